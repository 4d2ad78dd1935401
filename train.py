# SPDX-License-Identifier: MIT
"""Train a ClusterFormer.

    torchrun train.py --task cls                                          # built-in shapes, minutes on a CPU
    torchrun train.py --task det                                          # also inst, sem, pan

    On two CPU cores, own images, DIR/{train,val}/<class>/, and own objects, in COCO's layout:
    torchrun --nproc_per_node=2 train.py --task cls --data DIR --out runs/mine
    torchrun --nproc_per_node=2 train.py --task inst --data DIR --init runs/inst/last.pt --out runs/mine

    torchrun --nproc_per_node=8 train.py --task cls --data IMAGENET_DIR   # the full recipe on eight GPUs
    torchrun train.py --task cls --data IMAGENET_DIR --accumulate 8       # the same batch of 1024 on one GPU
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        train.py --task cls --data IMAGENET_DIR                           # on each of two machines
    torchrun --nproc_per_node=8 train.py --task inst --data COCO_DIR --init CHECKPOINT
    torchrun --nproc_per_node=8 train.py --task sem --data ADE_DIR --init CHECKPOINT

A setting that is not given comes from the recipe of the task and the data: shapes; small data, fewer than
10,000 training images; or the full scale of ImageNet, COCO and ADE20K.  If --init is given, variant, patch
size and T come from there.  A run writes OUT/last.pt, OUT/best.pt, OUT/metrics.json and OUT/log.jsonl, a line
per epoch.  However it is stopped, --resume continues it from OUT/last.pt, and on a CPU it ends with the weights
of a run that was never stopped.
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
from data import Ade, Coco, Folder, GlobalBatches, InputError, Shapes, SkipBroken, as_float, batches_of, check
from data import dense_train_transform, ignore_signals, loader_of, mix, stacked, train_transform
from eval import METRIC, default_workers, describe, evaluate, load_checkpoint, run, start_processes
from eval import validation_set


# --------------------------------------------------------------------------------------------------
# Settings.  Every field is a flag; a recipe is what differs from the defaults
# --------------------------------------------------------------------------------------------------
def setting(default, text, least=None, below=None, choices=None):
    """A field of Settings, with its explanation and its range, least <= value < below."""
    return field(default=default, metadata=dict(text=text, least=least, below=below, choices=choices))


# Fraction of the peak learning rate; t goes from 0 after warm-up to 1 at the end.
SCHEDULES = {
    "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t)),
    "poly": lambda t: (1 - t) ** 0.9,
    "step": lambda t: 1.0 if t < 0.9 else 0.1 if t < 0.95 else 0.01,
}
TASK_HELP = "cls: images; det: boxes; inst: boxes and masks; sem: pixels; pan: things and stuff"
DATA_HELP = "class folders (cls), COCO's layout or export (det, inst, pan), ADE20K's (sem) (default: shapes)"
SCHEDULE_HELP = "after warm-up: cosine, poly (power 0.9), or step (0.1 from 90 %, 0.01 from 95 % of the steps)"
TEST_HELP = "files: pixels per side (cls) or of the short side (dense tasks) in evaluation"
SCALE_HELP = "files: smallest crop, a part of the image's area (cls), or smallest of random sizes (dense tasks)"
COLOR_HELP = "files, dense tasks: strength of random brightness, contrast, saturation and hue; 1 is usual"
AUGMENT_HELP = "cls: magnitude, 0 to 30, of two RandAugment operations, each for half of the images; 0: none"


@dataclass
class Settings:
    """The defaults are the recipe of cls on shapes."""

    task: str = setting("cls", TASK_HELP, choices=TASKS)
    data: str = setting(None, DATA_HELP)
    out: str = setting(None, "folder of checkpoints and logs (default: runs/TASK)")
    init: str = setting(None, "checkpoint whose weights are loaded where they fit")
    resume: bool = setting(False, "continue from OUT/last.pt, with its settings, if it exists")
    checkpoint_every: float = setting(10.0, "minutes between checkpoints within an epoch; 0: every step", 0)
    seed: int = setting(0, "seed of initial weights, order and augmentation", 0)
    workers: int = setting(None, "loader processes per process (default: spare cores, at most 16)", 0)
    accumulate: int = setting(1, "forward and backward passes per step and process, to save memory", 1)
    compile: bool = setting(False, "torch.compile the model: slow to start, then faster")
    variant: str = setting("nano", "size of the model", choices=VARIANTS)
    iterations: int = setting(3, "T, EM iterations of each clustering", 1)
    patch_size: int = setting(2, "pixels per side of a token: 4, or 2 for small images", choices=(2, 4))
    image_size: int = setting(48, "pixels per side of training images; the dense tasks crop larger ones", 32)
    test_size: int = setting(None, TEST_HELP, 32)
    epochs: int = setting(5, "passes over the images; one of shapes has 5,700 new scenes, with masks 5,000", 1)
    batch_size: int = setting(64, "images per step, over all processes", 1)
    lr: float = setting(3e-3, "peak learning rate; the default is scaled with --batch-size", 0)
    backbone_rate: float = setting(1.0, "with --init: learning rate of the backbone, as a multiple of --lr", 0)
    schedule: str = setting("cosine", SCHEDULE_HELP, choices=SCHEDULES)
    warmup_epochs: float = setting(1.0, "epochs over which the learning rate rises", 0)
    weight_decay: float = setting(0.05, "decay of matrices and convolutions; norms, biases and scales have none", 0)
    clip: float = setting(5.0, "maximum norm of the gradient; 0: do not clip", 0)
    drop_path: float = setting(0.0, "stochastic depth of the last block; on files, the default is the variant's", 0, 1)
    ema: float = setting(0.99, "decay of the averaged weights, which evaluation uses", 0, 1)
    evaluate_every: int = setting(5, "epochs between evaluations; the last epoch always has one", 1)
    smoothing: float = setting(0.0, "cls: label smoothing", 0, 1)
    mixup: float = setting(0.0, "cls: alpha of mixup; 0: none", 0)
    cutmix: float = setting(0.0, "cls: alpha of cutmix; 0: none", 0)
    min_scale: float = setting(0.08, SCALE_HELP, 0.01, 1)
    color: float = setting(0.0, COLOR_HELP, 0, 2.0)
    randaugment: int = setting(0, AUGMENT_HELP, 0, 31)
    erasing: float = setting(0.0, "cls: probability of erasing a rectangle", 0, 1)

    @property
    def mixing(self):
        return self.mixup > 0 or self.cutmix > 0


CLS_ONLY = "smoothing", "mixup", "cutmix", "randaugment", "erasing"
CLS = Settings()
DENSE = replace(CLS, image_size=96, patch_size=4, epochs=4, batch_size=8, warmup_epochs=0.3)
DENSE = replace(DENSE, ema=0.995, evaluate_every=1)
FULL = replace(CLS, variant="tiny", patch_size=4, drop_path=None, ema=0.9999, evaluate_every=1)
# Swin's recipe.  A magnitude of 27 of 30 is the usual 9 of 10.
IMAGENET = replace(FULL, image_size=224, epochs=300, batch_size=1024, lr=1e-3, warmup_epochs=20.0)
IMAGENET = replace(IMAGENET, smoothing=0.1, mixup=0.8, cutmix=1.0, randaugment=27, erasing=0.25)
COCO = replace(FULL, image_size=1024, test_size=800, epochs=50, batch_size=16, lr=1e-4, clip=0.1)
# Mask2Former scales by 0.1 to 2.  Here centers start from 10 x 10 cells of the crop: an image at a scale of 0.5
# covers about 19 of them, and one at 0.1 covers one.  From 0.5 on, padding is 22 % of the crops, not 36 %.
COCO = replace(COCO, schedule="step", warmup_epochs=0.1, evaluate_every=5, min_scale=0.5)
# A backbone from ImageNet should keep its features while neck and decoder are still random.
COCO = replace(COCO, backbone_rate=0.1)
ADE20K = replace(COCO, image_size=512, test_size=512, epochs=127, schedule="poly")  # 160,000 steps
ADE20K = replace(ADE20K, warmup_epochs=1.0, color=1.0)
RECIPES = {"dense tasks": DENSE, "ImageNet": IMAGENET, "COCO": COCO, "ADE20K": ADE20K}
SMALL = 10_000  # training images; fewer take a recipe of their own


def small_recipe(task, count, patch_size):
    """The recipe for a folder with `count` < SMALL training images.  Ours.

    50 epochs of 100 images would be 300 steps at COCO's batch size, and a model learns nothing in
    them.  So the fewer images, the more epochs; and steps count more, by a higher rate, also of a
    backbone from --init, and a shorter average.  Nano and small images fit a CPU, and overfit less.
    """
    recipe = replace(CLS, patch_size=patch_size, drop_path=None, evaluate_every=5, lr=2e-3, ema=0.995)
    unit = 8 * patch_size  # pixels: with half the patch size, half the image has as many tokens
    if task == "cls":
        epochs = min(300, max(30, 410_000 // count))
        recipe = replace(recipe, image_size=4 * unit, test_size=6 * unit, batch_size=64, ema=0.999)
        recipe = replace(recipe, smoothing=0.1, min_scale=0.2, randaugment=9)
    else:
        epochs = max(12, -(-9_000 // count))
        recipe = replace(recipe, image_size=8 * unit, test_size=8 * unit, batch_size=8, min_scale=0.5, color=1.0)
    batch_size = min(recipe.batch_size, 2 ** (count.bit_length() - 1))
    return replace(recipe, batch_size=batch_size, epochs=epochs, warmup_epochs=round(epochs / 30, 1))


def recipe_of(task, data, count, patch_size=4):
    """The recipe of a task on a folder with `count` training images, or on shapes if `data` is None."""
    if data is None:
        return CLS if task == "cls" else DENSE
    if count < SMALL:
        return small_recipe(task, count, patch_size)
    return IMAGENET if task == "cls" else ADE20K if task == "sem" else COCO


def make_parser():
    """A flag for each field of Settings, with its explanation and its defaults."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=style, argument_default=argparse.SUPPRESS
    )
    for item in fields(Settings):
        others = {name: getattr(recipe, item.name) for name, recipe in RECIPES.items()}
        others = [f"{name} {value}" for name, value in others.items() if value not in (None, item.default)]
        text = item.metadata["text"].replace("%", "%%")
        if item.type is bool:
            parser.add_argument("--" + item.name.replace("_", "-"), action="store_true", help=text)
            continue
        if isinstance(item.default, str):
            text += f"; one of {', '.join(item.metadata['choices'])}"
        if item.default is not None or others:
            default = "; ".join([str(item.default), ", ".join(others)]) if others else item.default
            text += f" (default: {default})"
        parser.add_argument("--" + item.name.replace("_", "-"), type=item.type, help=text)
    return parser


def check_settings(settings):
    """Raise InputError, in one line, if a setting is out of range, or does not fit the task."""
    for item in fields(Settings):
        value, limits = getattr(settings, item.name), item.metadata
        least, below, choices = (limits[key] for key in ("least", "below", "choices"))
        flag = "--" + item.name.replace("_", "-")
        if choices and value not in choices:
            raise InputError(f"{flag} must be one of {', '.join(map(str, choices))}, got {value}")
        if least is not None and value is not None and not least <= value < math.inf:  # NaN fails, too
            raise InputError(f"{flag} must be at least {least}, got {value}")
        if below is not None and value is not None and value >= below:
            raise InputError(f"{flag} must be below {below}, got {value}")
        if item.name in CLS_ONLY and value and settings.task != "cls":
            raise InputError(f"{flag} works with --task cls only; {settings.task} has its own augmentation")


def parse_flags():
    """Settings that are given, a dictionary: by flags, else by the run that is resumed."""
    flags = vars(make_parser().parse_args())
    flags.setdefault("out", os.path.join("runs", flags.get("task", "cls")))
    last, before = os.path.join(flags["out"], "last.pt"), {}
    if os.path.exists(last):
        if not flags.get("resume"):
            raise InputError(f"{last} exists: --resume continues that run, --out DIR starts another elsewhere")
        before = load_checkpoint(last)[1]["settings"]
    task = before.get("task", flags.get("task", "cls"))
    if flags.setdefault("task", task) != task:
        raise InputError(f"{last} belongs to a run of --task {task}; --out DIR starts another elsewhere")
    given = before | flags
    check_settings(replace(CLS, **given))
    return given


def complete(given, count):
    """Settings: those given, and the others from --init and from the recipe.  count: of training images."""
    task, data = given["task"], given.get("data")
    unknown = {"variant", "patch_size", "iterations"} - given.keys()  # none, if a run is resumed
    if given.get("init") and unknown:
        theirs = load_checkpoint(given["init"])[1]["arguments"]
        given = {name: theirs[name] for name in unknown} | given
    recipe = recipe_of(task, data, count, given.get("patch_size", 4))
    settings = replace(recipe, **given)
    if "lr" not in given:
        settings.lr *= settings.batch_size / recipe.batch_size
    stride = 8 * settings.patch_size
    if settings.image_size % stride:
        side = settings.image_size // stride * stride or stride
        raise InputError(f"--image-size {settings.image_size} is not a multiple of {stride}; take {side}")
    if settings.workers is None:
        settings.workers = default_workers()
    if settings.drop_path is None:
        settings.drop_path = VARIANTS[settings.variant]["drop_path"]
    return settings


# --------------------------------------------------------------------------------------------------
# Data, model, optimizer
# --------------------------------------------------------------------------------------------------
def training_set(task, data, seed):
    """The training images, which augment() makes ready for use."""
    if data is None:
        scenes = 5_700 if task in ("cls", "det") else 5_000  # without masks, a scene costs less
        return Shapes(scenes, None, seed, "train", task)
    if task == "cls":
        return Folder(data, "train", None, seed)
    if task == "sem":
        return Ade(data, "train", None, seed=seed)
    return Coco(data, "train", task, None, seed=seed)


def augment(train, settings):
    """Set the augmentation of a training set."""
    size, least = settings.image_size, settings.min_scale
    train.size = size  # shapes are drawn in this size
    if settings.task == "cls":
        train.transform = train_transform(size, least, settings.randaugment, settings.erasing)
    else:
        train.transform = dense_train_transform(settings.task, size, least, settings.color)


def evaluation_batch_size(settings, world_size):
    """Images per process.  Those of dense tasks on files differ in size, so they go one by one."""
    if settings.task != "cls" and settings.data is not None:
        return 1
    return max(1, settings.batch_size // world_size)


def take_weights(model, path, rank):
    """Load the averaged weights of a checkpoint that fit by name and shape; print which modules are new."""
    theirs, ours = load_checkpoint(path)[1]["ema"], model.state_dict()
    fits = lambda name, value: name in ours and value.shape == ours[name].shape
    fitting = {name: value for name, value in theirs.items() if fits(name, value)}
    if not any(name.startswith("backbone.stages") for name in fitting):
        raise InputError(f"{path}: its backbone does not fit this model; give the --variant it was trained with")
    model.load_state_dict(fitting, strict=False)
    if rank == 0:
        # "a.b.c" -> a, a.b, a.b.c.  The first one without a tensor from the checkpoint is new as a
        # whole: "head", and not the names of all of its tensors.
        prefixes = lambda name: [name[:i] for i, letter in enumerate(name + ".") if letter == "."]
        taken = {prefix for name in fitting for prefix in prefixes(name)}
        new = [next(p for p in prefixes(name) if p not in taken) for name in ours if name not in fitting]
        new = f"; new: {', '.join(dict.fromkeys(new))}" if new else ""
        print(f"{path}: took {len(fitting)} of {len(ours)} tensors{new}")


def parameter_groups(model, weight_decay, backbone_rate):
    """Groups for the optimizer.  "rate" multiplies the learning rate: backbone_rate or 1.

    Only matrices and kernels decay: there is no reason for a norm, bias or scale to be near zero.
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
    """Write a file atomically: write(file) fills a temporary file, which then replaces `path`.

    If the program is killed at any point, `path` is still the whole old file or the whole new one.
    Raises InputError if the file cannot be written; the old one is then still intact.
    """
    part = path + ".part"
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # otherwise a power failure could leave an empty file
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError when a disk is full
        with contextlib.suppress(OSError):
            os.remove(part)
        why = str(error).splitlines()[0]
        raise InputError(f"{path}: cannot be written ({why}); the previous file is still intact") from error


# --------------------------------------------------------------------------------------------------
# The run
# --------------------------------------------------------------------------------------------------
MAX_BAD_STEPS = 20  # in a row without a finite loss or gradient: more than one bad image can cause


def on_signals(action):
    """Call action(exit code) on SIGTERM (schedulers, torchrun) and on SIGINT (Ctrl-C)."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: action(128 + number))


def resumed(path, train, batch_size):
    """The checkpoint of a run.  Raises InputError unless it has the same classes, images and batches."""
    checkpoint = load_checkpoint(path)[1]
    classes, batch = checkpoint["classes"], checkpoint["settings"]["batch_size"]
    images = checkpoint.get("images", len(train))
    if list(classes) != list(train.classes):
        raise InputError(f"{path} belongs to a run with {len(classes)} other classes; give its --data")
    if (images, batch) != (len(train), batch_size):
        what = f"{images} images in batches of {batch}, now {len(train)} in batches of {batch_size}"
        may = "--epochs, --lr, --workers and the number of processes may change; --init starts anew from it"
        raise InputError(f"{path} is of a run on {what}; {may}")
    return checkpoint


class Run:
    """A training run.  Its methods are a step, the end of an epoch and the loop over both."""

    def __init__(self, settings, train, val, rank, world_size, device):
        self.settings, self.train, self.val = settings, train, val
        self.rank, self.world_size, self.device = rank, world_size, device
        self.last = os.path.join(settings.out, "last.pt")
        self.steps_per_epoch = max(1, len(train) // settings.batch_size)
        self.steps = settings.epochs * self.steps_per_epoch
        self.step, self.log = 0, []  # steps done so far; a dictionary for each epoch
        self.sums, self.skipped = {}, 0  # of this epoch: losses, and steps without a finite one
        self.bad_steps = 0  # consecutive steps without a finite loss or gradient
        self.stop_signals = []  # exit codes of the signals received
        torch.manual_seed(settings.seed)
        self.model = model = ClusterFormer(
            settings.task,
            settings.variant,
            len(train.classes),
            settings.patch_size,
            settings.iterations,
            settings.drop_path,
            settings.smoothing,
            getattr(train, "things", None),
        )
        checkpoint = None
        if settings.resume and os.path.exists(self.last):
            checkpoint = resumed(self.last, train, settings.batch_size)
            model.load_state_dict(checkpoint["model"])
            for name in ("step", "log", "sums", "skipped"):
                setattr(self, name, checkpoint[name])
        elif settings.init:
            take_weights(model, settings.init, rank)
        model.to(device)
        # A depthwise weight (C, 1, 3, 3) has the same memory layout with channels first or last.  Its
        # gradient has channels last.  If both agree, DistributedDataParallel does not copy it.
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d) and module.groups > 1:
                module.to(memory_format=torch.channels_last)
        self.ema = copy.deepcopy(model).requires_grad_(False)
        backbone_rate = settings.backbone_rate if settings.init else 1.0
        groups = parameter_groups(model, settings.weight_decay, backbone_rate)
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        if checkpoint:
            self.ema.load_state_dict(checkpoint["ema"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.runner = torch.compile(model) if settings.compile else model
        if world_size > 1:  # gradients share memory with the buckets that are exchanged
            gpu = [device.index] if device.type == "cuda" else None
            self.runner = DistributedDataParallel(self.runner, gpu, gradient_as_bucket_view=True)
        if rank == 0:
            os.makedirs(settings.out, exist_ok=True)
            self.introduce(checkpoint)

    def introduce(self, checkpoint):
        settings, train, val = self.settings, self.train, self.val
        size = sum(parameter.numel() for parameter in self.model.parameters()) / 1e6
        print(
            f"{settings.task}, {settings.variant}, {size:.1f} M parameters, {len(train.classes)} classes; "
            f"{len(train)} training images of {settings.image_size} x {settings.image_size} and {len(val)} "
            f"validation images from {settings.data or 'shapes'}; {self.steps} steps of {settings.batch_size} "
            f"images on {self.world_size} x {self.device.type}"
        )
        if settings.data and len(train) < SMALL:
            why = "enough steps, of images that a CPU can carry; it differs from the full recipe in"
            print(f"fewer than {SMALL:,} images: recipe for small data, {why}")
            small = recipe_of(settings.task, settings.data, len(train), settings.patch_size)
            full, values = asdict(recipe_of(settings.task, settings.data, SMALL)), asdict(settings)
            changed = [name for name, value in asdict(small).items() if value != full[name]]
            print(*(f"--{name.replace('_', '-')} {values[name]}" for name in changed))
        if checkpoint:
            print(f"resuming after step {self.step}")
            before, now = checkpoint["processes"], self.world_size
            if before != now:
                same = "every step uses the same images, but rounding and stochastic depth differ"
                print(f"{before} processes before, {now} now: {same}")

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
        state = dict(version=VERSION, arguments=self.model.arguments, classes=list(self.train.classes))
        state |= dict(model=self.model.state_dict(), ema=self.ema.state_dict())
        state |= dict(optimizer=self.optimizer.state_dict(), settings=asdict(self.settings) | {"resume": False})
        state |= dict(step=self.step, log=self.log, sums=self.sums, skipped=self.skipped)
        state |= dict(processes=self.world_size, images=len(self.train))
        save(os.path.join(self.settings.out, name), lambda file: torch.save(state, file))

    def leave(self, code):
        if self.rank == 0:
            how = f"--out {self.settings.out} --resume continues from there"
            print(f"stopped after step {self.step} of {self.steps}; {how}", file=sys.stderr)
        sys.exit(code)

    def gradients(self, chunks):
        """Backward passes of this process's part of a batch.  Returns its losses, a dictionary."""
        settings, device = self.settings, self.device
        # With mixing, the first sample of a chunk is only mixed into the second, and has no loss.
        count = sum(self.model.count(targets[int(settings.mixing) :]) for _, targets in chunks)
        total = self.all_reduce(torch.full((), float(count), device=device)).clamp(min=1)
        parts = Counter()
        for i, chunk in enumerate(chunks):
            images, targets = (batch_to_device(part, device) for part in chunk)
            images = as_float(images)
            if settings.mixing:
                strength = settings.mixup, settings.cutmix, settings.seed, self.step
                images, targets = mix(images, targets, len(self.train.classes), *strength)
            # Processes exchange gradients once per step, in the last chunk.
            waits = self.world_size > 1 and i < len(chunks) - 1
            with self.runner.no_sync() if waits else contextlib.nullcontext():
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    output = self.runner(images)
                losses = self.model.loss(output, targets)
                losses = {name: loss / total for name, loss in losses.items()}
                (sum(losses.values()) * self.world_size).backward()  # DDP averages; losses are sums
            parts.update({name: loss.detach() for name, loss in losses.items()})
        return parts

    def train_step(self, chunks):
        """One optimizer step.  Returns nonzero if any process has received a stop signal."""
        settings, lr = self.settings, self.lr_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["rate"]
        # Seeded by step: a resumed run draws the same stochastic depth and mask points.
        state = np.random.SeedSequence((settings.seed, self.step, self.rank)).generate_state(1)
        torch.manual_seed(int(state[0]))
        parts = self.gradients(chunks)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip or math.inf)
        # Reduce the stop flag, gradient norm and losses, so that all ranks take the same decision.
        # Reading them is the only time in a step that the CPU waits for the GPU.
        stop_flag = torch.full((), float(len(self.stop_signals)), device=self.device)
        stop, *values = self.all_reduce(torch.stack([stop_flag, norm, *parts.values()])).tolist()
        if all(map(math.isfinite, values)):
            self.optimizer.step()
            decay = min(settings.ema, (1 + self.step) / (10 + self.step))  # a short memory at first
            get_ema_multi_avg_fn(decay)(list(self.ema.parameters()), list(self.model.parameters()), None)
            losses = zip(parts, values[1:])
            self.sums = {name: self.sums.get(name, 0.0) + value for name, value in losses}
            self.bad_steps = 0
        else:
            self.skipped, self.bad_steps = self.skipped + 1, self.bad_steps + 1
            if self.bad_steps == MAX_BAD_STEPS:
                first = self.step - MAX_BAD_STEPS + 2
                steps = f"{MAX_BAD_STEPS} steps in a row, {first} to {self.step + 1}"
                what = f"loss or gradient was not finite in {steps}"
                remedy = f"lower --lr (it is {lr:.1e} here) or --clip, or check these images"
                raise InputError(f"{what}: {remedy}; {self.last} is from before them")
        self.optimizer.zero_grad()
        self.step += 1
        return stop

    def end_epoch(self, broken, seconds, images_per_second):
        """Evaluate, log and save.  broken: bool (images,), True for images that could not be read."""
        settings, metrics, key = self.settings, {}, METRIC[self.settings.task]
        if self.rank == 0:
            self.write_checkpoint("last.pt")
        if (len(self.log) + 1) % settings.evaluate_every == 0 or self.step == self.steps:
            on_signals(self.leave)  # at once: an evaluation may take minutes, and nothing is lost
            batch_size = evaluation_batch_size(settings, self.world_size)
            metrics = evaluate(self.ema, self.val, self.device, batch_size, settings.workers)
            on_signals(self.stop_signals.append)
        broken = self.all_reduce(broken.to(self.device), dist.ReduceOp.MAX)
        good = max(1, self.done_in_epoch() - self.skipped)
        losses = {name: value / good for name, value in self.sums.items()}
        line = dict(epoch=len(self.log) + 1, step=self.step, loss=sum(losses.values()))
        line |= dict(lr=self.lr_at(self.step - 1)) | metrics
        line |= dict(images_per_second=images_per_second, seconds=seconds)
        line |= {f"loss_{name}": value for name, value in losses.items() if len(losses) > 1}
        if self.device.type == "cuda":
            line["memory_MiB"] = torch.cuda.max_memory_allocated() / 2**20
        earlier = [line[key] for line in self.log if key in line]
        improved = metrics and metrics[key] > max([-1.0, *earlier])
        self.log.append(line)
        skipped, self.sums, self.skipped = self.skipped, {}, 0
        if self.rank:
            return
        if metrics:
            self.write_text("metrics.json", json.dumps(metrics, indent=2))
        self.write_text("log.jsonl", "".join(json.dumps(line) + "\n" for line in self.log))
        if improved:
            self.write_checkpoint("best.pt")
        self.write_checkpoint("last.pt")  # comes last: a run killed before it repeats all of this
        found = describe(metrics, settings.task) + "  " if metrics else ""
        speed = f"{images_per_second:.0f} images/s"
        tqdm.write(f"epoch {len(self.log)}/{settings.epochs}  loss {line['loss']:.3f}  {found}{speed}")
        if broken.any():
            tqdm.write(f"{int(broken.sum())} of {len(self.train)} training images could not be read so far")
        if skipped:
            tqdm.write(f"{skipped} steps of this epoch were skipped: their loss or gradient was not finite")

    def loop(self, stream, broken):
        """The remaining steps.  stream: chunks of this process, in order.  broken: as in end_epoch."""
        settings, start, start_step, saved = self.settings, time.time(), self.step, time.time()
        on_signals(self.stop_signals.append)  # the current step is finished first
        with tqdm(total=self.steps, initial=self.step, disable=True if self.rank else None) as bar:
            while True:
                seconds = max(time.time() - start, 1e-9)
                speed = (self.step - start_step) * settings.batch_size / seconds
                if self.done_in_epoch() == self.steps_per_epoch:
                    self.end_epoch(broken, seconds, speed)
                    start, start_step, saved = time.time(), self.step, time.time()
                if self.step >= self.steps:
                    return
                stop = self.train_step([next(stream) for _ in range(settings.accumulate)])
                bar.update()
                if self.step % 10 == 0:
                    mean = sum(self.sums.values()) / max(1, self.done_in_epoch() - self.skipped)
                    lr = self.lr_at(self.step - 1)
                    bar.set_postfix(loss=f"{mean:.3f}", lr=f"{lr:.1e}", images_per_s=f"{speed:.0f}")
                # Not during bad steps: they may end the run, and resuming in them would not help.
                due = time.time() - saved > 60 * settings.checkpoint_every
                if self.rank == 0 and not self.bad_steps and (stop or due):
                    self.write_checkpoint("last.pt")
                    saved = time.time()
                if stop:
                    self.leave(max(self.stop_signals, default=128 + signal.SIGTERM))


def main():
    given = parse_flags()
    rank, world_size, device = start_processes()
    train = training_set(given["task"], given.get("data"), given.get("seed", CLS.seed))
    settings = complete(given, len(train))
    augment(train, settings)
    size = settings.test_size or settings.image_size
    val = validation_set(settings.data, size, settings.task, train.classes)
    check(train, "training")
    check(val, "validation")
    job = Run(settings, train, val, rank, world_size, device)
    batches = GlobalBatches(
        len(train),
        settings.batch_size,
        job.steps,
        settings.seed,
        rank,
        world_size,
        settings.accumulate,
        settings.mixing,
        job.step,
    )
    readable = SkipBroken(train)
    join = None if settings.task == "cls" else stacked  # None: labels are numbers
    options = dict(batch_sampler=batches, collate_fn=join, worker_init_fn=ignore_signals)
    loader = loader_of(readable, settings.workers, device, **options)
    with contextlib.closing(batches_of(loader)) as stream:
        job.loop(stream, readable.broken)
    if rank == 0:
        print(f"{describe(job.log[-1], settings.task)} on {len(val)} held-out images")
        print(f"python eval.py --checkpoint {job.last}")


if __name__ == "__main__":
    run(main)
