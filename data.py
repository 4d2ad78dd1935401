# SPDX-License-Identifier: MIT
"""Data sets and augmentation; this file knows nothing of models.

    shapes        drawn from (seed, epoch, index): no download, no files, every epoch new scenes; the default
    ImageFolder   DIR/train/<class>/*.jpg and DIR/val/<class>/*.jpg: ImageNet and anything else laid out like it

Nothing here depends on how many processes or workers read: a sample and its augmentation are a function of
(seed, epoch, index), the order of samples of (seed, epoch), mixup and cutmix of (seed, step).  A run can
therefore be repeated, split over more devices, or taken up in the middle, and sees the same images.
"""

import contextlib
import math
import os

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset, Sampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2

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


class Shapes(Dataset):
    """Scenes drawn from (seed, epoch, index); validation scenes do not depend on the seed, nor on the epoch."""

    classes = list(THINGS)

    def __init__(self, length, size, seed, split):
        self.length, self.size, self.seed, self.split = length, size, seed, split

    def __len__(self):
        return self.length

    def __getitem__(self, key):
        """key: (epoch, index).  Returns the image, float32 (3, size, size) in [0, 1], and its label, an int."""
        rng = np.random.default_rng((0, self.seed, *key) if self.split == "train" else (1, key[1]))
        things, label = dominant_thing(rng)
        image, _ = draw_scene(rng, self.size, things)
        return torch.from_numpy(image).float() / 255, label


# ---------------------------------------------------------------------------------------------------------------
# Folders of images
# ---------------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def seeded(*numbers):
    """Inside, torch's CPU random numbers are a function of the numbers; outside, nothing has changed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))
        yield


def load_image(path):
    """The image as PIL RGB, upright: grey, palette, CMYK, 16-bit and EXIF-rotated files included."""
    try:
        with Image.open(path) as image:
            ImageOps.exif_transpose(image, in_place=True)  # not in place, it copies the pixels of every image
            if image.mode.startswith("I"):  # 16 bits of grey, which convert() would clip at 255 instead of scaling
                image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
            if "transparency" in image.info:
                image = image.convert("RGBA")
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # what PIL raises for files that are no images, or half of one
        raise InputError(f"{path}: cannot be read as an image ({error}); replace or remove it") from error


def train_transform(size, randaugment, erasing):
    """PIL RGB -> float32 (3, size, size) in [0, 1].  randaugment: magnitude, 0 (none) to 30.  erasing: probability."""
    steps = [v2.RandomResizedCrop(size, interpolation=InterpolationMode.BICUBIC), v2.RandomHorizontalFlip()]
    if randaugment:
        fill = [round(255 * value) for value in MEAN_COLOUR]
        steps.append(v2.RandAugment(2, randaugment, interpolation=InterpolationMode.BILINEAR, fill=fill))
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

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        """key: (epoch, index).  Returns the image, float32 (3, size, size) in [0, 1], and its label, an int."""
        image = load_image(os.fsdecode(self.paths[key[1]]))
        with seeded(self.seed, *key):
            return self.transform(image), int(self.labels[key[1]])


# ---------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------
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
