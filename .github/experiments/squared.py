# SPDX-License-Identifier: MIT
"""Is it worth its time to predict on squares, as training sees them, and not on images as they are?

    python .github/experiments/squared.py runs/people/last.pt

Prints the metrics of eval.py, and those with images padded to multiples of the last stride only.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import make_dataset  # noqa: E402
from eval import describe, evaluate, load_checkpoint  # noqa: E402


class Plain(torch.nn.Module):
    """A model of det or inst whose predictions are made on images that are no squares."""

    def __init__(self, model):
        super().__init__()
        self.model, self.task = model, model.task

    @torch.no_grad()
    def predict(self, images, sizes):
        found, backbone = [], self.model.backbone
        for image, size in zip(images, sizes):
            height, width = (-(-side // backbone.strides[-1]) * backbone.strides[-1] for side in image.shape[1:])
            padded = backbone.mean.repeat(1, 1, height, width)
            padded[:, :, : image.shape[1], : image.shape[2]] = image
            output = self.model(padded)
            output["boxes"] = output["boxes"] * torch.tensor([width, height] * 2) / max(height, width)  # of the square
            found += self.model.head.predict(output, tuple(image.shape[1:]), [size])
        return found


if __name__ == "__main__":
    model, checkpoint = load_checkpoint(sys.argv[1])
    settings = checkpoint["settings"]
    dataset = make_dataset(model.task, settings["data"], "val", settings["test_size"], classes=checkpoint["classes"])
    for name, variant in (("squared", model), ("plain", Plain(model))):
        metrics, _ = evaluate(variant, dataset, torch.device("cpu"), batch_size=1)
        print(f"{name}: {describe(metrics, model.task)}")
