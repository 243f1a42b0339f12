"""What the network is, what it trains on and what scores it.

    images --ResNet + FPN--> features --BEVFormer encoder--> BEV features --head--> BEV logits

`Config` and `PRESETS` say how large everything is. `BEVSegmenter` is the network; its encoder is BEVFormer (Li et al.,
ECCV 2022, arXiv 2203.17270): a grid of BEV queries that look at the previous BEV (temporal self-attention, section 3.4)
and at the camera features where their ground is seen (spatial cross-attention, section 3.3), both by deformable
attention (Deformable DETR, arXiv 2010.04159). Then the loss, the score, and the training loop of stages 03 and 04.

Shapes: B batch, N cameras, C channels, M heads, L feature levels, P sampling points, Z heights of a pillar,
H x W cells of a BEV grid, Q = H*W queries (row by row), h x w pixels. Axes: see reproject.py.
"""
import ctypes
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.ops import FeaturePyramidNetwork
from tqdm import tqdm

from reproject import CAMERAS, CLASSES, IGNORE, Grid, load_pt, project, relative_pose, save_pt, warp

NUM_CLASSES = len(CLASSES)


# ---------------------------------------------------------------- size of everything

@dataclass(frozen=True)
class Config:
    """All that decides the shape of the network and of the data it reads. The defaults are the `toy` preset."""
    # the ground: metres in the ego frame (reproject.py); a cell is square
    x_range: tuple[float, float] = (-30.0, 30.0)
    y_range: tuple[float, float] = (-15.0, 15.0)
    cell: float = 0.3
    line_width: float = 0.75  # m; dividers and boundaries as drawn in the ground truth (HDMapNet: 5 cells of 0.15 m)
    # the images: (height, width) in pixels
    image_size: tuple[int, int] = (144, 256)
    # the backbone: a torchvision ResNet, the stages (1 to 4) that feed the FPN, its ImageNet weights in torchvision
    backbone: str = "resnet10"
    stages: tuple[int, ...] = (2, 3)
    weights: str | None = None
    # BEVFormer
    bev_shape: tuple[int, int] = (50, 25)  # queries along x, along y, on the same ground as the fine grid
    channels: int = 64
    layers: int = 2
    heads: int = 4
    ffn: int = 128
    points_spatial: int = 8  # sampling points of a query in each level, shared out among the heights
    points_temporal: int = 4
    heights: tuple[float, ...] = (0.0, 0.5)  # m above the ground where a pillar is projected into the cameras
    history: int = 1  # key frames before the current one in a training sequence

    @property
    def grid(self):
        """The fine grid: of the ground truth and of the predictions."""
        return Grid(self.x_range, self.y_range, self.cell)

    @property
    def padded_size(self):
        """image_size rounded up to the coarsest stride: only then do the features cover exactly the (padded) image."""
        stride = 2 ** (max(self.stages) + 1)
        return tuple(-(-n // stride) * stride for n in self.image_size)


TINY = Config(image_size=(450, 800), backbone="resnet50", stages=(4,), weights="IMAGENET1K_V2", bev_shape=(50, 50),
              channels=256, layers=3, heads=8, ffn=512, heights=(-0.5, 0.0, 0.5, 1.0), history=2)
PRESETS = {
    "toy": Config(),
    "tiny": TINY,
    "small": replace(TINY, image_size=(720, 1280), bev_shape=(150, 150)),
    "paper": replace(TINY, cell=0.15, stages=(2, 3, 4), bev_shape=(200, 100), layers=6, history=3),
}


# ---------------------------------------------------------------- deformable attention

def deformable_attention(values, locations, weights, source):
    """Weighted sum of bilinear samples: the operator of Deformable DETR (eq. 2 and 3) for a packed list of R queries.

    values: one tensor (S, M, D, h, w) a level: S feature maps; source (R,) int: which of the S maps a query reads;
    locations (R, M, L, P, 2) as (x, y) in [0, 1] of the map, weights (R, M, L, P). Returns (R, M*D).
    A sample outside its map is zero.

    The S maps are stacked into one tall image with a row of zeros after each, so that one grid_sample a level serves
    queries of all cameras and all samples of the batch, however many each has: nothing is padded, nothing is looped.
    """
    R, M, L, P, _ = locations.shape
    output = locations.new_zeros(M, values[0].shape[2], R)
    for level, value in enumerate(values):
        S, _, D, h, w = value.shape
        tall = F.pad(value.to(locations.dtype), (0, 0, 0, 1))
        tall = tall.permute(1, 2, 0, 3, 4).reshape(M, D, S * (h + 1), w)  # (M, D, S*(h+1), w)
        x, y = locations[:, :, level].permute(1, 2, 0, 3).unbind(-1)  # (M, P, R) each
        # Positions as fractional indices of pixel centres; the clamp parks far samples on the zeros around their map.
        x = (x * w - 0.5).clamp(-1, w)
        y = (y * h - 0.5).clamp(-1, h) + source * (h + 1)
        where = torch.stack(((2 * x + 1) / w - 1, (2 * y + 1) / (S * (h + 1)) - 1), -1)  # (M, P, R, 2)
        weight = weights[:, :, level].permute(1, 2, 0).contiguous()  # (M, P, R)
        # Point by point: half the time of all at once, as (M, D, P, R) samples do not fit the cache.
        for where_p, weight_p in zip(where.unbind(1), weight.unbind(1)):
            samples = F.grid_sample(tall, where_p.unsqueeze(1), align_corners=False).squeeze(2)  # (M, D, R)
            output = torch.addcmul(output, samples, weight_p.unsqueeze(1))
    return output.permute(2, 0, 1).reshape(R, M * D)  # (R, M*D)


def init_offsets(linear, heads, levels, points, group=1):
    """Start as Deformable DETR does: each head looks in a direction of its own, ever farther, but from 0 steps on.

    Every `group` successive points (one for each height of a pillar) share a step, so that from the first iteration on
    each query sees exactly the pixels that it projects to.
    """
    angle = torch.arange(heads) * (2 * math.pi / heads)
    direction = torch.stack((angle.cos(), angle.sin()), -1)
    direction = direction / direction.abs().max(-1, keepdim=True).values  # (heads, 2), on the unit square
    steps = torch.arange(points) // group
    offsets = (direction[:, None, None] * steps[:, None]).expand(heads, levels, points, 2)
    nn.init.zeros_(linear.weight)
    with torch.no_grad():
        linear.bias.copy_(offsets.flatten())


class TemporalSelfAttention(nn.Module):
    """BEVFormer section 3.4: a query looks at the previous BEV and at the current one, and takes their mean."""

    def __init__(self, config):
        super().__init__()
        C, self.M, self.P = config.channels, config.heads, config.points_temporal
        self.offsets = nn.Linear(2 * C, 2 * self.M * self.P * 2)  # 2 BEVs x heads x points x (x, y)
        self.weights = nn.Linear(2 * C, 2 * self.M * self.P)
        self.value = nn.Linear(C, C)
        self.output = nn.Linear(C, C)
        init_offsets(self.offsets, self.M, 2, self.P)
        nn.init.zeros_(self.weights.weight), nn.init.zeros_(self.weights.bias)

    def forward(self, query, position, previous, current, reference, shape):
        """query, position, previous, current (B, Q, C); shape (H, W); reference (B, 2, Q, 2): where each query's ground
        lies in the previous and in the current BEV, (x, y) in [0, 1]. -> (B, Q, C)"""
        B, Q, C = query.shape
        H, W = shape
        bevs = self.value(torch.stack((previous, current), 1))  # (B, 2, Q, C)
        bevs = bevs.view(2 * B, H, W, self.M, C // self.M).permute(0, 3, 4, 1, 2)  # (2B, M, D, H, W)
        guide = torch.cat((previous, query + position), -1)  # (B, Q, 2C)
        offsets = self.offsets(guide).view(B, Q, self.M, 2, self.P, 2).permute(0, 3, 1, 2, 4, 5)  # (B, 2, Q, M, P, 2)
        weights = self.weights(guide).view(B, Q, self.M, 2, self.P).permute(0, 3, 1, 2, 4)  # (B, 2, Q, M, P)
        locations = reference[:, :, :, None, None] + offsets.to(reference) / reference.new_tensor((W, H))
        # Both BEVs are read as if they were samples of a batch of 2B.
        locations = locations.reshape(2 * B * Q, self.M, 1, self.P, 2)
        weights = weights.to(reference).softmax(-1).reshape(2 * B * Q, self.M, 1, self.P)
        source = torch.arange(2 * B, device=query.device).repeat_interleave(Q)
        mixed = deformable_attention([bevs], locations, weights, source)  # (2BQ, C)
        return query + self.output(mixed.view(B, 2, Q, C).mean(1))  # (B, Q, C)


class SpatialCrossAttention(nn.Module):
    """BEVFormer section 3.3: a query looks at the cameras that see its pillar, around the pillar's projections."""

    def __init__(self, config):
        super().__init__()
        C, self.M, self.P, self.L = config.channels, config.heads, config.points_spatial, len(config.stages)
        self.offsets = nn.Linear(C, self.M * self.L * self.P * 2)
        self.weights = nn.Linear(C, self.M * self.L * self.P)
        self.value = nn.Linear(C, C)
        self.output = nn.Linear(C, C)
        init_offsets(self.offsets, self.M, self.L, self.P, len(config.heights))
        nn.init.zeros_(self.weights.weight), nn.init.zeros_(self.weights.bias)

    def forward(self, query, features, hits):
        """query (B, Q, C); features: (B*N, h, w, C) a level; hits: see find_hits. -> (B, Q, C)"""
        B, Q, C = query.shape
        camera, cell, anchors = hits  # (R,), (R,), (R, Z, 2)
        (R, Z, _), M, L, P = anchors.shape, self.M, self.L, self.P
        # Projected once a layer and camera, not once a query: (B*N, M, D, h, w) a level
        values = [self.value(f).unflatten(-1, (M, C // M)).permute(0, 3, 4, 1, 2) for f in features]
        flat = query.flatten(0, 1)  # (B*Q, C)
        sizes = torch.tensor([(f.shape[2], f.shape[1]) for f in features], device=query.device)  # (L, 2) as (w, h)
        offsets = self.offsets(flat).view(B * Q, M, L, P // Z, Z, 2).to(anchors) / sizes.view(L, 1, 1, 2)
        weights = self.weights(flat).view(B * Q, M, L * P).to(anchors).softmax(-1)  # over all levels and points
        locations = anchors.view(R, 1, 1, 1, Z, 2) + offsets[cell]  # (R, M, L, P/Z, Z, 2)
        seen = deformable_attention(values, locations.flatten(3, 4), weights[cell].view(R, M, L, P), camera)  # (R, C)
        # Mean over the cameras that see the query; one that sees nothing was never computed.
        total = torch.zeros_like(flat, dtype=seen.dtype).index_add(0, cell, seen)  # (B*Q, C)
        count = torch.bincount(cell, minlength=B * Q).clamp(min=1).unsqueeze(-1)  # (B*Q, 1)
        return query + self.output((total / count).view(B, Q, C))  # (B, Q, C)


class EncoderLayer(nn.Module):
    """One BEVFormer layer: temporal self-attention, spatial cross-attention, feed-forward, each with its LayerNorm."""

    def __init__(self, config):
        super().__init__()
        C = config.channels
        self.temporal = TemporalSelfAttention(config)
        self.spatial = SpatialCrossAttention(config)
        self.ffn = nn.Sequential(nn.Linear(C, config.ffn), nn.ReLU(), nn.Linear(config.ffn, C))
        self.norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(3))

    def forward(self, query, position, previous, current, reference, shape, features, hits):
        """query, position, previous, current (B, Q, C); the rest as in the two attentions. -> (B, Q, C)"""
        query = self.norms[0](self.temporal(query, position, previous, current, reference, shape))
        query = self.norms[1](self.spatial(query, features, hits))
        return self.norms[2](query + self.ffn(query))


def find_hits(K, ego_T_cam, image_size, grid, bev_shape, heights):
    """Which camera sees which query, and where: the pillars projected into every camera.

    K (B, N, 3, 3), ego_T_cam (B, N, 4, 4). Returns, for the R (sample, camera, query) triples in which at least one
    height of the pillar falls into the image: camera (R,) = b*N + n, cell (R,) = b*Q + q,
    anchors (R, Z, 2): the projections as fractions of the image. Each sample of the batch has its own visibility.
    """
    B, N = K.shape[:2]
    h, w = image_size
    xy = grid.centres(K, bev_shape).flatten(0, 1)  # (Q, 2)
    z = torch.tensor(heights, dtype=K.dtype, device=K.device)
    pts_ego = torch.cat((xy[:, None].expand(-1, len(z), -1), z[None, :, None].expand(len(xy), -1, -1)), -1)  # (Q, Z, 3)
    with torch.autocast(K.device.type, enabled=False):
        uv, depth = project(pts_ego, K[:, :, None, None], ego_T_cam[:, :, None, None])  # (B, N, Q, Z, 2), (B, N, Q, Z)
        anchors = uv / uv.new_tensor((w, h))
    inside = (depth > 1e-5) & (anchors > 0).all(-1) & (anchors < 1).all(-1)
    b, n, q = inside.any(-1).nonzero(as_tuple=True)
    return b * N + n, b * len(xy) + q, anchors[b, n, q]


class Encoder(nn.Module):
    """BEVFormer's encoder: a stack of layers over the same queries, features and projections."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))

    def forward(self, first, position, features, K, ego_T_cam, previous=None, has_previous=None, shift=None):
        """first, position (B, Q, C): the BEV queries and their positions; features: (B*N, h, w, C) a level;
        previous (B, Q, C): the last BEV, already warped into this ego frame; has_previous (B,) bool: False where a
        sample has no history; shift (B, 2): for a caller that, as the official code does, leaves a remaining
        translation in `previous`: (x, y) in fractions of the grid. Returns the BEV features (B, Q, C)."""
        c, B = self.config, len(first)
        H, W = c.bev_shape
        hits = find_hits(K, ego_T_cam, c.padded_size, c.grid, c.bev_shape, c.heights)
        reference = (c.grid.normalise(c.grid.centres(K, c.bev_shape)) + 1) / 2  # (H, W, 2) as (x, y) in [0, 1]
        reference = reference.view(H * W, 2).expand(B, 2, -1, -1)  # (B, 2, Q, 2)
        if shift is not None:
            reference = reference + torch.stack((shift, torch.zeros_like(shift)), 1).unsqueeze(2)
        query = first
        for layer in self.layers:
            # BEVFormer by definition: with history every layer compares the previous BEV with the *first* queries;
            # without, both stand for the layer's own input.
            then = now = query
            if previous is not None:
                then, now = (torch.where(has_previous.view(B, 1, 1), bev, query) for bev in (previous, first))
            query = layer(query, position, then, now, reference, (H, W), features, hits)
        return query


# ---------------------------------------------------------------- the network

def make_backbone(name):
    """A torchvision ResNet by its name; resnet10, one block a stage, is too small to be in torchvision's list."""
    return ResNet(BasicBlock, [1, 1, 1, 1]) if name == "resnet10" else torchvision.models.get_model(name)


class BEVSegmenter(nn.Module):
    """Camera images -> BEV class logits. Hack here: each attribute is one block of the picture at the top."""

    def __init__(self, config):
        super().__init__()
        self.config, C = config, config.channels
        backbone = make_backbone(config.backbone)
        widths = [list(getattr(backbone, f"layer{s}").children())[-1] for s in config.stages]
        widths = [(block.conv3 if hasattr(block, "conv3") else block.conv2).out_channels for block in widths]
        self.backbone = IntermediateLayerGetter(backbone, {f"layer{s}": str(s) for s in config.stages})
        self.fpn = FeaturePyramidNetwork(widths, C)
        H, W = config.bev_shape
        # Small at the start, unlike BEVFormer's N(0, 1), so that what the cameras see is not drowned by what they are.
        self.query = nn.Parameter(0.1 * torch.randn(H * W, C))
        self.row, self.column = (nn.Parameter(0.1 * torch.randn(n, C // 2)) for n in (H, W))
        self.camera = nn.Parameter(0.1 * torch.randn(len(CAMERAS), C))
        self.level = nn.Parameter(0.1 * torch.randn(len(config.stages), C))
        self.encoder = Encoder(config)
        self.refine = nn.Sequential(nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C), nn.ReLU())
        self.classify = nn.Sequential(nn.Conv2d(C, C // 2, 3, padding=1), nn.BatchNorm2d(C // 2), nn.ReLU(),
                                      nn.Conv2d(C // 2, NUM_CLASSES, 1))
        self.register_buffer("mean", torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1), persistent=False)
        self.to(memory_format=torch.channels_last)  # convolutions are faster so, on CPU and GPU

    def load_backbone_weights(self):
        """Fill the backbone with torchvision's ImageNet weights (config.weights); needs the network or its cache."""
        if self.config.weights is None:
            return
        try:
            weights = torchvision.models.get_model_weights(self.config.backbone)[self.config.weights]
            state = weights.get_state_dict(progress=True, check_hash=True)
        except (OSError, RuntimeError) as error:  # no network; a download that was cut short
            sys.exit(f"error: cannot fetch {self.config.backbone} {self.config.weights} ({error}): connect once, "
                     "or set weights=None in the preset (model.py)")
        have = self.backbone.state_dict().keys()
        self.backbone.load_state_dict({key: value for key, value in state.items() if key in have})

    def forward(self, image, K, ego_T_cam, previous=None, has_previous=None):
        """image (B, N, 3, h, w) uint8, K (B, N, 3, 3) in pixels of that image, ego_T_cam (B, N, 4, 4); previous
        (B, C, bev_H, bev_W): the last BEV features, warped into this ego frame; has_previous (B,) bool.
        Returns logits (B, classes, H, W) on the fine grid and the BEV features (B, C, bev_H, bev_W)."""
        (B, N), (H, W) = K.shape[:2], self.config.bev_shape
        image = (image.flatten(0, 1) - self.mean) / self.std  # (B*N, 3, h, w)
        (h, w), (padded_h, padded_w) = self.config.image_size, self.config.padded_size
        image = F.pad(image, (0, padded_w - w, 0, padded_h - h)).contiguous(memory_format=torch.channels_last)
        features = self.fpn(self.backbone(image)).values()  # (B*N, C, h/8, w/8), (B*N, C, h/16, w/16), ...
        features = [(f.unflatten(0, (B, N)) + self.camera[:N, :, None, None] + level[:, None, None])
                    .flatten(0, 1).permute(0, 2, 3, 1) for f, level in zip(features, self.level)]  # (B*N, h/8, w/8, C)
        position = torch.cat((self.column.expand(H, -1, -1), self.row[:, None].expand(-1, W, -1)), -1)  # (H, W, C)
        if previous is not None:
            previous = previous.flatten(2).transpose(1, 2)  # (B, Q, C)
        bev = self.encoder(self.query.expand(B, -1, -1), position.flatten(0, 1), features, K, ego_T_cam, previous,
                           has_previous)  # (B, Q, C)
        bev = bev.transpose(1, 2).unflatten(2, (H, W))  # (B, C, bev_H, bev_W)
        fine = F.interpolate(self.refine(bev), self.config.grid.shape, mode="bilinear", align_corners=False)
        return self.classify(fine), bev  # (B, classes, H, W), (B, C, bev_H, bev_W)


def run_sequence(model, batch):
    """A batch of Frames sequences: the history without gradients, then the current frame (BEVFormer section 3.4).

    Returns logits (B, classes, H, W) of the current frame and of the one before, each in its own ego frame, the latter
    without gradient (None if the sequences have no history).
    """
    T = batch["image"].shape[1]
    bev = logits = before = None
    for t in range(T):
        before = logits
        with torch.set_grad_enabled(torch.is_grad_enabled() and t == T - 1):
            logits, bev = step(model, {k: batch[k][:, t] for k in ("image", "K", "ego_T_cam", "world_T_ego", "linked")},
                               bev, batch["world_T_ego"][:, t - 1])
    return logits, before


def step(model, frame, bev, world_T_previous):
    """One frame on: warp the last BEV (or None) into this ego frame, then run the network. -> logits, BEV features"""
    if bev is not None:
        bev, _ = warp(bev, relative_pose(world_T_previous, frame["world_T_ego"]), model.config.grid)
    return model(frame["image"], frame["K"], frame["ego_T_cam"], bev, frame["linked"])


# ---------------------------------------------------------------- loss and score

def segmentation_loss(logits, target, class_weights):
    """Class-weighted cross-entropy, summed over the pixels that are not IGNORE and divided by their number.

    logits (B, classes, ...), target (B, ...) uint8, class_weights (classes,). The mean is over valid pixels, not over
    weights, so that a picture without paint does not count as much as one full of it.
    """
    logits = logits.float()
    weight = logits.new_tensor(class_weights)
    total = F.cross_entropy(logits, target.long(), weight, ignore_index=IGNORE, reduction="sum")
    return total / (target != IGNORE).sum().clamp(min=1)


def count_overlap(prediction, target):
    """Intersection and union (2, classes) in cells, int64. prediction, target (..., H, W): class indices, or IGNORE in
    the target: such cells do not count."""
    valid = target != IGNORE
    pair = NUM_CLASSES * target[valid].long() + prediction[valid].long()
    confusion = torch.bincount(pair, minlength=NUM_CLASSES ** 2).view(NUM_CLASSES, NUM_CLASSES)  # [target, prediction]
    intersection = confusion.diag()
    return torch.stack((intersection, confusion.sum(0) + confusion.sum(1) - intersection))


def iou(overlap):
    """Summed overlap (2, classes) -> {"iou": {class: value}, "miou": mean over the classes but background}.

    A class that neither prediction nor target contains has no IoU (None) and does not enter the mean.
    """
    intersection, union = overlap.tolist()
    values = {name: intersection[i] / union[i] if union[i] else None for i, name in enumerate(CLASSES) if i > 0}
    known = [v for v in values.values() if v is not None]
    return {"iou": values, "miou": sum(known) / len(known) if known else None}


# ---------------------------------------------------------------- training, shared by 03 and 04

def learning_rate(step, steps, peak):
    """Linear warm-up over the first twentieth, then half a cosine down to a hundredth of the peak."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


@lru_cache(maxsize=4)
def permutation(n, seed, epoch):
    """The order of n samples in one epoch."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch)).tolist()


def batch_indices(n, batch_size, seed, start, steps):
    """Sample indices of the batches of steps start..steps-1: a pure function of the step, so resuming is exact."""
    return [[permutation(n, seed, i // n)[i % n] for i in range(s * batch_size, (s + 1) * batch_size)]
            for s in range(start, steps)]


def keep_freed_memory():
    """Tell glibc to keep freed memory: fresh pages for each step's large CPU tensors cost more than the arithmetic."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 2**31 - 1), libc.mallopt(-1, 2**31 - 1)  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD


def load_checkpoint(path, remedy, config=None):
    """A checkpoint's dict and its network. With `config`, one of another architecture is refused in one line."""
    checkpoint = load_pt(path, remedy)
    if not isinstance(checkpoint, dict) or not {"model", "config", "args"} <= checkpoint.keys():
        sys.exit(f"error: {path} is no checkpoint of 03_pretrain.py or 04_finetune.py: {remedy}")
    try:
        found = Config(**checkpoint["config"])
    except TypeError as error:
        sys.exit(f"error: {path} does not fit Config in model.py ({error}): {remedy}")
    if config is not None and found != config:
        mine, theirs = asdict(config), asdict(found)
        differs = ", ".join(f"{k} {theirs[k]} (expected {mine[k]})" for k in mine if mine[k] != theirs[k])
        sys.exit(f"error: {path} is of another architecture: {differs}: {remedy}")
    model = BEVSegmenter(found)
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        sys.exit(f"error: {path} does not fit model.py: {str(error).splitlines()[1].strip()}: {remedy}")
    return checkpoint, model


def fit(model, data, loss_fn, args, path, minutes=1.0):
    """Train until args.steps, saving to `path` every `minutes` and at the end; go on where `path` stopped.

    loss_fn(batch) -> (loss, {name: float tensor} for the progress bar). args holds steps, batch_size, lr, seed, device
    and workers.
    """
    if not len(data):
        sys.exit(f"error: {args.out}/splits.json has no train scene: run 01 and 02 on a data set that has some")
    if min(args.steps, args.batch_size) < 1 or args.workers < 0:
        sys.exit("error: --steps and --batch-size are at least 1, --workers at least 0")
    keep_freed_memory()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    start = resume(model, optimizer, args, path)
    batches = batch_indices(len(data), args.batch_size, args.seed, start, args.steps)
    loader = torch.utils.data.DataLoader(data, batch_sampler=batches, num_workers=args.workers)
    bar = tqdm(watched(loader), initial=start, total=args.steps, desc=Path(path).stem, unit="step")
    model.train()
    saved, began = time.time(), time.time()
    for i, batch in enumerate(bar, start):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(i, args.steps, args.lr)
        loss, parts = loss_fn({k: v.to(args.device, non_blocking=True) for k, v in batch.items()})
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        if not (loss.isfinite() and norm.isfinite()):
            sys.exit(f"error: step {i} has loss {loss.item()}, gradient {norm.item()}: use a smaller --lr and another "
                     f"--name ({path} holds the last good weights, if it was saved before)")
        optimizer.step()
        if i % 10 == 0:
            bar.set_postfix({name: f"{value.item():.3f}" for name, value in parts.items()})
        if time.time() - saved > 60 * minutes or i + 1 == args.steps:
            save_pt({"model": model.state_dict(), "config": asdict(model.config), "args": vars(args), "step": i + 1,
                     "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}, path)
            saved = time.time()
    print(f"{path}: {args.steps} steps, the last {args.steps - start} in {time.time() - began:.0f} s")


def watched(loader):
    """The loader's batches. A worker that stopped has already said why, in one line of its own."""
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        sys.exit("error: a worker that decodes images stopped (see above, or too little memory: use fewer --workers)")


def positive(text):
    """The argparse type of a number above 0."""
    if not 0 < float(text) < math.inf:
        raise ValueError
    return float(text)


def check_device(name):
    """Stop with one line where PyTorch cannot use the device."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        sys.exit(f"error: --device {name}: PyTorch finds no such device here: use --device cpu")


def resume(model, optimizer, args, path):
    """Load a half-done run and return its step, or 0. Stops where `path` was trained with other settings."""
    if not Path(path).exists():
        return 0
    remedy = "delete it or choose another --name"
    checkpoint, half_done = load_checkpoint(path, remedy, model.config)
    for key, value in vars(args).items():
        if key not in ("device", "workers", "out", "name", "init") and checkpoint["args"].get(key) != value:
            sys.exit(f"error: {path} was trained with {key} {checkpoint['args'].get(key)}, not {value}: {remedy}")
    if checkpoint["step"] >= args.steps:
        print(f"{path} is finished ({args.steps} steps): nothing to do")
        sys.exit(0)
    model.load_state_dict(half_done.state_dict())
    optimizer.load_state_dict(checkpoint["optimizer"])
    torch.set_rng_state(checkpoint["rng"])
    print(f"{path}: going on from step {checkpoint['step']}")
    return checkpoint["step"]
