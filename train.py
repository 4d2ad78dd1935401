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

A setting that is not given comes from the run that is resumed, from --init (variant, patch size and T), or
from the recipe of the task and the data: shapes; fewer than 10,000 training images; or the full scale of
ImageNet, COCO and ADE20K.  The run prints all of them.  It writes OUT/last.pt, OUT/best.pt, OUT/metrics.json
and OUT/log.jsonl, a line per epoch.  However it is stopped, --resume continues it from OUT/last.pt, and on a
CPU it ends with the weights of a run that was never stopped.
"""

import argparse
import contextlib
import copy
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
from data import GlobalBatches, InputError, Parser, SkipBroken, as_float, batches_of, count_images
from data import default_workers, in_one_line, make_dataset, mix, number, stacked, start_processes, to_json
from eval import METRIC, describe, evaluate, read_checkpoint

# --------------------------------------------------------------------------------------------------
# Recipes.  Every key is a flag
# --------------------------------------------------------------------------------------------------
CLS = dict(variant="nano", patch_size=2, image_size=48, test_size=None, epochs=5, batch_size=64, lr=3e-3)
CLS |= dict(schedule="cosine", warmup_epochs=1.0, clip=5.0, drop_path=0.0, ema=0.99, evaluate_every=5)
CLS |= dict(backbone_rate=1.0, smoothing=0.0, mixup=0.0, cutmix=0.0, randaugment=0, erasing=0.0)
CLS |= dict(min_scale=0.08, color=0.0)
DENSE = CLS | dict(image_size=96, patch_size=4, epochs=4, batch_size=8, warmup_epochs=0.3, ema=0.995)
DENSE |= dict(evaluate_every=1)
FULL = CLS | dict(variant="tiny", patch_size=4, drop_path=None, ema=0.9999, evaluate_every=1)
# Swin's recipe.  A magnitude of 27 of 30 is the usual 9 of 10.
IMAGENET = FULL | dict(image_size=224, epochs=300, batch_size=1024, lr=1e-3, warmup_epochs=20.0)
IMAGENET |= dict(smoothing=0.1, mixup=0.8, cutmix=1.0, randaugment=27, erasing=0.25)
COCO = FULL | dict(image_size=1024, test_size=800, epochs=50, batch_size=16, lr=1e-4, clip=0.1)
# Mask2Former scales by 0.1 to 2.  Here centers start from 10 x 10 cells of the crop: an image at a scale
# of 0.5 covers about 19 of them, and one at 0.1 covers one.  From 0.5 on, padding is 22 % of the crops, not
# 36 %.
COCO |= dict(schedule="step", warmup_epochs=0.1, evaluate_every=5, min_scale=0.5)
# A backbone from ImageNet should keep its features while neck and decoder are still random.
COCO |= dict(backbone_rate=0.1)
ADE20K = COCO | dict(image_size=512, test_size=512, epochs=127, schedule="poly", warmup_epochs=1.0, color=1.0)
SMALL = 10_000  # training images; fewer take a recipe of their own


def small_recipe(task, count, patch_size):
    """The recipe for a folder with `count` < SMALL training images.  Ours.

    50 epochs of 100 images would be 300 steps at COCO's batch size, and a model learns nothing in
    them.  So the fewer images, the more epochs; and steps count more, by a higher rate, also of a
    backbone from --init, and a shorter average.  Nano and small images fit a CPU, and overfit less.
    """
    recipe = CLS | dict(patch_size=patch_size, drop_path=None, evaluate_every=5, lr=2e-3, ema=0.995)
    unit = 8 * patch_size  # pixels: with half the patch size, half the image has as many tokens
    if task == "cls":
        recipe |= dict(image_size=4 * unit, test_size=6 * unit, batch_size=64, ema=0.999)
        recipe |= dict(epochs=min(300, max(30, 410_000 // count)), smoothing=0.1, min_scale=0.2, randaugment=9)
    else:
        recipe |= dict(image_size=8 * unit, test_size=8 * unit, batch_size=8)
        recipe |= dict(epochs=max(12, math.ceil(9_000 / count)), min_scale=0.5, color=1.0)
    while recipe["batch_size"] > count:
        recipe["batch_size"] //= 2
    return recipe | dict(warmup_epochs=round(recipe["epochs"] / 30, 1))


def recipe_of(task, data, count, patch_size=4):
    """The recipe of a task on a folder with `count` training images, or on shapes if `data` is None."""
    if data is None:
        return CLS if task == "cls" else DENSE
    if count < SMALL:
        return small_recipe(task, max(1, count), patch_size)
    return IMAGENET if task == "cls" else ADE20K if task == "sem" else COCO


# --------------------------------------------------------------------------------------------------
# Settings
# --------------------------------------------------------------------------------------------------
# Fraction of the peak learning rate; t goes from 0 after warm-up to 1 at the end.
SCHEDULES = {
    "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t)),
    "poly": lambda t: (1 - t) ** 0.9,
    "step": lambda t: 1.0 if t < 0.9 else 0.1 if t < 0.95 else 0.01,
}


def make_parser():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    whole, real = (lambda *limits, kind=kind: number(kind, *limits) for kind in (int, float))
    add("--task", choices=TASKS, default="cls", help="of images, boxes, masks, pixels, things and stuff")
    add("--data", metavar="DIR", help="class folders (cls), COCO, ADE20K (sem); none: shapes")
    add("--out", metavar="DIR", help="folder of checkpoints and logs (default: runs/TASK)")
    add("--init", metavar="FILE", help="checkpoint whose weights are loaded where they fit")
    add("--resume", action="store_true", help="continue from OUT/last.pt, with its settings, if it exists")
    add("--checkpoint-every", type=real(0), default=10.0, help="minutes between checkpoints (default: 10)")
    add("--seed", type=whole(0, 2**63), default=0, help="of initial weights, order and augmentation (default: 0)")
    add("--workers", type=whole(0), help="loader processes per process (default: spare cores, at most 16)")
    add("--accumulate", type=whole(1), default=1, help="passes per step, to save memory (default: 1)")
    add("--compile", action="store_true", help="torch.compile the model: slow to start, then faster")
    add("--iterations", type=whole(1), default=3, help="T, EM iterations of each clustering (default: 3)")
    add("--weight-decay", type=real(0), default=0.05, help="of matrices and kernels (default: 0.05)")
    add = parser.add_argument_group("in the recipe, unless given").add_argument
    add("--variant", choices=VARIANTS, help="size of the model")
    add("--patch-size", type=int, choices=(2, 4), help="pixels per side of a token; 2 for small images")
    add("--image-size", type=whole(32), help="pixels per side of training images or crops")
    add("--test-size", type=whole(32), help="pixels per side, or of the short side, in evaluation")
    add("--epochs", type=whole(1), help="passes over the images")
    add("--batch-size", type=whole(1), help="images per step, over all processes")
    add("--lr", type=real(0), help="peak learning rate; that of the recipe is scaled with --batch-size")
    add("--backbone-rate", type=real(0), help="with --init: rate of the backbone, as a multiple of --lr")
    add("--schedule", choices=SCHEDULES, help="step: 0.1 from 90 %%, 0.01 from 95 %% of the steps")
    add("--warmup-epochs", type=real(0), help="epochs over which the learning rate rises")
    add("--clip", type=real(0), help="maximum norm of the gradient; 0: do not clip")
    add("--drop-path", type=real(0, 1), help="stochastic depth of the last block")
    add("--ema", type=real(0, 1), help="decay of the averaged weights, which evaluation uses")
    add("--evaluate-every", type=whole(1), help="epochs between evaluations; the last epoch always has one")
    add("--min-scale", type=real(0.01, 1), help="smallest crop, a part of the area; dense: smallest size")
    add("--color", type=real(0, 2), help="dense tasks: strength of random colors; 1 is usual")
    add("--smoothing", type=real(0, 1), help="cls: label smoothing")
    add("--mixup", type=real(0), help="cls: alpha of mixup; 0: none")
    add("--cutmix", type=real(0), help="cls: alpha of cutmix; 0: none")
    add("--randaugment", type=number(int, 0, 31), help="cls: magnitude of RandAugment; 0: none")
    add("--erasing", type=real(0, 1), help="cls: probability of erasing a rectangle")
    return parser


def parse_settings():
    """Settings: flags, else those of the run that is resumed, of --init, and of the recipe."""
    parser = make_parser()
    given = parser.parse_args()
    if "" in (given.data, given.out, given.init):
        raise InputError("--data, --out and --init need a name that is not empty")
    last = os.path.join(given.out or os.path.join("runs", given.task), "last.pt")
    best = os.path.join(os.path.dirname(last), "best.pt")
    if os.path.exists(best) and not os.path.exists(last):
        raise InputError(f"{best} is there without last.pt, and would be replaced; give another --out")
    if os.path.exists(last):
        if not given.resume:
            raise InputError(f"{last} exists: --resume continues that run, --out DIR starts another")
        parser.set_defaults(**read_checkpoint(last)["settings"])
    else:
        theirs = read_checkpoint(given.init)["arguments"] if given.init else {}
        theirs = {name: theirs[name] for name in ("variant", "patch_size", "iterations") if name in theirs}
        count = count_images(given.task, given.data, SMALL) if given.data else SMALL
        recipe = recipe_of(given.task, given.data, count, given.patch_size or theirs.get("patch_size", 4))
        parser.set_defaults(**recipe | theirs | dict(lr=None))
    settings = parser.parse_args()
    task = parser.get_default("task")
    if settings.task != task and os.path.exists(last):
        raise InputError(f"{last} is of a run of --task {task}; --out DIR starts another")
    settings.out, settings.resume = os.path.dirname(last), given.resume
    if settings.lr is None:
        settings.lr = recipe["lr"] * settings.batch_size / recipe["batch_size"]
    if settings.drop_path is None:
        settings.drop_path = VARIANTS[settings.variant]["drop_path"]
    if settings.workers is None:
        settings.workers = default_workers()
    settings.test_size = settings.test_size or settings.image_size
    settings.data = settings.data and os.path.abspath(settings.data)
    check_settings(settings, given)
    return settings


def check_settings(settings, given):
    """Raise InputError for settings that do not fit each other."""
    stride = 8 * settings.patch_size
    if settings.image_size % stride:
        side = max(stride, settings.image_size // stride * stride)
        raise InputError(f"--image-size {settings.image_size} is not a multiple of {stride}; take {side}")
    for name in ("smoothing", "mixup", "cutmix", "randaugment", "erasing", "color"):
        if getattr(given, name) and (settings.task == "cls") == (name == "color"):
            raise InputError(f"--{name} has no effect on --task {settings.task}; leave it out")
    chunk = settings.batch_size // settings.accumulate // int(os.environ.get("WORLD_SIZE", 1))
    if settings.mixup + settings.cutmix and chunk < 2:
        raise InputError("--mixup and --cutmix mix the images of a chunk, which has one; raise --batch-size")


# --------------------------------------------------------------------------------------------------
# Weights, optimizer, files
# --------------------------------------------------------------------------------------------------
def take_weights(model, path):
    """Load the averaged weights that fit by name and shape.  Returns the names of the model's others."""
    theirs, ours = read_checkpoint(path)["ema"], model.state_dict()
    fitting = {name: x for name, x in theirs.items() if name in ours and x.shape == ours[name].shape}
    if not any(name.startswith("backbone.stages") for name in fitting):
        raise InputError(f"{path}: its backbone does not fit; give the --variant it was trained with")
    return model.load_state_dict(fitting, strict=False).missing_keys


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
        os.makedirs(os.path.dirname(path), exist_ok=True)
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


def on_signals(action):
    """Call action(exit code) on SIGTERM (schedulers, torchrun) and on SIGINT (Ctrl-C)."""
    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, lambda kind, frame: action(128 + kind))


# --------------------------------------------------------------------------------------------------
# The run
# --------------------------------------------------------------------------------------------------
MAX_BAD_STEPS = 20  # in a row without a finite loss or gradient: more than one bad image can cause


class Run:
    """A training run.  Its methods are a step, the end of an epoch and the loop over both."""

    def __init__(self, settings, train, val, rank, world_size, device):
        self.settings, self.train, self.val = settings, train, val
        self.rank, self.world_size, self.device = rank, world_size, device
        self.last = os.path.join(settings.out, "last.pt")
        self.steps_per_epoch = max(1, len(train) // settings.batch_size)
        self.steps = settings.epochs * self.steps_per_epoch
        self.step, self.log, self.sums = 0, [], {}  # steps done; a dictionary per epoch; losses of this epoch
        self.bad_steps = 0  # consecutive steps without a finite loss or gradient
        self.stop_signals = []  # exit codes of the signals received
        torch.manual_seed(settings.seed)
        self.model = ClusterFormer(
            settings.task,
            settings.variant,
            len(train.classes),
            settings.patch_size,
            settings.iterations,
            settings.drop_path,
            settings.smoothing,
            getattr(train, "things", None),
        )
        checkpoint, new = None, []
        if settings.resume and os.path.exists(self.last):
            checkpoint = self.same_run(read_checkpoint(self.last))
            self.model.load_state_dict(checkpoint["model"])
            self.step, self.log, self.sums = (checkpoint[name] for name in ("step", "log", "sums"))
        elif settings.init:
            new = take_weights(self.model, settings.init)
        self.model.to(device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        backbone_rate = settings.backbone_rate if settings.init else 1.0
        groups = parameter_groups(self.model, settings.weight_decay, backbone_rate)
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        if checkpoint:
            self.ema.load_state_dict(checkpoint["ema"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.runner = torch.compile(self.model) if settings.compile else self.model
        if world_size > 1:  # gradients share memory with the buckets that are exchanged
            gpu = [device.index] if device.type == "cuda" else None
            self.runner = DistributedDataParallel(self.runner, gpu, gradient_as_bucket_view=True)
        if rank == 0:
            self.introduce(new)

    def same_run(self, checkpoint):
        """A checkpoint.  Raises InputError unless it has the classes, images and batches of this run."""
        batch_size = checkpoint["settings"]["batch_size"]
        compared = dict(batch_size=(batch_size, self.settings.batch_size))
        compared |= dict(images=(checkpoint["images"], len(self.train)))
        compared |= dict(classes=(checkpoint["classes"], list(self.train.classes)))
        for name, (before, now) in compared.items():
            if before != now:
                change = f"with {name} {str(before)[:40]}, not {str(now)[:40]}"
                may = "--epochs, --lr, --workers and processes may change; --init starts anew from it"
                raise InputError(f"{self.last} is of a run {change}; {may}")
        return checkpoint

    def introduce(self, new):
        settings, size = self.settings, sum(parameter.numel() for parameter in self.model.parameters()) / 1e6
        print(f"training data: {self.train.summary()}\nvalidation data: {self.val.summary()}")
        if settings.resume and not self.step:
            print(f"{self.last} is not there yet: this is a new run")
        given = {name: value for name, value in vars(settings).items() if value is not None and value is not False}
        print(*(f"--{name.replace('_', '-')} {value}" for name, value in given.items()))
        steps = f"after step {self.step} of {self.steps} steps" if self.step else f"{self.steps} steps"
        print(f"{size:.1f} M parameters, {steps} on {self.world_size} x {self.device.type}")
        if new:
            modules = dict.fromkeys(".".join(name.split(".")[:2]) for name in new)
            print(f"{settings.init} has no fitting weights of {', '.join(modules)}")

    def lr_at(self, step):
        warmup_steps = self.settings.warmup_epochs * self.steps_per_epoch
        return learning_rate(step, self.steps, warmup_steps, self.settings.lr, self.settings.schedule)

    def done_in_epoch(self):
        return self.step - len(self.log) * self.steps_per_epoch

    def all_reduce(self, tensor):
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def write_text(self, name, text):
        save(os.path.join(self.settings.out, name), lambda file: file.write(text.encode()))

    def write_checkpoint(self, name):
        state = dict(version=VERSION, arguments=self.model.arguments, classes=list(self.train.classes))
        state |= dict(model=self.model.state_dict(), ema=self.ema.state_dict())
        state |= dict(optimizer=self.optimizer.state_dict(), settings=vars(self.settings))
        state |= dict(images=len(self.train))
        state |= dict(step=self.step, log=self.log, sums=self.sums)
        save(os.path.join(self.settings.out, name), lambda file: torch.save(state, file))

    def leave(self, code):
        if self.rank == 0:
            how = f"--out {self.settings.out} --resume continues from there"
            print(f"stopped after step {self.step} of {self.steps}; {how}", file=sys.stderr)
        sys.exit(code)

    def gradients(self, chunks):
        """Backward passes of this process's part of a batch.  Returns its losses, a dictionary."""
        settings, device = self.settings, self.device
        count = float(sum(self.model.count(targets) for _, targets in chunks))
        total = self.all_reduce(torch.full((), count, device=device)).clamp(min=1)
        parts = Counter()
        for i, chunk in enumerate(chunks):
            images, targets = (batch_to_device(part, device) for part in chunk)
            images = as_float(images)
            if settings.mixup or settings.cutmix:
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
            losses = dict(zip(parts, values[1:]), steps=1)
            self.sums = {name: self.sums.get(name, 0.0) + value for name, value in losses.items()}
            self.bad_steps = 0
        else:
            self.bad_steps += 1
            if self.rank == 0:
                print(f"step {self.step + 1} is skipped: loss or gradient is not finite", file=sys.stderr)
            if self.bad_steps == MAX_BAD_STEPS:
                what = f"not finite in {MAX_BAD_STEPS} steps in a row, up to step {self.step + 1}"
                remedy = f"lower --lr (it is {lr:.1e} here) or --clip, or check these images"
                raise InputError(f"loss or gradient was {what}: {remedy}; {self.last} is from before")
        self.optimizer.zero_grad()
        self.step += 1
        return stop

    def means(self):
        """Mean losses of this epoch's steps so far, but of those that were skipped."""
        losses = {name: value for name, value in self.sums.items() if name != "steps"}
        return {name: value / self.sums["steps"] for name, value in losses.items()}

    def end_epoch(self, seconds, images_per_second):
        """Evaluate, log and save."""
        settings, metrics, key = self.settings, {}, METRIC[self.settings.task]
        if self.rank == 0:
            self.write_checkpoint("last.pt")
        if (len(self.log) + 1) % settings.evaluate_every == 0 or self.step == self.steps:
            on_signals(self.leave)  # at once: an evaluation may take minutes, and nothing is lost
            # Photographs of the dense tasks are large, and each has its own size.
            one = settings.task != "cls" and settings.data
            batch_size = 1 if one else max(1, settings.batch_size // self.world_size)
            metrics = evaluate(self.ema, self.val, self.device, batch_size, settings.workers)
            on_signals(self.stop_signals.append)
        losses = self.means()
        line = dict(epoch=len(self.log) + 1, step=self.step, loss=sum(losses.values()) if losses else None)
        line |= dict(lr=self.lr_at(self.step - 1)) | metrics
        line |= dict(images_per_second=images_per_second, seconds=seconds)
        line |= {f"loss_{name}": value for name, value in losses.items() if len(losses) > 1}
        if self.device.type == "cuda":
            line["memory_MiB"] = torch.cuda.max_memory_allocated() / 2**20
        earlier = [line[key] for line in self.log if key in line]
        improved = metrics and metrics[key] > max([-1.0, *earlier])
        self.log.append(line)
        self.sums = {}
        if self.rank:
            return
        if metrics:
            self.write_text("metrics.json", to_json(metrics, indent=2))
        self.write_text("log.jsonl", "".join(to_json(line) + "\n" for line in self.log))
        if improved:
            self.write_checkpoint("best.pt")
        self.write_checkpoint("last.pt")  # comes last: a run killed before it repeats all of this
        found = describe(metrics, settings.task) + "  " if metrics else ""
        loss, speed = f"loss {line['loss']:.3f}" if losses else "no finite loss", f"{images_per_second:.0f} images/s"
        tqdm.write(f"epoch {len(self.log)}/{settings.epochs}  {loss}  {found}{speed}")

    def loop(self, stream):
        """The remaining steps.  stream: chunks of this process, in order."""
        settings, start, start_step, saved = self.settings, time.time(), self.step, time.time()
        on_signals(self.stop_signals.append)  # the current step is finished first
        if self.rank == 0:  # can it be written?
            self.write_text("log.jsonl", "".join(to_json(line) + "\n" for line in self.log))
        with tqdm(total=self.steps, initial=self.step, disable=True if self.rank else None) as bar:
            while True:
                seconds = max(time.time() - start, 1e-9)
                speed = (self.step - start_step) * settings.batch_size / seconds
                if self.done_in_epoch() == self.steps_per_epoch:
                    self.end_epoch(seconds, speed)
                    start, start_step, saved = time.time(), self.step, time.time()
                if self.step >= self.steps:
                    return
                stop = self.train_step([next(stream) for _ in range(settings.accumulate)])
                bar.update()
                if self.step % 10 == 0:
                    loss, lr = sum(self.means().values()), self.lr_at(self.step - 1)
                    bar.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.1e}", images_per_s=f"{speed:.0f}")
                # Not during bad steps: they may end the run, and resuming in them would not help.
                due = time.time() - saved > 60 * settings.checkpoint_every
                if self.rank == 0 and not self.bad_steps and (stop or due):
                    self.write_checkpoint("last.pt")
                    saved = time.time()
                if stop:
                    self.leave(max(self.stop_signals, default=128 + signal.SIGTERM))


def main():
    settings = parse_settings()
    rank, world_size, device = start_processes()
    task, data, seed, size = settings.task, settings.data, settings.seed, settings.image_size
    augmentation = dict(least=settings.min_scale, color=settings.color)
    augmentation |= dict(randaugment=settings.randaugment, erasing=settings.erasing)
    train = make_dataset(task, data, "train", size, seed, **augmentation)
    val = make_dataset(task, data, "val", settings.test_size, classes=train.classes)
    run = Run(settings, train, val, rank, world_size, device)
    split = settings.batch_size, run.steps, seed, rank, world_size, settings.accumulate, run.step
    options = dict(batch_sampler=GlobalBatches(len(train), *split))
    options |= dict(collate_fn=None if task == "cls" else stacked)  # None: labels are numbers
    with contextlib.closing(batches_of(SkipBroken(train), settings.workers, device, **options)) as stream:
        run.loop(stream)
    if rank == 0:
        print(f"{describe(run.log[-1], task)} on {len(val)} held-out images")
        print(f"python eval.py --checkpoint {run.last}")


if __name__ == "__main__":
    in_one_line(main)
