"""Where things are: the BEV grid, the cameras, and the differentiable way from one to the other and back.

Places and directions, stated once:
- A transform `a_T_b` (..., 4, 4) takes points in frame b to frame a: p_a = a_T_b @ p_b. A point's name carries
  its frame: pts_ego. Frames are world, ego, cam and img.
- ego: nuScenes' ego frame at the key frame's LIDAR_TOP time, levelled (yaw only), on the ground:
  x ahead, y left, z up, metres. The ground is the plane z = 0.
- cam: x right, y down, z along the optical axis, metres. Each camera keeps its own time, so `ego_T_cam` holds the
  mounting and the few decimetres the car moved between the LIDAR_TOP time and the exposure.
- img: (u, v) in pixels, u to the right, v down; the centre of the top left pixel is (0.5, 0.5).
- BEV grids are (..., H, W) and lie as a map is held: row 0 farthest ahead, column 0 farthest left. No flip or
  transpose exists outside this file, except in `load_official` (model.py), for weights that were trained otherwise.

`pixels_to_ground` is the heart of the self-supervision: it finds where each pixel's ray meets the ground. Stage 03 lets
the pixels vote there; the paper's way, `render` (BEV -> cameras), reads the BEV logits there. The way up, `lift`
(cameras -> BEV), is inverse perspective mapping. `warp` carries a BEV grid from one ego frame to another.
`deformable_attention` reads feature maps where a network tells it to.
`Frames` is the data set that stages 03 to 05 read. At the end is what the training stages share besides the network.
"""
import atexit
import contextlib
import ctypes
import fcntl
import hashlib
import inspect
import io
import json
import math
import os
import random
import sys
import time
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.distributed._functional_collectives import all_reduce  # what torch advises instead of the one of its nn

FORMAT = 1
CLASSES = ("background", "divider", "ped_crossing", "boundary")
NUM_CLASSES = len(CLASSES)
CLASS_WEIGHTS = (1.0, 3.0, 1.0, 3.0)  # of the classes in the cross-entropy of BEV maps
IGNORE = 255
FRAMES_META = ("format", "classes", "cameras", "image_size")  # what frames depend on
GRID_META = ("format", "classes", "x_range", "y_range", "cell", "line_width")  # what bev_gt depends on
FRAMES_KEYS = ("timestamp", "image", "label", "K", "ego_T_cam", "world_T_ego")  # what frames have of each key frame
CONSENSUS_FLAGS = ("target", "view_range", "margin", "slope", "rules")  # of 03: what a consensus depends on
CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_FRONT_LEFT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT")
LEFT_RIGHT = {camera: camera.replace("LEFT", "RIGHT") if "LEFT" in camera else camera.replace("RIGHT", "LEFT")
              for camera in CAMERAS}  # each camera's mirror image
MAX_GAP = 2.0  # s; beyond it the previous key frame is no history (key frames come every 0.5 s)
HISTORY_SHARE = 0.25  # of the training steps look at history; the others are quicker, in `toy` by a third
# The keys of splits.json by --split of 03 and 04; the first one is trained on, the others are not.
SPLITS = {"official": ("train", "val"), "geo": ("geo_train", "geo_val", "geo_test")}
UNPACK = "unpack the data set's metadata again"
FIELDS = {  # what is read of the records of nuScenes' tables: its type, or how many of what it lists
    "scene": {"name": str, "description": str, "log_token": str, "first_sample_token": str, "nbr_samples": int},
    "sample_data": {"filename": str, "width": int, "height": int, "ego_pose_token": str, "timestamp": int,
                    "is_key_frame": bool, "next": str},
    "log": {"location": str}, "sample": {"timestamp": int, "next": str},
    "ego_pose": {"rotation": (4, float), "translation": (3, float)},
    "calibrated_sensor": {"rotation": (4, float), "translation": (3, float), "camera_intrinsic": (3, (3, float))}}


# ---------------------------------------------------------------- one process or many (torchrun)
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # this one, of how many
DEVICE = f"cuda:{RANK % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"


def has_bfloat16():
    """Whether bfloat16 pays: on a GPU that supports it, on a CPU that is faster with it (others: 8 times slower)."""
    if DEVICE != "cpu":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = torch.cpu.get_capabilities()
    by_vectors = cpu.get("avx512_bf16") and "Intel" not in cpu.get("cpu_name", "")  # Intel needs AMX to be faster so
    return bool(by_vectors or cpu.get("amx_bf16") or cpu.get("bf16"))


def join_ranks():
    """Meet the other processes that torchrun has started, if there are any."""
    if RANKS > 1:
        local, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if 0 < gpus < local:
            sys.exit(f"error: {local} processes and {gpus} GPU(s): torchrun --nproc-per-node {gpus}")
        if gpus:
            torch.cuda.set_device(DEVICE)
        torch.distributed.init_process_group("nccl" if gpus else "gloo")
        if not gpus:  # gloo: one that just ends breaks the others' lines; with nccl, this would wait for a dead one
            atexit.register(torch.distributed.destroy_process_group)
    if RANK:
        sys.stdout = open(os.devnull, "w")  # what there is to say, the first process says


def sum_over_ranks(x):
    """The sum of a tensor over all ranks; the backward pass sums the gradients over them, too."""
    return all_reduce(x, "sum", torch.distributed.group.WORLD) if RANKS > 1 else x


class BatchNorm(torch.nn.BatchNorm2d):
    """BatchNorm2d over the batches of all ranks. (torch's SyncBatchNorm does not run on the CPU.)"""

    def forward(self, x):
        if RANKS == 1 or not self.training:
            return super().forward(x)
        mean = sum_over_ranks(x.float().mean((0, 2, 3))) / RANKS  # (C,)
        centred = x - mean[:, None, None]
        var = sum_over_ranks(centred.square().mean((0, 2, 3))) / RANKS  # (C,)
        n = RANKS * x.numel() // x.shape[1]
        self.running_mean.lerp_(mean.detach(), self.momentum)
        self.running_var.lerp_(var.detach() * n / (n - 1), self.momentum)  # unbiased, as torch keeps it
        self.num_batches_tracked += 1
        scale = self.weight * (var + self.eps).rsqrt()  # (C,)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


# ---------------------------------------------------------------- geometry
@dataclass(frozen=True)
class Grid:
    """A rectangle of ground around the car, cut into square cells.

    x_range: (behind, ahead) and y_range: (right, left), in metres in the ego frame; cell: side of a cell in metres."""
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    cell: float

    @property
    def shape(self):
        """(H, W): cells along x, cells along y."""
        return tuple(round((high - low) / self.cell) for low, high in (self.x_range, self.y_range))

    def centres(self, like, shape=None):
        """Cell centres (H, W, 2) as (x, y) in metres, with dtype and device of the tensor `like`; `shape` asks for
        another number of cells on the same ground."""
        H, W = shape or self.shape
        x, y = (torch.linspace(high, low, 2 * n + 1, dtype=torch.float64, device=like.device)[1::2]
                for (low, high), n in ((self.x_range, H), (self.y_range, W)))
        return torch.stack(torch.meshgrid(x, y, indexing="ij"), -1).to(like)  # (H, W, 2)

    def cells(self, xy):
        """Ego (x, y) in metres, array (..., 2) -> (row, column) in cells; (0, 0) is the grid's far left corner."""
        size = self.x_range[1] - self.x_range[0], self.y_range[1] - self.y_range[0]
        return ((self.x_range[1], self.y_range[1]) - xy) * self.shape / size  # `cell` may not divide it evenly

    def normalise(self, xy):
        """Ego (x, y) in metres (..., 2) -> grid_sample coordinates (..., 2): (column, row), inside is [-1, 1]."""
        x, y = xy.unbind(-1)
        column = 2 * (self.y_range[1] - y) / (self.y_range[1] - self.y_range[0]) - 1
        row = 2 * (self.x_range[1] - x) / (self.x_range[1] - self.x_range[0]) - 1
        return torch.stack((column, row), -1)


def transform(a_T_b, pts_b):
    """Apply a_T_b (..., 4, 4) to points (..., 3); leading dimensions broadcast.

    Multiply and add instead of a matrix product: TF32 and autocast, which would shift pixels, never touch it."""
    return (a_T_b[..., :3, :3] * pts_b[..., None, :]).sum(-1) + a_T_b[..., :3, 3]


def relative_pose(world_T_a, world_T_b):
    """a_T_b in float32 from two world poses (..., 4, 4); in float64 inside, as world coordinates are kilometres."""
    return (torch.linalg.inv(world_T_a.double()) @ world_T_b.double()).float()


def project(pts_ego, K, ego_T_cam):
    """Pinhole projection. pts_ego (..., 3) m, K (..., 3, 3), ego_T_cam (..., 4, 4) -> pixels (..., 2), depth (...) m.

    Behind the camera (depth <= 0) the pixel means nothing: test the depth."""
    pts_cam = transform(torch.linalg.inv(ego_T_cam), pts_ego)
    depth = pts_cam[..., 2]
    # The clamp keeps the division finite; BEVFormer's official code clamps at the same 1e-5.
    pts_img = (K[..., :2, :2] * pts_cam[..., None, :2]).sum(-1) / depth.clamp(min=1e-5)[..., None] + K[..., :2, 2]
    return pts_img, depth


def pixels_to_ground(K, ego_T_cam, image_size):
    """Cut the ray of every pixel centre with the ground plane z = 0.

    K (..., 3, 3), ego_T_cam (..., 4, 4), image_size (h, w) -> points (..., h, w, 2) as ego (x, y) in metres, and the
    distance (..., h, w) from the camera's foot in metres, inf where the ray does not meet the ground ahead."""
    v, u = (torch.arange(n, device=K.device, dtype=K.dtype) + 0.5 for n in image_size)  # (h,), (w,)
    K_inv, R, t = torch.linalg.inv(K), ego_T_cam[..., :3, :3], ego_T_cam[..., None, None, :3, 3]  # t (..., 1, 1, 3)
    img_to_ego = (R[..., :, :, None] * K_inv[..., None, :, :]).sum(-2)  # (..., 3, 3)
    per_u, per_v, first = img_to_ego[..., None, None, :, :].unbind(-1)  # (..., 1, 1, 3) each
    rays_ego = per_u * u[:, None] + per_v * v[:, None, None] + first  # img_to_ego (u, v, 1): (..., h, w, 3)
    scale = -t[..., 2] / rays_ego[..., 2].clamp(max=-1e-9)  # (..., h, w); no division by 0 at the horizon
    step = scale[..., None] * rays_ego[..., :2]  # (..., h, w, 2), from the camera's foot to the ground point
    distance = torch.where((rays_ego[..., 2] < 0) & (scale > 0), step.norm(dim=-1), torch.inf)
    return t[..., :2] + step, distance


# ---------------------------------------------------------------- BEV <-> cameras
def render(bev_logits, K, ego_T_cam, image_size, grid, max_range=torch.inf):
    """Reprojection: what each camera would see if the BEV map lay on the ground. Differentiable in bev_logits.

    bev_logits (B, C, H, W), K (B, N, 3, 3), ego_T_cam (B, N, 4, 4), image_size (h, w), max_range in metres from the
    camera's foot. Returns logits (B, N, C, h, w) and valid (B, N, h, w) bool: False above the horizon, behind the
    camera, outside the grid and beyond max_range. Paper: the differentiable reprojection of its pretraining section."""
    (B, N), (h, w) = K.shape[:2], image_size
    with torch.autocast(bev_logits.device.type, enabled=False):
        xy_ego, distance = pixels_to_ground(K, ego_T_cam, image_size)  # (B, N, h, w, 2), (B, N, h, w)
        where = grid.normalise(xy_ego)
        valid = (distance <= max_range) & distance.isfinite() & (where.abs() <= 1).all(-1)
        where = where.nan_to_num().clamp(-2, 2).view(B, N * h, w, 2)  # far outside all is the same to grid_sample
        # Border padding only matters in the outermost half cell; zeros would mix "no evidence" into it.
        image = F.grid_sample(bev_logits.to(where.dtype), where, padding_mode="border", align_corners=False)
    return image.unflatten(2, (N, h)).transpose(1, 2), valid  # (B, C, N*h, w) -> (B, N, C, h, w)


def cells_in_cameras(K, ego_T_cam, image_size, grid):
    """Where each camera sees the centre of each cell, by geometry alone.

    K (B, N, 3, 3), ego_T_cam (B, N, 4, 4) -> grid_sample coordinates (B, N, H, W, 2) in the image, and inside
    (B, N, H, W) bool: in front of the camera and within its image."""
    pts_ego = F.pad(grid.centres(K), (0, 1))  # (H, W, 3), on the ground
    uv, depth = project(pts_ego, K[:, :, None, None], ego_T_cam[:, :, None, None])  # (B, N, H, W, 2), (B, N, H, W)
    where = 2 * uv / uv.new_tensor(image_size[::-1]) - 1
    return where, (depth > 0) & (where.abs() <= 1).all(-1)


def pillars_in_cameras(K, ego_T_cam, image_size, grid, bev_shape, heights):
    """Which camera sees which query, and where: the pillars of BEVFormer (section 3.3) projected into every camera.

    K (B, N, 3, 3), ego_T_cam (B, N, 4, 4). Returns, for the R (sample, camera, query) triples in which at least one
    height of the pillar falls into the image: camera (R,) = b*N + n, query (R,) = b*Q + q,
    anchors (R, Z, 2): the projections as fractions of the image. Each sample of the batch has its own visibility."""
    N, xy = K.shape[1], grid.centres(K, bev_shape).flatten(0, 1)  # (Q, 2)
    pts_ego = torch.stack([F.pad(xy, (0, 1), value=z) for z in heights], 1)  # (Q, Z, 3)
    with torch.autocast(K.device.type, enabled=False):
        uv, depth = project(pts_ego, K[:, :, None, None], ego_T_cam[:, :, None, None])  # (B, N, Q, Z, 2), (B, N, Q, Z)
        anchors = uv / uv.new_tensor(image_size[::-1])
    inside = (depth > 1e-5) & (anchors > 0).all(-1) & (anchors < 1).all(-1)
    b, n, q = inside.any(-1).nonzero(as_tuple=True)
    return (b * N + n).int(), b * len(xy) + q, anchors[b, n, q]


def lift(image_scores, K, ego_T_cam, grid):
    """Inverse perspective mapping: image scores, read where each cell's centre is seen, averaged over the cameras.

    image_scores (B, N, C, h, w). Returns (B, C, H, W); cells that no camera sees are 0."""
    where, inside = cells_in_cameras(K, ego_T_cam, image_scores.shape[-2:], grid)
    where = where.to(image_scores.dtype).clamp(-2, 2).flatten(0, 1)  # (B*N, H, W, 2)
    sampled = F.grid_sample(image_scores.flatten(0, 1), where, padding_mode="border", align_corners=False)
    total = (sampled.unflatten(0, K.shape[:2]) * inside.unsqueeze(2)).sum(1)  # (B, C, H, W)
    return total / inside.sum(1).clamp(min=1).unsqueeze(1)


def warp(bev, prev_T_cur, grid):
    """Carry a BEV grid of the previous ego frame into the current one: the exact SE(2) motion.

    bev (B, C, H, W) on the ground of `grid` (any number of cells), prev_T_cur (B, 4, 4).
    Returns (B, C, H, W), zero where the previous grid did not reach."""
    with torch.autocast(bev.device.type, enabled=False):
        pts_cur = F.pad(grid.centres(prev_T_cur, bev.shape[-2:]), (0, 1))  # (H, W, 3)
        where = grid.normalise(transform(prev_T_cur[:, None, None], pts_cur)[..., :2])  # (B, H, W, 2)
        return F.grid_sample(bev.to(where.dtype), where, align_corners=False)


# ---------------------------------------------------------------- sampling at learnt places, and what else must be fast
def corners(x, y, weights, source, height, width):
    """The four pixels around each sampling point, and how much of each enters its bilinear sample.

    x, y, weights (R, M, P); source (R, 1, P or 1) int32. Returns, each (R, M, P, 4), the rows (map, pixel, head) of
    the value table, int32, and the shares. Pixels outside the map have share 0; their row may not be in the table."""
    M, sides = x.shape[1], []
    for position, size in ((x, width), (y, height)):
        # Pixel centres become whole numbers; far outside is all the same, and so are the places of a diverged network.
        position = (position - 0.5).nan_to_num(-1.0).clamp(-1, size)
        low = position.detach().floor()
        far = position - low
        sides.append((low, (1 - far) * ((low >= 0) & (low < size)), far * (low < size - 1)))
    (left_x, left, right), (top_y, top, bottom) = sides
    top, bottom = top * weights, bottom * weights
    head = torch.arange(M, dtype=torch.int32, device=x.device).view(M, 1)
    first = (source * (height * width) + (top_y * width + left_x).int()) * M + head  # (R, M, P)
    rows = torch.stack([first + step * M for step in (0, 1, width, width + 1)], -1)  # (R, M, P, 4)
    return rows, torch.stack((top * left, top * right, bottom * left, bottom * right), -1)


# Of sparse CSR tensors we use sampled_addmm alone, which tests compare with an independent implementation.
warnings.filterwarnings("ignore", message="Sparse (CSR tensor support is in beta|invariant checks are implicitly)")


class DeformableAttention(torch.autograd.Function):
    """Weighted sum of bilinear samples as a product A @ V: V has the values, a row a pixel and head; A is sparse.

    A row of A belongs to a query and head and has P*4 entries: a bag of `embedding_bag`, which adds them up and never
    stores a sample. grid_sample stores each, P times the output, and adds its gradient to V one number at a time."""

    @staticmethod
    def forward(ctx, maps, x, y, weights, source):
        ctx.save_for_backward(maps, x, y, weights, source)  # and not the larger A: it is quickly made again
        (h, w, M, D), values = maps.shape[1:], maps.view(-1, maps.shape[-1])
        index, share = corners(x, y, weights, source, h, w)
        index = index.view(-1, 4 * x.shape[2]).clamp(0, len(values) - 1)  # (R*M, P*4)
        return F.embedding_bag(index, values, per_sample_weights=share.view_as(index), mode="sum").view(len(x), M * D)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        maps, x, y, weights, source = ctx.saved_tensors
        (h, w, M, D), P = maps.shape[1:], x.shape[2]
        grad, values = grad.contiguous().view(-1, D), maps.view(-1, D)  # (R*M, D), (S*h*w*M, D)
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (x, y, weights)]
            index, share = corners(*leaves, source, h, w)
        # dA = grad @ V.T, at the entries of A alone. A row may have a column twice: each entry gets its own product.
        columns = index.flatten().clamp(0, len(values) - 1)  # (R*M*P*4,)
        row_starts = torch.arange(0, len(columns) + 1, 4 * P, dtype=torch.int32, device=x.device)
        zeros = torch.zeros(len(columns), dtype=x.dtype, device=x.device)
        A = torch.sparse_csr_tensor(row_starts, columns, zeros, (len(grad), len(values)), check_invariants=False)
        grad_share = torch.sparse.sampled_addmm(A, grad, values.t(), out=A).values().view_as(share)  # (R, M, P, 4)
        grads = torch.autograd.grad(share, leaves, grad_share)
        # dV = A.T @ grad: sorted by their first pixel, the points are bags again, and the same ones for each corner.
        margin = (w + 1) * M  # the first pixel may lie a row and a column before the map, where its share is 0
        first, order = (index[..., 0].flatten() + margin).sort()  # (R*M*P,)
        sizes = torch.bincount(first, minlength=len(values) + margin)
        starts = sizes.cumsum(0) - sizes  # of the bags
        rows, share = order // P, share.detach().view(-1, 4).index_select(0, order)  # (R*M*P,), (R*M*P, 4)
        grad_values = torch.zeros_like(values)
        for step, part in zip((0, M, w * M, margin), share.unbind(1)):
            total = F.embedding_bag(rows, grad, starts, per_sample_weights=part.contiguous(), mode="sum")  # (bags, D)
            grad_values += total[margin - step:][:len(values)]
        return grad_values.view_as(maps), *grads, None


class Linear(torch.nn.Linear):
    """torch.nn.Linear, on the CPU as a 1x1 convolution: oneDNN does these, and is twice as fast as MKL, which does
    matrix products, on the AMD processor that we measured on."""

    def forward(self, x):
        if x.device.type != "cpu" or x.dtype == torch.float64:
            return super().forward(x)
        pixels = x.reshape(1, -1, 1, self.in_features).permute(0, 3, 1, 2)  # (1, in, rows, 1), channels last
        y = F.conv2d(pixels, self.weight[:, :, None, None], self.bias)  # (1, out, rows, 1)
        return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], self.out_features)


def deformable_attention(maps, x, y, weights, source):
    """The operator of Deformable DETR (eq. 2 and 3), one level, for a packed list of R queries. Returns (R, M*D).

    maps (S, h, w, M, D): S feature maps, M heads; x, y (R, M, P): sampling points in pixels of the map, (0, 0) at its
    corner; weights (R, M, P); source (R, 1, P or 1) int32: which map a point reads. A sample outside its map is zero.
    Queries of all cameras and of all samples of a batch are rows of one list: nothing is padded, nothing is looped."""
    return DeformableAttention.apply(maps.contiguous().to(x.dtype), x, y, weights, source)


# ---------------------------------------------------------------- nuScenes tables (stages 01 and 02)
def pose_matrix(record):
    """a_T_b (4, 4) float64 from the `rotation` (w, x, y, z) and `translation` of an ego_pose or calibrated_sensor."""
    from pyquaternion import Quaternion  # comes with nuscenes-devkit; here, as stages 03 to 05 do without it
    a_T_b = torch.from_numpy(Quaternion(record["rotation"]).transformation_matrix)
    a_T_b[:3, 3] = torch.tensor(record["translation"], dtype=torch.float64)
    return a_T_b


def levelled(world_T_ego):
    """The same place and heading without roll and pitch: our ego frame stands upright on the ground."""
    c, s = F.normalize(world_T_ego[:2, 0], dim=0).tolist()  # where the car's x axis points, seen from above
    x, y, z = world_T_ego[:3, 3].tolist()
    return torch.tensor([[c, -s, 0, x], [s, c, 0, y], [0, 0, 1, z], [0, 0, 0, 1]], dtype=torch.float64)


def open_tables(NuScenes, dataroot, version):
    """The devkit's NuScenes object (the class is handed in: this file does without the devkit)."""
    folder = Path(dataroot) / version
    if not folder.is_dir():
        sys.exit(f"error: there is no folder {folder}: set --dataroot and --version, or run tests/toyworld.py first")
    try:
        nusc = NuScenes(version, str(dataroot), verbose=False)
        for scene in nusc.scene:
            look_up(nusc, "scene", scene["token"])
        if nusc.scene:
            return nusc
        raise ValueError("no scene")
    except Exception as error:  # there is nothing that the devkit does not raise on damaged tables
        for path in sorted(folder.glob("*.json")):
            read_json(path, UNPACK)  # names the damaged table, if it is one
        sys.exit(f"error: {folder}: the tables do not fit together ({type(error).__name__}: {error}): {UNPACK}")


def is_sound(value, kind):
    """Whether a value is text (str), true or false (bool), a whole number from 0 on that int64 holds (int), a number
    below 1e15 (float), or a list of so many."""
    if isinstance(kind, tuple):
        return (isinstance(value, list) and len(value) == kind[0] and all(is_sound(v, kind[1]) for v in value)
                and (kind[0] != 4 or any(value)))  # four numbers are a quaternion: 0 is none
    if kind is float:
        return type(value) in (int, float) and abs(value) < 1e15  # of nan, too, this is False
    return type(value) is kind and (kind is str or 0 <= value < 2 ** 63)


def look_up(nusc, table, token):
    """A record of the tables; stops with one line if there is none, or if one of its FIELDS is not sound."""
    with contextlib.suppress(KeyError, TypeError):
        record = nusc.get(table, token)
        if all(is_sound(record.get(field), kind) for field, kind in FIELDS[table].items()):
            return record
    sys.exit(f"error: {nusc.table_root}/{table}.json has no record {token} with {', '.join(FIELDS[table])}: {UNPACK}")


def key_frames(nusc, scene):
    """A scene's samples in time order."""
    samples, token = [], scene["first_sample_token"]
    while token and len(samples) <= scene["nbr_samples"]:  # a wrong token may lead in a circle
        samples.append(look_up(nusc, "sample", token))
        token = samples[-1]["next"]
    if not samples or len(samples) != scene["nbr_samples"]:
        sys.exit(f"error: {nusc.table_root}/sample.json: not the key frames that {scene['name']} has: {UNPACK}")
    return samples


def recorded(nusc, sample, channel):
    """A sensor's sample_data record of a key frame; instead of a missing token, the message says what has none."""
    return look_up(nusc, "sample_data", sample["data"].get(channel, f"for {channel} at sample {sample['token']}"))


def pose_of(nusc, data):
    """world_T_ego (4, 4) float64 at the time of a sample_data record."""
    return pose_matrix(look_up(nusc, "ego_pose", data["ego_pose_token"]))


def drive_of(nusc, samples):
    """A fingerprint of where the car was, and how it stood, at these key frames: a data set that has changed may have
    kept its tokens. Of the tables' own numbers, as matrices differ by rounding from one CPU to another."""
    poses = [look_up(nusc, "ego_pose", recorded(nusc, sample, "LIDAR_TOP")["ego_pose_token"]) for sample in samples]
    return fingerprint(repr([(pose["translation"], pose["rotation"]) for pose in poses]))


def world_from_ego(nusc, sample):
    """world_T_ego (4, 4) float64 of a key frame: levelled, at its LIDAR_TOP time."""
    return levelled(pose_of(nusc, recorded(nusc, sample, "LIDAR_TOP")))


# ---------------------------------------------------------------- files
def fingerprint(data):
    """The first twelve hexadecimal digits of the SHA-256 of bytes or of a text."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()[:12]


def rules_of(*things):
    """A fingerprint of constants and of the text of functions: once it has changed, be it by a comment, what was made
    before is refused."""
    return fingerprint(repr([inspect.getsource(thing) if callable(thing) else thing for thing in things]))


def read_json(path, remedy):
    """The content of a JSON file, or stop with one line that ends in the remedy."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        sys.exit(f"error: {path} is missing: {remedy}")
    except OSError as error:
        sys.exit(f"error: {path} cannot be read ({error.strerror}): {remedy}")
    except (ValueError, RecursionError):
        sys.exit(f"error: {path} is damaged: {remedy}")


def write_whole(path, write):
    """Let write(file) write a file whole or not at all: under a temporary name, flushed to disk, then renamed."""
    temporary = path.with_name(f".{path.name}.{RANK}.{os.getpid()}.tmp")  # ranks on two machines may share a pid
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{path.name}.*.tmp"):
            with contextlib.suppress(FileNotFoundError):  # another process has just renamed it
                if time.time() - left.stat().st_mtime > 3600:  # the run that wrote it was killed
                    left.unlink()
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        sys.exit(f"error: {path} cannot be written ({error.strerror}): make room or choose another --out")
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def save_pt(content, path):
    """Write a .pt, whole or not at all."""
    buffer = io.BytesIO()  # torch.save itself would hide a full disk behind an error of another kind
    torch.save(content, buffer)
    write_whole(path, lambda file: file.write(buffer.getbuffer()))


def save_json(content, path):
    """Write a JSON file, whole or not at all."""
    write_whole(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


def load_pt(path, remedy):
    """Read a .pt (tensors, strings, numbers, lists, dicts only), or stop with one line that ends in the remedy."""
    try:
        # Files of torch before 1.6 are no zip archives, and cannot be mapped.
        if is_zip := zipfile.is_zipfile(path):
            # torch.load does not look at the checksums that torch.save writes: flipped bits would be other weights.
            with zipfile.ZipFile(path) as file:
                if file.testzip():
                    raise ValueError
        return torch.load(path, weights_only=True, mmap=is_zip, map_location="cpu")
    except FileNotFoundError:
        sys.exit(f"error: {path} is missing: {remedy}")
    except (PermissionError, IsADirectoryError) as error:  # no reason to delete it
        sys.exit(f"error: {path} cannot be read ({error.strerror}): give another path, or allow it to be read")
    except Exception:  # there is nothing that damaged pickles do not raise
        sys.exit(f"error: {path} is damaged or no .pt file of this project: {remedy}")


def is_classes(x):
    """Whether a tensor has nothing but class indices and IGNORE."""
    return not x.is_floating_point() and (((x >= 0) & (x < NUM_CLASSES)) | (x == IGNORE)).all().item()


def load_artifact(path, remedy, keys=()):
    """Read a file of frames/, bev_gt/ or a consensus whose `keys` have an entry for each key frame: "image" and "bev"
    exactly one, the others perhaps more, for the views of --sweeps. Adds "digest", a fingerprint of all that is in it.

    In a file of one's own making, meta["source"] may be a text, and meta["cameras"] be left out: then they are ours."""
    content = load_pt(path, remedy)
    if (not zipfile.is_zipfile(path) or not isinstance(content, dict) or not {"meta", "token", *keys} <= content.keys()
            or not isinstance(content["meta"], dict) or not isinstance(content["meta"].get("source"), (dict, str))
            or any(len(content[key]) < len(content["token"]) or
                   (key in ("image", "bev") and len(content[key]) > len(content["token"])) for key in keys)):
        sys.exit(f"error: {path} is no file of stage 01, 02 or 03: {remedy}")
    meta = {"cameras": list(CAMERAS)} | content["meta"]
    if isinstance(meta["source"], str):
        meta["source"] = {"text": meta["source"]}
    with zipfile.ZipFile(path) as file:
        return content | {"meta": meta, "digest": fingerprint(repr([part.CRC for part in file.infolist()]))}


def read_image(path, remedy):
    """A camera image (PIL, RGB, turned as its EXIF says), or stop with one line that ends in the remedy."""
    try:
        with Image.open(path) as file:
            return ImageOps.exif_transpose(file).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        sys.exit(f"error: {path} {what}: {remedy}")


def encode(image, kind):
    """A PIL image as a uint8 tensor of the bytes of a "JPEG" or "PNG" file."""
    file = io.BytesIO()
    image.save(file, kind, quality=95)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def read_splits(out, *sides):
    """{"train": [scene names], "val": ...} as 02_bev_gt.py wrote them, with at least these two and `sides`."""
    path = Path(out) / "splits.json"
    splits = read_json(path, "run 02_bev_gt.py")
    if not isinstance(splits, dict) or not all(isinstance(splits.get(side), list) for side in ("train", "val", *sides)):
        sys.exit(f"error: {path} is damaged or from before the geo split: run 02_bev_gt.py again")
    return splits


def make_meta(config, source):
    """The `meta` of an artifact: what a reader must know to trust the numbers beside it."""
    return {"format": FORMAT, "classes": list(CLASSES), "cameras": list(CAMERAS), "x_range": list(config.x_range),
            "y_range": list(config.y_range), "cell": config.cell, "line_width": config.line_width,
            "image_size": list(config.image_size), "source": source}


def check_meta(path, found, expected, keys, remedy):
    """Stop with one line if an artifact was made with another value of one of the keys than is expected."""
    for key in keys:
        if found.get(key) != expected[key]:
            sys.exit(f"error: {path} was made with {key} {found.get(key)}, expected {expected[key]}: {remedy}")


def is_finished(path, meta, keys, tokens, remedy=None):
    """Whether `path` holds what this run would write; stop with one line if it was made some other way.

    keys: what of the meta the artifact depends on, beside its source. tokens: of its key frames."""
    if not path.exists():
        return False
    remedy = remedy or f"delete {path.parent} or use another --out"
    found = load_artifact(path, "delete it and run again")
    check_meta(path, found["meta"], meta, keys, remedy)
    check_meta(path, found["meta"]["source"], meta["source"], meta["source"], remedy)
    if found["token"] != tokens:
        sys.exit(f"error: {path} was made with other key frames: {remedy}")
    return True


class Frames(torch.utils.data.Dataset):
    """Key frames of some scenes, each with the `history` key frames before it.

    An item is a dict (T = history + 1 frames in time order, the last one is the current frame; N = 6 cameras):
    image (T, N, 3, h, w) uint8, K (T, N, 3, 3), ego_T_cam (T, N, 4, 4), world_T_ego (T, 4, 4) float64,
    linked (T,) bool: frame t continues frame t-1 (False at a scene's first frame and after more than 2 s),
    label (N, h, w) uint8: pseudo-label of the current frame, token: its sample token; and bev (H, W) uint8 where
    scenes have a "bev": with bev_gt=True the ground truth, or 03's consensus. Before a scene's first frame that frame
    is repeated, unlinked. Instead of by its index, ask for a sample by (index, mirrored, frames of history)."""

    def __init__(self, out, scenes, config, history=0, bev_gt=False, consensus=(), settings=()):
        """consensus: {scene: file} of those scenes whose bev comes from 03_pretrain.py instead of the ground truth;
        settings: {flag: value} with which 03 must have made them."""
        if config.y_range[0] != -config.y_range[1] or set(LEFT_RIGHT.values()) != set(CAMERAS):
            sys.exit(f"error: y_range {config.y_range} (model.py) or CAMERAS (reproject.py): they must be the same to "
                     "the left and to the right, as half of the training samples are mirrored")
        self.history, self.size, self.scenes, self.samples = history, config.image_size, [], []
        made_of, meta = [], make_meta(config, None)
        for scene in scenes:
            path = Path(out) / "frames" / f"{scene}.pt"
            frames = load_artifact(path, "run 01_pseudolabel.py", FRAMES_KEYS)
            check_meta(path, frames["meta"], meta, FRAMES_META, "run 01_pseudolabel.py with this --preset")
            # A file of one's own making may have other types, and do without names.
            frames = {"description": ""} | frames | {key: frames[key].float() for key in ("K", "ego_T_cam")}
            frames |= {"scene": scene, "world_T_ego": frames["world_T_ego"].double()}
            counts = {*map(len, (*frames["image"], *frames["label"], *frames["K"], *frames["ego_T_cam"]))}
            if counts != {len(CAMERAS)}:
                sys.exit(f"error: {path} has views of {sorted(counts)} cameras, CAMERAS in reproject.py are "
                         f"{len(CAMERAS)}: run 01_pseudolabel.py")
            frames["meta"]["source"]["frames"] = frames["digest"]  # a consensus is of these labels; its rules are 03's
            if bev_gt:
                learnt = scene in consensus
                path = consensus[scene] if learnt else Path(out) / "bev_gt" / f"{scene}.pt"
                remedy = "run 03_pretrain.py" if learnt else "run 02_bev_gt.py"
                again = (f"delete its folder and its checkpoint, {remedy} again" if learnt else
                         "run 01_pseudolabel.py and 02_bev_gt.py, one of which says what is old")
                truth = load_artifact(path, remedy + ", or copy its folder along with --init" * learnt, ("bev",))
                check_meta(path, truth["meta"], meta, GRID_META, f"{remedy} with this --preset")
                if truth["token"] != frames["token"]:
                    sys.exit(f"error: {path} has other key frames than frames/{scene}.pt: {again}")
                found, made_with = truth["meta"]["source"], {**frames["meta"]["source"], **dict(settings)}
                check_meta(path, found, made_with, made_with if learnt else {"drive"} & found.keys() & made_with.keys(),
                           again)
                if truth["bev"].shape[1:] != config.grid.shape or not is_classes(truth["bev"]):
                    sys.exit(f"error: {path}: its bev is no map of {config.grid.shape} cells and our classes: {remedy}")
                frames["bev"] = truth["bev"]
                made_of.append(truth["digest"])
            self.samples += [(len(self.scenes), t) for t in range(len(frames["token"]))]
            self.scenes.append(frames)
            made_of += [scene, frames["digest"]]
        self.digest = fingerprint(repr(made_of))  # a training that goes on must go on with the same labels

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, sample):
        index, mirrored, history = sample if isinstance(sample, tuple) else (sample, False, self.history)
        scene, now = self.samples[index]
        frames = self.scenes[scene]
        times = torch.arange(now - history, now + 1).clamp(min=0)
        gap = frames["timestamp"].diff(prepend=frames["timestamp"][:1])[times]  # microseconds since the frame before
        linked = (times > 0) & (gap <= MAX_GAP * 1e6)
        item = {"image": torch.stack([self.decode(scene, t, "image").permute(0, 3, 1, 2) for t in times.tolist()]),
                "label": self.decode(scene, now, "label"), "linked": linked, "token": frames["token"][now]}
        item |= {key: frames[key][times] for key in ("K", "ego_T_cam", "world_T_ego")}
        if "bev" in frames:
            item["bev"] = frames["bev"][now]
        return mirror(item) if mirrored else item

    def decode(self, scene, t, key):
        """The six images (N, h, w, 3) or label maps (N, h, w) of one frame, uint8."""
        name, files = self.scenes[scene]["scene"], self.scenes[scene][key][t]
        try:
            pictures = torch.from_numpy(np.stack([Image.open(io.BytesIO(file.numpy())) for file in files]))
            size = self.size if key == "label" else (*self.size, 3)
            if pictures.shape[1:] != size or (key == "label" and not is_classes(pictures)):
                raise ValueError
            return pictures
        except (OSError, SyntaxError, ValueError):  # PIL reports a broken PNG as SyntaxError
            message = f"error: frames/{name}.pt: {key} of frame {t} is damaged: delete the file, run 01_pseudolabel.py"
            if torch.utils.data.get_worker_info():  # of a worker's errors, only an exception reaches the main process
                raise RuntimeError(message) from None
            sys.exit(message)


def mirror(item):
    """The same drive in a world whose left and right are exchanged: an item of Frames, as true as the first one."""
    swap = [CAMERAS.index(LEFT_RIGHT[camera]) for camera in CAMERAS]
    sides = torch.tensor((1.0, -1.0, 1.0, 1.0))  # of an ego or world point: y changes its sign
    columns = torch.tensor((-1.0, 1.0, 1.0, 1.0))  # of a camera point: x does
    flip_u = torch.tensor(((-1.0, 0, item["image"].shape[-1]), (0, 1, 0), (0, 0, 1)))  # of a pixel: u becomes w - u
    K = flip_u @ item["K"] * columns[:3]
    flipped = {key: item[key].flip(-1) for key in ("image", "label", "bev") if key in item}
    return item | flipped | {"image": flipped["image"][:, swap], "label": flipped["label"][swap], "K": K[:, swap],
                             "ego_T_cam": (sides[:, None] * item["ego_T_cam"] * columns)[:, swap],
                             "world_T_ego": sides[:, None] * item["world_T_ego"] * sides}


# ---------------------------------------------------------------- what the training stages share
def batch_samples(n, args, history, start):
    """What this rank asks of Frames from step `start` on: args.accumulate lists a step of (index, mirrored, frames of
    history), the same samples a step for any number of ranks: of a step's samples 0 to 7, rank 0 of two takes 0 and 4,
    then 2 and 6 with --accumulate 2, rank 1 the others. A pure function of the step, so that going on is exact."""
    if not n:
        sys.exit("error: splits.json has no train scene: run 01 and 02 on a data set that has some")
    order = {epoch: torch.randperm(n, generator=torch.Generator().manual_seed(1_000_003 * args.seed + epoch)).tolist()
             for epoch in range(start * args.batch_size // n, args.steps * args.batch_size // n + 1)}
    batches = []
    for step in range(start, args.steps):
        rng = random.Random(f"{args.seed} {step}")
        back = history if rng.random() < HISTORY_SHARE else 0
        places = range(step * args.batch_size, (step + 1) * args.batch_size)
        samples = [(order[i // n][i % n], rng.random() < 0.5, back) for i in places]
        batches += [samples[part * RANKS + RANK::args.accumulate * RANKS] for part in range(args.accumulate)]
    return batches


def learning_rate(step, steps, peak):
    """Linear warm-up over the first twentieth, then half a cosine down to a hundredth of the peak."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))


@contextlib.contextmanager
def watched():
    """Stop with one line where memory ran out, or a worker of a DataLoader met a damaged file or was stopped itself."""
    try:
        yield
    except (RuntimeError, MemoryError, EOFError, ConnectionResetError, ConnectionRefusedError) as error:
        if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate" in str(error):
            sys.exit("error: out of memory: use a smaller --batch-size or --preset, fewer --workers, or in 03 and 04 "
                     "--accumulate, --checkpointing and --bf16")
        if "shared memory" in str(error):
            sys.exit("error: /dev/shm is too small for --workers: --workers 0, or give docker --shm-size 8g")
        said = str(error).strip().rpartition("\n")[2].partition("error: ")[2]  # below the worker's traceback
        # One that was stopped as it handed over a batch leaves an error of the connection to it.
        of_worker = isinstance(error, (EOFError, ConnectionError)) or "DataLoader worker" in str(error)
        if not of_worker or ("Caught" in str(error) and not said):
            raise  # a mistake in the code, here or in a worker
        sys.exit("error: " + (said or "a worker process was stopped, perhaps for want of memory: use fewer --workers"))


def check_training(args):
    """Stop with one line where a flag of 03 or 04 makes no sense; --bf16 is dropped where it could only cost time."""
    if min(args.steps, args.batch_size, args.accumulate) < 1 or args.workers < 0 or not 0 <= args.seed < 2 ** 32:
        sys.exit("error: --steps, --batch-size and --accumulate are at least 1, --workers at least 0, and --seed is a "
                 "number from 0 to 2^32 - 1")
    if not 0 < args.lr < math.inf or not 0 <= args.image < math.inf:  # so written, both refuse nan
        sys.exit("error: --lr is a number above 0, and --image one of at least 0")
    if args.bf16 and not has_bfloat16():
        args.bf16 = False
        print(f"--bf16: {DEVICE} is not faster in bfloat16, so float32 is used")
    if Path(args.name).name in ("", "frames", "bev_gt", "eval") or args.name.endswith(("/", ".previous", "_sample")):
        sys.exit(f"error: --name {args.name}: this is no name, or what is there is written by others: choose another")
    if args.batch_size % (args.accumulate * RANKS):
        sys.exit(f"error: --batch-size {args.batch_size} cannot be shared out evenly: give a multiple of --accumulate "
                 f"times the number of processes ({args.accumulate * RANKS})")


def claim(path):
    """Refuse to write `path` while another run does. Returns the open lock file, which must be kept: the lock ends with
    it, and so with the process, however that ends."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.with_name(f".{path.name}.lock"), "w")
        if RANK == 0:  # lockf: unlike flock's, its locks are not shared with workers, who may outlive a killed process
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock
    except BlockingIOError:
        sys.exit(f"error: another run is writing {path}: wait for its end or choose another --name or --out")
    except OSError as error:
        sys.exit(f"error: {path} cannot be written or locked ({error.strerror}): choose another --out")


def keep_freed_memory():
    """Tell glibc to keep freed memory: fresh pages for the large arrays of each step cost more than the arithmetic."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0), libc.mallopt(-1, -1)  # M_MMAP_MAX: none, M_TRIM_THRESHOLD: never
