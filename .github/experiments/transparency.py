# SPDX-License-Identifier: MIT
"""Do clusters and explanations of a classifier of shapes follow the thing in the image?

    python .github/experiments/transparency.py runs/cls/last.pt

On 300 held-out scenes.  Clusters, per block: each cluster is given to the thing or to the background,
whichever holds more of its pixels; the part of the pixels that is then right; and the same for as many grid
cells.  Explanation: of the positive contributions of tokens to the logit of the right class, less the mean of
all logits, the part on tokens that the thing covers by a quarter or more; beside it, the part of the image that
these tokens are; and how often the strongest token is one of them.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from clusterformer import trace  # noqa: E402
from data import Shapes, as_float, dominant_thing, draw_scene  # noqa: E402
from eval import enlarge, explain, grid_assignment, load_checkpoint  # noqa: E402

SCENES = 300


def draw(index, size):
    """A held-out scene: image, float (3, size, size), mask of the large thing, and its class."""
    image, label = Shapes(SCENES, size, 0, "val")[0, index]
    rng = np.random.default_rng((1, index))  # as Shapes draws it
    things, _ = dominant_thing(rng)
    again, segments = draw_scene(rng, size, things)
    assert (again == image.numpy()).all()
    large = max(range(len(things)), key=lambda i: things[i][1])
    return as_float(image), torch.from_numpy(segments == large), label


def achievable(regions, mask):
    """Accuracy if each region (H, W) is given to the side of the mask that holds more of it."""
    total, thing = regions.flatten().bincount(), regions[mask].bincount(minlength=int(regions.max()) + 1)
    return torch.maximum(thing, total - thing).sum().item() / mask.numel()


def main(path):
    model, checkpoint = load_checkpoint(path)
    size, strides = checkpoint["settings"]["image_size"], model.backbone.strides
    clusters, evidence = {}, []
    for index in range(SCENES):
        image, mask, label = draw(index, size)
        blocks = trace(model, model.pad(image[None]))[:-1]  # the last one is the head's
        for block in blocks:
            stride = strides[int(block["name"].split(".")[2])]
            regions = [x.argmax(0).view(block["size"]) for x in (
                block["assignments"][-1][0].mean(0), grid_assignment(*block["size"])
            )]
            row = [achievable(enlarge(x, stride, image, mask[None]), mask) for x in regions]
            clusters.setdefault(block["name"], []).append([*row, len(regions[0].unique())])
        _, _, maps = explain(model, image, torch.eye(model.num_classes)[label] - 1 / model.num_classes)
        tokens, stride = maps.sum(0), strides[-1]
        whole = F.pad(mask.float()[None], (0, -size % stride, 0, -size % stride))
        on = F.avg_pool2d(whole, stride)[0] >= 0.25
        positive = tokens.clamp(min=0)
        part = positive[on].sum() / positive.sum().clamp(min=1e-9)  # 0 if nothing speaks for the class
        evidence.append([part.item(), on.float().mean().item(), on.flatten()[tokens.argmax()].item()])
    for name, rows in clusters.items():
        right, grid, used = np.mean(rows, 0)
        print(f"{name}: clusters {right:.3f}, grid cells {grid:.3f}; {used:.0f} clusters in use")
    part, area, hit = np.mean(evidence, 0)
    print(f"explanation: {part:.3f} on the thing, whose tokens are {area:.3f} of the image; strongest token {hit:.3f}")


if __name__ == "__main__":
    main(sys.argv[1])
