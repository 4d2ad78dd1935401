# SPDX-License-Identifier: MIT
"""Data sets and augmentation; this file knows nothing of models.

    shapes        drawn from (seed, epoch, index): no download, no files, every epoch new scenes; the default
    ImageFolder   DIR/train/<class>/*.jpg and DIR/val/<class>/*.jpg: ImageNet and anything else laid out like it
    COCO          DIR/{train,val}2017/*.jpg and DIR/annotations/: boxes, masks, panoptic segments of any categories
    ADE20K        DIR/images/ and DIR/annotations/: label maps of any number of classes

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

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from torch.utils.data import Dataset, Sampler, get_worker_info
from torchvision import tv_tensors
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import is_image_file
from torchvision.ops import box_convert, masks_to_boxes
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional
from tqdm import tqdm

MEAN_COLOUR = (0.485, 0.456, 0.406)  # ImageNet's; what erasing and rotation leave behind looks like nothing


class InputError(ValueError):
    """Something about the user's files or flags; its message is one line: what is wrong, where, what to do."""


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
    """Colours (3, h, w): the base colour, swung by the pattern towards another one and away from it."""
    swing = rng.uniform(-0.15, 0.15, (3, 1, 1)).astype(np.float32)
    return base.reshape(3, 1, 1) + swing * pattern(rng, kind, x, y)


def draw_scene(rng, size, things):
    """One scene: three to five regions of stuff, and things over them, later ones on top.

    rng: numpy Generator.  size: side in pixels.  things: list of (class index, radius, x, y), radius and centre
    in fractions of the side; rotation, stretch, colour and pattern are drawn here, independent of the class.
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
        reach = 1.2 * radius + 1  # nothing of the thing lies farther from its centre
        rows = slice(max(0, int(cy - reach)), max(0, int(cy + reach) + 1))
        columns = slice(max(0, int(cx - reach)), max(0, int(cx + reach) + 1))
        dx, dy = (x[:, columns] - cx) / radius, (y[rows] - cy) / radius
        angle, stretch = rng.uniform(0, 2 * math.pi), rng.uniform(0.92, 1.08)
        u = math.cos(angle) * stretch * dx + math.sin(angle) * stretch * dy
        v = math.cos(angle) / stretch * dy - math.sin(angle) / stretch * dx
        alpha = np.clip(0.5 - radius * list(THINGS.values())[category](u, v), 0, 1)  # one pixel of soft edge
        under = image[:, rows, columns]
        # Of three colours take the one farthest from what it covers: a thing that cannot be seen teaches nothing.
        colours = rng.uniform(0, 1, (3, 3)).astype(np.float32)
        base = colours[np.abs(colours - under.mean((1, 2))).sum(1).argmax()]
        colour = paint(rng, base, STUFF[rng.integers(len(STUFF))], x[:, columns], y[rows])
        under += alpha * (colour - under)
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
        """key: (epoch, index).  Returns the image, float32 (3, size, size) in [0, 1], and for cls its label, an int.

        The other tasks' targets are described with the dense data sets below.
        """
        image, shown, label = self.scene(*key)
        image = torch.from_numpy(image).float() / 255
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
    """A PIL image; whatever PIL raises for files that are no images, or half of one, becomes an InputError."""
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read as an image ({error}); replace or remove it") from error


def load_image(path):
    """The image as PIL RGB, upright: grey, palette, CMYK, 16-bit and EXIF-rotated files included."""
    with opened(path) as image:
        ImageOps.exif_transpose(image, in_place=True)  # not in place, it copies the pixels of every image
        if image.mode.startswith("I"):  # 16 bits of grey, which convert() would clip at 255 instead of scaling
            image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
        if "transparency" in image.info:
            image = image.convert("RGBA")
        return image.convert("RGB")


def train_transform(size, randaugment, erasing):
    """PIL RGB -> float32 (3, size, size) in [0, 1].  randaugment: magnitude, 0 (none) to 30.  erasing: probability."""
    steps = [v2.RandomResizedCrop(size, interpolation=InterpolationMode.BICUBIC), v2.RandomHorizontalFlip()]
    if randaugment:
        fill = [round(255 * value) for value in MEAN_COLOUR]
        operation = v2.RandAugment(1, randaugment, interpolation=InterpolationMode.BILINEAR, fill=fill)
        steps += [v2.RandomApply([operation], 0.5)] * 2  # one operation on average, as in Swin's recipe, not always two
    steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    if erasing:
        steps.append(v2.RandomErasing(erasing, value=list(MEAN_COLOUR)))
    return v2.Compose([*steps, v2.ToPureTensor()])


def eval_transform(size):
    """PIL RGB -> float32 (3, size, size) in [0, 1]: the central 7/8 of the short side, as is usual (224 of 256)."""
    resize = v2.Resize(round(size * 256 / 224), interpolation=InterpolationMode.BICUBIC)
    return v2.Compose(
        [resize, v2.CenterCrop(size), v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]
    )


class Folder(Dataset):
    """DIR/<split>/<class>/*.jpg, every sample augmented by (seed, epoch, index).

    classes: the names whose positions are the labels (of the training split, or of a checkpoint); None: as found.
    Raises InputError if there is no such folder, no image in it or in one of its classes, or a class not in `classes`.
    """

    def __init__(self, root, split, transform, seed=0, classes=None):
        folder = os.path.join(root, split)
        if not os.path.isdir(folder):
            missing = folder if os.path.isdir(root) else root
            raise InputError(f"{missing}: no such folder; --data takes DIR with DIR/train/<class>/, DIR/val/<class>/")
        try:
            found = ImageFolder(folder)
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
        self.transform, self.seed = transform, seed

    def name(self, index):
        return os.fsdecode(self.paths[index])

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        """key: (epoch, index).  Returns the image, float32 (3, size, size) in [0, 1], and its label, an int."""
        image = load_image(self.name(key[1]))
        with seeded(self.seed, *key):
            return self.transform(image), int(self.labels[key[1]])


# ---------------------------------------------------------------------------------------------------------------
# Dense data sets: every object, or every pixel, has a label
# ---------------------------------------------------------------------------------------------------------------
# In training data[epoch, index] is an image, float32 (3, H, W) in [0, 1], and what is in it, a dictionary:
#
#     labels  (n,) int64           class of each object (det, inst), of each segment (pan), or a class each (sem)
#     boxes   (n, 4) float32       centre x, centre y, width, height, in fractions of the image
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
    sem: ADE20K's, a short side of 0.5 to 2 times `size`, and changed light and colours.
    """
    if task != "sem":
        return v2.Compose([Rescale(size, size, 0.1, 2.0), v2.RandomHorizontalFlip()])
    # Colours come first, while the image is small.  Not RandomPhotometricDistort: it also swaps red for blue, and sky
    # is told from sand by that.
    colours = v2.ColorJitter(brightness=0.125, contrast=0.5, saturation=0.5, hue=0.05)
    return v2.Compose([colours, Rescale(size, 4 * size, 0.5, 2.0), v2.RandomHorizontalFlip()])


def dense_eval_transform(size, max_size):
    """The whole image, its short side `size` unless its long one would be more than `max_size`."""
    return Rescale(size, max_size)


def training_sample(image, labels, boxes, masks, transform, crop):
    """Augments an image and what is in it.

    image: tv_tensors.Image.  labels: list of n ints.  boxes: BoundingBoxes (n, 4), or None where the masks say it all.
    masks: (n, H, W) bool, or None.  transform: of torchvision.transforms.v2.  crop: pixels a side, at most; smaller
    images stay whole, since the model knows padding from image.
    Returns image and target as above.  What has less than a pixel left in the crop is dropped.
    """
    parts = dict(labels=torch.tensor(labels, dtype=torch.int64))
    if boxes is not None:
        parts["boxes"] = boxes
    if masks is not None:
        parts["masks"] = tv_tensors.Mask(masks.view(torch.uint8))  # bool is resized by way of float, nine times slower
    image, parts = transform(image, parts)
    height, width = image.shape[-2:]
    h, w = min(crop, height), min(crop, width)
    corner = int(torch.randint(height - h + 1, ())), int(torch.randint(width - w + 1, ()))
    image = functional.crop(image, *corner, h, w)
    cropped = {k: functional.crop(v, *corner, h, w) if k != "labels" else v for k, v in parts.items()}
    masks = cropped["masks"].as_subclass(torch.Tensor).view(torch.bool) if masks is not None else None
    boxes = cropped["boxes"].as_subclass(torch.Tensor) if boxes is not None else None
    return as_pixels(image), target_of(cropped["labels"], boxes, masks, (h, w))


def as_pixels(image):
    """uint8 -> float32 in [0, 1], a plain tensor."""
    return functional.to_dtype(image, torch.float32, scale=True).as_subclass(torch.Tensor)


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


def clip_box(bbox, size, where):
    """COCO's [left, top, width, height] -> [left, top, right, bottom] inside of size (H, W); None if nothing is left."""
    try:
        left, top, width, height = map(float, bbox)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where} has bbox {bbox}, which is not four numbers") from error
    box = [max(left, 0), max(top, 0), min(left + width, size[1]), min(top + height, size[0])]
    return box if box[2] > box[0] and box[3] > box[1] else None  # None for NaN, too: it is not greater than anything


def check_mask(mask, size, where):
    """COCO's segmentation as decode_mask takes it, empty if it has no inside.  To decode a million here takes minutes."""
    if not mask:
        raise InputError(f"{where} has no mask; --task det needs none")
    if isinstance(mask, list) and all(isinstance(polygon, list) for polygon in mask):
        return [polygon for polygon in mask if len(polygon) >= 6]  # pycocotools takes four numbers for a box
    runs = mask.get("counts") if isinstance(mask, dict) and mask.get("size") == list(size) else None
    whole = isinstance(runs, list) and all(isinstance(run, int) and run >= 0 for run in runs)
    # pycocotools takes runs that end too early, and leaves in the rest whatever was in memory.
    if isinstance(runs, str) or whole and sum(runs) == math.prod(size):
        return mask
    raise InputError(f"{where} has a mask that is neither polygons nor run lengths of size {list(size)}")


def decode_mask(mask, size):
    """A mask in any of COCO's three forms (polygons, RLE as numbers, RLE as text) -> uint8 (H, W)."""
    if isinstance(mask, list):
        if not all(np.abs(polygon).max() < 1e5 for polygon in mask):  # NaN, or what would be drawn in gigabytes
            raise ValueError("its polygons leave the plane")
        mask = mask_utils.merge(mask_utils.frPyObjects(mask, *size))
    elif isinstance(mask["counts"], list):
        mask = mask_utils.frPyObjects(mask, *size)
    mask = mask_utils.decode(mask)
    if mask.max() > 1:
        raise ValueError("its run lengths end too early")
    return mask


# What is used of the entries in COCO's files, and its kind; nothing else of them has to be there.
COCO_ENTRIES = {
    "images": dict(id=(int, str), file_name=str, width=int, height=int),
    "categories": dict(id=(int, str), name=str),
    "instances": dict(image_id=(int, str), category_id=(int, str), bbox=list),
    "panoptic": dict(image_id=(int, str), file_name=str, segments_info=list),
    "segments_info": dict(id=int, category_id=(int, str)),
}


def check_entry(kind, entry, where):
    keys = COCO_ENTRIES[kind].items()
    wrong = [key for key, types in keys if not isinstance(entry, dict) or not isinstance(entry.get(key), types)]
    if wrong:
        raise InputError(f"{where} has no usable {', '.join(wrong)}")


class Coco(Dataset):
    """COCO 2017's layout with any categories, any numbers: DIR/{train,val}2017/*.jpg and

    det, inst   DIR/annotations/instances_{train,val}2017.json: objects with boxes, and masks as polygons or RLE
    pan         DIR/annotations/panoptic_{train,val}2017.json: every pixel's segment, things and stuff, with the PNGs in
                the folder panoptic_{train,val}2017 beside it or in DIR

    Crowds are not trained on.  Boxes are clipped to their image; `dropped` objects had no area left.
    Raises InputError, a line that names file and entry, where files do not belong together.
    """

    def __init__(self, root, split, task, transform, crop=None, seed=0, classes=None):
        self.task, self.transform, self.crop, self.seed = task, transform, crop, seed
        self.kind = "panoptic" if task == "pan" else "instances"
        self.folder = os.path.join(root, f"{split}2017")
        self.path = os.path.join(root, "annotations", f"{self.kind}_{split}2017.json")
        instances = os.path.join(root, "annotations", f"instances_{split}2017.json")
        if task == "pan" and os.path.exists(instances) and not os.path.exists(self.path):
            raise InputError(f"{self.path}: not there, only {instances}, which --task det and --task inst read")
        for path in (root, self.folder, self.path):
            if not os.path.exists(path):
                raise InputError(f"{path}: not there; --data takes DIR with DIR/{split}2017/ and DIR/annotations/")
        if task == "pan":
            places = [self.path.removesuffix(".json"), os.path.join(root, f"panoptic_{split}2017")]
            self.maps = next((place for place in places if os.path.isdir(place)), None)
            if self.maps is None:
                raise InputError(f"{places[0]}: no such folder of panoptic PNGs, nor {places[1]}")
        content = self.read()
        categories = sorted(content["categories"], key=lambda category: category["id"])
        self.categories = [category["id"] for category in categories]
        self.classes = [category["name"] for category in categories]
        self.things = [bool(category.get("isthing", 1)) for category in categories]
        if classes is not None and self.classes != list(classes):
            raise InputError(f"{self.path}: its {len(self.classes)} categories are not the model's {len(classes)}")
        position = {number: i for i, number in enumerate(self.categories)}
        images = sorted(content["images"], key=lambda image: image["id"])
        sizes = {image["id"]: (image["height"], image["width"]) for image in images}
        entries, self.dropped = {number: [] for number in sizes}, 0
        if len(sizes) < len(images) or len(position) < len(categories):
            raise InputError(f"{self.path}: two images, or two categories, have the same id")
        self.check_files(images, "id", self.folder)
        if task == "pan":
            self.check_files(content["annotations"], "image_id", self.maps)
        for number, entry in enumerate(content["annotations"]):
            where = f"{self.path}: annotation {entry.get('id', entry.get('file_name', number))}"
            if entry["image_id"] not in entries:
                raise InputError(f"{where} is of image {entry['image_id']}, which is not in its table of images")
            for part in entry["segments_info"] if task == "pan" else [entry]:
                if part["category_id"] not in position:
                    raise InputError(f"{where} has category {part['category_id']}, which is not in its table")
            if task == "pan":
                entries[entry["image_id"]] = entry
                continue
            size = sizes[entry["image_id"]]
            box = clip_box(entry["bbox"], size, where)
            mask = check_mask(entry.get("segmentation"), size, where) if box and task == "inst" else None
            if box is None or mask == []:
                self.dropped += 1
            elif not entry.get("iscrowd", 0):
                entries[entry["image_id"]].append((position[entry["category_id"]], box, mask))
        if not any(entry["segments_info"] if task == "pan" else entry for entry in entries.values() if entry):
            raise InputError(f"{self.path}: no usable annotation in it")
        self.images = Packed([(image["file_name"], image["id"], sizes[image["id"]]) for image in images])
        self.entries = Packed([entries[image["id"]] for image in images])

    def read(self):
        """The content of the annotation file, with everything in it that COCO_ENTRIES names."""
        try:
            with open(self.path) as file:
                content = json.load(file)
        except (OSError, ValueError) as error:
            raise InputError(f"{self.path}: not a readable JSON file ({error})") from error
        tables = dict(images="images", categories="categories", annotations=self.kind)
        missing = [table for table in tables if not isinstance(content, dict) or not isinstance(content.get(table), list)]
        if missing:
            raise InputError(f"{self.path}: not in COCO's format, it has no {', '.join(missing)}")
        for table, kind in tables.items():
            for number, entry in enumerate(content[table]):
                check_entry(kind, entry, f"{self.path}: {table}[{number}]")
                for part in entry["segments_info"] if kind == "panoptic" else []:
                    check_entry("segments_info", part, f"{self.path}: a segment of {table}[{number}]")
        return content

    def check_files(self, entries, number, folder):
        there = set(os.listdir(folder))  # one listing: on a network drive, to ask for each of 118,000 takes minutes
        for entry in entries:
            name = entry["file_name"]
            if name not in there and not os.path.exists(os.path.join(folder, name)):  # in a folder of it
                raise InputError(f"{self.path}: image {entry[number]}, {name}, is not in {folder}")

    def coco(self):
        """The annotation file, crowds too, as pycocotools' evaluation takes it; what has no area nobody can find."""
        content = self.read()
        sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
        content["annotations"] = [e for e in content["annotations"] if clip_box(e["bbox"], sizes[e["image_id"]], self.path)]
        for number, entry in enumerate(content["annotations"], 1):
            entry["id"] = number  # for pycocotools, to be matched with annotation 0 is to be matched with none
            entry.setdefault("iscrowd", 0)  # users' own files often lack these two
            entry.setdefault("area", entry["bbox"][2] * entry["bbox"][3])
        return indexed(content)

    def segments(self, index):
        """The panoptic map of an image: ids, int64 (H, W), 0 where void, and a dictionary for each segment."""
        name, number, size = self.images[index]
        entry = self.entries[index]
        if not entry:
            raise InputError(f"{self.path}: image {number}, {name}, has no annotation")
        path = os.path.join(self.maps, entry["file_name"])
        rgb = np.asarray(load_image(path), np.int64)
        ids = rgb @ [1, 256, 256**2]  # (H, W)
        if ids.shape != size:
            raise InputError(f"{path}: {ids.shape[1]} x {ids.shape[0]} pixels, {name} has {size[1]} x {size[0]}")
        unknown = set(np.unique(ids).tolist()) - {0} - {segment["id"] for segment in entry["segments_info"]}
        if unknown:
            raise InputError(f"{path}: segment {min(unknown)} has no entry in {self.path}")
        return torch.from_numpy(ids), entry["segments_info"]

    def name(self, index):
        return os.path.join(self.folder, self.images[index][0])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        """key: (epoch, index).  See above."""
        epoch, index = key
        name, number, size = self.images[index]
        image = tv_tensors.Image(functional.pil_to_tensor(load_image(self.name(index))))
        if tuple(image.shape[-2:]) != size:
            found = f"{image.shape[2]} x {image.shape[1]}"
            raise InputError(f"{name}: {found} pixels, {self.path} says {size[1]} x {size[0]}")
        if self.crop is None:
            return as_pixels(self.transform(image)), dict(index=index, size=size)
        boxes = masks = None
        if self.task == "pan":
            ids, segments = self.segments(index)
            segments = [segment for segment in segments if not segment.get("iscrowd", 0)]
            labels = [self.categories.index(segment["category_id"]) for segment in segments]
            masks = ids == torch.tensor([segment["id"] for segment in segments]).view(-1, 1, 1)
        else:
            labels, boxes, shapes = zip(*self.entries[index]) if self.entries[index] else ([], [], [])
            boxes = box_tensor(boxes, size)
            if self.task == "inst":
                masks = torch.zeros(len(shapes), *size, dtype=torch.bool)
                for mask, shape in zip(masks, shapes):
                    try:
                        mask[:] = torch.from_numpy(decode_mask(shape, size)) > 0
                    except Exception as error:  # pycocotools raises just that
                        raise InputError(f"{self.path}: a mask of image {number}, {name}, is broken ({error})") from error
        with seeded(self.seed, epoch, index):
            return training_sample(image, labels, boxes, masks, self.transform, self.crop)


class Ade(Dataset):
    """ADE20K's layout (ADEChallengeData2016) with any number of classes, for sem:

    DIR/images/{training,validation}/*.jpg         DIR/annotations/{training,validation}/*.png, 0 where unlabelled
    DIR/objectInfo150.txt                          names, the last column after a tab; without it the classes are numbers
    """

    def __init__(self, root, split, transform, crop=None, seed=0, classes=None):
        self.transform, self.crop, self.seed = transform, crop, seed
        split = dict(train="training", val="validation")[split]
        self.folder, self.maps = os.path.join(root, "images", split), os.path.join(root, "annotations", split)
        for folder in (root, self.folder, self.maps):
            if not os.path.isdir(folder):
                raise InputError(f"{folder}: no such folder; --data takes DIR with DIR/images/ and DIR/annotations/")
        stems = {os.path.splitext(name)[0]: name for name in sorted(os.listdir(self.folder)) if is_image_file(name)}
        maps = set(os.listdir(self.maps))
        missing = [name for stem, name in stems.items() if stem + ".png" not in maps]
        if missing or not stems:
            what = f"no label map of {missing[0]}" if missing else "no images"
            raise InputError(f"{self.maps if missing else self.folder}: {what}")
        self.names = np.array([os.fsencode(name) for name in stems.values()])
        table = os.path.join(root, "objectInfo150.txt")
        if classes is not None:
            self.classes = list(classes)
        elif os.path.exists(table):
            with open(table) as file:
                self.classes = [line.rstrip("\n").split("\t")[-1].split(",")[0] for line in file][1:]
        else:
            maps = tqdm(range(len(self)), f"no {table}: counting classes", disable=None)
            self.classes = [str(i + 1) for i in range(max(map(self.highest, maps)))]
        if not any(map(self.highest, range(len(self)))):  # unless something is wrong, this looks at one map
            raise InputError(f"{self.maps}: not one labelled pixel in it")
        if not self.classes:
            raise InputError(f"{table}: no classes in it")
        self.things, self.categories = [False] * len(self.classes), list(range(1, len(self.classes) + 1))

    def read_map(self, index):
        path = os.path.join(self.maps, os.path.splitext(os.fsdecode(self.names[index]))[0] + ".png")
        with opened(path) as image:
            return path, torch.from_numpy(np.asarray(image).astype(np.int64))

    def highest(self, index):
        """The largest label of a map; 0 if it cannot be read, which is told when its turn comes."""
        with contextlib.suppress(InputError):
            return int(self.read_map(index)[1].max())
        return 0

    def label_map(self, index):
        """Classes of the pixels of an image, int64 (H, W), -1 where unlabelled."""
        path, labels = self.read_map(index)
        if labels.ndim != 2 or labels.max() > len(self.classes):
            what = f"label {int(labels.max())}" if labels.ndim == 2 else "colours"
            raise InputError(f"{path}: {what} in it, the data set has labels 0 to {len(self.classes)}")
        return labels - 1

    def name(self, index):
        return os.path.join(self.folder, os.fsdecode(self.names[index]))

    def __len__(self):
        return len(self.names)

    def __getitem__(self, key):
        """key: (epoch, index).  See above."""
        epoch, index = key
        path = self.name(index)
        image = tv_tensors.Image(functional.pil_to_tensor(load_image(path)))
        size = tuple(image.shape[-2:])
        labels = self.label_map(index)
        if tuple(labels.shape) != size:
            found = f"{labels.shape[1]} x {labels.shape[0]}"
            raise InputError(f"{path}: {size[1]} x {size[0]} pixels, its label map has {found}")
        if self.crop is None:
            return as_pixels(self.transform(image)), dict(index=index, size=size)
        present = labels.unique()
        present = present[present >= 0]
        with seeded(self.seed, epoch, index):
            masks = labels == present.view(-1, 1, 1)
            return training_sample(image, present.tolist(), None, masks, self.transform, self.crop)


# ---------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------
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
            yield from loader
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
                if count > min(max(10, length // 100), length - 1):
                    raise InputError(f"{count} of {length} training images are broken, the last: {error}") from error
                index = (index + 1) % length


def ignore_interrupts(worker):
    """For workers: Ctrl-C reaches every process of a terminal, but what becomes of them is for their parent to say."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def ignore_signals(worker):
    """For workers in training: they are needed until the step is finished, whoever asks to stop."""
    ignore_interrupts(worker)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # with which Python ends them, so that the parent has to close its loader


class GlobalBatches(Sampler):
    """For one process, the (epoch, index) keys of its part of every global batch, step after step.

    The order of an epoch is a permutation drawn from (seed, epoch); step s takes the next `batch_size` of it; the
    last, incomplete batch of an epoch is left out.  A global batch is cut into world_size * accumulate equal chunks
    in order, and this process takes `accumulate` of them, so that the images of step s are the same for any
    number of processes.  With `neighbour` every chunk is preceded by the sample before it in the global
    batch, with which `mix` mixes its first sample: it costs one more image a chunk, and no communication.
    """

    def __init__(
        self, length, batch_size, steps, seed=0, rank=0, world_size=1, accumulate=1, neighbour=False, first_step=0
    ):
        if batch_size % (world_size * accumulate):
            raise InputError(
                f"--batch-size {batch_size} is not divisible by {world_size} processes x --accumulate {accumulate}"
            )
        if batch_size > length:
            raise InputError(f"--batch-size {batch_size} is more than the {length} training images")
        self.length, self.batch_size, self.seed, self.neighbour = length, batch_size, seed, neighbour
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
                first = [batch[start - 1]] if self.neighbour else []  # -1: the batch is a ring, as in mix
                yield [(epoch, index) for index in first + batch[start : start + self.chunk]]


def collate(samples):
    """A batch of a dense data set: a list of images, which have sizes of their own, and a list of targets."""
    return [list(part) for part in zip(*samples)]


def mix(images, labels, num_classes, mixup, cutmix, seed, step):
    """Mixup or cutmix, half of the time each, of every sample with the one before it; drawn from (seed, step).

    images (1 + b, 3, H, W), labels (1 + b,): a chunk of GlobalBatches with its neighbour, which is dropped again.
    mixup, cutmix: the parameter of their Beta distributions, 0 for never.
    Returns images (b, 3, H, W) and targets (b, num_classes), rows summing to 1.
    """
    choices = [v2.MixUp(alpha=mixup, num_classes=num_classes)] if mixup else []
    choices += [v2.CutMix(alpha=cutmix, num_classes=num_classes)] if cutmix else []
    with seeded(seed, step):
        images, targets = v2.RandomChoice(choices)(images, labels)
    return images[1:], targets[1:]
