# SPDX-License-Identifier: MIT
"""Measure speed and memory of an untrained model; for cls, also of torchvision's Swin and ConvNeXt.

    python .github/benchmark.py --task cls --variant tiny --image-size 224 --batch-size 128 --compile
    python .github/benchmark.py --task inst --variant tiny --image-size 800 1344 --batch-size 1

It prints a Markdown table.  Its columns are parameters, GMACs of a forward pass on one image, images
per second of a forward pass and of a training step (forward, losses, backward, optimizer), and the
peak memory that each of the two adds.
"""

import argparse
import math
import multiprocessing
import os
import statistics
import sys
import time

import torch
import torch.nn.functional as F
import torchvision
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import box_convert, masks_to_boxes
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from clusterformer import VARIANTS, ClusterFormer
from data import InputError, in_one_line, make_dataset, start_processes

CLASSES = dict(cls=1000, det=80, inst=80, sem=150, pan=133)  # of ImageNet-1K, COCO and ADE20K


def peers(variant):
    """Names of torchvision's classifiers of about the same size."""
    return ("swin_s", "convnext_small") if variant == "small" else ("swin_t", "convnext_tiny")


def build(name):
    """An untrained model.  name: "VARIANT TASK" of ClusterFormer, or a classifier of torchvision."""
    if " " not in name:
        return torchvision.models.get_model(name)
    variant, task = name.split()
    return ClusterFormer(task, variant, CLASSES[task])


def usual_targets(model, images):
    """Labels for cls; for the dense tasks seven rectangles per image, as many as COCO has objects."""
    n, (height, width) = len(images), images.shape[-2:]
    if getattr(model, "task", "cls") == "cls":
        return torch.zeros(n, dtype=torch.int64, device=images.device)
    masks = torch.zeros(7, height, width, dtype=torch.bool, device=images.device)
    for i, mask in enumerate(masks):
        mask[i * height // 9 : (i + 3) * height // 9, i * width // 9 : (i + 3) * width // 9] = True
    boxes = masks_to_boxes(masks) / torch.tensor([width, height] * 2, device=images.device)
    labels = torch.arange(7, device=images.device)
    return [dict(labels=labels, boxes=box_convert(boxes, "xyxy", "cxcywh"), masks=masks)] * n


def work(model, images, optimizer=None):
    """What is measured: a forward pass or, with an optimizer, a training step.  On a GPU in bfloat16."""
    model.train(optimizer is not None)
    with torch.set_grad_enabled(optimizer is not None):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            output = model(images)
        if optimizer:
            targets = usual_targets(model, images)
            if isinstance(output, dict):
                loss = sum(model.loss(output, targets).values()) / model.count(targets)
            else:
                loss = F.cross_entropy(output.float(), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    if images.is_cuda:
        torch.cuda.synchronize()


def resident_peak(process="self"):
    """Peak resident memory of a process in bytes, as counted by the kernel (Linux)."""
    with open(f"/proc/{process}/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def peak_memory(name, training, shape, device):
    """Peak memory in bytes that a model, its optimizer and two runs of work() add.

    On a CPU, call it in a fresh process: it measures the whole process.  It returns nan on a CPU
    outside of Linux.
    """
    on_cpu = device.type == "cpu"
    if on_cpu and sys.platform != "linux":
        return math.nan
    if on_cpu:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # reset the peak, which would include the imports
    else:
        torch.cuda.reset_peak_memory_stats()
    before = resident_peak() if on_cpu else torch.cuda.memory_allocated()
    model, images = build(name).to(device), torch.rand(shape, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True) if training else None
    for _ in range(2):
        work(model, images, optimizer)
    return (resident_peak() if on_cpu else torch.cuda.max_memory_allocated()) - before


def in_a_process(function, *arguments):
    """Return function(*arguments), called in a fresh process, whose memory holds only the imports."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def benchmark(variant, task, image_size, batch_size, device, compiled=None, rounds=9):
    """Measure a variant and, for cls, its peers.  Returns a dictionary per model.

    image_size: (height, width).  compiled: a mode of torch.compile, to measure compiled models, too.
    In each round, every model is timed once.  The load of a machine changes between rounds, so each
    ratio to the first model is taken within a round, and the median over the rounds is returned.
    """
    names = (*(peers(variant) if task == "cls" else ()), f"{variant} {task}")
    shape = (batch_size, 3, *image_size)
    images = torch.rand(shape, device=device)
    rows, runs, times = [], {}, {}
    for name in names:
        model = build(name).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, *shape[1:]))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        memory = []
        for training in (False, True):
            arguments = name, training, shape, device
            on_cpu = device.type == "cpu"
            memory.append(in_a_process(peak_memory, *arguments) if on_cpu else peak_memory(*arguments))
        macs = counter.get_total_flops() // 2
        rows.append(dict(model=name, parameters=parameters, macs=macs, memory=memory))
        model = model.to(device)
        for mode in ["eager", compiled] if compiled else ["eager"]:
            runner = model if mode == "eager" else torch.compile(model, mode=mode)
            runs[name, mode, "forward"] = (runner, images)
            optimizer = torch.optim.AdamW(model.parameters(), fused=True)
            runs[name, mode, "training"] = (runner, images, optimizer)
    for run in tqdm(runs.values(), "warm up", leave=False, disable=None):
        work(*run)
        work(*run)
    repeats = 3 if device.type == "cuda" else 1
    for _ in tqdm(range(rounds), "rounds", leave=False, disable=None):
        for key, run in runs.items():
            start = time.perf_counter()
            for _ in range(repeats):
                work(*run)
            times.setdefault(key, []).append((time.perf_counter() - start) / repeats)
    for row in rows:
        for name, mode, kind in runs:
            if name == row["model"]:
                own, peer = times[name, mode, kind], times[names[0], mode, kind]
                row[f"{mode} {kind}"] = dict(
                    images_per_second=batch_size / statistics.median(own),
                    ratio=statistics.median(theirs / ours for theirs, ours in zip(peer, own)),
                )
    return rows


def loading_speed(data, image_size, images=300):
    """Images per second that one core reads from DIR/train/ and augments by the ImageNet recipe."""
    dataset = make_dataset("cls", data, "train", image_size, least=0.08, randaugment=27, erasing=0.25)
    torch.set_num_threads(1)  # as in a loader process
    start = time.process_time()  # seconds of CPU time, independent of other load
    for key in tqdm(range(images), "loading", leave=False, disable=None):
        dataset[key // len(dataset), key % len(dataset)]
    return images / (time.process_time() - start)


def print_benchmark(rows):
    """Print the rows of benchmark() as a Markdown table, with ratios to the first row."""
    speeds = [key for key in rows[0] if " " in key]
    titles = ["", "M parameters", "GMACs", *(f"{speed} /s" for speed in speeds)]
    table = [[*titles, "forward MiB", "training MiB"]]
    for row in rows:
        cells = [row["model"], f"{row['parameters'] / 1e6:.1f}", f"{row['macs'] / 1e9:.2f}"]
        timed = [row[speed] for speed in speeds]
        cells += [f"{x['images_per_second']:.4g} ({x['ratio']:.2f}x)" for x in timed]
        memory = zip(row["memory"], rows[0]["memory"])
        cells += [f"{own / 2**20:.0f} ({own / peer:.2f}x)" for own, peer in memory]
        table.append(cells)
    table.insert(1, ["---"] * len(table[0]))
    widths = [max(map(len, column)) for column in zip(*table)]
    for cells in table:
        print("|", " | ".join(cell.rjust(width) for cell, width in zip(cells, widths)), "|")


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    task = "task of the model (default: cls)"
    parser.add_argument("--task", choices=CLASSES, default="cls", help=task)
    variant = "size of the model (default: tiny)"
    parser.add_argument("--variant", choices=VARIANTS, default="tiny", help=variant)
    size = "one side, or height and width, in pixels, multiples of 32 (default: 224, dense tasks 512)"
    parser.add_argument("--image-size", type=int, nargs="+", help=size)
    batch_size = "images per step (default: cls 128, on a CPU 8; dense tasks 16, on a CPU 1)"
    parser.add_argument("--batch-size", type=int, help=batch_size)
    compiled = "also measure compiled models, reduce-overhead: with CUDA graphs; takes minutes to start"
    parser.add_argument("--compile", nargs="?", const="default", choices=["default", "reduce-overhead"], help=compiled)
    data = "also measure how fast DIR/train/<class>/ loads (default: not measured)"
    parser.add_argument("--data", metavar="DIR", help=data)
    args = parser.parse_args()
    sides = args.image_size or [224 if args.task == "cls" else 512]
    if len(sides) > 2 or min(sides) < 32 or any(side % 32 for side in sides):
        raise InputError("--image-size takes one or two multiples of 32")
    if args.batch_size is not None and args.batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, got {args.batch_size}")
    _, world_size, device = start_processes()
    if world_size > 1:
        raise InputError("the benchmark measures one device; start it without torchrun")
    default = 128 if device.type == "cuda" else 8
    batch_size = args.batch_size or (default if args.task == "cls" else default // 8)
    height, width = sides[0], sides[-1]
    where = f"{torch.get_num_threads()} CPU threads"
    if device.type == "cuda":
        where = torch.cuda.get_device_name()
    print(f"{batch_size} images of {height} x {width} on {where}, torch {torch.__version__}\n")
    rows = benchmark(args.variant, args.task, (height, width), batch_size, device, args.compile)
    print_benchmark(rows)
    if args.data:
        loaded = loading_speed(args.data, height)
        cores = rows[-1]["eager training"]["images_per_second"] / loaded
        speed = f"one core loads {loaded:.0f} training images/s from {args.data}"
        print(f"\n{speed}; the training step needs {cores:.2g} such cores")


if __name__ == "__main__":
    in_one_line(main)
