# SPDX-License-Identifier: MIT
"""Evaluate a checkpoint of train.py, or draw its predictions.

    python eval.py --checkpoint runs/cls/last.pt                                    on the data it was trained for
    python eval.py --checkpoint runs/cls/last.pt --data IMAGENET_DIR                on another folder's val/
    python eval.py --checkpoint runs/inst/last.pt --per-class --save-predictions inst.json
    torchrun --nproc_per_node=8 eval.py --checkpoint runs/inst/last.pt              on eight devices, with the same result
    python eval.py --checkpoint runs/inst/last.pt --images photo.jpg DIR --clusters --out pictures
    python eval.py --checkpoint runs/cls/last.pt --explain star cross               why the one and not the other

cls: top-1 and top-5.  det, inst: COCO's twelve metrics, by pycocotools.  sem: mIoU, pixel accuracy.  pan: PQ, SQ, RQ.

All are exact for any number of processes.  Process r of n takes images r, r + n, r + 2n, ..., and no image is counted
twice to fill a batch.  The first process puts the results back into the order of the images before it ranks or sums them.
"""

import argparse
import contextlib
import io
import itertools
import json
import math
import os
import sys
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.datasets.folder import is_image_file
from torchvision.ops import box_convert
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid
from tqdm import tqdm

from clusterformer import VERSION, ClusterFormer, make_layout, trace
from data import Ade, Coco, Folder, InputError, Shapes, as_float, check, collate, dense_eval_transform
from data import eval_transform, ignore_interrupts, is_hidden, load_image, loader_of


# ---------------------------------------------------------------------------------------------------------------
# Processes, checkpoint, data
# ---------------------------------------------------------------------------------------------------------------
def start_processes():
    """Join the processes that torchrun has started, if any.  Returns rank, number of processes, device."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if local_rank >= torch.cuda.device_count():
            raise InputError(f"more processes than the {torch.cuda.device_count()} GPUs here: lower --nproc_per_node")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # float32 products in TF32, among them those of the EM iterations
    if world_size > 1:
        # The others wait while one process runs COCO's evaluation, which takes longer than NCCL's ten minutes allow.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=1))
    return rank, world_size, device


def default_workers():
    """Loader processes for each training process: its share of the cores less two, 16 at most.

    On two cores that is none: a loader would take a core from threads that wait for one another.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(0, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 2))


def load_checkpoint(path):
    """The model with averaged weights, in evaluation mode on the CPU, and the whole checkpoint of train.py.

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
    """The held-out images.  data: None for shapes, or a folder in the task's layout.

    image_size: pixels per side for shapes and cls.  For the dense tasks on files, pixels of the short side; in COCO the
    long side has at most 1333 for every 800 of it, as is usual.
    """
    if data is None:
        return Shapes(2000 if task == "cls" else 500, image_size, seed=0, split="val", task=task)
    if task == "cls":
        return Folder(data, "val", eval_transform(image_size), classes=classes)
    if task == "sem":
        return Ade(data, "val", dense_eval_transform(image_size, math.inf), classes=classes)
    return Coco(data, "val", task, dense_eval_transform(image_size, image_size * 1333 / 800), classes=classes)


# ---------------------------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------------------------
METRIC = dict(cls="top1", det="AP", inst="mask_AP", sem="miou", pan="PQ")  # by which the best checkpoint is chosen
PAPER = dict(cls=0.8341, det=0.542, inst=0.470, sem=0.524, pan=0.558)  # the same for the paper's Small
PAPER_CLASSES = dict(cls=1000, det=80, inst=80, sem=150, pan=133)  # in ImageNet-1K, COCO, COCO, ADE20K, COCO panoptic
COCO_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def run_lengths(masks):
    """Masks, bool (n, H, W), as the n run-length encodings of COCO's files."""
    columns = masks.mT.contiguous().byte().cpu().numpy().T  # (H, W, n), column by column, as runs are
    return [dict(size=rle["size"], counts=rle["counts"].decode()) for rle in mask_utils.encode(columns)]


def coco_results(prediction, image_id, categories):
    """A prediction of det or inst in COCO's result format, with boxes rounded as COCO's own are."""
    boxes = box_convert(prediction["boxes"], "xyxy", "xywh").tolist()
    results = [
        dict(image_id=image_id, category_id=categories[label], bbox=[round(x, 2) for x in box], score=score)
        for label, box, score in zip(prediction["labels"].tolist(), boxes, prediction["scores"].tolist())
    ]
    if "masks" in prediction:
        for result, rle in zip(results, run_lengths(prediction["masks"])):
            result["segmentation"] = rle
    return results


def coco_metrics(truth, results, kind):
    """COCO's twelve metrics, nan where there is nothing to find, and a list of the AP of each class.

    truth: COCO object.  results: of coco_results.  kind: "bbox" or "segmentation", what is compared.
    """
    # loadRes changes its argument, refuses an empty list, and takes the size of a mask from its box if there is one.
    results = [{key: result[key] for key in ("image_id", "category_id", "score", kind)} for result in results]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCOeval(truth, truth.loadRes(results) if results else COCO(), kind.replace("segmentation", "segm"))
        coco.evaluate()
        coco.accumulate()
        coco.summarize()
    metrics = {name: value if value >= 0 else math.nan for name, value in zip(COCO_METRICS, coco.stats.tolist())}
    precision = torch.from_numpy(coco.eval["precision"][..., 0, -1])  # (IoU thresholds, recalls, classes)
    each = precision.where(precision >= 0, math.nan).nanmean((0, 1)).tolist()  # in the order of the categories' numbers
    numbers = [category["id"] for category in truth.dataset["categories"]]
    return metrics, [each[sorted(numbers).index(number)] for number in numbers]


def panoptic_counts(predicted, segments, truth, entries, category_class, num_classes):
    """What one image adds to panoptic quality (Kirillov et al., 2019), per class.

    predicted: int64 (H, W), ids of P segments, 0 for none.  segments: list of {"id", "label"}.
    truth: int64 (H, W), ids of G entries, 0 for void.  entries: list of {"id", "category_id", "iscrowd"}.
    category_class: category_id -> class.
    Returns float64 (num_classes, 4): sum of the IoU of matches, true positives, false positives, false negatives.
    """
    row = {entry["id"]: i for i, entry in enumerate(entries, 1)}
    column = {segment["id"]: j for j, segment in enumerate(segments, 1)}
    overlap = np.zeros((len(entries) + 1, len(segments) + 1))  # pixels; row 0: void, column 0: no segment
    base = int(predicted.max()) + 1
    pairs, pixels = (truth * base + predicted).unique(return_counts=True)
    for pair, n in zip(pairs.tolist(), pixels.tolist()):
        overlap[row.get(pair // base, 0), column.get(pair % base, 0)] += n
    true_class = np.array([category_class[entry["category_id"]] for entry in entries], int)  # (G,)
    label = np.array([segment["label"] for segment in segments], int)  # (P,)
    crowd = np.array([entry.get("iscrowd", 0) for entry in entries], bool)
    void, area_true, area_predicted = overlap[0, 1:], overlap.sum(1)[1:], overlap.sum(0)[1:]
    overlap, same = overlap[1:, 1:], true_class[:, None] == label  # (G, P)
    union = area_true[:, None] + area_predicted - overlap - void  # void counts neither for nor against a prediction
    iou = overlap / union.clip(1)
    match = same & ~crowd[:, None] & (iou > 0.5)  # no segment can have two
    # A segment that lies mostly on void, or on a crowd of its class, is no false positive.
    ignored = void + (overlap * (same & crowd[:, None])).sum(0)
    false_positive = ~match.any(0) & (area_predicted > 0) & (ignored <= 0.5 * area_predicted)
    false_negative = ~match.any(1) & (area_true > 0) & ~crowd
    counts = np.zeros((4, num_classes))
    np.add.at(counts[0], label[match.nonzero()[1]], iou[match])
    for count, labels in zip(counts[1:], (label[match.any(0)], label[false_positive], true_class[false_negative])):
        count += np.bincount(labels, minlength=num_classes)
    return torch.from_numpy(counts.T)


def panoptic_quality(counts, chosen):
    """PQ, SQ, RQ, means over the chosen classes (bool (C,)) that occur.  counts: float64 (C, 4), summed over images."""
    iou, tp, fp, fn = counts[chosen & (counts[:, 1:].sum(1) > 0)].unbind(1)
    rq = tp / (tp + 0.5 * fp + 0.5 * fn)
    sq = iou / tp.clamp(min=1)
    return [x.mean().item() if len(x) else math.nan for x in (sq * rq, sq, rq)]


def confusion_counts(predicted, truth, num_classes):
    """int64 (C, C): pixels of each true class (rows) that were predicted as each class (columns); ignores truth < 0."""
    real = truth >= 0
    return torch.bincount(truth[real] * num_classes + predicted[real], minlength=num_classes**2).view(num_classes, -1)


def semantic_metrics(confusion):
    """mIoU over the classes that occur in truth or prediction, pixel accuracy, and IoU per class (nan if absent)."""
    right = confusion.diag().double()
    union = confusion.sum(0) + confusion.sum(1) - right
    iou = right / union
    return dict(miou=iou[union > 0].mean().item(), pixel_accuracy=(right.sum() / confusion.sum()).item()), iou


def print_table(rows):
    """rows: lists of strings, the first one titles."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for cells in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths)))


def describe(metrics, task):
    """The main metrics of evaluate() in a line."""
    line = dict(
        cls="top-1 {top1:.2%}, top-5 {top5:.2%}",
        det="box AP {AP:.3f}, AP50 {AP50:.3f}, AP75 {AP75:.3f}",
        inst="box AP {box_AP:.3f}, AP50 {box_AP50:.3f}; mask AP {mask_AP:.3f}, AP50 {mask_AP50:.3f}",
        sem="mIoU {miou:.3f}, pixel accuracy {pixel_accuracy:.3f}",
        pan="PQ {PQ:.3f} (things {PQ_th:.3f}, stuff {PQ_st:.3f}), SQ {SQ:.3f}, RQ {RQ:.3f}",
    )
    return line[task].format(**metrics)


def print_metrics(metrics, task, compare):
    """Print what evaluate() returns.  compare: whether to print the paper's result beside it."""
    paper = f"{PAPER[task]:.2%}" if task == "cls" else f"{PAPER[task]:.3f}"
    print(f"{describe(metrics, task)} of {metrics['images']} images" + f" (the paper's Small: {paper})" * compare)
    if task in ("det", "inst"):
        kinds = {"box": ""} if task == "det" else {"box": "box_", "mask": "mask_"}
        rows = [[kind, *(f"{metrics[prefix + name]:.3f}" for name in COCO_METRICS)] for kind, prefix in kinds.items()]
        print_table([["", *COCO_METRICS], *rows])
    if "per_class" in metrics:
        rows = metrics["per_class"]
        print_table([list(rows[0]), *([x if isinstance(x, str) else f"{x:.3f}" for x in row.values()] for row in rows)])


# ---------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------
def accuracy(model, batches, device):
    """evaluate()'s metrics for cls.  batches: of this process."""
    counts = torch.zeros(3, dtype=torch.int64, device=device)  # top-1 hits, top-5 hits, images
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


def identity(dataset, index):
    """Name, without suffix, and number of an image in the files of its data set."""
    name, number = str(index), index
    if isinstance(dataset, Coco):
        name, number, _ = dataset.images[index]
    elif isinstance(dataset, Ade):
        name = os.fsdecode(dataset.names[index])
    return os.path.splitext(name)[0].replace("/", "_"), number  # a name with folders could lead out of where we save


def save_panoptic(prediction, name, image_id, categories, folder):
    """Write a panoptic map, id = R + 256 G + 256^2 B, to folder/name.png.  Returns its entry in COCO's result format."""
    ids = prediction["panoptic"]
    rgb = torch.stack([ids % 256, ids // 256 % 256, ids // 256**2], -1)  # (H, W, 3)
    Image.fromarray(rgb.byte().cpu().numpy()).save(os.path.join(folder, name + ".png"))
    there = ids.unique().tolist()  # COCO's evaluation refuses a segment without pixels
    table = {x["id"]: categories[x["label"]] for x in prediction["segments"] if x["id"] in there}
    segments = [dict(id=segment, category_id=category) for segment, category in table.items()]
    return dict(image_id=image_id, file_name=name + ".png", segments_info=segments)


def score_image(dataset, task, index, prediction, folder):
    """Compare a prediction with the truth, and write its PNG to `folder`, if given.  Returns a few kilobytes.

    det, inst: COCO results.  sem: confusion, sparse because an image has few classes.  pan: counts, and the entry in
    COCO's JSON (None without a folder).
    """
    name, number = identity(dataset, index)
    num_classes, categories = len(dataset.classes), dataset.categories
    if task == "sem":
        labels = prediction["semantic"]
        if folder:
            pixels = (labels + 1).cpu().numpy().astype(np.uint8 if num_classes < 256 else np.uint16)
            Image.fromarray(pixels).save(os.path.join(folder, name + ".png"))
        return confusion_counts(labels, dataset.label_map(index).to(labels.device), num_classes).cpu().to_sparse()
    if task == "pan":
        truth, entries = dataset.segments(index)
        ids, label_of = prediction["panoptic"], {category: label for label, category in enumerate(categories)}
        counts = panoptic_counts(ids, prediction["segments"], truth.to(ids.device), entries, label_of, num_classes)
        return counts, save_panoptic(prediction, name, number, categories, folder) if folder else None
    return coco_results(prediction, number, categories)


def dense_metrics(dataset, task, kept):
    """evaluate()'s metrics from what score_image() returned for all images, in their order.

    Returns a dictionary, and per metric (a name) a list of its values for each class.
    """
    if task == "sem":
        metrics, iou = semantic_metrics(sum(confusion.to_dense() for confusion in kept))
        return metrics, dict(IoU=iou.tolist())
    if task == "pan":
        counts = sum(counts for counts, _ in kept)  # in order: the same to the last bit for any number of processes
        things, metrics = torch.tensor(dataset.things), {}
        for suffix, chosen in (("", torch.ones_like(things)), ("_th", things), ("_st", ~things)):
            metrics |= zip([name + suffix for name in ("PQ", "SQ", "RQ")], panoptic_quality(counts, chosen))
        each = torch.eye(len(things), dtype=torch.bool)
        return metrics, dict(zip(("PQ", "SQ", "RQ"), zip(*(panoptic_quality(counts, one) for one in each))))
    truth, results = dataset.coco(), list(itertools.chain(*kept))
    boxes, box_ap = coco_metrics(truth, results, "bbox")
    if task == "det":
        return boxes, dict(AP=box_ap)
    masks, mask_ap = coco_metrics(truth, results, "segmentation")
    metrics = {f"box_{name}": value for name, value in boxes.items()}
    return metrics | {f"mask_{name}": value for name, value in masks.items()}, dict(box_AP=box_ap, mask_AP=mask_ap)


def evaluate(model, dataset, device, batch_size=128, workers=0, save=None, per_class=False):
    """The metrics of a model on a data set, over all processes.

    model: ClusterFormer itself, not wrapped (processes may have different numbers of batches).
    save: where predictions go.  det, inst: a JSON file.  pan: a JSON file, and PNGs in the folder of that name without
    ".json".  sem: a folder of PNGs, label + 1 as in ADE20K's.
    Returns the same on every process: the number of "images", and as fractions of 1, nan where there is nothing to find,
        cls: top1, top5   sem: miou, pixel_accuracy   pan: PQ, SQ, RQ, and for things PQ_th, ..., for stuff PQ_st, ...
        det: COCO_METRICS   inst: the same for boxes, box_AP, ..., and for masks, mask_AP, ...
    per_class: adds "per_class", a list of a dictionary for each class; not for cls.
    """
    task, distributed = model.task, dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    keys = [(0, index) for index in range(rank, len(dataset), world_size)]
    options = dict(sampler=keys, collate_fn=None if task == "cls" else collate, worker_init_fn=ignore_interrupts)
    loader = loader_of(dataset, workers, device, batch_size=batch_size, **options)
    bar = tqdm(loader, "evaluate", leave=False, disable=True if rank else None)
    if task == "cls":
        return accuracy(model, bar, device)
    folder = save and {"sem": save, "pan": save.removesuffix(".json")}.get(task)
    if folder:
        os.makedirs(folder, exist_ok=True)
    kept = {}  # index of an image -> what score_image() returns
    for images, targets in bar:
        images = as_float([image.to(device, non_blocking=True) for image in images])
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            predictions = model.predict(images, [tuple(target["size"]) for target in targets])
        for target, prediction in zip(targets, predictions):
            kept[target["index"]] = score_image(dataset, task, target["index"], prediction, folder)
    parts, metrics = [kept], [None]
    if distributed:
        parts = [None] * world_size if rank == 0 else None
        dist.gather_object(kept, parts)
    if rank == 0:
        kept = [parts[index % world_size][index] for index in range(len(dataset))]
        metrics[0], columns = dense_metrics(dataset, task, kept)
        metrics[0]["images"] = len(dataset)
        if per_class:
            rows = zip(dataset.classes, *columns.values())
            metrics[0]["per_class"] = [dict(zip(("class", *columns), row)) for row in rows]
        if save and task != "sem":
            pan = task == "pan"
            content = dict(annotations=[entry for _, entry in kept]) if pan else list(itertools.chain(*kept))
            write_json(content, save)
    if distributed:
        dist.broadcast_object_list(metrics)
    return metrics[0]


def write_json(content, path, indent=None):
    with open(path, "w") as file:
        json.dump(content, file, indent=indent)


# ---------------------------------------------------------------------------------------------------------------
# Pictures are rows of titled panels, uint8 (3, H, W).  torchvision paints boxes and masks.  It has no borders, its captions
# are small and hide each other, and its grids have no titles: these are drawn here.
# ---------------------------------------------------------------------------------------------------------------
MIN_SCORE = 0.3  # of the objects drawn for det and inst; --json has all
ORANGE, BLUE = (213, 94, 0), (0, 114, 178)
# Seven colors that color-blind readers can tell apart (Okabe and Ito, 2008), then paler ones of the same.
OKABE_ITO = (BLUE, (230, 159, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), ORANGE, (240, 228, 66))
COLORS = [tuple(round(c + pale * (255 - c)) for c in rgb) for pale in (0.0, 0.5, 0.25, 0.7) for rgb in OKABE_ITO]


def panel_of(image, side):
    """float (3, H, W) -> a panel whose long side has `side` pixels; the pixels of small images become squares."""
    size = [max(1, round(length * side / max(image.shape[1:]))) for length in image.shape[1:]]
    how = InterpolationMode.NEAREST if side > max(image.shape[1:]) else InterpolationMode.BILINEAR
    return functional.to_dtype(functional.resize(image.cpu(), size, how), torch.uint8, scale=True)


def enlarge(values, size, panel, stride=1):
    """A map with a value per stride x stride pixels of an image of size (H, W), in the size of a panel, unsmoothed."""
    rows, columns = (torch.arange(new) * old // new // stride for new, old in zip(panel.shape[1:], size))
    return values.cpu()[rows[:, None], columns]


def paint(panel, regions):
    """Color regions, int64 (H, W), -1 for none, with white borders that also separate similar colors."""
    numbers = regions[regions >= 0].unique()
    if len(numbers):
        colors = [COLORS[number % len(COLORS)] for number in numbers.tolist()]
        panel = draw_segmentation_masks(panel, regions == numbers[:, None, None], 0.7, colors)
    border = torch.zeros_like(regions, dtype=torch.bool)
    border[1:] |= regions[1:] != regions[:-1]
    border[:, 1:] |= regions[:, 1:] != regions[:, :-1]
    return panel.masked_fill(border, 255)


def write(panel, places, texts):
    """Write texts near (x, y), white on black to be readable on any image, moved where they would overlap."""
    picture, font, taken = functional.to_pil_image(panel), ImageFont.load_default(13), []
    draw = ImageDraw.Draw(picture)
    for (x, y), text in zip(places, texts):
        width, height = math.ceil(font.getlength(text)) + 4, 18
        x, y = max(0, min(round(x), picture.width - width)), max(0, min(round(y), picture.height - height))
        rows = [*range(y, picture.height - height + 1), *range(y)]  # down from the place, then from the top
        free = (row for row in rows if all(abs(row - b) >= height or a >= x + width or x >= a + w for a, b, w in taken))
        y = next(free, y)
        taken.append((x, y, width))
        draw.rectangle([x, y, x + width - 1, y + height - 1], "black")
        draw.text((x + 2, y + 1), text, "white", font)
    return functional.pil_to_tensor(picture)


def sheet(rows):
    """One picture of rows of (title, panel), all panels of one size, under titles of one or two lines."""
    columns, margin = max(map(len, rows)), 44
    height, width = rows[0][0][1].shape[1], max(rows[0][0][1].shape[2], 300)  # wide enough for a title
    cells = torch.full((len(rows), columns, 3, height, width), 255, dtype=torch.uint8)
    for i, j in ((i, j) for i, row in enumerate(rows) for j in range(len(row))):
        cells[i, j, :, :, : rows[i][j][1].shape[2]] = rows[i][j][1]
    picture = functional.to_pil_image(make_grid(cells.flatten(0, 1), columns, margin, pad_value=255))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(15)
    for i, row in enumerate(rows):
        for j, (title, _) in enumerate(row):
            place = margin + j * (width + margin), margin + i * (height + margin) - 4
            draw.text(place, title, "black", font, anchor="ld")
    return picture


def findings(prediction, names):
    """A prediction as a list of {"name", "score"}, for sem {"name", "share"}, and "box", "mask", "isthing" where known."""
    if "semantic" in prediction:
        masks = {c: prediction["semantic"] == c for c in prediction["semantic"].unique().tolist()}
        return [dict(name=names[c], share=mask.float().mean().item(), mask=mask) for c, mask in masks.items()]
    if "panoptic" in prediction:
        parts = [(part, prediction["panoptic"] == part["id"]) for part in prediction["segments"]]
        return [dict(name=names[p["label"]], score=p["score"], isthing=p["isthing"], mask=mask) for p, mask in parts]
    labels, scores = prediction["labels"].tolist(), prediction["scores"].tolist()
    found = [dict(name=names[label], score=score) for label, score in zip(labels, scores)]
    for key, name in (("boxes", "box"), ("masks", "mask")):  # boxes: xyxy, in pixels of the file
        for row, value in zip(found, prediction.get(key, ())):
            row[name] = value
    return found


def prediction_panels(found, names, task, image, size):
    """findings() beside the image, float (3, H, W).  size: the (H, W) in whose pixels boxes and masks are."""
    panel, title = panel_of(image, 560), "prediction"
    if task in ("det", "inst"):
        found = [x for x in found if x["score"] >= MIN_SCORE]
        title = f"{len(found)} objects with a score of at least {MIN_SCORE}"
    numbers = [names.index(x["name"]) if task == "sem" else i for i, x in enumerate(found)]  # of colors
    regions = torch.full(panel.shape[1:], -1)
    for number, x in reversed([*zip(numbers, found)]):  # the highest score on top
        if "mask" in x:
            regions[enlarge(x["mask"], size, panel)] = number
    picture, places, texts = paint(panel, regions), [], []
    for i, (number, x) in enumerate(zip(numbers, found)):
        place, pixels = (8, 8 + 24 * i), (regions == number).nonzero()  # (n, 2), of y and x
        if "box" in x:
            box = x["box"].cpu() * torch.tensor([panel.shape[2] / size[1], panel.shape[1] / size[0]] * 2)
            picture = draw_bounding_boxes(picture, box[None], colors=[COLORS[number % len(COLORS)]], width=3)
            place = box[:2].tolist()
        elif len(pixels):  # the pixel that is next to the mean of all
            place = pixels[(pixels - pixels.float().mean(0)).square().sum(1).argmin()].flip(0).tolist()
        if "mask" not in x or len(pixels):
            places.append(place)
            texts.append(f"{x['name']} {x['share']:.1%}" if "share" in x else f"{x['name']} {x['score']:.2f}")
    return [("image", panel), (title, write(picture, places, texts))]


def grid_assignment(height, width, device=None):
    """The grid cells of a map as clusters: (1, K, N), the weight of each token in the mean of each cell."""
    layout = make_layout(height, width, device=device)
    return (layout.row_pool[:, :, None, :, None] * layout.column_pool[:, None, :, None]).flatten(3).flatten(1, 2)


def cluster_panels(model, image):
    """Clusters in the last block of each stage, and in each iteration of one block.  image: float (3, H, W)."""
    with torch.no_grad():
        history = trace(model, [image])
    panel = panel_of(image, 320)

    def clusters(title, assignment, block, stride):
        """assignment: (h, K, N).  A token is in the cluster to which it is assigned most, in the mean over heads."""
        regions = assignment.mean(0).argmax(0).view(block["size"])
        return title, paint(panel, enlarge(regions, image.shape[1:], panel, stride))

    rows = [[("image", panel)], []]
    for i, stride in enumerate(model.backbone.strides):
        block = [entry for entry in history if entry["name"].startswith(f"backbone.stages.{i}.")][-1]
        steps = [M[0] for M in block["assignments"]]
        title = f"stage {i + 1}, stride {stride}: {len(steps[-1][0])} clusters"
        rows[0].append(clusters(title, steps[-1], block, stride))
        if i == 1:
            rows[1] = [clusters("stage 2: C(0), the grid", grid_assignment(*block["size"]), block, stride)]
            rows[1] += [clusters(f"iteration {t + 1}: M({t})", M, block, stride) for t, M in enumerate(steps)]
    return rows


def explain(model, image, weights):
    """The exact explanation of a logit, or of a difference of two: bias + what each token contributes to each center.

    image: float (3, H, W).  weights: (classes,), of the logits: 1 for one, 1 and -1 for a difference.
    Returns the value, the bias, and contributions (K, h, w), per center and token; value = bias + their sum.  This is
    exact for the weights of the means as they came out.  It does not say how the image changes those weights, nor how
    the backbone made the tokens.
    """
    head = model.head
    with torch.no_grad():
        value = model([image])["logits"][0] @ weights
        entry = trace(model, [image])[-1]  # the head's clustering
        C, tokens, size = entry["centers"][-1][0], entry["tokens"][0], entry["size"]  # (K, D), (N, D)
        # The weight of each channel of a center, through its norm: subtract the mean, divide by the deviation, scale.
        w = weights @ head.classifier.weight * head.center_norm.weight  # (D,)
        w = (w - w.mean()) / (C.var(1, correction=0, keepdim=True) + head.center_norm.eps).sqrt() / len(C)  # (K, D)
        contributions = grid_assignment(*size, image.device)[0] * (w @ tokens.T)  # (K, N), through C(0)
        values, W = entry["values"][0], sum(entry["weights"])[0]  # (h, N, d), (h, K, N), over all iterations
        w = w.unflatten(1, (-1, len(values))).permute(2, 0, 1)  # (h, K, d): head j collects channels j, j + h, ...
        contributions = contributions + (W * (w @ values.transpose(1, 2))).sum(0)
    return value.item(), (weights @ head.classifier(head.center_norm.bias)).item(), contributions.unflatten(1, size)


def explanation_panels(model, image, names, chosen):
    """explain() as pictures.  chosen: numbers of the one class or the two to be compared; none: the most likely class."""
    with torch.no_grad():
        chosen = chosen or [model([image])["logits"][0].argmax().item()]
    weights = torch.zeros(len(names), device=image.device)
    weights[chosen] = torch.tensor([1.0, -1.0], device=image.device)[: len(chosen)]
    value, bias, contributions = explain(model, image, weights)
    contributions, panel = contributions.cpu(), panel_of(image, 320)
    total, of_center = contributions.sum(0), contributions.sum((1, 2))
    gray = panel.float().mean(0)

    def heat(values, largest):
        """Values over the gray image, orange above zero, blue below, with full color at `largest`."""
        values = enlarge(values, image.shape[1:], panel, model.backbone.strides[-1]) / largest.clamp(min=1e-9)
        hue = torch.where(values < 0, *(torch.tensor(rgb).view(3, 1, 1) for rgb in (BLUE, ORANGE)))
        return torch.lerp(gray.expand_as(hue), hue.float(), 0.8 * values.abs()).byte()

    parts = f"orange {total.clamp(min=0).sum():+.2f}, blue {total.clamp(max=0).sum():+.2f}, bias {bias:+.2f}"
    title = f"{' - '.join(names[number] for number in chosen)}: {value:.3f}\n{parts}"
    rows = [[("image", panel), (title, heat(total, total.abs().max()))]]
    for side, sign in (("for", 1), ("against", -1)):
        centers = [k for k in (sign * of_center).argsort(descending=True)[:5].tolist() if sign * of_center[k] > 0]
        largest = contributions.abs().amax((1, 2))
        row = [(f"{side} it: center {k}, {of_center[k]:+.3f}", heat(contributions[k], largest[k])) for k in centers]
        rows += [row] if row else []
    return rows


def images_of(paths, task, size):
    """Images and folders of images -> (name, image as the model takes it, size (H, W) in the file) of each."""
    files = []
    for path in paths:
        inside = [path]
        if os.path.isdir(path):
            inside = sorted(name for name in os.listdir(path) if is_image_file(name) and not is_hidden(name))
            inside = [os.path.join(path, name) for name in inside]
        if not inside:
            raise InputError(f"{path}: no images in it")
        files += inside
    transform = eval_transform(size)
    if task != "cls":
        resize = dense_eval_transform(size, math.inf if task == "sem" else size * 1333 / 800)
        transform = lambda image: resize(functional.pil_to_tensor(image))
    for path in files:
        image = load_image(path)
        yield path, as_float(transform(image)), image.size[::-1]


def held_out(dataset, count=8):
    """The first validation images, as from images_of()."""
    for index in range(min(count, len(dataset))):
        image, target = dataset[0, index]
        yield dataset.name(index), as_float(image), target["size"] if isinstance(target, dict) else image.shape[1:]


def draw(model, classes, items, out, clusters, chosen, device):
    """Draw predictions, and if asked clusters and explanations, into the folder `out`.

    items: from images_of().  chosen: names of classes to explain, or None.  Returns what was found, for --json.
    """
    os.makedirs(out, exist_ok=True)
    result, used = [], []
    for name, image, size in tqdm(items, "draw", leave=False, disable=None):
        image = image.to(device)
        found = findings(model.predict([image], [size])[0], classes)
        sheets = {"": [prediction_panels(found, classes, model.task, image, size)]}
        if clusters:
            sheets["-clusters"] = cluster_panels(model, image)
        if chosen is not None:
            sheets["-explained"] = explanation_panels(model, image, classes, [classes.index(x) for x in chosen])
        stem = os.path.splitext(os.path.basename(name))[0]
        used.append(stem)
        stem += f"-{used.count(stem)}" if used.count(stem) > 1 else ""  # the same name in another folder or format
        for suffix, rows in sheets.items():
            sheet(rows).save(os.path.join(out, f"{stem}{suffix}.png"))
        for x in found:
            x |= {"box": [round(value, 2) for value in x["box"].tolist()]} if "box" in x else {}
            x |= {"mask": run_lengths(x["mask"][None])[0]} if "mask" in x else {}
        result.append(dict(image=name, height=size[0], width=size[1], found=found))
    print(f"{len(result)} images drawn in {out}")
    return result


# ---------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------
def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", required=True, help="a last.pt or best.pt of train.py; it knows task and model")
    add("--data", metavar="DIR", help="use the validation images in DIR (default: those of the training data)")
    add("--image-size", type=int, help="pixels per side; for dense tasks on files, of the short side (default: as in training)")
    add("--batch-size", type=int, help="images per step and process (default: cls 128, dense tasks 8)")
    add("--workers", type=int, help="loader processes per process (default: spare cores, 16 at most)")
    add("--json", metavar="FILE", help="also write metrics, as fractions of 1, or predictions to FILE")
    add("--per-class", action="store_true", help="also AP, IoU or PQ of each class; not for cls")
    add("--save-predictions", metavar="FILE", help="write them in COCO's format: det, inst: to FILE; pan: to FILE.json "
        "and PNGs in the folder FILE; sem: PNGs of label + 1 to the folder FILE")  # fmt: skip
    add = parser.add_argument_group("pictures").add_argument
    add("--images", nargs="*", metavar="PATH", help="draw predictions for images and folders (default: 8 held-out images)")
    add("--clusters", action="store_true", help="draw the clusters of each stage, and each iteration of one block")
    add("--explain", nargs="*", metavar="CLASS", help="cls: draw what speaks for a class (default: the most likely one), "
        "or for one and against another")  # fmt: skip
    add("--out", metavar="DIR", default="pictures", help="where pictures go (default: pictures)")
    args = parser.parse_args()
    args.draw = args.images is not None or args.clusters or args.explain is not None
    for name, least in dict(batch_size=1, workers=0, image_size=32).items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    return args


def check_arguments(args, task, classes, world_size):
    """Raise InputError if a flag does not suit the checkpoint or the number of processes."""
    save, chosen = args.save_predictions, args.explain or []
    if task == "cls" and (save or args.per_class):
        raise InputError("--save-predictions and --per-class are for the dense tasks; this checkpoint's task is cls")
    if save and (os.path.isfile(save) if task == "sem" else not save.endswith(".json")):
        raise InputError(f"--save-predictions {save}: for {task} it takes a {'folder' if task == 'sem' else '.json file'}")
    if save and not os.path.isdir(os.path.dirname(save) or "."):
        raise InputError(f"--save-predictions {save}: there is no folder {os.path.dirname(save)}")
    if args.draw and (world_size > 1 or save or args.per_class):
        raise InputError("pictures are drawn by one process, without --per-class and --save-predictions")
    if args.explain is not None and task != "cls" or len(chosen) > 2 or not set(chosen) <= set(classes):
        raise InputError(f"--explain is for cls and takes up to two of its classes: {', '.join(classes)}")


def main():
    args = parse_arguments()
    rank, world_size, device = start_processes()
    model, checkpoint = load_checkpoint(args.checkpoint)
    settings, classes, task = checkpoint["settings"], list(checkpoint["classes"]), model.task
    check_arguments(args, task, classes, world_size)
    model.to(device)
    data = args.data or settings["data"]
    image_size = args.image_size or settings.get("test_size") or settings["image_size"]
    if args.images:
        items = list(images_of(args.images, task, image_size))
    else:
        dataset = validation_set(data, image_size, task, classes)
        items = held_out(dataset)
    if args.draw:
        result = draw(model, classes, items, args.out, args.clusters, args.explain, device)
    else:
        if list(dataset.classes) != classes:
            raise InputError(f"{args.checkpoint} is trained for {len(classes)} classes that shapes do not have; give --data")
        check(dataset, "validation")
        workers = default_workers() if args.workers is None else args.workers
        batch_size = args.batch_size or (128 if task == "cls" else 8)
        result = evaluate(model, dataset, device, batch_size, workers, args.save_predictions, args.per_class)
        if rank == 0:
            print_metrics(result, task, compare=data is not None and len(classes) == PAPER_CLASSES[task])
    if args.json and rank == 0:
        write_json(result, args.json, indent=2)


def run(main):
    """Call main; an error in the user's input ends the program with one line instead of a traceback."""
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
