"""Stage 02: the rasteriser against hand-computed cells, shapely and the devkit; the map reader; bad input."""
import importlib
import json
import math
import re
import shutil

import numpy as np
import pytest
import shapely
import torch
from conftest import ROOT, run_script

from reproject import Grid, levelled, load_pt, pose_matrix

stage = importlib.import_module("02_bev_gt")
GRID = Grid((-6.0, 6.0), (-4.0, 4.0), 0.5)  # 24 x 16 cells
HOLE = [(-0.6, -0.6), (0.6, -0.6), (0.6, 0.6), (-0.6, 0.6)]
HERE = torch.eye(4, dtype=torch.float64)
EMPTY = {"version": "1.3", "node": [], "line": [], "polygon": [], "lane_divider": [], "road_divider": [],
         "ped_crossing": [], "road_segment": [], "lane": []}


def road_map(divider=(), boundary=(), ped_crossing=()):
    return {"divider": shapely.STRtree(stage.pieces(divider)), "boundary": shapely.STRtree(stage.pieces(boundary)),
            "ped_crossing": shapely.STRtree(stage.one_way([shapely.Polygon(p) for p in ped_crossing]))}


def pose(x=0.0, y=0.0, degrees=0.0):
    a = math.radians(degrees)
    return HERE.new_tensor([[math.cos(a), -math.sin(a), 0, x], [math.sin(a), math.cos(a), 0, y],
                            [0, 0, 1, 0], [0, 0, 0, 1]])


def filled(bev, name):
    return {tuple(cell) for cell in np.argwhere(bev == stage.CLASSES.index(name)).tolist()}


@pytest.fixture
def fragment():
    path = ROOT.parent / "shared" / "nuscenes_fragment"
    if not path.is_dir():
        pytest.skip(f"{path} is not there")
    return path


# ---------------------------------------------------------------- hand-computed cells

def test_line_ahead():
    """A line along x at y = 0.25: column 7 has its centre on it, columns 6 and 8 are 0.5 m off, column 9 1 m."""
    lines = [[(1.0, 0.25), (4.0, 0.25)]]
    narrow = stage.rasterise(road_map(divider=lines), HERE, GRID, 0.9)
    # x = 6 - (row + 0.5) / 2, so rows 4 to 9 lie within [1, 4]; the round ends reach 0.45 m: rows 3 and 10, 0.25 m off.
    assert filled(narrow, "divider") == {(row, 7) for row in range(3, 11)}
    wide = stage.rasterise(road_map(divider=lines), HERE, GRID, 1.02)  # reaches 0.51 m
    side = {(row, column) for row in range(4, 10) for column in (6, 8)}
    assert filled(wide, "divider") == {(row, 7) for row in range(3, 11)} | side  # corners: hypot(.25, .5) = 0.559 m


@pytest.mark.parametrize("way", [HOLE, HOLE[::-1]])
def test_polygon_with_hole(way):
    square = [(-2, -2), (2, -2), (2, 2), (-2, 2)]
    tree = {**road_map(), "ped_crossing": shapely.STRtree(stage.one_way([shapely.Polygon(square, [way])]))}
    bev = stage.rasterise(tree, HERE, GRID, 0.5)
    rows, columns = range(8, 16), range(4, 12)  # centres within 2 m; the hole takes centres at +-0.25 only
    inside = {(r, c) for r in rows for c in columns} - {(r, c) for r in (11, 12) for c in (7, 8)}
    assert filled(bev, "ped_crossing") == inside


def test_a_bow_tie_with_a_spike_keeps_its_triangles():
    """make_valid makes it a collection of a multipolygon and a line; the triangles are to be drawn all the same."""
    bow_tie = [(-2, -2), (2, 2), (2, -2), (-2, 2)]
    plain, spiked = (filled(stage.rasterise(road_map(ped_crossing=[ring]), HERE, GRID, 0.5), "ped_crossing")
                     for ring in (bow_tie, [*bow_tie, (-2, 3), (-2, 2)]))
    assert plain == spiked and len(plain) == 32  # 8 square metres in cells of 0.25


def test_polygon_partly_outside_the_window():
    bev = stage.rasterise(road_map(ped_crossing=[[(5, 3), (9, 3), (9, 9), (5, 9)]]), HERE, GRID, 0.5)
    assert filled(bev, "ped_crossing") == {(r, c) for r in (0, 1) for c in (0, 1)}
    outside = stage.rasterise(road_map(ped_crossing=[[(7, 5), (9, 5), (9, 9), (7, 9)]]), HERE, GRID, 0.5)
    assert not outside.any()


def test_overlaps_lie_in_order():
    crossing = [(-2, -4), (2, -4), (2, 4), (-2, 4)]
    bev = stage.rasterise(road_map([[(-6, 0.25), (6, 0.25)]], [[(0.25, -4), (0.25, 4)]], [crossing]), HERE, GRID, 0.5)
    names = [stage.CLASSES[bev[cell]] for cell in ((2, 7), (9, 7), (9, 2), (11, 2), (11, 7))]
    assert names == ["divider", "divider", "ped_crossing", "boundary", "boundary"]


def test_sub_pixel_shift():
    """The row where a line's edge passes a cell's centre, to a hundredth of a cell."""
    for shift, expected in ((0.0, {7}), (0.04, {7}), (0.06, {7, 6}), (-0.04, {7}), (-0.06, {7, 8})):
        y = 0.25 + shift  # the centre of column 7 is at 0.25, its neighbours' 0.5 away: reach 0.45 leaves 0.05
        bev = stage.rasterise(road_map(divider=[[(-9, y), (9, y)]]), HERE, GRID, 0.9)
        assert {c for _, c in filled(bev, "divider")} == expected, shift


def test_mean_width_is_line_width():
    """Lines at random angles and offsets cover line_width x length on average."""
    rng, grid, width, area = np.random.default_rng(0), Grid((-30, 30), (-15, 15), 0.3), 0.75, []
    for _ in range(100):
        angle, x, y = rng.uniform(0, math.pi), *rng.uniform(-2, 2, 2)
        d = 5 * np.array((math.cos(angle), math.sin(angle)))
        bev = stage.rasterise(road_map(boundary=[[(x, y) - d, (x, y) + d]]), HERE, grid, width)
        area.append(len(filled(bev, "boundary")) * 0.09)
    assert np.mean(area) == pytest.approx(10 * width + math.pi * width ** 2 / 4, rel=0.01)


# ---------------------------------------------------------------- directions

def test_ahead_left_is_upper_left():
    bev = stage.rasterise(road_map(ped_crossing=[[(4, 2), (5, 2), (5, 3), (4, 3)]]), HERE, GRID, 0.5)
    assert filled(bev, "ped_crossing") == {(2, 2), (2, 3), (3, 2), (3, 3)}


@pytest.mark.parametrize("degrees", [0, 37, 90, -120, 180])
def test_ego_pose(degrees):
    """A thing 4.5 m ahead and 2.5 m left of the car is at the same cells wherever the car stands and looks."""
    world_T_ego = pose(411.3, 1180.9, degrees)
    square = torch.tensor([(4.01, 2.01, 0, 1), (4.99, 2.01, 0, 1), (4.99, 2.99, 0, 1), (4.01, 2.99, 0, 1)]).double()
    world = (square @ world_T_ego.T)[:, :2].tolist()
    bev = stage.rasterise(road_map(ped_crossing=[world]), world_T_ego, GRID, 0.5)
    assert filled(bev, "ped_crossing") == {(2, 2), (2, 3), (3, 2), (3, 3)}


def test_turning_left_moves_things_right():
    north = [[(0, 5), (0, 5.5)]]  # straight left of a car at the origin that looks east
    grid = Grid((-6, 6), (-6, 6), 0.5)
    ahead = filled(stage.rasterise(road_map(north), pose(degrees=0), grid, 0.6), "divider")
    assert ahead == {(11, 1), (12, 1)}
    turned = filled(stage.rasterise(road_map(north), pose(degrees=60), grid, 0.6), "divider")
    assert turned and all(row < 4 and 5 < column < 9 for row, column in turned)  # now 30 degrees left of ahead


def test_levelled_keeps_place_and_heading():
    from nuscenes.eval.common.utils import quaternion_yaw
    from pyquaternion import Quaternion
    q = Quaternion(axis=(0, 0, 1), degrees=75) * Quaternion(axis=(0, 1, 0), degrees=4) * Quaternion(
        axis=(1, 0, 0), degrees=-3)
    record = {"rotation": list(q), "translation": [100.0, 2000.0, 1.5]}
    assert np.allclose(pose_matrix(record)[:3, :3].numpy(), q.rotation_matrix, atol=1e-12)
    quarter = pose_matrix({"rotation": [1, 0, 0, 1], "translation": [5, 6, 7]})  # to the left, not normalised
    assert np.allclose(quarter.numpy(), [[0, -1, 0, 5], [1, 0, 0, 6], [0, 0, 1, 7], [0, 0, 0, 1]], atol=1e-12)
    level = levelled(pose_matrix(record)).numpy()
    assert np.allclose(level[:3, :3], Quaternion(axis=(0, 0, 1), radians=quaternion_yaw(q)).rotation_matrix, atol=1e-12)
    assert level[:3, 3].tolist() == [100.0, 2000.0, 1.5]


# ---------------------------------------------------------------- against others

def test_against_shapely_cell_by_cell():
    """Random geometry, random pose: every cell as an independent distance or containment test has it."""
    rng, grid, width = np.random.default_rng(1), Grid((-12, 12), (-6, 6), 0.3), 0.75
    for _ in range(5):
        world_T_ego = pose(*rng.uniform(0, 2000, 2), rng.uniform(0, 360))
        to_world = lambda xy: (xy @ world_T_ego[:2, :2].numpy().T + world_T_ego[:2, 3].numpy()).tolist()  # noqa: E731
        lines = [to_world(rng.uniform(-15, 15, (4, 2))) for _ in range(3)]
        edges = [to_world(rng.uniform(-15, 15, (3, 2))) for _ in range(2)]
        hulls = [shapely.MultiPoint(rng.uniform(-9, 9, (6, 2))).convex_hull for _ in range(2)]
        bow_tie = np.array([(-8, 4), (-4, 6), (-4, 4), (-8, 6)]) + rng.uniform(-1, 1, 2)
        shapes = [to_world(xy) for xy in (*map(shapely.get_coordinates, hulls), bow_tie)]  # these overlap
        centres = np.array(to_world(grid.centres(HERE).numpy().reshape(-1, 2)))
        points = shapely.points(centres)
        expected = np.zeros(len(points), int)
        for shape in shapes:
            expected[shapely.contains(shapely.make_valid(shapely.Polygon(shape)), points)] = 2
        expected[shapely.distance(shapely.MultiLineString(lines), points) <= width / 2] = 1
        expected[shapely.distance(shapely.MultiLineString(edges), points) <= width / 2] = 3
        bev = stage.rasterise(road_map(lines, edges, shapes), world_T_ego, grid, width)
        assert (bev.ravel() == expected).all()
        assert set(np.unique(bev)) == {0, 1, 2, 3}


def test_pieces_are_the_same_line():
    lines = [[(0, 0), (10, 0), (10, 0.2)], [(5, 5), (5, 5)], [(1, 1)], []]
    got = stage.pieces(lines)
    assert shapely.length(got).max() <= stage.PIECE + 1e-9 and shapely.length(got).sum() == pytest.approx(10.2)
    assert shapely.hausdorff_distance(shapely.line_merge(shapely.union_all(got)),
                                      shapely.LineString(lines[0])) < 1e-9
    assert len(stage.pieces([])) == 0


def test_crossings_against_the_devkit(fragment):
    """The devkit's own mask of the ped_crossing layer, brought to our directions, differs at its rounded rims only."""
    from nuscenes.map_expansion.map_api import NuScenesMap
    devkit = NuScenesMap(str(fragment), "boston-seaport")
    ours, grid = stage.read_map(fragment / "maps/expansion/boston-seaport.json"), Grid((-30, 30), (-15, 15), 0.1)
    ring = ours["ped_crossing"].geometries[0]
    x, y = ring.centroid.x - 5, ring.centroid.y + 2
    for degrees in (0, 33, 200):
        world_T_ego = pose(x, y, degrees)
        bev = stage.rasterise({**road_map(), "ped_crossing": ours["ped_crossing"]}, world_T_ego, grid, 0.75) == 2
        # get_map_mask turns the map until the car looks along +x of its canvas: rows go up along y, columns along x.
        mask = devkit.get_map_mask((x, y, 30, 60), degrees, ["ped_crossing"], (300, 600))[0]
        theirs = mask.astype(bool).T[::-1, ::-1]
        assert bev.sum() > 3000  # 30 square metres
        different = bev != theirs
        assert different.sum() < 0.06 * bev.sum()
        rings = stage.pieces([shapely.get_coordinates(ring) for ring in ours["ped_crossing"].geometries])
        xy_ego = (shapely.get_coordinates(rings) - (x, y)) @ world_T_ego[:2, :2].numpy()
        rim = grid.cells(xy_ego).reshape(-1, 2, 2)
        assert not (different & (stage.draw_lines(rim, np.ones(len(rim)), grid.shape, 1.5) == 0)).any()


# ---------------------------------------------------------------- the map

def write_map(path, **layers):
    """A map expansion file; each layer is a list of polygons (with holes) or lines of (x, y)."""
    table = json.loads(json.dumps(EMPTY))
    for layer, shapes in layers.items():
        for number, shape in enumerate(shapes):
            rings = [shape] if layer.endswith("divider") else shape
            tokens = []
            for ring in rings:
                tokens.append([f"n{len(table['node']) + i}" for i in range(len(ring))])
                table["node"] += [{"token": t, "x": x, "y": y} for t, (x, y) in zip(tokens[-1], ring)]
            token = f"{layer}{number}"
            if layer.endswith("divider"):
                table["line"].append({"token": token, "node_tokens": tokens[0]})
                table[layer].append({"token": token, "line_token": token})
            else:
                table["polygon"].append({"token": token, "exterior_node_tokens": tokens[0],
                                         "holes": [{"node_tokens": hole} for hole in tokens[1:]]})
                table[layer].append({"token": token, "polygon_token": token})
    path.write_text(json.dumps(table))
    return table


def rectangle(x0, y0, x1, y1):
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def test_read_map(tmp_path):
    path = tmp_path / "map.json"
    table = write_map(path, lane_divider=[[(0, 0), (3, 0)]], road_divider=[[(0, 1), (4, 1)], [(0, 2)]],
                      ped_crossing=[[rectangle(0, 0, 4, 4), rectangle(1, 1, 2, 2)]],
                      road_segment=[[rectangle(0, -5, 20, 5)]], lane=[[rectangle(20, -5, 40, 5)]])
    table["road_divider"].append({"token": "x", "line_token": ""})  # as in the real maps
    path.write_text(json.dumps(table))
    got = stage.read_map(path)
    assert shapely.length(got["divider"].geometries).sum() == pytest.approx(7)
    outline, hole = got["ped_crossing"].geometries
    assert shapely.area(shapely.polygons([outline, hole])).tolist() == [16, 1]
    assert shapely.is_ccw(outline) != shapely.is_ccw(hole)
    assert shapely.length(got["boundary"].geometries).sum() == pytest.approx(100)  # 40 x 10 m, no line at x = 20


@pytest.mark.parametrize("gap", [-0.5, 0.0, 0.001, 0.03])
def test_no_boundary_between_abutting_lanes(gap):
    road = [shapely.box(0, 0, 20, 4), shapely.box(0, 4 + gap, 20, 8), shapely.box(20, 0, 40, 8)]
    outline = stage.contour(np.array(road))
    assert len(outline) == 1
    assert shapely.hausdorff_distance(shapely.LineString(outline[0]), shapely.box(0, 0, 40, 8).exterior) < 0.05


def test_contour_has_holes_and_keeps_real_gaps():
    island = shapely.Polygon(rectangle(0, 0, 40, 20), [rectangle(10, 8, 30, 12)])
    assert len(stage.contour(np.array([island]))) == 2
    assert len(stage.contour(np.array([shapely.box(0, 0, 20, 4), shapely.box(0, 4.3, 20, 8)]))) == 2


def test_boundary_is_never_the_window(tmp_path):
    """On a road far wider than the window there is no boundary, wherever the car stands; at its edge there is one."""
    path = tmp_path / "map.json"
    write_map(path, road_segment=[[rectangle(0, 0, 200, 200)]])
    wide = stage.read_map(path)
    for x, y, degrees in ((100, 100, 0), (60, 140, 30), (150, 100, 77)):
        assert not stage.rasterise(wide, pose(x, y, degrees), Grid((-30, 30), (-15, 15), 0.3), 0.75).any()
    bev = stage.rasterise(wide, pose(100, 195), Grid((-30, 30), (-15, 15), 0.3), 0.75)
    columns = {c for _, c in filled(bev, "boundary")}
    # y = 5 lies at column 33.3; centres 32.5 to 34.5 are within 0.375 m = 1.25 cells; in every row, to the very edge
    assert columns == {32, 33, 34} and len(filled(bev, "boundary")) == 3 * 200


@pytest.mark.parametrize("spoil, says", [
    (lambda text: text[:500], "damaged"),
    (lambda text: text.replace('"version": "1.3"', '"version": "1.2"'), "older than version 1.3"),
    (lambda text: text.replace('"version": "1.3"', '"version": "new"'), "damaged"),
    (lambda text: text.replace('"version": "1.3", ', ""), "older than version 1.3"),
    (lambda text: text.replace('"line": ', '"enil": '), "damaged"),
    (lambda text: text.replace('"n0"', '"n99"', 1), "damaged"),
    (lambda text: "[]", "damaged")])
def test_spoilt_maps(tmp_path, spoil, says):
    path = tmp_path / "town.json"
    write_map(path, ped_crossing=[[rectangle(x, 0, x + 2, 4)] for x in range(5)])
    path.write_text(spoil(path.read_text()))
    with pytest.raises(SystemExit) as stop:
        stage.read_map(path)
    message = str(stop.value.code)
    assert message.startswith("error: ") and "\n" not in message
    assert "town.json" in message and says in message and "nuScenes-map-expansion-v1.3.zip" in message


def test_later_versions_of_the_map_are_taken(tmp_path):
    path = tmp_path / "town.json"
    write_map(path, ped_crossing=[[rectangle(0, 0, 2, 4)]])
    for version in ("1.3", "1.10", "2.0"):
        path.write_text(path.read_text().replace('"version": "1.3"', f'"version": "{version}"'))
        assert len(stage.read_map(path)["ped_crossing"].geometries) == 1


def test_official_splits():
    names = ["scene-0103", "scene-0061", "scene-0003", "scene-0001", "scene-9999"]
    assert stage.official_splits(names, "v1.0-trainval") == {"train": ["scene-0001", "scene-0061"],
                                                             "val": ["scene-0003", "scene-0103"]}
    assert stage.official_splits(names, "v1.0-mini") == {"train": ["scene-0061"], "val": ["scene-0103"]}


# ---------------------------------------------------------------- the geo split

def straight(x, y, frames=10, step=4.0):
    """A drive towards +x from (x, y)."""
    return np.stack((x + step * np.arange(frames), np.full(frames, y)), 1)


def test_a_chain_of_scenes_stays_together():
    """a comes near b, and b near c; a and c are 80 m apart. d begins 36 m after the end of c."""
    tracks = {"c": straight(0, 80), "a": straight(0, 0), "b": straight(0, 40), "d": straight(72, 80)}
    assert stage.join_tracks(tracks, 50.0) == [("a", "b", "c", "d")]
    assert stage.join_tracks(tracks, 40.0) == [("a", "b", "c", "d")]  # not "nearer than", but "as near as"
    assert stage.join_tracks(tracks, 39.0) == [("c", "d"), ("a",), ("b",)]
    assert stage.join_tracks(tracks, 30.0) == [("a",), ("b",), ("c",), ("d",)]
    assert stage.join_tracks({**tracks, "d": straight(72, 80, 11)}, 30.0) == [("d",), ("a",), ("b",), ("c",)]


def wander(rng, size):
    """The track of a drive of 2 to 40 key frames that turns at random; or of a parked car."""
    frames, heading = rng.integers(2, 41), rng.uniform(0, 7) + np.cumsum(rng.normal(0, 0.2, 40))
    steps = rng.choice((0.0, 2.0, 5.0)) * np.stack((np.cos(heading), np.sin(heading)), 1)
    return (rng.uniform(0, size, 2) + np.cumsum(steps, 0))[:frames]


@pytest.mark.parametrize("seed, size", [(0, 500), (1, 1200), (2, 1200), (3, 3000)])
def test_geo_split_against_brute_force(seed, size):
    rng = np.random.default_rng(seed)
    tracks = {f"scene-{i:02}": wander(rng, size) for i in range(60)}
    distance = {(a, b): np.linalg.norm(p[:, None] - q, axis=-1).min() for a, p in tracks.items()
                for b, q in tracks.items()}
    component = {name: name for name in tracks}  # the smallest name that can be reached
    for _ in tracks:
        component = {a: min(component[b] for b in tracks if distance[a, b] <= 50) for a in tracks}
    groups = stage.join_tracks(tracks, 50.0)
    assert sorted(groups) == sorted({tuple(b for b in tracks if component[a] == component[b]) for a in tracks})

    split = stage.geo_splits(tracks, 50.0)
    side = {name: key for key, names in split.items() for name in names}
    assert sorted(sum(split.values(), [])) == sorted(tracks) and all(names == sorted(names) for names in split.values())
    assert all(side[a] == side[b] or d > 50 for (a, b), d in distance.items())
    backwards = {name: tracks[name] for name in reversed(tracks)}
    assert stage.geo_splits(backwards, 50.0) == split
    frames = {key: sum(len(tracks[name]) for name in names) for key, names in split.items()}
    largest = max(sum(len(tracks[name]) for name in group) for group in groups)
    for key, share in zip(("geo_train", "geo_val", "geo_test"), (0.7, 0.15, 0.15)):
        assert abs(frames[key] - share * sum(frames.values())) <= largest
        if size == 3000:  # many small groups
            assert frames[key] / sum(frames.values()) == pytest.approx(share, abs=0.02)

    near = np.mean([any(np.linalg.norm(tracks[train] - xy, axis=1).min() <= 5 for train in list(tracks)[20:])
                    for name in list(tracks)[:20] for xy in tracks[name]])
    assert stage.share_near(tracks, list(tracks)[:20], list(tracks)[20:]) == pytest.approx(near)
    assert near > 0 or size == 3000
    assert stage.share_near(tracks, split["geo_val"] + split["geo_test"], split["geo_train"]) == 0


@pytest.mark.parametrize("frames, expected", [
    ([5], ["geo_train"]), ([5, 5], ["geo_train", "geo_val"]), ([1, 99], ["geo_val", "geo_train"]),
    ([5, 5, 5], ["geo_train", "geo_val", "geo_test"]), ([40, 38, 11, 11], ["geo_train"] * 2 + ["geo_val", "geo_test"]),
    ([10, 60, 10, 10, 10], ["geo_val", "geo_train", "geo_test", "geo_train", "geo_val"])])
def test_few_groups(frames, expected):
    """Hand-computed: the largest first, each to the side that lacks most of 70, 15 and 15%; the last to empty ones."""
    tracks = {f"scene-{i}": straight(0, 1000 * i, n) for i, n in enumerate(frames)}
    split = stage.geo_splits(tracks, 50.0)
    assert [key for name in tracks for key, names in split.items() if name in names] == expected


def test_share_near():
    tracks = {"train": np.array([(0.0, 0.0), (100, 0)]), "a": np.array([(0.0, 5.0), (3, 4), (0, 5.01), (96, 0.0)]),
              "b": np.array([(50.0, 0.0)])}
    assert stage.share_near(tracks, ["a"], ["train"]) == 0.75
    assert stage.share_near(tracks, ["a", "b"], ["train"]) == 0.6
    assert stage.share_near(tracks, [], ["train"]) == stage.share_near(tracks, ["a"], []) == 0


# ---------------------------------------------------------------- the script

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A toy world of two scenes; returns the folder that data/toy lies in."""
    cwd = tmp_path_factory.mktemp("bev gt")
    run_script("tests/toyworld.py", "--train-scenes", 1, "--val-scenes", 1, "--frames", 2, cwd=cwd).check_returncode()
    return cwd


def run(cwd, *args, **environment):
    return run_script("02_bev_gt.py", *args, cwd=cwd, **environment)


def fails(result, *words):
    lines = [line for line in result.stderr.splitlines() if "scene/s]" not in line and line.strip()]
    assert result.returncode not in (0, None) and len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert all(word in lines[0] for word in words), lines[0]


def test_script_writes_resumes_and_finishes(world):
    out = world / "out"
    assert run(world).returncode == 0
    splits = json.loads((out / "splits.json").read_text())
    first, second = splits["train"] + splits["val"]
    assert len(splits["train"]) == len(splits["val"]) == 1
    truth = load_pt(out / f"bev_gt/{second}.pt", "")
    assert set(truth) == {"meta", "scene", "token", "bev"} and truth["bev"].dtype == torch.uint8
    assert truth["bev"].shape == (2, 200, 100) and len(truth["token"]) == 2 and truth["scene"] == second
    assert truth["bev"].max() <= 3 and truth["bev"].any()

    stamp = (out / f"bev_gt/{first}.pt").stat().st_mtime_ns
    (out / f"bev_gt/{second}.pt").unlink()
    (out / "splits.json").unlink()
    assert run(world).returncode == 0
    assert torch.equal(load_pt(out / f"bev_gt/{second}.pt", "")["bev"], truth["bev"])
    assert json.loads((out / "splits.json").read_text()) == splits
    assert "nothing to do" in run(world).stdout
    assert (out / f"bev_gt/{first}.pt").stat().st_mtime_ns == stamp
    fails(run(world, "--preset", "paper"), ".pt", "delete", "--out")

    # Another map, or another data set under the same names, is not taken for the finished one.
    paths = list((world / "data/toy/maps/expansion").glob("*.json"))
    for path in paths:
        path.write_text(path.read_text() + " ")
    fails(run(world), ".pt", "map", "delete")


def test_any_number_of_processes_writes_the_same_files(world, tmp_path):
    def files(out):
        return {path.relative_to(out): path.read_bytes() for path in out.rglob("*.*")}

    assert run(world, "--out", tmp_path / "one", "--workers", "0").returncode == 0
    expected = files(tmp_path / "one")
    assert len(expected) == 3
    assert run(world, "--out", tmp_path / "three", "--workers", "3").returncode == 0
    assert files(tmp_path / "three") == expected
    for rank in ("1", "2", "0"):  # torchrun starts them at once, but none may wait for another
        result = run(world, "--out", tmp_path / "ranks", RANK=rank, WORLD_SIZE="3")
        assert result.returncode == 0 and ("geo_val" in result.stdout) == (rank == "0")
        assert len(files(tmp_path / "ranks")) == {"1": 1, "2": 1, "0": 3}[rank]  # a scene; nothing; a scene, the splits
    assert files(tmp_path / "ranks") == expected
    fails(run(world, "--workers", "-1"), "--workers")


def test_geo_split_of_the_script(world, tmp_path, monkeypatch):
    """Two scenes with the same coordinates, first in two locations, then in one; there --geo-distance decides."""
    monkeypatch.setattr("sys.argv", ["02_bev_gt.py"])
    assert stage.parse_args().geo_distance == 50  # m
    root, splits = tmp_path / "data", tmp_path / "out/splits.json"
    shutil.copytree(world / "data/toy", root, ignore=shutil.ignore_patterns("samples"))
    args = ("--dataroot", root, "--out", tmp_path / "out")
    tables = {path.stem: json.loads(path.read_text()) for path in (root / "v1.0-trainval").glob("*.json")}
    first, second = sorted(tables["scene"], key=lambda scene: scene["name"])
    pose_of = {data["sample_token"]: data["ego_pose_token"] for data in tables["sample_data"]
               if "/LIDAR_TOP/" in data["filename"]}
    where = {record["token"]: record for record in tables["ego_pose"]}
    drives = [[where[pose_of[s["token"]]] for s in sorted(tables["sample"], key=lambda s: s["timestamp"])
               if s["scene_token"] == scene["token"]] for scene in (first, second)]
    for here, there in zip(*drives):
        there["translation"] = [here["translation"][0], here["translation"][1] + 3, 0.0]
    (root / "v1.0-trainval/ego_pose.json").write_text(json.dumps(tables["ego_pose"]))
    apart = {"train": [first["name"]], "val": [second["name"]],
             "geo_train": [first["name"]], "geo_val": [second["name"]], "geo_test": []}
    assert "one to train on: val 0.0%, geo_val 0.0%, geo_test 0.0%" in run(tmp_path, *args).stdout
    assert json.loads(splits.read_text()) == apart

    shutil.rmtree(tmp_path / "out")
    town = {"location": tables["log"][0]["location"]}
    (root / "v1.0-trainval/log.json").write_text(json.dumps([record | town for record in tables["log"]]))
    assert "val 100.0%, geo_val 0.0%" in run(tmp_path, *args).stdout
    together = json.loads(splits.read_text())
    assert together == apart | {"geo_train": [first["name"], second["name"]], "geo_val": []}
    assert "nothing to do" in run(tmp_path, *args).stdout
    assert "geo_val 1" in run(tmp_path, *args, "--geo-distance", "2.9").stdout
    assert json.loads(splits.read_text()) == apart
    splits.write_text(json.dumps({"train": [first["name"]], "val": [second["name"]]}))  # from before the geo split
    assert "nothing to do" not in run(tmp_path, *args).stdout
    assert json.loads(splits.read_text()) == together


def test_script_stops_on_bad_input(world, tmp_path):
    root, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(world / "data/toy", root, ignore=shutil.ignore_patterns("samples"))
    args = ("--dataroot", root, "--out", out)
    fails(run(tmp_path, "--dataroot", tmp_path / "nowhere"), "nowhere/v1.0-trainval", "--dataroot")
    for table, spoilt, says in (("log", "[{", "damaged"), ("ego_pose", "[]", "no record")):
        path = root / f"v1.0-trainval/{table}.json"
        whole = path.read_text()
        path.write_text(spoilt)
        fails(run(tmp_path, *args), f"v1.0-trainval/{table}.json", says, "unpack")
        path.write_text(whole)
    path = root / "v1.0-trainval/scene.json"
    whole = path.read_text()
    path.write_text(re.sub(r"scene-\d+", "scene-9999", whole))
    fails(run(tmp_path, *args), "split")
    path.write_text(whole)
    for path in (root / "maps/expansion").glob("*.json"):
        path.unlink()
    fails(run(tmp_path, *args), ".json is missing", "nuScenes-map-expansion-v1.3.zip", "maps")
    assert not (out / "splits.json").exists() and not [path for path in out.rglob("*.tmp")]
