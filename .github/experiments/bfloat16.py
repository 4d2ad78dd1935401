# SPDX-License-Identifier: MIT
"""How far logits and gradients in bfloat16 are from those in float32, with the weights in the repository.

    python .github/experiments/bfloat16.py DIR [SCALE ...]

DIR: Imagenette's class folders.  SCALE: that all heads of all clusterings are given; without it, their own.
It prints relative L2 distances over 100 validation images of 192 x 192, under autocast on a CPU.
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import make_dataset  # noqa: E402
from eval import load_checkpoint  # noqa: E402

model, checkpoint = load_checkpoint(str(Path(__file__).resolve().parents[1] / "nano-imagenette.pt"))
dataset = make_dataset("cls", sys.argv[1], "val", 192, classes=checkpoint["classes"])
indices = range(0, len(dataset), len(dataset) // 100)[:100]
images = torch.stack([dataset[0, i][0] for i in indices]).float() / 255
labels = torch.from_numpy(dataset.labels)[list(indices)]


def logits_and_gradients(rough):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=rough):
        logits = model(images)["logits"]
    F.cross_entropy(logits, labels).backward()
    return logits.detach(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


for scale in [None, *map(float, sys.argv[2:])]:
    for name, parameter in model.named_parameters():
        if scale and name.endswith("log_scale"):
            parameter.data.fill_(math.log(scale) - 1e-3)  # below its limit, where it has a gradient
    pairs = zip(logits_and_gradients(False), logits_and_gradients(True))
    logits, gradients = (((exact - rough).norm() / exact.norm()).item() for exact, rough in pairs)
    print(f"scale {scale or 'as trained'}: logits {100 * logits:.2f} %, gradients {100 * gradients:.1f} %", flush=True)
