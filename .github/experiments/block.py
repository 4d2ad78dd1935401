# SPDX-License-Identifier: MIT
"""What each departure from the paper's block gives on photographs, and what it costs.

    python .github/experiments/block.py --list
    python .github/experiments/block.py "ours, T 1" --seed 0 --data DIR
    python .github/experiments/block.py "paper, mean" --data DIR --probe 120
    python .github/experiments/block.py "ours, full projections" --cost
    python .github/experiments/block.py --table

DIR: class folders as for train.py; the tables in EXPERIMENTS.md are of Imagenette.  A nano classifier is trained on
96 x 96 pixels with one thread, and a JSON line per epoch goes to stdout and to block.jsonl beside this file: top-1
and loss on the validation images, seconds of CPU time so far (training and loading, not validation), multiply-adds
of an image.  Runs of one seed see the same images in the same order.  Images are decoded once, to
DIR-SPLIT-PIXELS.npy.  --probe looks at the clusters after so many steps, --cost measures a Tiny.
--table prints the last epochs of block.jsonl: a line per variant, and the paired differences from "ours".
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
from clusterformer import HEAD_DIM, MAX_SCALE, ClusterBlock, ClusterFormer, InitialCenters, prenorm_mlp  # noqa: E402
from data import Folder, eval_transform  # noqa: E402
from train import parameter_groups  # noqa: E402

SIZE, CACHED = 96, 128  # pixels per side: of training and validation, and of decoded training images
BATCH, RATE = 64, 2e-3


# --------------------------------------------------------------------------------------------------
# The block with everything that can be changed
# --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Options:
    """The defaults are the block of clusterformer.py."""

    clusters: bool = True  # False: the block without clustering and dispatching
    grid: int = 5  # sides of the grid of first centers, at most
    iterations: int = 3  # T
    residual_ffn: bool = True  # C(0) = pool + FFN(pool); False: FFN(pool)
    similarity: str = "cosine"  # with a learned scale; "dot": q k; "scaled dot": q k / sqrt(d)
    full: bool = False  # q, k, v are D x D, not d x d in each head
    random: str = "qk"  # which of the projections q, k and v start at random; the others start as the identity
    alike: bool = True  # in stage 1, q and k start as the identity in any case
    exp_s: bool = True  # the M-step weights are M exp(S); False: M
    mean: bool = True  # the M-step takes a weighted mean; False: a sum
    residual: bool = True  # and adds it to C; False: replaces C
    eq_6: bool = False  # dispatching by the paper's Eq. 6, with the cosine; False: sum_k M MLP(C_k)
    depthwise: bool = True  # a convolution, which in stage 4 starts at zero
    token_mlp: bool = True


OURS = Options()
PAPER = Options(
    grid=10, residual_ffn=False, similarity="dot", full=True, random="qkv", alike=False, exp_s=False, mean=False,
    residual=False, eq_6=True, depthwise=False, token_mlp=False,
)  # fmt: skip
VARIANTS = {  # the paper's block is as we read it, and nothing else
    "ours": OURS,
    "ours, T 1": replace(OURS, iterations=1),
    "ours, 100 centers": replace(OURS, grid=10),
    "ours, identity": replace(OURS, random=""),
    "ours, all random": replace(OURS, alike=False),
    "ours, weights M": replace(OURS, exp_s=False),
    "ours, scaled dot product": replace(OURS, similarity="scaled dot"),
    "ours, replace": replace(OURS, residual=False),
    "ours, full projections": replace(OURS, full=True),
    "no clusters": replace(OURS, clusters=False),
    "paper": PAPER,
    "paper, mean": replace(PAPER, mean=True),
    "paper, mean, residual": replace(PAPER, mean=True, residual=True),
    "paper, mean, residual, cosine": replace(PAPER, mean=True, residual=True, similarity="cosine"),
    "paper, mean, scaled dot product": replace(PAPER, mean=True, similarity="scaled dot"),
}


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
        self.options = options
        if options.depthwise:
            self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
            if stage == 3:
                nn.init.zeros_(self.depthwise.weight)
        if options.clusters:
            self.norm = nn.LayerNorm(dim)
            self.heads = dim // HEAD_DIM
            shape = (1, dim) if options.full else (self.heads, HEAD_DIM)
            drawn = {name: torch.randn(*shape, shape[1]) * shape[1] ** -0.5 for name in options.random}
            kept = () if options.alike and stage == 0 else "qk"
            start = {name: x for name, x in drawn.items() if name == "v" or name in kept}
            identity = torch.eye(shape[1]).expand(*shape, -1)
            self.q, self.k, self.v = (nn.Parameter(start.get(name, identity.clone())) for name in "qkv")
            if options.similarity == "cosine":
                self.log_scale = nn.Parameter(torch.full((self.heads,), math.log(10.0)))
            self.ffn = mlp(dim, 1, not options.residual_ffn)
            self.dispatch_mlp = mlp(dim, 2, options.eq_6)
        if options.token_mlp:
            self.mlp = mlp(dim, 2)

    def project(self, x, weight):
        """(B, n, D) -> (h, B, n, d)."""
        if self.options.full:
            return (x @ weight[0]).unflatten(-1, (self.heads, -1)).permute(2, 0, 1, 3)
        x = x.unflatten(-1, (self.heads, -1)).permute(2, 0, 1, 3)
        return (x.flatten(1, 2) @ weight).unflatten(1, x.shape[1:3])

    def cluster(self, tokens):
        """tokens: (B, H, W, D).  Returns C(T), (B, K, D), and M, (h, B, N, K)."""
        options = self.options
        C = InitialCenters(tokens.shape[-1], options.grid, ffn=False)(tokens)
        C = self.ffn(C) + (C if options.residual_ffn else 0)
        tokens = tokens.flatten(1, 2)
        keys, values = self.project(tokens, self.k), self.project(tokens, self.v)
        cosine = options.similarity == "cosine"
        if cosine:
            keys = F.normalize(keys, dim=-1)
            scale = self.log_scale.clamp(max=math.log(MAX_SCALE)).exp().view(-1, 1, 1, 1)
        else:
            scale = keys.shape[-1] ** -0.5 if options.similarity == "scaled dot" else 1.0
        for t in range(options.iterations + 1):
            queries = self.project(C, self.q)
            S = keys @ (scale * (F.normalize(queries, dim=-1) if cosine else queries)).mT  # (h, B, N, K)
            log_M = S.log_softmax(-1)
            if t == options.iterations:
                return C, log_M.exp()
            weights = S + log_M if options.exp_s else log_M
            weights = weights.softmax(-2) if options.mean else weights.exp()
            means = (values.mT @ weights).permute(1, 3, 0, 2).flatten(2)
            C = C + means if options.residual else means

    def dispatch(self, C, M, tokens):
        """What each token receives, (B, N, D)."""
        if self.options.eq_6:
            sim = F.normalize(tokens.flatten(1, 2), dim=-1) @ F.normalize(C, dim=-1).mT  # (B, N, K)
            return self.dispatch_mlp(sim @ C / C.shape[1])
        heads = self.dispatch_mlp(C).unflatten(-1, (self.heads, -1)).permute(2, 0, 1, 3)
        return (M @ heads).permute(1, 2, 0, 3).flatten(2)

    def forward(self, x):
        if self.options.depthwise:
            x = x + self.depthwise(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if self.options.clusters:
            tokens = self.norm(x)
            C, M = self.cluster(tokens)
            self.seen = C.detach(), M.detach()  # for probe()
            x = x + self.dispatch(C, M, tokens).view_as(x)
        return x + self.mlp(x) if self.options.token_mlp else x


def build(options, classes, size="nano"):
    """A classifier.  Everything but its blocks is that of clusterformer.py."""
    model = ClusterFormer("cls", size, classes, iterations=options.iterations)
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
    """Images, uint8 (n, 3, size, size), read from a file that is written once; labels (n,); number of classes."""
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
    return torch.from_numpy(np.load(path)), labels, len(dataset.classes)


def validate(model, images, labels):
    """Top-1 and cross-entropy."""
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(part.float() / 255)["logits"] for part in images.split(BATCH)])
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
    print(f"forward {forward:.2f}, training {training:.2f} of convnext_tiny's time; saved {size / 2**20:.0f} MiB an image")
    print(f"{sum(p.numel() for p in models['Tiny'].parameters()) / 1e6:.1f} M parameters")


def print_table():
    """A line per set and variant: means over seeds; differences from "ours", paired by seed, with standard errors."""
    rows = {}
    for line in map(json.loads, open(Path(__file__).with_suffix(".jsonl"))):
        if line["epoch"] == line["epochs"]:
            rows.setdefault((line["set"], line["variant"]), {})[line["seed"]] = line
    mean = lambda runs, key: np.mean([line[key] for line in runs.values()])
    print("| set | epochs | block | seeds | top-1 % | less ours | loss | less ours | CPU s | M MACs | M weights |")
    print("|" + " --- |" * 11)
    for (name, variant), runs in sorted(rows.items(), key=lambda row: (row[0][0], mean(row[1], "loss"))):
        first, base = runs[min(runs)], rows.get((name, "ours"), {})
        cells = [name, first["epochs"], variant, ", ".join(map(str, sorted(runs)))]
        for key, scale, digits in ("top1", 100, 1), ("loss", 1, 3):
            less = [scale * (runs[seed][key] - base[seed][key]) for seed in runs.keys() & base.keys()]
            cells.append(f"{scale * mean(runs, key):.{digits}f}")
            some = variant != "ours" and len(less) > 1
            error = np.std(less, ddof=1) / len(less) ** 0.5 if some else 0
            cells.append(f"{np.mean(less):+.{digits}f} ± {error:.{digits}f}" if some else "")
        cells += [f"{mean(runs, 'cpu_s'):.0f}", f"{first['macs'] / 1e6:.0f}", f"{first['parameters'] / 1e6:.2f}"]
        print("|", *(f"{cell} |" for cell in cells))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", nargs="?", choices=VARIANTS, metavar="VARIANT")
    parser.add_argument("--list", action="store_true", help="print the names of the variants")
    parser.add_argument("--probe", type=int, metavar="STEPS", help="look at the clusters after STEPS steps, and end")
    parser.add_argument("--cost", action="store_true", help="time and memory of a Tiny of these blocks")
    parser.add_argument("--table", action="store_true", help="print the results in block.jsonl")
    parser.add_argument("--data", help="class folders")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--set", default="screen", help="name of the runs that are compared, in block.jsonl")
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
    images, labels, classes = decoded(args.data.rstrip("/"), "train")
    held_out, held_out_labels, _ = decoded(args.data.rstrip("/"), "val")
    augment = v2.Compose([v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip()])
    torch.manual_seed(args.seed)
    model = build(VARIANTS[args.variant], classes)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, SIZE, SIZE))
    macs = counter.get_total_flops() // 2
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05, 1.0), lr=RATE)
    cpu, step, steps = 0.0, 0, args.epochs * (len(images) // BATCH)
    for epoch in range(args.epochs):
        start, losses = time.process_time(), []
        torch.manual_seed(1000 * (args.seed + 1) + epoch)  # the same images for every variant
        for chosen in torch.randperm(len(images)).split(BATCH)[: len(images) // BATCH]:
            if step == args.probe:
                return probe(model, held_out[::61].float() / 255, held_out_labels[::61])
            batch = torch.stack([augment(images[i]) for i in chosen]).float() / 255
            rate = RATE * min((step + 1) / (0.05 * steps), 0.5 + 0.5 * math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = F.cross_entropy(model(batch)["logits"], labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            losses.append(loss.item())
            step += 1
        cpu += time.process_time() - start
        top1, val_loss = validate(model, held_out, held_out_labels)
        line = dict(set=args.set, data=Path(args.data).name, variant=args.variant, seed=args.seed, epochs=args.epochs)
        line |= dict(epoch=epoch + 1, top1=round(top1, 4), loss=round(val_loss, 4))
        line |= dict(train_loss=round(float(np.mean(losses)), 4), cpu_s=round(cpu), macs=macs)
        line |= dict(parameters=sum(p.numel() for p in model.parameters()))
        print(json.dumps(line), flush=True)
        with open(Path(__file__).with_suffix(".jsonl"), "a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
