# SPDX-License-Identifier: MIT
"""Data sets and augmentation, independent of the model.

    shapes        scenes drawn from (seed, epoch, index): no files, new scenes in every epoch
    Folder        DIR/train/<class>/*.jpg and DIR/val/<class>/*.jpg, for example ImageNet
    COCO          DIR/{train,val}2017/*.jpg and DIR/annotations/: boxes, masks, panoptic segments
    ADE20K        DIR/images/ and DIR/annotations/: label maps of any number of classes

Files from many tools are accepted as long as their meaning is unambiguous.  If it is not, the run
ends with a one-line error before the first step.

A sample and its augmentation depend only on (seed, epoch, index), the order of samples on (seed,
epoch), and mixup and cutmix on (seed, step).  A run that is repeated, split over more devices or
resumed therefore sees the same images.
"""

import contextlib
import io
import json
import math
import os
import pickle
import re
import signal
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import tv_tensors
from torchvision.datasets.folder import is_image_file, make_dataset
from torchvision.ops import box_convert, masks_to_boxes
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional
from tqdm import tqdm


class InputError(ValueError):
    """A problem with the user's files or flags: one line with what is wrong, where, and the fix."""


class Unreadable(InputError):
    """An image file that is truncated or not an image.  Training skips a few of these."""


# -------------------------------------------------------------------------------------------------
# Shapes: scenes with things, stuff, occlusion and texture, drawn in about a millisecond
# -------------------------------------------------------------------------------------------------
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
    Rotation, stretch, color and pattern are drawn here, independent of the class.
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
    coco.dataset = tables
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


class Shapes(Dataset):
    """Scenes drawn from (seed, epoch, index); validation scenes depend only on the index."""

    def __init__(self, length, size, seed, split, task="cls"):
        self.length, self.size, self.seed, self.split, self.task = length, size, seed, split, task
        self.classes = [*THINGS, *(STUFF if task in ("sem", "pan") else ())]
        self.things = [name in THINGS for name in self.classes]
        self.categories = list(range(1, len(self.classes) + 1))

    def __len__(self):
        return self.length

    def name(self, index):
        return f"scene {index}"

    def scene(self, epoch, index):
        """Image, uint8 (3, size, size), list of (class, mask: bool (size, size)), and label (cls)."""
        drawn_from = (0, self.seed, epoch, index) if self.split == "train" else (1, index)
        rng = np.random.default_rng((drawn_from[0] + 2 * (self.task != "cls"), *drawn_from[1:]))
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


# -------------------------------------------------------------------------------------------------
# Images, and folders of classes
# -------------------------------------------------------------------------------------------------
MEAN_COLOR = [124, 116, 104]  # ImageNet's mean; fills what erasing and rotation remove


@contextlib.contextmanager
def seeded(*numbers):
    """Seed torch's CPU random numbers inside the block only."""
    with torch.random.fork_rng(devices=[]):
        state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
        torch.default_generator.manual_seed(int(state[0]))
        yield


@contextlib.contextmanager
def opened(path):
    """A PIL image.  Raises Unreadable if the file is truncated or not an image."""
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        what = f"cannot be read as an image ({error}); replace or remove it"
        raise Unreadable(f"{path}: {what}") from error


def header_size(path):
    """Height and width that load_image would return, without decoding pixels."""
    with opened(path) as image:
        exif = Image.Image.getexif(image)  # PNG's own getexif() decodes the image
        return image.size if exif.get(0x0112) in range(5, 9) else image.size[::-1]


def load_image(path):
    """PIL RGB, upright.  Accepts gray, palette, CMYK, 16-bit and EXIF-rotated files."""
    with opened(path) as image:
        ImageOps.exif_transpose(image, in_place=True)  # otherwise it copies every image
        if image.mode.startswith("I"):  # 16-bit gray; convert() would clip at 255 instead of scaling
            image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
        return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")


def train_transform(size, least, randaugment, erasing):
    """PIL RGB -> uint8 (3, size, size).

    least: area of the smallest crop, a part of the image's.  randaugment: magnitude, 0 to 30.
    erasing: probability.
    """
    bicubic, bilinear = InterpolationMode.BICUBIC, InterpolationMode.BILINEAR
    crop = v2.RandomResizedCrop(size, (least, 1.0), interpolation=bicubic)
    steps = [crop, v2.RandomHorizontalFlip()]
    if randaugment:  # one operation on average, as in Swin's recipe
        operation = v2.RandAugment(1, randaugment, interpolation=bilinear, fill=MEAN_COLOR)
        steps += [v2.RandomApply([operation], 0.5)] * 2
    erase = [v2.RandomErasing(erasing, value=MEAN_COLOR)] if erasing else []
    return v2.Compose([*steps, v2.ToImage(), *erase, v2.ToPureTensor()])


def eval_transform(size):
    """PIL RGB -> uint8 (3, size, size): the central 7/8 of the short side (224 of 256)."""
    resize = v2.Resize(round(size * 256 / 224), interpolation=InterpolationMode.BICUBIC)
    return v2.Compose([resize, v2.CenterCrop(size), v2.ToImage(), v2.ToPureTensor()])


def is_hidden(name):
    """Whether a file or folder was probably created by the system or a tool, not by the user."""
    left_behind = "__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"
    return name.startswith(".") or name in left_behind


def need(*paths, takes):
    """Raise InputError if a file or folder of a data set is missing."""
    for path in paths:
        if not os.path.exists(path):
            raise InputError(f"{path}: no such file or folder; --data takes DIR with {takes}")


def folder_of(root, split):
    """DIR/train, or the one of DIR/val, DIR/valid and DIR/validation that exists."""
    names = ("train",) if split == "train" else ("val", "valid", "validation")
    there = [path for path in (os.path.join(root, name) for name in names) if os.path.isdir(path)]
    if len(there) > 1:
        raise InputError(f"{root}: {there[0]} and {there[1]} are both there; keep one of the two")
    return there[0] if there else os.path.join(root, names[0])


class Folder(Dataset):
    """DIR/<split>/<class>/*.jpg.  classes: list of names in order of their labels; None: as found."""

    surveyed = Counter(), []  # nothing for check() to verify

    def __init__(self, root, split, transform, seed=0, classes=None):
        folder = folder_of(root, split)
        need(root, folder, takes="DIR/train/<class>/ and DIR/val/<class>/")
        found = sorted(x.name for x in os.scandir(folder) if x.is_dir() and not is_hidden(x.name))
        self.classes = found if classes is None else list(classes)
        unknown = [name for name in found if name not in self.classes]
        if unknown:
            names = f"{', '.join(unknown[:5])}; rename or remove them"
            raise InputError(f"{folder}: {len(unknown)} classes that the model is not trained for: {names}")
        labels = {name: self.classes.index(name) for name in found}
        hidden = lambda path: any(map(is_hidden, path[len(folder) :].split(os.sep)))
        shown = lambda path: is_image_file(path) and not hidden(path)
        try:
            samples = make_dataset(folder, labels, is_valid_file=shown)
        except (FileNotFoundError, ValueError) as error:  # a class without images, or no class
            what = str(error).strip(" .").replace("\n", " ") if found else "no class folder in it"
            raise InputError(f"{folder}: {what}; put images into a folder for each class") from error
        self.paths = np.array([os.fsencode(path) for path, _ in samples])  # an array: see Packed
        self.labels = np.array([label for _, label in samples])
        self.transform, self.seed = transform, seed

    def __len__(self):
        return len(self.paths)

    def name(self, index):
        return os.fsdecode(self.paths[index])

    def describe(self, total):
        return [f"{len(self)} images, {len(self.classes)} classes"]

    def __getitem__(self, key):
        """key: (epoch, index).  Returns the image, uint8 (3, size, size), and its label, an int."""
        image = load_image(self.name(key[1]))
        with seeded(self.seed, *key):
            return self.transform(image), int(self.labels[key[1]])


# -------------------------------------------------------------------------------------------------
# Dense data sets: every object, or every pixel, has a label
# -------------------------------------------------------------------------------------------------
def box_tensor(boxes, size):
    """Convert n lists [left, top, right, bottom], in pixels of an image of size (H, W)."""
    boxes = torch.tensor(boxes).float().view(-1, 4)
    return tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size)


def dense_train_transform(task, size, least, color):
    """Augmentation of an image and its target, and a random crop of size x size pixels.

    Where the resized image is smaller, the crop is padded, at a random place, with the mean color: no
    object, and void for sem and pan.
    least: smallest of the random factors by which images are resized; the largest is 2.  It should not
    be far below 1: centers start from the cells of a grid over the crop, and cells of padding have
    nothing to find.
    color: strength of random brightness, contrast, saturation and hue; 1 is usual for ADE20K.
    """
    # Colors come first, while the image is small.  RandomPhotometricDistort would also swap red and
    # blue, which distinguish sand and sky.
    steps = [v2.ColorJitter(0.125 * color, 0.5 * color, 0.5 * color, 0.05 * color)] if color else []
    # The unit is what fits into size x size, as in COCO's large-scale jitter.  For sem it is a short
    # side of `size`, as for ADE20K.
    if task == "sem":
        steps.append(v2.RandomShortestSize(range(round(least * size), 2 * size + 1), max_size=8 * size))
    else:
        steps.append(v2.ScaleJitter((size, size), (least, 2.0)))
    fill = {tv_tensors.Image: MEAN_COLOR, "others": 0}
    crop = v2.RandomCrop(size, pad_if_needed=True, fill=fill)
    return v2.Compose([*steps, v2.RandomHorizontalFlip(), crop])


def dense_eval_transform(task, size):
    """Resize the short side to `size`; the long side has at most 1333 / 800 of it, for sem four times."""
    return v2.Resize(size, max_size=4 * size if task == "sem" else size * 1333 // 800)


def training_sample(image, labels, boxes, masks, transform):
    """Augment an image and its target.

    image: tv_tensors.Image.  labels: n ints.  boxes: from box_tensor, or None if there are masks.
    masks: bool (n, H, W); or a map (H, W) from numbered(), if they do not overlap, because one map is
    faster to transform than n masks; or None.  Returns image and target: see Dense.
    """
    parts = dict(labels=torch.tensor(list(labels), dtype=torch.int64))
    if masks is None:
        parts["boxes"] = boxes
    else:  # resizing bool converts it to float, which is nine times slower than uint8
        parts["masks"] = tv_tensors.Mask(masks.byte() if masks.dtype == torch.bool else masks)
    image, parts = transform(image, parts)
    labels = parts["labels"]
    if masks is not None and masks.ndim == 2:
        cropped = parts["masks"].as_subclass(torch.Tensor)
        present = cropped.flatten().bincount(minlength=1)[1:].nonzero()[:, 0]  # unique() would sort all pixels
        labels, masks = labels[present], cropped == (present + 1).view(-1, 1, 1)
    elif masks is not None:
        masks = parts["masks"].as_subclass(torch.Tensor).bool()
    target = target_of(labels, parts.get("boxes"), masks, tuple(image.shape[-2:]))
    return image.as_subclass(torch.Tensor), target


def numbered(values, numbers):
    """A map (H, W) that holds k where `values` is numbers[k - 1], and 0 elsewhere."""
    numbers, order = torch.tensor([-2, *numbers]).sort()  # -2 is never in a map
    found = torch.searchsorted(numbers, values).clamp(max=len(numbers) - 1)
    found = torch.where(numbers[found] == values, order[found], 0)
    return found.to(torch.uint8 if len(numbers) <= 256 else torch.int32)  # resizing keeps both exact


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


class Dense(Dataset):
    """What Coco and Ade share.

    `classes` are names, `things` says which are countable, and `categories` are their numbers in the
    files.  A row of `images` is file name, number, and more.

    In training, data[epoch, index] is a crop, uint8 (3, size, size), and its target, a dictionary:
        labels  (n,) int64           class of each object (det, inst), segment (pan) or mask (sem)
        boxes   (n, 4) float32       center x, center y, width, height, as fractions of the image
        masks   (n, size, size) bool not for det
    In evaluation, it has the image's `index` and its `size` (H, W) in the file.  The ground
    truth comes from coco() for det and inst, label_map(index) for sem, segments(index) for pan.
    """

    surveyed = None  # result of survey(self.check, ...), if there is one already

    def __len__(self):
        return len(self.images)

    def name(self, index):
        return os.path.join(self.folder, self.images[index][0])

    def __getitem__(self, key):
        image = tv_tensors.Image(functional.pil_to_tensor(load_image(self.name(key[1]))))
        size = tuple(image.shape[-2:])
        if max(size) > 100 * min(size):  # resized to the usual sizes, no pixel would be left
            raise Unreadable(f"{self.name(key[1])}: {size[1]} x {size[0]} pixels are too thin; remove or cut it")
        if self.split == "val":
            return self.transform(image).as_subclass(torch.Tensor), dict(index=key[1], size=size)
        target = self.truth(key[1], size)
        with seeded(self.seed, *key):
            return training_sample(image, *target, self.transform)


def check_size(path, size, other, whose):
    if tuple(size) != tuple(other):
        sides = f"{size[1]} x {size[0]} pixels, {whose} has {other[1]} x {other[0]}"
        raise InputError(f"{path}: {sides}; correct or remove one")


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


# Which values of COCO's entries are used, and how they are parsed
def number(value):
    """Parse a number in any form, as 7, 7.0, "7" or "7.5".  Returns an int if it is whole."""
    value = int(value) if isinstance(value, int) or str(value).isdecimal() else float(value)
    return value if math.isnan(value) or value != math.floor(value) else int(value)  # inf: an error


def identifier(value):
    """Parse an id.  7, 7.0 and "7" are the same; any other text is a different id, also "07"."""
    is_text = isinstance(value, str) and not re.fullmatch("0|-?[1-9][0-9]*", value)
    return value if is_text else whole(value)


whole = lambda value: number(value) if isinstance(number(value), int) else None
positive = lambda value: max(0, whole(value) or 0) or None
flag = lambda default: lambda value: default if value is None else {0: 0, 1: 1}.get(number(value))
box = lambda value: [*map(number, value)] if isinstance(value, list) and len(value) == 4 else None
text = lambda value: value if isinstance(value, str) else None
COCO_ENTRIES = dict(  # the required keys of each entry
    images=dict(id=identifier, file_name=text, width=positive, height=positive),
    categories=dict(id=identifier, name=text, isthing=flag(1)),
    instances=dict(image_id=identifier, category_id=identifier, bbox=box, iscrowd=flag(0)),
    panoptic=dict(image_id=identifier, file_name=text),
    segments=dict(id=positive, category_id=identifier, iscrowd=flag(0)),
)
UNUSABLE = AttributeError, KeyError, OverflowError, TypeError, ValueError  # raised by a parser; it may also return None


def clean(rows, kind, where):
    """Parse the rows of a table of a COCO file as in COCO_ENTRIES."""
    if not isinstance(rows, list):
        raise InputError(f"{where} is not a list of entries, as in COCO's format; correct it")
    for i, row in enumerate(rows):
        for key, read in COCO_ENTRIES[kind].items():
            value = None
            with contextlib.suppress(*UNUSABLE):
                value = row[key] = read(row.get(key))
            if value is None:
                raise InputError(f"{where}[{i}] has no usable {key}; correct or remove the entry")
    return rows


def match_ids(rows, users, key, path):
    """Raise InputError if ids of rows are not unique, or if users refer by `key` to missing ones."""
    if any(isinstance(row["id"], str) for row in rows):  # then make all text: "7" and 7 are one entry
        for row, name in [(row, "id") for row in rows] + [(user, key) for user in users]:
            row[name] = str(row[name])
    known = {row["id"] for row in rows}
    if len(known) < len(rows):
        raise InputError(f"{path}: {key} is not unique in its table; number entries differently")
    for i, user in enumerate(users):
        if user[key] not in known:
            who = f"annotation {user.get('id', i)} has {key} {user[key]}, which is not in its table"
            raise InputError(f"{path}: {who}; add or remove one")


def fits(rle, pixels):
    """Whether run lengths end within so many pixels; if not, pycocotools raises ValueError."""
    with contextlib.suppress(ValueError):
        return mask_utils.decode(rle | dict(size=[1, pixels])) is not None


def rle_of(mask, size):
    """Convert a mask (polygons, or run lengths as numbers or text) to run lengths as text.

    Returns None if it is empty.  Raises one of UNUSABLE if it has another form or size.
    """
    if not mask:
        return None
    if isinstance(mask, list):
        polygons = [np.array(polygon, np.float64) for polygon in mask]
        # Fewer than three points enclose nothing, and pycocotools would read four numbers as a box.
        good = [p for p in polygons if len(p) >= 6 and len(p) % 2 == 0 and np.isfinite(p).all()]
        if any(p.ndim != 1 for p in polygons) or any(np.abs(p).max() >= 1e5 for p in good):
            raise ValueError  # no polygons, or so far outside that drawing them takes gigabytes
        rle = mask_utils.merge(mask_utils.frPyObjects(good, *size)) if good else None
    else:
        rle, pixels = dict(size=[*size], counts=mask["counts"]), math.prod(size)
        if isinstance(rle["counts"], list):
            rle = mask_utils.frPyObjects(rle | dict(counts=[*map(whole, rle["counts"])]), *size)
        elif not re.fullmatch("[0-o]*[0-O]", rle["counts"]):  # the last number must be complete
            raise ValueError
        # If runs end too early, pycocotools leaves the remaining pixels uninitialized.
        if [*map(whole, mask["size"])] != [*size] or fits(rle, pixels - 1) or not fits(rle, pixels):
            raise ValueError
    return rle if rle and mask_utils.area(rle) else None


def usable(entry, size, task, where):
    """Whether an object has an area and, for inst, a mask.

    Sets `box`, clipped to the image of size (H, W), and `segmentation`, run lengths.  If `area` is
    missing, sets it to that of the mask, or else of the bbox.
    """
    x1, y1, width, height = entry["bbox"]
    x2, y2, x1, y1 = min(x1 + width, size[1]), min(y1 + height, size[0]), max(x1, 0), max(y1, 0)
    area, rle = entry.get("area"), None
    known = isinstance(area, (int, float)) and 0 <= area < math.inf
    if task == "inst" or not known:
        try:
            rle = rle_of(entry.get("segmentation"), size)
        except UNUSABLE as error:
            if task == "inst":
                what = f"neither polygons in its image nor run lengths of size {[*size]}"
                raise InputError(f"{where} has a mask that is {what}; correct or remove it") from error
    area = area if known else int(mask_utils.area(rle)) if rle else width * height
    entry |= dict(box=[x1, y1, x2, y2], segmentation=rle, area=area)
    return x2 > x1 and y2 > y1 and (task == "det" or rle is not None)  # False for nan


class Coco(Dense):
    """COCO 2017's layout with any categories: DIR/{train,val}2017/*.jpg and

    det, inst   DIR/annotations/instances_{train,val}2017.json: boxes, and masks as polygons or RLE
    pan         DIR/annotations/panoptic_{train,val}2017.json: a segment for every pixel, things and
                stuff; PNGs in the folder panoptic_{train,val}2017 beside it or in DIR

    or, for det and inst, an export of a labeling tool: DIR/{train,valid}/_annotations.coco.json with
    the images beside it.  Crowds are not trained on.  `dropped` counts objects without area or, for
    inst, without mask.
    classes: names of the model's classes, which define the labels; None: use those of the file.
    """

    def __init__(self, root, split, task, transform, seed=0, classes=None):
        self.task, self.split, self.transform, self.seed = task, split, transform, seed
        self.find(root, split)
        images, categories, annotations, parts = self.read()
        self.crowds = sum(part["iscrowd"] for part in parts)
        self.objects = len(parts) - self.crowds
        if not self.objects:
            what = f"no usable annotation; {self.dropped} have no area or, for inst, no mask"
            raise InputError(f"{self.path}: {what}")
        self.choose_classes(categories, {part["category_id"] for part in parts}, classes)
        label = {number: label for label, number in enumerate(self.categories)}
        entries = {image["id"]: [] for image in images}
        for x in annotations:
            if task == "pan":
                entries[x["image_id"]].append((x["file_name"], x["segments_info"]))
            elif not x["iscrowd"]:
                entries[x["image_id"]].append((label[x["category_id"]], x["box"], x["segmentation"]))
        images.sort(key=lambda image: image["id"])
        self.images = Packed((x["file_name"], x["id"], (x["height"], x["width"])) for x in images)
        self.entries = Packed(entries[image["id"]] for image in images)

    def find(self, root, split):
        """Set `path` (annotation file), `folder` (of images) and, for pan, `maps` (folder of PNGs)."""
        kind = f"{'panoptic' if self.task == 'pan' else 'instances'}_{split}2017"
        places = [os.path.join(root, "annotations", kind), os.path.join(root, kind)]
        self.folder, self.path = os.path.join(root, f"{split}2017"), places[0] + ".json"
        self.maps = next(filter(os.path.isdir, places), places[0])
        export = os.path.join(folder_of(root, split), "_annotations.coco.json")
        self.exported = self.task != "pan" and os.path.exists(export)
        if self.exported and os.path.exists(self.path):
            raise InputError(f"{root}: {export} and {self.path} are both there; keep one of them")
        if self.exported:
            self.folder, self.path = os.path.dirname(export), export
        takes = f"DIR/{split}2017/ and, for --task {self.task}, DIR/annotations/{kind}.json"
        takes += f" and {kind}/*.png" if self.task == "pan" else f", or with {export} and images"
        need(root, self.folder, self.path, *[self.maps] * (self.task == "pan"), takes=takes)

    def read(self):
        """Read the annotation file, for training and evaluation.

        Returns images, categories, `usable` annotations, and parts: the annotations or, for pan, their
        segments.
        """
        try:
            with open(self.path, "rb") as file:
                content = json.load(file)  # bytes, so that json handles byte order marks and UTF-16
        except (OSError, ValueError) as error:
            raise InputError(f"{self.path}: not readable as JSON ({error}); replace it") from error
        content, pan = content if isinstance(content, dict) else {}, self.task == "pan"
        kinds = dict(images="images", categories="categories")
        kinds["annotations"] = "panoptic" if pan else "instances"
        tables = [clean(content.get(x), kind, f"{self.path}: {x}") for x, kind in kinds.items()]
        images, categories, annotations = tables
        match_ids(images, annotations, "image_id", self.path)
        self.locate(images, self.folder)
        where, parts = f"{self.path}: annotations[{{}}]".format, annotations
        if pan:
            self.locate(annotations, self.maps)
            parts = []
            for i, x in enumerate(annotations):
                parts += clean(x.get("segments_info"), "segments", f"{where(i)}.segments_info")
        match_ids(categories, parts, "category_id", self.path)
        if not pan:
            sizes = {x["id"]: (x["height"], x["width"]) for x in images}
            good = [usable(x, sizes[x["image_id"]], self.task, where(i)) for i, x in enumerate(annotations)]
            parts = annotations = [x for x, is_good in zip(annotations, good) if is_good]
        self.dropped = len(tables[2]) - len(annotations)
        return images, categories, annotations, parts

    def locate(self, rows, folder):
        """Set the file_name of every row to that of the file in the folder.

        Names written on other machines may have backslashes or other leading folders.  The longest
        ending of the name that exists in the folder is used.
        """
        there, meant = set(os.listdir(folder)), {}  # checking each file on a network drive takes minutes
        for row in rows:
            name, parts = row["file_name"], row["file_name"].replace("\\", "/").split("/")
            ends = [name] + ["/".join(parts[i:]) for i in range(len(parts))]
            here = lambda end: end in there or "/" in end and os.path.isfile(os.path.join(folder, end))
            row["file_name"] = found = next(filter(here, ends), None)
            if found is None:
                raise InputError(f"{self.path}: {name!r} is not in {folder}; add it, or remove its entry")
            if meant.setdefault(found, name) != name:
                both = f"{meant[found]} and {name} would both be {found}"
                raise InputError(f"{self.path}: {both}; rename one of them")

    def choose_classes(self, rows, used, classes):
        """Set classes, things, and categories (ids in the file).  used: ids that occur in objects.

        Unused categories are left out if the model does not know them, or if they are number 0, which
        some tools add as a name for all categories.
        """
        rows = sorted(rows, key=lambda row: row["id"])
        new, key = classes is None, "name" if classes else "supercategory"
        above = [row.get(key) for row in rows if row["id"] != 0]
        for_all = lambda row: row["id"] == 0 and (row["name"] in above or self.exported and new)
        extra = lambda row: for_all(row) or not new and row["name"] not in classes
        left_out = [row for row in rows if row["id"] not in used and extra(row)]
        last, rows = rows[-1]["id"], [row for row in rows if row not in left_out]
        self.left_out, names = [row["name"] for row in left_out], [row["name"] for row in rows]
        self.classes = names if classes is None else list(classes)
        if self.classes != names:
            here, there, pan = Counter(names), Counter(classes), self.task == "pan"
            wrong = [x for x in here | there if here[x] > 1 or there[x] != 1 or pan and not here[x]]
            if wrong:
                what = f"is not one of its names and one of the model's {len(classes)}"
                raise InputError(f"{self.path}: category {wrong[0]} {what}; name it as for training")
            # Classes missing from the file get new ids: predictions of them are saved, but not evaluated.
            free = lambda i: f"{last} {i}" if isinstance(last, str) else last + 1 + i
            of_name = {row["name"]: row for row in rows}
            rows = [of_name.get(name, dict(id=free(i), isthing=1)) for i, name in enumerate(classes)]
        self.categories = [row["id"] for row in rows]
        self.things = [row["isthing"] == 1 for row in rows]

    def coco(self):
        """The annotations, including crowds, as pycocotools' COCO object."""
        images, _, annotations, _ = self.read()
        for number, entry in enumerate(annotations, 1):
            entry["id"] = number  # pycocotools reads a match with id 0 as no match
        categories = [dict(id=i, name=name) for i, name in zip(self.categories, self.classes)]
        return indexed(images=images, annotations=annotations, categories=categories)

    def segments(self, index):
        """The panoptic map: ids, int64 (H, W), 0 for void, and a dictionary per segment."""
        (name, number, size), entry = self.images[index], self.entries[index]
        known = [0, *(segment["id"] for _, segments in entry for segment in segments)]
        if len(entry) != 1 or len({*known}) < len(known):
            what = f"has {len(entry)} annotations, or two segments with the same id"
            raise InputError(f"{self.path}: image {number}, {name}, {what}; leave one, with the PNG's ids")
        path = os.path.join(self.maps, entry[0][0])
        ids = np.asarray(load_image(path)) @ np.array([1, 256, 256**2])  # (H, W)
        check_size(path, ids.shape, size, name)
        unknown = ids[~np.isin(ids, known)]
        if len(unknown):
            raise InputError(f"{path}: segment {unknown[0]} has no entry in {self.path}; add one")
        return torch.from_numpy(ids), entry[0][1]

    def truth(self, index, size):
        """Labels, boxes and masks of an image of this size, for training_sample."""
        check_size(self.name(index), size, self.images[index][2], self.path)
        if self.task == "pan":
            ids, segments = self.segments(index)
            segments = [segment for segment in segments if not segment["iscrowd"]]
            labels = [self.categories.index(segment["category_id"]) for segment in segments]
            return labels, None, numbered(ids, [segment["id"] for segment in segments])
        labels, boxes, rles = zip(*self.entries[index]) if self.entries[index] else ([], [], [])
        if self.task == "det":
            return labels, box_tensor(boxes, size), None
        masks = mask_utils.decode(list(rles)) if rles else np.zeros((*size, 0))  # (H, W, n)
        return labels, None, torch.from_numpy(masks).permute(2, 0, 1).bool().contiguous()

    def check(self, index):
        """Return counts for one image.  Raises InputError if image, map and annotations disagree."""
        name = self.name(index)
        check_size(name, header_size(name), self.images[index][2], self.path)
        if self.task != "pan":
            return Counter()
        ids, segments = self.segments(index)
        empty = {segment["id"] for segment in segments} - set(ids.unique().tolist())
        return Counter(pixels=ids.numel(), void=int((ids == 0).sum()), empty=len(empty))

    def describe(self, total):
        """Lines that summarize the data set.  total: sum of the counts of check()."""
        need = dict(det="area", inst="area or mask", pan="pixels")[self.task]
        line = f"{len(self)} images, {len(self.classes)} classes, {self.objects} objects, ignored "
        line += f"{self.crowds} crowds and {self.dropped + total['empty']} objects without {need}"
        if self.task == "pan":
            line += f", {total['void'] / total['pixels']:.1%} of the pixels void"
        names = ", ".join(self.left_out[:5]) + ", ..." * (len(self.left_out) > 5)
        return [line] + [f"ignored categories without annotations: {names}"] * bool(names)


class Ade(Dense):
    """ADE20K's layout (ADEChallengeData2016) with any number of classes, for sem:

    DIR/images/{training,validation}/*.jpg
    DIR/annotations/{training,validation}/*.png    labels from 1; 0 is void, and 255 if it is no class
    DIR/objectInfo150.txt                          class names, at the ends of rows, after a tab; optional
    """

    def __init__(self, root, split, transform, seed=0, classes=None):
        self.split, self.transform, self.seed = split, transform, seed
        split = dict(train="training", val="validation")[split]
        self.folder, self.maps = (os.path.join(root, x, split) for x in ("images", "annotations"))
        need(root, self.folder, self.maps, takes=f"DIR/{{images,annotations}}/{split}/")
        maps, taken = set(os.listdir(self.maps)), {}
        names = sorted(x for x in os.listdir(self.folder) if is_image_file(x) and not is_hidden(x))
        for name in names:
            path = os.path.splitext(name)[0] + ".png"
            if path not in maps:
                raise InputError(f"{self.maps}: no label map of {name}; add it, or remove the image")
            if taken.setdefault(path, name) != name:
                both = f"{taken[path]} and {name} have the same label map"
                raise InputError(f"{self.folder}: {both}; rename or remove one")
        paths = [os.path.join(self.maps, path) for path in taken]
        self.images = Packed(zip(names, range(len(names)), paths))
        if not names:
            raise InputError(f"{self.folder}: no images in it; add some")
        self.table, self.classes = os.path.join(root, "objectInfo150.txt"), None
        self.classes = list(classes or self.read_table() or self.count_classes())
        self.categories = list(range(1, len(self.classes) + 1))
        self.things = [False] * len(self.classes)

    def read_table(self):
        """Class names from objectInfo150.txt; empty if there is no such file."""
        if not os.path.exists(self.table):
            return []
        try:
            with open(self.table, encoding="utf-8-sig") as file:
                rows = [[x.strip() for x in line.split("\t")] for line in file if line.strip()]
        except ValueError as error:
            raise InputError(f"{self.table}: not UTF-8 ({error}); save it as such") from error
        rows = rows[bool(rows) and not rows[0][0].isdigit() :]  # skip the column titles
        for number, row in enumerate(rows or [[]], 1):
            if len(row) < 2 or not row[-1] or row[0] != str(number):
                takes = f"the row of class {number} is not its number, a tab, ..., a tab, its name"
                raise InputError(f"{self.table}: {takes}; correct it, or remove the file")
        return [row[-1].split(",")[0].strip() for row in rows]

    def count_classes(self):
        """Class names if only labels are known: their numbers as text."""
        self.surveyed = survey(self.check, len(self), f"no {self.table}: counting classes")
        labels = sorted(label for label in self.surveyed[0] if label > 0)
        if labels[-1:] == [255] and 1 < len(labels) < 255:
            labels.pop()  # 255 is void if there are fewer classes
        if labels and labels[-1] > 10 * len(labels):  # gray values such as 0 and 255, not class numbers
            found = ", ".join(map(str, sorted(self.surveyed[0])[:5])) + " in it cannot be classes"
            remedy = f"number them 1, 2, 3, ..., 0 and 255 for void, or name all in {self.table}"
            raise InputError(f"{self.maps}: the values {found}; {remedy}")
        return [str(label) for label in range(1, max(labels, default=0) + 1)]

    def read_map(self, index):
        """Labels, int64 (H, W), of a gray or palette PNG; equal channels and alpha are accepted."""
        path = self.images[index][2]
        with opened(path) as image:
            bands = image.getbands()
            halved = len(bands) > 1 and ";16" in str(image.tile)  # PIL drops the lower 8 bits
            pixels = np.asarray(image).reshape(image.height, image.width, -1)
            pixels = pixels[..., : len(bands) - ("A" in bands)]
        if halved or (pixels != pixels[..., :1]).any():
            what = "16 bits a channel" if halved else "colors"
            raise InputError(f"{path}: {what} in it; save labels from 1, 0 for void, as a gray PNG")
        return torch.from_numpy(pixels[..., 0].astype(np.int64))

    def label_map(self, index, labels=None):
        """Classes of pixels, int64 (H, W), -1 for void.  labels: from read_map, if already known."""
        labels, count = self.read_map(index) if labels is None else labels, len(self.classes)
        labels = labels.where(labels != 255, 0) if count < 255 else labels
        if labels.max() > count:
            what = f"label {labels.max()} in it, the data set has labels 0 to {count}"
            raise InputError(f"{self.images[index][2]}: {what}; correct it")
        return labels - 1

    def truth(self, index, size):
        """As for Coco, with one mask per class."""
        labels = self.label_map(index)
        check_size(self.name(index), size, labels.shape, "its label map")
        return range(len(self.classes)), None, numbered(labels, range(len(self.classes)))

    def check(self, index):
        """Number of pixels per value.  Raises InputError if map, image and classes disagree."""
        name, labels = self.name(index), self.read_map(index)
        check_size(name, header_size(name), labels.shape, "its label map")
        if self.classes:
            self.label_map(index, labels)
        counts = labels.flatten().bincount()
        return Counter({value: int(counts[value]) for value in counts.nonzero()[:, 0].tolist()})

    def describe(self, total):
        """Lines that summarize the data set.  total: number of pixels per value in all maps."""
        share = lambda *values: f"{sum(total[value] for value in values) / total.total():.1%}"
        void = [0] + [255] * (len(self.classes) < 255)
        seen = len(total.keys() - void)
        if not seen:
            what = f"no labeled pixel, only the values {', '.join(map(str, sorted(total)))}"
            raise InputError(f"{self.maps}: {what}; number classes from 1, 0 and 255 are void")
        line = f"{len(self)} images, {len(self.classes)} classes, of which {seen} occur"
        lines = [f"{line}, {share(*void)} of the pixels void ({' and '.join(map(str, void))})"]
        if 255 in void and total[0] and total[255]:
            both = f"0 ({share(0)} of the pixels) and 255 ({share(255)}) are both void"
            lines.append(f"{both}; if 0 is a class, add 1 to all labels but 255")
        return lines


def survey(function, count, title):
    """Sum of function(index), a Counter, over all indices, and a list of the InputErrors it raises.

    Threads on all processes share the work, since PIL decodes in parallel.  Every process gets the
    whole result.
    """

    def call(index):
        try:
            return function(index)
        except InputError as error:
            return error

    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = range(rank, count, processes)
    with ThreadPoolExecutor() as pool:
        bar = tqdm(pool.map(call, mine), title, len(mine), leave=False, disable=True if rank else None)
        parts = [list(bar)] * processes
    if processes > 1:
        dist.all_gather_object(parts, parts[rank])
    found = [parts[i % processes][i // processes] for i in range(count)]
    total = sum((x for x in found if isinstance(x, Counter)), Counter())
    return total, [x for x in found if isinstance(x, InputError)]


def check(dataset, split):
    """Read the labels of a data set and the headers of its images, and print a summary.

    This finds errors before the first step, not hours later.  split: "training", where a few
    unreadable images are skipped, or "validation".  Raises the same InputError on every process.
    """
    if isinstance(dataset, Shapes):
        return
    title = f"checking {split} data"
    total, faults = dataset.surveyed or survey(dataset.check, len(dataset), title)
    wrong = [e for e in faults if split != "training" or not isinstance(e, Unreadable)]
    if wrong:
        more = f"; {len(wrong) - 1} more files are wrong" if len(wrong) > 1 else ""
        raise InputError(f"{wrong[0]}{more}")
    if faults:
        count_broken(len(faults), len(dataset), faults[-1])
    lines = dataset.describe(total)
    lines += [f"{len(faults)} images will be skipped, the first: {fault}" for fault in faults[:1]]
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(*(f"{split} data: {line}" for line in lines), sep="\n")


def count_broken(count, length, last):
    """Raise InputError if too many images are broken: over 1 % and over ten, or all of them."""
    if count > min(max(10, length // 100), length - 1):
        what = f"{count} of {length} training images are broken"
        raise InputError(f"{what}, the last: {last}") from last


# -------------------------------------------------------------------------------------------------
# Batches
# -------------------------------------------------------------------------------------------------
class SkipBroken(Dataset):
    """A training set that replaces a broken sample by the next one, so that long runs continue.

    Each broken file is reported once on stderr.  The substitute does not depend on the number of
    processes.
    """

    def __init__(self, dataset):
        self.dataset = dataset
        # Found so far, in memory that is shared with the workers:
        self.broken = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        """key: (epoch, index)."""
        epoch, index = key
        while True:
            try:
                return self.dataset[epoch, index]
            except InputError as error:
                if not self.broken[index]:
                    print(f"skipped: {error}", file=sys.stderr)
                self.broken[index] = True
                count_broken(int(self.broken.sum()), len(self), error)
                index = (index + 1) % len(self)


def batches_of(loader):
    """The batches of a loader, whose processes end with them, however that may be.

    Python would end them by SIGTERM, which ignore_signals() ignores, and wait for them forever.
    Raises InputError if one of them has died.
    """
    batches = iter(loader)
    try:
        yield from batches
    except (OSError, EOFError, RuntimeError) as error:
        lost = re.search(r"DataLoader worker \(pid.*|RuntimeError: .*(shm|No space left).*", str(error))
        if not lost and isinstance(error, RuntimeError):
            raise
        what = f"a loader process was lost ({lost[0] if lost else error})"
        remedy = "--workers 0 works without; Docker needs --ipc=host for their shared memory"
        raise InputError(f"{what}; if memory ran out, lower --workers; {remedy}") from error
    finally:
        if loader.num_workers:
            batches._shutdown_workers()  # torch has no public name for it


def ignore_interrupts(worker):
    """For workers: Ctrl-C reaches every process of a terminal, but the parent ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def ignore_signals(worker):
    """For workers in training, which are needed until the current step is finished."""
    ignore_interrupts(worker)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Python ends workers by it: close the loader


def loader_of(dataset, workers, device, **options):
    """A DataLoader.  On Linux, its workers are forked and share the data set with their parent."""
    context = "fork" if workers and sys.platform == "linux" else None  # not the default since Python 3.14
    options |= dict(num_workers=workers, pin_memory=device.type == "cuda")
    return DataLoader(dataset, multiprocessing_context=context, **options)


class GlobalBatches(Sampler):
    """Yields (epoch, index) keys of one process: its chunks of every global batch, step by step.

    An epoch is a permutation drawn from (seed, epoch), without the last, incomplete batch.  A global
    batch is split into world_size * accumulate equal chunks, of which this process takes `accumulate`.
    So the images of a step do not depend on the number of processes.  With `neighbor`, every chunk
    begins with the sample before it in the global batch, for `mix`: one more image, no communication.
    """

    def __init__(
        self, length, batch_size, steps, seed=0, rank=0, world_size=1, accumulate=1, neighbor=False, first_step=0
    ):
        if batch_size % (world_size * accumulate):
            parts = f"{world_size} processes x --accumulate {accumulate}"
            raise InputError(f"--batch-size {batch_size} is not divisible by {parts}; change one")
        if batch_size > length:
            what = f"more than the {length} training images"
            raise InputError(f"--batch-size {batch_size} is {what}; lower it")
        self.length, self.batch_size, self.seed, self.neighbor = length, batch_size, seed, neighbor
        self.steps, self.chunk = range(first_step, steps), batch_size // (world_size * accumulate)
        self.starts = [i * self.chunk for i in range(rank * accumulate, (rank + 1) * accumulate)]

    def __len__(self):
        return len(self.steps) * len(self.starts)

    def __iter__(self):
        drawn = None
        for step in self.steps:
            epoch, position = divmod(step, self.length // self.batch_size)
            if epoch != drawn:
                with seeded(self.seed, epoch):
                    order, drawn = torch.randperm(self.length), epoch
            batch = order[position * self.batch_size :][: self.batch_size].tolist()
            for start in self.starts:
                first = [batch[start - 1]] if self.neighbor else []  # index -1: the batch is a ring, as in mix
                yield [(epoch, index) for index in first + batch[start : start + self.chunk]]


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
    """Mixup or cutmix, chosen by (seed, step), of every sample with the one before it.

    images: (1 + b, 3, H, W).  labels: (1 + b,).  Both are a chunk with its neighbor.
    mixup, cutmix: parameters of their Beta distributions, 0 for never.
    Returns images (b, 3, H, W) and targets (b, num_classes).
    """
    choices = [v2.MixUp(alpha=mixup, num_classes=num_classes)] if mixup else []
    choices += [v2.CutMix(alpha=cutmix, num_classes=num_classes)] if cutmix else []
    with seeded(seed, step):
        images, targets = v2.RandomChoice(choices)(images, labels)
    return images[1:], targets[1:]
