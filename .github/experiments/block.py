# SPDX-License-Identifier: MIT
"""What each departure from the paper's block gives on photographs, and what it costs.

    python .github/experiments/block.py --list
    python .github/experiments/block.py "ours, T 1" --seed 0 --data DIR
    python .github/experiments/block.py "paper, mean" --data DIR --probe 120
    python .github/experiments/block.py "half, heads of 32" --cost
    python .github/experiments/block.py --table

DIR: class folders as for train.py, 96 x 96 pixels; or "shapes", the built-in scenes, 48 x 48.  The tables in
EXPERIMENTS.md are of Imagenette and of shapes.  A nano classifier is trained with one thread, and a
JSON line per epoch goes to stdout and to block.jsonl beside this file: top-1 and loss on the validation
images, seconds of CPU time so far (training and loading, not validation), multiply-adds of an image.
Runs of one seed see the same images in the same order.  Images are decoded once, to
DIR-SPLIT-PIXELS.npy.  --probe looks at the clusters after so many steps, --cost measures a Tiny.
--table prints the last epoch of every run in block.jsonl, the lowest mean loss first.  Runs with a commit are of the
backbone of that commit: its stem, depths and head have changed since; check it out to repeat them.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from clusterformer import MAX_SCALE, ClusterBlock, ClusterFormer, InitialCenters, prenorm_mlp  # noqa: E402
from data import Folder, Shapes, eval_transform  # noqa: E402
from train import parameter_groups  # noqa: E402

SIZE, CACHED = 96, 128  # pixels per side: of training and validation, and of decoded training images


# --------------------------------------------------------------------------------------------------
# The block with everything that can be changed
# --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Options:
    """The defaults are the block of clusterformer.py.  A tuple holds a value per stage."""

    clusters: tuple = (True, True, True, True)  # False: the block without clustering and dispatching
    grid: tuple = (5, 5, 5, 5)  # sides of the grid of first centers, at most
    iterations: tuple = (3, 3, 3, 3)  # T
    head_dim: int = 32
    center_ffn: str = "residual"  # C(0) = pool + FFN(pool); "plain": FFN(pool); "none": pool
    scale: float = 10.0  # of the cosine, at the start
    similarity: str = "cosine"  # with a learned scale; "dot": q k; "scaled dot": q k / sqrt(d)
    full: bool = False  # q, k, v are D x D, not d x d in each head
    random: str = "qk"  # which of the projections q, k and v start at random; the others start as the identity
    alike: tuple = (True, False, False, False)  # q and k start as the identity in any case
    near: tuple = (False, False, False, False)  # the identity is added to random q and k
    exp_s: bool = True  # the M-step weights are M exp(S); False: M
    mean: bool = True  # the M-step takes a weighted mean; False: a sum
    residual: bool = True  # and adds it to C; False: replaces C
    interleave: bool = False  # it collects other channels than a head compares
    last_e_step: bool = True  # M(T) from C(T) is dispatched; False: M(T-1)
    dispatch: str = "inside"  # sum_k M MLP(C_k); "outside": MLP(sum_k M C_k); "paper": Eq. 6 with the cosine
    layer_scale: bool = False  # branches start scaled by 0.1; False: their last layers start at zero
    depthwise: bool = True
    local: tuple = (False, False, False, True)  # the depthwise convolution starts at zero
    token_ratio: tuple = (2, 2, 2, 2)  # hidden width of the MLP on tokens, in units of D; 0: no such MLP


OURS = Options()
MIXED = replace(OURS, local=(False,) * 4)
WIDE = replace(MIXED, head_dim=64, last_e_step=False, alike=(False,) * 4)
HALF = replace(WIDE, near=(True,) * 4)
FIRST = replace(WIDE, grid=(10, 10, 10, 10), random="", interleave=True)  # the block before these experiments
LEAN = replace(FIRST, grid=(5, 5, 5, 5), interleave=False, exp_s=False)
NEAR = replace(LEAN, head_dim=32, center_ffn="plain", similarity="scaled dot", last_e_step=True, dispatch="outside")
NEAR = replace(NEAR, token_ratio=(0, 0, 0, 0))
PAPER = replace(MIXED, center_ffn="plain", similarity="dot", full=True, random="qkv", alike=(False,) * 4, exp_s=False)
PAPER = replace(PAPER, mean=False, residual=False, dispatch="paper", grid=(10, 10, 10, 10))
PAPER = replace(PAPER, depthwise=False, token_ratio=(0, 0, 0, 0))  # the block as we read it, and nothing else
CHANGES = {
    "T 1": dict(iterations=(1, 1, 1, 1)),
    "GRID 5": dict(grid=(5, 5, 5, 5)),
    "GRID 5, T 1": dict(grid=(5, 5, 5, 5), iterations=(1, 1, 1, 1)),
    "GRID 10": dict(grid=(10, 10, 10, 10)),
    "clusters in stages 3, 4": dict(clusters=(False, False, True, True)),
    "near": dict(near=(True,) * 4, alike=(False,) * 4),
    "near in stage 1": dict(near=(True, False, False, False), alike=(False,) * 4),
    "not alike": dict(alike=(False,) * 4),
    "identity": dict(random=""),
    "identity, scale 3": dict(random="", scale=3.0),
    "random q, k": dict(random="qk"),
    "random v": dict(random="v"),
    "random q, k, v": dict(random="qkv"),
    "random q, k, v, weights M, not interleaved": dict(random="qkv", exp_s=False, interleave=False),
    "scaled dot product": dict(similarity="scaled dot"),
    "scaled dot product, random q, k": dict(similarity="scaled dot", random="qk"),
    "weights M": dict(exp_s=False),
    "weights M, not interleaved": dict(exp_s=False, interleave=False),
    "not interleaved": dict(interleave=False),
    "interleaved": dict(interleave=True),
    "replace": dict(residual=False),
    "replace, last E-step": dict(residual=False, last_e_step=True),
    "last E-step": dict(last_e_step=True),
    "full projections": dict(full=True),
    "heads of 32": dict(head_dim=32),
    "plain center FFN": dict(center_ffn="plain"),
    "no center FFN": dict(center_ffn="none"),
    "MLP outside": dict(dispatch="outside"),
    "MLP outside, no MLP on tokens": dict(dispatch="outside", token_ratio=(0, 0, 0, 0)),
    "layer scale": dict(layer_scale=True),
    "no depthwise convolution": dict(depthwise=False),
    "mean": dict(mean=True),
    "residual": dict(residual=True),
    "mean, residual": dict(mean=True, residual=True),
    "mean, residual, cosine": dict(mean=True, residual=True, similarity="cosine"),
    "mean, scaled dot product": dict(mean=True, similarity="scaled dot"),
}
VARIANTS = {"no clusters": replace(MIXED, clusters=(False, False, False, False))}
BASES = dict(ours=OURS, mixed=MIXED, wide=WIDE, half=HALF, first=FIRST, lean=LEAN, near=NEAR, paper=PAPER)
for name, base in BASES.items():
    VARIANTS |= {name: base} | {f"{name}, {change}": replace(base, **values) for change, values in CHANGES.items()}


def mlp(dim, ratio, plain=False):
    """prenorm_mlp, or the same with neither norm nor zero start."""
    layers = prenorm_mlp(dim, ratio)
    if plain:
        layers[0] = nn.Identity()
        layers[-1].reset_parameters()
    return layers


class Block(nn.Module):
    """ClusterBlock with Options, for images of one size and without stochastic depth."""

    def __init__(self, dim, stage, options):
        super().__init__()
        self.options, self.on = options, options.clusters[stage]
        self.grid, self.iterations, ratio = options.grid[stage], options.iterations[stage], options.token_ratio[stage]
        if options.depthwise:
            self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
            if options.local[stage]:
                nn.init.zeros_(self.depthwise.weight)
        if self.on:
            self.norm = nn.LayerNorm(dim)
            self.heads = max(1, dim // options.head_dim)
            shape = (1, dim) if options.full else (self.heads, dim // self.heads)
            identity = torch.eye(shape[1]).expand(*shape, -1)
            drawn = [torch.randn(*shape, shape[1]) * shape[1] ** -0.5 for _ in options.random]
            drawn = [x + identity * (options.near[stage] and name != "v") for x, name in zip(drawn, options.random)]
            start = {name: identity.clone() for name in "qkv"}
            start |= {n: x for n, x in zip(options.random, drawn) if n == "v" or not options.alike[stage]}
            self.q, self.k, self.v = (nn.Parameter(start[name]) for name in "qkv")
            if options.similarity == "cosine":
                self.log_scale = nn.Parameter(torch.full((self.heads,), math.log(options.scale)))
            if options.center_ffn != "none":
                self.ffn = mlp(dim, 1, options.center_ffn == "plain")
            self.dispatch_mlp = mlp(dim, 2, options.dispatch == "paper")
        if ratio:
            self.mlp = mlp(dim, ratio)
        if options.layer_scale:
            self.gamma = nn.Parameter(torch.full((2, dim), 0.1))
            for branch in [self.dispatch_mlp] * self.on + [self.mlp]:
                branch[-1].reset_parameters()

    def project(self, x, weight):
        """(B, n, D) -> (h, B, n, d)."""
        if self.options.full:
            return (x @ weight[0]).unflatten(-1, (self.heads, -1)).permute(2, 0, 1, 3)
        x = x.unflatten(-1, (self.heads, -1)).permute(2, 0, 1, 3)
        return (x.flatten(1, 2) @ weight).unflatten(1, x.shape[1:3])

    def cluster(self, tokens):
        """tokens: (B, H, W, D).  Returns C(T), (B, K, D), and M, (h, B, N, K)."""
        options = self.options
        C = InitialCenters(tokens.shape[-1], self.grid, ffn=False)(tokens)
        if options.center_ffn != "none":
            C = self.ffn(C) + (C if options.center_ffn == "residual" else 0)
        tokens = tokens.flatten(1, 2)
        collected = tokens.unflatten(-1, (-1, self.heads)).mT.flatten(2) if options.interleave else tokens
        keys, values = self.project(tokens, self.k), self.project(collected, self.v)
        cosine = options.similarity == "cosine"
        if cosine:
            keys = F.normalize(keys, dim=-1)
            scale = self.log_scale.clamp(max=math.log(MAX_SCALE)).exp().view(-1, 1, 1, 1)
        else:
            scale = keys.shape[-1] ** -0.5 if options.similarity == "scaled dot" else 1.0
        for t in range(self.iterations + options.last_e_step):
            queries = self.project(C, self.q)
            S = keys @ (scale * (F.normalize(queries, dim=-1) if cosine else queries)).mT  # (h, B, N, K)
            log_M = S.log_softmax(-1)
            if t == self.iterations:
                break
            if options.mean:
                weights = (S + log_M if options.exp_s else log_M).softmax(-2)
            else:
                weights = (S + log_M if options.exp_s else log_M).exp()
            means = values.mT @ weights  # (h, B, d, K)
            means = means.permute(1, 3, 2, 0).flatten(2) if options.interleave else means.permute(1, 3, 0, 2).flatten(2)
            C = C + means if options.residual else means
        return C, log_M.exp()

    def dispatch(self, C, M, tokens):
        """What each token receives, (B, N, D)."""
        if self.options.dispatch == "paper":  # Eq. 6, with the cosine as the similarity
            sim = F.normalize(tokens.flatten(1, 2), dim=-1) @ F.normalize(C, dim=-1).mT  # (B, N, K)
            return self.dispatch_mlp(sim @ C / C.shape[1])
        inside = self.options.dispatch == "inside"
        heads = (self.dispatch_mlp(C) if inside else C).unflatten(-1, (self.heads, -1)).permute(2, 0, 1, 3)
        received = (M @ heads).permute(1, 2, 0, 3).flatten(2)
        return received if inside else self.dispatch_mlp(received)

    def forward(self, x):
        gamma = self.gamma if self.options.layer_scale else (1, 1)
        if self.options.depthwise:
            x = x + self.depthwise(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if self.on:
            tokens = self.norm(x)
            C, M = self.cluster(tokens)
            self.seen = C.detach(), M.detach()  # for probe()
            x = x + gamma[0] * self.dispatch(C, M, tokens).view_as(x)
        return x + gamma[1] * self.mlp(x) if hasattr(self, "mlp") else x


def build(options, classes, size="nano"):
    """A classifier.  Everything but its blocks is that of clusterformer.py."""
    model = ClusterFormer("cls", size, classes, iterations=options.iterations[-1])
    for stage, blocks in enumerate(model.backbone.stages):
        for i, block in enumerate(blocks):
            blocks[i] = Block(block.norm.normalized_shape[0], stage, options)
    return model


def check_against_module():
    """The default options compute what clusterformer.py computes."""
    theirs, ours = ClusterBlock(128, 4), Block(128, 0, OURS)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    theirs.cluster.log_scale.data.fill_(2.0)
    ours.load_state_dict(dict(zip(ours.state_dict(), map_names(theirs, ours))))
    x = torch.randn(2, 14, 9, 128)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def map_names(theirs, ours):
    """The values of a ClusterBlock in the order of a Block's state."""
    state = theirs.state_dict()
    old = dict(q="cluster.q", k="cluster.k", v="cluster.v", log_scale="cluster.log_scale", ffn="initial.ffn")
    old |= dict(dispatch_mlp="dispatch.mlp")
    for name in ours.state_dict():
        first, _, rest = name.partition(".")
        yield state[".".join(filter(None, [old.get(first, first), rest]))]


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------
def decoded(root, split):
    """Images, uint8 (n, 3, size, size), read from a file that is written once, and labels (n,)."""
    transform = eval_transform(SIZE) if split == "val" else v2.Compose([v2.Resize((CACHED, CACHED)), v2.PILToTensor()])
    dataset = Folder(root, split, transform)
    path = Path(f"{root}-{split}-{SIZE if split == 'val' else CACHED}.npy")
    if not path.exists():
        images = np.stack([dataset[0, i][0].numpy() for i in range(len(dataset))])
        part = path.with_suffix(".part")
        with open(part, "wb") as file:
            np.save(file, images)
        part.replace(path)
    labels = torch.tensor([dataset.images[i][1] for i in range(len(dataset))])
    return np.load(path, mmap_mode="r"), labels, dataset.classes


class Photographs:
    """Class folders, decoded once."""

    size, batch, rate = SIZE, 64, 2e-3

    def __init__(self, root, seed):
        self.images, self.labels, self.classes = decoded(root.rstrip("/"), "train")
        self.val_images, self.val_labels, _ = decoded(root.rstrip("/"), "val")
        self.length = len(self.labels)
        self.augment = v2.Compose([v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip()])

    def load(self, epoch, indices):
        return torch.stack([self.augment(torch.tensor(self.images[i])) for i in indices]), self.labels[indices]


class Scenes:
    """The built-in scenes, as train.py draws them."""

    size, batch, rate, length = 48, 32, 3e-3, 6500

    def __init__(self, root, seed):
        self.dataset, val = Shapes(self.length, self.size, seed, "train"), Shapes(2000, self.size, seed, "val")
        self.classes = val.classes
        scenes = [val[0, i] for i in range(len(val))]
        self.val_images = np.stack([image.numpy() for image, _ in scenes])
        self.val_labels = torch.tensor([label for _, label in scenes])

    def load(self, epoch, indices):
        images, labels = zip(*(self.dataset[epoch, i] for i in indices))
        return torch.stack(images), torch.tensor(labels)


def validate(model, images, labels):
    """Top-1 and cross-entropy."""
    model.eval()
    with torch.no_grad():
        parts = [torch.from_numpy(images[i : i + 64]).float() / 255 for i in range(0, len(images), 64)]
        logits = torch.cat([model(part)["logits"] for part in parts])
    model.train()
    return (logits.argmax(1) == labels).double().mean().item(), F.cross_entropy(logits, labels).item()


def probe(model, images, labels):
    """Print what the clusters of the first block of each stage are like, and the gradient of its queries.

    evenness: entropy of M over log K, 1 if every token belongs to all clusters alike, 0 if to one of them.
    spread: standard deviation over the centers of an image over that of all numbers in C(T); 0: all are equal.
    """
    model.zero_grad()
    F.cross_entropy(model(images)["logits"], labels).backward()
    for i, stage in enumerate(model.backbone.stages):
        if not stage[0].on:
            continue
        C, M = stage[0].seen
        evenness = torch.special.entr(M).sum(-1).mean() / math.log(M.shape[-1])
        spread, gradient = C.std(1).mean() / C.std(), stage[0].q.grad.norm()
        print(f"stage {i + 1}: evenness {evenness:.2f}, spread {spread:.2f}, gradient of q {gradient:.1e}")


def cost(options, rounds=5):
    """Print what a Tiny of these blocks costs beside torchvision's convnext_tiny, two images of 224 x 224.

    Times are CPU seconds of one thread, the least of some interleaved rounds.  Saved: what a forward pass
    keeps for the backward pass, without the parameters.
    """
    models = {"convnext_tiny": torchvision.models.convnext_tiny(), "Tiny": build(options, 1000, "tiny")}
    images, times = torch.rand(2, 3, 224, 224), {name: ([], []) for name in models}

    def loss(model):
        output = model(images)
        return (output if torch.is_tensor(output) else output["logits"]).square().mean()

    for _ in range(rounds):
        for name, model in models.items():
            start = time.process_time()
            with torch.no_grad():
                loss(model)
            middle = time.process_time()
            loss(model).backward()
            times[name][0].append(middle - start)
            times[name][1].append(time.process_time() - middle)
    own, saved = {p.untyped_storage().data_ptr() for p in models["Tiny"].parameters()}, {}
    pack = lambda x: saved.setdefault(x.untyped_storage().data_ptr(), x)  # kept, so that no address comes twice
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss(models["Tiny"])
    size = sum(x.untyped_storage().nbytes() for at, x in saved.items() if at not in own) / 2
    forward, training = (min(ours) / min(peer) for peer, ours in zip(times["convnext_tiny"], times["Tiny"]))
    line = f"forward {forward:.2f}, training {training:.2f} of convnext_tiny's time; saved {size / 2**20:.0f} MiB an image"
    print(f"{line}; {sum(p.numel() for p in models['Tiny'].parameters()) / 1e6:.1f} M parameters")


def print_table():
    last, rows = {}, {}
    for line in map(json.loads, open(Path(__file__).with_suffix(".jsonl"))):
        if line["epoch"] == line["epochs"]:
            last[line.get("commit", ""), line["data"], line["epochs"], line["variant"], line["seed"]] = line
    for (*key, _), line in last.items():
        rows.setdefault(tuple(key), []).append(line)
    print("| commit | data | epochs | block | seeds | top-1 % | loss | CPU s | M multiply-adds | M parameters |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    mean = lambda lines, key: sum(line[key] for line in lines) / len(lines)
    for key, lines in sorted(rows.items(), key=lambda row: (*row[0][:3], mean(row[1], "loss"))):
        seeds = ", ".join(sorted(str(line["seed"]) for line in lines))
        quality = f"{100 * mean(lines, 'top1'):.1f} | {mean(lines, 'loss'):.3f}"
        cost = f"{mean(lines, 'cpu_s'):.0f} | {lines[0]['macs'] / 1e6:.0f} | {lines[0]['parameters'] / 1e6:.2f}"
        print("|", *(f"{x} |" for x in (*key, seeds)), f"{quality} | {cost} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", nargs="?", choices=VARIANTS, metavar="VARIANT")
    parser.add_argument("--list", action="store_true", help="print the names of the variants")
    parser.add_argument("--probe", type=int, metavar="STEPS", help="look at the clusters after STEPS steps, and end")
    parser.add_argument("--cost", action="store_true", help="time and memory of a Tiny of these blocks")
    parser.add_argument("--table", action="store_true", help="print the results in block.jsonl")
    parser.add_argument("--data", help="class folders, or shapes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=4)
    args = parser.parse_args()
    if args.list:
        return print(*VARIANTS, sep="\n")
    if args.table:
        return print_table()
    if not args.variant or not (args.data or args.cost):
        parser.error("give a VARIANT, see --list, and --data DIR")
    torch.set_num_threads(1)
    check_against_module()
    if args.cost:
        return cost(VARIANTS[args.variant])
    data = (Scenes if args.data == "shapes" else Photographs)(args.data, args.seed)
    torch.manual_seed(args.seed)
    model = build(VARIANTS[args.variant], len(data.classes))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, data.size, data.size))
    macs = counter.get_total_flops() // 2
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05, 1.0), lr=data.rate)
    cpu, step, steps = 0.0, 0, args.epochs * (data.length // data.batch)
    for epoch in range(args.epochs):
        start, losses = time.process_time(), []
        torch.manual_seed(1000 * (args.seed + 1) + epoch)  # the same images for every variant
        for indices in torch.randperm(data.length)[: data.length // data.batch * data.batch].view(-1, data.batch):
            if step == args.probe:
                return probe(model, torch.tensor(data.val_images[::61]).float() / 255, data.val_labels[::61])
            images, labels = data.load(epoch, indices.tolist())
            rate = data.rate * min((step + 1) / (0.05 * steps), 0.5 + 0.5 * math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = F.cross_entropy(model(images.float() / 255)["logits"], labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            losses.append(loss.item())
            step += 1
        cpu += time.process_time() - start
        top1, val_loss = validate(model, data.val_images, data.val_labels)
        line = dict(data=Path(args.data).name, variant=args.variant, seed=args.seed, epochs=args.epochs)
        line |= dict(epoch=epoch + 1, top1=round(top1, 4), loss=round(val_loss, 4))
        line |= dict(train_loss=round(float(np.mean(losses)), 4), cpu_s=round(cpu), macs=macs)
        line |= dict(parameters=sum(p.numel() for p in model.parameters()))
        print(json.dumps(line), flush=True)
        with open(Path(__file__).with_suffix(".jsonl"), "a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
