# SPDX-License-Identifier: MIT
"""ClusterFormer: clustering as a universal visual learner, in one file.

A reference for "ClusterFormer: Clustering As A Universal Visual Learner" (NeurIPS 2023, arXiv
2309.13196).  Copy this file into any project: it needs PyTorch and NumPy, and nothing else.

    model = ClusterFormer("cls", "tiny", num_classes=1000)
    logits = model(images)["logits"]   # float RGB in [0, 1], (B, 3, H, W); H and W multiples of 32
    predictions = ClusterFormer("inst", "tiny", num_classes=80).predict(images)       # of any sizes

    C = InitialCenters(96)(tokens)                    # or the parts alone, on a map (B, H, W, 96)
    C, M = RecurrentCrossAttentionClustering(96, num_heads=3)(C, tokens)     # M: (B, 3, K, H, W)
    tokens = tokens + FeatureDispatching(96, num_heads=3)(C, M)

THE METHOD.  Self-attention compares every token with every other token, which costs N x N.
ClusterFormer puts K cluster centers between them, which costs N x K.  In the E-step every token is
assigned to the centers.  In the M-step every center collects its tokens.  After T = 3 iterations,
every token receives what its clusters have collected.  The assignment is also an explanation: it can be
drawn, and shows which pixels each cluster holds.

LETTERS, in equations and in the shapes at the ends of lines:

    B     images in a batch              I     tokens of a map, p_i one of them
    H, W  height and width in tokens     C(t)  centers after t iterations, C_k one of them
    N     tokens of a map, H * W         M     assignment: M_ki, of token i to cluster k; sums to 1
    K     centers                              over k
    D     channels                       S     similarity of centers and tokens, shaped like M
    h, d  heads; channels of a head      T     EM iterations

THE PAPER, as we read it: its abstract, and its Figure 2, which is in the README of the authors' release
and names Eq. 3 and Eq. 6.  "Recalled" marks what we know from elsewhere.  The full text may say more.

    initial centers   C(0)   = FFN( AdaptivePooling_K(I) )                                  recalled
    E-step            M(t)   = softmax_K( Q(C(t)) K(I)^T )           t = 0 .. T    Eq. 3, Figure 2b
    M-step            C(t+1) = M(t) V(I)                             t < T         Eq. 3, Figure 2b
    dispatching       p_i'   = p_i + MLP( 1/K sum_k sim(C_k(T), p_i) C_k(T) )      Eq. 6, Figure 2c

K in softmax_K and 1/K is the number of centers; K( ) is the projection of the keys; sim is a similarity
of center and token.  Recalled, too: 100 centers, T = 3, heads of 32 channels, and six layers in the decoder.

THIS FILE, with q, k and v for the projections:

    initial centers   C(0)   = pool(I) + FFN(pool(I))
    E-step            M(t)   = softmax_K( S(t) ),  S(t) = scale * cos( q(C(t)), k(I) )     t = 0 .. T
    M-step            C(t+1) = C(t) + mean of v(I), each token weighted by M(t) exp(S(t))      t < T
    dispatching       p_i'   = p_i + sum_k M_ki(T) MLP(C_k(T))

Where it differs from the paper, and why.  (Figures: .github/EXPERIMENTS.md.  In half an hour of a core on Imagenette,
top-1 is 4.0 +- 0.6 points higher without clustering, and 2.0 +- 1.0 with T = 1, in three seeds; T = 3 is the paper's.)

    C(0)     FFN is added to the pooled mean, and starts at zero: at first, centers are the means of cells
    K        at most 5 x 5 in the backbone, which takes a third less time than the paper's 100; 100 in the decoder
    S        a cosine with a learned scale per head.  A plain dot product ends in a hard assignment; with
             1/sqrt(d), M starts so evenly that all means are nearly equal
    q, k, v  a d x d matrix per head; D x D takes a quarter more time.  v starts as the identity; in stage 1 q and k do
             as well, so that clusters group what looks alike.  In deeper stages their random start learns better
    M-step   a mean, since a sum would grow with N; exp(S), so that a token that matches no center hardly counts.  C is
             kept and added to, as in kMaX-DeepLab (2022), so that a center of the decoder stays with its object
    p_i'     for sim we take K M_ki, already computed; this K cancels 1/K.  The MLP inside the sum runs K times, not N
    block    a depthwise 3 x 3 convolution first, since clusters ignore where tokens are; an MLP on tokens last
    stem     4 x 4 / 2 and 2 x 2 / 2 convolutions, and a linear map of the coordinates: see Backbone

A block costs these multiply-adds, in brackets divided by N D for stage 1 of Tiny (N = 3136, K = 25): keys and values
2 N D d (64); E- and M-steps and dispatching (2 T + 2) N D K (200); convolution 9 N D (9); MLP on tokens 4 N D D (384);
MLPs on centers 6 K D D (5); queries (T + 1) K D d (1).  The authors' release is another method than their figure's:
its centers attend by a softmax over N, then each of its tokens goes to the most similar center; it has no dense tasks.

"Paper" marks what follows the paper as we read it, a name and a year other work, "Ours" what is new here.  Sections:
clustering (1 to 3), backbone (4, 5), classification (6), detection and segmentation (7 to 10), model and trace (11).
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# depths and channels: of the four stages.  Those of tiny and small are Swin-T's and Swin-S's (Paper);
# nano is ours, for CPUs and small images.
# levels: for each decoder layer, the map that it clusters: 1, 2 or 3 for stride 8, 16 or 32 (half, if patch_size is 2).
# dim: width of neck and decoder.  drop_path: for train.py, which sets it in long runs on many images; not read here.
TINY = dict(depths=(2, 2, 6, 2), channels=(96, 192, 384, 768), dim=256, levels=(3, 2, 1, 3, 2, 1), drop_path=0.2)
VARIANTS = {
    "nano": dict(depths=(1, 2, 2, 1), channels=(32, 64, 128, 256), dim=128, levels=(1, 1, 1), drop_path=0.0),
    "tiny": TINY,
    "small": TINY | dict(depths=(2, 2, 18, 2), drop_path=0.3),
}
VERSION = 9  # of saved weights, for train.py: raised when older ones would not fit, or would mean another thing
HEAD_DIM = 32  # channels of a head (Paper, recalled); the decoder's clustering has four heads, see DecoderLayer
GRID = 5  # centers start from a grid of at most 5 x 5 cells: K = 25
OBJECT_GRID = 10  # and those of the decoder from 10 x 10 cells: K = 100 (Paper, recalled)
QUADRANTS = (-0.25, -0.25), (0.25, -0.25), (-0.25, 0.25), (0.25, 0.25)  # middles of a box's, x and y: see box_prior
MASK_SAMPLES = 12  # per side of a box, of its mask: fine enough for a silhouette
INITIAL_RATIO = 1  # hidden width of the FFN on C(0), in units of D
DISPATCH_RATIO = 2  # of the MLP on C(T)
TOKEN_RATIO = 2  # of the MLP on tokens, which runs N times; Swin spends 4 here


# --------------------------------------------------------------------------------------------------
# 1. Initial centers: C(0) is pooled from the image; it is not a learned query
# --------------------------------------------------------------------------------------------------
def grid_shape(height, width, grid=GRID, min_cell=2):
    """Rows and columns of the grid that centers start from, on a map of height x width tokens.

    grid: cells per side, at most.  min_cell: tokens per side of a cell, at least, if the map has them.  It is 2 in the
    backbone, where a single token would leave nothing to aggregate, and 1 in the decoder, where centers move on.
    Neighboring cells share a token where sides are not divisible: 7 tokens make 4 cells, of 2, 3, 3 and 2.
    """
    return min(grid, -(-height // min_cell)), min(grid, -(-width // min_cell))


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm in the dtype of its input: under autocast, torch's returns float32, at twice the time."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def in_full_precision(module, x):
    """module(x) in the dtype of its weights, also under autocast.

    For classifiers, since bfloat16 often gives two classes the same logit, and for MLPs on centers in the backbone,
    where they are so few that casting the weights would take longer than the products.
    """
    with torch.autocast(x.device.type, enabled=False):
        return module(x.to(next(module.parameters()).dtype))


def zero_linear(dim, out):
    """nn.Linear that starts at zero."""
    linear = nn.Linear(dim, out)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def prenorm_mlp(dim, ratio):
    """A residual branch: norm, D -> ratio * D -> D.  Ours: it starts at zero, so at first it adds nothing."""
    return nn.Sequential(LayerNorm(dim), nn.Linear(dim, ratio * dim), nn.GELU(), zero_linear(ratio * dim, dim))


class InitialCenters(nn.Module):
    """C(0) = pool(I) + FFN(pool(I)), in the backbone and in the decoder; in the classification head pool(I)."""

    def __init__(self, dim, grid=GRID, min_cell=2, ffn=True):
        super().__init__()
        self.grid, self.min_cell = grid, min_cell  # see grid_shape
        self.ffn = prenorm_mlp(dim, INITIAL_RATIO) if ffn else None

    def forward(self, x):
        """x: map (B, H, W, D).  Returns C(0), (B, K, D)."""
        shape = grid_shape(*x.shape[1:3], self.grid, self.min_cell)
        centers = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), shape).flatten(2).mT  # means of grid cells (Paper)
        return centers if self.ffn is None else centers + in_full_precision(self.ffn, centers)


# --------------------------------------------------------------------------------------------------
# 2. Recurrent cross-attention clustering: E-step and M-step
# --------------------------------------------------------------------------------------------------
MAX_SCALE = 20.0  # limit of the scale of S: bfloat16 rounds an S of 20 to eighths, so exp(S) is off by up to 6 %


# In clustering and dispatching, heads come before images, so that a head's weights multiply all images in one product.
def split_heads(x, h):
    """(B, n, D) -> (h B, n, d): head j has the channels j d .. j d + d - 1."""
    return x.unflatten(-1, (h, -1)).permute(2, 0, 1, 3).flatten(0, 1)


def join_heads(x, h):
    """(h B, n, d) -> (B, n, D)."""
    return x.unflatten(0, (h, -1)).permute(1, 2, 0, 3).flatten(2)


def images_first(x, h):
    """(h B, ...) -> (B, h, ...), a view."""
    return x.unflatten(0, (h, -1)).transpose(0, 1)


def rms_norm(x):
    """sqrt(d) x / |x|, for x (..., d), in one kernel of a GPU."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-12)


class RecurrentCrossAttentionClustering(nn.Module):
    """T iterations of EM between K centers and N tokens, in each head separately.

    One iteration, in one head (d channels of tokens and of centers), for one image:

        tokens I (N, d) --k--> keys (N, d)        queries (K, d) <--q-- centers C(t) (K, d)
               |                       |            |                        |
               |                       +--> S = scale * cos                  |
               v                           | softmax over K                  |
        values (N, d)                      v                                 |
               |               center 1  center 2 ... center K               |
               |      token 1 [   .8        .1          .0   ] sums to 1     |
               |      token 2 [   .2        .7          .0   ] sums to 1     |
               |      ...                   M^T                              v
               +----> mean over the tokens: softmax over N of S + log M ---> add ---> C(t+1) (K, d)

    Paper (Eq. 3, Figure 2b): softmax over K, so every token is divided among the clusters.  (Ordinary attention
    takes it over N: every center chooses its tokens, and some tokens may be chosen by none.)  All iterations share
    q, k and v, and keys and values are computed once: it is a recurrence, not a stack of T layers.

    Ours: softmax_N( S + log M ) = M exp(S) / sum_N M exp(S).  A token weighs much in a mean if it matches this center
    (S), and no other center equally well (M).  With weights M alone, a token that matches no center would blur the
    means of all.  Here it hardly counts in a mean, but still receives from all clusters.  The decoder adds the log of
    a prior to S.  Weights M exp(S) then hold the prior twice, in M and in exp(S); that is kept, and makes it sharper.

    Cost: an iteration writes four tensors of N * K numbers per head (S, log M, their sum and the weights;
    five with a bias).  Training keeps log M and the weights: the gradients of softmax need them.
    """

    def __init__(self, dim, num_heads, iterations=3, scale=10.0, identity_start=False):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}")
        self.num_heads, self.iterations = num_heads, iterations
        d = dim // num_heads
        q, k, v = (torch.eye(d).repeat(num_heads, 1, 1) for _ in range(3))  # (h, d, d) each
        # With identity_start, S begins as the cosine of center and token themselves: tokens go to centers like them.
        if not identity_start:
            q, k = (torch.randn(num_heads, d, d) * d**-0.5 for _ in range(2))
        self.q, self.k, self.v = nn.Parameter(q), nn.Parameter(k), nn.Parameter(v)
        # With scale 10, exp(S) is e^10 times as large for a key that equals the query as for an orthogonal one.
        self.log_scale = nn.Parameter(torch.full((num_heads,), math.log(scale)))
        self.history = None  # a dictionary to fill, while trace() runs

    def similarity(self, C, q, keys, bias):
        """S, (h B, K, N).  C: (h B, K, d).  keys: (h B, N, d), scaled."""
        queries = torch.bmm(C.reshape(self.num_heads, -1, C.shape[-1]), q).view(C.shape)  # (h B, K, d)
        S = torch.bmm(rms_norm(queries), keys.mT)
        return S if bias is None else S + bias

    def forward(self, centers, tokens, bias=None):
        """Cluster the tokens.

        centers: C(0), (B, K, D).  tokens: map (B, H, W, D), or (B, N, D).
        bias: added to S, broadcast to (h, B, K, N): the log of a prior; finite, since a softmax over -inf alone is NaN.
        Returns C(T), (B, K, D), and M(T), (B, h, K, H, W), or (B, h, K, N).
        """
        B, h, device = tokens.shape[0], self.num_heads, tokens.device.type
        d = tokens.shape[-1] // h
        # Everything runs in the dtype of autocast, if it is on.  Left to itself, softmax would return
        # float32, and all maps of K x N would take twice the memory.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tokens.dtype
        with torch.autocast(device, enabled=False):
            q, k, v = self.q.to(dtype), self.k.to(dtype), self.v.to(dtype)  # (h, d, d) each
            heads = tokens.to(dtype).reshape(-1, h, d).transpose(0, 1)  # (h, B N, d), a view
            scale = self.log_scale.clamp(max=math.log(MAX_SCALE)).exp()
            scale = (scale / d).to(dtype).view(h, 1, 1)  # rms_norm gives queries and keys the length sqrt(d)
            keys = (rms_norm(torch.bmm(heads, k)) * scale).view(h * B, -1, d)  # (h B, N, d)
            values = torch.bmm(heads, v).view(h * B, -1, d)  # (h B, N, d)
            C = split_heads(centers.to(dtype), h)  # (h B, K, d)
            if bias is not None:
                bias = bias.to(dtype).expand(h, B, -1, -1).flatten(0, 1)  # (h B, K, N)
            steps = []  # for trace()
            for _ in range(self.iterations):
                S = self.similarity(C, q, keys, bias)  # (h B, K, N)
                log_M = S.log_softmax(1)  # E-step, over K (Paper)
                weights = (S + log_M).softmax(2)  # M-step, over N: M exp(S), divided by its sum
                C = torch.baddbmm(C, weights, values)  # C + weights @ values, (h B, K, d)
                if self.history is not None:
                    steps.append((join_heads(C, h), log_M.exp(), weights))
            M = self.similarity(C, q, keys, bias).softmax(1)  # the last E-step, (h B, K, N)
        if self.history is not None:
            self.record(centers, tokens, values, steps, M)
        C = join_heads(C, h).to(centers.dtype)  # the decoder's centers stay float32 under autocast
        return C, images_first(M, h).unflatten(-1, tokens.shape[1:-1])

    def record(self, centers, tokens, values, steps, M):
        """Fill the history with what trace() returns."""
        later, assignments, weights = zip(*steps)
        by_image = lambda maps: [images_first(x, self.num_heads) for x in maps]
        self.history |= dict(size=tokens.shape[1:-1], tokens=tokens.flatten(1, -2), centers=[centers, *later])
        self.history |= dict(values=images_first(values, self.num_heads), weights=by_image(weights))
        self.history |= dict(assignments=by_image([*assignments, M]))


# --------------------------------------------------------------------------------------------------
# 3. Feature dispatching: what the clusters have collected returns to the tokens
# --------------------------------------------------------------------------------------------------
class FeatureDispatching(nn.Module):
    """What each token receives from its clusters.

        Paper (Eq. 6, Figure 2c)   MLP( 1/K sum_k sim(C_k(T), p_i) C_k(T) )
        Ours                       sum_k M_ki(T) MLP(C_k(T))

    Ours has sim(C_k, p_i) = K M_ki, so that 1/K cancels.  Each head uses its own M.  The classification head and the
    decoder have no dispatching: there, centers are the result.
    """

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.mlp = prenorm_mlp(dim, DISPATCH_RATIO)

    def forward(self, centers, assignment):
        """centers: (B, K, D).  assignment: (B, h, K, H, W).  Returns a map (B, H, W, D), at first zero."""
        h, size = self.num_heads, assignment.shape[3:]
        M = assignment.flatten(3).transpose(0, 1).flatten(0, 1)  # (h B, K, N)
        messages = split_heads(in_full_precision(self.mlp, centers), h)  # MLP(C), (h B, K, d)
        received = torch.bmm(M.mT, messages.to(M.dtype))  # sum_k M_ki MLP(C_k), (h B, N, d)
        return join_heads(received, h).unflatten(1, size)


# --------------------------------------------------------------------------------------------------
# 4. The block
# --------------------------------------------------------------------------------------------------
class ClusterBlock(nn.Module):
    """One layer of the backbone.

        x    = x + DepthwiseConv(x)       Ours
        I    = norm(x)                    Ours
        C, M = cluster(initial(I), I)     Paper (Figure 2a): recurrent cross-attention clustering
        x    = x + dispatch(C, M)         Paper (Figure 2a): feature dispatching
        x    = x + MLP(x)                 Ours: works on each token alone, as in any transformer

    The convolution relates neighbors, and prepares the tokens that are clustered.  Its weights start at
    random (in the last stage at zero, see Backbone), and it is never dropped.  The other branches start at zero.
    """

    def __init__(self, dim, num_heads, iterations=3, drop_path=0.0, identity_start=False):
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm = LayerNorm(dim)
        self.initial = InitialCenters(dim)
        self.cluster = RecurrentCrossAttentionClustering(dim, num_heads, iterations, identity_start=identity_start)
        self.dispatch = FeatureDispatching(dim, num_heads)
        self.mlp = prenorm_mlp(dim, TOKEN_RATIO)
        self.drop_path = drop_path

    def add(self, x, branch):
        """x + branch; in training, an image skips the branch with probability drop_path."""
        if self.training and self.drop_path:
            keep = torch.rand(x.shape[0], 1, 1, 1, device=x.device) >= self.drop_path
            branch = branch * (keep / (1 - self.drop_path)).to(branch.dtype)  # float32 would spread to x
        return x + branch

    def forward(self, x):
        """x: map (B, H, W, D).  Returns a map of the same shape."""
        x = x + self.depthwise(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        tokens = self.norm(x)
        C, M = self.cluster(self.initial(tokens), tokens)
        x = self.add(x, self.dispatch(C, M))
        return self.add(x, self.mlp(x))


# --------------------------------------------------------------------------------------------------
# 5. The backbone
# --------------------------------------------------------------------------------------------------
def check_images(images, stride):
    """Raise ValueError unless images are float (B, 3, H, W), with sides that are multiples of stride."""
    if not isinstance(images, torch.Tensor) or images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        got = tuple(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
        raise ValueError(f"images must be (B, 3, H, W), got {got}; predict also takes a list of (3, H, W)")
    if not images.is_floating_point():
        raise ValueError(f"images must be float RGB in [0, 1], got {images.dtype}; divide by 255")
    height, width = images.shape[2:]
    if height % stride or width % stride:
        raise ValueError(f"sides must be multiples of {stride}, got {height} x {width}; pad, or call predict")


def check_image(image):
    """Raise ValueError unless an image for predict is float RGB in [0, 1], (3, H, W)."""
    check_images(image[None] if isinstance(image, torch.Tensor) else image, stride=1)
    low, high = image.aminmax()
    if not (low >= 0 and high <= 1):  # NaN fails, too
        raise ValueError(f"images must be RGB in [0, 1], got values from {low:.4g} to {high:.4g}")


def token_positions(count, device):
    """Middles of `count` tokens in a row, as fractions of the image: (count,), from 0 to 1."""
    return (torch.arange(count, device=device) + 0.5) / count


class Backbone(nn.Module):
    """Four stages of cluster blocks.  Its maps drop into any detector: see channels and strides.

    One image in Tiny; every block makes its own K centers, and discards them:

        image      3 x 224 x 224
          | stem: 4 x 4 / 2 and 2 x 2 / 2 convolutions, + coordinates
        stage 1   96 x  56 x  56   stride  4   N = 3136   K = 5 x 5   2 blocks
          | norm, 2 x 2 / 2 convolution
        stage 2  192 x  28 x  28   stride  8   N =  784   K = 5 x 5   2 blocks
          | norm, 2 x 2 / 2 convolution
        stage 3  384 x  14 x  14   stride 16   N =  196   K = 5 x 5   6 blocks
          | norm, 2 x 2 / 2 convolution
        stage 4  768 x   7 x   7   stride 32   N =   49   K = 4 x 4   2 blocks

    Paper (Figure 2a): four stages; depths and widths of Swin.  Swin (2021): 2 x 2 / 2 downsampling.
    Ours: the stem, and how positions enter.
    """

    def __init__(self, depths, channels, patch_size=4, iterations=3, drop_path=0.0):
        super().__init__()
        self.channels, self.strides = tuple(channels), tuple(patch_size * 2**i for i in range(4))
        # Images are normalized here, so that whoever copies the file cannot forget it.
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))  # ImageNet's
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
        # Strided convolutions read whole patches, or a pixel more on each side, so a token sees what it stands for.
        # A padded 3 x 3 / 2 convolution would be off by half a pixel of its input.  Five of them, two here and three
        # between stages, would be off by (1 + 2 + 4 + 8 + 16) / 2 pixels: half a token of the last map.
        half = patch_size // 2
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels[0] // 2, half + 2, stride=half, padding=1),
            nn.GELU(),
            nn.Conv2d(channels[0] // 2, channels[0], 2, stride=2),
        )
        # Ours: three quarters of the first convolution's filters are zero-centered and scaled by 5, to respond to
        # contrast from the start; random filters mostly respond to brightness.
        edges = self.stem[0].weight.data[channels[0] // 8 :]  # a view: (3/4 of the filters, 3, k, k)
        edges.sub_(edges.mean((2, 3), keepdim=True)).mul_(5)
        self.coordinates = nn.Linear(2, channels[0], bias=False)
        self.embed_norm = LayerNorm(channels[0])
        rates = torch.linspace(0, drop_path, sum(depths)).split(depths)  # deeper blocks are dropped more
        self.stages = nn.ModuleList()
        self.downsample_norms, self.downsamples = nn.ModuleList(), nn.ModuleList()
        for i, dim in enumerate(channels):
            if i > 0:
                self.downsample_norms.append(LayerNorm(channels[i - 1]))
                self.downsamples.append(nn.Conv2d(channels[i - 1], dim, 2, stride=2))
            heads = max(1, dim // HEAD_DIM)
            # In stage 1, tokens are colors and edges, and similar ones belong together.
            blocks = [ClusterBlock(dim, heads, iterations, rate, identity_start=i == 0) for rate in rates[i].tolist()]
            self.stages.append(nn.ModuleList(blocks))
        # The last map is so small that a random 3 x 3 convolution would mix much of the image into each token.
        # Starting from zero, it lets a token describe its own place, so that explanations can be read off the map.
        for block in self.stages[-1]:
            nn.init.zeros_(block.depthwise.weight)

    def embed(self, images):
        """Pixels (B, 3, H, W) -> tokens, which hold what is there, and where: (B, H/4, W/4, D)."""
        x = (images.to(self.mean.dtype) - self.mean) / self.std
        # Channels last, as the blocks need them: otherwise the convolutions of the stem copy large maps.
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.stem(x).permute(0, 2, 3, 1)  # (B, H/4, W/4, D)
        y, x_ = (token_positions(side, x.device) - 0.5 for side in x.shape[1:3])
        places = torch.stack(torch.meshgrid(y, x_, indexing="ij"), -1)  # (H/4, W/4, 2), from -0.5 to 0.5
        return self.embed_norm(x + self.coordinates(places.to(x.dtype)))

    def features(self, images):
        """What forward() returns, as heads need it: channels last."""
        check_images(images, self.strides[-1])
        x, maps = self.embed(images), []
        for i, blocks in enumerate(self.stages):
            if i > 0:
                x = self.downsample_norms[i - 1](x).permute(0, 3, 1, 2)
                x = self.downsamples[i - 1](x).permute(0, 2, 3, 1)  # half of H and W
            for block in blocks:
                x = block(x)
            maps.append(x)
        return maps

    def forward(self, images):
        """images: float RGB in [0, 1], (B, 3, H, W), sides multiples of the last stride.

        Returns four maps (B, C, H / s, W / s) at strides s = 4, 8, 16, 32.
        Raises ValueError if the images have the wrong shape or dtype.
        """
        return [x.permute(0, 3, 1, 2) for x in self.features(images)]


# --------------------------------------------------------------------------------------------------
# 6. Classification
# --------------------------------------------------------------------------------------------------
class ClassificationHead(nn.Module):
    """Cluster the last map once more, and average what the centers say.

        logits = bias + weight mean_k norm(C_k)

    Ours: what we read of the paper does not describe this head.  All that follows norm(C_k) is linear, so a logit is
    always a bias plus one contribution per center.  To divide a contribution among the tokens of the last map, hold
    the weights of the M-steps constant (trace returns them): C_k is linear in the normed tokens.  Hold the divisor in
    norm constant, too: norm(C_k) is linear in C_k, plus a bias.  So a contribution is a constant plus a sum over
    tokens, which eval.py draws.  An FFN on C(0) would break this.
    """

    def __init__(self, backbone, size, num_classes, iterations, label_smoothing, things):
        super().__init__()
        dim, self.label_smoothing = backbone.channels[-1], label_smoothing
        self.norm = LayerNorm(dim)
        self.initial = InitialCenters(dim, ffn=False)
        self.cluster = RecurrentCrossAttentionClustering(dim, max(1, dim // HEAD_DIM), iterations)
        self.center_norm = LayerNorm(dim)
        self.classifier = nn.Linear(dim, num_classes)

    def forward(self, maps):
        """maps: of the backbone, (B, H, W, C); the last is used.  Returns {"logits": (B, classes)}."""
        tokens = self.norm(maps[-1])
        C, _ = self.cluster(self.initial(tokens), tokens)
        mean = self.center_norm(C).mean(1)  # (B, D)
        return {"logits": in_full_precision(self.classifier, mean)}

    def loss(self, output, targets):
        """Cross-entropy, a sum over images.  targets: (B,) classes, or (B, classes) probabilities."""
        logits, smoothing = output["logits"].float(), self.label_smoothing
        return {"label": F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="sum")}

    def predict(self, output, *_):
        """The five likeliest classes per image."""
        probability = output["logits"].float().softmax(-1)
        scores, labels = probability.topk(min(5, probability.shape[1]))
        return [{"scores": s, "labels": l} for s, l in zip(scores, labels)]


# --------------------------------------------------------------------------------------------------
# 7. Detection and segmentation: neck, boxes, and their prior.  From here on, a cluster is an object
#
# Paper (abstract): the same clustering solves these tasks, too.  That is all we have read of it, so most of this is
# known from other work.  The figures are what a task scores less, of 1, without the part (negative: more); none: not
# tried.  They are of one seed, on drawn scenes: mask AP after a run of inst; mIoU and box AP after a quarter of runs of
# sem and det.  0.02 may be chance.  Where a part is missing, others make up for it; on photographs, all may differ.
#
#     part                                                            whose                      inst   sem   det
#     maps are added from coarse to fine                              FPN (2017)                 0.00
#       the addition starts at zero; a random start does harm         ours                       0.04
#       a depthwise 3 x 3 convolution smooths the sum                 ours                       0.01
#     100 centers, each pooled from a grid cell; six layers, T = 3    Paper, recalled
#     the cell is its first box                                       ours
#     S starts with a scale of 2                                      ours
#     a center looks where its previous box is                        SMCA (2021)
#       head j looks at quadrant j, not at the whole box              ours                       0.00  0.00   0.09
#     and where its previous mask is                                  Mask2Former (2022)         0.00  0.02
#     each layer moves the previous box                               Deformable DETR (2021)
#     attention between centers; "no object"; losses of all layers    DETR (2020)
#       several centers per target in the first layers                ours, after H-DETR (2023)  0.01
#     masks are dot products; their losses; order of the maps         Mask2Former (2022)
#       less a falloff with the distance from the box's middle        ours                       0.00  0.07
#       classes also see the mask, at 12 x 12 points                  ours                       0.00  0.08
#     pixels predict their classes                                    MaX-DeepLab (2021)        -0.02  0.05
#     duplicates are removed                                          YOLACT (2019)              0.08
# --------------------------------------------------------------------------------------------------
class Neck(nn.Module):
    """Bring all maps to the same width D, and add what coarser maps see.  FPN (Lin et al., 2017).

        x_s   = lateral(norm(I_s)) + upsampled top_down(norm(out_2s))      s: stride, coarse to fine
        out_s = x_s + DepthwiseConv(x_s)
    """

    def __init__(self, channels, dim):
        super().__init__()
        self.laterals = nn.ModuleList(nn.Sequential(LayerNorm(c), nn.Linear(c, dim)) for c in channels)
        # Coarse features become useful late, and would only add noise before that.
        self.top_down = nn.ModuleList(nn.Sequential(LayerNorm(dim), zero_linear(dim, dim)) for _ in channels[1:])
        self.depthwise = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1, groups=dim) for _ in channels)

    def forward(self, maps):
        """maps: (B, H, W, C), fine to coarse.  Returns as many (B, H, W, D)."""
        outputs = [lateral(x) for lateral, x in zip(self.laterals, maps)]
        for i in reversed(range(len(maps))):
            if i + 1 < len(maps):
                coarse = self.top_down[i](outputs[i + 1])
                outputs[i] = outputs[i] + coarse.repeat_interleave(2, 1).repeat_interleave(2, 2)
            outputs[i] = outputs[i] + self.depthwise[i](outputs[i].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return outputs


def cell_boxes(rows, columns, device):
    """Boxes of the grid cells that centers start from, (K, 4) cxcywh as fractions of the image."""
    y, x = torch.meshgrid(token_positions(rows, device), token_positions(columns, device), indexing="ij")
    return torch.stack([x, y, torch.full_like(x, 1 / columns), torch.full_like(y, 1 / rows)], -1).flatten(0, 1)


def cxcywh_to_xyxy(boxes):
    """(..., 4) center x, center y, width, height -> left, top, right, bottom."""
    center, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([center - half, center + half], -1)


def iou_and_giou(a, b):
    """IoU and generalized IoU (Rezatofighi et al., 2019), which also compares disjoint boxes.

    a, b: (..., 4) xyxy, of shapes that broadcast.  Returns two tensors (...).
    """
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - shared
    iou = shared / union.clamp(min=1e-9)
    return iou, iou - (hull - union) / hull.clamp(min=1e-9)


def box_distance(boxes, height, width):
    """Squared distance of tokens from the middles of boxes, in halves of their sides.

    boxes: (..., 4) cxcywh as fractions of the image.  Returns (..., height, width): 0 in the middle of a box,
    1 in the middle of each of its sides, 2 in its corners.
    """
    middle_x, middle_y, w, h = boxes.float().unsqueeze(-1).unbind(-2)  # (..., 1) each
    x, y = token_positions(width, boxes.device), token_positions(height, boxes.device)
    # A side counts as at least one token: a narrower prior could lie between the tokens.
    horizontal = ((x - middle_x) / (w.clamp(min=1 / width) / 2)) ** 2  # (..., width)
    vertical = ((y - middle_y) / (h.clamp(min=1 / height) / 2)) ** 2  # (..., height)
    return vertical[..., None] + horizontal[..., None, :]


def box_prior(boxes, height, width):
    """Log prior of where a center's tokens are: in head j, a Gaussian over quadrant j of its box (after SMCA, 2021).

    A mean over a whole object does not tell how its parts are arranged; four means over its quadrants do.
    boxes: (B, K, 4) cxcywh as fractions of the image.  height, width: of the map in tokens.  Returns (4, B, K, N).
    """
    offsets = torch.tensor(QUADRANTS, device="cpu").to(boxes.device, non_blocking=True)  # does not wait for the GPU
    middles = boxes[..., :2] + boxes[..., 2:] * offsets.view(4, 1, 1, 2)
    quadrants = torch.cat([middles, (boxes[..., 2:] / 2).expand_as(middles)], -1)  # (4, B, K, 4)
    # box_distance is d^2, with d in half sides of the quadrant.  exp(-2 d^2) has sigma = 1/2, a quarter of its side.
    # At least -20: far from all boxes, S decides, not the nearest box.
    return (-2 * box_distance(quadrants, height, width)).clamp(min=-20).flatten(3)


def mask_prior(masks, factor):
    """Log prior of where a center's tokens are, from its previous mask: a soft masked attention (Mask2Former).

    masks: logits (B, K, H, W).  factor: a token covers factor x factor of their pixels.
    Returns (B, K, N), at least -10: a center with a wrong mask still sees its box.
    """
    return F.logsigmoid(F.avg_pool2d(masks.float(), factor)).clamp(min=-10).flatten(2)


# --------------------------------------------------------------------------------------------------
# 8. The decoder: centers find their objects, layer by layer
# --------------------------------------------------------------------------------------------------
class DecoderLayer(nn.Module):
    """Centers collect tokens from one map, then look at each other.

        C, M = cluster(norm(C), I)
        C    = C + attention(norm(C))
        C    = C + FFN(C)

    cluster returns norm(C) plus means: C is normalized once per layer, and cannot grow with depth.  In the
    attention, centers that have found the same object can decide which of them keeps it.
    """

    def __init__(self, dim, iterations=3):
        super().__init__()
        self.norm, self.attention_norm = LayerNorm(dim), LayerNorm(dim)
        # A head per quadrant, so d is D / 4.  A scale of 2, not 10: an object's center also collects unlike parts.
        self.cluster = RecurrentCrossAttentionClustering(dim, len(QUADRANTS), iterations, scale=2.0)
        self.attention = nn.MultiheadAttention(dim, max(1, dim // HEAD_DIM), batch_first=True)
        self.ffn = prenorm_mlp(dim, 4)

    def forward(self, centers, tokens, prior):
        """centers: (B, K, D).  tokens: map (B, H, W, D).  prior: log prior (4, B, K, N).  Returns (B, K, D)."""
        centers, _ = self.cluster(self.norm(centers), tokens, prior)
        x = self.attention_norm(centers)
        centers = centers + self.attention(x, x, x, need_weights=False)[0]
        return centers + self.ffn(centers)


def mlp(dim, out, last=nn.Linear):
    """D -> D -> D -> out, without norm and residual, as in DETR's heads."""
    return nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.GELU(), last(dim, out))


def mask_samples(masks, boxes):
    """Masks at 12 x 12 points over their boxes: silhouettes, at the same scale for small and large objects.

    masks: logits (B, K, H, W).  boxes: (B, K, 4) cxcywh as fractions of the image.
    Returns (B, K, 144), row by row: 0.5 inside, -0.5 outside.
    """
    line = torch.linspace(-0.6, 0.6, MASK_SAMPLES, device=boxes.device)  # in sides: a silhouette needs its border
    y, x = torch.meshgrid(line, line, indexing="ij")
    points = boxes[..., None, :2] + boxes[..., None, 2:] * torch.stack([x, y], -1).flatten(0, 1)  # (B, K, 144, 2)
    samples = sample_points(masks.flatten(0, 1).float(), points.flatten(0, 1).float())
    return samples.sigmoid().unflatten(0, masks.shape[:2]) - 0.5


class Decoder(nn.Module):
    """100 centers, six layers (nano has three).  A layer refines the previous boxes.

        map at stride 8 --> InitialCenters --> C (B, 100, D), boxes: the cells of the 10 x 10 grid
                                                 |
                     +-------------------------->|
                     |                           v
                     |     predict: class, mask, and box (from the previous box)
                     |                           |
                     |              box and mask | become a prior, without gradient
                     |                           v
                     C <------------------ DecoderLayer <-- map at stride 32, 16, 8, 32, 16, 8

    All predictions are trained, including the one before the first layer.  A mask is the dot product of its
    center with an embedding of each pixel, less a falloff with the distance from the middle of its box.  Tasks that
    return no boxes predict them, too, for the prior.
    """

    def __init__(self, dim, levels, num_classes, iterations, with_masks):
        super().__init__()
        self.levels, self.with_masks = levels, with_masks
        self.token_norm = LayerNorm(dim)
        self.initial = InitialCenters(dim, OBJECT_GRID, min_cell=1)
        self.layers = nn.ModuleList(DecoderLayer(dim, iterations) for _ in levels)
        self.norm = LayerNorm(dim)
        self.classifier = nn.Linear(dim, num_classes + 1)  # the last class is "no object"
        nn.init.constant_(self.classifier.bias[-1:], math.log(9 * num_classes))  # at first, its probability is 0.9
        self.box = mlp(dim, 4, zero_linear)  # at first, a box is the previous one
        if with_masks:
            self.pixel_mlp = prenorm_mlp(dim, TOKEN_RATIO)
            self.pixel = nn.Sequential(LayerNorm(dim), nn.Linear(dim, dim))
            self.mask = mlp(dim, dim)
            self.falloff = nn.Linear(dim, 1)  # log of a factor of the distance
            self.pixel_classifier = nn.Linear(dim, num_classes)
            self.silhouette = nn.Sequential(
                nn.Linear(MASK_SAMPLES**2, 2 * dim), nn.GELU(), zero_linear(2 * dim, num_classes + 1)
            )

    def predict_centers(self, centers, boxes, embeddings):
        """What centers (B, K, D) with previous boxes (B, K, 4) predict: "logits", "boxes" and "masks".

        embeddings: of the pixels, (B, H, W, D), or None.
        """
        x = self.norm(centers)
        boxes = (boxes.logit(1e-3) + self.box(x).float()).sigmoid()
        output = dict(logits=in_full_precision(self.classifier, x), boxes=boxes)
        if self.with_masks:
            masks = torch.einsum("bkd,bhwd->bkhw", self.mask(x), embeddings)
            # A center learns how much the distance counts: much among similar objects, little for the sky.  At first,
            # the factor is some 0.5: a pixel in a corner of the box, at distance 2, loses 1.
            distance = box_distance(boxes.detach(), *embeddings.shape[1:3]).clamp(max=8)  # (B, K, H, W)
            masks = masks - (0.5 * self.falloff(x).float().exp()[..., None] * distance).to(masks.dtype)
            silhouettes = in_full_precision(self.silhouette, mask_samples(masks.detach(), boxes.detach()))
            output |= dict(masks=masks, logits=output["logits"] + silhouettes)
        return output

    def forward(self, maps):
        """maps: of the neck, (B, H, W, D), fine to coarse; the last three have strides 8, 16, 32 if patch_size is 4.

        Returns a list of predictions: before the first layer, and after each.
        """
        embeddings = self.pixel(maps[0] + self.pixel_mlp(maps[0])) if self.with_masks else None
        tokens = [self.token_norm(x) for x in maps[-3:]]
        centers = self.initial(tokens[0])  # (B, K, D)
        cells = grid_shape(*tokens[0].shape[1:3], OBJECT_GRID, min_cell=1)
        boxes = cell_boxes(*cells, centers.device).expand(centers.shape[0], -1, -1)
        outputs = [self.predict_centers(centers, boxes, embeddings)]
        for level, layer in zip(self.levels, self.layers):
            boxes = outputs[-1]["boxes"].detach()  # no gradient from the next layer's losses
            prior = box_prior(boxes, *tokens[level - 1].shape[1:3])
            if self.with_masks and len(outputs) > 1:  # not in the first layer: its centers have seen one cell only
                prior = prior + mask_prior(outputs[-1]["masks"].detach(), 2**level)  # masks have level 0
            centers = layer(centers, tokens[level - 1], prior)
            outputs.append(self.predict_centers(centers, boxes, embeddings))
        if self.with_masks and self.training:
            outputs[-1]["pixels"] = self.pixel_classifier(embeddings)  # (B, H, W, classes)
        return outputs


# --------------------------------------------------------------------------------------------------
# 9. Matching and losses of the dense tasks: for boxes those of DETR, for masks those of Mask2Former
# --------------------------------------------------------------------------------------------------
LOSS_WEIGHTS = dict(label=2.0, l1=5.0, giou=2.0, mask=5.0, dice=5.0, pixel=20.0)
NO_OBJECT_WEIGHT = 0.1  # of centers without a target: they far outnumber the others
MATCHES = 6, 4, 2  # centers per target in the first three predictions, see match(); one in the others
NUM_POINTS = 12_544  # at which a mask is compared, at most; a quarter of a small mask's pixels


def hungarian(cost):
    """The cheapest pairs of rows and columns (Jonker and Volgenant, 1987), as SciPy's linear_sum_assignment.

    Rows and columns have prices: cost - row_price - column_price is never below 0, and is 0 for the pairs that are
    taken.  So no other pairs can be cheaper.  Rows are added one by one, each by the shortest path to a free column.
    cost: float64 (n, m), finite.  Returns rows and columns of min(n, m) pairs, int64.
    """
    n, m = cost.shape
    if n > m:
        return hungarian(cost.T)[::-1]
    row_price, column_price = np.zeros(n), np.zeros(m)
    owner = np.full(m + 1, -1)  # the row that has each column; column m, an extra one, is where each path starts
    for row in range(n):
        column, owner[m] = m, row
        distance, before, done = np.full(m + 1, np.inf), np.full(m + 1, m), np.zeros(m + 1, bool)
        distance[m] = 0
        while owner[column] >= 0:  # Dijkstra: a path may lead over a taken column, whose owner then takes another one
            done[column], at = True, owner[column]
            further = distance[column] + cost[at] - row_price[at] - column_price
            nearer = ~done[:m] & (further < distance[:m])
            distance[:m][nearer], before[:m][nearer] = further[nearer], column
            column = int(np.where(done, np.inf, distance).argmin())
        # Prices change so that the path's pairs cost 0 and no pair costs less: if a column is nearer than the free one,
        # its price falls by the difference, and that of its owner rises by as much.  Column m has no price.
        change = np.where(done, distance[column] - distance, 0)
        row_price[owner[done]] += change[done]
        column_price -= change[:m]
        while column != m:  # back along the path, each row takes the next column
            owner[column] = owner[before[column]]
            column = before[column]
    columns = np.flatnonzero(owner[:m] >= 0)
    return owner[columns], columns


def sample_points(maps, points):
    """Bilinear samples of maps (n, h, w) at points (n, P, 2), x and y as fractions of the image: (n, P)."""
    grid = 2 * points[:, None] - 1  # (n, 1, P, 2), from -1 to 1
    return F.grid_sample(maps[:, None], grid, padding_mode="border", align_corners=False)[:, 0, 0]


def uncertain_points(logits):
    """Random points (n, P, 2), three of four where a mask (n, h, w) is least certain (PointRend, 2020).

    A mask is uncertain at its border.  The border decides its quality, but has few of the pixels.
    """
    count = min(NUM_POINTS, logits.shape[1] * logits.shape[2] // 4)
    points = torch.rand(len(logits), 3 * count, 2, device=logits.device)
    uncertainty = -sample_points(logits, points).abs()  # (n, 3 count)
    most = uncertainty.topk(3 * count // 4, dim=1).indices[..., None]
    rest = torch.rand(len(logits), count - most.shape[1], 2, device=logits.device)
    return torch.cat([points.take_along_dim(most, 1), rest], 1)


@torch.no_grad()
def matching_cost(output, target):
    """Roughly what each pair of a target and a center would cost in the losses below: (targets, centers) float32.

    output: predictions for one image, (n centers, ...).  target: as in ClusterFormer.loss.
    """
    labels, boxes, truth = target["labels"], output["boxes"].float(), target["boxes"]
    _, giou = iou_and_giou(cxcywh_to_xyxy(truth)[:, None], cxcywh_to_xyxy(boxes))
    cost = LOSS_WEIGHTS["l1"] * torch.cdist(truth, boxes, p=1) - LOSS_WEIGHTS["giou"] * giou
    cost -= LOSS_WEIGHTS["label"] * output["logits"].float().softmax(-1)[:, labels].T
    if "masks" in output:
        masks, truth = output["masks"].float(), target["masks"].float()
        points = torch.rand(1, min(NUM_POINTS, masks[0].numel() // 4), 2, device=masks.device)  # the same for all masks
        logits = sample_points(masks, points.expand(len(masks), -1, -1))  # (centers, P)
        truth = sample_points(truth, points.expand(len(truth), -1, -1))  # (targets, P)
        # Cross-entropy is softplus(x) - x y: one matrix product for all pairs.
        entropy = (F.softplus(logits).sum(1) - truth @ logits.T) / logits.shape[1]
        probability = logits.sigmoid()
        shared, total = truth @ probability.T, truth.sum(1)[:, None] + probability.sum(1)
        cost += LOSS_WEIGHTS["mask"] * entropy + LOSS_WEIGHTS["dice"] * (1 - (2 * shared + 1) / (total + 1))
    return cost


def match(outputs, targets):
    """Match each target with centers in each layer, at the least cost per image and layer.

    One match per target teaches centers to leave an object to one of them (DETR).  Several give more gradient
    (H-DETR, 2023, adds queries for this); here, only early predictions get several: later layers can still decide.
    If an image has more targets than centers, each center has a match instead.
    outputs: (B, L, K, ...): L predictions, before the first layer and after each.  targets: as in ClusterFormer.loss.
    Returns image, layer, center and target of the m matches, and the number of matches that the target has
    in this layer, int64 (m,) each.  Targets are counted through the batch.
    """
    L, K = outputs["logits"].shape[1:3]
    flat = {key: value.flatten(1, 2) for key, value in outputs.items()}  # (B, L K, ...)
    costs = [matching_cost({key: flat[key][i] for key in flat}, one) for i, one in enumerate(targets)]
    # One copy to the CPU: each copy would wait for the GPU.  If a cost is not finite, any match will do.
    costs = torch.cat(costs).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).cpu().double().numpy().reshape(-1, L, K)
    matches, first = [], 0
    for i, target in enumerate(targets):
        n = len(target["labels"])
        most = K // (2 * max(1, n))  # half of the centers should still learn "no object"
        for layer in range(L):
            times = max(1, min(MATCHES[layer], most)) if layer < min(len(MATCHES), L - 1) else 1
            rows, centers = hungarian(np.tile(costs[first : first + n, layer], (times, 1)))
            found = i, layer, centers, first + rows % max(1, n), times  # row n is target 0 again
            matches.append(np.stack(np.broadcast_arrays(*found)))  # five rows, a column per match
        first += n
    table = torch.from_numpy(np.concatenate(matches, 1))
    return table.to(outputs["logits"].device, non_blocking=True).unbind()


def mask_losses(logits, masks, target, weight):
    """Cross-entropy and dice loss of matched masks at sampled points, two weighted sums over matches.

    logits: (m, h, w).  masks: of all targets, bool (n, H, W).  target: the target of each match, (m,).
    """
    points = uncertain_points(logits.detach())  # (m, P, 2)
    # The nearest pixel of the truth: bilinear samples would need a float copy of it for each match.
    x, y = (points[..., 0] * masks.shape[2]).long(), (points[..., 1] * masks.shape[1]).long()
    logits, truth = sample_points(logits, points), masks[target[:, None], y, x].float()  # (m, P)
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1)
    probability = logits.sigmoid()
    shared, total = (probability * truth).sum(1), probability.sum(1) + truth.sum(1)
    dice = 1 - (2 * shared + 1) / (total + 1)  # + 1: a small mask may contain no point
    return entropy @ weight, dice @ weight


def pixel_loss(pixels, masks, labels, image, stride):
    """Cross-entropy of the classes of pixels, a sum over targets of the mean over the pixels of each.

    A mask teaches the pixels little until its center has found an object; this loss does so from the first step.
    It is the auxiliary loss of MaX-DeepLab (2021), but for the mean: small targets count as much as large ones.
    pixels: logits (B, h, w, classes).  masks: of all targets, bool (n, H, W).  labels, image: of each, (n,).
    """
    weights = F.avg_pool2d(masks[:, None].float(), stride)[:, 0]  # (n, h, w)
    costs = -pixels.float().log_softmax(-1)[image, :, :, labels]  # (n, h, w)
    return ((costs * weights).sum((1, 2)) / weights.sum((1, 2)).clamp(min=1e-6)).sum()


def set_losses(output, targets, stride):
    """All losses of a dense task, weighted sums over all layers: label over centers, the others over targets.

    output, targets: as in ClusterFormer.loss.  stride: image pixels per mask pixel.
    Returns a dictionary of scalars: label, l1 and giou; mask and dice if there are masks; pixel, once, in training.
    """
    if "masks" in output:  # masks of another size would be misaligned
        size = tuple(stride * side for side in output["masks"].shape[2:])
        for target in targets:
            if (got := tuple(target["masks"].shape))[1:] != size:
                raise ValueError(f"masks must be (n, {size[0]}, {size[1]}), as the images, got {got}")
    layers = [*output["aux"], output]
    keys = [key for key in ("logits", "boxes", "masks") if key in output]
    outputs = {key: torch.stack([one[key] for one in layers], 1) for key in keys}  # (B, L, K, ...)
    truth = {key: torch.cat([one[key] for one in targets]) for key in ("labels", *keys[1:])}  # (n, ...), of all targets
    image, layer, center, target, times = match(outputs, targets)
    weight = 1 / times
    logits = outputs["logits"].float()
    classes = torch.full(logits.shape[:3], logits.shape[3] - 1, device=logits.device)
    weights = torch.full(logits.shape[:3], NO_OBJECT_WEIGHT, device=logits.device)
    classes[image, layer, center], weights[image, layer, center] = truth["labels"][target], weight
    entropy = F.cross_entropy(logits.flatten(0, 2), classes.flatten(), reduction="none") @ weights.flatten()
    boxes, wanted = outputs["boxes"][image, layer, center].float(), truth["boxes"][target]
    _, giou = iou_and_giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(wanted))
    losses = dict(label=entropy, l1=(boxes - wanted).abs().sum(1) @ weight, giou=(1 - giou) @ weight)
    if "masks" in outputs:
        masks = outputs["masks"][image, layer, center].float()
        losses["mask"], losses["dice"] = mask_losses(masks, truth["masks"], target, weight)
    if "pixels" in output:
        owner = torch.cat([torch.full_like(one["labels"], i) for i, one in enumerate(targets)])  # image of each target
        losses["pixel"] = pixel_loss(output["pixels"], truth["masks"], truth["labels"], owner, stride)
    return {name: LOSS_WEIGHTS[name] * value for name, value in losses.items()}


# --------------------------------------------------------------------------------------------------
# 10. The heads of the dense tasks, and their final predictions
# --------------------------------------------------------------------------------------------------
def top_detections(probability, boxes):
    """The best (center, class) pairs, at most 100 (Deformable DETR, 2021), without duplicates.

    A duplicate has an IoU above 0.6 with a better pair of its class, even with one that is itself a
    duplicate (Fast NMS of YOLACT, 2019).
    probability: (K, classes).  boxes: (K, 4) xyxy.  Returns scores, labels and centers, (n,) each.
    """
    scores, pairs = probability.flatten().topk(min(100, probability.numel()))
    centers, labels = pairs // probability.shape[1], pairs % probability.shape[1]
    iou, _ = iou_and_giou(boxes[centers][:, None], boxes[centers])  # (n, n)
    keep = ~((iou > 0.6) & (labels[:, None] == labels)).triu(1).any(0)  # above the diagonal, rows are better
    return scores[keep], labels[keep], centers[keep]


class DenseHead(nn.Module):
    """What detection and segmentation share.  A task adds final_prediction, for one image:

    probability: (K, classes).  boxes: (K, 4) xyxy in pixels.  masks(centers) returns probabilities (n, H, W).
    """

    with_masks = True

    def __init__(self, backbone, size, num_classes, iterations, label_smoothing, things):
        super().__init__()
        self.finest = 0 if self.with_masks else 1  # only masks need the map at stride 4
        self.stride = backbone.strides[0]  # of masks
        self.neck = Neck(backbone.channels[self.finest :], size["dim"])
        self.decoder = Decoder(size["dim"], size["levels"], num_classes, iterations, self.with_masks)
        self.things = [True] * num_classes if things is None else things

    def forward(self, maps):
        """maps: of the backbone, four (B, H, W, C).  Returns predictions."""
        *earlier, output = self.decoder(self.neck(maps[self.finest :]))
        output["aux"] = earlier
        return output

    def loss(self, output, targets):
        return set_losses(output, targets, self.stride)

    def predict(self, output, side, image_size, sizes):
        """One dictionary per image.

        output: for images (H, W) that were padded to squares of `side` pixels.  sizes: the final (H, W) of each.
        """
        sides = side / torch.tensor(image_size[::-1] * 2, device=output["boxes"].device)  # W, H, W, H
        predictions = []
        for i, size in enumerate(sizes):
            probability = output["logits"][i].float().softmax(-1)[:, :-1]  # (K, classes)
            boxes = cxcywh_to_xyxy(output["boxes"][i].float() * sides).clamp(0, 1)
            boxes = boxes * torch.tensor(size[::-1] * 2, device=boxes.device)
            masks = None
            if self.with_masks:
                logits = F.interpolate(output["masks"][i : i + 1].float(), scale_factor=self.stride, mode="bilinear")
                logits = logits[:, :, : image_size[0], : image_size[1]]  # without the padding
                masks = lambda centers: F.interpolate(logits[:, centers], size, mode="bilinear")[0].sigmoid()
            predictions.append(self.final_prediction(probability, boxes, masks))
        return predictions


class DetectionHead(DenseHead):
    """det: boxes."""

    with_masks = False

    def final_prediction(self, probability, boxes, masks):
        scores, labels, centers = top_detections(probability, boxes)
        return {"scores": scores, "labels": labels, "boxes": boxes[centers]}


class InstanceHead(DenseHead):
    """inst: boxes and masks.  A score is class probability times mean mask probability (Mask2Former)."""

    def final_prediction(self, probability, boxes, masks):
        scores, labels, centers = top_detections(probability, boxes)
        inside, quality = [], []
        for mask in map(masks, centers.split(1)):  # one by one: those of a large photograph take gigabytes
            inside.append(mask > 0.5)  # (1, H, W)
            quality.append((mask * inside[-1]).sum() / inside[-1].sum().clamp(min=1))
        scores, order = (scores * torch.stack(quality)).sort(descending=True)
        boxes, masks = boxes[centers[order]], torch.cat([inside[i] for i in order.tolist()])
        return {"scores": scores, "labels": labels[order], "boxes": boxes, "masks": masks}


class SemanticHead(DenseHead):
    """sem: the class of each pixel, by the largest sum of class probability times mask (MaskFormer, 2021)."""

    def final_prediction(self, probability, boxes, masks):
        return {"semantic": torch.einsum("kc,khw->chw", probability, masks(slice(None))).argmax(0)}


class PanopticHead(DenseHead):
    """pan: the segment of each pixel, one per center for things, one per class for stuff (MaskFormer).

    A pixel goes to the center whose class probability times mask is largest, if that mask is above 0.5
    there.  A center that wins less than 0.6 of its mask is a duplicate, and gets no segment.
    """

    def final_prediction(self, probability, boxes, masks):
        scores, labels = probability.max(1)
        confident = scores > 0.25  # Mask DINO's
        scores, labels, masks = scores[confident], labels[confident], masks(slice(None))[confident]
        ids, segments = torch.zeros(masks.shape[1:], dtype=torch.int64, device=masks.device), []
        winner = (scores[:, None, None] * masks).argmax(0) if len(scores) else ids  # (H, W)
        for k, (score, label) in enumerate(zip(scores.tolist(), labels.tolist())):
            inside = masks[k] > 0.5
            won = inside & (winner == k)
            if won.sum() < max(1, 0.6 * inside.sum()):
                continue
            segment = next((one for one in segments if one["label"] == label and not one["isthing"]), None)
            if segment is None:
                segment = dict(id=len(segments) + 1, label=label, isthing=self.things[label], score=0.0)
                segments.append(segment)
            segment["score"] = max(segment["score"], score)
            ids[won] = segment["id"]
        return {"panoptic": ids, "segments": segments}


# --------------------------------------------------------------------------------------------------
# 11. The model, and its trace
# --------------------------------------------------------------------------------------------------
TASKS = dict(cls=ClassificationHead, det=DetectionHead, inst=InstanceHead, sem=SemanticHead, pan=PanopticHead)


class ClusterFormer(nn.Module):
    """Backbone and head.  model(images) is for training; model.predict(images) is for results."""

    def __init__(
        self,
        task="cls",  # a key of TASKS
        variant="tiny",  # a key of VARIANTS
        num_classes=1000,
        patch_size=4,  # pixels per side of a token in stage 1: 4, or 2 for images of about 32 pixels
        iterations=3,  # T, 3 in the paper (recalled); time and memory of clustering grow with it
        drop_path=0.0,  # stochastic depth: rate of the last block, rising from 0 in the first
        label_smoothing=0.0,  # cls: probability that is spread over all classes
        things=None,  # pan: a bool per class, True: countable; None: all are
    ):
        super().__init__()
        if task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
        if num_classes < 1 or iterations < 1:
            raise ValueError(f"num_classes and iterations must be at least 1, got {num_classes}, {iterations}")
        if patch_size not in (2, 4):
            raise ValueError(f"patch_size must be 2 or 4, got {patch_size}")
        if things is not None and len(things) != num_classes:
            raise ValueError(f"things must have one entry for each of {num_classes} classes, got {len(things)}")
        things = None if things is None else [bool(thing) for thing in things]
        self.task, self.num_classes = task, num_classes
        # All that a checkpoint needs to build this model again.
        self.arguments = dict(task=task, variant=variant, num_classes=num_classes, patch_size=patch_size, things=things)
        self.arguments |= dict(iterations=iterations, drop_path=drop_path, label_smoothing=label_smoothing)
        size = VARIANTS[variant]
        self.backbone = Backbone(size["depths"], size["channels"], patch_size, iterations, drop_path)
        self.head = TASKS[task](self.backbone, size, num_classes, iterations, label_smoothing, things)

    def forward(self, images):
        """images: float RGB in [0, 1], (B, 3, H, W); H, W multiples of 32 (of 16 with patch_size 2).

        Returns for cls {"logits": (B, classes)}, and for the dense tasks
            "logits"  (B, K, classes + 1)  the last class is "no object"; K = 100, or less on maps below 10 x 10 tokens
            "boxes"   (B, K, 4)            cxcywh as fractions of the image
            "masks"   (B, K, H/4, W/4)     inst, sem, pan: logits (H/2, W/2 with patch_size 2)
            "aux"     a list of the same for the earlier layers, first to last
            "pixels"  (B, H/4, W/4, classes)  in training, if there are masks
        Raises ValueError for a wrong shape or dtype.  Values are not checked: each time, this would wait for the GPU.
        """
        return self.head(self.backbone.features(images))

    def loss(self, output, targets):
        """Losses of a batch: a dictionary of scalars, sums over its images (cls) or targets.

        Divide them by count(targets), summed over all processes; a mean of means would give the targets
        of crowded batches less weight.  Call it outside of autocast, which would round the costs of matches.
        output: from forward.  targets, on the same device:
            cls          (B,) int64 classes, or (B, classes) float probabilities (as from mixup)
            dense tasks  a list of a dictionary per image, with n >= 0 targets:
                "labels"  (n,) int64
                "boxes"   (n, 4) float32, cxcywh as fractions of the image
                "masks"   (n, H, W) bool, in the size of the images; not for det.  inst: of objects;
                          sem: of each class that occurs, or of its regions; pan: of each thing, and
                          of each class of stuff.  An unlabeled pixel is in no mask.
        Raises ValueError for masks of another size.
        """
        return self.head.loss(output, targets)

    def count(self, targets):
        """Number of images (cls) or targets (dense tasks) that the losses of this batch sum over."""
        return len(targets) if self.task == "cls" else sum(len(target["labels"]) for target in targets)

    def pad(self, images):
        """Pad images (B, 3, H, W) of any size at the bottom and right with the mean color, as predict does.

        For cls, to multiples of the last stride; for the dense tasks to a square, as in training, so that
        the cells in which centers start are squares.
        """
        height, width = images.shape[2:]
        stride = self.backbone.strides[-1]
        bottom, right = (-(-side // stride) * stride for side in (height, width))
        if self.task != "cls":
            bottom = right = max(bottom, right)
        padded = self.backbone.mean.to(images).repeat(len(images), 1, bottom, right)
        padded[:, :, :height, :width] = images
        return padded

    @torch.no_grad()
    def predict(self, images, sizes=None):
        """Final predictions, in evaluation mode, for images of any sizes.

        Images are padded by pad(), and what is returned is cropped.  If all images have one size, they
        run as a batch, otherwise one after the other.
        images: float RGB in [0, 1], (B, 3, H, W), or a list of (3, H, W).
        sizes: a list of (H, W) in which boxes and maps are returned; None: those of the images.
        Raises ValueError for other images, a value outside of [0, 1], and the wrong number of sizes.
        Returns one dictionary per image:
            cls   "scores" (5,) float32, highest first, and "labels" (5,) int64; or fewer
            det   "scores" (n,), highest first, "labels" (n,), "boxes" (n, 4) xyxy in pixels; n <= 100
            inst  the same, and "masks" (n, H, W) bool
            sem   "semantic" (H, W) int64, the class of each pixel
            pan   "panoptic" (H, W) int64, the segment of each pixel, 0 for none, and "segments", a
                  list of {"id": int, "label": int, "isthing": bool, "score": float}
        """
        images = list(images)
        if not images:
            raise ValueError("images must hold at least one image")
        for image in images:
            check_image(image)
        sizes = [tuple(size) for size in ([image.shape[1:] for image in images] if sizes is None else sizes)]
        if len(sizes) != len(images):
            raise ValueError(f"sizes must be one for each of {len(images)} images, got {len(sizes)}")
        stacked = len({image.shape for image in images}) == 1
        batches = [torch.stack(images)] if stacked else [image[None] for image in images]
        training, predictions = self.training, []
        self.eval()
        try:
            for batch in batches:
                padded = self.pad(batch)
                output = self(padded)
                rest = sizes[len(predictions) :][: len(batch)]
                with torch.autocast(batch.device.type, enabled=False):  # bfloat16 would tie two classes
                    predictions += self.head.predict(output, padded.shape[3], tuple(batch.shape[2:]), rest)
        finally:
            self.train(training)
        return predictions


@torch.no_grad()
def trace(model, images):
    """Record every clustering in a model: a ClusterFormer, a Backbone, or what contains them.

    It runs in evaluation mode, without gradients.  images: as for the model's forward.
    Returns a list of dictionaries, one per clustering, in the order of the modules, which is that of the data:
        "name"         of the module, such as "backbone.stages.1.0.cluster"
        "size"         (H, W) of its N tokens
        "centers"      C(0) .. C(T), each (B, K, D)
        "assignments"  M(0) .. M(T), each (B, h, K, N)
        "tokens"       (B, N, D), and "values" v(I), (B, h, N, d)
        "weights"      of the values in the mean of each iteration, T of (B, h, K, N); they sum to 1 over N
    """
    found = {name: x for name, x in model.named_modules() if isinstance(x, RecurrentCrossAttentionClustering)}
    for name, module in found.items():
        module.history = dict(name=name)
    training = model.training
    model.eval()
    try:
        model(images)
        return [module.history for module in found.values()]
    finally:
        model.train(training)
        for module in found.values():
            module.history = None
