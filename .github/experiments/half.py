# SPDX-License-Identifier: MIT
"""Save the averaged weights of a checkpoint in half precision, without optimizer and log.

    python .github/experiments/half.py runs/imagenette/last.pt .github/nano-imagenette.pt
"""

import sys

import torch

checkpoint = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
weights = {name: value.half() for name, value in checkpoint["ema"].items()}
kept = {key: checkpoint[key] for key in ("version", "arguments", "classes", "settings")}
torch.save(kept | dict(model=weights, ema=weights), sys.argv[2])
