# SPDX-License-Identifier: MIT
"""Facts about the method and its use, against references written here in NumPy.   pytest -q"""

import itertools
import json
import math
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

import clusterformer as cf
import data
import eval as evaluation
import train

HERE = os.path.dirname(os.path.abspath(__file__))


def random_model(**arguments):
    """A nano model whose every parameter is random, so that no branch is at its neutral start."""
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


def softmax(x, axis):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def em_step(C, I, W_q, W_k, W_v, temperature):
    """One E- and one M-step for one image, head by head.  C (K, D), I (N, D) -> C (K, D), M (h, K, N)."""
    heads = len(temperature)
    d = C.shape[1] // heads
    moved, M = C.copy(), []
    for h in range(heads):
        part, gathered = slice(h * d, (h + 1) * d), slice(h, None, heads)  # channels compared, channels gathered
        q, k, v = C[:, part] @ W_q[h], I[:, part] @ W_k[h], I[:, gathered] @ W_v[h]
        cosine = (q / np.linalg.norm(q, axis=1, keepdims=True)) @ (k / np.linalg.norm(k, axis=1, keepdims=True)).T
        M.append(softmax(temperature[h] * cosine, axis=0))
        W = M[h] * np.exp(temperature[h] * cosine)
        for center in range(len(C)):
            moved[center, gathered] += sum(W[center, i] * v[i] for i in range(len(I))) / W[center].sum()
    return moved, np.stack(M)


# ---------------------------------------------------------------------------------------------------------------
# The method
# ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("iterations", [1, 3])
def test_a_recursion_is_an_em_step(iterations):
    module = random_clustering(iterations=iterations)
    centers, tokens = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(2, 17, 12, dtype=torch.float64)
    C, M = module(centers, tokens)
    weights = [weight.detach().numpy() for weight in (module.q, module.k, module.v)]
    temperature = module.log_temperature.detach().exp().flatten().numpy()
    for image in range(2):
        expected = centers[image].numpy()
        for _ in range(iterations):
            expected, assignment = em_step(expected, tokens[image].numpy(), *weights, temperature)
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
    module.log_temperature.data.fill_(math.log(50.0))
    # At a temperature of 50 a lead of 0.3 in the cosine leaves the second best center exp(-15) = 3e-7 of a token.
    ranked = np.sort(tokens @ centers.T, axis=1)
    tokens = tokens[ranked[:, -1] - ranked[:, -2] > 0.3]
    new, M = module(torch.tensor(centers)[None], torch.tensor(tokens)[None])
    nearest = (tokens @ centers.T).argmax(1)
    np.testing.assert_allclose(M[0, 0].detach().numpy(), np.eye(4)[:, nearest], atol=1e-5)
    likeness = np.exp(50 * (tokens @ centers.T - 1))  # of a cluster's own pixels the likest weigh most
    means = np.stack([np.average(tokens[nearest == k], 0, likeness[nearest == k, k]) for k in range(4)])
    np.testing.assert_allclose(new[0].detach().numpy() - centers, means, atol=1e-4)


def test_a_pixel_that_looks_like_no_center_hardly_moves_any():
    module = cf.RecurrentCrossAttentionClustering(8, 1, iterations=1)
    centers = torch.eye(8)[:2][None]
    tokens = torch.cat([centers[0].repeat(5, 1), torch.eye(8)[7:]])[None]  # five like each center, one like neither
    C, M = module(centers, tokens)
    torch.testing.assert_close(M[0, 0, :, -1], torch.full((2,), 0.5))  # shared out nevertheless
    assert (C - centers)[0, :, 7].max() < 1e-4  # its part in the means; by shares alone it would be 0.5 / 5.5


def test_each_pixel_is_shared_out_among_the_clusters_and_padding_belongs_to_none():
    module = random_clustering(iterations=2)
    mask = torch.rand(3, 20) < 0.7
    centers, tokens, trace = torch.randn(3, 6, 12).double(), torch.randn(3, 20, 12).double(), []
    _, last = module(centers, tokens, mask, trace=trace)
    for M in [last, *trace[0]["assignments"]]:
        assert M.shape == (3, 3, 6, 20)
        torch.testing.assert_close(M.sum(2), mask[:, None].expand(3, 3, 20).double())
        assert (M.transpose(2, 3)[(~mask)[:, None].expand(3, 3, 20)] == 0).all()


def test_masked_tokens_and_centers_change_nothing():
    module = random_clustering(iterations=3)
    centers, tokens = torch.randn(1, 5, 12, dtype=torch.float64), torch.randn(1, 9, 12, dtype=torch.float64)
    C, M = module(centers, tokens)
    more_centers = torch.cat([centers, 9 * torch.randn(1, 2, 12, dtype=torch.float64)], 1)
    more_tokens = torch.cat([tokens, 9 * torch.randn(1, 4, 12, dtype=torch.float64)], 1)
    C_, M_ = module(more_centers, more_tokens, torch.arange(13)[None] < 9, torch.arange(7)[None] < 5)
    torch.testing.assert_close(C_[:, :5], C)
    torch.testing.assert_close(M_[:, :, :5, :9], M)
    assert (M_[:, :, 5:] == 0).all()


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


def test_keys_and_values_are_projected_once_whatever_T_is():
    N, K, D, d = 64, 4, 32, 16
    tokens, centers = torch.randn(1, N, D), torch.randn(1, K, D)
    for T in (1, 2, 5):
        module = cf.RecurrentCrossAttentionClustering(D, D // d, T)
        with FlopCounterMode(display=False) as counter:
            module(centers, tokens)
        a_round = K * D * d + 2 * K * N * D  # Q, similarities, M-step
        assert counter.get_total_flops() / 2 == 2 * N * D * d + T * a_round


def test_a_new_center_attracts_the_pixels_that_look_like_it():
    torch.manual_seed(0)
    module = cf.RecurrentCrossAttentionClustering(64, 2)
    kinds = torch.randn(3, 64)
    tokens = kinds[torch.arange(30) % 3][None] + 0.1 * torch.randn(1, 30, 64)
    C, M = module(kinds[None], tokens)
    assert (M[0].argmax(1) == torch.arange(30) % 3).all()
    assert (F.cosine_similarity(C[0], kinds) > 0.9).all()


def test_dispatching_is_equation_6_with_its_mlp_in_the_sum():
    rng = np.random.default_rng(0)
    K, N, h, d = 4, 7, 2, 3
    C, M = rng.normal(size=(K, h * d)), softmax(rng.normal(size=(h, K, N)), axis=1)
    module = cf.FeatureDispatching(h * d, h).double()
    received = module(torch.tensor(C)[None], torch.tensor(M)[None])[0]
    assert received.shape == (N, h * d) and (received == 0).all()  # a new block leaves the tokens as they are
    for parameter in module.parameters():
        parameter.data = torch.tensor(rng.normal(size=tuple(parameter.shape)))
    gain, shift, W, w, V, v = [parameter.detach().numpy() for parameter in module.parameters()]
    thought = []
    for c in C:
        c = (c - c.mean()) / np.sqrt(c.var() + 1e-5) * gain + shift
        hidden = [x * (1 + math.erf(x / math.sqrt(2))) / 2 for x in W @ c + w]  # GELU
        thought.append(V @ np.array(hidden) + v)
    received = module(torch.tensor(C)[None], torch.tensor(M)[None])[0].detach().numpy()
    for i in range(N):
        for head in range(h):
            part = slice(head * d, (head + 1) * d)
            expected = sum(K * M[head, k, i] * thought[k][part] for k in range(K)) / K  # 1/K sum_k sim(C_k, p_i) C_k
            np.testing.assert_allclose(received[i, part], expected, atol=1e-12)


def test_a_new_block_is_its_convolution():
    torch.manual_seed(0)
    block, x = cf.ClusterBlock(32, 2), torch.randn(2, 9, 6, 32)
    expected = x + F.conv2d(x.permute(0, 3, 1, 2), *block.neighbours.parameters(), padding=1, groups=32).permute(0, 2, 3, 1)
    torch.testing.assert_close(block(x, cf.layout_of(9, 6)), expected)


@pytest.mark.parametrize("height, width", [(56, 56), (7, 13), (1, 2), (25, 19)])
def test_centers_start_as_the_means_of_grid_cells(height, width):
    x = torch.randn(2, height, width, 8)
    grid = (min(10, (height + 1) // 2), min(10, (width + 1) // 2))
    expected = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), grid).flatten(2).transpose(1, 2)
    torch.testing.assert_close(cf.pool_centers(x, cf.layout_of(height, width)), expected)


def test_a_logit_is_the_bias_plus_the_mean_of_the_shares_of_the_centers():
    model, trace = random_model(), []
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        logits = model(image, trace)["logits"][0]
        head, (C, M) = model.head, (trace[-1]["centers"][-1][0], trace[-1]["assignments"][-1][0])
        shares = head.center_norm(C) @ head.classifier.weight.T  # (K, classes)
        torch.testing.assert_close(head.classifier.bias + shares.mean(0), logits)
        weight = M.mean(0) / M.mean(0).sum(1, keepdim=True)  # (K, N), rows sum to 1
        spread = weight.T @ shares / len(shares)  # (N, classes): the same shares, over pixels
        torch.testing.assert_close(head.classifier.bias + spread.sum(0), logits)


# ---------------------------------------------------------------------------------------------------------------
# The model and its use
# ---------------------------------------------------------------------------------------------------------------
def test_an_image_alone_and_among_others_gives_the_same():
    model = random_model()
    images = [torch.rand(3, *size) for size in [(64, 64), (33, 90), (100, 47), (32, 32)]]
    with torch.no_grad():
        together = model(images)["logits"]
        alone = torch.cat([model(image[None])["logits"] for image in images])
        maps, single = model.backbone(images), model.backbone(images[1][None])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    for among, own in zip(maps, single):
        torch.testing.assert_close(among[1:2, :, : own.shape[2], : own.shape[3]], own, atol=1e-4, rtol=1e-4)


def test_what_lies_in_the_padding_does_not_matter():
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


def test_the_trace_holds_every_round_of_every_block_and_changes_nothing():
    model, trace = random_model(), []
    image = torch.rand(2, 3, 64, 80)
    with torch.no_grad():
        torch.testing.assert_close(model(image, trace)["logits"], model(image)["logits"], atol=0, rtol=0)
    assert [entry["stage"] for entry in trace] == [0, 0, 1, 1, 2, 2, 3, "head"]
    for entry in trace:
        assert len(entry["centers"]) == 4 and len(entry["assignments"]) == 3
        B, h, K, N = entry["assignments"][0].shape
        assert N == math.prod(entry["size"]) and entry["centers"][0].shape[:2] == (B, K)


def test_every_parameter_gets_a_gradient():
    model = random_model().train()
    model(torch.rand(2, 3, 96, 96))["logits"].square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("variant, parameters, macs", [("tiny", 28.6e6, 5.6e9), ("small", 50e6, 9e9), ("nano", 3e6, 1e9)])
def test_sizes_are_those_of_the_paper(variant, parameters, macs):
    model = cf.ClusterFormer("cls", variant)
    assert parameters / 3 <= sum(p.numel() for p in model.parameters()) <= parameters
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.rand(1, 3, 224, 224))
    assert counter.get_total_flops() / 2 <= macs


def test_stochastic_depth_leaves_branches_out_in_training_only():
    model = random_model(drop_path=0.5)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(image)["logits"], model(image)["logits"])
        model.train()
        assert not torch.equal(model(image)["logits"], model(image)["logits"])
        block = model.backbone.stages[-1][-1]
        x, branch = torch.zeros(4000, 1, 1, 2), torch.ones(4000, 1, 1, 2)
        added = block.add(x, branch)
    assert set(added.unique().tolist()) == {0.0, 2.0} and abs(added.mean() - 1) < 0.1  # its expectation is the branch


def test_bfloat16_autocast_is_close_and_keeps_the_maps_in_float32():
    model, trace = random_model(), []
    image = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        exact = model(image)["logits"]
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(image, trace)["logits"]
    torch.testing.assert_close(rough.float(), exact, atol=0.1, rtol=0.1)
    for entry in trace:
        shares = entry["assignments"][-1].sum(2)
        assert shares.dtype == torch.float32
        torch.testing.assert_close(shares, torch.ones_like(shares))


def test_compiled_without_graph_breaks_it_gives_the_same(monkeypatch):
    monkeypatch.setitem(cf.VARIANTS, "nano", dict(cf.VARIANTS["nano"], depths=(1, 0, 0, 1)))  # compiling takes long
    model, image = random_model(), torch.rand(2, 3, 64, 48)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)(image)["logits"]
        torch.testing.assert_close(compiled, model(image)["logits"], atol=1e-4, rtol=1e-4)


def test_exported_it_gives_the_same_for_any_batch():
    model = random_model()
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (torch.rand(2, 3, 64, 48),), dynamic_shapes={"images": {0: batch}})
    image = torch.rand(5, 3, 64, 48)
    torch.testing.assert_close(exported.module()(image)["logits"], model(image)["logits"], atol=1e-5, rtol=1e-5)


def test_predict_gives_the_five_best_classes_and_leaves_the_mode():
    model = random_model().train()
    images = [torch.rand(3, 40, 60), torch.rand(3, 64, 64)]
    answers = model.predict(images)
    assert model.training and len(answers) == 2
    probabilities = model.eval()(images)["logits"].softmax(-1)
    for answer, row in zip(answers, probabilities):
        assert answer["labels"].tolist() == row.argsort(descending=True)[:5].tolist()
        torch.testing.assert_close(answer["scores"], row.sort(descending=True).values[:5])


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
# Data
# ---------------------------------------------------------------------------------------------------------------
def test_shapes_are_a_function_of_seed_epoch_and_index():
    shapes = data.Shapes(100, 64, seed=3, split="train")
    image, label = shapes[2, 7]
    again, same_label = data.Shapes(100, 64, seed=3, split="train")[2, 7]
    assert torch.equal(image, again) and label == same_label
    assert image.dtype == torch.float32 and image.shape == (3, 64, 64) and 0 <= image.min() and image.max() <= 1
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


def test_colour_and_brightness_say_nothing_about_the_class():
    shapes = data.Shapes(3000, 64, seed=0, split="train")
    images, labels = zip(*[shapes[0, i] for i in range(3000)])
    features = torch.stack([torch.cat([x[:, 16:48, 16:48].mean((1, 2)), x.mean((1, 2)), x.std((1, 2))]) for x in images])
    features = torch.cat([features, torch.ones(3000, 1)], 1)
    labels = torch.tensor(labels)
    fit = torch.linalg.lstsq(features[:2000], F.one_hot(labels[:2000], len(data.THINGS)).float()).solution
    accuracy = ((features[2000:] @ fit).argmax(1) == labels[2000:]).float().mean()
    assert len(data.THINGS) >= 8 and accuracy < 0.20  # chance is 0.125, with 1,000 images +- 0.01


def test_a_global_batch_is_the_same_however_it_is_divided():
    def batches(world_size, accumulate, **arguments):
        parts = [
            list(data.GlobalBatches(50, 12, 9, 5, rank, world_size, accumulate, **arguments)) for rank in range(world_size)
        ]
        assert all(len(part) == len(parts[0]) for part in parts)
        steps = len(parts[0]) // accumulate
        return [sum((key for p in parts for key in p[s * accumulate : (s + 1) * accumulate]), []) for s in range(steps)]

    whole = batches(1, 1)
    assert len(whole) == 9 and whole == batches(2, 1) == batches(3, 2) == batches(1, 4)
    for epoch in range(2):
        seen = sum(whole[4 * epoch : 4 * epoch + 4], [])
        assert {e for e, _ in seen} == {epoch} and len(set(seen)) == 48  # nothing twice
    assert batches(2, 1, first_step=5) == whole[5:]


def test_mixup_and_cutmix_of_a_global_batch_are_the_same_however_it_is_divided():
    pixels, labels = torch.rand(50, 3, 8, 8), torch.arange(50) % 7

    def mixed(world_size, accumulate, step):
        chunks = []
        for rank in range(world_size):
            keys = list(data.GlobalBatches(50, 12, 9, 5, rank, world_size, accumulate, neighbour=True))
            for part in keys[step * accumulate : (step + 1) * accumulate]:
                index = [i for _, i in part]
                chunks.append(data.mix(pixels[index], labels[index], 7, 0.8, 1.0, 5, step))
        return [torch.cat(x) for x in zip(*chunks)]

    for step in range(6):
        images, targets = mixed(1, 1, step)
        for divided in [(2, 1), (3, 2), (1, 6)]:
            other, other_targets = mixed(*divided, step)
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


def test_augmentation_is_a_function_of_seed_epoch_and_index_on_any_number_of_workers(folder):
    images = data.Folder(folder, "train", data.train_transform(32, 27, 0.25), seed=1)
    keys = [[(epoch, i) for i in range(16)] for epoch in (0, 1)]
    torch.manual_seed(0)
    alone = [x for x, _ in DataLoader(images, batch_sampler=keys)]
    torch.manual_seed(99)
    shared = [x for x, _ in DataLoader(images, batch_sampler=keys, num_workers=2)]
    assert all(torch.equal(a, b) for a, b in zip(alone, shared)) and not torch.equal(*alone)
    torch.manual_seed(0)
    images[0, 0]
    undisturbed = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(undisturbed, torch.rand(3))


def test_images_of_every_kind_are_read_rightly(tmp_path):
    rgb = np.zeros((40, 60, 3), np.uint8)
    rgb[:20], rgb[20:, :30], rgb[20:, 30:] = (200, 40, 40), (40, 200, 40), (40, 40, 200)
    upright = Image.fromarray(rgb)
    grey = np.arange(40 * 60, dtype=np.uint16).reshape(40, 60) * 27
    Image.fromarray(grey).save(tmp_path / "16bit.png")
    upright.convert("L").save(tmp_path / "grey.png")
    upright.quantize(8).save(tmp_path / "palette.png")
    upright.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    upright.convert("RGBA").save(tmp_path / "alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rows of the file are columns of the picture
    upright.rotate(90, expand=True).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    for name in ("palette.png", "cmyk.jpg", "alpha.png", "turned.jpg"):
        read = data.load_image(tmp_path / name)
        assert read.mode == "RGB" and read.size == (60, 40)
        assert np.abs(np.asarray(read).astype(int) - rgb)[[5, 35, 35], [30, 10, 50]].max() < 12, name
    assert np.abs(np.asarray(data.load_image(tmp_path / "grey.png"))[..., 0] - np.asarray(upright.convert("L"))).max() == 0
    assert np.abs(np.asarray(data.load_image(tmp_path / "16bit.png"))[..., 1] - grey / 257).max() <= 1


# ---------------------------------------------------------------------------------------------------------------
# Dense data: shapes with all labels, COCO's layout, ADE20K's layout
# ---------------------------------------------------------------------------------------------------------------
AS_IT_IS = v2.RandomHorizontalFlip(p=0.0)


def rectangle(top, left, bottom, right, size=(40, 60)):
    mask = np.zeros(size, bool)
    mask[top:bottom, left:right] = True
    return mask


def runs(mask):
    """COCO's run lengths of a mask, column by column, zeros first."""
    flat, lengths, value = mask.T.ravel(), [], False
    while len(flat):
        change = np.flatnonzero(flat != value)
        lengths.append(int(change[0]) if len(change) else len(flat))
        flat, value = flat[lengths[-1] :], not value
    return dict(size=list(mask.shape), counts=lengths)


def write_coco(root, split="train"):
    """Two images of 60 x 40 and categories 7 and 90: a polygon, an RLE, a crowd, a box over the border, one of no area."""
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


def test_coco_annotations_of_every_form_are_read_rightly(tmp_path):
    write_coco(tmp_path)
    coco = data.Coco(tmp_path, "train", "inst", AS_IT_IS, crop=1000)
    assert coco.classes == ["boat", "kite"] and coco.categories == [7, 90] and len(coco) == 2
    assert coco.dropped == 1  # the one of no area; the crowd is no training target either
    image, target = coco[0, 1]  # images in the order of their numbers
    assert image.shape == (3, 40, 60) and image.sub(100 / 255).abs().max() < 1e-6
    expected = [rectangle(5, 10, 15, 30), rectangle(20, 40, 35, 50), rectangle(0, 50, 10, 60)]
    assert target["labels"].tolist() == [1, 0, 0] and np.array_equal(target["masks"].numpy(), expected)
    boxes = torch.tensor([[20, 10, 20, 10], [45, 27.5, 10, 15], [55, 5, 10, 10]]) / torch.tensor([60, 40, 60, 40])
    torch.testing.assert_close(target["boxes"], boxes)
    torch.testing.assert_close(data.Coco(tmp_path, "train", "det", AS_IT_IS, crop=1000)[0, 1][1]["boxes"], boxes)
    _, nothing = coco[0, 0]  # an image without objects is one to learn from
    assert nothing["boxes"].shape == (0, 4) and nothing["masks"].shape == (0, 40, 60)
    assert len(coco.coco().anns) == 5


def test_a_flipped_image_has_flipped_boxes_and_masks(tmp_path):
    write_coco(tmp_path)
    straight = data.Coco(tmp_path, "train", "inst", AS_IT_IS, crop=1000)[0, 1][1]
    for task in ("det", "inst"):
        flipped = data.Coco(tmp_path, "train", task, v2.RandomHorizontalFlip(p=1.0), crop=1000)[0, 1][1]
        mirrored = straight["boxes"] * torch.tensor([-1, 1, 1, 1]) + torch.tensor([1, 0, 0, 0])
        torch.testing.assert_close(flipped["boxes"], mirrored)
    assert torch.equal(flipped["masks"], straight["masks"].flip(-1))


def test_a_crop_keeps_what_can_be_seen_and_is_a_function_of_seed_epoch_and_index(tmp_path):
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
    """One image of 60 x 40: sky (stuff), two boats, a crowd of boats, the rest void."""
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


def test_panoptic_maps_are_read_rightly(tmp_path):
    ids = write_panoptic(tmp_path)
    coco = data.Coco(tmp_path, "train", "pan", AS_IT_IS, crop=1000)
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
            Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(root / "images" / split / f"{name}.jpg")
            Image.fromarray(rng.integers(0, 4, (40, 60), dtype=np.uint8)).save(root / "annotations" / split / f"{name}.png")
    if names:
        lines = ["Idx\tRatio\tTrain\tVal\tName", *(f"{i}\t0.1\t1\t1\t{name}" for i, name in enumerate(("wall, x", "sky", "tree"), 1))]
        (root / "objectInfo150.txt").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("names", [True, False])
def test_label_maps_are_read_rightly(tmp_path, names):
    write_ade(tmp_path, names)
    ade = data.Ade(tmp_path, "train", AS_IT_IS, crop=1000)
    assert ade.classes == (["wall", "sky", "tree"] if names else ["1", "2", "3"]) and len(ade) == 2
    labels = np.asarray(Image.open(tmp_path / "annotations" / "training" / "b.png"))
    assert np.array_equal(ade.label_map(1), labels.astype(int) - 1)
    image, target = ade[0, 1]
    assert target["labels"].tolist() == [0, 1, 2]
    assert np.array_equal(target["masks"].numpy(), [labels == 1, labels == 2, labels == 3])
    held_out = data.Ade(tmp_path, "val", v2.Resize(80), classes=ade.classes)
    image, target = held_out[0, 0]
    assert image.shape == (3, 80, 120) and target == dict(index=0, size=(40, 60))


def edit_json(change, kind="instances"):
    def damage(root):
        path = root / "annotations" / f"{kind}_train2017.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return damage


def cut_json(root):
    path = root / "annotations" / "instances_train2017.json"
    path.write_text(path.read_text()[:300])


def refusal(read):
    """What a data set says before it refuses, one line."""
    with pytest.raises(data.InputError) as error:
        read()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "damage, complaint",
    [
        (lambda root: (root / "annotations" / "instances_train2017.json").unlink(), "instances_train2017.json: not there"),
        (lambda root: (root / "train2017").rename(root / "train"), "train2017: not there"),
        (lambda root: (root / "train2017" / "b.png").unlink(), "image 3, b.png, is not in"),
        (cut_json, "not a readable JSON file"),
        (edit_json(lambda c: c.pop("categories")), "it has no categories"),
        (edit_json(lambda c: c["annotations"][1].update(category_id=8)), "annotation 1 has category 8"),
        (edit_json(lambda c: c["annotations"][1].update(image_id=8)), "annotation 1 is of image 8"),
        (edit_json(lambda c: c.update(annotations=c["annotations"][2:3])), "no usable annotation"),
        (edit_json(lambda c: c["annotations"][0].pop("segmentation")), "annotation 0 has no mask; --task det needs none"),
        (edit_json(lambda c: c["images"][0].update(width=61)), "a.png: 60 x 40 pixels"),
    ],
)
def test_one_line_says_what_is_wrong_with_coco_files(tmp_path, damage, complaint):
    write_coco(tmp_path)
    damage(tmp_path)
    assert complaint in refusal(lambda: data.Coco(tmp_path, "train", "inst", AS_IT_IS, crop=1000)[0, 1])


def wrong_map(root):
    Image.fromarray(np.zeros((40, 61, 3), np.uint8)).save(root / "annotations" / "panoptic_train2017" / "a.png")


@pytest.mark.parametrize(
    "damage, complaint",
    [
        (lambda root: (root / "annotations" / "panoptic_train2017").rename(root / "maps"), "no such folder of panoptic PNGs"),
        (wrong_map, "a.png: 61 x 40 pixels, a.png has 60 x 40"),
        (edit_json(lambda c: c["annotations"][0]["segments_info"].pop(2), "panoptic"), "segment 3 has no entry in"),
        (edit_json(lambda c: c["annotations"][0]["segments_info"][0].update(category_id=2), "panoptic"), "a.png has category 2"),
    ],
)
def test_one_line_says_what_is_wrong_with_panoptic_files(tmp_path, damage, complaint):
    write_panoptic(tmp_path)
    damage(tmp_path)
    assert complaint in refusal(lambda: data.Coco(tmp_path, "train", "pan", AS_IT_IS, crop=1000)[0, 0])


@pytest.mark.parametrize(
    "damage, complaint",
    [
        (lambda root: (root / "annotations" / "training" / "b.png").unlink(), "no label map of b.jpg"),
        (lambda root: (root / "images" / "training").rename(root / "images" / "train"), "training: no such folder"),
        (lambda root: Image.new("L", (60, 40), 9).save(root / "annotations" / "training" / "b.png"), "label 9 in it"),
        (lambda root: Image.new("L", (50, 40), 1).save(root / "annotations" / "training" / "b.png"), "its label map has 50 x 40"),
    ],
)
def test_one_line_says_what_is_wrong_with_ade_files(tmp_path, damage, complaint):
    write_ade(tmp_path)
    damage(tmp_path)
    assert complaint in refusal(lambda: data.Ade(tmp_path, "train", AS_IT_IS, crop=1000)[0, 1])


def test_shapes_tell_the_same_of_a_scene_for_every_task():
    scenes = {task: data.Shapes(50, 96, 3, "train", task) for task in ("det", "inst", "sem", "pan")}
    things, stuff, cut = Counter(), 0, 0
    for index in range(50):
        (image, det), (same, inst), (_, sem), (_, pan) = (scenes[task][1, index] for task in scenes)
        assert torch.equal(image, same) and image.shape == (3, 96, 96)
        assert torch.equal(det["boxes"], inst["boxes"]) and "masks" not in det
        n = len(inst["labels"])
        assert torch.equal(pan["masks"][:n], inst["masks"]) and torch.equal(pan["labels"][:n], inst["labels"])
        assert pan["masks"].sum(0).max() == 1 and pan["masks"].flatten(1).sum(1).min() >= data.VISIBLE
        for label, mask in zip(sem["labels"], sem["masks"]):
            assert torch.equal(mask, pan["masks"][pan["labels"] == label].any(0))
        things[n] += 1
        stuff += (pan["labels"] >= len(data.THINGS)).sum().item() >= 3
        corners = torch.cat([inst["boxes"][:, :2] - inst["boxes"][:, 2:] / 2, inst["boxes"][:, :2] + inst["boxes"][:, 2:] / 2], 1)
        cut += ((corners <= 0) | (corners >= 1)).any(1).sum().item()
    assert max(things) == 6 and things[1] and stuff > 40 and cut > 25


def test_the_truth_of_shapes_for_evaluation_is_that_of_training():
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


def test_the_assignment_is_the_cheapest_of_all():
    rng = np.random.default_rng(0)
    for case in range(200):
        n = int(rng.integers(1, 6))
        m = int(rng.integers(n, 8))
        cost = rng.normal(size=(n, m)) if case % 2 else rng.integers(0, 3, (n, m)).astype(float)  # with ties, too
        columns = train.assign(cost)
        assert len(set(columns)) == n
        best = min(cost[range(n), list(order)].sum() for order in itertools.permutations(range(m), n))
        assert cost[range(n), columns].sum() == pytest.approx(best)
    assert sorted(train.assign(np.full((3, 5), np.nan))) == [0, 1, 2]  # it ends, and each row has a column of its own


def panoptic_figures(predicted, segments, truth, entries, classes=3):
    """PQ, SQ, RQ of small maps given as rows of digits; class c has category_id 10 + c."""
    predicted, truth = (torch.tensor([[int(digit) for digit in row] for row in rows.split()]) for rows in (predicted, truth))
    segments = [dict(id=i, label=label) for i, label in segments.items()]
    entries = [dict(id=i, category_id=10 + label, iscrowd=crowd) for i, (label, crowd) in entries.items()]
    counts = evaluation.panoptic_counts(predicted, segments, truth, entries, {10 + c: c for c in range(classes)}, classes)
    return counts, evaluation.panoptic_quality(counts, torch.ones(classes, dtype=torch.bool))


def test_panoptic_quality_of_cases_worked_by_hand():
    truth, entries = "1112 1112 3333", {1: (0, 0), 2: (0, 0), 3: (1, 0)}
    counts, figures = panoptic_figures(truth, {1: 0, 2: 0, 3: 1}, truth, entries)
    assert figures == [1, 1, 1] and counts[2].sum() == 0  # a class that does not occur does not count

    # Segment 1 lost a third to 2: IoU 4/6 and 2/4, the second is no match.  3 has the wrong class.
    counts, (pq, sq, rq) = panoptic_figures("1122 1122 3333", {1: 0, 2: 0, 3: 2}, truth, entries)
    assert counts.tolist() == [[pytest.approx(4 / 6), 1, 1, 1], [0, 0, 0, 1], [0, 0, 1, 0]]
    assert (pq, sq, rq) == (pytest.approx(4 / 6 / 2 / 3), pytest.approx(4 / 6 / 3), pytest.approx(1 / 2 / 3))


def test_void_and_crowds_are_not_held_against_the_model():
    # Half of the match lies on void: it counts neither as overlap nor as union.
    counts, figures = panoptic_figures("1111 0000", {1: 0}, "1100 0000", {1: (0, 0)})
    assert figures == [1, 1, 1]
    # A prediction that is mostly void, or mostly a crowd of its class, is no false positive; a crowd is never missed.
    counts, _ = panoptic_figures("1111 2222", {1: 0, 2: 1}, "0003 4444", {3: (2, 0), 4: (1, 1)})
    assert counts.tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    # On a crowd of another class it is one.
    counts, _ = panoptic_figures("2222", {2: 0}, "4444", {4: (1, 1)})
    assert counts.tolist() == [[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_semantic_figures_are_those_counted_pixel_by_pixel():
    rng = np.random.default_rng(0)
    predicted, truth = rng.integers(0, 4, (2, 30, 40))
    truth[rng.random((30, 40)) < 0.2] = -1
    predicted[predicted == 3], truth[truth == 3] = 0, 1  # class 3 does not occur
    confusion = evaluation.confusion_counts(torch.from_numpy(predicted), torch.from_numpy(truth), 4)
    figures, per_class = evaluation.semantic_figures(confusion)
    real = truth >= 0
    iou = [(real & (truth == c) & (predicted == c)).sum() / (real & ((truth == c) | (predicted == c))).sum() for c in range(3)]
    np.testing.assert_allclose(per_class[:3], iou)
    assert math.isnan(per_class[3]) and figures["miou"] == pytest.approx(np.mean(iou))
    assert figures["pixel_accuracy"] == pytest.approx((truth == predicted)[real].mean())


# ---------------------------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------------------------
def two_processes(rank, function, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/meet", rank=rank, world_size=2)
    torch.save(function(rank), f"{path}/{rank}.pt")
    dist.destroy_process_group()


def on_two_processes(function, path):
    torch.multiprocessing.spawn(two_processes, (function, str(path)), nprocs=2)
    return [torch.load(path / f"{rank}.pt") for rank in (0, 1)]


def loss_of(model, keys):
    shapes = data.Shapes(100, 32, seed=0, split="train")
    images, labels = zip(*[shapes[key] for key in keys])
    return F.cross_entropy(model(torch.stack(images))["logits"], torch.tensor(labels))


def gradients_of_half(rank):
    model = random_model()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    (keys,) = data.GlobalBatches(100, 8, 1, 0, rank, 2)
    loss_of(wrapped, keys).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_two_processes_give_the_gradients_of_one_with_both_batches(tmp_path):
    first, second = on_two_processes(gradients_of_half, tmp_path)
    model = random_model()
    (keys,) = data.GlobalBatches(100, 8, 1, 0)
    loss_of(model, keys).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(first[name], parameter.grad, atol=1e-5, rtol=1e-4)
        assert torch.equal(first[name], second[name])


def evaluate_a_part(rank):
    return evaluation.evaluate(random_model(), data.Shapes(101, 32, 0, "val"), torch.device("cpu"), batch_size=7)


def test_evaluation_on_two_processes_is_exact(tmp_path):
    expected = evaluation.evaluate(random_model(), data.Shapes(101, 32, 0, "val"), torch.device("cpu"), batch_size=64)
    assert expected["images"] == 101
    assert on_two_processes(evaluate_a_part, tmp_path) == [expected, expected]


def test_the_benchmark_counts_and_measures(monkeypatch, capsys, folder):
    monkeypatch.setitem(evaluation.PEERS, "nano", ())
    rows = evaluation.benchmark("nano", 64, 2, torch.device("cpu"), rounds=2)
    model = cf.ClusterFormer("cls", "nano")
    assert rows[0]["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 64, 64))
    assert rows[0]["macs"] * 2 == counter.get_total_flops()
    forward, training = rows[0]["memory"]
    assert 4 * rows[0]["parameters"] < forward < training  # float32 weights at least; then gradients and moments
    assert rows[0]["eager forward"]["images_per_second"] > rows[0]["eager training"]["images_per_second"] > 0
    assert rows[0]["eager training"]["ratio"] == 1
    evaluation.print_benchmark(rows)
    assert "(1.00x)" in capsys.readouterr().out
    assert evaluation.loading_speed(folder, 32, images=4) > 0


def test_top1_and_top5_are_what_they_say():
    class Fixed(torch.nn.Module):
        def forward(self, images):
            return {"logits": images[:, 0, 0]}

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
# Training and evaluating from the command line
# ---------------------------------------------------------------------------------------------------------------
def call(module, capsys, *arguments):
    """Runs a script's main in this process.  Returns what it printed; raises SystemExit as the script would."""
    argv, sys.argv = sys.argv, [module.__name__ + ".py", *map(str, arguments)]
    try:
        evaluation.run(module.main)
    finally:
        sys.argv = argv
    return capsys.readouterr().out


QUICK = ["--image-size", 32, "--patch-size", 2, "--batch-size", 50, "--workers", 0]


@pytest.fixture
def short_epochs(monkeypatch):
    monkeypatch.setattr(train, "Shapes", lambda length, *rest: data.Shapes(200, *rest))
    monkeypatch.setattr(train, "validation_set", lambda *_: data.Shapes(40, 32, 0, "val"))


def test_a_short_run_beats_chance_by_a_wide_margin(tmp_path, capsys):
    out = tmp_path / "run"
    call(train, capsys, *QUICK[:-2], "--epochs", 1, "--workers", 1, "--out", out)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["top1"] >= 0.3 and metrics["images"] == 2000  # chance is 0.125
    (line,) = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert line["top1"] == metrics["top1"] and line["epoch"] == 1 and line["step"] == 130
    printed = call(evaluation, capsys, "--checkpoint", out / "best.pt", "--json", tmp_path / "figures.json")
    assert json.loads((tmp_path / "figures.json").read_text()) == metrics and f"{metrics['top1']:.2%}" in printed


def test_a_resumed_run_ends_with_the_weights_of_one_that_never_stopped(tmp_path, capsys, short_epochs):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arguments = [*QUICK, "--drop-path", 0.2, "--epochs", 3]
    call(train, capsys, *arguments, "--out", whole)
    save = train.save

    def stop_after_the_first(value, path):
        save(value, path)
        raise KeyboardInterrupt

    train.save = stop_after_the_first
    try:
        with pytest.raises(KeyboardInterrupt):
            call(train, capsys, *arguments, "--out", parts)
    finally:
        train.save = save
    call(train, capsys, "--resume", "--out", parts, "--workers", 1)
    a, b = (torch.load(out / "last.pt") for out in (whole, parts))
    assert a["step"] == b["step"] == 12
    assert set(a) >= {"model", "ema", "optimizer", "step", "epoch", "settings", "classes"}
    for weights in ("model", "ema"):
        assert all(torch.equal(a[weights][name], b[weights][name]) for name in a[weights])


def test_accumulating_gives_the_step_of_the_whole_batch(tmp_path, capsys, short_epochs):
    for accumulate in (1, 5):
        call(train, capsys, *QUICK, "--epochs", 1, "--accumulate", accumulate, "--mixup", 0.8, "--out", tmp_path / str(accumulate))
    a, b = (torch.load(tmp_path / name / "last.pt")["model"] for name in ("1", "5"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-3, rtol=0)  # Adam's first steps magnify rounding


def test_training_two_processes_under_torchrun(tmp_path, folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d"]
    command += ["--rdzv_endpoint=localhost:0", "train.py", "--data", folder, "--variant", "nano", "--image-size", 32]
    command += ["--epochs", 2, "--warmup-epochs", 1, "--batch-size", 8, "--accumulate", 2, "--workers", 1, "--out", tmp_path / "run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), cwd=HERE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 2
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["images"] == 6
    assert done.stdout.count("images that it never saw") == 1


def test_init_takes_what_fits_and_says_what_does_not(tmp_path, capsys, short_epochs, folder):
    call(train, capsys, *QUICK, "--epochs", 1, "--out", tmp_path / "shapes")
    arguments = ["--variant", "nano", "--epochs", 1, "--out", tmp_path / "run", "--init", tmp_path / "shapes" / "last.pt"]
    printed = call(train, capsys, "--data", folder, *QUICK[:4], "--batch-size", 8, "--workers", 0, *arguments)
    assert "new: head.classifier.bias, head.classifier.weight" in printed


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "last.pt"
    model = cf.ClusterFormer("cls", "nano", num_classes=len(data.THINGS)).state_dict()
    settings = dict(task="cls", variant="nano", patch_size=4, image_size=32, data=None)
    torch.save(dict(model=model, ema=model, optimizer={}, step=1, epoch=1, best=0.0, settings=settings, classes=list(data.THINGS)), path)
    return path


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
    arguments = ["--data", folder, "--variant", "nano", "--image-size", 32, "--epochs", 1, "--batch-size", 8, "--workers", workers]
    with pytest.raises(SystemExit) as stop:
        call(train, capsys, *arguments, "--out", tmp_path / "run")
    message = str(stop.value)
    assert complaint in message and "\n" not in message and message.startswith("train.py: error: ")


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--data", "/no/such/folder"], "/no/such/folder: no such folder"),
        (["--batch-size", 0], "--batch-size must be at least 1, got 0"),
        (["--batch-size", 20000], "more than the 6500 training images"),
        (["--batch-size", 50, "--accumulate", 3], "not divisible by 1 processes x --accumulate 3"),
        (["--lr", "nan"], "--lr must be at least 0.0, got nan"),
        (["--image-size", 31], "--image-size must be at least 32"),
        (["--variant", "huge"], "--variant must be one of nano, tiny, small"),
        (["--patch-size", 3], "--patch-size must be 2 or 4, got 3"),
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


def test_a_run_is_not_overwritten_unasked(tmp_path, capsys, checkpoint):
    (tmp_path / "last.pt").write_bytes(checkpoint.read_bytes())
    with pytest.raises(SystemExit, match="--resume goes on with that run"):
        call(train, capsys, "--out", tmp_path)
    assert (tmp_path / "last.pt").read_bytes() == checkpoint.read_bytes()


def test_one_line_says_what_is_wrong_with_a_checkpoint(tmp_path, capsys, checkpoint, folder):
    half = tmp_path / "half.pt"
    half.write_bytes(checkpoint.read_bytes()[:100_000])
    other = tmp_path / "other.pt"
    torch.save({"weights": torch.zeros(2)}, other)
    task = tmp_path / "task.pt"
    content = torch.load(checkpoint)
    torch.save(content | {"settings": content["settings"] | {"task": "det"}}, task)
    fewer = tmp_path / "fewer.pt"
    torch.save(content | {"classes": ["cat", "dog"]}, fewer)
    for arguments, complaint in [
        (["--checkpoint", tmp_path / "none.pt"], "no such checkpoint"),
        (["--checkpoint", half], "half.pt: not a readable checkpoint"),
        (["--checkpoint", other], "other.pt: not a checkpoint of train.py"),
        (["--checkpoint", task], "task must be 'cls', got 'det'"),
        (["--checkpoint", fewer], "fewer.pt: its weights are not those of a nano with 2 classes"),
        (["--checkpoint", checkpoint, "--data", folder], "2 classes that the model is not trained for: cat, dog"),
        (["--checkpoint", checkpoint, "--data", tmp_path / "nowhere"], "nowhere: no such folder"),
        (["--checkpoint", checkpoint, "--batch-size", 0], "--batch-size must be at least 1"),
        (["--checkpoint", checkpoint, "--image-size", 16], "--image-size must be at least 32"),
    ]:
        with pytest.raises(SystemExit) as stop:
            call(evaluation, capsys, *arguments)
        message = str(stop.value)
        assert complaint in message and "\n" not in message and message.startswith("eval.py: error: "), message


def test_an_error_has_no_traceback_and_an_exit_code(tmp_path):
    command = [sys.executable, "train.py", "--batch-size", "0", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "train.py: error: --batch-size must be at least 1, got 0\n"


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Malice:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "broken-in"),)

    torch.save({"model": Malice(), "ema": {}, "settings": {}, "classes": []}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        cf.load_checkpoint(tmp_path / "last.pt")
    assert not (tmp_path / "broken-in").exists()


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_help_explains_every_flag(script):
    text = subprocess.run([sys.executable, script, "--help"], cwd=HERE, capture_output=True, text=True).stdout
    for line in text.splitlines():
        if line.startswith("  --"):
            assert len(line.split()) > 1, line
    assert "default" in text


def test_the_module_needs_nothing_but_torch():
    lines = open(os.path.join(HERE, "clusterformer.py")).read().splitlines()
    imports = [line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))]
    assert set(imports) - {"torch"} <= sys.stdlib_module_names
