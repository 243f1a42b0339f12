"""The embedded world: the devkit loads it, the map lies on the paint, and it is the same world each time."""
import importlib
import json

import cv2
import numpy as np
import pytest
import torch
import toyworld
from nuscenes import NuScenes
from nuscenes.map_expansion.map_api import NuScenesMap
from nuscenes.utils.geometry_utils import view_points
from nuscenes.utils.splits import train, val
from pyquaternion import Quaternion
from shapely.geometry import LineString
from shapely.ops import unary_union

from model import PRESETS
from reproject import CAMERAS, render

SIZE = {"seed": 3, "train_scenes": 1, "val_scenes": 1, "frames": 3}
GROUND = (toyworld.ROAD, toyworld.MARKING, toyworld.CROSSWALK, toyworld.CURB, toyworld.SIDEWALK, toyworld.TERRAIN)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small world: its folder, the devkit's view of it, a renderer a scene (by name), and the true labels of each
    image, by (scene name, frame, camera)."""
    root = tmp_path_factory.mktemp("data") / "toy"
    assert toyworld.build_world(root, **SIZE)
    nusc = NuScenes("v1.0-trainval", str(root), verbose=False)
    renderers = {plan.name: toyworld.Renderer(toyworld.make_scene(plan)) for plan in toyworld.plan_scenes(**SIZE)}
    truth = {(name, frame, camera): toyworld.render_frame(renderer, frame, camera)[1]
             for name, renderer in renderers.items() for frame in range(SIZE["frames"]) for camera in toyworld.CAMERAS}
    return root, nusc, renderers, truth


def key_frames(nusc):
    """(scene record, location, frame number, sample record) of every key frame."""
    for scene in nusc.scene:
        sample, frame = nusc.get("sample", scene["first_sample_token"]), 0
        location = nusc.get("log", scene["log_token"])["location"]
        while sample:
            yield scene, location, frame, sample
            sample = nusc.get("sample", sample["next"]) if sample["next"] else None
            frame += 1


def test_the_devkit_loads_everything(world):
    root, nusc, _, _ = world
    assert [scene["name"] in names for scene, names in zip(nusc.scene, (train, val))] == [True, True]
    locations = [nusc.get("log", scene["log_token"])["location"] for scene in nusc.scene]
    assert locations[0] != locations[1]
    assert not set(toyworld.TRAIN_TOWNS) & {toyworld.VAL_TOWN}
    for scene, location, frame, sample in key_frames(nusc):
        times = [nusc.get("sample_data", sample["data"][camera])["timestamp"] for camera in toyworld.CAMERAS]
        assert len(set(times)) == 6 and all(-50_000 < time - sample["timestamp"] < 1_000 for time in times)
        assert nusc.get("sample_data", sample["data"]["LIDAR_TOP"])["timestamp"] == sample["timestamp"]
        for camera in toyworld.CAMERAS:
            assert cv2.imread(nusc.get_sample_data_path(sample["data"][camera])).shape == (288, 512, 3)
    assert sum(1 for _ in key_frames(nusc)) == len(nusc.sample) == 6
    for location in locations:
        town = NuScenesMap(str(root), location)
        filled = [layer for layer in ("road_segment", "lane", "walkway", "stop_line", "road_divider", "drivable_area")
                  if getattr(town, layer)]
        assert len(filled) == 6
        patch = (0, 0, *town.canvas_edge)
        records = town.get_records_in_patch(patch, town.non_geometric_layers)
        assert len(records["lane"]) == len(town.lane) > 0


def test_weather_is_told_in_the_description():
    """Each weather comes in both splits of the default world, and in more than one town."""
    plans = toyworld.plan_scenes(0, 24, 6, 12)
    for kind in ("Night", "Rain"):
        towns = {plan.location for plan in plans if plan.weather == kind}
        assert toyworld.VAL_TOWN in towns and len(towns) == 4
        plan = next(plan for plan in plans if plan.weather == kind)
        assert kind in toyworld.make_scene(plan).description


# ---------------------------------------------------------------------------------------------------------------------
# Where the map lies in the images


def map_points(town, what):
    """(N, 2) world points, 0.25 m apart, of "solid" or "dashed" dividers or of "kerbs" of a NuScenesMap."""
    lines = []
    if what == "kerbs":
        records = town.road_segment + town.lane
        surface = unary_union([town.extract_polygon(record["polygon_token"]) for record in records])
        lines = [LineString(part.exterior.coords) for part in getattr(surface, "geoms", [surface])]
    else:
        for layer in ("road_divider", "lane_divider"):
            for record in getattr(town, layer):
                kind = record[f"{layer}_segments"][0]["segment_type"]
                if what.upper() in kind:
                    lines.append(town.extract_line(record["line_token"]))
    return np.concatenate([[line.interpolate(s).coords[0] for s in np.arange(0, line.length, 0.25)] for line in lines])


def projected(world, what, undo_offset=True, mirror=False, shift=0.0):
    """Yields, for every image, the true labels (288, 512) and what of the map falls into it, as seen at under 12 m:
    pixels (N, 2) and the scale there, in pixels a metre (N,).

    The way of NuScenesMapExplorer.render_map_in_image: world -> ego at the camera's time -> camera -> view_points.
    mirror (left and right swapped) and shift (m, ahead and to the left) spoil the points in the ego frame."""
    root, nusc, renderers, truth = world
    for scene, location, frame, sample in key_frames(nusc):
        points = map_points(NuScenesMap(str(root), location), what)
        offset = toyworld.map_offset(renderers[scene["name"]].scene.plan) * undo_offset
        for camera in toyworld.CAMERAS:
            data = nusc.get("sample_data", sample["data"][camera])
            pose = nusc.get("ego_pose", data["ego_pose_token"])
            mount = nusc.get("calibrated_sensor", data["calibrated_sensor_token"])
            world_xyz = np.pad(points + offset, ((0, 0), (0, 1))).T
            ego = Quaternion(pose["rotation"]).rotation_matrix.T @ (world_xyz - np.c_[pose["translation"]])
            ego = ego * np.c_[[1, -1 if mirror else 1, 1]] + np.c_[[shift, shift, 0]]
            cam = Quaternion(mount["rotation"]).rotation_matrix.T @ (ego - np.c_[mount["translation"]])
            cam = cam[:, (cam[2] > 1) & (np.linalg.norm(cam, axis=0) < 12)]
            pixels = view_points(cam, np.array(mount["camera_intrinsic"]), normalize=True)[:2].T
            inside = (pixels >= 0).all(1) & (pixels < (512, 288)).all(1)
            yield truth[scene["name"], frame, camera], pixels[inside], mount["camera_intrinsic"][0][0] / cam[2, inside]


def hit_fraction(world, what, label, **spoilt):
    """Share of the map's points that are not hidden that fall on pixels of `label`, give or take 1.5 pixels and 0.1 m
    (of a double line the paint lies on both sides of the map's line)."""
    hits = seen = 0
    for truth, pixels, scale in projected(world, what, **spoilt):
        column, row = pixels.astype(int).T
        visible = np.isin(truth[row, column], GROUND)
        distance = cv2.distanceTransform((truth != label).astype(np.uint8), cv2.DIST_L2, 5)[row, column]
        hits += (visible & (distance <= 1.5 + 0.1 * scale)).sum()
        seen += visible.sum()
    assert seen > 100
    return hits / seen


@pytest.mark.parametrize("what, label, least, most", [("solid", toyworld.MARKING, 0.9, 1.0),
                                                      ("dashed", toyworld.MARKING, 0.3, 0.8),
                                                      ("kerbs", toyworld.CURB, 0.9, 1.0)])
def test_the_map_lies_on_what_is_painted(world, what, label, least, most):
    right = hit_fraction(world, what, label)
    assert least <= right <= most
    for spoilt in ({"mirror": True}, {"shift": 0.7}, {"shift": -0.7}):
        assert hit_fraction(world, what, label, **spoilt) < 0.6 * right, spoilt


@pytest.mark.parametrize("what, label, axis", [("dashed", toyworld.MARKING, 0), ("kerbs", toyworld.CURB, 1)])
def test_pixels_are_not_half_a_pixel_off(world, what, label, axis):
    """Across a line, the map's point is in the middle of the run of painted pixels [first, last + 1)."""
    errors = []
    for truth, pixels, _ in projected(world, what):
        for pixel in pixels:
            column, row = pixel.astype(int)
            run, here = (truth[row], column) if axis == 0 else (truth[:, column], row)
            other = np.flatnonzero(run != label)
            first, last = other[other < here].max(initial=-1) + 1, other[other > here].min(initial=len(run)) - 1
            if run[here] == label and first > 0 and last < len(run) - 1 and last - first < 25:
                errors.append((first + last + 1) / 2 - pixel[axis])
    assert len(errors) > 50
    assert abs(np.median(errors)) < 0.2


def test_crossings_lie_on_zebras(world):
    """Painted crossings of the map, seen from above in the raster of labels."""
    _, _, renderers, _ = world
    count = 0
    for renderer in renderers.values():
        district, ground = renderer.scene.district, renderer.ground
        for crossing in district.crossings:
            x, y = crossing.centroid.coords[0]
            column, row = ((np.array([x, y]) - ground.origin) / toyworld.TEXEL).astype(int)
            if 0 <= row < ground.labels.shape[0] and 0 <= column < ground.labels.shape[1]:
                assert ground.labels[row, column] == toyworld.CROSSWALK
                count += 1
    assert count


def test_the_map_is_off_by_a_decimetre_or_two(world):
    offsets = np.array([toyworld.map_offset(plan) for plan in toyworld.plan_scenes(0, 24, 6, 12)])
    assert 0.11 < offsets.std() < 0.19 and np.abs(offsets.mean()) < 0.06 and np.abs(offsets).max() < 0.6
    # The tables hold true pose + offset, for every camera: with it left in, points miss paint that they hit without.
    left_in = hit_fraction(world, "solid", toyworld.MARKING, undo_offset=False)
    assert left_in < hit_fraction(world, "solid", toyworld.MARKING)


def test_about_one_crossing_in_twelve_is_wrong_in_the_map():
    painted, wrong = 0, 0
    for key in range(80):
        district = toyworld.make_district(np.random.default_rng([11, key]), (0.0, 0.0), 1)
        real, mapped = {p.wkt for p in district.crossings}, {p.wkt for p in district.map_crossings}
        painted, wrong = painted + len(real | mapped), wrong + len(real ^ mapped)
    assert 1 / 18 < wrong / painted < 1 / 8


def test_truth_belongs_to_the_image_on_disk(world):
    root, nusc, renderers, _ = world
    scene, _, frame, sample = next(key_frames(nusc))
    for camera in ("CAM_FRONT", "CAM_BACK"):
        on_disk = cv2.imread(nusc.get_sample_data_path(sample["data"][camera]))[..., ::-1]
        image, labels = toyworld.render_frame(renderers[scene["name"]], frame, camera)
        assert np.abs(on_disk.astype(float) - image).mean() < 5
        assert (labels == toyworld.EGO).any() == (camera == "CAM_BACK")


# ---------------------------------------------------------------------------------------------------------------------
# The project's ground truth and reprojection against the devkit's projection of the same map


def rendered_hits(world, spoil):
    """Share of the devkit-projected divider points at which the rendered BEV ground truth shows a line."""
    root, nusc, _, _ = world
    stage1, stage2 = (importlib.import_module(name) for name in ("01_pseudolabel", "02_bev_gt"))
    grid, shots, hits, total = PRESETS["toy"].grid, projected(world, "dashed", undo_offset=False), 0, 0
    for scene in nusc.scene:
        frames, _ = stage1.read_scene(nusc, scene, (288, 512))
        road_map = stage2.read_map(root / f"maps/expansion/{frames['location']}.json")
        for t in range(len(frames["token"])):
            bev = torch.from_numpy(stage2.rasterise(road_map, frames["world_T_ego"][t], grid, 0.75)).long()
            one_hot = torch.nn.functional.one_hot(spoil(bev), 4).permute(2, 0, 1)[None].float()
            image, valid = render(one_hot, frames["K"][t][None], frames["ego_T_cam"][t][None], (288, 512), grid)
            seen = dict(zip(CAMERAS, (image[0].argmax(1) * valid[0]).numpy()))
            for camera in toyworld.CAMERAS:  # in the order of `projected`
                _, pixels, _ = next(shots)
                column, row = pixels.astype(int).T
                hits += np.isin(seen[camera][row, column], (1, 3)).sum()
                total += len(pixels)
    assert total > 300
    return hits / total


def test_render_agrees_with_the_devkit(world):
    """The devkit projects the map's lines point by point, ours rasterises, then renders: points lie on lines."""
    assert rendered_hits(world, lambda bev: bev) > 0.98
    assert rendered_hits(world, lambda bev: bev.flip(1)) < 0.6  # left and right swapped
    assert rendered_hits(world, lambda bev: bev.flip(0)) < 0.9  # ahead and behind: straight roads stay where they were
    assert rendered_hits(world, lambda bev: bev.roll(4, 1)) < 0.3  # 1.2 m to the right


# ---------------------------------------------------------------------------------------------------------------------
# The same world each time


def contents(root):
    """{relative path: bytes} of all files in a folder."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_a_seed_always_makes_the_same_world(tmp_path):
    small = {"train_scenes": 1, "val_scenes": 1, "frames": 1}
    for name, seed, processes in (("a", 5, 2), ("b", 5, 1), ("c", 6, 2)):
        assert toyworld.build_world(tmp_path / name, seed=seed, processes=processes, **small)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    images = [name for name in a if name.endswith(".jpg")]
    assert images and not any(a[name] == c.get(name) for name in images)


def test_sweeps_lie_between_the_key_frames(world, tmp_path):
    """The world with three frames of each camera between two key frames: the devkit follows them in time; the car and
    the others are where they are then; the key frames are those of the world without."""
    root, _, renderers, _ = world
    assert toyworld.build_world(tmp_path / "toy", **SIZE, sweeps=3)
    images = {name: data for name, data in contents(root).items() if name.endswith(".jpg")}
    more = {name: data for name, data in contents(tmp_path / "toy").items() if name.endswith(".jpg")}
    assert images.items() <= more.items()
    assert all(name.startswith("sweeps/CAM_") for name in more.keys() - images.keys())
    nusc = NuScenes("v1.0-trainval", str(tmp_path / "toy"), verbose=False)
    assert len(nusc.sample) == 6
    for scene, camera in [(scene, camera) for scene in nusc.scene for camera in toyworld.CAMERAS]:
        samples = [sample for *_, sample in key_frames(nusc) if sample["scene_token"] == scene["token"]]
        chain = [nusc.get("sample_data", samples[0]["data"][camera])]
        assert chain[0]["prev"] == ""
        while chain[-1]["next"]:
            chain.append(nusc.get("sample_data", chain[-1]["next"]))
            assert chain[-1]["prev"] == chain[-2]["token"]
        assert [data["is_key_frame"] for data in chain] == [True, *[False] * 3] * 2 + [True]
        assert [data["token"] for data in chain[::4]] == [sample["data"][camera] for sample in samples]
        # Of a sweep, the devkit takes the sample for the one that follows: it interpolates from the one before.
        assert [data["sample_token"] for data in chain] == [samples[k]["token"] for k in (0, 1, 1, 1, 1, 2, 2, 2, 2)]
        assert all(abs(step - 125_000) <= 2_000 for step in np.diff([data["timestamp"] for data in chain]))
        for data in chain[5:7]:
            path, _, K = nusc.get_sample_data(data["token"])
            assert cv2.imread(path).shape == (288, 512, 3) and K.shape == (3, 3)
        check_shot(nusc, renderers[scene["name"]], camera, chain[6])


def check_shot(nusc, renderer, camera, data):
    """A sweep's ego pose is the car's at its time, and its picture is what is seen then, not at a key frame."""
    scene = renderer.scene
    time = (data["timestamp"] - scene.plan.timestamp) / 1e6
    pose = nusc.get("ego_pose", data["ego_pose_token"])
    assert pose["timestamp"] == data["timestamp"]
    assert np.allclose(pose["translation"][:2], toyworld.ego_pose(scene, time)[0][:2] + scene.map_offset)
    on_disk = cv2.imread(nusc.get_sample_data_path(data["token"]))[..., ::-1].astype(float)
    then, before = (np.abs(on_disk - renderer.render(camera, t, [1])[0]).mean() for t in (time, time - 0.25))
    places = [toyworld.ego_pose(scene, t)[0] for t in (time, time - 0.25)]
    assert then < 6 and (before > then + 1 or np.allclose(*places, atol=0.2))


def test_an_existing_folder_is_left_alone(world, capsys):
    root = world[0]
    before = contents(root)
    assert toyworld.build_world(root, **SIZE)
    assert "nothing to do" in capsys.readouterr().out
    assert not toyworld.build_world(root, **{**SIZE, "seed": 4})
    assert "remove it" in capsys.readouterr().out
    assert contents(root) == before
    assert json.loads((root / "toyworld.json").read_text())["seed"] == SIZE["seed"]


# ---------------------------------------------------------------------------------------------------------------------
# The segmenter


def test_the_committed_segmenter_is_small_and_good_enough():
    from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation
    folder = toyworld.SEGMENTER_FOLDER
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2_000_000
    model = Mask2FormerForUniversalSegmentation.from_pretrained(folder).eval()
    assert [model.config.id2label[k] for k in range(len(toyworld.LABELS))] == toyworld.LABELS
    images, labels = toyworld.segmenter_images(seed=0, first=1000, count=6, frames=1)
    iou = toyworld.label_iou(toyworld.predict_labels(model, AutoImageProcessor.from_pretrained(folder), images), labels)
    assert iou["Lane Marking - General"] > 0.40
    assert iou["Lane Marking - Crosswalk"] > 0.70
    assert iou["Curb"] > 0.50
