# SPDX-License-Identifier: MIT
"""Train a ClusterFormer.

    torchrun train.py --task cls                                                    built-in shapes, a few minutes on a CPU
    torchrun train.py --task det                                                    boxes; inst: and masks; sem, pan: maps
    torchrun train.py --task cls --data DIR --out runs/mine                         own images, DIR/{train,val}/<class>/
    torchrun train.py --task inst --data DIR --init CHECKPOINT                      own objects, in COCO's layout
    torchrun --nproc_per_node=8 train.py --task cls --data IMAGENET_DIR             the paper's recipe, one machine, 8 GPUs
    torchrun train.py --task cls --data IMAGENET_DIR --accumulate 8                 the same batch of 1024 on one GPU
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        train.py --task cls --data IMAGENET_DIR                                     typed on both of two machines

    torchrun --nproc_per_node=8 train.py --task inst --data COCO_DIR --init CHECKPOINT     det, pan alike
    torchrun --nproc_per_node=8 train.py --task sem --data ADE_DIR --init CHECKPOINT

Left out flags take their value from the recipe of the data.  The run leaves OUT/last.pt, OUT/best.pt, OUT/log.jsonl (a
line an epoch) and OUT/metrics.json.  Stopped at any moment, in whatever way, it goes on from OUT/last.pt with --resume,
and ends with the weights of a run that was never stopped.
"""

import argparse
import contextlib
import copy
import json
import math
import os
import signal
import sys
import time
from collections import Counter

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from clusterformer import TASKS, VARIANTS, VERSION, ClusterFormer
from data import (
    Ade,
    Coco,
    Folder,
    GlobalBatches,
    InputError,
    Shapes,
    SkipBroken,
    as_float,
    check,
    collate,
    dense_train_transform,
    ignore_signals,
    loader_of,
    mix,
    train_transform,
)
from eval import METRIC, default_workers, describe, evaluate, load_checkpoint, run, start_processes, validation_set

# flag: (cls on shapes, cls, dense tasks on shapes, COCO, ADE20K, smallest value, explanation)
RECIPES = {
    "variant": ("nano", "tiny", "nano", "tiny", "tiny", None, "size of the model: " + ", ".join(VARIANTS)),
    "iterations": (3, 3, 3, 3, 3, 1, "T, EM iterations of each clustering"),
    "patch_size": (4, 4, 4, 4, 4, None, "pixels a side of the smallest token: 4, or 2 for images of about 32 pixels"),
    "image_size": (48, 224, 96, 1024, 512, 32, "pixels a side of training images; of larger ones, dense tasks see a part"),
    "test_size": (None, None, None, 800, 512, 32, "dense tasks on files: pixels of the short side in evaluation"),
    "epochs": (4, 300, 4, 50, 127, 1, "passes over the training images; of shapes, 6,500 new scenes each, dense tasks 5,000"),
    "batch_size": (32, 1024, 16, 16, 16, 1, "images per optimizer step, over all processes"),
    "lr": (3e-3, 1e-3, 3e-3, 1e-4, 1e-4, 0.0, "peak learning rate; the default is scaled in proportion to --batch-size"),
    "schedule": ("cosine", "cosine", "cosine", "step", "poly", None, "after the warm-up: cosine to 0, step (a tenth at 90 "
                 "and a hundredth at 95 % of the steps) or poly (falling to 0 with power 0.9)"),
    "warmup_epochs": (0.3, 20.0, 0.3, 0.1, 1.0, 0.0, "epochs over which the learning rate rises"),
    "weight_decay": (0.05, 0.05, 0.05, 0.05, 0.05, 0.0, "of matrices and convolutions; norms, biases, temperatures have none"),
    "clip": (5.0, 5.0, 5.0, 0.1, 0.1, 0.0, "gradients are scaled down to this norm; 0: never"),
    "drop_path": (0.0, None, 0.0, None, None, 0.0, "stochastic depth of the last block; of files: 0.2 for tiny, 0.3 for small"),
    "smoothing": (0.0, 0.1, 0.0, 0.0, 0.0, 0.0, "cls: label smoothing"),
    "mixup": (0.0, 0.8, 0.0, 0.0, 0.0, 0.0, "cls: alpha of mixup; 0: none"),
    "cutmix": (0.0, 1.0, 0.0, 0.0, 0.0, 0.0, "cls: alpha of cutmix; 0: none"),
    "randaugment": (0, 27, 0, 0, 0, 0, "cls: magnitude of RandAugment, of 0 to 30 (27 is the usual 9 of 10), two operations, "
                    "each applied to half of the images; 0: none"),
    "erasing": (0.0, 0.25, 0.0, 0.0, 0.0, 0.0, "cls: probability of erasing a rectangle"),
    "evaluate_every": (1, 1, 1, 5, 5, 1, "epochs between evaluations; there is always one at the end"),
    "ema": (0.995, 0.9999, 0.995, 0.9999, 0.9999, 0.0, "decay of the averaged weights, reached gradually; they are evaluated"),
}
COLUMNS = ("cls on shapes", "cls on files", "dense on shapes", "COCO", "ADE20K")
BELOW_ONE = ("drop_path", "smoothing", "ema")
CLS_ONLY = ("smoothing", "mixup", "cutmix", "randaugment", "erasing")


def parse_settings():
    """Flags over recipe (or over the settings of the run that is resumed), checked.  Returns a dictionary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )
    tasks = "cls: classes of images; det: boxes; inst: boxes and masks; sem: classes of pixels; pan: of things and stuff"
    parser.add_argument("--task", choices=TASKS, help=f"{tasks} (default: cls)")
    layouts = "cls: train/<class>/ and val/<class>/; det, inst, pan: COCO's layout, or its common export; sem: ADE20K's"
    parser.add_argument("--data", metavar="DIR", help=f"folder of images and labels; {layouts} (default: draw shapes)")
    parser.add_argument("--out", metavar="DIR", help="where checkpoints and log go (default: runs/TASK)")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/last.pt, with its settings, if it is there")
    often = "write OUT/last.pt this often, too; 0: after every step (default: 10)"
    parser.add_argument("--checkpoint-every", type=float, metavar="MINUTES", help=often)
    parser.add_argument("--init", metavar="FILE", help="start from the weights of this checkpoint, as far as they fit")
    parser.add_argument("--accumulate", type=int, help="chunks that a process's share of a batch is cut into (default: 1)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model: slow to start, then faster")
    parser.add_argument("--workers", type=int, help="loader processes per process (default: spare cores, 16 at most)")
    parser.add_argument("--seed", type=int, help="of initial weights, order and augmentation (default: 0)")
    recipe = parser.add_argument_group("recipe")
    for name, (*values, _, text) in RECIPES.items():
        values = values[:2] if name in CLS_ONLY else values
        known = [f"{column} {value}" for column, value in zip(COLUMNS, values) if value is not None]
        default = str(values[0]) if len(set(values)) == 1 else ", ".join(known)
        kind = next(type(value) for value in values if value is not None)
        recipe.add_argument("--" + name.replace("_", "-"), type=kind, help=f"{text} (default: {default})".replace("%", "%%"))
    flags = vars(parser.parse_args())

    flags.setdefault("out", os.path.join("runs", flags.get("task", "cls")))
    last = os.path.join(flags["out"], "last.pt")
    base = {}
    if flags.get("resume") and os.path.exists(last):
        base = load_checkpoint(last)[1]["settings"]
    elif os.path.exists(last) and not flags.get("resume"):
        raise InputError(f"{last} exists: --resume continues that run, --out DIR starts another one elsewhere")
    data = flags.get("data", base.get("data"))
    task = base.get("task", flags.get("task", "cls"))
    if flags.setdefault("task", task) != task:
        raise InputError(f"{last} belongs to a run of --task {task}; --out DIR starts another one elsewhere")
    column = (0 if data is None else 1) if task == "cls" else 2 if data is None else 4 if task == "sem" else 3
    defaults = {name: row[column] for name, row in RECIPES.items()}
    defaults |= dict(data=None, resume=False, init=None, accumulate=1, compile=False, workers=default_workers(), seed=0)
    defaults["checkpoint_every"] = 10.0
    settings = defaults | base | {"resume": False} | flags
    if settings["variant"] not in VARIANTS:
        raise InputError(f"--variant must be one of {', '.join(VARIANTS)}, got {settings['variant']}")
    if settings["schedule"] not in SCHEDULES:
        raise InputError(f"--schedule must be one of {', '.join(SCHEDULES)}, got {settings['schedule']}")
    for name in CLS_ONLY:
        if task != "cls" and settings[name]:
            raise InputError(f"--{name} works with --task cls only; {task} has its own augmentation")
    if settings["patch_size"] not in (2, 4):
        raise InputError(f"--patch-size must be 2 or 4, got {settings['patch_size']}")
    if settings["drop_path"] is None:
        settings["drop_path"] = VARIANTS[settings["variant"]]["drop_path"]
    minimum = {name: row[-2] for name, row in RECIPES.items()} | dict(accumulate=1, workers=0, seed=0)
    minimum["checkpoint_every"] = 0.0
    for name, least in minimum.items():
        value, flag = settings[name], "--" + name.replace("_", "-")
        if least is not None and value is not None and not (least <= value < math.inf):  # NaN fails too
            raise InputError(f"{flag} must be at least {least}, got {value}")
        if name in BELOW_ONE and value >= 1 or name == "erasing" and value > 1 or name == "randaugment" and value > 30:
            raise InputError(f"{flag} must be {'at most 30' if name == 'randaugment' else 'below 1'}, got {value}")
    if "lr" not in flags and "lr" not in base:
        settings["lr"] *= settings["batch_size"] / RECIPES["batch_size"][column]
    return settings


def training_set(settings):
    task, data, size, seed = settings["task"], settings["data"], settings["image_size"], settings["seed"]
    if data is None:
        return Shapes(6_500 if task == "cls" else 5_000, size, seed, "train", task)
    if task == "cls":
        return Folder(data, "train", train_transform(size, settings["randaugment"], settings["erasing"]), seed)
    if task == "sem":
        return Ade(data, "train", dense_train_transform(task, size), size, seed)
    return Coco(data, "train", task, dense_train_transform(task, size), size, seed)


def take_weights(model, path, rank):
    """Loads what fits by name and shape from a checkpoint's averaged weights, and says what did not."""
    theirs, ours = load_checkpoint(path)[1]["ema"], model.state_dict()
    fitting = {name: value for name, value in theirs.items() if name in ours and value.shape == ours[name].shape}
    if not any(name.startswith("backbone.stages") for name in fitting):
        raise InputError(f"{path}: no weight of its backbone fits this model; give the --variant it was trained with")
    model.load_state_dict(fitting, strict=False)
    left = sorted(ours.keys() - fitting.keys())
    if rank == 0:
        print(f"{path}: took {len(fitting)} of {len(ours)} tensors" + (f"; new: {', '.join(left)}" if left else ""))


def parameter_groups(model, weight_decay, backbone_rate):
    """Groups for the optimizer; "rate" is what the learning rate is multiplied by, backbone_rate in the backbone.

    Decay pulls matrices and kernels; a norm, bias, scale or temperature of zero would mean something else.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        decay = weight_decay if parameter.ndim > 1 else 0.0
        rate = backbone_rate if name.startswith("backbone.") else 1.0
        groups.setdefault((decay, rate), []).append(parameter)
    return [dict(params=params, weight_decay=decay, rate=rate) for (decay, rate), params in groups.items()]


# ---------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------
SCHEDULES = {  # what is left of the peak, at a fraction of the way from warm-up to end
    "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t)),
    "poly": lambda t: (1 - t) ** 0.9,
    "step": lambda t: 1.0 if t < 0.9 else 0.1 if t < 0.95 else 0.01,
}


def learning_rate(step, steps, warmup_steps, peak, schedule):
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * SCHEDULES[schedule]((step - warmup_steps) / max(1, steps - warmup_steps))


MAX_BAD_STEPS = 20  # steps in a row without a finite loss: by then it is not one strange image


def batch_to_device(value, device):
    """Tensors, in lists and dictionaries, on the device; the loader has pinned them."""
    if isinstance(value, list):
        return [batch_to_device(item, device) for item in value]
    if isinstance(value, dict):
        return {key: batch_to_device(item, device) for key, item in value.items()}
    return value.to(device, non_blocking=True)


def save(path, write):
    """write(file) fills a file beside the one at path, which takes its name when it is on the disk, whole.

    Whoever reads path sees the old one or the new one, never half of one, wherever the program is killed.
    Raises InputError if it cannot be written; then path is as it was.
    """
    part = path + ".part"
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # or, after a power failure, the new name may stand for an empty file
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # the latter is what torch makes of a full disk
        with contextlib.suppress(OSError):
            os.remove(part)
        why = str(error).splitlines()[0]
        raise InputError(f"{path}: cannot be written ({why}); the previous file is still intact") from error


def on_signals(action):
    """From now on SIGTERM, of schedulers and torchrun, and SIGINT, of Ctrl-C, call action(exit code)."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: action(128 + number))


def main():
    settings = parse_settings()
    rank, world_size, device = start_processes()
    task, out = settings["task"], settings["out"]
    train = training_set(settings)
    val = validation_set(settings["data"], settings["test_size"] or settings["image_size"], task, train.classes)
    check(train, "training")
    check(val, "validation")
    num_classes = len(train.classes)
    things = None if task == "cls" else train.things
    steps_per_epoch = max(1, len(train) // settings["batch_size"])
    steps = settings["epochs"] * steps_per_epoch
    mixing = settings["mixup"] > 0 or settings["cutmix"] > 0

    def lr_at(step):
        warmup_steps = settings["warmup_epochs"] * steps_per_epoch
        return learning_rate(step, steps, warmup_steps, settings["lr"], settings["schedule"])

    torch.manual_seed(settings["seed"])
    model = ClusterFormer(
        task,
        settings["variant"],
        num_classes,
        patch_size=settings["patch_size"],
        iterations=settings["iterations"],
        drop_path=settings["drop_path"],
        label_smoothing=settings["smoothing"],
        things=things,
    )
    last = os.path.join(out, "last.pt")
    step, log = 0, []  # done in all; what is known of each epoch
    sums, skipped = {}, 0  # of this epoch: losses, and steps without a finite one
    checkpoint = None
    if settings["resume"] and os.path.exists(last):
        checkpoint = load_checkpoint(last)[1]
        if list(checkpoint["classes"]) != list(train.classes):
            raise InputError(f"{last} belongs to a run with {len(checkpoint['classes'])} other classes; give its --data")
        model.load_state_dict(checkpoint["model"])
        step, log, sums, skipped = (checkpoint[name] for name in ("step", "log", "sums", "skipped"))
    elif settings["init"]:
        take_weights(model, settings["init"], rank)
    model.to(device)
    # A depthwise weight (C, 1, 3, 3) lies in memory the same with channels first or last.  Gradients come as channels last; if
    # the weight says so, too, DistributedDataParallel need not copy them (nor warn of it).
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.groups > 1:
            module.to(memory_format=torch.channels_last)
    ema = copy.deepcopy(model).requires_grad_(False)
    # A backbone that has learned to see already shall keep what it knows while neck and decoder are still random.
    backbone_rate = 0.1 if settings["init"] and task != "cls" else 1.0
    optimizer = torch.optim.AdamW(parameter_groups(model, settings["weight_decay"], backbone_rate), fused=True)
    if checkpoint:
        ema.load_state_dict(checkpoint["ema"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    runner = torch.compile(model) if settings["compile"] else model
    if world_size > 1:
        # Buffers never change, so there is nothing to broadcast; gradients need not lie in memory twice.
        gpu = [device.index] if device.type == "cuda" else None
        runner = DistributedDataParallel(runner, gpu, broadcast_buffers=False, gradient_as_bucket_view=True)

    batches = GlobalBatches(
        len(train), settings["batch_size"], steps, settings["seed"], rank, world_size, settings["accumulate"], mixing, step
    )
    whole = SkipBroken(train, settings["workers"])
    join = None if task == "cls" else collate
    loader = loader_of(
        whole, settings["workers"], device, batch_sampler=batches, collate_fn=join, worker_init_fn=ignore_signals
    )
    val_batch = max(1, settings["batch_size"] // world_size) if task == "cls" or settings["data"] is None else 1
    if rank == 0:
        os.makedirs(out, exist_ok=True)
        size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        print(
            f"{task}, {settings['variant']}, {size:.1f} M parameters, {num_classes} classes; "
            f"{len(train)} training images of {settings['image_size']} x {settings['image_size']} and {len(val)} validation "
            f"images from {settings['data'] or 'shapes'}; {steps} steps of {settings['batch_size']} images on "
            f"{world_size} x {device.type}"
        )
        if checkpoint:
            print(f"resuming after step {step}")
            if checkpoint["processes"] != world_size:
                print(
                    f"{checkpoint['processes']} processes before, {world_size} now: every step uses the same images, but "
                    "rounding and stochastic depth differ"
                )

    def write_text(name, text):
        save(os.path.join(out, name), lambda file: file.write(text.encode()))

    def write_checkpoint(name):
        state = dict(model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(), settings=settings)
        state |= dict(step=step, log=log, sums=sums, skipped=skipped, processes=world_size)
        state |= dict(version=VERSION, arguments=model.arguments, classes=list(train.classes))
        save(os.path.join(out, name), lambda file: torch.save(state, file))

    def leave(code):
        if rank == 0:
            print(f"stopped after step {step} of {steps}; --out {out} --resume continues from there", file=sys.stderr)
        sys.exit(code)

    stop_signals = []  # exit codes of signals that arrived; the step is finished first
    on_signals(stop_signals.append)
    start, start_step, saved, bad_steps = time.time(), step, time.time(), 0
    bar = tqdm(total=steps, initial=step, disable=True if rank else None)
    with bar, contextlib.closing(whole.read(loader)) as stream:  # whatever happens, the loader's processes end
        while True:
            done = step - len(log) * steps_per_epoch  # of this epoch
            if done == steps_per_epoch:
                seconds = time.time() - start
                if rank == 0:
                    write_checkpoint("last.pt")
                metrics = {}
                if (len(log) + 1) % settings["evaluate_every"] == 0 or step == steps:
                    on_signals(leave)  # at once: nothing is lost, and evaluation may take minutes
                    metrics = evaluate(ema, val, device, val_batch, settings["workers"])
                    on_signals(stop_signals.append)
                broken = whole.broken.to(device)
                if world_size > 1:
                    dist.all_reduce(broken, dist.ReduceOp.MAX)
                losses = {name: value / max(1, done - skipped) for name, value in sums.items()}
                line = dict(epoch=len(log) + 1, step=step, loss=sum(losses.values()), lr=lr_at(step - 1)) | metrics
                line |= dict(images_per_second=(step - start_step) * settings["batch_size"] / seconds, seconds=seconds)
                line |= {f"loss_{name}": value for name, value in losses.items() if len(losses) > 1}
                if device.type == "cuda":
                    line["memory_MiB"] = torch.cuda.max_memory_allocated() / 2**20
                key = METRIC[task]
                improved = metrics and metrics[key] > max([-1.0, *(line[key] for line in log if key in line)])
                log.append(line)
                if rank == 0:  # last.pt last: killed before it, the next run does all this once more
                    if metrics:
                        write_text("metrics.json", json.dumps(metrics, indent=2))
                    write_text("log.jsonl", "".join(json.dumps(line) + "\n" for line in log))
                    if improved:
                        write_checkpoint("best.pt")
                    write_checkpoint("last.pt")
                    tqdm.write(
                        f"epoch {len(log)}/{settings['epochs']}  loss {line['loss']:.3f}  "
                        + (describe(metrics, task) + "  " if metrics else "")
                        + f"{line['images_per_second']:.0f} images/s"
                    )
                    if broken.any():
                        tqdm.write(f"{int(broken.sum())} of {len(train)} training images could not be read so far")
                    if skipped:
                        tqdm.write(f"{skipped} steps of this epoch were skipped: their loss or gradient was not finite")
                sums, skipped, start, start_step, saved = {}, 0, time.time(), step, time.time()
            if step == steps:
                break

            lr = lr_at(step)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["rate"]
            chunks = [next(stream) for _ in range(settings["accumulate"])]  # this process's part of the batch
            # Stochastic depth and points of masks, too, are functions of the step: a resumed run goes on as if never stopped.
            torch.manual_seed(int(np.random.SeedSequence((settings["seed"], step, rank)).generate_state(1)[0]))
            # With mixing, the first sample of a chunk only serves to blend the second.
            count = sum(model.count(targets[int(mixing) :]) for _, targets in chunks)
            total = torch.full((), float(count), device=device)
            if world_size > 1:
                dist.all_reduce(total)
            parts = Counter()
            for chunk, (images, targets) in enumerate(chunks):
                images, targets = as_float(batch_to_device(images, device)), batch_to_device(targets, device)
                if mixing:
                    images, targets = mix(
                        images, targets, num_classes, settings["mixup"], settings["cutmix"], settings["seed"], step
                    )
                # Gradients travel between processes once a step, with the last chunk.
                waits = world_size > 1 and chunk < settings["accumulate"] - 1
                with runner.no_sync() if waits else contextlib.nullcontext():
                    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                        output = runner(images)
                    losses = model.loss(output, targets)
                    losses = {name: loss / total.clamp(min=1) for name, loss in losses.items()}
                    (sum(losses.values()) * world_size).backward()  # of which DDP takes the mean over the processes
                parts.update({name: loss.detach() for name, loss in losses.items()})
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings["clip"] or math.inf)
            # Reduce the stop flag, gradient norm and losses, so that all ranks take the same decision.  Reading them is the
            # step's wait for the GPU.
            flags = torch.stack([torch.full((), float(len(stop_signals)), device=device), norm, *parts.values()])
            if world_size > 1:
                dist.all_reduce(flags)
            stop, *finite = flags.tolist()
            if all(map(math.isfinite, finite)):
                optimizer.step()
                # The average forgets its start: after few steps it looks back over few steps.
                decay = min(settings["ema"], (1 + step) / (10 + step))
                get_ema_multi_avg_fn(decay)(list(ema.parameters()), list(model.parameters()), None)
                sums = {name: sums.get(name, 0.0) + value for name, value in zip(parts, finite[1:])}
                bad_steps = 0
            else:
                skipped, bad_steps = skipped + 1, bad_steps + 1
                if bad_steps == MAX_BAD_STEPS:
                    raise InputError(
                        f"loss or gradient was not finite in {bad_steps} steps in a row, {step - bad_steps + 2} to {step + 1}: "
                        f"lower --lr (it is {lr:.1e} here) or --clip, or check these images; {last} is from before them"
                    )
            optimizer.zero_grad()
            step += 1

            bar.update()
            if step % 10 == 0:
                speed = (step - start_step) * settings["batch_size"] / (time.time() - start)
                mean = sum(sums.values()) / max(1, step - len(log) * steps_per_epoch - skipped)
                bar.set_postfix(loss=f"{mean:.3f}", lr=f"{lr:.1e}", images_per_s=f"{speed:.0f}")
            # Never in a row of bad steps: it may end the run, and to go on from its middle would not help.
            if rank == 0 and not bad_steps and (stop or time.time() - saved > 60 * settings["checkpoint_every"]):
                write_checkpoint("last.pt")
                saved = time.time()
            if stop:
                leave(max(stop_signals, default=128 + signal.SIGTERM))
    if rank == 0:
        print(f"{describe(log[-1], task)} on {len(val)} held-out images")
        print(f"python eval.py --checkpoint {last}")


if __name__ == "__main__":
    run(main)
