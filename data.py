# SPDX-License-Identifier: MIT
"""Data sets and augmentation; this file knows nothing of models.

    shapes        drawn from (seed, epoch, index): no download, no files, every epoch new scenes; the default
    ImageFolder   DIR/train/<class>/*.jpg and DIR/val/<class>/*.jpg: ImageNet and anything else laid out like it
    COCO          DIR/{train,val}2017/*.jpg and DIR/annotations/: boxes, masks, panoptic segments of any categories
    ADE20K        DIR/images/ and DIR/annotations/: label maps of any number of classes

Files are read as they are found, from whatever tool: where their meaning is certain, they are read, in training as in
evaluation; where it is not, check() ends the run with one line before the first step.

Nothing here depends on how many processes or workers read: a sample and its augmentation are a function of
(seed, epoch, index), the order of samples of (seed, epoch), mixup and cutmix of (seed, step).  A run can
therefore be repeated, split over more devices, or taken up in the middle, and sees the same images.
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
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from torchvision import tv_tensors
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import is_image_file
from torchvision.ops import box_convert, masks_to_boxes
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional
from tqdm import tqdm

MEAN_COLOR = (0.485, 0.456, 0.406)  # ImageNet's; what erasing and rotation leave behind looks like nothing


class InputError(ValueError):
    """Something about the user's files or flags; its message is one line: what is wrong, where, what to do."""


class Unreadable(InputError):
    """A file that is no image, or half of one.  Training can do without a few."""


# ---------------------------------------------------------------------------------------------------------------
# Shapes: scenes with things, stuff, occlusion and texture, drawn in about a millisecond
# ---------------------------------------------------------------------------------------------------------------
def star(u, v):
    """Five points: fold the plane into one tenth of the star, then measure to the edge from tip to notch."""
    tenth = math.pi / 5
    angle = np.abs(np.arctan2(u, v) % (2 * tenth) - tenth)
    radius = np.hypot(u, v)
    notch_u, notch_v = 0.42 * math.cos(tenth), 0.42 * math.sin(tenth)
    length = math.hypot(1 - notch_u, notch_v)
    return ((radius * np.cos(angle) - 1) * notch_v + radius * np.sin(angle) * (1 - notch_u)) / length


# Class of thing -> signed distance (roughly; negative inside) at (u, v) in units of the thing's radius.
THINGS = {
    "disc": lambda u, v: np.hypot(u, v) - 0.9,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.72) - 0.22,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.75,
    "bar": lambda u, v: np.maximum(np.abs(u) - 1, np.abs(v) - 0.32),
    "triangle": lambda u, v: np.maximum(-v, 0.866 * np.abs(u) + 0.5 * v) - 0.5,
    "star": star,
    "cross": lambda u, v: np.maximum(np.maximum(np.abs(u), np.abs(v)) - 0.95, np.minimum(np.abs(u), np.abs(v)) - 0.28),
    "crescent": lambda u, v: np.maximum(np.hypot(u, v) - 0.95, 0.72 - np.hypot(u - 0.45, v)),
}
# Stuff is told apart by its pattern alone.  Things wear the same patterns, so a pattern says nothing about a thing.
STUFF = ("plain", "stripes", "checks", "dots", "grain")


def pattern(rng, kind, x, y):
    """Values in [-1, 1] of a randomly turned and scaled pattern at pixel columns x (1, w) and rows y (h, 1)."""
    h, w = len(y), x.shape[1]
    if kind == "plain":
        return np.zeros((h, w), np.float32)
    if kind == "grain":
        return rng.uniform(-1, 1, (h // 2 + 1, w // 2 + 1)).astype(np.float32).repeat(2, 0).repeat(2, 1)[:h, :w]
    angle, wavelength, phase = rng.uniform(0, math.pi), rng.uniform(5, 9), rng.uniform(0, 2 * math.pi)
    cos, sin = 2 * math.pi / wavelength * math.cos(angle), 2 * math.pi / wavelength * math.sin(angle)
    across = np.sin(cos * x + (sin * y + phase))
    if kind == "stripes":
        return across
    along = np.sin(cos * y - sin * x)
    return np.sign(across * along) if kind == "checks" else np.maximum(across + along, 0) - 1


def paint(rng, base, kind, x, y):
    """Colors (3, h, w): the base color, swung by the pattern towards another one and away from it."""
    swing = rng.uniform(-0.15, 0.15, (3, 1, 1)).astype(np.float32)
    return base.reshape(3, 1, 1) + swing * pattern(rng, kind, x, y)


def draw_scene(rng, size, things):
    """One scene: three to five regions of stuff, and things over them, later ones on top.

    rng: numpy Generator.  size: side in pixels.  things: list of (class index, radius, x, y), radius and center
    in fractions of the side; rotation, stretch, color and pattern are drawn here, independent of the class.
    Returns the image, uint8 (3, size, size), and the segments, int64 (size, size): i for the visible pixels of
    things[i], -1 - s for stuff of class s.
    """
    x = np.arange(size, dtype=np.float32)[None]  # (1, size)
    y = x.T
    kinds = rng.permutation(len(STUFF))[: rng.integers(3, len(STUFF) + 1)]
    bend = (size / 24) * np.sin(x * (20 / size) + y * (12 / size))  # borders between regions are curved
    sites = rng.uniform(0, size, (len(kinds), 2)).tolist()
    nearest = np.stack([(x - sx + bend) ** 2 + (y - sy + bend) ** 2 for sx, sy in sites]).argmin(0)
    image = np.empty((3, size, size), np.float32)
    for i, kind in enumerate(kinds):
        base = (rng.uniform(0.25, 0.75) + rng.uniform(-0.15, 0.15, 3)).astype(np.float32)  # muted; things are vivid
        np.copyto(image, paint(rng, base, STUFF[kind], x, y), where=nearest == i)
    segments = -1 - kinds[nearest]

    for i, (category, radius, cx, cy) in enumerate(things):
        radius, cx, cy = radius * size, cx * size, cy * size
        reach = 1.2 * radius + 1  # nothing of the thing lies farther from its center
        rows = slice(max(0, int(cy - reach)), max(0, int(cy + reach) + 1))
        columns = slice(max(0, int(cx - reach)), max(0, int(cx + reach) + 1))
        dx, dy = (x[:, columns] - cx) / radius, (y[rows] - cy) / radius
        angle, stretch = rng.uniform(0, 2 * math.pi), rng.uniform(0.92, 1.08)
        u = math.cos(angle) * stretch * dx + math.sin(angle) * stretch * dy
        v = math.cos(angle) / stretch * dy - math.sin(angle) / stretch * dx
        alpha = np.clip(0.5 - radius * list(THINGS.values())[category](u, v), 0, 1)  # one pixel of soft edge
        under = image[:, rows, columns]
        # Of three colors take the one farthest from what it covers: a thing that cannot be seen teaches nothing.
        colors = rng.uniform(0, 1, (3, 3)).astype(np.float32)
        base = colors[np.abs(colors - under.mean((1, 2))).sum(1).argmax()]
        color = paint(rng, base, STUFF[rng.integers(len(STUFF))], x[:, columns], y[rows])
        under += alpha * (color - under)
        segments[rows, columns][alpha > 0.5] = i
    image += 0.02 * rng.standard_normal(image.shape, dtype=np.float32)
    return (image.clip(0, 1) * 255).astype(np.uint8), segments


def dominant_thing(rng):
    """A scene for classification: one large thing, one to three small ones anywhere, and the large one's class."""
    things = [
        (int(rng.integers(len(THINGS))), rng.uniform(0.08, 0.13), rng.uniform(), rng.uniform())
        for _ in range(rng.integers(1, 4))
    ]
    label = int(rng.integers(len(THINGS)))
    large = (label, rng.uniform(0.32, 0.45), rng.uniform(0.4, 0.6), rng.uniform(0.4, 0.6))
    things.insert(rng.integers(len(things) - 1, len(things) + 1), large)  # one small thing at most lies over it
    return things, label


def scattered_things(rng):
    """A scene for the dense tasks: one to six things, some cut by the frame, later ones over earlier ones."""
    return [
        (int(rng.integers(len(THINGS))), rng.uniform(0.10, 0.28), rng.uniform(0.02, 0.98), rng.uniform(0.02, 0.98))
        for _ in range(rng.integers(1, 7))
    ]


VISIBLE = 20  # pixels that must be seen of a thing, or of a kind of stuff, for it to be annotated


def indexed(content):
    """The content of an instances file -> pycocotools' COCO object."""
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


class Shapes(Dataset):
    """Scenes drawn from (seed, epoch, index); validation scenes do not depend on the seed, nor on the epoch.

    cls: a large thing among small ones.  det, inst: the things.  sem: the classes of all pixels.  pan: things and stuff.
    """

    def __init__(self, length, size, seed, split, task="cls"):
        self.length, self.size, self.seed, self.split, self.task = length, size, seed, split, task
        self.classes = list(THINGS) + (list(STUFF) if task in ("sem", "pan") else [])
        self.things = [name in THINGS for name in self.classes]
        self.categories = list(range(1, len(self.classes) + 1))

    def name(self, index):
        return f"scene {index}"

    def __len__(self):
        return self.length

    def scene(self, epoch, index):
        """Image, uint8 (3, size, size); what it shows, a list of (class, mask: bool (size, size)); the label, for cls."""
        train = self.split == "train"
        if self.task == "cls":
            rng = np.random.default_rng((0, self.seed, epoch, index) if train else (1, index))
            things, label = dominant_thing(rng)
            return draw_scene(rng, self.size, things)[0], [], label
        rng = np.random.default_rng((2, self.seed, epoch, index) if train else (3, index))
        things = scattered_things(rng)
        image, segments = draw_scene(rng, self.size, things)
        shown = [(category, segments == i) for i, (category, *_) in enumerate(things)]
        if self.task == "sem":  # one mask a class, which by_regions cuts into its parts
            shown = [(c, np.any([mask for k, mask in shown if k == c], 0)) for c in sorted({c for c, _ in shown})]
        if self.task in ("sem", "pan"):
            shown += [(len(THINGS) + s, segments == -1 - s) for s in range(len(STUFF))]
        return image, [(category, mask) for category, mask in shown if mask.sum() >= VISIBLE], None

    def __getitem__(self, key):
        """key: (epoch, index).  Returns the image, uint8 (3, size, size), and for cls its label, an int.

        The other tasks' targets are described with the dense data sets below.
        """
        image, shown, label = self.scene(*key)
        image = torch.from_numpy(image)
        if self.task == "cls":
            return image, label
        if self.split == "val":
            return image, dict(index=key[1], size=(self.size, self.size))
        masks = torch.from_numpy(np.array([mask for _, mask in shown], bool).reshape(-1, self.size, self.size))
        labels = torch.tensor([category for category, _ in shown], dtype=torch.int64)
        target = target_of(labels, None, masks, masks.shape[1:])
        if self.task == "det":
            del target["masks"]
        return image, by_regions(target) if self.task == "sem" else target

    def coco(self):
        """The validation scenes as a COCO object."""
        images = [dict(id=index, width=self.size, height=self.size) for index in range(len(self))]
        annotations = []
        for index in range(len(self)):
            for category, mask in self.scene(0, index)[1]:
                rle = mask_utils.encode(np.asfortranarray(mask, np.uint8))
                annotations.append(
                    dict(id=len(annotations) + 1, image_id=index, category_id=self.categories[category], iscrowd=0)
                    | dict(bbox=mask_utils.toBbox(rle).tolist(), area=int(mask.sum()), segmentation=rle)
                )
        categories = [dict(id=i, name=name) for i, name in zip(self.categories, self.classes)]
        return indexed(dict(images=images, annotations=annotations, categories=categories))

    def label_map(self, index):
        """Classes of the pixels of a scene, int64 (size, size), -1 where not annotated."""
        labels = torch.full((self.size, self.size), -1)
        for category, mask in self.scene(0, index)[1]:
            labels[torch.from_numpy(mask)] = category
        return labels

    def segments(self, index):
        """Ids of the segments of a scene, int64 (size, size), 0 where void, and a dictionary for each segment."""
        ids, table = torch.zeros(self.size, self.size, dtype=torch.int64), []
        for number, (category, mask) in enumerate(self.scene(0, index)[1], 1):
            ids[torch.from_numpy(mask)] = number
            table.append(dict(id=number, category_id=self.categories[category], iscrowd=0))
        return ids, table


# ---------------------------------------------------------------------------------------------------------------
# Folders of images
# ---------------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def seeded(*numbers):
    """Inside, torch's CPU random numbers are a function of the numbers; outside, nothing has changed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))
        yield


@contextlib.contextmanager
def opened(path):
    """A PIL image; whatever PIL raises for files that are no images, or half of one, becomes Unreadable."""
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise Unreadable(f"{path}: cannot be read as an image ({error}); replace or remove it") from error


def header_size(path):
    """Height and width of an image as load_image gives it, without decoding its pixels."""
    with opened(path) as image:
        turned = Image.Image.getexif(image).get(0x0112) in range(5, 9)  # PNG's own getexif() decodes the image
        return image.size if turned else image.size[::-1]


def load_image(path):
    """The image as PIL RGB, upright: gray, palette, CMYK, 16-bit and EXIF-rotated files included."""
    with opened(path) as image:
        ImageOps.exif_transpose(image, in_place=True)  # not in place, it copies the pixels of every image
        if image.mode.startswith("I"):  # 16 bits of gray, which convert() would clip at 255 instead of scaling
            image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
        if "transparency" in image.info:
            image = image.convert("RGBA")
        return image.convert("RGB")


def train_transform(size, randaugment, erasing):
    """PIL RGB -> uint8 (3, size, size).  randaugment: magnitude, 0 (none) to 30.  erasing: probability."""
    steps = [v2.RandomResizedCrop(size, interpolation=InterpolationMode.BICUBIC), v2.RandomHorizontalFlip()]
    fill = [round(255 * value) for value in MEAN_COLOR]
    if randaugment:
        operation = v2.RandAugment(1, randaugment, interpolation=InterpolationMode.BILINEAR, fill=fill)
        steps += [v2.RandomApply([operation], 0.5)] * 2  # one operation on average, as in Swin's recipe, not always two
    steps.append(v2.ToImage())
    if erasing:
        steps.append(v2.RandomErasing(erasing, value=fill))
    return v2.Compose([*steps, v2.ToPureTensor()])


def eval_transform(size):
    """PIL RGB -> uint8 (3, size, size): the central 7/8 of the short side, as is usual (224 of 256)."""
    resize = v2.Resize(round(size * 256 / 224), interpolation=InterpolationMode.BICUBIC)
    return v2.Compose([resize, v2.CenterCrop(size), v2.ToImage(), v2.ToPureTensor()])


def is_hidden(name):
    """Whether a file or folder is one of those that systems and tools leave among a user's own."""
    return name.startswith(".") or name in ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")


def folder_of(root, split):
    """DIR/train, or what there is of DIR/val, DIR/valid and DIR/validation; DIR/val if there is none."""
    names = ("train",) if split == "train" else ("val", "valid", "validation")
    there = [path for path in (os.path.join(root, name) for name in names) if os.path.isdir(path)]
    if len(there) > 1:
        raise InputError(f"{root}: {there[0]} and {there[1]} are both there; keep one of the two")
    return there[0] if there else os.path.join(root, names[0])


class ClassFolders(ImageFolder):
    """ImageFolder without what is hidden."""

    def __init__(self, root):
        inside = len(os.path.join(root, ""))
        hidden = lambda path: any(map(is_hidden, path[inside:].split(os.sep)))
        super().__init__(root, is_valid_file=lambda path: is_image_file(path) and not hidden(path))

    def find_classes(self, directory):
        names = [name for name in super().find_classes(directory)[0] if not is_hidden(name)]
        if not names:
            raise FileNotFoundError(f"Couldn't find any class folder in {directory}.")
        return names, {name: label for label, name in enumerate(names)}


class Folder(Dataset):
    """DIR/<split>/<class>/*.jpg, every sample augmented by (seed, epoch, index).

    classes: the names whose positions are the labels (of the training split, or of a checkpoint); None: as found.
    Raises InputError if there is no such folder, no image in it or in one of its classes, or a class not in `classes`.
    """

    def __init__(self, root, split, transform, seed=0, classes=None):
        folder = folder_of(root, split)
        if not os.path.isdir(folder):
            missing = folder if os.path.isdir(root) else root
            raise InputError(f"{missing}: no such folder; --data takes DIR with DIR/train/<class>/, DIR/val/<class>/")
        try:
            found = ClassFolders(folder)
        except FileNotFoundError as error:
            raise InputError(f"{folder}: {error}".replace("\n", " ")) from error
        self.classes = found.classes if classes is None else list(classes)
        unknown = [name for name in found.classes if name not in self.classes]
        if unknown:
            names = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
            raise InputError(f"{folder}: {len(unknown)} classes that the model is not trained for: {names}")
        position = [self.classes.index(name) for name in found.classes]
        # Arrays, not a list of 1.28 million strings: reading a list's items writes to their reference counts, and
        # every worker process would end up with a copy of its own.
        self.paths = np.array([os.fsencode(path) for path, _ in found.samples])
        self.labels = np.array([position[label] for _, label in found.samples])
        self.transform, self.seed, self.surveyed = transform, seed, (Counter(), [])

    def describe(self, total):
        return [f"{len(self)} images, {len(self.classes)} classes"]

    def name(self, index):
        return os.fsdecode(self.paths[index])

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        """key: (epoch, index).  Returns the image, uint8 (3, size, size), and its label, an int."""
        image = load_image(self.name(key[1]))
        with seeded(self.seed, *key):
            return self.transform(image), int(self.labels[key[1]])


# ---------------------------------------------------------------------------------------------------------------
# Dense data sets: every object, or every pixel, has a label
# ---------------------------------------------------------------------------------------------------------------
# In training data[epoch, index] is an image, uint8 (3, H, W), and what is in it, a dictionary:
#
#     labels  (n,) int64           class of each object (det, inst), segment (pan) or mask (sem)
#     boxes   (n, 4) float32       center x, center y, width, height, in fractions of the image
#     masks   (n, H, W) bool       det has none
#
# In evaluation (no crop) the dictionary holds the image's `index` and its `size` (H, W) in the file; what is right is
# asked of the data set: `coco()` for det and inst, `label_map(index)` for sem, `segments(index)` for pan.
# `classes` are the names, `things` says for each class whether it is countable, `categories` its number in the files.


class Packed:
    """A long list of small Python objects in two arrays.

    Worker processes share their parent's memory until someone writes to it, and to look at a Python object writes to its
    count of references: a million annotations kept as objects end up once in every worker.
    """

    def __init__(self, items):
        packed = [pickle.dumps(item, -1) for item in items]
        self.ends = np.cumsum([0] + [len(item) for item in packed])
        self.bytes = np.frombuffer(b"".join(packed), np.uint8)

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, index):
        return pickle.loads(self.bytes[self.ends[index] : self.ends[index + 1]].tobytes())


def box_tensor(boxes, size):
    """A list of [left, top, right, bottom] in pixels of an image of size (H, W), as torchvision's transforms take it."""
    return tv_tensors.BoundingBoxes(torch.tensor(boxes).float().view(-1, 4), format="XYXY", canvas_size=size)


class Rescale(v2.Transform):
    """Resizes an image, and what is in it, by one factor: the largest with sides of at most `short` and `long` pixels,
    times a number drawn from low to high.

    Only a side that would have less than 32 pixels gets those 32, the least that the model takes: for a panorama to be
    stretched is better than to be refused, and boxes in fractions of the image stay right.
    """

    def __init__(self, short, long, low=1.0, high=1.0):
        super().__init__()
        self.short, self.long, self.low, self.high = short, long, low, high

    def make_params(self, flat_inputs):
        sides = functional.get_size(flat_inputs[0])
        factor = min(self.short / min(sides), self.long / max(sides))
        factor *= self.low + (self.high - self.low) * torch.rand(()).item()
        return dict(size=[max(32, round(factor * side)) for side in sides])

    def transform(self, value, params):
        return functional.resize(value, params["size"])  # of masks, the nearest pixel; of images, with antialiasing


def dense_train_transform(task, size):
    """Augmentation of an image and what is in it, of any size; training_sample then crops it to `size`.

    det, inst, pan: COCO's large-scale jitter, 0.1 to 2 times what fits into size x size.
    sem: ADE20K's, a short side of 0.5 to 2 times `size`, and changed light and colors.
    """
    if task != "sem":
        return v2.Compose([Rescale(size, size, 0.1, 2.0), v2.RandomHorizontalFlip()])
    # Colors come first, while the image is small.  Not RandomPhotometricDistort: it also swaps red for blue, and sky
    # is told from sand by that.
    colors = v2.ColorJitter(brightness=0.125, contrast=0.5, saturation=0.5, hue=0.05)
    return v2.Compose([colors, Rescale(size, 4 * size, 0.5, 2.0), v2.RandomHorizontalFlip()])


def dense_eval_transform(size, max_size):
    """The whole image, its short side `size` unless its long one would be more than `max_size`."""
    return Rescale(size, max_size)


def training_sample(image, labels, boxes, masks, transform, crop):
    """Augments an image and what is in it.

    image: tv_tensors.Image.  labels: list of n ints.  boxes: BoundingBoxes (n, 4), or None where the masks say it all.
    masks: (n, H, W) bool, or None; or, where they do not overlap, one map as of positions(), which is faster to transform.
    transform: of torchvision.transforms.v2.  crop: pixels a side, at most; smaller images stay whole, since the model knows
    padding from image.
    Returns image and target as above.  What has less than a pixel left in the crop is dropped.
    """
    parts = dict(labels=torch.tensor(list(labels), dtype=torch.int64))
    if boxes is not None:
        parts["boxes"] = boxes
    if masks is not None:
        # bool is resized by way of float, nine times slower than uint8
        parts["masks"] = tv_tensors.Mask(masks.view(torch.uint8) if masks.dtype == torch.bool else masks)
    image, parts = transform(image, parts)
    height, width = image.shape[-2:]
    h, w = min(crop, height), min(crop, width)
    corner = int(torch.randint(height - h + 1, ())), int(torch.randint(width - w + 1, ()))
    image = functional.crop(image, *corner, h, w)
    cropped = {k: functional.crop(v, *corner, h, w) if k != "labels" else v for k, v in parts.items()}
    boxes = cropped["boxes"].as_subclass(torch.Tensor) if boxes is not None else None
    labels, image = cropped["labels"], image.as_subclass(torch.Tensor)
    if masks is None:
        return image, target_of(labels, boxes, None, (h, w))
    cropped = cropped["masks"].as_subclass(torch.Tensor)
    if masks.ndim == 3:
        return image, target_of(labels, boxes, cropped.view(torch.bool), (h, w))
    present = cropped.flatten().bincount(minlength=1)[1:].nonzero()[:, 0]
    return image, target_of(labels[present], None, cropped == (present + 1).view(-1, 1, 1), (h, w))


def positions(values, numbers):
    """Which of n numbers each pixel of a map (H, W) has: k for numbers[k - 1], 0 for none of them.

    uint8, or int32 if there are many: both keep their values when they are resized to nearest pixels.
    """
    numbers, order = torch.tensor([-1, *numbers]).sort()  # -1: never in a map, but there is always one to be found
    found = torch.searchsorted(numbers, values).clamp(max=len(numbers) - 1)
    return torch.where(numbers[found] == values, order[found], 0).to(torch.uint8 if len(numbers) <= 256 else torch.int32)


def as_float(images):
    """uint8 images, in lists or alone -> float32 in [0, 1].  Done on the device: to it travels a quarter of the bytes."""
    return [as_float(image) for image in images] if isinstance(images, list) else images.float() / 255


def target_of(labels, boxes, masks, size):
    """labels (n,), boxes (n, 4) xyxy in pixels or None, masks (n, H, W) bool or None -> a target as above."""
    height, width = size
    if masks is not None:  # they know better than boxes what is left of an object
        seen = masks.flatten(1).any(1)
        labels, masks = labels[seen], masks[seen]
        boxes = masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1]) if len(masks) else torch.zeros(0, 4)
    whole = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(1)
    boxes = box_convert(boxes[whole], "xyxy", "cxcywh") / torch.tensor([width, height, width, height])
    target = dict(labels=labels[whole], boxes=boxes.float())
    return target if masks is None else target | dict(masks=masks[whole])


def by_regions(target):
    """Cuts the mask of each class into its connected regions, each a target of its own with the class as label.

    Two stars are easier to name one by one than as one mask: see README.  Label maps of files keep one mask a class, as the
    models that the paper compares itself with do: their regions may be more than there are centers.  In evaluation a pixel
    gets the class of the largest sum over centers, to which it does not matter how many share a class.
    Regions are seen at stride 4, where what almost touches is one; what is smaller than 1/400 of the image stays with the
    largest region of its class.
    """
    masks, labels = target["masks"], target["labels"]
    if not len(masks):
        return target
    seen = F.max_pool2d(masks.float(), 4, ceil_mode=True)  # (n, h, w)
    number = torch.arange(1.0, seen[0].numel() + 1).view_as(seen[0]) * seen
    while True:  # each pixel takes the highest number around it, until all of a region have the same
        spread = F.max_pool2d(number, 3, 1, 1) * seen
        if spread.equal(number):
            break
        # A number is also the name of a pixel of the region: what that pixel has by now is as high or higher.
        number = F.pad(spread.flatten(1), (1, 0)).gather(1, spread.flatten(1).long()).view_as(spread)
    regions = []
    for label, of_class, mask in zip(labels, number.repeat_interleave(4, 1).repeat_interleave(4, 2), masks):
        of_class = of_class[: mask.shape[0], : mask.shape[1]]
        names, sizes = of_class[mask].unique(return_counts=True)
        large = names[(400 * sizes >= mask.numel()) & (names != names[sizes.argmax()])]
        parts = [mask & (of_class == name) for name in large]
        regions += [(label, part) for part in [mask & ~torch.isin(of_class, large), *parts]]
    labels, masks = map(torch.stack, zip(*regions))
    return target_of(labels, None, masks, masks.shape[1:])


def number(value):
    """A number as files write it, 7, 7.0, "7" or "7.5" -> int if it is whole, float if not; None if it is no number."""
    if isinstance(value, int):
        return int(value)
    try:
        value = float(value)
    except (TypeError, ValueError):
        return None
    return int(value) if value.is_integer() else value


def identifier(value):
    """An id as files write it: 7, 7.0 and "7" are 7; any other text is an id of its own, "07" too.  None if it is no id."""
    whole = number(value)
    if isinstance(value, str):
        return whole if isinstance(whole, int) and str(whole) == value else value
    return whole if isinstance(whole, int) else None


def positive(value):
    """A whole number above 0, or None."""
    return number(value) if isinstance(number(value), int) and number(value) > 0 else None


def flag(default):
    """A reader of 0 and 1, true and false; what is null or not there is the default."""
    return lambda value: default if value is None else number(value) if number(value) in (0, 1) else None


def of_type(kind):
    return lambda value: value if isinstance(value, kind) else None


# What is used of the entries in COCO's files, and how to read it; nothing else of them has to be there.
COCO_ENTRIES = {
    "images": dict(id=identifier, file_name=of_type(str), width=positive, height=positive),
    "categories": dict(id=identifier, name=of_type(str), isthing=flag(1)),
    "instances": dict(image_id=identifier, category_id=identifier, bbox=of_type(list), iscrowd=flag(0)),
    "panoptic": dict(image_id=identifier, file_name=of_type(str), segments_info=of_type(list)),
    "segments_info": dict(id=positive, category_id=identifier, iscrowd=flag(0)),
}


def clean_entry(kind, entry, where):
    """An entry of a COCO file with its values as COCO_ENTRIES reads them.  Raises InputError that names what is missing."""
    entry = entry if isinstance(entry, dict) else {}
    read = {key: reader(entry.get(key)) for key, reader in COCO_ENTRIES[kind].items()}
    wrong = [key for key, value in read.items() if value is None]
    if wrong:
        raise InputError(f"{where} has no usable {', '.join(wrong)}; correct or remove the entry")
    return entry | read


def clean_box(bbox, where):
    """COCO's [left, top, width, height], as numbers."""
    numbers = [number(value) for value in bbox]
    if len(numbers) != 4 or {None, math.inf, -math.inf} & {*numbers}:
        raise InputError(f"{where} has bbox {bbox}, which is not four numbers; correct or remove it")
    return numbers


def clip_box(bbox, size):
    """COCO's [left, top, width, height] -> [left, top, right, bottom] inside of size (H, W); None if nothing is left."""
    left, top, width, height = map(float, bbox)
    box = [max(left, 0), max(top, 0), min(left + width, size[1]), min(top + height, size[0])]
    return box if box[2] > box[0] and box[3] > box[1] else None  # None for NaN, too: it is not greater than anything


def runs_of(counts):
    """COCO's run lengths as text -> as numbers, int64 (n,), with -1 in it if it is no such text.

    A character has five bits, and one that says whether the number goes on; from the fourth on a number is what is added
    to the one before the last.
    """
    codes = np.frombuffer(counts.encode(), np.uint8).astype(np.int64) - 48
    last = codes & 32 == 0
    if not len(codes) or not last[-1] or codes.min() < 0 or codes.max() > 63:
        return np.array([-1])
    first = np.flatnonzero(np.append(True, last[:-1]))
    place = 5 * (np.arange(len(codes)) - first[np.cumsum(last) - last])
    runs = np.add.reduceat((codes & 31) << place, first) - ((codes[last] & 16) << (place[last] + 1))  # a sign
    runs[1::2], runs[2::2] = runs[1::2].cumsum(), runs[2::2].cumsum()
    return runs


def clean_mask(mask, size, where):
    """COCO's segmentation as rle_of takes it, empty if it has no inside."""
    if not mask:
        return []
    if isinstance(mask, list) and all(isinstance(polygon, list) for polygon in mask):
        try:
            polygons = [np.asarray(polygon, np.float64) for polygon in mask]
        except (TypeError, ValueError):
            polygons = [np.zeros((0, 0))]
        if all(polygon.ndim == 1 for polygon in polygons):
            # Fewer than three points have no inside, and pycocotools takes four numbers for a box.
            whole = [p for p in polygons if len(p) >= 6 and len(p) % 2 == 0 and np.isfinite(p).all()]
            if any(np.abs(polygon).max() >= 1e5 for polygon in whole):  # it would be drawn in gigabytes
                raise InputError(f"{where} has a polygon far outside of its image; correct or remove it")
            return [polygon.tolist() for polygon in whole]
    if isinstance(mask, dict) and isinstance(mask.get("size"), list) and [number(x) for x in mask["size"]] == list(size):
        counts = mask.get("counts")
        counts = [number(run) for run in counts] if isinstance(counts, list) else counts
        runs = runs_of(counts).tolist() if isinstance(counts, str) else counts or [None]
        # pycocotools takes runs that end too early, and leaves in the rest whatever was in memory.
        if all(isinstance(run, int) and run >= 0 for run in runs) and sum(runs) == math.prod(size):
            return dict(size=list(size), counts=counts)
    what = f"neither polygons nor run lengths of size {list(size)}"
    raise InputError(f"{where} has a mask that is {what}; correct or remove it")


def rle_of(mask, size):
    """A mask in any of COCO's three forms (polygons, RLE as numbers, RLE as text) -> RLE as text."""
    if isinstance(mask, list):
        return mask_utils.merge(mask_utils.frPyObjects(mask, *size))
    return mask_utils.frPyObjects(mask, *size) if isinstance(mask["counts"], list) else mask


def locate(name, there, folder):
    """The file that a COCO file calls `name`, as a path inside of `folder`, whose listing is `there`; None if it is not there.

    Names that were written elsewhere have backslashes, or begin with folders that are not here: the longest end that is
    here is meant.
    """
    parts = name.replace("\\", "/").split("/")
    for end in [name] + ["/".join(parts[i:]) for i in range(len(parts))]:
        # A listing answers at once: on a network drive, to ask for each of 118,000 files takes minutes.
        if end in there or "/" in end and os.path.isfile(os.path.join(folder, end)):
            return end


class Coco(Dataset):
    """COCO 2017's layout with any categories, any numbers: DIR/{train,val}2017/*.jpg and

    det, inst   DIR/annotations/instances_{train,val}2017.json: objects with boxes, and masks as polygons or RLE
    pan         DIR/annotations/panoptic_{train,val}2017.json: every pixel's segment, things and stuff, with the PNGs in
                the folder panoptic_{train,val}2017 beside it or in DIR

    or, for det and inst, the layout in which labeling tools export: DIR/{train,valid}/_annotations.coco.json, images beside.

    Crowds are not trained on.  Boxes are clipped to their image; `dropped` objects have no area or, for inst, no mask.
    classes: of the model, by whose names those of the file get their labels; None: those of the file.
    Raises InputError, a line that names file and entry, where files do not belong together.
    """

    def __init__(self, root, split, task, transform, crop=None, seed=0, classes=None):
        self.task, self.transform, self.crop, self.seed, self.surveyed = task, transform, crop, seed, None
        self.kind = "panoptic" if task == "pan" else "instances"
        self.find(root, split)
        content = self.read()
        parts = content["annotations"]
        if task == "pan":
            parts = [part for entry in parts for part in entry["segments_info"]]
        self.choose_classes(content["categories"], parts, classes)
        position = {number: label for label, number in enumerate(self.categories)}
        images = sorted(content["images"], key=lambda image: image["id"])
        sizes = {image["id"]: (image["height"], image["width"]) for image in images}
        entries = {number: [] for number in sizes}
        self.check_files(images, "id", self.folder)
        if task == "pan":
            self.check_files(content["annotations"], "image_id", self.maps)
        for entry in content["annotations"]:
            if task == "pan":
                entries[entry["image_id"]] = entry
            elif not entry["iscrowd"]:
                box = clip_box(entry["bbox"], sizes[entry["image_id"]])
                mask = entry["segmentation"] if task == "inst" else None
                entries[entry["image_id"]].append((position[entry["category_id"]], box, mask))
        self.crowds = sum(part["iscrowd"] for part in parts)
        self.objects = len(parts) - self.crowds
        if not self.objects:
            none = f": {self.dropped} objects have no mask; --task det needs none" if self.dropped and task == "inst" else ""
            raise InputError(f"{self.path}: no usable annotation in it{none}")
        self.images = Packed([(image["file_name"], image["id"], sizes[image["id"]]) for image in images])
        self.entries = Packed([entries[image["id"]] for image in images])

    def find(self, root, split):
        """Finds the annotation file, `path`, the folder of images, and that of panoptic maps."""
        self.folder = os.path.join(root, f"{split}2017")
        self.path = os.path.join(root, "annotations", f"{self.kind}_{split}2017.json")
        instances = os.path.join(root, "annotations", f"instances_{split}2017.json")
        export = os.path.join(folder_of(root, split), "_annotations.coco.json")
        self.exported = os.path.exists(export)
        if self.task == "pan" and not os.path.exists(self.path):
            other = next((path for path in (instances, export) if os.path.exists(path)), None)
            if other:
                raise InputError(f"{self.path}: not there, only {other}, which --task det and --task inst read")
        elif self.exported and os.path.exists(self.path):
            raise InputError(f"{root}: {export} and {self.path} are both there; keep one of the two")
        elif self.exported:
            self.folder, self.path = os.path.dirname(export), export
        for path in (root, self.folder, self.path):
            if not os.path.exists(path):
                takes = f"DIR/{split}2017/ and DIR/annotations/, or DIR/{'train' if split == 'train' else 'valid'}/ with "
                raise InputError(f"{path}: not there; --data takes DIR with {takes}_annotations.coco.json")
        if self.task == "pan":
            places = [self.path.removesuffix(".json"), os.path.join(root, f"panoptic_{split}2017")]
            self.maps = next((place for place in places if os.path.isdir(place)), None)
            if self.maps is None:
                raise InputError(f"{places[0]}: no such folder of panoptic PNGs, nor {places[1]}")

    def read(self):
        """The content of the annotation file, cleaned: what training and pycocotools' evaluation see is the same.

        Of the annotations only those that can be learned or found are left; `dropped` counts the others.
        """
        try:
            with open(self.path, "rb") as file:
                content = json.load(file)  # bytes: a byte order mark, and UTF-16, are recognized
        except (OSError, ValueError) as error:
            raise InputError(f"{self.path}: not a readable JSON file ({error})") from error
        tables = dict(images="images", categories="categories", annotations=self.kind)
        missing = [table for table in tables if not isinstance(content, dict) or not isinstance(content.get(table), list)]
        if missing:
            raise InputError(f"{self.path}: not in COCO's format, it has no {', '.join(missing)}")
        for table, kind in tables.items():
            where = f"{self.path}: {table}"
            content[table] = [clean_entry(kind, entry, f"{where}[{i}]") for i, entry in enumerate(content[table])]
        parts = content["annotations"]
        if self.task == "pan":
            for i, entry in enumerate(content["annotations"]):
                where = f"{self.path}: a segment of annotations[{i}]"
                entry["segments_info"] = [clean_entry("segments_info", part, where) for part in entry["segments_info"]]
            parts = [part for entry in content["annotations"] for part in entry["segments_info"]]
        # Ids are numbers or, if one of them is not, text: "7" and 7 never are two entries.
        for table, key, users in (("images", "image_id", content["annotations"]), ("categories", "category_id", parts)):
            if any(isinstance(entry["id"], str) for entry in content[table]):
                for entry in content[table]:
                    entry["id"] = str(entry["id"])
                for user in users:
                    user[key] = str(user[key])
        sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
        categories = {category["id"] for category in content["categories"]}
        if len(sizes) < len(content["images"]) or len(categories) < len(content["categories"]):
            raise InputError(f"{self.path}: two images, or two categories, have the same id; number them differently")
        annotations = [self.clean(i, entry, sizes, categories) for i, entry in enumerate(content["annotations"])]
        self.dropped = annotations.count(None)
        content["annotations"] = [entry for entry in annotations if entry is not None]
        if self.task == "pan":
            counts = Counter(entry["image_id"] for entry in annotations)
            twice = next((image for image, count in counts.items() if count > 1), None)
            if twice is not None:
                raise InputError(f"{self.path}: image {twice} has {counts[twice]} annotations; leave one of them")
        return content

    def clean(self, index, entry, sizes, categories):
        """An annotation whose references, box and mask are good; None if it has nothing to be seen."""
        where = f"{self.path}: annotation {entry.get('id', entry.get('file_name', index))}"
        if entry["image_id"] not in sizes:
            raise InputError(f"{where} is of image {entry['image_id']}, which is not in its table of images; add or remove one")
        parts = entry["segments_info"] if self.task == "pan" else [entry]
        for part in parts:
            if part["category_id"] not in categories:
                raise InputError(f"{where} has category {part['category_id']}, which is not in its table; add or remove one")
        if self.task == "pan":
            if len({part["id"] for part in parts}) < len(parts):
                raise InputError(f"{where} has two segments with the same id; number them differently, as in its PNG")
            return entry
        size, bbox, area = sizes[entry["image_id"]], clean_box(entry["bbox"], where), entry.get("area")
        known, mask = isinstance(area, (int, float)) and 0 <= area < math.inf, []
        try:
            if self.task == "inst" or not known:
                mask = clean_mask(entry.get("segmentation"), size, where)
        except InputError:
            if self.task == "inst":
                raise
        pixels = int(mask_utils.area(rle_of(mask, size))) if mask else 0  # none outside of the image, or of a line
        if not clip_box(bbox, size) or self.task == "inst" and not pixels:
            return None
        return entry | dict(bbox=bbox, segmentation=mask, area=area if known else pixels or math.prod(bbox[2:]))

    def choose_classes(self, table, parts, classes):
        """Sets classes, things, categories (the number in the file of each class), and those that are left out."""
        used = {part["category_id"] for part in parts}
        rows = sorted(table, key=lambda row: row["id"])
        top = rows[-1]["id"] if rows else 0
        others = [row for row in rows if row["id"] != 0]
        if classes is None:  # tools put a name for all categories first, which no object has
            above = [row.get("supercategory") for row in others]
            left_out = [row for row in rows if row["id"] == 0 and (self.exported or row["name"] in above)]
        else:
            twins = {row["name"] for row in others}
            left_out = [row for row in rows if row["name"] not in classes or row["id"] == 0 and row["name"] in twins]
        left_out = [row for row in left_out if row["id"] not in used]
        self.left_out = [row["name"] for row in left_out]
        rows = [row for row in rows if row not in left_out]
        self.classes = [row["name"] for row in rows]
        if classes is not None and self.classes != list(classes):
            strange = next((name for name in self.classes if name not in classes), None)
            if strange is not None:
                what = f"its category {strange} is none of the model's {len(classes)} classes"
                raise InputError(f"{self.path}: {what}; name categories as for training")
            of_name = {row["name"]: row for row in rows}
            if len(of_name) < len(rows) or len(set(classes)) < len(classes):
                raise InputError(f"{self.path}: two categories have the same name, so that classes cannot be told by name")
            missing = [name for name in classes if name not in of_name]
            if missing and self.task == "pan":
                raise InputError(f"{self.path}: it has no category {missing[0]}, which the model is trained for")
            # What the file does not know gets numbers that it does not use: those answers are saved, and not judged.
            free = {name: f"{top} {i}" if isinstance(top, str) else top + 1 + i for i, name in enumerate(missing)}
            rows = [of_name.get(name) or dict(id=free[name], name=name, isthing=1) for name in classes]
            self.classes = list(classes)
        self.categories = [row["id"] for row in rows]
        self.things = [bool(row["isthing"]) for row in rows]

    def check_files(self, entries, number, folder):
        """Every entry's file_name becomes that of the file in the folder."""
        there, meant = set(os.listdir(folder)), {}
        for entry in entries:
            name = entry["file_name"]
            entry["file_name"] = found = locate(name, there, folder)
            if found is None:
                raise InputError(f"{self.path}: image {entry[number]}, {name}, is not in {folder}")
            if meant.setdefault(found, name) != name:
                raise InputError(f"{self.path}: {meant[found]} and {name} would both be {os.path.join(folder, found)}")

    def coco(self):
        """The annotations, crowds too, as pycocotools' evaluation takes them."""
        content = self.read()
        content["categories"] = [dict(id=i, name=name) for i, name in zip(self.categories, self.classes)]
        for number, entry in enumerate(content["annotations"], 1):
            entry["id"] = number  # for pycocotools, to be matched with annotation 0 is to be matched with none
        return indexed(content)

    def segments(self, index):
        """The panoptic map of an image: ids, int64 (H, W), 0 where void, and a dictionary for each segment."""
        name, number, size = self.images[index]
        entry = self.entries[index]
        if not entry:
            raise InputError(f"{self.path}: image {number}, {name}, has no annotation; add one, or remove the image")
        path = os.path.join(self.maps, entry["file_name"])
        rgb = np.asarray(load_image(path), np.int32)
        ids = rgb[..., 0] + 256 * rgb[..., 1] + 256**2 * rgb[..., 2]  # (H, W)
        if ids.shape != size:
            raise InputError(f"{path}: {ids.shape[1]} x {ids.shape[0]} pixels, {name} has {size[1]} x {size[0]}")
        known = [segment["id"] for segment in entry["segments_info"]]
        unknown = ids[~np.isin(ids, [0, *known])]
        if len(unknown):
            raise InputError(f"{path}: segment {unknown.min()} has no entry in {self.path}")
        return torch.from_numpy(ids.astype(np.int64)), entry["segments_info"]

    def name(self, index):
        return os.path.join(self.folder, self.images[index][0])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        """key: (epoch, index).  See above."""
        epoch, index = key
        image = tv_tensors.Image(functional.pil_to_tensor(load_image(self.name(index))))
        size = self.check_size(index, tuple(image.shape[-2:]))
        if self.crop is None:
            return self.transform(image).as_subclass(torch.Tensor), dict(index=index, size=size)
        boxes = masks = None
        if self.task == "pan":
            ids, segments = self.segments(index)
            segments = [segment for segment in segments if not segment["iscrowd"]]
            labels = [self.categories.index(segment["category_id"]) for segment in segments]
            masks = positions(ids, [segment["id"] for segment in segments])
        else:
            labels, boxes, shapes = zip(*self.entries[index]) if self.entries[index] else ([], [], [])
            boxes = box_tensor(boxes, size)
            if self.task == "inst":
                masks = torch.zeros(len(shapes), *size, dtype=torch.uint8)
                for mask, shape in zip(masks, shapes):
                    mask[:] = torch.from_numpy(mask_utils.decode(rle_of(shape, size)))
                masks = masks.view(torch.bool)
        with seeded(self.seed, epoch, index):
            return training_sample(image, labels, boxes, masks, self.transform, self.crop)

    def check_size(self, index, found):
        """The size (H, W) of an image in the annotation file, if its own is the same."""
        name, _, size = self.images[index]
        if found != size:
            raise InputError(f"{name}: {found[1]} x {found[0]} pixels, {self.path} says {size[1]} x {size[0]}")
        return size

    def check(self, index):
        """What is counted of an image; raises InputError if image, map and annotations do not belong together."""
        size = self.check_size(index, header_size(self.name(index)))
        if self.task != "pan":
            return Counter()
        ids, segments = self.segments(index)
        seen = set(ids.unique().tolist())
        return Counter(pixels=math.prod(size), void=int((ids == 0).sum()), unseen=sum(s["id"] not in seen for s in segments))

    def describe(self, total):
        """Lines that say what was understood.  total: sum of what check() counts."""
        what = "segments" if self.task == "pan" else "objects"
        line = f"{len(self)} images, {len(self.classes)} classes, {self.objects} {what}, {self.crowds} crowds ignored"
        dropped, nothing = self.dropped + total["unseen"], dict(det="area", inst="area or mask", pan="pixels")[self.task]
        line += f", ignored {dropped} {what} without {nothing}" if dropped else ""
        line += f", {total['void'] / total['pixels']:.1%} of the pixels void" if self.task == "pan" else ""
        names = ", ".join(self.left_out[:5]) + (", ..." if len(self.left_out) > 5 else "")
        return [line] + [f"ignored categories without annotations: {names}"] * bool(names)


class Ade(Dataset):
    """ADE20K's layout (ADEChallengeData2016) with any number of classes, for sem:

    DIR/images/{training,validation}/*.jpg         DIR/annotations/{training,validation}/*.png, labels from 1, 0 is void
    DIR/objectInfo150.txt                          names, the last column after a tab; without it the classes are numbers

    255 is void, too, where there are fewer classes.
    """

    def __init__(self, root, split, transform, crop=None, seed=0, classes=None):
        self.transform, self.crop, self.seed = transform, crop, seed
        split = dict(train="training", val="validation")[split]
        self.folder, self.maps = os.path.join(root, "images", split), os.path.join(root, "annotations", split)
        for folder in (root, self.folder, self.maps):
            if not os.path.isdir(folder):
                raise InputError(f"{folder}: no such folder; --data takes DIR with DIR/images/ and DIR/annotations/")
        names = sorted(name for name in os.listdir(self.folder) if is_image_file(name) and not is_hidden(name))
        maps, stems = set(os.listdir(self.maps)), {}
        for name in names:
            stem = os.path.splitext(name)[0]
            if stem + ".png" not in maps:
                raise InputError(f"{self.maps}: no label map of {name}")
            if stems.setdefault(stem, name) != name:
                raise InputError(f"{self.folder}: {stems[stem]} and {name} have the same label map; rename or remove one")
        if not names:
            raise InputError(f"{self.folder}: no images")
        self.names = np.array([os.fsencode(name) for name in names])
        self.table, self.surveyed = os.path.join(root, "objectInfo150.txt"), None
        if classes is not None:
            self.classes = list(classes)
        elif os.path.exists(self.table):
            self.classes = self.read_table()
        else:
            self.classes = self.count_classes()
        self.things, self.categories = [False] * len(self.classes), list(range(1, len(self.classes) + 1))
        if not any(map(self.is_labeled, range(len(self)))):  # unless something is wrong, this looks at one map
            total, faults = self.surveyed or survey(self.check, len(self), "looking for labels")
            only = f"only the values {', '.join(map(str, sorted(total)))}; number classes from 1, 0 and 255 are void"
            raise InputError(f"{self.maps}: no labeled pixel, {only if total else faults[0][1]}")

    def read_table(self):
        """The names of the classes in objectInfo150.txt."""
        try:
            with open(self.table, encoding="utf-8-sig") as file:
                rows = [line.strip("\n").split("\t") for line in file if line.strip()]
        except ValueError as error:
            raise InputError(f"{self.table}: not a text in UTF-8 ({error}); save it as one") from error
        if rows and not rows[0][0].strip().isdigit():
            rows = rows[1:]  # the titles of the columns
        for number, row in enumerate(rows, 1):
            if len(row) < 2 or not row[-1].strip() or row[0].strip() != str(number):
                raise InputError(f"{self.table}: the row of class {number} is not its number, a tab, ..., a tab, its name")
        if not rows:
            raise InputError(f"{self.table}: no classes in it")
        return [row[-1].split(",")[0].strip() for row in rows]

    def count_classes(self):
        """Names of classes of which nothing but the labels is known: their numbers."""
        self.surveyed = survey(self.check, len(self), f"no {self.table}: counting classes")
        labels = sorted(label for label in self.surveyed[0] if label > 0)
        if labels[-1:] == [255] and 1 < len(labels) < 255:
            labels.pop()  # the classes do not reach it
        # Masks of 0 and 255, and of other shades of gray, are no numbers of classes.
        if labels and labels[-1] > 10 * len(labels):
            found = ", ".join(map(str, sorted(self.surveyed[0])[:5]))
            raise InputError(
                f"{self.maps}: the values {found} in it cannot be numbers of classes; number them 1, 2, 3, ..., "
                f"with 0 and 255 for void, or name all classes in {self.table}"
            )
        return [str(label) for label in range(1, max(labels, default=0) + 1)]

    def read_map(self, index):
        """Path and labels, int64 (H, W), as the file has them."""
        path = os.path.join(self.maps, os.path.splitext(os.fsdecode(self.names[index]))[0] + ".png")
        with opened(path) as image:
            halved = len(image.getbands()) > 1 and ";16" in str(image.tile)  # PIL drops the lower 8 of its 16 bits
            pixels = np.asarray(image)
            channels = pixels.reshape(*pixels.shape[:2], -1)[..., : len(image.getbands()) - ("A" in image.getbands())]
        if halved or (channels != channels[..., :1]).any():
            what = "16 bits a channel" if halved else "colors"
            raise InputError(f"{path}: {what} in it; the data set has labels from 1, 0 where void, as gray or palette PNG")
        return path, torch.from_numpy(channels[..., 0].astype(np.int64))

    def is_labeled(self, index):
        """Whether a map has a class; one that cannot be read has none, which is told when its turn comes."""
        with contextlib.suppress(InputError):
            labels = self.read_map(index)[1]
            return ((labels > 0) & (labels <= len(self.classes))).any().item()
        return False

    def label_map(self, index):
        """Classes of the pixels of an image, int64 (H, W), -1 where void."""
        return self.without_void(*self.read_map(index))

    def without_void(self, path, labels):
        """Labels of the file at path -> classes, -1 where void."""
        if len(self.classes) < 255:
            labels = labels.where(labels != 255, 0)
        labels = labels - 1
        if labels.max() >= len(self.classes):
            raise InputError(f"{path}: label {int(labels.max()) + 1} in it, the data set has labels 0 to {len(self.classes)}")
        return labels

    def name(self, index):
        return os.path.join(self.folder, os.fsdecode(self.names[index]))

    def __len__(self):
        return len(self.names)

    def check_size(self, index, found, labels):
        if found != tuple(labels.shape):
            size = f"{labels.shape[1]} x {labels.shape[0]}"
            raise InputError(f"{self.name(index)}: {found[1]} x {found[0]} pixels, its label map has {size}")

    def check(self, index):
        """How many pixels of a map have each value; raises InputError if it does not go with its image and the classes."""
        path, labels = self.read_map(index)
        self.check_size(index, header_size(self.name(index)), labels)
        if hasattr(self, "classes"):
            self.without_void(path, labels)
        counts = labels.flatten().bincount()
        return Counter({value: int(counts[value]) for value in counts.nonzero()[:, 0].tolist()})

    def describe(self, total):
        """Lines that say what was understood.  total: pixels of each value in the maps."""
        share = lambda *values: f"{sum(total[value] for value in values) / total.total():.1%}"
        void = [0] + [255] * (len(self.classes) < 255)
        seen = sum(0 < value <= len(self.classes) for value in total.keys() - void)
        line = f"{len(self)} images, {len(self.classes)} classes, of which {seen} occur, {share(*void)} of the pixels void"
        lines = [f"{line} ({' and '.join(map(str, void))})"]
        if 255 in void and total[0] and total[255]:
            both = f"0 ({share(0)} of the pixels) and 255 ({share(255)}) are both void"
            lines.append(f"{both}; if 0 is a class, add 1 to all labels but 255")
        return lines

    def __getitem__(self, key):
        """key: (epoch, index).  See above."""
        epoch, index = key
        image = tv_tensors.Image(functional.pil_to_tensor(load_image(self.name(index))))
        size, labels = tuple(image.shape[-2:]), self.label_map(index)
        self.check_size(index, size, labels)
        if self.crop is None:
            return self.transform(image).as_subclass(torch.Tensor), dict(index=index, size=size)
        labels = (labels + 1).to(torch.uint8 if len(self.classes) < 256 else torch.int32)
        with seeded(self.seed, epoch, index):
            return training_sample(image, range(len(self.classes)), None, labels, self.transform, self.crop)


# ---------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------
def survey(function, count, title):
    """Calls function(index), which returns a Counter, for all indices, on threads of all processes: PIL decodes in parallel.

    Returns the sum of the counters and a list of (index, InputError) in order, the same on every process.
    """

    def call(index):
        try:
            return function(index), []
        except InputError as error:
            return Counter(), [(index, error)]

    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine, total, faults = range(rank, count, world_size), Counter(), []
    with ThreadPoolExecutor() as pool:
        for counts, fault in tqdm(pool.map(call, mine), title, len(mine), leave=False, disable=True if rank else None):
            total.update(counts)
            faults += fault
    parts = [(total, faults)]
    if world_size > 1:
        parts = [None] * world_size
        dist.all_gather_object(parts, (total, faults))
    faults = [fault for _, faults in parts for fault in faults]
    return sum((total for total, _ in parts), Counter()), sorted(faults, key=lambda fault: fault[0])


def check(dataset, split):
    """Reads all labels of a data set, and the headers of its images, and prints what was understood.

    What is wrong with files, or could be taken for something else, shall be known before the first step and not hours later.
    split: "training", where a few unreadable images are skipped as by SkipBroken, or "validation".
    Raises InputError, the same on every process.
    """
    if isinstance(dataset, Shapes):
        return
    total, faults = dataset.surveyed or survey(dataset.check, len(dataset), f"checking {split} data")
    spared = lambda error: split == "training" and isinstance(error, Unreadable)
    broken = [error for _, error in faults if spared(error)]
    wrong = [error for _, error in faults if not spared(error)]
    if wrong:
        raise InputError(f"{wrong[0]}" + (f"; {len(wrong) - 1} more files are wrong" if len(wrong) > 1 else ""))
    if len(broken) > spare(len(dataset)):
        raise InputError(f"{len(broken)} of {len(dataset)} training images are broken, the last: {broken[-1]}")
    if not dist.is_initialized() or dist.get_rank() == 0:
        for line in dataset.describe(total):
            print(f"{split} data: {line}")
        if broken:
            print(f"{split} data: {len(broken)} images will be skipped, the first: {broken[0]}")


def spare(length):
    """How many of so many training images may be broken: 1 %, or ten if that is not all."""
    return min(max(10, length // 100), length - 1)


class SkipBroken(Dataset):
    """A training set that gives the next sample instead of one that cannot be read: a run of days goes on.

    A line on stderr says which file it was, and why, once.  The substitute is the same for any number of processes.
    broken: bool (n,), the samples met so far that were; it lies in memory that this process and its workers share.
    workers: how many processes will read it; `read` then knows which sample each is at.
    """

    def __init__(self, dataset, workers=0):
        self.dataset = dataset
        self.broken = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()
        self.reading = torch.zeros(workers, 2, dtype=torch.int64).share_memory_()  # of each worker: process, index

    def read(self, loader):
        """The loader's batches.  Raises InputError if one of its workers dies, with the file that it was on."""
        try:
            try:
                yield from loader
            except (OSError, EOFError):  # a dying worker can break a connection before torch learns of its death,
                time.sleep(5)  # which then raises RuntimeError here
                raise
        except RuntimeError as error:
            dead = re.findall(r"\d+", str(error)) if "DataLoader worker" in str(error) else []
            names = [self.dataset.name(index) for process, index in self.reading.tolist() if str(process) in dead]
            if not names:
                raise
            raise InputError(f"{', '.join(names)}: a loader process died with it ({str(error).splitlines()[0]})") from error

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        """key: (epoch, index).  Raises InputError once more than 1 % are broken (but ten may be, if that is not all)."""
        epoch, index = key
        while True:
            worker = get_worker_info()
            if worker:
                self.reading[worker.id] = torch.tensor([os.getpid(), index])
            try:
                return self.dataset[epoch, index]
            except InputError as error:
                if not self.broken[index]:
                    print(f"skipped: {error}", file=sys.stderr)
                self.broken[index] = True
                count, length = int(self.broken.sum()), len(self)
                if count > spare(length):
                    raise InputError(f"{count} of {length} training images are broken, the last: {error}") from error
                index = (index + 1) % length


def ignore_interrupts(worker):
    """For workers: Ctrl-C reaches every process of a terminal, but what becomes of them is for their parent to say."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def ignore_signals(worker):
    """For workers in training: they are needed until the step is finished, whoever asks to stop."""
    ignore_interrupts(worker)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # with which Python ends them, so that the parent has to close its loader


def loader_of(dataset, workers, device, **options):
    """A DataLoader whose workers share the data set with their parent.

    Linux can fork them.  From Python 3.14 on it no longer does so by itself, and each would hold a copy of all annotations.
    """
    context = "fork" if workers and sys.platform == "linux" else None
    pin = device.type == "cuda"
    return DataLoader(dataset, num_workers=workers, multiprocessing_context=context, pin_memory=pin, **options)


class GlobalBatches(Sampler):
    """For one process, the (epoch, index) keys of its part of every global batch, step after step.

    The order of an epoch is a permutation drawn from (seed, epoch); step s takes the next `batch_size` of it; the
    last, incomplete batch of an epoch is left out.  A global batch is cut into world_size * accumulate equal chunks
    in order, and this process takes `accumulate` of them, so that the images of step s are the same for any
    number of processes.  With `neighbor` every chunk is preceded by the sample before it in the global
    batch, with which `mix` mixes its first sample: it costs one more image a chunk, and no communication.
    """

    def __init__(
        self, length, batch_size, steps, seed=0, rank=0, world_size=1, accumulate=1, neighbor=False, first_step=0
    ):
        if batch_size % (world_size * accumulate):
            raise InputError(
                f"--batch-size {batch_size} is not divisible by {world_size} processes x --accumulate {accumulate}"
            )
        if batch_size > length:
            raise InputError(f"--batch-size {batch_size} is more than the {length} training images")
        self.length, self.batch_size, self.seed, self.neighbor = length, batch_size, seed, neighbor
        self.first_step, self.steps = first_step, steps
        self.chunk = batch_size // (world_size * accumulate)
        self.chunks = range(rank * accumulate, (rank + 1) * accumulate)

    def __len__(self):
        return (self.steps - self.first_step) * len(self.chunks)

    def __iter__(self):
        drawn = None
        for step in range(self.first_step, self.steps):
            epoch, position = divmod(step, self.length // self.batch_size)
            if epoch != drawn:
                with seeded(self.seed, epoch):
                    order, drawn = torch.randperm(self.length), epoch
            batch = order[position * self.batch_size :][: self.batch_size].tolist()
            for chunk in self.chunks:
                start = chunk * self.chunk
                first = [batch[start - 1]] if self.neighbor else []  # -1: the batch is a ring, as in mix
                yield [(epoch, index) for index in first + batch[start : start + self.chunk]]


def collate(samples):
    """A batch of a dense data set: a list of images, which have sizes of their own, and a list of targets."""
    return [list(part) for part in zip(*samples)]


def mix(images, labels, num_classes, mixup, cutmix, seed, step):
    """Mixup or cutmix, half of the time each, of every sample with the one before it; drawn from (seed, step).

    images (1 + b, 3, H, W), labels (1 + b,): a chunk of GlobalBatches with its neighbor, which is dropped again.
    mixup, cutmix: the parameter of their Beta distributions, 0 for never.
    Returns images (b, 3, H, W) and targets (b, num_classes), rows summing to 1.
    """
    choices = [v2.MixUp(alpha=mixup, num_classes=num_classes)] if mixup else []
    choices += [v2.CutMix(alpha=cutmix, num_classes=num_classes)] if cutmix else []
    with seeded(seed, step):
        images, targets = v2.RandomChoice(choices)(images, labels)
    return images[1:], targets[1:]
