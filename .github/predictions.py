# SPDX-License-Identifier: MIT
"""Draw .github/predictions.png: what the default runs of the five tasks predict on held-out scenes.

    python .github/predictions.py runs/cls/last.pt runs/det/last.pt runs/inst/last.pt runs/sem/last.pt runs/pan/last.pt

For the dense tasks it is the first scene with five things or more, no two of one class.  In all panels, a region has
the color of the thing, or of the background, that it covers best.
"""

import itertools
import sys
from pathlib import Path

import torch
from torch.nn.functional import interpolate
from torchvision.ops import box_iou, masks_to_boxes

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import THINGS, as_float, make_dataset  # noqa: E402
from eval import COLORS, load_checkpoint, panel_of, prediction_panels, regions_of, sheet  # noqa: E402

SIDE = 288  # three times an image's: three panels are as wide as the README, and captions keep their size
PALE = [(200, 200, 200), (170, 190, 215), (220, 200, 165), (195, 175, 200), (175, 205, 180)]  # of backgrounds


def chosen_scene():
    """Its index, the masks of what is there (n, SIDE, SIDE), and a color for each."""
    scenes = make_dataset("pan", None, "val", 96)
    for index in itertools.count():
        labels, masks = zip(*scenes.scene(0, index)[1])
        things = [label for label in labels if label < len(THINGS)]
        if len(things) == len(set(things)) >= 5:
            break
    masks = torch.stack([torch.from_numpy(mask) for mask in masks]).float()
    colors = [COLORS[i] if i < len(things) else PALE[i - len(things)] for i in range(len(labels))]
    return index, interpolate(masks[None], (SIDE, SIDE))[0] > 0.5, colors


def panels(path, index, truth, colors):
    """The scene and the prediction of a checkpoint, each as (title, picture)."""
    model, checkpoint = load_checkpoint(path)
    dataset = make_dataset(model.task, None, "val", checkpoint["settings"]["image_size"])
    image = as_float(dataset[0, 0 if model.task == "cls" else index][0])
    panel = panel_of(image, SIDE)
    (prediction,) = model.predict([image], [panel.shape[1:]])
    _, masks, boxes = regions_of(prediction, dataset.classes)
    if masks is not None:
        shared = (masks[:, None] & truth).sum((2, 3))
        overlap = shared / (masks[:, None] | truth).sum((2, 3))
    elif boxes is not None:
        overlap = box_iou(boxes, masks_to_boxes(truth).float())
    own = None if model.task == "cls" else [colors[i] for i in overlap.argmax(1)]
    *scene, (title, picture) = prediction_panels(prediction, dataset.classes, panel, own)
    title = ", ".join(f"{model.task}: {title}".split(", ")[:2])  # cls: the two likeliest classes
    return [("a scene for the other tasks", panel) for _, panel in scene], (title, picture)


if __name__ == "__main__":
    scene = chosen_scene()
    (_, cls), ((image,), det), *others = (panels(path, *scene) for path in sys.argv[1:])
    sheet([[cls, image, det], [picture for _, picture in others]]).save(Path(__file__).with_suffix(".png"))
