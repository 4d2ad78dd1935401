# SPDX-License-Identifier: MIT
"""Data sets and augmentation, independent of the model, and what the scripts share: processes and errors.

    shapes        scenes drawn from (seed, epoch, index): no files, new scenes in every epoch
    Folder        DIR/{train,val}/<class>/*.jpg, for example ImageNet
    Coco          DIR/{train,val}2017/*.jpg and DIR/annotations/: boxes, masks, panoptic segments
    Ade           DIR/{images,annotations}/: label maps of any number of classes

One standard form of each format is read.  A file of another form ends the run in one line, which names the
file, the entry and the remedy: names, ids and annotations before the first step, images and maps when they
are read.

A sample and its augmentation depend only on (seed, epoch, index), the order of samples on (seed,
epoch), and mixup and cutmix on (seed, step).  A run that is repeated or resumed sees the same images.
"""

import argparse
import contextlib
import io
import itertools
import json
import math
import os
import pickle
import re
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import tv_tensors
from torchvision.datasets import folder as image_folder
from torchvision.ops import box_convert, masks_to_boxes
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional


# --------------------------------------------------------------------------------------------------
# Errors and processes
# --------------------------------------------------------------------------------------------------
class InputError(ValueError):
    """A problem with the user's files or flags: one line with what is wrong, where, and the fix."""


def expect(good, what):
    if not good:
        raise InputError(what)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; see --help")


def number(kind, least, below=math.inf):
    """A type for argparse: least <= value < below."""

    def read(text):
        if least <= kind(text) < below:  # NaN is refused, too
            return kind(text)
        raise argparse.ArgumentTypeError(f"must be at least {least} and below {below}, got {text}")

    read.__name__ = "number"
    return read


def in_one_line(main):
    """Call main.  An error that the user can mend ends the program with one line, not with a traceback."""
    sys.stdout.reconfigure(errors="replace")  # names of classes that the console cannot show
    try:
        main()
        if dist.is_initialized():  # not after an error: NCCL may wait for a process that is gone
            dist.destroy_process_group()
    except (InputError, OSError, EOFError, RuntimeError) as error:
        # From a loader process, it arrives with a traceback; the last line is the message.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        message = lines[-1].removeprefix("data.InputError: ")
        if isinstance(error, torch.OutOfMemoryError):
            message = "too little GPU memory: raise --accumulate (train.py) or lower --batch-size (eval.py)"
        elif isinstance(error, (EOFError, RuntimeError)):
            if not re.search(r"worker \(pid|shm|No space left", str(error)):
                raise
            remedy = "lower --workers (0 needs no memory beside), or give Docker --ipc=host"
            message = f"a loader process was lost, probably since shared memory ran out ({message}); {remedy}"
        sys.exit(f"{os.path.basename(sys.argv[0])}: error: {message}")
    except KeyboardInterrupt:
        sys.exit(130)  # Ctrl-C, as in shells; no traceback


def bfloat16_on(device):
    """Autocast to bfloat16 on GPUs that compute in it; older ones would emulate it, slower than float32."""
    good = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=good)


def to_json(value, **options):
    """JSON with null, which every program reads, for the metrics of what does not occur."""
    return json.dumps(value, **options).replace(": NaN", ": null")


def start_processes():
    """Join the processes of torchrun, if any.  Returns rank, number of processes, and device."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ["RANK"]) if world_size > 1 else 0
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local_rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        expect(local_rank < gpus, f"more processes than the {gpus} GPUs here: lower --nproc_per_node")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32, for what autocast leaves in float32
    if world_size > 1:
        # One process runs COCO's evaluation, which takes longer than the 10 minutes of NCCL.
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=1))
    return rank, world_size, device


def default_workers():
    """Loader processes for each training process: its share of the cores, less two or, with a GPU, one.

    On two cores without a GPU it is 0: a loader would compete with the threads of the training process.
    """
    busy = 1 if torch.cuda.is_available() else 2
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count()
    return max(0, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - busy))


class Packed:
    """A long list of small Python objects in two arrays.

    Workers share their parent's memory until it is written to.  Even reading a Python object writes
    to its reference count, so every worker would end up with its own copy of a million annotations.
    """

    def __init__(self, items):
        packed = [pickle.dumps(item, -1) for item in items]
        self.ends = np.cumsum([0] + [len(item) for item in packed])
        self.bytes = np.frombuffer(b"".join(packed), np.uint8)

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, index):
        return pickle.loads(self.bytes[self.ends[index] : self.ends[index + 1]])


class Images(Dataset):
    """What all data sets share.

    `classes` are names.  A row of `images` is the name of an image in `folder`, then its label (Folder), or
    its number in the files and its size (Coco) or label map (Ade).  `things`: is a class countable (pan)?
    `note`: what is not used, for the line that is printed at the start.
    """

    folder, things, note = "", None, ""

    def __len__(self):
        return len(self.images)

    def name(self, index):
        return os.path.join(self.folder, self.images[index][0])


# --------------------------------------------------------------------------------------------------
# Shapes: scenes with things, stuff, occlusion and texture, drawn in about a millisecond
# --------------------------------------------------------------------------------------------------
def star(u, v):
    """Fold the plane into one tenth of the star, then measure to the edge from tip to notch."""
    tenth = math.pi / 5
    angle, radius = np.abs(np.arctan2(u, v) % (2 * tenth) - tenth), np.hypot(u, v)
    notch_u, notch_v = 0.42 * math.cos(tenth), 0.42 * math.sin(tenth)
    length = math.hypot(1 - notch_u, notch_v)
    return ((radius * np.cos(angle) - 1) * notch_v + radius * np.sin(angle) * (1 - notch_u)) / length


# Class of thing -> signed distance (roughly; negative inside) at (u, v) in units of its radius.
THINGS = {
    "disc": lambda u, v: np.hypot(u, v) - 0.9,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.72) - 0.22,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.75,
    "bar": lambda u, v: np.maximum(np.abs(u) - 1, np.abs(v) - 0.32),
    "triangle": lambda u, v: np.maximum(-v, 0.866 * np.abs(u) + 0.5 * v) - 0.5,
    "star": star,
    "cross": lambda u, v: np.maximum(np.maximum(abs(u), abs(v)) - 0.95, np.minimum(abs(u), abs(v)) - 0.28),
    "crescent": lambda u, v: np.maximum(np.hypot(u, v) - 0.95, 0.72 - np.hypot(u - 0.45, v)),
}
# Only the pattern identifies stuff.  Things have the same patterns, independent of their class.
STUFF = ("plain", "stripes", "checks", "dots", "grain")
VISIBLE = 20  # minimum number of visible pixels for a thing or a class of stuff to be annotated


def pattern(rng, kind, x, y):
    """A randomly rotated and scaled pattern in [-1, 1].  x: columns (1, w).  y: rows (h, 1)."""
    h, w = len(y), x.shape[1]
    if kind == "plain":
        return np.zeros((h, w), np.float32)
    if kind == "grain":
        grain = rng.uniform(-1, 1, (h // 2 + 1, w // 2 + 1)).astype(np.float32)
        return grain.repeat(2, 0).repeat(2, 1)[:h, :w]
    angle, wavelength, phase = rng.uniform(0, math.pi), rng.uniform(5, 9), rng.uniform(0, 2 * math.pi)
    cos, sin = 2 * math.pi / wavelength * math.cos(angle), 2 * math.pi / wavelength * math.sin(angle)
    across, along = np.sin(cos * x + (sin * y + phase)), np.sin(cos * y - sin * x)
    if kind == "stripes":
        return across
    return np.sign(across * along) if kind == "checks" else np.maximum(across + along, 0) - 1


def paint(rng, base, kind, x, y):
    """Colors (3, h, w): a base color plus the pattern times a random color difference."""
    swing = rng.uniform(-0.15, 0.15, (3, 1, 1)).astype(np.float32)
    return base.reshape(3, 1, 1) + swing * pattern(rng, kind, x, y)


def draw_scene(rng, size, things):
    """Draw three to five regions of stuff, then things, each one over the previous ones.

    things: list of (class, radius, x, y), with radius and center as fractions of the side.
    Returns the image, uint8 (3, size, size), and segments, int64 (size, size): i for the visible
    pixels of things[i], -1 - s for stuff of class s.
    """
    x = np.arange(size, dtype=np.float32)[None]  # (1, size)
    y = x.T
    kinds = rng.permutation(len(STUFF))[: rng.integers(3, len(STUFF) + 1)]
    bend = (size / 24) * np.sin(x * (20 / size) + y * (12 / size))  # borders are curved
    sites = rng.uniform(0, size, (len(kinds), 2)).tolist()
    nearest = np.stack([(x - sx + bend) ** 2 + (y - sy + bend) ** 2 for sx, sy in sites]).argmin(0)
    image = np.empty((3, size, size), np.float32)
    for i, kind in enumerate(kinds):  # stuff has muted colors, things have vivid ones
        base = (rng.uniform(0.25, 0.75) + rng.uniform(-0.15, 0.15, 3)).astype(np.float32)
        np.copyto(image, paint(rng, base, STUFF[kind], x, y), where=nearest == i)
    segments = -1 - kinds[nearest]
    for i, (category, radius, cx, cy) in enumerate(things):
        radius, cx, cy = radius * size, cx * size, cy * size
        reach = 1.2 * radius + 1  # the thing lies within this distance of its center
        rows, columns = (slice(max(0, int(c - reach)), max(0, int(c + reach) + 1)) for c in (cy, cx))
        dx, dy = (x[:, columns] - cx) / radius, (y[rows] - cy) / radius
        angle, stretch = rng.uniform(0, 2 * math.pi), rng.uniform(0.92, 1.08)
        u = math.cos(angle) * stretch * dx + math.sin(angle) * stretch * dy
        v = math.cos(angle) / stretch * dy - math.sin(angle) / stretch * dx
        alpha = np.clip(0.5 - radius * list(THINGS.values())[category](u, v), 0, 1)  # soft edge
        under = image[:, rows, columns]
        # Of three colors, take the one farthest from the background, so that the thing is visible.
        colors = rng.uniform(0, 1, (3, 3)).astype(np.float32)
        base = colors[np.abs(colors - under.mean((1, 2))).sum(1).argmax()]
        color = paint(rng, base, STUFF[rng.integers(len(STUFF))], x[:, columns], y[rows])
        under += alpha * (color - under)
        segments[rows, columns][alpha > 0.5] = i
    image += 0.02 * rng.standard_normal(image.shape, dtype=np.float32)
    return (image.clip(0, 1) * 255).astype(np.uint8), segments


def draw_thing(rng, radius, place):
    """Draw (class, radius, x, y) uniformly; radius and place are ranges (low, high)."""
    category = int(rng.integers(len(THINGS)))
    return category, rng.uniform(*radius), rng.uniform(*place), rng.uniform(*place)


def dominant_thing(rng):
    """One large thing, one to three small ones anywhere; and the class of the large one."""
    things = [draw_thing(rng, (0.08, 0.13), (0, 1)) for _ in range(rng.integers(1, 4))]
    large = draw_thing(rng, (0.32, 0.45), (0.4, 0.6))
    things.insert(rng.integers(len(things) - 1, len(things) + 1), large)  # at most one small thing covers it
    return things, large[0]


def indexed(**tables):
    """Convert the tables of an instances file to pycocotools' COCO object."""
    coco = COCO()
    coco.dataset = dict(info={}) | tables  # loadRes of pycocotools 2.0.9 and 2.0.10 reads info
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


class Shapes(Images):
    """Scenes drawn from (seed, epoch, index); validation scenes depend only on the index."""

    def __init__(self, length, size, seed, split, task="cls"):
        self.size, self.seed, self.split, self.task = size, seed, split, task
        self.images = [(f"scene {index}", index, None) for index in range(length)]
        self.classes = [*THINGS, *(STUFF if task in ("sem", "pan") else ())]
        self.things = [name in THINGS for name in self.classes]
        self.categories = list(range(1, len(self.classes) + 1))

    def scene(self, epoch, index):
        """Image, uint8 (3, size, size), list of (class, mask: bool (size, size)), and label (cls)."""
        kind = 2 * (self.task != "cls")  # and 1 more in validation: four kinds of scenes, none alike
        training = kind, self.seed, epoch, index
        rng = np.random.default_rng(training if self.split == "train" else (kind + 1, index))
        if self.task == "cls":
            things, label = dominant_thing(rng)
            return draw_scene(rng, self.size, things)[0], [], label
        # One to six things.  The frame cuts some of them off.
        things = [draw_thing(rng, (0.10, 0.28), (0.02, 0.98)) for _ in range(rng.integers(1, 7))]
        image, segments = draw_scene(rng, self.size, things)
        shown = [(category, segments == i) for i, (category, *_) in enumerate(things)]
        if self.task in ("sem", "pan"):
            shown += [(len(THINGS) + s, segments == -1 - s) for s in range(len(STUFF))]
        return image, [(category, mask) for category, mask in shown if mask.sum() >= VISIBLE], None

    def __getitem__(self, key):
        """key: (epoch, index).  Returns image, uint8 (3, size, size), and label, or target: see Dense."""
        image, shown, label = self.scene(*key)
        image = torch.from_numpy(image)
        if self.task == "cls":
            return image, label
        if self.split == "val":
            return image, dict(index=key[1], size=(self.size, self.size))
        masks = np.array([mask for _, mask in shown], bool).reshape(-1, self.size, self.size)
        labels = torch.tensor([category for category, _ in shown], dtype=torch.int64)
        target = target_of(labels, None, torch.from_numpy(masks), image.shape[1:])
        if self.task == "det":
            del target["masks"]
        return image, target

    def coco(self):
        """The validation scenes as a COCO object."""
        images = [dict(id=index, width=self.size, height=self.size) for index in range(len(self))]
        found = [(i, *shown) for i in range(len(self)) for shown in self.scene(0, i)[1]]
        annotations = []
        for number, (index, c, mask) in enumerate(found, 1):
            rle = mask_utils.encode(np.asfortranarray(mask, np.uint8))
            bbox, area = mask_utils.toBbox(rle).tolist(), int(mask.sum())
            entry = dict(id=number, image_id=index, category_id=self.categories[c], iscrowd=0)
            annotations.append(entry | dict(bbox=bbox, area=area, segmentation=rle))
        categories = [dict(id=i, name=name) for i, name in zip(self.categories, self.classes)]
        return indexed(images=images, annotations=annotations, categories=categories)

    def segments(self, index):
        """Segment ids, int64 (size, size), 0 for void, and a dictionary per segment."""
        ids, table = torch.zeros(self.size, self.size, dtype=torch.int64), []
        for number, (category, mask) in enumerate(self.scene(0, index)[1], 1):
            ids[torch.from_numpy(mask)] = number
            table.append(dict(id=number, category_id=self.categories[category], iscrowd=0))
        return ids, table

    def label_map(self, index):
        """Classes of pixels, int64 (size, size), -1 for void."""
        ids, table = self.segments(index)
        return torch.tensor([-1, *(segment["category_id"] - 1 for segment in table)])[ids]


# --------------------------------------------------------------------------------------------------
# Images, and folders of classes
# --------------------------------------------------------------------------------------------------
MEAN_COLOR = [124, 116, 104]  # ImageNet's mean; fills what erasing and rotation remove
EIGHT_BITS = "1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"  # Pillow's modes


@contextlib.contextmanager
def seeded(*numbers):
    """Seed torch's CPU random numbers inside the block only."""
    with torch.random.fork_rng(devices=[]):
        state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
        torch.default_generator.manual_seed(int(state[0]))
        yield


def read_image(path, modes=EIGHT_BITS):
    """A PIL image, upright.  Raises InputError if the file is broken, or its mode is another one."""
    try:
        with Image.open(path) as image:
            expect(image.mode in modes, f"its mode is {image.mode}, not {' or '.join(modes)}")
            ImageOps.exif_transpose(image, in_place=True)
            image.load()
            return image
    except Exception as error:  # broken files raise many kinds
        raise InputError(f"{path}: cannot be read as an image ({error}); replace or remove it") from error


def load_image(path):
    """PIL RGB, upright."""
    image = read_image(path)
    thin = max(image.size) > 100 * min(image.size)  # resized, it might have no pixel
    expect(not thin, f"{path}: {image.width} x {image.height} pixels are too thin; remove it")
    return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")


def train_transform(size, least, randaugment, erasing):
    """PIL RGB -> uint8 (3, size, size).

    least: area of the smallest crop, as a part of the image.  randaugment: magnitude, 0 to 30.
    erasing: probability.
    """
    bicubic, bilinear = InterpolationMode.BICUBIC, InterpolationMode.BILINEAR
    crop = v2.RandomResizedCrop(size, (least, 1.0), interpolation=bicubic)
    steps = [crop, v2.RandomHorizontalFlip()]
    if randaugment:  # twice with probability 0.5: one operation on average, as in Swin's recipe
        operation = v2.RandAugment(1, randaugment, interpolation=bilinear, fill=MEAN_COLOR)
        steps += [v2.RandomApply([operation], 0.5)] * 2
    erase = [v2.RandomErasing(erasing, value=MEAN_COLOR)] if erasing else []
    return v2.Compose([*steps, v2.ToImage(), *erase, v2.ToPureTensor()])


def eval_transform(size):
    """PIL RGB -> uint8 (3, size, size): the central 7/8 of the short side (224 of 256)."""
    resize = v2.Resize(round(size * 256 / 224), interpolation=InterpolationMode.BICUBIC)
    return v2.Compose([resize, v2.CenterCrop(size), v2.ToImage(), v2.ToPureTensor()])


def need(*paths):
    """Raise InputError if a file or folder of a data set is missing."""
    for path in paths:
        expect(os.path.exists(path), f"{path}: no such file or folder; README.md shows the layouts of --data")


def folder_of(root, split):
    """DIR/train, or DIR/val, or DIR/valid if there is no DIR/val."""
    path, other = os.path.join(root, split), os.path.join(root, "valid")
    return other if split == "val" and not os.path.isdir(path) and os.path.isdir(other) else path


class Folder(Images):
    """DIR/<split>/<class>/*.jpg.  classes: list of names in order of their labels; None: as found."""

    def __init__(self, root, split, transform, seed=0, classes=None):
        folder = folder_of(root, split)
        need(root, folder)
        found = sorted(x.name for x in os.scandir(folder) if x.is_dir() and x.name[0] != ".")
        self.classes, self.transform, self.seed = classes or found, transform, seed
        unknown = [name for name in found if name not in self.classes]
        expect(found, f"{folder}: there is no class folder in it; make a folder for the images of each class")
        expect(not unknown, f"{folder}: class folders {unknown[:5]} are no classes of the model; rename them")
        labels = {name: self.classes.index(name) for name in found}
        shown = lambda path: image_folder.is_image_file(path) and "/." not in path[len(folder) :]
        try:
            samples = image_folder.make_dataset(folder, labels, is_valid_file=shown)
        except FileNotFoundError as error:
            raise InputError(f"{folder}: {str(error).strip(' .')}; remove it, or add some") from error
        self.images = Packed(samples)

    def __getitem__(self, key):
        """key: (epoch, index).  Returns the image, uint8 (3, size, size), and its label, an int."""
        path, label = self.images[key[1]]
        image = load_image(path)
        with seeded(self.seed, *key):
            return self.transform(image), label


# --------------------------------------------------------------------------------------------------
# Dense data sets: every object, or every pixel, has a label
# --------------------------------------------------------------------------------------------------
def dense_train_transform(task, size, least, color):
    """Augmentation of an image and its target, and a random crop of size x size pixels.

    Where the resized image is smaller than the crop, it lies at a random place, in the mean color.  There
    is no object in this padding, and for sem and pan it is void.
    least: smallest of the random factors by which images are resized; the largest is 2.  It should not
    be far below 1: centers start from the cells of a grid over the crop, and cells of padding have
    nothing to find.
    color: strength of random brightness, contrast, saturation and hue; 1 is usual for ADE20K.
    """
    # A factor of 1 makes the long side `size` pixels, as in COCO's large-scale jitter; for sem the short
    # side, as usual for ADE20K.
    if task == "sem":
        steps = [v2.RandomShortestSize(range(round(least * size), 2 * size + 1), max_size=8 * size)]
    else:
        steps = [v2.ScaleJitter((size, size), (least, 2.0))]
    # After resizing, since a photograph may have a hundred times the pixels of a crop.
    # RandomPhotometricDistort would also swap red and blue, which distinguish sand and sky.
    steps += [v2.ColorJitter(0.125 * color, 0.5 * color, 0.5 * color, 0.05 * color)] if color else []
    fill = {tv_tensors.Image: MEAN_COLOR, "others": 0}
    crop = v2.RandomCrop(size, pad_if_needed=True, fill=fill)
    return v2.Compose([*steps, v2.RandomHorizontalFlip(), crop])


def dense_eval_transform(task, size):
    """Resize the short side to `size`; the long side has at most 1333 / 800 of it, for sem four times."""
    return v2.Resize(size, max_size=4 * size if task == "sem" else size * 1333 // 800)


def read_photo(path, task, size):
    """An image file as evaluation sees it: uint8 (3, H, W)."""
    image = load_image(path)
    if task == "cls":
        return eval_transform(size)(image)
    return dense_eval_transform(task, size)(functional.pil_to_tensor(image))


class Regions(tv_tensors.Mask):
    """Masks, or a map of numbers.  A new pixel is the old one under its middle.

    tv_tensors.Mask takes the old one under its corner, and so moves masks by up to half a pixel.
    """


@functional.register_kernel(functional.resize, Regions)
def resize_regions(regions, size, **_):
    maps = regions.as_subclass(torch.Tensor).reshape(-1, *regions.shape[-2:])
    maps = functional.resize_image(maps, size, InterpolationMode.NEAREST_EXACT)
    return tv_tensors.wrap(maps.reshape(*regions.shape[:-2], *maps.shape[1:]), like=regions)


def training_sample(image, labels, boxes, masks, transform):
    """Augment an image and its target.

    image: tv_tensors.Image.  labels: n classes.  boxes: n lists xyxy in pixels, or None if there are masks.
    masks: uint8 (n, H, W), or None; or, which is faster where masks do not overlap, a map (H, W) of
    numbers.  Then labels is a dictionary, number -> class, and what has another number is void.
    Returns image and target: see Dense.
    """
    parts = {}
    if masks is None:
        corners = torch.tensor(boxes).float().view(-1, 4)
        parts["boxes"] = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=image.shape[-2:])
    else:
        parts["masks"] = Regions(masks)
    image, parts = transform(image, parts)
    if isinstance(labels, dict):
        found = parts["masks"].flatten().unique_consecutive().unique()  # unique alone would sort all pixels
        numbers = [number for number in found.tolist() if number in labels]
        labels, masks = [labels[i] for i in numbers], parts["masks"] == torch.tensor(numbers)[:, None, None]
    elif masks is not None:
        masks = parts["masks"].bool()
    labels = torch.tensor(labels, dtype=torch.int64)
    target = target_of(labels, parts.get("boxes"), masks, tuple(image.shape[-2:]))
    return image.as_subclass(torch.Tensor), target


def target_of(labels, boxes, masks, size):
    """Build a target: see Dense.  Drops targets smaller than a pixel.

    labels: (n,).  boxes: (n, 4) xyxy in pixels, or None.  masks: bool (n, H, W), or None.
    """
    if masks is not None:  # after cropping, masks give tighter boxes
        seen = masks.flatten(1).any(1)
        labels, masks = labels[seen], masks[seen]
        boxes = masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])
    whole = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(1)
    boxes = box_convert(boxes[whole], "xyxy", "cxcywh") / torch.tensor([*size[::-1], *size[::-1]])
    target = dict(labels=labels[whole], boxes=boxes.float())
    return target if masks is None else target | dict(masks=masks[whole])


class Dense(Images):
    """What Coco and Ade share.  `categories` are the numbers of the classes in the files.

    In training, data[epoch, index] is a crop, uint8 (3, size, size), and its target, a dictionary:
        labels  (n,) int64           class of each object (det, inst), segment (pan) or mask (sem)
        boxes   (n, 4) float32       center x, center y, width, height, as fractions of the image
        masks   (n, size, size) bool not for det
    In evaluation, it has the image's `index` and its `size` (H, W) in the file.

    A child sets classes, categories, images, folder, split, transform and seed.  It has truth(index, size):
    labels, boxes and masks of an image for training_sample, after a look at its size.  And for evaluation,
    coco() for det and inst, label_map(index) for sem, or segments(index) for pan.
    """

    def __getitem__(self, key):
        path = self.name(key[1])
        image = tv_tensors.Image(functional.pil_to_tensor(load_image(path)))
        size = tuple(image.shape[-2:])
        target = self.truth(key[1], size)
        if self.split == "val":
            return self.transform(image).as_subclass(torch.Tensor), dict(index=key[1], size=size)
        with seeded(self.seed, *key):
            return training_sample(image, *target, self.transform)


def need_size(path, size, other, whose):
    """Raise InputError unless two sizes (H, W) are equal."""
    sides = f"{size[1]} x {size[0]} pixels upright, {whose} has {other[1]} x {other[0]}"
    expect(tuple(size) == tuple(other), f"{path}: {sides}; correct or remove one")


def fits(rle, pixels):
    """Whether run lengths end within so many pixels; if not, pycocotools raises ValueError."""
    with contextlib.suppress(ValueError):
        return mask_utils.decode(dict(size=[1, pixels], counts=rle["counts"])) is not None


def run_lengths_of(mask, size):
    """Polygons, or run lengths as numbers or text, as run lengths in text; None if they are empty.

    Raises ValueError if they have another form, or another size than the image's, (H, W).
    """
    if isinstance(mask, list):
        # Fewer than three points enclose nothing, and pycocotools would read four numbers as a box.
        mask = [polygon for polygon in mask if len(polygon) >= 6]
        far = any(len(polygon) % 2 or not np.abs(polygon).max() < 1e5 for polygon in mask)  # or NaN
        expect(not far, "a polygon is no list of x, y, x, y, ... in the image")
        rle = mask_utils.merge(mask_utils.frPyObjects(mask, *size)) if mask else None
    else:
        expect(list(mask["size"]) == list(size), f"the size of its run lengths is not {[*size]}")
        rle = mask_utils.frPyObjects(mask, *size) if isinstance(mask["counts"], list) else dict(mask)
        # They fill the image and no less.  Where they end too early, a mask would be what was in memory.
        whole = fits(rle, math.prod(size)) and not fits(rle, math.prod(size) - 1)
        expect(whole, "its run lengths do not add up to its size")
    return rle if rle and mask_utils.area(rle) else None


def complete(x, size, task):
    """Set `box`, xyxy within the image of size (H, W), `segmentation`, run lengths or None, and `area`.

    Returns whether the object can be used: it has an area and, for inst, a mask.
    """
    left, top, width, height = x["bbox"]
    expect(math.isfinite(left + top + width + height), "bbox must be four numbers")
    x["box"] = [max(left, 0), max(top, 0), min(left + width, size[1]), min(top + height, size[0])]
    masked = x.get("segmentation") and (task == "inst" or x.get("area") is None)
    rle = x["segmentation"] = run_lengths_of(x["segmentation"], size) if masked else None
    if x.get("area") is None:
        x["area"] = float(mask_utils.area(rle)) if rle else width * height
    expect(0 <= x["area"] < math.inf, "area must be a number")
    return x["box"][2] > x["box"][0] and x["box"][3] > x["box"][1] and (task == "det" or rle is not None)


class Coco(Dense):
    """COCO 2017's layout with any categories: DIR/{train,val}2017/*.jpg and

    det, inst   DIR/annotations/instances_{train,val}2017.json: boxes, and masks as polygons or RLE
    pan         DIR/annotations/panoptic_{train,val}2017.json, and PNGs in the folder of that name: a
                segment for every pixel, things and stuff

    or, for det and inst, an export of a labeling tool: DIR/{train,valid}/_annotations.coco.json with
    the images beside it.  Crowds are not trained on.
    classes: names of the model's classes, which define the labels; None: those of the file.
    """

    def __init__(self, root, split, task, transform, seed=0, classes=None):
        self.task, self.split, self.transform, self.seed = task, split, transform, seed
        kind = f"{'panoptic' if task == 'pan' else 'instances'}_{split}2017"
        self.folder, self.maps = os.path.join(root, f"{split}2017"), os.path.join(root, "annotations", kind)
        self.path = self.maps + ".json"
        export = os.path.join(folder_of(root, split), "_annotations.coco.json")
        if task != "pan" and os.path.exists(export):
            self.folder, self.path = os.path.dirname(export), export
        need(root, self.folder, self.path)
        if task == "pan":
            need(self.maps)
        images, annotations = self.read(classes)
        entries = {number: [] for number in images}
        for number, x in enumerate(annotations, 1):
            x["id"] = number  # pycocotools reads a match with id 0 as no match
            if task == "pan" or not x["iscrowd"]:
                entries[x["image_id"]].append(x)
        rows = [images[number] for number in sorted(images)]
        self.images = Packed((x["file_name"], x["id"], (x["height"], x["width"])) for x in rows)
        self.entries = Packed(entries[x["id"]] for x in rows)
        self.note = f"; not used: {self.crowds} crowds and {self.dropped} objects without area or mask"
        self.tables = dict(images=rows, annotations=annotations) if split == "val" else None

    def read(self, classes):
        """Images by id, and annotations, of the file.  Sets what choose_classes sets, crowds and dropped.

        Raises InputError with the first entry that lacks something, or has something of another kind.
        """
        where, images, used = "no COCO file", {}, set()
        try:
            with open(self.path, "rb") as file:
                content = json.load(file)
            there = {*os.listdir(self.folder)}
            for i, x in enumerate(content["images"]):
                where = f"images[{i}]"
                expect(type(x["id"]) is int and x["id"] not in images, "ids must be different whole numbers")
                expect(min(x["height"], x["width"]) > 0, "height and width must be positive")
                name = x["file_name"]
                here = name in there or os.path.exists(os.path.join(self.folder, name))
                expect(here, f"{name} is not in {self.folder}")
                images[x["id"]] = x
            where = "categories"
            known = {x["id"] for x in content["categories"] if type(x["id"]) is int}
            expect(len(known) == len(content["categories"]), "ids must be different whole numbers")
            where, maps = "annotations", {*os.listdir(self.maps)} if self.task == "pan" else None
            kept, self.crowds, self.dropped = [], 0, 0
            for i, x in enumerate(content["annotations"]):
                where, parts = f"annotations[{i}]", [x]
                size = images[x["image_id"]]["height"], images[x["image_id"]]["width"]
                if self.task == "pan":
                    parts = x["segments_info"]
                    expect(x["file_name"] in maps, f"{x['file_name']} is not in {self.maps}")
                    expect(len({part["id"] for part in parts}) == len(parts), "two segments have the same id")
                for part in parts:
                    expect(part["category_id"] in known, f"there is no category {part['category_id']}")
                    part["iscrowd"] = part.get("iscrowd") or 0
                    expect(part["iscrowd"] in (0, 1), "iscrowd must be 0 or 1")
                    used.add(part["category_id"])
                    self.crowds += part["iscrowd"]
                if self.task == "pan" or complete(x, size, self.task):
                    kept.append(x)
                else:
                    self.dropped += 1
            where = "categories"
            self.choose_classes(content["categories"], used, classes)
        except (OSError, AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            what = f"there is no {error}" if isinstance(error, KeyError) else str(error)
            raise InputError(f"{self.path}: {where}: {what}; correct or remove it") from error
        needed = "an area and a mask" if self.task == "inst" else "an area"
        expect(kept, f"{self.path}: it has no object with {needed}; annotate some")
        in_pixels = self.task == "pan" or any(max(x["bbox"]) > 1 for x in kept)
        expect(in_pixels, f"{self.path}: its boxes are fractions of images; write them in pixels")
        return images, kept

    def choose_classes(self, rows, used, classes):
        """Categories in the order of their ids, or of the model's classes, which must be the same."""
        # Some tools add a category 0 that stands for all and has no objects.  It is left out, unless the
        # model has a class of its name, and no other category has this name.
        others = [x for x in rows if x["id"] != 0]
        needed = {*(classes or ())} - {x["name"] for x in others}
        rows = others + [x for x in rows if x["id"] == 0 and (0 in used or x["name"] in needed)]
        of_name = {x["name"]: x for x in sorted(rows, key=lambda x: x["id"])}
        expect(len(of_name) == len(rows), "two categories have the same name")
        self.classes = list(classes or of_name)
        wrong = sorted({*self.classes} ^ of_name.keys())
        expect(not wrong, f"category {wrong[:1]} is only in the file, or only in the model")
        self.categories = [of_name[name]["id"] for name in self.classes]
        self.things = [of_name[name].get("isthing", 1) == 1 for name in self.classes]

    def coco(self):
        """The annotations, including crowds, as pycocotools' COCO object."""
        categories = [dict(id=i, name=name) for i, name in zip(self.categories, self.classes)]
        return indexed(**self.tables, categories=categories)

    def segments(self, index):
        """The panoptic map: ids, int64 (H, W), 0 for void, and a dictionary per segment."""
        (name, _, size), found = self.images[index], self.entries[index]
        expect(len(found) == 1, f"{self.path}: {name} has {len(found)} annotations, and must have one")
        path, table = os.path.join(self.maps, found[0]["file_name"]), found[0]["segments_info"]
        ids = torch.from_numpy(np.asarray(load_image(path)) @ np.array([1, 256, 256**2]))  # (H, W)
        need_size(path, ids.shape, size, name)
        used = ids.flatten().unique_consecutive().tolist()
        unknown = {*used} - {0, *(segment["id"] for segment in table)}
        expect(not unknown, f"{path}: segments {[*unknown][:3]} have no entries in {self.path}; add them")
        return ids, table

    def truth(self, index, size):
        """Labels, boxes and masks of an image of this size, for training_sample."""
        need_size(self.name(index), size, self.images[index][2], self.path)
        if self.split == "val":
            return None
        label_of = {category: label for label, category in enumerate(self.categories)}
        if self.task == "pan":
            ids, table = self.segments(index)
            return {x["id"]: label_of[x["category_id"]] for x in table if not x["iscrowd"]}, None, ids.int()
        found = self.entries[index]
        labels = [label_of[x["category_id"]] for x in found]
        if self.task == "det":
            return labels, [x["box"] for x in found], None
        rles = [x["segmentation"] for x in found]
        masks = mask_utils.decode(rles) if rles else np.zeros((*size, 0), np.uint8)  # (H, W, n)
        return labels, None, torch.from_numpy(masks).permute(2, 0, 1)


class Ade(Dense):
    """ADE20K's layout (ADEChallengeData2016) with any number of classes, for sem:

    DIR/images/{training,validation}/*.jpg
    DIR/annotations/{training,validation}/*.png    gray or palette: classes from 1; 0 and 255 are void
    DIR/objectInfo150.txt                          class names, at the ends of rows, after a tab; optional
    """

    def __init__(self, root, split, task, transform, seed=0, classes=None):
        self.split, self.transform, self.seed = split, transform, seed
        name = dict(train="training", val="validation")[split]
        self.folder, self.maps = (os.path.join(root, part, name) for part in ("images", "annotations"))
        need(root, self.folder, self.maps)
        names = sorted(x for x in os.listdir(self.folder) if image_folder.is_image_file(x) and x[0] != ".")
        maps = [os.path.splitext(name)[0] + ".png" for name in names]
        expect(names, f"{self.folder}: there is no image in it")
        missing = sorted({*maps} - {*os.listdir(self.maps)})
        expect(not missing, f"{self.maps}: no {missing[:1]}; every image needs a label map of its name")
        self.images = Packed(zip(names, range(len(names)), maps))
        table = os.path.join(root, "objectInfo150.txt")
        named = self.read_names(table)
        same = not classes or not named or classes == named
        expect(same, f"{table}: its names are not the model's classes")
        self.classes = classes or named or self.count_classes()
        self.categories = list(range(1, len(self.classes) + 1))

    def read_names(self, path):
        """Class names of a table; None if there is no such file."""
        if not os.path.exists(path):
            return None
        with open(path, encoding="utf-8", errors="replace") as file:
            rows = [line.strip().split("\t") for line in file if line[:1].isdigit()]
        numbered = [row[0].strip() for row in rows] == [str(i) for i in range(1, len(rows) + 1)]
        expect(rows and numbered, f"{path}: its rows are not 1, a tab, ..., a name; 2, ...; correct it")
        return [row[-1].split(",")[0].strip() for row in rows]

    def count_classes(self):
        """Their numbers, as text, where only label maps are known: up to the largest below 255."""
        with ThreadPoolExecutor() as pool:  # PIL decodes in parallel
            found = pool.map(lambda index: self.read_map(index).unique().tolist(), range(len(self)))
            found = sorted({*itertools.chain(*found)} - {0, 255})
        good = len(found) > 1 and found[-1] <= 10 * len(found)  # gray values such as 85, 170 are no classes
        remedy = "0 and 255 are void; number two or more classes from 1 on, or name all in objectInfo150.txt"
        expect(good, f"{self.maps}: there are labels {found[:9]}; {remedy}")
        return [str(label) for label in range(1, found[-1] + 1)]

    def read_map(self, index):
        """Labels, uint8 (H, W)."""
        path = os.path.join(self.maps, self.images[index][2])
        return torch.from_numpy(np.array(read_image(path, ("L", "P"))))

    def label_map(self, index):
        """Classes of pixels, int64 (H, W), -1 for void."""
        labels, count = self.read_map(index).long(), len(self.classes)
        labels = labels.where(labels != 255, 0) if count < 255 else labels
        path = os.path.join(self.maps, self.images[index][2])
        what = f"{path}: label {labels.max()} in it, the data set has labels 0 to {count}; correct it"
        expect(labels.max() <= count, what)
        return labels - 1

    def truth(self, index, size):
        """Labels, and the label map, for training_sample."""
        labels = self.label_map(index)
        need_size(self.name(index), size, labels.shape, "its label map")
        return dict(zip(self.categories, range(len(self.classes)))), None, (labels + 1).byte()


def make_dataset(
    task, data, split, size, seed=0, classes=None, least=1.0, color=0.0, randaugment=0, erasing=0.0
):
    """The images of a split, "train" or "val".  data: None for shapes, or a folder in the task's layout.

    size: pixels per side; of the short side where the dense tasks evaluate photographs.  The rest is
    augmentation: see train_transform and dense_train_transform.
    """
    training = split == "train"
    if data is None:
        scenes = dict(cls=5_700, det=5_700).get(task, 5_000)  # without masks, a scene costs less
        held_out = 2_000 if task == "cls" else 500
        return Shapes(scenes if training else held_out, size, seed, split, task)
    if task == "cls":
        transform = train_transform(size, least, randaugment, erasing) if training else eval_transform(size)
        return Folder(data, split, transform, seed, classes)
    crop = dense_train_transform(task, size, least, color)
    transform = crop if training else dense_eval_transform(task, size)
    return (Ade if task == "sem" else Coco)(data, split, task, transform, seed, classes)


def count_images(task, data, limit):
    """How many images there are to train on, at most `limit`, without reading them or their annotations."""
    folders = dict(cls=["train"], sem=["images/training"]).get(task, ["train2017", "train"])
    walks = (os.walk(os.path.join(data, folder), followlinks=True) for folder in folders)
    names = (name for walk in walks for _, _, names in walk for name in names)  # walks no further than needed
    return sum(1 for _ in itertools.islice(filter(image_folder.is_image_file, names), limit))


# --------------------------------------------------------------------------------------------------
# Batches
# --------------------------------------------------------------------------------------------------
class SkipBroken(Dataset):
    """A training set that takes the next image for one that cannot be read, so that long runs continue."""

    def __init__(self, dataset):
        self.dataset, self.broken = dataset, set()  # each process has its own

    def __getitem__(self, key):
        """key: (epoch, index)."""
        epoch, index = key
        while True:
            try:
                return self.dataset[epoch, index]
            except InputError as error:
                if index not in self.broken:
                    print(f"skipped: {error}", file=sys.stderr)
                self.broken.add(index)
                broken, count = len(self.broken), len(self.dataset)
                what = f"{broken} of {count} training images are broken, the last: {error}"
                expect(broken <= max(10, count // 100) and broken < count, what)
                index = (index + 1) % count


def ignore_signals(worker):
    """For loader processes: their parent ends them, in training when the current step is finished."""
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, signal.SIG_IGN)


def batches_of(dataset, workers, device, **options):
    """The batches of a DataLoader, whose processes end with this generator: close it."""
    # On Linux, workers are forked and share the data set with their parent.
    context = "fork" if workers and sys.platform == "linux" else None  # not the default since Python 3.14
    options |= dict(num_workers=workers, pin_memory=device.type == "cuda", multiprocessing_context=context)
    batches = iter(DataLoader(dataset, worker_init_fn=ignore_signals, **options))
    try:
        yield from batches
    finally:
        if workers:
            # Python would send SIGTERM, which they ignore.  Torch has no public name for this.
            batches._shutdown_workers()


class GlobalBatches(Sampler):
    """Yields lists of (epoch, index), the chunks of one process in every global batch.

    An epoch is a permutation drawn from (seed, epoch), without the last, incomplete batch.  A global
    batch is split into world_size * accumulate equal chunks, of which this process takes `accumulate`.
    So the images of a step do not depend on the number of processes.
    """

    def __init__(self, length, batch_size, steps, seed=0, rank=0, world_size=1, accumulate=1, first_step=0):
        split = f"{world_size} processes x --accumulate {accumulate}"
        chunk, rest = divmod(batch_size, world_size * accumulate)
        expect(not rest, f"--batch-size {batch_size} is not divisible by {split}; change one")
        few = f"--batch-size {batch_size} is more than the {length} training images; lower it"
        expect(batch_size <= length, few)
        self.length, self.batch_size, self.seed, self.chunk = length, batch_size, seed, chunk
        first = rank * accumulate * chunk  # image of a global batch that is this process's
        self.steps, self.starts = range(first_step, steps), range(first, first + accumulate * chunk, chunk)

    def __iter__(self):
        drawn = None
        for step in self.steps:
            epoch, position = divmod(step, self.length // self.batch_size)
            if epoch != drawn:
                with seeded(self.seed, epoch):
                    order, drawn = torch.randperm(self.length), epoch
            for start in self.starts:
                start += position * self.batch_size
                yield [(epoch, index) for index in order[start : start + self.chunk].tolist()]


def lists(samples):
    """A batch in evaluation: a list of images, whose sizes may differ, and a list of targets."""
    return [list(part) for part in zip(*samples)]


def stacked(samples):
    """A batch of a dense task in training: images (B, 3, H, W), and a list of targets."""
    images, targets = zip(*samples)
    return torch.stack(images), list(targets)


def as_float(images):
    """uint8 images to float32 in [0, 1]; on the device, so that fewer bytes are copied."""
    return images.float() / 255


def mix(images, labels, num_classes, mixup, cutmix, seed, step):
    """Mixup or cutmix, chosen by (seed, step): each image of a chunk is mixed with its neighbor.

    images: (b, 3, H, W).  labels: (b,).  mixup, cutmix: parameters of their Beta distributions, 0 for
    never.  Returns images, and targets (b, num_classes).
    """
    choices = [v2.MixUp(alpha=mixup, num_classes=num_classes)] if mixup else []
    choices += [v2.CutMix(alpha=cutmix, num_classes=num_classes)] if cutmix else []
    with seeded(seed, step):
        return v2.RandomChoice(choices)(images, labels)
