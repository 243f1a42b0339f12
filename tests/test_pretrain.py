"""The losses of stage 03: near zero for the right map, large for a mirrored or unmoved one, blind where masked. And
what the cameras of a scene agree on, for a world that is known."""
import argparse
import importlib
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rig import pose, surround

from model import PRESETS, BEVSegmenter, image_loss
from reproject import IGNORE, Grid, pixels_to_ground, relative_pose, render, warp

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


@pytest.mark.parametrize("smear", (False, True))
def test_temporal_loss_follows_the_motion(smear):
    frames = batch(motion=(3.0, 0.6, 10.0))
    moved = warp(town(), relative_pose(pose(0, 0, 0), pose(3.0, 0.6, 10.0))[None], GRID)
    right, still = (stage.temporal_loss(logits, town(), frames, GRID, smear) for logits in (moved, town()))
    assert right < 0.02 and still > 10 * right
    assert stage.temporal_loss(town(), town(), batch(motion=(3.0, 0.6, 10.0), linked=False), GRID, smear) == 0


def test_the_mended_temporal_loss_does_not_ask_for_blur():
    """Carried by half a cell, every edge of the last prediction is half one class, half the other."""
    frames, motion = batch(motion=(0.15, 0.15, 0.0)), relative_pose(pose(0, 0, 0), pose(0.15, 0.15, 0.0))[None]
    carried = warp(town().softmax(1), motion, GRID)
    blurred = carried.clamp(min=1e-6).log()
    sharp = 12 * torch.nn.functional.one_hot(carried.argmax(1), 4).permute(0, 3, 1, 2).float()
    shifted = sharp.roll(2, 3)  # 0.6 m aside: what consistency is for
    smear = [stage.temporal_loss(logits, town(), frames, GRID, smear=True) for logits in (sharp, blurred, shifted)]
    within = [stage.temporal_loss(logits, town(), frames, GRID) for logits in (sharp, blurred, shifted)]
    assert smear[1] < 1e-4 < smear[0] < smear[2]  # it wants the blur
    assert within[0] < 1e-6 and within[1] < 1e-6 and within[2] > 0.2 * smear[2]


def test_temporal_loss_counts_only_what_both_frames_see():
    """One camera, looking ahead: the prediction behind the car may differ, and so may what came into the grid."""
    frames = batch(motion=(2.0, 0.0, 0.0), yaws=(0,))
    logits = warp(town(), relative_pose(pose(0, 0, 0), pose(2.0, 0.0, 0.0))[None], GRID)
    other = logits.clone()
    other[:, :, 105:] = torch.randn_like(other[:, :, 105:])  # from 1.5 m behind the car
    other[:, :, :7] = torch.randn_like(other[:, :, :7])  # the 2 m that were not in the grid of the frame before
    same = stage.temporal_loss(logits, town(), frames, GRID)
    assert stage.temporal_loss(other, town(), frames, GRID) == pytest.approx(same.item(), abs=1e-6)
    other[:, :, 60:70] = torch.randn_like(other[:, :, 60:70])
    assert stage.temporal_loss(other, town(), frames, GRID) > same + 0.01


@pytest.mark.parametrize("metres, rows", ((2.0, slice(90, 93)),  # 2.2 to 2.9 m ahead now, 4.2 to 4.9 m before
                                          (-2.0, slice(84, 87))))  # 4.0 to 4.7 m ahead now, 2.0 to 2.7 m before
def test_temporal_loss_does_not_count_what_one_frame_did_not_see(metres, rows):
    """The camera looks 5 degrees down, and half of its image is 72 / 200 high: it sees the ground from 3.2 m on."""
    frames = batch((metres, 0, 0), yaws=(0,))
    logits = warp(town(), relative_pose(pose(0, 0, 0), pose(metres, 0, 0))[None], GRID)
    other = logits.clone()
    other[:, :, rows] = 9 * torch.randn_like(other[:, :, rows])
    assert stage.temporal_loss(other, town(), frames, GRID) == stage.temporal_loss(logits, town(), frames, GRID)


@pytest.mark.parametrize("smear", (False, True))
def test_temporal_loss_by_hand(smear):
    """All classes alike where one was sure: it has 0.75 too little, the three others each 0.25 too much."""
    sure = torch.zeros(1, 4, *GRID.shape)
    sure[:, 2] = 50.0
    assert stage.temporal_loss(0 * sure, sure, batch(), GRID, smear).item() == pytest.approx(0.75 ** 2 + 3 * 0.25 ** 2)


@pytest.mark.parametrize("smear", (False, True))
def test_temporal_loss_pulls_towards_the_frame_before(smear):
    """Towards its class in each cell; or, near an edge, towards one that a cell next to it has."""
    logits = torch.zeros(1, 4, *GRID.shape, requires_grad=True)
    stage.temporal_loss(logits, town(), batch(), GRID, smear).backward()
    seen = logits.grad.abs().sum(1) > 0
    there = torch.nn.functional.one_hot(town().argmax(1), 4).permute(0, 3, 1, 2).float()  # (1, 4, H, W)
    around = there if smear else torch.nn.functional.max_pool2d(there, 3, 1, 1)
    towards = around.gather(1, (-logits.grad).argmax(1, keepdim=True))[:, 0] == 1
    assert seen.float().mean() > 0.5 and towards[seen].all()


# ---------------------------------------------------------------- what the cameras of a scene agree on

def flags(**changes):
    """The default flags of stage 03, some of them changed."""
    argv, sys.argv = sys.argv, ["03_pretrain.py"]
    try:
        return argparse.Namespace(**{**vars(stage.parse_args()), **changes})
    finally:
        sys.argv = argv


def painted(x, y):
    """What lies at world places (numpy arrays, metres): class indices. The line at y = 2 is 0.15 m wide and dashed, 3 m
    of paint in every 7; a crossing lies from x = 20 to 23; the kerb at y = -5 is 0.3 m wide."""
    world = np.zeros(x.shape, np.uint8)
    world[(np.abs(y - 2) < 0.075) & (x % 7 < 3)] = 1
    world[(x > 20) & (x < 23) & (np.abs(y) < 4)] = 2
    world[np.abs(y + 5) < 0.15] = 3
    return world


def drive(places, hide=(), pitch=0.0):
    """Frames-like: one scene of a car at the given (x m, y m, yaw degrees), whose six cameras label what is painted.

    The pixels' rays are cut with the ground here, by numpy. hide: pairs (frame, camera) that see nothing but a lorry.
    pitch: degrees by which the cameras look down more than the scene's poses say, as if the ground rose ahead."""
    a = math.radians(pitch)
    nose_down = torch.tensor([[math.cos(a), 0, math.sin(a), 0], [0, 1, 0, 0], [-math.sin(a), 0, math.cos(a), 0],
                              [0, 0, 0, 1]])
    labels, (K, ego_T_cam) = {}, surround(len(places))
    poses = torch.stack([pose(*place) for place in places])
    v, u = np.mgrid[:144, :256] + 0.5
    for t in range(len(places)):
        cameras = []
        for n in range(6):
            world_T_cam = (poses[t] @ (nose_down @ ego_T_cam[t, n]).double()).numpy()
            rays = np.stack(((u - 128) / 200, (v - 72) / 200, np.ones_like(u)), -1) @ world_T_cam[:3, :3].T
            with np.errstate(divide="ignore"):
                far = world_T_cam[2, 3] / -rays[..., 2]
            ground = (far > 0) & np.isfinite(far)
            x, y = (world_T_cam[k, 3] + np.where(ground, far, 0) * rays[..., k] for k in (0, 1))
            cameras.append(np.where(ground & ((t, n) not in hide), painted(x, y), IGNORE))
        labels[t] = torch.from_numpy(np.stack(cameras)).byte()
    scene = {"K": K, "ego_T_cam": ego_T_cam, "world_T_ego": poses,
             "timestamp": torch.arange(len(places)) * 500_000 + 1_600_000_000_000_000, "token": list(places)}
    return SimpleNamespace(scenes=[scene], decode=lambda index, t, key: labels[t])


def strip(consensus, t, frames, x, y):
    """The classes that the map of frame t has at world places x, y (arrays, metres)."""
    places = torch.tensor(np.stack(np.broadcast_arrays(x, y), -1), dtype=torch.float64)  # (..., 2)
    ego_T_world = frames.scenes[0]["world_T_ego"][t].inverse()
    xy = places @ ego_T_world[:2, :2].T + ego_T_world[:2, 3]
    row, column = (torch.floor((edge - xy[..., k]) / 0.3).long() for k, edge in enumerate((30, 15)))
    return consensus[t][row, column]


DRIVE = [(2.5 * t, 0.1 * t, 2.0 * t) for t in range(8)]


def test_consensus_is_the_map_in_the_style_of_the_truth():
    frames = drive(DRIVE)
    maps = stage.consensus(frames, 0, PRESETS["toy"], flags())
    assert maps.shape == (8, 200, 100) and maps.dtype == torch.uint8
    x = np.arange(0, 17, 0.3)  # from dash to dash; the next one lies behind the crossing
    for t in (0, 3, 7):
        assert (strip(maps, t, frames, x, 2.0) == 1).float().mean() > 0.95  # the dashes are joined
        assert (strip(maps, t, frames, x, 2.0 + 0.8) == 0).all() and (strip(maps, t, frames, x, 2.0 - 0.8) == 0).all()
        assert (strip(maps, t, frames, x, -5.0) == 3).float().mean() > 0.95
        assert (strip(maps, t, frames, x, 5.0) == 0).float().mean() > 0.95  # and nothing at the mirrored place
        assert (strip(maps, t, frames, np.linspace(20.3, 22.7, 9), -2.0) == 2).all()
    columns = strip(maps, 4, frames, x[:, None], np.arange(1, 3, 0.05))  # across the line
    assert 0.65 < 0.05 * (columns == 1).sum(1).float().mean() < 1.0  # 0.75 m and a cell's rounding
    raw = stage.consensus(frames, 0, PRESETS["toy"], flags(target="painted"))
    assert 0.2 < (strip(raw, 4, frames, x, 2.0) == 1).float().mean() < 0.6


def test_lines_lie_where_they_are_painted():
    """The middle of the divider drawn, in the world, for four places of the raster: half a cell of it is 0.075 m."""
    grid, middle = PRESETS["toy"].grid, []
    cells = grid.centres(torch.zeros(1, dtype=torch.float64))  # (H, W, 2)
    for shift in (0, 0.0375, 0.075, 0.1125):
        frames = drive([(2.0 + 3.1 * t, shift + 0.13 * t, 3.0 * t - 9.0) for t in range(7)])
        maps = stage.consensus(frames, 0, PRESETS["toy"], flags())
        for bev, world_T_ego in zip(maps, frames.scenes[0]["world_T_ego"]):
            y = (cells[bev == 1] @ world_T_ego[:2, :2].T + world_T_ego[:2, 3])[:, 1]
            middle.append(y[(y - 2).abs() < 1].mean())
    assert abs(sum(middle) / len(middle) - 2) < 0.03


def test_other_frames_see_what_is_hidden():
    """A lorry hides what lies ahead of the fourth frame, in all its cameras: others saw it, within --view-range."""
    frames = drive(DRIVE, hide=[(3, n) for n in range(6)])
    everyone, alone = (stage.consensus(frames, 0, PRESETS["toy"], flags(view_range=s)) for s in (math.inf, 0.0))
    x = np.arange(8, 17, 0.3)
    assert (strip(everyone, 3, frames, x, 2.0) == 1).float().mean() > 0.95
    assert (alone[3] == IGNORE).all() and (strip(alone, 2, frames, np.arange(10, 14, 0.3), -5.0) == 3).any()
    near = stage.consensus(frames, 0, PRESETS["toy"], flags(view_range=0.5))
    assert (strip(near, 3, frames, x, -5.0) == 3).float().mean() > 0.5  # frames 2 and 4


def test_views_between_key_frames_vote():
    """Key frames see nothing but a lorry; views between them, at quarters of a second, see the road. The maps are
    still those of the key frames, and --view-range counts for all views."""
    frames = drive(DRIVE, hide=[(t, n) for t in range(4) for n in range(6)])
    scene = frames.scenes[0]  # four key frames, then four views that belong between them
    scene["token"] = scene["token"][:4]
    scene["timestamp"] = scene["timestamp"][0] + torch.tensor([0, 500, 1000, 1500, 250, 750, 1250, 1400]) * 1000
    maps = stage.consensus(frames, 0, PRESETS["toy"], flags())
    assert maps.shape == (4, 200, 100)
    x = np.arange(8, 17, 0.3)
    for t in range(4):  # where the car is at a key frame, not at a view
        assert (strip(maps, t, frames, x, 2.0) == 1).float().mean() > 0.95
        assert (strip(maps, t, frames, x, -5.0) == 3).float().mean() > 0.95
    near = stage.consensus(frames, 0, PRESETS["toy"], flags(view_range=0.2))
    assert (near[:3] == IGNORE).all() and (near[3] != IGNORE).any()  # 100 ms away from the last view
    for key in ("timestamp", "K", "ego_T_cam", "world_T_ego"):
        scene[key] = scene[key][:4]
    assert (stage.consensus(frames, 0, PRESETS["toy"], flags()) == IGNORE).all()


def test_parallel_lines_are_told_apart():
    """The two kerbs of a median strip, 1.2 m apart, at 20 degrees to the rows: both have their middle and direction.
    A faint line beside them has none, a round spot next to none."""
    x, y = torch.meshgrid(*[torch.arange(150.0)] * 2, indexing="ij")
    angle, metres = math.radians(20), stage.RASTER
    aside = metres * ((y - 70) * math.cos(angle) - (x - 75) * math.sin(angle))  # of the first kerb
    kerbs = [torch.exp(-(offset / 0.2) ** 2 / 2) for offset in (aside, aside - 1.2)]
    row, column, direction = stage.middle_of_lines(0.5 * sum(kerbs))
    inside = (row > 15) & (row < 135) & (column > 15) & (column < 135)
    assert (torch.rad2deg(direction[inside]) - 20).abs().max() < 2
    for place in (0, 1.2):
        found = inside & ((aside[row, column] - place).abs() < 0.6 * metres)
        assert len(row[found].unique()) == 119  # in each row
    assert (((aside[row, column] - 0.6).abs() - 0.6).abs() < 1.5 * metres)[inside].all()  # and nothing between
    faint = stage.middle_of_lines(torch.cat((0.5 * sum(kerbs), 0.2 * sum(kerbs))))[0]
    assert (faint < 150).any() and not (faint > 160).any()
    spot = torch.exp(-((x - 75) ** 2 + (y - 75) ** 2) * (metres / 0.5) ** 2 / 2)
    assert (spot > 0.25).sum() > 50 and len(stage.middle_of_lines(spot)[0]) < 5


@pytest.mark.parametrize("width", (0.1, 0.15, 0.3))
def test_paint_of_any_width_is_a_line(width):
    """Votes as `draw` blurs them: where all paint of a scene is thin, no cell has many."""
    across = stage.RASTER * (torch.arange(41) - 20.25)
    share = [0.5 * math.erf((y + width / 2) / 0.2 / 2 ** 0.5) - 0.5 * math.erf((y - width / 2) / 0.2 / 2 ** 0.5)
             for y in across.tolist()]
    row, column, _ = stage.middle_of_lines(torch.tensor(share).expand(60, -1).contiguous())
    assert row.unique().tolist() == list(range(60)) and (column - 20).abs().max() <= 1
    assert not len(stage.middle_of_lines(0.09 * torch.tensor(share).expand(60, -1) / max(share))[0])


@pytest.mark.parametrize("side", (1, -1))
@pytest.mark.parametrize("radius", (50, 80, 150, 1e4))
def test_dashes_are_joined_around_bends(radius, side):
    """3 m of paint, 9 m without, on a circle to either side: the length of the line drawn, and nothing far from it."""
    along = torch.arange(0, 60, stage.RASTER / 2)
    angle = along[along % 12 < 3] / radius
    row, column = (x / stage.RASTER for x in (5 + radius * angle.sin(), 40 + side * radius * (1 - angle.cos())))
    cells = torch.stack((row.round().long(), column.round().long(), angle.mul(side * 1e4).long())).unique(dim=1)
    line = stage.join_dashes(cells[0], cells[1], cells[2] / 1e4, (450, 540), *stage.LINES["divider"])
    x, y = (stage.RASTER * place for place in line.nonzero().float().unbind(1))
    to_centre = radius - side * (y - 40)
    assert ((x - 5).hypot(to_centre) - radius).abs().max() < 0.35
    found = (radius * torch.atan2(x - 5, to_centre)).round().unique()
    assert set(range(0, 51)) <= set(found.int().tolist())  # the last dash begins at 48 m


def test_a_stop_line_is_no_divider():
    """Straight runs of cells, 4.5 m and 9 m long: the first is shorter than any divider. Kerbs may be of any length."""
    for cells, expected in ((30, 0), (60, 60)):
        row, column, direction = torch.arange(20, 20 + cells), torch.full((cells,), 10), torch.zeros(cells)
        line = stage.join_dashes(row, column, direction, (100, 20), *stage.LINES["divider"])
        assert line[20:20 + cells, 10].sum() == expected and line.sum() <= expected + 2  # a cell at each end
        kerb = stage.join_dashes(row, column, direction, (100, 20), *stage.LINES["boundary"])
        assert kerb[20:20 + cells, 10].sum() == cells and kerb.sum() <= cells + 2


def test_dashes_are_joined_across_nine_metres_and_solid_lines_are_not():
    """As in the US: 10 feet of paint, 30 feet without, here 21 and 61 cells. Then a solid line that ends before a
    junction and begins anew behind it, as far away."""
    def joined(*runs):
        row = torch.cat([torch.arange(*run) for run in runs])
        line = stage.join_dashes(row, torch.full_like(row, 10), torch.zeros(len(row)), (400, 20),
                                 *stage.LINES["divider"])
        assert line[:, 10].sum() == line.sum()
        return line[:, 10]

    dashes = joined((20, 41), (102, 123), (184, 205))
    assert dashes[20:205].all() and dashes.sum() <= 187
    assert joined((20, 48), (101, 129), (182, 210))[20:210].all()  # 4 m and 8 m, and a cell that blur has added
    solid = joined((20, 120), (181, 281))
    assert solid[20:120].all() and solid[181:281].all() and solid.sum() <= 204  # a cell at each end


@pytest.mark.parametrize("metres, name, joined", ((2.4, "boundary", True), (4.5, "boundary", False),
                                                  (6.45, "divider", True), (7.65, "divider", False)))
def test_gaps_in_solid_lines(metres, name, joined):
    """A driveway interrupts a kerb, a parked car hides a divider for less than 7 m."""
    gap = round(metres / stage.RASTER)
    row = torch.cat((torch.arange(20, 120), torch.arange(119 + gap, 219 + gap)))
    line = stage.join_dashes(row, torch.full_like(row, 10), torch.zeros(len(row)), (400, 20), *stage.LINES[name])
    assert line[120:119 + gap, 10].all() == joined and line[20:120, 10].all() and line[119 + gap:219 + gap, 10].all()


def test_a_direction_has_two_names():
    """pi / 2 and -pi / 2: two dashes of 4.5 m along the columns, 4.5 m apart: one line. (Alone, too short for one.)"""
    column = torch.cat((torch.arange(20, 50), torch.arange(80, 110)))
    direction = (math.pi / 2 - 1e-3) * (1 - 2.0 * (column > 60))
    line = stage.join_dashes(torch.full_like(column, 10), column, direction, (20, 130), *stage.LINES["divider"])
    assert line[10, 20:110].all() and line.sum() <= 92  # a cell at each end


@pytest.mark.parametrize("turn, one", ((0.1, True), (0.3, False)))
def test_a_line_goes_on_only_in_its_own_direction(turn, one):
    """Two runs of 4.5 m behind each other, the second said to be turned; each alone is too short for a divider."""
    row = torch.cat((torch.arange(20, 50), torch.arange(52, 82)))
    line = stage.join_dashes(row, torch.full_like(row, 10), turn * (row > 50), (100, 20), *stage.LINES["divider"])
    assert line[20:82, 10].all() == line.any() == one


def test_a_line_is_followed_in_its_direction():
    """9 m along the diagonal are a divider; the same cells, each said to lie in the other diagonal, are none."""
    place = torch.arange(20, 62)
    for direction, long in ((math.pi / 4, True), (-math.pi / 4, False)):
        line = stage.join_dashes(place, place, torch.full((42,), direction), (80, 80), *stage.LINES["divider"])
        assert line[place, place].all() == long and line.any() == long


def test_pixels_beside_what_hides_the_ground_do_not_vote():
    frames, label = drive(DRIVE[:1]), torch.zeros(6, 144, 256, dtype=torch.uint8)
    label[0, 100:103, 100:103], label[0, 101, 101] = 1, IGNORE  # eight pixels around a hidden one, 6 m ahead
    frames.decode = lambda *_: label
    shown, own, beside = (stage.cast_votes(frames, 0, [0], flags(margin=m))[0].sum((1, 2)) for m in (-1, 0, 1))
    assert beside[1] == 0 < own[1] == shown[1] and shown[0] > own[0]  # with -1, the hidden one is background


def test_the_slope_of_the_ground_is_found():
    """Cameras that look down by 1.5 degrees more than they say: the crossing, x = 20 to 23, comes out too far ahead,
    unless that is found."""
    frames = drive([(2.5 * t, 0.2 * t, 15 - 4 * t) for t in range(8)], pitch=1.5)
    assert math.degrees(stage.find_slope(frames, 0, flags())) == pytest.approx(1.5, abs=0.3)
    assert stage.find_slope(drive(DRIVE), 0, flags()) == 0
    down = drive([(2.5 * t, 0.2 * t, 15 - 4 * t) for t in range(8)], pitch=-1.5)
    assert math.degrees(stage.find_slope(down, 0, flags())) == pytest.approx(-1.5, abs=0.3)
    bare = SimpleNamespace(scenes=frames.scenes, decode=lambda *_: torch.zeros(6, 144, 256, dtype=torch.uint8))
    assert stage.find_slope(bare, 0, flags()) == 0  # without paint all slopes agree as well: level
    level, sloped = (stage.consensus(frames, 0, PRESETS["toy"], flags(slope=on)) for on in (False, True))
    for x, there in ((20.1, True), (23.5, False)):
        found, found_level = (strip(maps, 4, frames, x, np.linspace(-3.5, 1, 15)) == 2 for maps in (sloped, level))
        assert (found == there).all() and (found_level != there).float().mean() > 0.9


def test_each_view_votes_with_its_own_cameras():
    """One pixel of the second frame, whose cameras lie 0.6 m farther ahead and have longer lenses."""
    frames, label = drive([(0, 0, 0), (3, 0, 0)]), torch.full((6, 144, 256), IGNORE, dtype=torch.uint8)
    label[0, 110, 150] = 1
    frames.decode, scene = lambda *_: label, frames.scenes[0]
    scene["ego_T_cam"][1, :, 0, 3] = 0.6
    scene["K"][1, :, 0, 0] = scene["K"][1, :, 1, 1] = 250.0
    votes, corner = stage.cast_votes(frames, 0, [1], flags(margin=0))
    (name, *cell), = votes.nonzero().tolist()
    xy, _ = pixels_to_ground(scene["K"][1, 0], scene["ego_T_cam"][1, 0], (144, 256))
    off = corner + (torch.tensor(cell) + 0.5) * stage.RASTER - xy[110, 150] - torch.tensor((3.0, 0.0))
    assert name == 1 and off.abs().max() < 0.5 * stage.RASTER + 1e-3


def test_a_boundary_lies_over_a_divider():
    """Where both are drawn, as in the ground truth (02)."""
    votes = torch.full((4, 200, 200), 0.1)
    votes[1, :, 100] = votes[3, 100] = 5
    drawn = stage.draw(votes, PRESETS["toy"], False)
    assert (drawn[100] == 3).all() and (drawn[:, 100] == 1).sum() > 180


def test_most_cameras_win():
    """One frame of eight takes the crossing for a kerb, and everything near it: seven do not."""
    frames = drive(DRIVE)
    honest = frames.decode
    frames.decode = lambda index, t, key: honest(index, t, key) + (honest(index, t, key) == 2) * (t == 3)
    maps = stage.consensus(frames, 0, PRESETS["toy"], flags())
    crossing = strip(maps, 3, frames, np.linspace(20.3, 22.7, 9)[:, None], np.linspace(-3, 1, 9))
    assert (crossing == 2).float().mean() > 0.9


@pytest.mark.parametrize("finer", (1, 2))
def test_votes_are_all_reprojections_at_once(finer):
    """A map, rendered into every camera as in the paper and compared with all their labels, has the same cross-entropy
    as it has with the votes. A pixel half as high, of an image with 288 rows, counts more."""
    frames, args = drive(DRIVE[:3]), flags(margin=0)
    scene, grid, size = frames.scenes[0], Grid((-30.0, 30.0), (-30.0, 30.0), 0.15), (144 * finer, 256 * finer)
    coarse = frames.decode
    frames.decode = lambda *which: coarse(*which).repeat_interleave(finer, 1).repeat_interleave(finer, 2)
    scene["K"][..., :2, :] *= finer

    def log_p(xy_world):  # a smooth map of the world: (..., 2) m -> (..., classes)
        x, y = xy_world.float().unbind(-1)
        return torch.stack((2 + 0 * x, (x / 3).sin(), (y / 4).cos(), ((x + y) / 5).sin()), -1).log_softmax(-1)

    every_pixel = 0
    for t in range(3):
        world_T_ego, label = scene["world_T_ego"][t], frames.decode(0, t, "label")
        bev = log_p(grid.centres(world_T_ego) @ world_T_ego[:2, :2].T + world_T_ego[:2, 3]).permute(2, 0, 1)[None]
        camera = scene["K"][t][None], scene["ego_T_cam"][t][None]
        image, valid = render(bev, *camera, size, grid, stage.MAX_RANGE)
        loss = torch.nn.functional.nll_loss(image[0], torch.where(valid[0], label, IGNORE).long(), ignore_index=IGNORE,
                                            reduction="none")
        _, distance = pixels_to_ground(*camera, size)
        every_pixel += (loss / (1 + distance[0] ** 2 / (36 * finer))).sum()
    votes, corner = stage.cast_votes(frames, 0, range(3), args)
    cells = torch.stack(torch.meshgrid(*[torch.arange(n) + 0.5 for n in votes.shape[1:]], indexing="ij"), -1) * 0.15
    assert -(votes * log_p(cells + corner).permute(2, 0, 1)).sum() == pytest.approx(every_pixel.item(), rel=2e-3)


def test_image_loss_by_hand():
    """70 x 120 pixels, padded below and on the right to 80 x 128. All that count, the top left ones in each 2 x 2, are
    divider; nothing is known: 5 log 4."""
    model = SimpleNamespace(image_head=lambda x: x, finest=torch.zeros(6, 4, 40, 64))
    model.finest[:, 2, 35:] = model.finest[:, 2, :, 60:] = 99  # beyond the image
    label = torch.ones(1, 6, 70, 120, dtype=torch.uint8)
    label[..., 1::2, :], label[..., 1::2] = 2, 2
    assert image_loss(model, label).item() == pytest.approx(5 * math.log(4))


def test_image_loss_compares_each_pixel_with_its_label():
    model = BEVSegmenter(PRESETS["toy"])  # features at an eighth of the image, logits at half of it
    label = torch.zeros(1, 6, 144, 256, dtype=torch.uint8)
    label[0, 2, 96:104, 40:48] = 2  # the pixels of one feature
    features, optimizer = torch.zeros(6, 64, 18, 32), torch.optim.Adam(model.image_head.parameters(), 0.3)
    features[:, 0] = 1
    features[2, :, 12, 5] = torch.eye(64)[1]
    model.finest = features
    for _ in range(40):
        optimizer.zero_grad()
        loss = image_loss(model, label)
        loss.backward()
        optimizer.step()
    assert loss < 1e-3
    model.finest = features.roll(1, 3)  # the same, one feature to the right
    assert image_loss(model, label) > 1e-3
    label[:] = IGNORE
    assert image_loss(model, label) == 0
