# SPDX-License-Identifier: MIT
"""Train a ClusterFormer.

    torchrun train.py --task cls                                                    built-in shapes, minutes on a CPU
    torchrun train.py --task det                                                    also inst, sem, pan
    torchrun train.py --task cls --data DIR --out runs/mine                         own images, DIR/{train,val}/<class>/
    torchrun train.py --task inst --data DIR --init CHECKPOINT                      own objects, in COCO's layout
    torchrun --nproc_per_node=8 train.py --task cls --data IMAGENET_DIR             the full recipe on eight GPUs
    torchrun train.py --task cls --data IMAGENET_DIR --accumulate 8                 the same batch of 1024 on one GPU
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        train.py --task cls --data IMAGENET_DIR                                     on each of two machines

    torchrun --nproc_per_node=8 train.py --task inst --data COCO_DIR --init CHECKPOINT     also det, pan
    torchrun --nproc_per_node=8 train.py --task sem --data ADE_DIR --init CHECKPOINT

A setting that is not given comes from the recipe of the task and the data.  A run writes OUT/last.pt, OUT/best.pt,
OUT/metrics.json and OUT/log.jsonl, a line per epoch.  However a run is stopped, --resume continues it from OUT/last.pt, and
on a CPU it ends with the weights of a run that was never stopped.
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
from dataclasses import asdict, dataclass, field, fields, replace

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from clusterformer import TASKS, VARIANTS, VERSION, ClusterFormer
from data import Ade, Coco, Folder, GlobalBatches, InputError, Shapes, SkipBroken
from data import as_float, check, collate, dense_train_transform, ignore_signals, loader_of, mix, train_transform
from eval import METRIC, default_workers, describe, evaluate, load_checkpoint, run, start_processes, validation_set


# ---------------------------------------------------------------------------------------------------------------
# Settings.  Every field is a flag; a recipe is what differs from the defaults
# ---------------------------------------------------------------------------------------------------------------
def setting(default, text, least=None, below=None, choices=None, cls=False):
    """A field of Settings: its explanation, its range (least <= value < below), and whether only cls has it."""
    return field(default=default, metadata=dict(text=text, least=least, below=below, choices=choices, cls=cls))


SCHEDULES = {  # fraction of the peak learning rate, at a fraction t of the way from the end of the warm-up to the end
    "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t)),
    "poly": lambda t: (1 - t) ** 0.9,
    "step": lambda t: 1.0 if t < 0.9 else 0.1 if t < 0.95 else 0.01,
}


@dataclass
class Settings:
    """Defaults are those of cls on the built-in shapes."""

    task: str = setting("cls", "cls: images; det: boxes; inst: boxes and masks; sem: pixels; pan: things and stuff", choices=TASKS)
    data: str = setting(None, "folder of images and labels: class folders (cls), COCO's layout or its common export (det, "
                        "inst, pan), ADE20K's (sem) (default: built-in shapes)")
    out: str = setting(None, "where checkpoints and logs go (default: runs/TASK)")
    init: str = setting(None, "checkpoint to start from: all weights that fit; the dense tasks' backbone then learns at lr / 10")
    resume: bool = setting(False, "continue from OUT/last.pt, with its settings, if it exists")
    checkpoint_every: float = setting(10.0, "minutes between checkpoints, beside those of each epoch; 0: every step", 0)
    seed: int = setting(0, "of initial weights, order and augmentation", 0)
    workers: int = setting(None, "loader processes per process (default: spare cores, at most 16)", 0)
    accumulate: int = setting(1, "chunks into which a process divides its part of a batch, to save memory", 1)
    compile: bool = setting(False, "torch.compile the model: slow to start, then faster")
    variant: str = setting("nano", "size of the model", choices=VARIANTS)
    iterations: int = setting(3, "T, EM iterations of each clustering", 1)
    patch_size: int = setting(4, "pixels per side of the smallest token: 4, or 2 for images of about 32 pixels", choices=(2, 4))
    image_size: int = setting(48, "pixels per side of training images; the dense tasks crop larger ones", 32)
    test_size: int = setting(None, "dense tasks on files: pixels of the short side in evaluation", 32)
    epochs: int = setting(4, "passes over the training images (of shapes: 6,500 new scenes each; dense tasks 5,000)", 1)
    batch_size: int = setting(32, "images per step, over all processes", 1)
    lr: float = setting(3e-3, "peak learning rate; the default is scaled with --batch-size", 0)
    schedule: str = setting("cosine", "of the learning rate after the warm-up: cosine to 0, poly (power 0.9) to 0, or step (a "
                            "tenth from 90 % of the steps on, a hundredth from 95 %)", choices=SCHEDULES)
    warmup_epochs: float = setting(0.3, "epochs over which the learning rate rises", 0)
    weight_decay: float = setting(0.05, "of matrices and convolutions; norms, biases and scales have none", 0)
    clip: float = setting(5.0, "largest norm of the gradient; 0: do not clip", 0)
    drop_path: float = setting(0.0, "stochastic depth of the last block (default on files: 0.2 for tiny, 0.3 for small)", 0, 1)
    ema: float = setting(0.995, "decay of the averaged weights, which are the ones that are evaluated", 0, 1)
    evaluate_every: int = setting(1, "epochs between evaluations; the last epoch always has one", 1)
    smoothing: float = setting(0.0, "cls: label smoothing", 0, 1, cls=True)
    mixup: float = setting(0.0, "cls: alpha of mixup; 0: none", 0, cls=True)
    cutmix: float = setting(0.0, "cls: alpha of cutmix; 0: none", 0, cls=True)
    randaugment: int = setting(0, "cls: magnitude of two RandAugment operations, 0 to 30, each applied to half of the images "
                               "(27 is the usual 9 of 10); 0: none", 0, 31, cls=True)
    erasing: float = setting(0.0, "cls: probability of erasing a rectangle", 0, 1, cls=True)


CLS = Settings()
DENSE = replace(CLS, image_size=96, batch_size=16)
IMAGENET = replace(CLS, variant="tiny", image_size=224, epochs=300, batch_size=1024, lr=1e-3, warmup_epochs=20.0, drop_path=None,
                   ema=0.9999, smoothing=0.1, mixup=0.8, cutmix=1.0, randaugment=27, erasing=0.25)  # Swin's
COCO = replace(CLS, variant="tiny", image_size=1024, test_size=800, epochs=50, batch_size=16, lr=1e-4, schedule="step",
               warmup_epochs=0.1, clip=0.1, drop_path=None, ema=0.9999, evaluate_every=5)
ADE20K = replace(COCO, image_size=512, test_size=512, epochs=127, schedule="poly", warmup_epochs=1.0)  # 160,000 steps
RECIPES = {"cls on shapes": CLS, "cls on files": IMAGENET, "dense tasks on shapes": DENSE, "COCO": COCO, "ADE20K": ADE20K}


def recipe_of(task, data):
    """The recipe of a task on a folder, or on shapes if `data` is None."""
    if task == "cls":
        return CLS if data is None else IMAGENET
    return DENSE if data is None else ADE20K if task == "sem" else COCO


def make_parser():
    """A flag for each field of Settings, with its explanation and its defaults."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )
    for item in fields(Settings):
        recipes = {name: getattr(recipe, item.name) for name, recipe in RECIPES.items()}
        recipes = {name: value for name, value in recipes.items() if not item.metadata["cls"] or name.startswith("cls")}
        values, text = set(recipes.values()), item.metadata["text"]
        if len(values) > 1:
            text += f" (default: {', '.join(f'{name} {value}' for name, value in recipes.items() if value is not None)})"
        elif values != {None} and item.type is not bool:
            text += f" (default: {values.pop()})"
        if item.metadata["choices"] and item.name != "patch_size":
            text += f"; one of {', '.join(item.metadata['choices'])}"
        kind = dict(action="store_true") if item.type is bool else dict(type=item.type)
        parser.add_argument("--" + item.name.replace("_", "-"), help=text.replace("%", "%%"), **kind)
    return parser


def check_settings(settings, flags):
    """Raise InputError, in one line, if a setting is out of range, or a flag does not go with the task."""
    for item in fields(Settings):
        value, limits, flag = getattr(settings, item.name), item.metadata, "--" + item.name.replace("_", "-")
        if limits["choices"] and value not in limits["choices"]:
            raise InputError(f"{flag} must be one of {', '.join(map(str, limits['choices']))}, got {value}")
        if limits["least"] is not None and value is not None and not limits["least"] <= value < math.inf:  # NaN fails too
            raise InputError(f"{flag} must be at least {limits['least']}, got {value}")
        if limits["below"] is not None and value is not None and value >= limits["below"]:
            raise InputError(f"{flag} must be below {limits['below']}, got {value}")
        if limits["cls"] and value and settings.task != "cls":
            raise InputError(f"{flag} works with --task cls only; {settings.task} has its own augmentation")


def parse_settings():
    """The settings of this run: flags over those of the run that is resumed, over the recipe.  Checked."""
    flags = vars(make_parser().parse_args())
    flags.setdefault("out", os.path.join("runs", flags.get("task", "cls")))
    last, before = os.path.join(flags["out"], "last.pt"), {}
    if os.path.exists(last):
        if not flags.get("resume"):
            raise InputError(f"{last} exists: --resume continues that run, --out DIR starts another one elsewhere")
        before = load_checkpoint(last)[1]["settings"]
    task = before.get("task", flags.get("task", "cls"))
    if flags.setdefault("task", task) != task:
        raise InputError(f"{last} belongs to a run of --task {task}; --out DIR starts another one elsewhere")
    recipe = recipe_of(task, flags.get("data", before.get("data"))) if task in TASKS else CLS
    given = before | flags
    settings = replace(recipe, **given)
    check_settings(settings, flags)
    if "lr" not in given:
        settings.lr *= settings.batch_size / recipe.batch_size
    if settings.workers is None:
        settings.workers = default_workers()
    if settings.drop_path is None:
        settings.drop_path = VARIANTS[settings.variant]["drop_path"]
    return settings


# ---------------------------------------------------------------------------------------------------------------
# Data, model, optimizer
# ---------------------------------------------------------------------------------------------------------------
def training_set(settings):
    task, data, size, seed = settings.task, settings.data, settings.image_size, settings.seed
    if data is None:
        return Shapes(6_500 if task == "cls" else 5_000, size, seed, "train", task)
    if task == "cls":
        return Folder(data, "train", train_transform(size, settings.randaugment, settings.erasing), seed)
    if task == "sem":
        return Ade(data, "train", dense_train_transform(task, size), size, seed)
    return Coco(data, "train", task, dense_train_transform(task, size), size, seed)


def take_weights(model, path, rank):
    """Load the averaged weights of a checkpoint, as far as names and shapes fit, and say which are new."""
    theirs, ours = load_checkpoint(path)[1]["ema"], model.state_dict()
    fitting = {name: value for name, value in theirs.items() if name in ours and value.shape == ours[name].shape}
    if not any(name.startswith("backbone.stages") for name in fitting):
        raise InputError(f"{path}: no weight of its backbone fits this model; give the --variant it was trained with")
    model.load_state_dict(fitting, strict=False)
    left = sorted(ours.keys() - fitting.keys())
    if rank == 0:
        print(f"{path}: took {len(fitting)} of {len(ours)} tensors" + (f"; new: {', '.join(left)}" if left else ""))


def parameter_groups(model, weight_decay, backbone_rate):
    """Groups for the optimizer.  "rate" multiplies the learning rate; in the backbone it is backbone_rate.

    Weight decay is for matrices and kernels: a norm, bias or scale has no reason to be near zero.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        decay = weight_decay if parameter.ndim > 1 else 0.0
        rate = backbone_rate if name.startswith("backbone.") else 1.0
        groups.setdefault((decay, rate), []).append(parameter)
    return [dict(params=params, weight_decay=decay, rate=rate) for (decay, rate), params in groups.items()]


def learning_rate(step, steps, warmup_steps, peak, schedule):
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * SCHEDULES[schedule]((step - warmup_steps) / max(1, steps - warmup_steps))


def batch_to_device(value, device):
    """Tensors, in lists and dictionaries, on the device; the loader has pinned them."""
    if isinstance(value, list):
        return [batch_to_device(item, device) for item in value]
    if isinstance(value, dict):
        return {key: batch_to_device(item, device) for key, item in value.items()}
    return value.to(device, non_blocking=True)


def save(path, write):
    """write(file) fills a file beside `path`, which gets that name once it is on the disk, whole.

    Wherever the program is killed, whoever reads `path` finds the old file or the new one.
    Raises InputError if the file cannot be written; then the old one is still there.
    """
    part = path + ".part"
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # otherwise, after a power failure, the new name may belong to an empty file
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError when a disk is full
        with contextlib.suppress(OSError):
            os.remove(part)
        raise InputError(f"{path}: cannot be written ({str(error).splitlines()[0]}); the previous file is still intact") from error


# ---------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------
MAX_BAD_STEPS = 20  # in a row, without a finite loss: by then it is not a single strange image


def on_signals(action):
    """From now on SIGTERM (from schedulers and torchrun) and SIGINT (from Ctrl-C) call action(exit code)."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: action(128 + number))


class Run:
    """A training run: what changes from step to step, a step, the end of an epoch, and what a checkpoint holds."""

    def __init__(self, settings, train, val, rank, world_size, device):
        self.settings, self.train, self.val = settings, train, val
        self.rank, self.world_size, self.device = rank, world_size, device
        self.last = os.path.join(settings.out, "last.pt")
        self.steps_per_epoch = max(1, len(train) // settings.batch_size)
        self.steps = settings.epochs * self.steps_per_epoch
        self.step, self.log = 0, []  # steps done so far; a dictionary for each epoch
        self.sums, self.skipped = {}, 0  # of this epoch: losses, and steps without a finite one
        self.bad_steps, self.stop_signals = 0, []  # such steps in a row; exit codes of signals that arrived
        torch.manual_seed(settings.seed)
        self.model = model = ClusterFormer(
            settings.task,
            settings.variant,
            len(train.classes),
            patch_size=settings.patch_size,
            iterations=settings.iterations,
            drop_path=settings.drop_path,
            label_smoothing=settings.smoothing,
            things=getattr(train, "things", None),
        )
        checkpoint = None
        if settings.resume and os.path.exists(self.last):
            checkpoint = load_checkpoint(self.last)[1]
            if list(checkpoint["classes"]) != list(train.classes):
                raise InputError(f"{self.last} belongs to a run with {len(checkpoint['classes'])} other classes; give its --data")
            model.load_state_dict(checkpoint["model"])
            self.step, self.log, self.sums, self.skipped = (checkpoint[key] for key in ("step", "log", "sums", "skipped"))
        elif settings.init:
            take_weights(model, settings.init, rank)
        model.to(device)
        # A depthwise weight (C, 1, 3, 3) lies in memory the same with channels first or last.  Its gradient comes with
        # channels last: if the weight says so, too, DistributedDataParallel need not copy it.
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d) and module.groups > 1:
                module.to(memory_format=torch.channels_last)
        self.ema = copy.deepcopy(model).requires_grad_(False)
        # A trained backbone should keep what it knows while neck and decoder are still random.
        backbone_rate = 0.1 if settings.init and settings.task != "cls" else 1.0
        groups = parameter_groups(model, settings.weight_decay, backbone_rate)
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        if checkpoint:
            self.ema.load_state_dict(checkpoint["ema"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.runner = torch.compile(model) if settings.compile else model
        if world_size > 1:  # buffers never change: nothing to broadcast.  Gradients need not lie in memory twice.
            gpu = [device.index] if device.type == "cuda" else None
            self.runner = DistributedDataParallel(self.runner, gpu, broadcast_buffers=False, gradient_as_bucket_view=True)
        if rank == 0:
            os.makedirs(settings.out, exist_ok=True)
            self.introduce(checkpoint)

    def introduce(self, checkpoint):
        settings, size = self.settings, sum(parameter.numel() for parameter in self.model.parameters()) / 1e6
        print(
            f"{settings.task}, {settings.variant}, {size:.1f} M parameters, {len(self.train.classes)} classes; "
            f"{len(self.train)} training images of {settings.image_size} x {settings.image_size} and {len(self.val)} validation "
            f"images from {settings.data or 'shapes'}; {self.steps} steps of {settings.batch_size} images on "
            f"{self.world_size} x {self.device.type}"
        )
        if checkpoint:
            print(f"resuming after step {self.step}")
            if checkpoint["processes"] != self.world_size:
                print(
                    f"{checkpoint['processes']} processes before, {self.world_size} now: every step uses the same images, "
                    "but rounding and stochastic depth differ"
                )

    def lr_at(self, step):
        warmup_steps = self.settings.warmup_epochs * self.steps_per_epoch
        return learning_rate(step, self.steps, warmup_steps, self.settings.lr, self.settings.schedule)

    def done_in_epoch(self):
        return self.step - len(self.log) * self.steps_per_epoch

    def all_reduce(self, tensor, op=dist.ReduceOp.SUM):
        if self.world_size > 1:
            dist.all_reduce(tensor, op)
        return tensor

    def write_text(self, name, text):
        save(os.path.join(self.settings.out, name), lambda file: file.write(text.encode()))

    def write_checkpoint(self, name):
        state = dict(model=self.model.state_dict(), ema=self.ema.state_dict(), optimizer=self.optimizer.state_dict())
        state |= dict(settings=asdict(self.settings) | {"resume": False}, version=VERSION, arguments=self.model.arguments)
        state |= dict(classes=list(self.train.classes), step=self.step, log=self.log, sums=self.sums, skipped=self.skipped)
        state |= dict(processes=self.world_size)
        save(os.path.join(self.settings.out, name), lambda file: torch.save(state, file))

    def leave(self, code):
        if self.rank == 0:
            out = self.settings.out
            print(f"stopped after step {self.step} of {self.steps}; --out {out} --resume continues from there", file=sys.stderr)
        sys.exit(code)

    def gradients(self, chunks):
        """Backward passes of this process's part of a batch, chunk by chunk.  Returns its losses, a dictionary."""
        settings, mixing = self.settings, self.settings.mixup > 0 or self.settings.cutmix > 0
        # With mixing, the first sample of a chunk is there only to be mixed into the second.
        count = sum(self.model.count(targets[int(mixing) :]) for _, targets in chunks)
        total = self.all_reduce(torch.full((), float(count), device=self.device))
        parts = Counter()
        for i, (images, targets) in enumerate(chunks):
            images, targets = as_float(batch_to_device(images, self.device)), batch_to_device(targets, self.device)
            if mixing:
                classes = len(self.train.classes)
                images, targets = mix(images, targets, classes, settings.mixup, settings.cutmix, settings.seed, self.step)
            # Processes exchange gradients once per step, with the last chunk.
            waits = self.world_size > 1 and i < len(chunks) - 1
            with self.runner.no_sync() if waits else contextlib.nullcontext():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                    output = self.runner(images)
                losses = {name: loss / total.clamp(min=1) for name, loss in self.model.loss(output, targets).items()}
                (sum(losses.values()) * self.world_size).backward()  # DDP averages over processes; losses are sums
            parts.update({name: loss.detach() for name, loss in losses.items()})
        return parts

    def train_step(self, chunks):
        """One optimizer step.  Returns whether any process was asked to stop."""
        settings, lr = self.settings, self.lr_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["rate"]
        # Stochastic depth and mask points are functions of the step, too, so that a resumed run draws the same.
        torch.manual_seed(int(np.random.SeedSequence((settings.seed, self.step, self.rank)).generate_state(1)[0]))
        parts = self.gradients(chunks)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip or math.inf)
        # Reduce the stop flag, gradient norm and losses, so that all ranks take the same decision.  To read them is the
        # one wait of a step for the GPU.
        asked = torch.full((), float(len(self.stop_signals)), device=self.device)
        stop, *finite = self.all_reduce(torch.stack([asked, norm, *parts.values()])).tolist()
        if all(map(math.isfinite, finite)):
            self.optimizer.step()
            decay = min(settings.ema, (1 + self.step) / (10 + self.step))  # a short memory at first
            get_ema_multi_avg_fn(decay)(list(self.ema.parameters()), list(self.model.parameters()), None)
            self.sums = {name: self.sums.get(name, 0.0) + value for name, value in zip(parts, finite[1:])}
            self.bad_steps = 0
        else:
            self.skipped, self.bad_steps = self.skipped + 1, self.bad_steps + 1
            if self.bad_steps == MAX_BAD_STEPS:
                first = self.step - MAX_BAD_STEPS + 2
                raise InputError(
                    f"loss or gradient was not finite in {MAX_BAD_STEPS} steps in a row, {first} to {self.step + 1}: lower --lr "
                    f"(it is {lr:.1e} here) or --clip, or check these images; {self.last} is from before them"
                )
        self.optimizer.zero_grad()
        self.step += 1
        return stop

    def end_epoch(self, broken, seconds, images_per_second):
        """Evaluate, log and save.  broken: bool (images,), training images that could not be read so far."""
        settings, metrics, key = self.settings, {}, METRIC[self.settings.task]
        if self.rank == 0:
            self.write_checkpoint("last.pt")
        if (len(self.log) + 1) % settings.evaluate_every == 0 or self.step == self.steps:
            on_signals(self.leave)  # at once: nothing is lost, and an evaluation may take minutes
            batch_size = 1  # of files of the dense tasks, which have many sizes
            if settings.task == "cls" or settings.data is None:
                batch_size = max(1, settings.batch_size // self.world_size)
            metrics = evaluate(self.ema, self.val, self.device, batch_size, settings.workers)
            on_signals(self.stop_signals.append)
        broken = self.all_reduce(broken.to(self.device), dist.ReduceOp.MAX)
        losses = {name: value / max(1, self.done_in_epoch() - self.skipped) for name, value in self.sums.items()}
        line = dict(epoch=len(self.log) + 1, step=self.step, loss=sum(losses.values()), lr=self.lr_at(self.step - 1)) | metrics
        line |= dict(images_per_second=images_per_second, seconds=seconds)
        line |= {f"loss_{name}": value for name, value in losses.items() if len(losses) > 1}
        if self.device.type == "cuda":
            line["memory_MiB"] = torch.cuda.max_memory_allocated() / 2**20
        improved = metrics and metrics[key] > max([-1.0, *(line[key] for line in self.log if key in line)])
        self.log.append(line)
        skipped, self.sums, self.skipped = self.skipped, {}, 0
        if self.rank:
            return
        if metrics:
            self.write_text("metrics.json", json.dumps(metrics, indent=2))
        self.write_text("log.jsonl", "".join(json.dumps(line) + "\n" for line in self.log))
        if improved:
            self.write_checkpoint("best.pt")
        self.write_checkpoint("last.pt")  # last: a run that is killed before it does all of this once more
        found = describe(metrics, settings.task) + "  " if metrics else ""
        speed = f"{images_per_second:.0f} images/s"
        tqdm.write(f"epoch {len(self.log)}/{settings.epochs}  loss {line['loss']:.3f}  {found}{speed}")
        if broken.any():
            tqdm.write(f"{int(broken.sum())} of {len(self.train)} training images could not be read so far")
        if skipped:
            tqdm.write(f"{skipped} steps of this epoch were skipped: their loss or gradient was not finite")

    def loop(self, stream, broken):
        """All steps that are left.  stream: this process's chunks of all batches.  broken: as in end_epoch."""
        settings, start, start_step, saved = self.settings, time.time(), self.step, time.time()
        on_signals(self.stop_signals.append)  # a step is finished first
        with tqdm(total=self.steps, initial=self.step, disable=True if self.rank else None) as bar:
            while True:
                seconds = max(time.time() - start, 1e-9)
                speed = (self.step - start_step) * settings.batch_size / seconds
                if self.done_in_epoch() == self.steps_per_epoch:
                    self.end_epoch(broken, seconds, speed)
                    start, start_step, saved = time.time(), self.step, time.time()
                if self.step == self.steps:
                    return
                stop = self.train_step([next(stream) for _ in range(settings.accumulate)])
                bar.update()
                if self.step % 10 == 0:
                    mean = sum(self.sums.values()) / max(1, self.done_in_epoch() - self.skipped)
                    bar.set_postfix(loss=f"{mean:.3f}", lr=f"{self.lr_at(self.step - 1):.1e}", images_per_s=f"{speed:.0f}")
                # Never within a row of bad steps: it may end the run, and resuming from its middle would not help.
                due = time.time() - saved > 60 * settings.checkpoint_every
                if self.rank == 0 and not self.bad_steps and (stop or due):
                    self.write_checkpoint("last.pt")
                    saved = time.time()
                if stop:
                    self.leave(max(self.stop_signals, default=128 + signal.SIGTERM))


def main():
    settings = parse_settings()
    rank, world_size, device = start_processes()
    train = training_set(settings)
    val = validation_set(settings.data, settings.test_size or settings.image_size, settings.task, train.classes)
    check(train, "training")
    check(val, "validation")
    job = Run(settings, train, val, rank, world_size, device)
    mixing = settings.mixup > 0 or settings.cutmix > 0
    batches = GlobalBatches(
        len(train), settings.batch_size, job.steps, settings.seed, rank, world_size, settings.accumulate, mixing, job.step
    )
    readable = SkipBroken(train, settings.workers)
    join = None if settings.task == "cls" else collate  # None: stack images of one size into a tensor
    options = dict(batch_sampler=batches, collate_fn=join, worker_init_fn=ignore_signals)
    loader = loader_of(readable, settings.workers, device, **options)
    with contextlib.closing(readable.read(loader)) as stream:  # whatever happens, the loader's processes end
        job.loop(stream, readable.broken)
    if rank == 0:
        print(f"{describe(job.log[-1], settings.task)} on {len(val)} held-out images")
        print(f"python eval.py --checkpoint {job.last}")


if __name__ == "__main__":
    run(main)
