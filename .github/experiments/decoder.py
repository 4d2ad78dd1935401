# SPDX-License-Identifier: MIT
"""What each part of the decoder is worth: default runs of the dense tasks, each with a part left out.

    python .github/experiments/decoder.py --list
    python .github/experiments/decoder.py --work DIR          takes jobs until none is left; start one per core
    python .github/experiments/decoder.py --job "quadrants" inst 0 DIR
    python .github/experiments/decoder.py --table

A worker can be killed and started again: a job goes on from its last checkpoint.  Results go to decoder.jsonl
beside this file, a line per job.  PARTS and their expectations were written before the first run.
The parts that were put back into a shorter decoder are in the same log: see decoder_back.py.
"""

import argparse
import functools
import json
import math
import os
import sys
import time
import types
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import clusterformer as cf  # noqa: E402
import data  # noqa: E402
import eval as evaluation  # noqa: E402
import train  # noqa: E402

METRICS = dict(det="AP", inst="mask_AP", sem="miou", pan="PQ")
# What is left out, or replaced: (expected loss in mask AP of inst, or of the metric of `task`, more tasks).
PARTS = {
    "nothing": (0.00, ("det", "sem", "pan")),
    "quadrants": (0.04, ("det",)),  # one Gaussian over the box in all heads, as in SMCA
    "mask prior": (0.02, ()),
    "mask samples": (0.06, ("pan",)),
    "falloff": (0.02, ("sem", "pan")),
    "locality": (0.20, ()),  # the four above together; clusterings have no prior at all
    "overlap": (0.01, ("det",)),
    "several matches": (0.03, ("det",)),
    "pixel loss": (0.05, ("sem", "pan")),
    "fixed no object": (0.00, ()),  # a learned logit of "no object", as in DETR
    "own sides": (0.02, ("det",)),  # boxes move by inverse sigmoids, as in Deformable DETR
    "top-down from zero": (0.00, ()),  # it starts at random
    "top-down": (0.02, ("sem",)),  # no top-down path at all
    "neck depthwise": (0.00, ("sem",)),
    "suppression": (0.03, ("det",)),  # evaluation of the run with nothing left out
    "prior twice": (0.00, ()),  # the prior is in M only
    "T 1": (0.01, ("det", "sem")),
    "T 2": (0.00, ()),
    "added": (0.02, ()),  # means replace the centers
}

TOGETHER = ()  # what the screen takes out, all at once, "quadrants + mask prior" for example


# --------------------------------------------------------------------------------------------------
# Changes: functions of the module are replaced, or a model is changed after it was built
# --------------------------------------------------------------------------------------------------
def whole_box_prior(boxes, height, width):
    x, y, w, h = boxes.unbind(-1)
    boxes = torch.stack([x, y, w.clamp(min=1 / width), h.clamp(min=1 / height)], -1)
    return (-2 * cf.box_distance(boxes, height, width).flatten(2)).clamp(min=-20).expand(4, -1, -1, -1)


def no_mask_prior(masks, factor):
    return masks.new_zeros(*masks.shape[:2], masks[0, 0].numel() // factor**2, dtype=torch.float32)


def no_samples(masks, boxes):
    return boxes.new_zeros(*boxes.shape[:2], cf.MASK_SAMPLES**2)


def plain_masks(self, centers, boxes, embeddings):
    return torch.einsum("bkd,bhwd->bkhw", self.center(centers), embeddings)


def book_boxes(self, centers, anchors):
    anchors = anchors.clamp(1e-3, 1 - 1e-3)
    return ((anchors / (1 - anchors)).log() + self.delta(centers).float()).sigmoid()


def learned_no_object(model):
    """Softmax is over differences of logits: those of the classes, less that of "no object"."""
    decoder = model.head.decoder
    decoder.no_object = nn.Linear(decoder.norm.normalized_shape[0], 1)
    predict = decoder.predict_centers

    def predict_centers(centers, anchors, embeddings):
        output = predict(centers, anchors, embeddings)
        output["logits"] = output["logits"] - decoder.no_object(decoder.norm(centers))
        return output

    decoder.predict_centers = predict_centers


def clustering(self, centers, tokens, bias=None, once=False, replace=False):
    """forward() of the clustering, with the prior in M only, or with means that replace the centers."""
    B, h = tokens.shape[0], self.num_heads
    d = tokens.shape[-1] // h
    heads = tokens.reshape(-1, h, d).transpose(0, 1)
    scale = (self.log_scale.clamp(max=math.log(cf.MAX_SCALE)).exp() / d).view(h, 1, 1)
    keys = (cf.rms_norm(torch.bmm(heads, self.k)) * scale).view(h * B, -1, d)
    values = torch.bmm(heads, self.v).view(h * B, -1, d)
    C = cf.split_heads(centers, h)
    bias = bias.expand(h, B, -1, -1).flatten(0, 1)
    for _ in range(self.iterations):
        S = self.similarity(C, self.q, keys, None)
        log_M = (S + bias).log_softmax(1)
        means = torch.bmm((S + log_M if once else S + bias + log_M).softmax(2), values)
        C = means if replace else C + means
    return cf.join_heads(C, h), None


class Nothing(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


def each_layer(change):
    return lambda model: [change(layer) for layer in model.head.decoder.layers]


def with_forward(**options):
    def change(layer):
        layer.cluster.forward = functools.partial(clustering, layer.cluster, **options)

    return each_layer(change)


def random_top_down(model):
    for linear in model.head.neck.top_down:
        linear[-1].reset_parameters()


def without(name):
    def change(model):
        modules = getattr(model.head.neck, name)
        for i in range(len(modules)):
            modules[i] = Nothing()

    return change


def set_iterations(T):
    return each_layer(lambda layer: setattr(layer.cluster, "iterations", T))


def top_down_off(model):
    for linear in model.head.neck.top_down:
        linear.requires_grad_(False)  # it starts at zero, and stays there


def apply(parts):
    """Change the module as PARTS says.  parts: one, or several with " + " between them."""
    changes = []  # of a model, after it was built
    for part in parts.replace("locality", "mask prior + mask samples + falloff + no prior").split(" + "):
        if part == "quadrants":
            cf.box_prior = whole_box_prior
        elif part == "no prior":
            cf.box_prior = lambda boxes, height, width: boxes.new_zeros(4, *boxes.shape[:2], height * width)
        elif part == "mask prior":
            cf.mask_prior = no_mask_prior
        elif part == "mask samples":
            cf.mask_samples = no_samples
        elif part == "falloff":
            cf.MaskHead.forward = plain_masks
        elif part == "overlap":
            cf.pairwise_iou, right = (lambda boxes: torch.zeros_like(right(boxes))), cf.pairwise_iou
            cf.top_detections = types.FunctionType(
                cf.top_detections.__code__, dict(vars(cf), pairwise_iou=right), argdefs=(0.6,)
            )  # suppression still needs it
        elif part == "several matches":
            cf.MATCHES_PER_TARGET = (1,)
        elif part == "pixel loss":
            cf.LOSS_WEIGHTS["pixel"] = 0.0
        elif part == "own sides":
            cf.BoxHead.forward = book_boxes
        elif part == "suppression":
            cf.top_detections = functools.partial(cf.top_detections, threshold=2.0)
        elif part != "nothing":
            changes.append(CHANGES[part])
    build = cf.ClusterFormer.__init__

    def build_and_change(self, *arguments, **options):
        build(self, *arguments, **options)
        for change in changes:
            change(self)

    cf.ClusterFormer.__init__ = build_and_change


CHANGES = {"fixed no object": learned_no_object, "top-down from zero": random_top_down, "top-down": top_down_off}
CHANGES |= {"neck depthwise": without("depthwise"), "prior twice": with_forward(once=True)}
CHANGES |= {"T 1": set_iterations(1), "T 2": set_iterations(2), "added": with_forward(replace=True)}


# --------------------------------------------------------------------------------------------------
# Jobs
# --------------------------------------------------------------------------------------------------
LOG = Path(__file__).with_suffix(".jsonl")


def jobs():
    """(part, task, seed), in the order in which they are run."""
    base = [("nothing", task, seed) for seed in (0, 1, 2) for task in METRICS]
    screen = [(part, task, 0) for part, (_, more) in PARTS.items() for task in ("inst", *more) if part != "nothing"]
    together = [(parts, task, seed) for parts in TOGETHER for seed in (0, 1, 2) for task in METRICS]
    first, rest = ([job for job in screen if (job[1] == "inst") == inst] for inst in (True, False))
    return base[:4] + first + base[4:] + rest + together


def done():
    lines = map(json.loads, open(LOG)) if LOG.exists() else ()
    return {(line["part"], line["task"], line["seed"]): line for line in lines}


def run_job(part, task, seed, folder):
    """Train, or evaluate, and add a line to the log."""
    apply(part)
    start = time.process_time()
    if part == "suppression":
        path = os.path.join(folder, f"nothing-{task}-{seed}", "last.pt")
        model, checkpoint = evaluation.load_checkpoint(path)
        dataset = data.make_dataset(task, None, "val", 96)
        (metrics, _), minutes = evaluation.evaluate(model, dataset, torch.device("cpu"), 8), 0.0
    else:
        out = os.path.join(folder, f"{part}-{task}-{seed}".replace(" ", "-"))
        sys.argv = ["train.py", "--task", task, "--seed", str(seed), "--out", out, "--workers", "0", "--resume"]
        train.main()
        log = [json.loads(line) for line in open(os.path.join(out, "log.jsonl"))]
        metrics, minutes = log[-1], sum(line["seconds"] for line in log) / 60
    found = {name: round(value, 4) for name, value in metrics.items() if isinstance(value, float) and value == value}
    line = dict(part=part, task=task, seed=seed, value=found[METRICS[task]], minutes=round(minutes, 1))
    line |= dict(cpu_minutes=round((time.process_time() - start) / 60, 1), metrics=found)
    with open(LOG, "a") as file:
        file.write(json.dumps(line) + "\n")


def work(folder):
    """Take the first job that is neither done nor taken; a job of a worker that died is free again."""
    os.makedirs(folder, exist_ok=True)
    while True:
        for job in jobs():
            part, task, seed = job
            lock = Path(folder, f"{part}-{task}-{seed}.lock".replace(" ", "-"))
            waits = part == "suppression" and ("nothing", task, seed) not in done()
            taken = lock.exists() and os.path.exists(f"/proc/{lock.read_text()}")
            if job not in done() and not taken and not waits:
                lock.write_text(str(os.getpid()))
                break
        else:
            return
        print(*job, flush=True)
        command = [sys.executable, __file__, "--job", part, task, str(seed), folder]
        code = os.spawnv(os.P_WAIT, sys.executable, command)
        if code:
            sys.exit(f"{job} ended with {code}")


def print_table():
    lines = done()
    print("| left out | expected | " + " | ".join(METRICS) + " | minutes of a core |\n| --- | --- | --- | --- | --- | --- | --- |")
    for part in dict.fromkeys((*PARTS, *TOGETHER, *(part for part, _, _ in lines))):
        expected, cells = PARTS.get(part, ("",))[0], []
        for task in METRICS:
            found = [lines[part, task, seed]["value"] for seed in (0, 1, 2) if (part, task, seed) in lines]
            cells.append(", ".join(f"{value:.3f}" for value in found))
        minutes = lines.get((part, "inst", 0), {}).get("cpu_minutes", "")
        print(f"| {part} | {expected} | " + " | ".join(cells) + f" | {minutes} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the jobs")
    parser.add_argument("--table", action="store_true", help="print the results")
    parser.add_argument("--work", metavar="DIR", help="take jobs until none is left; DIR holds their checkpoints")
    parser.add_argument("--job", nargs=4, metavar=("PART", "TASK", "SEED", "DIR"), help="run one")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.list:
        print(*jobs(), sep="\n")
    elif args.table:
        print_table()
    elif args.work:
        work(args.work)
    elif args.job:
        part, task, seed, folder = args.job
        run_job(part, task, int(seed), folder)
    else:
        parser.error("give --list, --table, --work or --job")


if __name__ == "__main__":
    main()
