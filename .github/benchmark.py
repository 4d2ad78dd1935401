# SPDX-License-Identifier: MIT
"""Measure speed and memory of a model with fresh weights, for cls beside torchvision's Swin and ConvNeXt.

    python .github/benchmark.py --task cls --variant tiny --image-size 224 --batch-size 128 --compile
    python .github/benchmark.py --task inst --variant tiny --image-size 800 1333 --batch-size 1

It prints a table in Markdown: parameters, GMACs of a forward pass of one image, images a second of a forward pass and of a
training step (forward, losses, backward, optimizer), and what a forward pass and a training step add to the memory at its peak.
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
from data import Folder, InputError, train_transform
from eval import PAPER_CLASSES, run, start_processes


def peers(variant):
    """Classifiers of torchvision of about the same size."""
    return ("swin_s", "convnext_small") if variant == "small" else ("swin_t", "convnext_tiny")


def build(name):
    """A model with fresh weights: "VARIANT TASK" of ClusterFormer, or torchvision's classifier of that name."""
    variant, *task = name.split()
    return ClusterFormer(*task, variant, PAPER_CLASSES[task[0]]) if task else torchvision.models.get_model(name)


def usual_targets(model, images):
    """Labels for cls; for the dense tasks seven rectangles an image, as many objects as COCO has on average."""
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
    """What is measured: a forward pass or, with an optimizer, a training step; in bfloat16 on a GPU, as in train.py."""
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
    """The most bytes that a process had in memory at once, from the kernel's count of resident pages."""
    with open(f"/proc/{process}/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def peak_memory(name, training, shape, device):
    """Bytes that a model, its optimizer and its work add at the peak; on a CPU, to a process of its own.

    Of a CPU it is known on Linux only; elsewhere nan.
    """
    on_cpu = device.type == "cpu"
    if on_cpu and sys.platform != "linux":
        return math.nan
    if on_cpu:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak counts from here, not from the imports
    else:
        torch.cuda.reset_peak_memory_stats()
    before = resident_peak() if on_cpu else torch.cuda.memory_allocated()
    model, images = build(name).to(device), torch.rand(shape, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True) if training else None
    for _ in range(2):
        work(model, images, optimizer)
    return (resident_peak() if on_cpu else torch.cuda.max_memory_allocated()) - before


def in_a_process(function, *arguments):
    """function(*arguments), in a fresh process: its count of memory starts from what the imports take."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def benchmark(variant, task, image_size, batch_size, device, compiled=False, rounds=9):
    """Measures a variant, for cls beside its peers of torchvision.  Returns a list of rows, dictionaries; the first is 1 x.

    image_size: (height, width).

    The models take turns, round after round, since other work on a machine comes and goes: a ratio is the median over
    the rounds of the ratios within a round.
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
            each = name, training, shape, device
            memory.append(in_a_process(peak_memory, *each) if device.type == "cpu" else peak_memory(*each))
        rows.append(dict(model=name, parameters=parameters, macs=counter.get_total_flops() // 2, memory=memory))
        model = model.to(device)
        for mode in ["eager", "compiled"][: 1 + compiled]:
            runner = torch.compile(model) if mode == "compiled" else model
            runs[name, mode, "forward"] = (runner, images)
            runs[name, mode, "training"] = (runner, images, torch.optim.AdamW(model.parameters(), fused=True))
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
    """Images a second that one core reads and augments for training, as in the ImageNet recipe, from DIR/train/."""
    dataset = Folder(data, "train", train_transform(image_size, randaugment=27, erasing=0.25))
    torch.set_num_threads(1)  # as in a loader process
    start = time.process_time()  # the seconds of a core, whatever else the machine does
    for key in tqdm(range(images), "loading", leave=False, disable=None):
        dataset[key // len(dataset), key % len(dataset)]
    return images / (time.process_time() - start)


def print_benchmark(rows):
    """The rows of benchmark() as a table in Markdown; x is times the first row."""
    speeds = [key for key in rows[0] if " " in key]
    table = [["", "M parameters", "GMACs", *(f"{speed} /s" for speed in speeds), "forward MiB", "training MiB"]]
    for row in rows:
        cells = [row["model"], f"{row['parameters'] / 1e6:.1f}", f"{row['macs'] / 1e9:.2f}"]
        cells += [f"{row[speed]['images_per_second']:.4g} ({row[speed]['ratio']:.2f}x)" for speed in speeds]
        cells += [f"{own / 2**20:.0f} ({own / peer:.2f}x)" for own, peer in zip(row["memory"], rows[0]["memory"])]
        table.append(cells)
    table.insert(1, ["---"] * len(table[0]))
    widths = [max(map(len, column)) for column in zip(*table)]
    for cells in table:
        print("|", " | ".join(cell.rjust(width) for cell, width in zip(cells, widths)), "|")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=PAPER_CLASSES, default="cls", help="model to measure (default: cls)")
    parser.add_argument("--variant", choices=VARIANTS, default="tiny", help="size of the model (default: tiny)")
    size = "a side, or height and width, in pixels (default: 224, dense tasks 512)"
    parser.add_argument("--image-size", type=int, nargs="+", help=size)
    batch_size = "images per step (default: cls 128, on a CPU 8; dense tasks 16, on a CPU 1)"
    parser.add_argument("--batch-size", type=int, help=batch_size)
    parser.add_argument("--compile", action="store_true", help="measure compiled models, too; takes minutes to start")
    parser.add_argument("--data", metavar="DIR", help="also how fast DIR/train/<class>/ is loaded (default: not measured)")
    args = parser.parse_args()
    sides = args.image_size or [224 if args.task == "cls" else 512]
    if len(sides) > 2 or min(sides) < 32:
        raise InputError("--image-size takes one or two numbers, each at least 32")
    if args.batch_size is not None and args.batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, got {args.batch_size}")
    _, world_size, device = start_processes()
    if world_size > 1:
        raise InputError("it measures one device: start it without torchrun")
    batch_size = args.batch_size or (128 if device.type == "cuda" else 8) // (1 if args.task == "cls" else 8)
    height, width = sides[0], sides[-1]
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{batch_size} images of {height} x {width} on {where}, torch {torch.__version__}\n")
    rows = benchmark(args.variant, args.task, (height, width), batch_size, device, args.compile)
    print_benchmark(rows)
    if args.data:
        loaded = loading_speed(args.data, height)
        cores = rows[-1]["eager training"]["images_per_second"] / loaded
        print(f"\na core loads {loaded:.0f} training images/s from {args.data}; {cores:.2g} of them feed the training step")


if __name__ == "__main__":
    run(main)
