# SPDX-License-Identifier: MIT
"""ClusterFormer: clustering as a universal visual learner, in one file.

After "ClusterFormer: Clustering As A Universal Visual Learner" (NeurIPS 2023, arXiv 2309.13196).
Copy this file into any project; it needs PyTorch and nothing else.

    model = ClusterFormer("cls", "tiny", num_classes=1000)
    logits = model(images)["logits"]        # images: float RGB in [0, 1], (B, 3, H, W), any H, W >= 32
    model = ClusterFormer("inst", "tiny", num_classes=80)
    objects = model.predict(images)         # of each image: scores, labels, boxes, masks

Self-attention compares every token with every other: N x N.  ClusterFormer puts K cluster centers between
them.  Tokens are assigned to centers, centers move to their tokens, a few times over; then every token takes
back what its clusters have gathered: N x K, linear in the number of pixels, and the assignment of pixels to
clusters is a picture that can be looked at.

    centers at first    C(0) = pool(I) + FFN(pool(I))             the cells of a grid, averaged
    E-step              M(t) = softmax_K( Q(C(t-1)) K(I)^T )      every pixel is shared out among K clusters
    M-step              C(t) = C(t-1) + W(t) V(I) / W(t) 1        every center moves by the mean of its pixels
    dispatching         p_i' = p_i + sum_k M[k,i] MLP(C_k)       every pixel takes back from its clusters

E- and M-step alternate T = 3 times with the same Q, K and V: a recursion, not a stack of T layers.

Letters, here and in the shapes at the ends of lines:

    B  images         H, W  height and width of a map, in tokens     N  tokens = H W        D  channels
    K  centers        h     heads, each clustering on its own        d  channels of a head = D / h
    T  recursions     I     the tokens                               C  the centers
    M  the assignment: M[k, i] is the share that cluster k has of pixel i
    W  M times likeness, how much pixel i weighs in the mean of cluster k       1  a vector of ones: W 1 sums over pixels

The file runs in the order in which an image meets it: where the centers start, clustering, dispatching, the
block made of these, the backbone made of blocks; then the head of classification; neck, decoder and heads of detection
and segmentation, where a cluster is an object; and the model that holds them.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

VARIANTS = {  # blocks and channels of the four stages; of the dense tasks: width, and the map that each layer looks at
    "nano": dict(depths=(2, 2, 2, 1), channels=(32, 64, 128, 256), dim=128, levels=(1, 1, 1)),  # for a CPU, small images
    "tiny": dict(depths=(2, 2, 6, 2), channels=(96, 192, 384, 768), dim=256, levels=(3, 2, 1, 3, 2, 1)),  # as Swin-T
    "small": dict(depths=(2, 2, 18, 2), channels=(96, 192, 384, 768), dim=256, levels=(3, 2, 1, 3, 2, 1)),  # as Swin-S
}
VERSION = 2  # raised whenever weights of before would give other results, also where their names and shapes are the same
HEAD_DIM = 64  # channels of one head; a stage of fewer has one head
GRID = 10  # centers start from a grid of at most 10 x 10 cells: K = 100, as in the paper
CENTER_RATIO = 1, 2  # hidden widths, in D, of the two MLPs of the centers, before and after clustering
TOKEN_RATIO = 2  # of the MLP of the tokens, of which there may be thousands; ConvNeXt and Swin spend 4 here


# ---------------------------------------------------------------------------------------------------------------
# 1. Where the centers start: C(0) is seen in the image, not learned for the data set
# ---------------------------------------------------------------------------------------------------------------
class Layout(NamedTuple):
    """Where images lie in a map of H x W tokens; computed once for all the blocks of a stage.

    In a batch of unequal images each lies at the top left of the map and padding fills the rest; `tokens` and
    `centers` then tell what is real.  A mask is None where everything is real; images of one size have a 1 in place of B.
    """

    rows: torch.Tensor  # (B, kh, H)  row i averages the rows of the map that make up row i of the grid
    columns: torch.Tensor  # (B, kw, W)  the same across
    y: torch.Tensor  # (B, H)  height of each token in its image, -0.5 to 0.5
    x: torch.Tensor  # (B, W)
    tokens: torch.Tensor | None  # (B, H, W)  bool, True where there is image
    centers: torch.Tensor | None  # (B, kh * kw)  bool, True where there is a center


def to_device(values, device):
    """A small host tensor on the device, without waiting for the GPU: from pageable memory the copy would be a wait."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def split_side(lengths, size, tokens_per_cell=2):
    """Averaging over the cells of a grid along one side, as a matrix.

    lengths: (B,) int64, the real length of each image in tokens.  size: length of the map, >= every length.
    tokens_per_cell: a side has one cell for every so many tokens, rounded up, and GRID cells at most.
    Returns (B, k, size) float32, rows summing to 1 (0 for cells that an image has not), and (B, k) bool, which
    cells an image has.  Cells tile the side as evenly as integers allow and overlap by a token where they must,
    as in torch's adaptive pooling; unlike there, every image of the batch may have its own length.
    """
    fill = tokens_per_cell - 1
    cell = torch.arange(min(GRID, (size + fill) // tokens_per_cell), device=lengths.device)[:, None]  # (k, 1)
    position = torch.arange(size, device=lengths.device)  # (size,)
    lengths = lengths[:, None, None]  # (B, 1, 1)
    cells = ((lengths + fill) // tokens_per_cell).clamp(max=GRID)
    start, end = cell * lengths // cells, ((cell + 1) * lengths + cells - 1) // cells  # (B, k, 1)
    real = cell < cells
    inside = (position >= start) & (position < end) & real  # (B, k, size)
    return inside / inside.sum(-1, keepdim=True).clamp(min=1), real[..., 0]


def inside_of(height, width, sides):
    """Which places of a map of height x width lie within images of these sides, (B, 2) -> bool (B, H, W)."""
    rows = torch.arange(height, device=sides.device) < sides[:, :1]
    columns = torch.arange(width, device=sides.device) < sides[:, 1:]
    return rows[:, :, None] & columns[:, None]


def layout_of(height, width, sizes=None, device=None, tokens_per_cell=2):
    """Layout of a map of height x width tokens.

    sizes: (B, 2) int64 on the CPU, real heights and widths in tokens, or None.  On the host, whether a mask is needed can be
    decided without waiting for the GPU.
    tokens_per_cell: of a small map; a large one has its 10 x 10 cells.  A cluster of one token has nothing to gather: hence 2.
    """
    device = torch.device("cpu") if device is None else device
    if sizes is None:
        sides = torch.stack([torch.full((1,), side, device=device) for side in (height, width)], 1)
    else:
        sides = to_device(sizes, device)
    rows, real_rows = split_side(sides[:, 0], height, tokens_per_cell)
    columns, real_columns = split_side(sides[:, 1], width, tokens_per_cell)
    y = (torch.arange(height, device=device) + 0.5) / sides[:, :1] - 0.5
    x = (torch.arange(width, device=device) + 0.5) / sides[:, 1:] - 0.5
    tokens = centers = None
    if sizes is not None:
        shortest = sizes.amin(0).tolist()
        if shortest != [height, width]:
            tokens = inside_of(height, width, sides)
        cells = [min(GRID, -(-side // tokens_per_cell)) for side in shortest]
        if cells != [rows.shape[1], columns.shape[1]]:
            centers = (real_rows[:, :, None] & real_columns[:, None]).flatten(1)
    return Layout(rows, columns, y, x, tokens, centers)


def pool_centers(x, layout):
    """AdaptivePooling_K: x, map (B, H, W, D) -> means of the cells of the grid, (B, K, D), K = kh * kw."""
    x = (layout.rows.to(x.dtype) @ x.flatten(2)).unflatten(2, x.shape[2:])  # (B, kh, W, D)
    return (layout.columns[:, None].to(x.dtype) @ x).flatten(1, 2)  # (B, K, D)


def mask_padding(x, layout):
    """A map (B, H, W, D) with zeros beyond each image, which a convolution then sees as it sees any border."""
    return x if layout.tokens is None else x * layout.tokens[..., None]


def mlp(dim, ratio):
    """norm, D -> ratio D -> D.  The last layer is zero: the branch begins as nothing, and grows with its gradients.

    (Layer scale, a learned factor near 0 on a branch of ordinary weights, held the branches back: most of its factors had
    not left their 0.01 after 300 steps.)
    """
    layers = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, ratio * dim), nn.GELU(), nn.Linear(ratio * dim, dim))
    nn.init.zeros_(layers[-1].weight)
    nn.init.zeros_(layers[-1].bias)
    return layers


# ---------------------------------------------------------------------------------------------------------------
# 2. Recurrent cross-attention clustering: the E- and M-steps
# ---------------------------------------------------------------------------------------------------------------
class RecurrentCrossAttentionClustering(nn.Module):
    """T rounds of EM between K centers and N tokens, in each head on its own.

        E-step    M(t) = softmax_K( tau cos(Q(C(t-1)), K(I)) )
        M-step    C(t) = C(t-1) + W(t) V(I) / W(t) 1,  W(t) = M(t) exp( tau cos(Q(C(t-1)), K(I)) ), element by element

    - Softmax over K, not over N: every pixel is shared out among the clusters, its shares sum to 1.  (Attention
      normalises over N instead: every center would take its own pick, and pixels might go unseen.)
    - Cosine and a temperature tau per head: with plain dot products long vectors would win every pixel.
    - A pixel weighs by its share times its likeness.  Shares alone cannot say that a pixel looks like no center: it is
      shared out all the same, a little to each, and all these little shares together would blur the center.
    - Divided by the mass W 1: the M-step of EM is a mean.  The sum would grow with the number of pixels.
    - Added to the center: gradients reach C(0) through all T rounds, and a cluster without pixels stays put.
    - Q, K and V start as the identity, so that from the first step a center attracts the pixels that look like it,
      and stays in the space of the pixels.
    - A head compares d neighbouring channels of the tokens, but gathers every h-th.  The mean over pixels that look
      alike, of just those channels in which they look alike, would tell a center little that it does not know.  So in
      the next round each head compares what other heads have gathered, and d x d projections suffice: full ones, of
      D to D channels, cost D / d times as much and were no better (one seed, small images).

    What costs is passes over M, which has K numbers where a head of a token has d channels: per round one product writes the
    similarities, the softmax turns them into M, two more passes into W, the mass and one product read it; in training M and
    W of all rounds are kept.  Keys and values are projected once, whatever T is.  Inside, heads come before images: a head's
    projection is then one product for all images, where (B, h, ...) would copy its d x d weights, and sum their gradients,
    for every image.
    """

    def __init__(self, dim, num_heads, iterations=3, temperature=10.0):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}")
        self.num_heads, self.iterations = num_heads, iterations
        identity = torch.eye(dim // num_heads).expand(num_heads, -1, -1)
        self.q, self.k, self.v = (nn.Parameter(identity.clone()) for _ in range(3))  # (h, d, d)
        self.log_temperature = nn.Parameter(torch.full((num_heads,), math.log(temperature)))

    def project(self, x, weight):
        """x: (B, n, h, d).  weight: (h, d, d).  Returns (h, B, n, d)."""
        return (x.permute(2, 0, 1, 3).flatten(1, 2) @ weight).unflatten(1, x.shape[:2])

    def forward(self, centers, tokens, mask=None, center_mask=None, trace=None, prior=None):
        """Cluster the tokens.

        centers: (B, K, D).  tokens: (B, N, D).
        mask: (B, N) bool, True for real tokens, or None if all are; the others weigh nothing.
        center_mask: (B, K) bool, True for real centers, or None if all are; the others get no pixels.
        trace: a list to which {"centers": [C(0), ..., C(T)], "assignments": [M(1), ..., M(T)], "values": V(I), (B, h, N, d),
            "weights": [W(1) / W(1) 1, ..., W(T) / W(T) 1], what each value counts in a center's mean} is appended, or None.
        prior: (h, B, N, K), log of how likely a pixel is a center's whatever it looks like, or None.  Added to the similarity:
            it counts in M and in the likeness.
        Returns C(T), (B, K, D), and M(T), (B, h, K, N): over K it sums to 1 for real tokens and is 0 for others.
        """
        if self.training:
            with torch.no_grad():  # the parameter itself: beyond a clamp in the graph it would never see a gradient again
                self.log_temperature.clamp_(max=math.log(50.0))  # at 50 a softmax is an argmax
        keys = self.project(tokens.unflatten(-1, (self.num_heads, -1)), self.k)  # (h, B, N, d)
        # (B, N, h, d): of four heads, the first compares channels 0 to d - 1 and gathers channels 0, 4, 8, ...
        values = tokens.unflatten(-1, (-1, self.num_heads)).transpose(-2, -1)
        # The rounds run in float32 also under autocast.  It costs no memory traffic: the softmax gives float32 in any
        # case, and to cast M down would be one more pass over it.
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        keys = F.normalize(keys.to(dtype), dim=-1)
        values = self.project(values, self.v).to(dtype)  # (h, B, N, d)
        history = {"centers": [centers], "assignments": [], "values": values.transpose(0, 1), "weights": []}
        with torch.autocast(tokens.device.type, enabled=False):
            centers, q = centers.to(dtype), self.q.to(dtype)
            tau = self.log_temperature.to(dtype).exp().view(-1, 1, 1, 1)
            for _ in range(self.iterations):
                queries = self.project(centers.unflatten(-1, (self.num_heads, -1)), q)  # (h, B, K, d)
                queries = tau * F.normalize(queries, dim=-1)
                similarity = keys @ queries.transpose(-2, -1)  # (h, B, N, K): K last, where the softmax is one pass
                if prior is not None:
                    similarity = similarity + prior
                if center_mask is not None:
                    similarity = similarity.masked_fill(~center_mask[:, None], -torch.inf)
                assignment = similarity.softmax(-1)  # (h, B, N, K)
                weights = assignment * similarity.exp_()  # (h, B, N, K), at most e^50; similarity is done with
                if mask is not None:
                    weights = weights * mask[:, :, None]  # neither pull nor mass
                mass = weights.sum(-2, keepdim=True)  # (h, B, 1, K)
                means = values.transpose(-2, -1) @ weights / mass.clamp(min=1e-30)  # (h, B, d, K)
                centers = centers + means.permute(1, 3, 2, 0).flatten(2)  # (B, K, D), each channel back in its place
                if trace is not None:
                    history["centers"].append(centers)
                    history["assignments"].append(assignment.permute(1, 0, 3, 2))
                    history["weights"].append((weights / mass.clamp(min=1e-30)).permute(1, 0, 3, 2))
        assignment = assignment.permute(1, 0, 3, 2)  # (B, h, K, N)
        if mask is not None:
            assignment = assignment * mask[:, None, None]
            history["assignments"] = [past * mask[:, None, None] for past in history["assignments"]]
        if trace is not None:
            trace.append(history)
        return centers.to(tokens.dtype), assignment


# ---------------------------------------------------------------------------------------------------------------
# 3. Feature dispatching: what the clusters have gathered goes back to the tokens
# ---------------------------------------------------------------------------------------------------------------
class FeatureDispatching(nn.Module):
    """p_i' = p_i + sum_k M[k, i] MLP(C_k): the paper's Eq. 6, p_i' = p_i + MLP( 1/K sum_k sim(C_k, p_i) C_k ), with

    - the similarity that is already there, sim(C_k, p_i) = K M[k, i]: the assignment of the last E-step, in each head.
      1/K and K cancel, and a token receives a mean of its centers, in the shares in which it was counted among them.
      A similarity of its own (a sigmoid of the cosine, in the released code) would be one more pass over (B, h, K, N);
    - the MLP inside of the sum: what a cluster has gathered is thought over once per cluster, not once per pixel.
      Without it a token gets little more than a blurred copy of itself, since its clusters are pixels that look like it.

    The MLP ends in a layer of zeros: new dispatching adds nothing.
    """

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.mlp = mlp(dim, CENTER_RATIO[1])

    def forward(self, centers, assignment):
        """centers: (B, K, D).  assignment: (B, h, K, N).  Returns what each token receives, (B, N, D)."""
        centers = self.mlp(centers)
        heads = centers.unflatten(-1, (self.num_heads, -1)).permute(2, 0, 1, 3).to(assignment.dtype)  # (h, B, K, d)
        with torch.autocast(centers.device.type, enabled=False):  # as in the rounds: M is float32 already
            received = assignment.permute(1, 0, 3, 2) @ heads  # (h, B, N, d)
        return received.permute(1, 2, 0, 3).flatten(2)  # (B, N, D)


# ---------------------------------------------------------------------------------------------------------------
# 4. The block
# ---------------------------------------------------------------------------------------------------------------
class ClusterBlock(nn.Module):
    """One layer of the backbone, and of whatever else works on a map.

        x = x + DepthwiseConv(x)               clusters gather what looks alike, wherever it is: neighbours meet here
        I = norm(x)
        C(0) = pool(I) + FFN(pool(I))
        C, M = cluster(C(0), I)
        x = x + dispatch(C, M)                 the MLP in it is once per cluster
        x = x + MLP(x)                         and this one once per pixel
    """

    def __init__(self, dim, num_heads, iterations=3, drop_path=0.0):
        super().__init__()
        self.neighbours = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm = nn.LayerNorm(dim)
        # Zero at first: a center begins as the plain mean of its cell, and so attracts the pixels that look like it.
        self.center_ffn = mlp(dim, CENTER_RATIO[0])
        self.cluster = RecurrentCrossAttentionClustering(dim, num_heads, iterations)
        self.dispatch = FeatureDispatching(dim, num_heads)
        self.mlp = mlp(dim, TOKEN_RATIO)
        self.drop_path = drop_path

    def add(self, x, branch):
        """x + branch; in training the branch is left out of an image with probability drop_path."""
        if self.training and self.drop_path:
            keep = torch.rand(x.shape[0], 1, 1, 1, device=x.device) >= self.drop_path
            branch = branch * (keep / (1 - self.drop_path))
        return x + branch

    def forward(self, x, layout, trace=None):
        """x: map (B, H, W, D).  layout: of this map.  trace: as in RecurrentCrossAttentionClustering.

        Returns the map, same shape.
        """
        x = mask_padding(x, layout)
        x = x + self.neighbours(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        tokens = self.norm(x)
        mask = None if layout.tokens is None else layout.tokens.flatten(1)
        centers = pool_centers(tokens, layout)  # (B, K, D)
        centers = centers + self.center_ffn(centers)
        # centers (B, K, D), assignment (B, h, K, N)
        centers, assignment = self.cluster(centers, tokens.flatten(1, 2), mask, layout.centers, trace)
        if trace is not None:
            trace[-1]["size"] = x.shape[1:3]
        x = self.add(x, self.dispatch(centers, assignment).view_as(x))
        return self.add(x, self.mlp(x))


# ---------------------------------------------------------------------------------------------------------------
# 5. The backbone
# ---------------------------------------------------------------------------------------------------------------
def check_images(images):
    """Raises ValueError unless images are a float tensor (B, 3, H, W) with H, W >= 32, or a list of (3, H, W)."""
    is_list = isinstance(images, (list, tuple))
    if is_list and not images:
        raise ValueError("images must hold at least one image")
    for image in images if is_list else [images]:
        if not isinstance(image, torch.Tensor) or image.ndim != (3 if is_list else 4) or image.shape[-3] != 3:
            got = tuple(image.shape) if isinstance(image, torch.Tensor) else type(image).__name__
            raise ValueError(f"images must be a tensor (B, 3, H, W) or a list of tensors (3, H, W), got {got}")
        if not image.is_floating_point():
            raise ValueError(f"images must be float RGB in [0, 1], got {image.dtype}; divide by 255")
        if min(image.shape[-2:]) < 32:
            raise ValueError(f"images must be at least 32 x 32 pixels, got {image.shape[-2]} x {image.shape[-1]}")


def batch_images(images):
    """One tensor for a list of images.

    images: (B, 3, H, W), or a list of (3, H, W) of any sizes.
    Returns (B, 3, H, W), and None if all have one size, else sizes (B, 2) int64 in pixels, on the CPU; padding is zero.
    """
    if isinstance(images, torch.Tensor):
        return images, None
    if len({image.shape for image in images}) == 1:
        return torch.stack(list(images)), None
    sizes = [tuple(image.shape[-2:]) for image in images]
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    batch = images[0].new_zeros(len(images), 3, height, width)
    for padded, image in zip(batch, images):
        padded[:, : image.shape[-2], : image.shape[-1]] = image
    return batch, torch.tensor(sizes, device="cpu")


def pad_to_multiple(images, multiple):
    """(B, C, H, W) with zeros at the bottom and the right, so that H and W are divisible."""
    return F.pad(images, (0, -images.shape[-1] % multiple, 0, -images.shape[-2] % multiple))


class Backbone(nn.Module):
    """Four stages of cluster blocks at strides 4, 8, 16 and 32 (2, 4, 8, 16 with patch_size 2).

    backbone(images) gives four maps that drop into any detector; backbone.channels are their widths.
    """

    def __init__(self, depths, channels, patch_size=4, iterations=3, drop_path=0.0):
        super().__init__()
        self.channels, self.strides = tuple(channels), tuple(patch_size * 2**i for i in range(4))
        # Normalisation is part of the model: wherever the file is copied, images come as they are, in [0, 1].
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))  # of ImageNet
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
        # Two overlapping convolutions instead of one of 4 x 4 pixels: edges are found in a fraction of the steps.
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels[0], 3, stride=patch_size // 2, padding=1),
            nn.GELU(),
            nn.Conv2d(channels[0], channels[0], 3, stride=2, padding=1),
        )
        # Neighbouring pixels are nearly equal, so that random filters answer to brightness, and a texture is lost in what
        # is left.  Three of four begin without a mean, and strong: they see contrast.  Textures are learned faster than
        # with batch normalisation, which would tie an image to the others of its batch.
        edges = self.stem[0].weight.data[channels[0] // 4 :]  # a view: (3/4 of the filters, 3, 3, 3)
        edges.sub_(edges.mean((2, 3), keepdim=True)).mul_(5)
        self.coordinates = nn.Linear(2, channels[0], bias=False)
        self.embed_norm = nn.LayerNorm(channels[0])
        rates = torch.linspace(0, drop_path, sum(depths)).tolist()  # deeper blocks are left out more often
        self.stages, self.downsample_norms, self.downsamples = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for i, (depth, dim) in enumerate(zip(depths, channels)):
            if i > 0:
                self.downsample_norms.append(nn.LayerNorm(channels[i - 1]))
                self.downsamples.append(nn.Conv2d(channels[i - 1], dim, 3, stride=2, padding=1))
            blocks = [ClusterBlock(dim, max(1, dim // HEAD_DIM), iterations, drop_path=rates.pop(0)) for _ in range(depth)]
            self.stages.append(nn.ModuleList(blocks))

    def embed(self, images, sizes):
        """Pixels to tokens: what is seen there, and where in the image it is.

        Returns the map (B, H, W, D) and its layout.
        """
        x = (images - self.mean) / self.std
        if sizes is not None:  # padding of zeros after normalising, as at the border of an image on its own
            x = x * inside_of(*x.shape[-2:], to_device(sizes, x.device))[:, None]
            sizes = -(-sizes // self.strides[0])
        x = self.stem(pad_to_multiple(x, self.strides[0])).permute(0, 2, 3, 1)  # (B, H, W, D)
        layout = layout_of(x.shape[1], x.shape[2], sizes, x.device)
        y, x_ = torch.broadcast_tensors(layout.y[:, :, None], layout.x[:, None])
        return self.embed_norm(x + self.coordinates(torch.stack([y, x_], -1))), layout

    def features(self, images, sizes=None, trace=None):
        """As forward, for heads that go on with the tokens: a list of four maps (B, H, W, C), and their four layouts."""
        x, layout = self.embed(images, sizes)
        maps, layouts = [], []
        for i, blocks in enumerate(self.stages):
            if i > 0:
                x = mask_padding(self.downsample_norms[i - 1](x), layout)
                x = self.downsamples[i - 1](x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # ceil(H / 2), ceil(W / 2)
                real = None if sizes is None else -(-sizes // self.strides[i])
                layout = layout_of(x.shape[1], x.shape[2], real, x.device)
            for block in blocks:
                x = block(x, layout, trace)
                if trace is not None:
                    trace[-1]["stage"] = i
            maps.append(x)
            layouts.append(layout)
        return maps, layouts

    def forward(self, images, sizes=None, trace=None):
        """images: float RGB in [0, 1], (B, 3, H, W), or a list of (3, H, W) of any sizes >= 32 x 32.

        sizes: (B, 2) int64, heights and widths in pixels of images padded to one tensor; None for a list.
        trace: a list to which one dictionary per block is appended, in order (no cost if None):
            "centers"      C(0) .. C(T), each (B, K, D)
            "assignments"  M(1) .. M(T), each (B, h, K, N)
            "values"       V(I), (B, h, N, d), and "weights", W(t) / W(t) 1 for each t, (B, h, K, N): what the means are made of
            "size"         (H, W) of the N tokens
            "stage"        0 to 3
        Returns four maps (B, C, ceil(H / s), ceil(W / s)) at strides s = 4, 8, 16, 32.
        """
        check_images(images)
        if not isinstance(images, torch.Tensor):
            images, sizes = batch_images(images)
        maps, _ = self.features(images, None if sizes is None else sizes.cpu(), trace)
        return [x.permute(0, 3, 1, 2) for x in maps]


# ---------------------------------------------------------------------------------------------------------------
# 6. Classification
# ---------------------------------------------------------------------------------------------------------------
class ClassificationHead(nn.Module):
    """Clusters the last map once more and lets every cluster vote.

        logits = bias + W mean_k norm(C_k)

    Everything after the norm is linear, so that a logit is exactly the bias plus the mean over the centers of
    w . norm(C_k), each center's share.  And a center is a sum of tokens: C(0) is the mean of a cell, and each M-step adds a
    mean of values.  So with the weights of these means, and the norm's division, as they came out, a share is the sum of what
    each token brought to the center: an explanation that adds up, token by token (explain() in eval.py).  Clustering once
    more puts the last block's dispatching to use.
    """

    def __init__(self, dim, num_heads, num_classes, iterations=3):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.cluster = RecurrentCrossAttentionClustering(dim, num_heads, iterations)
        self.center_norm = nn.LayerNorm(dim)
        self.classifier = nn.Linear(dim, num_classes)

    def forward(self, x, layout, trace=None):
        """x: last map (B, H, W, D).  Returns logits (B, num_classes)."""
        tokens = self.norm(x)
        mask = None if layout.tokens is None else layout.tokens.flatten(1)
        centers, _ = self.cluster(pool_centers(tokens, layout), tokens.flatten(1, 2), mask, layout.centers, trace)
        if trace is not None:
            trace[-1].update(size=x.shape[1:3], stage="head", tokens=tokens.flatten(1, 2))
        centers = self.center_norm(centers)  # (B, K, D)
        if layout.centers is None:
            mean = centers.mean(1)  # (B, D)
        else:
            real = layout.centers[..., None].to(centers.dtype)
            mean = (centers * real).sum(1) / real.sum(1)
        with torch.autocast(mean.device.type, enabled=False):  # in bfloat16 logits of likely classes would often be equal
            return self.classifier(mean.to(self.classifier.weight.dtype))


# ---------------------------------------------------------------------------------------------------------------
# 7. Neck and decoder: detection and segmentation begin
# ---------------------------------------------------------------------------------------------------------------
class Neck(nn.Module):
    """Maps of one width D, in which fine maps know what coarse ones see.

        Q_s = Linear(norm(I_s)) + upsampled Linear(norm(P_2s))        from the coarsest map to the finest
        P_s = Q_s + DepthwiseConv(Q_s)                                each token among its neighbors, as in an FPN

    What comes down begins as zero.  Coarse maps learn last: until then they would only drown what the fine one sees.
    """

    def __init__(self, channels, dim):
        super().__init__()
        self.laterals = nn.ModuleList(nn.Sequential(nn.LayerNorm(c), nn.Linear(c, dim)) for c in channels)
        self.descents = nn.ModuleList(nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim)) for _ in channels[1:])
        for descent in self.descents:
            nn.init.zeros_(descent[-1].weight)
            nn.init.zeros_(descent[-1].bias)
        self.neighbours = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1, groups=dim) for _ in channels)

    def forward(self, maps, layouts):
        """maps: (B, H, W, C) of each stride, fine to coarse.  layouts: of these.  Returns as many maps (B, H, W, D)."""
        outputs = []
        for i in reversed(range(len(maps))):
            x = self.laterals[i](maps[i])
            if outputs:
                coarse = self.descents[i](outputs[-1]).repeat_interleave(2, 1).repeat_interleave(2, 2)
                x = x + coarse[:, : x.shape[1], : x.shape[2]]  # (i, j) lies in (i // 2, j // 2)
            x = mask_padding(x, layouts[i])
            outputs.append(x + self.neighbours[i](x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return outputs[::-1]


def cells_of(layout):
    """The grid's cells as the clusters that they are at first: (B or 1, K, N), the weight of each token in its center."""
    return (layout.rows[:, :, None, :, None] * layout.columns[:, None, :, None]).flatten(3).flatten(1, 2)


def moments(share, layout):
    """The box that a cluster's pixels fill: mean and spread of their places; the first boxes are those of the grid's cells.

    share: (B or 1, K, N), not negative.  Returns (B or 1, K, 4) float32: centre x, y, width, height in fractions of the
    image.  Over a side of length s, even density has the variance s^2 / 12; so s = sqrt(12 variance).
    """
    share = share.float().unflatten(-1, (layout.y.shape[1], layout.x.shape[1]))  # (B, K, H, W)
    centre, extent = [], []
    for density, place in ((share.sum(-2), layout.x), (share.sum(-1), layout.y)):  # (B, K, W) and (B, W); then rows
        density = density / density.sum(-1, keepdim=True).clamp(min=1e-9)
        mean = (density * place[:, None]).sum(-1)
        variance = (density * (place[:, None] - mean[..., None]) ** 2).sum(-1)
        token = 0.5 + place[:, :1]  # half a token: the first one's middle, seen from the border
        centre.append(mean + 0.5)
        extent.append((12 * variance + 4 * token**2).sqrt())  # a token is no point, but a side of its own
    return torch.stack(centre + extent, -1)


def remoteness(boxes, layout):
    """Squared distance of places from the middles of boxes, in half sides: 1 in the middle of each side.

    boxes: (B, K, 4) cxcywh in fractions of the image.  Returns (B, K, H, W).
    """
    x, y, width, height = boxes.float().unsqueeze(-1).unbind(2)  # (B, K, 1) each
    across = ((layout.x[:, None] + 0.5 - x) / (width.clamp(min=0.01) / 2)) ** 2  # (B, K, W)
    down = ((layout.y[:, None] + 0.5 - y) / (height.clamp(min=0.01) / 2)) ** 2  # (B, K, H)
    return down[..., None] + across[:, :, None]


QUARTERS = (-0.25, -0.25), (0.25, -0.25), (-0.25, 0.25), (0.25, 0.25)  # of a box: x and y from its middle, in its sides


def place_prior(boxes, layout):
    """How likely the pixels of a center are at a place: in each head, the log of a Gaussian over a quarter of its box.

    A mean over a whole object tells what it is made of, but not how it is put together.  Where four heads each gather a
    quarter, a corner at the top left and one at the bottom right are two things: of shapes, 64 % instead of 44 % were named
    rightly after 300 steps of 16 scenes (means over true boxes).
    A quarter is at least a token wide.  A narrower one may lie between the tokens: all of them would be far away, equally,
    and the center would gather the whole image.
    boxes: (B, K, 4) cxcywh in fractions of the image.  Returns (4, B, N, K); in the middle of a quarter's sides it is -2.
    """
    x, y, width, height = boxes.unbind(-1)  # (B, K) each
    wide, high = (torch.maximum(side / 2, 1 + 2 * place[:, :1]) for side, place in ((width, layout.x), (height, layout.y)))
    quarters = [torch.stack([x + right * width, y + down * height, wide, high], -1) for right, down in QUARTERS]
    prior = torch.stack([-2 * remoteness(quarter, layout).flatten(2).mT for quarter in quarters])
    # Not below -20: the weights of a box in which there is no token would all be 0 in float32, and so would their mass.
    return prior.clamp(min=-20)


def mask_prior(masks, finest, step):
    """How likely the pixels of a center are at a place: the log of the probability of its mask there.

    A box also holds what is around an object and before it; its mask does not.
    masks: logits (B, K, H, W).  finest: layout of the masks.  step: how many of their pixels a side make a token.
    Returns (B, N, K), not below -10, so that a center whose mask is wrong still sees what else is in its box.
    """
    pool = lambda x: F.avg_pool2d(x, step, ceil_mode=True)  # a mean of what there is at the border
    masks = masks.float()
    if finest.tokens is None:
        masks = pool(masks)
    else:  # a mean over what is image
        real = finest.tokens[:, None].float()
        masks = pool(masks * real) / pool(real).clamp(min=1e-6)
    return F.logsigmoid(masks).clamp(min=-10).flatten(2).mT


def corners(boxes):
    """(..., 4) centre x, y, width, height -> left, top, right, bottom."""
    middle, sides = boxes[..., :2], boxes[..., 2:]
    return torch.cat([middle - sides / 2, middle + sides / 2], -1)


def box_overlap(a, b):
    """IoU of boxes, and their generalized IoU (Rezatofighi et al., 2019), which also tells boxes apart that do not overlap.

    a, b: (..., 4) left, top, right, bottom, of shapes that broadcast.  Returns two tensors (...).
    """
    shared = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - shared
    iou = shared / union.clamp(min=1e-9)
    return iou, iou - (hull - union) / hull.clamp(min=1e-9)


def overlaps(boxes):
    """IoU of all pairs of an image's boxes, 0 of a box with itself.  boxes: (B, K, 4) cxcywh.  Returns (B, K, K)."""
    boxes = corners(boxes)
    iou, _ = box_overlap(boxes[:, :, None], boxes[:, None])
    return iou * (1 - torch.eye(iou.shape[1], device=iou.device))


class DecoderLayer(nn.Module):
    """Centers look at one map, then at each other.

        C, M = cluster(norm(C), I)         with a prior: a center's pixels lie in its box, a quarter a head, and in its mask
        C = C + attention(norm(C))         biased by the overlap of boxes: who else speaks for this object?
        C = C + FFN(C)
    """

    def __init__(self, dim, iterations=3):
        super().__init__()
        self.norm, self.attention_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        # A low temperature: an object is seen whole, its pixels that look unlike its center, too.
        self.cluster = RecurrentCrossAttentionClustering(dim, len(QUARTERS), iterations, temperature=2.0)
        self.attention = nn.MultiheadAttention(dim, max(1, dim // 32), batch_first=True)
        # Per head, how much overlap attracts: from not at all to a factor of e^8 for a box of the same place.
        self.overlap = nn.Parameter(torch.linspace(0, 8, self.attention.num_heads))
        self.ffn = mlp(dim, 4)

    def forward(self, centers, boxes, tokens, layout, center_mask=None, trace=None, masks=None):
        """centers: (B, K, D).  boxes: (B, K, 4), where they are.  tokens: (B, H, W, D).

        masks: log of the probability that a token is a center's, (B, N, K), as of mask_prior; None: only boxes are known.
        Returns the centers.
        """
        mask = None if layout.tokens is None else layout.tokens.flatten(1)
        prior = place_prior(boxes, layout)
        if masks is not None:
            prior = prior + masks
        centers, _ = self.cluster(self.norm(centers), tokens.flatten(1, 2), mask, center_mask, trace, prior)
        if trace is not None:
            trace[-1].update(size=tokens.shape[1:3], stage="decoder")
        x = self.attention_norm(centers)
        bias = self.overlap[:, None, None] * overlaps(boxes)[:, None]  # (B, heads, K, K)
        if center_mask is not None:
            bias = bias.masked_fill(~center_mask[:, None, None], -torch.inf)
        centers = centers + self.attention(x, x, x, attn_mask=bias.flatten(0, 1), need_weights=False)[0]
        return centers + self.ffn(centers)


# ---------------------------------------------------------------------------------------------------------------
# 8. Detection and segmentation: what a center answers
# ---------------------------------------------------------------------------------------------------------------
def class_probability(logits):
    """Softmax over the classes and "none", whose logit is 0.  logits: (..., classes).  Returns (..., classes).

    Not a sigmoid and the focal loss of each class, as DETR's successors have it: with these a center learns to keep
    quiet long before it learns to tell classes apart (of shapes, 23 instead of 64 % were named rightly after 300 steps of 16).
    """
    return F.pad(logits.float(), (0, 1)).softmax(-1)[..., :-1]


def perceptron(dim, out):
    """D -> D -> D -> out."""
    return nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, out))


class DetectionHead(nn.Module):
    """The box of a center: its anchor, moved by fractions of its sides and stretched, then cut off at the image's border.

    What a center has gathered lies in quarters of the anchor, too: the same sight asks for the same correction, wherever and
    however large the object is.
    """

    def __init__(self, dim):
        super().__init__()
        self.correction = perceptron(dim, 4)
        nn.init.zeros_(self.correction[-1].weight)  # at first, the anchor itself
        nn.init.zeros_(self.correction[-1].bias)

    def forward(self, centers, anchors):
        """centers: (B, K, D).  anchors: (B, K, 4) cxcywh in fractions of the image.  Returns boxes of the same kind."""
        move, stretch = self.correction(centers).float().chunk(2, -1)
        middle, sides = anchors[..., :2], anchors[..., 2:].clamp(min=0.01)
        middle, sides = middle + sides * move, sides * stretch.clamp(max=4).exp()  # e^4: from 2 % of the image to all of it
        low, high = (middle - sides / 2).clamp(0, 1), (middle + sides / 2).clamp(0, 1)
        return torch.cat([(low + high) / 2, high - low], -1)


class SegmentationHead(nn.Module):
    """The mask of a center: where the pixels' embeddings point its way, and that is not far from its box.

        masks = MLP(C) . P - 2 s min(remoteness, 8)      P: MLP of the finest map of the neck

    s > 0, how much the box counts, is the center's own: a lot for one thing among its like, little for a sky.

    In training, pixels also name their classes themselves, for a loss of their own; those of no class have none.  A mask and
    the class of its center have to find each other first, and until then tell the pixels little; their own classes tell them
    at once what is to be told apart.
    """

    def __init__(self, dim, num_classes):
        super().__init__()
        self.classifier = nn.Linear(dim, num_classes)
        self.mlp = mlp(dim, TOKEN_RATIO)
        self.pixel = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim))
        self.center = perceptron(dim, dim)
        self.steepness = nn.Linear(dim, 1)
        nn.init.zeros_(self.steepness.weight)
        nn.init.constant_(self.steepness.bias, math.log(0.25))

    def embed(self, x):
        """Pixel embeddings (B, H, W, D) from the finest map (B, H, W, D); once for all layers."""
        return self.pixel(x + self.mlp(x))

    def forward(self, centers, boxes, pixels, layout):
        """centers: (B, K, D).  boxes: (B, K, 4).  pixels: (B, H, W, D).  layout: of these.  Returns logits (B, K, H, W)."""
        steepness = self.steepness(centers).float().exp()[..., None]  # (B, K, 1, 1)
        far = remoteness(boxes, layout).clamp(max=8)  # as far as the corners of a box of twice the sides; farther is no worse
        masks = torch.einsum("bkd,bhwd->bkhw", self.center(centers), pixels)
        return masks - (2 * steepness * far).to(masks.dtype)


OUTLINE = 12  # samples a side of what a center sees of its own mask


def outlines(masks, boxes, layout):
    """What masks look like in their boxes: samples from a tenth of a side before the box to a tenth behind it.

    masks: logits (B, K, H, W).  boxes: (B, K, 4) cxcywh in fractions of the image.  layout: of the masks.
    Returns (B, K, 12 * 12), rows first: 0.5 inside of the mask, -0.5 outside, 0 beyond the image.
    """
    shares = []
    for axis, place in enumerate((layout.x, layout.y)):
        middle, side = boxes[..., axis, None].float(), boxes[..., axis + 2, None].float()  # (B, K, 1)
        samples = middle + side * torch.linspace(-0.6, 0.6, OUTLINE, device=boxes.device)  # (B, K, 12)
        token = 1 + 2 * place[:, :1, None]  # of the image's side, (B or 1, 1, 1)
        reach = torch.maximum(side * 1.2 / (OUTLINE - 1), token)  # of large masks, a sample is a mean over many tokens
        distance = (place[:, None, None] + 0.5 - samples[..., None]).abs() / reach[..., None]
        share = (1 - distance).clamp(min=0)  # (B, K, 12, W), then H: linear between tokens
        shares.append(share / share.sum(-1, keepdim=True).clamp(min=1))
    columns, rows = shares
    seen = masks.float().sigmoid() - 0.5
    if layout.tokens is not None:
        seen = seen * layout.tokens[:, None]
    return (rows @ seen @ columns.mT).flatten(2)


class Decoder(nn.Module):
    """100 centers, started from the cells of a grid, and six layers that look at strides 32, 16, 8 in turn.

    (On scenes of 96 pixels the coarse maps have 3 x 3 and 6 x 6 tokens; nano's three layers look at stride 8 only, which
    learns faster.)

    A center answers before the first layer and after each of them, and every answer is trained (deep supervision); where
    it answers that the object is, the next layer looks for its pixels.
    """

    def __init__(self, task, dim, levels, num_classes, iterations=3):
        super().__init__()
        self.levels = levels  # of each layer: 1 is the finest of the last three maps, at stride 8, and 3 the coarsest
        self.token_norm = nn.LayerNorm(dim)
        self.center_ffn = mlp(dim, CENTER_RATIO[0])
        self.layers = nn.ModuleList(DecoderLayer(dim, iterations) for _ in levels)
        self.norm = nn.LayerNorm(dim)
        self.classifier = nn.Linear(dim, num_classes)
        nn.init.constant_(self.classifier.bias, -math.log(9 * num_classes))  # 0.9 for none: most centers are, and start so
        self.detection = DetectionHead(dim)  # also where boxes are not asked for: centers find their pixels by them
        self.segmentation = None
        if task != "det":
            self.segmentation = SegmentationHead(dim, num_classes)
            # Means forget an outline; a mask has it.  So a center also looks at its mask before it says what it is.
            self.outline = nn.Sequential(nn.Linear(OUTLINE**2, 2 * dim), nn.GELU(), nn.Linear(2 * dim, num_classes))
            nn.init.zeros_(self.outline[-1].weight)
            nn.init.zeros_(self.outline[-1].bias)

    def answer(self, centers, anchors, pixels, layout, center_mask):
        """What centers (B, K, D) say, a dictionary: "logits", "boxes" and, as the task has them, "masks".

        layout: of the pixels (B, H, W, D).
        """
        x = self.norm(centers)
        output = dict(boxes=self.detection(x, anchors))
        if self.segmentation:
            boxes = output["boxes"].detach()
            output["masks"] = self.segmentation(x, boxes, pixels, layout)
            seen = outlines(output["masks"].detach(), boxes, layout)
        with torch.autocast(x.device.type, enabled=False):  # in bfloat16 scores of many centers would be equal
            output["logits"] = self.classifier(x.to(self.classifier.weight.dtype))
            if self.segmentation:
                output["logits"] = output["logits"] + self.outline(seen.to(self.classifier.weight.dtype))
        if center_mask is not None:  # a center that an image has not got says nothing: probability e^-100
            output["logits"] = output["logits"].masked_fill(~center_mask[..., None], -100.0)
        return output

    def forward(self, maps, layouts, grid, trace=None):
        """maps: of the neck, (B, H, W, D), fine to coarse, the last three at strides 8, 16, 32.  layouts: of the maps.

        grid: layout of the map at stride 8, for the centers.  Returns the answers, a list.
        """
        pixels = self.segmentation.embed(maps[0]) if self.segmentation else None
        finest, layouts, tokens = layouts[0], layouts[-3:], [self.token_norm(x) for x in maps[-3:]]
        centers = pool_centers(tokens[0], grid)
        centers = centers + self.center_ffn(centers)
        boxes = moments(cells_of(grid), grid).expand(len(centers), -1, -1)  # (B, K, 4)
        answers = [self.answer(centers, boxes, pixels, finest, grid.centers)]
        for level, layer in zip(self.levels, self.layers):
            boxes = answers[-1]["boxes"].detach()  # a layer corrects what it is given, and is judged by that alone
            masks = None
            if self.segmentation and len(answers) > 1:  # a mask means little before a center has seen anything
                masks = mask_prior(answers[-1]["masks"].detach(), finest, 2**level)
            centers = layer(centers, boxes, tokens[level - 1], layouts[level - 1], grid.centers, trace, masks)
            answers.append(self.answer(centers, boxes, pixels, finest, grid.centers))
        if self.training and self.segmentation:
            answers[-1]["pixels"] = self.segmentation.classifier(pixels).permute(0, 3, 1, 2)
        return answers


# ---------------------------------------------------------------------------------------------------------------
# 9. From what the centers say to answers for people
# ---------------------------------------------------------------------------------------------------------------
def full_size(masks, image_size, stride, size):
    """Logits of masks in the size of the answer.

    masks: (K, h, w) at a stride of the padded image.  image_size, size: (H, W) of the image without padding, of the answer.
    Returns (K, H, W) float32.
    """
    height, width = image_size
    masks = masks[:, : -(-height // stride), : -(-width // stride)].float()  # first, so that no padding shines through
    masks = F.interpolate(masks[None], scale_factor=stride, mode="bilinear")[:, :, :height, :width]
    return masks[0] if size == image_size else F.interpolate(masks, size, mode="bilinear")[0]


def best_objects(probability, boxes, threshold=0.6):
    """The (center, class) pairs of highest probability, at most 100, without repetitions.

    A pair is a repetition if a better one of the same class, itself one or not, overlaps it by more than the threshold.
    Trained long, centers leave an object to one of them; until then, and where two are left, this is why it is counted once.
    probability: (K, classes).  boxes: (K, 4) cxcywh.  Returns scores, labels, centers, each (n,), best first.
    """
    scores, pairs = probability.flatten().topk(min(100, probability.numel()))
    centers, labels = pairs // probability.shape[1], pairs % probability.shape[1]
    repeats = overlaps(boxes[None])[0][centers][:, centers] > threshold  # (n, n)
    same = labels[:, None] == labels
    keep = ~(repeats & same).triu(1).any(0)
    return scores[keep], labels[keep], centers[keep]


def semantic_labels(probability, masks):
    """Class of every pixel: of each class, the sum over centers of its probability times their mask, and the largest.

    probability: (K, classes).  masks: (K, H, W) logits.  Returns int64 (H, W).
    """
    with torch.autocast(masks.device.type, enabled=False):  # in bfloat16 sums of two classes would often be equal
        return torch.einsum("kc,khw->chw", probability, masks.sigmoid()).argmax(0)


def panoptic_segments(probability, masks, things, threshold=0.25, overlap=0.6):
    """Every pixel's segment: things one a center, stuff one a class.

    Of the centers surer than `threshold` of a class, each pixel goes to the one whose probability times mask is largest.
    A center that wins less than `overlap` of its mask was a repetition, and gets nothing.
    probability: (K, classes).  masks: (K, H, W) logits.  things: list of bool, for each class whether it is countable.
    Returns ids, int64 (H, W), 0 where no center has a mask, and a list of {"id", "label", "isthing", "score"}.
    """
    scores, labels = probability.max(1)
    sure = scores > threshold
    scores, labels, masks = scores[sure], labels[sure], masks[sure].sigmoid()
    ids, segments = torch.zeros(masks.shape[1:], dtype=torch.int64, device=masks.device), []
    if not len(scores):
        return ids, segments
    owner = (scores[:, None, None] * masks).argmax(0)  # (H, W)
    of_stuff = {}  # class -> its segment
    for k, (score, label) in enumerate(zip(scores.tolist(), labels.tolist())):
        inside = masks[k] > 0.5
        won = inside & (owner == k)
        if won.sum() == 0 or won.sum() < overlap * inside.sum():
            continue
        if label in of_stuff:
            segment = of_stuff[label]
            segment["score"] = max(segment["score"], score)
        else:
            segment = dict(id=len(segments) + 1, label=label, isthing=things[label], score=score)
            segments.append(segment)
            if not things[label]:
                of_stuff[label] = segment
        ids[won] = segment["id"]
    return ids, segments


# ---------------------------------------------------------------------------------------------------------------
# 10. The model
# ---------------------------------------------------------------------------------------------------------------
TASKS = ("cls", "det", "inst", "sem", "pan")


class ClusterFormer(nn.Module):
    """Backbone and head of one task.

    model(images) gives what is trained, model.predict(images) answers for people, one dictionary per image.
    """

    def __init__(
        self,
        task="cls",  # cls: class of an image; det: boxes; inst: boxes and masks; sem: class of a pixel; pan: and of things, which
        variant="tiny",  # a key of VARIANTS
        num_classes=1000,
        patch_size=4,  # 4, or 2 for images of about 32 x 32 pixels
        iterations=3,  # T, rounds of E- and M-step; memory and time of the maps grow with it
        drop_path=0.0,  # stochastic depth: probability of leaving out a branch of the last block, 0 in the first
        things=None,  # pan: for each class whether it is countable, a list of bool; None: all are
    ):
        super().__init__()
        if task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if patch_size not in (2, 4):
            raise ValueError(f"patch_size must be 2 or 4, got {patch_size}")
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
        if things is not None and len(things) != num_classes:
            raise ValueError(f"things must have one entry for each of {num_classes} classes, got {len(things)}")
        self.task, self.num_classes = task, num_classes
        # What a checkpoint has to know to build this model again.
        self.arguments = dict(task=task, variant=variant, num_classes=num_classes, patch_size=patch_size, iterations=iterations)
        self.arguments |= dict(drop_path=drop_path, things=None if things is None else [bool(thing) for thing in things])
        things = [True] * num_classes if things is None else [bool(thing) for thing in things]
        self.register_buffer("things", torch.tensor(things), persistent=False)
        size = VARIANTS[variant]
        self.backbone = Backbone(size["depths"], size["channels"], patch_size, iterations, drop_path)
        channels = self.backbone.channels
        if task == "cls":
            self.head = ClassificationHead(channels[-1], max(1, channels[-1] // HEAD_DIM), num_classes, iterations)
        else:
            self.levels = slice(1, None) if task == "det" else slice(None)  # only masks need the finest map
            self.neck = Neck(channels[self.levels], size["dim"])
            self.decoder = Decoder(task, size["dim"], size["levels"], num_classes, iterations)

    def forward(self, images, trace=None):
        """images and trace: as in Backbone; head and decoder append more dictionaries, of stage "head" (and its
            "tokens", (B, N, D)) and "decoder".

        Returns for cls {"logits": (B, classes)}, and for the other tasks
            "logits"  (B, K, classes)  of each of K = 100 centers (fewer where there are fewer than 10 x 10 tokens at stride
                                       8) and class that the center is of it; class_probability makes shares of them
            "boxes"   (B, K, 4)        centre x, y, width, height, in fractions of the image without padding; sem and pan
                                       have them, too, as the prior of where a center's pixels are
            "masks"   (B, K, H/4, W/4) inst, sem, pan: logits (H/2, W/2 with patch_size 2)
            "aux"     a list of the same for earlier layers, first to last
            "pixels"  (B, classes, H/4, W/4), in training, with masks: logits of the pixels' own classes, for softmax
        Checks shapes and dtype (ValueError), not the range of values: that would wait for the GPU at every step.
        """
        check_images(images)
        images, sizes = batch_images(images)
        maps, layouts = self.backbone.features(images, sizes, trace)  # (B, H, W, D) each
        if self.task == "cls":
            return {"logits": self.head(maps[-1], layouts[-1], trace)}
        real = None if sizes is None else -(-sizes // self.backbone.strides[1])
        grid = layout_of(maps[1].shape[1], maps[1].shape[2], real, images.device, tokens_per_cell=1)
        maps, layouts = maps[self.levels], layouts[self.levels]
        *earlier, last = self.decoder(self.neck(maps, layouts), layouts, grid, trace)
        return last | {"aux": earlier}

    @torch.no_grad()
    def predict(self, images, sizes=None):
        """Answers for people.

        images: as in forward; raises ValueError also if a value is not within [0, 1].
        sizes: a list of (H, W), in which boxes and maps are given; None: those of the images.
        Returns one dictionary per image:
            cls   "scores" (5,) float32, highest first, and "labels" (5,) int64 (fewer where there are fewer classes)
            det   "scores" (n,), highest first, "labels" (n,), "boxes" (n, 4) xyxy in pixels; n <= 100
            inst  the same and "masks" (n, H, W) bool; a score is multiplied by the mean probability of the mask's pixels
            sem   "semantic" (H, W) int64, the class of every pixel
            pan   "panoptic" (H, W) int64, the segment of every pixel, 0 for none, and "segments", a list of dictionaries
                  {"id": int, "label": int, "isthing": bool, "score": float}
        The model is in evaluation mode meanwhile.
        """
        check_images(images)
        for image in images:
            low, high = image.aminmax()
            if not (low >= 0 and high <= 1):  # also catches NaN
                raise ValueError(f"images must be RGB in [0, 1], got values from {low:.4g} to {high:.4g}")
        training = self.training
        self.eval()
        output = self(images)
        self.train(training)
        if self.task == "cls":
            scores, labels = output["logits"].float().softmax(-1).topk(min(5, self.num_classes))
            return [{"scores": s, "labels": l} for s, l in zip(scores, labels)]
        answers = []
        for i, image in enumerate(images):
            own = tuple(image.shape[-2:])
            size = own if sizes is None else tuple(sizes[i])
            probability = class_probability(output["logits"][i])  # (K, classes)
            masks = full_size(output["masks"][i], own, self.backbone.strides[0], size) if "masks" in output else None
            if self.task == "sem":
                answers.append({"semantic": semantic_labels(probability, masks)})
            elif self.task == "pan":
                ids, segments = panoptic_segments(probability, masks, self.things.tolist())
                answers.append({"panoptic": ids, "segments": segments})
            else:
                boxes = output["boxes"][i].float()
                scores, labels, centers = best_objects(probability, boxes)
                answer = {}
                if masks is not None:
                    masks = masks.sigmoid()
                    inside = masks > 0.5
                    quality = (masks * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)
                    order = (scores * quality[centers]).argsort(descending=True)
                    scores, labels, centers = (scores * quality[centers])[order], labels[order], centers[order]
                    answer["masks"] = inside[centers]
                pixels = torch.tensor([size[1], size[0]] * 2, device=boxes.device)
                boxes = corners(boxes[centers]).clamp(0, 1) * pixels
                answers.append({"scores": scores, "labels": labels, "boxes": boxes} | answer)
        return answers


def load_checkpoint(path, ema=True):
    """A model as train.py left it, in evaluation mode on the CPU, and the checkpoint's dictionary.

    ema: take the averaged weights, which are the ones that train.py reports.
    Raises ValueError, in one line, if the file is not a whole checkpoint of train.py.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # no code runs from the file
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint") from None
    except Exception as error:  # a broken archive shows as any of half a dozen exceptions
        raise ValueError(f"{path}: not a readable checkpoint ({str(error).splitlines()[0]})") from error
    if not isinstance(checkpoint, dict) or not {"model", "ema", "settings", "classes"} <= checkpoint.keys():
        raise ValueError(f"{path}: not a checkpoint of train.py: no model, ema, settings and classes in it")
    version = checkpoint.get("version", 1)  # the first one did not say so
    if version != VERSION:
        raise ValueError(f"{path}: its weights are of version {version} of the model, this is version {VERSION}; train anew")
    try:
        model = ClusterFormer(**checkpoint["arguments"])
        model.load_state_dict(checkpoint["ema" if ema else "model"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:  # the last is of weights that do not fit
        raise ValueError(f"{path}: not a whole checkpoint of train.py ({' '.join(str(error).split())})") from error
    return model.eval(), checkpoint
