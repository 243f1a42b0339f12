"""A rig of pinhole cameras for tests, built from angles by plain trigonometry (nothing from reproject.py)."""
import math

import torch


def camera(yaw=0.0, pitch=0.0, height=1.5, x=0.0, y=0.0, dtype=torch.float32):
    """ego_T_cam (4, 4) of a camera that looks along ego x, then is turned left by `yaw` and down by `pitch` degrees."""
    a, p = math.radians(yaw), math.radians(pitch)
    forward = [math.cos(a) * math.cos(p), math.sin(a) * math.cos(p), -math.sin(p)]
    right = [math.sin(a), -math.cos(a), 0.0]
    down = [forward[1] * right[2] - forward[2] * right[1], forward[2] * right[0] - forward[0] * right[2],
            forward[0] * right[1] - forward[1] * right[0]]
    rows = [[right[i], down[i], forward[i], (x, y, height)[i]] for i in range(3)]
    return torch.tensor(rows + [[0.0, 0.0, 0.0, 1.0]], dtype=dtype)


def intrinsics(focal=200.0, cx=128.0, cy=72.0, dtype=torch.float32):
    """K (3, 3) in pixels."""
    return torch.tensor([[focal, 0, cx], [0, focal, cy], [0, 0, 1]], dtype=dtype)


def surround(batch=1, yaws=(0, -55, 55, 180, 110, -110), dtype=torch.float32, **where):
    """K (batch, N, 3, 3) and ego_T_cam (batch, N, 4, 4) of a ring of cameras in the order of reproject.CAMERAS."""
    K = intrinsics(dtype=dtype).expand(batch, len(yaws), 3, 3).clone()
    ego_T_cam = torch.stack([camera(yaw, 5.0, dtype=dtype, **where) for yaw in yaws]).expand(batch, -1, 4, 4).clone()
    return K, ego_T_cam


def pose(x, y, yaw, dtype=torch.float64):
    """world_T_ego (4, 4): the car at (x, y) metres, turned left by `yaw` degrees."""
    a = math.radians(yaw)
    c, s = math.cos(a), math.sin(a)
    return torch.tensor([[c, -s, 0, x], [s, c, 0, y], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=dtype)
