"""Stage 01: labels from hand-made query logits, cameras and poses against the devkit, files, resuming, bad input."""
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from PIL import Image

from model import PRESETS
from reproject import CAMERAS, IGNORE, Frames, load_pt, project, save_pt

stage = importlib.import_module("01_pseudolabel")
BACKGROUND, DIVIDER, CROSSING, BOUNDARY = range(4)
NAMES = ["Road", "Lane Marking - General", "Lane Marking - Crosswalk", "Curb", "Sidewalk", "Terrain", "Building",
         "Vegetation", "Car", "Person", "Pole", "Sky", "Ego Vehicle"]
SIZE = (16, 32)


def labels(picture, size=(8, 16), least=0.4):
    """labels_from_queries for one query a label, each sure of its label and of its mask: picture holds label names."""
    class_logits = torch.cat((torch.eye(len(NAMES)) * 20, torch.zeros(len(NAMES), 1)), 1)
    masks = torch.stack([torch.from_numpy(picture == name).float() * 40 - 20 for name in NAMES])
    return stage.labels_from_queries(class_logits, masks, stage.group_labels(NAMES), picture.shape, size, least)


def paint(**areas):
    """A picture (16, 32) of label names, Road everywhere but in the areas: name = slices."""
    picture = np.full(SIZE, "Road", dtype="<U30")
    for name, where in areas.items():
        picture[where] = {"Marking": NAMES[1], "Crosswalk": NAMES[2]}.get(name, name)
    return picture


# ---------------------------------------------------------------- labels from queries

def test_each_label_becomes_its_class():
    picture = paint(Marking=np.s_[:, 4:8], Crosswalk=np.s_[:, 12:16], Curb=np.s_[:, 20:24], Car=np.s_[:, 28:])
    expected = [0, 0, 1, 1, 0, 0, 2, 2, 0, 0, 3, 3, 0, 0, IGNORE, IGNORE]
    assert labels(picture).tolist() == [expected] * 8
    assert labels(picture).dtype == torch.uint8


def test_what_hides_the_ground_is_ignored():
    for name in ("Building", "Vegetation", "Car", "Person", "Pole", "Sky", "Ego Vehicle"):
        assert (labels(np.full(SIZE, name)) == IGNORE).all()
    for name in ("Road", "Sidewalk", "Terrain"):
        assert (labels(np.full(SIZE, name)) == BACKGROUND).all()


@pytest.mark.parametrize("at", range(8, 16))
@pytest.mark.parametrize("width, size", [(1, (8, 16)), (2, (8, 16)), (2, (6, 13)), (3, (4, 8))])
def test_thin_paint_survives(at, width, size):
    """A line of half a pixel's width or more keeps a pixel in every row, wherever it lies on the coarser grid."""
    got = labels(paint(Marking=np.s_[:, at:at + width]), size)
    assert (got == DIVIDER).any(1).all()
    assert ((got == DIVIDER) | (got == BACKGROUND)).all()
    assert ((got == DIVIDER).sum(1) <= 2).all()  # and does not grow fat
    assert labels(paint(Curb=np.s_[:, at:at + width]), size).eq(BOUNDARY).any(1).all()


def test_contact_line():
    """Road against pavement is a boundary, a pixel wide on each side; a kerb or a car between them is not."""
    for name in ("Sidewalk", "Terrain"):
        got = labels(paint(**{name: np.s_[:, 16:]}))
        assert got.tolist() == [[0] * 7 + [BOUNDARY, BOUNDARY] + [0] * 7] * 8
        assert labels(paint(**{name: np.s_[8:]})).tolist() == [[0] * 16] * 3 + [[BOUNDARY] * 16] * 2 + [[0] * 16] * 3
    kerb = labels(paint(Curb=np.s_[:, 14:16], Sidewalk=np.s_[:, 16:]))
    assert kerb.tolist() == [[0] * 7 + [BOUNDARY] + [0] * 8] * 8
    car = labels(paint(Car=np.s_[:, 14:16], Sidewalk=np.s_[:, 16:]))
    assert car.tolist() == [[0] * 7 + [IGNORE] + [0] * 8] * 8
    assert (labels(paint(Sidewalk=np.s_[:, :16], Terrain=np.s_[:, 16:])) == BACKGROUND).all()
    assert (labels(paint(Car=np.s_[:, 16:])) != BOUNDARY).all()


def test_contact_line_from_every_side():
    """One pixel of verge in a road; to its left paint, above it a crossing."""
    group = torch.full((5, 5), list(stage.GROUPS).index("carriageway"))
    group[2, 2], group[2, 1], group[1, 2] = (list(stage.GROUPS).index(n) for n in ("verge", "divider", "ped_crossing"))
    assert {tuple(p) for p in stage.contact_line(group).nonzero().tolist()} == {(2, 2), (1, 2), (3, 2), (2, 1), (2, 3)}


def test_contact_line_of_a_crossing_and_of_a_corner():
    got = labels(paint(Crosswalk=np.s_[:, :16], Sidewalk=np.s_[:, 16:]))
    assert got.tolist() == [[2] * 8 + [BOUNDARY] + [0] * 7] * 8
    got = labels(paint(Sidewalk=np.s_[8:, 16:]))
    assert {tuple(p) for p in (got == BOUNDARY).nonzero().tolist()} == (
        {(r, c) for r in range(4, 8) for c in (7, 8)} | {(r, c) for r in (3, 4) for c in range(8, 16)})


def test_only_lines_win_from_less_than_half():
    """6 of 16 pixels are enough for paint and kerbs (2 * 0.375 > 0.625), for nothing else. They are no surer for it."""
    for name, expected in (("Marking", DIVIDER), ("Curb", BOUNDARY), ("Crosswalk", BACKGROUND), ("Car", BACKGROUND)):
        assert labels(paint(**{name: np.s_[:3, 4:6]}), (4, 8), 0.35)[0, 1] == expected, name
    assert labels(paint(Marking=np.s_[:3, 4:6]), (4, 8), 0.4)[0, 1] == IGNORE


def test_unsure_pixels_are_ignored():
    class_logits = torch.zeros(1, len(NAMES) + 1)
    class_logits[0, :2] = torch.tensor((10.0, 9.0))  # Road 0.73, marking 0.27; the gain of lines does not suffice
    answer = (class_logits, torch.full((1, *SIZE), 5.0), stage.group_labels(NAMES), SIZE, (8, 16))
    assert (stage.labels_from_queries(*answer, 0.7) == BACKGROUND).all()
    assert (stage.labels_from_queries(*answer, 0.75) == IGNORE).all()


def test_no_object_and_scale_of_masks_do_not_matter():
    """"No object" takes no part, and a query's mask need not be near 1: probabilities are shares of what is said."""
    class_logits = torch.full((2, len(NAMES) + 1), -20.0)
    class_logits[0, 0], class_logits[1, 3], class_logits[:, -1] = 5.0, 5.0, 8.0  # both say "no object" at 95 %
    masks = torch.stack((torch.full(SIZE, -3.0), torch.full(SIZE, -9.0)))  # Road at 5 %, kerb at 0.01 %
    got = stage.labels_from_queries(class_logits, masks, stage.group_labels(NAMES), SIZE, (8, 16), 0.9)
    assert (got == BACKGROUND).all()


def test_masks_are_upsampled_before_the_sigmoid():
    """Halfway between logits 10 and -2 the mask is at 4, sure, where a mean of sigmoids would be at 0.56."""
    class_logits = torch.full((2, len(NAMES) + 1), -20.0)
    class_logits[0, 1], class_logits[1, 0] = 20.0, 20.0
    masks = torch.tensor([[[10.0, -2.0]], [[0.0, 0.0]]])  # marking from left to right, road at 0.5 everywhere
    got = stage.labels_from_queries(class_logits, masks, stage.group_labels(NAMES), (1, 8), (1, 8), 0.0)
    assert got.tolist() == [[1] * 6 + [0] * 2]  # logit above -0.69, or 0.33 for the share of 1/3: columns 0 to 5


def test_all_mapillary_names():
    """The 65 of Mapillary Vistas 1.2, in its order."""
    mapillary = """Bird, Ground Animal, Curb, Fence, Guard Rail, Barrier, Wall, Bike Lane, Crosswalk - Plain, Curb Cut,
        Parking, Pedestrian Area, Rail Track, Road, Service Lane, Sidewalk, Bridge, Building, Tunnel, Person,
        Bicyclist, Motorcyclist, Other Rider, Lane Marking - Crosswalk, Lane Marking - General, Mountain, Sand, Sky,
        Snow, Terrain, Vegetation, Water, Banner, Bench, Bike Rack, Billboard, Catch Basin, CCTV Camera, Fire Hydrant,
        Junction Box, Mailbox, Manhole, Phone Booth, Pothole, Street Light, Pole, Traffic Sign Frame, Utility Pole,
        Traffic Light, Traffic Sign (Back), Traffic Sign (Front), Trash Can, Bicycle, Boat, Bus, Car, Caravan,
        Motorcycle, On Rails, Other Vehicle, Trailer, Truck, Wheeled Slow, Car Mount, Ego Vehicle"""
    mapillary = re.split(r",\s+", mapillary)
    assert len(set(mapillary)) == 65 and set(NAMES) <= set(mapillary)
    group = stage.group_labels(mapillary)
    assert group.sum(1).eq(1).all()
    found = {name: {mapillary[i] for i in group[:, n].nonzero().flatten()} for n, name in enumerate(stage.GROUPS)}
    assert found["divider"] == {"Lane Marking - General"} and found["kerb"] == {"Curb"}
    assert found["ped_crossing"] == {"Lane Marking - Crosswalk", "Crosswalk - Plain"}
    assert found["carriageway"] == {"Road", "Bike Lane", "Service Lane", "Parking", "Rail Track", "Manhole", "Pothole",
                                    "Catch Basin"}
    assert found["verge"] == {"Sidewalk", "Pedestrian Area", "Curb Cut", "Terrain", "Sand", "Snow"}


def test_unknown_and_missing_names():
    with pytest.raises(SystemExit) as stop:
        stage.group_labels(NAMES + ["Lava", "Moon"])
    assert "['Lava', 'Moon']" in stop.value.code and "Lane Marking - General" in stop.value.code
    with pytest.raises(SystemExit) as stop:
        stage.group_labels([name for name in NAMES if name != "Curb"])
    assert "no label for ['kerb']" in stop.value.code and "Lane Marking - Crosswalk" in stop.value.code
    with pytest.raises(SystemExit) as stop:
        stage.group_labels(["road", "sidewalk", "car"])  # Cityscapes' names
    assert "no label for ['divider', 'ped_crossing', 'kerb', 'carriageway', 'verge']" in stop.value.code


@pytest.mark.parametrize("mode", ("RGB", "L", "P", "RGBA"))
def test_the_segmenter_is_shown_an_image_of_its_own_size(tmp_path, mode):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (180, 320, 3), np.uint8)).convert(mode)
    picture.save(tmp_path / "a.png")
    _, shown = stage.load_image(tmp_path / "a.png", (36, 64), (96, 160))
    wanted = picture.convert("RGB").resize((160, 96), Image.Resampling.BILINEAR)
    assert np.array_equal(shown.permute(1, 2, 0), wanted)


# ---------------------------------------------------------------- the script

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A toy world of two scenes, and a tiny Mask2Former that knows nothing; returns the folder they lie in."""
    from transformers import (Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor,
                              ResNetConfig)
    cwd = tmp_path_factory.mktemp("pseudo labels")
    small = "--train-scenes", 1, "--val-scenes", 1, "--frames", 2, "--sweeps", 5
    run_script("tests/toyworld.py", *small, cwd=cwd).check_returncode()
    torch.manual_seed(0)
    backbone = ResNetConfig(embedding_size=16, hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1],
                            out_features=["stage1", "stage2", "stage3", "stage4"])
    config = Mask2FormerConfig(backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32,
                               encoder_feedforward_dim=32, dim_feedforward=32, encoder_layers=1, decoder_layers=2,
                               num_attention_heads=2, num_queries=20, id2label=dict(enumerate(NAMES)))
    Mask2FormerForUniversalSegmentation(config).save_pretrained(cwd / "tests/toy_segmenter")
    Mask2FormerImageProcessor(num_labels=len(NAMES)).save_pretrained(cwd / "tests/toy_segmenter")
    (cwd / "result").write_text(run(cwd).stderr)
    return cwd


def run(cwd, *args):
    return run_script("01_pseudolabel.py", *args, cwd=cwd)


def test_a_published_swin_is_whole_without_its_last_norm(tmp_path):
    """Checkpoints on the hub have no weights for the norm that feature maps skip; with any other one gone, they are
    refused. The README's segmenter is one with a Swin backbone."""
    from safetensors.torch import load_file, save_file
    from transformers import (Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor,
                              SwinConfig)
    backbone = SwinConfig(image_size=64, embed_dim=12, depths=[1] * 4, num_heads=[1] * 4, window_size=4,
                          out_features=["stage1", "stage2", "stage3", "stage4"])
    config = Mask2FormerConfig(backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32,
                               encoder_feedforward_dim=16, dim_feedforward=16, encoder_layers=1, decoder_layers=2,
                               num_attention_heads=2, num_queries=4, num_labels=3)
    model = Mask2FormerForUniversalSegmentation(config).eval()
    model.save_pretrained(tmp_path)
    Mask2FormerImageProcessor().save_pretrained(tmp_path)
    path, images = tmp_path / "model.safetensors", torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    weights = load_file(path)
    published = {name: value for name, value in weights.items() if not re.search(r"encoder\.(swin\.)?layernorm", name)}
    assert len(published) == len(weights) - 2
    save_file(published, path, {"format": "pt"})
    answer = stage.load_segmenter(str(tmp_path), "cpu")(images)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        wanted = model((images / 255 - mean) / std)
    torch.testing.assert_close(answer[1], wanted.masks_queries_logits)
    del published[next(name for name in published if "hidden_states_norms" in name)]
    save_file(published, path, {"format": "pt"})
    with pytest.raises(SystemExit, match="lacks weights .*hidden_states_norms.*get it again"):
        stage.load_segmenter(str(tmp_path), "cpu")


def fails(result, *words):
    """Exit code not 0, and one line on stderr besides the progress bar."""
    lines = [line for line in result.stderr.splitlines() if "image/s]" not in line and line.strip()]
    assert result.returncode not in (0, None) and len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert all(word in lines[0] for word in words), lines[0]


def scene_files(world):
    return sorted((world / "out/frames").iterdir())


def test_files_read_back(world):
    paths = scene_files(world)
    assert len(paths) == 2 and all(path.suffix == ".pt" for path in paths), (world / "result").read_text()
    frames = load_pt(paths[0], "")
    assert set(frames) == {"meta", "scene", "location", "description", "token", "timestamp", "image", "label", "K",
                           "ego_T_cam", "world_T_ego"}
    assert frames["scene"] == paths[0].stem and len(frames["token"]) == 2
    assert frames["timestamp"].dtype == torch.int64 and frames["timestamp"].shape == (2,)
    assert frames["world_T_ego"].dtype == torch.float64 and frames["ego_T_cam"].dtype == torch.float32
    assert set(frames["meta"]["source"]) == {"version", "segmenter", "revision", "segmenter_size", "min_confidence",
                                             "sweeps", "rules", "drive", "rig"}
    assert frames["meta"]["source"]["segmenter_size"] == [288, 512]  # where nothing else is asked for
    assert frames["meta"]["source"]["segmenter"] == "toy_segmenter" and len(frames["meta"]["source"]["revision"]) == 12
    item = Frames(world / "out", [path.stem for path in paths], PRESETS["toy"], history=1)[3]
    assert item["image"].shape == (2, 6, 3, 144, 256) and item["label"].shape == (6, 144, 256)
    assert set(item["label"].unique().tolist()) <= {0, 1, 2, 3, IGNORE} and item["linked"].tolist() == [False, True]


def test_images_are_the_cameras_images(world):
    nusc = stage.open_tables(stage.NuScenes, world / "data/toy", "v1.0-trainval")
    frames = load_pt(scene_files(world)[0], "")
    for t, token in enumerate(frames["token"]):
        for n, camera in enumerate(CAMERAS):
            with Image.open(nusc.get_sample_data_path(nusc.get("sample", token)["data"][camera])) as file:
                wanted = np.asarray(file.resize((256, 144), Image.BILINEAR), float)  # PIL's resize is antialiased
            got = np.asarray(Image.open(io.BytesIO(frames["image"][t][n].numpy().tobytes())), float)
            assert got.shape == (144, 256, 3) and np.abs(got - wanted).mean() < 3


def test_cameras_project_as_the_devkit_does(world):
    """A point on the ground, sent through the devkit's own chain of transforms, lands on the pixel that ours gives."""
    from nuscenes.utils.geometry_utils import transform_matrix, view_points
    from pyquaternion import Quaternion
    nusc = stage.open_tables(stage.NuScenes, world / "data/toy", "v1.0-trainval")
    scene = next(s for s in nusc.scene if s["name"] == scene_files(world)[0].stem)
    size, seen = (100, 300), 0
    frames, _ = stage.read_scene(nusc, scene, size)
    for t, token in enumerate(frames["token"]):
        sample = nusc.get("sample", token)
        lidar_pose = nusc.get("ego_pose", nusc.get("sample_data", sample["data"]["LIDAR_TOP"])["ego_pose_token"])
        heading = Quaternion(lidar_pose["rotation"]).rotation_matrix[:2, 0]
        level = Quaternion(axis=(0, 0, 1), angle=np.arctan2(heading[1], heading[0]))
        pts_ego = np.random.default_rng(t).uniform((-30, -15, 0), (30, 15, 0), (200, 3))
        pts_world = pts_ego @ level.rotation_matrix.T + lidar_pose["translation"]
        for n, camera in enumerate(CAMERAS):
            data = nusc.get("sample_data", sample["data"][camera])
            sensor = nusc.get("calibrated_sensor", data["calibrated_sensor_token"])
            pts = np.c_[pts_world, np.ones(200)].T
            for record in (nusc.get("ego_pose", data["ego_pose_token"]), sensor):
                pts = transform_matrix(record["translation"], Quaternion(record["rotation"]), inverse=True) @ pts
            theirs = view_points(pts[:3], np.array(sensor["camera_intrinsic"]), normalize=True)[:2].T
            theirs = theirs * (size[1] / data["width"], size[0] / data["height"])
            ours, depth = project(torch.from_numpy(pts_ego).float(), frames["K"][t, n], frames["ego_T_cam"][t, n])
            ahead = pts[2] > 1
            assert np.allclose(depth, pts[2], atol=1e-4)
            assert np.allclose(ours[ahead], theirs[ahead], rtol=1e-4, atol=0.02)
            seen += ahead.sum()
    assert seen > 500


def test_each_camera_keeps_its_own_time():
    """A car at 10 m/s along its heading, tilted; the camera fires 40 ms before the lidar, so it was 0.4 m behind."""
    from pyquaternion import Quaternion
    tilted = (Quaternion(axis=(0, 0, 1), degrees=90) * Quaternion(axis=(0, 1, 0), degrees=2)).elements.tolist()
    forward = [0.5, -0.5, 0.5, -0.5]  # camera z along ego x, camera x to the right
    records = {"sample": {"s": {"token": "s", "timestamp": 1, "next": "", "data": {
                   "LIDAR_TOP": "lidar", **{camera: "camera" for camera in CAMERAS}}}},
               "sample_data": {"lidar": {"ego_pose_token": "now", "filename": "x.bin", "width": 0, "height": 0,
                                         "timestamp": 1, "is_key_frame": True, "next": ""},
                               "camera": {"ego_pose_token": "then", "calibrated_sensor_token": "c", "filename": "x.jpg",
                                          "width": 1600, "height": 900, "timestamp": 1, "is_key_frame": True,
                                          "next": ""}},
               "ego_pose": {"now": {"rotation": tilted, "translation": [500.0, 1000.0, 0.0]},
                            "then": {"rotation": tilted, "translation": [500.0, 999.6, 0.0]}},
               "calibrated_sensor": {"c": {"rotation": forward, "translation": [1.5, 0.2, 1.6],
                                           "camera_intrinsic": [[1260.0, 0, 800.5], [0, 1250.0, 450.25], [0, 0, 1]]}},
               "log": {"l": {"location": "somewhere"}}}
    nusc = SimpleNamespace(dataroot="here", table_root="here/v", get=lambda table, token: records[table][token])
    scene = {"name": "scene", "description": "", "log_token": "l", "first_sample_token": "s", "nbr_samples": 1}
    frames, paths = stage.read_scene(nusc, scene, (450, 800))
    assert paths == [Path("here/x.jpg")] * 6
    assert torch.allclose(frames["K"][0, 0], torch.tensor([[630.0, 0, 400.25], [0, 625, 225.125], [0, 0, 1]]))
    assert torch.allclose(frames["world_T_ego"][0], torch.tensor([[0.0, -1, 0, 500], [1, 0, 0, 1000], [0, 0, 1, 0],
                                                                  [0, 0, 0, 1]]).double())
    a = np.radians(2)  # nose down: the mounting turns about the ego origin, forward and down
    place = torch.tensor([1.5 * np.cos(a) + 1.6 * np.sin(a) - 0.4, 0.2, -1.5 * np.sin(a) + 1.6 * np.cos(a)]).float()
    assert torch.allclose(frames["ego_T_cam"][0, 0, :3, 3], place, atol=1e-5)
    axis = torch.tensor([np.cos(a), 0, -np.sin(a)]).float()  # where the camera looks: a little down
    assert torch.allclose(frames["ego_T_cam"][0, 0, :3, 2], axis, atol=1e-6)


# ---------------------------------------------------------------- images between key frames

def test_sweeps_follow_the_key_frames(world, tmp_path):
    """With --sweeps 2, the second and the fourth of the five images between the two key frames are views as well, where
    the tables say that they were taken; nothing else changes, and other sweeps are noticed."""
    from pyquaternion import Quaternion
    out = tmp_path / "out"
    assert run(world, "--sweeps", "2", "--out", out).returncode == 0
    nusc = stage.open_tables(stage.NuScenes, world / "data/toy", "v1.0-trainval")
    scene, plain = nusc.scene[0], load_pt(scene_files(world)[0], "")
    frames = load_pt(out / f"frames/{scene['name']}.pt", "")
    assert frames.keys() == plain.keys() and frames["token"] == plain["token"]
    assert len(frames["image"]) == 2 and len(frames["label"]) == 4 and frames["meta"]["source"]["sweeps"] == 2
    for key in ("timestamp", "K", "ego_T_cam", "world_T_ego"):
        assert len(frames[key]) == 4 and torch.equal(frames[key][:2], plain[key])
    assert all(torch.equal(*pair) for t in (0, 1) for pair in zip(frames["label"][t], plain["label"][t]))
    _, paths = stage.read_scene(nusc, scene, (144, 256), 2)
    data = nusc.get("sample", frames["token"][0])["data"]
    for n, camera in enumerate(CAMERAS):
        chain = [nusc.get("sample_data", data[camera])]
        while chain[-1]["next"]:
            chain.append(nusc.get("sample_data", chain[-1]["next"]))
        for t, record in ((2, chain[2]), (3, chain[4])):
            assert paths[t * 6 + n] == world / "data/toy" / record["filename"]
            # The camera's place and axes in the world, by pyquaternion from the tables.
            ego, mount = (nusc.get(table, record[f"{table}_token"]) for table in ("ego_pose", "calibrated_sensor"))
            turn, place = Quaternion(ego["rotation"]), ego["translation"]
            world_T_ego = frames["world_T_ego"][t].numpy()
            world_T_cam = world_T_ego @ frames["ego_T_cam"][t, n].double().numpy()
            assert np.allclose(world_T_cam[:3, 3], turn.rotate(np.array(mount["translation"])) + place, atol=1e-4)
            assert np.allclose(world_T_cam[:3, :3], (turn * Quaternion(mount["rotation"])).rotation_matrix, atol=1e-5)
            assert np.allclose(world_T_ego[2], [0, 0, 1, place[2]])
            if camera == "CAM_FRONT":  # the view's time and place are its own
                assert frames["timestamp"][t] == record["timestamp"] and np.allclose(world_T_ego[:3, 3], place)
                assert np.isclose(np.arctan2(*world_T_ego[[1, 0], 0]), turn.yaw_pitch_roll[0], atol=1e-3)
    item = Frames(out, [scene["name"]], PRESETS["toy"], history=1)
    assert len(item) == 2 and item[1]["image"].shape == (2, 6, 3, 144, 256)
    fails(run(world, "--out", out), scene["name"], "sweeps 2, expected 0", "delete", "--out")


@pytest.mark.parametrize("there, wanted", [
    ({1, 2, 3, 4, 5}, {1: [3], 2: [2, 4], 3: [1, 3, 4], 5: [1, 2, 3, 4, 5], 9: [1, 2, 3, 4, 5]}),
    ({1, 5}, {1: [1], 2: [1, 5], 3: [1, 5]}), ({4, 5}, {1: [4], 2: [4, 5], 5: [4, 5]}), (set(), {3: []})])
def test_views_are_evenly_spread_as_far_as_there_are_images(there, wanted):
    """Six cameras at 12 Hz, each at its own time; those but the first have all five images between the key frames."""
    def camera(n):
        taken = [0, *sorted(there if n == 0 else {1, 2, 3, 4, 5}), 6]
        return [{"token": f"{n} {k}", "next": f"{n} {after}", "is_key_frame": k in (0, 6), "ego_pose_token": "p",
                 "filename": "x.jpg", "width": 1600, "height": 900,
                 "timestamp": 10 ** 15 + 83_000 * k + 7_000 * n} for k, after in zip(taken, [*taken[1:], ""])]
    cameras = [camera(n) for n in range(6)]
    records = {data["token"]: data for row in cameras for data in row}
    records["p"] = {"rotation": [1.0, 0.0, 0.0, 0.0], "translation": [3.0, 4.0, 0.0]}
    nusc = SimpleNamespace(table_root="here", get=lambda table, token: records[token])
    for sweeps, expected in wanted.items():
        views = stage.views_between(nusc, [row[0] for row in cameras], [row[-1] for row in cameras], sweeps)
        assert [time for time, *_ in views] == [10 ** 15 + 83_000 * k for k in expected]
        assert [data["token"] for *_, (data, *_) in views] == [f"0 {k}" for k in expected]
        assert all([data["token"][0] for data in row] == list("012345") for *_, row in views)
        assert len({data["token"] for *_, row in views for data in row}) == 6 * len(expected)
        # A camera that lacks images does not pull the others away from it: they are as if no more had been asked for.
        fewer = stage.views_between(nusc, [row[0] for row in cameras], [row[-1] for row in cameras], len(expected))
        assert [row for *_, row in fewer] == [row for *_, row in views]
    if there:
        records[f"0 {max(there)}"]["next"] = f"0 {min(there)}"  # in a circle
        with pytest.raises(SystemExit, match="sample_data.json: x.jpg follows itself"):
            stage.views_between(nusc, [row[0] for row in cameras], [row[-1] for row in cameras], 1)


def test_damaged_sweeps(world, tmp_path):
    """An image between key frames that is missing, damaged, or in no table: a line each, and no file."""
    root, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(world / "data/toy", root)
    path = sorted(root.glob("sweeps/CAM_BACK/*"))[2]
    path.write_bytes(path.read_bytes()[:5000])
    flags = "--dataroot", root, "--out", out, "--sweeps", "1"
    fails(run(world, *flags), path.name, "cannot be read", "unpack")
    path.unlink()
    fails(run(world, *flags), path.name, "missing", "unpack")
    assert not list(out.rglob("*.pt"))
    assert run(world, "--dataroot", root, "--out", out).returncode == 0  # nobody else reads it
    shutil.rmtree(out)
    table = root / "v1.0-trainval/sample_data.json"
    records = [record for record in json.loads(table.read_text()) if record["is_key_frame"]]
    key_of = {(r["sample_token"], r["filename"].split("/")[1]): r["token"] for r in records}
    samples = json.loads((root / "v1.0-trainval/sample.json").read_text())
    after = {sample["token"]: sample["next"] for sample in samples}
    for r in records:  # as before this world had images between key frames
        r["next"] = key_of.get((after[r["sample_token"]], r["filename"].split("/")[1]), "")
    table.write_text(json.dumps(records))
    fails(run(world, *flags), "sample_data.json", "no images between the key frames", "--sweeps 0")
    fails(run(world, "--sweeps", "-1", "--out", out), "--sweeps")


# ---------------------------------------------------------------- several processes, resuming, bad input

def test_two_ranks_write_what_one_writes(world, tmp_path):
    """The two scenes, one a process, both at the same time; a third process of three has nothing to do."""
    def start(rank, ranks):
        return subprocess.Popen([sys.executable, ROOT / "01_pseudolabel.py", "--out", tmp_path / "out"], cwd=world,
                                env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(ranks)}, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    both = [start(rank, 2) for rank in range(2)]
    said = [process.communicate() for process in both]
    assert all("1 scenes" in stdout for stdout, _ in said), said
    assert all(process.returncode == 0 for process in both)
    assert sorted(p.name for p in (tmp_path / "out/frames").iterdir()) == [p.name for p in scene_files(world)]
    for path in scene_files(world):
        one, two = (load_pt(p, "") for p in (path, tmp_path / "out/frames" / path.name))
        assert one.keys() == two.keys()
        for key, value in one.items():
            if key in ("image", "label"):
                assert all(torch.equal(*pair) for rows in zip(value, two[key]) for pair in zip(*rows))
            else:
                assert torch.equal(value, two[key]) if torch.is_tensor(value) else value == two[key]
    third = run_script("01_pseudolabel.py", "--out", tmp_path / "out", cwd=world, RANK="2", WORLD_SIZE="3")
    assert "0 scenes" in third.stdout



def test_resumes_by_scene(world, tmp_path):
    """A scene that is missing is made again, the same; the one that is there is not touched; then there is no more."""
    shutil.copytree(world / "out", tmp_path / "out")
    first, second = sorted((tmp_path / "out/frames").iterdir())
    stamp, before = first.stat().st_mtime_ns, torch.load(second, weights_only=True)
    second.unlink()
    result = run(world, "--out", tmp_path / "out")
    assert result.returncode == 0 and "1 scenes" in result.stdout and first.stat().st_mtime_ns == stamp
    after = torch.load(second, weights_only=True)
    assert before["meta"] == after["meta"] and torch.equal(before["ego_T_cam"], after["ego_T_cam"])
    assert all(torch.equal(a, b) for one, two in zip(before["label"], after["label"]) for a, b in zip(one, two))
    assert "nothing to do" in run(world, "--out", tmp_path / "out").stdout
    fails(run(world, "--segmenter-size", "300", "512"), "--segmenter-size: give multiples of 32")
    fails(run(world, "--out", tmp_path / "out", "--min-confidence", "0.6"), first.name,
          "min_confidence 0.35, expected 0.6", "delete", "--out")


def test_broken_images(world, tmp_path):
    """The first scene stays; of the one with the bad image nothing is left behind, and mending it is all it takes."""
    root, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(world / "data/toy", root)
    scenes = json.loads((root / "v1.0-trainval/scene.json").read_text())
    path = sorted(root.glob(f"samples/CAM_BACK/*{scenes[1]['name']}*"))[-1]
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    fails(run(world, "--dataroot", root, "--out", out), path.name, "cannot be read", "unpack")
    path.unlink()
    fails(run(world, "--dataroot", root, "--out", out), path.name, "missing")
    assert [p.name for p in out.rglob("*") if p.is_file()] == [f"{scenes[0]['name']}.pt"]
    path.write_bytes(whole)
    assert "1 scenes" in run(world, "--dataroot", root, "--out", out).stdout


def test_segmenters_that_are_none(world, tmp_path):
    out, good = tmp_path / "out", world / "tests/toy_segmenter"
    # Whether there is a network, transformers is told when it is imported: not by run_script, which has imported it.
    absent = [sys.executable, ROOT / "01_pseudolabel.py", "--out", out, "--segmenter", "nobody/has-this-model"]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}  # or it asks for half a minute
    done = subprocess.run(absent, cwd=world, capture_output=True, text=True, env=offline)
    fails(done, absent[-1], "neither a folder")
    cut = tmp_path / "cut"
    shutil.copytree(good, cut)
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    fails(run(world, "--out", out, "--segmenter", cut), "cut", "cannot be loaded")
    assert not out.exists()

    weights.unlink()
    stops("no weights", stage.segmenter_names, cut)
    (cut / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    stops("is a resnet, not a Mask2Former", stage.segmenter_names, cut)
    (cut / "config.json").unlink()
    stops("config.json", stage.segmenter_names, cut)


def test_settings_of_a_segmenter_belong_to_its_revision(world, tmp_path):
    folder = tmp_path / "segmenter"
    shutil.copytree(world / "tests/toy_segmenter", folder)
    names, revision = stage.segmenter_names(folder)
    assert stage.segmenter_names(world / "tests/toy_segmenter") == (names, revision)
    colours = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(colours | {"image_mean": [0.0, 0.0, 0.0]}))
    assert stage.segmenter_names(folder)[1] != revision
    (folder / "preprocessor_config.json").write_text(json.dumps(colours | {"image_mean": "grey"}))
    stops("cannot be loaded", stage.load_segmenter, folder, "cpu")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"id2label": {"1": "Road"}}))
    stops("is a folder without the config.json of a model", stage.segmenter_names, folder)


def stops(says, function, *args):
    with pytest.raises(SystemExit) as stop:
        function(*args)
    assert stop.value.code.startswith("error: ") and says in stop.value.code and "\n" not in stop.value.code


def test_no_data_set(tmp_path):
    stops("nothing/v1.0-trainval", stage.open_tables, stage.NuScenes, tmp_path / "nothing", "v1.0-trainval")


def test_half_written_files_never_appear(tmp_path):
    """save_pt leaves the old file whole, and no other, when it dies on the way."""
    path = tmp_path / "frames" / "scene.pt"
    save_pt({"a": torch.zeros(3)}, path)
    with pytest.raises(Exception):
        save_pt({"a": torch.zeros(3), "b": lambda: None}, path)
    assert list(path.parent.iterdir()) == [path] and load_pt(path, "")["a"].shape == (3,)
