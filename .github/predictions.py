# SPDX-License-Identifier: MIT
"""Draw .github/predictions.png: what the default runs of the five tasks predict on the first held-out scene.

    python .github/predictions.py runs/cls/last.pt runs/det/last.pt runs/inst/last.pt runs/sem/last.pt runs/pan/last.pt
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import as_float, make_dataset  # noqa: E402
from eval import load_checkpoint, panel_of, prediction_panels, sheet  # noqa: E402


def panels(path):
    """The scene and the prediction of a checkpoint, each as (title, picture)."""
    model, checkpoint = load_checkpoint(path)
    dataset = make_dataset(model.task, None, "val", checkpoint["settings"]["image_size"])
    image = as_float(dataset[0, 0][0])
    panel = panel_of(image, 560)
    (prediction,) = model.predict([image], [panel.shape[1:]])
    *scene, (title, picture) = prediction_panels(prediction, dataset.classes, panel)
    return [("a scene for the other tasks", picture) for _, picture in scene], (f"{model.task}: {title}", picture)


if __name__ == "__main__":
    (_, cls), ((scene,), det), *others = map(panels, sys.argv[1:])
    rows = [[cls, scene, det], [picture for _, picture in others]]
    whole = sheet(rows)
    whole.resize((whole.width * 3 // 4, whole.height * 3 // 4)).save(Path(__file__).with_suffix(".png"))
