# SPDX-License-Identifier: MIT
"""Evaluate a checkpoint of train.py.

    python eval.py --checkpoint runs/cls/last.pt                                    on the data it was trained for
    python eval.py --checkpoint runs/cls/last.pt --data IMAGENET_DIR                on another folder's val/
    torchrun --nproc_per_node=8 eval.py --checkpoint runs/cls/last.pt               on eight devices, the same figures

Top-1 and top-5 are exact for any number of processes: process r takes images r, r + n, r + 2n, ..., no image is
counted twice to fill a batch, and only whole numbers are summed over the processes.
"""

import argparse
import json
import os
import sys

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

from clusterformer import load_checkpoint
from data import Folder, InputError, Shapes, eval_transform


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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a last.pt or best.pt of train.py; it knows task and model")
    parser.add_argument("--data", help="a folder that holds val/<class>/ (default: what the checkpoint was trained on)")
    parser.add_argument("--image-size", type=int, help="pixels a side (default: as in training)")
    parser.add_argument("--batch-size", type=int, default=128, help="images per process and step (default: 128)")
    parser.add_argument("--workers", type=int, help="loader processes per process (default: spare cores, 16 at most)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE, as fractions of 1")
    args = parser.parse_args()
    if args.batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, got {args.batch_size}")
    if args.workers is not None and args.workers < 0:
        raise InputError(f"--workers must be at least 0, got {args.workers}")
    if args.image_size is not None and args.image_size < 32:
        raise InputError(f"--image-size must be at least 32, got {args.image_size}")

    rank, _, device = start_processes()
    try:
        model, checkpoint = load_checkpoint(args.checkpoint)
    except ValueError as error:
        raise InputError(str(error)) from error
    settings, classes = checkpoint["settings"], checkpoint["classes"]
    dataset = validation_set(args.data or settings["data"], args.image_size or settings["image_size"], classes)
    if list(dataset.classes) != list(classes):
        raise InputError(f"{args.checkpoint} is trained for {len(classes)} classes that shapes do not have; give --data")
    workers = default_workers() if args.workers is None else args.workers
    metrics = evaluate(model.to(device), dataset, device, args.batch_size, workers)
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
