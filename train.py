# SPDX-License-Identifier: MIT
"""Train a ClusterFormer.

    torchrun train.py --task cls                                          # built-in shapes, minutes on a CPU
    torchrun train.py --task det                                          # also inst, sem, pan
    torchrun --nproc_per_node=2 train.py --task cls --data DIR --out runs/mine    # own images, two CPU cores
    torchrun --nproc_per_node=2 train.py --task inst --data DIR --init runs/inst/last.pt --out runs/mine

    torchrun --nproc_per_node=8 train.py --task cls --data IMAGENET_DIR   # the full recipe on eight GPUs
    torchrun train.py --task cls --data IMAGENET_DIR --accumulate 8       # the same batch of 1024 on one GPU
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        train.py --task cls --data IMAGENET_DIR --out SHARED_DIR          # on each of two machines
    torchrun --nproc_per_node=8 train.py --task inst --data COCO_DIR --init CHECKPOINT
    torchrun --nproc_per_node=8 train.py --task sem --data ADE_DIR --init CHECKPOINT

A setting that is not given comes from the run that is resumed, from --init (variant, patch size, iterations),
or from the recipe of the task and the data: shapes; fewer than 10,000 training images; or the full scale of
ImageNet, COCO and ADE20K.  A run writes OUT/last.pt, OUT/metrics.json, and OUT/log.jsonl, a line per epoch.
However it is stopped, --resume continues it from OUT/last.pt, and on a CPU it ends with the weights of a run
that was never stopped.
"""

import argparse
import contextlib
import copy
import math
import os
import signal
import sys
import time
import warnings
from collections import Counter

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from clusterformer import TASKS, VARIANTS, VERSION, ClusterFormer
from data import GlobalBatches, InputError, Parser, SkipBroken, as_float, batches_of, bfloat16_on
from data import count_images, default_workers, expect, in_one_line, make_dataset, mix, number, stacked
from data import start_processes, to_json
from eval import describe, evaluate, read_checkpoint

# --------------------------------------------------------------------------------------------------
# Recipes.  Settings without a flag are changed here
# --------------------------------------------------------------------------------------------------
CLS = dict(
    variant="nano", patch_size=2, image_size=48, test_size=None, epochs=5, batch_size=64, lr=3e-3,
    backbone_rate=1.0, schedule="cosine", warmup=0.2, clip=5.0, drop_path=0.0, ema=0.99, evaluate_every=5,
    min_scale=0.08, color=0.0, smoothing=0.0, mixup=0.0, cutmix=0.0, randaugment=0, erasing=0.0,
)  # fmt: skip
DENSE = CLS | dict(image_size=96, patch_size=4, epochs=4, batch_size=8, warmup=0.075, ema=0.995)
DENSE |= dict(evaluate_every=1)
# drop_path: None is that of the variant.
FULL = CLS | dict(variant="tiny", patch_size=4, drop_path=None, ema=0.9999, evaluate_every=1)
# Swin's recipe.  Its RandAugment has 10 magnitudes and takes the ninth; torchvision's has 30.
IMAGENET = FULL | dict(image_size=224, epochs=300, batch_size=1024, lr=1e-3, warmup=20 / 300)
IMAGENET |= dict(smoothing=0.1, mixup=0.8, cutmix=1.0, randaugment=27, erasing=0.25)
# A backbone from ImageNet should keep its features while neck and decoder are still random.
COCO = FULL | dict(image_size=1024, test_size=800, epochs=50, batch_size=16, lr=1e-4, backbone_rate=0.1)
# Mask2Former's smallest scale is 0.1.  Here centers start from the cells of a 10 x 10 grid over the crop, and
# an image of that scale would cover a single cell.
COCO |= dict(schedule="step", warmup=0.002, clip=0.1, evaluate_every=5, min_scale=0.5)
# 127 epochs of 20,210 images are the usual 160,000 steps.
ADE20K = COCO | dict(image_size=512, test_size=512, epochs=127, schedule="poly", warmup=0.008, color=1.0)
SMALL = 10_000  # training images; fewer take a recipe of their own
# Settings that a resumed run must share with the run before.
MUST_AGREE = "task", "variant", "patch_size", "iterations", "batch_size", "seed", "weight_decay", "init"


def small_recipe(task, count, patch_size):
    """The recipe for a folder with `count` < SMALL training images.  Ours.

    The fewer images, the more epochs.  The learning rate is higher, also of a backbone from --init, and
    the average is shorter, since there are few steps.  Nano and small images fit a CPU, and overfit less.
    """
    unit = 8 * patch_size  # pixels: with half the patch size, half the image has as many tokens
    recipe = CLS | dict(patch_size=patch_size, drop_path=None, lr=2e-3, warmup=1 / 30, ema=0.999)
    if task == "cls":
        recipe |= dict(image_size=4 * unit, test_size=6 * unit, epochs=min(300, max(30, 410_000 // count)))
        recipe |= dict(smoothing=0.1, min_scale=0.2, randaugment=9)
    else:
        recipe |= dict(image_size=8 * unit, test_size=8 * unit, epochs=max(12, math.ceil(9_000 / count)))
        recipe |= dict(batch_size=8, ema=0.995, min_scale=0.5, color=1.0)
    while recipe["batch_size"] > count:
        recipe["batch_size"] //= 2
    return recipe


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
# Part of the peak learning rate; t goes from 0 after warm-up to 1 at the end.
SCHEDULES = {
    "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t)),
    "poly": lambda t: (1 - t) ** 0.9,
    "step": lambda t: 1.0 if t < 0.9 else 0.1 if t < 0.95 else 0.01,
}


def make_parser():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", choices=TASKS, default="cls", help="classes, boxes, masks, classes of pixels, or segments")
    add("--data", metavar="DIR", help="class folders (cls), COCO, ADE20K (sem); none: shapes")
    add("--out", metavar="DIR", help="folder of checkpoints and logs (default: runs/TASK)")
    add("--init", metavar="FILE", help="checkpoint whose weights are loaded where they fit")
    add("--resume", action="store_true", help="continue from OUT/last.pt, with its settings, if it exists")
    add("--checkpoint-every", type=number(float, 0), default=10.0, help="minutes between checkpoints (10)")
    add("--seed", type=number(int, 0, 2**63), default=0, help="of weights, order and augmentation (0)")
    workers = "loader processes per process (spare cores, at most 16)"
    add("--workers", type=number(int, 0), default=default_workers(), help=workers)
    add("--accumulate", type=number(int, 1), default=1, help="passes per step, to save memory (1)")
    compiled = "torch.compile the model: slow to start, then faster"
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help=compiled)
    add("--iterations", type=number(int, 1), default=3, help="T, EM iterations of each clustering (3)")
    add("--weight-decay", type=number(float, 0), default=0.05, help="of matrices and kernels (0.05)")
    add = parser.add_argument_group("in the recipe, unless given").add_argument
    add("--variant", choices=VARIANTS, help="size of the model")
    add("--patch-size", type=int, choices=(2, 4), help="pixels per side of a token; 2 for small images")
    add("--image-size", type=number(int, 32), help="pixels per side of training images or crops")
    add("--test-size", type=number(int, 32), help="pixels per side, or of the short side, in evaluation")
    add("--epochs", type=number(int, 1), help="passes over the images")
    add("--batch-size", type=number(int, 1), help="images per step, over all processes")
    add("--lr", type=number(float, 0), help="peak learning rate; the recipe's is scaled with --batch-size")
    add("--warmup", type=number(float, 0, 1), help="part of the steps in which the learning rate rises")
    add("--clip", type=number(float, 0), help="maximum norm of the gradient; 0: do not clip")
    add("--drop-path", type=number(float, 0, 1), help="stochastic depth of the last block")
    add("--ema", type=number(float, 0, 1), help="decay of the averaged weights, which evaluation uses")
    add("--evaluate-every", type=number(int, 1), help="epochs between evaluations; the last epoch has one")
    return parser


def parse_settings():
    """Settings: flags, else those of the run that is resumed, of --init, and of the recipe."""
    parser = make_parser()
    given = parser.parse_args()
    expect("" not in (given.data, given.out, given.init), "--data, --out and --init must not be empty")
    out, recipe = given.out or os.path.join("runs", given.task), {}
    last, saved = os.path.join(out, "last.pt"), {}
    if os.path.exists(last):
        expect(given.resume, f"{last} exists: --resume continues that run, --out DIR starts another")
        saved = read_checkpoint(last)["settings"]
        parser.set_defaults(**saved | dict(workers=default_workers()))  # it may be another machine
    else:
        theirs = read_checkpoint(given.init)["arguments"] if given.init else {}
        theirs = {name: theirs[name] for name in theirs.keys() & {"variant", "patch_size", "iterations"}}
        count = count_images(given.task, given.data, SMALL) if given.data else SMALL
        recipe = recipe_of(given.task, given.data, count, given.patch_size or theirs.get("patch_size", 4))
        parser.set_defaults(**recipe | theirs | dict(lr=None, test_size=None))
    settings = parser.parse_args()
    for name in MUST_AGREE if saved else ():
        change = f"{name} {saved[name]}, not {getattr(settings, name)}"
        may = "--epochs, --lr, --workers and processes may change; --out and --init start another from it"
        expect(saved[name] == getattr(settings, name), f"{last} is of a run with {change}; {may}")
    settings.out, settings.resume = out, given.resume
    settings.data = settings.data and os.path.abspath(settings.data)
    if settings.lr is None:  # proportional to the batch size
        settings.lr = recipe["lr"] * settings.batch_size / recipe["batch_size"]
    if settings.drop_path is None:
        settings.drop_path = VARIANTS[settings.variant]["drop_path"]
    size, stride = settings.image_size, 8 * settings.patch_size
    if settings.test_size is None:
        settings.test_size = size * (recipe["test_size"] or recipe["image_size"]) // recipe["image_size"]
    expect(size % stride == 0, f"--image-size {size} is not a multiple of {stride}, 8 patches")
    chunk = settings.batch_size // settings.accumulate // int(os.environ.get("WORLD_SIZE", 1))
    mixes = settings.mixup + settings.cutmix
    expect(chunk > 1 or not mixes, "mixup needs more than one image in a chunk; raise --batch-size")
    return settings


# --------------------------------------------------------------------------------------------------
# Weights, optimizer, files
# --------------------------------------------------------------------------------------------------
def take_weights(model, path):
    """Load the averaged weights that fit by name and shape.  Returns the names of those that are missing."""
    theirs, ours = read_checkpoint(path)["ema"], model.state_dict()
    fitting = {name: x for name, x in theirs.items() if name in ours and x.shape == ours[name].shape}
    if any(name.startswith("head.neck.") for name in theirs.keys() ^ ours.keys()):
        # det has no map of stride 4, so the same number in a name is of another stride.
        fitting = {name: x for name, x in fitting.items() if not name.startswith("head.neck.")}
    stages = lambda state: {name: x.shape for name, x in state.items() if name.startswith("backbone.stages.")}
    fits = stages(theirs) == stages(ours)
    expect(fits, f"{path}: its backbone is another; leave --variant out to take that of the checkpoint")
    return model.load_state_dict(fitting, strict=False).missing_keys


def parameter_groups(model, weight_decay, backbone_rate):
    """Groups for the optimizer.  "rate" multiplies the learning rate: backbone_rate or 1."""
    groups = {}
    for name, parameter in model.named_parameters():
        decay = weight_decay if parameter.ndim > 1 else 0.0  # a norm, bias or scale need not be near zero
        rate = backbone_rate if name.startswith("backbone.") else 1.0
        groups.setdefault((decay, rate), []).append(parameter)
    return [dict(params=params, weight_decay=decay, rate=rate) for (decay, rate), params in groups.items()]


def learning_rate(settings, step, steps):
    warmup = settings.warmup * steps
    if step < warmup:
        return settings.lr * min(1, (step + 1) / warmup)
    return settings.lr * SCHEDULES[settings.schedule]((step - warmup) / (steps - warmup))


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
    """Call action(signal, frame) on SIGTERM (schedulers, torchrun) and on SIGINT (Ctrl-C)."""
    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, action)


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
        self.steps_per_epoch = len(train) // settings.batch_size
        self.steps = settings.epochs * self.steps_per_epoch
        self.step, self.log, self.sums = 0, [], {}  # steps done; a line per epoch; losses of this epoch
        self.bad_steps = 0  # consecutive steps without a finite loss or gradient
        self.signals = 0  # received
        torch.manual_seed(settings.seed)
        self.model = ClusterFormer(
            settings.task, settings.variant, len(train.classes), settings.patch_size, settings.iterations,
            settings.drop_path, settings.smoothing, train.things
        ).to(device)  # fmt: skip
        resumed = os.path.exists(self.last)
        new = take_weights(self.model, settings.init) if settings.init and not resumed else []
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        backbone_rate = settings.backbone_rate if settings.init else 1.0
        groups = parameter_groups(self.model, settings.weight_decay, backbone_rate)
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        if resumed:
            self.load(read_checkpoint(self.last))
        everywhere = self.all_reduce(torch.tensor(self.step, device=device)) == self.step * world_size
        expect(everywhere, f"{self.last} is not on all machines: --out must be on a disk that they share")
        self.runner = torch.compile(self.model) if settings.compile else self.model
        if world_size > 1:
            gpu = [device.index] if device.type == "cuda" else None
            # Views: gradients lie in the buffers in which processes exchange them, and take no memory beside.
            # DDP warns of depthwise kernels, one of whose sides is 1: strides of such a side are arbitrary.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
            self.runner = DistributedDataParallel(self.runner, gpu, gradient_as_bucket_view=True)
        if rank == 0:
            for name, data in ("training", train), ("validation", val):
                print(f"{name} data: {len(data)} images, {len(data.classes)} classes{data.note}")
            print(f"settings: {to_json(vars(settings))}")
            size = sum(parameter.numel() for parameter in self.model.parameters()) / 1e6
            print(f"{size:.1f} M parameters, {self.steps} steps on {world_size} x {device.type}")
            if settings.resume:
                print(f"resumed after step {self.step}" if resumed else f"no {self.last}: this is a new run")
            if new:
                modules = dict.fromkeys(".".join(name.split(".")[:-1][:3]) for name in new)
                print(f"{settings.init} has no fitting weights of {', '.join(modules)}")

    def load(self, checkpoint):
        """Continue from a checkpoint.  Raises InputError if it is of a run on other images."""
        same = checkpoint["classes"] == self.train.classes and checkpoint["images"] == len(self.train)
        expect(same, f"{self.last} is of a run on other images; --init in another --out starts anew from it")
        self.model.load_state_dict(checkpoint["model"])
        self.ema.load_state_dict(checkpoint["ema"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.step, self.log, self.sums = (checkpoint[name] for name in ("step", "log", "sums"))

    def write_checkpoint(self):
        state = dict(version=VERSION, arguments=self.model.arguments, classes=self.train.classes)
        state |= dict(settings=vars(self.settings), images=len(self.train), step=self.step, log=self.log)
        state |= dict(sums=self.sums, model=self.model.state_dict(), ema=self.ema.state_dict())
        state |= dict(optimizer=self.optimizer.state_dict())
        save(self.last, lambda file: torch.save(state, file))

    def write_text(self, name, text):
        save(os.path.join(self.settings.out, name), lambda file: file.write(text.encode()))

    def leave(self, *_):
        if self.rank == 0:
            how = f"--out {self.settings.out} --resume continues from there"
            print(f"stopped after step {self.step} of {self.steps}; {how}", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)

    def note_signal(self, *_):
        self.signals += 1

    def all_reduce(self, tensor):
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def means(self):
        """Mean losses of this epoch's steps so far, without those that were skipped."""
        return {name: value / self.sums["steps"] for name, value in self.sums.items() if name != "steps"}

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
            more_follow = self.world_size > 1 and i < len(chunks) - 1
            with self.runner.no_sync() if more_follow else contextlib.nullcontext():
                with bfloat16_on(device):
                    output = self.runner(images)
                losses = self.model.loss(output, targets)
                losses = {name: loss / total for name, loss in losses.items()}
                (sum(losses.values()) * self.world_size).backward()  # DDP divides gradients by it
            parts.update({name: loss.detach() for name, loss in losses.items()})
        return parts

    def train_step(self, chunks):
        """One optimizer step.  Returns nonzero if any process has received a stop signal."""
        settings = self.settings
        lr = learning_rate(settings, self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["rate"]
        # Seeded by step: a resumed run draws the same stochastic depth and mask points.
        state = np.random.SeedSequence((settings.seed, self.step, self.rank)).generate_state(1)
        torch.manual_seed(int(state[0]))
        parts = self.gradients(chunks)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip or math.inf)
        # Reduce the stop flag, gradient norm and losses, so that all ranks take the same decision.
        # Here the CPU waits for the GPU; dense tasks wait once more, for the costs of matching.
        stop_flag = torch.full((), float(self.signals), device=self.device)
        stop, *values = self.all_reduce(torch.stack([stop_flag, norm, *parts.values()])).tolist()
        if all(map(math.isfinite, values)):
            self.optimizer.step()
            decay = min(settings.ema, (1 + self.step) / (10 + self.step))  # a short memory at first
            averages, parameters = list(self.ema.parameters()), list(self.model.parameters())
            get_ema_multi_avg_fn(decay)(averages, parameters, None)
            losses = dict(zip(parts, values[1:]), steps=1)
            self.sums = {name: self.sums.get(name, 0.0) + value for name, value in losses.items()}
            self.bad_steps = 0
        else:
            self.bad_steps += 1
            if self.rank == 0:
                print(f"step {self.step + 1} is skipped: its loss or gradient is not finite", file=sys.stderr)
            remedy = f"lower --lr (it is {lr:.1e} here) or --clip, or check these images"
            what = f"{MAX_BAD_STEPS} steps in a row not finite: {remedy}; {self.last} has older weights"
            expect(self.bad_steps < MAX_BAD_STEPS, what)
        self.optimizer.zero_grad()
        self.step += 1
        return stop

    def end_epoch(self, started, first_step):
        """Evaluate, log and save.  started, first_step: when the epoch began, or was resumed."""
        settings, epoch, metrics = self.settings, len(self.log) + 1, {}
        seconds = max(1e-9, time.time() - started)  # a run that is resumed here has done no step
        if epoch % settings.evaluate_every == 0 or epoch == settings.epochs:
            if self.rank == 0:
                self.write_checkpoint()
            on_signals(self.leave)  # at once: an evaluation may take minutes, and all steps are saved
            if self.signals:  # one came since the last step
                self.leave()
            # One by one in the dense tasks: photographs are large, and each has its own size.
            chunk = settings.batch_size // (self.world_size * settings.accumulate)
            batch_size = chunk if settings.task == "cls" else 1
            metrics, _ = evaluate(self.ema, self.val, self.device, batch_size, settings.workers)
            on_signals(self.note_signal)
        losses = self.means()
        line = dict(epoch=epoch, step=self.step, loss=sum(losses.values()) if losses else None) | metrics
        line |= dict(losses=losses, seconds=seconds)
        line |= dict(images_per_second=(self.step - first_step) * settings.batch_size / seconds)
        if self.device.type == "cuda":
            line["memory_MiB"] = torch.cuda.max_memory_allocated() / 2**20
        self.log.append(line)
        self.sums = {}
        if self.rank:
            return
        if metrics:
            self.write_text("metrics.json", to_json(metrics, indent=2))
        self.write_text("log.jsonl", "".join(to_json(line) + "\n" for line in self.log))
        self.write_checkpoint()  # comes last: a run that was killed earlier repeats the evaluation
        loss = f"loss {line['loss']:.3f}" if losses else "no finite loss"
        found = describe(metrics, settings.task) if metrics else ""
        speed = f"{line['images_per_second']:.0f} images/s"
        tqdm.write("  ".join(filter(None, (f"epoch {epoch}/{settings.epochs}", loss, found, speed))))

    def loop(self, stream):
        """The remaining steps.  stream: chunks of this process, in order."""
        settings, started, first_step = self.settings, time.time(), self.step
        saved = 0  # the first step is saved: an unwritable disk is noticed, a second run here is refused
        on_signals(self.note_signal)  # the current step is finished first
        bar = tqdm(total=self.steps, initial=self.step, unit="step", disable=True if self.rank else None)
        while len(self.log) < settings.epochs:
            if self.step == (len(self.log) + 1) * self.steps_per_epoch:
                self.end_epoch(started, first_step)
                started, first_step, saved = time.time(), self.step, time.time()
                continue
            stop = self.train_step([next(stream) for _ in range(settings.accumulate)])
            bar.update()
            if self.step % 10 == 0:
                bar.set_postfix(loss=sum(self.means().values()))
            # Not during bad steps: the checkpoint of a run that ends by them is from before them.
            due = time.time() - saved > 60 * settings.checkpoint_every and not self.bad_steps
            if self.rank == 0 and (stop or due):
                self.write_checkpoint()
                saved = time.time()
            if stop:
                self.leave()
        bar.close()


def main():
    settings = parse_settings()
    rank, world_size, device = start_processes()
    task, data, seed = settings.task, settings.data, settings.seed
    augmentation = dict(least=settings.min_scale, color=settings.color)
    augmentation |= dict(randaugment=settings.randaugment, erasing=settings.erasing)
    train = make_dataset(task, data, "train", settings.image_size, seed, **augmentation)
    val = make_dataset(task, data, "val", settings.test_size, classes=train.classes)
    run = Run(settings, train, val, rank, world_size, device)
    split = settings.batch_size, run.steps, seed, rank, world_size, settings.accumulate, run.step
    options = dict(batch_sampler=GlobalBatches(len(train), *split))
    if task != "cls":
        options |= dict(collate_fn=stacked)  # targets are dictionaries, not numbers
    with contextlib.closing(batches_of(SkipBroken(train), settings.workers, device, **options)) as stream:
        run.loop(stream)
    if rank == 0:
        print(f"python eval.py --checkpoint {run.last}")


if __name__ == "__main__":
    in_one_line(main)
