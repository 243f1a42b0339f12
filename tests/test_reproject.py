"""Geometry against hand-computed numbers, finite differences and its own inverse.

A wrong sign, axis or half pixel fails here.
"""
import json
import math
import os

import numpy as np
import pytest
import torch
from PIL import Image
from rig import camera, intrinsics, pose, surround

from model import PRESETS, Config
from reproject import (CAMERAS, Frames, Grid, cells_in_cameras, encode, lift, load_pt, make_meta, mirror,
                       pixels_to_ground, project, read_splits, relative_pose, render, save_pt, transform, warp)

GRID = Grid((-30.0, 30.0), (-15.0, 15.0), 0.3)


def one(K, ego_T_cam):
    """A batch of one sample with one camera."""
    return K.view(1, 1, 3, 3), ego_T_cam.view(1, 1, 4, 4)


def test_grid_lies_as_a_map_is_held():
    centres = GRID.centres(torch.empty(0, dtype=torch.float64))
    assert centres.shape == (200, 100, 2)
    assert centres[0, 0].tolist() == pytest.approx([29.85, 14.85])  # farthest ahead, farthest left
    assert centres[-1, -1].tolist() == pytest.approx([-29.85, -14.85])
    # grid_sample's (column, row): the left front corner of the ground is (-1, -1), a point ahead has a low row.
    assert GRID.normalise(torch.tensor([30.0, 15.0])).tolist() == [-1, -1]
    assert GRID.normalise(torch.tensor([15.0, -15.0])).tolist() == [1, -0.5]


def test_project_hand_computed():
    """10 m ahead, 2 m left, on the ground, seen from 1.5 m: u = 128 - 200 * 2/10, v = 72 + 200 * 1.5/10."""
    uv, depth = project(torch.tensor([10.0, 2.0, 0.0]), intrinsics(), camera())
    assert uv.tolist() == pytest.approx([88.0, 102.0], abs=1e-4)
    assert depth.item() == pytest.approx(10.0)
    # a camera that looks left sees what is left of the car straight ahead, and what is ahead of the car on its right
    uv, depth = project(torch.tensor([[1.0, 10.0, 1.5], [-10.0, -10.0, 0.0]]), intrinsics(), camera(yaw=90))
    assert uv[0].tolist() == pytest.approx([148.0, 72.0], abs=1e-4)
    assert depth.tolist() == pytest.approx([10.0, -10.0])


def test_pixels_to_ground_hand_computed():
    """Row 101 has its centre at v = 101.5: x = 1.5 * 200 / (101.5 - 72); column 27 lies 100.5 px left of the axis."""
    xy, distance = pixels_to_ground(intrinsics(), camera(), (144, 256))
    ahead = 1.5 * 200 / 29.5
    assert xy[101, 27].tolist() == pytest.approx([ahead, 100.5 * ahead / 200], rel=1e-5)
    assert distance[101, 27].item() == pytest.approx(math.hypot(ahead, 100.5 * ahead / 200), rel=1e-5)
    assert torch.isinf(distance[:72]).all() and torch.isfinite(distance[72:]).all()  # the horizon is at v = 72
    beside = camera(x=2.0, y=-1.0)  # as far from this camera's foot, not from the car
    assert torch.equal(pixels_to_ground(intrinsics(), beside, (144, 256))[1], distance)
    # A camera turned by 180 degrees sees the ground behind the car.
    assert (pixels_to_ground(intrinsics(), camera(yaw=180), (144, 256))[0][100:, :, 0] < 0).all()
    # One that looks up by more than its field of view never meets the ground.
    assert torch.isinf(pixels_to_ground(intrinsics(), camera(pitch=-80), (144, 256))[1]).all()


def test_render_hand_computed():
    """A map that holds x in one channel and y in the other shows each pixel's ground point."""
    bev = GRID.centres(torch.empty(0)).permute(2, 0, 1)[None]
    K, ego_T_cam = one(intrinsics(), camera(yaw=30, pitch=4, x=1.0, y=-0.5))
    image, valid = render(bev, K, ego_T_cam, (144, 256), GRID)
    xy, _ = pixels_to_ground(K, ego_T_cam, (144, 256))
    inside = valid & (xy[..., 0].abs() < 29.8) & (xy[..., 1].abs() < 14.8)
    error = (image - xy.permute(0, 1, 4, 2, 3)).abs().amax(2)
    assert inside.sum() > 5000 and error[inside].max() < 1e-3
    # By hand, level camera: pixel (row 101, column 27) lies at x = 10.169, y = 5.110.
    image, _ = render(bev, *one(intrinsics(), camera()), (144, 256), GRID)
    assert image[0, 0, :, 101, 27].tolist() == pytest.approx([10.169, 5.110], abs=1e-3)


def test_a_camera_that_looks_up_sees_no_ground():
    """The ray of its middle pixel is vertical: it must not be cut with the ground below the camera."""
    K = torch.tensor([[100.0, 0, 1.5], [0, 100, 1.5], [0, 0, 1]])[None, None]
    ego_T_cam = torch.tensor([[0.0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 1.5], [0, 0, 0, 1]])[None, None]
    for sign, seen in ((1, False), (-1, True)):  # upwards, then the same camera turned over, x to the front
        ego_T_cam[..., 2, 2], ego_T_cam[..., 1, 0] = sign, -sign
        _, valid = render(torch.zeros(1, 4, 200, 100), K, ego_T_cam, (3, 3), Grid((-30, 30), (-15, 15), 0.3))
        assert (valid == seen).all()


def test_render_validity():
    K, ego_T_cam = one(intrinsics(), camera())
    _, valid = render(torch.zeros(1, 1, 200, 100), K, ego_T_cam, (144, 256), GRID)
    assert not valid[0, 0, :72].any()  # above the horizon
    assert not valid[0, 0, 75].any()  # 1.5 * 200 / 3.5 = 86 m: outside the grid
    assert valid[0, 0, 84, 128] and not valid[0, 0, 84, 0]  # 24 m ahead; column 0 would be 15.3 m to the left
    assert valid[0, 0, 85, 0]  # and here 14.2 m
    _, near = render(torch.zeros(1, 1, 200, 100), K, ego_T_cam, (144, 256), GRID, max_range=10.0)
    assert near[0, 0, 103, 128] and not near[0, 0, 100, 128]  # 9.5 m and 10.5 m


@pytest.mark.parametrize("cell", (0.3, 0.35))  # the second one does not divide the ground evenly
def test_cells_are_counted_from_the_far_left_corner(cell):
    grid = Grid((-30.0, 30.0), (-15.0, 15.0), cell)
    cells = grid.cells(grid.centres(torch.empty(0, dtype=torch.float64)).numpy())
    assert np.allclose(cells[0, 0], 0.5) and np.allclose(cells[7, 30], (7.5, 30.5))
    assert np.allclose(cells[-1, -1], np.array(grid.shape) - 0.5)


def test_render_gradcheck():
    grid = Grid((-3.0, 3.0), (-2.0, 2.0), 1.0)
    K = intrinsics(6.0, 4.0, 2.0, torch.float64)
    K, ego_T_cam = one(K, camera(pitch=20, dtype=torch.float64))
    bev = torch.randn(1, 2, 6, 4, dtype=torch.float64, requires_grad=True)
    assert render(bev, K, ego_T_cam, (5, 8), grid)[1].any()
    assert torch.autograd.gradcheck(lambda b: render(b, K, ego_T_cam, (5, 8), grid)[0], bev)


def test_lift_after_render_returns_the_map():
    """A smooth map, rendered into a fine image and lifted back, is itself wherever a camera sees it well."""
    xy = GRID.centres(torch.empty(0))
    bev = torch.stack(((xy[..., 0] / 3).sin(), (xy[..., 1] / 2 + 1).cos(), (xy.sum(-1) / 4).sin()))[None]
    K, ego_T_cam = surround()
    K[..., :2, :] *= 3
    image, _ = render(bev, K, ego_T_cam, (432, 768), GRID)
    back, seen = lift(image, K, ego_T_cam, GRID), cells_in_cameras(K, ego_T_cam, (432, 768), GRID)[1].any(1)
    near = seen & (xy.norm(dim=-1) < 12)
    assert near.sum() > 4000
    assert (back - bev).abs().amax(1)[near].max() < 0.03
    assert (back.flip(3) - bev).abs().amax(1)[near].mean() > 0.5  # a mirrored map is another map
    assert (back * ~seen.unsqueeze(1)).abs().max() == 0


def test_lift_averages_over_the_cameras_that_see_a_cell():
    """Two cameras at the same place disagree, and a third one looks back."""
    K, ego_T_cam = (t[None] for t in (intrinsics().expand(3, -1, -1), torch.stack((camera(), camera(), camera(180)))))
    scores = torch.tensor([1.0, 3.0, 7.0]).view(1, 3, 1, 1, 1).expand(1, 3, 1, 144, 256)
    mean = lift(scores, K, ego_T_cam, GRID)
    row, column = 66, 50  # 10 m ahead
    assert mean[0, 0, row, column] == pytest.approx(2.0) and mean[0, 0, 133, column] == pytest.approx(7.0)
    assert mean[0, 0, 100, column] == 0  # the car's own place


def test_two_rigs_in_one_batch_equal_two_runs():
    first, second = surround(), surround(yaws=(10, -70, 40, 170, 120, -100), height=1.8, x=0.7)
    K, ego_T_cam = (torch.cat(pair) for pair in zip(first, second))
    bev = torch.randn(2, 4, 200, 100)
    image, valid = render(bev, K, ego_T_cam, (144, 256), GRID)
    lifted = lift(image, K, ego_T_cam, GRID)
    for b, rig in enumerate((first, second)):
        alone, valid_alone = render(bev[b:b + 1], *rig, (144, 256), GRID)
        torch.testing.assert_close(image[b:b + 1], alone)
        assert torch.equal(valid[b:b + 1], valid_alone)
        torch.testing.assert_close(lifted[b:b + 1], lift(alone, *rig, GRID))


def test_warp_lands_where_the_map_says():
    """A post at world (20, 5); the car moves 6 m ahead and turns left by 90 degrees: the post goes to its right."""
    world_T_prev, world_T_cur = pose(4, 2, 0), pose(10, 2, 90)
    prev = torch.zeros(1, 1, 200, 100)
    prev[0, 0, 46, 39] = 1  # 16.05 m ahead, 3.15 m left
    prev_T_cur = relative_pose(world_T_prev, world_T_cur)[None]
    cur = warp(prev, prev_T_cur, GRID)
    # From (10, 2) facing +y: 3.15 m ahead, 10.05 m to the right (y = -10.05): row 89.5, column 83.5.
    total = cur.sum()
    rows, columns = torch.arange(200.0) + 0.5, torch.arange(100.0) + 0.5
    assert total == pytest.approx(1.0, abs=1e-3)
    assert ((cur[0, 0].sum(1) * rows).sum() / total).item() == pytest.approx((30 - 3.15) / 0.3, abs=0.01)
    assert ((cur[0, 0].sum(0) * columns).sum() / total).item() == pytest.approx((15 + 10.05) / 0.3, abs=0.01)
    # What is 25 m ahead of the turned car is 27 m left of the old one, outside its grid. The car's own cell is inside.
    ones = warp(torch.ones(1, 1, 200, 100), prev_T_cur, GRID)[0, 0]
    assert ones[16, 50] == 0 and ones[100, 50] == pytest.approx(1.0)


def test_warp_by_nothing_is_nothing():
    bev = torch.randn(2, 3, 50, 25)
    same = warp(bev, torch.eye(4).expand(2, 4, 4), GRID)
    torch.testing.assert_close(same, bev, atol=1e-4, rtol=0)


def test_relative_pose_keeps_millimetres_far_from_the_origin():
    a, b = pose(2000.125, 1000.25, 30), pose(2000.625, 1000.25, 30)
    motion, turn = relative_pose(a, b), math.radians(30)
    assert motion[:2, 3].tolist() == pytest.approx([0.5 * math.cos(turn), -0.5 * math.sin(turn)], abs=1e-6)


def test_cells_in_cameras():
    _, inside = cells_in_cameras(*one(intrinsics(), camera()), (144, 256), GRID)
    assert inside[0, 0, 66, 50] and not inside[0, 0, 133, 50]  # 10 m ahead, 10 m behind
    assert not inside[0, 0, 95, 50]  # 1.35 m ahead: v = 72 + 200 * 1.5/1.35 lies below the image


# ---------------------------------------------------------------- files

def write_scene(out, name, config, times, size=None):
    """A frames file and its bev_gt with flat-coloured images; frame t has colour 10 t."""
    h, w = size or config.image_size
    K, ego_T_cam = surround(len(times))
    frames = {"meta": make_meta(config, {}), "scene": name, "location": "boston-seaport", "description": "day",
              "token": [f"{name}-{t}" for t in range(len(times))],
              "timestamp": torch.tensor([int(t * 1e6) for t in times]), "K": K, "ego_T_cam": ego_T_cam,
              "image": [[encode(Image.new("RGB", (w, h), (10 * t,) * 3), "JPEG")] * 6 for t in range(len(times))],
              "label": [[encode(Image.new("L", (w, h), t % 4), "PNG")] * 6 for t in range(len(times))],
              "world_T_ego": torch.stack([pose(t, 0, 0) for t in times])}
    frames["meta"]["image_size"] = [h, w]
    save_pt(frames, out / "frames" / f"{name}.pt")
    save_pt({"meta": make_meta(config, {}), "scene": name, "token": frames["token"],
             "bev": torch.zeros(len(times), *config.grid.shape, dtype=torch.uint8)}, out / "bev_gt" / f"{name}.pt")


def test_frames_history_and_gaps(tmp_path):
    config = PRESETS["toy"]
    write_scene(tmp_path, "a", config, [0.0, 0.5, 3.0, 3.5])  # a gap of 2.5 s after the second
    write_scene(tmp_path, "b", config, [0.0])
    frames = Frames(tmp_path, ["a", "b"], config, history=2, bev_gt=True)
    assert len(frames) == 5
    assert [frames[i]["linked"].tolist() for i in range(5)] == [
        [False, False, False], [False, False, True], [False, True, False], [True, False, True], [False, False, False]]
    item = frames[3]
    assert item["image"].shape == (3, 6, 3, 144, 256) and item["bev"].shape == (200, 100)
    assert [round(item["image"][t].float().mean().item()) for t in range(3)] == [10, 20, 30]  # in time order
    assert (item["label"] == 3).all() and item["label"].shape == (6, 144, 256)
    assert item["world_T_ego"][:, 0, 3].tolist() == [0.5, 3.0, 3.5]
    assert (frames[4]["image"] == 0).all()  # never a frame of another scene
    write_scene(tmp_path, "a", config, [0.0, 1.9, 4.0])
    assert [Frames(tmp_path, ["a"], config)[i]["linked"].item() for i in range(3)] == [False, True, False]


def test_a_mirrored_drive_is_as_true_as_the_first(tmp_path):
    """What was seen to the left at a place is seen to the right at the mirrored place, in the mirrored camera."""
    config = PRESETS["toy"]
    write_scene(tmp_path, "a", config, [0.0, 0.5])
    frames = Frames(tmp_path, ["a"], config, history=1, bev_gt=True)
    scene = frames.scenes[0]
    scene["world_T_ego"] = torch.stack((pose(5, 2, 10), pose(7, 3, 25)))
    scene["K"][:, CAMERAS.index("CAM_FRONT_LEFT")] = intrinsics(210.0, 141.0, 70.0)  # a lens of its own, off the middle
    scene["K"][:, CAMERAS.index("CAM_FRONT_LEFT"), 0, 1] = 8.0  # and askew
    scene["bev"][1, 20, 10] = 1  # far ahead, on the left
    paint = torch.zeros(6, 144, 256, dtype=torch.uint8)
    paint[CAMERAS.index("CAM_FRONT_LEFT"), 100, 30] = 2  # near the left edge of the left camera
    scene["label"][1] = [encode(Image.fromarray(p.numpy()), "PNG") for p in paint]
    item, other = frames[1], frames[(1, True, 1)]
    assert other["bev"][20, 89] == 1 and other["bev"].sum() == 1
    assert other["label"][CAMERAS.index("CAM_FRONT_RIGHT"), 100, 225] == 2 and other["label"].sum() == 2
    flip = torch.tensor((1.0, -1.0, 1.0))
    for t, names in ((0, ("CAM_FRONT_LEFT", "CAM_FRONT_RIGHT")), (1, ("CAM_BACK", "CAM_BACK"))):
        n, m = map(CAMERAS.index, names)
        point = torch.tensor((9.0, 4.0, 0.3)) if t == 0 else torch.tensor((-8.0, 1.5, 0.2))
        (u, v), depth = project(point, item["K"][t, n], item["ego_T_cam"][t, n])
        (u2, v2), depth2 = project(point * flip, other["K"][t, m], other["ego_T_cam"][t, m])
        assert depth > 0 and torch.allclose(torch.stack((256 - u, v, depth)), torch.stack((u2, v2, depth2)), atol=1e-3)
    motion, mirrored = (relative_pose(i["world_T_ego"][0], i["world_T_ego"][1]) for i in (item, other))
    assert torch.allclose(transform(mirrored, torch.tensor((3.0, -2.0, 0.0))),
                          transform(motion, torch.tensor((3.0, 2.0, 0.0))) * flip, atol=1e-4)
    assert frames[(1, False, 0)]["image"].shape[0] == 1  # a single frame, where no history is asked for
    image = torch.zeros(2, 6, 3, 144, 256, dtype=torch.uint8)
    image[1, CAMERAS.index("CAM_FRONT_LEFT"), :, 100, 30] = 9  # where the label has its paint
    seen = mirror(item | {"image": image})["image"]
    assert (seen[1, CAMERAS.index("CAM_FRONT_RIGHT"), :, 100, 225] == 9).all() and seen.sum() == 27


def test_frames_and_truth_of_ones_own_making(tmp_path):
    """Files that another program wrote: nothing says which cameras and what drive, the source is a text, matrices have
    another precision."""
    config = PRESETS["toy"]
    write_scene(tmp_path, "a", config, [0.0, 0.5])
    ours = Frames(tmp_path, ["a"], config, bev_gt=True)[1]
    for folder, matrices in (("frames", {"K": torch.float64, "ego_T_cam": torch.float64, "world_T_ego": torch.float32}),
                             ("bev_gt", {})):
        content = torch.load(tmp_path / folder / "a.pt", weights_only=True)
        del content["meta"]["cameras"]
        content["meta"]["source"] = "a simulator, version 2"
        content = {key: value for key, value in content.items() if key not in ("scene", "location", "description")}
        save_pt(content | {key: content[key].to(kind) for key, kind in matrices.items()}, tmp_path / folder / "a.pt")
    theirs = Frames(tmp_path, ["a"], config, bev_gt=True)
    assert all(theirs[1][key].dtype == value.dtype and torch.equal(theirs[1][key], value)
               for key, value in ours.items() if key not in ("token", "world_T_ego"))
    torch.testing.assert_close(theirs[1]["world_T_ego"], ours["world_T_ego"], atol=1e-4, rtol=0)
    scene = theirs.scenes[0]
    assert scene["meta"]["source"]["text"] == "a simulator, version 2"
    assert scene["scene"] == "a" and scene["description"] == ""  # what 03 and 05 ask for


def test_what_cannot_be_mirrored_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="the same to the left and to the right"):
        Frames(tmp_path, [], Config(y_range=(-10.0, 20.0)))


def test_digest_tells_labels_apart(tmp_path):
    """What a half-done training is compared by: same files, same digest; other labels or scenes, another one."""
    config = PRESETS["toy"]
    for scene in "ab":
        write_scene(tmp_path, scene, config, [0.0, 0.5])
    first = Frames(tmp_path, ["a"], config, bev_gt=True).digest
    assert Frames(tmp_path, ["a"], config, bev_gt=True).digest == first
    assert Frames(tmp_path, ["b"], config, bev_gt=True).digest != first
    frames = torch.load(tmp_path / "frames/a.pt", weights_only=True)
    frames["label"][1][5][-20] += 1  # a bit, near the end of a picture
    save_pt(frames, tmp_path / "frames/a.pt")
    second = Frames(tmp_path, ["a"], config, bev_gt=True).digest
    assert second != first
    truth = torch.load(tmp_path / "bev_gt/a.pt", weights_only=True)
    truth["bev"][1, 7, 7] = 1
    save_pt(truth, tmp_path / "bev_gt/a.pt")
    assert Frames(tmp_path, ["a"], config, bev_gt=True).digest != second
    assert Frames(tmp_path, ["a"], config).digest == Frames(tmp_path, ["a"], config).digest


@pytest.mark.parametrize("damage, says", [
    (lambda out, config: (out / "frames/a.pt").unlink(), "frames/a.pt is missing: run 01"),
    (lambda out, config: (out / "bev_gt/a.pt").unlink(), "bev_gt/a.pt is missing: run 02"),
    (lambda out, config: os.truncate(out / "frames/a.pt", 5000), "a.pt is damaged"),
    (lambda out, config: write_scene(out, "a", config, [0.0], (72, 128)), "image_size [72, 128], expected [144, 256]"),
    (lambda out, config: save_pt({"meta": make_meta(Config(cell=0.5), {}), "token": ["a-0"], "bev": [0]},
                                 out / "bev_gt/a.pt"),
     "cell 0.5, expected 0.3"),
    *((lambda out, config, changes=changes: save_pt({"meta": make_meta(Config(), {}) | changes, "token": ["a-0"],
                                                     "bev": [0]}, out / "bev_gt/a.pt"), says) for changes, says in (
        ({"line_width": 0.6}, "line_width 0.6, expected 0.75"), ({"format": 0}, "format 0, expected 1"),
        ({"x_range": [-20.0, 40.0]}, "x_range [-20.0, 40.0], expected [-30.0, 30.0]"),
        ({"y_range": [-9.0, 9.0]}, "y_range [-9.0, 9.0], expected [-15.0, 15.0]"),
        ({"classes": ["background", "kerb"]}, "classes ['background', 'kerb'], expected ['background', 'divider'"))),
    (lambda out, config: save_pt(load_pt(out / "frames/a.pt", "") | {"meta": make_meta(config, {}) | {"classes": []}},
                                 out / "frames/a.pt"), "frames/a.pt was made with classes [], expected"),
    (lambda out, config: save_pt({"meta": make_meta(config, {}), "token": ["x"], "bev": [0]}, out / "bev_gt/a.pt"),
     "other key frames"),
    (lambda out, config: save_pt({"model": {}}, out / "frames/a.pt"), "a.pt is no file of stage 01, 02 or 03: run 01"),
    (lambda out, config: torch.save(torch.load(out / "frames/a.pt"), out / "frames/a.pt",
                                    _use_new_zipfile_serialization=False), "a.pt is no file of stage 01, 02 or 03"),
    (lambda out, config: save_pt(load_pt(out / "bev_gt/a.pt", "") | {"bev": torch.zeros(1, 100, 200).byte()},
                                 out / "bev_gt/a.pt"), "a.pt: its bev is no map of (200, 100) cells and our classes"),
    *((lambda out, config, value=value: save_pt(load_pt(out / "bev_gt/a.pt", "") | {
        "bev": torch.full((1, 200, 100), value)}, out / "bev_gt/a.pt"),
       "a.pt: its bev is no map of (200, 100) cells and our classes") for value in (4, -1)),
    *((lambda out, config, key=key: save_pt((old := load_pt(out / "frames/a.pt", "")) | {
        key: [old[key][0][:5]] if isinstance(old[key], list) else old[key][:, :5]}, out / "frames/a.pt"),
       "frames/a.pt has views of [5, 6] cameras, CAMERAS in reproject.py are 6: run 01_pseudolabel.py")
      for key in ("image", "label", "K", "ego_T_cam")),
])
def test_bad_artifacts_are_one_line(tmp_path, damage, says):
    config = PRESETS["toy"]
    write_scene(tmp_path, "a", config, [0.0])
    damage(tmp_path, config)
    with pytest.raises(SystemExit) as stop:
        Frames(tmp_path, ["a"], config, bev_gt=True)
    assert says in str(stop.value) and "\n" not in str(stop.value)


@pytest.mark.parametrize("key, picture", (
    ("label", Image.new("L", (256, 144), 4)), ("label", Image.new("L", (128, 72))),
    ("label", Image.new("RGB", (256, 144))), ("image", Image.new("L", (256, 144))),
    ("image", Image.new("RGB", (128, 72)))))
def test_pictures_that_cannot_be_are_one_line(tmp_path, key, picture):
    """A class that there is not, another size, grey for coloured and the other way round; all six of a frame alike."""
    write_scene(tmp_path, "a", PRESETS["toy"], [0.0, 0.5])
    content = load_pt(tmp_path / "frames/a.pt", "")
    content[key][1] = [encode(picture, "PNG")] * 6
    save_pt(content, tmp_path / "frames/a.pt")
    frames = Frames(tmp_path, ["a"], PRESETS["toy"])
    frames[0]
    with pytest.raises(SystemExit, match=f"frames/a.pt: {key} of frame 1 is damaged: delete the file"):
        frames[1]


def test_save_pt_is_whole_or_not_at_all(tmp_path):
    save_pt({"a": 1}, tmp_path / "x.pt")
    with pytest.raises(Exception):
        save_pt({"a": lambda: 1}, tmp_path / "x.pt")  # cannot be pickled
    assert load_pt(tmp_path / "x.pt", "") == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_read_splits(tmp_path):
    with pytest.raises(SystemExit, match="run 02_bev_gt.py"):
        read_splits(tmp_path)
    (tmp_path / "splits.json").write_text(json.dumps({"train": ["a"], "val": []}))
    assert read_splits(tmp_path)["train"] == ["a"]
    with pytest.raises(SystemExit, match="from before the geo split: run 02_bev_gt.py again"):
        read_splits(tmp_path, "geo_val")
