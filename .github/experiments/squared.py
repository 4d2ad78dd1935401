# SPDX-License-Identifier: MIT
"""Does it help to evaluate on squares, as training sees them, instead of images as they are?

    python .github/experiments/squared.py runs/people/last.pt

Prints the metrics of eval.py, and those with every image padded to a square at the bottom and right.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from eval import describe, evaluate, load_checkpoint, validation_set  # noqa: E402


class Squared(torch.nn.Module):
    """A model of det or inst whose predictions are made on squares."""

    def __init__(self, model):
        super().__init__()
        self.model, self.task = model, model.task

    @torch.no_grad()
    def predict(self, images, sizes):
        found, (stride, *_, coarsest), color = [], self.model.backbone.strides, self.model.backbone.mean
        for image, size in zip(images, sizes):
            height, width = (-(-side // coarsest) * coarsest for side in image.shape[1:])  # as predict pads
            square = color.repeat(1, 1, max(height, width), max(height, width))
            square[:, :, : image.shape[1], : image.shape[2]] = image
            output = self.model(square)
            output["boxes"] = output["boxes"] * max(height, width) / torch.tensor([width, height] * 2)
            if "masks" in output:
                output["masks"] = output["masks"][:, :, : height // stride, : width // stride]
            found += self.model.head.predict(output, tuple(image.shape[1:]), [size])
        return found


if __name__ == "__main__":
    model, checkpoint = load_checkpoint(sys.argv[1])
    settings = checkpoint["settings"]
    dataset = validation_set(settings["data"], settings["test_size"], model.task, checkpoint["classes"])
    for name, variant in (("plain", model), ("squared", Squared(model))):
        metrics = evaluate(variant, dataset, torch.device("cpu"), batch_size=1)
        print(f"{name}: {describe(metrics, model.task)}")
