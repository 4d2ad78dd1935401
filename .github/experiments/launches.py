# SPDX-License-Identifier: MIT
"""Does a training step of cls wait for the processor, which launches kernels, or for the GPU, which runs them?

    python .github/experiments/launches.py                  nano on 64 images of 48 x 48, Tiny on 128 of 224 x 224
"""

import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from clusterformer import ClusterFormer  # noqa: E402

torch.set_float32_matmul_precision("high")  # as in eval.py
for variant, patch_size, batch_size, image_size in ("nano", 2, 64, 48), ("tiny", 4, 128, 224):
    model = ClusterFormer("cls", variant, num_classes=10, patch_size=patch_size).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images = torch.rand(batch_size, 3, image_size, image_size, device="cuda")
    labels = torch.arange(batch_size, device="cuda") % 10

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            output = model(images)
        model.loss(output, labels)["label"].backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(5):
        step()
    torch.cuda.synchronize()
    start = time.time()
    for _ in range(10):
        step()
    torch.cuda.synchronize()
    print(f"{variant}: {100 * (time.time() - start):.1f} ms a step; the GPU works for the time in the last line of the table")
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    print(recorded.key_averages().table(sort_by="self_cuda_time_total", row_limit=30, max_name_column_width=80))
