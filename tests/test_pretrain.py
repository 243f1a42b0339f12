"""The two losses of stage 03: near zero for the right map, large for a mirrored or unmoved one, blind where masked."""
import importlib

import pytest
import torch
from rig import pose, surround

from model import PRESETS
from reproject import IGNORE, relative_pose, render, warp

stage = importlib.import_module("03_pretrain")
GRID, EVEN = PRESETS["toy"].grid, (1.0, 1.0, 1.0, 1.0)


def town():
    """Logits (1, 4, H, W), sure of themselves: a divider left of the car, a crossing ahead, a kerb on the right."""
    x, y = GRID.centres(torch.empty(0)).unbind(-1)
    classes = torch.zeros(x.shape, dtype=torch.long)
    classes[(y - 2).abs() < 0.6] = 1
    classes[(x - 9).abs() < 2] = 2
    classes[(y + 5).abs() < 0.6] = 3
    return 12 * torch.nn.functional.one_hot(classes, 4).permute(2, 0, 1)[None].float()


def batch(motion=(0.0, 0.0, 0.0), linked=True, yaws=(0, -55, 55, 180, 110, -110)):
    """Two frames of one sample; the car moves from the origin to `motion` (x m, y m, yaw degrees)."""
    K, ego_T_cam = surround(2, yaws=yaws)
    return {"K": K[None], "ego_T_cam": ego_T_cam[None], "linked": torch.tensor([[False, linked]]),
            "world_T_ego": torch.stack((pose(0, 0, 0), pose(*motion)))[None],
            "label": torch.zeros(1, len(yaws), 144, 256, dtype=torch.uint8)}


def labelled(logits, max_range=torch.inf):
    """A batch whose pseudo-labels are what the cameras see of `logits`, IGNORE elsewhere."""
    frames = batch()
    image, valid = render(logits, frames["K"][:, -1], frames["ego_T_cam"][:, -1], (144, 256), GRID, max_range)
    frames["label"] = torch.where(valid, image.argmax(2), IGNORE).byte()
    return frames


def test_reprojection_loss_knows_the_right_map():
    frames = labelled(town())
    right = stage.reprojection_loss(town(), frames, GRID, EVEN, 25.0)
    assert right < 0.1
    for wrong in (town().flip(3), town().flip(2), town().roll(5, 3)):  # mirrored, back to front, 1.5 m to the right
        assert stage.reprojection_loss(wrong, frames, GRID, EVEN, 25.0) > 5 * right


def test_reprojection_loss_learns_the_map_where_it_is_seen():
    frames = labelled(town(), max_range=15.0)
    logits = torch.zeros(1, 4, *GRID.shape, requires_grad=True)
    optimizer = torch.optim.Adam([logits], 0.3)
    for _ in range(60):
        optimizer.zero_grad()
        stage.reprojection_loss(logits, frames, GRID, (1.0, 5.0, 2.0, 5.0), 15.0).backward()
        optimizer.step()
    touched = logits.detach().abs().amax(1) > 0.5
    assert (logits.argmax(1) == town().argmax(1))[touched].float().mean() > 0.95
    distance = GRID.centres(torch.empty(0)).norm(dim=-1)
    assert touched[0][(distance > 4) & (distance < 10)].float().mean() > 0.6 and not touched[0][distance > 18].any()


def test_reprojection_loss_ignores_what_it_should():
    frames = labelled(town())
    before = stage.reprojection_loss(town(), frames, GRID, EVEN, 10.0)
    _, near = render(town(), frames["K"][:, -1], frames["ego_T_cam"][:, -1], (144, 256), GRID, 10.0)
    frames["label"][~near] = 3  # beyond the range, above the horizon
    assert stage.reprojection_loss(town(), frames, GRID, EVEN, 10.0) == before
    frames["label"][:] = IGNORE
    assert stage.reprojection_loss(town(), frames, GRID, EVEN, 10.0) == 0


def test_temporal_loss_follows_the_motion():
    frames = batch(motion=(3.0, 0.6, 10.0))
    moved, _ = warp(town(), relative_pose(pose(0, 0, 0), pose(3.0, 0.6, 10.0))[None], GRID)
    right, still = (stage.temporal_loss(logits, town(), frames, GRID) for logits in (moved, town()))
    assert right < 0.02 and still > 10 * right
    assert stage.temporal_loss(town(), town(), batch(motion=(3.0, 0.6, 10.0), linked=False), GRID) == 0


def test_temporal_loss_counts_only_what_both_frames_see():
    """One camera, looking ahead: the prediction behind the car may differ, and so may what came into the grid."""
    frames = batch(motion=(2.0, 0.0, 0.0), yaws=(0,))
    logits, _ = warp(town(), relative_pose(pose(0, 0, 0), pose(2.0, 0.0, 0.0))[None], GRID)
    other = logits.clone()
    other[:, :, 105:] = torch.randn_like(other[:, :, 105:])  # from 1.5 m behind the car
    other[:, :, :7] = torch.randn_like(other[:, :, :7])  # the 2 m that were not in the grid of the frame before
    same = stage.temporal_loss(logits, town(), frames, GRID)
    assert stage.temporal_loss(other, town(), frames, GRID) == pytest.approx(same.item(), abs=1e-6)
    other[:, :, 60:70] = torch.randn_like(other[:, :, 60:70])
    assert stage.temporal_loss(other, town(), frames, GRID) > same + 0.01


def test_temporal_loss_pulls_towards_the_frame_before():
    logits = torch.zeros(1, 4, *GRID.shape, requires_grad=True)
    stage.temporal_loss(logits, town(), batch(), GRID).backward()
    seen = logits.grad.abs().sum(1) > 0
    towards = (-logits.grad).argmax(1) == town().argmax(1)
    assert seen.any() and towards[seen].all()
