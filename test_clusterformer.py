# SPDX-License-Identifier: MIT
"""Tests of the method and the scripts, most of them against references in NumPy, brute force or pycocotools.

    pytest -q                                what a change needs: two minutes on two cores
    SLOW=1 pytest -q                         also kills, several processes and compilation: five minutes
    pytest -q -k on_a_gpu                    on a machine with GPUs
    REHEARSAL=1 pytest -q -s -k rehearsal    the first steps of the full-scale recipes
"""

import ast
import contextlib
import inspect
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from collections import Counter

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.run
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as mask_utils
from pycocotools.cocoeval import COCOeval
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torchvision.ops import box_convert, box_iou
from torchvision.transforms import v2

import clusterformer as cf
import data
import eval as evaluation
import train

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path += [os.path.join(HERE, ".github"), os.path.join(HERE, ".github", "experiments")]
import benchmark  # noqa: E402
import block as experiment  # noqa: E402

CPU = torch.device("cpu")
DENSE = "det", "inst", "sem", "pan"
METRIC = dict(cls="top1", det="AP", inst="mask_AP", sem="miou", pan="PQ")
KEYS = dict(cls=set(), det={"boxes"}) | dict.fromkeys(("inst", "sem", "pan"), {"boxes", "masks"})  # of an output
# Torch's attention in bfloat16 asks the processor what it can do, not this variable, and fails.
lowered = pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="torch has no bfloat16 attention then")
slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="slow; SLOW=1 in the environment runs it")


def quick(*tasks):
    """All tasks; those that are not named here are slow."""
    return pytest.mark.parametrize("task", [pytest.param(t, marks=() if t in tasks else slow) for t in cf.TASKS])


@pytest.fixture(autouse=True)
def seeded():
    """A test draws the same random numbers, whichever tests ran before it."""
    torch.manual_seed(0)


def randomized(module, deviation):
    """No branch is at its zero initialization any more."""
    for parameter in module.parameters():
        parameter.data += deviation * torch.randn_like(parameter)
    return module


def random_model(task="cls", **arguments):
    """A nano model with random parameters; for dense tasks it has five classes, the last two of them stuff."""
    torch.manual_seed(0)
    if task != "cls":
        arguments["things"] = [True, True, True, False, False]
    model = cf.ClusterFormer(task, "nano", num_classes=10 if task == "cls" else 5, **arguments)
    return randomized(model.eval(), 0.05 if task == "cls" else 0.03)


def random_clustering(iterations, dim=12, heads=3):
    return randomized(cf.RecurrentCrossAttentionClustering(dim, heads, iterations).double(), 0.3)


def with_identity(clustering):
    """q, k and v leave centers and tokens as they are."""
    for projection in (clustering.q, clustering.k, clustering.v):
        projection.data[:] = torch.eye(projection.shape[-1])
    return clustering


def softmax(x, axis):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def numbers(*tensors):
    arrays = [tensor.detach().double().numpy() for tensor in tensors]
    return arrays if len(arrays) > 1 else arrays[0]


# --------------------------------------------------------------------------------------------------
# The method
# --------------------------------------------------------------------------------------------------
def e_step(C, I, q, k, scale):
    """Similarities and assignments of one image, head by head.  C (K, D), I (N, D) -> S and M (h, K, N)."""
    heads, S = len(scale), []
    for C_h, I_h, h in zip(np.split(C, heads, 1), np.split(I, heads, 1), range(heads)):
        queries, keys = C_h @ q[h], I_h @ k[h]
        norms = np.outer(np.linalg.norm(queries, axis=1), np.linalg.norm(keys, axis=1))
        S.append(scale[h] * (queries @ keys.T) / norms)
    return np.stack(S), softmax(np.stack(S), axis=1)


def m_step(C, I, v, S, M):
    """C plus the means of the values, with weights M exp(S)."""
    weights = M * np.exp(S)
    means = [W @ (I_h @ v_h) / W.sum(1, keepdims=True) for W, I_h, v_h in zip(weights, np.split(I, len(v), 1), v)]
    return C + np.concatenate(means, 1)


@pytest.mark.parametrize("iterations", [1, 3])
def test_one_iteration_is_one_em_step(iterations):
    module = random_clustering(iterations)
    centers, tokens = torch.randn(2, 5, 12).double(), torch.randn(2, 17, 12).double()
    C, M = numbers(*module(centers, tokens))
    scale = numbers(module.log_scale.exp()).flatten()
    for image in range(2):
        q, k, v = numbers(module.q, module.k, module.v)
        expected, I = centers[image].numpy(), tokens[image].numpy()
        for _ in range(iterations):
            expected = m_step(expected, I, v, *e_step(expected, I, q, k, scale))
        _, assignment = e_step(expected, I, q, k, scale)  # Figure 2b ends with an E-step
        np.testing.assert_allclose(C[image], expected, atol=1e-10)
        np.testing.assert_allclose(M[image], assignment, atol=1e-10)


def test_the_assignment_is_a_picture_in_which_each_pixel_is_divided_among_the_clusters():
    initial, cluster, dispatch = cf.InitialCenters(12), random_clustering(3).float(), cf.FeatureDispatching(12, 3)
    tokens = torch.randn(2, 7, 6, 12)
    C, M = cluster(initial(tokens), tokens)
    assert C.shape == (2, 4 * 3, 12) and M.shape == (2, 3, 4 * 3, 7, 6) and dispatch(C, M).shape == tokens.shape
    torch.testing.assert_close(M.sum(2), torch.ones(2, 3, 7, 6))


def test_a_token_unlike_every_center_hardly_moves_any():
    module = with_identity(cf.RecurrentCrossAttentionClustering(8, 1, iterations=1))
    centers = torch.eye(8)[:2][None]
    tokens = torch.cat([centers[0].repeat(5, 1), torch.eye(8)[7:]])[None]  # five like each center, one unlike both
    C, M = module(centers, tokens)
    torch.testing.assert_close(M[0, 0, :, -1], torch.full((2,), 0.5))  # it is divided nevertheless
    assert (C - centers)[0, :, 7].max() < 1e-4  # its part in the means: weighted by M alone, 0.5 / 5.5


def test_gradients_agree_with_finite_differences():
    module = random_clustering(3, dim=4, heads=2)
    centers, tokens = (torch.randn(1, n, 4).double().requires_grad_() for n in (3, 5))
    inputs = centers, tokens, *module.parameters()
    assert torch.autograd.gradcheck(lambda c, x, *_: module(c, x), inputs)


def test_dispatching_is_equation_6_with_the_mlp_inside_the_sum():
    rng = np.random.default_rng(0)
    K, N, h, d = 4, 7, 2, 3
    C, M = rng.normal(size=(K, h * d)), softmax(rng.normal(size=(h, K, N)), axis=1)
    module = cf.FeatureDispatching(h * d, h).double()
    received = module(torch.tensor(C)[None], torch.tensor(M)[None])[0]
    assert received.shape == (N, h * d) and (received == 0).all()  # a new block leaves the tokens as they are
    gain, shift, W, w, V, v = numbers(*randomized(module, 1.0).parameters())
    after_mlp = []
    for c in C:
        c = (c - c.mean()) / np.sqrt(c.var() + 1e-5) * gain + shift
        hidden = [x * (1 + math.erf(x / math.sqrt(2))) / 2 for x in W @ c + w]  # GELU
        after_mlp.append(V @ np.array(hidden) + v)
    received = numbers(module(torch.tensor(C)[None], torch.tensor(M)[None])[0])
    for i, head in itertools.product(range(N), range(h)):
        part = slice(head * d, (head + 1) * d)
        expected = sum(K * M[head, k, i] * after_mlp[k][part] for k in range(K)) / K  # 1/K sum_k sim(C_k, p_i) C_k
        np.testing.assert_allclose(received[i, part], expected, atol=1e-12)


def test_a_new_block_equals_its_convolution():
    block, x = cf.ClusterBlock(32, 2), torch.randn(2, 9, 6, 32)
    convolved = F.conv2d(x.permute(0, 3, 1, 2), *block.depthwise.parameters(), padding=1, groups=32)
    torch.testing.assert_close(block(x), x + convolved.permute(0, 2, 3, 1))


@pytest.mark.parametrize("patch_size", [2, 4])
def test_a_token_sees_its_own_patch_and_a_pixel_on_each_side(patch_size):
    """Without the blocks, which relate neighbors."""
    backbone = cf.Backbone((1,) * 4, (8, 16, 32, 64), patch_size)
    for (block,) in backbone.stages:
        torch.nn.init.zeros_(block.depthwise.weight)
    images = torch.rand(1, 3, 96, 96, requires_grad=True)
    for x, stride in zip(backbone(images), backbone.strides):
        (seen,) = torch.autograd.grad((x[0, :, 1, 1] * torch.randn(x.shape[1])).sum(), images, retain_graph=True)
        rows, columns = seen.abs().sum((0, 1)).nonzero().unbind(1)
        for at in rows, columns:
            assert (at.min(), at.max()) == (stride - 1, 2 * stride)


def test_stochastic_depth_drops_the_branch_of_an_image_in_training_only():
    block, x, branch = cf.ClusterBlock(8, 1, drop_path=0.5), torch.zeros(4000, 1, 1, 2), torch.ones(4000, 1, 1, 2)
    added = block.train().add(x, branch)
    assert set(added.unique().tolist()) == {0.0, 2.0} and abs(added.mean() - 1) < 0.1  # on average, the branch
    assert torch.equal(added[..., 0], added[..., 1]) and torch.equal(block.eval().add(x, branch), branch)


# --------------------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("task", cf.TASKS)
def test_an_image_gives_the_same_alone_and_in_a_batch(task):
    model, images = random_model(task), torch.rand(3, 3, 64, 96)
    with torch.no_grad():
        together, alone = model(images), [model(image[None]) for image in images]
    for i, own in enumerate(alone):
        assert own.keys() - {"aux"} == KEYS[task] | {"logits"} and len(own.get("aux", [])) == 3 * (task != "cls")
        for key in KEYS[task] | {"logits"}:
            torch.testing.assert_close(together[key][i], own[key][0], atol=1e-4, rtol=1e-4)
    mixed = [images[0], torch.rand(3, 50, 70), images[1]]
    for image, found in zip(mixed, model.predict(mixed), strict=True):
        (own,) = model.predict(image[None])
        for key in found.keys() - {"segments"}:
            assert torch.equal(found[key], own[key])


@pytest.mark.parametrize("patch_size", [2, 4])
@pytest.mark.parametrize("height, width", [(32, 32), (64, 320)])
def test_the_backbone_gives_four_maps(height, width, patch_size):
    maps = random_model(patch_size=patch_size).backbone(torch.rand(1, 3, height, width))
    for i, (channels, x) in enumerate(zip((32, 64, 128, 256), maps, strict=True)):
        assert x.shape == (1, channels, height // (patch_size * 2**i), width // (patch_size * 2**i))


@pytest.mark.parametrize("task", cf.TASKS)
def test_predict_pads_at_the_bottom_and_right_and_crops_what_it_returns(monkeypatch, task):
    """The same as for an image that was padded before, whose results are then cropped."""
    monkeypatch.setattr(cf, "iou_and_giou", lambda a, b: ((a[..., 0] - b[..., 0]) * 0, None))  # that of cropped boxes differs
    model, image = random_model(task), torch.rand(3, 70, 50)
    padded = model.backbone.mean.expand(3, 96, 64 if task == "cls" else 96).clone()
    padded[:, :70, :50] = image
    (found,), (whole,) = model.predict([image]), model.predict([padded])
    assert found.keys() == whole.keys()
    if task == "cls":
        torch.testing.assert_close(found, whole)
    elif task == "sem":
        assert torch.equal(found["semantic"], whole["semantic"][:70, :50])
    elif task == "det":
        torch.testing.assert_close(found["boxes"], whole["boxes"].minimum(torch.tensor([50.0, 70] * 2)))
    elif task == "inst":  # the order differs: a score holds the mean probability inside of a mask that is cropped
        masks = {mask.numpy().tobytes() for mask in whole["masks"][:, :70, :50]}
        assert {mask.numpy().tobytes() for mask in found["masks"]} == masks


@pytest.mark.parametrize("size, final", [((96, 96), (201, 130)), ((96, 96), (33, 41)), ((70, 50), (70, 50)), ((70, 50), (35, 70))])
def test_masks_are_resized_scored_and_sorted(size, final):
    """Logits that rise to the right, or to the bottom: bilinear samples of a slope are known in any size."""
    rise = 4 * torch.arange(24) + 2.0  # at the middles of mask pixels, in pixels of the padded image
    masks = torch.stack([(rise - 0.32 * size[1]).expand(24, 24), (rise - 0.32 * size[0])[:, None].expand(24, 24)])
    logits = torch.tensor([[3.0, 0.0, -1.0], [1.0, 2.0, 0.5]])  # the last is of "no object"
    boxes = torch.tensor([[0.2, 0.2, 0.1, 0.1], [0.7, 0.7, 0.1, 0.1]])
    head = cf.ClusterFormer("inst", "nano", num_classes=2).head
    (found,) = head.predict(dict(logits=logits[None], boxes=boxes[None], masks=masks[None]), 96, size, [final])
    y, x = ((np.arange(n) + 0.5) * side / n - 0.32 * side for n, side in zip(final, size))
    slopes = [np.broadcast_to(x, final), np.broadcast_to(y[:, None], final)]
    pairs = [(0, 0), (1, 1), (1, 0), (0, 1)]  # center and class
    expected = []
    for center, label in pairs:
        weights, slope = np.exp(logits[center].tolist()), slopes[center]
        expected.append((weights[label] / weights.sum() * (1 / (1 + np.exp(-slope)))[slope > 0].mean(), center, label))
    expected.sort(reverse=True)
    np.testing.assert_allclose(found["scores"], [score for score, _, _ in expected], atol=1e-3)
    assert found["labels"].tolist() == [label for _, _, label in expected]
    for mask, (_, center, _) in zip(found["masks"].numpy(), expected):
        assert np.array_equal(mask, slopes[center] > 0)


def test_the_trace_holds_every_iteration_of_every_clustering_and_changes_nothing():
    model, image = random_model(drop_path=0.9), torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        before, entries, after = model(image)["logits"], cf.trace(model.train(), image), model.eval()(image)["logits"]
    assert not entries[-1]["centers"][-1].requires_grad
    read = model.head.classifier(model.head.center_norm(entries[-1]["centers"][-1]).mean(1))
    torch.testing.assert_close(read, before)  # without stochastic depth
    assert torch.equal(before, after) and all(m.history is None for m in model.modules() if hasattr(m, "history"))
    blocks = [f"backbone.stages.{i}.{j}.cluster" for i, j in [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]]
    assert [entry["name"] for entry in entries] == [*blocks, "head.cluster"]
    for entry in entries:
        assert len(entry["centers"]) == len(entry["assignments"]) == 4 and len(entry["weights"]) == 3
        B, h, K, N = entry["assignments"][0].shape
        assert N == math.prod(entry["size"]) and entry["centers"][0].shape[:2] == (B, K)
        torch.testing.assert_close(entry["assignments"][-1].sum(2), torch.ones(B, h, N))
        means = entry["weights"][-1] @ entry["values"]  # (B, h, K, d)
        C = entry["centers"][-2] + means.transpose(1, 2).flatten(2)
        torch.testing.assert_close(entry["centers"][-1], C, atol=1e-4, rtol=1e-4)


@lowered
@pytest.mark.parametrize("task", cf.TASKS)
def test_bfloat16_autocast_is_close_and_its_maps_take_half_the_memory(task):
    model, image = random_model(task), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        exact = model(image)
        with torch.autocast("cpu", torch.bfloat16):
            rough, entries = model(image), cf.trace(model, image)
    for key in KEYS[task] | {"logits"}:
        assert (rough[key].float() - exact[key]).abs().mean() < 0.05 * exact[key].abs().mean(), key
    assert {entry[key][-1].dtype for entry in entries for key in ("assignments", "weights")} == {torch.bfloat16}


@quick("cls")
def test_the_exported_model_gives_the_same_for_any_batch_size(shallow, task):
    model, images = random_model(task), torch.rand(5, 3, 64, 96)
    shapes = {"images": {0: torch.export.Dim("batch", min=1, max=64)}}
    exported = torch.export.export(model, (torch.rand(2, 3, 64, 96),), dynamic_shapes=shapes).module()
    found, expected = exported(images), model(images)
    for key in KEYS[task] | {"logits"}:
        torch.testing.assert_close(found[key], expected[key], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("task", cf.TASKS)
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=lowered), torch.float64])
def test_predict_works_in_every_dtype(task, dtype):
    model, image = random_model(task), torch.rand(3, 70, 50)
    exact, found = model.predict([image])[0], model.to(dtype).predict([image.to(dtype)])[0]
    assert found.keys() == exact.keys()
    if "scores" in found:
        n = min(len(found["scores"]), len(exact["scores"]), 3)
        torch.testing.assert_close(found["scores"][:n].float(), exact["scores"][:n], atol=0.1, rtol=0.1)
    if dtype == torch.float64:  # and where it is the default
        torch.set_default_dtype(dtype)
        try:
            assert cf.ClusterFormer(task, "nano", 5).predict([image])[0].keys() == exact.keys()
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("task", cf.TASKS)
@pytest.mark.parametrize("n", [(3, 1), (0, 0)])
@pytest.mark.parametrize("precise", [True, False])
def test_every_parameter_gets_a_finite_gradient_even_from_images_without_objects(task, n, precise):
    model = random_model(task).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
        losses = model.loss(model(torch.rand(2, 3, 64, 64)), some_targets(task, n))
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert not sum(n) or all(p.grad.any() for p in model.parameters())


@pytest.fixture
def shallow(monkeypatch):
    """Compiling takes minutes for deep models, and sizes that other tests compiled for would become variables."""
    torch.compiler.reset()
    monkeypatch.setitem(cf.VARIANTS, "nano", dict(cf.VARIANTS["nano"], depths=(1, 0, 0, 1)))


@quick("cls")
def test_a_training_step_of_every_task_is_one_graph_that_is_compiled_once(shallow, task):
    model, graphs = random_model(task, drop_path=0.5).train(), []
    backend = lambda graph, inputs: graphs.append(graph) or graph.forward  # runs it as it is
    runner = torch.compile(model, fullgraph=True, backend=backend)
    for n in ([3, 1], [0, 0]):
        losses = model.loss(runner(torch.rand(2, 3, 64, 64)), some_targets(task, n))
        sum(losses.values()).backward()
    assert len(graphs) == 1


@slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_model_has_the_same_outputs_and_gradients(shallow, backend):
    image, found = torch.rand(2, 3, 64, 96), []
    for compiled in (False, True):
        model = random_model().train()
        scale = model.head.cluster.log_scale
        scale.data.fill_(math.log(80.0))  # beyond its limit
        runner = torch.compile(model, fullgraph=True, backend=backend) if compiled else model
        logits = runner(image)["logits"]
        logits.square().sum().backward()
        assert not scale.grad.any() and scale.exp().max().item() == pytest.approx(80)  # no forward pass edits it
        found.append([logits.detach(), *(parameter.grad for parameter in model.parameters())])
    torch.testing.assert_close(*found, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("task", cf.TASKS)
@pytest.mark.parametrize("precise", [True, pytest.param(False, marks=lowered)])
def test_any_image_has_a_valid_prediction(task, precise):
    images = [torch.zeros(3, 32, 300), torch.ones(3, 77, 33), torch.rand(3, 250, 40), torch.full((3, 45, 61), 0.5)]
    images[0][:, ::2, ::2] = images[0][:, 1::2, 1::2] = 1  # the highest frequency
    model = random_model(task).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
        predictions = model.predict(images)
    assert model.training  # predict switches to evaluation mode, and back
    for image, found in zip(images, predictions, strict=True):
        size = image.shape[1:]
        if "scores" in found:
            scores, labels = found["scores"], found["labels"]
            assert (scores >= 0).all() and (scores <= 1).all() and (scores.diff() <= 0).all()  # NaN fails, too
            assert len(scores) == len(labels) <= 100 and set(labels.tolist()) <= {*range(model.num_classes)}
        if "boxes" in found:
            low, high = found["boxes"].split(2, 1)
            assert (low >= 0).all() and (low <= high).all() and (high <= torch.tensor(size).flip(0)).all()
        if "masks" in found:
            assert found["masks"].shape == (len(scores), *size) and found["masks"].dtype == torch.bool
        if task == "sem":
            assert found["semantic"].shape == size and {*found["semantic"].unique().tolist()} <= {*range(5)}
        if task == "pan":
            ids = sorted(segment["id"] for segment in found["segments"])
            assert found["panoptic"].shape == size and found["panoptic"].unique().tolist() in (ids, [0, *ids])
            assert all(s["isthing"] == (s["label"] < 3) and 0 <= s["score"] <= 1 for s in found["segments"])


@pytest.mark.parametrize("images, complaint", [
    (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "uint8; divide by 255"),
    (torch.full((1, 3, 64, 64), math.nan), r"RGB in \[0, 1\]"),
    (torch.zeros(1, 3, 0, 64), r"got \(1, 3, 0, 64\)"), ([torch.zeros(1, 3, 64, 64)], r"got \(1, 1, 3, 64, 64\)"),
    ([np.zeros((3, 64, 64))], "got ndarray"), ([], "at least one"),
])
def test_predict_says_what_is_wrong_with_images(images, complaint):
    with pytest.raises(ValueError, match=complaint):
        random_model().predict(images)
    with pytest.raises(ValueError, match="one for each of 2 images, got 1"):
        random_model().predict(torch.zeros(2, 3, 64, 64), [(64, 64)])


@pytest.mark.parametrize("images, complaint", [
    (torch.zeros(1, 3, 64, 80), "sides must be multiples of 32, got 64 x 80; pad, or call predict"),
    (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "uint8; divide by 255"), ([torch.zeros(3, 64, 64)], "got list"),
])
def test_forward_says_what_is_wrong_with_images(images, complaint):
    for model in (random_model(), random_model("inst"), random_model().backbone):
        with pytest.raises(ValueError, match=complaint):
            model(images)
    assert random_model(patch_size=2)(torch.zeros(1, 3, 48, 80))["logits"].isfinite().all()


def test_masks_of_another_size_than_the_images_are_refused():
    with pytest.raises(ValueError, match=r"masks must be \(n, 96, 64\), as the images, got \(3, 64, 64\)"):
        random_model("inst").train().loss(random_model("inst")(torch.rand(2, 3, 96, 64)), some_targets("inst"))


# --------------------------------------------------------------------------------------------------
# Detection and segmentation
# --------------------------------------------------------------------------------------------------
def test_the_box_prior_is_the_log_of_a_gaussian_over_a_quadrant():
    boxes = torch.tensor([[[0.5, 0.3, 0.4, 0.2], [0.5, 0.3, 0.4, 0.02]]])
    x = y = (np.arange(10) + 0.5) / 10
    for box, height in enumerate((0.1, 0.1)):  # a quadrant is at least as high as a token
        priors = cf.box_prior(boxes, 10, 10)[:, 0, box].view(4, 10, 10)
        up = boxes[0, box, 3].item() / 4
        quadrants = (0.3 - up, 0.4), (0.3 - up, 0.6), (0.3 + up, 0.4), (0.3 + up, 0.6)  # centers, y and x
        for prior, (middle_y, middle_x) in zip(priors, quadrants):
            horizontal, vertical = (x[None] - middle_x) / 0.05, (y[:, None] - middle_y) / (height / 4)
            expected = -(horizontal**2 + vertical**2) / 2  # sigma: a quarter of a side
            np.testing.assert_allclose(prior, expected.clip(min=-20), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("height, width", [(12, 12), (7, 25), (40, 33)])
def test_centers_start_as_the_means_of_the_cells_that_are_their_first_boxes(height, width):
    x, boxes = torch.randn(2, height, width, 8), cf.cell_boxes(min(10, height), min(10, width), CPU)
    means = cf.InitialCenters(8, cf.OBJECT_GRID, min_cell=1, ffn=False)(x)
    assert len(boxes) == means.shape[1] == min(10, height) * min(10, width)
    for i, box in enumerate(boxes):
        left, top, right, bottom = (cf.cxcywh_to_xyxy(box) * torch.tensor([width, height] * 2)).tolist()
        rows = slice(math.floor(top + 1e-4), math.ceil(bottom - 1e-4))  # of all tokens that the cell touches
        cell = x[:, rows, math.floor(left + 1e-4) : math.ceil(right - 1e-4)]
        torch.testing.assert_close(means[:, i], cell.mean((1, 2)))
    assert cf.InitialCenters(8)(x[:, :3, :4]).shape[1] == 2 * 2  # in the backbone, a cell has two tokens a side


def test_a_box_is_the_previous_one_moved_by_inverse_sigmoids():
    decoder = random_model("det").head.decoder
    centers, boxes = torch.randn(1, 2, 128), torch.tensor([[[0.5, 0.4, 0.2, 0.1], [0.9, 0.5, 0.3, 0.2]]])
    for parameter in decoder.box[-1].parameters():
        parameter.data.zero_()  # as at first
    found = lambda: decoder.predict_centers(centers, boxes, None)["boxes"]
    torch.testing.assert_close(found(), boxes)
    decoder.box[-1].bias.data = torch.tensor([math.log(3), 0.0, -math.log(2), math.log(9)])
    torch.testing.assert_close(found()[0, 0], torch.tensor([0.75, 0.4, 1 / 9, 0.5]))  # 1:1 -> 3:1, 1:4 -> 1:8, 1:9 -> 9:9


@pytest.mark.parametrize("size", [48, 192])
def test_mask_samples_show_the_silhouette_of_a_disc(size):
    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    disc = torch.where((x / size - 0.5) ** 2 + (y / size - 0.5) ** 2 < 1 / 16, 20.0, -20.0)  # half as wide as the image
    samples = cf.mask_samples(disc[None, None], torch.tensor([[[0.5, 0.5, 0.5, 0.5]]])).view(12, 12).numpy()
    line = np.linspace(-0.3, 0.3, 12)
    distance = np.hypot(line[:, None], line)
    clear = abs(distance - 0.25) > 1.5 / size  # farther from the border than the pixels that a sample reads
    assert clear.mean() > 0.5
    np.testing.assert_allclose(samples[clear], np.where(distance < 0.25, 0.5, -0.5)[clear], atol=1e-5)


def test_classes_of_centers_and_pixels_worked_out_by_hand():
    probability = torch.tensor([[0.9, 0.1], [0.8, 0.7], [0.6, 0.2]])
    boxes = torch.tensor([[3.0, 3.0, 7.0, 7.0], [3.1, 3.0, 7.1, 7.0], [1.0, 1.0, 2.0, 2.0]])
    found = zip(*(x.tolist() for x in cf.top_detections(probability, boxes)))
    # Center 1 for class 0 and center 0 for class 1 duplicate a better detection of the same class.
    expected = [(0.9, 0, 0), (0.7, 1, 1), (0.6, 0, 2), (0.2, 1, 2)]
    assert list(found) == [(pytest.approx(score), label, center) for score, label, center in expected]
    probability = torch.tensor([[0.6, 0.0], [0.0, 0.5], [0.0, 0.4]])
    masks = torch.tensor([[9.0, 9.0, 9.0], [9.0, -9.0, 9.0], [-9.0, -9.0, 9.0]]).view(3, 1, 3).sigmoid()
    found = cf.SemanticHead.final_prediction(None, probability, None, masks.__getitem__)
    assert found["semantic"].tolist() == [[0, 0, 1]]  # 0.6 : 0.5, 0.6 : 0, 0.6 : 0.9


def test_panoptic_segments_of_a_case_worked_out_by_hand():
    rows = ["111100", "011110", "000011", "110000", "000001"]  # masks of five centers over six pixels
    masks = torch.tensor([[9.0 if pixel == "1" else -9.0 for pixel in row] for row in rows]).view(5, 1, 6).sigmoid()

    def segments_of(probability, things):
        head = types.SimpleNamespace(things=things)
        return cf.PanopticHead.final_prediction(head, probability, None, masks.__getitem__).values()

    probability = torch.zeros(5, 3)
    probability[[0, 1, 2, 3, 4], [0, 0, 2, 2, 1]] = torch.tensor([0.9, 0.5, 0.6, 0.95, 0.05])
    ids, segments = segments_of(probability, [True, True, False])
    # Center 3 beats 0 at two of its four pixels: 0 keeps less than 0.6 of its mask, and gets no segment.  Nor does 1.
    # The score of 4 is below the threshold.  2 and 3 are stuff of one class: one segment.
    assert ids.tolist() == [[1, 1, 0, 0, 1, 1]]
    assert segments == [dict(id=1, label=2, isthing=False, score=pytest.approx(0.95))]
    ids, segments = segments_of(probability, [True, True, True])
    assert ids.tolist() == [[2, 2, 0, 0, 1, 1]] and [s["isthing"] for s in segments] == [True, True]
    ids, segments = segments_of(0.1 * probability, [True] * 3)
    assert ids.tolist() == [[0] * 6] and segments == []


def rectangle(top, left, bottom, right, size=(40, 60)):
    mask = np.zeros(size, bool)
    mask[top:bottom, left:right] = True
    return mask


def some_targets(task, n=(3, 1), size=64):
    """n rectangles of random classes for each image; for cls, a class."""
    rng, targets = np.random.default_rng(0), []
    if task == "cls":
        return torch.from_numpy(rng.integers(0, 10, len(n)))
    for count in n:
        corners = [(*rng.integers(0, size - 20, 2), *rng.integers(12, 20, 2)) for _ in range(count)]
        masks = [rectangle(y, x, y + h, x + w, (size, size)) for y, x, h, w in corners]
        masks = torch.from_numpy(np.array(masks, bool).reshape(-1, size, size))
        boxes = torch.tensor([[x + w / 2, y + h / 2, w, h] for y, x, h, w in corners]).float().view(-1, 4) / size
        target = dict(labels=torch.from_numpy(rng.integers(0, 5, count)), boxes=boxes, masks=masks)
        targets.append({key: value for key, value in target.items() if key in KEYS[task] | {"labels"}})
    return targets


def perfect_output(targets, task):
    """Predictions in which center 2 j of 12 is target j, and the others are no object; in all of four layers."""
    B = len(targets)
    prediction = dict(logits=torch.full((B, 12, 6), -12.0), boxes=torch.rand(B, 12, 4) * 0.1 + 0.45)
    prediction["logits"][:, :, 5] = 0.0
    prediction["masks"] = torch.full((B, 12, 16, 16), -12.0)
    for i, target in enumerate(targets):
        for j, label in enumerate(target["labels"]):
            prediction["logits"][i, 2 * j, label], prediction["boxes"][i, 2 * j] = 12.0, target["boxes"][j]
            if "masks" in target:
                prediction["masks"][i, 2 * j] = 24 * F.avg_pool2d(target["masks"][j].float()[None], 4)[0] - 12
    prediction = {key: prediction[key].requires_grad_() for key in KEYS[task] | {"logits"}}
    return prediction | {"aux": [prediction] * 3}


def layers_of(output, count=4):
    """The same predictions in each of some layers, as match() takes them."""
    return {key: torch.stack([output[key]] * count, 1) for key in output.keys() & {"logits", "boxes", "masks"}}


def test_hungarian_matching_is_optimal():
    rng = np.random.default_rng(0)
    for case in range(200):
        n, more = int(rng.integers(1, 6)), int(rng.integers(0, 3))
        shape = n, n + more
        cost = rng.normal(size=shape) if case % 2 else rng.integers(0, 3, shape).astype(float)  # with ties, too
        best = min(cost[range(n), list(order)].sum() for order in itertools.permutations(range(n + more), n))
        for cost in (cost, cost.T):  # with more columns than rows, and with fewer
            rows, columns = cf.hungarian(cost)
            assert len(set(rows)) == len(set(columns)) == n and cost[rows, columns].sum() == pytest.approx(best)


@pytest.mark.parametrize("task", DENSE)
def test_every_target_is_matched_with_the_center_that_predicts_it(task):
    targets = some_targets(task, (3, 0, 2))
    output = perfect_output(targets, task)
    image, layer, center, target, times = cf.match(layers_of(output), targets)
    found = sorted((i, t, c) for i, l, t, c in zip(*(x.tolist() for x in (image, layer, target, center))) if l == 3)
    assert found == [(0, j, 2 * j) for j in range(3)] + [(2, 3 + j, 2 * j) for j in range(2)]
    for l, limits in enumerate([(2, 3), (2, 3), (2, 2), (1, 1)]):  # at most half of the 12 centers have a target
        first = zip(*(x[layer == l].tolist() for x in (image, target, times)))
        assert Counter(first) == {(i, t, limits[i // 2]): limits[i // 2] for i, t, _ in found}
        assert len(set(zip(image[layer == l].tolist(), center[layer == l].tolist()))) == (layer == l).sum()
    losses = cf.set_losses(output | {"aux": []}, targets, 4)
    assert max(losses[name] for name in ("label", "l1", "giou")) < 0.01


def test_with_more_targets_than_centers_each_center_has_one():
    targets = some_targets("inst", (30, 2), 32)
    output = random_model("inst").train()(torch.rand(2, 3, 32, 32))  # 4 x 4 tokens at stride 8: 16 centers
    image, layer, center, target, _ = cf.match(layers_of(output), targets)
    assert sorted(center[(image == 0) & (layer == 3)].tolist()) == list(range(16))
    assert len(set(target[(image == 0) & (layer == 3)].tolist())) == 16
    assert sorted(target[(image == 1) & (layer == 3)].tolist()) == [30, 31]
    assert cf.set_losses(output, targets, 4)["mask"].isfinite()


def test_losses_match_a_reference_in_numpy():
    """One image, one layer, two targets, three centers: the best of all assignments, and what it costs."""
    logits = torch.tensor([[[2.0, -1.0, 0.2], [-1.0, 0.5, -0.3], [0.3, -2.0, 0.1]]])  # the last: "no object"
    boxes = torch.rand(1, 3, 4) * 0.2 + 0.3
    targets = [dict(labels=torch.tensor([1, 0]), boxes=torch.rand(2, 4) * 0.2 + 0.3)]
    losses = cf.set_losses(dict(logits=logits, boxes=boxes, aux=[]), targets, 4)
    probability = softmax(logits[0].numpy(), axis=1)
    found = []
    for pair in itertools.permutations(range(3), 2):
        label, likely = -0.1 * np.log(probability[3 - sum(pair), 2]), 0  # of the center without a target
        l1 = giou = 0
        for t, c in enumerate(pair):
            label -= np.log(probability[c, 1 - t])
            likely += probability[c, 1 - t]
            ours, theirs = boxes[0, c].numpy(), targets[0]["boxes"][t].numpy()
            l1 += np.abs(ours - theirs).sum()
            low, high = zip(*((box[:2] - box[2:] / 2, box[:2] + box[2:] / 2) for box in (ours, theirs)))
            shared = np.prod(np.clip(np.minimum(*high) - np.maximum(*low), 0, None))
            hull = np.prod(np.maximum(*high) - np.minimum(*low))
            union = np.prod(ours[2:]) + np.prod(theirs[2:]) - shared
            giou += 1 - (shared / union - (hull - union) / hull)
        found.append((-2 * likely + 5 * l1 + 2 * giou, 2 * label, 5 * l1, 2 * giou))
    np.testing.assert_allclose([losses[name].item() for name in ("label", "l1", "giou")], min(found)[1:], rtol=1e-4)


def test_mask_costs_at_random_points_average_to_those_at_all_pixels():
    rectangles = [rectangle(20, 30, 150, 90, (256, 256)), rectangle(100, 10, 220, 250, (256, 256))]
    target = dict(labels=torch.tensor([1, 4]), boxes=torch.full((2, 4), 0.5))
    target["masks"] = torch.from_numpy(np.array(rectangles))
    masks = F.interpolate(torch.randn(1, 6, 4, 4), (64, 64), mode="bilinear")
    output = dict(logits=torch.zeros(6, 6), boxes=torch.full((6, 4), 0.5), masks=masks[0])
    mean = torch.stack([cf.matching_cost(output, target) for _ in range(100)]).mean(0)
    full = F.interpolate(masks, scale_factor=4.0, mode="bilinear")[0]
    for (t, truth), (k, logits) in itertools.product(enumerate(target["masks"].float()), enumerate(full)):
        entropy = F.binary_cross_entropy_with_logits(logits, truth)
        dice = 1 - 2 * (logits.sigmoid() * truth).sum() / (logits.sigmoid() + truth).sum()
        label, box = -2 / 6, -2  # five classes and "no object" are equally likely; the boxes are equal
        assert mean[t, k] == pytest.approx(label + box + 5 * entropy.item() + 5 * dice.item(), abs=0.03)


def test_the_pixel_loss_is_the_mean_entropy_over_each_target():
    targets, pixels = some_targets("sem", (2, 0, 1)), torch.randn(3, 16, 16, 5)
    expected = 0
    for target, image in zip(targets, -pixels.log_softmax(-1)):
        for mask, label in zip(target["masks"], target["labels"]):  # a pixel of the mask lies under a quarter of E's
            part = image[..., label].repeat_interleave(4, 0).repeat_interleave(4, 1)[mask]
            expected += part.mean() if len(part) else 0
    masks, labels = (torch.cat([target[key] for target in targets]) for key in ("masks", "labels"))
    found = cf.pixel_loss(pixels, masks, labels, torch.tensor([0, 0, 2]), 4)
    torch.testing.assert_close(found, expected)


def test_points_are_sampled_where_a_mask_is_uncertain():
    masks = torch.linspace(8, -8, 40).repeat(1, 40, 1)  # the border is at x = 32 of 64 pixels
    points = cf.uncertain_points(masks) * 64
    assert points.shape == (1, 400, 2) and 0 <= points.min() and points.max() < 64
    assert ((points[..., 0] - 32).abs() < 12).float().mean() > 0.75  # if they were uniform, 24 / 64


@slow
@pytest.mark.parametrize("task", DENSE)
def test_each_head_overfits_one_batch(monkeypatch, task):
    small = dict(depths=(1, 1, 1, 1), channels=(16, 32, 64, 128), dim=64, levels=(1, 1))  # half of nano, for speed
    monkeypatch.setitem(cf.VARIANTS, "nano", small)
    shapes, steps = data.Shapes(100, 64, 0, "train", task), 160 if task == "det" else 100
    images, targets = data.stacked([shapes[0, i] for i in (1, 2)])
    images, model = data.as_float(images), cf.ClusterFormer(task, "nano", len(shapes.classes), things=shapes.things)
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / 10) * (1 - i / steps))
    for _ in range(steps):
        (sum(model.loss(model(images), targets).values()) / model.count(targets)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step(), schedule.step(), optimizer.zero_grad()
    for found, target in zip(model.predict(images), targets):
        if task in ("det", "inst"):
            corners = box_convert(target["boxes"], "cxcywh", "xyxy") * 64
            overlap, index = box_iou(corners, found["boxes"][: len(corners)]).max(1)
            assert (overlap > 0.5).all() and torch.equal(found["labels"][index], target["labels"])
        if task == "inst":
            ours, theirs = found["masks"][index], target["masks"]
            assert ((ours & theirs).sum((1, 2)) > 0.5 * (ours | theirs).sum((1, 2))).all()
        if task in ("sem", "pan"):
            truth = (target["masks"] * (target["labels"] + 1).view(-1, 1, 1)).sum(0) - 1
            assert (class_map(found) == truth)[truth >= 0].float().mean() > 0.75


# --------------------------------------------------------------------------------------------------
# What would fail on a GPU, or wait for it
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("task", cf.TASKS)
@pytest.mark.parametrize("n", [(3, 1), (0, 0)])
def test_every_tensor_is_created_on_the_device_of_the_images(monkeypatch, task, n):
    """A tensor created without a device is on "meta" here, and using it together with the images is an error."""
    model, images, found = random_model(task), torch.rand(2, 3, 64, 64), some_targets(task, n)
    scenes = data.Shapes(2, 64, 0, "val", task)
    for name in ("label_map", "segments"):  # the ground truth is computed in advance
        monkeypatch.setattr(scenes, name, [getattr(scenes, name)(i) for i in range(2)].__getitem__)

    def batches(*arguments, **options):
        truth = found if task == "cls" else [dict(index=i, size=(64, 64)) for i in range(2)]
        with torch.device("meta"):
            yield list(images), truth
        raise EOFError  # the rest of evaluate() works on the host

    with torch.device("meta"):
        losses = model.loss(model.train()(images), found)
        sum(losses.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    monkeypatch.setattr(evaluation, "batches_of", batches)
    for images in (images, [torch.rand(3, 64, 64), torch.rand(3, 70, 50)]):
        with pytest.raises(EOFError):
            evaluation.evaluate(model.eval(), scenes, CPU)


@pytest.mark.skipif(torch.__version__ < (2, 14), reason="torch 2.6 asks a driver how to convolve; 2.14 is known not to")
@pytest.mark.parametrize("task", cf.TASKS)
@pytest.mark.parametrize("training", [True, False])
def test_all_dtypes_agree_under_autocast_for_cuda(task, training):
    """Fake tensors on a fake GPU: nothing is computed, but a product of two dtypes is still an error."""
    model = random_model(task).train(training)
    dtypes = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    with FakeTensorMode():
        fake = lambda x: torch.empty(x.shape, dtype=x.dtype, device="cuda", requires_grad=x.requires_grad)
        weights = {name: fake(x) for name, x in itertools.chain(model.named_parameters(), model.named_buffers())}
        torch.set_autocast_enabled("cuda", True)  # torch.autocast("cuda") is off without a GPU
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            output = torch.func.functional_call(model, weights, torch.rand(2, 3, 64, 64, device="cuda"))
        finally:
            torch.set_autocast_enabled("cuda", dtypes[0])
            torch.set_autocast_dtype("cuda", dtypes[1])
    for prediction in [output, *output.get("aux", [])]:
        assert all(value.device.type == "cuda" for key, value in prediction.items() if key != "aux")
        assert {prediction[key].dtype for key in prediction.keys() & {"logits", "boxes"}} == {torch.float32}
        assert "masks" not in prediction or prediction["masks"].dtype == torch.bfloat16  # so autocast was on


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a GPU: copies to it, reads of values, shapes that depend on values."""

    READS = "_local_scalar_dense", "is_nonzero", "equal", "masked_select", "_unique2", "nonzero"

    def __init__(self, monkeypatch):
        super().__init__()
        self.count = Counter()
        for name in ("cpu", "new_tensor", "tolist"):
            monkeypatch.setattr(torch.Tensor, name, self.counted(name, getattr(torch.Tensor, name)))

    def counted(self, name, method):
        return lambda *arguments, **options: self.count.update([name]) or method(*arguments, **options)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__
        if name in self.READS:
            self.count[name] += 1
        if name.startswith(("index", "_index")) and any(getattr(i, "dtype", None) == torch.bool for i in args[1] or ()):
            self.count["index by a mask"] += 1
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("count", [2, 4])
def test_the_losses_of_inst_wait_for_a_gpu_once(count, monkeypatch):
    """For the matching costs, for any number of images; a training step also waits for the losses of the log."""
    model, images = random_model("inst"), torch.rand(count, 3, 64, 64)
    found = some_targets("inst", [3, 1] * (count // 2))
    with Waits(monkeypatch) as waits:
        losses = model.loss(model.train()(images), found)
        sum(losses.values()).backward()
    assert waits.count == {"cpu": 1}


# --------------------------------------------------------------------------------------------------
# Data: shapes, batches, folders of images
# --------------------------------------------------------------------------------------------------
def test_shapes_are_a_function_of_seed_epoch_and_index():
    draw = lambda split, seed, *key: data.Shapes(100, 64, seed, split)[key]
    image, label = draw("train", 3, 2, 7)
    again, same_label = draw("train", 3, 2, 7)
    assert torch.equal(image, again) and label == same_label
    assert image.dtype == torch.uint8 and image.shape == (3, 64, 64)
    for seed, *key in ((3, 2, 8), (3, 3, 7), (4, 2, 7)):
        assert not torch.equal(image, draw("train", seed, *key)[0])
    held_out = draw("val", 3, 0, 7)[0]
    assert torch.equal(held_out, draw("val", 4, 5, 7)[0]) and not torch.equal(held_out, draw("train", 3, 0, 7)[0])


def test_shapes_agree_on_a_scene_across_tasks():
    for index in range(10):
        shown = {task: data.Shapes(10, 96, 3, "train", task)[1, index] for task in DENSE}
        (image, det), (same, inst), (_, sem), (_, pan) = shown.values()
        n = len(inst["labels"])
        assert torch.equal(image, same) and torch.equal(det["boxes"], inst["boxes"]) and "masks" not in det
        assert torch.equal(pan["masks"][:n], inst["masks"]) and torch.equal(pan["labels"][:n], inst["labels"])
        assert pan["masks"].sum(0).max() == sem["masks"].sum(0).max() == 1
        for label in pan["labels"].unique():
            assert torch.equal(sem["masks"][sem["labels"] == label].any(0), pan["masks"][pan["labels"] == label].any(0))


def test_a_global_batch_is_the_same_however_it_is_split():
    def batches(world_size, accumulate, first=0):
        """The batches of all steps, from the chunks of all processes in the order of the images."""
        split = world_size, accumulate, first
        ranks = [list(data.GlobalBatches(50, 12, 9, 5, rank, *split)) for rank in range(world_size)]
        steps = range(0, (9 - first) * accumulate, accumulate)
        return [sum((chunk for part in ranks for chunk in part[i : i + accumulate]), []) for i in steps]

    whole = batches(1, 1)
    for other in (batches(2, 1), batches(3, 2), batches(1, 4), batches(1, 1)[:5] + batches(2, 1, first=5)):
        assert other == whole
    for epoch in range(2):
        seen = sum(whole[4 * epoch : 4 * epoch + 4], [])
        assert {e for e, _ in seen} == {epoch} and len(set(seen)) == 48  # no duplicates


def test_mixing_is_a_function_of_seed_and_step():
    pixels, labels = torch.rand(12, 3, 8, 8), torch.arange(12) % 7
    mixed = [data.mix(pixels.clone(), labels, 7, 0.8, 1.0, 5, step) for step in (*range(6), 3)]
    assert torch.equal(mixed[3][0], mixed[-1][0]) and torch.equal(mixed[3][1], mixed[-1][1])
    assert sum(torch.equal(images, pixels) for images, _ in mixed[:6]) < 3  # a cut may be smaller than a pixel
    for _, targets in mixed:
        torch.testing.assert_close(targets.sum(1), torch.ones(12))


def write_images(root, split, classes, count=3, size=(40, 50)):
    rng = np.random.default_rng(0)
    for name in classes:
        (root / split / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / split / name / f"{i}.png")


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path, "train", ["cat", "dog"], 8)
    write_images(tmp_path, "val", ["cat", "dog"], 3)
    return tmp_path


def test_images_of_every_kind_are_read_correctly(tmp_path, monkeypatch):
    rgb, wide = np.zeros((40, 60, 3), np.uint8), np.arange(40 * 60, dtype=np.uint16).reshape(40, 60) * 27
    rgb[:20], rgb[20:, :30], rgb[20:, 30:] = (200, 40, 40), (40, 200, 40), (40, 40, 200)
    upright, exif = Image.fromarray(rgb), Image.Exif()
    exif[0x0112] = 6  # rotated: rows of the file are columns of the picture
    upright.quantize(8).save(tmp_path / "palette.png")
    upright.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    upright.convert("RGBA").save(tmp_path / "alpha.png")
    upright.rotate(90, expand=True).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    for path in tmp_path.iterdir():
        image = np.asarray(data.load_image(path)).astype(int)
        assert image.shape == (40, 60, 3) and np.abs(image - rgb)[[5, 35, 35], [30, 10, 50]].max() < 12, path
    Image.fromarray(wide).save(tmp_path / "16bit.png")
    assert "its mode is I;16, not 1 or L or" in refusal(lambda: data.load_image(tmp_path / "16bit.png"))
    for transform in (data.train_transform(32, 0.08, 9, 0), data.eval_transform(32)):
        assert transform(Image.new("RGB", (1, 1))).shape == transform(Image.new("RGB", (9000, 30))).shape == (3, 32, 32)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # more than twice as many may fill the memory
    assert "palette.png: cannot be read" in refusal(lambda: data.load_image(tmp_path / "palette.png"))


@pytest.mark.parametrize("workers", [0, 2])
def test_training_skips_a_broken_image_and_reports_it_once(folder, capfd, workers):
    cut_in_half(folder / "train" / "cat" / "3.png")
    (folder / "train" / "cat" / "4.png").write_text("this is no image")
    (folder / "train" / "dog" / "7.png").write_bytes(b"")  # the last index: the first one comes next
    images = data.Folder(folder, "train", data.train_transform(32, 0.08, 27, 0.25), seed=1)
    whole = data.SkipBroken(images)
    keys = [[(epoch, i) for i in range(16)] for epoch in (0, 1)]
    for epoch, (pixels, labels) in enumerate(DataLoader(whole, batch_sampler=keys, num_workers=workers)):
        for index in range(16):  # augmented as a function of seed, epoch and index, for any number of workers
            expected = images[epoch, {3: 5, 4: 5, 15: 0}.get(index, index)]
            assert torch.equal(pixels[index], expected[0]) and labels[index] == expected[1]
    reported = {line for line in capfd.readouterr().err.splitlines() if line.startswith("skipped: ")}
    assert sorted(re.search(r"\w+/\d\.png", line)[0] for line in reported) == ["cat/3.png", "cat/4.png", "dog/7.png"]
    for path in sorted((folder / "train").rglob("*.png"))[:15]:
        path.write_bytes(b"")
    assert "11 of 16 training images are broken, the last: " in refusal(lambda: data.SkipBroken(images)[0, 0])


class Deadly(data.Shapes):
    """Its loader process is killed at one scene, as by the kernel when memory runs out; another has a fault."""

    def __getitem__(self, key):
        if key[1] == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        if key[1] == 9:
            raise data.InputError("scene 9: too many are broken")
        return super().__getitem__(key)


@pytest.mark.parametrize("index, complaint", [(7, "a loader process was lost.*--ipc=host"), (9, "error: scene 9: ")])
def test_a_loader_ends_with_its_processes_although_they_ignore_signals(index, complaint):
    batches = data.batches_of(Deadly(20, 32, 0, "train"), 2, CPU, sampler=[(0, i) for i in (1, 2, index, 3, 4)])
    with pytest.raises(SystemExit, match=complaint):
        data.in_one_line(lambda: list(batches))
    assert not torch.multiprocessing.active_children()


# --------------------------------------------------------------------------------------------------
# Data of the dense tasks: COCO's layout, ADE20K's layout, files of other tools
# --------------------------------------------------------------------------------------------------
UNCHANGED = v2.RandomHorizontalFlip(p=0.0)
INSTANCES, MAPS, NAMES = "annotations/instances_train2017.json", "annotations/training", "objectInfo150.txt"


def runs(mask):
    """COCO's uncompressed run lengths of a mask: column by column, zeros first."""
    changes = np.flatnonzero(np.diff(mask.T.ravel(), prepend=False, append=~mask[-1, -1]))
    return dict(size=list(mask.shape), counts=np.diff(changes, prepend=0).tolist())


COCO_OBJECTS = [  # a polygon, run lengths, a crowd, a box across the border, an object without area
    dict(category_id=90, bbox=[10, 5, 20, 10], segmentation=[[10, 5, 30, 5, 30, 15, 10, 15]]),
    dict(category_id=7, bbox=[40, 20, 10, 15], segmentation=runs(rectangle(20, 40, 35, 50))),
    dict(category_id=7, bbox=[0, 0, 60, 40], segmentation=runs(rectangle(0, 0, 40, 60)), iscrowd=1),
    dict(category_id=7, bbox=[50, -5, 20, 15], segmentation=runs(rectangle(0, 50, 10, 60))),
    dict(category_id=7, bbox=[20, 20, 0, 5], segmentation=[[20, 20, 20, 25, 20, 22]]),
]
COCO_MASKS = {0: rectangle(5, 10, 15, 30), 1: rectangle(20, 40, 35, 50), 3: rectangle(0, 50, 10, 60)}


def write_coco(root):
    """Image 5 has all objects, and is bright where they are; image 3 has none."""
    bright = np.any(list(COCO_MASKS.values()), 0)[..., None] * np.full(3, 100, np.uint8)
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / f"{split}2017").mkdir()
        for name, pixels in (("a.png", bright), ("b.png", 0 * bright)):
            Image.fromarray(pixels).save(root / f"{split}2017" / name)
        content = dict(
            images=[dict(id=i, file_name=name, width=60, height=40) for i, name in ((5, "a.png"), (3, "b.png"))],
            annotations=[dict(id=i, image_id=5, area=1, iscrowd=0) | e for i, e in enumerate(COCO_OBJECTS)],
            categories=[dict(id=90, name="kite"), dict(id=7, name="boat")],
        )
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))


def write_scenes(root, task, sizes=((60, 90), (80, 64), (48, 70), (70, 71))):
    """Write scenes of shapes in the layout of the task, the same for both splits.  sizes: (height, width)."""
    scenes = data.Shapes(len(sizes), max(map(max, sizes)), 0, "val", task)
    table = [dict(id=i + 1, name=name, isthing=int(scenes.things[i])) for i, name in enumerate(scenes.classes)]
    for split, ade in (("train", "training"), ("val", "validation")):
        maps = root / "annotations" / (ade if task == "sem" else f"panoptic_{split}2017")
        content = dict(images=[], annotations=[], categories=table)
        for i, (height, width) in enumerate(sizes):
            pixels, shown, label = scenes.scene(0, i)
            numbers, found = np.zeros((height, width), int), []
            for category, mask in ((category, mask[:height, :width]) for category, mask in shown):
                rle = mask_utils.encode(np.asfortranarray(mask, np.uint8))
                row = dict(id=9000 * len(found) + 9000, image_id=i, category_id=category + 1, iscrowd=0)
                row |= dict(bbox=mask_utils.toBbox(rle).tolist(), area=int(mask.sum()))
                found += [row | dict(segmentation=rle | dict(counts=rle["counts"].decode()))] if mask.any() else []
                numbers[mask] = category + 1 if task == "sem" else row["id"]
            content["images"].append(dict(id=i, file_name=f"{i}.jpg", height=height, width=width))
            whole = dict(image_id=i, file_name=f"{i}.png", segments_info=found)
            content["annotations"] += [whole] if task == "pan" else found
            place = dict(cls=f"{split}/{scenes.classes[label or 0]}", sem=f"images/{ade}").get(task, f"{split}2017")
            coded = numbers if task == "sem" else numbers[..., None] >> np.array([0, 8, 16]) & 255
            for path, shades in ((root / place / f"{i}.jpg", pixels.transpose(1, 2, 0)), (maps / f"{i}.png", coded)):
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(shades[:height, :width].astype(np.uint8)).save(path)
        kind = "panoptic" if task == "pan" else "instances"
        (root / "annotations" / f"{kind}_{split}2017.json").write_text(json.dumps(content))


write = lambda root, task: write_scenes(root, task) if task in ("sem", "pan") else write_coco(root)


def read(root, task, split="train", transform=UNCHANGED, **options):
    return (data.Ade if task == "sem" else data.Coco)(root, split, task, transform, **options)


def read_both(root, task="inst"):
    """The data sets of training, but without augmentation, and of evaluation, as train.py creates them."""
    train_set = read(root, task)
    return train_set, read(root, task, "val", v2.Resize(20), classes=train_set.classes)


def read_all(dataset):
    """Read every image and its annotations."""
    return [dataset[0, i] for i in range(len(dataset))]


def edit(change, *splits):
    """A function of a folder that changes its annotation files."""

    def damage(root):
        for path in [p for split in splits or ("train", "val") for p in root.glob(f"annotations/*_{split}2017.json")]:
            content = json.loads(path.read_text())
            change(content)
            path.write_text(json.dumps(content))

    return damage


entry = lambda table, index, **change: edit(lambda c: c[table][index].update(change))
one_object = lambda **change: entry("annotations", 1, **change)
every_object = lambda **change: edit(lambda c: [e.update(change) for e in c["annotations"] if not e["iscrowd"]])
segments = lambda change: edit(lambda c: change(c["annotations"][0]["segments_info"]))
picture = lambda path, mode="L", value=1, size=(90, 60): lambda root: Image.new(mode, size, value).save(root / path)
cut_in_half = lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def stripes(*values, names=None):
    """All label maps get these values, in stripes of ten columns."""

    def change(root):
        for path in root.glob("annotations/*/*.png"):
            width, height = Image.open(path).size
            pixels = np.resize(np.repeat(values, 10), width)[None].repeat(height, 0)
            Image.fromarray(pixels.astype(np.uint8 if max(values) < 256 else np.uint16)).save(path)
        if names:
            (root / NAMES).write_text("Idx\tName\n" + "".join(f"{i + 1}\tc{i}, other\n" for i in range(names)))

    return change


def refusal(function):
    """The one-line message with which data are refused."""
    with pytest.raises(data.InputError) as error:
        function()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_coco_annotations_of_every_form_are_read_correctly(tmp_path):
    write_coco(tmp_path)
    coco = read(tmp_path, "inst")
    assert coco.classes == ["boat", "kite"] and coco.categories == [7, 90] and len(coco) == 2
    assert (coco.dropped, coco.crowds) == (1, 1)  # the one without area; the crowd is no training target, either
    image, target = coco[0, 1]  # images are sorted by id
    assert image.dtype == torch.uint8 and torch.equal(image == 100, target["masks"].any(0).expand(3, 40, 60))
    assert target["labels"].tolist() == [1, 0, 0] and np.array_equal(target["masks"].numpy(), list(COCO_MASKS.values()))
    boxes = torch.tensor([[20, 10, 20, 10], [45, 27.5, 10, 15], [55, 5, 10, 10]]) / torch.tensor([60, 40, 60, 40])
    for task in ("det", "inst"):
        torch.testing.assert_close(read(tmp_path, task)[0, 1][1]["boxes"], boxes)
    _, nothing = coco[0, 0]  # an image without objects is trained on, too
    assert nothing["boxes"].shape == (0, 4) and nothing["masks"].shape == (0, 40, 60)
    assert len(read(tmp_path, "inst", "val").coco().anns) == 4  # with the crowd, without the object without area


@pytest.mark.parametrize("task", ["sem", "pan"])
def test_label_maps_and_panoptic_maps_are_read_correctly(tmp_path, task):
    write_scenes(tmp_path, task)
    dataset, scenes = read(tmp_path, task), data.Shapes(4, 90, 0, "val", task)
    assert len(dataset) == 4 and (dataset.classes == scenes.classes if task == "pan" else dataset.classes[0] == "1")
    for index in range(4):
        image, target = dataset[0, index]
        height, width = image.shape[1:]
        shown = [(c, mask[:height, :width]) for c, mask in scenes.scene(0, index)[1] if mask[:height, :width].any()]
        if task == "sem":  # a label map has one mask per class
            shown = [(c, np.any([mask for other, mask in shown if other == c], 0)) for c in {c for c, _ in shown}]
        found = {(label, mask.tobytes()) for label, mask in zip(target["labels"].tolist(), target["masks"].numpy())}
        assert found == {(category, mask.copy().tobytes()) for category, mask in shown}
    image, target = read(tmp_path, task, "val", v2.Resize(90))[0, 0]
    assert image.shape == (3, 90, 135) and target == dict(index=0, size=(60, 90))


def test_augmentation_keeps_boxes_and_masks_on_their_objects(tmp_path):
    write_coco(tmp_path)
    of = lambda task, size: read(tmp_path, task, "train", data.dense_train_transform(task, size, 0.5, 0), seed=4)
    masks, boxes, gray = of("inst", 96), of("det", 96), torch.tensor(data.MEAN_COLOR).view(3, 1, 1)
    shares, counts, flipped, places = [], set(), 0, set()
    for epoch in range(80):
        (image, target), (same, det) = masks[epoch, 1], boxes[epoch, 1]
        assert image.shape == (3, 96, 96) and torch.equal(image, same)
        padding = (image == gray).all(0)
        shown = (image[0] > 50) & ~padding
        assert (shown != target["masks"].any(0)).float().mean() < 0.01 and not (target["masks"] & padding).any()
        shares.append(1 - padding.float().mean().item())
        counts.add(len(target["labels"]))
        places |= {padding[0].all().item(), padding[-1].all().item(), padding[:, 0].all().item()}
        if len(det["labels"]) == len(target["labels"]) and shares[-1] < 0.6:  # nothing is cut off
            torch.testing.assert_close(det["boxes"] * 96, target["boxes"] * 96, atol=1.6, rtol=0)
            flipped += (target["boxes"][0, 0] > target["boxes"][1, 0]).item()
    assert torch.equal(image, masks[79, 1][0]) and flipped and counts >= {2, 3} and places == {True, False}
    assert min(shares) < 0.3 and max(shares) == 1  # at 0.5, a quarter of what is two thirds of the square
    assert data.dense_eval_transform("inst", 96)(torch.zeros(3, 108, 192)).shape == (3, 89, 159)  # 1333 of 800


MASK = COCO_OBJECTS[1]["segmentation"]
TEXT = mask_utils.encode(np.asfortranarray(COCO_MASKS[1], np.uint8))["counts"].decode()  # the same, compressed
PAN_MAP = "annotations/panoptic_train2017/3.png"
WRONG = [  # task, damage, part of the message
    ("inst", lambda root: (root / INSTANCES).unlink(), "instances_train2017.json: "),
    ("inst", lambda root: (root / "train2017").rename(root / "train"), "train2017: "),
    ("inst", entry("images", 0, file_name="x.png"), "images[0]: x.png is not in"),
    ("inst", lambda root: cut_in_half(root / INSTANCES), "no COCO file"),
    ("inst", edit(lambda c: c.pop("categories")), "there is no 'categories'"),
    ("inst", edit(lambda c: c.update(annotations=c["annotations"][4:])), "no object with an area and a mask"),
    ("inst", edit(lambda c: [e.update(bbox=[0.1, 0.1, 0.5, 0.5]) for e in c["annotations"]]), "write them in pixels"),
    ("inst", edit(lambda c: c["annotations"].insert(1, None)), "annotations[1]: "),
    ("inst", edit(lambda c: c["annotations"][1].pop("bbox")), "annotations[1]: there is no 'bbox'"),
    ("inst", one_object(image_id=99), "annotations[1]: there is no 99"),
    ("inst", one_object(category_id="7"), "annotations[1]: there is no category 7"),
    *(("inst", one_object(iscrowd=flag), "annotations[1]: iscrowd must be 0 or 1") for flag in ("0", 2, "maybe")),
    *(("inst", one_object(bbox=box), "annotations[1]: ") for box in (
        [1, 2, 3], ["1", "2", "3", "4"], [1, 2, math.nan, 4], 7, None)),
    *(("inst", one_object(area=area), "annotations[1]: ") for area in ("large", -1, math.nan)),
    *(("inst", one_object(segmentation=mask), "annotations[1]: ") for mask in (
        MASK | dict(size=[60, 40]), MASK | dict(counts=[7, 9]), MASK | dict(counts=TEXT + TEXT), dict(counts=TEXT),
        [["x"] * 6], [[0, 0, 9, 0, 9, 1e9]], [[1, 1, 9, 1, 9, 9, 4]], [[math.nan] * 6])),
    ("inst", entry("images", 1, width="60"), "images[1]: "),
    ("inst", entry("images", 1, id="5"), "images[1]: ids must be different whole numbers"),
    ("inst", entry("categories", 1, id="7"), "categories: ids must be different whole numbers"),
    ("inst", entry("images", 1, id=5), "images[1]: ids must be different whole numbers"),
    ("inst", entry("categories", 1, name="kite"), "two categories have the same name"),
    ("inst", picture("train2017/a.png", "RGB"), "a.png: 90 x 60 pixels"),
    ("inst", lambda root: Image.new("I;16", (60, 40)).save(root / "train2017" / "a.png"), "its mode is I;16, not"),
    ("pan", lambda root: (root / PAN_MAP).parent.rename(root / "x"), "panoptic_train2017"),
    ("pan", picture(PAN_MAP, "RGB", 0, (61, 40)), "3.png: 61 x 40 pixels"),
    ("pan", lambda root: cut_in_half(root / PAN_MAP), "3.png: cannot be read"),
    ("pan", segments(lambda found: found.pop(2)), "segments [27000] have no entries in"),
    ("pan", segments(lambda found: found[0].update(category_id=99)), "there is no category 99"),
    ("pan", segments(lambda found: found[1].update(id=9000)), "two segments have the same id"),
    ("pan", edit(lambda c: c["annotations"].append(c["annotations"][0])), "has 2 annotations, and must have one"),
    ("pan", lambda root: (root / PAN_MAP).unlink(), "annotations[3]: 3.png is not in"),
    ("sem", lambda root: (root / MAPS / "1.png").unlink(), "no ['1.png']; every image"),
    ("sem", lambda root: (root / "images/training").rename(root / "images/train"), "training: no such"),
    ("sem", picture(MAPS + "/0.png", "L", 1, (50, 40)), "50 x 40"),
    ("sem", picture(MAPS + "/0.png", "RGB", "red"), "its mode is RGB, not L or P"),
    ("sem", stripes(0, 85, 170, 255), "labels [85, 170]; 0 and 255 are void"),
    ("sem", stripes(0, 1), "labels [1]; 0 and 255 are void; number two or more"),  # a lesion, and void
    ("sem", stripes(0, 1, 9, 255, names=3), "0.png: label 9 in it"),
    ("sem", stripes(0, 40, 300, names=300), "its mode is I;16"),
    ("sem", lambda root: (root / NAMES).write_text("2\twall\n1\tsky\n"), "its rows are not 1, a tab"),
    ("sem", lambda root: [x.unlink() for x in root.glob("images/training/*")], "there is no image in it"),
]


@pytest.mark.parametrize("task, damage, complaint", WRONG)
def test_one_line_says_what_is_wrong_with_files(tmp_path, task, damage, complaint):
    write(tmp_path, task)
    damage(tmp_path)
    message = refusal(lambda: read_all(read(tmp_path, task)))
    assert complaint in message and len(message) < 300 + 2 * len(str(tmp_path))


LEFT, EVERY = [[40, 20, 50, 20, 50, 35, 40, 35]], [0, 1, 3]  # polygon of object 1; objects with area
USUAL = [  # change, which objects are left
    (every_object(iscrowd=None), EVERY), (edit(lambda c: [e.pop("area") for e in c["annotations"]]), EVERY),
    (one_object(area=None, segmentation=LEFT), EVERY), (one_object(segmentation=MASK | dict(counts=TEXT)), EVERY),
    (one_object(segmentation=[[40, 20, 50, 35], *LEFT]), EVERY),  # two points have no area
    (one_object(segmentation=None), [0, 3]), (one_object(segmentation=MASK | dict(counts=[2400])), [0, 3]),
    (one_object(bbox=[60, 0, 5, 5]), [0, 3]),
]


@pytest.mark.parametrize("change, objects", USUAL)
def test_annotations_mean_the_same_in_training_and_evaluation(tmp_path, change, objects):
    write_coco(tmp_path)
    change(tmp_path)
    train_set, val_set = read_both(tmp_path)
    target = next(target for image, target in read_all(train_set) if image.any())  # of a.png
    assert target["labels"].tolist() == [int(i == 0) for i in objects] and train_set.classes == ["boat", "kite"]
    assert np.array_equal(target["masks"].numpy(), [COCO_MASKS[i] for i in objects])
    assert train_set.dropped == val_set.dropped == 4 - len(objects)
    coco = val_set.coco()
    truth = [e for e in coco.dataset["annotations"] if not e["iscrowd"]]
    assert [e["bbox"] for e in truth] == [COCO_OBJECTS[i]["bbox"] for i in objects]
    assert len(coco.anns) == len(objects) + 1 and {e["area"] for e in truth} <= {1, 100, 150, 200}
    assert all(np.array_equal(coco.annToMask(e), COCO_MASKS[i]) for e, i in zip(truth, objects))
    metrics, _ = evaluation.evaluate(Oracle(val_set, "inst"), val_set, CPU)
    assert metrics["mask_AP"] == pytest.approx(1) and metrics["box_AP50"] == pytest.approx(1)


def write_export(root, for_all):
    """write_coco() as labeling tools export it: with an unused category 0, and other ids in validation."""
    write_coco(root)
    for split, place in (("train", "train"), ("val", "valid")):
        path = (root / f"{split}2017").rename(root / place) / "_annotations.coco.json"
        (root / "annotations" / f"instances_{split}2017.json").rename(path)
        content = json.loads(path.read_text())
        if split == "val":  # kite comes first
            content["categories"] = [dict(id=1, name="kite"), dict(id=2, name="boat")]
            for e in content["annotations"]:
                e["category_id"] = {90: 1, 7: 2}[e["category_id"]]
        content["categories"].insert(0, dict(id=0, name=for_all, supercategory="none"))
        path.write_text(json.dumps(content))


@pytest.mark.parametrize("task, for_all", [("det", "things"), ("inst", "boat")])
def test_the_common_coco_export_is_read_and_its_classes_are_matched_by_name(tmp_path, task, for_all):
    write_export(tmp_path, for_all)
    train_set, val_set = read_both(tmp_path, task)
    assert train_set.classes == val_set.classes == ["boat", "kite"]
    assert train_set.categories == [7, 90] and val_set.categories == [2, 1]

    def kites(*arguments):
        found = truth_as_prediction(*arguments)
        return {name: value[found["labels"] == 1] for name, value in found.items()}

    _, rows = evaluation.evaluate(Oracle(val_set, task, kites), val_set, CPU)
    assert [row["AP" if task == "det" else "mask_AP"] for row in rows] == [0, pytest.approx(1)]
    for classes in (["kite", "dog"], ["kite"], ["boat", "kite", "dog"]):
        assert "is only in the file, or only in the model" in refusal(lambda: read(tmp_path, task, "val", classes=classes))


@pytest.mark.parametrize("values, names, classes, void", [
    ((1, 2, 255), None, 2, (255,)),
    ((0, 1, 2, 255), None, 2, (0, 255)),
    ((0, 1, 255), 150, 150, (0, 255)),
    ((0, 1, 255), 255, 255, (0,)),  # a class that has a name
])
def test_255_is_void_if_there_are_fewer_classes(tmp_path, values, names, classes, void):
    write_scenes(tmp_path, "sem", [(40, 60), (40, 60)])
    stripes(*values, names=names)(tmp_path)
    path = tmp_path / "annotations/validation/1.png"
    (palette := Image.open(path)).putpalette([7 * i % 256 for i in range(768)])  # for display
    palette.save(path)
    train_set, val_set = read_both(tmp_path, "sem")
    pixels, seen = np.asarray(Image.open(tmp_path / MAPS / "0.png")).astype(int), sorted(set(values) - {0, *void})
    assert len(train_set.classes) == classes and train_set.classes[1] == ("c1" if names else "2")
    assert train_set[0, 0][1]["labels"].tolist() == [value - 1 for value in seen]
    if names:
        assert "not the model's classes" in refusal(lambda: read(tmp_path, "sem", classes=["c1", "c0"]))
    for dataset in (train_set, val_set):
        for i in range(2):
            assert np.array_equal(dataset.label_map(i), np.where(np.isin(pixels, seen), pixels - 1, -1))


def test_hidden_files_are_never_taken_for_images(tmp_path, folder):
    """Files that macOS and Jupyter leave behind."""
    write_scenes(tmp_path, "sem")
    for place in ("train", "valid", "train/cat", "valid/cat", "images/training", "images/validation"):
        (folder / place / ".ipynb_checkpoints").mkdir(parents=True)
        Image.new("RGB", (60, 40)).save(folder / place / ".ipynb_checkpoints" / "copy.png")
        for name in ("._photo.jpg", ".DS_Store", "Thumbs.db"):
            (folder / place / name).write_bytes(b"no image")
    shutil.copytree(folder / "val", folder / "valid", dirs_exist_ok=True)
    shutil.rmtree(folder / "val")
    plain = data.train_transform(32, 0.08, 0, 0)
    for split, count, transform in (("train", 16, plain), ("val", 6, data.eval_transform(32))):
        assert len(found := data.Folder(folder, split, transform)) == count and found.classes == ["cat", "dog"]
    assert list(map(len, read_both(tmp_path, "sem"))) == [4, 4]


def many_times(content):
    """List the images of a COCO file, and their annotations, nine times."""
    for table, keys in (("images", ["id"]), ("annotations", ["id", "image_id"])):
        content[table] = [e | {key: e[key] + 1000 * i for key in keys} for i in range(9) for e in content[table]]


# --------------------------------------------------------------------------------------------------
# Evaluation and pictures, with models that return the ground truth, or a degraded copy of it
# --------------------------------------------------------------------------------------------------
def truth_as_prediction(dataset, task, index, score=1.0):
    """The ground truth of an image in the form of a prediction; unlabeled pixels get class 0."""
    if task == "sem":
        return dict(semantic=dataset.label_map(index).clamp(min=0))
    if task == "pan":
        ids, entries = dataset.segments(index)
        rows = [(e["id"], dataset.categories.index(e["category_id"])) for e in entries]
        found = [dict(id=i, label=label, isthing=dataset.things[label], score=score) for i, label in rows]
        return dict(panoptic=ids, segments=found)
    coco = dataset.coco()
    entries = [e for e in coco.imgToAnns[sorted(coco.imgs)[index]] if not e.get("iscrowd")]
    labels = [dataset.categories.index(e["category_id"]) for e in entries]
    boxes = box_convert(torch.tensor([e["bbox"] for e in entries]).float().view(-1, 4), "xywh", "xyxy")
    prediction = dict(labels=torch.tensor(labels, dtype=torch.int64), boxes=boxes)
    prediction["scores"] = torch.full((len(labels),), score)
    if task == "inst":
        masks = np.array([coco.annToMask(e) for e in entries], bool)
        prediction["masks"] = torch.from_numpy(masks.reshape(-1, *dataset[0, index][1]["size"]))
    return prediction


def half_right(dataset, task, index):
    """The ground truth with errors that depend on the index: wrong classes, shifted boxes and masks, tied scores."""
    prediction, rng = truth_as_prediction(dataset, task, index), np.random.default_rng(index)
    if task in ("sem", "pan"):
        return {name: x.roll(index % 7, 1) if torch.is_tensor(x) else x for name, x in prediction.items()}
    n = len(prediction["labels"])
    prediction["boxes"] += torch.from_numpy(rng.integers(-3, 4, (n, 4))).float()
    prediction["labels"][rng.random(n) < 0.2] = 0
    prediction["scores"] = torch.from_numpy(rng.choice([0.9, 0.6, 0.3], n)).float().sort(descending=True).values
    if task == "inst":
        prediction["masks"] = prediction["masks"].roll(int(rng.integers(-3, 4)), 1)
    return prediction


class Oracle(torch.nn.Module):
    """A model that recognizes an image by its pixels, and returns predict(dataset, task, index) for it."""

    def __init__(self, dataset, task, predict=truth_as_prediction):
        super().__init__()
        self.task = task
        known = [data.as_float(dataset[0, i][0]).numpy().tobytes() for i in range(len(dataset))]
        self.known = {pixels: predict(dataset, task, i) for i, pixels in enumerate(known)}

    def predict(self, images, sizes=None):
        predictions = [self.known[image.numpy().tobytes()] for image in images]
        for prediction, size in zip(predictions, sizes):
            maps = prediction.keys() & {"semantic", "panoptic", "masks"}
            assert all(prediction[name].shape[-2:] == size for name in maps)
        return predictions


class Pixels(torch.nn.Module):
    """A classifier whose logits are pixels: they are the same to the last bit in any batch size."""

    task = "cls"

    def forward(self, images):
        return {"logits": torch.stack([image.flatten()[::400] for image in images])}

    def predict(self, images, sizes=None):
        return [dict(labels=row.topk(5).indices) for row in self(images)["logits"]]


def metrics_of_shapes(task, predict=truth_as_prediction, length=6, **arguments):
    dataset = data.Shapes(length, 96, 0, "val", task)
    return evaluation.evaluate(Oracle(dataset, task, predict), dataset, CPU, **{"batch_size": 4} | arguments)


def metrics_of_all_tasks(batch_size, **arguments):
    cls = evaluation.evaluate(Pixels(), data.Shapes(101, 32, 0, "val"), CPU, batch_size)
    arguments |= dict(length=11, batch_size=batch_size)
    return {task: metrics_of_shapes(task, half_right, **arguments) for task in DENSE} | dict(cls=cls)


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=slow)])
def test_evaluation_on_several_processes_is_exact(tmp_path, request, count):
    if count == 2:
        parts = [parts["metrics"] for parts in request.getfixturevalue("pair")]
    else:
        parts = on_processes(evaluate_a_part, tmp_path, 3)
    expected = metrics_of_all_tasks(7)
    assert all(0.1 < expected[task][0][METRIC[task]] < 0.9 for task in DENSE)
    assert repr(metrics_of_all_tasks(11, workers=2)) == repr(expected)  # to the last bit; and nan is nan
    assert [repr(part) for part in parts] == [repr(expected)] * count


def test_top1_and_top5_count_the_rank_of_the_label():
    dataset = data.Shapes(50, 32, 0, "val")
    rows = [(Pixels()([image])["logits"][0], label) for image, label in (dataset[0, i] for i in range(50))]
    ranks = np.array([(row > row[label]).sum().item() for row, label in rows])
    metrics, _ = evaluation.evaluate(Pixels(), dataset, CPU, batch_size=8)
    assert metrics == dict(top1=(ranks < 1).mean(), top5=(ranks < 5).mean())


@pytest.mark.parametrize("task", DENSE)
def test_the_ground_truth_scores_1_and_no_predictions_score_0(tmp_path, task):
    def nothing(dataset, task, index):
        prediction = truth_as_prediction(dataset, task, index)
        if task == "sem":
            return dict(semantic=(prediction["semantic"] + 1) % len(dataset.classes))  # all are wrong
        if task == "pan":
            return dict(panoptic=torch.zeros_like(prediction["panoptic"]), segments=[])
        return {name: value[:0] for name, value in prediction.items()}

    write(tmp_path, task)
    dataset = read(tmp_path, task, "val", v2.Resize(20))  # unlabeled: void, crowds, what has no area
    for predict, expected in ((truth_as_prediction, 1), (nothing, 0)):
        metrics, _ = evaluation.evaluate(Oracle(dataset, task, predict), dataset, CPU)
        assert metrics[METRIC[task]] == pytest.approx(expected)
        for name, value in metrics.items():  # AR1 allows one detection per image
            assert value == pytest.approx(expected) or math.isnan(value) or name.endswith("AR1"), name


@pytest.mark.parametrize("task", ["det", "inst"])
def test_saved_predictions_have_the_same_metrics_in_coco_s_own_evaluation(tmp_path, task):
    metrics, _ = metrics_of_shapes(task, half_right, save=str(tmp_path / "found.json"))
    truth = data.Shapes(6, 96, 0, "val", task).coco()
    assert 0.2 < metrics[METRIC[task]] < 0.9
    for kind, prefix in ({"bbox": ""} if task == "det" else {"bbox": "box_", "segm": "mask_"}).items():
        results = json.loads((tmp_path / "found.json").read_text())
        for result in results if kind == "segm" else []:
            del result["bbox"]  # or pycocotools would take its area for that of the mask
        coco_eval = COCOeval(truth, truth.loadRes(results), kind)
        coco_eval.evaluate(), coco_eval.accumulate(), coco_eval.summarize()
        expected = [value if value >= 0 else math.nan for value in coco_eval.stats.tolist()]
        np.testing.assert_array_equal([metrics[prefix + name] for name in evaluation.COCO_METRICS], expected)


@pytest.mark.parametrize("task", ["sem", "pan"])
def test_saved_predictions_have_the_names_and_numbers_of_the_files(tmp_path, task):
    write(tmp_path, task)
    found = tmp_path / ("found" if task == "sem" else "found.json")
    dataset = read(tmp_path, task, "val", v2.Resize(20))
    evaluation.evaluate(Oracle(dataset, task), dataset, CPU, save=str(found))
    saved = np.asarray(Image.open(tmp_path / "found" / "0.png")).astype(int)
    if task == "sem":
        assert np.array_equal(saved, dataset.label_map(0).clamp(min=0) + 1)
    else:
        row, (ids, table) = json.loads(found.read_text())["annotations"][0], dataset.segments(0)
        assert np.array_equal(saved @ [1, 256, 65536], ids) and row["image_id"] == 0
        assert {s["id"]: s["category_id"] for s in row["segments_info"]} == {s["id"]: s["category_id"] for s in table}


def panoptic_metrics(predicted, labels, truth, entries, classes=3):
    """Counts, and [PQ, SQ, RQ], of small maps given as rows of digits; class c has category_id 10 + c."""
    rows = lambda text: torch.tensor([[int(digit) for digit in row] for row in text.split()])
    labels = [dict(id=i, label=label) for i, label in labels.items()]
    entries = [dict(id=i, category_id=10 + label, iscrowd=crowd) for i, (label, crowd) in entries.items()]
    categories = {10 + c: c for c in range(classes)}
    counts = evaluation.panoptic_counts(rows(predicted), labels, rows(truth), entries, categories, classes)
    return counts, [*evaluation.panoptic_quality(counts, torch.ones(classes, dtype=torch.bool)).values()]


def test_panoptic_quality_of_cases_worked_out_by_hand():
    truth, entries = "1112 1112 3333", {1: (0, 0), 2: (0, 0), 3: (1, 0)}
    counts, metrics = panoptic_metrics(truth, {1: 0, 2: 0, 3: 1}, truth, entries)
    assert metrics == [1, 1, 1] and counts[2].sum() == 0  # a class that does not occur does not count
    # Segment 1 loses a third of its pixels to 2: IoUs of 4/6 and 2/4, of which the second is no match.  3 has the
    # wrong class.
    counts, (pq, sq, rq) = panoptic_metrics("1122 1122 3333", {1: 0, 2: 0, 3: 2}, truth, entries)
    assert counts.tolist() == [[pytest.approx(4 / 6), 1, 1, 1], [0, 0, 0, 1], [0, 0, 1, 0]]
    assert (pq, sq, rq) == (pytest.approx(4 / 6 / 2 / 3), pytest.approx(4 / 6 / 3), pytest.approx(1 / 2 / 3))
    # Half of the match is on void, which counts neither in the intersection nor in the union.
    assert panoptic_metrics("1111 0000", {1: 0}, "1100 0000", {1: (0, 0)})[1] == [1, 1, 1]
    # A prediction that is mostly void, or mostly a crowd of its class, is no false positive; a crowd is never missed.
    counts, _ = panoptic_metrics("1111 2222", {1: 0, 2: 1}, "0003 4444", {3: (2, 0), 4: (1, 1)})
    assert counts.tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    # On a crowd of another class, it is a false positive.
    counts, _ = panoptic_metrics("2222", {2: 0}, "4444", {4: (1, 1)})
    assert counts.tolist() == [[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_semantic_metrics_match_a_count_pixel_by_pixel():
    dataset = data.Shapes(6, 96, 0, "val", "sem")
    metrics, rows = metrics_of_shapes("sem", half_right)
    truth = np.stack([dataset.label_map(i) for i in range(6)])
    found, real = np.stack([half_right(dataset, "sem", i)["semantic"] for i in range(6)]), truth >= 0
    pairs = [(real & (truth == c), real & (found == c)) for c in range(len(dataset.classes))]
    iou = [(a & b).sum() / (a | b).sum() for a, b in pairs]  # all classes occur
    np.testing.assert_allclose([row["IoU"] for row in rows], iou)
    assert metrics["miou"] == pytest.approx(np.mean(iou))
    assert metrics["pixel_accuracy"] == pytest.approx((truth == found)[real].mean())


def test_an_explanation_adds_up_to_the_logit_and_is_what_each_token_added_to_each_center():
    """The head in NumPy, token by token."""
    model, image, weights = random_model(), torch.rand(3, 96, 96), torch.eye(10)[3] - torch.eye(10)[5]
    with torch.no_grad():
        entry, head, logits = cf.trace(model, image[None])[-1], model.head, model(image[None])["logits"][0]
    value, bias, contributions = evaluation.explain(model, image, weights)
    assert value == pytest.approx((logits @ weights).item(), abs=1e-5)
    assert bias + contributions.sum().item() == pytest.approx(value, abs=1e-4)
    x, V = numbers(entry["tokens"][0], head.cluster.v)  # (N, D), (h, d, d)
    (N, D), h = x.shape, len(V)
    assert contributions.shape == (4, 3, 3)  # 2 x 2 cells of 2 x 2 tokens, overlapping in the middle
    gamma, w = numbers(head.center_norm.weight, weights @ head.classifier.weight)
    for k, cell in enumerate([[0, 1, 3, 4], [1, 2, 4, 5], [3, 4, 6, 7], [4, 5, 7, 8]]):
        parts = np.stack([x[i] / 4 if i in cell else np.zeros(D) for i in range(N)])
        for i, j, W in itertools.product(range(N), range(h), entry["weights"]):
            part = slice(j * D // h, (j + 1) * D // h)  # the channels of head j
            parts[i, part] += W[0, j, k, i].item() * (x[i, part] @ V[j])
        C = parts.sum(0)
        np.testing.assert_allclose(C, entry["centers"][-1][0, k].numpy(), rtol=1e-4, atol=1e-5)
        for i in range(N):
            part = (parts[i] - parts[i].mean()) / np.sqrt(C.var() + head.center_norm.eps)
            np.testing.assert_allclose(contributions[k].flatten()[i], w @ (gamma * part) / 4, rtol=1e-3, atol=1e-5)


def state_of(model, classes, **settings):
    """The part of a checkpoint from which a model is rebuilt."""
    weights = model.state_dict()
    state = dict(version=cf.VERSION, arguments=model.arguments, model=weights, ema=weights)
    return state | dict(settings=settings, classes=classes)


def saved_checkpoint(path, task="cls"):
    torch.manual_seed(0)
    model = cf.ClusterFormer("cls", "nano", num_classes=8) if task == "cls" else random_model(task)
    classes = list(data.THINGS)[: model.num_classes]
    torch.save(state_of(randomized(model, 0.03), classes, task=task, test_size=64, data=None), path)
    return model.eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "last.pt"
    saved_checkpoint(path)
    return path


@pytest.mark.parametrize("task", cf.TASKS)
def test_predictions_are_drawn_and_replace_nothing(tmp_path, monkeypatch, capfd, task):
    monkeypatch.chdir(tmp_path)
    saved_checkpoint("last.pt", task)
    os.mkdir("photos")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8)).save("photos/a.png")
    Image.new("L", (300, 100), 80).save("photos/b c.jpg")
    shutil.copy("last.pt", "photos/c.png")  # no image
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    arguments = ["--images", "photos", "photos/a.png", "--clusters", "--out", "photos"]
    arguments += ["--explain", "star", "disc"] * (task == "cls")
    call(evaluation, capfd, "--checkpoint", "last.pt", *arguments)
    names = ["a-2", "a-3", "a-clusters", "a-clusters-2", "b c", "b c-clusters"]
    names += ["a-explained", "a-explained-2", "b c-explained"] * (task == "cls")
    drawn = {path for path in tmp_path.rglob("*.*") if path not in before}
    assert {path.name for path in drawn} == {f"{name}.png" for name in names}
    assert before == {path: path.read_bytes() for path in before}
    for path in drawn:
        picture = Image.open(path)
        assert min(picture.size) > 100 and picture.convert("L").getextrema()[0] < 100


@pytest.mark.parametrize("task", DENSE)
def test_regions_are_drawn_where_they_are_predicted(task):
    scenes = data.Shapes(3, 96, 0, "val", task)
    for i in range(3):
        panel, prediction = scenes[0, i][0], truth_as_prediction(scenes, task, i)
        texts, masks, boxes = evaluation.regions_of(prediction, scenes.classes)
        (_, same), (_, picture) = evaluation.prediction_panels(prediction, scenes.classes, panel)
        changed = (panel != picture).any(0)
        assert torch.equal(panel, same) and len(texts) > 1 and changed.any()
        assert masks is None or (changed & masks.any(0)).sum() > 0.9 * masks.any(0).sum()


def test_without_paths_held_out_images_are_drawn(tmp_path, capsys, checkpoint):
    call(evaluation, capsys, "--checkpoint", checkpoint, "--explain", "--out", tmp_path)
    names = sorted(os.listdir(tmp_path))
    assert names[:2] == ["scene 0-explained.png", "scene 0.png"] and len(names) == 16


# --------------------------------------------------------------------------------------------------
# Several processes
# --------------------------------------------------------------------------------------------------
def one_process(rank, function, path, count):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/meet", rank=rank, world_size=count)
    torch.save(function(rank, path), f"{path}/{rank}.pt")
    dist.barrier()  # torch 2.6 hangs if a group is destroyed while its threads still release a tensor
    dist.destroy_process_group()


def on_processes(function, path, count=2):
    torch.multiprocessing.spawn(one_process, (function, str(path), count), nprocs=count)
    return [torch.load(path / f"{rank}.pt") for rank in range(count)]


def evaluate_a_part(rank, path):
    return metrics_of_all_tasks(3)


def gradients(indices, world_size=1):
    """Of a model for these scenes, from losses that are divided by the targets of all processes, as in train.py."""
    model, shapes = random_model("det").train(), data.Shapes(100, 64, 0, "train", "det")
    wrapped = DistributedDataParallel(model) if world_size > 1 else model
    images, targets = data.stacked([shapes[0, i] for i in indices])
    for target in targets:
        target["labels"] %= 5
    total = torch.tensor(float(model.count(targets)))
    if world_size > 1:
        dist.all_reduce(total)
    (sum(model.loss(wrapped(data.as_float(images)), targets).values()) * world_size / total).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def spoil(monkeypatch, steps):
    """Make the losses of these steps NaN."""
    calls, right = itertools.count(), cf.ClusterFormer.loss

    def wrong(*arguments):
        factor = math.nan if next(calls) in steps else 1.0
        return {name: factor * loss for name, loss in right(*arguments).items()}

    monkeypatch.setattr(cf.ClusterFormer, "loss", wrong)


def spoiled_on_one(rank, path):
    """Optimizer steps and weights after four steps; in the second, one of two processes has no finite loss."""
    right, made = torch.optim.AdamW, []
    arguments = [*QUICK, "--batch-size", 10, "--epochs", 1, "--out", os.path.join(path, "run")]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(torch.optim, "AdamW", lambda *args, **more: made.append(right(*args, **more)) or made[-1])
        monkeypatch.setattr(train, "start_processes", lambda: (rank, 2, CPU))
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        few_scenes(monkeypatch, 40, 4)
        if rank == 1:
            spoil(monkeypatch, {1})
        train.main()
    steps = {state["step"].item() for state in made[0].state.values()}
    return steps, [p.detach() for group in made[0].param_groups for p in group["params"]]


def all_parts(rank, path):
    spoiled, own = spoiled_on_one(rank, path), gradients(range(3 * rank, 3 * rank + 3), 2)
    return dict(spoiled=spoiled, gradients=own, metrics=evaluate_a_part(rank, path))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What all_parts returns on two processes.  Starting them takes seconds, so several tests share them."""
    return on_processes(all_parts, tmp_path_factory.mktemp("pair"))


def test_two_processes_give_the_gradients_of_one_with_the_whole_batch(pair):
    first, second = (parts["gradients"] for parts in pair)
    for name, expected in gradients(range(6)).items():
        torch.testing.assert_close(first[name], expected, atol=1e-4, rtol=1e-3)
        assert torch.equal(first[name], second[name])


def test_all_processes_skip_the_step_in_which_one_has_no_finite_loss(pair):
    (steps, weights), (same, others) = (parts["spoiled"] for parts in pair)
    assert steps == same == {3} and all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(weights, others))


# --------------------------------------------------------------------------------------------------
# Training and evaluating from the command line, and runs that are stopped
# --------------------------------------------------------------------------------------------------
QUICK = ["--image-size", 32, "--patch-size", 2, "--workers", 0]


def call(module, capsys, *arguments):
    """Run a script's main in this process.  Returns what it printed; raises SystemExit as the script would."""
    argv, sys.argv = sys.argv, [module.__name__ + ".py", *map(str, arguments)]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        data.in_one_line(module.main)
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return capsys.readouterr().out


def failure(module, capsys, *arguments):
    """The one line with which a script ends."""
    with pytest.raises(SystemExit) as stop:
        call(module, capsys, *arguments)
    message = str(stop.value)
    assert "\n" not in message and message.startswith(f"{module.__name__}.py: error: ")
    return message


def few_scenes(monkeypatch, training, validation):
    """Shapes have so many scenes."""
    start = data.Shapes.__init__
    short = lambda self, count, size, seed, split, task: start(
        self, training if split == "train" else validation, size, seed, split, task
    )
    monkeypatch.setattr(data.Shapes, "__init__", short)


def log_of(out):
    """A dictionary for each epoch; losses and metrics must be finite."""
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    finite = "loss", *METRIC.values()
    assert all(math.isfinite(line[key]) for line in log for key in line.keys() & {*finite}), log
    return log


def test_a_short_run_beats_chance_by_a_wide_margin(tmp_path, capsys, monkeypatch):
    few_scenes(monkeypatch, 1000, 400)
    out, found = tmp_path / "run", tmp_path / "found.json"
    arguments = [*QUICK, "--batch-size", 25, "--workers", 1, "--epochs", 2, "--evaluate-every", 2]
    call(train, capsys, *arguments, "--out", out)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["top1"] >= 0.25  # chance: 0.125 +- 0.017
    first, last = log_of(out)
    assert "top1" not in first and last["top1"] == metrics["top1"] and (last["epoch"], last["step"]) == (2, 80)
    assert last["loss"] < first["loss"]
    again = ["--checkpoint", out / "last.pt", "--batch-size", 25, "--json", found]  # the same batches and rounding
    printed = call(evaluation, capsys, *again)
    assert json.loads(found.read_text()) == metrics | dict(per_class={})
    assert f"{metrics['top1']:.2%}" in printed and "400 images, 8 classes" in printed


def test_accumulated_and_compiled_steps_are_those_of_the_whole_batch(tmp_path, capsys, monkeypatch, shallow):
    few_scenes(monkeypatch, 24, 4)
    # Adam would magnify rounding in its first steps.  Adam and clipping would hide a gradient of the wrong norm.
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, **_: torch.optim.SGD(groups, 0.0))
    monkeypatch.setattr(torch, "compile", lambda model, right=torch.compile: right(model, backend="aot_eager"))
    arguments, found = [*QUICK, "--epochs", 1, "--batch-size", 12, "--lr", 0.1, "--clip", 0], []
    for i, option in enumerate(([], ["--accumulate", 3], ["--compile"] if os.environ.get("SLOW") else [])):
        call(train, capsys, *arguments, *option, "--out", tmp_path / str(i))
        found.append(torch.load(tmp_path / str(i) / "last.pt")["model"])
        torch.testing.assert_close(found[-1], found[0], atol=1e-5, rtol=1e-4)


def test_recipes_depend_on_task_and_data_and_flags_come_before_them(tmp_path, monkeypatch):
    def parse(arguments, count=10_000):
        monkeypatch.setattr(sys, "argv", ["train.py", "--out", "/nowhere", *arguments.split()])
        monkeypatch.setattr(train, "count_images", lambda *_: count)
        return train.parse_settings()

    for arguments, epochs in {"": 5, "--data D": 1, "--task sem": 1, "--task sem --data D": 5}.items():
        assert parse(arguments).evaluate_every == epochs
    imagenet, half = parse("--data D"), parse("--data D --batch-size 512 --clip 0")
    assert (imagenet.batch_size, imagenet.epochs, imagenet.schedule) == (1024, 300, "cosine")
    assert half.lr == imagenet.lr / 2 and half.clip == 0 < imagenet.clip and imagenet.mixup == 0.8
    assert parse("--task inst --data D").schedule == "step" and parse("--lr 1 --batch-size 1").lr == 1
    few = {count: parse("--task inst --data D", count) for count in (5, 136, 9_999)}
    assert [(x.batch_size, x.epochs) for x in few.values()] == [(4, 1800), (8, 67), (8, 12)]
    assert {(x.variant, x.backbone_rate) for x in few.values()} == {("nano", 1.0)}
    assert {parse(f"--task {task} --data D").backbone_rate for task in DENSE} == {0.1}
    model = cf.ClusterFormer("cls", "nano", 8, patch_size=2, iterations=1)
    torch.save(state_of(model, list(data.THINGS)), tmp_path / "a.pt")
    for flags, expected in {"": ("nano", 2, 1, 128), "--patch-size 4 --iterations 2": ("nano", 4, 2, 256)}.items():
        found = parse(f"--task det --data D --init {tmp_path / 'a.pt'} {flags}", 136)
        assert (found.variant, found.patch_size, found.iterations, found.image_size) == expected
    assert parse("--task inst --data D --lr 1", 136).lr == 1 and parse("--task inst", 136).image_size == 96


def test_learning_rates_warm_up_and_follow_their_schedules():
    rates = {}
    for name in train.SCHEDULES:
        settings = types.SimpleNamespace(warmup=1 / 11, lr=1.0, schedule=name)
        rates[name] = [train.learning_rate(settings, step, 110) for step in range(110)]
    for rate in rates.values():
        np.testing.assert_allclose(rate[:10], np.arange(1, 11) / 10)
        assert (np.diff(rate[10:]) <= 0).all()
    assert rates["cosine"][60] == pytest.approx(0.5) and rates["poly"][60] == pytest.approx(0.5**0.9)
    assert [rates["step"][step] for step in (99, 100, 104, 105)] == [1, 0.1, 0.1, 0.01]


def train_and_evaluate(tmp_path, capsys, task, processes, *options):
    """Two steps and an evaluation, the same after a resume on one process, and eval.py, on images of unequal sizes."""
    out, found, dense = tmp_path / "run", tmp_path / "found.json", task != "cls"
    write_scenes(tmp_path / "files", task)
    arguments = ["--task", task, "--data", tmp_path / "files", "--variant", "nano", "--image-size", 64, *options]
    arguments += ["--test-size", 48] * dense + ["--batch-size", 2, "--epochs", 1, "--evaluate-every", 1, "--workers", 1]
    if processes == 1:
        call(train, capsys, *arguments, "--out", out)
    else:
        _, errors = (run := start(processes, *arguments, "--out", out)).communicate()
        assert run.returncode == 0, errors
    resume = "--task", task, "--resume", "--epochs", 2, "--out", out
    assert "resumed after step 2\n" in call(train, capsys, *resume)
    assert [line["step"] for line in log_of(out)] == [2, 4]
    assert "python eval.py --checkpoint" in call(train, capsys, *resume)  # nothing is left to do
    more = ["--per-class", "--save-predictions", tmp_path / ("maps" if task == "sem" else "saved.json")] * dense
    again = ["--workers", 0, "--batch-size", 1 if dense else 2, "--json", found]
    printed = call(evaluation, capsys, "--checkpoint", out / "last.pt", *again, *more)
    metrics, saved = json.loads(found.read_text()), json.loads((out / "metrics.json").read_text())
    classes = [*metrics.pop("per_class")]
    assert classes == torch.load(out / "last.pt")["classes"] * dense and "4 images, " in printed
    assert {line.split()[0] for line in printed.splitlines()} >= {*classes} and metrics.keys() == saved.keys()
    for name in saved if processes == 1 else ():
        assert saved[name] == pytest.approx(metrics[name], abs=0.01, nan_ok=True)
    if dense:
        assert "is of a run with task" in failure(train, capsys, "--task", "cls", "--resume", "--out", out)


@quick("cls", "inst", "sem")
def test_every_task_from_training_to_prediction(tmp_path, capsys, monkeypatch, task, checkpoint):
    slow = ["--init", checkpoint] if task in ("cls", "inst") else []
    monkeypatch.setitem(train.CLS, "backbone_rate", 0.1)
    train_and_evaluate(tmp_path, capsys, task, 1, *slow)
    groups = torch.load(tmp_path / "run" / "last.pt")["optimizer"]["param_groups"]
    rates = {round(group["lr"] / max(group["lr"] for group in groups), 3) for group in groups}
    assert rates == ({0.1, 1} if slow else {1})
    names = {"label", "l1", "giou"} | ({"mask", "dice", "pixel"} if task != "det" else set())
    assert task == "cls" or log_of(tmp_path / "run")[0]["losses"].keys() == names


def short_run(task, folder, count=18):
    """Arguments of a run of 18 steps in two epochs; for cls, of as many steps as there are images of a class."""
    arguments = ["--task", task, "--data", folder, "--variant", "nano", "--image-size", 32, "--epochs", 2]
    if task == "det":
        write_coco(folder)
        edit(many_times)(folder)
        return [*arguments, "--test-size", 40, "--batch-size", 2, "--workers", 0, "--seed", 1]
    write_images(folder, "train", ("cat", "dog"), count)
    write_images(folder, "val", ("cat", "dog"))
    return [*arguments, "--batch-size", 4, "--drop-path", 0.2, "--workers", 1]


def test_init_takes_what_fits_and_a_resumed_run_keeps_its_settings(tmp_path, capsys, checkpoint):
    arguments, out = short_run("cls", tmp_path / "files", 4), tmp_path / "run"
    printed = call(train, capsys, *arguments, "--iterations", 1, "--epochs", 1, "--init", checkpoint, "--out", out)
    assert "has no fitting weights of head.classifier\n" in printed
    printed = call(train, capsys, "--resume", "--epochs", 2, "--out", out)
    assert "resumed after step 2\n" in printed
    model, state = evaluation.load_checkpoint(out / "last.pt")
    assert model.arguments["iterations"] == state["settings"]["iterations"] == 1 and state["step"] == 4
    assert {len(entry["weights"]) for entry in cf.trace(model, torch.rand(1, 3, 64, 64))} == {1}


def test_a_run_on_other_images_or_batches_is_not_resumed(tmp_path, capsys):
    arguments, out = short_run("cls", tmp_path / "files", 4), tmp_path / "run"
    call(train, capsys, *arguments, "--out", out)
    resume = ["--resume", "--epochs", 3, "--out", out]
    assert "with batch_size 4, not 2; --epochs" in failure(train, capsys, *resume, "--batch-size", 2)
    (tmp_path / "files" / "train" / "cat" / "0.png").unlink()
    assert "is of a run on other images" in failure(train, capsys, *resume)
    assert step_of(out) == 4


def start(processes, *arguments):
    """Start train.py, under torchrun if there are several processes."""
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--rdzv_backend=c10d"]
    torchrun += ["--rdzv_endpoint=localhost:0"]
    command = [sys.executable, *(torchrun if processes > 1 else []), "train.py", *map(str, arguments)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=HERE, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)


def members(mark):
    """Processes with this text in their command lines: pid -> pid of the parent."""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has just ended
            if str(mark) in open(f"/proc/{name}/cmdline").read():
                found[int(name)] = int(open(f"/proc/{name}/stat").read().rsplit(")", 1)[1].split()[1])
    return found


def kill(out):
    """Kill all processes of a run at once, as when a machine goes down: torchrun, training, loaders."""
    for pid in members(out):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_for(condition, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.02)


def step_of(out):
    return torch.load(out / "last.pt")["step"] if (out / "last.pt").exists() else 0


def assert_same_end(a, b):
    a, b = (torch.load(out / "last.pt") for out in (a, b))
    assert a["step"] == b["step"]
    for name in ("model", "ema"):
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)
    measured = "seconds", "images_per_second", "memory_MiB"
    a, b = ([{k: v for k, v in line.items() if k not in measured} for line in x["log"]] for x in (a, b))
    assert repr(a) == repr(b)  # nan is nan


def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, capsys, monkeypatch):
    """Interrupted in a step and in a write, within this process; the next test kills processes."""
    arguments = short_run("cls", tmp_path / "files", 8)
    call(train, capsys, *arguments, "--out", tmp_path / "whole")
    out = tmp_path / "broken"
    for module, name, last in [(cf.ClusterFormer, "loss", 3), (os, "fsync", 4)]:

        def broken(*arguments, right=getattr(module, name), calls=itertools.count(1)):
            if next(calls) == last:
                raise KeyboardInterrupt
            return right(*arguments)

        before = step_of(out)
        with monkeypatch.context() as patched, pytest.raises(SystemExit):
            patched.setattr(module, name, broken)
            call(train, capsys, *arguments, "--out", out, "--resume", "--checkpoint-every", 0)
        assert before < step_of(out) < 8
    assert "resumed after step" in call(train, capsys, "--out", out, "--resume")
    assert_same_end(tmp_path / "whole", out)


@slow
@pytest.mark.parametrize("task, processes", [("cls", 1), ("det", 2)])
def test_killed_at_any_moment_a_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, task, processes):
    """Twice; with KILLS=20 in the environment, 20 times."""
    arguments = short_run(task, tmp_path / "files")
    assert start(processes, *arguments, "--out", tmp_path / "whole").wait() == 0
    out, rng = tmp_path / "killed", random.Random(0)
    for _ in range(int(os.environ.get("KILLS", 2))):
        run, before = start(processes, *arguments, "--out", out, "--resume", "--checkpoint-every", 0), step_of(out)
        moment = rng.choice([(out / "last.pt.part").exists, lambda: step_of(out) > before])  # during a write, or after
        wait_for(lambda: moment() or run.poll() is not None)
        time.sleep(rng.uniform(0, 0.3))
        kill(out)
        run.communicate()
        assert step_of(out) >= before
    run = start(processes, "--out", out, "--resume", "--task", task)
    printed, errors = run.communicate()
    assert run.returncode == 0 and "resumed after step" in printed, errors
    assert printed.count("python eval.py") == 1  # one process prints
    assert_same_end(tmp_path / "whole", out)


@slow
def test_whatever_stops_one_process_stops_all_and_one_can_resume(tmp_path):
    out = tmp_path / "run"
    arguments = [*short_run("cls", tmp_path / "files"), "--epochs", 200, "--accumulate", 2, "--checkpoint-every", 0]
    run = start(2, *arguments, "--out", out)
    wait_for(lambda: step_of(out) > 2)
    sent = time.time()
    os.kill(run.pid, signal.SIGTERM)  # torchrun forwards it
    printed, errors = run.communicate()
    assert run.returncode != 0 and time.time() - sent < 20 and not members(out)
    step = int(re.search(r"stopped after step (\d+) of 1800; --out \S+ --resume continues", errors).group(1))
    assert step == step_of(out)  # all finished it

    run = start(2, "--out", out, "--resume")
    wait_for(lambda: step_of(out) > step)
    os.kill(max(pid for pid, parent in members(out).items() if parent == run.pid), signal.SIGKILL)
    died = time.time()
    run.communicate()
    assert run.returncode != 0 and time.time() - died < 60 and not members(out)

    step = step_of(out)
    run = start(1, "--out", out, "--resume")
    wait_for(lambda: step_of(out) > step)
    run.send_signal(signal.SIGINT)  # Ctrl-C
    printed, errors = run.communicate()
    assert run.returncode == 143 and "Traceback" not in errors and f"resumed after step {step}\n" in printed


def test_a_full_disk_leaves_the_previous_checkpoint_intact(tmp_path, capsys):
    arguments, out = short_run("cls", tmp_path / "files", 4), tmp_path / "run"
    call(train, capsys, *arguments, "--epochs", 1, "--out", out)
    before = (out / "last.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))  # no file may exceed a megabyte
    try:
        message = failure(train, capsys, "--out", out, "--resume", "--epochs", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{out}/last.pt: cannot be written (" in message and "the previous file is still intact" in message
    assert (out / "last.pt").read_bytes() == before and not (out / "last.pt.part").exists()


def test_a_step_whose_loss_is_not_finite_changes_nothing(tmp_path, capsys, monkeypatch):
    few_scenes(monkeypatch, 40, 4)
    spoil(monkeypatch, {2, 3})
    call(train, capsys, *QUICK, "--batch-size", 10, "--epochs", 1, "--out", tmp_path)
    state = torch.load(tmp_path / "last.pt")
    assert {own["step"].item() for own in state["optimizer"]["state"].values()} == {2.0} and state["step"] == 4
    assert all(value.isfinite().all() for value in state["model"].values())
    assert len(log_of(tmp_path)) == 1


def test_after_20_bad_steps_a_run_stops_and_its_checkpoint_is_from_before_them(tmp_path, capsys, monkeypatch):
    few_scenes(monkeypatch, 120, 4)
    spoil(monkeypatch, range(3, 100))
    arguments = [*QUICK, "--batch-size", 4, "--epochs", 1, "--checkpoint-every", 0, "--out", tmp_path]
    message = failure(train, capsys, *arguments)
    assert re.search("20 steps in a row not finite: lower --lr .*last.pt has older weights", message)
    assert step_of(tmp_path) == 3


# --------------------------------------------------------------------------------------------------
# Guards of the full scale:   pytest -q -k on_a_gpu;   REHEARSAL=1 pytest -q -s -k rehearsal
# --------------------------------------------------------------------------------------------------
def needs_gpus(count):
    return pytest.mark.skipif(torch.cuda.device_count() < count, reason=f"needs {count} GPU" + "s" * (count > 1))


def class_map(prediction):
    """The class of each pixel for sem and pan; for inst, whether it belongs to an object."""
    if "panoptic" in prediction:
        label = torch.tensor([-1, *(segment["label"] for segment in prediction["segments"])])
        place = torch.tensor([0, *(segment["id"] for segment in prediction["segments"])])
        return label[torch.searchsorted(place, prediction["panoptic"].cpu())]
    return prediction["semantic"].cpu() if "semantic" in prediction else prediction["masks"].any(0).cpu()


@pytest.mark.parametrize("task", cf.TASKS)
@pytest.mark.parametrize("processes", [pytest.param(count, marks=needs_gpus(count)) for count in (1, 2)])
def test_training_and_evaluation_on_a_gpu(tmp_path, capsys, task, processes):
    train_and_evaluate(tmp_path, capsys, task, processes)
    assert log_of(tmp_path / "run")[-1]["memory_MiB"] > 0


@needs_gpus(1)
@pytest.mark.parametrize("task", cf.TASKS)
def test_predictions_on_a_gpu_match_those_of_the_cpu(task):
    """float32 predictions for images of unequal sizes; the GPU may multiply in TF32."""
    model, there = random_model(task), torch.device("cuda")
    images = [torch.rand(3, *size) for size in [(96, 64), (50, 70), (100, 81)]]
    batch = torch.rand(2, 3, 96, 64)
    with torch.no_grad():
        expected, exact = model.predict(images), model(batch)
        model, images = model.to(there), [image.to(there) for image in images]
        found, rough = model.predict(images), model(batch.to(there))
    for key in exact.keys() - {"aux"}:
        assert (rough[key].cpu() - exact[key]).abs().mean() < 0.01 * exact[key].abs().mean(), key
    for a, b in zip(found, expected, strict=True):
        if "scores" in a:
            torch.testing.assert_close(a["scores"][:5].cpu(), b["scores"][:5], atol=0.01, rtol=0.01)
        if task in ("inst", "sem", "pan"):
            assert (class_map(a) == class_map(b)).float().mean() > 0.95


@pytest.mark.skipif("REHEARSAL" not in os.environ, reason="takes long; REHEARSAL=1 in the environment runs it")
@pytest.mark.parametrize("task, size", dict(cls=224, det=1024, inst=1024, sem=512, pan=1024).items())
def test_rehearsal_of_a_full_scale_recipe(tmp_path, monkeypatch, task, size):
    """Two processes with an image each: two steps, an evaluation, SIGTERM, and a resume to the end."""
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # a step may take longer than 30 s
    out = tmp_path / "run"
    write_scenes(tmp_path / "files", task, [(480, 640), (640, 480), (427, 640), (500, 375)])
    recipe = dict(cls=train.IMAGENET, sem=train.ADE20K).get(task, train.COCO)  # few images take another one
    recipe = recipe | dict(task=task, data=tmp_path / "files", out=out, batch_size=2, epochs=2, evaluate_every=1, workers=1)
    given = [(f"--{key.replace('_', '-')}", value) for key, value in recipe.items() if value not in (None, False)]
    run = start(2, *itertools.chain(*given))
    try:
        wait_for(lambda: (out / "log.jsonl").exists() or run.poll() is not None, 3600)
        memory = [benchmark.resident_peak(pid) / 2**20 for pid, parent in members(out).items() if parent == run.pid]
        run.send_signal(signal.SIGTERM)
        printed, errors = run.communicate()
        assert '"variant": "tiny"' in printed and f'"image_size": {size}, ' in printed, errors
        step = int(re.search(r"stopped after step (\d+) of 4; ", errors).group(1))
        assert run.returncode != 0 and 2 <= step < 4 and len(memory) == 2
        run = start(2, "--task", task, "--out", out, "--resume")
        printed, errors = run.communicate()
        assert run.returncode == 0 and f"resumed after step {step}\n" in printed, errors
    finally:
        kill(out)
    first, last = log_of(out)
    assert (first["step"], last["step"]) == (2, 4) and step_of(out) == 4
    print(f"\n{task}: {first['seconds'] / 2:.1f} s a step, {max(memory):.0f} MiB a process")


# --------------------------------------------------------------------------------------------------
# Messages, checkpoints, documentation
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("task, damage, complaint", [
    ("cls", lambda root: (root / "train").rename(root / "training"), "train: no such"),
    ("cls", lambda root: (root / "train" / "empty").mkdir(), "empty"),
    ("cls", lambda root: write_images(root, "val", ["wolf"]), "class folders ['wolf'] are no classes of the model"),
    ("cls", lambda root: [shutil.rmtree(path) for path in (root / "train").iterdir()], "there is no class folder in it"),
    ("cls", lambda root: [cut_in_half(path) for path in root.glob("val/*/*")], "cannot be read"),  # by a loader process
    ("det", lambda root: (root / "val2017" / "b.png").write_text("no image"), "b.png: cannot be read as an image"),
    ("inst", edit(lambda c: c["annotations"][2].update(segmentation=MASK | dict(counts="0")), "val"), "its run lengths"),
    ("sem", picture("annotations/validation/1.png"), "90 x 60"),
    ("pan", picture("annotations/panoptic_val2017/0.png", "L", 5), "have no entries in"),
    ("pan", lambda root: [path.rename(str(path).replace("panoptic", "instances")) for path in root.glob("*/*.json")],
     "panoptic_train2017"),
])
def test_broken_files_end_a_run_in_one_line(tmp_path, capsys, task, damage, complaint):
    write_scenes(tmp_path, "cls") if task == "cls" else write(tmp_path, task)
    damage(tmp_path)
    arguments = ["--task", task, "--data", tmp_path, "--variant", "nano", "--image-size", 32, "--epochs", 1]
    arguments += ["--batch-size", 1, "--workers", 1, "--out", tmp_path / "run"]
    assert complaint in failure(train, capsys, *arguments)


@pytest.mark.parametrize("arguments, complaint", [
    (["--data", "/no/such/folder"], "/no/such/folder: no such"),
    (["--batch-size", 0], "argument --batch-size: must be at least 1 and below inf, got 0"),
    (["--batch-size", 20000], "--batch-size 20000 is more than the 5700 training images"),
    (["--batch-size", 50, "--accumulate", 3], "is not divisible by 1 processes x --accumulate 3"),
    (["--image-size", 50], "--image-size 50 is not a multiple of 16"),
    (["--lr", "nan"], "argument --lr: must be at least 0 and below inf, got nan"),
    (["--variant", "huge"], "argument --variant: invalid choice: 'huge'"),
    (["--init", "/no/such/file"], "No such file or directory: '/no/such/file'"),
    (["--out", "old"], "--resume continues that run"),
    (["--out", "old/last.pt", *QUICK], "old/last.pt/last.pt: cannot be written"), (["--out", ""], "must not be empty"),
])
def test_one_line_says_what_is_wrong_with_a_flag(tmp_path, capsys, monkeypatch, checkpoint, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint.parent, "old")
    assert complaint in failure(train, capsys, "--out", "new", *arguments)
    assert not list(tmp_path.glob("new/*")) and (tmp_path / "old" / "last.pt").read_bytes() == checkpoint.read_bytes()


class Malice:
    def __reduce__(self):
        return os.mkdir, ("broken-in",)  # would be called by pickle


@pytest.mark.parametrize("change, complaint", [
    (lambda state: {"weights": torch.zeros(2)}, "not a whole checkpoint of this train.py (KeyError)"),
    (lambda state: state | {"model": Malice()}, "not a whole checkpoint"),
    (lambda state: state | {"version": cf.VERSION - 1}, f"version {cf.VERSION - 1}, not {cf.VERSION}"),
    (None, "not a whole checkpoint"),
])
def test_one_line_says_what_is_wrong_with_a_checkpoint(tmp_path, capsys, monkeypatch, checkpoint, change, complaint):
    monkeypatch.chdir(tmp_path)
    torch.save(change(torch.load(checkpoint)) if change else torch.load(checkpoint), "other.pt")
    if change is None:
        cut_in_half(tmp_path / "other.pt")
    message = failure(evaluation, capsys, "--checkpoint", "other.pt")
    assert "other.pt: " in message and complaint in message and os.listdir() == ["other.pt"]


@pytest.mark.parametrize("arguments, complaint", [
    (["--checkpoint", "none.pt"], "No such file or directory: 'none.pt'"),
    (["--images", "--json", "a.json"], "a.json exists"), (["--clusters", "--json", "b.json"], "pictures come without"),
    (["--data", "nowhere"], "nowhere: no such"),
    (["--data", "."], "class folders ['cat', 'dog'] are no classes of the model"),
    (["--batch-size", 0], "--batch-size: must be at least 1"), (["--per-class"], "for the dense tasks"),
    (["--json", "cf.pt"], "cf.pt exists, and is not replaced"), (["--json", "no/a.json"], "no cannot be written"),
    (["--explain", "wolf"], "takes up to two of its classes: disc, ring"),
    (["--checkpoint", "inst.pt", "--explain"], "--explain is for cls"),
    (["--checkpoint", "inst.pt", "--save-predictions", "found.txt"], "--save-predictions found.txt"),
    (["--checkpoint", "inst.pt", "--save-predictions", "a.json"], "a.json exists, and is not replaced"),
    (["--checkpoint", "pan.pt", "--save-predictions", "train.json"], "train exists, and is not replaced"),
    (["--checkpoint", "sem.pt", "--save-predictions", "train"], "train exists, and is not replaced"),
])
def test_one_line_says_why_nothing_is_evaluated_or_drawn(folder, capsys, monkeypatch, checkpoint, arguments, complaint):
    monkeypatch.chdir(folder)
    for task in {"inst.pt", "pan.pt", "sem.pt"} & {*arguments}:
        saved_checkpoint(task, task.removesuffix(".pt"))
    shutil.copy(checkpoint, "cf.pt"), (folder / "a.json").write_text("{}")
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    assert complaint in failure(evaluation, capsys, "--checkpoint", "cf.pt", *arguments)
    assert before == {path: path.read_bytes() for path in folder.rglob("*.*")}


def readme(language):
    """Blocks of the README in a language."""
    with open(os.path.join(HERE, "README.md")) as file:
        return re.findall(rf"```{language}\n(.*?)```", file.read(), re.DOTALL)


def commands():
    """Command lines in the README, in code blocks and in the text, and in the docstrings of the scripts."""
    with open(os.path.join(HERE, "README.md")) as file:
        inline = re.findall(r"`((?:torchrun|python) [^`]+)`", file.read())
    text = "\n".join([*readme("bash"), *inline, train.__doc__, evaluation.__doc__, benchmark.__doc__])
    lines = [line.strip() for line in re.sub(r"\\\n\s*", "", text).splitlines()]
    lines = [re.split(r"\s#|\s{3,}", line)[0].split() for line in lines if line.startswith(("torchrun", "python"))]
    return sorted({tuple(line) for line in lines if "--help" not in line})


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_documented_command_is_valid(tmp_path, monkeypatch, command):
    """Up to the point where data and checkpoints are read; shortened runs are tested above."""
    monkeypatch.chdir(tmp_path)
    words = list(command[1:])
    if command[0] == "torchrun":
        launch = torch.distributed.run.get_args_parser().parse_args(words)
        words = [launch.training_script, *launch.training_script_args]
    monkeypatch.setattr(sys, "argv", words)
    script = {"train.py": train, "eval.py": evaluation, ".github/benchmark.py": benchmark}[words[0]]
    for name in ("start_processes", "read_checkpoint"):
        monkeypatch.setattr(script, name, lambda *_: sys.exit("valid"), raising=False)
    with pytest.raises(SystemExit, match="^valid$"):
        script.main()


def test_the_examples_in_the_readme_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "cls").mkdir(parents=True)
    saved_checkpoint(tmp_path / "runs" / "cls" / "last.pt", "cls")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)).save("photo.jpg")
    exec(readme("python")[0], {})
    printed = capsys.readouterr().out
    assert any(name in printed for name in data.THINGS) and "tensor([" in printed


def test_the_module_copied_alone_learns_boxes_and_masks(tmp_path):
    """The training loop of the README, with this one file in the folder, and nothing else of the project."""
    shutil.copy(cf.__file__, tmp_path)
    example = next(block for block in readme("python") if "model.loss" in block)
    script = f"""
import sys
import torch
torch.manual_seed(0)
torch.set_num_threads(1)
boxes = torch.tensor([[0.3, 0.4, 0.4, 0.5], [0.7, 0.6, 0.3, 0.4]])
masks = torch.zeros(2, 64, 64, dtype=torch.bool)
masks[0, 10:42, 6:32], masks[1, 26:51, 35:54] = True, True
image = 0.1 * torch.rand(3, 64, 64)
image[0] += 0.6 * masks[0]
image[2] += 0.6 * masks[1]
batches = [(torch.stack([image, image.flip(0)]), [dict(labels=torch.tensor([0, 1]), boxes=boxes, masks=masks),
            dict(labels=torch.tensor([]).long(), boxes=boxes[:0], masks=masks[:0])])] * 12
for task in ("det", "inst"):
    history = []
    looped = {example!r} + "    history.append(loss.item())"
    exec(looped.replace('"inst"', "task").replace('"tiny"', '"nano"'), globals())
    assert sum(history[-3:]) < 0.6 * sum(history[:3]), (task, history)
    (first, _) = model.predict(batches[0][0])
    assert first.keys() - {{"masks"}} == {{"scores", "labels", "boxes"}} and ("masks" in first) == (task == "inst")
assert not {{"train", "eval", "data"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_block_of_the_experiments_is_by_default_that_of_the_module():
    experiment.check_against_module()
    assert experiment.build(experiment.PAPER, 3)(torch.rand(2, 3, 96, 96))["logits"].shape == (2, 3)


def test_imports_have_no_circle_and_the_module_needs_torch_and_numpy_only():
    imported = {}
    for script in (cf, data, evaluation, train):
        nodes = list(ast.walk(ast.parse(inspect.getsource(script))))
        found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        found |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        imported[script.__name__] = {module.split(".")[0] for module in found}
    assert imported["clusterformer"] - {"torch", "numpy"} <= sys.stdlib_module_names
    assert not imported["data"] & imported.keys() and imported["eval"] & imported.keys() == {"clusterformer", "data"}
