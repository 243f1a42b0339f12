"""A rig of one's own through stage 05, against the network fed by hand."""
import importlib
import json
from dataclasses import asdict

import pytest
import torch
from conftest import run_script
from PIL import Image
from rig import camera, intrinsics, surround

from model import PRESETS, BEVSegmenter
from reproject import CAMERAS, save_pt

CONFIG = PRESETS["toy"]
H, W = CONFIG.image_size
PALETTE = {(45, 45, 45), (240, 228, 66), (86, 180, 233), (213, 94, 0)}  # background and the three classes


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A random network, and the folder where its checkpoint lies."""
    torch.manual_seed(0)
    folder, model = tmp_path_factory.mktemp("rig"), BEVSegmenter(CONFIG).eval()
    save_pt({"model": model.state_dict(), "config": asdict(CONFIG), "args": {"steps": 1}, "step": 1}, folder / "net.pt")
    return model, folder


def write_rig(folder, images, K, ego_T_cam, order=None):
    """Images (N, 3, h, w) as PNG files and their calibration, cameras in this order."""
    rig = {}
    for n in order or range(len(images)):
        Image.fromarray(images[n].permute(1, 2, 0).numpy()).save(folder / f"{n}.png")
        rig[f"{n}.png"] = {"K": K[n].tolist(), "ego_T_cam": ego_T_cam[n].tolist()}
    (folder / "rig.json").write_text(json.dumps(rig))


def test_images_of_another_shape_are_squeezed_with_their_K(tmp_path):
    """640 x 480 become 256 x 144: 0.4 times as wide, 0.3 times as high."""
    write_rig(tmp_path, torch.zeros(1, 3, 480, 640, dtype=torch.uint8), intrinsics(400.0, 320.0, 240.0)[None],
              camera()[None])
    frame, _ = importlib.import_module("05_eval").read_rig(tmp_path, tmp_path / "rig.json", CONFIG)
    torch.testing.assert_close(frame["K"][0, 0].cpu(), torch.tensor([[160.0, 0, 128], [0, 120, 72], [0, 0, 1]]))


def test_a_camera_that_was_held_the_other_way_round(tmp_path):
    """Its file lies upside down and says so (EXIF orientation 3), and viewers turn it."""
    write_rig(tmp_path, torch.zeros(1, 3, H, W, dtype=torch.uint8), intrinsics()[None], camera()[None])
    picture, exif = Image.new("RGB", (W, H)), Image.Exif()
    picture.paste((255, 255, 255), (0, 0, W, 40))
    exif[0x0112] = 3
    picture.save(tmp_path / "0.png", exif=exif)
    frame, _ = importlib.import_module("05_eval").read_rig(tmp_path, tmp_path / "rig.json", CONFIG)
    bright = frame["image"][0, 0].float().mean((0, 2)) > 128
    assert not bright[:-40].any() and bright[-40:].all()


def run(folder, *flags):
    """Stage 05 in `folder`; returns the finished process."""
    return run_script("05_eval.py", "--checkpoint", "net.pt", *flags, cwd=folder)


RIG = "--images", ".", "--calibration", "rig.json"


def test_six_cameras_in_any_order_and_of_twice_the_size(network):
    """Also: K belongs to the image on disk; every camera gets the embedding of its own direction."""
    model, folder = network
    K, ego_T_cam = (x[0] for x in surround())
    small = torch.randint(0, 256, (6, 3, H // 8, W // 8), dtype=torch.uint8)
    images = small.repeat_interleave(8, 2).repeat_interleave(8, 3)
    with torch.no_grad():
        expected = model(images[None], K[None], ego_T_cam[None])[0][0].softmax(0)
    write_rig(folder, images, K, ego_T_cam, [3, 1, 5, 0, 2, 4])
    done = run(folder, *RIG)
    assert done.returncode == 0, done.stderr
    # 2 atan(128 / 200) = 65.2 degrees
    assert ", ".join(f"{CAMERAS[n]} (65 degrees wide)" for n in (3, 1, 5, 0, 2, 4)) in done.stdout
    found = torch.load(folder / "out/eval/rig.pt", weights_only=True)
    torch.testing.assert_close(found["probability"], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(found["bev"].long(), found["probability"].argmax(0))
    # No cell is seen by all of them, and the ground under the car by none.
    assert found["seen"][0, 50] and found["seen"][-1, 50] and found["seen"][100, 0] and found["seen"][100, -1]
    assert not found["seen"][100, 50]

    double = torch.nn.functional.interpolate(images.float(), scale_factor=2).byte()
    write_rig(folder, double, torch.tensor([2.0, 2.0, 1.0])[:, None] * K, ego_T_cam)
    assert run(folder, *RIG).returncode == 0
    found = torch.load(folder / "out/eval/rig.pt", weights_only=True)["probability"]
    assert (found - expected).abs().mean() < 0.003 < (expected - expected.flip(-1)).abs().mean()


@pytest.mark.parametrize("yaws, names", [
    ([10], ["CAM_FRONT"]),
    ([0, 45, 90, 135, 180, -135, -90, -45], "CAM_FRONT CAM_FRONT_LEFT CAM_BACK_LEFT CAM_BACK_LEFT CAM_BACK "
                                            "CAM_BACK_RIGHT CAM_BACK_RIGHT CAM_FRONT_RIGHT".split())])
def test_rigs_of_one_and_of_eight(network, yaws, names):
    _, folder = network
    K, ego_T_cam = (x[0] for x in surround(yaws=yaws))
    write_rig(folder, torch.zeros(len(yaws), 3, 90, 160, dtype=torch.uint8), K, ego_T_cam)
    done = run(folder, *RIG)
    # 2 atan(80 / 200) = 43.6 degrees
    says = f"; cameras: {len(yaws)}, taken for " + ", ".join(f"{name} (44 degrees wide)" for name in names) + "\n"
    assert done.returncode == 0 and done.stdout.endswith(says), done.stderr + done.stdout
    assert Image.open(folder / "out/eval/rig.png").width >= 700


def test_what_no_camera_sees_is_dark(network):
    """One camera, straight ahead, 1.5 m high: the ground nearer than 4 m and that to the sides is not seen."""
    _, folder = network
    write_rig(folder, torch.zeros(1, 3, 144, 256, dtype=torch.uint8), intrinsics()[None], camera()[None])
    assert run(folder, *RIG).returncode == 0
    seen = torch.load(folder / "out/eval/rig.pt", weights_only=True)["seen"]  # (200, 100), 0.3 m, the car at (100, 50)
    # Lower edge of the image, v = 144: 1.5 m * 200 / 72 = 4.17 m ahead. Right edge, u = 256: 0.64 times the distance.
    assert seen[:86, 50].all() and not seen[86:].any()
    assert seen[50, 50 - 31:50 + 31].all() and not seen[50, :50 - 33].any() and not seen[50, 50 + 33:].any()
    sheet = Image.open(folder / "out/eval/rig.png").convert("RGB")
    left, top, height = 768 + 8, 24, 400  # of the map: beside a row of three tiles, below a line of text
    assert sheet.getpixel((left + 100, top + height - 20)) in {tuple(c // 3 for c in colour) for colour in PALETTE}
    assert sheet.getpixel((left + 100, top + 20)) in PALETTE


def test_bad_rigs_are_one_line(network, tmp_path):
    _, folder = network
    (tmp_path / "net.pt").symlink_to(folder / "net.pt")
    good = {"K": intrinsics().tolist(), "ego_T_cam": camera().tolist()}
    mirrored, nowhere = camera() * torch.tensor([-1.0, 1.0, 1.0, 1.0]), camera() + torch.nan * torch.eye(4)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    Image.new("RGB", (100, 80)).save(tmp_path / "small.png")  # K's centre is (128, 72)
    Image.new("RGB", (256, 144)).save(tmp_path / "whole.png")
    upward = torch.eye(4) + 1.5 * torch.eye(4).roll(1, 1) * torch.tensor([0.0, 0.0, 1.0, 0.0])[:, None]  # z = 1.5 m
    for rig, says in (
            (None, "rig.json is missing"), ("{", "rig.json is damaged"), ({}, "lists no 1 to 8 cameras"),
            ({str(n): good for n in range(9)}, "lists no 1 to 8 cameras"), ({"a.png": good}, "a.png is missing"),
            ({"broken.png": good}, "broken.png cannot be read"), ({"a.png": {"K": 1}}, "a.png has no camera matrix"),
            ({"a.png": good | {"K": [[1, 0], [0, 1]]}}, "a.png has no camera matrix"),
            ({"a.png": good | {"ego_T_cam": torch.ones(4, 4).tolist()}}, "a.png has no camera matrix"),
            ({"a.png": good | {"ego_T_cam": mirrored.tolist()}}, "no camera matrix"),
            ({"a.png": good | {"ego_T_cam": nowhere.tolist()}}, "no camera matrix"),
            ({"a.png": good | {"K": [*intrinsics().tolist()[:2], [0, 0, 0]]}}, "a.png has no camera matrix"),
            ({"a.png": good | {"ego_T_cam": [*camera().tolist()[:3], [0, 0, 0, 2]]}}, "a.png has no camera matrix"),
            ({"a.png": good | {"ego_T_cam": camera().inverse().tolist()}}, "rigid ego_T_cam with z > 0"),
            ({"a.png": good | {"K": (-intrinsics()).tolist()}}, "a.png has no camera matrix"),
            ({"a.png": good | {"K": [[9, 9, 8], [9, 9, 4], [0, 0, 1]]}}, "a.png has no camera matrix"),
            ({"a.png": good | {"K": [[10 ** 400, 0, 8], [0, 9, 4], [0, 0, 1]]}}, "a.png has no camera matrix"),
            ({"whole.png": good | {"ego_T_cam": upward.tolist()}}, "no camera sees any ground of the map"),
            ({"small.png": good}, "small.png has 100 x 80 pixels, and the centre of its K lies outside")):
        (tmp_path / "rig.json").unlink(missing_ok=True)
        if rig is not None:
            (tmp_path / "rig.json").write_text(rig if isinstance(rig, str) else json.dumps(rig))
        done = run(tmp_path, *RIG)
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 1 and "Traceback" not in done.stderr and last.startswith("error: ") and says in last
    for flags in (RIG[:2], RIG[2:], (*RIG, "--checkpoint", "ipm")):
        done = run(tmp_path, *flags)
        assert done.returncode == 1 and "--images and --calibration go together" in done.stderr
    assert not (tmp_path / "out").exists()
