# SPDX-License-Identifier: MIT
"""Two small sets of photographs to try the recipe for small data on: shapes, filled with photographs.

    python .github/experiments/pasted.py IMAGENETTE OUT
    torchrun --nproc_per_node=2 train.py --task inst --data OUT/objects --init runs/inst/last.pt --out runs/objects
    torchrun --nproc_per_node=2 train.py --task sem --data OUT/labels --init runs/sem/last.pt --out runs/labels

300 training and 60 validation images of 288 x 288.  OUT/objects: photographs, in which shapes cut from other
photographs lie: COCO's layout, 8 classes; a class shows in the outline only.  OUT/labels: scenes whose things are
filled in the same way, and whose stuff is not: ADE20K's layout, 12 classes, and 16 % void.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as rle

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import THINGS, Shapes  # noqa: E402

SIZE, CLASSES = 288, 12


def photograph(paths, rng):
    with Image.open(paths[rng.integers(len(paths))]) as image:
        return np.asarray(image.convert("RGB").resize((SIZE, SIZE)))


def annotation(number, image, label, mask):
    """A thing as COCO describes it.  mask: bool (SIZE, SIZE), what is visible of it."""
    code = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    text = dict(size=code["size"], counts=code["counts"].decode())
    box, area = rle.toBbox(code).tolist(), int(mask.sum())
    ids = dict(id=number, image_id=image, category_id=label + 1)
    return ids | dict(iscrowd=0, bbox=box, area=area, segmentation=text)


def write(split, count, objects, labels, paths):
    """One split of both sets.  objects, labels: their folders."""
    year, part = f"{split}2017", dict(train="training", val="validation")[split]
    folders = [objects / year, objects / "annotations", labels / "images" / part, labels / "annotations" / part]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for i in range(count):
        rng = np.random.default_rng((5, split == "val", i))
        scene, shown, _ = Shapes(count, SIZE, 7, split, "pan").scene(0, i)
        scene, pasted = scene.transpose(1, 2, 0).copy(), photograph(paths, rng).copy()
        classes = np.zeros((SIZE, SIZE), np.uint8)
        for label, mask in shown:
            classes[mask] = label + 1 if label < CLASSES else 255  # the last kind of stuff is void
            if label < len(THINGS):
                filling = photograph(paths, rng)
                pasted[mask], scene[mask] = filling[mask], filling[mask]
                annotations.append(annotation(len(annotations) + 1, i, label, mask))
        images.append(dict(id=i, width=SIZE, height=SIZE, file_name=f"{i:04d}.jpg"))
        Image.fromarray(pasted).save(folders[0] / f"{i:04d}.jpg", quality=92)
        Image.fromarray(scene).save(folders[2] / f"{i:04d}.jpg", quality=92)
        Image.fromarray(classes).save(folders[3] / f"{i:04d}.png")
    categories = [dict(id=k + 1, name=name) for k, name in enumerate(THINGS)]
    table = dict(images=images, annotations=annotations, categories=categories)
    (folders[1] / f"instances_{year}.json").write_text(json.dumps(table))


if __name__ == "__main__":
    source, out = map(Path, sys.argv[1:])
    paths = sorted(source.glob("train/*/*"))
    for split, count in dict(train=300, val=60).items():
        write(split, count, out / "objects", out / "labels", paths)
