# SPDX-License-Identifier: MIT
"""ClusterFormer: clustering as a universal visual learner, in one file.

A reference for "ClusterFormer: Clustering As A Universal Visual Learner" (NeurIPS 2023, arXiv 2309.13196).
Copy this file into any project.  It needs PyTorch and NumPy, and nothing else.

    model = ClusterFormer("cls", "tiny", num_classes=1000)
    logits = model(images)["logits"]                # images: float RGB in [0, 1], (B, 3, H, W), any H, W >= 32

    model = ClusterFormer("inst", "tiny", num_classes=80)
    losses = model.loss(model(images), targets)     # a dictionary of sums over the targets
    (sum(losses.values()) / max(1, model.count(targets))).backward()
    predictions = model.predict(images)             # for each image: scores, labels, boxes, masks

THE METHOD.  Self-attention compares every token with every other token, at a cost of N x N.  ClusterFormer puts K
cluster centers between them, at a cost of N x K.  In the E-step every token is assigned to the centers; in the M-step
every center collects its tokens.  After T = 3 iterations, every token receives what its clusters have collected.  The
assignment is also an explanation: it is a picture that shows which pixels each cluster holds.

The paper, as we read it.  (We had its abstract, its Figure 2, and its equations partly as shown there and partly as
recalled.  We did not have the full text, so the file can say what we read, but not what else the paper may say.)

    initial centers   C(0)   = FFN( AdaptivePooling_K(I) )                      recalled
    E-step            M(t)   = softmax_K( Q(C(t)) K(I)^T )                      Eq. 3, Figure 2b;  t = 0 .. T
    M-step            C(t+1) = M(t) V(I)                                        Eq. 3, Figure 2b;  t = 0 .. T-1
    dispatching       p_i'   = p_i + MLP( 1/K sum_k sim(C_k(T), p_i) C_k(T) )   Eq. 6, Figure 2c

This file.  q, k, v are the projections Q, K, V; they are lowercase here because K is already the number of centers.

    initial centers   C(0)   = pool(I) + FFN(pool(I))
    E-step            M(t)   = softmax_K( S(t) ),   S(t) = scale * cos( q(C(t)), k(I) )              t = 0 .. T-1
    M-step            C(t+1) = C(t) + mean of v(I), in which token i weighs M_ki(t) exp(S_ki(t))     t = 0 .. T-1
    dispatching       p_i'   = p_i + sum_k M_ki(T-1) MLP(C_k(T))

Where the two differ.  A dash means that what we read does not say.

    equation         the paper, as we read it   here                          why
    ---------------  -------------------------  ----------------------------  ------------------------------------------
    C(0): FFN        replaces the pooled mean   is added to it, starts at     a center starts as the mean of its cell,
                                                zero; hidden width D          so it attracts the tokens that look like it
    K                100 in every stage         at most 10 x 10; a cell is    a cluster of a single token has nothing
                                                at least 2 tokens wide        to aggregate
    E-step: S        dot product                cosine times a learned scale  with a dot product, long vectors win the
                                                per head, at most 50          softmax whatever their direction
    q, k, v at       -                          the identity                  queries and keys can be compared from the
    the start                                                                 first step on
    q, k, v: size    -                          d x d, one per head           full D x D projections cost D / d times
                                                                              as much
    heads            32 channels each           64 channels each              half as many maps M to compute and to store
    E-steps          T + 1: C(T) is dispatched  T: C(T) is dispatched with    saves one pass over all pairs of tokens
                     with M(T)                  M(T-1), which made it         and centers
    M-step: weights  M                          M exp(S)                      M sums to 1 even for a token that looks
                                                                              like no center; exp(S) makes it count little
    M-step: scale    sum                        mean                          a sum grows with the number of tokens
    M-step: update   replaces the center        is added to the center        an empty cluster stays where it is, and
                                                (as in kMaX-DeepLab)          gradients reach C(0) directly
    M-step:          -                          head h compares channels      in the next iteration, a head compares what
    channels                                    hd .. hd+d-1, and collects    the other heads have collected; otherwise
                                                channels h, h + heads, ...    it would only see its own channels again
    dispatching:     a similarity of its own    M(T-1), which sums to 1       it is there already; another similarity
    sim                                         over k; 1/K cancels           would be one more pass
    dispatching:     outside of the sum         inside of the sum             it runs K times per image instead of N
    MLP                                                                       times
    block            -                          a 3 x 3 depthwise convolution clusters ignore where a token is;
                                                first, a token MLP last       the convolution knows its neighbors
    positions        -                          a linear map of (y, x) is     centers can tell places apart
                                                added to the tokens
    stem             -                          two 3 x 3 / 2 convolutions    edges are learned in fewer steps than
                                                                              with one 4 x 4 / 4 convolution
    downsampling     -                          3 x 3 / 2 convolution         the cells overlap (the release has it, too)
    widths, depths   those of Swin              the same; MLPs of ratio 1     Swin's size: Tiny has 27.0 M parameters
                                                (centers) and 2 (tokens)      (28 M and 81.5 % are cited for the paper's)

The released code of the authors is another method than these equations, so it cannot serve to check them.  Its centers
attend to tokens with a softmax over the N tokens (over K in its first version).  Then each token goes to its single most
similar center by sigmoid(beta + alpha cos), a center becomes the mean of its tokens and of its pooled start, and a token
takes back its center times that similarity.  It has no FFN on the centers, no MLP in dispatching, and no detection or
segmentation code.  From it we know the widths, a 4 x 4 / 4 stem with coordinates as extra channels, and 3 x 3 / 2
downsampling.

LETTERS, in equations and in the shapes at the ends of lines:

    B  images in a batch            I     the tokens of a map, p_i one of them     M  assignment, (.., K, N); M_ki: of token i
    H, W  height and width, tokens  C(t)  the centers after t iterations              to cluster k; sums to 1 over k
    N  tokens of a map = H * W      K     number of centers                        S  similarity, of the same shape
    D  channels                     h, d  heads, and channels of a head = D / h    T  number of EM iterations

MARKS.  "Paper" says that a class or a line follows the equations above, and where we read them.  A name and a year say
that it is taken from that work.  "Ours" says that it is this project's own.

THE FILE runs in the order of the data: initial centers (1), clustering (2), dispatching (3), block (4), backbone (5),
classification head (6); neck, boxes and priors, and decoder of the dense tasks (7, 8); their matching and losses (9), and
their final predictions (10); one head per task (11); the model, its trace, and its checkpoint (12).
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

VARIANTS = {
    # depths, channels: blocks and channels of the four stages.  dim: channels of the dense tasks' neck and decoder.
    # levels: the map that each decoder layer looks at, 1, 2, 3 for strides 8, 16, 32.
    # drop_path: the stochastic depth of full-scale training.
    "nano": dict(depths=(2, 2, 2, 1), channels=(32, 64, 128, 256), dim=128, levels=(1, 1, 1), drop_path=0.0),
    "tiny": dict(depths=(2, 2, 6, 2), channels=(96, 192, 384, 768), dim=256, levels=(3, 2, 1, 3, 2, 1), drop_path=0.2),
    "small": dict(depths=(2, 2, 18, 2), channels=(96, 192, 384, 768), dim=256, levels=(3, 2, 1, 3, 2, 1), drop_path=0.3),
}  # tiny and small have the depths and channels of Swin-T and Swin-S (Paper); nano is ours, for CPUs and small images
VERSION = 3  # of the weights: raised when weights of before would be named, or would work, differently
HEAD_DIM = 64  # channels per head; a stage with fewer channels has one head
GRID = 10  # centers start from a grid of at most 10 x 10 cells, K = 100 (Paper)
CENTER_RATIO = 1, 2  # hidden width, in units of D, of the MLPs on centers: before clustering, and in dispatching
TOKEN_RATIO = 2  # of the MLP on tokens, which runs N times; Swin spends 4 here


# ---------------------------------------------------------------------------------------------------------------
# 1. Initial centers: C(0) is pooled from the image; it is not a learned query
# ---------------------------------------------------------------------------------------------------------------
class Layout(NamedTuple):
    """Where the images of a batch lie in a map of H x W tokens.  Computed once per map.  Ours.

    Images of different sizes lie at the top left of the map, and padding fills the rest.  The masks tell which tokens
    and centers are real; a mask is None if all are.  Images of equal size share one row, with 1 in place of B.
    """

    row_pool: torch.Tensor  # (B, kh, H)  row a averages the map's rows that belong to row a of the grid
    column_pool: torch.Tensor  # (B, kw, W)  the same for columns
    y: torch.Tensor  # (B, H)  vertical position of each row in its image, from -0.5 to 0.5
    x: torch.Tensor  # (B, W)  horizontal position of each column
    token_mask: torch.Tensor | None  # (B, H, W)  bool, True for image, False for padding
    center_mask: torch.Tensor | None  # (B, kh * kw)  bool, True for the centers that an image has
    sizes: torch.Tensor | None  # (B, 2)  int64, on the CPU: height and width of each image in tokens


def to_device(values, device):
    """Copy a small CPU tensor to a device without waiting for the GPU: a copy from unpinned memory would wait."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def pooling_matrix(lengths, size, min_cell=2):
    """Average pooling along one side as a matrix, so that each image of a batch can have its own length.  Ours.

    lengths: (B,) int64, the length of each image in tokens.  size: length of the map, >= every length.
    min_cell: a side has one cell per `min_cell` tokens, rounded up, and at most GRID cells.
    Returns (B, k, size) float32, whose rows sum to 1 (or 0, for cells that an image does not have), and (B, k) bool,
    True for the cells that it has.  Cells are those of torch's adaptive pooling: as even as integers allow, and
    overlapping by a token where the length is not divisible.
    """
    fill = min_cell - 1
    cell = torch.arange(min(GRID, (size + fill) // min_cell), device=lengths.device)[:, None]  # (k, 1)
    position = torch.arange(size, device=lengths.device)  # (size,)
    lengths = lengths[:, None, None]  # (B, 1, 1)
    cells = ((lengths + fill) // min_cell).clamp(max=GRID)
    start, end = cell * lengths // cells, ((cell + 1) * lengths + cells - 1) // cells  # (B, k, 1)
    real = cell < cells
    inside = (position >= start) & (position < end) & real  # (B, k, size)
    return inside / inside.sum(-1, keepdim=True).clamp(min=1), real[..., 0]


def image_mask(height, width, sizes):
    """Mask of the places in a map that lie inside of images of the given sizes, (B, 2) -> bool (B, height, width)."""
    rows = torch.arange(height, device=sizes.device) < sizes[:, :1]
    columns = torch.arange(width, device=sizes.device) < sizes[:, 1:]
    return rows[:, :, None] & columns[:, None]


def make_layout(height, width, sizes=None, device=None, min_cell=2):
    """Layout of a map of height x width tokens.

    sizes: (B, 2) int64 on the CPU, the real heights and widths in tokens; None if every image fills the map.  They are
        on the CPU because they decide whether masks are needed: to read that from a GPU would stall it.
    min_cell: minimum side of a grid cell in tokens.  Large maps have the full 10 x 10 grid in any case.  On small maps
        a cell of a single token would have nothing to aggregate, so the default is 2.
    """
    device = torch.device("cpu") if device is None else device
    if sizes is None:
        sides = torch.stack([torch.full((1,), side, device=device) for side in (height, width)], 1)
    else:
        sides = to_device(sizes, device)
    row_pool, real_rows = pooling_matrix(sides[:, 0], height, min_cell)
    column_pool, real_columns = pooling_matrix(sides[:, 1], width, min_cell)
    y = (torch.arange(height, device=device) + 0.5) / sides[:, :1] - 0.5
    x = (torch.arange(width, device=device) + 0.5) / sides[:, 1:] - 0.5
    token_mask = center_mask = None
    if sizes is not None:
        shortest = sizes.amin(0).tolist()
        if shortest != [height, width]:
            token_mask = image_mask(height, width, sides)
        if [min(GRID, -(-side // min_cell)) for side in shortest] != [row_pool.shape[1], column_pool.shape[1]]:
            center_mask = (real_rows[:, :, None] & real_columns[:, None]).flatten(1)
    return Layout(row_pool, column_pool, y, x, token_mask, center_mask, sizes)


def pool_centers(x, layout):
    """Average a map over the cells of the grid: (B, H, W, D) -> (B, K, D), K = kh * kw.  Paper: AdaptivePooling_K."""
    x = (layout.row_pool.to(x.dtype) @ x.flatten(2)).unflatten(2, x.shape[2:])  # (B, kh, W, D)
    return (layout.column_pool[:, None].to(x.dtype) @ x).flatten(1, 2)  # (B, K, D)


def prenorm_mlp(dim, ratio):
    """A residual branch: norm, D -> ratio * D -> D.  The last layer is zero, so the branch starts as the identity.

    Ours.  A new model is thus nearly linear, and each branch grows as its gradients ask.  Layer scale, a small learned
    factor on an ordinary branch, is the usual alternative; its factor must grow before the branch counts.
    """
    layers = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, ratio * dim), nn.GELU(), nn.Linear(ratio * dim, dim))
    nn.init.zeros_(layers[-1].weight)
    nn.init.zeros_(layers[-1].bias)
    return layers


class InitialCenters(nn.Module):
    """Where the centers start, in the backbone, in the classification head and in the decoder.

        C(0) = pool(I) + FFN(pool(I))

    Paper (recalled): C(0) = FFN(AdaptivePooling_K(I)).  Ours: the FFN is a residual branch that starts at zero, so a
    new center is the mean of its cell and attracts the tokens that look like it.
    """

    def __init__(self, dim, ffn=True):
        super().__init__()
        self.ffn = prenorm_mlp(dim, CENTER_RATIO[0]) if ffn else None

    def forward(self, x, layout):
        """x: map (B, H, W, D).  layout: of this map, or of its grid.  Returns C(0), (B, K, D)."""
        centers = pool_centers(x, layout)
        return centers if self.ffn is None else centers + self.ffn(centers)


# ---------------------------------------------------------------------------------------------------------------
# 2. Recurrent cross-attention clustering: E-step and M-step
# ---------------------------------------------------------------------------------------------------------------
def center_bias(center_mask):
    """Bias that keeps tokens away from centers that an image does not have: bool (B, K) or None -> (B, 1, K) or None."""
    if center_mask is None:
        return None
    return torch.zeros(center_mask.shape, device=center_mask.device).masked_fill(~center_mask, -torch.inf)[:, None]


class RecurrentCrossAttentionClustering(nn.Module):
    """T iterations of EM between K centers and N tokens, in each head separately.

        E-step    M(t)   = softmax_K( S(t) ),   S(t) = scale * cos( q(C(t)), k(I) )
        M-step    C(t+1) = C(t) + mean of v(I), in which token i weighs M_ki(t) exp(S_ki(t))

    One iteration, in one head of one image:

        tokens I (N, D) --k--> keys (N, d) ----+---- queries (K, d) <--q-- centers C(t) (K, D)
               |                               |
               v                          S = scale * cos                 +-- exp(S) is large where a token
               |                               |                          |   looks like a center
               |               K centers       v softmax over K           |
               |            +---------------------+                       |
               |          N | .8  .1  .0  ...  .0 | --> sums to 1         |
               |     tokens | .2  .7  .1  ...  .0 | --> sums to 1         |
               |            |       M (N, K)      |                       |
               v            +---------------------+                       |
        values (N, d) ---> mean over the N tokens, weights M exp(S) <-----+ ---> + C(t) = C(t+1) (K, D)

    Paper (Eq. 3, Figure 2b): softmax over K, so that every token is divided among the clusters.  (Attention has it over
    N: each center would choose tokens freely, and some tokens might be chosen by none.)  The projections are shared by all
    iterations, and keys and values are computed once.  It is a recurrence, not a stack of T layers.

    Ours (the table in the header lists them):
    - cos and scale.  With a dot product, long vectors win the softmax.  A scale of 10 at the start gives a center that
      equals a token e^10 times the odds of an orthogonal one, and still leaves gradients for the others.
    - exp(S) in the weights.  M compares the centers for one token, and sums to 1 even if the token looks like none of
      them; many such tokens together would blur every mean.  exp(S) compares the tokens for one center.  A larger scale
      cannot replace it: it sharpens the choice between centers, but M still sums to 1.
    - mean, not sum, so that C does not depend on the number of tokens.  It is added to C(t): C(T) is the sum of C(0) and T
      means, so its norm grows.  This is harmless, since the cosine ignores the norm and every reader normalizes first.
    - q, k and v start as the identity: from the first step on, a center attracts tokens that look like it.
    - Interleaved channels.  Head j compares the d neighboring channels j d .. j d + d - 1, but collects the channels j,
      j + h, j + 2 h, ...  Tokens that agree in the compared channels have a mean that adds little in those channels.
      Collecting others tells a center something new, and the next iteration compares it in other heads.

    Cost: S, M and the weights have N * K numbers per head.  An iteration makes about six passes over them, and training
    keeps M and the weights of all iterations.  In the code, heads come before images: each projection is then one matrix
    product over the whole batch, whose weight and gradient need not be copied per image.
    """

    def __init__(self, dim, num_heads, iterations=3, scale=10.0):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}")
        self.num_heads, self.iterations = num_heads, iterations
        identity = torch.eye(dim // num_heads).expand(num_heads, -1, -1)
        self.q, self.k, self.v = (nn.Parameter(identity.clone()) for _ in range(3))  # (h, d, d)
        self.log_scale = nn.Parameter(torch.full((num_heads,), math.log(scale)))
        self.history = None  # a dictionary while trace() runs

    def project(self, x, weight):
        """x: (B, n, h, d).  weight: (h, d, d).  Returns (h, B, n, d)."""
        return (x.permute(2, 0, 1, 3).flatten(1, 2) @ weight).unflatten(1, x.shape[:2])

    def forward(self, centers, tokens, token_mask=None, bias=None):
        """Cluster the tokens.

        centers: C(0), (B, K, D).  tokens: (B, N, D), or a map (B, H, W, D).
        token_mask: bool (B, N) or (B, H, W), False for padding, which belongs to no cluster; None if there is none.
        bias: added to S, broadcast to (h, B, N, K): the log of a prior, and -inf for centers that an image does not have.
        Returns C(T), (B, K, D), and M(T-1), (B, h, K, N): it sums to 1 over K for real tokens, and is 0 for padding.
        """
        if self.training:
            with torch.no_grad():  # clamp the parameter, not its use: beyond a clamp in the graph it gets no gradient
                self.log_scale.clamp_(max=math.log(50.0))  # at 50 the softmax is nearly an argmax, and exp(S) < 1e22
        size, tokens = tokens.shape[1:-1], tokens.flatten(1, -2)  # (B, N, D)
        keys = self.project(tokens.unflatten(-1, (self.num_heads, -1)), self.k)  # (h, B, N, d)
        interleaved = tokens.unflatten(-1, (-1, self.num_heads)).mT  # (B, N, h, d): head j has channels j, j + h, ...
        # float32 also under autocast.  It is nearly free: softmax returns float32 anyway, and casting M would be a pass.
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        keys = F.normalize(keys.to(dtype), dim=-1)
        values = self.project(interleaved, self.v).to(dtype)  # (h, B, N, d)
        real = None if token_mask is None else token_mask.flatten(1)[..., None]  # (B, N, 1)
        history = self.history
        if history is not None:
            history |= dict(size=size, tokens=tokens, values=values.transpose(0, 1))
            history |= dict(centers=[centers], assignments=[], weights=[])
        with torch.autocast(tokens.device.type, enabled=False):
            centers, q = centers.to(dtype), self.q.to(dtype)
            scale = self.log_scale.to(dtype).exp().view(-1, 1, 1, 1)
            for _ in range(self.iterations):
                # E-step.  K is the last axis, where softmax is one pass.
                queries = self.project(centers.unflatten(-1, (self.num_heads, -1)), q)  # (h, B, K, d)
                S = keys @ (scale * F.normalize(queries, dim=-1)).mT  # (h, B, N, K)
                S = S if bias is None else S + bias
                M = S.softmax(-1)  # (h, B, N, K), over K: each token is divided among the clusters (Paper)
                M = M if real is None else M * real  # a factor: -inf in a whole row of S would make it NaN
                # M-step.
                weights = M * S.exp_()  # (h, B, N, K); S is not needed any more
                mass = weights.sum(-2, keepdim=True)  # (h, B, 1, K)
                mass = mass.masked_fill(mass < 1e-30, 1.0)  # an empty cluster: its mean is 0, its center stays
                means = values.mT @ weights / mass  # (h, B, d, K)
                centers = centers + means.permute(1, 3, 2, 0).flatten(2)  # (B, K, D), channels back in their order
                if history is not None:
                    history["centers"].append(centers)
                    history["assignments"].append(M.permute(1, 0, 3, 2))
                    history["weights"].append((weights / mass).permute(1, 0, 3, 2))
        return centers.to(tokens.dtype), M.permute(1, 0, 3, 2)


# ---------------------------------------------------------------------------------------------------------------
# 3. Feature dispatching: what the clusters have collected returns to the tokens
# ---------------------------------------------------------------------------------------------------------------
class FeatureDispatching(nn.Module):
    """What each token receives from its clusters:  sum_k M_ki(T-1) MLP(C_k(T)).

    Paper (Eq. 6, Figure 2c): MLP( 1/K sum_k sim(C_k(T), p_i) C_k(T) ).
    Ours: sim = K M, the assignment of the last E-step in each head, so that 1/K and K cancel.  M(T-1) was computed from
    C(T-1); the paper's figure has one more E-step, which gives M(T).
    Ours: the MLP is inside of the sum, so it runs on K centers instead of N tokens.  Without any MLP, a token would
    receive little more than a blurred copy of itself, since the tokens of its clusters look like it.
    Channels are not interleaved here: the MLP has mixed all of them already.
    """

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.mlp = prenorm_mlp(dim, CENTER_RATIO[1])

    def forward(self, centers, assignment):
        """centers: (B, K, D).  assignment: (B, h, K, N).  Returns (B, N, D), zero in a new model."""
        centers = self.mlp(centers)
        heads = centers.unflatten(-1, (self.num_heads, -1)).permute(2, 0, 1, 3).to(assignment.dtype)  # (h, B, K, d)
        with torch.autocast(centers.device.type, enabled=False):  # M is float32, and casting it would be one more pass
            received = assignment.permute(1, 0, 3, 2) @ heads  # (h, B, N, d)
        return received.permute(1, 2, 0, 3).flatten(2)  # (B, N, D)


# ---------------------------------------------------------------------------------------------------------------
# 4. The block
# ---------------------------------------------------------------------------------------------------------------
def mask_padding(x, layout):
    """Set the padding of a map (B, H, W, D) to zero: a convolution then sees the zeros that it sees at any border."""
    return x if layout.token_mask is None else x * layout.token_mask[..., None]


class ClusterBlock(nn.Module):
    """One layer of the backbone.

        x    = x + DepthwiseConv(x)           Ours
        I    = norm(x)
        C, M = cluster(initial(I), I)         Paper (Figure 2a): recurrent cross-attention clustering ...
        x    = x + dispatch(C, M)             ... then feature dispatching
        x    = x + MLP(x)                     Ours: every token on its own, as in any transformer

    Clusters gather tokens that look alike, wherever they are; the convolution is what relates neighbors.  It is linear, so
    it needs no norm before it.  It is not dropped by stochastic depth and does not start at zero: clustering depends on
    it in every block, so a block without it would be another function rather than a shallower network.
    """

    def __init__(self, dim, num_heads, iterations=3, drop_path=0.0):
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.initial = InitialCenters(dim)
        self.cluster = RecurrentCrossAttentionClustering(dim, num_heads, iterations)
        self.dispatch = FeatureDispatching(dim, num_heads)
        self.mlp = prenorm_mlp(dim, TOKEN_RATIO)
        self.drop_path = drop_path

    def add(self, x, branch):
        """x + branch.  In training, each image loses the branch with probability drop_path (stochastic depth)."""
        if self.training and self.drop_path:
            keep = torch.rand(x.shape[0], 1, 1, 1, device=x.device) >= self.drop_path
            branch = branch * (keep / (1 - self.drop_path))
        return x + branch

    def forward(self, x, layout):
        """x: map (B, H, W, D).  layout: of this map.  Returns a map of the same shape."""
        x = mask_padding(x, layout)
        x = x + self.depthwise(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        tokens = self.norm(x)
        bias = center_bias(layout.center_mask)
        # centers (B, K, D), assignment (B, h, K, N)
        centers, assignment = self.cluster(self.initial(tokens, layout), tokens, layout.token_mask, bias)
        x = self.add(x, self.dispatch(centers, assignment).view_as(x))
        return self.add(x, self.mlp(x))


# ---------------------------------------------------------------------------------------------------------------
# 5. The backbone
# ---------------------------------------------------------------------------------------------------------------
def check_images(images):
    """Raise ValueError unless images are a float tensor (B, 3, H, W) with H, W >= 32, or a list of (3, H, W)."""
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
    """Put a list of images into one tensor.

    images: (B, 3, H, W), or a list of (3, H, W) of any sizes.
    Returns (B, 3, H, W), padded with zeros at the bottom and right, and the sizes, (B, 2) int64 in pixels on the CPU,
    or None if all images have the same size.
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
    """Pad (B, C, H, W) with zeros at the bottom and right, so that H and W are divisible."""
    return F.pad(images, (0, -images.shape[-1] % multiple, 0, -images.shape[-2] % multiple))


class Backbone(nn.Module):
    """Four stages of cluster blocks.  Its four maps drop into any detector; backbone.channels are their widths.

    One image of 224 x 224 in Tiny, with the K centers that each block starts and forgets:

        image      3 x 224 x 224
          | stem: two 3 x 3 / 2 convolutions, + coordinates
        stage 1   96 x  56 x  56   2 blocks   stride  4   K = 10 x 10   N = 3136
          | norm, 3 x 3 / 2 convolution
        stage 2  192 x  28 x  28   2 blocks   stride  8   K = 10 x 10   N =  784
          | norm, 3 x 3 / 2 convolution
        stage 3  384 x  14 x  14   6 blocks   stride 16   K =  7 x  7   N =  196
          | norm, 3 x 3 / 2 convolution
        stage 4  768 x   7 x   7   2 blocks   stride 32   K =  4 x  4   N =   49

    Paper (Figure 2a): four stages, each clustering and dispatching; depths and widths of Swin.  Ours: the stem (the release
    has one 4 x 4 / 4 convolution, which needs more steps to find edges) and the way positions enter (the release
    appends coordinates to the RGB channels; what we read of the paper does not say).
    """

    def __init__(self, depths, channels, patch_size=4, iterations=3, drop_path=0.0):
        super().__init__()
        self.channels, self.strides = tuple(channels), tuple(patch_size * 2**i for i in range(4))
        # Normalization is part of the model: wherever the file is copied, images go in as RGB in [0, 1].
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))  # of ImageNet
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels[0], 3, stride=patch_size // 2, padding=1),
            nn.GELU(),
            nn.Conv2d(channels[0], channels[0], 3, stride=2, padding=1),
        )
        # Ours.  Neighboring pixels are nearly equal, so random filters mostly respond to brightness.  Three quarters of
        # the first layer's filters are zero-centered and scaled by 5, so that they respond to contrast from the start.
        # Batch normalization would help too, but it would make an image depend on the others in its batch.
        edges = self.stem[0].weight.data[channels[0] // 4 :]  # a view: (3/4 of the filters, 3, 3, 3)
        edges.sub_(edges.mean((2, 3), keepdim=True)).mul_(5)
        self.coordinates = nn.Linear(2, channels[0], bias=False)
        self.embed_norm = nn.LayerNorm(channels[0])
        rates = torch.linspace(0, drop_path, sum(depths)).tolist()  # deeper blocks are dropped more often
        self.stages, self.downsample_norms, self.downsamples = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for i, (depth, dim) in enumerate(zip(depths, channels)):
            if i > 0:
                self.downsample_norms.append(nn.LayerNorm(channels[i - 1]))
                self.downsamples.append(nn.Conv2d(channels[i - 1], dim, 3, stride=2, padding=1))
            blocks = [ClusterBlock(dim, max(1, dim // HEAD_DIM), iterations, drop_path=rates.pop(0)) for _ in range(depth)]
            self.stages.append(nn.ModuleList(blocks))

    def embed(self, images, sizes):
        """Turn pixels into tokens, which hold what is there and where in the image it is.

        images: (B, 3, H, W) in pixels.  sizes: (B, 2) in pixels, or None.  Returns a map (B, H, W, D) and its layout.
        """
        x = (images - self.mean) / self.std
        if sizes is not None:  # zeros after normalization: padding then looks like the border of any convolution
            x = x * image_mask(*x.shape[-2:], to_device(sizes, x.device))[:, None]
            sizes = -(-sizes // self.strides[0])
        # No mask is needed between the two convolutions.  A 3 x 3 / 2 convolution reads rows 2i - 1 .. 2i + 1, and sides
        # that are padded to a multiple of the patch are even: it never reads past the last row of an image's last token.
        x = self.stem(pad_to_multiple(x, self.strides[0])).permute(0, 2, 3, 1)  # (B, H, W, D)
        layout = make_layout(x.shape[1], x.shape[2], sizes, x.device)
        y, x_ = torch.broadcast_tensors(layout.y[:, :, None], layout.x[:, None])
        return self.embed_norm(x + self.coordinates(torch.stack([y, x_], -1))), layout

    def features(self, images, sizes=None):
        """Like forward, but for heads that go on with tokens: four maps (B, H, W, C), and their four layouts."""
        x, layout = self.embed(images, sizes)
        maps, layouts = [], []
        for i, blocks in enumerate(self.stages):
            if i > 0:
                x = mask_padding(self.downsample_norms[i - 1](x), layout)
                x = self.downsamples[i - 1](x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # ceil(H / 2), ceil(W / 2)
                real = None if sizes is None else -(-sizes // self.strides[i])
                layout = make_layout(x.shape[1], x.shape[2], real, x.device)
            for block in blocks:
                x = block(x, layout)
            maps.append(x)
            layouts.append(layout)
        return maps, layouts

    def forward(self, images, sizes=None):
        """images: float RGB in [0, 1], (B, 3, H, W), or a list of (3, H, W) of any sizes >= 32 x 32.

        sizes: (B, 2) int64, heights and widths in pixels of images that are padded to one tensor; None for a list.
        Returns four maps (B, C, ceil(H / s), ceil(W / s)) at strides s = 4, 8, 16, 32.
        Raises ValueError if the images have another form.
        """
        check_images(images)
        if not isinstance(images, torch.Tensor):
            images, sizes = batch_images(images)
        maps, _ = self.features(images, None if sizes is None else sizes.cpu())
        return [x.permute(0, 3, 1, 2) for x in maps]


# ---------------------------------------------------------------------------------------------------------------
# 6. Classification
# ---------------------------------------------------------------------------------------------------------------
class ClassificationHead(nn.Module):
    """Cluster the last map once more, and average what the clusters say.

        logits = bias + classifier weight * mean_k norm(C_k)

    Ours; what we read of the paper does not describe this head.  After the norm everything is linear, so a logit is
    exactly the bias plus one contribution per center.  A center is in turn a sum of tokens: C(0) is the mean of a cell,
    and each M-step adds a mean of values.  With the weights of these means and the norm's divisor held as they came out, a
    contribution is a sum over tokens: an explanation that adds up (explain() in eval.py).  This is also why these
    centers have no FFN at the start: C(0) would no longer be a sum of tokens.
    """

    def __init__(self, backbone, size, num_classes, iterations, label_smoothing, things):
        super().__init__()
        dim, self.label_smoothing = backbone.channels[-1], label_smoothing
        self.norm = nn.LayerNorm(dim)
        self.initial = InitialCenters(dim, ffn=False)
        self.cluster = RecurrentCrossAttentionClustering(dim, max(1, dim // HEAD_DIM), iterations)
        self.center_norm = nn.LayerNorm(dim)
        self.classifier = nn.Linear(dim, num_classes)

    def forward(self, maps, layouts):
        """maps: of the backbone, (B, H, W, C).  Only the last one is used.  Returns {"logits": (B, num_classes)}."""
        tokens, layout = self.norm(maps[-1]), layouts[-1]
        bias = center_bias(layout.center_mask)
        centers, _ = self.cluster(self.initial(tokens, layout), tokens, layout.token_mask, bias)
        centers = self.center_norm(centers)  # (B, K, D)
        if layout.center_mask is None:
            mean = centers.mean(1)  # (B, D)
        else:
            real = layout.center_mask[..., None].to(centers.dtype)
            mean = (centers * real).sum(1) / real.sum(1)
        with torch.autocast(mean.device.type, enabled=False):  # bfloat16 would give likely classes equal logits
            return {"logits": self.classifier(mean.to(self.classifier.weight.dtype))}

    def loss(self, output, targets):
        """Cross-entropy, summed over images.  targets: (B,) int64 classes, or (B, num_classes) float probabilities."""
        logits = output["logits"].float()
        return {"label": F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing, reduction="sum")}

    def count(self, targets):
        """Number of images."""
        return len(targets)

    def predict(self, output, image_sizes, sizes):
        """The five most likely classes of each image, highest score first."""
        probability = output["logits"].float().softmax(-1)
        scores, labels = probability.topk(min(5, probability.shape[1]))
        return [{"scores": s, "labels": l} for s, l in zip(scores, labels)]


# ---------------------------------------------------------------------------------------------------------------
# 7. Detection and segmentation: neck, boxes, and priors.  Here a cluster is an object
#
# Paper (abstract; recalled): the dense tasks are solved by the same clustering, in a decoder of six layers of recurrent
# cross-attention with 100 centers.  What we read says no more, so everything else in sections 7 to 11 is taken from
# the work that is named beside it, or ours.
# ---------------------------------------------------------------------------------------------------------------
class Neck(nn.Module):
    """Maps of one width D.  Each knows what the coarser maps see.  After FPN (Lin et al., 2017).

        x_s   = lateral(norm(I_s)) + upsampled top_down(norm(out_2s))       from the coarsest map to the finest
        out_s = x_s + DepthwiseConv(x_s)                                    s: stride

    Ours: the top-down path starts at zero.  Coarse features become useful late, and would only add noise before that.
    Only the convolution needs padding to be zero: all else works token by token.
    """

    def __init__(self, channels, dim):
        super().__init__()
        self.laterals = nn.ModuleList(nn.Sequential(nn.LayerNorm(c), nn.Linear(c, dim)) for c in channels)
        self.top_down = nn.ModuleList(nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim)) for _ in channels[1:])
        for branch in self.top_down:
            nn.init.zeros_(branch[-1].weight)
            nn.init.zeros_(branch[-1].bias)
        self.depthwise = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1, groups=dim) for _ in channels)

    def forward(self, maps, layouts):
        """maps: (B, H, W, C) of each stride, fine to coarse.  layouts: of these.  Returns as many maps (B, H, W, D)."""
        outputs = []
        for i in reversed(range(len(maps))):
            x = self.laterals[i](maps[i])
            if outputs:
                coarse = self.top_down[i](outputs[-1]).repeat_interleave(2, 1).repeat_interleave(2, 2)
                x = x + coarse[:, : x.shape[1], : x.shape[2]]  # token (i, j) lies in token (i // 2, j // 2)
            x = mask_padding(x, layouts[i])
            outputs.append(x + self.depthwise[i](x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return outputs[::-1]


def cell_boxes(layout):
    """Boxes of the grid's cells, where the decoder's centers start: (B or 1, K, 4) float32, cxcywh as fractions.

    Ours.  The box follows from the mean and the variance of the positions in a cell: a side of length L that is evenly
    covered has the variance L^2 / 12.
    """
    centers, sides = [], []
    for pool, position in ((layout.column_pool, layout.x), (layout.row_pool, layout.y)):  # (B, k, W), (B, W); then H
        mean = (pool * position[:, None]).sum(-1)  # (B, k)
        variance = (pool * (position[:, None] - mean[..., None]) ** 2).sum(-1)
        half_token = 0.5 + position[:, :1]  # the first position is half a token from the border, at -0.5
        centers.append(mean + 0.5)
        sides.append((12 * variance + 4 * half_token**2).sqrt())  # a token is not a point; its own side counts
    (x, y), (width, height) = centers, sides
    columns, rows = torch.stack([x, width], -1), torch.stack([y, height], -1)  # (B, kw, 2), (B, kh, 2)
    columns, rows = torch.broadcast_tensors(columns[:, None], rows[:, :, None])  # (B, kh, kw, 2) each
    return torch.stack([columns, rows], -1).flatten(3).flatten(1, 2)  # (x, y, width, height)


def cxcywh_to_xyxy(boxes):
    """(..., 4) center x, y, width, height -> left, top, right, bottom."""
    center, sides = boxes[..., :2], boxes[..., 2:]
    return torch.cat([center - sides / 2, center + sides / 2], -1)


def iou_and_giou(a, b):
    """IoU and generalized IoU (Rezatofighi et al., 2019), which is negative for boxes that lie apart.

    a, b: (..., 4) xyxy, of shapes that broadcast.  Returns two tensors (...).
    """
    shared = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - shared
    iou = shared / union.clamp(min=1e-9)
    return iou, iou - (hull - union) / hull.clamp(min=1e-9)


def pairwise_iou(boxes):
    """IoU of all pairs of boxes of an image, 0 for a box with itself.  boxes: (B, K, 4) cxcywh.  Returns (B, K, K)."""
    boxes = cxcywh_to_xyxy(boxes)
    iou, _ = iou_and_giou(boxes[:, :, None], boxes[:, None])
    return iou * (1 - torch.eye(iou.shape[1], device=iou.device))


# How a decoder layer uses a center's last box and last mask.  All of this is seen in units of the box's own sides:
#
#        left half  right half              Quadrants: head 0 clusters tokens near the point a, head 1 near b, and so on.
#       +----------+----------+             Each prior is a Gaussian whose sigma is half of the quadrant's side.
#       |          |          |
#       |    a     |    b     |             Distance: 0 in the middle of the box (+), 1 in the middle of each side,
#       |          |          |             2 in the corners, 8 in the corners of a box of twice the size.
#       +----------+----------+
#       |          |          |             Mask samples: 12 x 12 points, from a tenth of a side outside of the box on
#       |    c     |    d     |             one side to a tenth outside on the other.  The classifier sees an object's
#       |          |          |             silhouette there, at the same scale for small and large objects.
#       +----------+----------+
def box_distance(boxes, layout):
    """Squared distance of positions from the centers of boxes, in units of half a side.  Ours.

    boxes: (B, K, 4) cxcywh as fractions of the image.  Returns (B, K, H, W).
    """
    x, y, width, height = boxes.float().unsqueeze(-1).unbind(2)  # (B, K, 1) each
    # No side is shorter than 1 % of the image: the distance would explode.
    horizontal = ((layout.x[:, None] + 0.5 - x) / (width.clamp(min=0.01) / 2)) ** 2  # (B, K, W)
    vertical = ((layout.y[:, None] + 0.5 - y) / (height.clamp(min=0.01) / 2)) ** 2  # (B, K, H)
    return vertical[..., None] + horizontal[:, :, None]


QUADRANTS = (-0.25, -0.25), (0.25, -0.25), (-0.25, 0.25), (0.25, 0.25)  # their centers, (x, y) from the box's, in sides


def box_prior(boxes, layout):
    """Log of a Gaussian over one quadrant of the box per head: where a center looks for its tokens.

    After SMCA (Gao et al., 2021), which adds a Gaussian around a predicted point to the attention logits.
    Ours: one quadrant per head.  A mean over a whole object says what it is made of, but not how it is arranged.  With four
    heads on four quadrants, a corner at the top left and a corner at the bottom right are different features.
    boxes: (B, K, 4) cxcywh as fractions of the image.  Returns (4, B, N, K).
    """
    x, y, width, height = boxes.unbind(-1)  # (B, K) each
    # A quadrant is at least one token wide: 1 + 2 * position[0] is a token's side.  A narrower one could lie between the
    # tokens, and all of them would be equally far away: the center would collect the whole image.
    widths = torch.maximum(width / 2, 1 + 2 * layout.x[:, :1])
    heights = torch.maximum(height / 2, 1 + 2 * layout.y[:, :1])
    quadrants = [torch.stack([x + right * width, y + down * height, widths, heights], -1) for right, down in QUADRANTS]
    # A Gaussian is -z^2 / 2 with z in sigmas.  The distance is in half sides and sigma is a quarter of... see below.
    prior = torch.stack([-2 * box_distance(quadrant, layout).flatten(2).mT for quadrant in quadrants])
    # At least -20: if all tokens were farther, their weights and their sum would be 0 in float32.
    return prior.clamp(min=-20)


def mask_prior(masks, finest, factor):
    """Log-probability of the last mask, averaged over each token.  A soft form of Mask2Former's masked attention (2022).

    A box also holds what is around an object and in front of it; the mask does not.
    masks: logits (B, K, H, W).  finest: layout of the masks.  factor: how many of their pixels per side make a token.
    Returns (B, N, K).  It is at least -10, so a center whose mask is wrong still sees the rest of its box.
    """
    pool = lambda x: F.avg_pool2d(x, factor, ceil_mode=True)  # at the border, the mean of the pixels that exist
    masks = masks.float()
    if finest.token_mask is None:
        masks = pool(masks)
    else:  # the mean over real pixels
        real = finest.token_mask[:, None].float()
        masks = pool(masks * real) / pool(real).clamp(min=1e-6)
    return F.logsigmoid(masks).clamp(min=-10).flatten(2).mT


# ---------------------------------------------------------------------------------------------------------------
# 8. The decoder: centers find their objects, layer by layer
# ---------------------------------------------------------------------------------------------------------------
class DecoderLayer(nn.Module):
    """Centers collect tokens from one map, then look at each other.

        C, M = cluster(norm(C), I)     bias: the log prior of box and mask.  Paper: recurrent cross-attention clustering
        C    = C + attention(norm(C))  bias: overlap of the boxes.  Attention as in DETR (Carion et al., 2020); bias ours
        C    = C + FFN(C)              DETR

    The first line returns norm(C) plus the means, so C is renormalized in every layer and cannot grow with depth.

    Overlap raises attention, which does not move anything.  Centers whose boxes overlap may hold the same object, and they must
    see each other to decide which of them keeps it.
    """

    def __init__(self, dim, iterations=3):
        super().__init__()
        self.norm, self.attention_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        # Scale 2 instead of the backbone's 10: an object is collected whole, parts that look different included.
        self.cluster = RecurrentCrossAttentionClustering(dim, len(QUADRANTS), iterations, scale=2.0)
        self.attention = nn.MultiheadAttention(dim, max(1, dim // 32), batch_first=True)
        # One factor per head, from 0 (overlap does not matter) to 8 (equal boxes get e^8 times the attention).
        self.overlap = nn.Parameter(torch.linspace(0, 8, self.attention.num_heads))
        self.ffn = prenorm_mlp(dim, 4)

    def forward(self, centers, boxes, tokens, layout, center_mask=None, masks=None):
        """centers: (B, K, D).  boxes: (B, K, 4), their last boxes.  tokens: map (B, H, W, D).  layout: of this map.

        center_mask: bool (B, K), or None.  masks: mask_prior of their last masks, (B, N, K), or None.
        Returns the centers, (B, K, D).
        """
        bias = box_prior(boxes, layout)  # (4, B, N, K)
        if masks is not None:
            bias = bias + masks
        if center_mask is not None:
            bias = bias + center_bias(center_mask)
        centers, _ = self.cluster(self.norm(centers), tokens, layout.token_mask, bias)
        x = self.attention_norm(centers)
        bias = self.overlap[:, None, None] * pairwise_iou(boxes)[:, None]  # (B, heads, K, K)
        if center_mask is not None:
            bias = bias.masked_fill(~center_mask[:, None, None], -torch.inf)
        centers = centers + self.attention(x, x, x, attn_mask=bias.flatten(0, 1), need_weights=False)[0]
        return centers + self.ffn(centers)


def class_probability(logits):
    """Softmax over the classes and "no object", whose logit is 0 (DETR).  (..., classes) -> (..., classes).

    DETR's successors use a sigmoid and the focal loss.  With these, centers learn to predict "no object" long before
    they learn to discriminate classes, which costs short training runs dearly.
    """
    return F.pad(logits.float(), (0, 1)).softmax(-1)[..., :-1]


def mlp(dim, out):
    """D -> D -> D -> out.  No norm and no residual, unlike prenorm_mlp."""
    return nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, out))


class BoxHead(nn.Module):
    """The box of a center: its anchor, moved and stretched in units of its sides, then clipped to the image.

    After Deformable DETR (Zhu et al., 2021), where each layer refines the last box.  Ours: units of the anchor's sides.
    What a center has collected lies in quadrants of the anchor, so the same features ask for the same correction,
    wherever and however large the object is.
    """

    def __init__(self, dim):
        super().__init__()
        self.delta = mlp(dim, 4)
        nn.init.zeros_(self.delta[-1].weight)  # the first prediction is the anchor itself
        nn.init.zeros_(self.delta[-1].bias)

    def forward(self, centers, anchors):
        """centers: (B, K, D).  anchors: (B, K, 4) cxcywh as fractions of the image.  Returns boxes of the same form."""
        move, stretch = self.delta(centers).float().chunk(2, -1)
        center, sides = anchors[..., :2], anchors[..., 2:].clamp(min=0.01)
        center, sides = center + sides * move, sides * stretch.clamp(max=4).exp()  # e^4: from 2 % of the image to all
        low, high = cxcywh_to_xyxy(torch.cat([center, sides], -1)).clamp(0, 1).chunk(2, -1)
        return torch.cat([(low + high) / 2, high - low], -1)


class MaskHead(nn.Module):
    """The mask of a center: pixels whose embedding E matches the center, and that are not far from its box.

        mask logits = MLP(C) . E - 2 * falloff(C) * min(distance, 8)            distance: box_distance

    The dot product is Mask2Former's (Cheng et al., 2022).  Ours: the distance.  A center predicts its own falloff > 0: large
    for one object among similar ones, small for the sky.

    Ours: in training, every pixel also predicts its class.  A mask only helps the pixels once it has found its class and
    its object; this loss tells the pixels from the first step which of them differ.
    """

    def __init__(self, dim, num_classes):
        super().__init__()
        self.pixel_classifier = nn.Linear(dim, num_classes)
        self.mlp = prenorm_mlp(dim, TOKEN_RATIO)
        self.pixel = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim))
        self.center = mlp(dim, dim)
        self.falloff = nn.Linear(dim, 1)
        nn.init.zeros_(self.falloff.weight)
        nn.init.constant_(self.falloff.bias, math.log(0.25))  # at first, -0.5 at a side's middle and -1 at a corner

    def embed_pixels(self, x):
        """Pixel embeddings E, (B, H, W, D), from the neck's finest map (B, H, W, D).  All layers share them."""
        return self.pixel(x + self.mlp(x))

    def forward(self, centers, boxes, embeddings, layout):
        """centers: (B, K, D).  boxes: (B, K, 4).  embeddings: (B, H, W, D).  Returns mask logits (B, K, H, W)."""
        falloff = self.falloff(centers).float().exp()[..., None]  # (B, K, 1, 1)
        distance = box_distance(boxes, layout).clamp(max=8)  # beyond twice the box, farther is no worse
        masks = torch.einsum("bkd,bhwd->bkhw", self.center(centers), embeddings)
        return masks - (2 * falloff * distance).to(masks.dtype)


MASK_SAMPLES = 12  # per side: enough to tell a star from a disc, and 144 inputs for the classifier


def mask_samples(masks, boxes, layout):
    """Sample masks on a regular grid over their boxes, as RoIAlign does for features (He et al., 2017).  Ours.

    masks: logits (B, K, H, W).  boxes: (B, K, 4) cxcywh as fractions of the image.  layout: of the masks.
    Returns (B, K, 12 * 12), row by row: 0.5 inside of the mask, -0.5 outside of it, 0 beyond the image.
    """
    pools = []
    for axis, position in enumerate((layout.x, layout.y)):
        center, side = boxes[..., axis, None].float(), boxes[..., axis + 2, None].float()  # (B, K, 1)
        # The grid covers 1.2 sides: the border of the mask matters, and the box may be slightly too small.
        samples = center + side * torch.linspace(-0.6, 0.6, MASK_SAMPLES, device=boxes.device)  # (B, K, 12)
        token = 1 + 2 * position[:, :1, None]  # side of a token as a fraction of the image, (B or 1, 1, 1)
        reach = torch.maximum(side * 1.2 / (MASK_SAMPLES - 1), token)  # in large boxes a sample averages many tokens
        distance = (position[:, None, None] + 0.5 - samples[..., None]).abs() / reach[..., None]
        pool = (1 - distance).clamp(min=0)  # (B, K, 12, W), then H: linear interpolation
        pools.append(pool / pool.sum(-1, keepdim=True).clamp(min=1))
    columns, rows = pools
    inside = masks.float().sigmoid() - 0.5
    if layout.token_mask is not None:
        inside = inside * layout.token_mask[:, None]
    return (rows @ inside @ columns.mT).flatten(2)


class Decoder(nn.Module):
    """100 centers and six layers (Paper; nano has three).  Every layer predicts, and the next one starts from there.

        map at stride 8 --initial--> C (B, 100, D)      boxes: the cells of a 10 x 10 grid
                                        |
              +------------------------>+
              |                         v
              |        predict: box (from the last box), mask (with the new box), class (with the new mask)
              |                         |
              |           box, mask --> prior     <-- no gradient from one layer to another
              |                         v
              +----- C <---- DecoderLayer <---- map at stride 32, 16, 8, 32, 16, 8 in turn

    Every prediction is trained (deep supervision, DETR).  The order of maps is Mask2Former's.  Boxes also serve the tasks that
    do not ask for them, as priors.
    Ours: the classifier sees a center and samples of its own mask.  Means forget a silhouette; a mask has it.
    """

    def __init__(self, dim, levels, num_classes, iterations, with_masks):
        super().__init__()
        self.levels = levels
        self.token_norm = nn.LayerNorm(dim)
        self.initial = InitialCenters(dim)
        self.layers = nn.ModuleList(DecoderLayer(dim, iterations) for _ in levels)
        self.norm = nn.LayerNorm(dim)
        self.classifier = nn.Linear(dim, num_classes)
        # e^bias summed over the classes is 1/9: at first "no object" has 0.9, which is right for most centers.
        nn.init.constant_(self.classifier.bias, -math.log(9 * num_classes))
        self.box_head = BoxHead(dim)
        self.mask_head = self.mask_classifier = None
        if with_masks:
            self.mask_head = MaskHead(dim, num_classes)
            self.mask_classifier = nn.Sequential(
                nn.Linear(MASK_SAMPLES**2, 2 * dim), nn.GELU(), nn.Linear(2 * dim, num_classes)
            )
            nn.init.zeros_(self.mask_classifier[-1].weight)
            nn.init.zeros_(self.mask_classifier[-1].bias)

    def predict_centers(self, centers, anchors, embeddings, layout, center_mask):
        """Boxes, masks (if the task has them) and class logits of centers (B, K, D), as a dictionary.

        anchors: (B, K, 4).  embeddings: (B, H, W, D).  layout: of the embeddings.
        """
        x = self.norm(centers)
        output = dict(boxes=self.box_head(x, anchors))
        if self.mask_head:
            boxes = output["boxes"].detach()
            output["masks"] = self.mask_head(x, boxes, embeddings, layout)
            samples = mask_samples(output["masks"].detach(), boxes, layout)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would give many centers equal scores
            output["logits"] = self.classifier(x.to(self.classifier.weight.dtype))
            if self.mask_head:
                output["logits"] = output["logits"] + self.mask_classifier(samples.to(self.classifier.weight.dtype))
        if center_mask is not None:  # a center that an image does not have gets the probability e^-100
            output["logits"] = output["logits"].masked_fill(~center_mask[..., None], -100.0)
        return output

    def forward(self, maps, layouts):
        """maps: of the neck, (B, H, W, D), fine to coarse; the last three are at strides 8, 16, 32.  layouts: of these.

        Returns a list of predictions: before the first layer, and after each.
        """
        embeddings = self.mask_head.embed_pixels(maps[0]) if self.mask_head else None
        finest, layouts, tokens = layouts[0], layouts[-3:], [self.token_norm(x) for x in maps[-3:]]
        # A cell of one token is enough here (the backbone asks for two): a center is not bound to its cell, and an
        # image of few tokens can still hold many objects.
        grid = make_layout(*maps[-3].shape[1:3], layouts[0].sizes, maps[0].device, min_cell=1)
        centers = self.initial(tokens[0], grid)
        boxes = cell_boxes(grid).expand(len(centers), -1, -1)  # (B, K, 4)
        outputs = [self.predict_centers(centers, boxes, embeddings, finest, grid.center_mask)]
        for level, layer in zip(self.levels, self.layers):
            boxes = outputs[-1]["boxes"].detach()  # a layer is trained by its own losses only
            masks = None
            if self.mask_head and len(outputs) > 1:  # the first masks mean little: their centers have seen one cell
                masks = mask_prior(outputs[-1]["masks"].detach(), finest, 2**level)
            centers = layer(centers, boxes, tokens[level - 1], layouts[level - 1], grid.center_mask, masks)
            outputs.append(self.predict_centers(centers, boxes, embeddings, finest, grid.center_mask))
        if self.training and self.mask_head:
            outputs[-1]["pixels"] = self.mask_head.pixel_classifier(embeddings).permute(0, 3, 1, 2)
        return outputs


# ---------------------------------------------------------------------------------------------------------------
# 9. Matching and losses of the dense tasks
#
# Every loss is a sum over targets.  What it is divided by, the number of targets in the batches of all processes, no
# process knows alone: see ClusterFormer.count.
# ---------------------------------------------------------------------------------------------------------------
MATCHES_PER_TARGET = 6, 4, 2  # centers per target in the first layers; one in the others, and always in the last
# All but the last as in DETR, Mask2Former and Mask DINO; the last is ours.
LOSS_WEIGHTS = dict(label=2.0, l1=5.0, giou=2.0, mask=5.0, dice=5.0, pixel=20.0)
NO_OBJECT_WEIGHT = 0.1  # of a center without a target: there are a dozen or more of these for each one that has a target
NUM_POINTS = 12_544  # where a mask is compared (Mask2Former); all 65,536 of a 1024 x 1024 image take five times the memory


def num_points(masks):
    """Number of points at which masks (..., h, w) at stride 4 are compared.

    NUM_POINTS from 512 x 512 pixels on; on smaller images a quarter of the pixels, so that points do not crowd.
    """
    pixels = masks.shape[-2] * masks.shape[-1]
    return NUM_POINTS if pixels >= 128 * 128 else pixels // 4


def hungarian(cost):
    """Give every row its own column at the least total cost, by shortest augmenting paths (Jonker and Volgenant, 1987).

    cost: float64 NumPy (n, m), n <= m.  Returns the column of each row, int64 (n,).
    Rows are targets, and an image has few of them: the loop is over rows, and NumPy handles all columns at once.
    """
    n, m = cost.shape
    if not np.isfinite(cost).all():
        return np.arange(n)  # any assignment will do: the loss will not be finite either
    row_price, column_price = np.zeros(n), np.zeros(m)
    owner = np.full(m, -1)  # the row that holds each column
    for row in range(n):
        distance, before, done = np.full(m, np.inf), np.full(m, -1), np.zeros(m, bool)
        column, at, traveled = -1, row, 0.0
        while True:  # Dijkstra's search for the nearest free column; from a taken column it goes on from its owner
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
        while column >= 0:  # each column on the path moves to the row before it
            previous = before[column]
            owner[column] = row if previous < 0 else owner[previous]
            column = previous
    columns = np.full(n, -1)
    columns[owner[owner >= 0]] = np.flatnonzero(owner >= 0)
    return columns


def coverage(masks, truth, stride):
    """How many times the height and width of an image (truth (n, H, W)) its padded masks (m, h, w) at a stride cover."""
    return [stride * padded / real for padded, real in zip(masks.shape[1:], truth.shape[1:])]


def sample_points(maps, points, cover=(1.0, 1.0)):
    """Bilinear samples of maps.

    maps: (n, h, w).  points: (n or 1, P, 2), x and y as fractions of an image.  cover: height and width of the maps in
    units of the image's: more than 1 if they are padded.  Returns (n, P).
    """
    grid = torch.stack([points[..., 0] * (2 / cover[1]) - 1, points[..., 1] * (2 / cover[0]) - 1], -1)
    if not len(maps):
        return maps.new_zeros(0, points.shape[1])
    if len(points) == 1:  # the same points for all maps, which are then channels of one
        return F.grid_sample(maps[None], grid[:, None], padding_mode="border", align_corners=False)[0, :, 0]
    return F.grid_sample(maps[:, None], grid[:, None], padding_mode="border", align_corners=False)[:, 0, 0]


def uncertain_points(logits, count, cover):
    """Random points, (n, count, 2) as fractions of the image; three of four where a mask is least certain.

    After PointRend (Kirillov et al., 2020).  A mask is decided at its border, which holds few of its pixels.
    """
    points = torch.rand(len(logits), 3 * count, 2, device=logits.device)
    certainty = sample_points(logits, points, cover).abs()  # (n, 3 count)
    uncertain = (-certainty).topk(3 * count // 4, dim=1).indices[..., None].expand(-1, -1, 2)
    rest = torch.rand(len(logits), count - uncertain.shape[1], 2, device=logits.device)
    return torch.cat([points.gather(1, uncertain), rest], 1)


@torch.no_grad()
def matching_cost(output, target, stride, box_classes=None):
    """What each pair of target and center would cost, by the losses below (DETR, Mask2Former).

    output: predictions of one image's centers, of any number of layers, (n centers, ...).  box_classes: as in set_losses.
    Returns (targets, centers) float32, infinite for centers that the image does not have.
    """
    labels, boxes, truth = target["labels"], output["boxes"].float(), target["boxes"]
    cost = -LOSS_WEIGHTS["label"] * class_probability(output["logits"])[:, labels].T
    _, giou = iou_and_giou(cxcywh_to_xyxy(truth)[:, None], cxcywh_to_xyxy(boxes))
    box_cost = LOSS_WEIGHTS["l1"] * torch.cdist(truth, boxes, p=1) - LOSS_WEIGHTS["giou"] * giou
    cost += box_cost if box_classes is None else box_cost * box_classes[labels, None]
    if "masks" in output:
        masks, truth = output["masks"].float(), target["masks"].float()
        points = torch.rand(1, num_points(masks), 2, device=masks.device)
        logits = sample_points(masks, points, coverage(masks, truth, stride))  # (centers, P)
        truth = sample_points(truth, points)  # (targets, P)
        # Binary cross-entropy is softplus(x) - x y, so that all pairs are one matrix product.
        entropy = (F.softplus(logits).sum(1) - truth @ logits.T) / logits.shape[1]
        probability = logits.sigmoid()
        dice = 1 - (2 * truth @ probability.T + 1) / (truth.sum(1)[:, None] + probability.sum(1) + 1)
        cost += LOSS_WEIGHTS["mask"] * entropy + LOSS_WEIGHTS["dice"] * dice
    return cost.masked_fill(output["logits"].amax(1) <= -100, torch.inf)


def matches_per_target(num_layers, centers, targets):
    """How many centers a target of an image gets in each layer: never so many that most centers have a target."""
    most = max(1, centers // (2 * max(1, targets)))
    return [min(times, most) for times in [*MATCHES_PER_TARGET, *[1] * num_layers][: num_layers - 1]] + [1]


def match(outputs, targets, stride, box_classes=None):
    """Match every target with a center in each layer, and with several in the first layers.

    One-to-one matching (DETR) is what teaches centers to leave an object to one of them.  One-to-many matching gives
    several times the gradient, and H-DETR (Jia et al., 2023) adds extra queries for it.  Ours: the first layers use it for
    all centers, since their predictions are not the final ones.
    If an image has more targets than centers, the smallest targets are left out.
    outputs: (B, L, K, ...), predictions of L layers.  Returns for each image layer, center and target of its m matches,
    int64 (m,), and their weight, float32 (m,): one over the number of centers that the target has in that layer.
    """
    L, K = outputs["logits"].shape[1:3]
    parts = [{key: value.flatten(0, 1) for key, value in zip(outputs, image)} for image in zip(*outputs.values())]
    costs = [matching_cost(part, target, stride, box_classes) for part, target in zip(parts, targets)]
    costs = torch.cat(costs).cpu().double().split([len(cost) for cost in costs])  # one copy, so one wait for the GPU
    tables = []
    for cost, target in zip(costs, targets):
        cost = cost.unflatten(1, (L, K)).numpy()  # (n, L, K)
        centers = np.flatnonzero(~np.isposinf(cost).any((0, 1)))
        kept = np.arange(len(cost))
        if len(cost) > len(centers):
            areas = target["masks"].flatten(1).sum(1) if "masks" in target else target["boxes"][:, 2:].prod(1)
            kept = np.sort(areas.argsort(descending=True)[: len(centers)].cpu().numpy())
        rows = [np.zeros((0, 4))]
        for layer, times in enumerate(matches_per_target(L, len(centers), len(kept))):
            chosen = centers[hungarian(np.tile(cost[kept, layer][:, centers], (times, 1)))]
            owners = np.tile(kept, times)
            rows.append(np.stack([np.full(len(chosen), layer), chosen, owners, np.full(len(chosen), 1 / times)], 1))
        tables.append(torch.from_numpy(np.concatenate(rows)).float())
    table = to_device(torch.cat(tables), outputs["logits"].device)
    return [(*part[:, :3].long().unbind(1), part[:, 3]) for part in table.split([len(part) for part in tables])]


def mask_losses(masks, targets, matches, stride):
    """Binary cross-entropy and dice loss of matched masks at sampled points (Mask2Former), as sums over targets.

    masks: logits (B, L, K, h, w).  targets: as in ClusterFormer.loss.  matches: from match().
    """
    entropy = dice = 0.0 * masks.sum()  # without targets, too, every parameter gets a gradient: DDP waits for it
    # Looping over `masks` gives it one gradient; masks[i] would make one of its full size for each i.
    for image, predicted, (layer, center, target, weight) in zip(targets, masks, matches):
        logits, truth = predicted[layer, center].float(), image["masks"]  # (m, h, w), (n, H, W)
        cover = coverage(logits, truth, stride)
        points = uncertain_points(logits.detach(), num_points(logits), cover)
        x, y = ((points[..., axis] * truth.shape[2 - axis]).long() for axis in (0, 1))  # (m, P)
        logits, truth = sample_points(logits, points, cover), truth[target[:, None], y, x].float()  # (m, P)
        entropy = entropy + F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1) @ weight
        probability = logits.sigmoid()
        shared = 2 * (probability * truth).sum(1) + 1  # + 1: a small mask may have no point
        dice = dice + (1 - shared / (probability.sum(1) + truth.sum(1) + 1)) @ weight
    return entropy, dice


def pixel_loss(pixels, targets, stride):
    """Cross-entropy of the pixels' classes, averaged over each target's pixels, so that small targets count as much.  Ours.

    pixels: logits (B, classes, h, w).  Pixels without a target (background, not labeled) have no loss.
    """
    costs = -pixels.float().log_softmax(1)
    loss = 0.0 * costs.sum()
    for image, cost in zip(targets, costs):
        height, width = image["masks"].shape[1:]
        padding = 0, stride * cost.shape[2] - width, 0, stride * cost.shape[1] - height
        weights = F.avg_pool2d(F.pad(image["masks"][:, None].float(), padding), stride)[:, 0]  # (n, h, w)
        weights = weights / weights.sum((1, 2), keepdim=True).clamp(min=1e-6)
        loss = loss + (cost[image["labels"]] * weights).sum()
    return loss


def set_losses(output, targets, stride, box_classes=None):
    """All losses of a dense task, over all layers, as weighted sums over targets.

    output: of the model.  targets: as in ClusterFormer.loss.  stride: of the masks, in pixels.
    box_classes: bool (classes,), the classes whose boxes are matched and trained; None: all.
    Returns a dictionary of scalars: label, l1, giou; with masks mask, dice; and in training pixel.
    """
    layers, keys = [*output["aux"], output], [key for key in ("logits", "boxes", "masks") if key in output]
    outputs = {key: torch.stack([layer[key] for layer in layers], 1) for key in keys}  # (B, L, K, ...)
    matches = match(outputs, targets, stride, box_classes)
    layer, center, _, weight = map(torch.cat, zip(*matches))
    image = torch.cat([torch.full_like(index, i) for i, (_, _, index, _) in enumerate(matches)])
    labels = torch.cat([target["labels"][index] for target, (_, _, index, _) in zip(targets, matches)])
    logits = F.pad(outputs["logits"].float(), (0, 1))  # "no object" is the last class, with logit 0
    classes = torch.full(logits.shape[:3], logits.shape[3] - 1, device=logits.device)
    weights = torch.full(logits.shape[:3], NO_OBJECT_WEIGHT, device=logits.device)
    classes[image, layer, center], weights[image, layer, center] = labels, weight
    entropy = F.cross_entropy(logits.flatten(0, 2), classes.flatten(), reduction="none")
    losses = dict(label=entropy @ weights.flatten())
    boxes = outputs["boxes"][image, layer, center].float()
    truth = torch.cat([target["boxes"][index] for target, (_, _, index, _) in zip(targets, matches)])
    _, giou = iou_and_giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(truth))
    box_weight = weight if box_classes is None else weight * box_classes[labels]
    losses["l1"], losses["giou"] = (boxes - truth).abs().sum(1) @ box_weight, (1 - giou) @ box_weight
    if "masks" in outputs:
        losses["mask"], losses["dice"] = mask_losses(outputs["masks"], targets, matches, stride)
    if "pixels" in output:
        losses["pixel"] = pixel_loss(output["pixels"], targets, stride)
    return {name: LOSS_WEIGHTS[name] * value for name, value in losses.items()}


# ---------------------------------------------------------------------------------------------------------------
# 10. Final predictions of the dense tasks
# ---------------------------------------------------------------------------------------------------------------
def resize_masks(masks, image_size, stride, size):
    """Mask logits at the size of the final prediction.

    masks: (K, h, w) at a stride of the padded image.  image_size: (H, W) of the image without padding.  size: (H, W) wanted.
    Returns (K, H, W) float32.
    """
    height, width = image_size
    masks = masks[:, : -(-height // stride), : -(-width // stride)].float()  # crop first: padding must not bleed in
    masks = F.interpolate(masks[None], scale_factor=stride, mode="bilinear")[:, :, :height, :width]
    return masks[0] if size == image_size else F.interpolate(masks, size, mode="bilinear")[0]


def top_detections(probability, boxes, threshold=0.6):
    """The best (center, class) pairs, at most 100, without duplicates.  Ours: a last step of non-maximum suppression.

    A pair is a duplicate if a better pair of the same class, kept or not, has an IoU with it above the threshold.  A
    fully trained model rarely predicts duplicates; before that, this step removes them.
    probability: (K, classes).  boxes: (K, 4) cxcywh.  Returns scores, labels, centers, each (n,), best first.
    """
    scores, pairs = probability.flatten().topk(min(100, probability.numel()))
    centers, labels = pairs // probability.shape[1], pairs % probability.shape[1]
    overlap = pairwise_iou(boxes[None])[0][centers][:, centers] > threshold  # (n, n)
    same_class = labels[:, None] == labels
    keep = ~(overlap & same_class).triu(1).any(0)
    return scores[keep], labels[keep], centers[keep]


def semantic_map(probability, masks):
    """Class of every pixel: the largest sum, over centers, of class probability times mask (MaskFormer, 2021).

    probability: (K, classes).  masks: (K, H, W) logits.  Returns int64 (H, W).
    """
    with torch.autocast(masks.device.type, enabled=False):  # bfloat16 would give two classes equal sums
        return torch.einsum("kc,khw->chw", probability, masks.sigmoid()).argmax(0)


def panoptic_segments(probability, masks, things, threshold=0.25, overlap=0.6):
    """Segment of every pixel (MaskFormer, 2021): one segment per center for things, one per class for stuff.

    Centers below the threshold (Mask DINO's) are dropped.  A pixel goes to the center with the largest probability times
    mask.  A center that wins less than `overlap` of its mask is a duplicate, and gets no segment.
    probability: (K, classes).  masks: (K, H, W) logits.  things: list of bool, True for countable classes.
    Returns ids, int64 (H, W), 0 for no segment, and a list of {"id", "label", "isthing", "score"}.
    """
    scores, labels = probability.max(1)
    confident = scores > threshold
    scores, labels, masks = scores[confident], labels[confident], masks[confident].sigmoid()
    ids, segments = torch.zeros(masks.shape[1:], dtype=torch.int64, device=masks.device), []
    if not len(scores):
        return ids, segments
    winner = (scores[:, None, None] * masks).argmax(0)  # (H, W)
    stuff = {}  # class -> its segment
    for k, (score, label) in enumerate(zip(scores.tolist(), labels.tolist())):
        inside = masks[k] > 0.5
        won = inside & (winner == k)
        if won.sum() == 0 or won.sum() < overlap * inside.sum():
            continue
        if label in stuff:
            segment = stuff[label]
            segment["score"] = max(segment["score"], score)
        else:
            segment = dict(id=len(segments) + 1, label=label, isthing=things[label], score=score)
            segments.append(segment)
            if not things[label]:
                stuff[label] = segment
        ids[won] = segment["id"]
    return ids, segments


# ---------------------------------------------------------------------------------------------------------------
# 11. One head per task.  Each owns its modules, its forward pass, its loss and its predictions
# ---------------------------------------------------------------------------------------------------------------
class DenseHead(nn.Module):
    """What detection and segmentation share: neck, decoder and losses.  A task adds what it predicts for an image."""

    with_masks = True

    def __init__(self, backbone, size, num_classes, iterations, label_smoothing, things):
        super().__init__()
        self.finest = 0 if self.with_masks else 1  # only masks need the map at stride 4
        self.stride = backbone.strides[0]  # of the masks
        self.neck = Neck(backbone.channels[self.finest :], size["dim"])
        self.decoder = Decoder(size["dim"], size["levels"], num_classes, iterations, self.with_masks)

    def forward(self, maps, layouts):
        """maps: four, of the backbone, (B, H, W, C).  layouts: of these.  Returns the last prediction, and "aux"."""
        maps, layouts = maps[self.finest :], layouts[self.finest :]
        *earlier, last = self.decoder(self.neck(maps, layouts), layouts)
        return last | {"aux": earlier}

    def loss(self, output, targets):
        """A dictionary of sums over targets, as in set_losses."""
        return set_losses(output, targets, self.stride)

    def count(self, targets):
        """Number of targets.  Images have few or many, and each target should count the same."""
        return sum(len(target["labels"]) for target in targets)

    def predict(self, output, image_sizes, sizes):
        """One dictionary per image.  image_sizes, sizes: (H, W) of each image, and of its prediction."""
        predictions = []
        for i, (image_size, size) in enumerate(zip(image_sizes, sizes)):
            probability = class_probability(output["logits"][i])  # (K, classes)
            masks = resize_masks(output["masks"][i], image_size, self.stride, size) if self.with_masks else None
            predictions.append(self.predict_image(probability, output["boxes"][i].float(), masks, size))
        return predictions


def pixel_boxes(boxes, size):
    """(n, 4) cxcywh as fractions -> xyxy in pixels of an image of size (H, W)."""
    return cxcywh_to_xyxy(boxes).clamp(0, 1) * torch.tensor([size[1], size[0]] * 2, device=boxes.device)


class DetectionHead(DenseHead):
    """det: boxes."""

    with_masks = False

    def predict_image(self, probability, boxes, masks, size):
        scores, labels, centers = top_detections(probability, boxes)
        return {"scores": scores, "labels": labels, "boxes": pixel_boxes(boxes[centers], size)}


class InstanceHead(DenseHead):
    """inst: boxes and masks.  A score is the class probability times the mean of its mask (Mask2Former)."""

    def predict_image(self, probability, boxes, masks, size):
        scores, labels, centers = top_detections(probability, boxes)
        masks = masks.sigmoid()
        inside = masks > 0.5
        quality = (masks * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)  # (K,)
        scores = scores * quality[centers]
        order = scores.argsort(descending=True)
        scores, labels, centers = scores[order], labels[order], centers[order]
        return {"scores": scores, "labels": labels, "boxes": pixel_boxes(boxes[centers], size), "masks": inside[centers]}


class SemanticHead(DenseHead):
    """sem: the class of every pixel."""

    def predict_image(self, probability, boxes, masks, size):
        return {"semantic": semantic_map(probability, masks)}


class PanopticHead(DenseHead):
    """pan: the segment of every pixel.

    Stuff is neither matched nor trained by boxes (Mask DINO, Li et al., 2022): the box around all the grass of a photo
    teaches nothing.
    """

    def __init__(self, backbone, size, num_classes, iterations, label_smoothing, things):
        super().__init__(backbone, size, num_classes, iterations, label_smoothing, things)
        self.register_buffer("things", torch.tensor(things or [True] * num_classes), persistent=False)

    def loss(self, output, targets):
        return set_losses(output, targets, self.stride, box_classes=self.things)

    def predict_image(self, probability, boxes, masks, size):
        ids, segments = panoptic_segments(probability, masks, self.things.tolist())
        return {"panoptic": ids, "segments": segments}


# A new task is one class with forward, loss, count and predict, and one entry here.
TASKS = {
    "cls": ClassificationHead,
    "det": DetectionHead,
    "inst": InstanceHead,
    "sem": SemanticHead,
    "pan": PanopticHead,
}


# ---------------------------------------------------------------------------------------------------------------
# 12. The model
# ---------------------------------------------------------------------------------------------------------------
class ClusterFormer(nn.Module):
    """Backbone and head.  model(images) is what is trained; model.predict(images) is what people read."""

    def __init__(
        self,
        task="cls",  # a key of TASKS
        variant="tiny",  # a key of VARIANTS
        num_classes=1000,
        patch_size=4,  # side of a token at stage 1 in pixels: 4, or 2 for images of about 32 x 32 pixels
        iterations=3,  # T (Paper: 3); time and memory of the clustering grow with it
        drop_path=0.0,  # stochastic depth: rate of the last block; it grows linearly from 0 in the first
        label_smoothing=0.0,  # cls: probability that is spread evenly over all classes
        things=None,  # pan: a list of bool, True for countable classes; None: all are
    ):
        super().__init__()
        if task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if patch_size not in (2, 4):
            raise ValueError(f"patch_size must be 2 or 4, got {patch_size}")
        if iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {iterations}")
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
        if things is not None and len(things) != num_classes:
            raise ValueError(f"things must have one entry for each of {num_classes} classes, got {len(things)}")
        things = None if things is None else [bool(thing) for thing in things]
        self.task, self.num_classes = task, num_classes
        # What a checkpoint needs to build this model again.
        self.arguments = dict(task=task, variant=variant, num_classes=num_classes, patch_size=patch_size)
        self.arguments |= dict(iterations=iterations, drop_path=drop_path, label_smoothing=label_smoothing, things=things)
        size = VARIANTS[variant]
        self.backbone = Backbone(size["depths"], size["channels"], patch_size, iterations, drop_path)
        self.head = TASKS[task](self.backbone, size, num_classes, iterations, label_smoothing, things)

    def forward(self, images):
        """images: float RGB in [0, 1], (B, 3, H, W), or a list of (3, H, W) of any sizes >= 32 x 32.

        Returns for cls {"logits": (B, classes)}, and for the dense tasks
            "logits"  (B, K, classes)  class logits of each of K = 100 centers (fewer if the map at stride 8 has less than
                                       10 x 10 tokens); "no object" has the logit 0: see class_probability
            "boxes"   (B, K, 4)        center x, y, width, height as fractions of the image without padding
            "masks"   (B, K, H/4, W/4) inst, sem, pan: logits (H/2, W/2 with patch_size 2)
            "aux"     a list of the same for the earlier layers, first to last
            "pixels"  (B, classes, H/4, W/4), in training, if there are masks: class logits of the pixels
        Raises ValueError if shape or dtype are wrong.  Values are not checked: that would wait for the GPU in every step.
        """
        check_images(images)
        return self.head(*self.backbone.features(*batch_images(images)))

    def loss(self, output, targets):
        """The losses of a batch: a dictionary of scalars, to be summed.  Each is a sum over images (cls) or targets.

        output: of forward.  targets, on the same device:
            cls: (B,) int64 classes, or (B, classes) float probabilities (mixup)
            dense tasks: a list of one dictionary per image, with n >= 0 targets in each:
                "labels"  (n,) int64    "boxes"  (n, 4) float32, cxcywh as fractions of the image
                "masks"   (n, H, W) bool, at the size of the image (not for det).  sem: one mask per class that occurs, or
                one per region; pan: one per thing, and one per class of stuff.  Pixels without a label have no mask.
        Divide by count(targets) of the whole batch, summed over all processes: a mean of means would weigh targets of
        crowded batches less.
        """
        return self.head.loss(output, targets)

    def count(self, targets):
        """Number of images (cls) or targets (dense tasks) in a batch of this process: what its losses are sums over."""
        return self.head.count(targets)

    @torch.no_grad()
    def predict(self, images, sizes=None):
        """Final predictions, in evaluation mode.

        images: as in forward; raises ValueError also if a value is not in [0, 1].
        sizes: a list of (H, W), the sizes in which boxes and maps are returned; None: those of the images.
        Returns one dictionary per image:
            cls   "scores" (5,) float32, highest first, and "labels" (5,) int64 (fewer if there are fewer classes)
            det   "scores" (n,), highest first, "labels" (n,), "boxes" (n, 4) xyxy in pixels; n <= 100
            inst  the same, and "masks" (n, H, W) bool
            sem   "semantic" (H, W) int64, the class of every pixel
            pan   "panoptic" (H, W) int64, the segment of every pixel, 0 for none, and "segments", a list of dictionaries
                  {"id": int, "label": int, "isthing": bool, "score": float}
        """
        check_images(images)
        for image in images:
            low, high = image.aminmax()
            if not (low >= 0 and high <= 1):  # NaN fails too
                raise ValueError(f"images must be RGB in [0, 1], got values from {low:.4g} to {high:.4g}")
        training = self.training
        self.eval()
        output = self(images)
        self.train(training)
        own = [tuple(image.shape[-2:]) for image in images]
        return self.head.predict(output, own, own if sizes is None else [tuple(size) for size in sizes])


def trace(model, images):
    """Record every clustering of a model: ClusterFormer, Backbone, or any module that contains clusterings.

    Returns a list of dictionaries, in the order in which they run:
        "name"         path of the module, such as "backbone.stages.1.0.cluster" or "head.decoder.layers.2.cluster"
        "size"         (H, W) of its N tokens
        "centers"      C(0) .. C(T), each (B, K, D)
        "assignments"  M(0) .. M(T-1), each (B, h, K, N)
        "tokens"       I, (B, N, D), and "values" v(I), (B, h, N, d)
        "weights"      for each iteration the weight of each value in each mean, (B, h, K, N); they sum to 1 over N
    """
    clusterings = {n: m for n, m in model.named_modules() if isinstance(m, RecurrentCrossAttentionClustering)}
    histories = [dict(name=name) for name in clusterings]
    for module, history in zip(clusterings.values(), histories):
        module.history = history
    try:
        model(images)
    finally:
        for module in clusterings.values():
            module.history = None
    return histories
