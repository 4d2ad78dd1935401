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

Any number of processes gives the same metrics: no image is counted twice, and the first process
puts the results back into the order of the images before it ranks or sums them.
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
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
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

from clusterformer import VERSION, ClusterFormer, grid_shape, trace
from data import InputError, Parser, as_float, batches_of, bfloat16_on, default_workers, expect, in_one_line
from data import lists, make_dataset, number, read_photo, start_processes, to_json

COCO_METRICS = "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split()


def read_checkpoint(path):
    """The content of a checkpoint of train.py, a dictionary, on the CPU."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # no code can run
        expect(checkpoint["version"] == VERSION, f"version {checkpoint['version']}, not {VERSION}")
        return checkpoint
    except OSError:
        raise  # its message names the file
    except Exception as error:  # broken archives raise many kinds, some of them with many lines
        why = str(error) if isinstance(error, InputError) else type(error).__name__
        raise InputError(f"{path}: not a whole checkpoint of this train.py ({why}); train anew") from error


def load_checkpoint(path):
    """Return the averaged model, in evaluation mode on the CPU, and the whole checkpoint."""
    checkpoint = read_checkpoint(path)
    model = ClusterFormer(**checkpoint["arguments"])
    model.load_state_dict(checkpoint["ema"])
    return model.eval(), checkpoint


# --------------------------------------------------------------------------------------------------
# Metrics
# --------------------------------------------------------------------------------------------------
def run_lengths(masks):
    """Masks, bool (n, H, W), as the n run-length encodings of COCO's files."""
    # One by one: a copy of all masks of a large photograph would take a gigabyte.
    encoded = [mask_utils.encode(np.asfortranarray(mask.cpu().numpy(), np.uint8)) for mask in masks]
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
    precision = torch.from_numpy(coco.eval["precision"][..., 0, -1])  # (IoUs, recalls, categories by id)
    each = precision.where(precision >= 0, math.nan).nanmean((0, 1)).tolist()
    of_id = dict(zip(coco.params.catIds, each))
    each = [of_id[category["id"]] for category in truth.dataset["categories"]]
    return dict(zip(COCO_METRICS, values)), each


def panoptic_counts(predicted, segments, truth, entries, label_of, num_classes):
    """What one image adds to panoptic quality (Kirillov et al., 2019), per class.

    predicted: int64 (H, W), ids of segments, 0 for none.  segments: list of {"id", "label"}.
    truth: int64 (H, W), ids of entries, 0 for void.  entries: list of {"id", "category_id", "iscrowd"}.
    label_of: category_id -> class.
    Returns float64 (num_classes, 4): sum of IoUs of matches, numbers of true positives, false
    positives and false negatives.
    """
    base = int(predicted.max()) + 1
    pairs, numbers = (truth * base + predicted).unique(return_counts=True)
    # (id g in the ground truth, id p in the prediction) -> pixels
    overlap = {divmod(pair, base): n for pair, n in zip(pairs.tolist(), numbers.tolist())}
    area, found_area = Counter(), Counter()
    for (g, p), n in overlap.items():
        area[g] += n
        found_area[p] += n
    found = {segment["id"]: segment["label"] for segment in segments}
    real = {entry["id"]: label_of[entry["category_id"]] for entry in entries if not entry.get("iscrowd")}
    crowds = {entry["id"]: label_of[entry["category_id"]] for entry in entries if entry.get("iscrowd")}
    counts, ignored = torch.zeros(num_classes, 4, dtype=torch.float64), Counter()
    for (g, p), n in overlap.items():
        if p in found and real.get(g) == found[p]:
            iou = n / (area[g] + found_area[p] - n - overlap.get((0, p), 0))  # void is not in the union
            if iou > 0.5:  # at most one match for each
                counts[real.pop(g)] += torch.tensor([iou, 1, 0, 0], dtype=torch.float64)
                del found[p]
        elif g == 0 or (p in found and crowds.get(g) == found[p]):
            ignored[p] += n
    for p, label in found.items():  # what lies mostly on void, or a crowd of its class, is no false positive
        counts[label, 2] += found_area[p] > 0 and ignored[p] <= 0.5 * found_area[p]
    for g, label in real.items():
        counts[label, 3] += area[g] > 0
    return counts


def panoptic_quality(counts, chosen):
    """PQ, SQ, RQ, means over the chosen classes, bool (C,), that occur.  counts: (C, 4), summed."""
    iou, tp, fp, fn = counts[chosen & (counts[:, 1:].sum(1) > 0)].unbind(1)
    rq = tp / (tp + 0.5 * fp + 0.5 * fn)
    sq = iou / tp.clamp(min=1)
    return dict(PQ=(sq * rq).mean().item(), SQ=sq.mean().item(), RQ=rq.mean().item())  # nan if there is none


def semantic_counts(predicted, truth, num_classes):
    """int64 (C, 3): correct, true and predicted pixels per class, where truth >= 0."""
    predicted, truth = predicted[truth >= 0], truth[truth >= 0]
    labels = truth[predicted == truth], truth, predicted
    return torch.stack([x.bincount(minlength=num_classes) for x in labels], 1)


def semantic_metrics(counts):
    """mIoU over the classes that occur, pixel accuracy, and the IoU of each class (nan: absent)."""
    correct, true, predicted = counts.double().unbind(1)
    iou = correct / (true + predicted - correct)
    return dict(miou=iou.nanmean().item(), pixel_accuracy=(correct.sum() / true.sum()).item()), iou


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


# --------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------
def score_image(dataset, task, target, prediction, folder):
    """Compare a prediction with the ground truth.  If a folder is given, save it there as a PNG.

    target: from the data set: a label for cls, otherwise a dictionary with "index".
    Returns a few kilobytes.  cls: whether the top 1 and the top 5 are right.  det, inst: COCO
    results.  sem: counts.  pan: counts, and an entry in COCO's result format.
    """
    if task == "cls":
        hits = (prediction["labels"] == target).tolist()
        return hits[0], any(hits)
    name, image_id, _ = dataset.images[target["index"]]
    categories, file_name = dataset.categories, os.path.splitext(name)[0].replace("/", "_") + ".png"
    if task in ("det", "inst"):
        return coco_results(prediction, image_id, categories)
    if task == "sem":
        labels = prediction["semantic"].cpu()
        pixels, truth = labels + 1, dataset.label_map(target["index"])
        score = semantic_counts(labels, truth, len(categories))
    else:
        ids, segments = prediction["panoptic"].cpu(), prediction["segments"]
        pixels = torch.stack([ids % 256, ids // 256 % 256, ids // 256**2], -1)  # (H, W, 3)
        table = [dict(id=s["id"], category_id=categories[s["label"]]) for s in segments]
        label_of = {category: label for label, category in enumerate(categories)}
        truth = dataset.segments(target["index"])
        counts = panoptic_counts(ids, segments, *truth, label_of, len(categories))
        score = counts, dict(image_id=image_id, file_name=file_name, segments_info=table)
    if folder:
        Image.fromarray(pixels.byte().numpy()).save(os.path.join(folder, file_name))
    return score


def combine(dataset, task, scores):
    """Metrics from score_image() of all images, in order.  Returns a dictionary, and one per class."""
    if task == "cls":
        top1, top5 = (sum(hits) / len(scores) for hits in zip(*scores))
        return dict(top1=top1, top5=top5), []
    if task == "sem":
        metrics, iou = semantic_metrics(sum(scores))
        return metrics, [dict(IoU=value) for value in iou.tolist()]
    if task == "pan":
        counts, things, metrics = sum(counts for counts, _ in scores), torch.tensor(dataset.things), {}
        for suffix, chosen in (("", torch.ones_like(things)), ("_th", things), ("_st", ~things)):
            values = panoptic_quality(counts, chosen)
            metrics |= {name + suffix: value for name, value in values.items()}
        return metrics, [panoptic_quality(counts, one) for one in torch.eye(len(things)).bool()]
    truth, results = dataset.coco(), list(itertools.chain(*scores))
    boxes, box_ap = coco_metrics(truth, results, "bbox")
    if task == "det":
        return boxes, [dict(AP=value) for value in box_ap]
    masks, mask_ap = coco_metrics(truth, results, "segmentation")
    metrics = {"box_" + name: value for name, value in boxes.items()}
    metrics |= {"mask_" + name: value for name, value in masks.items()}
    return metrics, [dict(box_AP=box, mask_AP=mask) for box, mask in zip(box_ap, mask_ap)]


def evaluate(model, dataset, device, batch_size=128, workers=0, save=None):
    """The metrics of a model on a data set, over all processes.

    model: a ClusterFormer, without DDP: processes may have different numbers of batches.
    save: where predictions go.  det, inst: a JSON file.  pan: a JSON file, and PNGs in the folder
        of that name without ".json".  sem: a folder of PNGs, label + 1 as in ADE20K's.
    Returns, on every process, a dictionary of the metrics below, as fractions of 1, and a list of
    dictionaries, one per class (empty for cls).
        cls   top1, top5
        det   COCO_METRICS, nan where there is nothing to find
        inst  the same for boxes, box_AP, ..., and for masks, mask_AP, ...
        sem   miou, pixel_accuracy
        pan   PQ, SQ, RQ, for things PQ_th, ..., for stuff PQ_st, ...
    """
    task, scores = model.task, []
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    keys = [(0, index) for index in range(rank, len(dataset), world_size)]
    collate = None if task == "cls" else lists  # None stacks: each tensor from a worker takes a file handle
    total = math.ceil(len(keys) / batch_size)
    options = dict(sampler=keys, batch_size=batch_size, collate_fn=collate)
    batches = batches_of(dataset, min(workers, total), device, **options)
    folder = save.removesuffix(".json") if save and task in ("sem", "pan") else None
    if folder:
        os.makedirs(folder, exist_ok=True)
    with contextlib.closing(batches):
        for images, targets in tqdm(batches, "evaluate", total, leave=False, disable=True if rank else None):
            images = [as_float(image.to(device, non_blocking=True)) for image in images]
            sizes = None if task == "cls" else [tuple(target["size"]) for target in targets]
            with bfloat16_on(device):
                predictions = model.predict(images, sizes)
            for target, prediction in zip(targets, predictions):
                scores.append(score_image(dataset, task, target, prediction, folder))
    parts, result = [scores], [None]
    if world_size > 1:
        parts = [None] * world_size if rank == 0 else None
        dist.gather_object(scores, parts)
    if rank == 0:
        scores = [parts[i % world_size][i // world_size] for i in range(len(dataset))]
        result = [combine(dataset, task, scores)]
        if save and task != "sem":
            pan = dict(annotations=[entry for _, entry in scores]) if task == "pan" else None
            with open(save, "w") as file:
                json.dump(pan or list(itertools.chain(*scores)), file)
    if world_size > 1:
        dist.broadcast_object_list(result)
    return result[0]


# --------------------------------------------------------------------------------------------------
# Pictures: rows of titled panels, uint8 (3, H, W)
# --------------------------------------------------------------------------------------------------
MIN_SCORE = 0.3  # det, inst: objects with lower scores are not drawn
MIN_SHARE = 0.01  # of the pixels: smaller regions have no name
ORANGE, BLUE = (213, 94, 0), (0, 114, 178)
# Seven colors that color-blind readers can tell apart (Okabe and Ito, 2008).
COLORS = [BLUE, (230, 159, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), ORANGE, (240, 228, 66)]


def panel_of(image, side):
    """Convert an image, float (3, H, W), to a panel with a long side of `side` pixels."""
    small = max(image.shape) < side  # if so, pixels become squares
    how = InterpolationMode.NEAREST if small else InterpolationMode.BILINEAR
    panel = functional.resize(image.cpu(), None, how, max_size=side)
    return functional.to_dtype(panel, torch.uint8, scale=True)


def enlarge(values, stride, image, panel):
    """Bring a map (h, w) of an image's tokens, at this stride, to the size of a panel, unsmoothed."""
    sides = zip(panel.shape[1:], image.shape[1:])
    rows, columns = (torch.arange(new) * old // new // stride for new, old in sides)
    return values.cpu()[rows[:, None], columns]


def paint_means(panel, regions):
    """Color regions, int64 (H, W), by the mean of their pixels, as superpixels are shown."""
    count = regions.flatten().bincount().clamp(min=1)
    total = torch.zeros(3, len(count)).index_add_(1, regions.flatten(), panel.flatten(1).float())
    return (total / count)[:, regions].byte()


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
    """A picture with rows of (title, panel), the panels of a row of one size."""
    grids = []
    for row in rows:
        room = [0, 20, max(0, 235 - row[0][1].shape[2]), 0]  # for the titles
        titled = [write(functional.pad(panel, room, fill=255), [(title, (0, 0))]) for title, panel in row]
        grids.append(make_grid(titled, len(row), 10, pad_value=255))
    widest = max(grid.shape[2] for grid in grids)
    grids = [functional.pad(grid, [0, 0, widest - grid.shape[2], 0], fill=255) for grid in grids]
    return functional.to_pil_image(torch.cat(grids, 1))


def regions_of(prediction, names):
    """What to draw of a prediction: texts, and tensors of masks (n, H, W) and boxes (n, 4), or None."""
    if "semantic" in prediction:
        ids = prediction["semantic"].unique()
        return [names[label] for label in ids], prediction["semantic"] == ids[:, None, None], None
    if "panoptic" in prediction:
        segments = prediction["segments"]
        ids = torch.tensor([segment["id"] for segment in segments]).to(prediction["panoptic"])
        texts = [f"{names[segment['label']]} {segment['score']:.2f}" for segment in segments]
        return texts, prediction["panoptic"] == ids[:, None, None], None
    shown = prediction["scores"] >= (MIN_SCORE if "boxes" in prediction else 0)
    found = zip(prediction["labels"][shown].tolist(), prediction["scores"][shown].tolist())
    masks, boxes = (prediction[key][shown] if key in prediction else None for key in ("masks", "boxes"))
    return [f"{names[label]} {score:.2f}" for label, score in found], masks, boxes


def prediction_panels(prediction, names, panel, colors=None):
    """A panel, and on it a prediction in pixels of the panel.  colors: of its regions or objects."""
    texts, masks, boxes = regions_of(prediction, names)
    if masks is None and boxes is None:
        return [(", ".join(texts), panel)]
    picture, captions = panel, []
    colors = colors or [COLORS[i % len(COLORS)] for i in range(len(texts))]
    if texts and masks is not None:
        picture = draw_segmentation_masks(picture, masks.cpu().flip(0), 0.6, colors[::-1])  # the best on top
    if texts and boxes is not None:
        picture = draw_bounding_boxes(picture, boxes.cpu(), colors=colors, width=2)
    for i, text in enumerate(texts):
        if boxes is not None:
            captions.append((text, boxes[i, :2].tolist()))
        elif masks[i].float().mean() >= MIN_SHARE:
            y, x = masks[i].nonzero().float().median(0).values.tolist()
            captions.append((text, (x - 30, y - 9)))
    return [("image", panel), (f"prediction: {len(texts)} regions or objects", write(picture, captions))]


def grid_assignment(height, width):
    """Grid cells as clusters, (K, N): the weight of each token in the mean of each cell."""
    pools = [
        F.adaptive_avg_pool1d(torch.eye(tokens)[None], cells)[0].T  # (cells, tokens)
        for tokens, cells in zip((height, width), grid_shape(height, width))
    ]
    return torch.kron(*pools)


def cluster_panels(model, image):
    """Clusters in the last block of each stage, the fine ones large, and how those of stage 1 come about."""
    history = trace(model, model.pad(image[None]))
    large, small = panel_of(image, 480), panel_of(image, 235)  # three and six fill a row

    def clusters(assignment, block, stride, panel):
        """Most likely cluster of each token, averaged over heads.  assignment: (h, K, N)."""
        regions = assignment.mean(0).argmax(0).view(block["size"])
        return paint_means(panel, enlarge(regions, stride, image, panel))

    rows, iterations = ([("image", large)], []), []
    for i, stride in enumerate(model.backbone.strides):
        block = [x for x in history if x["name"].startswith(f"backbone.stages.{i}.")][-1]
        steps = [M[0] for M in block["assignments"]]
        picture = clusters(steps[-1], block, stride, large if i < 2 else small)
        rows[i // 2].append((f"stage {i + 1}, stride {stride}: {steps[-1].shape[1]} clusters", picture))
        if i == 0:
            first = clusters(grid_assignment(*block["size"])[None], block, stride, small)
            iterations.append(("stage 1: C(0), the grid", first))
            for t, M in enumerate(steps[:-1]):  # the last one is shown large
                iterations.append((f"stage 1: E-step {t + 1}, M({t})", clusters(M, block, stride, small)))
    return [rows[0], rows[1] + iterations]


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
        # A value goes to a center in each iteration, so its weights add up.
        values, W = entry["values"][0], sum(entry["weights"])[0]  # (h, N, d), (h, K, N)
        w = w.unflatten(1, (len(values), -1)).transpose(0, 1)  # (h, K, d)
        contributions = contributions + (W * (w @ values.mT)).sum(0)
        bias = weights @ head.classifier(head.center_norm.bias)
    return value.item(), bias.item(), contributions.unflatten(1, size)


def explanation_panels(model, image, names, chosen):
    """A picture of explain().  chosen: one or two class indices; empty: the most likely class."""
    chosen = chosen or [model.predict([image])[0]["labels"][0].item()]
    # Softmax ignores what is added to all logits, so tokens that speak for all classes are no evidence.
    own, *other = torch.eye(len(names), device=image.device)[chosen]
    value, bias, maps = explain(model, image, own - (other[0] if other else 1 / len(names)))
    total, panel = maps.sum(0).cpu(), panel_of(image, 384)
    # Over the gray image: orange where a token adds to the value, blue where it takes away.
    heat = enlarge(total / total.abs().max().clamp(min=1e-9), model.backbone.strides[-1], image, panel)
    hue = torch.tensor([ORANGE, BLUE]).float()[(heat < 0).long()].permute(2, 0, 1)
    picture = panel.float().mean(0).expand_as(hue).lerp(hue, 0.8 * heat.abs()).byte()
    title = f"{names[chosen[0]]} - {names[chosen[1]] if len(chosen) > 1 else 'mean of all'}: {value:.2f} ="
    added, taken = total.clamp(min=0).sum(), total.clamp(max=0).sum()
    title += f" bias {bias:+.2f}, orange {added:+.2f}, blue {taken:+.2f}"
    return [[("image", panel), (title, picture)]]


def free(path):
    """This path, or if there is such a file, one beside it: name-2.png, name-3.png, ..."""
    stem, suffix = os.path.splitext(path)
    others = (f"{stem}-{i}{suffix}" for i in itertools.count(2))
    return next(other for other in itertools.chain([path], others) if not os.path.exists(other))


def draw(model, classes, names, read, args, device):
    """Draw predictions, and what the arguments say, into a folder.  names: of images.  read(i): image i."""
    os.makedirs(args.out, exist_ok=True)
    for i, name in enumerate(tqdm(names, "draw", leave=False, disable=None)):
        try:
            image = as_float(read(i)).to(device)
        except InputError as error:
            print(f"skipped: {error}", file=sys.stderr)
            continue
        panel = panel_of(image, 560)
        (prediction,) = model.predict([image], [panel.shape[1:]])
        sheets = {"": [prediction_panels(prediction, classes, panel)]}
        if args.clusters:
            sheets["-clusters"] = cluster_panels(model, image)
        if args.explain is not None:
            chosen = [classes.index(x) for x in args.explain]
            sheets["-explained"] = explanation_panels(model, image, classes, chosen)
        stem = os.path.splitext(os.path.basename(name))[0][:99]
        for kind, rows in sheets.items():
            sheet(rows).save(free(os.path.join(args.out, f"{stem}{kind}.png")))
    print(f"pictures are in {args.out}")


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------
def parse_arguments():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", required=True, help="a last.pt of train.py")
    add("--data", metavar="DIR", help="its validation images are used (default: the training data's)")
    add("--image-size", type=number(int, 32), help="pixels per side, or of the short side (as training's)")
    add("--batch-size", type=number(int, 1), help="images per step and process (cls 128, others 8)")
    workers = "loader processes per process (spare cores, at most 16)"
    add("--workers", type=number(int, 0), default=default_workers(), help=workers)
    add("--json", metavar="FILE", help="also write metrics, as fractions of 1, to a new FILE")
    add("--per-class", action="store_true", help="also print AP, IoU or PQ per class; not for cls")
    formats = "write predictions to a new place; sem: a folder of PNGs of label + 1; det, inst, pan: a "
    formats += ".json FILE in COCO's format, and for pan PNGs in the folder of that name without .json"
    add("--save-predictions", metavar="FILE", help=formats)
    add = parser.add_argument_group("pictures").add_argument
    add("--images", nargs="*", metavar="PATH", help="images or folders to draw (8 held-out images)")
    add("--clusters", action="store_true", help="draw clusters per stage, and per iteration of one block")
    why = "cls: draw the evidence for CLASS (the most likely), or for one against another"
    add("--explain", nargs="*", metavar="CLASS", help=why)
    add("--out", metavar="DIR", default="pictures", help="folder of the pictures, which replace no file")
    args = parser.parse_args()
    args.draw = args.images is not None or args.clusters or args.explain is not None
    return args


def check_arguments(args, task, classes, rank):
    """Raise InputError if a flag does not fit the checkpoint, or an output would replace something."""
    save, outputs = args.save_predictions, [args.json, args.save_predictions]
    dense = task != "cls"
    fits = dense or not (save or args.per_class)
    expect(fits, "--save-predictions and --per-class are for the dense tasks")
    named = not save or task == "sem" or save.endswith(".json")
    expect(named, f"--save-predictions {save}: {task} needs a .json file")
    if save and task == "pan":
        outputs.append(save.removesuffix(".json"))
    for path in filter(None, outputs if rank == 0 else []):  # rank 0 may write before others are here
        expect(not os.path.exists(path), f"{path} exists, and is not replaced; give another name")
        folder = os.path.dirname(path) or "."
        writable = os.path.isdir(folder) and os.access(folder, os.W_OK)
        expect(writable, f"{path}: the folder {folder} cannot be written")
    numbers = args.json or save or args.per_class
    expect(not args.draw or not numbers, "pictures come without --json, --per-class and --save-predictions")
    chosen = args.explain or []
    good = len(chosen) < 3 and {*chosen} <= {*classes} and not (dense and args.explain is not None)
    expect(good, f"--explain is for cls and takes up to two of its classes: {', '.join(classes)[:200]}")


def main():
    args = parse_arguments()
    rank, world_size, device = start_processes()
    model, checkpoint = load_checkpoint(args.checkpoint)
    settings, classes, task = checkpoint["settings"], checkpoint["classes"], model.task
    check_arguments(args, task, classes, rank)
    if world_size > 1:
        dist.barrier()  # now others may write beside what was checked
    model.to(device)
    size = args.image_size or settings["test_size"]
    if args.images:
        names = []
        for path in args.images:
            inside = [str(file) for file in sorted(Path(path).glob("*")) if is_image_file(file.name)]
            names += inside or [path]
        read = lambda i: read_photo(names[i], task, size)
    else:
        dataset = make_dataset(task, args.data or settings["data"], "val", size, classes=classes)
        shown = range(0, len(dataset), math.ceil(len(dataset) / 8))  # the first eight may be of one class
        names = [dataset.name(i) for i in shown]
        read = lambda i: dataset[0, shown[i]][0]
    if args.draw:
        return draw(model, classes, names, read, args, device) if rank == 0 else None
    batch_size = args.batch_size or (128 if task == "cls" else 8)
    metrics, rows = evaluate(model, dataset, device, batch_size, args.workers, args.save_predictions)
    if rank == 0:
        print(f"{len(dataset)} images, {len(classes)} classes{dataset.note}\n{describe(metrics, task)}")
        table = {"all": metrics} | (dict(zip(classes, rows)) if args.per_class else {})
        for name, row in table.items():
            print(f"{name:<20}", ", ".join(f"{key} {value:.3f}" for key, value in row.items()))
        if args.json:
            with open(args.json, "w") as file:
                file.write(to_json(metrics | dict(per_class=dict(zip(classes, rows))), indent=2))


if __name__ == "__main__":
    in_one_line(main)
