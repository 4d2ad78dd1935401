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

THE PAPER, as we read it: its abstract, and its Figure 2, which is in the README of the authors' release
and names Eq. 3 and Eq. 6.  "Recalled" is known from other places.  The full text may say more.

    initial centers   C(0)   = FFN( AdaptivePooling_K(I) )                                  recalled
    E-step            M(t)   = softmax_K( Q(C(t)) K(I)^T )           t = 0 .. T    Eq. 3, Figure 2b
    M-step            C(t+1) = M(t) V(I)                             t < T         Eq. 3, Figure 2b
    dispatching       p_i'   = p_i + MLP( 1/K sum_k sim(C_k(T), p_i) C_k(T) )      Eq. 6, Figure 2c

K in softmax_K and 1/K is the number of centers; K( ) is the projection of the keys; sim is a similarity
of center and token.  Recalled, too: 100 centers in every stage, T = 3, and heads of 32 channels.

THIS FILE, with q, k and v for the projections:

    initial centers   C(0)   = pool(I) + FFN(pool(I))
    E-step            M(t)   = softmax_K( S(t) ),  S(t) = scale * cos( q(C(t)), k(I) )     t = 0 .. T
    M-step            C(t+1) = C(t) + softmax_N( S(t) + log M(t) ) v(I)                        t < T
    dispatching       p_i'   = p_i + sum_k M_ki(T) MLP(C_k(T))

Where it differs from the paper, and why.  (.github/EXPERIMENTS.md has the figures.  At equal time the
same blocks without clusters are ahead on small images, and T = 3 is not shown to beat T = 1.)

    C(0)     FFN is added to the pooled mean, and starts at zero: at first, centers are the means of cells
    K        at most 5 x 5 in the backbone: as good as 100, in less time; 100 in the decoder
    S        a cosine with a learned scale per head.  A plain dot product ends in a hard assignment; with
             1/sqrt(d), it starts so even that all means are nearly equal
    q, k, v  d x d in each head.  v starts as the identity, and in stage 1 q and k, too: there, clusters
             follow what looks alike.  In deeper stages a random start of q and k learns better
    M-step   a mean, where a sum would grow with N; with weights M exp(S), see section 2; added to C, as in
             kMaX-DeepLab (2022), so that a center of the decoder stays with its object
    p_i'     sim = K M_ki, already computed; the MLP inside of the sum runs K times, not N times
    block    a depthwise 3 x 3 convolution first, since clusters ignore where tokens are; an MLP on tokens last
    stem     4 x 4 / 2 and 2 x 2 / 2 convolutions, and a linear map of the coordinates: see Backbone

A block costs N D (2 d + (2 T + 2) K + 9 + 4 D) + 6 K D^2 multiply-adds: keys and values, E- and M-steps
with dispatching, convolution, MLP on tokens; MLPs on centers.  In stage 1 of Tiny that is 64 + 200 + 9 +
384 + 5 per number of the map.  The release is another method: centers attend by a softmax over N, then
each token goes to its most similar center alone.  It has no MLP on centers, and no dense tasks.

LETTERS, in equations and in the shapes at the ends of lines:

    B     images in a batch              I     tokens of a map, p_i one of them
    H, W  height and width in tokens     C(t)  centers after t iterations, C_k one of them
    N     tokens of a map, H * W         M     assignment: M_ki, of token i to cluster k; sums to 1
    K     centers                              over k
    D     channels                       S     similarity of centers and tokens, shaped like M
    h, d  heads; channels of a head      T     EM iterations

"Paper" marks what follows the paper as we read it, a name and a year what is from that work, "Ours" what
is this project's.  In the order of the data: clustering (1 to 3), backbone (4, 5), classification (6),
detection and segmentation (7 to 11), the model and its trace (12).
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# depths and channels: of the four stages.  Those of tiny and small are Swin-T's and Swin-S's (Paper);
# nano is ours, for CPUs and small images.
# dim: width of neck and decoder.
# levels: the map that each decoder layer clusters, 1, 2 or 3 for strides 8, 16 or 32.
# drop_path: for train.py, which sets it at full scale; not read here.
TINY = dict(depths=(2, 2, 6, 2), channels=(96, 192, 384, 768), dim=256, levels=(3, 2, 1, 3, 2, 1), drop_path=0.2)
VARIANTS = {
    "nano": dict(depths=(1, 2, 2, 1), channels=(32, 64, 128, 256), dim=128, levels=(1, 1, 1), drop_path=0.0),
    "tiny": TINY,
    "small": TINY | dict(depths=(2, 2, 18, 2), drop_path=0.3),
}
VERSION = 7  # of saved weights, for train.py: raised when older ones would not fit, or would mean another thing
HEAD_DIM = 32  # channels of a head (Paper, recalled)
GRID = 5  # centers start from a grid of at most 5 x 5 cells: K = 25
OBJECT_GRID = 10  # and those of the decoder from 10 x 10 cells: K = 100 (Paper, recalled)
CENTER_RATIO = 1, 2  # hidden width of the MLPs on centers, in units of D: initial, dispatching
TOKEN_RATIO = 2  # of the MLP on tokens, which runs N times; Swin spends 4 here


# --------------------------------------------------------------------------------------------------
# 1. Initial centers: C(0) is pooled from the image; it is not a learned query
# --------------------------------------------------------------------------------------------------
def grid_shape(height, width, grid=GRID, min_cell=2):
    """Rows and columns of the grid that centers start from, on a map of height x width tokens.

    grid: cells per side, at most.  min_cell: side of a cell in tokens, at least.  It is 2 in the
    backbone, where a cluster of a single token would have nothing to aggregate, and 1 in the decoder.
    """
    return min(grid, -(-height // min_cell)), min(grid, -(-width // min_cell))


def pool_cells(x, grid=GRID, min_cell=2):
    """Mean of each grid cell: (B, H, W, D) -> (B, K, D).  Paper: AdaptivePooling_K."""
    shape = grid_shape(x.shape[1], x.shape[2], grid, min_cell)
    return F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), shape).flatten(2).mT  # (B, K, D)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm in the dtype of its input.

    Under autocast, nn.LayerNorm returns float32, at twice the memory and time.  Torch computes mean and
    variance in float32 in any case.
    """

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def in_full_precision(module, x):
    """module(x) in the dtype of its weights, also under autocast: for MLPs of centers and for classifiers.

    Centers are so few that casting the weights would take longer than the products.  Classifiers in
    bfloat16 would often give two classes the same logit.
    """
    with torch.autocast(x.device.type, enabled=False):
        return module(x.to(next(module.parameters()).dtype))


def prenorm_mlp(dim, ratio):
    """A residual branch: norm, D -> ratio * D -> D.

    Ours: the last layer is zero-initialized.  A residual branch thus adds nothing at first, and
    grows with training.
    """
    layers = [LayerNorm(dim), nn.Linear(dim, ratio * dim), nn.GELU(), nn.Linear(ratio * dim, dim)]
    nn.init.zeros_(layers[-1].weight)
    nn.init.zeros_(layers[-1].bias)
    return nn.Sequential(*layers)


class InitialCenters(nn.Module):
    """Where centers start, in the backbone, in the classification head and in the decoder.

        C(0) = pool(I) + FFN(pool(I))

    Paper (recalled): FFN(pool(I)).  Ours: the FFN is a residual branch, and starts at zero.
    """

    def __init__(self, dim, grid=GRID, min_cell=2, ffn=True):
        super().__init__()
        self.grid, self.min_cell = grid, min_cell  # see grid_shape
        self.ffn = prenorm_mlp(dim, CENTER_RATIO[0]) if ffn else None

    def forward(self, x):
        """x: map (B, H, W, D).  Returns C(0), (B, K, D)."""
        centers = pool_cells(x, self.grid, self.min_cell)
        return centers if self.ffn is None else centers + in_full_precision(self.ffn, centers)


# --------------------------------------------------------------------------------------------------
# 2. Recurrent cross-attention clustering: E-step and M-step
# --------------------------------------------------------------------------------------------------
# Limit of the scale of S.  bfloat16 rounds an S of 20 to eighths, so exp(S) is off by up to 6 % there.
MAX_SCALE = 20.0


# In clustering and dispatching, heads come before images: then the weights of a head multiply all images
# in one product.
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

        E-step    M(t)   = softmax_K( S(t) ),   S(t) = scale * cos( q(C(t)), k(I) )
        M-step    C(t+1) = C(t) + softmax_N( S(t) + log M(t) ) v(I)

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

    Paper (Eq. 3, Figure 2b): softmax over K, so every token is divided among the clusters.
    (Ordinary attention takes it over N: every center chooses its tokens, and some tokens may be
    chosen by none.)  All iterations share q, k and v, and keys and values are computed once: it is
    a recurrence, not a stack of T layers.

    Ours: softmax_N( S + log M ) = M exp(S) / sum_N M exp(S).  A token weighs much in a mean if it matches
    the center (S), and matches no other center as well (M).  With weights M alone, a token that matches
    no center would be divided among all of them, and would blur their means, whatever the scale.  A bias
    added to S counts twice, in S and in M.

    C(T) is C(0) plus T means, so its norm grows with T.  This is harmless, since the cosine ignores
    the norm, and everything that reads C(T) normalizes it first.

    Cost: S has N * K numbers per head.  An iteration writes four tensors of this size (S, log M, their
    sum and the weights; five with a bias).  Training keeps log M and the weights: the gradient of a
    softmax needs its result.
    """

    def __init__(self, dim, num_heads, iterations=3, scale=10.0, alike=False):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}")
        self.num_heads, self.iterations = num_heads, iterations
        d = dim // num_heads
        identity = lambda: torch.eye(d).repeat(num_heads, 1, 1)  # (h, d, d)
        # alike: S is the cosine of center and token itself, so tokens go to centers that look like them.
        start = identity if alike else lambda: torch.randn(num_heads, d, d) * d**-0.5
        self.q, self.k, self.v = nn.Parameter(start()), nn.Parameter(start()), nn.Parameter(identity())
        # With scale 10, a query that equals a key gets e^10 times what an orthogonal one gets.
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
        bias: added to S, broadcast to (h, B, K, N): the log of a prior; finite.
        Returns C(T), (B, K, D), and M(T), (B, h, K, H, W), or (B, h, K, N).
        """
        B, h, device = tokens.shape[0], self.num_heads, tokens.device.type
        d = tokens.shape[-1] // h
        # All is computed in the dtype of autocast, if it is on.  Left to itself, softmax would return
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
        C = join_heads(C, h).to(centers.dtype)  # in the decoder, centers are float32
        return C, images_first(M, h).unflatten(-1, tokens.shape[1:-1])

    def record(self, centers, tokens, values, steps, M):
        """Fill the history with what trace() returns."""
        later, assignments, weights = zip(*steps)
        by_image = lambda maps: [images_first(x, self.num_heads) for x in maps]
        self.history |= dict(size=tokens.shape[1:-1], tokens=tokens.flatten(1, -2), values=by_image([values])[0])
        self.history |= dict(centers=[centers, *later], assignments=by_image([*assignments, M]))
        self.history |= dict(weights=by_image(weights))


# --------------------------------------------------------------------------------------------------
# 3. Feature dispatching: what the clusters have collected returns to the tokens
# --------------------------------------------------------------------------------------------------
class FeatureDispatching(nn.Module):
    """What each token receives from its clusters.

        Paper (Eq. 6, Figure 2c)   MLP( 1/K sum_k sim(C_k(T), p_i) C_k(T) )
        Ours                       sum_k M_ki(T) MLP(C_k(T))

    Ours has sim(C_k, p_i) = K M_ki, so that 1/K cancels.  The MLP decides what a cluster tells its tokens.
    Each head uses its own M.  The classification head and the decoder have no dispatching: there, centers
    are the result.
    """

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.mlp = prenorm_mlp(dim, CENTER_RATIO[1])

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

    The convolution relates neighbors, and prepares the tokens that are clustered.  It starts at random (in
    the last stage at zero, see Backbone), and is never dropped.  The other branches start at zero, so an
    untrained block is x + DepthwiseConv(x).
    """

    def __init__(self, dim, num_heads, iterations=3, drop_path=0.0, alike=False):
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm = LayerNorm(dim)
        self.initial = InitialCenters(dim)
        self.cluster = RecurrentCrossAttentionClustering(dim, num_heads, iterations, alike=alike)
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

    One image in Tiny; every block starts its own K centers, and forgets them:

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
        # Strided convolutions read whole patches, or a pixel more on each side, so a token sees what it
        # stands for.  Padded 3 x 3 / 2 convolutions would shift that by half a token at stride 32.
        half = patch_size // 2
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels[0] // 2, half + 2, stride=half, padding=1),
            nn.GELU(),
            nn.Conv2d(channels[0] // 2, channels[0], 2, stride=2),
        )
        # Ours: three quarters of the first filters are zero-centered and scaled by 5, to respond to
        # contrast from the start; random filters mostly respond to brightness.
        edges = self.stem[0].weight.data[channels[0] // 8 :]  # a view: (3/4 of the filters, 3, k, k)
        edges.sub_(edges.mean((2, 3), keepdim=True)).mul_(5)
        self.coordinates = nn.Linear(2, channels[0], bias=False)
        self.embed_norm = LayerNorm(channels[0])
        rates = torch.linspace(0, drop_path, sum(depths)).tolist()  # deeper blocks are dropped more
        self.stages = nn.ModuleList()
        self.downsample_norms, self.downsamples = nn.ModuleList(), nn.ModuleList()
        for i, (depth, dim) in enumerate(zip(depths, channels)):
            if i > 0:
                self.downsample_norms.append(LayerNorm(channels[i - 1]))
                self.downsamples.append(nn.Conv2d(channels[i - 1], dim, 2, stride=2))
            heads = max(1, dim // HEAD_DIM)
            # alike in stage 1 only: there, tokens are colors and edges, and similar ones belong together.
            blocks = [ClusterBlock(dim, heads, iterations, rates.pop(0), alike=i == 0) for _ in range(depth)]
            self.stages.append(nn.ModuleList(blocks))
        # The last map is so small that a random 3 x 3 convolution would mix much of the image into each
        # token.  From zero, a token first speaks for its own place, and explanations can be read there.
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
        Raises ValueError if the images have another form.
        """
        return [x.permute(0, 3, 1, 2) for x in self.features(images)]


# --------------------------------------------------------------------------------------------------
# 6. Classification
# --------------------------------------------------------------------------------------------------
class ClassificationHead(nn.Module):
    """Cluster the last map once more, and average what the centers say.

        logits = bias + weight mean_k norm(C_k)

    Ours: what we read of the paper does not describe this head.  Everything after the norm is
    linear, so a logit is exactly a bias plus one contribution per center.  Each contribution is also a
    constant plus a sum over tokens of the last map, if the weights of the means (see trace) and the norm's
    divisor are held constant.  eval.py draws this sum.  An FFN on C(0) would break it: there is none here.
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
        entropy = F.cross_entropy(
            output["logits"].float(), targets, label_smoothing=self.label_smoothing, reduction="sum"
        )
        return {"label": entropy}

    def count(self, targets):
        """Number of images."""
        return len(targets)

    def predict(self, output, image_size, sizes):
        """The five likeliest classes per image."""
        probability = output["logits"].float().softmax(-1)
        scores, labels = probability.topk(min(5, probability.shape[1]))
        return [{"scores": s, "labels": l} for s, l in zip(scores, labels)]


# --------------------------------------------------------------------------------------------------
# 7. Detection and segmentation: neck, boxes, and priors.  From here on, a cluster is an object
#
# Paper (abstract): the same clustering solves these tasks, too.  Paper (recalled): their decoder has
# six layers of recurrent cross-attention with 100 centers.  What we read says no more.  All else in
# sections 7 to 11 is taken from the work that is named beside it; numbers without a name are ours.
# Who wants to learn the clustering can stop after section 8.  "Previous" boxes and masks are those that a
# center predicted one layer before.
# --------------------------------------------------------------------------------------------------
class Neck(nn.Module):
    """Bring all maps to the same width D, and add what coarser maps see.  FPN (Lin et al., 2017).

        x_s   = lateral(norm(I_s)) + upsampled top_down(norm(out_2s))     s: stride, coarse to fine
        out_s = x_s + DepthwiseConv(x_s)

    Ours: the depthwise convolution; and a top-down path that is zero-initialized, because coarse
    features become useful late, and would only add noise before that.
    """

    def __init__(self, channels, dim):
        super().__init__()
        linear = lambda c: nn.Sequential(LayerNorm(c), nn.Linear(c, dim))
        self.laterals = nn.ModuleList(linear(c) for c in channels)
        self.top_down = nn.ModuleList(linear(dim) for _ in channels[1:])
        for _, last in self.top_down:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        self.depthwise = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1, groups=dim) for _ in channels)

    def forward(self, maps):
        """maps: (B, H, W, C), fine to coarse.  Returns as many (B, H, W, D)."""
        outputs = []
        for i in reversed(range(len(maps))):
            x = self.laterals[i](maps[i])
            if outputs:
                x = x + self.top_down[i](outputs[-1]).repeat_interleave(2, 1).repeat_interleave(2, 2)
            outputs.append(x + self.depthwise[i](x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return outputs[::-1]


def cell_boxes(height, width, device):
    """Boxes of the grid cells that centers start from, (K, 4) cxcywh as fractions of the image.  Ours."""
    middles, sides = [], []
    for tokens, cells in zip((height, width), grid_shape(height, width, OBJECT_GRID, min_cell=1)):
        cell = torch.arange(cells, device=device)
        start = cell * tokens // cells  # as in adaptive pooling: neighboring cells may share a token
        end = ((cell + 1) * tokens + cells - 1) // cells
        middles.append((start + end) / (2 * tokens))
        sides.append((end - start) / tokens)
    y, x = torch.meshgrid(*middles, indexing="ij")  # (kh, kw)
    h, w = torch.meshgrid(*sides, indexing="ij")
    return torch.stack([x, y, w, h], -1).flatten(0, 1)


def cxcywh_to_xyxy(boxes):
    """(..., 4) center x, center y, width, height -> left, top, right, bottom."""
    center, sides = boxes[..., :2], boxes[..., 2:]
    return torch.cat([center - sides / 2, center + sides / 2], -1)


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


def pairwise_iou(boxes):
    """IoU of all pairs of an image's boxes, (B, K, 4) cxcywh -> (B, K, K), 0 on the diagonal."""
    boxes = cxcywh_to_xyxy(boxes)
    iou, _ = iou_and_giou(boxes[:, :, None], boxes[:, None])
    return iou * (1 - torch.eye(iou.shape[1], device=iou.device))


# How the previous box and mask of a center are used:
#
#      12 x 12 mask samples          QUADRANTS.  The center clusters tokens near its box: head 0 around a,
#     . . . . . . . . . . . .        head 1 around b, head 2 around c, head 3 around d, each with a
#     . +-----------------+ .        Gaussian whose sigma is a quarter of the quadrant's side.
#     . |        |        | .
#     . |   a    |    b   | .        SQUARED DISTANCE from the box, in units of half its sides: 0 in the
#     . |        |        | .        middle x, 1 in the middle of each side, 2 in the corners.
#     . |--------x--------| .
#     . |        |        | .        MASK SAMPLES.  The classifier also sees 12 x 12 samples of the mask,
#     . |   c    |    d   | .        which reach a tenth of a side beyond the box: a silhouette, at the
#     . |        |        | .        same scale for small and large objects.
#     . +-----------------+ .
#     . . . . . . . . . . . .
def box_distance(boxes, height, width):
    """Squared distance of tokens from the middles of boxes, in units of half a side.  Ours.

    boxes: (B, K, 4) cxcywh as fractions of the image.  Returns (B, K, height, width).
    """
    middle_x, middle_y, w, h = boxes.float().unsqueeze(-1).unbind(2)  # (B, K, 1) each
    x, y = token_positions(width, boxes.device), token_positions(height, boxes.device)
    # A side counts as at least 1 % of the image: near 0, distances would explode.
    horizontal = ((x - middle_x) / (w.clamp(min=0.01) / 2)) ** 2  # (B, K, width)
    vertical = ((y - middle_y) / (h.clamp(min=0.01) / 2)) ** 2  # (B, K, height)
    return vertical[..., None] + horizontal[:, :, None]


# Offsets (x, y) of the middles of a, b, c, d from the middle of the box, in its sides.
QUADRANTS = (-0.25, -0.25), (0.25, -0.25), (-0.25, 0.25), (0.25, 0.25)


def box_prior(boxes, height, width):
    """Log prior of where a center's tokens are: in head j, a Gaussian over quadrant j of its box.

    After SMCA (Gao et al., 2021), which adds a Gaussian around a predicted point to the attention
    logits.  Ours: a quadrant per head.  The mean over a whole object says what the object consists
    of, but not how it is arranged.  With quadrants, a corner at the top left and a corner at the
    bottom right are different features.
    boxes: (B, K, 4) cxcywh as fractions of the image.  height, width: of the map in tokens.
    Returns (4, B, K, N).
    """
    x, y, w, h = boxes.unbind(-1)  # (B, K) each
    # A quadrant is at least one token wide.  A narrower one could lie between the tokens, and the
    # limit of -20 below would make all tokens equally likely.
    w_quadrant, h_quadrant = (w / 2).clamp(min=1 / width), (h / 2).clamp(min=1 / height)
    prior = []
    for right, down in QUADRANTS:
        quadrant = torch.stack([x + right * w, y + down * h, w_quadrant, h_quadrant], -1)
        distance = box_distance(quadrant, height, width)  # (B, K, H, W)
        prior.append(-2 * distance.flatten(2))  # -2: sigma is side / 4
    # At least -20: for tokens far from all boxes, S decides, not which far box is a little nearer.
    return torch.stack(prior).clamp(min=-20)


def mask_prior(masks, factor):
    """Log prior from the previous masks: a soft form of Mask2Former's masked attention (2022).

    A box also holds what is around an object and in front of it; the mask of the object does not.
    masks: logits (B, K, H, W).  factor: a token covers factor x factor of their pixels.
    Returns (B, K, N), at least -10: a center with a wrong mask still sees its box.
    """
    return F.logsigmoid(F.avg_pool2d(masks.float(), factor)).clamp(min=-10).flatten(2)


# --------------------------------------------------------------------------------------------------
# 8. The decoder: centers find their objects, layer by layer
# --------------------------------------------------------------------------------------------------
class DecoderLayer(nn.Module):
    """Centers collect tokens from one map, then look at each other.

        C, M = cluster(norm(C), I)     Paper (recalled); the norm and the bias, log priors, are ours
        C    = C + attention(norm(C))  DETR (2020); the bias, the overlap of boxes, is ours
        C    = C + FFN(C)              DETR (2020)

    cluster returns norm(C) plus means: C is normalized once per layer, and cannot grow with depth.
    Two centers whose boxes overlap may have found the same object.  They must see each other to
    decide which of them keeps it, so overlap raises the attention between them.
    """

    def __init__(self, dim, iterations=3):
        super().__init__()
        self.norm, self.attention_norm = LayerNorm(dim), LayerNorm(dim)
        # A scale of 2, not 10: an object's center should also collect parts that look different.
        self.cluster = RecurrentCrossAttentionClustering(dim, len(QUADRANTS), iterations, scale=2.0)
        self.attention = nn.MultiheadAttention(dim, max(1, dim // 32), batch_first=True)
        # Learned.  At first 0 in the first head, and up to 8 in the last: there, equal boxes get e^8
        # times the attention of disjoint ones.
        self.overlap = nn.Parameter(torch.linspace(0, 8, self.attention.num_heads))
        self.ffn = prenorm_mlp(dim, 4)

    def forward(self, centers, boxes, tokens, masks=None):
        """centers: (B, K, D).  boxes: (B, K, 4), previous ones.  tokens: map (B, H, W, D).

        masks: mask_prior of the previous masks, (B, K, N), or None.  Returns centers (B, K, D).
        """
        bias = box_prior(boxes, *tokens.shape[1:3])  # (4, B, K, N)
        if masks is not None:
            bias = bias + masks
        centers, _ = self.cluster(self.norm(centers), tokens, bias)
        x = self.attention_norm(centers)
        bias = self.overlap[:, None, None] * pairwise_iou(boxes)[:, None]  # (B, heads, K, K)
        bias = bias.flatten(0, 1).to(x.dtype)  # (B heads, K, K)
        centers = centers + self.attention(x, x, x, attn_mask=bias, need_weights=False)[0]
        return centers + self.ffn(centers)


def class_probability(logits):
    """Softmax over the classes and "no object": (..., classes) -> (..., classes).  After DETR (2020).

    Ours: the logit of "no object" is 0.  DETR's successors use sigmoids and the focal loss.  With
    these, centers learn to predict "no object" long before they learn to discriminate classes.
    """
    return F.pad(logits.float(), (0, 1)).softmax(-1)[..., :-1]


def mlp(dim, out):
    """D -> D -> D -> out, without norm and residual."""
    return nn.Sequential(
        nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, out)
    )


class BoxHead(nn.Module):
    """The box of a center: its anchor (the previous box), moved, stretched and clipped to the image.

    Each layer refines the previous box, as in Deformable DETR (2021).  Ours: it does so in units of
    the anchor's sides.  The features of a center come from quadrants of its anchor.  So the same
    features ask for the same correction, wherever the object is and however large it is.
    """

    def __init__(self, dim):
        super().__init__()
        self.delta = mlp(dim, 4)
        nn.init.zeros_(self.delta[-1].weight)  # at first, a box is its anchor
        nn.init.zeros_(self.delta[-1].bias)

    def forward(self, centers, anchors):
        """centers: (B, K, D).  anchors: (B, K, 4), cxcywh as fractions.  Returns boxes (B, K, 4)."""
        move, stretch = self.delta(centers).float().chunk(2, -1)
        middle, sides = anchors[..., :2], anchors[..., 2:].clamp(min=0.01)
        # The limit, e^4 = 55, still takes a box of 2 % of the image to all of it.
        box = torch.cat([middle + sides * move, sides * stretch.clamp(max=4).exp()], -1)
        low, high = cxcywh_to_xyxy(box).clamp(0, 1).chunk(2, -1)
        return torch.cat([(low + high) / 2, high - low], -1)


class MaskHead(nn.Module):
    """A center's mask: pixels whose embedding E matches the center, and that are near its box.

        mask logits = MLP(C) . E - 2 falloff(C) min(distance, 8)

    distance is box_distance.  The dot product is Mask2Former's (2022).  Ours: the distance from the
    box.  A center predicts falloff > 0, how much the distance counts: much for one object among
    similar ones, little for the sky.
    Ours: in training, pixels also predict their own classes.  A mask teaches the pixels little until
    its center has found an object and its class; this loss teaches them from the first step.
    """

    def __init__(self, dim, num_classes):
        super().__init__()
        self.pixel_classifier = nn.Linear(dim, num_classes)
        self.mlp = prenorm_mlp(dim, TOKEN_RATIO)
        self.pixel = nn.Sequential(LayerNorm(dim), nn.Linear(dim, dim))
        self.center = mlp(dim, dim)
        self.falloff = nn.Linear(dim, 1)  # its log
        nn.init.zeros_(self.falloff.weight)
        nn.init.constant_(self.falloff.bias, math.log(0.25))  # -1 in a corner of the box

    def embed_pixels(self, x):
        """Embeddings E from the finest map of the neck, (B, H, W, D); all layers share them."""
        return self.pixel(x + self.mlp(x))

    def forward(self, centers, boxes, embeddings):
        """centers: (B, K, D).  boxes: (B, K, 4).  embeddings: (B, H, W, D).  Returns (B, K, H, W)."""
        falloff = self.falloff(centers).float().exp()[..., None]  # (B, K, 1, 1)
        # Far away, distance does not matter.
        distance = box_distance(boxes, *embeddings.shape[1:3]).clamp(max=8)  # (B, K, H, W)
        masks = torch.einsum("bkd,bhwd->bkhw", self.center(centers), embeddings)
        return masks - (2 * falloff * distance).to(masks.dtype)


MASK_SAMPLES = 12  # per side: fine enough for a silhouette, and 144 inputs of the classifier


def mask_samples(masks, boxes):
    """Sample masks on a regular grid over their boxes, as RoIAlign (2017) samples features.  Ours.

    masks: logits (B, K, H, W).  boxes: (B, K, 4) cxcywh as fractions of the image.
    Returns (B, K, 144), row by row: 0.5 inside, -0.5 outside, 0 beyond the image.
    """
    pools = []
    for axis, length in enumerate((masks.shape[3], masks.shape[2])):
        middle, side = boxes[..., axis, None].float(), boxes[..., axis + 2, None].float()  # (B, K, 1)
        # 1.2 sides: a silhouette needs its border, and a box may be slightly too small.
        samples = middle + side * torch.linspace(-0.6, 0.6, MASK_SAMPLES, device=boxes.device)
        # Half the width of a sample: what lies between two of them, and at least a pixel of the mask.
        reach = (side * 1.2 / (MASK_SAMPLES - 1)).clamp(min=1 / length)
        distance = (token_positions(length, boxes.device) - samples[..., None]).abs() / reach[..., None]
        pool = (1 - distance).clamp(min=0)  # (B, K, 12, W), then H: linear weights
        pools.append(pool / pool.sum(-1, keepdim=True).clamp(min=1))
    columns, rows = pools
    inside = masks.to(rows.dtype).sigmoid() - 0.5
    return (rows @ inside @ columns.mT).flatten(2)


class Decoder(nn.Module):
    """100 centers, six layers (Paper, recalled; nano has three).  A layer refines the previous boxes.

        map at stride 8 --> InitialCenters --> C (B, 100, D), boxes: the cells of the 10 x 10 grid
                                                 |
                     +-------------------------->|
                     |                           v
                     |     predict: box (from the previous box), mask (from that box),
                     |              class (from the center and samples of that mask)
                     |                           |
                     |              box and mask | become priors, without gradient
                     |                           v
                     C <------------------ DecoderLayer <-- map at stride 32, 16, 8, 32, 16, 8

    All predictions are trained (deep supervision, DETR), including the one before the first layer
    (Mask2Former).  The order of maps is Mask2Former's.  Tasks that return no boxes predict them,
    too: priors need them.  Ours: the class also depends on mask samples, since averaging tokens loses
    the silhouette of an object, and the mask keeps it.
    """

    def __init__(self, dim, levels, num_classes, iterations, with_masks):
        super().__init__()
        self.levels = levels
        self.token_norm = LayerNorm(dim)
        # Unlike in the backbone, a cell may be a single token: a center is not bound to its cell,
        # and a small map may still hold many objects.
        self.initial = InitialCenters(dim, OBJECT_GRID, min_cell=1)
        self.layers = nn.ModuleList(DecoderLayer(dim, iterations) for _ in levels)
        self.norm = LayerNorm(dim)
        self.classifier = nn.Linear(dim, num_classes)
        # At first "no object" has a probability of 0.9, and the classes share the rest.
        nn.init.constant_(self.classifier.bias, -math.log(9 * num_classes))
        self.box_head = BoxHead(dim)
        self.mask_head = self.mask_classifier = None
        if with_masks:
            self.mask_head = MaskHead(dim, num_classes)
            first, last = nn.Linear(MASK_SAMPLES**2, 2 * dim), nn.Linear(2 * dim, num_classes)
            self.mask_classifier = nn.Sequential(first, nn.GELU(), last)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def predict_centers(self, centers, anchors, embeddings):
        """What centers (B, K, D) with anchors (B, K, 4) predict: "boxes", "masks" and "logits".

        embeddings: of the pixels, (B, H, W, D).
        """
        x = self.norm(centers)
        output = dict(boxes=self.box_head(x, anchors))
        if self.mask_head:
            boxes = output["boxes"].detach()
            output["masks"] = self.mask_head(x, boxes, embeddings)
            samples = mask_samples(output["masks"].detach(), boxes)
        output["logits"] = in_full_precision(self.classifier, x)
        if self.mask_head:
            output["logits"] = output["logits"] + in_full_precision(self.mask_classifier, samples)
        return output

    def forward(self, maps):
        """maps: of the neck, (B, H, W, D), fine to coarse; the last three have strides 8, 16, 32.

        Returns a list of predictions: before the first layer, and after each.
        """
        embeddings = self.mask_head.embed_pixels(maps[0]) if self.mask_head else None
        tokens = [self.token_norm(x) for x in maps[-3:]]
        centers = self.initial(tokens[0])  # (B, K, D)
        boxes = cell_boxes(*tokens[0].shape[1:3], centers.device).expand(centers.shape[0], -1, -1)
        outputs = [self.predict_centers(centers, boxes, embeddings)]
        for level, layer in zip(self.levels, self.layers):
            boxes = outputs[-1]["boxes"].detach()  # no gradient from the next layer's losses
            masks = None
            if self.mask_head and len(outputs) > 1:  # not in the first layer: its centers saw one cell
                masks = mask_prior(outputs[-1]["masks"].detach(), 2**level)
            centers = layer(centers, boxes, tokens[level - 1], masks)
            outputs.append(self.predict_centers(centers, boxes, embeddings))
        if self.training and self.mask_head:
            outputs[-1]["pixels"] = self.mask_head.pixel_classifier(embeddings).permute(0, 3, 1, 2)
        return outputs


# --------------------------------------------------------------------------------------------------
# 9. Matching and losses of the dense tasks.  All are sums over targets: see ClusterFormer.loss
# --------------------------------------------------------------------------------------------------
MATCHES_PER_TARGET = 6, 4, 2  # for the first three predictions; one for the others, and for the last
# l1 and giou are DETR's; label, mask and dice are Mask2Former's; pixel is ours.
LOSS_WEIGHTS = dict(label=2.0, l1=5.0, giou=2.0, mask=5.0, dice=5.0, pixel=20.0)
NO_OBJECT_WEIGHT = 0.1  # of centers without a target (DETR): they far outnumber the others
NUM_POINTS = 12_544  # at which a mask is compared (Mask2Former); a 1024 x 1024 image has 65,536


def num_points(masks):
    """Number of points at which masks (..., h, w) at stride 4 are compared.

    It is NUM_POINTS for images of at least 512 x 512 pixels.  Small masks have so many pixels or fewer: a
    quarter of them is compared.
    """
    pixels = masks.shape[-2] * masks.shape[-1]
    return NUM_POINTS if pixels >= 128 * 128 else pixels // 4


def hungarian(cost):
    """The cheapest way to give each row a column of its own (Jonker and Volgenant, 1987).

    cost: float64 NumPy (n, m), n <= m.  Returns the column of each row, int64 (n,).  For finite costs it is
    scipy.optimize.linear_sum_assignment(cost)[1], without SciPy.
    """
    n, m = cost.shape
    if not np.isfinite(cost).all():
        return np.arange(n)  # any columns will do: the loss will not be finite either
    row_price, column_price = np.zeros(n), np.zeros(m)
    owner = np.full(m, -1)  # the row that has each column
    for row in range(n):
        distance, before, done = np.full(m, np.inf), np.full(m, -1), np.zeros(m, bool)
        column, at, traveled = -1, row, 0.0
        while True:  # Dijkstra's search for a free column; a taken one continues from its owner
            step = traveled + cost[at] - row_price[at] - column_price
            nearer = ~done & (step < distance)
            distance[nearer], before[nearer] = step[nearer], column
            column = int(np.where(done, np.inf, distance).argmin())
            done[column], traveled, at = True, distance[column], owner[column]
            if at < 0:
                break
        passed = done & (distance < traveled)
        row_price[row] += traveled
        row_price[owner[passed]] += traveled - distance[passed]
        column_price[passed] += distance[passed] - traveled
        while column >= 0:  # back along the path, each row takes the next column
            previous = before[column]
            owner[column] = row if previous < 0 else owner[previous]
            column = previous
    columns = np.full(n, -1)
    columns[owner[owner >= 0]] = np.flatnonzero(owner >= 0)
    return columns


def sample_points(maps, points):
    """Bilinear samples of maps (n, h, w) at points (n or 1, P, 2), x and y as fractions of the image.

    Returns (n, P).
    """
    if not len(maps):
        return maps.new_zeros(0, points.shape[1])
    grid = 2 * points[:, None] - 1  # (n or 1, 1, P, 2), from -1 to 1
    sample = lambda x: F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    # If all maps are sampled at the same points, they are the channels of one.
    return sample(maps[None])[0, :, 0] if len(points) == 1 else sample(maps[:, None])[:, 0, 0]


def uncertain_points(logits, count):
    """Random points (n, count, 2), three of four where a mask is least certain (PointRend, 2020).

    A mask is uncertain at its border.  The border decides its quality, but has few of the pixels.
    """
    points = torch.rand(len(logits), 3 * count, 2, device=logits.device)
    uncertainty = -sample_points(logits, points).abs()  # (n, 3 count)
    most = uncertainty.topk(3 * count // 4, dim=1).indices[..., None].expand(-1, -1, 2)
    rest = torch.rand(len(logits), count - most.shape[1], 2, device=logits.device)
    return torch.cat([points.gather(1, most), rest], 1)


@torch.no_grad()
def matching_cost(output, target, box_classes=None):
    """What each pair of a target and a center would cost in the losses below (DETR, Mask2Former).

    output: predictions for one image, (n centers, ...).  target, box_classes: as in set_losses.
    Returns (targets, centers) float32.
    """
    labels, boxes, truth = target["labels"], output["boxes"].float(), target["boxes"]
    cost = -LOSS_WEIGHTS["label"] * class_probability(output["logits"])[:, labels].T
    _, giou = iou_and_giou(cxcywh_to_xyxy(truth)[:, None], cxcywh_to_xyxy(boxes))
    l1 = torch.cdist(truth, boxes, p=1)
    box_cost = LOSS_WEIGHTS["l1"] * l1 - LOSS_WEIGHTS["giou"] * giou
    cost += box_cost if box_classes is None else box_cost * box_classes[labels, None]
    if "masks" in output:
        masks, truth = output["masks"].float(), target["masks"].float()
        points = torch.rand(1, num_points(masks), 2, device=masks.device)
        logits = sample_points(masks, points)  # (centers, P)
        truth = sample_points(truth, points)  # (targets, P)
        # Cross-entropy is softplus(x) - x y: one matrix product for all pairs.
        entropy = (F.softplus(logits).sum(1) - truth @ logits.T) / logits.shape[1]
        probability = logits.sigmoid()
        shared, total = truth @ probability.T, truth.sum(1)[:, None] + probability.sum(1)
        dice = 1 - (2 * shared + 1) / (total + 1)
        cost += LOSS_WEIGHTS["mask"] * entropy + LOSS_WEIGHTS["dice"] * dice
    return cost


def matches_per_target(num_layers, centers, targets):
    """Matches per target in each layer of an image: one, or more for at most half of the centers."""
    most = max(1, centers // (2 * max(1, targets)))
    wanted = [*MATCHES_PER_TARGET, *[1] * num_layers][: num_layers - 1]
    return [min(times, most) for times in wanted] + [1]


def match(outputs, targets, box_classes=None):
    """Match each target with several centers in the first layers, and with one in the others.

    One-to-one matching teaches centers to leave an object to one of them (DETR).  One-to-many
    matching gives more gradient, and H-DETR (2023) adds queries for it.  Ours: the first layers use
    one-to-many matching for all centers, because their predictions are not the final ones.
    If an image has more targets than centers, the smallest targets have no match.
    outputs: (B, L, K, ...), the predictions of L layers.  Returns a list with one tuple per image:
    layer, center and target of its m matches, (m,) int64 each, and the weight of each match, (m,)
    float32, which is one over the number of matches of its target in that layer.
    """
    L, K = outputs["logits"].shape[1:3]
    images = [dict(zip(outputs, image)) for image in zip(*outputs.values())]
    costs = []
    for image, target in zip(images, targets):
        image = {key: value.flatten(0, 1) for key, value in image.items()}  # (L K, ...)
        costs.append(matching_cost(image, target, box_classes))
    # One copy to the CPU: each copy would wait for the GPU.
    costs = torch.cat(costs).cpu().double().split([len(cost) for cost in costs])
    tables = []
    for cost, target in zip(costs, targets):
        cost = cost.unflatten(1, (L, K)).numpy()  # (n, L, K)
        kept = np.arange(len(cost))
        if len(cost) > K:
            box = target["boxes"][:, 2:].prod(1)
            area = target["masks"].flatten(1).sum(1) if "masks" in target else box
            kept = np.sort(area.argsort(descending=True)[:K].cpu().numpy())
        rows = [np.zeros((0, 4))]
        for layer, times in enumerate(matches_per_target(L, K, len(kept))):
            chosen = hungarian(np.tile(cost[kept, layer], (times, 1)))
            layers, weights = np.full(len(chosen), layer), np.full(len(chosen), 1 / times)
            rows.append(np.stack([layers, chosen, np.tile(kept, times), weights], 1))
        tables.append(torch.from_numpy(np.concatenate(rows)).float())
    table, device = torch.cat(tables), outputs["logits"].device
    if device.type == "cuda":  # through pinned memory; otherwise the CPU would wait for the GPU
        table = table.pin_memory()
    table = table.to(device, non_blocking=True)
    parts = table.split([len(part) for part in tables])
    return [(*part[:, :3].long().unbind(1), part[:, 3]) for part in parts]


def mask_losses(masks, targets, matches):
    """Cross-entropy and dice loss of matched masks at sampled points (Mask2Former), two sums.

    masks: logits (B, L, K, h, w).  matches: from match().
    """
    entropy = dice = 0.0 * masks.sum()  # DDP needs all gradients, even without targets
    # Iterating over `masks` gives it one gradient; masks[i] would give a full-size one per image.
    for image, predicted, (layer, center, target, weight) in zip(targets, masks, matches):
        logits, truth = predicted[layer, center].float(), image["masks"]  # (m, h, w), (n, H, W)
        points = uncertain_points(logits.detach(), num_points(logits))
        x, y = ((points[..., axis] * truth.shape[2 - axis]).long() for axis in (0, 1))  # (m, P)
        logits, truth = sample_points(logits, points), truth[target[:, None], y, x].float()
        each = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")  # (m, P)
        entropy = entropy + each.mean(1) @ weight
        probability = logits.sigmoid()
        shared = 2 * (probability * truth).sum(1) + 1  # + 1: a small mask may contain no point
        dice = dice + (1 - shared / (probability.sum(1) + truth.sum(1) + 1)) @ weight
    return entropy, dice


def pixel_loss(pixels, targets, stride):
    """Cross-entropy of the pixels' classes, a mean over each target's pixels.  Ours.

    The mean makes small targets count as much as large ones.  Unlabeled pixels have no loss.
    pixels: logits (B, classes, h, w).
    """
    costs = -pixels.float().log_softmax(1)
    loss = 0.0 * costs.sum()
    for image, cost in zip(targets, costs):
        # One channel: pooling (n, h, w) would refuse n = 0.
        weights = F.avg_pool2d(image["masks"][:, None].float(), stride)[:, 0]  # (n, h, w)
        weights = weights / weights.sum((1, 2), keepdim=True).clamp(min=1e-6)  # (n, h, w)
        loss = loss + (cost[image["labels"]] * weights).sum()
    return loss


def set_losses(output, targets, stride, box_classes=None):
    """All losses of a dense task, summed over layers and targets, and weighted.

    output, targets: as in ClusterFormer.  stride: image pixels per mask pixel.
    box_classes: bool (classes,), the classes that are matched and trained by boxes; None: all.
    Returns a dictionary of scalars: label, l1, giou; mask and dice
    if there are masks, and then in training also pixel.
    Raises ValueError for masks of another size than the images, which would be compared shifted.
    """
    if "masks" in output:
        size = tuple(stride * side for side in output["masks"].shape[2:])
        for target in targets:
            if target["masks"].shape[1:] != size:
                got = tuple(target["masks"].shape)
                raise ValueError(f"masks must be (n, {size[0]}, {size[1]}), as the images, got {got}")
    layers = [*output["aux"], output]
    keys = [key for key in ("logits", "boxes", "masks") if key in output]
    outputs = {key: torch.stack([layer[key] for layer in layers], 1) for key in keys}  # (B, L, K, ..)
    matches = match(outputs, targets, box_classes)
    layer, center, _, weight = map(torch.cat, zip(*matches))
    chosen = [index for _, _, index, _ in matches]
    image = torch.cat([torch.full_like(index, i) for i, index in enumerate(chosen)])
    labels = torch.cat([target["labels"][index] for target, index in zip(targets, chosen)])
    logits = F.pad(outputs["logits"].float(), (0, 1))  # "no object" is the last class, logit 0
    classes = torch.full(logits.shape[:3], logits.shape[3] - 1, device=logits.device)
    weights = torch.full(logits.shape[:3], NO_OBJECT_WEIGHT, device=logits.device)
    classes[image, layer, center], weights[image, layer, center] = labels, weight
    entropy = F.cross_entropy(logits.flatten(0, 2), classes.flatten(), reduction="none")
    losses = dict(label=entropy @ weights.flatten())
    boxes = outputs["boxes"][image, layer, center].float()
    truth = torch.cat([target["boxes"][index] for target, index in zip(targets, chosen)])
    _, giou = iou_and_giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(truth))
    box_weight = weight if box_classes is None else weight * box_classes[labels]
    losses["l1"] = (boxes - truth).abs().sum(1) @ box_weight
    losses["giou"] = (1 - giou) @ box_weight
    if "masks" in outputs:
        losses["mask"], losses["dice"] = mask_losses(outputs["masks"], targets, matches)
    if "pixels" in output:
        losses["pixel"] = pixel_loss(output["pixels"], targets, stride)
    return {name: LOSS_WEIGHTS[name] * value for name, value in losses.items()}


# --------------------------------------------------------------------------------------------------
# 10. Final predictions of the dense tasks
# --------------------------------------------------------------------------------------------------
def mask_bands(masks, stride, image_size, size, rows=16):
    """Mask probabilities in the final size, a band of rows after the other.

    In one piece, 100 masks of a photograph of 12 megapixels would take 4.8 GB.
    masks: logits (K, h, w) at a stride of the padded image.  image_size: (H, W) of the image without
    its padding.  size: the final (H, W).
    Yields slices of rows, and probabilities (K, rows of the slice, W) float32.
    """

    def stretch(x, axis):
        """Bilinear resizing along the last axis of (a, b, n): to pixels of the image, then of the result."""
        x = F.interpolate(x, scale_factor=stride, mode="linear")[..., : image_size[axis]]
        return x if size[axis] == image_size[axis] else F.interpolate(x, size[axis], mode="linear")

    masks = masks.float()
    # Down the columns, resizing is a product: weights (h, H) say how much each row of a mask is in each
    # final row.  A band needs a few rows of the masks.
    weights = stretch(torch.eye(masks.shape[1], device="cpu")[None], 0)[0]
    for start in range(0, size[0], rows):
        part = weights[:, start : start + rows]
        near = part.any(1).nonzero()[:, 0].tolist()
        first, end = near[0], near[-1] + 1
        part = part[first:end].to(masks)
        yield slice(start, start + rows), (part.mT @ stretch(masks[:, first:end], 1)).sigmoid()


def top_detections(probability, boxes, threshold=0.6):
    """The best (center, class) pairs, at most 100, without duplicates.

    A duplicate has an IoU above the threshold with a better pair of its class, even with one that
    is itself a duplicate.  Ours: a fully trained model rarely predicts duplicates; after a
    short training they are common.
    probability: (K, classes). boxes: (K, 4) cxcywh.  Returns scores, labels and centers, (n,) each.
    """
    scores, pairs = probability.flatten().topk(min(100, probability.numel()))
    centers, labels = pairs // probability.shape[1], pairs % probability.shape[1]
    overlap = pairwise_iou(boxes[None])[0][centers][:, centers] > threshold  # (n, n)
    same_class = labels[:, None] == labels
    keep = ~(overlap & same_class).triu(1).any(0)
    return scores[keep], labels[keep], centers[keep]


def instance_masks(masks, centers, size):
    """Masks of some centers, and the mean probability inside of each.

    masks: mask_bands.  centers: (n,) int64.  Returns bool (n, H, W) and float32 (n,).
    """
    inside = torch.empty(len(centers), *size, dtype=torch.bool, device=centers.device)
    total = count = torch.zeros(len(centers), device=centers.device)
    for rows, probability in masks:
        probability = probability[centers]
        inside[:, rows] = probability > 0.5
        total = total + (probability * inside[:, rows]).sum((1, 2))
        count = count + inside[:, rows].sum((1, 2))
    return inside, total / count.clamp(min=1)


def semantic_map(probability, masks, size):
    """Class of each pixel: the largest sum over centers of class probability times mask.

    MaskFormer's (2021). probability: (K, classes). masks: mask_bands.  Returns int64 (H, W).
    """
    labels = torch.empty(size, dtype=torch.int64, device=probability.device)
    for rows, mask in masks:
        labels[rows] = torch.einsum("kc,khw->chw", probability, mask).argmax(0)
    return labels


def panoptic_segments(probability, masks, things, size, threshold=0.25, overlap=0.6):
    """Segment of each pixel: one per center for things, one per class for stuff.  MaskFormer's.

    Centers below the threshold (Mask DINO's) are ignored.  A pixel goes to the center whose
    probability times mask is largest, if that mask is above 0.5 there.  A center that wins less
    than `overlap` of its mask is a duplicate, and gets no segment.
    probability: (K, classes).  masks: mask_bands.  things: list of bool, True: countable.
    Returns ids, int64 (H, W), 0 for none, and a list of {"id", "label", "isthing", "score"}.
    """
    scores, labels = probability.max(1)
    confident = scores > threshold
    scores, labels = scores[confident], labels[confident]
    ids = torch.zeros(size, dtype=torch.int64, device=scores.device)
    segments, stuff = [], {}  # stuff: class -> its segment
    if not len(scores):
        return ids, segments
    winner, area = torch.full_like(ids, -1), 0  # -1: the best mask is below 0.5
    for rows, mask in masks:
        mask = mask[confident]
        area = area + (mask > 0.5).sum((1, 2))
        best = (scores[:, None, None] * mask).argmax(0)  # (rows, W)
        sure = mask.gather(0, best[None])[0] > 0.5
        winner[rows] = torch.where(sure, best, -1)
    won = (winner.flatten() + 1).bincount(minlength=len(scores) + 1)[1:]  # pixels of each center
    won, area = won.tolist(), area.tolist()
    for k, (score, label) in enumerate(zip(scores.tolist(), labels.tolist())):
        if won[k] == 0 or won[k] < overlap * area[k]:
            continue
        if label in stuff:
            segment = stuff[label]
            segment["score"] = max(segment["score"], score)
        else:
            segment = dict(id=len(segments) + 1, label=label, isthing=things[label], score=score)
            segments.append(segment)
            if not things[label]:
                stuff[label] = segment
        ids[winner == k] = segment["id"]
    return ids, segments


# --------------------------------------------------------------------------------------------------
# 11. The heads of the dense tasks.  Each owns its modules, forward pass, losses and predictions
# --------------------------------------------------------------------------------------------------
class DenseHead(nn.Module):
    """What detection and segmentation share.  A task adds what it predicts for an image."""

    with_masks = True

    def __init__(self, backbone, size, num_classes, iterations, label_smoothing, things):
        super().__init__()
        self.finest = 0 if self.with_masks else 1  # only masks need the map at stride 4
        self.stride, self.coarsest = backbone.strides[0], backbone.strides[-1]  # of masks; of the last map
        self.neck = Neck(backbone.channels[self.finest :], size["dim"])
        self.decoder = Decoder(size["dim"], size["levels"], num_classes, iterations, self.with_masks)

    def forward(self, maps):
        """maps: of the backbone, four (B, H, W, C).  Returns predictions."""
        *earlier, output = self.decoder(self.neck(maps[self.finest :]))
        output["aux"] = earlier
        return output

    def loss(self, output, targets):
        """set_losses: sums over targets."""
        return set_losses(output, targets, self.stride)

    def count(self, targets):
        """Number of targets, so that each target counts the same, in crowded images and others."""
        return sum(len(target["labels"]) for target in targets)

    def predict(self, output, image_size, sizes):
        """One dictionary per image.

        output: for images of size (H, W) that ClusterFormer.pad has made squares.  sizes: the final
        (H, W) of each.
        """
        square = -(-max(image_size) // self.coarsest) * self.coarsest
        height, width = image_size
        sides = torch.tensor([square / width, square / height] * 2, device=output["boxes"].device)
        predictions = []
        for i, size in enumerate(sizes):
            probability = class_probability(output["logits"][i])  # (K, classes)
            boxes = output["boxes"][i].float() * sides  # fractions of the image, without padding
            masks = None
            if self.with_masks:
                masks = mask_bands(output["masks"][i], self.stride, image_size, size)
            predictions.append(self.predict_image(probability, boxes, masks, size))
        return predictions


def pixel_boxes(boxes, size):
    """(n, 4) cxcywh as fractions of an image of size (H, W) -> xyxy in its pixels."""
    pixels = torch.tensor([size[1], size[0]] * 2, device=boxes.device)
    return cxcywh_to_xyxy(boxes).clamp(0, 1) * pixels


class DetectionHead(DenseHead):
    """det: boxes."""

    with_masks = False

    def predict_image(self, probability, boxes, masks, size):
        scores, labels, centers = top_detections(probability, boxes)
        return {"scores": scores, "labels": labels, "boxes": pixel_boxes(boxes[centers], size)}


class InstanceHead(DenseHead):
    """inst: boxes and masks.  A score is class probability times mean mask probability (Mask2Former)."""

    def predict_image(self, probability, boxes, masks, size):
        scores, labels, centers = top_detections(probability, boxes)
        masks, quality = instance_masks(masks, centers, size)
        scores = scores * quality
        order = scores.argsort(descending=True)
        for rows in masks.split(64, dim=1):  # in place: all masks of a large photograph take a gigabyte
            rows.copy_(rows[order])
        boxes = pixel_boxes(boxes[centers[order]], size)
        return {"scores": scores[order], "labels": labels[order], "boxes": boxes, "masks": masks}


class SemanticHead(DenseHead):
    """sem: the class of each pixel."""

    def predict_image(self, probability, boxes, masks, size):
        return {"semantic": semantic_map(probability, masks, size)}


class PanopticHead(DenseHead):
    """pan: the segment of each pixel.

    Stuff is neither matched nor trained by boxes (Mask DINO, 2022): the box around all the grass in
    a photograph says little.  (sem trains the boxes of all its classes.)
    """

    def __init__(self, backbone, size, num_classes, iterations, label_smoothing, things):
        super().__init__(backbone, size, num_classes, iterations, label_smoothing, things)
        things = torch.tensor([True] * num_classes if things is None else things)
        self.register_buffer("things", things, persistent=False)

    def loss(self, output, targets):
        """set_losses: sums over targets."""
        return set_losses(output, targets, self.stride, box_classes=self.things)

    def predict_image(self, probability, boxes, masks, size):
        ids, segments = panoptic_segments(probability, masks, self.things.tolist(), size)
        return {"panoptic": ids, "segments": segments}


# --------------------------------------------------------------------------------------------------
# 12. The model, and its trace
# --------------------------------------------------------------------------------------------------
TASKS = {  # a new task is one class, with the methods and the constructor of these, and one entry
    "cls": ClassificationHead,
    "det": DetectionHead,
    "inst": InstanceHead,
    "sem": SemanticHead,
    "pan": PanopticHead,
}


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
        self.arguments = dict(task=task, variant=variant, num_classes=num_classes, patch_size=patch_size)
        self.arguments |= dict(iterations=iterations, drop_path=drop_path)
        self.arguments |= dict(label_smoothing=label_smoothing, things=things)
        size = VARIANTS[variant]
        self.backbone = Backbone(size["depths"], size["channels"], patch_size, iterations, drop_path)
        self.head = TASKS[task](self.backbone, size, num_classes, iterations, label_smoothing, things)

    def forward(self, images):
        """images: float RGB in [0, 1], (B, 3, H, W); H, W multiples of 32 (of 16 with patch_size 2).

        Returns for cls {"logits": (B, classes)}, and for the dense tasks
            "logits"  (B, K, classes)  see class_probability.  K = 100 centers, or fewer if the map at
                                       stride 8 has fewer than 10 x 10 tokens
            "boxes"   (B, K, 4)        cxcywh as fractions of the image
            "masks"   (B, K, H/4, W/4) inst, sem, pan: logits (H/2, W/2 with patch_size 2)
            "aux"     a list of the same for the earlier layers, first to last
            "pixels"  (B, classes, H/4, W/4), with masks, in training: logits of the pixels' classes
        Raises ValueError for a wrong shape or dtype.  It does not check values: that would wait for
        the GPU in every step.
        """
        return self.head(self.backbone.features(images))

    def loss(self, output, targets):
        """Losses of a batch: a dictionary of scalars, sums over its images (cls) or targets.

        Divide them by count(targets), summed over all processes; a mean of means would weigh the
        targets of crowded batches less.
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
        return self.head.count(targets)

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

        Images are padded by pad(), and what is returned is cropped.  Images of one size make a batch;
        others go through the model one after the other.
        images: float RGB in [0, 1], (B, 3, H, W), or a list of (3, H, W).
        sizes: a list of (H, W) in which boxes and maps are returned; None: those of the images.
        Raises ValueError for other images, and for a value outside of [0, 1].
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
        sizes = [image.shape[1:] for image in images] if sizes is None else sizes
        sizes = [tuple(size) for size in sizes]
        stacked = len({image.shape for image in images}) == 1
        batches = [torch.stack(images)] if stacked else [image[None] for image in images]
        training, predictions = self.training, []
        self.eval()
        try:
            for batch in batches:
                output = self(self.pad(batch))
                rest = sizes[len(predictions) :][: len(batch)]
                with torch.autocast(batch.device.type, enabled=False):  # bfloat16 would tie two classes
                    predictions += self.head.predict(output, tuple(batch.shape[2:]), rest)
        finally:
            self.train(training)
        return predictions


@torch.no_grad()
def trace(model, images):
    """Record every clustering in a model: a ClusterFormer, a Backbone, or what contains them.

    It runs in evaluation mode, without gradients.  images: as for the model's forward.
    Returns a list of dictionaries, in the order in which the clusterings run:
        "name"         of the module, such as "backbone.stages.1.0.cluster"
        "size"         (H, W) of its N tokens
        "centers"      C(0) .. C(T), each (B, K, D)
        "assignments"  M(0) .. M(T), each (B, h, K, N)
        "tokens"       (B, N, D), and "values" v(I), (B, h, N, d)
        "weights"      of the values in the mean of each iteration, T of (B, h, K, N); they sum to 1
                       over N
    """
    modules = model.named_modules()
    found = {name: x for name, x in modules if isinstance(x, RecurrentCrossAttentionClustering)}
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
