# SPDX-License-Identifier: MIT
"""Tests of the method and the scripts, most of them against references in NumPy.   pytest -q"""

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
import tempfile
import time
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import tv_tensors
from torchvision.ops import box_convert, box_iou, generalized_box_iou
from torchvision.transforms import v2

import clusterformer as cf
import data
import eval as evaluation
import train

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.append(os.path.join(HERE, ".github"))
import benchmark  # noqa: E402


@pytest.fixture(autouse=True)
def seeded():
    """A test draws the same random numbers, whichever tests ran before it."""
    torch.manual_seed(0)


def slow():
    """Skip the rest of a slow test, unless SLOW is set in the environment."""
    if not os.environ.get("SLOW"):
        pytest.skip("slow; all of them run with: SLOW=1 pytest -q")


def random_model(**arguments):
    """A nano model with random parameters: no branch is at its zero initialization."""
    torch.manual_seed(0)
    model = cf.ClusterFormer("cls", "nano", num_classes=10, **arguments).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def random_clustering(dim=12, heads=3, iterations=1, dtype=torch.float64):
    torch.manual_seed(1)
    module = cf.RecurrentCrossAttentionClustering(dim, heads, iterations).to(dtype)
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return module


def state_of(model, classes, **settings):
    """The part of a checkpoint from which a model is rebuilt."""
    weights = model.state_dict()
    state = dict(version=cf.VERSION, arguments=model.arguments, model=weights, ema=weights)
    return state | dict(settings=settings, classes=classes)


def softmax(x, axis):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def em_iteration(C, I, q, k, v, scale):
    """One E-step and one M-step for one image, head by head.  C (K, D), I (N, D) -> C (K, D), M (h, K, N)."""
    heads = len(scale)
    d = C.shape[1] // heads
    updated, M = C.copy(), []
    for h in range(heads):
        compared, collected = slice(h * d, (h + 1) * d), slice(h, None, heads)  # channels
        queries, keys, values = C[:, compared] @ q[h], I[:, compared] @ k[h], I[:, collected] @ v[h]
        norms = np.outer(np.linalg.norm(queries, axis=1), np.linalg.norm(keys, axis=1))
        S = scale[h] * (queries @ keys.T) / norms
        M.append(softmax(S, axis=0))
        weights = M[h] * np.exp(S)
        for center in range(len(C)):
            total = sum(weights[center, i] * values[i] for i in range(len(I)))
            updated[center, collected] += total / weights[center].sum()
    return updated, np.stack(M)


# ---------------------------------------------------------------------------------------------------------------
# The method
# ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("iterations", [1, 3])
def test_one_iteration_is_one_em_step(iterations):
    module = random_clustering(iterations=iterations)
    centers, tokens = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(2, 17, 12, dtype=torch.float64)
    C, M = module(centers, tokens)
    weights = [weight.detach().numpy() for weight in (module.q, module.k, module.v)]
    scale = module.log_scale.detach().exp().flatten().numpy()
    for image in range(2):
        expected = centers[image].numpy()
        for _ in range(iterations):
            expected, assignment = em_iteration(expected, tokens[image].numpy(), *weights, scale)
        np.testing.assert_allclose(C[image].detach().numpy(), expected, atol=1e-10)
        np.testing.assert_allclose(M[image].detach().numpy(), assignment, atol=1e-10)


def test_sharp_assignments_are_those_of_spherical_kmeans():
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(60, 8))
    tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
    centers = tokens[:4].copy()
    module = cf.RecurrentCrossAttentionClustering(8, 1, iterations=1).double()
    for weight in (module.q, module.k, module.v):
        assert torch.equal(weight[0], torch.eye(8, dtype=torch.float64))
    module.log_scale.data.fill_(math.log(50.0))
    # At a scale of 50, if the best cosine leads by 0.3, the second best center gets exp(-15) = 3e-7 of a token.
    ranked = np.sort(tokens @ centers.T, axis=1)
    tokens = tokens[ranked[:, -1] - ranked[:, -2] > 0.3]
    new, M = module(torch.tensor(centers)[None], torch.tensor(tokens)[None])
    nearest = (tokens @ centers.T).argmax(1)
    np.testing.assert_allclose(M[0, 0].detach().numpy(), np.eye(4)[:, nearest], atol=1e-5)
    weights = np.exp(50 * (tokens @ centers.T - 1))  # within a cluster, the most similar tokens weigh most
    means = np.stack([np.average(tokens[nearest == k], 0, weights[nearest == k, k]) for k in range(4)])
    np.testing.assert_allclose(new[0].detach().numpy() - centers, means, atol=1e-4)


def test_a_token_unlike_every_center_hardly_moves_any():
    module = cf.RecurrentCrossAttentionClustering(8, 1, iterations=1)
    centers = torch.eye(8)[:2][None]
    tokens = torch.cat([centers[0].repeat(5, 1), torch.eye(8)[7:]])[None]  # five like each center, one unlike both
    C, M = module(centers, tokens)
    torch.testing.assert_close(M[0, 0, :, -1], torch.full((2,), 0.5))  # it is divided nevertheless
    assert (C - centers)[0, :, 7].max() < 1e-4  # its part in the means: weighted by M alone, 0.5 / 5.5


def test_each_token_is_divided_among_the_clusters_and_padding_belongs_to_none():
    module = random_clustering(iterations=2)
    mask = torch.rand(3, 20) < 0.7
    module.history = history = {}
    _, last = module(torch.randn(3, 6, 12).double(), torch.randn(3, 20, 12).double(), mask)
    for M in [last, *history["assignments"]]:
        assert M.shape == (3, 3, 6, 20)
        torch.testing.assert_close(M.sum(2), mask[:, None].expand(3, 3, 20).double())
        assert (M.transpose(2, 3)[(~mask)[:, None].expand(3, 3, 20)] == 0).all()


def test_masked_tokens_and_centers_change_nothing():
    module = random_clustering(iterations=3)
    centers, tokens = torch.randn(1, 5, 12, dtype=torch.float64), torch.randn(1, 9, 12, dtype=torch.float64)
    C, M = module(centers, tokens)
    more_centers = torch.cat([centers, 9 * torch.randn(1, 2, 12, dtype=torch.float64)], 1).requires_grad_()
    more_tokens = torch.cat([tokens, 9 * torch.randn(1, 4, 12, dtype=torch.float64)], 1)
    bias = cf.center_bias(torch.arange(7)[None] < 5)
    C_, M_ = module(more_centers, more_tokens, torch.arange(13)[None] < 9, bias)
    torch.testing.assert_close(C_[:, :5], C)
    torch.testing.assert_close(M_[:, :, :5, :9], M)
    assert (M_[:, :, 5:] == 0).all() and torch.equal(C_[:, 5:], more_centers[:, 5:])  # an empty cluster stays in place
    C_.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (more_centers, *module.parameters()))


def test_permuting_the_tokens_permutes_the_assignment_and_leaves_the_centers():
    module = random_clustering(iterations=3)
    centers, tokens = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(2, 17, 12, dtype=torch.float64)
    order = torch.randperm(17)
    C, M = module(centers, tokens)
    C_, M_ = module(centers, tokens[:, order])
    torch.testing.assert_close(C_, C)
    torch.testing.assert_close(M_, M[..., order])


def test_gradients_agree_with_finite_differences():
    module = random_clustering(dim=4, heads=2, iterations=3)
    centers = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    tokens = torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True)
    parameters = tuple(module.parameters())
    assert torch.autograd.gradcheck(lambda c, x, *_: module(c, x), (centers, tokens, *parameters))


def test_keys_and_values_are_projected_once_for_any_T():
    N, K, D, d = 64, 4, 32, 16
    tokens, centers = torch.randn(1, N, D), torch.randn(1, K, D)
    for T in (1, 2, 5):
        module = cf.RecurrentCrossAttentionClustering(D, D // d, T)
        with FlopCounterMode(display=False) as counter:
            module(centers, tokens)
        iteration = K * D * d + 2 * K * N * D  # Q, similarities, M-step
        assert counter.get_total_flops() / 2 == 2 * N * D * d + T * iteration


def test_a_new_center_attracts_the_tokens_that_look_like_it():
    torch.manual_seed(0)
    module = cf.RecurrentCrossAttentionClustering(64, 2)
    directions = torch.randn(3, 64)
    tokens = directions[torch.arange(30) % 3][None] + 0.1 * torch.randn(1, 30, 64)
    C, M = module(directions[None], tokens)
    assert (M[0].argmax(1) == torch.arange(30) % 3).all()
    assert (F.cosine_similarity(C[0], directions) > 0.9).all()


def test_dispatching_is_equation_6_with_the_mlp_inside_the_sum():
    rng = np.random.default_rng(0)
    K, N, h, d = 4, 7, 2, 3
    C, M = rng.normal(size=(K, h * d)), softmax(rng.normal(size=(h, K, N)), axis=1)
    module = cf.FeatureDispatching(h * d, h).double()
    received = module(torch.tensor(C)[None], torch.tensor(M)[None])[0]
    assert received.shape == (N, h * d) and (received == 0).all()  # a new block leaves the tokens as they are
    for parameter in module.parameters():
        parameter.data = torch.tensor(rng.normal(size=tuple(parameter.shape)))
    gain, shift, W, w, V, v = [parameter.detach().numpy() for parameter in module.parameters()]
    after_mlp = []
    for c in C:
        c = (c - c.mean()) / np.sqrt(c.var() + 1e-5) * gain + shift
        hidden = [x * (1 + math.erf(x / math.sqrt(2))) / 2 for x in W @ c + w]  # GELU
        after_mlp.append(V @ np.array(hidden) + v)
    received = module(torch.tensor(C)[None], torch.tensor(M)[None])[0].detach().numpy()
    for i in range(N):
        for head in range(h):
            part = slice(head * d, (head + 1) * d)
            expected = sum(K * M[head, k, i] * after_mlp[k][part] for k in range(K)) / K  # 1/K sum_k sim(C_k, p_i) C_k
            np.testing.assert_allclose(received[i, part], expected, atol=1e-12)


def test_a_new_block_equals_its_convolution():
    torch.manual_seed(0)
    block, x = cf.ClusterBlock(32, 2), torch.randn(2, 9, 6, 32)
    convolved = F.conv2d(x.permute(0, 3, 1, 2), *block.depthwise.parameters(), padding=1, groups=32)
    torch.testing.assert_close(block(x, cf.make_layout(9, 6)), x + convolved.permute(0, 2, 3, 1))


@pytest.mark.parametrize("height, width", [(56, 56), (7, 13), (1, 2), (25, 19)])
def test_centers_start_as_the_means_of_grid_cells(height, width):
    x = torch.randn(2, height, width, 8)
    grid = (min(10, (height + 1) // 2), min(10, (width + 1) // 2))
    expected = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), grid).flatten(2).transpose(1, 2)
    torch.testing.assert_close(cf.pool_centers(x, cf.make_layout(height, width)), expected)


def test_a_logit_is_the_bias_plus_the_mean_contribution_of_the_centers():
    model, image = random_model(), torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        C = cf.trace(model, image)[-1]["centers"][-1][0]
        contributions = model.head.center_norm(C) @ model.head.classifier.weight.T  # (K, classes)
        torch.testing.assert_close(model.head.classifier.bias + contributions.mean(0), model(image)["logits"][0])


# ---------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------
def test_an_image_gives_the_same_alone_and_in_a_batch():
    model = random_model()
    images = [torch.rand(3, *size) for size in [(64, 64), (33, 90), (100, 47), (32, 32)]]
    with torch.no_grad():
        together = model(images)["logits"]
        alone = torch.cat([model(image[None])["logits"] for image in images])
        maps, single = model.backbone(images), model.backbone(images[1][None])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    for among, own in zip(maps, single):
        torch.testing.assert_close(among[1:2, :, : own.shape[2], : own.shape[3]], own, atol=1e-4, rtol=1e-4)


def test_the_content_of_the_padding_does_not_matter():
    model = random_model()
    images, sizes = cf.batch_images([torch.rand(3, 40, 70), torch.rand(3, 64, 50)])
    padding = images.clone()
    padding[0, :, 40:], padding[1, :, :, 50:] = 1.0, 0.5
    with torch.no_grad():
        for a, b in zip(model.backbone(images, sizes), model.backbone(padding, sizes)):
            rows, columns = -(-40 * a.shape[2] // 64), a.shape[3]
            torch.testing.assert_close(a[0, :, :rows, :columns], b[0, :, :rows, :columns])


@pytest.mark.parametrize("height, width", [(32, 32), (33, 47), (224, 224), (61, 300)])
def test_the_backbone_gives_four_maps_for_any_size(height, width):
    maps = random_model().backbone(torch.rand(1, 3, height, width))
    for stride, channels, x in zip((4, 8, 16, 32), (32, 64, 128, 256), maps):
        assert x.shape == (1, channels, math.ceil(height / stride), math.ceil(width / stride))


def test_patch_size_2_halves_the_strides():
    model = random_model(patch_size=2)
    assert [x.shape[-1] for x in model.backbone(torch.rand(1, 3, 32, 32))] == [16, 8, 4, 2]
    assert model.backbone.strides == (2, 4, 8, 16)


def test_the_trace_holds_every_iteration_of_every_clustering_and_changes_nothing():
    model, image = random_model(), torch.rand(2, 3, 64, 80)
    with torch.no_grad():
        before, entries, after = model(image)["logits"], cf.trace(model, image), model(image)["logits"]
    assert torch.equal(before, after)
    assert all(module.history is None for module in model.modules() if hasattr(module, "history"))
    blocks = [f"backbone.stages.{i}.{j}.cluster" for i, j in [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]]
    assert [entry["name"] for entry in entries] == [*blocks, "head.cluster"]
    for entry in entries:
        assert len(entry["centers"]) == 4 and len(entry["assignments"]) == len(entry["weights"]) == 3
        torch.testing.assert_close(entry["weights"][0].sum(-1), torch.ones(entry["weights"][0].shape[:3]))
        B, h, K, N = entry["assignments"][0].shape
        assert N == math.prod(entry["size"]) and entry["centers"][0].shape[:2] == (B, K)
        assert entry["tokens"].shape[:2] == (B, N) and entry["values"].shape[:3] == (B, h, N)
        M = entry["assignments"][-1]
        C = entry["centers"][-2] + sum_of_values(entry["weights"][-1], entry["values"])
        torch.testing.assert_close(entry["centers"][-1], C, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(M.sum(2), torch.ones(B, h, N))


def sum_of_values(weights, values):
    """(B, h, K, N) and (B, h, N, d) -> (B, K, D), head j in channels j, j + h, ..."""
    return (weights @ values).permute(0, 2, 3, 1).flatten(2)


def test_every_parameter_gets_a_gradient():
    model = random_model().train()
    model(torch.rand(2, 3, 96, 96))["logits"].square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    "variant, parameters, macs", [("tiny", 28.6e6, 5.6e9), ("small", 50e6, 9e9), ("nano", 3e6, 1e9)]
)
def test_sizes_are_those_of_the_paper(variant, parameters, macs):
    model = cf.ClusterFormer("cls", variant)
    assert parameters / 3 <= sum(p.numel() for p in model.parameters()) <= parameters
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.rand(1, 3, 224, 224))
    assert counter.get_total_flops() / 2 <= macs


def test_stochastic_depth_drops_branches_in_training_only():
    model = random_model(drop_path=0.5)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(image)["logits"], model(image)["logits"])
        model.train()
        assert not torch.equal(model(image)["logits"], model(image)["logits"])
        block = model.backbone.stages[-1][-1]
        x, branch = torch.zeros(4000, 1, 1, 2), torch.ones(4000, 1, 1, 2)
        added = block.add(x, branch)
    assert set(added.unique().tolist()) == {0.0, 2.0} and abs(added.mean() - 1) < 0.1  # the branch on average


def test_bfloat16_autocast_is_close_and_keeps_the_assignments_in_float32():
    model, image = random_model(), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        exact = model(image)["logits"]
        with torch.autocast("cpu", torch.bfloat16):
            rough, entries = model(image)["logits"], cf.trace(model, image)
    torch.testing.assert_close(rough.float(), exact, atol=0.1, rtol=0.1)
    for entry in entries:
        sums = entry["assignments"][-1].sum(2)
        assert sums.dtype == torch.float32
        torch.testing.assert_close(sums, torch.ones_like(sums))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_model_compiles_without_graph_breaks_and_gives_the_same(monkeypatch, backend):
    if backend == "inductor":
        slow()
    monkeypatch.setitem(cf.VARIANTS, "nano", dict(cf.VARIANTS["nano"], depths=(1, 0, 0, 1)))  # compiling is slow
    model, image = random_model(), torch.rand(2, 3, 64, 48)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend=backend)(image)["logits"]
        torch.testing.assert_close(compiled, model(image)["logits"], atol=1e-4, rtol=1e-4)


def test_a_compiled_training_step_has_the_gradients_of_an_eager_one(monkeypatch):
    monkeypatch.setitem(cf.VARIANTS, "nano", dict(cf.VARIANTS["nano"], depths=(1, 0, 0, 1)))
    image, gradients = torch.rand(2, 3, 64, 48), []
    for compiled in (False, True):
        model = random_model().train()
        model.head.cluster.log_scale.data.fill_(math.log(80.0))  # training clamps it, in place
        runner = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        runner(image)["logits"].square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_the_exported_model_gives_the_same_for_any_batch_size(monkeypatch):
    monkeypatch.setitem(cf.VARIANTS, "nano", dict(cf.VARIANTS["nano"], depths=(1, 0, 0, 1)))
    model = random_model()
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (torch.rand(2, 3, 64, 48),), dynamic_shapes={"images": {0: batch}})
    image = torch.rand(5, 3, 64, 48)
    torch.testing.assert_close(exported.module()(image)["logits"], model(image)["logits"], atol=1e-5, rtol=1e-5)


def test_predict_returns_the_top_5_classes_and_restores_the_mode():
    model = random_model().train()
    images = [torch.rand(3, 40, 60), torch.rand(3, 64, 64)]
    predictions = model.predict(images)
    assert model.training and len(predictions) == 2
    probabilities = model.eval()(images)["logits"].softmax(-1)
    for prediction, row in zip(predictions, probabilities):
        torch.testing.assert_close(prediction["scores"], row.sort(descending=True).values[:5])
        torch.testing.assert_close(prediction["scores"], row[prediction["labels"]])  # rounding decides near ties
        assert len(set(prediction["labels"].tolist())) == 5


@pytest.mark.parametrize(
    "images, complaint",
    [
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "uint8; divide by 255"),
        (torch.full((1, 3, 64, 64), 255.0), "values from 255 to 255"),
        (torch.full((1, 3, 64, 64), -0.1), "RGB in \\[0, 1\\]"),
        (torch.full((1, 3, 64, 64), math.nan), "RGB in \\[0, 1\\]"),
        (torch.zeros(1, 3, 31, 64), "at least 32 x 32 pixels, got 31 x 64"),
        (torch.zeros(1, 1, 64, 64), "got \\(1, 1, 64, 64\\)"),
        (torch.zeros(3, 64, 64), "got \\(3, 64, 64\\)"),
        ([torch.zeros(1, 3, 64, 64)], "got \\(1, 3, 64, 64\\)"),
        ([np.zeros((3, 64, 64))], "got ndarray"),
        ([], "at least one"),
    ],
)
def test_predict_says_what_is_wrong_with_images(images, complaint):
    with pytest.raises(ValueError, match=complaint):
        random_model().predict(images)


@pytest.mark.parametrize(
    "arguments", [dict(task="x"), dict(variant="huge"), dict(variant="nano", num_classes=0), dict(patch_size=3)]
)
def test_the_model_says_what_is_wrong_with_its_settings(arguments):
    with pytest.raises(ValueError, match=list(arguments)[-1]):
        cf.ClusterFormer(**arguments)


# ---------------------------------------------------------------------------------------------------------------
# Detection and segmentation
# ---------------------------------------------------------------------------------------------------------------
DENSE = ("det", "inst", "sem", "pan")
KEYS = dict(det={"boxes"}) | dict.fromkeys(("inst", "sem", "pan"), {"boxes", "masks"})


def random_dense(task, **arguments):
    """A nano model of a dense task with random parameters and five classes, the last two of them stuff."""
    torch.manual_seed(0)
    model = cf.ClusterFormer(task, "nano", num_classes=5, things=[True, True, True, False, False], **arguments).eval()
    for parameter in model.parameters():
        parameter.data += 0.03 * torch.randn_like(parameter)
    return model


def some_targets(task, n=(3, 1), size=64):
    """n rectangles of random classes for each image."""
    rng, targets = np.random.default_rng(0), []
    for count in n:
        masks = torch.zeros(count, size, size, dtype=torch.bool)
        for mask in masks:
            (top, left), (height, width) = rng.integers(0, size - 20, 2), rng.integers(12, 20, 2)
            mask[top : top + height, left : left + width] = True
        target = data.target_of(torch.from_numpy(rng.integers(0, 5, count)), None, masks, (size, size))
        targets.append({key: value for key, value in target.items() if key == "labels" or key in KEYS[task]})
    return targets


@pytest.mark.parametrize("task", DENSE)
def test_the_predictions_of_all_layers_have_the_promised_shapes(task):
    model = random_dense(task)
    with torch.no_grad():
        output = model(torch.rand(2, 3, 96, 101))
    assert len(output["aux"]) == 3 and output.keys() == KEYS[task] | {"logits", "aux"}
    for prediction in [output, *output["aux"]]:
        assert prediction.keys() - {"aux"} == KEYS[task] | {"logits"}
        assert prediction["logits"].shape == (2, 100, 5)
        if "boxes" in prediction:
            assert prediction["boxes"].shape == (2, 100, 4)
            assert 0 <= prediction["boxes"].min() and prediction["boxes"].max() <= 1
        if "masks" in prediction:
            assert prediction["masks"].shape == (2, 100, 24, 26)


def found_again(objects, among):
    """Fraction of an image's objects that are among others, at any rank.

    Rounding decides near ties: their order, which of two is a duplicate, and which is the hundredth.
    """
    same = objects["labels"][:, None] == among["labels"]  # (n, m)
    for key, digits in (("scores", 1e-3), ("boxes", 0.1), ("masks", 0.01)):  # tolerance: of 1, in pixels, of the image
        if key in objects:
            a, b = (x[key].float().view(len(x[key]), -1) for x in (objects, among))
            same &= torch.cdist(a, b, p=1) < digits * (a.shape[1] if key == "masks" else 1)
    return same.any(1).float().mean()


@pytest.mark.parametrize("task", DENSE)
def test_dense_tasks_give_the_same_for_an_image_alone_and_in_a_batch(task):
    model = random_dense(task)
    images = [torch.rand(3, *size) for size in [(96, 64), (50, 70), (100, 81)]]
    with torch.no_grad():
        together, alone = model(images), [model([image]) for image in images]
    for i, own in enumerate(alone):
        real = together["logits"][i, :, 0] > -99  # centers that the image has
        for key in KEYS[task] | {"logits"}:
            value = together[key][i][real]
            if key == "masks":
                value = value[:, : own[key].shape[2], : own[key].shape[3]]
            torch.testing.assert_close(value, own[key][0], atol=1e-4, rtol=1e-4)
    for prediction, (own,) in zip(model.predict(images), [model.predict([image]) for image in images]):
        assert prediction.keys() == own.keys()
        if "scores" in own:
            assert found_again(own, prediction) > 0.95 and found_again(prediction, own) > 0.95
        for key in own.keys() & {"semantic", "panoptic"}:
            assert prediction[key].shape == own[key].shape and (prediction[key] == own[key]).float().mean() > 0.99


@pytest.mark.parametrize("task", DENSE)
@pytest.mark.parametrize("n", [(3, 1), (0, 0)])
def test_every_parameter_of_a_dense_model_gets_a_gradient_even_from_images_without_objects(task, n):
    model = random_dense(task).train()
    losses = cf.set_losses(model(torch.rand(2, 3, 64, 64)), some_targets(task, n), 4)
    sum(losses.values()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or (sum(n) and not p.grad.any())]
    assert without == [] and all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("task", DENSE)
def test_dense_tasks_under_bfloat16_autocast_are_close(task):
    model = random_dense(task)
    images = [torch.rand(3, 64, 80), torch.rand(3, 96, 50)]
    with torch.no_grad():
        exact = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(images)
            assert len(model.predict(images)) == 2
    for key in KEYS[task] | {"logits"}:
        assert (rough[key].float() - exact[key]).abs().mean() < 0.1 * exact[key].abs().mean()
    with torch.autocast("cpu", torch.bfloat16):
        losses = cf.set_losses(model.train()(images), some_targets(task), 4)
    sum(losses.values()).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def strange_images(rng):
    """Images of any size, with aspect ratios up to 10: noise, constant colors, sharp contrasts."""
    for kind in ("noise", "black", "white", "gray", "checks", "spot"):
        short = int(rng.integers(32, 120))
        long = min(300, int(short * rng.uniform(1, 10)))
        image = torch.full((3, *rng.permutation([short, long])), dict(white=1.0, gray=0.5).get(kind, 0.0))
        if kind == "noise":
            image = torch.rand(image.shape, generator=torch.Generator().manual_seed(int(rng.integers(2**31))))
        elif kind == "checks":  # the highest frequency
            image[:, ::2, ::2] = image[:, 1::2, 1::2] = 1
        elif kind == "spot":
            image[:, -1, -1] = 1
        yield image


@pytest.mark.parametrize("task", cf.TASKS)
@pytest.mark.parametrize("precise", [True, False])
def test_any_image_has_a_valid_prediction(task, precise):
    model = random_model() if task == "cls" else random_dense(task)
    model.train()  # predict switches to evaluation mode by itself
    images = [image for seed in range(2) for image in strange_images(np.random.default_rng(seed))]
    with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
        predictions = [prediction for i in range(0, len(images), 3) for prediction in model.predict(images[i : i + 3])]
    for image, prediction in zip(images, predictions):
        height, width = image.shape[1:]
        if "scores" in prediction:
            scores = prediction["scores"]
            assert scores.isfinite().all() and (scores >= 0).all() and (scores <= 1).all()
            assert (scores.diff() <= 0).all() and len(scores) == len(prediction["labels"]) <= 100
            assert (prediction["labels"] >= 0).all() and (prediction["labels"] < model.num_classes).all()
        if "boxes" in prediction:
            low, high = prediction["boxes"].split(2, 1)
            assert (low >= 0).all() and (low <= high).all() and (high <= torch.tensor([width, height])).all()
        if "masks" in prediction:
            assert prediction["masks"].shape == (len(prediction["scores"]), height, width)
            assert prediction["masks"].dtype == torch.bool
        if task == "sem":
            assert prediction["semantic"].shape == (height, width)
            assert 0 <= prediction["semantic"].min() and prediction["semantic"].max() < model.num_classes
        if task == "pan":
            ids = {segment["id"] for segment in prediction["segments"]}
            assert prediction["panoptic"].shape == (height, width) and len(ids) == len(prediction["segments"])
            assert set(prediction["panoptic"].unique().tolist()) - {0} == ids
            for segment in prediction["segments"]:
                assert segment["isthing"] == model.head.things[segment["label"]] and 0 <= segment["score"] <= 1


@pytest.mark.parametrize("height, width", [(12, 12), (7, 25), (40, 33)])
def test_the_first_boxes_are_the_grid_cells(height, width):
    boxes = cf.cell_boxes(cf.make_layout(height, width, min_cell=1))[0]
    expected = []
    for i, j in itertools.product(range(min(10, height)), range(min(10, width))):
        sides = []
        for k, side in ((j, width), (i, height)):
            cells = min(10, side)
            start, end = k * side // cells, -(-(k + 1) * side // cells)  # as in adaptive pooling
            sides.append(((start + end) / 2 / side, (end - start) / side))
        (x, w), (y, h) = sides
        expected.append([x, y, w, h])
    torch.testing.assert_close(boxes, torch.tensor(expected))


def test_decoder_centers_start_at_the_cells_of_a_grid():
    model, seen = random_dense("det"), []
    model.head.decoder.box_head.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[1]))
    model(torch.rand(1, 3, 160, 80))  # 20 x 10 tokens at stride 8: cells of 2 x 1 tokens
    y, x = torch.meshgrid((torch.arange(10) + 0.5) / 10, (torch.arange(10) + 0.5) / 10, indexing="ij")
    expected = torch.stack([x, y, torch.full_like(x, 0.1), torch.full_like(x, 0.1)], -1).flatten(0, 1)
    torch.testing.assert_close(seen[0][0], expected)


def test_the_box_prior_is_the_log_of_a_gaussian_over_a_quadrant_and_is_added_to_the_similarity():
    layout, boxes = cf.make_layout(10, 10), torch.tensor([[[0.5, 0.3, 0.4, 0.2]]])
    priors = cf.box_prior(boxes, layout)[:, 0, :, 0].view(4, 10, 10)
    y, x = (np.arange(10) + 0.5) / 10, (np.arange(10) + 0.5) / 10
    quadrants = (0.25, 0.4), (0.25, 0.6), (0.35, 0.4), (0.35, 0.6)  # centers, y and x, of 0.1 x 0.2
    for prior, (up, left) in zip(priors, quadrants):
        horizontal, vertical = (x[None] - left) / 0.05, (y[:, None] - up) / 0.025  # sigma: a quarter of a side
        expected = -(horizontal**2 + vertical**2) / 2
        np.testing.assert_allclose(prior, expected.clip(min=-20), rtol=1e-4, atol=1e-4)

    module = random_clustering(dim=4, heads=2)
    centers, tokens = torch.randn(1, 3, 4).double(), torch.randn(1, 7, 4).double()
    prior = torch.randn(2, 1, 7, 3).double()
    _, plain = module(centers, tokens)
    _, M = module(centers, tokens, bias=prior)
    expected = plain[0] * prior[:, 0].mT.exp()  # Bayes: assignment times prior, normalized
    torch.testing.assert_close(M[0], expected / expected.sum(1, keepdim=True))


@pytest.mark.parametrize("pixels", [6, 12, 24, 48])
def test_the_prior_of_a_small_box_stays_near_it_on_a_coarse_map(pixels):
    """In an image of 1024 pixels, at stride 32, a quadrant of such a box may contain the center of no token."""
    boxes = torch.cat([torch.rand(1, 200, 2), torch.full((1, 200, 2), pixels / 1024)], -1)
    prior = cf.box_prior(boxes, cf.make_layout(32, 32))[:, 0].mT.exp()  # (4, 200, N)
    y, x = torch.meshgrid((torch.arange(32) + 0.5) / 32, (torch.arange(32) + 0.5) / 32, indexing="ij")
    far = torch.maximum((x.flatten() - boxes[0, :, :1]).abs(), (y.flatten() - boxes[0, :, 1:2]).abs()) > 2.5 / 32
    assert ((prior * far).sum(-1) < 0.05 * prior.sum(-1)).all()


@pytest.mark.parametrize("step", [2, 4])
def test_the_mask_prior_is_the_log_probability_of_the_mean_logit_of_a_token(step):
    masks = 8 * torch.randn(2, 3, 10, 13)
    sizes = torch.tensor([[10, 13], [7, 9]])
    priors = cf.mask_prior(masks, cf.make_layout(10, 13, sizes), step)
    for mask, prior, (height, width) in zip(masks, priors, sizes.tolist()):
        prior = prior.T.view(3, -(-10 // step), -(-13 // step))
        for i, j in itertools.product(range(-(-height // step)), range(-(-width // step))):
            cell = mask[:, :height, :width][:, i * step : (i + 1) * step, j * step : (j + 1) * step]
            expected = -(1 + (-cell.mean((1, 2)).double()).exp()).log().clamp(max=10)
            torch.testing.assert_close(prior[:, i, j].double(), expected, atol=1e-4, rtol=1e-4)


def test_later_layers_add_the_prior_of_the_last_mask():
    """The first layer has only the boxes; a later one also has the masks after the layer before it."""
    model, seen = random_dense("inst"), []
    for layer in model.head.decoder.layers:
        layer.cluster.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[3]))
    output = model(torch.rand(1, 3, 96, 96))
    boxes = [prediction["boxes"] for prediction in output["aux"]]
    masks = [prediction["masks"] for prediction in output["aux"]]
    layout, finest = cf.make_layout(12, 12), cf.make_layout(24, 24)
    for i, prior in enumerate(seen):
        expected = cf.box_prior(boxes[i], layout)
        expected = expected + cf.mask_prior(masks[i], finest, 2) if i else expected
        torch.testing.assert_close(prior, expected)
    assert len(seen) == 3


def test_a_scale_beyond_its_limit_still_gets_a_gradient():
    module = random_clustering().train()
    module.log_scale.data.fill_(math.log(80.0))
    C, _ = module(torch.randn(2, 6, 12).double(), torch.randn(2, 20, 12).double())
    C.square().sum().backward()
    torch.testing.assert_close(module.log_scale.exp(), torch.full_like(module.log_scale, 50.0))
    assert module.log_scale.grad.abs().min() > 0


def test_no_object_is_a_class_with_logit_0():
    logits = torch.tensor([[0.0, math.log(2), -torch.inf], [-100.0, -100.0, -100.0]])
    torch.testing.assert_close(cf.class_probability(logits), torch.tensor([[0.25, 0.5, 0.0], [0.0, 0.0, 0.0]]))


def test_a_box_is_its_anchor_moved_by_fractions_of_its_sides_and_stretched():
    head = cf.BoxHead(8)
    anchors = torch.tensor([[[0.5, 0.4, 0.2, 0.1], [0.9, 0.5, 0.3, 0.2]]])
    # At first, a box is its anchor, clipped to the image.
    torch.testing.assert_close(head(torch.randn(1, 2, 8), anchors)[0, 0], anchors[0, 0])
    clipped = torch.tensor([0.875, 0.5, 0.25, 0.2])
    torch.testing.assert_close(head(torch.randn(1, 2, 8), anchors)[0, 1], clipped)
    head.delta[-1].bias.data = torch.tensor([0.5, -1.0, math.log(1.5), 0.0])
    torch.testing.assert_close(head(torch.randn(1, 2, 8), anchors)[0, 0], torch.tensor([0.6, 0.3, 0.3, 0.1]))


def test_a_mask_falls_off_with_the_distance_from_its_box():
    layout = cf.make_layout(10, 10)
    box = torch.tensor([[[0.45, 0.25, 0.4, 0.2]]])  # around the middle of token (2, 4), half sides of 1 and 2 tokens
    far = cf.box_distance(box, layout)[0, 0]
    assert far[2, 4] == pytest.approx(0, abs=1e-6) and far[3, 4] == pytest.approx(1) and far[2, 8] == pytest.approx(4)
    head = random_dense("inst").head.decoder.mask_head
    head.falloff.weight.data.zero_()
    centers, pixels = torch.randn(1, 1, 128), torch.randn(1, 10, 10, 128)
    masks = {}
    for falloff in (0.25, 1.0):
        head.falloff.bias.data.fill_(math.log(falloff))
        masks[falloff] = head(centers, box, pixels, layout)[0, 0]
    torch.testing.assert_close(masks[0.25] - masks[1.0], 1.5 * far.clamp(max=8), atol=1e-4, rtol=1e-4)


def test_mask_samples_in_small_boxes_are_bilinear():
    torch.manual_seed(0)
    masks = torch.randn(1, 2, 12, 16)
    boxes = torch.tensor([[[0.5, 0.4, 0.3, 0.5], [0.2, 0.7, 0.2, 0.3]]])  # samples less than a token apart
    ours = cf.mask_samples(masks, boxes, cf.make_layout(12, 16)).view(2, 12, 12)
    steps = np.linspace(-0.6, 0.6, 12)
    for mask, (x, y, width, height), samples in zip(masks[0].sigmoid().numpy() - 0.5, boxes[0].tolist(), ours):
        for i, row in enumerate((y + height * steps) * 12 - 0.5):
            for j, column in enumerate((x + width * steps) * 16 - 0.5):
                a, b, r, c = row % 1, column % 1, int(row // 1), int(column // 1)
                above = mask[r, c] * (1 - b) + mask[r, c + 1] * b
                below = mask[r + 1, c] * (1 - b) + mask[r + 1, c + 1] * b
                assert samples[i, j].item() == pytest.approx(above * (1 - a) + below * a, abs=1e-5)


def test_mask_samples_do_not_depend_on_the_size_of_an_object():
    def of_disc(size):  # half as wide as the image
        y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
        disc = torch.where((x / size - 0.5) ** 2 + (y / size - 0.5) ** 2 < 1 / 16, 20.0, -20.0)
        box = torch.tensor([[[0.5, 0.5, 0.5, 0.5]]])
        return cf.mask_samples(disc[None, None], box, cf.make_layout(size, size)).view(12, 12)

    small, large = of_disc(48), of_disc(192)  # in the large one, a sample averages 9 x 9 tokens
    assert (small - large).abs().max() < 0.15 and (small - large).abs().mean() < 0.02
    for samples in (small, large):  # inside the disc, and in a corner of the box
        assert samples[5, 5].item() == pytest.approx(0.5, abs=1e-5)
        assert samples[0, 0].item() == pytest.approx(-0.5, abs=1e-5)


def test_mask_samples_are_zero_beyond_the_image():
    full = torch.full((2, 1, 8, 8), 20.0)
    boxes = torch.tensor([0.75, 0.5, 0.5, 0.5]).expand(2, 1, 4)  # its right side is that of the image
    layout = cf.make_layout(8, 8, torch.tensor([[8, 8], [8, 4]]))  # the second image ends after four columns
    for samples in cf.mask_samples(full, boxes, layout).view(2, 12, 12):
        assert (samples[:, :8] - 0.5).abs().max() < 1e-5 and samples[:, -1].max() < 0.3


def test_iou_and_giou_are_those_of_torchvision():
    a, b = (box_convert(torch.rand(n, 4, dtype=torch.float64), "cxcywh", "xyxy") for n in (7, 5))
    iou, giou = cf.iou_and_giou(a[:, None], b)
    torch.testing.assert_close(iou, box_iou(a, b))
    torch.testing.assert_close(giou, generalized_box_iou(a, b))


def test_pairwise_iou_is_that_of_torchvision_with_zeros_on_the_diagonal():
    torch.manual_seed(0)
    boxes = torch.rand(2, 6, 4)
    for ours, of_image in zip(cf.pairwise_iou(boxes), boxes):
        corners = box_convert(of_image, "cxcywh", "xyxy")
        torch.testing.assert_close(ours, box_iou(corners, corners) * (1 - torch.eye(6)))


def test_duplicate_detections_are_suppressed():
    probability = torch.tensor([[0.9, 0.1], [0.8, 0.7], [0.6, 0.2]])
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.51, 0.5, 0.4, 0.4], [0.2, 0.2, 0.1, 0.1]])
    scores, labels, centers = cf.top_detections(probability, boxes)
    found = list(zip(scores.tolist(), labels.tolist(), centers.tolist()))
    # Center 1 for class 0 and center 0 for class 1 duplicate a better detection of the same class.
    expected = [(0.9, 0, 0), (0.7, 1, 1), (0.6, 0, 2), (0.2, 1, 2)]
    assert found == [(pytest.approx(s), label, center) for s, label, center in expected]


def test_the_class_of_a_pixel_has_the_largest_sum_over_centers():
    probability = torch.tensor([[0.6, 0.0], [0.0, 0.5], [0.0, 0.4]])
    masks = torch.tensor([[9.0, 9.0, 9.0], [9.0, -9.0, 9.0], [-9.0, -9.0, 9.0]]).view(3, 1, 3)
    assert cf.semantic_map(probability, masks).tolist() == [[0, 0, 1]]  # 0.6 : 0.5, 0.6 : 0, 0.6 : 0.9


def test_panoptic_segments_of_a_case_worked_out_by_hand():
    rows = ["111100", "011110", "000011", "110000", "000001"]  # masks of five centers over six pixels
    masks = torch.tensor([[9.0 if pixel == "1" else -9.0 for pixel in row] for row in rows]).view(5, 1, 6)
    probability = torch.zeros(5, 3)
    probability[[0, 1, 2, 3, 4], [0, 0, 2, 2, 1]] = torch.tensor([0.9, 0.5, 0.6, 0.95, 0.05])
    ids, segments = cf.panoptic_segments(probability, masks, [True, True, False])
    # Center 3 beats 0 at two of its four pixels: 0 keeps less than 0.6 of its mask, and gets no segment.  Nor does 1.
    # The score of 4 is below the threshold.  2 and 3 are stuff of one class: one segment.
    assert ids.tolist() == [[1, 1, 0, 0, 1, 1]]
    assert segments == [dict(id=1, label=2, isthing=False, score=pytest.approx(0.95))]
    ids, segments = cf.panoptic_segments(probability, masks, [True, True, True])
    assert ids.tolist() == [[2, 2, 0, 0, 1, 1]] and [s["isthing"] for s in segments] == [True, True]
    ids, segments = cf.panoptic_segments(0.1 * probability, masks, [True] * 3)
    assert ids.tolist() == [[0] * 6] and segments == []


def test_padding_does_not_leak_into_resized_masks():
    masks = torch.full((1, 8, 8), 50.0)
    masks[:, :3, :4] = -1.0  # the real part of an image of 11 x 13 in a batch of 32 x 32
    full = cf.resize_masks(masks, (11, 13), 4, (11, 13))
    assert full.shape == (1, 11, 13)
    torch.testing.assert_close(full, torch.full_like(full, -1))
    assert cf.resize_masks(masks, (11, 13), 4, (22, 26)).shape == (1, 22, 26)


def perfect_output(targets, task, classes=5, K=12):
    """Predictions in which center 2 j is target j, and the others are no object; in all of four layers."""
    B, size = len(targets), 64
    prediction = dict(logits=torch.full((B, K, classes), -12.0), boxes=torch.rand(B, K, 4) * 0.1 + 0.45)
    prediction["masks"] = torch.full((B, K, size // 4, size // 4), -12.0)
    for i, target in enumerate(targets):
        for j, label in enumerate(target["labels"]):
            prediction["logits"][i, 2 * j, label] = 12.0
            prediction["boxes"][i, 2 * j] = target["boxes"][j] if "boxes" in target else 0.5
            if "masks" in target:
                covered = F.avg_pool2d(target["masks"][j].float()[None], 4)[0]
                prediction["masks"][i, 2 * j] = 24 * covered - 12
    keys = KEYS[task] | {"logits"}
    prediction = {key: value.requires_grad_() for key, value in prediction.items() if key in keys}
    return prediction | {"aux": [prediction] * 3}


@pytest.mark.parametrize("task", DENSE)
def test_every_target_is_matched_with_the_center_that_predicts_it(task):
    targets = some_targets(task, (3, 0, 2))
    output = perfect_output(targets, task)
    outputs = {key: torch.stack([output[key]] * 4, 1) for key in output if key != "aux"}
    torch.manual_seed(0)
    matches = cf.match(outputs, targets, 4)
    for n, limits, (layer, center, target, weight) in zip((3, 0, 2), ((2, 2, 2, 1), (), (3, 3, 2, 1)), matches):
        last = layer == 3
        assert center[last].tolist() == [0, 2, 4][:n] and target[last].tolist() == [0, 1, 2][:n]
        assert (weight[last] == 1).all()
        for l, times in enumerate(limits):  # at most half of the 12 centers have a target, in any layer
            assert Counter(target[layer == l].tolist()) == dict.fromkeys(range(n), times)
            assert weight[(layer == l) & (target == 0)].sum() == pytest.approx(1)
            assert len(set(center[layer == l].tolist())) == n * times


def test_with_more_targets_than_centers_the_largest_are_matched():
    targets = some_targets("inst", (30, 2))
    model = random_dense("inst").train()
    output = model(torch.rand(2, 3, 32, 32))  # 4 x 4 tokens at stride 8: 16 centers
    areas = torch.arange(30).roll(7) + 1  # the 16 largest are targets 21 to 29 and 0 to 6
    targets[0]["masks"] = (torch.arange(32 * 32).view(32, 32) < areas.view(-1, 1, 1))
    targets[1]["masks"] = targets[1]["masks"][:, :32, :32]
    outputs = {key: torch.stack([output[key]] * 4, 1) for key in KEYS["inst"] | {"logits"}}
    (layer, _, target, _), (other, _, second, _) = cf.match(outputs, targets, 4)
    assert target[layer == 3].tolist() == areas.topk(16).indices.sort().values.tolist()
    assert second[other == 3].tolist() == [0, 1]
    assert all(torch.isfinite(loss) for loss in cf.set_losses(output, targets, 4).values())


def test_no_target_is_matched_with_a_center_that_its_image_does_not_have():
    images = [torch.rand(3, 38, 102), torch.rand(3, 256, 256)]  # 5 x 10 centers beside 10 x 10
    model, targets = random_dense("det").train(), some_targets("det", (12, 1))
    output = model(images)
    absent = output["logits"][0, :, 0] <= -100
    assert absent.sum() == 50
    for layer in [*output["aux"], output]:
        (_, center, _, _), _ = cf.match({key: layer[key][:, None] for key in ("logits", "boxes")}, targets, 4)
        assert len(center) == 12 and not absent[center].any()
    first = lambda layer: {key: value[:1] for key, value in layer.items() if key != "aux"}
    among = first(output) | {"aux": [first(layer) for layer in output["aux"]]}
    both = [cf.set_losses(predictions, targets[:1], 4)["label"] for predictions in (model(images[:1]), among)]
    torch.testing.assert_close(both[1], both[0], rtol=0.02, atol=0)  # the second image does not matter to the first


def test_several_matches_per_target_leave_half_of_the_centers_free():
    assert cf.matches_per_target(7, 100, 1) == [6, 4, 2, 1, 1, 1, 1]
    assert cf.matches_per_target(4, 100, 10) == [5, 4, 2, 1] and cf.matches_per_target(4, 100, 16) == [3, 3, 2, 1]
    assert cf.matches_per_target(4, 100, 60) == [1, 1, 1, 1] and cf.matches_per_target(4, 16, 0)[3] == 1


def test_masks_are_compared_at_12544_points_from_512_pixels_up():
    counts = {side: cf.num_points(torch.empty(1, side // 4, side // 4)) for side in (96, 256, 508, 512, 1024)}
    assert counts == {96: 144, 256: 1024, 508: 4032, 512: 12_544, 1024: 12_544}


def test_panoptic_stuff_is_neither_matched_nor_trained_by_boxes():
    torch.manual_seed(0)
    targets = some_targets("pan", (3,))
    targets[0]["labels"] = torch.tensor([0, 3, 4])  # the last two of five classes are stuff
    output = perfect_output(targets, "pan") | {"aux": []}
    things = torch.tensor([True, True, True, False, False])
    moved = output | {"boxes": output["boxes"].detach().clone()}
    moved["boxes"][0, [2, 4]] = torch.tensor([0.9, 0.9, 0.1, 0.1])  # the centers of the second and third target
    losses, free = (cf.set_losses(predictions, targets, 4, things) for predictions in (output, moved))
    assert cf.set_losses(moved, targets, 4)["l1"] > 1
    assert free["l1"] == losses["l1"] < 0.01 and free["giou"] == losses["giou"] < 0.01
    outputs = {key: moved[key][:, None] for key in ("logits", "boxes", "masks")}
    ((_, center, target, _),) = cf.match(outputs, targets, 4, things)
    assert center.tolist() == [0, 2, 4] and target.tolist() == [0, 1, 2]


@pytest.mark.parametrize("task", DENSE)
def test_losses_are_near_zero_for_the_ground_truth_and_ignore_the_order_of_targets(task):
    targets = some_targets(task, (3, 0, 2))
    torch.manual_seed(0)
    losses = cf.set_losses(perfect_output(targets, task) | {"aux": []}, targets, 4)
    assert losses["label"] < 0.01 and losses.get("l1", 0) < 0.01 and losses.get("giou", 0) < 0.01
    if task == "det":
        model = random_dense(task)
        output = model(torch.rand(3, 3, 64, 64))
        turned = [{key: value.flip(0) for key, value in target.items()} for target in targets]
        for name, value in cf.set_losses(output, targets, 4).items():
            torch.testing.assert_close(cf.set_losses(output, turned, 4)[name], value)


def test_losses_match_a_reference_in_numpy():
    """One image, one layer, two targets, three centers, in NumPy."""
    logits, boxes = torch.tensor([[[2.0, -1.0], [-1.0, 0.5], [0.3, -2.0]]]), torch.rand(1, 3, 4) * 0.2 + 0.3
    targets = [dict(labels=torch.tensor([1, 0]), boxes=torch.rand(2, 4) * 0.2 + 0.3)]
    losses = cf.set_losses(dict(logits=logits, boxes=boxes, aux=[]), targets, 4)
    probability = softmax(np.pad(logits[0].numpy(), ((0, 0), (0, 1))), axis=1)  # the last is "no object"
    found = []
    for pair in itertools.permutations(range(3), 2):
        label, likely = -0.1 * np.log(probability[3 - sum(pair), 2]), 0  # of the center without a target
        l1 = giou = 0
        for t, c in enumerate(pair):
            label -= np.log(probability[c, 1 - t])
            likely += probability[c, 1 - t]
            l1 += np.abs(boxes[0, c].numpy() - targets[0]["boxes"][t].numpy()).sum()
            (ax, ay, aw, ah), (bx, by, bw, bh) = boxes[0, c].tolist(), targets[0]["boxes"][t].tolist()
            width = min(ax + aw / 2, bx + bw / 2) - max(ax - aw / 2, bx - bw / 2)
            height = min(ay + ah / 2, by + bh / 2) - max(ay - ah / 2, by - bh / 2)
            shared = max(width, 0) * max(height, 0)
            union = aw * ah + bw * bh - shared
            hull = (max(ax + aw / 2, bx + bw / 2) - min(ax - aw / 2, bx - bw / 2)) * (
                max(ay + ah / 2, by + bh / 2) - min(ay - ah / 2, by - bh / 2)
            )
            giou += 1 - (shared / union - (hull - union) / hull)
        cost = -2 * likely + 5 * l1 + 2 * giou
        found.append((cost, 2 * label, 5 * l1, 2 * giou))
    best = min(found)
    np.testing.assert_allclose([losses[name].item() for name in ("label", "l1", "giou")], best[1:], rtol=1e-4)


def test_mask_costs_at_random_points_average_to_those_at_all_pixels():
    torch.manual_seed(0)
    rectangles = [rectangle(20, 30, 150, 90, (256, 256)), rectangle(100, 10, 220, 250, (256, 256))]
    target = dict(labels=torch.tensor([1, 4]), masks=torch.from_numpy(np.array(rectangles)))
    target["boxes"] = torch.full((2, 4), 0.5)
    masks = F.interpolate(torch.randn(1, 6, 4, 4), (64, 64), mode="bilinear")[0]
    output = dict(logits=torch.zeros(6, 5), boxes=torch.full((6, 4), 0.5), masks=masks)
    mean = torch.stack([cf.matching_cost(output, target, 4) for _ in range(100)]).mean(0)
    full = F.interpolate(output["masks"][None], scale_factor=4.0, mode="bilinear")[0]
    for t, truth in enumerate(target["masks"].float()):
        for k, logits in enumerate(full):
            entropy = F.binary_cross_entropy_with_logits(logits, truth)
            dice = 1 - 2 * (logits.sigmoid() * truth).sum() / (logits.sigmoid() + truth).sum()
            label, box = -2 / 6, -2  # five classes and "no object" are equally likely; the boxes are equal
            assert mean[t, k] == pytest.approx(label + box + 5 * entropy.item() + 5 * dice.item(), abs=0.03)


def test_small_targets_weigh_as_much_as_large_ones_in_the_pixel_loss():
    masks = torch.zeros(2, 16, 16, dtype=torch.bool)
    masks[0, :8], masks[1, 12:, 12:] = True, True
    pixels = torch.randn(1, 3, 4, 4)
    output = dict(logits=torch.zeros(1, 4, 3), boxes=torch.rand(1, 4, 4), masks=torch.zeros(1, 4, 4, 4))
    output |= dict(pixels=pixels, aux=[])
    target = dict(labels=torch.tensor([2, 0]), boxes=torch.rand(2, 4), masks=masks)
    loss = cf.set_losses(output, [target], 4)["pixel"]
    cost = -np.log(softmax(pixels[0].numpy(), axis=0))
    assert loss.item() == pytest.approx(cf.LOSS_WEIGHTS["pixel"] * (cost[2, :2].mean() + cost[0, 3, 3]), rel=1e-4)


def test_points_are_sampled_where_a_mask_is_uncertain():
    masks = torch.linspace(8, -8, 16).repeat(1, 16, 1)  # the border is at x = 32 of 64 pixels
    torch.manual_seed(0)
    points = cf.uncertain_points(masks, 400, (1.0, 1.0)) * 64
    assert points.shape == (1, 400, 2) and 0 <= points.min() and points.max() < 64
    near = ((points[..., 0] - 32).abs() < 12).float().mean()
    assert near > 0.75  # if they were uniform, 24 / 64


@pytest.mark.parametrize("task", DENSE)
def test_each_head_overfits_one_batch(monkeypatch, task):
    # Half as wide and deep as nano: it takes seconds, and still reaches a box IoU of 0.9 and a pixel accuracy of 0.95.
    small = dict(depths=(1, 1, 1, 1), channels=(16, 32, 64, 128), dim=64, levels=(1, 1))
    monkeypatch.setitem(cf.VARIANTS, "nano", small)
    shapes = data.Shapes(100, 64, 0, "train", task)
    images, targets = data.collate([shapes[0, i] for i in (1, 2)])
    images = data.as_float(images)
    model = cf.ClusterFormer(task, "nano", len(shapes.classes), things=shapes.things).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for step in range(120):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, (step + 1) / 10) * (1 - step / 120)
        loss = sum(cf.set_losses(model(images), targets, 4).values()) / sum(len(t["labels"]) for t in targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    for prediction, target in zip(model.predict(images), targets):
        if task in ("det", "inst"):
            n = len(target["labels"])
            corners = box_convert(target["boxes"], "cxcywh", "xyxy") * 64
            overlap, found = box_iou(corners, prediction["boxes"][:n]).max(1)
            assert (overlap > 0.5).all() and torch.equal(prediction["labels"][found], target["labels"])
        else:
            labels = prediction["semantic"] if task == "sem" else torch.full((64, 64), -1)
            for segment in prediction.get("segments", []):
                labels[prediction["panoptic"] == segment["id"]] = segment["label"]
            truth = (target["masks"] * (target["labels"] + 1).view(-1, 1, 1)).sum(0) - 1
            assert (labels == truth)[truth >= 0].float().mean() > 0.75


# ---------------------------------------------------------------------------------------------------------------
# The module in other projects: a copy of the file, a new task, a new variant
# ---------------------------------------------------------------------------------------------------------------
def test_label_smoothing_is_an_argument_of_the_model():
    model, images, labels = random_model(label_smoothing=0.2), torch.rand(3, 3, 64, 64), torch.tensor([1, 7, 7])
    output = model(images)
    log_probability = output["logits"].log_softmax(-1)
    expected = -sum(0.8 * row[label] + 0.2 * row.mean() for row, label in zip(log_probability, labels))
    torch.testing.assert_close(model.loss(output, labels), {"label": expected})
    assert model.count(labels) == 3


def test_the_module_copied_alone_learns_boxes_and_masks(tmp_path):
    """The loop in the README, with this one file in the folder, and nothing else of the project."""
    shutil.copy(cf.__file__, tmp_path)
    example = next(block for block in readme("python") if "model.loss" in block)
    assert len(example.splitlines()) <= 12
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
batches = [([image, image.flip(-1)[:, :, 4:]], [dict(labels=torch.tensor([0, 1]), boxes=boxes, masks=masks),
            dict(labels=torch.tensor([]).long(), boxes=boxes[:0], masks=masks[:0, :, 4:])])] * 12
for task in ("det", "inst"):
    history = []
    exec({example!r}.replace('"inst"', "task").replace('"tiny"', '"nano"'), globals())
    assert sum(history[-3:]) < 0.6 * sum(history[:3]), (task, history)
    (first, _) = model.predict(batches[0][0])
    assert first.keys() - {{"masks"}} == {{"scores", "labels", "boxes"}} and ("masks" in first) == (task == "inst")
assert not {{"train", "eval", "data"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class DepthHead(torch.nn.Module):
    """A task that the module does not have: the depth of each token of the finest map."""

    def __init__(self, backbone, size, num_classes, iterations, label_smoothing, things):
        super().__init__()
        self.depth = torch.nn.Linear(backbone.channels[0], 1)

    def forward(self, maps, layouts):
        return {"depth": self.depth(maps[0])[..., 0]}

    def loss(self, output, targets):
        return {"l1": (output["depth"] - targets).abs().mean((1, 2)).sum()}

    def count(self, targets):
        return len(targets)

    def predict(self, output, image_sizes, sizes):
        return [{"depth": F.interpolate(x[None, None], size)[0, 0]} for x, size in zip(output["depth"], sizes)]


def test_a_new_task_is_one_class_and_one_entry(monkeypatch):
    monkeypatch.setitem(cf.TASKS, "depth", DepthHead)
    model = cf.ClusterFormer("depth", "nano").train()
    images, truth = torch.rand(2, 3, 64, 96), torch.rand(2, 16, 24)
    (sum(model.loss(model(images), truth).values()) / model.count(truth)).backward()
    assert model.backbone.stem[0].weight.grad.abs().sum() > 0
    assert [prediction["depth"].shape for prediction in model.predict(images)] == [(64, 96)] * 2


def test_a_new_variant_is_one_entry(tmp_path, monkeypatch):
    base = dict(depths=(1, 1, 1, 1), channels=(16, 32, 64, 128), dim=64, levels=(2, 1), drop_path=0.4)
    monkeypatch.setitem(cf.VARIANTS, "base", base)
    arguments = ["train.py", "--variant", "base", "--data", str(tmp_path), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert train.parse_settings().drop_path == 0.4
    model = cf.ClusterFormer("det", "base", 3)
    assert model.backbone.channels == (16, 32, 64, 128) and len(model(torch.rand(1, 3, 64, 64))["aux"]) == 2
    monkeypatch.setattr(sys, "argv", [".github/benchmark.py", "--variant", "base"])
    monkeypatch.setattr(benchmark, "benchmark", lambda variant, *_: sys.exit(f"measures {benchmark.peers(variant)}"))
    with pytest.raises(SystemExit, match="swin_t"):
        benchmark.main()


# ---------------------------------------------------------------------------------------------------------------
# What would fail on a GPU, or wait for it
# ---------------------------------------------------------------------------------------------------------------
def one_task(task, sizes, targets):
    """A model, images of these sizes, and their targets: none, or three and one in turn."""
    model = random_model() if task == "cls" else random_dense(task)
    images = [torch.rand(3, *size) for size in sizes]
    if task == "cls":
        return model, torch.stack(images) if len(set(sizes)) == 1 else images, torch.tensor([3, 1])
    found = some_targets(task, [3, 1] * (len(sizes) // 2) if targets else [0] * len(sizes), 64)
    for target, (height, width) in zip(found, sizes):
        if "masks" in target:
            target["masks"] = F.pad(target["masks"], (0, 64, 0, 64))[:, :height, :width]
    return model, images, found


class InMemory:
    """The part of a data set that evaluation needs, computed in advance."""

    def __init__(self, task, size):
        shapes = data.Shapes(2, size, 0, "val", task)
        self.classes, self.things, self.categories = shapes.classes[:5], shapes.things[:5], shapes.categories
        self.maps = [shapes.label_map(i).clamp(max=4) for i in range(2)]
        self.label_map = lambda index: self.maps[index]
        segments = [dict(id=i + 1, category_id=i + 1, iscrowd=0) for i in range(5)]
        self.segments = lambda index: (self.maps[index] + 1, segments)


@pytest.mark.parametrize("task", cf.TASKS)
@pytest.mark.parametrize("targets", [True, False])
@pytest.mark.parametrize("second", [(64, 64), (96, 128), (61, 62)])  # equal; unequal; equal in tokens only
def test_every_tensor_is_created_on_the_device_of_the_images(task, second, targets):
    """A tensor created without a device is on "meta" here, and using it together with the images is an error."""
    model, images, found = one_task(task, ((64, 64), second), targets)
    truth = InMemory(task, 64)
    with torch.device("meta"):
        losses = model.loss(model.train()(images), found)
        sum(losses.values()).backward()
        model.eval()(images)
        predictions = model.predict(images, [(64, 64), (64, 64)])
        for index, prediction in enumerate(predictions):
            evaluation.score_image(truth, task, 1 if task == "cls" else dict(index=index), prediction, None)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.skipif(torch.__version__ < (2, 15), reason="torch 2.6 asks a driver how to convolve; 2.15 is known not to")
@pytest.mark.parametrize("task", cf.TASKS)
@pytest.mark.parametrize("training", [True, False])
def test_all_dtypes_agree_under_autocast_for_cuda(task, training):
    """Fake tensors on a fake GPU: nothing is computed, but a product of two dtypes is still an error."""
    model, images, _ = one_task(task, ((64, 64), (64, 64)), False)
    dtypes = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    with FakeTensorMode():
        fake = lambda x: torch.empty(x.shape, dtype=x.dtype, device="cuda", requires_grad=x.requires_grad)
        weights = {name: fake(x) for name, x in itertools.chain(model.named_parameters(), model.named_buffers())}
        torch.set_autocast_enabled("cuda", True)  # torch.autocast("cuda") is off without a GPU
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            output = torch.func.functional_call(model.train(training), weights, torch.rand(2, 3, 64, 64, device="cuda"))
        finally:
            torch.set_autocast_enabled("cuda", dtypes[0])
            torch.set_autocast_dtype("cuda", dtypes[1])
    for prediction in [output, *output.get("aux", [])]:
        assert all(value.device.type == "cuda" for key, value in prediction.items() if key != "aux")
        assert {prediction[key].dtype for key in prediction.keys() & {"logits", "boxes"}} == {torch.float32}
        assert "masks" not in prediction or prediction["masks"].dtype == torch.bfloat16  # so autocast was on


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a GPU: copies to it, reads of values, shapes that depend on values."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.count = Counter()
        for name in ("cpu", "new_tensor", "tolist"):
            monkeypatch.setattr(torch.Tensor, name, self.counted(name, getattr(torch.Tensor, name)))

    def counted(self, name, original):
        def method(*arguments, **options):
            self.count[name] += 1
            return original(*arguments, **options)

        return method

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__
        if name in ("_local_scalar_dense", "is_nonzero", "equal", "masked_select", "_unique2", "nonzero"):
            self.count[name] += 1
        if name.startswith(("index", "_index")) and any(getattr(i, "dtype", None) == torch.bool for i in args[1] or ()):
            self.count["index by a mask"] += 1
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("count", [2, 4])
def test_the_losses_of_inst_wait_for_a_gpu_once(count, monkeypatch):
    """For the matching costs, for any number of images; a training step also waits for the losses of the log."""
    model, images, found = one_task("inst", ((64, 64), (96, 80), (64, 96), (70, 64))[:count], True)
    waits = Waits(monkeypatch)
    with waits:
        losses = model.loss(model.train()(images), found)
        sum(losses.values()).backward()
    layouts = 5  # of four maps and the grid; their sizes are on the host, so no wait
    assert waits.count == {"cpu": 1, "tolist": layouts}


# ---------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------
def test_shapes_are_a_function_of_seed_epoch_and_index():
    shapes = data.Shapes(100, 64, seed=3, split="train")
    image, label = shapes[2, 7]
    again, same_label = data.Shapes(100, 64, seed=3, split="train")[2, 7]
    assert torch.equal(image, again) and label == same_label
    assert image.dtype == torch.uint8 and image.shape == (3, 64, 64)
    assert torch.equal(data.as_float(image), image / 255) and data.as_float([image])[0].dtype == torch.float32
    for other in (shapes[2, 8], shapes[3, 7], data.Shapes(100, 64, seed=4, split="train")[2, 7]):
        assert not torch.equal(image, other[0])
    held_out = data.Shapes(100, 64, seed=3, split="val")[0, 7][0]
    assert torch.equal(held_out, data.Shapes(100, 64, seed=4, split="val")[0, 7][0])
    assert not torch.equal(held_out, data.Shapes(100, 64, seed=3, split="train")[0, 7][0])


def test_the_label_of_shapes_is_the_class_of_the_largest_thing():
    largest = []
    for index in range(200):
        rng = np.random.default_rng(index)
        things, label = data.dominant_thing(rng)
        _, segments = data.draw_scene(rng, 64, things)
        areas = [(segments == i).sum() for i in range(len(things))]
        largest.append(things[int(np.argmax(areas))][0] == label)
        assert len(np.unique(segments[segments < 0])) >= 2 and segments.min() >= -len(data.STUFF)
    assert np.mean(largest) > 0.99


def test_color_and_brightness_do_not_reveal_the_class():
    shapes = data.Shapes(3000, 64, seed=0, split="train")
    images, labels = zip(*[shapes[0, i] for i in range(3000)])
    images = data.as_float(list(images))
    middles = [x[:, 16:48, 16:48].mean((1, 2)) for x in images]
    features = torch.stack([torch.cat([middle, x.mean((1, 2)), x.std((1, 2))]) for middle, x in zip(middles, images)])
    features = torch.cat([features, torch.ones(3000, 1)], 1)
    labels = torch.tensor(labels)
    fit = torch.linalg.lstsq(features[:2000], F.one_hot(labels[:2000], len(data.THINGS)).float()).solution
    accuracy = ((features[2000:] @ fit).argmax(1) == labels[2000:]).float().mean()
    assert len(data.THINGS) >= 8 and accuracy < 0.20  # chance is 0.125, with 1,000 images +- 0.01


def test_a_global_batch_is_the_same_however_it_is_split():
    def batches(world_size, accumulate, **arguments):
        split = world_size, accumulate
        parts = [list(data.GlobalBatches(50, 12, 9, 5, rank, *split, **arguments)) for rank in range(world_size)]
        assert all(len(part) == len(parts[0]) for part in parts)
        steps = len(parts[0]) // accumulate
        return [sum((key for p in parts for key in p[s * accumulate : (s + 1) * accumulate]), []) for s in range(steps)]

    whole = batches(1, 1)
    assert len(whole) == 9 and whole == batches(2, 1) == batches(3, 2) == batches(1, 4)
    for epoch in range(2):
        seen = sum(whole[4 * epoch : 4 * epoch + 4], [])
        assert {e for e, _ in seen} == {epoch} and len(set(seen)) == 48  # no duplicates
    assert batches(2, 1, first_step=5) == whole[5:]


def test_mixup_and_cutmix_are_the_same_however_the_global_batch_is_split():
    pixels, labels = torch.rand(50, 3, 8, 8), torch.arange(50) % 7

    def mixed(world_size, accumulate, step):
        chunks = []
        for rank in range(world_size):
            keys = list(data.GlobalBatches(50, 12, 9, 5, rank, world_size, accumulate, neighbor=True))
            for part in keys[step * accumulate : (step + 1) * accumulate]:
                index = [i for _, i in part]
                chunks.append(data.mix(pixels[index], labels[index], 7, 0.8, 1.0, 5, step))
        return [torch.cat(x) for x in zip(*chunks)]

    for step in range(6):
        images, targets = mixed(1, 1, step)
        for split in [(2, 1), (3, 2), (1, 6)]:
            other, other_targets = mixed(*split, step)
            assert torch.equal(images, other) and torch.equal(targets, other_targets)
        torch.testing.assert_close(targets.sum(1), torch.ones(12))
    assert not torch.equal(mixed(1, 1, 0)[1].sort().values, mixed(1, 1, 4)[1].sort().values)


def write_images(root, split, classes, count=3, size=(40, 50)):
    rng = np.random.default_rng(0)
    for name in classes:
        folder = root / split / name
        folder.mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{i}.png")


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path, "train", ["cat", "dog"], 8)
    write_images(tmp_path, "val", ["cat", "dog"], 3)
    return tmp_path


def test_augmentation_depends_on_seed_epoch_and_index_only_for_any_number_of_workers(folder):
    images = data.Folder(folder, "train", data.train_transform(32, 27, 0.25), seed=1)
    keys = [[(epoch, i) for i in range(16)] for epoch in (0, 1)]
    torch.manual_seed(0)
    alone = [x for x, _ in DataLoader(images, batch_sampler=keys)]
    torch.manual_seed(99)
    workers = [x for x, _ in DataLoader(images, batch_sampler=keys, num_workers=2)]
    assert all(torch.equal(a, b) for a, b in zip(alone, workers)) and not torch.equal(*alone)
    torch.manual_seed(0)
    images[0, 0]
    undisturbed = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(undisturbed, torch.rand(3))


def test_randaugment_applies_each_of_two_operations_to_half_of_the_images():
    image, same = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)), 0
    plain, augmented = data.train_transform(32, 0, 0), data.train_transform(32, 27, 0)
    for seed in range(300):
        with data.seeded(seed):
            expected = plain(image)
        with data.seeded(seed):
            same += torch.equal(augmented(image), expected)
    assert 0.2 < same / 300 < 0.45  # a quarter gets neither; 1 of 14 operations is the identity


def test_erased_rectangles_have_the_mean_color():
    with data.seeded(0):
        image = data.train_transform(32, 0, 1.0)(Image.new("RGB", (40, 40), "white"))
    assert image.dtype == torch.uint8
    assert image.flatten(1).unique(dim=1).T.tolist() == [[124, 116, 104], [255, 255, 255]]


def test_images_of_every_kind_are_read_correctly(tmp_path):
    rgb = np.zeros((40, 60, 3), np.uint8)
    rgb[:20], rgb[20:, :30], rgb[20:, 30:] = (200, 40, 40), (40, 200, 40), (40, 40, 200)
    upright = Image.fromarray(rgb)
    gray = np.arange(40 * 60, dtype=np.uint16).reshape(40, 60) * 27
    Image.fromarray(gray).save(tmp_path / "16bit.png")
    upright.convert("L").save(tmp_path / "gray.png")
    upright.quantize(8).save(tmp_path / "palette.png")
    upright.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    upright.convert("RGBA").save(tmp_path / "alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated: rows of the file are columns of the picture
    upright.rotate(90, expand=True).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    for name in ("palette.png", "cmyk.jpg", "alpha.png", "turned.jpg"):
        read = data.load_image(tmp_path / name)
        assert read.mode == "RGB" and read.size == (60, 40)
        assert np.abs(np.asarray(read).astype(int) - rgb)[[5, 35, 35], [30, 10, 50]].max() < 12, name
    assert np.array_equal(np.asarray(data.load_image(tmp_path / "gray.png"))[..., 0], np.asarray(upright.convert("L")))
    assert np.abs(np.asarray(data.load_image(tmp_path / "16bit.png"))[..., 1] - gray / 257).max() <= 1


# ---------------------------------------------------------------------------------------------------------------
# Data of the dense tasks: shapes, COCO's layout, ADE20K's layout
# ---------------------------------------------------------------------------------------------------------------
UNCHANGED = v2.RandomHorizontalFlip(p=0.0)


def rectangle(top, left, bottom, right, size=(40, 60)):
    mask = np.zeros(size, bool)
    mask[top:bottom, left:right] = True
    return mask


def runs(mask):
    """COCO's uncompressed run lengths of a mask: column by column, zeros first."""
    flat, lengths, value = mask.T.ravel(), [], False
    while len(flat):
        change = np.flatnonzero(flat != value)
        lengths.append(int(change[0]) if len(change) else len(flat))
        flat, value = flat[lengths[-1] :], not value
    return dict(size=list(mask.shape), counts=lengths)


def write_coco(root, split="train"):
    """Two images of 60 x 40; a polygon, an RLE, a crowd, a box across the border, an object without area."""
    (root / f"{split}2017").mkdir()
    (root / "annotations").mkdir(exist_ok=True)
    for name in ("a", "b"):
        Image.fromarray(np.full((40, 60, 3), 100, np.uint8)).save(root / f"{split}2017" / f"{name}.png")
    objects = [
        dict(category_id=90, bbox=[10, 5, 20, 10], segmentation=[[10, 5, 30, 5, 30, 15, 10, 15]], iscrowd=0),
        dict(category_id=7, bbox=[40, 20, 10, 15], segmentation=runs(rectangle(20, 40, 35, 50)), iscrowd=0),
        dict(category_id=7, bbox=[0, 0, 60, 40], segmentation=runs(rectangle(0, 0, 40, 60)), iscrowd=1),
        dict(category_id=7, bbox=[50, -5, 20, 15], segmentation=runs(rectangle(0, 50, 10, 60)), iscrowd=0),
        dict(category_id=7, bbox=[20, 20, 0, 5], segmentation=[[20, 20, 20, 25, 20, 22]], iscrowd=0),
    ]
    content = dict(
        images=[dict(id=i, file_name=f"{name}.png", width=60, height=40) for i, name in ((5, "a"), (3, "b"))],
        annotations=[dict(id=i, image_id=5, area=1, **entry) for i, entry in enumerate(objects)],
        categories=[dict(id=90, name="kite"), dict(id=7, name="boat")],
    )
    (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return content


def test_coco_annotations_of_every_form_are_read_correctly(tmp_path):
    write_coco(tmp_path)
    coco = data.Coco(tmp_path, "train", "inst", UNCHANGED, crop=1000)
    assert coco.classes == ["boat", "kite"] and coco.categories == [7, 90] and len(coco) == 2
    assert coco.dropped == 1  # the one without area; the crowd is no training target, either
    image, target = coco[0, 1]  # images are sorted by id
    assert image.shape == (3, 40, 60) and image.dtype == torch.uint8 and (image == 100).all()
    expected = [rectangle(5, 10, 15, 30), rectangle(20, 40, 35, 50), rectangle(0, 50, 10, 60)]
    assert target["labels"].tolist() == [1, 0, 0] and np.array_equal(target["masks"].numpy(), expected)
    boxes = torch.tensor([[20, 10, 20, 10], [45, 27.5, 10, 15], [55, 5, 10, 10]]) / torch.tensor([60, 40, 60, 40])
    torch.testing.assert_close(target["boxes"], boxes)
    torch.testing.assert_close(data.Coco(tmp_path, "train", "det", UNCHANGED, crop=1000)[0, 1][1]["boxes"], boxes)
    _, nothing = coco[0, 0]  # an image without objects is trained on, too
    assert nothing["boxes"].shape == (0, 4) and nothing["masks"].shape == (0, 40, 60)
    assert len(coco.coco().anns) == 4  # with the crowd, without the object without area


def test_a_flipped_image_has_flipped_boxes_and_masks(tmp_path):
    write_coco(tmp_path)
    straight = data.Coco(tmp_path, "train", "inst", UNCHANGED, crop=1000)[0, 1][1]
    for task in ("det", "inst"):
        flipped = data.Coco(tmp_path, "train", task, v2.RandomHorizontalFlip(p=1.0), crop=1000)[0, 1][1]
        mirrored = straight["boxes"] * torch.tensor([-1, 1, 1, 1]) + torch.tensor([1, 0, 0, 0])
        torch.testing.assert_close(flipped["boxes"], mirrored)
    assert torch.equal(flipped["masks"], straight["masks"].flip(-1))


def test_a_crop_keeps_visible_objects_and_depends_on_seed_epoch_and_index_only(tmp_path):
    write_coco(tmp_path)
    jitter = v2.ScaleJitter((40, 60), scale_range=(0.5, 2.0))
    coco = data.Coco(tmp_path, "train", "inst", jitter, crop=24, seed=4)
    counts = set()
    for epoch in range(20):
        image, target = coco[epoch, 1]
        assert max(image.shape[-2:]) <= 24 and target["masks"].shape[-2:] == image.shape[-2:]
        assert target["masks"].flatten(1).any(1).all() and len(target["labels"]) == len(target["boxes"])
        for box, mask in zip(target["boxes"], target["masks"]):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            corners = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            size = image.shape[-1], image.shape[-2]
            expected = [(corners[i] + corners[i + 2]) / 2 / size[i] for i in (0, 1)]
            expected += [(corners[i + 2] - corners[i]) / size[i] for i in (0, 1)]
            np.testing.assert_allclose(box, expected, rtol=1e-5)
        counts.add(len(target["labels"]))
        assert torch.equal(image, coco[epoch, 1][0])
    assert len(counts) > 1


def write_panoptic(root, split="train"):
    """One image of 60 x 40: sky (stuff), two boats, a crowd of boats, the rest is void."""
    (root / f"{split}2017").mkdir(exist_ok=True)
    maps = root / "annotations" / f"panoptic_{split}2017"
    maps.mkdir(parents=True)
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(root / f"{split}2017" / "a.png")
    ids = np.zeros((40, 60), int)
    ids[:10], ids[12:20, :10], ids[12:20, 20:30], ids[30:] = 70000, 258, 3, 9
    Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)).save(maps / "a.png")
    table = [(70000, 40, 0), (258, 1, 0), (3, 1, 0), (9, 1, 1)]
    segments = [dict(id=number, category_id=category, iscrowd=crowd) for number, category, crowd in table]
    content = dict(
        images=[dict(id=1, file_name="a.png", width=60, height=40)],
        annotations=[dict(image_id=1, file_name="a.png", segments_info=segments)],
        categories=[dict(id=1, name="boat", isthing=1), dict(id=40, name="sky", isthing=0)],
    )
    (root / "annotations" / f"panoptic_{split}2017.json").write_text(json.dumps(content))
    return ids


def test_panoptic_maps_are_read_correctly(tmp_path):
    ids = write_panoptic(tmp_path)
    coco = data.Coco(tmp_path, "train", "pan", UNCHANGED, crop=1000)
    assert coco.classes == ["boat", "sky"] and coco.things == [True, False]
    assert np.array_equal(coco.segments(0)[0], ids)
    target = coco[0, 0][1]
    assert target["labels"].tolist() == [1, 0, 0]  # no crowd
    assert np.array_equal(target["masks"].numpy(), [ids == 70000, ids == 258, ids == 3])


def write_ade(root, names=True):
    rng = np.random.default_rng(0)
    for split in ("training", "validation"):
        (root / "images" / split).mkdir(parents=True)
        (root / "annotations" / split).mkdir(parents=True)
        for name in ("a", "b"):
            image, labels = rng.integers(0, 256, (40, 60, 3), np.uint8), rng.integers(0, 4, (40, 60), np.uint8)
            Image.fromarray(image).save(root / "images" / split / f"{name}.jpg")
            Image.fromarray(labels).save(root / "annotations" / split / f"{name}.png")
    if names:
        rows = [f"{i}\t0.1\t1\t1\t{name}\n" for i, name in enumerate(("wall, x", "sky", "tree"), 1)]
        (root / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n" + "".join(rows))


@pytest.mark.parametrize("names", [True, False])
def test_label_maps_are_read_correctly(tmp_path, names):
    write_ade(tmp_path, names)
    ade = data.Ade(tmp_path, "train", UNCHANGED, crop=1000)
    assert ade.classes == (["wall", "sky", "tree"] if names else ["1", "2", "3"]) and len(ade) == 2
    labels = np.asarray(Image.open(tmp_path / "annotations" / "training" / "b.png"))
    assert np.array_equal(ade.label_map(1), labels.astype(int) - 1)
    image, target = ade[0, 1]
    assert target["labels"].tolist() == [0, 1, 2]
    assert np.array_equal(target["masks"].numpy(), [labels == 1, labels == 2, labels == 3])
    held_out = data.Ade(tmp_path, "val", v2.Resize(80), classes=ade.classes)
    image, target = held_out[0, 0]
    assert image.shape == (3, 80, 120) and target == dict(index=0, size=(40, 60))


def flood(seen, start):
    """The cells, of a set of (row, column), that are connected with one of them, also diagonally."""
    reached, edge = {start}, [start]
    while edge:
        row, column = edge.pop()
        near = {(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & seen - reached
        reached |= near
        edge += near
    return reached


def test_regions_of_a_class_match_a_flood_fill_and_small_ones_join_the_largest():
    rng = np.random.default_rng(0)
    for size in [(64, 64), (50, 71)]:
        blobs = rng.standard_normal((3, *size))
        for _ in range(3):
            blobs = blobs / 5 + sum(np.roll(blobs, shift, axis) / 5 for axis in (1, 2) for shift in (1, -1))
        owner = np.concatenate([blobs, np.full((1, *size), 0.3)]).argmax(0)  # 3: void
        masks = torch.from_numpy(owner == np.arange(3)[:, None, None])
        labels = torch.tensor([4, 0, 2])
        got = data.by_regions(data.target_of(labels, None, masks, size))
        expected = []
        for label, mask in zip(labels.tolist(), masks.numpy()):
            left, parts = {(y // 4, x // 4) for y, x in np.argwhere(mask)}, []
            while left:
                cells = flood(left, next(iter(left)))
                left -= cells
                parts.append([p for p in map(tuple, np.argwhere(mask)) if (p[0] // 4, p[1] // 4) in cells])
            parts.sort(key=len)
            small = [part for part in parts[:-1] if len(part) < mask.size / 400]
            expected += [(label, frozenset(part)) for part in parts[len(small) : -1]]
            expected.append((label, frozenset(itertools.chain(parts[-1], *small))))
        regions = [frozenset(map(tuple, np.argwhere(mask))) for mask in got["masks"].numpy()]
        found = list(zip(got["labels"].tolist(), regions))
        assert len(found) == len(expected) > 5 and set(found) == set(expected)
    nothing = data.target_of(labels[:0], None, masks[:0], size)
    assert data.by_regions(nothing) is nothing


def edit_json(change, kind="instances"):
    def damage(root):
        path = root / "annotations" / f"{kind}_train2017.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return damage


def changed(table, index, kind="instances", **change):
    return edit_json(lambda c: c[table][index].update(change), kind)


def without(table, index, key, kind="instances"):
    return edit_json(lambda c: c[table][index].pop(key), kind)


def edit_segments(change):
    return edit_json(lambda c: change(c["annotations"][0]["segments_info"]), "panoptic")


RUNS = runs(rectangle(20, 40, 35, 50))  # the mask of object 1 in write_coco()
INSTANCES, MAPS = "annotations/instances_train2017.json", "annotations/training"


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def break_panoptic(root):
    cut_in_half(root / "annotations" / "panoptic_train2017" / "a.png")


def refusal(read):
    """The one-line message with which data are refused."""
    with pytest.raises(data.InputError) as error:
        read()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "damage, complaint",
    [
        (lambda root: (root / INSTANCES).unlink(), "instances_train2017.json: not there"),
        (lambda root: (root / "train2017").rename(root / "train"), "train2017: not there"),
        (lambda root: (root / "train2017" / "b.png").unlink(), "image 3, b.png, is not in"),
        (lambda root: cut_in_half(root / INSTANCES), "not a readable JSON file"),
        (edit_json(lambda c: c.pop("categories")), "it has no categories"),
        (changed("annotations", 1, category_id=8), "annotation 1 has category 8"),
        (changed("annotations", 1, image_id=8), "annotation 1 is of image 8"),
        (edit_json(lambda c: c.update(annotations=c["annotations"][2:3])), "no usable annotation"),
        (edit_json(lambda c: [a.pop("segmentation") for a in c["annotations"]]), "in it: 5 objects have no mask"),
        (lambda root: Image.new("RGB", (61, 40)).save(root / "train2017" / "a.png"), "a.png: 61 x 40 pixels"),
        (lambda root: (root / INSTANCES).write_text("[]"), "it has no images, categories, annotations"),
        (lambda root: (root / INSTANCES).write_text("7"), "not in COCO's format"),
        (edit_json(lambda c: c.update(images={})), "it has no images"),
        (without("annotations", 1, "image_id"), "annotations[1] has no usable image_id"),
        (without("annotations", 1, "category_id"), "annotations[1] has no usable category_id"),
        (without("annotations", 1, "bbox"), "annotations[1] has no usable bbox"),
        (edit_json(lambda c: c["annotations"].insert(1, None)), "s[1] has no usable image_id, category_id, bbox"),
        (changed("annotations", 1, bbox=[1, 2, 3]), "annotation 1 has bbox [1, 2, 3], which is not four"),
        (changed("annotations", 1, bbox=[1, 2, 3, None]), "annotation 1 has bbox [1, 2, 3, None]"),
        (without("images", 1, "file_name"), "images[1] has no usable file_name"),
        (changed("images", 1, height="tall"), "images[1] has no usable height"),
        (changed("images", 1, id=5), "two images, or two categories, have the same id"),
        (without("categories", 1, "name"), "categories[1] has no usable name"),
        (changed("annotations", 1, segmentation=RUNS | dict(size=[60, 40])), "annotation 1 has a mask that is neither"),
        (changed("annotations", 1, segmentation=RUNS | dict(counts=[7, 9])), "annotation 1 has a mask that is neither"),
        (changed("annotations", 1, segmentation=[1, 2, 3, 4, 5, 6]), "annotation 1 has a mask that is neither"),
        (changed("annotations", 0, segmentation=[["x"] * 6]), "annotation 0 has a mask that is neither"),
        (changed("annotations", 0, segmentation=[[0, 0, 9, 0, 9, 1e9]]), "annotation 0 has a polygon far outside"),
    ],
)
def test_one_line_says_what_is_wrong_with_coco_files(tmp_path, damage, complaint):
    write_coco(tmp_path)
    damage(tmp_path)
    assert complaint in refusal(lambda: data.Coco(tmp_path, "train", "inst", UNCHANGED, crop=1000)[0, 1])


def wrong_map(root):
    Image.fromarray(np.zeros((40, 61, 3), np.uint8)).save(root / "annotations" / "panoptic_train2017" / "a.png")


@pytest.mark.parametrize(
    "damage, complaint",
    [
        (lambda root: (root / "annotations/panoptic_train2017").rename(root / "x"), "no such folder of panoptic PNGs"),
        (wrong_map, "a.png: 61 x 40 pixels, a.png has 60 x 40"),
        (edit_segments(lambda segments: segments.pop(2)), "segment 3 has no entry in"),
        (edit_segments(lambda segments: segments[0].update(category_id=2)), "a.png has category 2"),
        (without("annotations", 0, "segments_info", "panoptic"), "annotations[0] has no usable segments_info"),
        (edit_segments(lambda segments: segments[1].pop("id")), "a segment of annotations[0] has no usable id"),
        (changed("annotations", 0, "panoptic", segments_info=[]), "no usable annotation"),
        (changed("annotations", 0, "panoptic", file_name="b.png"), "image 1, b.png, is not in"),
        (break_panoptic, "a.png: cannot be read as an image"),
    ],
)
def test_one_line_says_what_is_wrong_with_panoptic_files(tmp_path, damage, complaint):
    write_panoptic(tmp_path)
    damage(tmp_path)
    assert complaint in refusal(lambda: data.Coco(tmp_path, "train", "pan", UNCHANGED, crop=1000)[0, 0])


@pytest.mark.parametrize(
    "damage, complaint",
    [
        (lambda root: (root / MAPS / "b.png").unlink(), "no label map of b.jpg"),
        (lambda root: (root / "images" / "training").rename(root / "images" / "train"), "training: no such folder"),
        (lambda root: Image.new("L", (60, 40), 9).save(root / MAPS / "b.png"), "label 9 in it"),
        (lambda root: Image.new("L", (50, 40), 1).save(root / MAPS / "b.png"), "its label map has 50 x 40"),
        (lambda root: [Image.new("L", (60, 40)).save(path) for path in (root / MAPS).iterdir()], "no labeled pixel"),
        (lambda root: [path.write_bytes(b"") for path in (root / MAPS).iterdir()], "no labeled pixel"),
        (lambda root: Image.new("RGB", (60, 40), "red").save(root / MAPS / "b.png"), "b.png: colors in it"),
        (lambda root: (root / "objectInfo150.txt").write_text(""), "objectInfo150.txt: no classes in it"),
    ],
)
def test_one_line_says_what_is_wrong_with_ade_files(tmp_path, damage, complaint):
    write_ade(tmp_path)
    damage(tmp_path)
    assert complaint in refusal(lambda: data.Ade(tmp_path, "train", UNCHANGED, crop=1000)[0, 1])


@pytest.mark.parametrize("size", [(480, 640), (640, 480), (20, 700), (3000, 1), (7, 5)])
def test_any_image_is_rescaled_to_a_valid_size_in_its_aspect_ratio(size):
    image = tv_tensors.Image(torch.zeros(3, *size, dtype=torch.uint8))
    height, width = data.dense_eval_transform(800, 1333)(image).shape[-2:]
    fits = min(800 / min(size), 1333 / max(size))
    assert (height, width) == (max(32, round(size[0] * fits)), max(32, round(size[1] * fits)))
    boxes = data.box_tensor([[0, 0, size[1], size[0]]], size)
    masks = torch.ones(1, *size, dtype=torch.bool)
    for task, crop in (("inst", 128), ("sem", 64)):
        transform, shapes = data.dense_train_transform(task, crop), set()
        for index in range(30):
            with data.seeded(index):
                image_, target = data.training_sample(image, [3], boxes, masks, transform, crop)
            shapes.add(tuple(image_.shape[-2:]))
            assert 32 <= min(image_.shape[-2:]) and max(image_.shape[-2:]) <= crop
            assert target["masks"].all() and target["masks"].dtype == torch.bool and target["labels"].tolist() == [3]
            torch.testing.assert_close(target["boxes"], torch.tensor([[0.5, 0.5, 1, 1]]))
        assert len(shapes) > 1 or task == "sem"  # whose short side is never less than half of the crop


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (20_000, 30), (30, 20_000)])
def test_images_of_any_shape_are_classified(tmp_path, size):
    for split in ("train", "val"):
        (tmp_path / split / "cat" / "folder.jpg").mkdir(parents=True)  # a folder, not an image
        Image.new("RGB", size, (255, 0, 0)).save(tmp_path / split / "cat" / "a.jpg")
    for split, transform in (("train", data.train_transform(32, 9, 0.0)), ("val", data.eval_transform(32))):
        images = data.Folder(tmp_path, split, transform)
        assert len(images) == 1 and images[0, 0][0].shape == (3, 32, 32)


def test_jitter_samples_scales_uniformly_and_keeps_boxes_on_their_masks():
    mask = torch.zeros(1, 100, 150, dtype=torch.bool)
    mask[:, 20:70, 30:120] = True
    image = tv_tensors.Image(torch.where(mask, 255, 0).to(torch.uint8).repeat(3, 1, 1))
    jitter, factors = data.dense_train_transform("det", 600), []
    for index in range(200):
        with data.seeded(index):
            boxes = data.box_tensor([[30, 20, 120, 70]], (100, 150))
            image_, target = data.training_sample(image, [0], boxes, None, jitter, 2000)
        factors.append(max(image_.shape) / 600)
        x, y, w, h = (target["boxes"][0] * torch.tensor([*image_.shape[:0:-1]] * 2)).tolist()
        bright = (image_[0] > 127).nonzero()
        (top, left), (bottom, right) = bright.min(0).values.tolist(), (bright.max(0).values + 1).tolist()
        corners = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
        np.testing.assert_allclose(corners, [left, top, right, bottom], atol=0.6)
    assert min(factors) < 0.15 and max(factors) > 1.95 and abs(np.mean(factors) - 1.05) < 0.1


def test_augmentation_of_label_maps_changes_colors_and_keeps_labels(tmp_path):
    write_ade(tmp_path)
    plain = data.Ade(tmp_path, "train", UNCHANGED, crop=1000)
    colored = data.Ade(tmp_path, "train", data.dense_train_transform("sem", 64), crop=1000, seed=1)
    areas = plain[0, 0][1]["masks"].float().mean((1, 2))
    for epoch in range(5):
        image, target = colored[epoch, 0]
        assert 32 <= min(image.shape[-2:]) <= 128 and abs(max(image.shape) / min(image.shape[-2:]) - 1.5) < 0.1
        assert target["labels"].tolist() == [0, 1, 2] and (target["masks"].sum(0) <= 1).all()
        torch.testing.assert_close(target["masks"].float().mean((1, 2)), areas, atol=0.05, rtol=0)
        assert torch.equal(image, colored[epoch, 0][0]) and not torch.equal(image, colored[epoch + 1, 0][0])


@pytest.mark.parametrize("count", [1, 20, 300])
def test_augmenting_a_label_map_equals_augmenting_its_masks_one_by_one(count):
    rng = np.random.default_rng(count)
    numbers = (rng.choice(2**24 - 1, count, replace=False) + 1).tolist()
    ids = torch.from_numpy(np.array([0, *numbers])[np.kron(rng.integers(0, count + 1, (20, 30)), np.ones((4, 4), int))])
    image, labels = tv_tensors.Image(torch.zeros(3, 80, 120, dtype=torch.uint8)), rng.integers(0, 9, count).tolist()
    once, each = data.positions(ids, numbers), ids == torch.tensor(numbers).view(-1, 1, 1)
    for task in ("pan", "sem"):
        for index in range(5):
            targets = []
            for masks in (once, each):
                with data.seeded(index):
                    transform = data.dense_train_transform(task, 64)
                    targets.append(data.training_sample(image, labels, None, masks, transform, 64)[1])
            assert all(torch.equal(targets[0][name], targets[1][name]) for name in ("labels", "boxes", "masks"))


def test_an_image_without_objects_is_augmented_like_any_other(tmp_path):
    write_coco(tmp_path)
    for task in ("det", "inst"):
        coco = data.Coco(tmp_path, "train", task, data.dense_train_transform(task, 64), crop=64)
        images, targets = next(iter(DataLoader(coco, batch_sampler=[[(0, 0), (0, 1)]], collate_fn=data.collate)))
        assert isinstance(images, list) and isinstance(targets, list)
        assert targets[0]["boxes"].shape == (0, 4) and len(targets[1]["boxes"])
        if task == "inst":
            assert targets[0]["masks"].shape == (0, *images[0].shape[-2:])


def test_an_image_too_large_for_memory_counts_as_unreadable(tmp_path, monkeypatch):
    Image.new("L", (60, 40)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert "a.png: cannot be read as an image" in refusal(lambda: data.load_image(tmp_path / "a.png"))


@pytest.mark.parametrize("workers", [0, 2])
def test_training_skips_a_broken_image_and_reports_it_once(folder, capfd, workers):
    cut_in_half(folder / "train" / "cat" / "3.png")
    (folder / "train" / "cat" / "4.png").write_text("this is no image")
    (folder / "train" / "dog" / "7.png").write_bytes(b"")  # the last index: the first one comes next
    images = data.Folder(folder, "train", data.train_transform(32, 0, 0))
    whole = data.SkipBroken(images, workers)
    keys = [[(epoch, i) for i in range(16)] for epoch in (0, 1)]
    batches = list(DataLoader(whole, batch_sampler=keys, num_workers=workers))
    for epoch, (pixels, labels) in enumerate(batches):
        for index, instead in ((2, 2), (3, 5), (4, 5), (15, 0)):
            assert torch.equal(pixels[index], images[epoch, instead][0]) and labels[index] == images[epoch, instead][1]
    reported = [line for line in capfd.readouterr().err.splitlines() if line.startswith("skipped: ")]
    assert [any(name in line for line in reported) for name in ("cat/3.png", "cat/4.png", "dog/7.png")] == [True] * 3
    assert len(set(reported)) == 3 and whole.broken.nonzero().flatten().tolist() == [3, 4, 15]
    assert workers or len(reported) == 3


def second_panoptic_image_without_sky(content):
    entry = content["annotations"][0]
    content["images"].append(content["images"][0] | dict(id=0))
    content["annotations"].append(entry | dict(image_id=0, segments_info=entry["segments_info"][1:]))


@pytest.mark.parametrize("task", ["inst", "det", "sem", "pan"])
def test_dense_training_skips_a_broken_image_too(tmp_path, capfd, task):
    if task == "sem":
        write_ade(tmp_path)
        cut_in_half(tmp_path / "annotations" / "training" / "a.png")
        dataset = data.Ade(tmp_path, "train", UNCHANGED, crop=1000)
    elif task == "pan":
        write_panoptic(tmp_path)
        edit_json(second_panoptic_image_without_sky, "panoptic")(tmp_path)
        dataset = data.Coco(tmp_path, "train", "pan", UNCHANGED, crop=1000)
    else:
        write_coco(tmp_path)
        Image.new("RGB", (61, 40)).save(tmp_path / "train2017" / "b.png")
        dataset = data.Coco(tmp_path, "train", task, UNCHANGED, crop=1000)
    whole = data.SkipBroken(dataset)
    assert torch.equal(whole[0, 0][0], whole[0, 1][0]) and whole.broken.tolist() == [True, False]
    assert capfd.readouterr().err.count("skipped: ") == 1


def test_many_broken_images_are_an_error(folder):
    for name in ("cat", "dog"):
        for i in range(8):
            if (name, i) != ("dog", 7):
                cut_in_half(folder / "train" / name / f"{i}.png")
    images = data.Folder(folder, "train", data.train_transform(32, 0, 0))
    assert "11 of 16 training images are broken, the last: " in refusal(lambda: data.SkipBroken(images)[0, 0])
    images.paths = images.paths[:3]
    assert "3 of 3 training images are broken" in refusal(lambda: data.SkipBroken(images)[0, 1])


def test_objects_without_area_are_ignored_and_counted(tmp_path):
    write_coco(tmp_path)
    nothing = [[60, 0, 5, 5], [-9, 0, 9, 5], [math.nan, 0, 5, 5], [9, 9, -5, 5], [9, 9, 5, 0]]
    for change in [*(dict(bbox=bbox) for bbox in nothing), dict(segmentation=[[10, 5, 30, 5]])]:
        edit_json(lambda c: c["annotations"].append(c["annotations"][0] | dict(id=9) | change))(tmp_path)
    assert data.Coco(tmp_path, "train", "det", UNCHANGED, crop=1000).dropped == 6
    coco = data.Coco(tmp_path, "train", "inst", UNCHANGED, crop=1000)
    assert coco.dropped == 7 and len(coco[0, 1][1]["labels"]) == 3  # a polygon with two points has no area


def test_panoptic_training_on_instances_alone_is_refused(tmp_path):
    write_coco(tmp_path)
    complaint = refusal(lambda: data.Coco(tmp_path, "train", "pan", UNCHANGED, crop=1000))
    assert "panoptic_train2017.json: not there, only" in complaint
    assert "which --task det and --task inst read" in complaint


def test_in_evaluation_a_label_map_of_another_size_is_an_error_and_hidden_files_are_ignored(tmp_path):
    write_ade(tmp_path)
    (tmp_path / "images" / "validation" / ".DS_Store").write_bytes(b"")
    ade = data.Ade(tmp_path, "val", data.dense_eval_transform(64, 256))
    assert len(ade) == 2 and ade[0, 1][0].shape == (3, 64, 96)
    Image.new("L", (50, 40), 1).save(tmp_path / "annotations" / "validation" / "b.png")
    assert "b.jpg: 60 x 40 pixels, its label map has 50 x 40" in refusal(lambda: ade[0, 1])


def test_the_ground_truth_has_an_ap_of_1_even_if_ids_start_at_0(tmp_path):
    write_coco(tmp_path)
    edit_json(lambda c: [entry.pop("area") for entry in c["annotations"]])(tmp_path)
    edit_json(lambda c: [entry.pop("iscrowd") for entry in c["annotations"] if not entry["iscrowd"]])(tmp_path)
    truth = data.Coco(tmp_path, "train", "inst", None).coco()
    found = [dict(entry, score=0.5) for entry in truth.anns.values() if not entry["iscrowd"]]
    for kind in ("bbox", "segm"):
        assert plain_metrics(truth, [dict(entry) for entry in found], kind)[0] == pytest.approx(1)


def test_shapes_agree_on_a_scene_across_tasks():
    scenes = {task: data.Shapes(50, 96, 3, "train", task) for task in ("det", "inst", "sem", "pan")}
    things, stuff, clipped = Counter(), 0, 0
    for index in range(50):
        (image, det), (same, inst), (_, sem), (_, pan) = (scenes[task][1, index] for task in scenes)
        assert torch.equal(image, same) and image.shape == (3, 96, 96)
        assert torch.equal(det["boxes"], inst["boxes"]) and "masks" not in det
        n = len(inst["labels"])
        assert torch.equal(pan["masks"][:n], inst["masks"]) and torch.equal(pan["labels"][:n], inst["labels"])
        assert pan["masks"].sum(0).max() == 1 and pan["masks"].flatten(1).sum(1).min() >= data.VISIBLE
        assert sem["masks"].sum(0).max() == 1 and set(sem["labels"].tolist()) == set(pan["labels"].tolist())
        for label in sem["labels"].unique():
            assert torch.equal(sem["masks"][sem["labels"] == label].any(0), pan["masks"][pan["labels"] == label].any(0))
        things[n] += 1
        stuff += (pan["labels"] >= len(data.THINGS)).sum().item() >= 3
        corners = box_convert(inst["boxes"], "cxcywh", "xyxy")
        clipped += ((corners <= 0) | (corners >= 1)).any(1).sum().item()
    assert max(things) == 6 and things[1] and stuff > 40 and clipped > 25


def test_shapes_have_the_same_ground_truth_in_training_and_evaluation():
    val = data.Shapes(5, 96, 0, "val", "pan")
    assert val[0, 2][1] == dict(index=2, size=(96, 96))
    assert torch.equal(val[0, 2][0], data.Shapes(5, 96, 8, "val", "pan")[7, 2][0])
    coco = val.coco()
    for index in range(5):
        ids, table = val.segments(index)
        labels = val.label_map(index)
        entries = coco.loadAnns(coco.getAnnIds(imgIds=[index]))
        assert len(entries) == len(table)
        for entry, segment in zip(entries, table):
            mask = (ids == segment["id"]).numpy()
            assert np.array_equal(coco.annToMask(entry), mask) and entry["area"] == mask.sum()
            assert (labels[ids == segment["id"]] == val.categories.index(segment["category_id"])).all()
            assert entry["category_id"] == segment["category_id"]


def test_hungarian_matching_is_optimal():
    rng = np.random.default_rng(0)
    for case in range(200):
        n = int(rng.integers(1, 6))
        m = int(rng.integers(n, 8))
        cost = rng.normal(size=(n, m)) if case % 2 else rng.integers(0, 3, (n, m)).astype(float)  # with ties, too
        columns = cf.hungarian(cost)
        assert len(set(columns)) == n
        best = min(cost[range(n), list(order)].sum() for order in itertools.permutations(range(m), n))
        assert cost[range(n), columns].sum() == pytest.approx(best)
    assert sorted(cf.hungarian(np.full((3, 5), np.nan))) == [0, 1, 2]  # it ends, with distinct columns


def panoptic_metrics(predicted, segments, truth, entries, classes=3):
    """Counts, and [PQ, SQ, RQ], of small maps given as rows of digits; class c has category_id 10 + c."""
    read = lambda rows: torch.tensor([[int(digit) for digit in row] for row in rows.split()])
    segments = [dict(id=i, label=label) for i, label in segments.items()]
    entries = [dict(id=i, category_id=10 + label, iscrowd=crowd) for i, (label, crowd) in entries.items()]
    categories = {10 + c: c for c in range(classes)}
    counts = evaluation.panoptic_counts(read(predicted), segments, read(truth), entries, categories, classes)
    return counts, evaluation.panoptic_quality(counts, torch.ones(classes, dtype=torch.bool))


def test_panoptic_quality_of_cases_worked_out_by_hand():
    truth, entries = "1112 1112 3333", {1: (0, 0), 2: (0, 0), 3: (1, 0)}
    counts, metrics = panoptic_metrics(truth, {1: 0, 2: 0, 3: 1}, truth, entries)
    assert metrics == [1, 1, 1] and counts[2].sum() == 0  # a class that does not occur does not count

    # Segment 1 loses a third of its pixels to 2: IoUs of 4/6 and 2/4, of which the second is no match.  3 has the
    # wrong class.
    counts, (pq, sq, rq) = panoptic_metrics("1122 1122 3333", {1: 0, 2: 0, 3: 2}, truth, entries)
    assert counts.tolist() == [[pytest.approx(4 / 6), 1, 1, 1], [0, 0, 0, 1], [0, 0, 1, 0]]
    assert (pq, sq, rq) == (pytest.approx(4 / 6 / 2 / 3), pytest.approx(4 / 6 / 3), pytest.approx(1 / 2 / 3))


def test_void_and_crowds_do_not_count_as_errors():
    # Half of the match is on void, which counts neither in the intersection nor in the union.
    counts, metrics = panoptic_metrics("1111 0000", {1: 0}, "1100 0000", {1: (0, 0)})
    assert metrics == [1, 1, 1]
    # A prediction that is mostly void, or mostly a crowd of its class, is no false positive; a crowd is never missed.
    counts, _ = panoptic_metrics("1111 2222", {1: 0, 2: 1}, "0003 4444", {3: (2, 0), 4: (1, 1)})
    assert counts.tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    # On a crowd of another class, it is a false positive.
    counts, _ = panoptic_metrics("2222", {2: 0}, "4444", {4: (1, 1)})
    assert counts.tolist() == [[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_semantic_metrics_match_a_count_pixel_by_pixel():
    rng = np.random.default_rng(0)
    predicted, truth = rng.integers(0, 4, (2, 30, 40))
    truth[rng.random((30, 40)) < 0.2] = -1
    predicted[predicted == 3], truth[truth == 3] = 0, 1  # class 3 does not occur
    counts = evaluation.semantic_counts(torch.from_numpy(predicted), torch.from_numpy(truth), 4)
    metrics, per_class = evaluation.semantic_metrics(counts)
    real = truth >= 0
    both = [real & (truth == c) & (predicted == c) for c in range(3)]
    iou = [both[c].sum() / (real & ((truth == c) | (predicted == c))).sum() for c in range(3)]
    np.testing.assert_allclose(per_class[:3], iou)
    assert math.isnan(per_class[3]) and metrics["miou"] == pytest.approx(np.mean(iou))
    assert metrics["pixel_accuracy"] == pytest.approx((truth == predicted)[real].mean())


# ---------------------------------------------------------------------------------------------------------------
# Files of other tools: what is unambiguous is read alike in training and evaluation; the rest is refused in one line
# ---------------------------------------------------------------------------------------------------------------
LEFT = [[40, 20, 50, 20, 50, 35, 40, 35]]  # the polygon of object 1


def edit_both(root, change):
    """Change the annotation files of both splits; two different images, so that an Oracle can tell them apart."""
    for split in ("train", "val"):
        write_coco(root, split)
        Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(root / f"{split}2017" / "b.png")
        path = root / "annotations" / f"instances_{split}2017.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))


def read_both(root, task="inst"):
    """The data sets of training, but without augmentation, and of evaluation, as train.py creates and checks them."""
    train_set = data.Coco(root, "train", task, UNCHANGED, crop=1000)
    val_set = data.Coco(root, "val", task, v2.Resize(20), classes=train_set.classes)
    for dataset, split in ((train_set, "training"), (val_set, "validation")):
        data.check(dataset, split)
    return train_set, val_set


def every_object(**change):
    return lambda c: [e.update(change) for e in c["annotations"] if not e["iscrowd"]]


def entry(table, index, **change):
    return lambda c: c[table][index].update(change)


def one_object(**change):
    return entry("annotations", 1, **change)


def as_text(c):
    for e in c["annotations"]:
        e["bbox"] = [str(x) for x in e["bbox"]]


def as_floats(c):
    for e in c["images"] + c["categories"] + c["annotations"]:
        e.update({key: float(e[key]) for key in e.keys() & {"id", "width", "height", "image_id", "category_id"}})


def ids_as_text(c):
    for e in c["images"] + c["categories"]:
        e["id"] = str(e["id"])  # while annotations refer to numbers


def ids_of_words(c):
    for e in c["images"]:
        e["id"] = {5: "5", 3: "night"}[e["id"]]


EVERY = [0, 1, 3]  # objects of write_coco() with area, without the crowd


@pytest.mark.parametrize("change, objects, area", [
    pytest.param(every_object(iscrowd=None), EVERY, 1, id="iscrowd-null"),
    pytest.param(every_object(iscrowd="0"), EVERY, 1, id="iscrowd-text"),
    pytest.param(entry("annotations", 2, iscrowd=True), EVERY, 1, id="iscrowd-true"),
    pytest.param(every_object(area=None), EVERY, 150, id="area-null"),
    pytest.param(every_object(area="large"), EVERY, 150, id="area-text"),
    pytest.param(every_object(area=math.nan), EVERY, 150, id="area-nan"),
    pytest.param(as_text, EVERY, 1, id="bbox-text"),
    pytest.param(one_object(segmentation=[[40, 20, 50, 35]]), [0, 3], None, id="polygon-of-two-points"),
    pytest.param(one_object(segmentation=[[40, 20, 50, 35], *LEFT]), EVERY, 1, id="polygon-of-two-points-and-good-one"),
    pytest.param(one_object(segmentation=[[1, 1, 9, 1, 9, 9, 4], *LEFT]), EVERY, 1, id="polygon-of-seven-numbers"),
    pytest.param(one_object(segmentation=[[99, 9, 120, 9, 120, 30]]), [0, 3], None, id="polygon-outside"),
    pytest.param(one_object(segmentation=[[4, 9, 5, 9, 4, 9]]), [0, 3], None, id="polygon-that-is-a-line"),
    pytest.param(one_object(segmentation=dict(size=[40, 60], counts=[2400])), [0, 3], None, id="mask-without-pixels"),
    pytest.param(one_object(segmentation=[[math.nan] * 6, *LEFT]), EVERY, 1, id="polygon-nan"),
    pytest.param(one_object(segmentation=[[str(x) for x in LEFT[0]]]), EVERY, 1, id="polygon-text"),
    pytest.param(one_object(segmentation=[]), [0, 3], None, id="mask-empty"),
    pytest.param(one_object(segmentation=None), [0, 3], None, id="mask-null"),
    pytest.param(as_floats, EVERY, 1, id="whole-numbers-as-floats"),
    pytest.param(lambda c: [e.update(width="60", height=40.0) for e in c["images"]], EVERY, 1, id="sides-text"),
    pytest.param(ids_as_text, EVERY, 1, id="ids-text-and-numbers"),
    pytest.param(ids_of_words, EVERY, 1, id="ids-words-and-numbers"),
])
def test_annotations_of_any_tool_mean_the_same_in_training_and_evaluation(tmp_path, change, objects, area):
    edit_both(tmp_path, change)
    train_set, val_set = read_both(tmp_path)
    at = [name for name, *_ in train_set.images].index("a.png")
    target = train_set[0, at][1]
    masks = {0: rectangle(5, 10, 15, 30), 1: rectangle(20, 40, 35, 50), 3: rectangle(0, 50, 10, 60)}
    assert target["labels"].tolist() == [{0: 1, 1: 0, 3: 0}[i] for i in objects]
    assert train_set.classes == ["boat", "kite"]
    assert np.array_equal(target["masks"].numpy(), [masks[i] for i in objects])
    assert train_set.dropped == val_set.dropped == 4 - len(objects)
    coco = val_set.coco()
    truth = [entry for entry in coco.dataset["annotations"] if not entry["iscrowd"]]
    boxes = {0: [10, 5, 20, 10], 1: [40, 20, 10, 15], 3: [50, -5, 20, 15]}
    assert [entry["bbox"] for entry in truth] == [boxes[i] for i in objects] and len(coco.anns) == len(objects) + 1
    assert all(np.array_equal(coco.annToMask(entry), masks[i]) for entry, i in zip(truth, objects))
    if area:
        assert truth[1]["area"] == area and isinstance(truth[1]["area"], (int, float))
    metrics = evaluation.evaluate(Oracle(val_set, "inst"), val_set, CPU)
    assert metrics["mask_AP"] == pytest.approx(1) and metrics["box_AP50"] == pytest.approx(1) and metrics["images"] == 2


def test_compressed_run_lengths_are_decoded_as_by_pycocotools():
    rng = np.random.default_rng(0)
    large = rectangle(0, 0, 400, 300, (400, 600))
    for mask in [*(rng.random((40, 60)) < density for density in (0, 0.001, 0.5, 1)), rectangle(5, 10, 15, 30), large]:
        text = mask_utils.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()
        assert data.runs_of(text).tolist() == runs(mask)["counts"]
        for damaged in (text[:-1], text + "1", "b'" + text + "'", "\n" + text):
            runs_ = data.runs_of(damaged)
            assert runs_.min() < 0 or runs_.sum() != mask.size


@pytest.mark.parametrize("mask, area", [
    (LEFT, 150), (None, 150), ("of another tool", 150), ([[40, 20, 45, 20, 45, 35, 40, 35]], 75)])
def test_a_missing_area_is_that_of_the_mask_or_else_of_the_box(tmp_path, mask, area):
    edit_both(tmp_path, one_object(area=None, segmentation=mask))
    assert read_both(tmp_path, "det")[1].coco().dataset["annotations"][1]["area"] == area


@pytest.mark.parametrize("change, complaint", [
    pytest.param(entry("annotations", 0, iscrowd="maybe"), "annotations[0] has no usable iscrowd", id="iscrowd"),
    pytest.param(entry("annotations", 0, bbox=["1", "2", "x", "4"]), "annotation 0 has bbox", id="bbox"),
    pytest.param(entry("annotations", 0, bbox=[0, 0, math.inf, 4]), "annotation 0 has bbox", id="bbox-infinite"),
    pytest.param(entry("images", 0, width=60.5), "images[0] has no usable width", id="width"),
    pytest.param(entry("images", 1, height=0), "images[1] has no usable height", id="height"),
    pytest.param(entry("images", 0, id="3"), "two images, or two categories, have the same id", id="ids-join"),
    pytest.param(entry("annotations", 0, image_id="05"), "annotation 0 is of image 05, which is not in", id="ids-part"),
    pytest.param(every_object(segmentation=None), "no usable annotation in it: 4 objects have no mask", id="no-masks"),
    pytest.param(one_object(segmentation=[[[4, 2], [5, 2], [5, 3]]]), "annotation 1 has a mask that is", id="pairs"),
])
def test_ambiguous_coco_files_are_refused(tmp_path, change, complaint):
    edit_both(tmp_path, change)
    assert complaint in refusal(lambda: data.Coco(tmp_path, "val", "inst", UNCHANGED))
    assert complaint in refusal(lambda: read_both(tmp_path))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_annotation_files_may_start_with_a_byte_order_mark(tmp_path, encoding):
    edit_both(tmp_path, lambda c: None)
    for path in (tmp_path / "annotations").iterdir():
        path.write_text(path.read_text(), encoding=encoding)
    train_set, val_set = read_both(tmp_path)
    assert len(train_set[0, 1][1]["labels"]) == 3 and len(val_set.coco().anns) == 4


@pytest.mark.parametrize("name, complaint", [
    pytest.param("train2017/a.png", None, id="folder-before-it"),
    pytest.param("C:\\data\\photos\\a.png", None, id="backslashes"),
    pytest.param("photos\\a.png", None, id="backslashes-in-a-folder"),
    pytest.param("/home/else/data/train2017/a.png", None, id="absolute-of-another-machine"),
    pytest.param("more/c.png", None, id="in-a-folder-that-is-there"),
    pytest.param("D:\\x\\more\\c.png", None, id="in-a-folder-that-is-there-of-windows"),
    pytest.param("train2017/x.png", "image 5, train2017/x.png, is not in", id="not-there"),
    pytest.param("night/b.png", "b.png and night/b.png would both be", id="not-unique"),
    pytest.param("", "image 5, , is not in", id="empty"),
])
@pytest.mark.parametrize("task", ["det", "pan"])
def test_images_are_found_by_paths_of_other_machines(tmp_path, name, complaint, task):
    kind = "panoptic" if task == "pan" else "instances"
    write_panoptic(tmp_path) if task == "pan" else write_coco(tmp_path)
    (tmp_path / "train2017" / "more").mkdir()
    Image.new("RGB", (60, 40), "red").save(tmp_path / "train2017" / "more" / "c.png")
    if task == "pan":
        Image.new("RGB", (60, 40), "red").save(tmp_path / "train2017" / "b.png")
        edit_json(lambda c: c["images"].append(dict(id=3, file_name="b.png", width=60, height=40)), kind)(tmp_path)
        edit_json(lambda c: c["annotations"][0].update(file_name="E:\\maps\\a.png"), kind)(tmp_path)
        edit_json(lambda c: [c["images"][0].update(id=5), c["annotations"][0].update(image_id=5)], kind)(tmp_path)
    edit_json(lambda c: c["images"][0].update(file_name=name), kind)(tmp_path)
    read = lambda: data.Coco(tmp_path, "train", task, UNCHANGED, crop=1000)
    if complaint:
        assert complaint in refusal(read)
        return
    image, target = read()[0, 1]
    color = [255, 0, 0] if "c.png" in name else [0, 0, 0] if task == "pan" else [100] * 3
    assert image.amax((1, 2)).tolist() == color
    assert len(target["labels"]) == 3


def write_export(root, used_in_val=("boat", "kite")):
    """write_coco() as labeling tools export it: with an unused category 0, and other ids in validation."""
    for split, folder in (("train", "train"), ("val", "valid")):
        content = write_coco(root, split)
        (root / f"{split}2017").rename(root / folder)
        Image.new("RGB", (60, 40)).save(root / folder / "b.png")
        content["categories"] = [dict(id=0, name="things", supercategory="none"), *content["categories"]]
        if split == "val":  # kite comes first, and one class has no objects
            content["categories"] = [dict(id=1, name="kite"), dict(id=2, name="boat"), dict(id=4, name="never")]
            for entry in content["annotations"]:
                entry["category_id"] = {90: 1, 7: 2}[entry["category_id"]]
        (root / folder / "_annotations.coco.json").write_text(json.dumps(content))
    for path in (root / "annotations").iterdir():
        path.unlink()


@pytest.mark.parametrize("task", ["det", "inst"])
def test_the_common_coco_export_is_read(tmp_path, capsys, task):
    write_export(tmp_path)
    train_set, val_set = read_both(tmp_path, task)
    printed = capsys.readouterr().out
    assert "training data: ignored categories without annotations: things" in printed
    assert "validation data: ignored categories without annotations: never" in printed
    assert train_set.classes == val_set.classes == ["boat", "kite"]
    assert train_set.categories == [7, 90] and val_set.categories == [2, 1]
    assert train_set[0, 1][1]["labels"].tolist() == [1, 0, 0]
    metrics = evaluation.evaluate(Oracle(val_set, task), val_set, CPU, per_class=True)
    assert metrics[evaluation.METRIC[task]] == pytest.approx(1)
    half = lambda dataset, task, index: keep(truth_as_prediction(dataset, task, index), 1)  # kites only
    rows = evaluation.evaluate(Oracle(val_set, task, half), val_set, CPU, per_class=True)["per_class"]
    name = "AP" if task == "det" else "mask_AP"
    assert [(row["class"], row[name]) for row in rows] == [("boat", 0), ("kite", pytest.approx(1))]


def keep(prediction, label):
    return {name: value[prediction["labels"] == label] for name, value in prediction.items()}


def test_classes_of_a_validation_file_are_matched_by_name(tmp_path):
    write_export(tmp_path)
    read = lambda *classes: data.Coco(tmp_path, "val", "det", v2.Resize(20), classes=classes)
    assert "its category boat is none of the model's 2 classes" in refusal(lambda: read("kite", "dog"))
    more = read("dog", "kite", "boat")
    assert more.categories[1:] == [1, 2] and more.categories[0] not in (1, 2, 4)
    rows = evaluation.evaluate(Oracle(more, "det"), more, CPU, per_class=True)["per_class"]
    assert math.isnan(rows[0]["AP"]) and [row["AP"] for row in rows[1:]] == [pytest.approx(1)] * 2
    (tmp_path / "val").mkdir()
    assert "valid are both there" in refusal(lambda: read("boat", "kite"))


def write_maps(root, *values, names=None):
    """ADE20K's layout, two label maps per split, each with all of the values, in stripes of ten columns."""
    write_ade(root, names=False)
    pixels = np.repeat(np.resize(values, 6), 10)[None].repeat(40, 0)
    for path in (root / "annotations").rglob("*.png"):
        Image.fromarray(pixels.astype(np.uint8 if max(values) < 256 else np.uint16)).save(path)
    if names:
        rows = "".join(f"{i}\tclass {i}\n" for i in range(1, names + 1))
        (root / "objectInfo150.txt").write_text(f"Idx\tName\n{rows}\n \n")
    return pixels


def read_maps(root):
    train_set = data.Ade(root, "train", UNCHANGED, crop=1000)
    val_set = data.Ade(root, "val", v2.Resize(20), classes=train_set.classes)
    for dataset, split in ((train_set, "training"), (val_set, "validation")):
        data.check(dataset, split)
    return train_set, val_set


@pytest.mark.parametrize("values, names, classes, void", [
    pytest.param((1, 2, 3), None, 3, (), id="no-void"),
    pytest.param((1, 2, 255), None, 2, (255,), id="255-and-no-table"),
    pytest.param((0, 1, 2, 255), None, 2, (0, 255), id="0-and-255-and-no-table"),
    pytest.param((0, 1, 255), 150, 150, (0, 255), id="0-and-255-and-names"),
    pytest.param((0, 1, 255), 255, 255, (0,), id="255-is-a-class-that-has-a-name"),
    pytest.param((0, 40, 255, 300), 300, 300, (0,), id="16-bit-maps"),
])
def test_255_is_void_if_there_are_fewer_classes(tmp_path, capsys, values, names, classes, void):
    pixels = write_maps(tmp_path, *values, names=names)
    train_set, val_set = read_maps(tmp_path)
    seen = sorted(set(values) - {0, *void})
    right = np.where(np.isin(pixels, seen), pixels.astype(int) - 1, -1)
    target = train_set[0, 0][1]
    assert len(train_set.classes) == classes and target["labels"].tolist() == [value - 1 for value in seen]
    assert np.array_equal(target["masks"].numpy(), [pixels == value for value in seen])
    for dataset in (train_set, val_set):
        assert np.array_equal(dataset.label_map(0), right)
    printed = capsys.readouterr().out
    share = f"{np.isin(pixels, [0, *void]).mean():.1%} of the pixels void"
    assert printed.count(f"2 images, {classes} classes, of which {len(seen)} occur, {share}") == 2
    zeros, maxima = (f"{(pixels == value).mean():.1%}" for value in (0, 255))
    both = f"0 ({zeros} of the pixels) and 255 ({maxima}) are both void; if 0 is a class"
    assert printed.count(both) == (2 if {0, 255} <= {*void} else 0)


def test_255_is_a_class_if_all_values_below_it_occur(tmp_path):
    write_ade(tmp_path, names=False)
    for path in (tmp_path / "annotations").rglob("*.png"):
        Image.fromarray((np.arange(40 * 60).reshape(40, 60) % 256).astype(np.uint8)).save(path)
    assert len(read_maps(tmp_path)[0].classes) == 255


@pytest.mark.parametrize("values, names, complaint", [
    pytest.param((0, 255), None, "the values 0, 255 in it cannot be numbers of classes; number them 1, 2", id="mask"),
    pytest.param((255,), None, "the values 255 in it cannot be", id="255-alone"),
    pytest.param((0, 128, 255), None, "the values 0, 128, 255 in it cannot be", id="shades"),
    pytest.param((0, 85, 170, 255), None, "the values 0, 85, 170, 255 in it cannot be", id="more-shades"),
    pytest.param((0, 255), 3, "no labeled pixel, only the values 0, 255; number classes from 1", id="0-and-255-named"),
    pytest.param((0, 1, 9, 255), 3, "a.png: label 9 in it, the data set has labels 0 to 3; 1 more files", id="no-name"),
])
def test_values_that_cannot_be_classes_are_refused(tmp_path, values, names, complaint):
    write_maps(tmp_path, *values, names=names)
    assert complaint in refusal(lambda: read_maps(tmp_path))


@pytest.mark.parametrize("names", [None, 3])
def test_label_maps_in_colors_are_refused(tmp_path, names):
    write_maps(tmp_path, 0, 1, 2, names=names)
    for path in (tmp_path / "annotations").rglob("*.png"):
        Image.new("RGB", (60, 40), (0, 128, 64)).save(path)
    assert "a.png: colors in it; the data set has labels from 1" in refusal(lambda: read_maps(tmp_path))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P"])
def test_gray_label_maps_are_read_in_any_mode(tmp_path, mode):
    pixels = write_maps(tmp_path, 0, 1, 2)
    for path in (tmp_path / "annotations").rglob("*.png"):
        gray = Image.open(path)
        if mode == "P":
            gray.putpalette([7, 7, 7, 200, 0, 0, 0, 200, 0])  # the pixels hold the labels, the palette is for display
        picture = gray if mode == "P" else gray.convert(mode)
        if mode.endswith("A"):
            picture.putalpha(Image.new("L", (60, 40), 90))
        picture.save(path)
        assert Image.open(path).mode == mode
    for dataset in read_maps(tmp_path):
        assert np.array_equal(dataset.label_map(0), pixels.astype(int) - 1)


@pytest.mark.parametrize("table, complaint", [
    pytest.param("\ufeffIdx\tName\n1\twall\n2\tsky, air\n\n", None, id="blank-last-line-and-byte-order-mark"),
    pytest.param("1\twall\r\n2\tsky\r\n", None, id="without-titles-of-windows"),
    pytest.param("Idx\tName\n2\twall\n1\tsky\n", "the row of class 1 is not its number", id="another-order"),
    pytest.param("wall\nsky\n", "the row of class 1 is not its number", id="no-tabs"),
    pytest.param("Idx\tName\n1\twall\n2\t\n", "the row of class 2 is not its number", id="no-name"),
    pytest.param("Idx\tName\n\n", "objectInfo150.txt: no classes in it", id="no-rows"),
])
def test_tables_of_class_names_are_read_or_refused(tmp_path, table, complaint):
    write_maps(tmp_path, 0, 1, 2)
    (tmp_path / "objectInfo150.txt").write_text(table, encoding="utf-8", newline="")
    if complaint:
        assert complaint in refusal(lambda: read_maps(tmp_path))
    else:
        assert read_maps(tmp_path)[0].classes == ["wall", "sky"]


def leave_hidden_files(folder):
    """Files that macOS, Windows and Jupyter leave behind."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "._photo.jpg").write_bytes(b"no image")
    (folder / ".DS_Store").write_bytes(b"")
    (folder / "Thumbs.db").write_bytes(b"")
    for name in (".ipynb_checkpoints", "__MACOSX"):
        (folder / name).mkdir()
        Image.new("RGB", (60, 40)).save(folder / name / "copy.png")


def test_hidden_files_are_never_taken_for_images(tmp_path, folder):
    for split in ("train", "val"):
        leave_hidden_files(folder / split)
        leave_hidden_files(folder / split / "cat")
    train_set = data.Folder(folder, "train", data.train_transform(32, 0, 0))
    val_set = evaluation.validation_set(folder, 32, "cls", train_set.classes)
    assert train_set.classes == ["cat", "dog"] and (len(train_set), len(val_set)) == (16, 6)
    found = [name for name, *_ in evaluation.images_of([folder / "val" / "cat"], "cls", 32)]
    assert [os.path.basename(name) for name in found] == ["0.png", "1.png", "2.png"]
    write_ade(tmp_path / "ade")
    for path in (tmp_path / "ade").glob("*/*"):
        leave_hidden_files(path)
    assert list(map(len, read_maps(tmp_path / "ade"))) == [2, 2]


def test_two_images_with_one_label_map_are_refused(tmp_path):
    write_ade(tmp_path)
    Image.new("RGB", (60, 40)).save(tmp_path / "images" / "training" / "a.png")
    assert "a.jpg and a.png have the same label map" in refusal(lambda: read_maps(tmp_path))


@pytest.mark.parametrize("name", ["valid", "validation"])
def test_validation_images_are_found_in_val_or_valid(folder, name):
    (folder / "val").rename(folder / name)
    assert len(evaluation.validation_set(folder, 32, "cls", ["cat", "dog"])) == 6
    (folder / "val").mkdir()
    assert f"{name} are both there; keep one" in refusal(lambda: evaluation.validation_set(folder, 32))


# ---------------------------------------------------------------------------------------------------------------
# The check before the first step
# ---------------------------------------------------------------------------------------------------------------
def turned_image(root, split):
    """The image is rotated in the file, as cameras store it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((60, 40, 3), np.uint8)).save(root / f"{split}2017" / "a.png", "JPEG", exif=exif)


def test_the_check_prints_a_summary_of_the_data(tmp_path, capsys):
    for name, write in (("coco", coco_folder), ("pan", panoptic_folder)):
        (tmp_path / name).mkdir()
        write(tmp_path / name)
    turned_image(tmp_path / "coco", "train")
    read_both(tmp_path / "coco")
    training, validation = capsys.readouterr().out.splitlines()
    assert training == ("training data: 2 images, 2 classes, 3 objects, 1 crowds ignored, "
                        "ignored 1 objects without area or mask")
    assert validation == training.replace("training", "validation")
    more = lambda c: c["annotations"][0]["segments_info"].append(dict(id=77, category_id=1))
    edit_json(more, "panoptic")(tmp_path / "pan")  # a segment without pixels
    read_both(tmp_path / "pan", "pan")
    void = f"{1 - (20 * 60 + 8 * 20) / 2400:.1%} of the pixels void"  # sky and crowd, and the boats
    training, validation = capsys.readouterr().out.splitlines()
    what = "1 images, 2 classes, 4 segments, 1 crowds ignored, ignored 1 segments without pixels"
    assert training == f"training data: {what}, {void}"
    assert validation == f"validation data: 1 images, 2 classes, 3 segments, 1 crowds ignored, {void}"


def small_image(root):
    Image.new("RGB", (61, 40)).save(root / "val2017" / "b.png")


def half_image(root):
    (root / "val2017" / "b.png").write_text("no image")


def broken_runs(root):
    path = root / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["annotations"][2]["segmentation"] = dict(size=[40, 60], counts="0")  # of the crowd
    path.write_text(json.dumps(content))


def strange_map(root):
    Image.new("RGB", (60, 40), (5, 0, 0)).save(root / "annotations" / "panoptic_val2017" / "a.png")


def small_label_map(root):
    Image.new("L", (50, 40), 1).save(root / "annotations" / "validation" / "b.png")


def half_label_map(root):
    cut_in_half(root / "annotations" / "validation" / "b.png")


@pytest.mark.parametrize("task, write, damage, complaint", [
    ("inst", lambda root: coco_folder(root), small_image, "b.png: 61 x 40 pixels"),
    ("det", lambda root: coco_folder(root), half_image, "b.png: cannot be read as an image"),
    ("inst", lambda root: coco_folder(root), broken_runs, "annotation 2 has a mask that is neither"),
    ("pan", lambda root: panoptic_folder(root), strange_map, "segment 5 has no entry in"),
    ("sem", lambda root: write_ade(root), small_label_map, "b.jpg: 60 x 40 pixels, its label map has 50 x 40"),
    ("sem", lambda root: write_ade(root), half_label_map, "b.png: cannot be read as an image"),
])
def test_broken_validation_files_end_a_run_before_its_first_step(tmp_path, capsys, task, write, damage, complaint):
    (tmp_path / "files").mkdir()
    write(tmp_path / "files")
    damage(tmp_path / "files")
    arguments = ["--task", task, "--data", tmp_path / "files", "--variant", "nano", "--batch-size", 1, "--workers", 0]
    with pytest.raises(SystemExit) as stop:
        call(train, capsys, *arguments, "--out", tmp_path / "run")
    assert complaint in str(stop.value) and "\n" not in str(stop.value) and not (tmp_path / "run").exists()


def test_a_few_unreadable_training_images_are_counted_and_many_are_refused(tmp_path, capsys):
    write_coco(tmp_path)
    edit_json(many_times)(tmp_path)
    dataset = lambda: data.Coco(tmp_path, "train", "det", UNCHANGED, crop=1000)
    (tmp_path / "train2017" / "a.png").write_text("no image")  # 9 of 18
    data.check(dataset(), "training")
    assert "training data: 9 images will be skipped, the first: " in capsys.readouterr().out
    (tmp_path / "train2017" / "b.png").write_text("no image")
    assert "18 of 18 training images are broken, the last: " in refusal(lambda: data.check(dataset(), "training"))


def check_a_part(rank):
    root = os.environ["CHECKED"]
    try:
        dataset = data.Ade(f"{root}/ade", "train", UNCHANGED, crop=1000)
        data.check(dataset, "training")
        data.check(data.Coco(f"{root}/coco", "val", "det", UNCHANGED), "validation")
    except data.InputError as error:
        return dataset.classes, str(error)


def test_all_processes_agree_whichever_of_them_reads_a_file(tmp_path, monkeypatch):
    for name in ("ade", "coco"):
        (tmp_path / name).mkdir()
    write_maps(tmp_path / "ade", 0, 1)
    Image.new("L", (60, 40), 2).save(tmp_path / "ade" / MAPS / "b.png")  # one process sees another class
    coco_folder(tmp_path / "coco")
    small_image(tmp_path / "coco")
    monkeypatch.setenv("CHECKED", str(tmp_path))
    first, second = on_processes(check_a_part, tmp_path)
    assert first == second and first[0] == ["1", "2"] and "b.png: 61 x 40 pixels" in first[1]


# ---------------------------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------------------------
def one_process(rank, function, path, count):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/meet", rank=rank, world_size=count)
    torch.save(function(rank), f"{path}/{rank}.pt")
    dist.barrier()  # torch 2.6 hangs if a group is destroyed while its threads still release a tensor
    dist.destroy_process_group()


def on_processes(function, path, count=2):
    torch.multiprocessing.spawn(one_process, (function, str(path), count), nprocs=count)
    return [torch.load(path / f"{rank}.pt") for rank in range(count)]


def loss_of(model, keys):
    shapes = data.Shapes(100, 32, seed=0, split="train")
    images, labels = zip(*[shapes[key] for key in keys])
    return F.cross_entropy(model(data.as_float(torch.stack(images)))["logits"], torch.tensor(labels))


def gradients_of_half(rank):
    model = random_model()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    (keys,) = data.GlobalBatches(100, 8, 1, 0, rank, 2)
    loss_of(wrapped, keys).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def all_parts(rank):
    parts = gradients_of_half, dense_gradients_of_half, evaluate_a_part, spoiled_on_one
    return {part.__name__: part(rank) for part in parts}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What all_parts returns on two processes.  Starting them takes seconds, so several tests share them."""
    return on_processes(all_parts, tmp_path_factory.mktemp("pair"))


def test_two_processes_give_the_gradients_of_one_with_the_whole_batch(pair):
    first, second = (parts["gradients_of_half"] for parts in pair)
    model = random_model()
    (keys,) = data.GlobalBatches(100, 8, 1, 0)
    loss_of(model, keys).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(first[name], parameter.grad, atol=1e-5, rtol=1e-4)
        assert torch.equal(first[name], second[name])


def dense_gradients(parts, world_size=1):
    """Gradients of a det model for the images of `parts`, from losses that are divided as in train.py."""
    model = random_dense("det").train()
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if world_size > 1 else model
    shapes = data.Shapes(100, 48, 0, "train", "det")
    images, targets = data.collate([shapes[0, i] for i in parts])
    for target in targets:
        target["labels"] %= 5
    total = torch.tensor(float(sum(len(target["labels"]) for target in targets)))
    if world_size > 1:
        dist.all_reduce(total)
    (sum(cf.set_losses(wrapped(data.as_float(images)), targets, 4).values()) * world_size / total).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def dense_gradients_of_half(rank):
    return dense_gradients([range(3), range(3, 6)][rank], 2)


def test_two_processes_divide_the_losses_by_the_targets_of_both(pair):
    first, second = (parts["dense_gradients_of_half"] for parts in pair)
    for name, expected in dense_gradients(range(6)).items():
        torch.testing.assert_close(first[name], expected, atol=1e-4, rtol=1e-3)
        assert torch.equal(first[name], second[name])


class Pixels(torch.nn.Module):
    """A classifier whose logits are pixels: they are the same to the last bit in any batch size."""

    task = "cls"

    def predict(self, images, sizes):
        return [dict(labels=image.flatten()[::400].topk(5).indices) for image in images]


def metrics_of_all(batch_size, **arguments):
    cls = evaluation.evaluate(Pixels(), data.Shapes(101, 32, 0, "val"), CPU, batch_size)
    arguments |= dict(length=11, batch_size=batch_size, per_class=True)
    return {task: dense_metrics(task, half_right, **arguments) for task in DENSE} | dict(cls=cls)


def evaluate_a_part(rank):
    return metrics_of_all(3)


@pytest.mark.parametrize("count", [2, 3])
def test_evaluation_on_several_processes_is_exact(tmp_path, request, count):
    if count == 3:
        slow()
        parts = on_processes(evaluate_a_part, tmp_path, 3)
    else:
        parts = [parts["evaluate_a_part"] for parts in request.getfixturevalue("pair")]
    expected = metrics_of_all(7)
    assert expected["cls"]["images"] == 101
    assert all(0.1 < expected[task][evaluation.METRIC[task]] < 0.9 for task in DENSE)
    assert repr(metrics_of_all(11, workers=2)) == repr(expected)  # to the last bit; and nan is nan
    assert [repr(part) for part in parts] == [repr(expected)] * count


def test_the_benchmark_counts_and_measures(monkeypatch, capsys, folder):
    slow()
    monkeypatch.setattr(benchmark, "peers", lambda variant: ())
    rows = benchmark.benchmark("nano", "cls", (64, 64), 2, torch.device("cpu"), rounds=2)
    model = cf.ClusterFormer("cls", "nano")
    assert rows[0]["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 64, 64))
    assert rows[0]["macs"] * 2 == counter.get_total_flops()
    forward, training = rows[0]["memory"]
    assert 4 * rows[0]["parameters"] < forward < training  # float32 weights; in training also gradients and moments
    assert rows[0]["eager forward"]["images_per_second"] > rows[0]["eager training"]["images_per_second"] > 0
    assert rows[0]["eager training"]["ratio"] == 1
    benchmark.print_benchmark(rows)
    titles, rule, row = capsys.readouterr().out.splitlines()
    assert titles.count("|") == rule.count("|") == row.count("|") and "(1.00x)" in row  # a table in Markdown
    assert benchmark.loading_speed(folder, 32, images=4) > 0
    (row,) = benchmark.benchmark("nano", "inst", (64, 80), 1, torch.device("cpu"), rounds=1)
    assert row["model"] == "nano inst" and row["eager training"]["images_per_second"] > 0
    assert row["memory"][0] < row["memory"][1]


def test_top1_and_top5_count_the_rank_of_the_label():
    class Fixed(torch.nn.Module):
        task = "cls"

        def predict(self, images, sizes):
            return [dict(labels=image[0, 0].topk(5).indices) for image in images]

    logits = torch.randn(50, 1, 1, 12)
    labels = torch.randint(0, 12, (50,))

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 50

        def __getitem__(self, key):
            return logits[key[1]], int(labels[key[1]])

    ranks = [(row > row[label]).sum().item() for row, label in zip(logits[:, 0, 0], labels)]
    metrics = evaluation.evaluate(Fixed(), Rows(), torch.device("cpu"), batch_size=8)
    assert metrics == {"top1": sum(r < 1 for r in ranks) / 50, "top5": sum(r < 5 for r in ranks) / 50, "images": 50}


# ---------------------------------------------------------------------------------------------------------------
# Evaluation of the dense tasks, with models that return the ground truth, or a degraded copy of it
# ---------------------------------------------------------------------------------------------------------------
CPU = torch.device("cpu")


def truth_as_prediction(dataset, task, index, score=1.0):
    """The ground truth of an image in the form of a prediction; unlabeled pixels get class 0."""
    if task == "sem":
        return dict(semantic=dataset.label_map(index).clamp(min=0))
    if task == "pan":
        ids, entries = dataset.segments(index)
        label = [dataset.categories.index(entry["category_id"]) for entry in entries]
        segments = [
            dict(id=entry["id"], label=c, isthing=dataset.things[c], score=score)
            for entry, c in zip(entries, label)
            if not entry["iscrowd"]
        ]
        return dict(panoptic=ids, segments=segments)
    coco = dataset.coco()
    entries = [entry for entry in coco.imgToAnns[evaluation.identity(dataset, index)[1]] if not entry.get("iscrowd")]
    labels = [dataset.categories.index(entry["category_id"]) for entry in entries]
    x, y, w, h = torch.tensor([entry["bbox"] for entry in entries]).float().view(-1, 4).unbind(1)
    prediction = dict(labels=torch.tensor(labels, dtype=torch.int64), boxes=torch.stack([x, y, x + w, y + h], 1))
    prediction["scores"] = torch.full((len(labels),), score)
    if task == "inst":
        height, width = dataset[0, index][1]["size"]
        masks = [torch.from_numpy(coco.annToMask(entry)).bool() for entry in entries]
        prediction["masks"] = torch.stack(masks) if masks else torch.zeros(0, height, width, dtype=torch.bool)
    return prediction


def half_right(dataset, task, index):
    """The ground truth with errors that depend on the index: wrong classes, shifted boxes and masks, tied scores."""
    prediction, rng = truth_as_prediction(dataset, task, index), np.random.default_rng(index)
    if task == "sem":
        return dict(semantic=prediction["semantic"].roll(index % 7, 1))
    if task == "pan":
        return dict(panoptic=prediction["panoptic"].roll(index % 7, 1), segments=prediction["segments"])
    n = len(prediction["labels"])
    prediction["boxes"] += torch.from_numpy(rng.integers(-3, 4, (n, 4))).float()
    prediction["labels"][rng.random(n) < 0.2] = 0
    prediction["scores"] = torch.from_numpy(rng.choice([0.9, 0.6, 0.3], n)).float().sort(descending=True).values
    if task == "inst":
        prediction["masks"] = prediction["masks"].roll(int(rng.integers(-3, 4)), 1)
    return prediction


def pixels_of(dataset, index):
    return data.as_float(dataset[0, index][0]).numpy().tobytes()


class Oracle(torch.nn.Module):
    """A model that recognizes an image by its pixels, and returns predict(dataset, task, index) for it."""

    def __init__(self, dataset, task, predict=truth_as_prediction):
        super().__init__()
        self.task = task
        self.known = {pixels_of(dataset, i): predict(dataset, task, i) for i in range(len(dataset))}

    def predict(self, images, sizes=None):
        predictions = [self.known[image.numpy().tobytes()] for image in images]
        for prediction, size in zip(predictions, sizes):
            for name in prediction.keys() & {"semantic", "panoptic", "masks"}:
                assert prediction[name].shape[-2:] == size
        return predictions


def dense_metrics(task, predict=truth_as_prediction, length=6, **arguments):
    dataset = data.Shapes(length, 96, 0, "val", task)
    return evaluation.evaluate(Oracle(dataset, task, predict), dataset, CPU, **{"batch_size": 4} | arguments)


def plain_metrics(truth, results, kind="bbox"):
    """COCO's twelve metrics, by plain calls of pycocotools."""
    coco_eval = COCOeval(truth, truth.loadRes(results), kind)
    coco_eval.evaluate(), coco_eval.accumulate(), coco_eval.summarize()
    return coco_eval.stats.tolist()


@pytest.mark.parametrize("task", DENSE)
def test_the_ground_truth_scores_1(task):
    metrics = dense_metrics(task)
    assert metrics.pop("images") == 6
    assert metrics[evaluation.METRIC[task]] == pytest.approx(1)
    for name, value in metrics.items():
        if not name.endswith(("AR1", "APl", "ARl")):  # AR1 allows one detection; no object is large by COCO's measure
            assert value == pytest.approx(1) or math.isnan(value), name


@pytest.mark.parametrize("task", DENSE)
def test_unlabeled_pixels_do_not_lower_the_score(tmp_path, task):
    if task == "sem":
        write_ade(tmp_path)
        dataset = data.Ade(tmp_path, "val", v2.Resize(20))
    elif task == "pan":
        write_panoptic(tmp_path, "val")
        dataset = data.Coco(tmp_path, "val", "pan", v2.Resize(20))
    else:
        write_coco(tmp_path, "val")
        Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(tmp_path / "val2017" / "b.png")
        dataset = data.Coco(tmp_path, "val", task, v2.Resize(20))
    metrics = evaluation.evaluate(Oracle(dataset, task), dataset, CPU)
    assert metrics[evaluation.METRIC[task]] == pytest.approx(1) and metrics["images"] == len(dataset)


def test_crowds_are_treated_as_coco_treats_them(tmp_path):
    """A detection in a crowd is neither right nor wrong, whatever its score; elsewhere it is wrong."""
    write_coco(tmp_path, "val")
    path = tmp_path / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["annotations"] = [content["annotations"][i] for i in (1, 2)]
    content["annotations"][1].update(bbox=[0, 0, 30, 40], segmentation=runs(rectangle(0, 0, 40, 30)))
    del content["annotations"][0]["area"], content["annotations"][0]["iscrowd"]  # as in files of other tools
    path.write_text(json.dumps(content))
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(tmp_path / "val2017" / "b.png")
    dataset = data.Coco(tmp_path, "val", "inst", v2.Resize(20))

    def ap(left):
        def predict(dataset, task, index):
            prediction = truth_as_prediction(dataset, task, index, 0.5)
            if len(prediction["labels"]):
                prediction["labels"] = torch.cat([torch.tensor([0]), prediction["labels"]])
                prediction["scores"] = torch.cat([torch.tensor([0.9]), prediction["scores"]])
                more = torch.tensor([[left, 5.0, left + 8, 15.0]])
                prediction["boxes"] = torch.cat([more, prediction["boxes"]])
                mask = torch.from_numpy(rectangle(5, left, 15, left + 8))
                prediction["masks"] = torch.cat([mask[None], prediction["masks"]])
            return prediction

        metrics = evaluation.evaluate(Oracle(dataset, "inst", predict), dataset, CPU)
        return metrics["box_AP"], metrics["mask_AP"]

    assert ap(10) == (pytest.approx(1), pytest.approx(1)) and ap(50) == (pytest.approx(0.5), pytest.approx(0.5))


def test_shifted_boxes_have_the_average_precision_of_pycocotools():
    def shifted(dataset, task, index):
        prediction = truth_as_prediction(dataset, task, index, 0.5 + 0.01 * index)
        prediction["boxes"] += torch.tensor([index, 0, index, 0])
        return prediction

    dataset = data.Shapes(6, 96, 0, "val", "det")
    metrics = evaluation.evaluate(Oracle(dataset, "det", shifted), dataset, CPU, batch_size=4)
    truth = dataset.coco()
    results = []
    for entry in truth.dataset["annotations"]:
        (x, y, w, h), i = entry["bbox"], entry["image_id"]
        results.append(dict(image_id=i, category_id=entry["category_id"], bbox=[x + i, y, w, h], score=0.5 + 0.01 * i))
    expected = [value if value >= 0 else math.nan for value in plain_metrics(truth, results)]
    assert 0.2 < expected[0] < 0.9
    np.testing.assert_allclose([metrics[name] for name in evaluation.COCO_METRICS], expected)


@pytest.mark.parametrize("task", ["det", "inst", "pan"])
def test_no_predictions_score_zero(task):
    def nothing(dataset, task, index):
        prediction = truth_as_prediction(dataset, task, index)
        if task == "pan":
            return dict(panoptic=torch.zeros_like(prediction["panoptic"]), segments=[])
        return {name: value[:0] for name, value in prediction.items()}

    assert dense_metrics(task, nothing, length=3)[evaluation.METRIC[task]] == 0


def test_without_any_ground_truth_metrics_are_nan(monkeypatch):
    dataset = data.Shapes(2, 96, 0, "val", "det")
    model, image = Oracle(dataset, "det"), dataset.scene(0, 0)[0]
    model.known = {pixels_of(dataset, 0): next(iter(model.known.values()))}
    monkeypatch.setattr(dataset, "scene", lambda epoch, index: (image, [], None))
    metrics = evaluation.evaluate(model, dataset, CPU)
    assert metrics.pop("images") == 2 and all(math.isnan(value) for value in metrics.values())


@pytest.mark.parametrize("task", ["det", "inst"])
def test_saved_predictions_have_the_same_metrics(tmp_path, task):
    metrics = dense_metrics(task, half_right, save=str(tmp_path / "found.json"))
    truth = data.Shapes(6, 96, 0, "val", task).coco()
    assert 0.2 < metrics[evaluation.METRIC[task]] < 0.9
    prefixes = {"bbox": ""} if task == "det" else {"bbox": "box_", "segm": "mask_"}
    for kind, prefix in prefixes.items():
        results = json.loads((tmp_path / "found.json").read_text())
        for result in results if kind == "segm" else []:
            del result["bbox"]  # or pycocotools would take its area for that of the mask
        expected = [value if value >= 0 else math.nan for value in plain_metrics(truth, results, kind)]
        np.testing.assert_array_equal([metrics[prefix + name] for name in evaluation.COCO_METRICS], expected)


def test_saved_predictions_have_the_ids_of_the_annotation_file(tmp_path):
    write_coco(tmp_path, "val")
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(tmp_path / "val2017" / "b.png")
    dataset = data.Coco(tmp_path, "val", "det", v2.Resize(20))
    evaluation.evaluate(Oracle(dataset, "det"), dataset, CPU, save=str(tmp_path / "found.json"))
    first = json.loads((tmp_path / "found.json").read_text())[0]
    assert first == dict(image_id=5, category_id=90, bbox=[10, 5, 20, 10], score=1)


def test_saved_panoptic_maps_are_read_back_the_same(tmp_path):
    (tmp_path / "coco").mkdir()
    ids = write_panoptic(tmp_path / "coco", "val")
    images, path = tmp_path / "coco" / "val2017", tmp_path / "coco" / "annotations" / "panoptic_val2017.json"
    (images / "more").mkdir()
    (images / "a.png").rename(images / "more" / "a.png")
    content = json.loads(path.read_text())
    content["images"][0]["file_name"] = "more/../more/a.png"  # must not decide where files are written
    path.write_text(json.dumps(content))
    dataset = data.Coco(tmp_path / "coco", "val", "pan", v2.Resize(20))
    evaluation.evaluate(Oracle(dataset, "pan"), dataset, CPU, save=str(tmp_path / "found.json"))
    (entry,) = json.loads((tmp_path / "found.json").read_text())["annotations"]
    assert entry["image_id"] == 1 and entry["file_name"] == "more_.._more_a.png"
    pixels = np.asarray(Image.open(tmp_path / "found" / entry["file_name"])).astype(int)
    assert np.array_equal(pixels @ [1, 256, 65536], ids)
    segments = {segment["id"]: segment for segment in entry["segments_info"]}
    assert {number: segment["category_id"] for number, segment in segments.items()} == {70000: 40, 258: 1, 3: 1}


def test_saved_label_maps_have_the_values_of_ade(tmp_path):
    write_ade(tmp_path)
    dataset = data.Ade(tmp_path, "val", v2.Resize(20))
    evaluation.evaluate(Oracle(dataset, "sem"), dataset, CPU, save=str(tmp_path / "found"))
    for index, name in enumerate(("a.png", "b.png")):
        saved = torch.from_numpy(np.asarray(Image.open(tmp_path / "found" / name)).astype(int))
        assert torch.equal(saved, dataset.label_map(index).clamp(min=0) + 1)


@pytest.mark.parametrize("task", DENSE)
def test_dense_predictions_are_evaluated_at_the_size_of_the_image_file(tmp_path, task):
    if task == "sem":
        write_ade(tmp_path)
    else:
        (write_panoptic if task == "pan" else write_coco)(tmp_path, "val")
    dataset = evaluation.validation_set(tmp_path, 32, task)
    image, target = dataset[0, 0]
    assert image.shape == (3, 32, 48) and target["size"] == (40, 60)


# ---------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("names", [["disc"], ["star", "bar"]])
def test_the_explanation_of_a_logit_adds_up_to_it(names):
    model, image = random_model().eval(), torch.rand(3, 200, 170)
    weights = torch.zeros(10)
    for sign, name in zip((1, -1), names):
        weights[list(data.THINGS).index(name)] = sign
    value, bias, contributions = evaluation.explain(model, image, weights)
    logits = model([image])["logits"][0].detach()
    assert value == pytest.approx((logits @ weights).item(), abs=1e-5)
    assert bias + contributions.sum().item() == pytest.approx(value, abs=1e-4)
    assert contributions.shape == (12, 7, 6)  # a center per 2 x 2 tokens of 32 x 32 pixels


def test_a_contribution_is_what_the_token_added_to_the_center():
    """The head in NumPy, token by token."""
    model, image, number = random_model().eval(), torch.rand(3, 96, 90), 3
    with torch.no_grad():
        entry, head = cf.trace(model, [image])[-1], model.head
    _, bias, contributions = evaluation.explain(model, image, torch.eye(10)[number])
    x, V = entry["tokens"][0].double().numpy(), head.cluster.v.detach().double().numpy()  # (N, D), (h, d, d)
    (N, D), h = x.shape, len(V)
    assert contributions.shape == (4, 3, 3)  # 2 x 2 cells of 2 x 2 tokens, overlapping in the middle
    cells = [[0, 1, 3, 4], [1, 2, 4, 5], [3, 4, 6, 7], [4, 5, 7, 8]]
    gamma, beta = head.center_norm.weight.detach().numpy(), head.center_norm.bias.detach().numpy()
    w, b = head.classifier.weight[number].detach().numpy(), head.classifier.bias[number].item()
    for k in range(4):
        parts = np.zeros((N, D))
        for i in range(N):
            parts[i] += x[i] / len(cells[k]) if i in cells[k] else 0
            for j in range(h):
                for W in entry["weights"]:
                    parts[i, j::h] += W[0, j, k, i].item() * (x[i, j::h] @ V[j])
        C = parts.sum(0)
        np.testing.assert_allclose(C, entry["centers"][-1][0, k].numpy(), rtol=1e-4, atol=1e-5)
        for i in range(N):
            part = (parts[i] - parts[i].mean()) / np.sqrt(C.var() + head.center_norm.eps)
            np.testing.assert_allclose(contributions[k].flatten()[i], w @ (gamma * part) / 4, rtol=1e-3, atol=1e-5)
    assert bias == pytest.approx(b + w @ beta, abs=1e-6)


def saved_checkpoint(path, task):
    model = cf.ClusterFormer("cls", "nano", num_classes=8) if task == "cls" else random_dense(task)
    for parameter in model.parameters():
        parameter.data += 0.03 * torch.randn_like(parameter)
    classes = list(data.THINGS)[: model.num_classes]
    torch.save(state_of(model, classes, task=task, image_size=64, data=None), path)
    return model.eval()


@pytest.mark.parametrize("task", cf.TASKS)
def test_predictions_are_drawn_and_written_as_data(tmp_path, capsys, task):
    model = saved_checkpoint(tmp_path / "last.pt", task)
    (tmp_path / "photos" / "more").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photos" / "a.png")
    Image.new("L", (300, 100), 80).save(tmp_path / "b c.jpg")
    out, found = tmp_path / "out", tmp_path / "found.json"
    Image.new("RGB", (40, 40)).save(tmp_path / "a.jpg")
    images = [tmp_path / "photos", tmp_path / "b c.jpg", tmp_path / "a.jpg"]
    arguments = ["--checkpoint", tmp_path / "last.pt", "--images", *images, "--clusters", "--out", out, "--json", found]
    printed = call(evaluation, capsys, *arguments, *(["--explain"] if task == "cls" else []))
    assert f"3 images drawn in {out}" in printed
    kinds = ["", "-clusters", "-explained"] if task == "cls" else ["", "-clusters"]
    names = {f"{name}{kind}.png" for name in ("a", "b c", "a-2") for kind in kinds}
    assert {path.name for path in out.iterdir()} == names
    for path in out.iterdir():
        with Image.open(path) as picture:
            assert min(picture.size) > 100 and picture.convert("L").getextrema()[0] < 100
    a, b, _ = json.loads(found.read_text())
    assert a["image"].endswith("a.png")
    assert (a["height"], a["width"], b["height"], b["width"]) == (50, 90, 100, 300)
    (_, image, size), _ = evaluation.images_of([tmp_path / "photos", tmp_path / "b c.jpg"], task, 64)
    (prediction,) = model.predict([image], [size])
    if task in ("cls", "det", "inst"):
        assert [x["score"] for x in a["found"]] == pytest.approx(prediction["scores"].tolist(), abs=1e-5)
        written = sorted((x["name"], x["score"]) for x in a["found"])  # by name: rounding decides near ties
        expected = sorted((list(data.THINGS)[c], s.item()) for c, s in zip(prediction["labels"], prediction["scores"]))
        assert [name for name, _ in written] == [name for name, _ in expected]
        assert [score for _, score in written] == pytest.approx([score for _, score in expected], abs=1e-5)
    if task in ("inst", "sem", "pan"):
        for x in a["found"]:
            mask = mask_utils.decode(x["mask"])
            assert mask.shape == (50, 90)
        if task == "sem":
            assert sum(mask_utils.decode(x["mask"]) for x in a["found"]).min() == 1
            assert sum(x["share"] for x in a["found"]) == pytest.approx(1)


def test_without_paths_held_out_images_are_drawn(tmp_path, capsys):
    saved_checkpoint(tmp_path / "last.pt", "cls")
    out = tmp_path / "out"
    call(evaluation, capsys, "--checkpoint", tmp_path / "last.pt", "--explain", "star", "disc", "--out", out)
    names = sorted(path.name for path in out.iterdir())
    assert names[:2] == ["scene 0-explained.png", "scene 0.png"] and len(names) == 16


def test_the_pictures_of_a_block_start_with_the_cells_of_a_grid():
    rows = evaluation.cluster_panels(random_model().eval(), torch.rand(3, 64, 64))
    stages = [f"stage {i + 1}, stride {4 * 2**i}: {4 ** (3 - i)} clusters" for i in range(4)]
    assert [title for title, _ in rows[0]] == ["image", *stages]
    iterations = [f"iteration {t + 1}: M({t})" for t in range(3)]
    assert [title for title, _ in rows[1]] == ["stage 2: C(0), the grid", *iterations]
    first = rows[1][0][1]
    assert len({tuple(first[:, y, x].tolist()) for y in (40, 280) for x in (40, 280)}) == 4


@pytest.mark.parametrize(
    "task, arguments, complaint",
    [
        ("cls", ["--images", "/no/such.jpg"], "/no/such.jpg: cannot be read as an image"),
        ("cls", ["--explain", "wolf"], "takes up to two of its classes: disc, ring"),
        ("det", ["--explain"], "--explain is for cls"),
        ("det", ["--images", "--per-class"], "pictures are drawn by one process"),
    ],
)
def test_one_line_says_why_no_pictures_are_drawn(tmp_path, capsys, task, arguments, complaint):
    saved_checkpoint(tmp_path / "last.pt", task)
    with pytest.raises(SystemExit) as stop:
        call(evaluation, capsys, "--checkpoint", tmp_path / "last.pt", "--out", tmp_path / "out", *arguments)
    assert complaint in str(stop.value) and "\n" not in str(stop.value)


@pytest.mark.parametrize("task", DENSE)
def test_the_command_line_prints_metrics_and_classes(tmp_path, capsys, monkeypatch, task):
    dataset = data.Shapes(500, 96, 0, "val", task)
    small = data.Shapes(5, 96, 0, "val", task)
    monkeypatch.setattr(evaluation, "validation_set", lambda data, size, *rest: small if size == 96 else None)
    settings = dict(task=task, image_size=48, test_size=96, data=None)
    checkpoint = dict(settings=settings, classes=dataset.classes)
    monkeypatch.setattr(evaluation, "load_checkpoint", lambda path: (Oracle(small, task, half_right), checkpoint))
    found = tmp_path / "found.json"
    printed = call(evaluation, capsys, "--checkpoint", "some.pt", "--per-class", "--workers", 0, "--json", found)
    assert {line.split()[0] for line in printed.splitlines()} >= set(dataset.classes)
    metrics = json.loads(found.read_text())
    assert evaluation.describe(metrics, task) + " of 5 images\n" in printed and "paper" not in printed
    assert [row["class"] for row in metrics["per_class"]] == dataset.classes
    name = {"det": "AP", "inst": "mask_AP", "sem": "IoU", "pan": "PQ"}[task]
    assert np.nanmean([row[name] for row in metrics["per_class"]]) == pytest.approx(metrics[evaluation.METRIC[task]])


def test_metrics_on_the_papers_data_are_printed_beside_the_papers(capsys):
    evaluation.print_metrics(dict(miou=0.5, pixel_accuracy=0.8, images=2000), "sem", compare=True)
    assert capsys.readouterr().out == "mIoU 0.500, pixel accuracy 0.800 of 2000 images (the paper's Small: 0.524)\n"


# ---------------------------------------------------------------------------------------------------------------
# Training and evaluating from the command line
# ---------------------------------------------------------------------------------------------------------------
def call(module, capsys, *arguments):
    """Run a script's main in this process.  Returns what it printed; raises SystemExit as the script would."""
    argv, sys.argv = sys.argv, [module.__name__ + ".py", *map(str, arguments)]
    handlers = [signal.getsignal(number) for number in SIGNALS]
    try:
        evaluation.run(module.main)
    finally:
        sys.argv = argv
        for number, handler in zip(SIGNALS, handlers):
            signal.signal(number, handler)
    return capsys.readouterr().out


SIGNALS = signal.SIGTERM, signal.SIGINT
QUICK = ["--image-size", 32, "--patch-size", 2, "--batch-size", 50, "--workers", 0]


@pytest.fixture
def short_epochs(monkeypatch):
    monkeypatch.setattr(train, "Shapes", lambda length, *rest: data.Shapes(200, *rest))
    monkeypatch.setattr(train, "validation_set", lambda *_: data.Shapes(40, 32, 0, "val"))


def test_a_short_run_beats_chance_by_a_wide_margin(tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    monkeypatch.setattr(train, "Shapes", lambda length, *rest: data.Shapes(2500, *rest))
    for module in (train, evaluation):
        monkeypatch.setattr(module, "validation_set", lambda *_: data.Shapes(400, 32, 0, "val"))
    call(train, capsys, *QUICK[:4], "--batch-size", 25, "--epochs", 1, "--workers", 1, "--out", out)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["top1"] >= 0.3 and metrics["images"] == 400  # chance: 0.125 +- 0.017; here 0.44 to 0.46
    (line,) = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert line["top1"] == metrics["top1"] and line["epoch"] == 1 and line["step"] == 100
    again = ["--batch-size", 25, "--json", tmp_path / "found.json"]  # the same batches, so the same rounding
    printed = call(evaluation, capsys, "--checkpoint", out / "best.pt", *again)
    assert json.loads((tmp_path / "found.json").read_text()) == metrics and f"{metrics['top1']:.2%}" in printed


def test_between_evaluations_the_log_has_only_the_loss_and_best_pt_stays(tmp_path, capsys, short_epochs, monkeypatch):
    values, out = iter([0.5, 0.75, 0.25]), tmp_path / "run"
    monkeypatch.setattr(train, "evaluate", lambda *_: dict(top1=next(values), top5=1.0, images=1))
    printed = call(train, capsys, *QUICK, "--epochs", 5, "--evaluate-every", 2, "--out", out)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line.get("top1") for line in log] == [None, 0.5, None, 0.75, 0.25]  # always after the last epoch
    assert all(math.isfinite(line["loss"]) for line in log) and printed.count("images/s") == 5
    assert torch.load(out / "best.pt")["step"] == log[3]["step"]
    assert json.loads((out / "metrics.json").read_text())["top1"] == 0.25


def test_the_interval_between_evaluations_depends_on_the_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cases = {"": 1, "--data D": 1, "--task sem": 1, "--task sem --data D": 5, "--task pan --data D": 5}
    for arguments, epochs in cases.items():
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments.split()])
        assert train.parse_settings().evaluate_every == epochs


def test_gradient_accumulation_gives_the_step_of_the_whole_batch(tmp_path, capsys, monkeypatch, short_epochs):
    # Adam would magnify rounding in its first steps.  Adam and clipping would hide a gradient of the wrong norm.
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, **_: torch.optim.SGD(groups, 0.0))
    arguments = [*QUICK, "--epochs", 1, "--lr", 0.1, "--clip", 0, "--mixup", 0.8]
    for accumulate in (1, 5):
        call(train, capsys, *arguments, "--accumulate", accumulate, "--out", tmp_path / str(accumulate))
    a, b = (torch.load(tmp_path / name / "last.pt")["model"] for name in ("1", "5"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=1e-4)


def test_training_with_two_processes_under_torchrun(tmp_path, folder):
    slow()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d"]
    command += ["--rdzv_endpoint=localhost:0", "train.py", "--data", folder, "--variant", "nano", "--image-size", 32]
    command += ["--epochs", 2, "--warmup-epochs", 1, "--batch-size", 8, "--accumulate", 2, "--workers", 1]
    command += ["--out", tmp_path / "run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), cwd=HERE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 2
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["images"] == 6
    assert done.stdout.count("held-out images") == 1


# ---------------------------------------------------------------------------------------------------------------
# Runs that are stopped
# ---------------------------------------------------------------------------------------------------------------
def start(processes, *arguments, **options):
    """Start train.py, under torchrun if there are several processes."""
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--rdzv_backend=c10d"]
    torchrun += ["--rdzv_endpoint=localhost:0"]
    command = [sys.executable, *(torchrun if processes > 1 else []), "train.py", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=HERE, env=environment, **pipes, **options)


def members(mark):
    """Processes with this text in their command lines: pid -> pid of the parent."""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if str(mark) in open(f"/proc/{name}/cmdline").read():
                found[int(name)] = int(open(f"/proc/{name}/stat").read().rsplit(")", 1)[1].split()[1])
        except OSError:
            pass  # it has just ended
    return found


def kill(out):
    """Kill all processes of a run at once, as when a machine goes down: torchrun, training, loaders."""
    for pid in members(out):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_for(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.02)


def step_of(out):
    return torch.load(out / "last.pt")["step"] if (out / "last.pt").exists() else 0


MEASURED = "seconds", "images_per_second", "memory_MiB"


def assert_same_end(a, b):
    a, b = (torch.load(out / "last.pt") for out in (a, b))
    assert a["step"] == b["step"]
    for name in ("model", "ema"):
        assert a[name].keys() == b[name].keys()
        assert all(torch.equal(a[name][key], b[name][key]) for key in a[name])
    a, b = ([{k: v for k, v in line.items() if k not in MEASURED} for line in x["log"]] for x in (a, b))
    assert repr(a) == repr(b)  # nan is nan


def many_times(content):
    """List the images of a COCO file, and their annotations, nine times."""
    for table, keys in (("images", ["id"]), ("annotations", ["id", "image_id"])):
        entries = content[table]
        content[table] = [e | {key: e[key] + 1000 * i for key in keys} for i in range(9) for e in entries]


def short_run(task, folder):
    """Arguments of a run of 18 steps in two epochs."""
    if task == "det":
        folder.mkdir()
        write_coco(folder, "train")
        write_coco(folder, "val")
        edit_json(many_times)(folder)
        return ["--task", "det", "--data", folder, "--variant", "nano", "--image-size", 48, "--test-size", 40,
                "--batch-size", 2, "--epochs", 2, "--workers", 0, "--seed", 1]
    write_images(folder, "train", ("cat", "dog"), count=18)
    write_images(folder, "val", ("cat", "dog"))
    return ["--data", folder, "--variant", "nano", "--image-size", 32, "--batch-size", 4, "--epochs", 2,
            "--drop-path", 0.2, "--workers", 1]


def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, capsys, monkeypatch):
    """Interrupted in a step and in a write, within this process; the next test kills processes."""
    arguments = short_run("cls", tmp_path / "files")
    call(train, capsys, *arguments, "--out", tmp_path / "whole")
    out = tmp_path / "broken"
    for module, name, last in [(cf.ClusterFormer, "loss", 5), (os, "fsync", 7)]:

        def broken(*arguments, right=getattr(module, name), calls=itertools.count(1)):
            if next(calls) == last:
                raise KeyboardInterrupt
            return right(*arguments)

        before = step_of(out)
        with monkeypatch.context() as patched, pytest.raises(SystemExit):
            patched.setattr(module, name, broken)
            call(train, capsys, *arguments, "--out", out, "--resume", "--checkpoint-every", 0)
        assert before < step_of(out) < 18
    assert "resuming after step" in call(train, capsys, "--out", out, "--resume")
    assert_same_end(tmp_path / "whole", out)


@pytest.mark.parametrize("task, processes", [("cls", 1), ("det", 2)])
def test_killed_at_any_moment_a_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, task, processes):
    """Twice; with KILLS=20 in the environment, 20 times."""
    slow()
    arguments = short_run(task, tmp_path / "files")
    assert start(processes, *arguments, "--out", tmp_path / "whole").wait() == 0
    out, rng = tmp_path / "killed", random.Random(0)
    for _ in range(int(os.environ.get("KILLS", 2))):
        run, before = start(processes, *arguments, "--out", out, "--resume", "--checkpoint-every", 0), step_of(out)
        # During a write, or after it.
        moment = rng.choice([(out / "last.pt.part").exists, lambda: step_of(out) > before])
        wait_for(lambda: moment() or run.poll() is not None)
        time.sleep(rng.uniform(0, 0.3))
        kill(out)
        run.communicate()
        assert step_of(out) >= before
    run = start(processes, "--out", out, "--resume", "--task", task)
    printed, errors = run.communicate()
    assert run.returncode == 0 and "resuming after step" in printed, errors
    assert_same_end(tmp_path / "whole", out)


def test_on_a_signal_all_processes_finish_the_step_and_one_can_resume(tmp_path):
    slow()
    arguments = [*short_run("cls", tmp_path / "files"), "--epochs", 200]
    out = tmp_path / "run"
    run = start(2, *arguments, "--out", out, "--checkpoint-every", 0)
    wait_for(lambda: step_of(out) > 2)
    sent = time.time()
    os.kill(run.pid, signal.SIGTERM)  # torchrun forwards it
    printed, errors = run.communicate()
    assert run.returncode != 0 and time.time() - sent < 20 and not members(out)
    step = int(re.search(r"stopped after step (\d+) of 1800; --out \S+ --resume continues", errors).group(1))
    assert step == step_of(out)
    run = start(1, "--out", out, "--resume")
    wait_for(lambda: step_of(out) > step)
    run.send_signal(signal.SIGINT)  # Ctrl-C
    printed, errors = run.communicate()
    assert run.returncode == 130 and "Traceback" not in errors and f"resuming after step {step}" in printed


def test_a_run_resumes_with_another_number_of_processes_and_says_so(tmp_path, capsys, short_epochs):
    out = tmp_path / "run"
    call(train, capsys, *QUICK, "--epochs", 1, "--out", out)
    torch.save(torch.load(out / "last.pt") | {"processes": 4}, out / "last.pt")
    printed = call(train, capsys, "--resume", "--epochs", 2, "--out", out)
    assert "resuming after step 4\n4 processes before, 1 now: every step uses the same images" in printed


def test_a_full_disk_leaves_the_previous_checkpoint_intact(tmp_path, capsys):
    arguments, out = short_run("cls", tmp_path / "files"), tmp_path / "run"
    call(train, capsys, *arguments, "--epochs", 1, "--out", out)
    before = (out / "last.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))  # no file may exceed a megabyte
    try:
        with pytest.raises(SystemExit) as stop:
            call(train, capsys, "--out", out, "--resume", "--epochs", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = str(stop.value)
    assert message.startswith(f"train.py: error: {out}/last.pt: cannot be written (") and "\n" not in message
    assert "the previous file is still intact" in message
    assert (out / "last.pt").read_bytes() == before and not (out / "last.pt.part").exists()
    evaluation.load_checkpoint(out / "last.pt")


def spoil(monkeypatch, steps):
    """Make the losses of these steps NaN."""
    calls, right = itertools.count(), cf.ClusterFormer.loss

    def wrong(*arguments):
        factor = math.nan if next(calls) in steps else 1.0
        return {name: factor * loss for name, loss in right(*arguments).items()}

    monkeypatch.setattr(cf.ClusterFormer, "loss", wrong)


def test_a_step_whose_loss_is_not_finite_changes_nothing_and_is_counted(tmp_path, capsys, monkeypatch, short_epochs):
    out = tmp_path / "run"
    spoil(monkeypatch, {2, 3})
    assert "2 steps of this epoch were skipped" in call(train, capsys, *QUICK, "--epochs", 1, "--out", out)
    checkpoint = torch.load(out / "last.pt")
    assert {state["step"].item() for state in checkpoint["optimizer"]["state"].values()} == {2.0}
    assert checkpoint["step"] == 4
    assert all(value.isfinite().all() for value in checkpoint["model"].values())
    assert math.isfinite(checkpoint["log"][0]["loss"])


def spoiled_on_one(rank):
    """Weights after four steps; in the second, one of two processes has no finite loss."""
    with pytest.MonkeyPatch.context() as monkeypatch, tempfile.TemporaryDirectory() as out:
        monkeypatch.setattr(train, "Shapes", lambda length, *rest: data.Shapes(40, *rest))
        monkeypatch.setattr(train, "validation_set", lambda *_: data.Shapes(4, 32, 0, "val"))
        monkeypatch.setattr(train, "start_processes", lambda: (rank, 2, torch.device("cpu")))
        monkeypatch.setattr(train, "evaluate", lambda *_: dict(top1=0.0, top5=0.0, images=4))
        arguments = [*QUICK[:4], "--batch-size", 10, "--epochs", 1, "--workers", 0, "--out", out]
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        states = []
        monkeypatch.setattr(train, "save", lambda *_: None)
        average = train.get_ema_multi_avg_fn
        record = lambda decay: lambda ema, own, _: (states.append(own), average(decay)(ema, own, _))
        monkeypatch.setattr(train, "get_ema_multi_avg_fn", record)
        if rank == 1:
            spoil(monkeypatch, {1})
        train.main()
    return len(states), [value.detach() for value in states[-1]]


def test_all_processes_skip_the_step_in_which_one_has_no_finite_loss(pair):
    (first, weights), (second, others) = (parts["spoiled_on_one"] for parts in pair)
    assert first == second == 3
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(weights, others))


def test_after_20_bad_steps_a_run_stops_and_its_checkpoint_is_from_before_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "Shapes", lambda length, *rest: data.Shapes(2000, *rest))
    monkeypatch.setattr(train, "validation_set", lambda *_: data.Shapes(40, 32, 0, "val"))
    spoil(monkeypatch, range(3, 100))
    out = tmp_path / "run"
    complaint = "not finite in 20 steps in a row, 4 to 23: lower --lr .* is from before them"
    with pytest.raises(SystemExit, match=complaint):
        call(train, capsys, *QUICK, "--epochs", 1, "--checkpoint-every", 0, "--out", out)
    assert step_of(out) == 3
    evaluation.load_checkpoint(out / "last.pt")


def test_when_one_process_dies_the_other_does_not_wait_for_it(tmp_path):
    slow()
    out = tmp_path / "run"
    run = start(2, *short_run("cls", tmp_path / "files"), "--epochs", 500, "--out", out, "--checkpoint-every", 0)
    wait_for(lambda: step_of(out) > 0)
    os.kill(max(pid for pid, parent in members(out).items() if parent == run.pid), signal.SIGKILL)
    died = time.time()
    _, errors = run.communicate()
    assert run.returncode != 0 and time.time() - died < 60 and not members(out)


class Deadly(data.Shapes):
    def __getitem__(self, key):
        if key[1] == 7:
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory runs out
        return super().__getitem__(key)


def test_the_error_names_the_file_on_which_a_loader_process_died():
    whole = data.SkipBroken(Deadly(20, 32, 0, "train"), workers=2)
    loader = DataLoader(whole, 2, sampler=[(0, index) for index in range(20)], num_workers=2)
    with pytest.raises(data.InputError, match="^scene 7: a loader process died with it"):
        list(whole.read(loader))


def test_init_takes_what_fits_and_says_what_does_not(tmp_path, capsys, short_epochs, folder):
    call(train, capsys, *QUICK, "--epochs", 1, "--out", tmp_path / "shapes")
    arguments = ["--data", folder, "--variant", "nano", *QUICK[:4], "--batch-size", 8, "--workers", 0, "--epochs", 1]
    arguments += ["--init", tmp_path / "shapes" / "last.pt", "--out", tmp_path / "run"]
    printed = call(train, capsys, *arguments)
    assert "new: head.classifier.bias, head.classifier.weight" in printed


def test_iterations_are_a_flag_that_the_checkpoint_and_a_resumed_run_keep(tmp_path, capsys, short_epochs):
    arguments = ["--variant", "nano", *QUICK, "--iterations", 1, "--epochs", 1, "--out", tmp_path]
    call(train, capsys, *arguments)
    call(train, capsys, "--resume", "--epochs", 2, "--out", tmp_path)
    model, checkpoint = evaluation.load_checkpoint(tmp_path / "last.pt")
    assert model.arguments["iterations"] == checkpoint["settings"]["iterations"] == 1 and checkpoint["step"] == 8
    entries = cf.trace(model, torch.rand(1, 3, 64, 64))
    assert len(entries) == 8 and {len(entry["assignments"]) for entry in entries} == {1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "last.pt"
    model = cf.ClusterFormer("cls", "nano", num_classes=len(data.THINGS))
    torch.save(state_of(model, list(data.THINGS), task="cls", image_size=32, data=None), path)
    return path


@pytest.mark.parametrize("task", DENSE)
def test_a_dense_task_from_training_to_prediction(tmp_path, capsys, monkeypatch, task):
    monkeypatch.setattr(train, "Shapes", lambda length, *rest: data.Shapes(24, *rest))
    monkeypatch.setattr(evaluation, "Shapes", lambda length, *rest, **more: data.Shapes(5, *rest, **more))
    out = tmp_path / "run"
    quick = ["--task", task, "--image-size", 48, "--batch-size", 8, "--epochs", 2, "--workers", 0, "--out", out]
    printed = call(train, capsys, *quick)
    assert "on 5 held-out images" in printed
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6] and all(math.isfinite(line["loss"]) for line in lines)
    names = {"label"} | ({"l1", "giou"} if "boxes" in KEYS[task] else set())
    names |= {"mask", "dice", "pixel"} if "masks" in KEYS[task] else set()
    parts = [value for name, value in lines[0].items() if name.startswith("loss_")]
    assert {f"loss_{name}" for name in names} <= lines[0].keys() and sum(parts) == pytest.approx(lines[0]["loss"])
    again = ["--batch-size", 8, "--json", tmp_path / "found.json"]
    printed = call(evaluation, capsys, "--checkpoint", out / "last.pt", *again)
    saved, metrics = (json.loads(path.read_text()) for path in (out / "metrics.json", tmp_path / "found.json"))
    assert saved.keys() == metrics.keys()
    for name in saved:
        assert saved[name] == pytest.approx(metrics[name], abs=1e-3, nan_ok=True)
    assert printed.split(" of ")[0] in call(train, capsys, "--resume", "--out", out)  # nothing is left to do
    with pytest.raises(SystemExit, match=f"belongs to a run of --task {task}"):
        call(train, capsys, "--resume", "--out", out, "--task", "cls")
    model, checkpoint = evaluation.load_checkpoint(out / "last.pt")
    assert checkpoint["classes"] == data.Shapes(1, 48, 0, "val", task).classes
    (prediction,) = model.predict([torch.rand(3, 40, 56)])
    for name in ("masks", "semantic", "panoptic"):
        assert name not in prediction or prediction[name].shape[-2:] == (40, 56)


def coco_folder(root):
    for split in ("train", "val"):
        write_coco(root, split)
    return root


def test_fine_tuning_from_a_checkpoint_trains_the_backbone_slowly(tmp_path, capsys, monkeypatch, checkpoint):
    coco_folder(tmp_path)
    rates, groups, out = [], train.parameter_groups, tmp_path / "run"
    monkeypatch.setattr(train, "parameter_groups", lambda *args: rates.append(args[2]) or groups(*args))
    arguments = ["--task", "inst", "--data", tmp_path, "--variant", "nano", "--image-size", 64, "--test-size", 48]
    arguments += ["--batch-size", 2, "--epochs", 2, "--init", checkpoint, "--workers", 0, "--out", out]
    printed = call(train, capsys, *arguments)
    assert "2 images, 2 classes, 3 objects, 1 crowds ignored, ignored 1 objects without area or mask" in printed
    assert "new: head.decoder." in printed
    assert rates == [0.1] and len((out / "log.jsonl").read_text().splitlines()) == 2
    printed = call(evaluation, capsys, "--checkpoint", out / "last.pt", "--per-class")
    assert "mask AP" in printed and "kite" in printed


def panoptic_folder(root):
    for split in ("train", "val"):
        write_panoptic(root, split)


@pytest.mark.parametrize("task, write", [("det", coco_folder), ("pan", panoptic_folder), ("sem", write_ade)])
def test_training_reads_the_layouts_of_coco_and_ade(tmp_path, capsys, task, write):
    (tmp_path / "files").mkdir()
    write(tmp_path / "files")
    count, arguments = 1 if task == "pan" else 2, ["--task", task, "--data", tmp_path / "files", "--variant", "nano"]
    arguments += ["--image-size", 64, "--test-size", 40, "--epochs", 1, "--workers", 0, "--out", tmp_path / "run"]
    call(train, capsys, *arguments, "--batch-size", count)
    saved = tmp_path / ("maps" if task == "sem" else "found.json")
    printed = call(evaluation, capsys, "--checkpoint", tmp_path / "run" / "last.pt", "--save-predictions", saved)
    assert f"of {count} images" in printed and saved.exists()


# ---------------------------------------------------------------------------------------------------------------
# On a GPU:   pytest -q -k on_a_gpu
# ---------------------------------------------------------------------------------------------------------------
def needs_gpus(count):
    return pytest.mark.skipif(torch.cuda.device_count() < count, reason=f"needs {count} GPU" + "s" * (count > 1))


def write_scenes(root, task, sizes):
    """Write scenes of shapes in the layout of the task, the same for both splits.  sizes: a list of (height, width)."""
    scenes = data.Shapes(len(sizes), max(map(max, sizes)), 0, "val", task)
    kind = "panoptic" if task == "pan" else "instances"
    rows = zip(scenes.categories, scenes.classes, scenes.things)
    table = [dict(id=i, name=name, isthing=int(thing)) for i, name, thing in rows]
    for split, ade in (("train", "training"), ("val", "validation")):
        maps = root / "annotations" / (ade if task == "sem" else f"panoptic_{split}2017")
        images = root / "images" / ade if task == "sem" else root / f"{split}2017"
        content = dict(images=[], annotations=[], categories=table)
        for i, (height, width) in enumerate(sizes):
            pixels, shown, label = scenes.scene(0, i)
            labeled, segments = np.zeros((height, width, 3), np.uint8), []
            shown = [(category, mask[:height, :width]) for category, mask in shown if mask[:height, :width].any()]
            for number, (category, mask) in enumerate(shown, 1):
                rle = mask_utils.encode(np.asfortranarray(mask, np.uint8))
                labeled[mask, 0] = category + 1 if task == "sem" else number
                row = dict(id=number, image_id=i, category_id=category + 1, area=int(mask.sum()), iscrowd=0)
                row |= dict(bbox=mask_utils.toBbox(rle).tolist(), segmentation=rle)
                rle["counts"] = rle["counts"].decode()
                segments.append(row)
            content["images"].append(dict(id=i, file_name=f"{i}.jpg", height=height, width=width))
            whole = dict(image_id=i, file_name=f"{i}.png", segments_info=segments)
            content["annotations"] += [whole] if task == "pan" else segments
            place = root / split / scenes.classes[label] if task == "cls" else images
            for folder in (place, maps):
                folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[:, :height, :width].transpose(1, 2, 0).copy()).save(place / f"{i}.jpg")
            Image.fromarray(labeled[..., 0] if task == "sem" else labeled).save(maps / f"{i}.png")
        (root / "annotations" / f"{kind}_{split}2017.json").write_text(json.dumps(content))


def finite_log(out, task):
    """The lines of a run's log, whose loss and metric must be finite."""
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(line[key]) for line in log for key in ("loss", evaluation.METRIC[task])), log
    return log


def train_and_evaluate(tmp_path, capsys, task, processes):
    """Two steps and an evaluation, the same after a resume on one process, and eval.py, on images of unequal sizes."""
    out = tmp_path / "run"
    write_scenes(tmp_path / "files", task, [(60, 90), (80, 64), (48, 70), (70, 71)])
    arguments = ["--task", task, "--data", tmp_path / "files", "--variant", "nano", "--image-size", 64]
    arguments += [] if task == "cls" else ["--test-size", 48]
    arguments += ["--batch-size", 2, "--epochs", 1, "--workers", 1, "--out", out]
    if processes == 1:
        call(train, capsys, *arguments)
    else:
        run = start(processes, *arguments)
        _, errors = run.communicate()
        assert run.returncode == 0, errors
    assert "resuming after step 2" in call(train, capsys, "--task", task, "--resume", "--epochs", 2, "--out", out)
    assert [line["step"] for line in finite_log(out, task)] == [2, 4]
    assert "of 4 images" in call(evaluation, capsys, "--checkpoint", out / "last.pt", "--workers", 0)  # in one batch


def class_map(prediction):
    """The class of each pixel for sem and pan; for inst, whether it belongs to an object."""
    if "panoptic" in prediction:
        label = torch.tensor([-1, *(segment["label"] for segment in prediction["segments"])])
        place = torch.tensor([0, *(segment["id"] for segment in prediction["segments"])])
        return label[torch.searchsorted(place, prediction["panoptic"].cpu())]
    return prediction["semantic"].cpu() if "semantic" in prediction else prediction["masks"].any(0).cpu()


def compare_predictions(task, there):
    """float32 predictions for images of unequal sizes on the CPU and on a device, which may multiply in TF32."""
    model = random_model() if task == "cls" else random_dense(task)
    images = [torch.rand(3, *size) for size in [(96, 64), (50, 70), (100, 81)]]
    with torch.no_grad():
        expected, exact = model.predict(images), model(images)
        model, images = model.to(there), [image.to(there) for image in images]
        found, rough = model.predict(images), model(images)
    for key in exact.keys() - {"aux"}:
        real = exact[key] > -99  # centers that the image has
        difference = (rough[key].cpu() - exact[key])[real].abs().mean()
        assert difference < 0.01 * exact[key][real].abs().mean(), key
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        if "scores" in a:
            torch.testing.assert_close(a["scores"][:5].cpu(), b["scores"][:5], atol=0.01, rtol=0.01)
        if task in ("inst", "sem", "pan"):
            assert (class_map(a) == class_map(b)).float().mean() > 0.95


@pytest.mark.parametrize("task", cf.TASKS)
@pytest.mark.parametrize("processes", [pytest.param(count, marks=needs_gpus(count)) for count in (1, 2)])
def test_training_and_evaluation_on_a_gpu(tmp_path, capsys, task, processes):
    train_and_evaluate(tmp_path, capsys, task, processes)
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])["memory_MiB"] > 0


@pytest.mark.parametrize("task", cf.TASKS)
@needs_gpus(1)
def test_predictions_on_a_gpu_match_those_of_the_cpu(task):
    compare_predictions(task, torch.device("cuda"))


# ---------------------------------------------------------------------------------------------------------------
# Dress rehearsal of the full-scale recipes:   REHEARSAL=1 pytest -q -s -k rehearsal
# ---------------------------------------------------------------------------------------------------------------
FULL_SIZE = dict(cls=224, det=1024, inst=1024, sem=512, pan=1024)


@pytest.fixture(scope="module")
def rehearsed():
    rows = [["", "s a step", "s of evaluation", "MiB a process"]]
    yield rows
    for row in ["", *rows]:
        print(*row, sep="\t")


@pytest.mark.skipif("REHEARSAL" not in os.environ, reason="takes long; REHEARSAL=1 in the environment runs it")
@pytest.mark.parametrize("task", cf.TASKS)
def test_rehearsal_of_a_full_scale_recipe(tmp_path, monkeypatch, rehearsed, task):
    """Two processes with an image each: two steps, an evaluation, SIGTERM, and a resume to the end."""
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # a step may take longer than 30 s
    out = tmp_path / "run"
    write_scenes(tmp_path / "files", task, [(480, 640), (640, 480), (427, 640), (500, 375)])
    files = ["--data", tmp_path / "files", "--batch-size", 2, "--epochs", 2, "--evaluate-every", 1]
    run = start(2, "--task", task, *files, "--workers", 1, "--out", out)
    written = []
    try:
        for name in ("last.pt", "log.jsonl"):  # written before the evaluation, and after it
            wait_for(lambda: (out / name).exists() or run.poll() is not None, 3600)
            written.append(time.time())
        memory = [benchmark.resident_peak(pid) / 2**20 for pid, parent in members(out).items() if parent == run.pid]
        run.send_signal(signal.SIGTERM)
        printed, errors = run.communicate()
        size = FULL_SIZE[task]
        assert f"{task}, tiny, " in printed and f"training images of {size} x {size} " in printed, errors
        step = int(re.search(r"stopped after step (\d+) of 4; ", errors).group(1))
        assert run.returncode != 0 and 2 <= step < 4 and len(memory) == 2
        run = start(2, "--task", task, "--out", out, "--resume")
        printed, errors = run.communicate()
        assert run.returncode == 0 and f"resuming after step {step}\n" in printed, errors
    finally:
        kill(out)
    first, last = finite_log(out, task)
    assert (first["step"], last["step"]) == (2, 4) and step_of(out) == 4
    rehearsed.append([task, f"{first['seconds'] / 2:.1f}", f"{written[1] - written[0]:.1f}", f"{max(memory):.0f}"])


# ---------------------------------------------------------------------------------------------------------------
# Settings, messages, checkpoints, documentation
# ---------------------------------------------------------------------------------------------------------------
def test_the_backbone_has_a_lower_learning_rate_and_vectors_no_weight_decay():
    model = random_dense("det")
    rows = train.parameter_groups(model, 0.05, 0.1)
    assert sum(len(row["params"]) for row in rows) == len(list(model.parameters()))
    backbone = {id(p) for p in model.backbone.parameters()}
    for row in rows:
        assert {p.ndim > 1 for p in row["params"]} == {row["weight_decay"] > 0}
        assert {id(p) in backbone for p in row["params"]} == {row["rate"] == 0.1}


def test_learning_rates_warm_up_and_follow_their_schedules():
    rates = {name: [train.learning_rate(step, 110, 10, 1.0, name) for step in range(110)] for name in train.SCHEDULES}
    for rate in rates.values():
        np.testing.assert_allclose(rate[:10], np.arange(1, 11) / 10)
        assert (np.diff(rate[10:]) <= 0).all()
    assert rates["cosine"][60] == pytest.approx(0.5) and rates["poly"][60] == pytest.approx(0.5**0.9)
    assert [rates["step"][step] for step in (99, 100, 104, 105)] == [1, 0.1, 0.1, 0.01]


def without_train(root):
    (root / "train").rename(root / "training")


def empty_class(root):
    (root / "train" / "empty").mkdir()


def strange_val(root):
    write_images(root, "val", ["wolf"])


def no_classes(root):
    for path in sorted((root / "train").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()


def half_an_image(root):
    path = root / "val" / "cat" / "0.png"
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    "damage, complaint",
    [
        (without_train, "train: no such folder"),
        (empty_class, "no valid file for the classes empty"),
        (strange_val, "1 classes that the model is not trained for: wolf"),
        (no_classes, "Couldn't find any class folder"),
        (half_an_image, "0.png: cannot be read as an image"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_one_line_says_what_is_wrong_with_a_data_folder(tmp_path, capsys, folder, damage, complaint, workers):
    damage(folder)
    arguments = ["--data", folder, "--variant", "nano", "--image-size", 32, "--epochs", 1, "--batch-size", 8]
    with pytest.raises(SystemExit) as stop:
        call(train, capsys, *arguments, "--workers", workers, "--out", tmp_path / "run")
    message = str(stop.value)
    assert complaint in message and "\n" not in message and message.startswith("train.py: error: ")


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--data", "/no/such/folder"], "/no/such/folder: no such folder"),
        (["--batch-size", 0], "--batch-size must be at least 1, got 0"),
        (["--batch-size", 20000], "more than the 6500 training images"),
        (["--batch-size", 50, "--accumulate", 3], "not divisible by 1 processes x --accumulate 3"),
        (["--lr", "nan"], "--lr must be at least 0, got nan"),
        (["--image-size", 31], "--image-size must be at least 32"),
        (["--variant", "huge"], "--variant must be one of nano, tiny, small"),
        (["--patch-size", 3], "--patch-size must be one of 2, 4, got 3"),
        (["--smoothing", 1.5], "--smoothing must be below 1"),
        (["--epochs", 0], "--epochs must be at least 1"),
        (["--init", "/no/such/file"], "/no/such/file: no such checkpoint"),
    ],
)
def test_one_line_says_what_is_wrong_with_a_flag(tmp_path, capsys, arguments, complaint):
    with pytest.raises(SystemExit) as stop:
        call(train, capsys, *arguments, "--out", tmp_path)
    assert complaint in str(stop.value) and "\n" not in str(stop.value)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_run_is_not_overwritten(tmp_path, capsys, checkpoint):
    (tmp_path / "last.pt").write_bytes(checkpoint.read_bytes())
    with pytest.raises(SystemExit, match="--resume continues that run"):
        call(train, capsys, "--out", tmp_path)
    assert (tmp_path / "last.pt").read_bytes() == checkpoint.read_bytes()


def test_one_line_says_what_is_wrong_with_a_checkpoint(tmp_path, capsys, checkpoint, folder):
    half = tmp_path / "half.pt"
    half.write_bytes(checkpoint.read_bytes()[:100_000])
    other = tmp_path / "other.pt"
    torch.save({"weights": torch.zeros(2)}, other)
    task = tmp_path / "task.pt"
    content = torch.load(checkpoint)
    torch.save(content | {"arguments": content["arguments"] | {"task": "depth"}}, task)
    fewer = tmp_path / "fewer.pt"
    torch.save(content | {"arguments": content["arguments"] | {"num_classes": 2}}, fewer)
    older = tmp_path / "older.pt"
    torch.save(content | {"version": cf.VERSION - 1}, older)
    first = tmp_path / "first.pt"
    torch.save({name: value for name, value in content.items() if name not in ("version", "arguments")}, first)
    for arguments, complaint in [
        (["--checkpoint", tmp_path / "none.pt"], "no such checkpoint"),
        (["--checkpoint", half], "half.pt: not a readable checkpoint"),
        (["--checkpoint", other], "other.pt: not a checkpoint of train.py"),
        (["--checkpoint", task], "task must be one of cls, det, inst, sem, pan, got 'depth'"),
        (["--checkpoint", fewer], "fewer.pt: not a whole checkpoint of train.py (Error(s) in loading state_dict"),
        (["--checkpoint", older], f"older.pt: its weights are of version {cf.VERSION - 1}, this code needs version "),
        (["--checkpoint", first], "first.pt: its weights are of version 1, this code needs version "),
        (["--checkpoint", checkpoint, "--data", folder], "2 classes that the model is not trained for: cat, dog"),
        (["--checkpoint", checkpoint, "--data", tmp_path / "nowhere"], "nowhere: no such folder"),
        (["--checkpoint", checkpoint, "--batch-size", 0], "--batch-size must be at least 1"),
        (["--checkpoint", checkpoint, "--image-size", 16], "--image-size must be at least 32"),
    ]:
        with pytest.raises(SystemExit) as stop:
            call(evaluation, capsys, *arguments)
        message = str(stop.value)
        assert complaint in message and "\n" not in message and message.startswith("eval.py: error: "), message


def test_an_error_has_an_exit_code_and_no_traceback(tmp_path):
    command = [sys.executable, "train.py", "--batch-size", "0", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "train.py: error: --batch-size must be at least 1, got 0\n"


def test_a_checkpoint_knows_every_argument_of_its_model(tmp_path):
    arguments = dict(task="pan", variant="nano", num_classes=3, patch_size=2, iterations=1, drop_path=0.1)
    arguments |= dict(label_smoothing=0.1, things=[True, False, True])
    model = cf.ClusterFormer(**arguments)
    assert model.arguments == arguments
    assert inspect.signature(cf.ClusterFormer).parameters.keys() == arguments.keys()
    torch.save(state_of(model, ["a", "b", "c"]), tmp_path / "last.pt")
    again, _ = evaluation.load_checkpoint(tmp_path / "last.pt")
    assert again.arguments == arguments and again.backbone.stages[0][0].cluster.iterations == 1


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Malice:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "broken-in"),)

    torch.save({"model": Malice(), "ema": {}, "settings": {}, "classes": []}, tmp_path / "last.pt")
    with pytest.raises(data.InputError, match="not a readable checkpoint"):
        evaluation.load_checkpoint(tmp_path / "last.pt")
    assert not (tmp_path / "broken-in").exists()


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
    if words[0] == "train.py":
        settings = train.parse_settings()
        assert settings.task in cf.TASKS
    else:
        script = {"eval.py": evaluation, ".github/benchmark.py": benchmark}[words[0]]
        monkeypatch.setattr(script, "start_processes", lambda: sys.exit("valid"))
        with pytest.raises(SystemExit, match="^valid$"):
            script.main()


def test_the_examples_in_the_readme_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "cls").mkdir(parents=True)
    saved_checkpoint(tmp_path / "runs" / "cls" / "last.pt", "cls")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)).save("photo.jpg")
    first, _, detector = readme("python")
    exec(first, {})
    printed = capsys.readouterr().out
    assert any(name in printed for name in data.THINGS) and "torch.Size([1, 4, 2, 6]) torch.Size([2, 3])" in printed
    assert len(detector.splitlines()) <= 20
    names = {}
    exec(detector, names)
    target = dict(boxes=torch.tensor([[8.0, 8.0, 40.0, 40.0]]), labels=torch.tensor([3]))
    small = names["FasterRCNN"](names["Maps"](), 5, min_size=64, rpn_anchor_generator=names["anchors"])
    losses = small.train()([torch.rand(3, 64, 64)], [target])
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert len(names["detector"].eval()([torch.rand(3, 64, 64)])) == 1


@pytest.mark.parametrize("script", [train, evaluation, benchmark])
def test_help_explains_every_flag(capsys, script):
    with pytest.raises(SystemExit):
        call(script, capsys, "--help")
    text = capsys.readouterr().out
    for line in text.splitlines():
        if line.startswith("  --"):
            assert len(line.split()) > 1, line
    assert "default" in text


def test_the_module_needs_torch_and_numpy_only_and_is_readable():
    with open(cf.__file__) as file:
        text = file.read()
    nodes = list(ast.walk(ast.parse(text)))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} - {"torch", "numpy"} <= sys.stdlib_module_names
    for node in nodes:
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} has more than 60 lines"
    lengths = [len(line) for line in text.splitlines()]
    assert max(lengths) <= 120 and sum(length > 100 for length in lengths) < 0.05 * len(lengths)
