# SPDX-License-Identifier: MIT
"""Evaluate a checkpoint of train.py, or draw its predictions.

    python eval.py --checkpoint runs/cls/last.pt                     on the data it was trained for
    python eval.py --checkpoint runs/cls/last.pt --data IMAGENET_DIR     on another folder's val/
    python eval.py --checkpoint runs/inst/last.pt --per-class --save-predictions inst.json
    torchrun --nproc_per_node=8 eval.py --checkpoint runs/inst/last.pt     the same, on 8 devices
    python eval.py --checkpoint runs/inst/last.pt --images photo.jpg DIR --clusters --out pictures
    python eval.py --checkpoint runs/cls/last.pt --explain star cross    why the one, not the other

cls: top-1 and top-5.  det, inst: COCO's twelve metrics, by pycocotools.  sem: mIoU and pixel
accuracy.  pan: PQ, SQ, RQ.

All are exact for any number of processes.  Process r of n takes images r, r + n, r + 2n, ..., and
no image is counted twice to fill a batch.  The first process puts the results back into the order
of the images before it ranks or sums them.
"""

import argparse
import contextlib
import io
import itertools
import json
import math
import os
import sys

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.datasets.folder import is_image_file
from torchvision.ops import box_convert
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks
from tqdm import tqdm

from clusterformer import VERSION, ClusterFormer, grid_shape, trace
from data import InputError, Parser, Shapes, as_float, batches_of, default_workers, dense_eval_transform
from data import eval_transform, in_one_line, lists, load_image, make_dataset, number, start_processes
from data import to_json

METRIC = dict(cls="top1", det="AP", inst="mask_AP", sem="miou", pan="PQ")  # it chooses best.pt
COCO_METRICS = "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split()


def read_checkpoint(path):
    """The content of a checkpoint of train.py, a dictionary, on the CPU."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # no code can run
        if checkpoint["version"] != VERSION:
            raise ValueError(f"version {checkpoint['version']}, not {VERSION}")
        return {name: checkpoint[name] for name in ("settings", "classes", "arguments", "ema")} | checkpoint
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    except Exception as error:  # broken archives raise many kinds of exceptions, some of many lines
        why = str(error)[:99] if isinstance(error, ValueError) else type(error).__name__
        raise InputError(f"{path}: not a whole checkpoint of this train.py ({why}); train anew") from error


def load_checkpoint(path):
    """Return the averaged model, in evaluation mode on the CPU, and the whole checkpoint."""
    checkpoint = read_checkpoint(path)
    try:
        model = ClusterFormer(**checkpoint["arguments"])
        model.load_state_dict(checkpoint["ema"])
    except (TypeError, ValueError, RuntimeError) as error:  # weights that do not fit: a line for each
        why = str(error)[:99] if isinstance(error, ValueError) else type(error).__name__
        raise InputError(f"{path}: not a whole checkpoint of this train.py ({why}); train anew") from error
    return model.eval(), checkpoint


# --------------------------------------------------------------------------------------------------
# Metrics
# --------------------------------------------------------------------------------------------------
def run_lengths(masks):
    """Masks, bool (n, H, W), as the n run-length encodings of COCO's files."""
    # One by one: a copy of all masks of a large photograph would take a gigabyte.  Runs go down columns.
    encoded = [mask_utils.encode(mask.mT.contiguous().byte().cpu().numpy().T) for mask in masks]
    return [dict(size=rle["size"], counts=rle["counts"].decode()) for rle in encoded]


def coco_results(prediction, image_id, categories):
    """A prediction of det or inst in COCO's result format, with boxes rounded as COCO's own are."""
    ids = [categories[label] for label in prediction["labels"].tolist()]
    boxes = box_convert(prediction["boxes"], "xyxy", "xywh").tolist()
    results = [
        dict(image_id=image_id, category_id=i, bbox=[round(x, 2) for x in box], score=score)
        for i, box, score in zip(ids, boxes, prediction["scores"].tolist())
    ]
    if "masks" in prediction:
        for result, rle in zip(results, run_lengths(prediction["masks"])):
            result["segmentation"] = rle
    return results


def coco_metrics(truth, results, kind):
    """COCO's twelve metrics, nan where there is nothing to find, and the AP of each class.

    truth: COCO object.  results: from coco_results.  kind: compare "bbox" or "segmentation".
    """
    # loadRes changes its argument, rejects an empty list, and takes areas of masks from boxes.
    keys = ("image_id", "category_id", "score", kind)
    results = [{key: result[key] for key in keys} for result in results]
    with contextlib.redirect_stdout(io.StringIO()):
        found = truth.loadRes(results) if results else COCO()
        coco = COCOeval(truth, found, "segm" if kind == "segmentation" else kind)
        coco.evaluate()
        coco.accumulate()
        coco.summarize()
    values = np.where(coco.stats >= 0, coco.stats, math.nan).tolist()
    precision = torch.from_numpy(coco.eval["precision"][..., 0, -1])  # (IoUs, recalls, classes)
    each = precision.where(precision >= 0, math.nan).nanmean((0, 1)).tolist()
    numbers = [category["id"] for category in truth.dataset["categories"]]
    return dict(zip(COCO_METRICS, values)), [each[sorted(numbers).index(i)] for i in numbers]


def panoptic_counts(predicted, segments, truth, entries, category_class, num_classes):
    """What one image adds to panoptic quality (Kirillov et al., 2019), per class.

    predicted: int64 (H, W), ids of P segments, 0 for none.  segments: list of {"id", "label"}.
    truth: int64 (H, W), ids of G entries, 0 for void.
    entries: list of {"id", "category_id", "iscrowd"}.  category_class: category_id -> class.
    Returns float64 (num_classes, 4): sum of IoUs of matches, numbers of true positives, false
    positives and false negatives.
    """
    row = {entry["id"]: i for i, entry in enumerate(entries, 1)}
    column = {segment["id"]: j for j, segment in enumerate(segments, 1)}
    pixels = np.zeros((1 + len(entries), 1 + len(segments)))  # row 0: void, column 0: no segment
    base = int(predicted.max()) + 1
    pairs, counts = (truth * base + predicted).unique(return_counts=True)
    for pair, n in zip(pairs.tolist(), counts.tolist()):
        pixels[row.get(pair // base, 0), column.get(pair % base, 0)] += n
    overlap, void = pixels[1:, 1:], pixels[0, 1:]  # (G, P), (P,)
    area, area_predicted = pixels.sum(1)[1:], pixels.sum(0)[1:]  # (G,), (P,)
    label = np.array([category_class[entry["category_id"]] for entry in entries], int)  # (G,)
    predicted_label = np.array([segment["label"] for segment in segments], int)  # (P,)
    crowd = np.array([entry.get("iscrowd", 0) for entry in entries], bool)
    same = label[:, None] == predicted_label  # (G, P)
    union = area[:, None] + area_predicted - overlap - void  # without void pixels
    iou = overlap / union.clip(1)
    match = same & ~crowd[:, None] & (iou > 0.5)  # at most one per row and column
    # A segment that lies mostly on void, or on a crowd of its class, is no false positive.
    ignored = void + (overlap * (same & crowd[:, None])).sum(0)
    wrong = ~match.any(0) & (area_predicted > 0) & (ignored <= 0.5 * area_predicted)
    missed = ~match.any(1) & (area > 0) & ~crowd
    matched, false, missing = label[match.any(1)], predicted_label[wrong], label[missed]
    columns = [np.bincount(matched, iou[match], num_classes)]  # row after row, as in `matched`
    columns += [np.bincount(labels, None, num_classes) for labels in (matched, false, missing)]
    return torch.from_numpy(np.stack(columns, 1).astype(float))


def panoptic_quality(counts, chosen):
    """PQ, SQ, RQ, means over the chosen classes, bool (C,), that occur.  counts: (C, 4), summed."""
    iou, tp, fp, fn = counts[chosen & (counts[:, 1:].sum(1) > 0)].unbind(1)
    rq = tp / (tp + 0.5 * fp + 0.5 * fn)
    sq = iou / tp.clamp(min=1)
    return [x.mean().item() if len(x) else math.nan for x in (sq * rq, sq, rq)]


def semantic_counts(predicted, truth, num_classes):
    """int64 (C, 3): correct, true and predicted pixels per class, where truth >= 0."""
    predicted, truth = predicted[truth >= 0], truth[truth >= 0]
    labels = truth[predicted == truth], truth, predicted
    return torch.stack([x.bincount(minlength=num_classes) for x in labels], 1)


def semantic_metrics(counts):
    """mIoU over the classes that occur, pixel accuracy, and the IoU of each class (nan: absent)."""
    correct, true, predicted = counts.double().unbind(1)
    iou = correct / (true + predicted - correct)
    mean, accuracy = iou[~iou.isnan()].mean(), correct.sum() / true.sum()
    return dict(miou=mean.item(), pixel_accuracy=accuracy.item()), iou


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


def print_metrics(metrics, task):
    """Print what evaluate() returns."""
    print(f"{describe(metrics, task)} of {metrics['images']} images")
    for kind in {"det": ("",), "inst": ("box_", "mask_")}.get(task, ()):
        print(", ".join(f"{kind}{name} {metrics[kind + name]:.3f}" for name in COCO_METRICS))
    for row in metrics.get("per_class", ()):
        values = [f"{name} {value:.3f}" for name, value in row.items() if name != "class"]
        print(f"{row['class']:<20}", ", ".join(values))


# --------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------
def identity(dataset, index):
    """Name without suffix, and number, of an image in the files of its data set."""
    name, number = str(index), index
    if not isinstance(dataset, Shapes):
        name, number, _ = dataset.images[index]
    return os.path.splitext(name)[0].replace("/", "_"), number  # no path into other folders


def score_image(dataset, task, target, prediction, folder):
    """Compare a prediction with the ground truth.  If a folder is given, save it there as a PNG.

    target: from the data set: a label for cls, otherwise a dictionary with "index".
    Returns a few kilobytes.  cls: whether the top 1 and the top 5 are right.  det, inst: COCO
    results.  sem: counts.  pan: counts, and an entry in COCO's result format.
    """
    if task == "cls":
        hits = (prediction["labels"] == target).tolist()
        return hits[0], any(hits)
    name, number = identity(dataset, target["index"])
    path, categories = os.path.join(folder or "", name + ".png"), dataset.categories
    if task in ("det", "inst"):
        return coco_results(prediction, number, categories)
    if task == "sem":
        labels = prediction["semantic"]
        if folder:
            dtype = np.uint8 if len(categories) < 256 else np.uint16
            Image.fromarray((labels + 1).cpu().numpy().astype(dtype)).save(path)
        truth = dataset.label_map(target["index"]).to(labels.device)
        return semantic_counts(labels, truth, len(categories)).cpu()
    ids, segments = prediction["panoptic"], prediction["segments"]
    if folder:
        rgb = torch.stack([ids % 256, ids // 256 % 256, ids // 256**2], -1)  # (H, W, 3)
        Image.fromarray(rgb.byte().cpu().numpy()).save(path)
    seen = ids.unique().tolist()  # COCO's evaluation rejects segments without pixels
    table = [(s["id"], categories[s["label"]]) for s in segments if s["id"] in seen]
    entry = dict(segments_info=[dict(id=i, category_id=category) for i, category in table])
    truth, entries = dataset.segments(target["index"])
    label_of, truth = {c: label for label, c in enumerate(categories)}, truth.to(ids.device)
    counts = panoptic_counts(ids, segments, truth, entries, label_of, len(categories))
    return counts, entry | dict(image_id=number, file_name=name + ".png")


def combine(dataset, task, kept):
    """Metrics from the results of score_image() for all images, in order.

    Returns a dictionary of metrics, and one of lists with a value per class.
    """
    if task == "cls":
        top1, top5 = (sum(hits) / len(kept) for hits in zip(*kept))
        return dict(top1=top1, top5=top5), {}
    if task == "sem":
        metrics, iou = semantic_metrics(sum(kept))
        return metrics, dict(IoU=iou.tolist())
    if task == "pan":
        counts, things = sum(counts for counts, _ in kept), torch.tensor(dataset.things)
        metrics, names = {}, ("PQ", "SQ", "RQ")
        for suffix, chosen in (("", things | True), ("_th", things), ("_st", ~things)):
            values = panoptic_quality(counts, chosen)
            metrics |= {name + suffix: value for name, value in zip(names, values)}
        each = [panoptic_quality(counts, one) for one in torch.eye(len(things)).bool()]
        return metrics, dict(zip(names, zip(*each)))
    truth, results = dataset.coco(), list(itertools.chain(*kept))
    if task == "det":
        metrics, ap = coco_metrics(truth, results, "bbox")
        return metrics, dict(AP=ap)
    metrics, columns = {}, {}
    for prefix, kind in (("box_", "bbox"), ("mask_", "segmentation")):
        values, columns[prefix + "AP"] = coco_metrics(truth, results, kind)
        metrics |= {prefix + name: value for name, value in values.items()}
    return metrics, columns


def evaluate(model, dataset, device, batch_size=128, workers=0, save=None, per_class=False):
    """The metrics of a model on a data set, over all processes.

    model: a ClusterFormer, without DDP: processes may have different numbers of batches.
    save: where predictions go.  det, inst: a JSON file.  pan: a JSON file, and PNGs in the folder
        of that name without ".json".  sem: a folder of PNGs, label + 1 as in ADE20K's.
    per_class: adds "per_class", a list of dictionaries, one per class; not for cls.
    Returns on every process the number of "images", and these metrics as fractions of 1:
        cls   top1, top5
        det   COCO_METRICS, nan where there is nothing to find
        inst  the same for boxes, box_AP, ..., and for masks, mask_AP, ...
        sem   miou, pixel_accuracy
        pan   PQ, SQ, RQ, for things PQ_th, ..., for stuff PQ_st, ...
    """
    task, distributed = model.task, dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    keys = [(0, index) for index in range(rank, len(dataset), world_size)]
    batches = batches_of(dataset, workers, device, sampler=keys, batch_size=batch_size, collate_fn=lists)
    folder = save and {"sem": save, "pan": save.removesuffix(".json")}.get(task)
    if folder:
        os.makedirs(folder, exist_ok=True)
    kept = []  # results of score_image() on this process
    total = -(-len(keys) // batch_size)
    with contextlib.closing(batches):
        for images, targets in tqdm(batches, "evaluate", total, leave=False, disable=True if rank else None):
            images = [as_float(image.to(device, non_blocking=True)) for image in images]
            sizes = None if task == "cls" else [tuple(target["size"]) for target in targets]
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                predictions = model.predict(images, sizes)
            pairs = zip(targets, predictions)
            kept += [score_image(dataset, task, target, found, folder) for target, found in pairs]
    parts, result = [kept], [None]
    if distributed:
        parts = [None] * world_size if rank == 0 else None
        dist.gather_object(kept, parts)
    if rank == 0:
        kept = [parts[i % world_size][i // world_size] for i in range(len(dataset))]
        metrics, columns = combine(dataset, task, kept)
        result = [metrics | dict(images=len(dataset))]
        if per_class:
            rows = zip(dataset.classes, *columns.values())
            result[0]["per_class"] = [dict(zip(("class", *columns), row)) for row in rows]
        if save and task != "sem":
            pan = dict(annotations=[entry for _, entry in kept]) if task == "pan" else None
            with open(save, "w") as file:
                json.dump(pan or list(itertools.chain(*kept)), file)
    if distributed:
        dist.broadcast_object_list(result)
    return result[0]


# --------------------------------------------------------------------------------------------------
# Pictures: rows of titled panels, uint8 (3, H, W)
# --------------------------------------------------------------------------------------------------
MIN_SCORE = 0.3  # det, inst: objects with lower scores are not drawn
MIN_SHARE = 0.01  # of the pixels: smaller regions have no name
ORANGE, BLUE = (213, 94, 0), (0, 114, 178)
# Seven colors that color-blind readers can tell apart (Okabe and Ito, 2008), then paler versions.
COLORS = [BLUE, (230, 159, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), ORANGE, (240, 228, 66)]
COLORS += [tuple(round(c + p * (255 - c)) for c in rgb) for p in (0.5, 0.25, 0.7) for rgb in COLORS]


def panel_of(image, side):
    """Convert an image, float (3, H, W), to a panel with a long side of `side` pixels."""
    size = [max(1, round(length * side / max(image.shape[1:]))) for length in image.shape[1:]]
    small = max(image.shape[1:]) < side  # if so, pixels become squares
    how = InterpolationMode.NEAREST if small else InterpolationMode.BILINEAR
    return functional.to_dtype(functional.resize(image.cpu(), size, how), torch.uint8, scale=True)


def enlarge(values, size, panel, stride=1):
    """Resize maps (..., h, w), at a stride of an image of size (H, W), to that of a panel, unsmoothed."""
    rows, columns = (torch.arange(new) * old // new // stride for new, old in zip(panel.shape[1:], size))
    return values.cpu()[..., rows[:, None], columns]


def paint_means(panel, regions):
    """Color regions, int64 (H, W), by the mean of their pixels, as superpixels are shown, with borders."""
    count = regions.flatten().bincount().clamp(min=1)
    total = torch.zeros(3, len(count)).index_add_(1, regions.flatten(), panel.flatten(1).float())
    border = torch.zeros_like(regions, dtype=torch.bool)
    border[1:] |= regions[1:] != regions[:-1]
    border[:, 1:] |= regions[:, 1:] != regions[:, :-1]
    return ((total / count)[:, regions] * torch.where(border, 0.5, 1.0)).byte()


def write(panel, captions):
    """Write captions, a list of (text, (x, y)), white on black, within the panel."""
    picture, font = functional.to_pil_image(panel), ImageFont.load_default(13)
    draw = ImageDraw.Draw(picture)
    for text, (x, y) in captions:
        width = math.ceil(font.getlength(text)) + 4
        x, y = max(0, min(round(x), picture.width - width)), max(0, min(round(y), picture.height - 18))
        draw.rectangle([x, y, x + width - 1, y + 17], "black")
        draw.text((x + 2, y + 1), text, "white", font)
    return functional.pil_to_tensor(picture)


def sheet(rows):
    """A picture with rows of (title, panel).  Panels have one size, titles one or two lines."""
    _, height, width = rows[0][0][1].shape
    height, width = height + 44, max(width, 300) + 20  # leaves room for titles
    picture = Image.new("RGB", (width * max(map(len, rows)) + 20, height * len(rows) + 20), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(15)
    for i, row in enumerate(rows):
        for j, (title, panel) in enumerate(row):
            x, y = 20 + j * width, 44 + i * height
            picture.paste(functional.to_pil_image(panel), (x, y))
            draw.text((x, y - 4), title, "black", font, anchor="ld")
    return picture


def regions_of(prediction, names):
    """What to draw of a prediction: texts, and tensors of masks (n, H, W) and boxes (n, 4), or None."""
    if "semantic" in prediction:
        classes = prediction["semantic"].unique()
        return [names[c] for c in classes], prediction["semantic"] == classes[:, None, None], None
    if "panoptic" in prediction:
        segments = prediction["segments"]
        ids = torch.tensor([x["id"] for x in segments], device=prediction["panoptic"].device)
        texts = [f"{names[x['label']]} {x['score']:.2f}" for x in segments]
        return texts, prediction["panoptic"] == ids[:, None, None], None
    shown = prediction["scores"] >= MIN_SCORE
    found = zip(prediction["labels"][shown].tolist(), prediction["scores"][shown].tolist())
    masks = prediction["masks"][shown] if "masks" in prediction else None
    return [f"{names[label]} {score:.2f}" for label, score in found], masks, prediction["boxes"][shown]


def prediction_panels(prediction, names, task, image, size):
    """An image, float (3, H, W), beside its prediction, in pixels of a file of size (H, W)."""
    panel = picture = panel_of(image, 560)
    if task == "cls":
        pairs = zip(prediction["labels"].tolist(), prediction["scores"].tolist())
        return [(", ".join(f"{names[label]} {score:.2f}" for label, score in list(pairs)[:3]), panel)]
    texts, masks, boxes = regions_of(prediction, names)
    colors, captions = [COLORS[i % len(COLORS)] for i in range(len(texts))], []
    if boxes is not None and len(texts):
        boxes = boxes.cpu() * torch.tensor([panel.shape[2] / size[1], panel.shape[1] / size[0]] * 2)
        captions = [(text, (box[0], box[1])) for text, box in zip(texts, boxes.tolist())]
    if masks is not None and len(texts):
        masks = enlarge(masks, size, panel)
        picture = draw_segmentation_masks(picture, masks.flip(0), 0.6, colors[::-1])  # the best on top
        if boxes is None:  # names stand at the middles of regions
            for text, mask in zip(texts, masks):
                if mask.float().mean() >= MIN_SHARE:
                    y, x = mask.nonzero().float().median(0).values.tolist()
                    captions.append((text, (x - 30, y - 9)))
    if boxes is not None and len(texts):
        picture = draw_bounding_boxes(picture, boxes, colors=colors, width=2)
    return [("image", panel), (f"prediction: {len(texts)} regions or objects", write(picture, captions))]


def grid_assignment(height, width):
    """Grid cells as clusters, (K, N): the weight of each token in the mean of each cell."""
    pools = [
        F.adaptive_avg_pool1d(torch.eye(tokens)[None], cells)[0].T  # (cells, tokens)
        for tokens, cells in zip((height, width), grid_shape(height, width))
    ]
    return torch.kron(*pools)


def cluster_panels(model, image):
    """Clusters in the last block of each stage, and in each iteration of one block."""
    history = trace(model, model.pad(image[None]))
    panel = panel_of(image, 320)

    def clusters(assignment, block, stride):
        """Most likely cluster of each token, averaged over heads.  assignment: (h, K, N)."""
        regions = assignment.mean(0).argmax(0).view(block["size"])
        return paint_means(panel, enlarge(regions, image.shape[1:], panel, stride))

    stages, iterations = [("image", panel)], []
    for i, stride in enumerate(model.backbone.strides):
        block = [x for x in history if x["name"].startswith(f"backbone.stages.{i}.")][-1]
        steps = [M[0] for M in block["assignments"]]
        title = f"stage {i + 1}, stride {stride}: {steps[-1].shape[1]} clusters"
        stages.append((title, clusters(steps[-1], block, stride)))
        if i == 0:
            first = clusters(grid_assignment(*block["size"])[None], block, stride)
            iterations.append((f"stage {i + 1}: C(0), the grid", first))
            for t, M in enumerate(steps):
                iterations.append((f"E-step {t + 1}: M({t})", clusters(M, block, stride)))
    return [stages, iterations]


def explain(model, image, weights):
    """Split a logit, or a difference of two, into a bias and contributions of tokens to centers.

    image: float (3, H, W).  weights: (classes,), of the logits; 1 and -1 give a difference.
    Returns the value, the bias, and contributions (K, h, w) per center and token.  The value is the
    bias plus the sum of all contributions.  This is exact for given weights of the means.  It does
    not explain how these weights depend on the image, or how the backbone computes the tokens.
    """
    head, image = model.head, model.pad(image[None])
    with torch.no_grad():
        value = model.eval()(image)["logits"][0] @ weights
        entry = trace(model, image)[-1]  # the head's clustering
        C, tokens, size = entry["centers"][-1][0], entry["tokens"][0], entry["size"]  # (K, D), (N, D)
        # Weights of the channels of C.  They include the norm: mean, standard deviation and scale.
        w = weights @ head.classifier.weight * head.center_norm.weight  # (D,)
        deviation = (C.var(1, correction=0, keepdim=True) + head.center_norm.eps).sqrt()  # (K, 1)
        w = (w - w.mean()) / deviation / len(C)  # (K, D)
        # Contributions through C(0), then through the iterations.
        contributions = grid_assignment(*size).to(w) * (w @ tokens.T)  # (K, N)
        values, W = entry["values"][0], sum(entry["weights"])[0]  # (h, N, d), (h, K, N)
        w = w.unflatten(1, (len(values), -1)).transpose(0, 1)  # (h, K, d)
        contributions = contributions + (W * (w @ values.mT)).sum(0)
        bias = weights @ head.classifier(head.center_norm.bias)
    return value.item(), bias.item(), contributions.unflatten(1, size)


def logit_weights(chosen, count):
    """Weights (count,) of a class's logit less the mean of all, or of the difference of two classes.

    Softmax ignores what is added to all logits, so tokens that speak for all classes are no evidence.
    """
    own, *other = torch.eye(count)[chosen]
    return own - (other[0] if other else 1 / count)


def explanation_panels(model, image, names, chosen):
    """A picture of explain().  chosen: one or two class indices; empty: the most likely class."""
    chosen = chosen or [model.predict([image])[0]["labels"][0].item()]
    value, bias, maps = explain(model, image, logit_weights(chosen, len(names)).to(image.device))
    total, panel = maps.sum(0).cpu(), panel_of(image, 560)
    # Over the gray image: orange where a token adds to the value, blue where it takes away.
    heat = total / total.abs().max().clamp(min=1e-9)
    heat = enlarge(heat, image.shape[1:], panel, model.backbone.strides[-1])
    hue = torch.tensor([ORANGE, BLUE]).float()[(heat < 0).long()].permute(2, 0, 1)
    picture = panel.float().mean(0).expand_as(hue).lerp(hue, 0.8 * heat.abs()).byte()
    title = f"{names[chosen[0]]} - {names[chosen[1]] if len(chosen) > 1 else 'mean of all'}: {value:.3f} ="
    added, taken = total.clamp(min=0).sum(), total.clamp(max=0).sum()
    title += f" bias {bias:+.3f}, orange {added:+.3f}, blue {taken:+.3f}"
    return [[("image", panel), (title, picture)]]


def files_of(paths):
    """Image files: those given, and those in folders."""
    files = []
    for path in paths:
        names = [path]
        if os.path.isdir(path):
            found = [x for x in sorted(os.listdir(path)) if is_image_file(x) and x[0] != "."]
            names = [os.path.join(path, name) for name in found]
        if not names:
            raise InputError(f"{path}: no images in it")
        files += names
    return files


def read_file(path, task, size):
    """Model input, float (3, H, W), and size (H, W) in the file."""
    image = load_image(path)
    if task == "cls":
        pixels = eval_transform(size)(image)
    else:
        pixels = dense_eval_transform(task, size)(functional.pil_to_tensor(image))
    return as_float(pixels), image.size[::-1]


def read_held_out(dataset, index):
    """The same of a validation image."""
    image, target = dataset[0, index]
    return as_float(image), target["size"] if isinstance(target, dict) else tuple(image.shape[1:])


SOFTWARE = "ClusterFormer eval.py"  # written into pictures, to know them again


def drawn_here(path):
    try:
        with Image.open(path) as picture:
            return picture.info.get("Software") == SOFTWARE
    except OSError:
        return False


def picture_stems(names, out, kinds):
    """File names of pictures without suffix, a different one for each image name.

    kinds: endings of the pictures of an image.  Raises InputError if a picture would replace a file
    that is none of ours.
    """
    stems = []
    for name in names:
        base = os.path.splitext(os.path.basename(name))[0]
        # Other folders or formats may have the same name: a, a-2, a-3, ...
        numbered = (base if i == 1 else f"{base}-{i}" for i in itertools.count(1))
        stem = next(stem for stem in numbered if stem not in stems)
        stems.append(stem)
    for path in (os.path.join(out, f"{stem}{kind}.png") for stem in stems for kind in kinds):
        if os.path.exists(path) and not drawn_here(path):
            raise InputError(f"{path} is not a picture of eval.py, and is not replaced; give another --out")
    return stems


def draw(model, classes, names, read, out, clusters, chosen, device):
    """Draw predictions, optionally with clusters and explanations, into the folder `out`.

    names: of images.  read(i): of image i, as read_file().  chosen: names of the classes to explain;
    empty: the most likely class; None: no explanation.
    """
    kinds = ["", *["-clusters"] * clusters, *["-explained"] * (chosen is not None)]
    stems, made_here = picture_stems(names, out, kinds), PngInfo()
    os.makedirs(out, exist_ok=True)
    made_here.add_text("Software", SOFTWARE)
    drawn = 0
    for i in tqdm(range(len(names)), "draw", leave=False, disable=None):
        try:
            image, size = read(i)
        except InputError as error:
            print(f"skipped: {error}", file=sys.stderr)
            continue
        image = image.to(device)
        (prediction,) = model.predict([image], [size])
        sheets = [[prediction_panels(prediction, classes, model.task, image, size)]]
        if clusters:
            sheets.append(cluster_panels(model, image))
        if chosen is not None:
            sheets.append(explanation_panels(model, image, classes, [classes.index(x) for x in chosen]))
        for kind, rows in zip(kinds, sheets):
            sheet(rows).save(os.path.join(out, f"{stems[i]}{kind}.png"), pnginfo=made_here)
        drawn += 1
    print(f"{drawn} images drawn in {out}")


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------
def parse_arguments():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", required=True, help="a last.pt or best.pt of train.py")
    add("--data", metavar="DIR", help="its validation images are used (default: the training data's)")
    add("--image-size", type=number(int, 32), help="pixels per side, or of the short side (default: as in training)")
    add("--batch-size", type=number(int, 1), help="images per step and process (default: cls 128, others 8)")
    add("--workers", type=number(int, 0), help="loader processes per process (default: spare cores)")
    add("--json", metavar="FILE", help="also write metrics, as fractions of 1, to FILE, a new one")
    add("--per-class", action="store_true", help="also print AP, IoU or PQ per class; not for cls")
    formats = "det, inst, pan: write predictions in COCO's format to a new .json FILE, for pan also PNGs to the "
    formats += "folder of that name without .json; sem: write PNGs of label + 1 to a new folder FILE"
    add("--save-predictions", metavar="FILE", help=formats)
    add = parser.add_argument_group("pictures").add_argument
    add("--images", nargs="*", metavar="PATH", help="images or folders to draw (default: 8 held-out images)")
    add("--clusters", action="store_true", help="draw clusters per stage, and per iteration of one block")
    why = "cls: draw the evidence for CLASS (default: the most likely), or for one against another"
    add("--explain", nargs="*", metavar="CLASS", help=why)
    out = "folder of the pictures; only pictures of eval.py are replaced in it (default: pictures)"
    add("--out", metavar="DIR", default="pictures", help=out)
    args = parser.parse_args()
    args.draw = args.images is not None or args.clusters or args.explain is not None
    return args


def check_arguments(args, task, classes, rank, world_size):
    """Raise InputError if a flag does not fit the checkpoint, the number of processes or what is there."""
    save, chosen = args.save_predictions, args.explain or []
    if task == "cls" and (save or args.per_class):
        raise InputError("--save-predictions and --per-class are for the dense tasks, not for cls")
    if save and task != "sem" and not save.endswith(".json"):
        raise InputError(f"--save-predictions {save}: {task} needs a .json file")
    outputs = [("--json", args.json), ("--save-predictions", save)]
    outputs += [("--save-predictions", save.removesuffix(".json"))] if save and task == "pan" else []
    for flag, path in outputs if rank == 0 else []:  # other processes may be so late that it is our own
        if path and os.path.exists(path):
            raise InputError(f"{flag}: {path} exists, and is not replaced; remove it, or give another name")
        if path and not os.path.isdir(os.path.dirname(path) or "."):
            raise InputError(f"{flag} {path}: there is no folder {os.path.dirname(path)}")
    if args.draw and (world_size > 1 or save or args.per_class or args.json):
        raise InputError("pictures are drawn by one process, without --per-class, --json, --save-predictions")
    if args.explain is not None and task != "cls" or len(chosen) > 2 or set(chosen) - set(classes):
        raise InputError(f"--explain is for cls and takes up to two of its classes: {', '.join(classes)}")


def main():
    args = parse_arguments()
    rank, world_size, device = start_processes()
    model, checkpoint = load_checkpoint(args.checkpoint)
    settings, classes, task = checkpoint["settings"], list(checkpoint["classes"]), model.task
    check_arguments(args, task, classes, rank, world_size)
    model.to(device)
    data = args.data or settings["data"]
    size = args.image_size or settings.get("test_size") or settings["image_size"]
    dataset = None if args.images else make_dataset(task, data, "val", size, classes=classes)
    if args.draw:
        if args.images:
            names = files_of(args.images)
            read = lambda i: read_file(names[i], task, size)
        else:
            names = [dataset.name(i) for i in range(min(8, len(dataset)))]
            read = lambda i: read_held_out(dataset, i)
        return draw(model, classes, names, read, args.out, args.clusters, args.explain, device)
    if list(dataset.classes) != classes:
        complaint = f"is trained for {len(classes)} classes that shapes do not have"
        raise InputError(f"{args.checkpoint} {complaint}; give --data")
    workers = default_workers() if args.workers is None else args.workers
    batch_size = args.batch_size or (128 if task == "cls" else 8)
    result = evaluate(model, dataset, device, batch_size, workers, args.save_predictions, args.per_class)
    if rank == 0:
        print(f"validation data: {dataset.summary()}")
        print_metrics(result, task)
        if args.json:
            with open(args.json, "w") as file:
                file.write(to_json(result, indent=2))


if __name__ == "__main__":
    in_one_line(main)
