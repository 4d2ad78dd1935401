# SPDX-License-Identifier: MIT
"""Draw .github/predictions.png: what the default runs of the five tasks predict on the first held-out scene.

    python .github/predictions.py runs/cls/last.pt runs/det/last.pt runs/inst/last.pt runs/sem/last.pt runs/pan/last.pt
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import as_float  # noqa: E402
from eval import findings, load_checkpoint, prediction_panels, sheet, validation_set  # noqa: E402


def panels(path):
    """The scene and the prediction of a checkpoint, each as (title, picture)."""
    model, checkpoint = load_checkpoint(path)
    dataset = validation_set(None, checkpoint["settings"]["image_size"], model.task)
    image = as_float(dataset[0, 0][0])
    found = findings(model.predict([image])[0], dataset.classes)
    (_, scene), (_, picture) = prediction_panels(found, dataset.classes, model.task, image, image.shape[1:])
    return ("a scene for the other tasks", scene), (model.task, picture)


if __name__ == "__main__":
    (_, cls), (scene, det), *others = map(panels, sys.argv[1:])
    rows = [[cls, scene, det], [picture for _, picture in others]]
    whole = sheet(rows)
    whole.resize((whole.width * 3 // 4, whole.height * 3 // 4)).save(Path(__file__).with_suffix(".png"))
