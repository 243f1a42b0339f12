"""Damage by the hundred, seeded: files, tables, maps, images, disks, memory, processes. Each case ends in one line that
names the file, or in the result of the undamaged one. `python tests/test_faults.py` prints how many did which."""
import contextlib
import importlib
import io
import json
import math
import os
import pickle
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run_script
from PIL import Image
from test_bev_gt import rectangle, write_map
from test_reproject import write_scene

from model import PRESETS, BEVSegmenter
from reproject import (CONSENSUS_FLAGS, Frames, is_sound, levelled, load_artifact, load_pt, pose_matrix, read_splits,
                       save_json, save_pt, watched)

CONFIG = PRESETS["toy"]
TALLY = {}  # case -> how many were tried, named, right, altered
WRONG = (None, 7, -1.5, "text", ["text"], {"text": 7}, math.nan)
stage_1, stage_2 = importlib.import_module("01_pseudolabel"), importlib.import_module("02_bev_gt")


def same(a, b):
    """Whether two things out of .pt files are equal, tensors bit by bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def tally(case, attempt, expected, names, altered=False):
    """attempt() stops with one line that has `names`, or returns what is expected; with `altered`, anything else."""
    counts = TALLY.setdefault(case, dict.fromkeys(("tried", "named", "right", "altered"), 0))
    counts["tried"] += 1
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            result = attempt()
    except SystemExit as stop:
        message = str(stop.code)
        assert message.startswith("error: ") and "\n" not in message and names in message, message
        counts["named"] += 1
        return
    is_right = same(result, expected)
    assert is_right or altered, "a silently wrong result"
    counts["right" if is_right else "altered"] += 1


def put(path, data):
    """Replace a file as the stages do: what has mapped the old one keeps it."""
    path.unlink()
    path.write_bytes(data)


def spoilt_bytes(data, rng):
    """The bytes cut short, or with one bit flipped, or with a block of zeros; half of the time near an end of them."""
    data = bytearray(data)
    place = rng.choice((rng.randrange(len(data)), rng.randrange(len(data)), rng.randrange(min(1000, len(data))),
                        len(data) - 1 - rng.randrange(min(3000, len(data)))))
    how = rng.choice(("cut", "flip", "flip", "zeros"))
    if how == "cut":
        return bytes(data[:place])
    if how == "flip":
        data[place] ^= 1 << rng.randrange(8)
    else:
        data[place:place + 512] = bytes(len(data[place:place + 512]))
    return bytes(data)


def spoilt_table(table, rng, keep=()):
    """A JSON table, {layer: [records]}, with a record deleted (not in the layers to `keep`), or a field of it deleted,
    of another type, with a number that is none, or a token of nothing."""
    table = json.loads(json.dumps(table))
    layer = rng.choice(sorted(name for name in table if isinstance(table[name], list) and table[name]))
    place = rng.randrange(len(table[layer]))
    record = table[layer][place]
    field = rng.choice(sorted(record))
    how = rng.choice(("record", "field", "type", "type", "type", "inside", "inside"))
    if how == "record" and layer not in keep:
        del table[layer][place]
    elif how == "field":
        del record[field]
    elif how == "inside" and isinstance(record[field], list) and record[field]:
        record[field][rng.randrange(len(record[field]))] = rng.choice((None, *WRONG[3:]))
    else:
        wrong = [v for v in WRONG if type(v) is not type(record[field])
                 and not (type(v) in (int, float) and type(record[field]) in (int, float) and math.isfinite(v))]
        record[field] = "nothing" if "token" in field and rng.random() < 0.5 else rng.choice(wrong)
    return table


# ---------------------------------------------------------------- .pt files

@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Frames, truth, consensus, checkpoint and splits of one scene, made by hand."""
    folder = tmp_path_factory.mktemp("faults") / "out"
    write_scene(folder, "a", CONFIG, [0.0, 0.5])
    truth = load_pt(folder / "bev_gt/a.pt", "")
    labels = load_artifact(folder / "frames/a.pt", "")
    truth["meta"]["source"] = dict.fromkeys(CONSENSUS_FLAGS, 1) | {"frames": labels["digest"]}
    truth["bev"][:, ::7] = 3
    save_pt(truth, folder / "pretrain/a.pt")
    torch.manual_seed(0)
    weights = {k: v for k, v in BEVSegmenter(CONFIG).state_dict().items() if not k.startswith("backbone")}  # a few MB
    save_pt({"model": weights, "config": asdict(CONFIG), "step": 1, "args": {"steps": 1}}, folder / "pretrain.pt")
    save_json({"train": ["a"], "val": ["a"]}, folder / "splits.json")
    return folder


def read_frames(out):
    frames = Frames(out, ["a"], CONFIG, 1, True)
    return frames.digest, frames[0], frames[1]


def read_consensus(out):
    return Frames(out, ["a"], CONFIG, 0, True, {"a": out / "pretrain/a.pt"}, dict.fromkeys(CONSENSUS_FLAGS, 1))[1]


def read_weights(out):
    return load_pt(out / "pretrain.pt", "run 03_pretrain.py")


@pytest.mark.parametrize("name, read, times", [
    ("frames/a.pt", read_frames, 200), ("bev_gt/a.pt", read_frames, 100), ("pretrain/a.pt", read_consensus, 100),
    ("pretrain.pt", read_weights, 150)])
def test_bytes_of_artifacts(out, name, read, times):
    path, rng = out / name, random.Random(name)
    whole, expected = path.read_bytes(), read(out)
    try:
        for _ in range(times):
            put(path, spoilt_bytes(whole, rng))
            tally(f"bytes of {name.replace('/a', '/<scene>')}", lambda: read(out), expected, str(path))
    finally:
        put(path, whole)
    assert TALLY[f"bytes of {name.replace('/a', '/<scene>')}"]["named"] > times / 2


def test_a_flipped_bit_of_a_number_is_noticed(out):
    """Not left to chance: each of the 32 bits of one weight, deep in its tensor, which torch.load itself takes."""
    path = out / "pretrain.pt"
    whole, weight = path.read_bytes(), load_pt(path, "")["model"]["query"][5]
    place = whole.index(weight.numpy().tobytes())
    try:
        for bit in range(32):
            data = bytearray(whole)
            data[place + bit // 8] ^= 1 << bit % 8
            put(path, data)
            assert not torch.equal(torch.load(path, weights_only=True)["model"]["query"][5], weight)
            with pytest.raises(SystemExit, match="pretrain.pt is damaged"):
                load_pt(path, "")
    finally:
        put(path, whole)


def test_files_of_another_place(out, tmp_path):
    """A whole file, but the wrong one; each missing key; fewer entries than key frames; splits.json of wrong types."""
    shutil.copytree(out, tmp_path / "out")
    frames, splits = load_pt(out / "frames/a.pt", ""), json.loads((out / "splits.json").read_text())
    path = tmp_path / "out/frames/a.pt"
    contents = [load_pt(out / name, "") for name in ("bev_gt/a.pt", "pretrain.pt")]
    contents += [{k: v for k, v in frames.items() if k != key} for key in frames if key not in ("location", "scene",
                                                                                                  "description")]
    contents += [{**frames, key: frames[key][:1]} for key in ("token", "timestamp", "image", "label", "K")] + [[], 7]
    for content in contents:
        save_pt(content, path)
        tally("whole .pt, wrong content", lambda: read_frames(tmp_path / "out"), None, str(path))
    for content in (7, [], {}, {"train": 7, "val": []}, {**splits, "val": None}, "train val"):
        save_json(content, tmp_path / "out/splits.json")
        tally("splits.json", lambda: read_splits(tmp_path / "out"), None, "splits.json")


@pytest.mark.parametrize("value, kind, sound", [
    (1.5, float, True), (-7, float, True), (10 ** 400, float, False), (math.inf, float, False),
    (math.nan, float, False), (-math.inf, float, False),
    (7, int, True), (0, int, True), (-1, int, False), (2 ** 63, int, False), (True, int, False), (True, bool, True),
    ([0, 0, 0, 1.0], (4, float), True), ([0, 0, 0, 0], (4, float), False), ([1, 2], (3, float), False)])
def test_what_tables_may_hold(value, kind, sound):
    assert is_sound(value, kind) == sound


@pytest.mark.parametrize("meta", [None, 7, {}, {"source": None}])
def test_an_artifact_without_meta_is_named(tmp_path, meta):
    save_pt({"meta": meta, "token": []}, tmp_path / "x.pt")
    with pytest.raises(SystemExit, match="x.pt is no file of stage 01, 02 or 03: run 01"):
        load_artifact(tmp_path / "x.pt", "run 01")


class Malicious:
    """Unpickled by an unwary reader, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_malicious_pickles_are_refused(tmp_path):
    path, proof = tmp_path / "x.pt", tmp_path / "proof"
    for name, write in {"zip": lambda: torch.save({"a": Malicious(proof)}, path),
                        "old": lambda: torch.save({"a": Malicious(proof)}, path, _use_new_zipfile_serialization=False),
                        "raw": lambda: path.write_bytes(pickle.dumps(Malicious(proof), protocol=2))}.items():
        write()
        tally("malicious pickles", lambda: load_pt(path, "run 01"), None, "x.pt is damaged or no .pt file")
        assert not proof.exists(), name
    pickle.loads(path.read_bytes())
    assert proof.exists()  # it would have worked


def test_nothing_is_unpickled_otherwise():
    code = "".join(path.read_text() for path in ROOT.glob("*.py"))
    calls = re.findall(r"torch\.load\((.*)", code)
    assert calls and all("weights_only=True" in call for call in calls)
    assert not re.search(r"\b(np|numpy|pickle|joblib|marshal)\.loads?\(|allow_pickle|import pickle",
                         code)


# ---------------------------------------------------------------- images

def test_camera_images(tmp_path):
    """A JPEG has no checksum: one that decodes to another picture cannot be told from a good one. No more happens."""
    rng, path = random.Random(1), tmp_path / "camera é.jpg"
    noise = torch.randint(0, 256, (9, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).resize((320, 180)).save(path)
    whole, expected = path.read_bytes(), stage_1.load_image(path, (90, 160), (45, 80))
    for _ in range(300):
        path.write_bytes(spoilt_bytes(whole, rng))
        tally("camera images", lambda: stage_1.load_image(path, (90, 160), (45, 80)), expected, str(path), altered=True)
    for data in (b"", whole[:2], b"no image", whole.replace(b"\x00\xb4\x01\x40", b"\xff\xff\xff\xff"), pickle.dumps(1)):
        path.write_bytes(data)
        tally("camera images", lambda: stage_1.load_image(path, (90, 160), (45, 80)), None, str(path))
    path.unlink()
    path.mkdir()
    tally("camera images", lambda: stage_1.load_image(path, (90, 160), (45, 80)), None, str(path))


# ---------------------------------------------------------------- tables and maps

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A toy world of two scenes, with small images and a map of a few lines. Returns the folder and its tables."""
    root = tmp_path_factory.mktemp("wörld with spaces 地図") / "data"
    small = "--train-scenes", 1, "--val-scenes", 1, "--frames", 2
    run_script("tests/toyworld.py", *small, "--out", root).check_returncode()
    for path in root.rglob("*.jpg"):
        Image.open(path).resize((64, 36)).save(path)
    tables = {path.stem: json.loads(path.read_text()) for path in (root / "v1.0-trainval").iterdir()}
    x, y, _ = tables["ego_pose"][0]["translation"]
    for path in (root / "maps/expansion").iterdir():
        write_map(path, lane_divider=[[(x - 9, y), (x + 9, y)]], ped_crossing=[[rectangle(x, y - 5, x + 3, y + 5)]],
                  road_segment=[[rectangle(x - 20, y - 8, x + 20, y + 8), rectangle(x - 9, y + 5, x, y + 6)]])
    return root, tables


def run_here(script, root, monkeypatch, *args):
    """A stage from its first to its last line in this process, on the data set `root`, with a segmenter that sees
    nothing. Returns what it has written, by name; a stage that stops leaves nothing half-written."""
    import transformers
    blind = torch.nn.Module()
    blind.forward = lambda images: SimpleNamespace(class_queries_logits=torch.zeros(len(images), 2, 14),
                                                   masks_queries_logits=images.mean(1, keepdim=True).repeat(1, 2, 1, 1))
    small = ["--segmenter", str(ROOT / "tests/toy_segmenter"), "--segmenter-size", "32", "64", "--workers", "1"]
    out = root.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    with monkeypatch.context() as patch:
        patch.setattr(transformers.Mask2FormerForUniversalSegmentation, "from_pretrained",
                      lambda *args, **flags: (blind, {"missing_keys": []}))
        patch.setitem(PRESETS, "toy", replace(CONFIG, image_size=(18, 32)))
        patch.setattr(torch, "set_num_threads", lambda number: None)
        patch.setattr(sys, "argv", [script, "--dataroot", str(root), "--out", str(out), "--preset", "toy", *args,
                                    *(small if script.startswith("01") else ["--workers", "0"])])
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        finally:
            assert not list(out.rglob("*.tmp"))
    return {path.name: load_pt(path, "") if path.suffix == ".pt" else path.read_text()
            for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize("script", ["01_pseudolabel.py", "02_bev_gt.py"])
def test_records_of_tables(data, script, monkeypatch):
    root, tables = data
    rng, expected = random.Random(script), run_here(script, root, monkeypatch)
    assert len(expected) == (2 if script.startswith("01") else 3)
    for _ in range(200):
        spoilt = spoilt_table(tables, rng, keep=("scene",))  # a data set with fewer scenes is a good one
        changed = [name for name in tables if spoilt[name] != tables[name]]
        for name in changed:
            (root / f"v1.0-trainval/{name}.json").write_text(json.dumps(spoilt[name]))
        tally(f"records of tables, {script[:2]}", lambda: run_here(script, root, monkeypatch), expected, "v1.0-")
        for name in changed:
            (root / f"v1.0-trainval/{name}.json").write_text(json.dumps(tables[name]))


@pytest.mark.parametrize("script", ["01_pseudolabel.py", "02_bev_gt.py"])
def test_whole_tables(data, script, monkeypatch):
    """Tables that are cut, empty, of another type, a folder or away; values that would pass, and mean nothing."""
    root, tables = data
    rng, expected = random.Random(script), run_here(script, root, monkeypatch)
    for name in sorted(tables):
        path = root / f"v1.0-trainval/{name}.json"
        whole = path.read_text()
        for text in (whole[:rng.randrange(len(whole))], "", "null", "7", '"text"', "{}", "[7]", "[[" * 60000, "\xff"):
            path.write_text(text, encoding="latin-1")
            tally(f"whole tables, {script[:2]}", lambda: run_here(script, root, monkeypatch), expected, "v1.0-trainval")
        path.unlink()
        tally(f"whole tables, {script[:2]}", lambda: run_here(script, root, monkeypatch), expected, f"{name}.json")
        path.mkdir()
        tally(f"whole tables, {script[:2]}", lambda: run_here(script, root, monkeypatch), expected, f"{name}.json")
        path.rmdir()
        path.write_text(whole)
    first = tables["sample"][0]["token"]
    cameras = [r for r in tables["calibrated_sensor"] if r["camera_intrinsic"]]
    for name, record, field, value in [
            ("ego_pose", r, "rotation", [0, 0, 0, 0.0]) for r in tables["ego_pose"][:1]] + [
            ("sample", r, "next", first) for r in tables["sample"]] + [
            ("scene", r, "nbr_samples", n) for r in tables["scene"] for n in (0, 1, 3)] + [
            ("calibrated_sensor", r, "camera_intrinsic", [[-1000.0, 0, 800], [0, 1000, 450], [0, 0, 1]])
            for r in cameras[:1]] + [
            ("sample_data", r, "width", 0) for r in tables["sample_data"] if r["width"]][:1]:
        path = root / f"v1.0-trainval/{name}.json"
        path.write_text(json.dumps([{**r, field: value} if r is record else r for r in tables[name]]))
        tally(f"senseless values, {script[:2]}", lambda: run_here(script, root, monkeypatch), expected, "v1.0-trainval")
        path.write_text(json.dumps(tables[name]))


def test_maps(data, tmp_path):
    root, tables = data
    rng, path = random.Random(2), next((root / "maps/expansion").iterdir())
    here = levelled(pose_matrix(tables["ego_pose"][0]))

    def drawn():
        return torch.from_numpy(stage_2.rasterise(stage_2.read_map(spoilt), here, CONFIG.grid, CONFIG.line_width))

    table, spoilt = json.loads(path.read_text()), tmp_path / "map.json"
    spoilt.write_text(json.dumps(table))
    expected = drawn()
    assert set(expected.unique().tolist()) == {0, 1, 2, 3}
    for _ in range(300):  # a map with one lane less is a good one
        spoilt.write_text(json.dumps(spoilt_table(table, rng, keep=("lane", "lane_divider", "ped_crossing",
                                                                    "road_segment"))))
        tally("records of maps", drawn, expected, str(spoilt))
    whole = json.dumps(table)
    for text in [whole[:rng.randrange(len(whole))] for _ in range(20)] + ["", "7", "[7]", "[[" * 60000, "\xff"]:
        spoilt.write_text(text, encoding="latin-1")
        tally("whole maps", drawn, expected, str(spoilt))


def test_odd_places_change_nothing(data, tmp_path, monkeypatch):
    """Links for the data set and out/, names beyond ASCII, files from the future: the same result."""
    root, _ = data
    for script in ("01_pseudolabel.py", "02_bev_gt.py"):
        expected = run_here(script, root, monkeypatch)
        (tmp_path / script / "elsewhere").mkdir(parents=True)
        (tmp_path / script / "out").symlink_to("elsewhere")
        (tmp_path / script / "a link é").symlink_to(root)
        for path in root.rglob("*"):
            os.utime(path, (time.time() + 1e6,) * 2)
        link = tmp_path / script / "a link é"
        tally("links, odd names, future", lambda: run_here(script, link, monkeypatch), expected, "")
        written = sorted((tmp_path / script / "elsewhere").rglob("*.pt"))
        for path in written:
            os.utime(path, (time.time() + 1e6,) * 2)
        stamps = [path.stat().st_mtime_ns for path in written]
        with contextlib.suppress(SystemExit):  # finished: nothing to do
            run_here(script, root, monkeypatch, "--out", str(tmp_path / script / "out"))
        assert len(stamps) == 2 and stamps == [path.stat().st_mtime_ns for path in written]


# ---------------------------------------------------------------- disk, memory, processes

@contextlib.contextmanager
def disk_of(size):
    """No file may grow beyond `size` bytes: the write that would gets an OSError, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name, save", [("x.pt", save_pt), ("x.json", save_json)])
def test_full_disks(tmp_path, name, save):
    """The old file stays, whole, and no other."""
    old, new, path, rng = {"a": 1}, {"b": list(range(9000))}, tmp_path / name, random.Random(3)
    save(new, path)
    size = path.stat().st_size
    save(old, path)
    whole = path.read_bytes()
    for limit in [0, 1, size - 1, *(rng.randrange(size) for _ in range(30))]:
        with disk_of(limit):
            tally("full disks", lambda: save(new, path), 0, f"{name} cannot be written (File too large)")
        assert path.read_bytes() == whole and list(tmp_path.iterdir()) == [path]
    with disk_of(size):
        save(new, path)


def test_what_a_killed_run_left_is_cleared_away(tmp_path):
    """The half-written file of a process that was killed goes with the next write; that of one at work stays."""
    old, new, other = (tmp_path / name for name in (".x.pt.7.tmp", ".x.pt.8.tmp", ".y.pt.7.tmp"))
    for path in (old, new, other):
        path.write_text("half of it")
    for path in (old, other):
        os.utime(path, (time.time() - 4000,) * 2)
    save_pt([1], tmp_path / "x.pt")
    assert sorted(tmp_path.iterdir()) == [new, other, tmp_path / "x.pt"]


def test_a_full_disk_under_the_stages(data, out, tmp_path, monkeypatch):
    root, _ = data
    for script, size in (("01_pseudolabel.py", 9000), ("02_bev_gt.py", 9000), ("02_bev_gt.py", 10)):
        def full():
            with disk_of(size):
                return run_here(script, root, monkeypatch)
        tally("full disks", full, None, "cannot be written (File too large): make room")
        assert not [path for path in (root.parent / "out").rglob("*") if path.is_file()]
    file, loop = tmp_path / "file", tmp_path / "loop"
    file.write_text("")
    loop.symlink_to(loop)
    for place in (file / "out", loop, Path("/proc/nothing")):
        for script in ("01_pseudolabel.py", "02_bev_gt.py"):
            tally("folders that take nothing", lambda: run_here(script, root, monkeypatch, "--out", str(place)), None,
                  "cannot be written")


def test_memory_that_runs_out():
    @watched()
    def fails(error):
        raise error

    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
                  torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'"),
                  RuntimeError("[enforce fail at alloc_cpu.cpp:126] err == 0. DefaultCPUAllocator: can't allocate "
                               "memory: you tried to allocate 4000000000 B. Error code 12 (Cannot allocate memory)")):
        tally("memory", lambda: fails(error), None, "out of memory: use a smaller --batch-size or --preset")
    for message in ("Caught RuntimeError in DataLoader worker process 0.\nRuntimeError: unable to allocate shared "
                    "memory(shm) for file </torch_7>: No space left on device (28)",
                    "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's "
                    "workers are out of shared memory. Please try to raise your shared memory limit."):
        with pytest.raises(SystemExit, match="/dev/shm is too small for --workers: --workers 0, or give docker"):
            fails(RuntimeError(message))
    for error in (EOFError(), ConnectionResetError()):  # of a worker that was killed while it handed over a batch
        with pytest.raises(SystemExit, match="error: a worker process was stopped"):
            fails(error)
    with pytest.raises(EOFError):  # a mistake of its own is none
        fails(EOFError("Caught EOFError in DataLoader worker process 0."))
    for message in ("shapes cannot be multiplied", "Caught RuntimeError in DataLoader worker process 0.\nshapes"):
        with pytest.raises(RuntimeError, match="shapes"):  # what is no fault of the machine stays an exception
            fails(RuntimeError(message))

    with pytest.raises(NotImplementedError):  # without a word
        fails(NotImplementedError())

    def real():
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (int(Path("/proc/self/statm").read_text().split()[0]) * 4096, before[1]))
        try:
            return watched()(torch.zeros)(1 << 32)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)
    tally("memory", real, None, "out of memory")


def test_memory_that_runs_out_while_the_segmenter_loads(monkeypatch):
    import transformers

    def too_large(*args, **flags):
        raise MemoryError

    monkeypatch.setattr(transformers.Mask2FormerForUniversalSegmentation, "from_pretrained", too_large)
    tally("memory", lambda: stage_1.load_segmenter(str(ROOT / "tests/toy_segmenter"), "cpu"), None, "out of memory")


def ends_in_one_line(code, stderr):
    """What sys.exit is told, from outside: the last line of stderr, below the progress bars; no traceback."""
    assert code == 1 and "Traceback" not in stderr, stderr
    sys.exit(re.split(r"[\r\n]+", stderr.strip())[-1])


def test_a_worker_that_is_killed(out, tmp_path):
    shutil.copytree(out, tmp_path / "out")
    process = subprocess.Popen([sys.executable, ROOT / "03_pretrain.py", "--out", tmp_path / "out", "--batch-size", "1",
                                "--steps", "5000", "--workers", "1", "--name", "b"], stderr=subprocess.PIPE, text=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").exists():
        process.kill()
        pytest.skip("no /proc to find the worker in")
    workers = []
    while not workers and process.poll() is None:  # a worker is a fork; what imports start for a moment is not
        time.sleep(1)
        own = Path(f"/proc/{process.pid}/cmdline").read_bytes()  # not at once: it is empty while the process starts
        workers = [pid for pid in children.read_text().split()
                   if Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() == own]
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, stderr = process.communicate(timeout=120)
    tally("killed worker", lambda: ends_in_one_line(process.returncode, stderr), None, "a worker process was stopped")


def test_damage_seen_from_outside(out, tmp_path):
    """Exit code, one line and no traceback, of whole processes."""
    shutil.copytree(out, tmp_path / "out")
    path = tmp_path / "out/frames/a.pt"
    whole = bytearray(path.read_bytes())
    whole[whole.index(b"\xff\xd8\xff") + 300] ^= 1  # a bit of a picture
    path.write_bytes(whole)
    done = run_script("03_pretrain.py", "--out", tmp_path / "out", "--batch-size", 1)
    tally("stage 03 from outside", lambda: ends_in_one_line(done.returncode, done.stderr), None, "a.pt is damaged")
    shutil.copytree(out, tmp_path / "full")
    small = tmp_path / "small.py"  # a stage under a limit for the size of files
    small.write_text("import resource, runpy, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
                     f"sys.path[0] = {str(ROOT)!r}\ndel sys.argv[0]\nrunpy.run_path(sys.argv[0], run_name='__main__')")
    full = run_script(small, ROOT / "03_pretrain.py", "--out", tmp_path / "full", "--steps", 1, "--name", "b")
    tally("stage 03 from outside", lambda: ends_in_one_line(full.returncode, full.stderr), None,
          "b.pt cannot be written (File too large)")
    assert not [path for path in (tmp_path / "full").rglob("*") if path.name.endswith(".tmp") or path.name == "b.pt"]


if __name__ == "__main__":
    code = pytest.main(["-q", __file__, "-p", "no:cacheprovider"])
    tables = sys.modules["test_faults"].TALLY
    print(f"{'case':<28}" + "".join(f"{name:>9}" for name in ("tried", "named", "right", "altered")))
    for case, counts in tables.items():
        print(f"{case:<28}" + "".join(f"{count:>9}" for count in counts.values()))
    sys.exit(code)
