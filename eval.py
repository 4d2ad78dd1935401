# SPDX-License-Identifier: MIT
"""Evaluate a checkpoint of train.py, or draw what it sees.

    python eval.py --checkpoint runs/cls/last.pt                                    on the data it was trained for
    python eval.py --checkpoint runs/cls/last.pt --data IMAGENET_DIR                on another folder's val/
    python eval.py --checkpoint runs/inst/last.pt --per-class --save-predictions inst.json
    torchrun --nproc_per_node=8 eval.py --checkpoint runs/inst/last.pt              on eight devices, the same figures
    python eval.py --checkpoint runs/inst/last.pt --images photo.jpg DIR --clusters --out pictures
    python eval.py --checkpoint runs/cls/last.pt --explain star cross               why the one and not the other

cls: top-1 and top-5.  det, inst: COCO's twelve figures, by pycocotools.  sem: mIoU, pixel accuracy.  pan: PQ, SQ, RQ.

All are exact for any number of processes: process r takes images r, r + n, r + 2n, ..., no image is counted twice to
fill a batch, and what the processes found is put back in the order of the images before anything is ranked or summed.
"""

import argparse
import contextlib
import io
import itertools
import json
import math
import os
import sys
from collections import Counter
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.datasets.folder import is_image_file
from torchvision.ops import box_convert, masks_to_boxes
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional
from tqdm import tqdm

from clusterformer import VERSION, ClusterFormer, make_layout, trace
from data import (
    Ade,
    Coco,
    Folder,
    InputError,
    Shapes,
    as_float,
    check,
    collate,
    dense_eval_transform,
    eval_transform,
    ignore_interrupts,
    is_hidden,
    load_image,
    loader_of,
)


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
        # The others wait while one process runs COCO's evaluation, which takes longer than NCCL's ten minutes allow.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=1))
    return rank, world_size, device


def default_workers():
    """Loader processes for each training process: its share of the cores less two, 16 at most.

    On two cores that is none: threads that wait for one another would also wait for a loader on their core.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(0, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 2))


def load_checkpoint(path):
    """The model that train.py has saved, with averaged weights, in evaluation mode on the CPU; and the whole checkpoint.

    Raises InputError if the file is not a whole checkpoint of train.py, or its weights are of another version.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # a file cannot run code
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    except Exception as error:  # a broken archive raises any of half a dozen exceptions
        raise InputError(f"{path}: not a readable checkpoint ({str(error).splitlines()[0]})") from error
    if not isinstance(checkpoint, dict) or not {"model", "ema", "settings", "classes"} <= checkpoint.keys():
        raise InputError(f"{path}: not a checkpoint of train.py: it has no model, ema, settings and classes")
    version = checkpoint.get("version", 1)  # the first version did not record it
    if version != VERSION:
        raise InputError(f"{path}: its weights are of version {version}, this code needs version {VERSION}; train anew")
    try:
        model = ClusterFormer(**checkpoint["arguments"])
        model.load_state_dict(checkpoint["ema"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:  # RuntimeError: the weights do not fit
        raise InputError(f"{path}: not a whole checkpoint of train.py ({' '.join(str(error).split())})") from error
    return model.eval(), checkpoint


def validation_set(data, image_size, task="cls", classes=None):
    """The held-out images of a data set: `data` is None for shapes, or a folder in the task's layout.

    image_size: pixels a side of shapes and of cls; in files of the other tasks, of the short side.  In COCO's the long one
    has 1333 for every 800 of it at most, as is usual.
    """
    if data is None:
        return Shapes(2000 if task == "cls" else 500, image_size, seed=0, split="val", task=task)
    if task == "cls":
        return Folder(data, "val", eval_transform(image_size), classes=classes)
    if task == "sem":
        return Ade(data, "val", dense_eval_transform(image_size, math.inf), classes=classes)
    return Coco(data, "val", task, dense_eval_transform(image_size, image_size * 1333 / 800), classes=classes)


# ---------------------------------------------------------------------------------------------------------------
# Figures of the dense tasks
# ---------------------------------------------------------------------------------------------------------------
COCO_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def coco_results(prediction, image_id, categories):
    """A prediction of det or inst in COCO's result format, a list of dictionaries.

    Boxes are rounded as COCO's own are.  Masks become run lengths at once: as pixels, a hundred of them are 30 MB.
    """
    boxes = box_convert(prediction["boxes"], "xyxy", "xywh").tolist()
    results = [
        dict(image_id=image_id, category_id=categories[label], bbox=[round(x, 2) for x in box], score=score)
        for label, box, score in zip(prediction["labels"].tolist(), boxes, prediction["scores"].tolist())
    ]
    if "masks" in prediction:
        masks = prediction["masks"].mT.contiguous().byte().cpu().numpy().T  # (H, W, n), column by column, as runs are
        for result, rle in zip(results, mask_utils.encode(masks)):
            result["segmentation"] = dict(size=rle["size"], counts=rle["counts"].decode())
    return results


def coco_metrics(truth, results, kind):
    """COCO's twelve figures, nan where there is nothing to find, and a list of the AP of each class.

    truth: COCO object.  results: list of dictionaries as above.  kind: "bbox" or "segmentation", what is compared.
    """
    # loadRes writes into what it gets, takes no empty list, and judges the size of a mask by a box if there is one.
    results = [{key: result[key] for key in ("image_id", "category_id", "score", kind)} for result in results]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCOeval(truth, truth.loadRes(results) if results else COCO(), kind.replace("segmentation", "segm"))
        coco.evaluate()
        coco.accumulate()
        coco.summarize()
    figures = {name: value if value >= 0 else math.nan for name, value in zip(COCO_METRICS, coco.stats.tolist())}
    precision = torch.from_numpy(coco.eval["precision"][..., 0, -1])  # (IoU thresholds, recalls, classes)
    each = precision.where(precision >= 0, math.nan).nanmean((0, 1)).tolist()  # in the order of the categories' numbers
    numbers = [category["id"] for category in truth.dataset["categories"]]
    return figures, [each[sorted(numbers).index(number)] for number in numbers]


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


def semantic_metrics(confusion):
    """mIoU over the classes that occur in truth or prediction, pixel accuracy, and IoU per class (nan: not there)."""
    right = confusion.diag().double()
    union = confusion.sum(0) + confusion.sum(1) - right
    iou = right / union
    return dict(miou=iou[union > 0].mean().item(), pixel_accuracy=(right.sum() / confusion.sum()).item()), iou


# ---------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------
METRIC = dict(cls="top1", det="AP", inst="mask_AP", sem="miou", pan="PQ")  # the figure by which the best is chosen
PAPER = dict(cls=0.8341, det=0.542, inst=0.470, sem=0.524, pan=0.558)  # that figure of the paper's Small
PAPER_CLASSES = dict(cls=1000, det=80, inst=80, sem=150, pan=133)  # in ImageNet-1K, COCO, COCO, ADE20K, COCO panoptic


def print_table(rows):
    """rows: lists of strings, the first one titles."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for cells in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths)))


def describe(metrics, task):
    """The figures of evaluate() that matter most, in a line."""
    line = dict(
        cls="top-1 {top1:.2%}, top-5 {top5:.2%}",
        det="box AP {AP:.3f}, AP50 {AP50:.3f}, AP75 {AP75:.3f}",
        inst="box AP {box_AP:.3f}, AP50 {box_AP50:.3f}; mask AP {mask_AP:.3f}, AP50 {mask_AP50:.3f}",
        sem="mIoU {miou:.3f}, pixel accuracy {pixel_accuracy:.3f}",
        pan="PQ {PQ:.3f} (things {PQ_th:.3f}, stuff {PQ_st:.3f}), SQ {SQ:.3f}, RQ {RQ:.3f}",
    )
    return line[task].format(**metrics)


def print_metrics(metrics, task, compare):
    """What evaluate() found, for people.  compare: with the paper's."""
    theirs = "{:.2%}" if task == "cls" else "{:.3f}"
    paper = f" (the paper's Small: {theirs.format(PAPER[task])})" if compare else ""
    print(f"{describe(metrics, task)} of {metrics['images']} images{paper}")
    if task in ("det", "inst"):
        kinds = {"box": ""} if task == "det" else {"box": "box_", "mask": "mask_"}
        rows = [[kind, *(f"{metrics[prefix + name]:.3f}" for name in COCO_METRICS)] for kind, prefix in kinds.items()]
        print_table([["", *COCO_METRICS], *rows])
    if "per_class" in metrics:
        rows = metrics["per_class"]
        print_table([list(rows[0]), *([x if isinstance(x, str) else f"{x:.3f}" for x in row.values()] for row in rows)])


def identity(dataset, index):
    """Name, without suffix, and number of an image in the files of its data set; a scene of shapes has its index."""
    if isinstance(dataset, Coco):
        name, number, _ = dataset.images[index]
    elif isinstance(dataset, Ade):
        name, number = os.fsdecode(dataset.names[index]), index
    else:
        name, number = str(index), index
    return os.path.splitext(name)[0].replace("/", "_"), number  # with folders in it, it could lead out of where it is saved


def save_panoptic(prediction, name, image_id, categories, folder):
    """Writes a panoptic map, id = R + 256 G + 256^2 B, to folder/name.png.  Returns its entry of COCO's JSON."""
    ids, segments = prediction["panoptic"], []
    rgb = torch.stack([ids % 256, ids // 256 % 256, ids // 256**2], -1)  # (H, W, 3)
    Image.fromarray(rgb.byte().cpu().numpy()).save(os.path.join(folder, name + ".png"))
    for segment in prediction["segments"]:
        mask = ids == segment["id"]
        if mask.any():  # COCO's evaluation refuses a segment without pixels
            left, top, right, bottom = masks_to_boxes(mask[None])[0].int().tolist()
            entry = dict(id=segment["id"], category_id=categories[segment["label"]], iscrowd=0)
            segments.append(entry | dict(area=int(mask.sum()), bbox=[left, top, right - left + 1, bottom - top + 1]))
    return dict(image_id=image_id, file_name=name + ".png", segments_info=segments)


def accuracy(model, batches, device):
    """evaluate()'s figures of a classifier.  batches: of this process."""
    counts = torch.zeros(3, dtype=torch.int64, device=device)  # right at first guess, within five, seen
    training = model.training
    model.eval()
    for images, labels in batches:
        images, labels = as_float(images.to(device, non_blocking=True)), labels.to(device, non_blocking=True)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(images)["logits"]
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (B, 5)
        counts += torch.stack([hits[:, 0].sum(), hits.sum(), torch.tensor(len(labels), device=device)])
    model.train(training)
    if dist.is_initialized():
        dist.all_reduce(counts)
    top1, top5, seen = counts.tolist()
    return {"top1": top1 / seen, "top5": top5 / seen, "images": seen}


def score_image(dataset, task, index, prediction, folder):
    """Compares the prediction for an image with the truth.  Returns what has to be kept of it, a few kilobytes.

    det, inst: COCO results.  sem: confusion, sparse, since an image has few classes.  pan: counts, and, if its PNG is to be
    left in `folder`, the entry of the JSON.
    """
    name, number = identity(dataset, index)
    classes, categories = dataset.classes, dataset.categories
    if task == "sem":
        labels = prediction["semantic"]
        truth = dataset.label_map(index).to(labels.device)
        if folder:
            pixels = (labels + 1).cpu().numpy().astype(np.uint8 if len(classes) < 256 else np.uint16)
            Image.fromarray(pixels).save(os.path.join(folder, name + ".png"))
        return confusion_counts(labels, truth, len(classes)).cpu().to_sparse()
    if task == "pan":
        truth, entries = dataset.segments(index)
        ids, label_of = prediction["panoptic"], {category: label for label, category in enumerate(categories)}
        counts = panoptic_counts(ids, prediction["segments"], truth.to(ids.device), entries, label_of, len(classes))
        return counts, save_panoptic(prediction, name, number, categories, folder) if folder else None
    return coco_results(prediction, number, categories)


def dense_metrics(dataset, task, kept):
    """evaluate()'s figures from what was kept of all images, in their order; for the eye, figures of each class.

    Returns the figures, a dictionary, and the columns of a table, name -> a list of one float a class.
    """
    if task == "sem":
        figures, iou = semantic_metrics(sum(confusion.to_dense() for confusion in kept))
        return figures, dict(IoU=iou.tolist())
    if task == "pan":
        counts = sum(counts for counts, _ in kept)  # one after the other: the same to the last bit, whoever counted
        things, figures = torch.tensor(dataset.things), {}
        for suffix, chosen in (("", torch.ones_like(things)), ("_th", things), ("_st", ~things)):
            figures |= zip([name + suffix for name in ("PQ", "SQ", "RQ")], panoptic_quality(counts, chosen))
        each = torch.eye(len(things), dtype=torch.bool)
        return figures, dict(zip(("PQ", "SQ", "RQ"), zip(*(panoptic_quality(counts, one) for one in each))))
    truth, results = dataset.coco(), list(itertools.chain(*kept))
    boxes, box_ap = coco_metrics(truth, results, "bbox")
    if task == "det":
        return boxes, dict(AP=box_ap)
    masks, mask_ap = coco_metrics(truth, results, "segmentation")
    figures = {f"box_{name}": value for name, value in boxes.items()}
    return figures | {f"mask_{name}": value for name, value in masks.items()}, dict(box_AP=box_ap, mask_AP=mask_ap)


def evaluate(model, dataset, device, batch_size=128, workers=0, save=None, per_class=False):
    """How well a model does its task on a data set, on all processes together.

    model: ClusterFormer itself, not wrapped (processes may have different numbers of batches).
    save: where predictions go.  det, inst: a JSON file.  pan: the same, and its PNGs in the folder of that name without
    ".json".  sem: a folder of PNGs, label + 1 as in ADE20K's.
    Returns the number of "images" and figures, fractions of 1, nan where the data set has nothing of the kind; the same
    on every process:
        cls: top1, top5   sem: miou, pixel_accuracy   pan: PQ, SQ, RQ, and the same of things, PQ_th, and of stuff, PQ_st
        det: COCO_METRICS   inst: the same of boxes, box_AP, and of masks, mask_AP
    per_class: adds "per_class", a list of a dictionary for each class; not for cls.
    """
    task, distributed = model.task, dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    keys = [(0, index) for index in range(rank, len(dataset), world_size)]
    together = None if task == "cls" else collate  # None: one tensor
    loader = loader_of(
        dataset, workers, device, batch_size=batch_size, sampler=keys, collate_fn=together, worker_init_fn=ignore_interrupts
    )
    bar = tqdm(loader, "evaluate", leave=False, disable=True if rank else None)
    if task == "cls":
        return accuracy(model, bar, device)
    folder = save and {"sem": save, "pan": save.removesuffix(".json")}.get(task)
    if folder:
        os.makedirs(folder, exist_ok=True)
    kept = {}  # index of an image -> what is kept of it
    for images, targets in bar:
        images = as_float([image.to(device, non_blocking=True) for image in images])
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            predictions = model.predict(images, [tuple(target["size"]) for target in targets])
        for target, prediction in zip(targets, predictions):
            kept[target["index"]] = score_image(dataset, task, target["index"], prediction, folder)
    parts = [kept]
    if distributed:
        parts = [None] * world_size if rank == 0 else None
        dist.gather_object(kept, parts)
    metrics = [None]
    if rank == 0:
        kept = {index: what for part in parts for index, what in part.items()}
        kept = [kept[index] for index in range(len(dataset))]
        figures, columns = dense_metrics(dataset, task, kept)
        metrics = [figures | dict(images=len(dataset))]
        if per_class:
            rows = zip(dataset.classes, *columns.values())
            metrics[0]["per_class"] = [dict(zip(("class", *columns), row)) for row in rows]
        if save and task != "sem":
            pan = dict(annotations=[entry for _, entry in kept]) if task == "pan" else None
            with open(save, "w") as file:
                json.dump(pan or list(itertools.chain(*kept)), file)
    if distributed:
        dist.broadcast_object_list(metrics)
    return metrics[0]


# ---------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------
SURE = 0.3  # of det and inst, what is drawn; --json has everything
# Seven colors that color-blind readers can tell apart (Okabe and Ito, 2008); more are paler ones of the same.
COLORS = [(0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (213, 94, 0), (240, 228, 66)]


def color(number):
    """Of a class, an object or a cluster, RGB."""
    pale = (0.0, 0.5, 0.25, 0.7)[number // len(COLORS) % 4]
    return tuple(round(c + pale * (255 - c)) for c in COLORS[number % len(COLORS)])


def shown(image, side):
    """An image, float (3, H, W), with a long side of `side` pixels; small ones keep their pixels as squares."""
    size = [max(1, round(length * side / max(image.shape[1:]))) for length in image.shape[1:]]
    how = InterpolationMode.NEAREST if side > max(image.shape[1:]) else InterpolationMode.BILINEAR
    return functional.resize(image, size, how)


def enlarged(values, size):
    """(..., h, w) -> (..., H, W), every pixel repeated: maps are shown as they are, not as they would look smoothed."""
    rows, columns = (torch.arange(new) * old // new for new, old in zip(size, values.shape[-2:]))
    return values[..., rows, :][..., columns]


def painted(image, regions, alpha=0.7):
    """Regions in their colors over an image, with white borders, which tell them apart without colors, too.

    image: float (3, H, W).  regions: int64 (H, W), -1 for none.  Returns a PIL picture.
    """
    table = torch.tensor([color(number) for number in range(max(1, int(regions.max()) + 1))]) / 255  # (n, 3)
    over = torch.lerp(image, table[regions.clamp(min=0)].permute(2, 0, 1), alpha * (regions >= 0).float())
    border = torch.zeros_like(regions, dtype=torch.bool)
    border[1:] |= regions[1:] != regions[:-1]
    border[:, 1:] |= regions[:, 1:] != regions[:, :-1]
    return functional.to_pil_image(over.masked_fill(border, 1.0))


def label(picture, places, texts):
    """Writes texts at (x, y), white on black, which can be read on anything, where they neither overlap nor stick out."""
    draw, font, taken = ImageDraw.Draw(picture), ImageFont.load_default(13), []
    for (x, y), text in zip(places, texts):
        _, _, width, height = draw.textbbox((4, 5), text, font)
        x, y = max(0, min(round(x), picture.width - width)), max(0, min(round(y), picture.height - height))
        rows = [*range(y, picture.height - height + 1), *range(y)]  # from there down, then from the top; or where it is
        free = (row for row in rows if all(abs(row - b) >= height or a >= x + width or x >= a + w for a, b, w in taken))
        y = next(free, y)
        taken.append((x, y, width))
        draw.rectangle([x, y, x + width - 1, y + height - 1], "black")
        draw.text((x + 2, y + 1), text, "white", font)


def middle(mask):
    """A pixel of a mask near its mean, (x, y)."""
    places = mask.nonzero().float()
    y, x = places[(places - places.mean(0)).square().sum(1).argmin()].tolist()
    return x, y


def legend(rows):
    """A panel of lines of text, each with a bar of its color before it.  rows: (color, text, length of the bar, 0 to 1)."""
    font = ImageFont.load_default(15)
    width = max([60, *(int(font.getlength(text)) for _, text, _ in rows)])
    panel = Image.new("RGB", (84 + width, 24 * len(rows) + 8), "white")
    draw = ImageDraw.Draw(panel)
    for i, (fill, text, length) in enumerate(rows):
        draw.rectangle([6, 24 * i + 6, 8 + round(58 * length), 24 * i + 22], fill, "black")
        draw.text((76, 24 * i + 4), text, "black", font)
    return panel


def sheet(rows):
    """One picture of rows of panels, lists of (title, picture); titles stand above."""
    font = ImageFont.load_default(15)
    widths = [[max(picture.width, int(font.getlength(title)) + 1) + 12 for title, picture in row] for row in rows]
    heights = [max(picture.height for _, picture in row) + 36 for row in rows]
    whole = Image.new("RGB", (max(map(sum, widths)) + 12, sum(heights) + 12), "white")
    draw, y = ImageDraw.Draw(whole), 12
    for row, row_widths, height in zip(rows, widths, heights):
        x = 12
        for (title, picture), width in zip(row, row_widths):
            draw.text((x, y), title, "black", font)
            whole.paste(picture, (x, y + 24))
            x += width
        y += height
    return whole


def as_data(prediction, names):
    """One of predict()'s predictions as a list of dictionaries; masks are run lengths, as in COCO's files."""

    def runs(mask):
        rle = mask_utils.encode(np.asfortranarray(mask.numpy(), np.uint8))
        return dict(size=rle["size"], counts=rle["counts"].decode())

    if "semantic" in prediction:
        masks = {c: prediction["semantic"] == c for c in prediction["semantic"].unique().tolist()}
        return [dict(name=names[c], share=mask.float().mean().item(), mask=runs(mask)) for c, mask in masks.items()]
    if "panoptic" in prediction:
        parts = [(part, prediction["panoptic"] == part["id"]) for part in prediction["segments"]]
        return [dict(name=names[p["label"]], score=p["score"], isthing=p["isthing"], mask=runs(mask)) for p, mask in parts]
    rows = [dict(name=names[c], score=score) for c, score in zip(prediction["labels"].tolist(), prediction["scores"].tolist())]
    for i, row in enumerate(rows):
        if "boxes" in prediction:
            row["box"] = [round(x, 2) for x in prediction["boxes"][i].tolist()]  # left, top, right, bottom, in pixels of the file
        if "masks" in prediction:
            row["mask"] = runs(prediction["masks"][i])
    return rows


def prediction_panels(prediction, names, image, size):
    """One of predict()'s predictions, in pixels of size (H, W), beside its image, float (3, H, W), whatever its size."""
    image = shown(image, 560)
    sides = image.shape[1:]
    first = ("image", functional.to_pil_image(image))
    if "semantic" in prediction:
        regions, name_of = prediction["semantic"], names
        text_of = [f"{name} {(regions == c).float().mean():.1%}" for c, name in enumerate(names)]
    elif "panoptic" in prediction:
        regions = torch.full(size, -1)
        for i, part in enumerate(prediction["segments"]):
            regions[prediction["panoptic"] == part["id"]] = i
        name_of = [names[part["label"]] for part in prediction["segments"]]
        text_of = [f"{name} {part['score']:.2f}" for name, part in zip(name_of, prediction["segments"])]
    else:
        scores, found = prediction["scores"].tolist(), [names[c] for c in prediction["labels"].tolist()]
        if "boxes" not in prediction:
            return [first, ("prediction", legend([(color(0), f"{s:.3f} {name}", s) for s, name in zip(scores, found)]))]
        sure, regions = sum(score >= SURE for score in scores), torch.full(sides, -1)
        for i in reversed(range(sure if "masks" in prediction else 0)):  # the surest on top
            regions[enlarged(prediction["masks"][i], sides)] = i
        picture, stretch = painted(image, regions), torch.tensor([sides[1] / size[1], sides[0] / size[0]] * 2)
        boxes = (prediction["boxes"][:sure] * stretch).tolist()
        for i, box in enumerate(boxes):
            ImageDraw.Draw(picture).rectangle(box, outline=color(i), width=3)
        label(picture, [box[:2] for box in boxes], [f"{name} {score:.2f}" for name, score in zip(found, scores)])
        return [first, (f"{sure} surer than {SURE}", picture)]
    regions = enlarged(regions, sides)
    picture, numbers = painted(image, regions), [n for n in regions.unique().tolist() if n >= 0]
    label(picture, [middle(regions == n) for n in numbers], [name_of[n] for n in numbers])
    return [first, ("prediction", picture), ("", legend([(color(n), text_of[n], 1) for n in numbers]))]


def regions_of(assignment, map_size, image, stride):
    """The cluster with the largest share of each pixel, int64 (H, W).  assignment: (h, K, N), of which heads are averaged."""
    regions = assignment.mean(0).argmax(0).view(map_size).repeat_interleave(stride, 0).repeat_interleave(stride, 1)
    return regions[: image.shape[1], : image.shape[2]]


def grid_assignment(height, width, device=None):
    """The grid cells of a map as clusters: (1, K, N), the weight of each token in the mean of each cell."""
    layout = make_layout(height, width, device=device)
    return (layout.row_pool[:, :, None, :, None] * layout.column_pool[:, None, :, None]).flatten(3).flatten(1, 2)


def cluster_panels(model, image):
    """The clusters of the last block of each stage, and the iterations of one block.  image: float (3, H, W)."""
    with torch.no_grad():
        entries = trace(model, [image])
    picture = shown(image.cpu(), 320)

    def panel(title, assignment, map_size, stride):
        regions = enlarged(regions_of(assignment, map_size, image, stride).cpu(), picture.shape[1:])
        return title, painted(picture, regions)

    stages = range(len(model.backbone.strides))
    last = [[x for x in entries if x["name"].startswith(f"backbone.stages.{i}.")][-1] for i in stages]
    rows = [[("image", functional.to_pil_image(picture))], []]
    for stride, block in zip(model.backbone.strides, last):
        M = block["assignments"][-1][0]
        rows[0].append(panel(f"stride {stride}: {M.shape[1]} clusters", M, block["size"], stride))
    stride, block = model.backbone.strides[1], last[1]
    steps = [grid_assignment(*block["size"]), *(M[0] for M in block["assignments"])]
    titles = [f"stride {stride}: C(0), the grid", *(f"M({t})" for t in range(len(steps) - 1))]
    return [rows[0], [panel(title, M, block["size"], stride) for title, M in zip(titles, steps)]]


def explain(model, image, weights):
    """The exact explanation of a logit, or of a difference of two: bias + what each token brought to each center.

    image: float (3, H, W).  weights: (classes,), what each logit counts: 1 for one, 1 and -1 for a difference.
    Returns the value, the bias, and the shares (K, h, w), of each center by the token that they come from; the value is the
    bias plus the sum of the shares.  Exact for the weights of the means as they are: how the image moves the weights, and how
    the backbone made the tokens, it does not say.
    """
    head = model.head
    with torch.no_grad():
        value = model([image])["logits"][0] @ weights
        entry = trace(model, [image])[-1]  # the head's clustering
        C, tokens, size = entry["centers"][-1][0], entry["tokens"][0], entry["size"]  # (K, D), (N, D)
        # What a channel of a center counts.  The norm subtracts the mean, divides by the deviation, multiplies by its weight.
        w = weights @ head.classifier.weight * head.center_norm.weight  # (D,)
        w = (w - w.mean()) / (C.var(1, correction=0, keepdim=True) + head.center_norm.eps).sqrt() / len(C)  # (K, D)
        contributions = grid_assignment(*size, image.device)[0] * (w @ tokens.T)  # (K, N), through C(0)
        values, W = entry["values"][0], sum(entry["weights"])[0]  # (h, N, d), (h, K, N), over all iterations
        w = w.unflatten(1, (-1, len(values))).permute(2, 0, 1)  # (h, K, d): head j collects channels j, j + h, ...
        contributions = contributions + (W * (w @ values.transpose(1, 2))).sum(0)
    return value.item(), (weights @ head.classifier(head.center_norm.bias)).item(), contributions.unflatten(1, size)


def explanation_panels(model, image, names, chosen):
    """explain() for people.  chosen: no class (the likeliest), one, or two to be compared, as numbers."""
    with torch.no_grad():
        likeliest = model([image])["logits"][0].argmax().item()
    chosen = chosen or [likeliest]
    weights = torch.zeros(len(names), device=image.device)
    for number, sign in zip(chosen, (1, -1)):
        weights[number] = sign
    value, bias, maps = explain(model, image, weights)
    maps, image = maps.cpu(), image.cpu()
    shares, total = maps.sum((1, 2)), maps.sum(0)  # of the centers, of the tokens
    stride, picture = model.backbone.strides[-1], shown(image, 320)

    def over(values, largest, strength=0.8):
        """A map over the gray image: orange speaks for, blue against, gray is neutral; the colors are full at `largest`."""
        values = values.repeat_interleave(stride, 0).repeat_interleave(stride, 1)[: image.shape[1], : image.shape[2]]
        values = enlarged(values, picture.shape[1:]) / largest.clamp(min=1e-9)
        gray = picture.mean(0).expand(3, -1, -1)
        ends = torch.tensor([(213, 94, 0), (0, 114, 178)])[(values < 0).long()].permute(2, 0, 1) / 255
        return functional.to_pil_image(torch.lerp(gray, ends, strength * values.abs().clamp(max=1)))

    what = " - ".join(names[number] for number in chosen)
    rows = [[("image", functional.to_pil_image(picture)), (f"{what}: {value:.3f}", over(total, total.abs().max()))]]
    order = shares.argsort(descending=True).tolist()
    speakers = {"for": [k for k in order[:5] if shares[k] > 0], "against": [k for k in order[::-1][:5] if shares[k] < 0]}
    for side, centers in speakers.items():
        if centers:
            rows.append([(f"{side}: {shares[k]:+.3f} of center {k}", over(maps[k], maps.abs().max())) for k in centers])
    told = [((213, 94, 0), f"pixels for it {total.clamp(min=0).sum():+.3f}", 1)]
    told += [((0, 114, 178), f"pixels against it {total.clamp(max=0).sum():+.3f}", 1), ("white", f"bias {bias:+.3f}", 1)]
    rows[0].append((f"together {value:+.3f}, the logit" if len(chosen) == 1 else f"together {value:+.3f}", legend(told)))
    return rows


def images_of(paths, task, size):
    """Pictures and folders of pictures -> a list of (name, image as the model takes it, size (H, W) in the file)."""
    files = []
    for path in paths:
        if not os.path.isdir(path):
            files.append(path)
            continue
        inside = sorted(name for name in os.listdir(path) if is_image_file(name) and not is_hidden(name))
        if not inside:
            raise InputError(f"{path}: no images in it")
        files += [os.path.join(path, name) for name in inside]
    for path in files:
        image = load_image(path)
        if task == "cls":
            yield path, as_float(eval_transform(size)(image)), image.size[::-1]
        else:
            transform = dense_eval_transform(size, math.inf if task == "sem" else size * 1333 / 800)
            yield path, as_float(transform(functional.pil_to_tensor(image))), image.size[::-1]


def held_out(data, image_size, task, classes, count=8):
    """The first validation images, as of images_of()."""
    dataset = validation_set(data, image_size, task, classes)
    for index in range(min(count, len(dataset))):
        image, target = dataset[0, index]
        yield dataset.name(index), as_float(image), tuple(image.shape[1:]) if task == "cls" else target["size"]


def draw(model, classes, items, out, clusters, chosen, device):
    """Draws predictions, and if asked clusters and explanations, into the folder `out`.

    items: as of images_of().  chosen: names of classes to explain, or None.  Returns what was found, for --json.
    """
    os.makedirs(out, exist_ok=True)
    found, used = [], Counter()
    for name, image, size in tqdm(items, "draw", leave=False, disable=None):
        image = image.to(device)
        (prediction,) = model.predict([image], [size])
        prediction = {key: value.cpu() if isinstance(value, torch.Tensor) else value for key, value in prediction.items()}
        sheets = {"": [prediction_panels(prediction, classes, image.cpu(), size)]}
        if clusters:
            sheets["-clusters"] = cluster_panels(model, image)
        if chosen is not None:
            sheets["-explained"] = explanation_panels(model, image, classes, [classes.index(name) for name in chosen])
        stem = os.path.splitext(os.path.basename(name))[0]
        used[stem] += 1  # of other folders, or another format
        stem += f"-{used[stem]}" if used[stem] > 1 else ""
        for suffix, rows in sheets.items():
            sheet(rows).save(os.path.join(out, f"{stem}{suffix}.png"))
        found.append(dict(image=name, height=size[0], width=size[1], found=as_data(prediction, classes)))
    print(f"{len(found)} images drawn in {out}")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a last.pt or best.pt of train.py; it knows task and model")
    data = "evaluate its validation images (default: those of the data that the checkpoint was trained on)"
    parser.add_argument("--data", metavar="DIR", help=data)
    size = "pixels a side, dense tasks on files: of the short side (default: as in training)"
    parser.add_argument("--image-size", type=int, help=size)
    parser.add_argument("--batch-size", type=int, help="images per step and process (default: cls 128, dense tasks 8)")
    parser.add_argument("--workers", type=int, help="loader processes per process (default: spare cores, 16 at most)")
    parser.add_argument("--json", metavar="FILE", help="also write figures, as fractions of 1, or predictions to FILE")
    parser.add_argument("--per-class", action="store_true", help="also AP, IoU or PQ of each class; not for cls")
    parser.add_argument(
        "--save-predictions",
        metavar="FILE",
        help="write them in COCO's format: det, inst: to FILE; pan: to FILE.json and PNGs in the folder FILE; "
        "sem: PNGs of label + 1 to the folder FILE",
    )
    pictures = parser.add_argument_group("pictures")
    pictures.add_argument(
        "--images", nargs="*", metavar="PATH", help="draw predictions for these images and folders (default: 8 held-out images)"
    )
    pictures.add_argument("--clusters", action="store_true", help="draw clusters of each stage, and one block's E- and M-steps")
    pictures.add_argument(
        "--explain", nargs="*", metavar="CLASS", help="cls: draw what speaks for a class (default: the likeliest), or for one "
        "and against another"
    )
    pictures.add_argument("--out", metavar="DIR", default="pictures", help="where pictures go (default: pictures)")
    args = parser.parse_args()
    if args.batch_size is not None and args.batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, got {args.batch_size}")
    if args.workers is not None and args.workers < 0:
        raise InputError(f"--workers must be at least 0, got {args.workers}")
    if args.image_size is not None and args.image_size < 32:
        raise InputError(f"--image-size must be at least 32, got {args.image_size}")

    rank, world_size, device = start_processes()
    model, checkpoint = load_checkpoint(args.checkpoint)
    settings, classes = checkpoint["settings"], list(checkpoint["classes"])
    task, save = model.task, args.save_predictions
    if task == "cls" and (save or args.per_class):
        raise InputError("--save-predictions and --per-class are for the dense tasks; this checkpoint's task is cls")
    if save and (os.path.isfile(save) if task == "sem" else not save.endswith(".json")):
        raise InputError(f"--save-predictions {save}: for {task} it takes a {'folder' if task == 'sem' else '.json file'}")
    if save and not os.path.isdir(os.path.dirname(save) or "."):
        raise InputError(f"--save-predictions {save}: there is no folder {os.path.dirname(save)}")
    draws = args.images is not None or args.clusters or args.explain is not None
    chosen = args.explain or []
    if draws and (world_size > 1 or save or args.per_class):
        raise InputError("pictures are drawn by one process, without --per-class and --save-predictions")
    if args.explain is not None and task != "cls" or len(chosen) > 2 or not set(chosen) <= set(classes):
        raise InputError(f"--explain is for cls and takes up to two of its classes: {', '.join(classes)}")
    data = args.data or settings["data"]
    image_size = args.image_size or settings.get("test_size") or settings["image_size"]
    if draws:
        model.to(device)
        items = list(images_of(args.images, task, image_size)) if args.images else held_out(data, image_size, task, classes)
        found = draw(model, classes, items, args.out, args.clusters, args.explain, device)
        if args.json:
            with open(args.json, "w") as file:
                json.dump(found, file, indent=2)
        return
    dataset = validation_set(data, image_size, task, classes)
    if list(dataset.classes) != classes:
        raise InputError(f"{args.checkpoint} is trained for {len(classes)} classes that shapes do not have; give --data")
    check(dataset, "validation")
    workers = default_workers() if args.workers is None else args.workers
    batch_size = args.batch_size or (128 if task == "cls" else 8)
    metrics = evaluate(model.to(device), dataset, device, batch_size, workers, save, args.per_class)
    if rank == 0:
        print_metrics(metrics, task, compare=data is not None and len(classes) == PAPER_CLASSES[task])
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
    except KeyboardInterrupt:
        sys.exit(130)  # Ctrl-C, as shells have it; no traceback
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
