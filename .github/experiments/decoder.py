# SPDX-License-Identifier: MIT
"""What each part of the decoder is worth: default runs of the dense tasks, each with a part left out.

    python .github/experiments/decoder.py --list
    python .github/experiments/decoder.py --work DIR          takes jobs until none is left; start one per core
    python .github/experiments/decoder.py --job "falloff" inst 0 DIR
    python .github/experiments/decoder.py --table
    git show 3264464:clusterformer.py > old.py && python .github/experiments/decoder.py --step old.py

A worker can be killed and started again: a job goes on from its last checkpoint.  Results go to decoder.jsonl
beside this file, a line per job.  Lines with a commit are of another decoder: check it out, and run its form of this
script; a note says where a run differed.
"""

import argparse
import functools
import importlib.util
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import clusterformer as cf  # noqa: E402
import data  # noqa: E402
import eval as evaluation  # noqa: E402
import train  # noqa: E402

METRICS = dict(det="AP", inst="mask_AP", sem="miou", pan="PQ")
# What is left out, or replaced, and in which tasks, seed 0.
PARTS = {
    "nothing": ("det", "inst", "sem", "pan"),  # seeds 0, 1 and 2
    "prior": ("inst",),  # clusterings see the whole map
    "quadrants": ("inst", "det"),  # one Gaussian over the box in all heads, as in SMCA
    "mask prior": ("inst", "sem"),
    "falloff": ("inst", "sem"),
    "pixel loss": ("inst", "sem"),
    "several matches": ("inst", "sem", "det"),
    "silhouettes": ("inst", "sem"),
    "neck depthwise": ("inst",),
    "top-down": ("inst", "sem"),  # no top-down path at all
    "top-down from zero": ("inst",),  # it starts at random
    "suppression": ("inst", "det"),  # evaluation of the run with nothing left out
    "prior twice": ("inst",),  # the prior is in M only
    "T 1": ("inst",),
    "T 2": ("inst",),
    "added": ("inst",),  # means replace the centers
}


# --------------------------------------------------------------------------------------------------
# Changes: functions of the module are replaced, or a model is changed after it was built
# --------------------------------------------------------------------------------------------------
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


def no_depthwise(model):
    modules = model.head.neck.depthwise
    for i in range(len(modules)):
        modules[i] = Nothing()


def set_iterations(T):
    return each_layer(lambda layer: setattr(layer.cluster, "iterations", T))


def top_down_off(model):
    for linear in model.head.neck.top_down:
        linear.requires_grad_(False)  # it starts at zero, and stays there


def no_falloff(model):
    falloff = model.head.decoder.falloff.requires_grad_(False)
    nn.init.constant_(falloff.bias, -30)  # the log of next to nothing


def no_silhouettes(model):
    for parameter in model.head.decoder.silhouette[-1].parameters():
        parameter.requires_grad_(False)  # they start at zero, and stay there


CHANGES = {"silhouettes": no_silhouettes, "falloff": no_falloff}
CHANGES |= {"top-down from zero": random_top_down, "top-down": top_down_off, "neck depthwise": no_depthwise}
CHANGES |= {"T 1": set_iterations(1), "T 2": set_iterations(2)}
CHANGES |= {"prior twice": with_forward(once=True), "added": with_forward(replace=True)}


def apply(parts):
    """Change the module as PARTS says.  parts: one, or several with " + " between them."""
    changes = []  # of a model, after it was built
    for part in parts.split(" + "):
        if part == "prior":
            cf.box_prior = lambda boxes, height, width: boxes.new_zeros(4, *boxes.shape[:2], height * width)
        elif part == "quadrants":  # quadrants of a box of twice its sides, all in its middle
            cf.QUADRANTS, prior = ((0.0, 0.0),) * 4, cf.box_prior
            cf.box_prior = lambda boxes, h, w: prior(torch.cat([boxes[..., :2], 2 * boxes[..., 2:]], -1), h, w)
        elif part == "mask prior":
            cf.mask_prior = lambda masks, factor: masks.new_zeros(*masks.shape[:2], masks[0, 0].numel() // factor**2)
        elif part == "pixel loss":
            cf.LOSS_WEIGHTS["pixel"] = 0.0
        elif part == "several matches":
            cf.MATCHES = ()
        elif part == "suppression":
            cf.iou_and_giou = lambda a, b: ((a[..., 0] - b[..., 0]) * 0, None)  # nothing overlaps; only for evaluation
        elif part != "nothing":
            changes.append(CHANGES[part])
    build = cf.ClusterFormer.__init__

    def build_and_change(self, *arguments, **options):
        build(self, *arguments, **options)
        for change in changes:
            change(self)

    cf.ClusterFormer.__init__ = build_and_change


# --------------------------------------------------------------------------------------------------
# Jobs
# --------------------------------------------------------------------------------------------------
LOG = Path(__file__).with_suffix(".jsonl")


def jobs():
    """(part, task, seed), in the order in which they are run."""
    base = [("nothing", task, seed) for seed in (0, 1, 2) for task in PARTS["nothing"]]
    return base + [(part, task, 0) for part, tasks in PARTS.items() for task in tasks if part != "nothing"]


def log_lines():
    return [json.loads(line) for line in open(LOG)] if LOG.exists() else []


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
        done = {(x["part"], x["task"], x["seed"]) for x in log_lines() if "commit" not in x}
        for job in jobs():
            part, task, seed = job
            lock = Path(folder, f"{part}-{task}-{seed}.lock".replace(" ", "-"))
            waits = part == "suppression" and ("nothing", task, seed) not in done
            taken = lock.exists() and os.path.exists(f"/proc/{lock.read_text()}")
            if job not in done and not taken and not waits:
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
    """A row per decoder and part, a value per seed; of a run that was stopped, the last value, and after which epoch."""
    rows = {}
    for line in log_lines():
        epochs = line.get("epochs", [])
        value = f"{epochs[-1]:.3f} (epoch {len(epochs)})" if "value" not in line else f"{line['value']:.3f}"
        row = rows.setdefault((line.get("commit", "today's"), line["part"]), {})
        row[line["task"]] = ", ".join(filter(None, [row.get(line["task"]), value]))
    print("| commit | left out | " + " | ".join(METRICS) + " |\n| --- | --- | --- | --- | --- | --- |")
    for (commit, part), row in rows.items():
        print(f"| {commit} | {part} | " + " | ".join(row.get(task, "") for task in METRICS) + " |")


def compare_steps(path):
    """CPU seconds of a training step of inst, and what it keeps for the backward pass, here and with another file."""
    spec = importlib.util.spec_from_file_location("other", path)
    other = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)
    dataset = data.Shapes(64, 96, 0, "train", "inst")
    batches = [data.stacked([dataset[0, i] for i in range(b, b + 8)]) for b in range(0, 64, 8)]
    models = {name: m.ClusterFormer("inst", "nano", len(dataset.classes)) for name, m in ((path, other), ("this", cf))}
    seconds, kept = {name: [] for name in models}, {name: {} for name in models}

    def keep(x):
        kept[name][x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    for images, targets in batches * 3:
        for name, model in models.items():
            kept[name].clear()
            start = time.process_time()
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                losses = model.loss(model(data.as_float(images)), targets)
            (sum(losses.values()) / model.count(targets)).backward()
            seconds[name].append(time.process_time() - start)
    for name, model in models.items():
        parameters = {x.untyped_storage().data_ptr() for x in model.parameters()}
        size = sum(value for pointer, value in kept[name].items() if pointer not in parameters) / 2**20
        print(f"{name}: {sorted(seconds[name][4:])[10]:.3f} CPU seconds, {size:.1f} MiB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the jobs")
    parser.add_argument("--table", action="store_true", help="print the results")
    parser.add_argument("--work", metavar="DIR", help="take jobs until none is left; DIR holds their checkpoints")
    parser.add_argument("--step", metavar="FILE", help="compare a training step with that of another module")
    parser.add_argument("--job", nargs=4, metavar=("PART", "TASK", "SEED", "DIR"), help="run one")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.list:
        print(*jobs(), sep="\n")
    elif args.table:
        print_table()
    elif args.step:
        compare_steps(args.step)
    elif args.work:
        work(args.work)
    elif args.job:
        part, task, seed, folder = args.job
        run_job(part, task, int(seed), folder)
    else:
        parser.error("give --list, --table, --step, --work or --job")


if __name__ == "__main__":
    main()
