# SPDX-License-Identifier: MIT
"""Train a ClusterFormer.

    torchrun train.py --task cls                                                    built-in shapes, a few minutes on a CPU
    torchrun train.py --task cls --data DIR --out runs/mine                         own images, DIR/{train,val}/<class>/
    torchrun --nproc_per_node=8 train.py --task cls --data IMAGENET_DIR             the paper's recipe, one machine, 8 GPUs
    torchrun train.py --task cls --data IMAGENET_DIR --accumulate 8                 the same batch of 1024 on one GPU
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        train.py --task cls --data IMAGENET_DIR                                     typed on both of two machines

Left out flags take their value from the recipe of the data.  The run leaves OUT/last.pt, OUT/best.pt, OUT/log.jsonl (a
line an epoch) and OUT/metrics.json, and goes on from OUT/last.pt with --resume.
"""

import argparse
import contextlib
import copy
import json
import math
import os
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

from clusterformer import VARIANTS, ClusterFormer, load_checkpoint
from data import Folder, GlobalBatches, InputError, Shapes, mix, train_transform
from eval import default_workers, evaluate, run, start_processes, validation_set

# flag: (shapes, folder, smallest value, explanation)
RECIPES = {
    "variant": ("nano", "tiny", None, "size of the model: " + ", ".join(VARIANTS)),
    "patch_size": (4, 4, None, "pixels a side of the smallest token: 4, or 2 for images of about 32 pixels"),
    "image_size": (48, 224, 32, "pixels a side of training and evaluation images"),
    "epochs": (4, 300, 1, "passes over the training images; on shapes 6,500 new scenes each"),
    "batch_size": (32, 1024, 1, "images per optimizer step, over all processes"),
    "lr": (3e-3, 1e-3, 0.0, "peak learning rate; the default is scaled in proportion to --batch-size"),
    "warmup_epochs": (0.3, 20.0, 0.0, "epochs over which the learning rate rises; after them it falls as a cosine"),
    "weight_decay": (0.05, 0.05, 0.0, "of matrices and convolutions; norms, biases, scales and temperatures have none"),
    "clip": (5.0, 5.0, 0.0, "gradients are scaled down to this norm; 0: never"),
    "drop_path": (0.0, None, 0.0, "stochastic depth of the last block; folder: 0.2 for tiny, 0.3 for small"),
    "smoothing": (0.0, 0.1, 0.0, "label smoothing"),
    "mixup": (0.0, 0.8, 0.0, "alpha of mixup; 0: none"),
    "cutmix": (0.0, 1.0, 0.0, "alpha of cutmix; 0: none"),
    "randaugment": (0, 27, 0, "magnitude of RandAugment, of 0 to 30 (27 is the usual 9 of 10); 0: none"),
    "erasing": (0.0, 0.25, 0.0, "probability of erasing a rectangle"),
    "ema": (0.995, 0.9999, 0.0, "decay of the averaged weights, reached gradually; they are what is evaluated"),
}
DROP_PATH = {"nano": 0.0, "tiny": 0.2, "small": 0.3}
BELOW_ONE = ("drop_path", "smoothing", "ema")


def parse_settings():
    """Flags over recipe (or over the settings of the run that is resumed), checked.  Returns a dictionary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("--task", choices=["cls"], default="cls", help="cls: classification (default: cls)")
    parser.add_argument("--data", metavar="DIR", help="folder with train/<class>/ and val/<class>/ (default: draw shapes)")
    parser.add_argument("--out", metavar="DIR", help="where checkpoints and log go (default: runs/TASK)")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/last.pt, with its settings")
    parser.add_argument("--init", metavar="FILE", help="start from the weights of this checkpoint, as far as they fit")
    parser.add_argument("--accumulate", type=int, help="chunks that a process's share of a batch is cut into (default: 1)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model: slow to start, then faster")
    parser.add_argument("--workers", type=int, help="loader processes per process (default: spare cores, 16 at most)")
    parser.add_argument("--seed", type=int, help="of initial weights, order and augmentation (default: 0)")
    recipe = parser.add_argument_group("recipe")
    for name, (shapes, folder, _, text) in RECIPES.items():
        default = f"default: {shapes}" if shapes == folder else f"default: shapes {shapes}, folder {folder}"
        default = default if folder is not None else f"default: shapes {shapes}"
        recipe.add_argument("--" + name.replace("_", "-"), type=type(shapes), help=f"{text} ({default})".replace("%", "%%"))
    flags = vars(parser.parse_args())

    flags.setdefault("out", os.path.join("runs", flags["task"]))
    last = os.path.join(flags["out"], "last.pt")
    base = {}
    if flags.get("resume") and os.path.exists(last):
        base = read_checkpoint(last)[1]["settings"]
    elif os.path.exists(last) and not flags.get("resume"):
        raise InputError(f"{last} exists: --resume goes on with that run, --out DIR starts another one elsewhere")
    data = flags.get("data", base.get("data"))
    column = 0 if data is None else 1
    defaults = {name: row[column] for name, row in RECIPES.items()}
    defaults |= dict(data=None, resume=False, init=None, accumulate=1, compile=False, workers=default_workers(), seed=0)
    settings = defaults | base | {"resume": False} | flags
    if settings["variant"] not in VARIANTS:
        raise InputError(f"--variant must be one of {', '.join(VARIANTS)}, got {settings['variant']}")
    if settings["patch_size"] not in (2, 4):
        raise InputError(f"--patch-size must be 2 or 4, got {settings['patch_size']}")
    if settings["drop_path"] is None:
        settings["drop_path"] = DROP_PATH[settings["variant"]]
    minimum = {name: row[2] for name, row in RECIPES.items()} | {"accumulate": 1, "workers": 0, "seed": 0}
    for name, least in minimum.items():
        value, flag = settings[name], "--" + name.replace("_", "-")
        if least is not None and not (least <= value < math.inf):  # NaN fails too
            raise InputError(f"{flag} must be at least {least}, got {value}")
        if name in BELOW_ONE and value >= 1 or name == "erasing" and value > 1 or name == "randaugment" and value > 30:
            raise InputError(f"{flag} must be {'at most 30' if name == 'randaugment' else 'below 1'}, got {value}")
    if "lr" not in flags and "lr" not in base:
        settings["lr"] *= settings["batch_size"] / RECIPES["batch_size"][column]
    return settings


def read_checkpoint(path):
    try:
        return load_checkpoint(path)
    except ValueError as error:
        raise InputError(str(error)) from error


def training_set(settings):
    if settings["data"] is None:
        return Shapes(6_500, settings["image_size"], settings["seed"], "train")
    transform = train_transform(settings["image_size"], settings["randaugment"], settings["erasing"])
    return Folder(settings["data"], "train", transform, settings["seed"])


def take_weights(model, path):
    """Loads what fits by name and shape from a checkpoint's averaged weights, and says what did not."""
    theirs, ours = read_checkpoint(path)[1]["ema"], model.state_dict()
    fitting = {name: value for name, value in theirs.items() if name in ours and value.shape == ours[name].shape}
    if not any(name.startswith("backbone.stages") for name in fitting):
        raise InputError(f"{path}: no weight of its backbone fits this model; give the --variant it was trained with")
    model.load_state_dict(fitting, strict=False)
    left = sorted(ours.keys() - fitting.keys())
    print(f"{path}: took {len(fitting)} of {len(ours)} tensors" + (f"; new: {', '.join(left)}" if left else ""))


def parameter_groups(model, weight_decay):
    """Decay pulls matrices and kernels; a norm, bias, scale or temperature of zero would mean something else."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    return [dict(params=matrices, weight_decay=weight_decay), dict(params=vectors, weight_decay=0.0)]


def assign(cost):
    """The cheapest way to give every row a column of its own, by shortest augmenting paths (Jonker, Volgenant, 1987).

    cost: float64 NumPy (n, m), n <= m.  Returns the columns of the rows, int64 (n,).
    Rows are targets, of which an image has a few; so the loop is over rows, and NumPy does a row of columns at a time.
    """
    n, m = cost.shape
    if not np.isfinite(cost).all():
        return np.arange(n)  # whatever it is: the loss will not be finite either
    row_price, column_price = np.zeros(n), np.zeros(m)
    owner = np.full(m, -1)  # the row that has each column
    for row in range(n):
        distance, before, done = np.full(m, np.inf), np.full(m, -1), np.zeros(m, bool)
        column, at, travelled = -1, row, 0.0
        while True:  # Dijkstra's search for the nearest free column; stepping onto a taken one goes on from its owner
            step = travelled + cost[at] - row_price[at] - column_price
            nearer = ~done & (step < distance)
            distance[nearer], before[nearer] = step[nearer], column
            column = int(np.where(done, np.inf, distance).argmin())
            done[column], travelled, at = True, distance[column], owner[column]
            if at < 0:
                break
        passed = done & (distance < travelled)
        row_price[row] += travelled
        row_price[owner[passed]] += travelled - distance[passed]
        column_price[passed] += distance[passed] - travelled
        while column >= 0:  # everyone on the path moves on by one
            previous = before[column]
            owner[column] = row if previous < 0 else owner[previous]
            column = previous
    columns = np.full(n, -1)
    columns[owner[owner >= 0]] = np.flatnonzero(owner >= 0)
    return columns


def learning_rate(step, steps, warmup_steps, peak):
    """Linear warm-up, then half a cosine down to zero."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def save(value, path):
    """Writes beside the file and renames: whoever reads it sees the old one or the new one, never half of one."""
    torch.save(value, path + ".part")
    os.replace(path + ".part", path)


def main():
    settings = parse_settings()
    rank, world_size, device = start_processes()
    train = training_set(settings)
    val = validation_set(settings["data"], settings["image_size"], train.classes)
    num_classes, out = len(train.classes), settings["out"]
    steps_per_epoch = max(1, len(train) // settings["batch_size"])
    steps = settings["epochs"] * steps_per_epoch
    mixing = settings["mixup"] > 0 or settings["cutmix"] > 0

    torch.manual_seed(settings["seed"])
    model = ClusterFormer(
        settings["task"],
        settings["variant"],
        num_classes,
        patch_size=settings["patch_size"],
        drop_path=settings["drop_path"],
    )
    first_step, best = 0, -1.0
    checkpoint = None
    if settings["resume"] and os.path.exists(os.path.join(out, "last.pt")):
        checkpoint = read_checkpoint(os.path.join(out, "last.pt"))[1]
        if list(checkpoint["classes"]) != list(train.classes):
            raise InputError(f"{out}/last.pt is of a run on {len(checkpoint['classes'])} other classes; give its --data")
        model.load_state_dict(checkpoint["model"])
        first_step, best = checkpoint["step"], checkpoint["best"]
    elif settings["init"]:
        take_weights(model, settings["init"])
    model.to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(parameter_groups(model, settings["weight_decay"]), fused=True)
    if checkpoint:
        ema.load_state_dict(checkpoint["ema"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    runner = torch.compile(model) if settings["compile"] else model
    if world_size > 1:
        runner = DistributedDataParallel(runner, device_ids=[device.index] if device.type == "cuda" else None)

    batches = GlobalBatches(
        len(train), settings["batch_size"], steps, settings["seed"], rank, world_size, settings["accumulate"], mixing, first_step
    )
    loader = DataLoader(
        train,
        batch_sampler=batches,
        num_workers=settings["workers"],
        pin_memory=device.type == "cuda",
    )
    if rank == 0:
        os.makedirs(out, exist_ok=True)
        size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        print(
            f"{settings['variant']}, {size:.1f} M parameters, {num_classes} classes; "
            f"{len(train)} training and {len(val)} validation images of {settings['image_size']} x {settings['image_size']} "
            f"from {settings['data'] or 'shapes'}; {steps} steps of {settings['batch_size']} images on {world_size} x {device.type}"
        )
    chunks, bar = iter(loader), tqdm(total=steps, initial=first_step, disable=True if rank else None)
    loss_sum, epoch_start, images_seen, metrics = torch.zeros(2, device=device), time.time(), 0, None
    for step in range(first_step, steps):
        lr = learning_rate(step, steps, settings["warmup_epochs"] * steps_per_epoch, settings["lr"])
        for group in optimizer.param_groups:
            group["lr"] = lr
        # Stochastic depth, too, is a function of the step, so that a resumed run continues as if never stopped.
        torch.manual_seed(int(np.random.SeedSequence((settings["seed"], step, rank)).generate_state(1)[0]))
        for chunk in range(settings["accumulate"]):
            images, targets = next(chunks)
            images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            if mixing:
                images, targets = mix(
                    images, targets, num_classes, settings["mixup"], settings["cutmix"], settings["seed"], step
                )
            # Gradients travel between processes once a step, with the last chunk.
            waits = world_size > 1 and chunk < settings["accumulate"] - 1
            with runner.no_sync() if waits else contextlib.nullcontext():
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    logits = runner(images)["logits"]
                loss = F.cross_entropy(logits.float(), targets, label_smoothing=settings["smoothing"])
                (loss / settings["accumulate"]).backward()
            loss_sum += torch.stack([loss.detach(), torch.ones_like(loss)])
        if settings["clip"]:
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings["clip"])
        optimizer.step()
        optimizer.zero_grad()
        # The average forgets its start: after few steps it looks back over few steps.
        decay = min(settings["ema"], (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(list(ema.parameters()), list(model.parameters()), None)
        images_seen += settings["batch_size"]

        bar.update()
        if step % 10 == 0 and not bar.disable:  # reading the loss waits for the GPU
            speed = images_seen / (time.time() - epoch_start)
            bar.set_postfix(loss=f"{loss_sum[0] / loss_sum[1]:.3f}", lr=f"{lr:.1e}", images_per_s=f"{speed:.0f}")

        if (step + 1) % steps_per_epoch == 0:
            epoch = (step + 1) // steps_per_epoch
            seconds = time.time() - epoch_start
            metrics = evaluate(ema, val, device, settings["batch_size"] // world_size, settings["workers"])
            if world_size > 1:
                dist.all_reduce(loss_sum)
            if rank == 0:
                line = dict(epoch=epoch, step=step + 1, loss=(loss_sum[0] / loss_sum[1]).item(), lr=lr)
                line |= metrics | dict(images_per_second=images_seen / seconds, seconds=seconds)
                with open(os.path.join(out, "log.jsonl"), "a") as file:
                    file.write(json.dumps(line) + "\n")
                improved, best = metrics["top1"] > best, max(best, metrics["top1"])
                state = dict(model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict())
                state |= dict(step=step + 1, epoch=epoch, best=best, settings=settings, classes=list(train.classes))
                save(state, os.path.join(out, "last.pt"))
                if improved:
                    save(state, os.path.join(out, "best.pt"))
                tqdm.write(
                    f"epoch {epoch}/{settings['epochs']}  loss {line['loss']:.3f}  top-1 {metrics['top1']:.2%}  "
                    f"top-5 {metrics['top5']:.2%}  {line['images_per_second']:.0f} images/s"
                )
            loss_sum, epoch_start, images_seen = torch.zeros(2, device=device), time.time(), 0
    bar.close()
    if metrics is None:  # --resume of a finished run
        metrics = evaluate(ema, val, device, settings["batch_size"] // world_size, settings["workers"])
    if rank == 0:
        with open(os.path.join(out, "metrics.json"), "w") as file:
            json.dump(metrics, file, indent=2)
        print(f"top-1 {metrics['top1']:.2%}, top-5 {metrics['top5']:.2%} of {metrics['images']} images that it never saw")
        print(f"python eval.py --checkpoint {os.path.join(out, 'last.pt')}")


if __name__ == "__main__":
    run(main)
