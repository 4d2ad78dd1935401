# SPDX-License-Identifier: MIT
"""What the shortened decoder of commit aa0986f gains from a part that was put back: default runs of train.py.

    python .github/experiments/decoder_back.py "points + quadrants + sides" inst 0 runs/back

In a worktree of aa0986f, with this file copied into it: it takes the parts from the module of commit 3264464.  The
result is a line of decoder.jsonl beside this file, with the mask AP (or AP, mIoU, PQ) after each of the four epochs.
"""

import json
import math
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import clusterformer as cf  # noqa: E402
import train  # noqa: E402

METRICS = dict(det="AP", inst="mask_AP", sem="miou", pan="PQ")
source = subprocess.run(["git", "show", "3264464:clusterformer.py"], cwd=ROOT, capture_output=True, check=True).stdout
old = types.ModuleType("old")
exec(source, vars(old))


def width(model):
    return model.head.decoder.norm.normalized_shape[0]


def change_predictions(model, change):
    """change(output, centers, boxes, embeddings) after each prediction of the decoder."""
    decoder = model.head.decoder
    predict = decoder.predict_centers

    def predict_centers(centers, boxes, embeddings):
        output = predict(centers, boxes, embeddings)
        change(output, centers, boxes, embeddings)
        return output

    decoder.predict_centers = predict_centers


def sides(model):
    """Boxes move in their own sides."""
    decoder = model.head.decoder
    decoder.box_head = old.BoxHead(width(model))
    change_predictions(model, lambda output, c, boxes, e: output.update(boxes=decoder.box_head(decoder.norm(c), boxes)))


def falloff(model):
    decoder = model.head.decoder
    decoder.falloff = nn.Linear(width(model), 1)
    nn.init.zeros_(decoder.falloff.weight)
    nn.init.constant_(decoder.falloff.bias, math.log(0.25))

    def change(output, centers, boxes, embeddings):
        distance = old.box_distance(output["boxes"].detach(), *embeddings.shape[1:3]).clamp(max=8)
        output["masks"] = output["masks"] - 2 * decoder.falloff(decoder.norm(centers)).exp()[..., None] * distance

    change_predictions(model, change)


def point_samples(masks, boxes):
    """Mask samples without averages."""
    line = torch.linspace(-0.6, 0.6, 12)
    y, x = torch.meshgrid(line, line, indexing="ij")
    points = boxes[..., None, :2] + boxes[..., None, 2:] * torch.stack([x, y], -1).flatten(0, 1)
    return (cf.sample_points(masks.flatten(0, 1), points.flatten(0, 1)).sigmoid() - 0.5).unflatten(0, masks.shape[:2])


def samples(model, sample=old.mask_samples):
    decoder = model.head.decoder
    last = nn.Linear(2 * width(model), decoder.classifier.out_features)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    decoder.silhouette = nn.Sequential(nn.Linear(144, 2 * width(model)), nn.GELU(), last)

    def change(output, *_):
        silhouettes = decoder.silhouette(sample(output["masks"].detach(), output["boxes"].detach()))
        output["logits"] = output["logits"] + silhouettes

    change_predictions(model, change)


def mask_prior(model):
    """The masks of a prediction are added to the prior of the next layer, but not to that of the first one."""
    decoder, box_prior, last = model.head.decoder, cf.box_prior, []
    change_predictions(model, lambda output, *_: last.append(output["masks"].detach()))
    forward = decoder.forward

    def prior(boxes, height, width):
        bias = box_prior(boxes, height, width)
        if len(last) > 1:
            bias = bias + old.mask_prior(last[-1], last[-1].shape[2] // height)
        return bias

    def forget(maps):
        last.clear()
        return forward(maps)

    cf.box_prior, decoder.forward = prior, forget


def depthwise(model):
    neck = model.head.neck
    neck.depthwise = nn.ModuleList(nn.Conv2d(width(model), width(model), 3, padding=1, groups=width(model)) for _ in neck.laterals)
    neck.forward = types.MethodType(old.Neck.forward, neck)


def overlap(model):
    for layer in model.head.decoder.layers:
        layer.overlap = nn.Parameter(torch.linspace(0, 8, layer.attention.num_heads))
        layer.forward = types.MethodType(overlapping_forward, layer)


def overlapping_forward(self, centers, boxes, tokens):
    centers, _ = self.cluster(self.norm(centers), tokens, cf.box_prior(boxes, *tokens.shape[1:3]))
    x = self.attention_norm(centers)
    bias = (self.overlap[:, None, None] * old.pairwise_iou(boxes)[:, None]).flatten(0, 1)
    centers = centers + self.attention(x, x, x, attn_mask=bias, need_weights=False)[0]
    return centers + self.ffn(centers)


def top_down_off(model):
    for linear in model.head.neck.top_down:
        linear.requires_grad_(False)


def pixel_loss(model):
    head, kept = model.head, {}
    head.pixel_classifier = nn.Linear(width(model), model.num_classes)
    embed, loss = head.decoder.pixel.forward, head.loss

    def keep(x):
        kept["pixels"] = embed(x)
        return kept["pixels"]

    def with_pixels(output, targets):
        pixels = head.pixel_classifier(kept["pixels"]).permute(0, 3, 1, 2)
        return loss(output, targets) | dict(pixel=20 * old.pixel_loss(pixels, targets, head.stride))

    head.decoder.pixel.forward, head.loss = keep, with_pixels


def stuff_boxes(model):
    model.head.boxed[:] = True


def several_matches(_):
    """set_losses of the shortened module, with a weight for each match."""
    old.matching_cost = cf.matching_cost

    def set_losses(output, targets, stride, boxed):
        layers = [*output["aux"], output]
        outputs = {key: torch.stack([one[key] for one in layers], 1) for key in output if key != "aux"}
        matches = old.match(outputs, targets, boxed)
        layer, center, _, weight = map(torch.cat, zip(*matches))
        image = torch.cat([torch.full_like(one[0], i) for i, one in enumerate(matches)])
        first = np.cumsum([0] + [len(one["labels"]) for one in targets])
        target = torch.cat([one[2] + int(start) for one, start in zip(matches, first)])
        labels, wanted = (torch.cat([one[key] for one in targets])[target] for key in ("labels", "boxes"))
        logits = outputs["logits"]
        classes = torch.full(logits.shape[:3], logits.shape[3] - 1)
        weights = torch.full(logits.shape[:3], cf.NO_OBJECT_WEIGHT)
        classes[image, layer, center], weights[image, layer, center] = labels, weight
        entropy = F.cross_entropy(logits.flatten(0, 2), classes.flatten(), reduction="none")
        boxes, box_weight = outputs["boxes"][image, layer, center], boxed[labels] * weight
        _, giou = old.iou_and_giou(cf.cxcywh_to_xyxy(boxes), cf.cxcywh_to_xyxy(wanted))
        losses = dict(label=entropy @ weights.flatten(), l1=(boxes - wanted).abs().sum(1) @ box_weight)
        losses["giou"] = (1 - giou) @ box_weight
        if "masks" in outputs:
            losses["mask"], losses["dice"] = old.mask_losses(outputs["masks"], targets, matches)
        return {name: cf.LOSS_WEIGHTS[name] * value for name, value in losses.items()}

    cf.set_losses = set_losses


def quadrants(_):
    cf.box_prior = old.box_prior


PARTS = {  # in the order in which they are put back; those before "samples" change what it reads
    "quadrants": quadrants,
    "sides": sides,
    "falloff": falloff,
    "samples": samples,
    "points": lambda model: samples(model, point_samples),
    "mask prior": mask_prior,
    "overlap": overlap,
    "several matches": several_matches,
    "pixel loss": pixel_loss,
    "depthwise": depthwise,
    "no top-down": top_down_off,
    "stuff boxes": stuff_boxes,
}


def main():
    names, task, seed, folder = sys.argv[1:]
    build = cf.ClusterFormer.__init__
    wanted = names.split(" + ")
    if unknown := set(wanted) - {"none", *PARTS}:
        sys.exit(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")

    def build_and_change(self, *arguments, **options):
        build(self, *arguments, **options)
        for part, change in PARTS.items():
            if part in wanted:
                change(self)

    cf.ClusterFormer.__init__ = build_and_change
    torch.set_num_threads(1)
    out = str(Path(folder, f"{names}-{task}-{seed}".replace(" ", "")))
    sys.argv = ["train.py", "--task", task, "--seed", seed, "--out", out, "--workers", "0", "--resume"]
    train.main()
    epochs = [json.loads(line) for line in open(Path(out, "log.jsonl"))]
    values = [round(epoch[METRICS[task]], 4) for epoch in epochs]
    line = dict(part=f"aa0986f + {names}", task=task, seed=int(seed), value=values[-1], epochs=values)
    line |= dict(minutes=round(sum(epoch["seconds"] for epoch in epochs) / 60, 1))
    if "box_AP" in epochs[-1]:
        line["box_AP"] = round(epochs[-1]["box_AP"], 4)
    with open(Path(__file__).with_name("decoder.jsonl"), "a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
