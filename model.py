"""The network, its losses, its score and its training loop.

    images --ResNet + FPN--> features --BEVFormer encoder--> BEV features --head--> BEV logits

`Config` and `PRESETS` say how large everything is. `BEVSegmenter` is the network; its encoder is BEVFormer (Li et al.,
ECCV 2022, arXiv 2203.17270): a grid of BEV queries that look at the previous BEV (temporal self-attention, section 3.4)
and at the camera features where their ground is seen (spatial cross-attention, section 3.3), both by deformable
attention (Deformable DETR, arXiv 2010.04159). `load_official` takes the weights of a released BEVFormer.

Shapes: B batch, N cameras, C channels, M heads of D channels, L levels, P sampling points, Z heights of a pillar, H x W
cells of a BEV grid, Q = H*W queries, S feature maps, R rows of packed queries (spatial: one for each camera that sees a
query), h x w pixels: of an image, in the attentions of a feature map (h' x w' where both occur). Axes: reproject.py.
"""
import importlib
import json
import math
import re
import sys
import time
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch.utils.checkpoint import checkpoint as recompute
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import BasicBlock, ResNet
from tqdm import tqdm

from reproject import (CAMERAS, CLASSES, CONSENSUS_FLAGS, DEVICE, IGNORE, NUM_CLASSES, RANK, RANKS, SPLITS, BatchNorm,
                       Grid, Linear, batch_samples, check_meta, deformable_attention, fingerprint, keep_freed_memory,
                       learning_rate, load_pt, pillars_in_cameras, read_splits, relative_pose, save_pt, sum_over_ranks,
                       warp, watched, write_whole)

IMAGE_WEIGHTS = (1.0, 5.0, 2.0, 5.0)  # of the classes in an image, where lines are thinner than on the map
NEAR = 10.0  # m; ground that is farther from the car is known less well
REMEMBERED = 10  # key frames (5 s): by then the car has left the ground that they saw from near by
MUON = 8  # Muon's learning rate is this many times AdamW's, which is --lr
LOSS_COLOURS = ("#0072B2", "#D55E00", "#009E73")  # Okabe and Ito's, distinguishable by colour-blind readers


# ---------------------------------------------------------------- size of everything
@dataclass(frozen=True)
class Config:
    """All that decides the shape of the network and of the data it reads. The defaults are the `toy` preset."""
    # the ground: metres in the ego frame (reproject.py); a cell is square
    x_range: tuple[float, float] = (-30.0, 30.0)
    y_range: tuple[float, float] = (-15.0, 15.0)
    cell: float = 0.3
    line_width: float = 0.75  # m; dividers and boundaries as drawn in the ground truth (HDMapNet: 5 cells of 0.15 m)
    image_size: tuple[int, int] = (144, 256)  # of the images: (height, width) in pixels
    # the backbone: a torchvision ResNet, the stages (1 to 4) that feed the FPN, its ImageNet weights in torchvision
    backbone: str = "resnet10"
    stages: tuple[int, ...] = (2, 3)
    weights: str | None = None
    # BEVFormer
    bev_shape: tuple[int, int] = (50, 25)  # queries along x, along y, on the same ground as the fine grid
    channels: int = 64  # even, and a multiple of the heads
    layers: int = 2
    heads: int = 4
    ffn: int = 128
    points_spatial: int = 8  # sampling points of a query in each level: a multiple of the number of heights
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
        return tuple(math.ceil(n / stride) * stride for n in self.image_size)


TINY = Config(image_size=(450, 800), backbone="resnet50", stages=(4,), weights="IMAGENET1K_V2", bev_shape=(50, 50),
              channels=256, layers=3, heads=8, ffn=512, heights=(-0.5, 0.0, 0.5, 1.0), history=2)
PRESETS = {"toy": Config(), "tiny": TINY,
           "small": replace(TINY, image_size=(720, 1280), bev_shape=(150, 150)),
           "paper": replace(TINY, cell=0.15, stages=(2, 3, 4), bev_shape=(200, 100), layers=6, history=3)}


# ---------------------------------------------------------------- deformable attention
@torch.no_grad()
def init_guide(linear, heads, levels, points, group=1):
    """Start as Deformable DETR: each head looks in its own direction, its points 0, 1, ... pixels away (there 1, ...).

    linear: its 3 * heads * levels * points outputs are the x, then the y, then the weights of all points. Every
    `group` successive points (one for each height of a pillar) share a step, so that from the first iteration on each
    query sees exactly the pixels that it projects to."""
    angle = torch.arange(heads) * (2 * math.pi / heads)
    direction = F.normalize(torch.stack((angle.cos(), angle.sin())), math.inf, 0)  # (2, heads), on the unit square
    linear.weight.zero_()
    linear.bias.zero_()
    linear.bias.view(3, heads, levels, points)[:2] = direction[:, :, None, None] * (torch.arange(points) // group)


class TemporalSelfAttention(nn.Module):
    """BEVFormer section 3.4: a query looks at the previous BEV and at the current one, and takes their mean."""

    def __init__(self, config):
        super().__init__()
        C, self.M, self.P = config.channels, config.heads, config.points_temporal
        self.guide = Linear(C, 3 * self.M * 2 * self.P)  # (x, y, weight) x heads x 2 BEVs x points
        self.guide_previous = Linear(C, 3 * self.M * 2 * self.P, bias=False)
        self.value, self.output = Linear(C, C), Linear(C, C)
        init_guide(self.guide, self.M, 2, self.P)
        nn.init.zeros_(self.guide_previous.weight)

    def forward(self, query, position, previous, current, reference):
        """query, previous, current (B, Q, C), position (Q, C); reference (H, W, 2): the queries' own places in
        pixels (x, y). -> (B, Q, C)"""
        (B, Q, C), (H, W, _), M, P = query.shape, reference.shape, self.M, self.P
        guide = self.guide(query + position) + self.guide_previous(previous)  # (B, Q, 3*M*2*P)
        x, y, weights = guide.to(reference).view(B, Q, 3, M, 2, P).unbind(2)  # (B, Q, M, 2, P) each
        x, y = (offset + place.view(Q, 1, 1, 1) for offset, place in zip((x, y), reference.unbind(-1)))
        weights = weights.softmax(-1) / 2  # over the points in each BEV; halved, as the two results are averaged
        # Without a history both are the same BEV, which is projected once.
        bevs = [self.value(bev) for bev in ((previous,) if previous is current else (previous, current))]
        maps = torch.cat(bevs).view(-1, H, W, M, C // M)  # (S, H, W, M, D), S = B or 2B
        # A sample's previous BEV is among the first B maps, its current one among the last B.
        sample = torch.arange(B, dtype=torch.int32, device=query.device).repeat_interleave(Q)  # (B*Q,)
        source = torch.stack((sample, len(maps) - B + sample), -1).repeat_interleave(P, -1)[:, None]  # (B*Q, 1, 2*P)
        x, y, weights = (t.reshape(B * Q, M, 2 * P) for t in (x, y, weights))  # (B*Q, M, 2*P)
        return query + self.output(deformable_attention(maps, x, y, weights, source).view(B, Q, C))  # (B, Q, C)


class SpatialCrossAttention(nn.Module):
    """BEVFormer section 3.3: a query looks at the cameras that see its pillar, around the pillar's projections."""

    def __init__(self, config):
        super().__init__()
        C, self.M, self.P, self.L = config.channels, config.heads, config.points_spatial, len(config.stages)
        self.guide = Linear(C, 3 * self.M * self.L * self.P)  # (x, y, weight) x heads x levels x points
        self.value, self.output = Linear(C, C), Linear(C, C)
        init_guide(self.guide, self.M, self.L, self.P, len(config.heights))

    def forward(self, query, features, hits):
        """query (B, Q, C); features: (B*N, h, w, C) a level; hits: see reproject.pillars_in_cameras. -> (B, Q, C)"""
        (B, Q, C), (camera, of_query, anchors) = query.shape, hits  # hits: (R,), (R,), (R, Z, 2)
        (R, Z, _), M, L, P = anchors.shape, self.M, self.L, self.P
        guide = self.guide(query).flatten(0, 1).index_select(0, of_query).to(anchors)  # (R, 3*M*L*P)
        x, y, weights = guide.view(R, 3, M, L, P // Z, Z).unbind(1)  # (R, M, L, P/Z, Z) each
        weights = weights.reshape(R, M, L * P).softmax(-1).view(R, M, L, P)  # over all levels and points
        seen = 0
        for level, feature in enumerate(features):
            h, w = feature.shape[1:3]
            places = [(offset[:, :, level] + size * anchors[:, None, None, :, axis]).flatten(2)  # (R, M, P)
                      for axis, (offset, size) in enumerate(((x, w), (y, h)))]
            # Values are projected once a layer and camera, not once a query: (B*N, h, w, M, D)
            maps = self.value(feature).unflatten(-1, (M, C // M))
            seen = seen + deformable_attention(maps, *places, weights[:, :, level], camera.view(R, 1, 1))  # (R, C)
        # Mean over the cameras that see the query; `hits` lists no others.
        total = torch.zeros(B * Q, C, dtype=seen.dtype, device=seen.device).index_add(0, of_query, seen)  # (B*Q, C)
        count = torch.bincount(of_query, minlength=B * Q).clamp(min=1).unsqueeze(-1)  # (B*Q, 1)
        return query + self.output((total / count).view(B, Q, C))  # (B, Q, C)


class EncoderLayer(nn.Module):
    """One BEVFormer layer: temporal self-attention, spatial cross-attention, feed-forward, each with its LayerNorm."""

    def __init__(self, config):
        super().__init__()
        C = config.channels
        self.temporal, self.spatial = TemporalSelfAttention(config), SpatialCrossAttention(config)
        self.ffn = nn.Sequential(Linear(C, config.ffn), nn.ReLU(), Linear(config.ffn, C))
        self.norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(3))

    def forward(self, query, position, previous, current, reference, features, hits):
        """Arguments as in the two attentions. -> (B, Q, C)"""
        query = self.norms[0](self.temporal(query, position, previous, current, reference))
        query = self.norms[1](self.spatial(query, features, hits))
        return self.norms[2](query + self.ffn(query))


class Encoder(nn.Module):
    """BEVFormer's encoder: a stack of layers over the same queries, features and projections."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))
        self.checkpointing = False  # True: run layers again in the backward pass instead of storing what is in them

    def forward(self, first, position, features, K, ego_T_cam, previous=None, has_previous=None):
        """first (1, Q, C), position (Q, C): BEV queries and where they are; features (B*N, h, w, C) a level; previous
        (B, Q, C); has_previous and the cameras as in BEVSegmenter.forward. Returns the BEV features (B, Q, C)."""
        c = self.config
        hits = pillars_in_cameras(K, ego_T_cam, c.padded_size, c.grid, c.bev_shape, c.heights)
        row, column = torch.meshgrid(*(torch.arange(n, device=K.device) + 0.5 for n in c.bev_shape), indexing="ij")
        reference = torch.stack((column, row), -1).to(K)  # (H, W, 2)
        query = first.expand(len(K), -1, -1)  # (B, Q, C)
        for layer in self.layers:
            # As in BEVFormer: with a history, every layer attends to the previous BEV and to the *first* queries;
            # without, to its own input twice.
            then = now = query
            if previous is not None:
                then, now = (torch.where(has_previous.view(-1, 1, 1), bev, query) for bev in (previous, first))
            inputs = query, position, then, now, reference, features, hits
            query = recompute(layer, *inputs, use_reentrant=False) if self.checkpointing else layer(*inputs)
        return query


# ---------------------------------------------------------------- the network
class BEVSegmenter(nn.Module):
    """Camera images -> BEV class logits. Hack here: each attribute is one block of the picture at the top.

    weights: of the backbone, by torchvision's name; they are downloaded, or come from torchvision's cache."""

    def __init__(self, config, weights=None):
        super().__init__()
        self.config, C = config, config.channels
        names = "resnet10", *torchvision.models.list_models(torchvision.models, include=["res*", "wide_res*"])
        if config.backbone not in names:
            sys.exit(f"error: there is no backbone {config.backbone} (model.py): choose one of {', '.join(names)}")
        try:
            backbone = (ResNet(BasicBlock, [1, 1, 1, 1], norm_layer=BatchNorm)  # not in torchvision's list
                        if config.backbone == "resnet10" and not weights else
                        torchvision.models.get_model(config.backbone, weights=weights, norm_layer=BatchNorm))
        except (OSError, RuntimeError, LookupError, ValueError) as error:  # no network, or no such weights
            if not weights:
                raise
            sys.exit(f"error: cannot fetch {config.backbone} {weights} ({error}): connect once, or set weights=None in "
                     "the preset (model.py)")
        widths = [64 * 2 ** (s - 1) * backbone.layer1[0].expansion for s in config.stages]
        self.backbone = IntermediateLayerGetter(backbone, {f"layer{s}": str(s) for s in config.stages})
        self.fpn = torchvision.ops.FeaturePyramidNetwork(widths, C)
        H, W = config.bev_shape
        # Small at the start, unlike BEVFormer's N(0, 1), so that they do not drown the features that they are added to.
        self.query = nn.Parameter(0.1 * torch.randn(H * W, C))
        self.row, self.column = (nn.Parameter(0.1 * torch.randn(n, C // 2)) for n in (H, W))
        self.camera, self.level = (nn.Parameter(0.1 * torch.randn(n, C)) for n in (len(CAMERAS), len(config.stages)))
        self.encoder = Encoder(config)
        self.refine = nn.Sequential(nn.Conv2d(C, C, 3, padding=1), BatchNorm(C), nn.ReLU())
        self.classify = nn.Sequential(nn.Conv2d(C, C // 2, 3, padding=1), BatchNorm(C // 2), nn.ReLU(),
                                      nn.Conv2d(C // 2, NUM_CLASSES, 1))
        n = 2 ** min(config.stages)  # image features must tell their pixels' classes, at half the size
        self.image_head = nn.Sequential(nn.Conv2d(C, NUM_CLASSES * n * n, 1), nn.PixelShuffle(n))
        self.to(memory_format=torch.channels_last)  # convolutions are faster so, on CPU and GPU

    def forward(self, image, K, ego_T_cam, previous=None, has_previous=None):
        """image (B, N, 3, h, w) uint8, K (B, N, 3, 3) in pixels of that image, ego_T_cam (B, N, 4, 4); previous
        (B, C, bev_H, bev_W): the last BEV features, warped into this ego frame; has_previous (B,) bool: False where a
        sample has none. Returns logits (B, classes, H, W) on the fine grid and BEV features (B, C, bev_H, bev_W)."""
        (B, N), (H, W) = K.shape[:2], self.config.bev_shape
        # A key frame's images together get mean 0 and deviation 1, so that night looks like day; + 1, as black has 0.
        image = image - image.mean((1, 3, 4), keepdim=True, dtype=torch.float32)
        image = (image / (image.square().mean((1, 3, 4), keepdim=True).sqrt() + 1)).flatten(0, 1)  # (B*N, 3, h, w)
        (h, w), (padded_h, padded_w) = self.config.image_size, self.config.padded_size
        image = F.pad(image, (0, padded_w - w, 0, padded_h - h)).contiguous(memory_format=torch.channels_last)
        features = list(self.fpn(self.backbone(image)).values())  # (B*N, C, padded_h/8, padded_w/8), ... in `toy`
        self.finest = features[0]  # kept for image_loss: of the frame that ran last
        features = [(f.unflatten(0, (B, N)) + self.camera[:N, :, None, None] + level[:, None, None])
                    .flatten(0, 1).permute(0, 2, 3, 1) for f, level in zip(features, self.level)]  # (B*N, h', w', C)
        position = torch.cat((self.column.expand(H, -1, -1), self.row[:, None].expand(-1, W, -1)), -1)  # (H, W, C)
        if previous is not None:
            previous = previous.flatten(2).transpose(1, 2)  # (B, Q, C)
        bev = self.encoder(self.query[None], position.flatten(0, 1), features, K, ego_T_cam, previous, has_previous)
        bev = bev.transpose(1, 2).unflatten(2, (H, W))  # (B, Q, C) -> (B, C, bev_H, bev_W)
        fine = F.interpolate(self.refine(bev), self.config.grid.shape, mode="bilinear", align_corners=False)
        return self.classify(fine), bev  # (B, classes, H, W), (B, C, bev_H, bev_W)


def run_sequence(model, batch):
    """A batch of Frames sequences: the history without gradients, then the current frame (BEVFormer section 3.4).

    Returns logits (B, classes, H, W) of the current frame and of the one before, each in its own ego frame, the latter
    without gradient (None if the sequences have no history)."""
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
        bev = warp(bev, relative_pose(world_T_previous, frame["world_T_ego"]), model.config.grid)
    return model(frame["image"], frame["K"], frame["ego_T_cam"], bev, frame["linked"])


def remember(past, logits, frame, grid):
    """What this key frame and the last ones say together: the mean of their class probabilities for the same ground.

    A map is sharp near the car: its weight is 1 there, 1/2 at NEAR, and soon so small that any nearer view outdoes it.
    So the road behind, which no camera will see better again, stays as it was seen from near by. logits (1, classes, H,
    W) come from this frame alone; past lists [(weighted probabilities and weight (1, classes + 1, H, W), world_T_ego)]
    of the drive, and this frame joins it. Each is carried here in one step: a map that is handed on from frame to frame
    is blurred by each of them. Returns log probabilities (1, classes, H, W)."""
    weight = 1 / (1 + (grid.centres(logits).norm(dim=-1) / NEAR) ** 8)  # (H, W)
    if not frame["linked"].item():
        past.clear()
    past.append((torch.cat((logits.softmax(1) * weight, weight[None, None]), 1), frame["world_T_ego"]))
    del past[:-REMEMBERED]
    total = sum(warp(then, relative_pose(pose, frame["world_T_ego"]), grid) for then, pose in past)
    return (total[:, :-1] / total[:, -1:]).clamp(min=1e-6).log()


# ---------------------------------------------------------------- released BEVFormer weights
OFFICIAL_NAMES = (  # in released BEVFormer checkpoints -> ours; regular expressions, each tried on every name
    (r"^img_backbone\.", "backbone."), (r"^pts_bbox_head\.(transformer\.)?", ""),
    (r"^img_neck\.lateral_convs\.(\d+)\.conv", r"fpn.inner_blocks.\1.0"),
    (r"^img_neck\.fpn_convs\.(\d+)\.conv", r"fpn.layer_blocks.\1.0"),
    ("^bev_embedding.weight", "query"), ("^level_embeds", "level"), ("^cams_embeds", "camera"),
    ("^positional_encoding.row_embed.weight", "row"), ("^positional_encoding.col_embed.weight", "column"),
    (r"\.attentions\.0", ".temporal"), (r"\.attentions\.1(\.deformable_attention)?", ".spatial"),
    (r"\.(value|output)_proj", r".\1"), (r"\.ffns\.0\.layers\.0\.0", ".ffn.0"), (r"\.ffns\.0\.layers\.1", ".ffn.2"))
OFFICIAL_BLOCKS = {"backbone", "fpn", "query", "level", "camera", "row", "column", "encoder", "can_bus_mlp"}


def load_official(model, state_dict):
    """Fill a BEVSegmenter with the parameters of a released BEVFormer detector (its `state_dict`), in our axes.

    The BEV of BEVFormer has row 0 at the rear: queries, row embeddings and the y of temporal offsets are flipped. We do
    not read the CAN bus: what its network returns for zeros is added to the queries. Returns {"used", "ignored": their
    names, the latter the detection decoder; "left": ours that keep their start}. Raises ValueError, naming what does
    not fit."""
    H, C, ours, used = model.config.bev_shape[0], model.config.channels, {}, {}
    for key, value in state_dict.items():
        name = key
        for official, own in OFFICIAL_NAMES:
            name = re.sub(official, own, name)
        if name.split(".")[0] in OFFICIAL_BLOCKS:  # the rest is the detection decoder
            ours[name], used[name] = value, key
    try:
        if "can_bus_mlp.0.weight" in ours:
            _, b0, w2, b2, scale, shift = (ours.pop(f"can_bus_mlp.{key}") for key in (
                "0.weight", "0.bias", "2.weight", "2.bias", "norm.weight", "norm.bias"))
            ours["query"] = ours["query"] + F.layer_norm(F.linear(b0.relu(), w2, b2).relu(), (C,), scale, shift)
        for name in list(ours):
            if name in ("query", "row"):  # H rows of W queries, or of one embedding each
                ours[name] = ours[name].view(H, -1, C if name == "query" else C // 2).flip(0).flatten(0, 1)
            elif name == "level":  # official networks with one level were built with four embeddings
                ours[name] = ours[name][:len(model.config.stages)]
            elif "sampling_offsets" in name:
                x, y = ours.pop(name).unflatten(0, (-1, 2)).unbind(1)
                weights = ours.pop(name.replace("sampling_offsets", "attention_weights"))
                guide = torch.cat((x, -y if "temporal" in name else y, weights))
                name = name.replace("sampling_offsets", "guide")
                if "temporal.guide.weight" in name:  # its input is (previous BEV, query)
                    ours[name.replace("guide", "guide_previous")], guide = guide.split(C, 1)
                ours[name] = guide
        if unknown := sorted(ours.keys() - model.state_dict().keys()):
            raise ValueError(f"{used.get(unknown[0], unknown[0])} has no place in this network")
        left = model.load_state_dict(ours, strict=False).missing_keys
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{type(error).__name__} {str(error).splitlines()[-1].strip()}") from None
    return {"used": sorted(used.values()), "ignored": sorted(state_dict.keys() - set(used.values())), "left": left}


# ---------------------------------------------------------------- loss and score
def segmentation_loss(logits, target, class_weights):
    """Class-weighted cross-entropy, summed over the pixels that are not IGNORE and divided by their number.

    logits (B, classes, ...), target (B, ...) uint8, class_weights (classes,). The mean is over valid pixels, not over
    weights, so that a picture without paint does not count as much as one full of it; it is that of all ranks."""
    logits, target = logits.float(), target.long()
    loss = F.cross_entropy(logits, target, logits.new_tensor(class_weights), ignore_index=IGNORE, reduction="sum")
    # DistributedDataParallel averages over the ranks what each divides by its share of the number.
    return loss / (sum_over_ranks((target != IGNORE).sum()) / RANKS).clamp(min=1 / RANKS)


def image_loss(model, label):
    """Cross-entropy of what the image head reads from the image features of the frame that ran last, against its
    pseudo-labels (B, N, h, w), of which the top left one in each 2 x 2 counts."""
    label = label.flatten(0, 1)[:, ::2, ::2]  # (B*N, h/2, w/2)
    logits = model.image_head(model.finest)  # (B*N, classes, padded_h/2, padded_w/2)
    return segmentation_loss(logits[..., :label.shape[1], :label.shape[2]], label, IMAGE_WEIGHTS)


def count_confusion(prediction, target):
    """Cells (classes, classes) int64 of each [target, prediction]. prediction, target (..., H, W): class indices, or
    IGNORE in the target: such cells do not count."""
    valid = target != IGNORE
    pair = NUM_CLASSES * target[valid].long() + prediction[valid].long()
    return torch.bincount(pair, minlength=NUM_CLASSES ** 2).view(NUM_CLASSES, NUM_CLASSES)


def iou(confusion):
    """Summed confusion (classes, classes) -> {"iou": {class: value}, "miou": mean over the classes but background}.

    A class that neither prediction nor target contains has no IoU (None) and does not enter the mean."""
    intersection, union = confusion.diag().tolist(), (confusion.sum(0) + confusion.sum(1) - confusion.diag()).tolist()
    values = {name: intersection[i] / union[i] if union[i] else None for i, name in enumerate(CLASSES) if i > 0}
    known = [v for v in values.values() if v is not None]
    return {"iou": values, "miou": sum(known) / len(known) if known else None}


# ---------------------------------------------------------------- training, shared by 03 and 04
@watched()
def load_checkpoint(path, remedy, config=None):
    """A checkpoint's dict and its network. With `config`, one of another architecture is refused in one line."""
    checkpoint = load_pt(path, remedy)
    if not isinstance(checkpoint, dict) or not {"model", "config", "args", "step"} <= checkpoint.keys():
        sys.exit(f"error: {path} is no checkpoint of 03_pretrain.py or 04_finetune.py: {remedy}")
    try:
        found = Config(**checkpoint["config"])
        check_meta(path, vars(found), vars(config or found), vars(found), remedy)
        model = BEVSegmenter(found).to(DEVICE)
    except (TypeError, ValueError, LookupError) as error:
        sys.exit(f"error: {path} does not fit Config in model.py ({error}): {remedy}")
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        sys.exit(f"error: {path} does not fit model.py: {str(error).splitlines()[1].strip()}: {remedy}")
    return checkpoint, model


@watched()
def initial_model(args, config, path):
    """The network that is trained into `path`, as --init says: from scratch, or with the weights of a finished
    checkpoint of 03 or of a released BEVFormer. Sets args.init_digest (which weights), args.seen (their scenes) and
    args.consensus (the flags of 03 that say what consensus goes with them)."""
    args.init_digest, args.seen, args.consensus, known = None, [], {}, {}
    if Path(path).exists():  # it is refused now rather than after the minutes in which 03 votes
        known = load_checkpoint(path, "delete it, choose another --name or the --preset it has", config)[0]["args"]
    if args.init == "scratch":  # a run that goes on has its weights already
        return BEVSegmenter(config, None if known else config.weights).to(DEVICE)
    model = BEVSegmenter(config).to(DEVICE)
    if known and known["init"] == args.init and not Path(args.init).exists():
        args.init_digest, args.seen, args.consensus = (known[key] for key in ("init_digest", "seen", "consensus"))
        return model
    if args.init.endswith(".pth"):
        content = load_pt(args.init, "give the path of a released BEVFormer checkpoint")
        try:
            report = load_official(model, content.get("state_dict", content))
            if missing := [key for key in report["left"] if not key.startswith(("refine", "classify", "image_head"))]:
                raise ValueError(f"nothing in it is our {missing[0]}")
        except (AttributeError, TypeError, ValueError) as error:
            sys.exit(f"error: {args.init} does not fit --preset {args.preset}: {error}: choose the preset of its size")
        print(f"{args.init}: {len(report['used'])} parameters used, {len(report['ignored'])} of the detector ignored; "
              f"left at their start: {', '.join(report['left'])}")
    else:
        remedy = "run 03_pretrain.py, or give the --init and --preset of what it has written"
        checkpoint, model = load_checkpoint(args.init, remedy, config)
        if checkpoint["step"] < checkpoint["args"]["steps"]:
            sys.exit(f"error: {args.init} stopped at step {checkpoint['step']} of {checkpoint['args']['steps']}: "
                     "run 03_pretrain.py again with the same flags, it goes on from there")
        splits = read_splits(args.out, *SPLITS[args.split])
        args.seen = checkpoint["args"].get("seen", splits["train"])
        args.consensus = {flag: checkpoint["args"].get(flag) for flag in CONSENSUS_FLAGS}
        if leak := [scene for side in SPLITS[args.split][1:] for scene in splits[side] if scene in args.seen]:
            sys.exit(f"error: {args.init} was trained on {len(leak)} scenes that --split {args.split} holds out, e.g. "
                     f"{leak[0]}: run 03_pretrain.py with --split {args.split} and another --name")
    args.init_digest = fingerprint(Path(args.init).read_bytes())  # compared when a run goes on
    return model


def orthogonal(matrix):
    """The nearest matrix with orthogonal rows or columns, roughly: all singular values but the tiniest (1/700 of the
    norm) come near 1 (0.7 to 1.2).

    Five iterations of Newton and Schulz with Jordan's coefficients, as in torch.optim.Muon, which computes in bfloat16
    and takes 40 times as long on a CPU that has no instructions for it. Here only the Gram matrix goes through the
    iterations, and float32 is almost as fast. They enlarge its rounding errors: it must be true float32, not TF32."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonal(matrix.T).T
    matrix = matrix / (matrix.norm() + 1e-7)
    gram, product = matrix @ matrix.T, (one := torch.eye(len(matrix), device=matrix.device))  # (n, n) each
    for _ in range(5):
        factor = 3.4445 * one - 4.775 * gram + 2.0315 * gram @ gram
        gram, product = factor @ gram @ factor, factor @ product
    return product @ matrix


class Optimizer:
    """Muon (Jordan et al., 2024; step size of Liu et al., 2025, arXiv 2502.16982) for the weights of the hidden layers,
    AdamW for all else: embeddings, biases, norms, the first layer, the last ones, what guides attention, and a backbone
    with ImageNet weights. (Names tell which is which: add that of a new last layer to `others`.) A step of Muon changes
    all directions of a matrix alike, where other optimizers mostly follow the few in which gradients are large."""

    def __init__(self, model):
        params = dict(model.named_parameters())
        # Names without a dot are embeddings.
        others = r"^\w+$|guide|image_head|classify\.3|" + ("backbone" if model.config.weights else r"backbone\.conv1")
        hidden = {name: p for name, p in params.items() if p.ndim > 1 and not re.search(others, name)}
        self.adamw = torch.optim.AdamW([p for name, p in params.items() if name not in hidden], weight_decay=0.01)
        self.hidden = list(hidden.values())
        self.momenta = [torch.zeros_like(p) for p in self.hidden]

    @torch.no_grad()
    def step(self, lr):
        self.adamw.param_groups[0]["lr"] = lr
        self.adamw.step()
        for weight, momentum in zip(self.hidden, self.momenta):
            if weight.grad is not None:
                momentum.lerp_(weight.grad, 0.05)
                ahead = weight.grad.lerp(momentum, 0.95).flatten(1)  # Nesterov's; (out, in) or (out, in * h * w)
                # Entries of an orthogonal matrix have an RMS of max(shape) ** -0.5, steps of AdamW one of about 0.2.
                weight.mul_(1 - 0.01 * MUON * lr)
                weight.sub_(orthogonal(ahead).view_as(weight), alpha=MUON * lr * 0.2 * max(ahead.shape) ** 0.5)

    def state_dict(self):
        return {"adamw": self.adamw.state_dict(), "muon": self.momenta}

    def load_state_dict(self, state):
        self.adamw.load_state_dict(state["adamw"])
        for momentum, saved in zip(self.momenta, state["muon"], strict=True):
            momentum.copy_(saved)


@watched()
def fit(model, data, loss_fn, args, path, minutes=1.0):
    """Train until args.steps, saving to `path` every `minutes` and at the end; go on where `path` stopped.
    loss_fn(batch) -> (loss, {name: float tensor} for the progress bar), where batch is a batch of Frames and has the
    share of the training that is done ("progress"); args: the flags of 03 or 04."""
    keep_freed_memory()
    torch.set_float32_matmul_precision("highest")  # no TF32: see `orthogonal`
    model.encoder.checkpointing = args.checkpointing
    optimizer = Optimizer(model)
    args.optimizer = f"Muon at {MUON} times the rate of AdamW"  # in the checkpoint: none goes on with another optimizer
    start, curve = resume(model, optimizer, args, path)
    if sum_over_ranks(torch.tensor(start, device=DEVICE)) != RANKS * start:
        sys.exit(f"error: {path} is not the same on all machines: put --out where all of them see it")
    if start >= args.steps:
        print(f"{path} is finished ({args.steps} steps): nothing to do")
        sys.exit(0)
    batches = batch_samples(len(data), args, model.config.history, start)
    batches = iter(torch.utils.data.DataLoader(data, batch_sampler=batches, num_workers=args.workers,
                                               generator=torch.Generator()))  # or it would draw from what "rng" saves
    both = nn.Module()  # network and loss: DistributedDataParallel must see all that takes part in the forward pass
    both.model, both.forward = model, loss_fn
    if RANKS > 1:  # without --image its head has no gradient; the statistics of BatchNorm are the same everywhere
        both = nn.parallel.DistributedDataParallel(both, find_unused_parameters=not args.image, broadcast_buffers=False)
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc=f"{path.stem} on {DEVICE}", unit="step",
               disable=RANK > 0)
    model.train()
    waited, saved, began = 0, time.time(), time.time()
    for i in bar:
        model.zero_grad()
        total, losses, tokens = 0, {}, []
        for part in range(1, args.accumulate + 1):
            asked = time.time()
            batch = next(batches)
            waited += time.time() - asked
            tokens += batch.pop("token")
            batch = {k: v.to(DEVICE) for k, v in batch.items()} | {"progress": i / args.steps}
            both.require_backward_grad_sync = part == args.accumulate  # ranks share gradients with the last part
            with torch.autocast(DEVICE.split(":")[0], torch.bfloat16, enabled=args.bf16):
                loss, parts = both(batch)
            (loss / args.accumulate).backward()
            total += loss.detach() / args.accumulate
            losses |= {name: losses.get(name, 0) + value.detach() / args.accumulate for name, value in parts.items()}
        norm = nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        if not (total.isfinite() and norm.isfinite()):
            sys.exit(f"error: step {i} has loss {total.item()}, gradient {norm.item()}, samples {tokens}: "
                     f"use a smaller --lr and another --name (the last good weights, if any were saved: {path})")
        optimizer.step(learning_rate(i, args.steps, args.lr))
        curve.append({name: (sum_over_ranks(value) / RANKS).item() for name, value in losses.items()})
        bar.set_postfix({name: f"{value:.3f}" for name, value in curve[-1].items()}, refresh=False)
        if RANK == 0 and (time.time() - saved > 60 * minutes or i + 1 == args.steps):
            record(curve, args, path)
            draw_sample(model, data, path, i + 1)
            save_checkpoint(model, optimizer, args, curve, path)  # last: a finished run must have its pictures
            saved = time.time()
    seconds = time.time() - began
    print(f"{path}: {args.steps} steps, the last {args.steps - start} in {seconds:.0f} s, of which "
          f"{waited / seconds:.1%} were spent waiting for data")


def record(curve, args, path):
    """Write the losses (curve: a dict a step) beside the checkpoint: <name>.jsonl, a line a step, and <name>.png."""
    from matplotlib.figure import Figure  # comes with nuscenes-devkit; here, as it takes a second
    lines = [json.dumps({"step": i, "lr": learning_rate(i, args.steps, args.lr), **losses}) + "\n"
             for i, losses in enumerate(curve)]
    write_whole(path.with_suffix(".jsonl"), lambda file: file.write("".join(lines).encode()))
    figure = Figure((7, 4), dpi=120, layout="tight")
    axes, n = figure.subplots(), max(1, len(curve) // 50)  # single steps differ too much to see a trend
    for name, colour in zip({name: None for losses in curve for name in losses}, cycle(LOSS_COLOURS)):
        points = torch.tensor([(i, losses[name]) for i, losses in enumerate(curve) if name in losses])  # (T, 2)
        axes.plot(*torch.stack([part.mean(0) for part in points.split(n)]).T, colour, label=name)
    axes.set(xlabel="step", ylabel=f"loss, mean of {n} value(s)", ylim=(0, None), title=path.stem)
    axes.grid(alpha=0.3)
    axes.legend()
    write_whole(path.with_suffix(".png"), lambda file: figure.savefig(file, format="png"))


def draw_sample(model, data, path, step):
    """Draw what the network makes of the first sample, as a map and rendered over its cameras: <name>_sample.png."""
    stage = importlib.import_module("05_eval")  # not at the top, as it imports this file
    model.eval()
    _, frame, logits = next(stage.predict(data, model, model.config, (0,)))
    model.train()
    frame.pop("bev", None)  # with it the sheet would call the consensus ground truth
    sheet = stage.contact_sheet(frame, logits, model.config.grid, f"map, step {step}")
    write_whole(path.with_name(f"{path.stem}_sample.png"), lambda file: sheet.save(file, "PNG"))


def save_checkpoint(model, optimizer, args, curve, path):
    """Write a checkpoint and keep the one before it as <name>.previous.pt; at any moment one of them is whole."""
    if path.exists():
        write_whole(path.with_suffix(".previous.pt"), lambda file: file.write(path.read_bytes()))
    save_pt({"model": model.state_dict(), "config": asdict(model.config), "args": vars(args), "step": len(curve),
             "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state(), "curve": curve}, path)


def resume(model, optimizer, args, path):
    """Load a half-done run; other settings are refused. Returns its step, or 0, and its losses, a dict a step."""
    if not Path(path).exists():
        return 0, []
    remedy = "delete it or choose another --name"
    checkpoint = load_pt(path, remedy)  # initial_model has checked that it fits
    free = {"workers", "checkpointing", "bf16", "out", "name", "init", "seen"}  # seen follows from others
    check_meta(path, checkpoint["args"], vars(args), [key for key in vars(args) if key not in free], remedy)
    model.load_state_dict(checkpoint["model"])
    try:
        optimizer.load_state_dict(checkpoint["optimizer"])
    except (ValueError, LookupError, RuntimeError) as error:
        sys.exit(f"error: {path} does not fit Optimizer in model.py ({error}): {remedy}")
    torch.set_rng_state(checkpoint["rng"])
    return checkpoint["step"], checkpoint["curve"]
