# SPDX-License-Identifier: MIT
"""Evaluate a checkpoint of train.py, or measure speed and memory.

    python eval.py --checkpoint runs/cls/last.pt                                    on the data it was trained for
    python eval.py --checkpoint runs/cls/last.pt --data IMAGENET_DIR                on another folder's val/
    torchrun --nproc_per_node=8 eval.py --checkpoint runs/cls/last.pt               on eight devices, the same figures
    python eval.py --benchmark --variant tiny --image-size 224 --batch-size 8       beside torchvision's Swin and ConvNeXt

Top-1 and top-5 are exact for any number of processes: process r takes images r, r + n, r + 2n, ..., no image is
counted twice to fill a batch, and only whole numbers are summed over the processes.
"""

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections import Counter

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from clusterformer import VARIANTS, ClusterFormer, load_checkpoint
from data import Folder, InputError, Shapes, eval_transform, train_transform


def start_processes():
    """Joins the processes that torchrun has started, if it has.  Returns rank, number of processes, device."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if local_rank >= torch.cuda.device_count():
            raise InputError(f"more processes than the {torch.cuda.device_count()} GPUs here: lower --nproc_per_node")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # float32 products in TF32, among them those of the EM rounds
    else:
        device = torch.device("cpu")
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world_size, device


def default_workers():
    """Loader processes for each training process: its share of the cores less two, 16 at most.

    On two cores that is none: threads that wait for one another would also wait for a loader on their core.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(0, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 2))


def validation_set(data, image_size, classes=None):
    """The held-out images of a data set: `data` is None for shapes, or a folder that holds val/."""
    if data is None:
        return Shapes(2000, image_size, seed=0, split="val")
    return Folder(data, "val", eval_transform(image_size), classes=classes)


def evaluate(model, dataset, device, batch_size=128, workers=0):
    """Top-1 and top-5 accuracy, fractions of 1, of a classifier over a data set, on all processes together.

    model: ClusterFormer itself, not wrapped (processes may have different numbers of batches).
    Returns {"top1": float, "top5": float, "images": int}, the same on every process.
    """
    distributed = dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    keys = [(0, index) for index in range(rank, len(dataset), world_size)]
    loader = DataLoader(dataset, batch_size, sampler=keys, num_workers=workers, pin_memory=device.type == "cuda")
    counts = torch.zeros(3, dtype=torch.int64, device=device)  # right at first guess, within five, seen
    training = model.training
    model.eval()
    for images, labels in tqdm(loader, "evaluate", leave=False, disable=True if rank else None):
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(images)["logits"]
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (B, 5)
        counts += torch.stack([hits[:, 0].sum(), hits.sum(), torch.tensor(len(labels), device=device)])
    model.train(training)
    if distributed:
        dist.all_reduce(counts)
    top1, top5, seen = counts.tolist()
    return {"top1": top1 / seen, "top5": top5 / seen, "images": seen}


# ---------------------------------------------------------------------------------------------------------------
# Figures of the dense tasks; those of boxes and masks are pycocotools'
# ---------------------------------------------------------------------------------------------------------------
def panoptic_counts(predicted, segments, truth, entries, category_class, num_classes):
    """What one image adds to panoptic quality (Kirillov et al., 2019), per class.

    predicted: int64 (H, W), ids of segments, 0 where there is none.  segments: list of {"id", "label"}.
    truth: int64 (H, W), 0 is void.  entries: list of {"id", "category_id", "iscrowd"}.
    category_class: category_id -> class.
    Returns float64 (num_classes, 4): sum of the IoU of matches, true positives, false positives, false negatives.
    """
    counts = torch.zeros(num_classes, 4, dtype=torch.float64)
    base = int(predicted.max()) + 1
    pairs, pixels = (truth * base + predicted).unique(return_counts=True)
    overlap = {(pair // base, pair % base): n for pair, n in zip(pairs.tolist(), pixels.tolist())}
    area_true, area_predicted = Counter(), Counter()
    for (g, p), n in overlap.items():
        area_true[g] += n
        area_predicted[p] += n
    label = {segment["id"]: segment["label"] for segment in segments if area_predicted[segment["id"]]}
    expected = {entry["id"]: category_class[entry["category_id"]] for entry in entries if area_true[entry["id"]]}
    crowds = {entry["id"] for entry in entries if entry.get("iscrowd", 0)}
    matched = set()
    for (g, p), n in overlap.items():
        if g in expected and g not in crowds and p in label and expected[g] == label[p]:
            # Void pixels count neither for nor against a prediction.
            iou = n / (area_true[g] + area_predicted[p] - n - overlap.get((0, p), 0))
            if iou > 0.5:  # so that no segment can have two matches
                counts[label[p], 0] += iou
                counts[label[p], 1] += 1
                matched |= {("true", g), ("predicted", p)}
    for p, c in label.items():
        # A prediction that lies mostly on void, or on a crowd of its class, is not held against the model.
        forgiven = overlap.get((0, p), 0) + sum(overlap.get((g, p), 0) for g in crowds if expected.get(g) == c)
        if ("predicted", p) not in matched and forgiven / area_predicted[p] <= 0.5:
            counts[c, 2] += 1
    for g, c in expected.items():
        if ("true", g) not in matched and g not in crowds:
            counts[c, 3] += 1
    return counts


def panoptic_quality(counts, chosen):
    """PQ, SQ, RQ, means over the chosen classes (bool (C,)) that occur.  counts: float64 (C, 4), summed over images."""
    iou, tp, fp, fn = counts[chosen & (counts[:, 1:].sum(1) > 0)].unbind(1)
    rq = tp / (tp + 0.5 * fp + 0.5 * fn)
    sq = iou / tp.clamp(min=1)
    return [x.mean().item() if len(x) else math.nan for x in (sq * rq, sq, rq)]


def confusion_counts(predicted, truth, num_classes):
    """int64 (C, C): pixels of each true class (rows) that were given each class (columns); truth < 0 is left out."""
    real = truth >= 0
    return torch.bincount(truth[real] * num_classes + predicted[real], minlength=num_classes**2).view(num_classes, -1)


def semantic_figures(confusion):
    """mIoU over the classes that occur in truth or prediction, pixel accuracy, and IoU per class (nan: not there)."""
    right = confusion.diag().double()
    union = confusion.sum(0) + confusion.sum(1) - right
    iou = right / union
    return dict(miou=iou[union > 0].mean().item(), pixel_accuracy=(right.sum() / confusion.sum()).item()), iou


# ---------------------------------------------------------------------------------------------------------------
# Speed and memory
# ---------------------------------------------------------------------------------------------------------------
PEERS = {"nano": ("swin_t", "convnext_tiny"), "tiny": ("swin_t", "convnext_tiny"), "small": ("swin_s", "convnext_small")}


def build(name):
    """A classifier of 1000 classes with fresh weights: ClusterFormer's variant or torchvision's model of that name."""
    return ClusterFormer("cls", name) if name in VARIANTS else torchvision.models.get_model(name)


def work(model, images, optimizer=None):
    """What is measured: a forward pass or, with an optimizer, a training step; in bfloat16 on a GPU, as in train.py."""
    model.train(optimizer is not None)
    with torch.set_grad_enabled(optimizer is not None):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            logits = model(images)
        logits = logits["logits"] if isinstance(logits, dict) else logits
        if optimizer:
            F.cross_entropy(logits.float(), torch.zeros(len(images), dtype=torch.int64, device=images.device)).backward()
            optimizer.step()
            optimizer.zero_grad()
    if images.is_cuda:
        torch.cuda.synchronize()


def peak_memory(name, training, shape, device):
    """Bytes that a model, its optimizer and its work add to a process; called in a process of its own.

    Of a CPU it is known on Linux only, from the kernel's count of resident pages; elsewhere nan.
    """

    def peak():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

    on_cpu = device.type == "cpu"
    if on_cpu and sys.platform != "linux":
        return math.nan
    if on_cpu:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak counts from here, not from the imports
        before = peak()
    model, images = build(name).to(device), torch.rand(shape, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True) if training else None
    for _ in range(2):
        work(model, images, optimizer)
    return peak() - before if on_cpu else torch.cuda.max_memory_allocated()


def benchmark(variant, image_size, batch_size, device, compiled=False, rounds=9):
    """Measures a variant beside its peers of torchvision.  Returns a list of rows, dictionaries; the first peer is 1 x.

    The models take turns, round after round, since other work on a machine comes and goes: a ratio is the median over
    the rounds of the ratios within a round.
    """
    names = (*PEERS[variant], variant)
    shape = (batch_size, 3, image_size, image_size)
    images = torch.rand(shape, device=device)
    rows, runs, times = [], {}, {}
    for name in names:
        model = build(name).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, *shape[1:]))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        # A fresh process for each figure; its count of memory starts from what the imports take.
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            memory = [pool.apply(peak_memory, (name, training, shape, device)) for training in (False, True)]
        rows.append(dict(model=name, parameters=parameters, macs=counter.get_total_flops() // 2, memory=memory))
        model = model.to(device)
        for mode in ["eager", "compiled"][: 1 + compiled]:
            runner = torch.compile(model) if mode == "compiled" else model
            runs[name, mode, "forward"] = (runner, images)
            runs[name, mode, "training"] = (runner, images, torch.optim.AdamW(model.parameters(), fused=True))
    for run in tqdm(runs.values(), "warm up", leave=False, disable=None):
        work(*run)
        work(*run)
    repeats = 10 if device.type == "cuda" else 1
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
    """The rows of benchmark() as a table; x is times the first row."""
    speeds = [key for key in rows[0] if " " in key]
    titles = ["", "M parameters", "GMACs", *(f"{speed} /s" for speed in speeds), "forward MiB", "training MiB"]
    table = [titles]
    for row in rows:
        cells = [row["model"], f"{row['parameters'] / 1e6:.1f}", f"{row['macs'] / 1e9:.2f}"]
        cells += [f"{row[speed]['images_per_second']:.4g} ({row[speed]['ratio']:.2f}x)" for speed in speeds]
        cells += [f"{own / 2**20:.0f} ({own / peer:.2f}x)" for own, peer in zip(row["memory"], rows[0]["memory"])]
        table.append(cells)
    widths = [max(map(len, column)) for column in zip(*table)]
    for cells in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a last.pt or best.pt of train.py; it knows task and model")
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="evaluate DIR/val/<class>/ (default: what the checkpoint was trained on); benchmark loading DIR/train/<class>/",
    )
    parser.add_argument("--image-size", type=int, help="pixels a side (default: as in training; benchmark: 224)")
    parser.add_argument("--batch-size", type=int, help="images per step and process (default: 128; benchmark on a CPU: 8)")
    parser.add_argument("--workers", type=int, help="loader processes per process (default: spare cores, 16 at most)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE, as fractions of 1")
    speed = parser.add_argument_group("speed and memory, of fresh weights")
    speed.add_argument("--benchmark", action="store_true", help="images per second, peak memory, GMACs beside torchvision")
    speed.add_argument("--variant", choices=VARIANTS, default="tiny", help="size of the model (default: tiny)")
    speed.add_argument("--compile", action="store_true", help="measure compiled models, too; takes minutes to start")
    args = parser.parse_args()
    if bool(args.checkpoint) == args.benchmark:
        raise InputError("give either --checkpoint FILE or --benchmark")
    if args.batch_size is not None and args.batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, got {args.batch_size}")
    if args.workers is not None and args.workers < 0:
        raise InputError(f"--workers must be at least 0, got {args.workers}")
    if args.image_size is not None and args.image_size < 32:
        raise InputError(f"--image-size must be at least 32, got {args.image_size}")

    rank, world_size, device = start_processes()
    if args.benchmark:
        if world_size > 1:
            raise InputError("--benchmark measures one device: start it without torchrun")
        image_size, batch_size = args.image_size or 224, args.batch_size or (8 if device.type == "cpu" else 128)
        where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
        print(f"{batch_size} images of {image_size} x {image_size} on {where}, torch {torch.__version__}")
        rows = benchmark(args.variant, image_size, batch_size, device, args.compile)
        print_benchmark(rows)
        if args.data:
            loaded = loading_speed(args.data, image_size)
            cores = rows[-1]["eager training"]["images_per_second"] / loaded
            print(f"a core loads {loaded:.0f} training images/s from {args.data}; {cores:.2g} of them feed the training step")
        if args.json:
            with open(args.json, "w") as file:
                json.dump(rows, file, indent=2)
        return
    try:
        model, checkpoint = load_checkpoint(args.checkpoint)
    except ValueError as error:
        raise InputError(str(error)) from error
    settings, classes = checkpoint["settings"], checkpoint["classes"]
    dataset = validation_set(args.data or settings["data"], args.image_size or settings["image_size"], classes)
    if list(dataset.classes) != list(classes):
        raise InputError(f"{args.checkpoint} is trained for {len(classes)} classes that shapes do not have; give --data")
    workers = default_workers() if args.workers is None else args.workers
    metrics = evaluate(model.to(device), dataset, device, args.batch_size or 128, workers)
    if rank == 0:
        print(f"top-1 {metrics['top1']:.2%}, top-5 {metrics['top5']:.2%} of {metrics['images']} images")
        if args.json:
            with open(args.json, "w") as file:
                json.dump(metrics, file, indent=2)


def run(main):
    """Calls main; what is wrong with the user's input ends the program with one line instead of a traceback."""
    try:
        main()
    except InputError as error:
        # From a loader process the error arrives with that process's traceback before it: keep its last line.
        message = str(error).strip().splitlines()[-1].removeprefix("data.InputError: ")
        sys.exit(f"{os.path.basename(sys.argv[0])}: error: {message}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
