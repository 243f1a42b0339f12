"""All five stages end to end, each as its own process, on a world of two scenes; and their bad input, one line each."""
import ast
import importlib
import json
import os
import runpy
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from PIL import Image
from test_model import official_state

from model import PRESETS, BEVSegmenter, run_sequence, segmentation_loss
from reproject import CAMERAS, CLASS_WEIGHTS, IGNORE, learning_rate, load_artifact, render, save_pt


def run(script, *args, cwd, ok=True, **environment):
    """Run a script of the repository in `cwd`; returns its output. With ok=False it must fail in one clear line."""
    result = run_script(script, *args, cwd=cwd, **environment)
    if ok:
        assert result.returncode == 0, result.stderr
        return result.stdout + result.stderr
    assert result.returncode not in (0, None) and "Traceback" not in result.stderr, result.stderr
    line = result.stderr.strip().splitlines()[-1]
    assert "error: " in line
    return line


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The five stages run once with their default places, few steps. Returns the working folder."""
    cwd = tmp_path_factory.mktemp("world with a space")
    run("tests/toyworld.py", "--train-scenes", 1, "--val-scenes", 1, "--frames", 3, cwd=cwd)
    run("01_pseudolabel.py", "--segmenter", ROOT / "tests/toy_segmenter", cwd=cwd)
    run("02_bev_gt.py", cwd=cwd)
    (cwd / "out/bev_gt").rename(cwd / "out/hidden")  # stage 3 must not need it
    run("03_pretrain.py", "--steps", 3, cwd=cwd)
    (cwd / "out/hidden").rename(cwd / "out/bev_gt")
    run("04_finetune.py", "--steps", 3, cwd=cwd)
    run("05_eval.py", "--pictures", 2, "--animate", "out/pretrain.pt", "out/finetune.pt", cwd=cwd)
    return cwd


@pytest.mark.parametrize("script, flags, weights", (
    ("03_pretrain.py", ["--temporal", "smear", "--temporal-weight", "8"], {"consensus": 1, "image": 3, "temporal": 4}),
    ("04_finetune.py", ["--image", "2"], {"map": 1, "image": 2})))
def test_losses_are_weighed(world, monkeypatch, script, flags, weights):
    """Halfway through the training, when the temporal loss has half of its weight."""
    given = []
    monkeypatch.setattr("model.fit", lambda *args: given.extend(args))
    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "argv", [script, "--name", "weighed", *flags])
    runpy.run_path(str(ROOT / script), run_name="__main__")
    model, frames, loss_fn, args, _ = given
    batch = torch.utils.data.default_collate([frames[(2, False, 1)]]) | {"progress": 0.5}
    loss, parts = loss_fn(batch)
    assert loss.item() == pytest.approx(sum(weight * parts[name].item() for name, weight in weights.items()))
    assert parts.keys() == weights.keys() and min(part.item() for part in parts.values()) > 0
    assert args.data == frames.digest
    logits, before = run_sequence(model, batch)
    again = {next(iter(weights)): segmentation_loss(logits, batch["bev"], CLASS_WEIGHTS)}
    if "temporal" in parts:
        temporal_loss = importlib.import_module("03_pretrain").temporal_loss
        again["temporal"] = temporal_loss(logits, before, batch, model.config.grid, smear=True)
    for name, value in again.items():
        assert parts[name].item() == pytest.approx(value.item(), rel=1e-4), name


@pytest.mark.parametrize("script, flags", (("03_pretrain.py", []), ("04_finetune.py", ["--init", "scratch"])))
def test_the_seed_decides_the_first_weights(world, monkeypatch, script, flags):
    given = []
    monkeypatch.setattr("model.fit", lambda *args: given.extend(args))
    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "argv", [script, "--seed", "7", "--name", "seeded", *flags])
    runpy.run_path(str(ROOT / script), run_name="__main__")
    torch.manual_seed(7)
    for name, value in BEVSegmenter(PRESETS["toy"]).state_dict().items():
        assert torch.equal(given[0].state_dict()[name], value), name


def test_the_paper_compares_a_frame_with_its_own_cameras(world, monkeypatch):
    """The map that is predicted, rendered as far as 20 m, with the weights that classes have in images."""
    given = []
    monkeypatch.setattr("model.fit", lambda *args: given.extend(args))
    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "argv", ["03_pretrain.py", "--name", "rendered", "--target", "rendered", "--image", "0"])
    runpy.run_path(str(ROOT / "03_pretrain.py"), run_name="__main__")
    model, frames, loss_fn, _, _ = given
    batch = torch.utils.data.default_collate([frames[(1, False, 0)]]) | {"progress": 0.5}
    loss, parts = loss_fn(batch)
    logits = run_sequence(model, batch)[0]
    image, valid = render(logits, batch["K"][:, -1], batch["ego_T_cam"][:, -1], (144, 256), model.config.grid, 20.0)
    valid &= batch["label"] != IGNORE
    p, label = image.log_softmax(2).permute(0, 1, 3, 4, 2)[valid], batch["label"][valid].long()  # (P, classes), (P,)
    expected = -(p.gather(1, label[:, None])[:, 0] * torch.tensor((1.0, 5.0, 2.0, 5.0))[label]).mean()
    assert loss.item() == parts["rendered"].item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("share, chosen", ((0.01, "d"), (0.35, "cd"), (0.6, "bcd"), (0.8, "bcde"), (1, "abcde")))
def test_the_scenes_with_the_smallest_hashes_are_labelled(share, chosen):
    """SHA-256 of d, c, b, e, a begins with 18ac, 2e7d, 3e23, 3f79, ca97."""
    assert importlib.import_module("04_finetune").choose_scenes("ebdac", share) == list(chosen)


def test_stages_leave_what_they_promise(world):
    out = world / "out"
    splits = json.loads((out / "splits.json").read_text())
    assert len(splits["train"]) == len(splits["val"]) == 1
    for scene in splits["train"] + splits["val"]:
        frames = torch.load(out / f"frames/{scene}.pt", weights_only=True)
        truth = torch.load(out / f"bev_gt/{scene}.pt", weights_only=True)
        assert frames["token"] == truth["token"] and len(frames["token"]) == 3
        assert len(frames["image"]) == 3 and len(frames["image"][0]) == len(CAMERAS)
        assert frames["K"].shape == (3, 6, 3, 3) and frames["ego_T_cam"].shape == (3, 6, 4, 4)
        assert frames["world_T_ego"].shape == (3, 4, 4) and frames["world_T_ego"].dtype == torch.float64
        assert truth["bev"].shape == (3, 200, 100) and truth["bev"].dtype == torch.uint8
        assert set(truth["bev"].unique().tolist()) <= {0, 1, 2, 3} and (truth["bev"] > 0).any()
    checkpoint = torch.load(out / "finetune.pt", weights_only=True)
    assert {"model", "config", "args", "optimizer", "step", "rng"} <= checkpoint.keys()
    assert checkpoint["step"] == 3 and checkpoint["args"]["scenes"] == splits["train"]
    assert checkpoint["args"]["optimizer"] == "Muon at 8 times the rate of AdamW"
    assert [set(step) for step in checkpoint["curve"]] == 3 * [{"map", "image"}]
    lines = [json.loads(line) for line in (out / "finetune.jsonl").read_text().splitlines()]
    known = [(i, learning_rate(i, 3, 1.5e-3)) for i in range(3)]
    assert [(line.pop("step"), line.pop("lr")) for line in lines] == known
    assert lines == checkpoint["curve"] and Image.open(out / "finetune.png").size == (840, 480)
    assert Image.open(out / "pretrain_sample.png").size == Image.open(out / "finetune_sample.png").size == (976, 448)
    learnt = torch.load(out / f"pretrain/{splits['train'][0]}.pt", weights_only=True)
    assert learnt["token"] == torch.load(out / f"frames/{splits['train'][0]}.pt", weights_only=True)["token"]
    assert learnt["bev"].shape == (3, 200, 100) and set(learnt["bev"].unique().tolist()) <= {0, 1, 2, 3, 255}
    metrics = json.loads((out / "eval/metrics.json").read_text())
    assert metrics["checkpoint"] == "out/finetune.pt" and metrics["split"] == "val" and metrics["num_samples"] == 3
    assert metrics["memory"] == "map"
    assert set(metrics["iou"]) == {"divider", "ped_crossing", "boundary"} and 0 <= metrics["miou"] <= 1
    assert set(metrics["by_range"]) == {"0-10", "10-20", "20-30"} and metrics["by_condition"]
    assert sum(map(sum, metrics["confusion"])) == 3 * 200 * 100
    assert sorted(p.name for p in (out / "eval").iterdir()) == ["animation.webp", "confusion.png", "distance.png",
                                                                "metrics.json", "sample_0.png", "sample_1.png"]
    assert Image.open(out / "eval/animation.webp").n_frames == 2
    assert not [p for p in out.rglob("*") if ".tmp" in p.name]


def test_the_consensus_as_a_picture(world):
    """Its last maps are what 03 has stored and the ground truth; the votes of one frame see less than those of all."""
    scene = json.loads((world / "out/splits.json").read_text())["train"][0]
    run("tests/draw_consensus.py", "--scene", scene, "--frame", 1, cwd=world)
    page = torch.from_numpy(np.array(Image.open(world / "out/consensus.webp"))).int()  # (h, w, 3)
    paint, panels = importlib.import_module("05_eval").paint, []
    for number in range(4):  # maps of 200 x 100 cells, as high as two blocks of cameras
        left = 3 * 256 + 8 + number * (288 + 8)
        rows, columns = 24 + (torch.arange(200) * 2.88 + 1.4).long(), left + (torch.arange(100) * 2.88 + 1.4).long()
        panels.append(page[rows][:, columns])  # (200, 100, 3)
    for number, path in ((2, f"pretrain/{scene}.pt"), (3, f"bev_gt/{scene}.pt")):
        expected = paint(torch.load(world / "out" / path, weights_only=True)["bev"][1])
        assert ((panels[number] - expected).abs().amax(-1) < 60).float().mean() > 0.95  # WebP blurs colours at edges
    unseen = [((panel - 110).abs().amax(-1) < 15).float().mean() for panel in panels]
    assert unseen[0] > unseen[1] > unseen[2] > unseen[3]


def test_ipm_needs_no_checkpoint(world):
    scores = {}
    for memory in ("map", "none"):
        run("05_eval.py", "--checkpoint", "ipm", "--split", "train", "--memory", memory, cwd=world)
        metrics = json.loads((world / "out/eval/metrics.json").read_text())
        assert metrics["checkpoint"] == "ipm" and metrics["memory"] == memory and 0.05 < metrics["miou"] < 0.9
        scores[memory] = metrics["confusion"]
    assert scores["map"] != scores["none"]


def test_pictures_without_any_ground_truth(world, tmp_path):
    """Maps that are ignored everywhere: the pictures are drawn, and no class has an IoU."""
    shutil.copytree(world / "out", tmp_path / "out")
    for path in (tmp_path / "out/bev_gt").iterdir():
        truth = torch.load(path, weights_only=True)
        save_pt(truth | {"bev": torch.full_like(truth["bev"], IGNORE)}, path)
    said = run("05_eval.py", "--pictures", 1, cwd=tmp_path)
    assert ["all", "-", "-", "-", "-"] in [line.split() for line in said.splitlines()]
    assert sorted(path.name for path in (tmp_path / "out/eval").iterdir()) == ["confusion.png", "distance.png",
                                                                               "metrics.json", "sample_0.png"]
    metrics = json.loads((tmp_path / "out/eval/metrics.json").read_text())
    assert set(metrics["iou"].values()) == {None} and metrics["miou"] is None


def test_a_run_goes_on_with_other_workers(world):
    assert "nothing to do" in run("04_finetune.py", "--steps", 3, "--workers", 1, cwd=world)


def test_finished_stages_do_nothing(world):
    stamps = {p: p.stat().st_mtime_ns for p in (world / "out").rglob("*.pt")}
    for script, args in (("01_pseudolabel.py", ["--segmenter", ROOT / "tests/toy_segmenter"]), ("02_bev_gt.py", []),
                         ("03_pretrain.py", ["--steps", 3]), ("04_finetune.py", ["--steps", 3])):
        assert "nothing to do" in run(script, *args, cwd=world)
    assert "nothing to do" in run("03_pretrain.py", "--steps", 3, "--out", world / "out", cwd=world)  # the same folder
    (world / "out/pretrain.pt").rename(world / "away.pt")  # of which a finished run has no more need
    assert "nothing to do" in run("04_finetune.py", "--steps", 3, cwd=world)
    (world / "away.pt").rename(world / "out/pretrain.pt")
    assert stamps == {p: p.stat().st_mtime_ns for p in (world / "out").rglob("*.pt")}


def test_all_networks_are_evaluated(world, tmp_path, monkeypatch):
    """With the statistics of their batch norms, those of a moving picture, too."""
    shutil.copytree(world / "out", tmp_path / "out")
    modes, forward = [], BEVSegmenter.forward
    monkeypatch.setattr(BEVSegmenter, "forward",
                        lambda self, *args: modes.append(self.training) or forward(self, *args))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["05_eval.py", "--pictures", "0", "--animate", "out/pretrain.pt"])
    runpy.run_path(str(ROOT / "05_eval.py"), run_name="__main__")
    assert len(modes) > 3 and not any(modes)


@pytest.mark.parametrize("script, args, says", [
    ("03_pretrain.py", ["--preset", "huge"], "invalid choice: 'huge'"),
    ("03_pretrain.py", ["--steps", 3, "--name", "b", "--preset", "tiny"], "image_size [144, 256], expected [450, 800]"),
    ("03_pretrain.py", ["--out", "nowhere"], "splits.json is missing: run 02_bev_gt.py"),
    ("03_pretrain.py", ["--out", "out/splits.json"], "pretrain.pt cannot be written or locked (File exists)"),
    ("04_finetune.py", ["--init", "nowhere.pt", "--name", "b"], "nowhere.pt is missing: run 03_pretrain.py"),
    ("04_finetune.py", ["--init", "nowhere.pt"], "nowhere.pt is missing: run 03_pretrain.py"),
    ("04_finetune.py", ["--labels", "0", "--name", "b"], "--labels 0.0"),
    ("04_finetune.py", ["--init", "out/finetune.pt", "--name", "b"], "out/finetune.pt is no checkpoint of 03_pretrain"),
    ("04_finetune.py", ["--init", "copy.of", "--name", "b"], "copy.of is no checkpoint of 03_pretrain"),
    ("03_pretrain.py", ["--init", "out/finetune.pt", "--name", "b"], "out/finetune.pt: give scratch or a released BEV"),
    ("03_pretrain.py", ["--name", "finetune_sample"], "--name finetune_sample: this is no name, or"),
    ("03_pretrain.py", ["--name", "b/"], "--name b/: this is no name, or"),
    ("03_pretrain.py", ["--lr", "-1"], "--lr is a number above 0"),
    ("03_pretrain.py", ["--accumulate", "4", "--name", "b"], "--batch-size 2 cannot be shared out evenly: give a mult"),
    ("03_pretrain.py", ["--steps", "0", "--name", "b"], "--steps, --batch-size and --accumulate are at least 1"),
    ("03_pretrain.py", ["--init", "nowhere.pth", "--name", "b"], "nowhere.pth is missing: give the path of a released"),
    ("03_pretrain.py", ["--steps", "3", "--temporal", "off"], "was made with temporal within, expected off"),
    ("03_pretrain.py", ["--margin", "-2", "--name", "b"], "--margin is at least -1"),
    ("03_pretrain.py", ["--target", "rendered", "--slope", "--name", "b"], "--slope, --margin and --view-range are of"),
    ("03_pretrain.py", ["--target", "rendered", "--margin", "0", "--name", "b"], "not with --target rendered"),
    ("03_pretrain.py", ["--target", "rendered", "--view-range", "0", "--name", "b"], "not with --target rendered"),
    ("03_pretrain.py", ["--temporal-weight", "nan"], "--temporal-weight are numbers of at least 0"),
    ("04_finetune.py", ["--image", "-1"], "--image one of at least 0"),
    ("04_finetune.py", ["--image", "inf"], "--image one of at least 0"),
    ("03_pretrain.py", ["--temporal-weight", "inf"], "--temporal-weight are numbers of at least 0"),
    ("03_pretrain.py", ["--seed", 10 ** 16, "--name", "b"], "--seed is a number from 0 to 2^32 - 1"),
    ("03_pretrain.py", ["--name", "frames"], "--name frames: this is no name, or what is there is written by others"),
    ("03_pretrain.py", ["--name", "pretrain.previous"], "--name pretrain.previous: this is no name, or"),
    ("04_finetune.py", ["--name", ""], "--name : this is no name, or"),
    ("03_pretrain.py", ["--steps", "3", "--temporal-weight", "4"], "was made with temporal_weight 5.0, expected 4.0"),
    ("03_pretrain.py", ["--steps", "3", "--view-range", "9"], "view_range inf, expected 9.0: delete out/pretrain and"),
    ("03_pretrain.py", ["--steps", "3", "--slope"], "slope False, expected True: delete out/pretrain and"),
    ("03_pretrain.py", ["--name", "bev_gt"], "--name bev_gt: this is no name, or what is there is written by others"),
    ("03_pretrain.py", ["--name", "eval"], "--name eval: this is no name, or what is there is written by others"),
    ("05_eval.py", ["--checkpoint", "out"], "out cannot be read (Is a directory): give another path"),
    ("05_eval.py", ["--checkpoint", "out/splits.json"], "out/splits.json is damaged"),
    ("05_eval.py", ["--images", "", "--calibration", "rig.json"], "rig.json"),  # a shell variable that is not set
    ("05_eval.py", ["--animate", "nowhere.pt"], "nowhere.pt is missing: give checkpoints of 03 or 04"),
    ("05_eval.py", ["--checkpoint", "ipm", "--preset", "paper"], "expected [450, 800]: run 01_pseudolabel.py"),
])
def test_bad_input_is_one_line(world, script, args, says):
    shutil.copy(world / "out/finetune.pt", world / "copy.of")
    assert says in run(script, *args, cwd=world, ok=False)


LABEL = "01_pseudolabel.py", "--segmenter", ROOT / "tests/toy_segmenter"


def changed(world, folder, table, key, change):
    """A copy of the world in whose table each record's value of a key was changed."""
    shutil.copytree(world / "data", folder / "data", copy_function=os.link)
    path = folder / f"data/toy/v1.0-trainval/{table}.json"
    records = [record | {key: change(record[key])} for record in json.loads(path.read_text())]
    path.unlink()  # it is a link
    path.write_text(json.dumps(records))
    shutil.copytree(world / "out", folder / "out")


@pytest.mark.parametrize("key, change", (("translation", lambda v: [v[0] + 0.5, *v[1:]]),
                                         ("rotation", lambda v: [-v[3], *v[1:3], v[0]])))  # by half a turn
def test_another_data_set_of_the_same_scenes_is_noticed(world, tmp_path, key, change):
    """A world that was made anew has the same scenes and tokens, but the car goes elsewhere, or another way."""
    changed(world, tmp_path, "ego_pose", key, change)
    for command, folder in ((LABEL, "frames"), (("02_bev_gt.py",), "bev_gt")):
        said = run(*command, cwd=tmp_path, ok=False)
        assert "was made with drive" in said and f"delete out/{folder} or use another --out" in said
    shutil.rmtree(tmp_path / "out/bev_gt")
    run("02_bev_gt.py", cwd=tmp_path)
    said = run("05_eval.py", cwd=tmp_path, ok=False)
    assert "was made with drive" in said and "run 01_pseudolabel.py and 02_bev_gt.py, one of which says" in said


def test_the_losses_of_the_paper(world):
    """As bench_claim.py asks for them: nothing votes, and the network's own frame teaches it."""
    flags = "--target", "rendered", "--image", 0, "--temporal", "smear", "--steps", 1, "--name", "paper"
    run("03_pretrain.py", *flags, cwd=world)
    curve = torch.load(world / "out/paper.pt", weights_only=True)["curve"]
    assert "rendered" in curve[0] and set(curve[0]) <= {"rendered", "temporal"} and not (world / "out/paper").exists()


@pytest.mark.parametrize("key, change", (("translation", lambda v: v if v[0] > 0.5 else [0.2, *v[1:]]),  # the rear one
                                         ("camera_intrinsic", lambda v: [[1.01 * x for x in row] for row in v])))
def test_a_calibration_that_was_corrected_is_noticed(world, tmp_path, key, change):
    changed(world, tmp_path, "calibrated_sensor", key, change)
    said = run(*LABEL, cwd=tmp_path, ok=False)
    assert "was made with rig" in said and "delete out/frames or use another --out" in said
    assert "nothing to do" in run("02_bev_gt.py", cwd=tmp_path)  # it reads no camera


def test_other_labels_of_the_same_key_frames_are_noticed(world, tmp_path):
    """Two cameras' labels change places: the consensus is of others, and so is what was half trained."""
    shutil.copytree(world / "out", tmp_path / "out")
    scene, = json.loads((tmp_path / "out/splits.json").read_text())["train"]
    path = tmp_path / f"out/frames/{scene}.pt"
    frames = torch.load(path, weights_only=True)
    frames["label"][1].reverse()
    save_pt(frames, path)
    said = run("03_pretrain.py", "--steps", 3, cwd=tmp_path, ok=False)
    assert f"out/pretrain/{scene}.pt was made with frames" in said and "delete out/pretrain and out/pretrain.pt" in said
    assert "out/finetune.pt was made with data" in run("04_finetune.py", "--steps", 3, cwd=tmp_path, ok=False)


def test_a_released_bevformer_is_a_start(world):
    """--init FILE.pth for 03 and 04, in bfloat16 and with checkpointing; another file of that name is noticed."""
    state = official_state(BEVSegmenter(PRESETS["toy"]))
    torch.save({"meta": {"epoch": 24}, "state_dict": state}, world / "official.pth")
    flags = ["--init", "official.pth", "--name", "official", "--steps", 1]
    output = run("03_pretrain.py", *flags, "--bf16", "--checkpointing", cwd=world)
    assert "5 of the detector ignored; left at their start: refine.0.weight" in output
    assert torch.load(world / "out/official.pt", weights_only=True)["args"]["bf16"] == ("float32 is used" not in output)
    run("04_finetune.py", *flags[:2], "--name", "official_4", "--steps", 1, "--bf16", cwd=world)

    again = "03_pretrain.py", *flags, "--bf16"  # it goes on, or is finished, with the same file and without it
    assert "nothing to do" in run(*again, cwd=world)
    (world / "official.pth").rename(world / "away.pth")
    assert "nothing to do" in run(*again, cwd=world)
    state["pts_bbox_head.code_weights"] += 1
    torch.save({"state_dict": state}, world / "official.pth")
    assert "was made with init_digest" in run(*again, cwd=world, ok=False)


def test_checkpoint_of_another_architecture(world):
    checkpoint = torch.load(world / "out/pretrain.pt", weights_only=True)
    checkpoint["config"]["channels"] = 32
    save_pt(checkpoint, world / "out/other.pt")
    finetune = "04_finetune.py", "--init", "out/other.pt", "--name", "b"
    assert "other.pt was made with channels 32, expected 64: run 03" in run(*finetune, cwd=world, ok=False)
    checkpoint["config"]["channels"], checkpoint["args"]["steps"] = 64, 9
    save_pt(checkpoint, world / "out/other.pt")
    assert "stopped at step 3 of 9" in run(*finetune, cwd=world, ok=False)


def test_a_run_that_cannot_go_on_is_refused_before_its_minutes_of_votes(world):
    checkpoint = torch.load(world / "out/pretrain.pt", weights_only=True)
    checkpoint["config"]["layers"] = 1
    save_pt(checkpoint, world / "out/shallow.pt")
    said = run("03_pretrain.py", "--steps", 3, "--name", "shallow", cwd=world, ok=False)
    assert "made with layers 1, expected 2: delete it, choose another --name or the --preset it has" in said
    assert not (world / "out/shallow").exists()


def test_a_backbone_that_does_not_exist(world, tmp_path):
    for name in ("03_pretrain.py", "reproject.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "model.py").write_text((ROOT / "model.py").read_text().replace('= "resnet10"\n', '= "resnet35"\n'))
    said = run(tmp_path / "03_pretrain.py", "--name", "b", cwd=world, ok=False)
    assert "there is no backbone resnet35 (model.py): choose one of resnet10, resnet101, " in said
    wrong = (ROOT / "model.py").read_text().replace('weights: str | None = None', 'weights: str = "IMAGENET1K_V2"')
    (tmp_path / "model.py").write_text(wrong.replace('= "resnet10"\n', '= "resnet18"\n'))  # which has V1 alone
    said = run(tmp_path / "03_pretrain.py", "--name", "b", cwd=world, ok=False)
    assert "cannot fetch resnet18 IMAGENET1K_V2" in said and "set weights=None" in said


def test_images_of_other_cameras_are_refused(world, tmp_path):
    """Whoever edits CAMERAS must not train on the images of before, where each one's place is another camera's."""
    for name in ("01_pseudolabel.py", "03_pretrain.py", "model.py"):
        shutil.copy(ROOT / name, tmp_path)
    text = (ROOT / "reproject.py").read_text()
    (tmp_path / "reproject.py").write_text(text.replace('("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_FRONT_LEFT", ',
                                                        '("CAM_FRONT", "CAM_FRONT_LEFT", "CAM_FRONT_RIGHT", '))
    for stage, flags in (("01_pseudolabel.py", ("--segmenter", ROOT / "tests/toy_segmenter")), ("03_pretrain.py", ())):
        said = run(tmp_path / stage, *flags, cwd=world, ok=False)
        assert "was made with cameras ['CAM_FRONT', 'CAM_FRONT_RIGHT', " in said


def test_a_consensus_that_other_code_has_made_is_refused(world, tmp_path):
    """Whoever edits a rule of the consensus must not train on the maps of before."""
    for name in ("model.py", "reproject.py"):
        shutil.copy(ROOT / name, tmp_path)
    stage = tmp_path / "03_pretrain.py"
    for was, is_now in (("STRAY = ", "STRAY = 1 + "), ("0.85 * response", "0.8 * response"), ("> 0.4]", "> 0.5]")):
        text = (ROOT / stage.name).read_text()
        assert text.count(was) == 1
        stage.write_text(text.replace(was, is_now))
        said = run(stage, "--steps", 3, cwd=world, ok=False)
        assert "was made with rules" in said and "delete out/pretrain and out/pretrain.pt or choose another" in said
    # Without the folder there is a new consensus, but the network has learnt from the old one.
    shutil.copytree(world / "out", tmp_path / "out", ignore=shutil.ignore_patterns("pretrain"))
    assert "out/pretrain.pt was made with rules" in run(stage, "--steps", 3, cwd=tmp_path, ok=False)
    stage.write_text((ROOT / stage.name).read_text())
    assert "nothing to do" in run(stage, "--steps", 3, cwd=world)
    geometry = tmp_path / "reproject.py"  # votes fall where its rays meet the ground
    geometry.write_text(geometry.read_text().replace("def pixels_to_ground(K,", "def pixels_to_ground(K ,"))
    assert "was made with rules" in run(stage, "--steps", 3, cwd=world, ok=False)


@pytest.mark.parametrize("stage, was, is_now", (
    ("01_pseudolabel.py", '("Curb",)', '("Curb", "Curb Cut")'),
    ("01_pseudolabel.py", "LINE_GAIN = 2.0", "LINE_GAIN = 1.5"),
    ("01_pseudolabel.py", "F.adaptive_max_pool", "F.adaptive_avg_pool"), ("02_bev_gt.py", "SEAM = 0.02", "SEAM = 0.03"),
    ("02_bev_gt.py", "fill_rings(to_cells(points), ring,", "fill_rings(to_cells(points) + 0.5, ring,")))
def test_labels_and_truth_that_other_code_has_made_are_refused(world, tmp_path, stage, was, is_now):
    """Whoever edits how pixels or cells get their class, and runs the stage again, must not keep those of before."""
    for name in ("model.py", "reproject.py"):
        shutil.copy(ROOT / name, tmp_path)
    text = (ROOT / stage).read_text()
    (tmp_path / stage).write_text(text.replace(was, is_now))
    flags = ["--segmenter", ROOT / "tests/toy_segmenter"] if stage[:2] == "01" else []
    said = run(tmp_path / stage, *flags, cwd=world, ok=False)
    assert was in text and "was made with rules" in said and "or use another --out" in said


@pytest.mark.parametrize("stage, roots", (("01_pseudolabel", {"labels_from_queries", "load_image", "read_scene"}),
                                          ("02_bev_gt", {"read_map", "rasterise"}), ("03_pretrain", {"consensus"})))
def test_the_rules_are_all_that_decides(stage, roots):
    """Every function and constant of the stage that these use, directly or through others, but words for messages."""
    tree = ast.parse((ROOT / f"{stage}.py").read_text())
    known = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    known |= {target.id: node for node in tree.body if isinstance(node, ast.Assign) for target in node.targets}
    used, todo = {"EXPANSION"}, list(roots)
    while todo:
        name = todo.pop()
        if name in known and name not in used:
            used.add(name)
            todo += [node.id for node in ast.walk(known[name]) if isinstance(node, ast.Name)]
    call, = (n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "rules_of")
    assert used - {"EXPANSION"} <= {argument.id for argument in call.args}


def test_a_consensus_that_is_missing_or_of_another_run_is_refused(world, tmp_path):
    shutil.copytree(world / "out", tmp_path / "out")
    splits = json.loads((tmp_path / "out/splits.json").read_text())
    both = splits["train"] + splits["val"]
    (tmp_path / "out/splits.json").write_text(json.dumps({"train": both, "val": []}))
    tune = "04_finetune.py", "--steps", 1, "--name", "half"
    run(*tune, "--labelled-only", cwd=tmp_path)
    labelled = torch.load(tmp_path / "out/half.pt", weights_only=True)["args"]["scenes"]
    (tmp_path / "out/half.pt").unlink()
    other = tmp_path / f"out/pretrain/{(set(both) - set(labelled)).pop()}.pt"
    content = torch.load(next((tmp_path / "out/pretrain").iterdir()), weights_only=True)
    other.unlink(missing_ok=True)
    assert f"{other.name} is missing: run 03_pretrain.py, or copy its" in run(*tune, cwd=tmp_path, ok=False)
    checkpoint = torch.load(tmp_path / "out/pretrain.pt", weights_only=True)
    for target in ("painted", "rendered"):  # the latter leaves no maps
        checkpoint["args"]["target"] = target
        save_pt(checkpoint, tmp_path / f"out/{target}.pt")
        said = run(*tune, "--init", f"out/{target}.pt", cwd=tmp_path, ok=target == "rendered")
        assert ("consensus of pretraining: 0" if target == "rendered" else "is missing: run 03_pretrain.py") in said
    (tmp_path / "out/half.pt").unlink()
    frames = load_artifact(tmp_path / f"out/frames/{other.name}", "")
    content["meta"]["source"] |= {"drive": frames["meta"]["source"]["drive"], "frames": frames["digest"]}
    save_pt(content | {"scene": frames["scene"], "token": frames["token"]}, other)
    assert "with the consensus of pretraining: 1" in run(*tune, cwd=tmp_path)
    (tmp_path / "out/half.pt").unlink()
    for key, value in (("margin", 2), ("frames", "of labels that have changed since")):
        source = content["meta"]["source"] | {key: value}
        save_pt(content | {"meta": content["meta"] | {"source": source}, "scene": frames["scene"],
                           "token": frames["token"]}, other)
        assert f"{other.name} was made with {key} {value}, expected" in run(*tune, cwd=tmp_path, ok=False)


def test_training_sees_nothing_of_what_its_split_holds_out(world, tmp_path):
    """With the sides of the geo split exchanged: what is official val is trained on, official train is held out."""
    shutil.copytree(world / "out", tmp_path / "out")
    splits = json.loads((tmp_path / "out/splits.json").read_text())
    train, val = splits["train"], splits["val"]
    assert splits == {"train": train, "val": val, "geo_train": train, "geo_val": val, "geo_test": []}
    geo = {"geo_train": val, "geo_val": [], "geo_test": train}
    (tmp_path / "out/splits.json").write_text(json.dumps(splits | geo))

    def training(name):
        return torch.load(tmp_path / f"out/{name}.pt", weights_only=True)["args"]

    assert training("pretrain")["seen"] == train and training("pretrain")["split"] == "official"
    tune = "04_finetune.py", "--steps", 1, "--name"
    refused = run(*tune, "b", "--split", "geo", cwd=tmp_path, ok=False)
    assert "pretrain.pt was trained on 1 scenes that --split geo holds out" in refused and train[0] in refused
    run("03_pretrain.py", "--steps", 1, "--split", "geo", "--name", "geo", cwd=tmp_path)
    assert training("geo")["seen"] == val and (tmp_path / f"out/geo/{val[0]}.pt").exists()
    official = *tune, "b", "--init", "out/geo.pt"
    assert "geo.pt was trained on 1 scenes that --split official holds out" in run(*official, cwd=tmp_path, ok=False)
    run(*tune, "geo_4", "--init", "out/geo.pt", "--split", "geo", cwd=tmp_path)
    assert training("geo_4")["seen"] == training("geo_4")["scenes"] == val

    for checkpoint, side, warns in (("geo_4", "val", True), ("geo_4", "geo_train", False), ("geo_4", "geo_test", False),
                                    ("finetune", "geo_test", True)):
        said = run("05_eval.py", "--checkpoint", f"out/{checkpoint}.pt", "--split", side, cwd=tmp_path)
        assert (f"{checkpoint}.pt was trained on 1 of the 1 scenes of {side}" in said) == warns
        assert ("warning" in said) == warns
        assert json.loads((tmp_path / "out/eval/metrics.json").read_text())["split"] == side

    # What pretraining has seen, fine-tuning has seen, too.
    pretrained = torch.load(tmp_path / "out/pretrain.pt", weights_only=True)
    pretrained["args"]["seen"] = ["scene-0999", *train]
    save_pt(pretrained, tmp_path / "out/more.pt")
    run(*tune, "more_4", "--init", "out/more.pt", "--labelled-only", cwd=tmp_path)
    assert training("more_4")["seen"] == sorted(["scene-0999", *train])
    other = *tune, "c", "--init", "out/more.pt", "--split", "geo"
    assert "more.pt was trained on 1 scenes" in run(*other, cwd=tmp_path, ok=False)
    (tmp_path / "out/splits.json").write_text(json.dumps({"train": train, "val": val}))
    for command in (other, ("03_pretrain.py", "--split", "geo"), ("05_eval.py", "--split", "geo_val")):
        assert "splits.json is damaged or from before the geo split" in run(*command, cwd=tmp_path, ok=False)


def test_a_missing_scene_is_named(world):
    scene = json.loads((world / "out/splits.json").read_text())["val"][0]
    path = world / f"out/bev_gt/{scene}.pt"
    shutil.move(path, world / "kept.pt")
    assert f"{scene}.pt is missing: run 02_bev_gt.py" in run("05_eval.py", cwd=world, ok=False)
    shutil.move(world / "kept.pt", path)


def test_a_damaged_picture_is_named_by_a_worker_too(world, tmp_path):
    shutil.copytree(world / "out", tmp_path / "out")
    scene = json.loads((tmp_path / "out/splits.json").read_text())["train"][0]
    frames = torch.load(tmp_path / f"out/frames/{scene}.pt", weights_only=True)
    frames["image"][1][2] = frames["image"][1][2][:500]
    save_pt(frames, tmp_path / f"out/frames/{scene}.pt")
    for workers in (0, 1):
        result = run_script("03_pretrain.py", "--steps", 9, "--name", "b", "--workers", workers, cwd=tmp_path)
        assert result.returncode == 1 and "Traceback" not in result.stderr
        assert f"frames/{scene}.pt: image of frame 1 is damaged" in result.stderr


@pytest.mark.parametrize("script", sorted(p.name for p in ROOT.glob("0*.py")))
def test_help_explains_every_flag(script, tmp_path):
    text = run(script, "--help", cwd=tmp_path)
    assert "--out" in text and text.count("  --") <= 20
