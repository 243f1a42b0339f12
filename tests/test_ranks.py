"""Two processes under torchrun do what one does; a run that is killed at any moment ends as if it had not been."""
import fcntl
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, run_script

import reproject
from model import PRESETS
from reproject import Frames, claim, read_splits

LIGHT = {"OMP_NUM_THREADS": "1"}
# A stage as it is, but that it saves after every step instead of every minute.
EAGER = """
import functools, runpy, sys
sys.path.insert(0, {root!r})
import model
model.fit = functools.partial(model.fit, minutes=0)
del sys.argv[0]
runpy.run_path({root!r} + "/" + sys.argv[0], run_name="__main__")
""".format(root=str(ROOT))


def run(script, *flags, cwd):
    """Run a stage, which must succeed."""
    done = run_script(script, *flags, cwd=cwd, **LIGHT)
    assert done.returncode == 0, done.stderr[-2000:]


def torchrun(script, *flags, cwd):
    """The same, as two processes."""
    command = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, ROOT / script, *flags
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env=os.environ | LIGHT, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two train scenes and a val scene, labelled and rasterised. Returns the working folder."""
    cwd = tmp_path_factory.mktemp("world")
    flags = "--train-scenes", 2, "--val-scenes", 2, "--frames", 3
    run("tests/toyworld.py", *flags, cwd=cwd)
    run("01_pseudolabel.py", "--segmenter", ROOT / "tests/toy_segmenter", cwd=cwd)
    run("02_bev_gt.py", cwd=cwd)
    return cwd


def load(path):
    """A checkpoint."""
    return torch.load(path, weights_only=True)


def running_mean(optimizer):
    """All of a checkpoint's running means of gradients: AdamW's, then Muon's."""
    means = [state["exp_avg"] for state in optimizer["adamw"]["state"].values()] + optimizer["muon"]
    return torch.cat([mean.flatten() for mean in means])


def same(a, b):
    """Whether two nested artifacts are equal, bit by bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("script, flags", (("03_pretrain.py", []), ("04_finetune.py", ["--init", "scratch"])))
def test_two_processes_have_the_loss_curve_of_one(world, script, flags):
    flags = *flags, "--steps", 3, "--lr", 2e-5, "--name"  # one sample a process and step
    run(script, *flags, "one", cwd=world)
    torchrun(script, *flags, "two", cwd=world)
    one, two = (load(world / f"out/{name}.pt") for name in ("one", "two"))
    for name in ("one", "two"):
        (world / f"out/{name}.pt").unlink()
    assert len(one["curve"]) == len(two["curve"]) == 3
    for mine, theirs in zip(one["curve"], two["curve"]):
        assert mine == pytest.approx(theirs, abs=1e-5)
    if script == "03_pretrain.py":  # a step that looks back is among them
        assert any("temporal" in step for step in one["curve"])
    else:
        assert all(set(step) == {"map"} for step in one["curve"])  # the baseline knows no pseudo-label
    # The optimizers hide a gradient's size from the weights; its running mean does not.
    mine, theirs = (running_mean(run["optimizer"]) for run in (one, two))
    assert (mine - theirs).norm() < 0.01 * mine.norm()
    for name, value in one["model"].items():
        if "running" in name:
            assert torch.allclose(value, two["model"][name], rtol=3e-3, atol=1e-4), name


# A stage as it is, but that each process notes the size of its gradients at each step.
PEEK = """
import os, runpy, sys
sys.path.insert(0, {root!r})
import model
step = model.Optimizer.step
def peek(self, lr):
    with open("gradients." + os.environ["RANK"], "a") as file:
        print(sum(p.grad.double().abs().sum().item() for p in self.hidden if p.grad is not None), file=file)
    step(self, lr)
model.Optimizer.step = peek
del sys.argv[0]
runpy.run_path({root!r} + "/" + sys.argv[0], run_name="__main__")
""".format(root=str(ROOT))


def test_processes_share_the_gradients_of_all_parts(world, tmp_path):
    """With --accumulate, they meet in the last part alone: what the others have added must be in it."""
    peek = tmp_path / "peek.py"
    peek.write_text(PEEK)
    torchrun(peek, "04_finetune.py", "--init", "scratch", "--steps", 2, "--batch-size", 4, "--accumulate", 2,
             "--name", "shared", cwd=world)
    first, second = ((world / f"gradients.{rank}").read_text().split() for rank in (0, 1))
    assert len(first) == 2 and [float(g) for g in first] == pytest.approx([float(g) for g in second], rel=1e-9)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(reproject, "RANKS", 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit, match="2 processes and 1 GPU.*--nproc-per-node 1"):
        reproject.join_ranks()


def test_parts_of_a_step_add_up(world):
    """Without BatchNorm's statistics, which are those of a part, two parts would be exactly the whole; so: nearly."""
    flags = "--init", "scratch", "--steps", 2, "--batch-size", 4, "--lr", 2e-5, "--name"
    run("04_finetune.py", *flags, "whole", cwd=world)
    run("04_finetune.py", *flags, "parts", "--accumulate", 2, cwd=world)
    mine, theirs = (running_mean(load(world / f"out/{name}.pt")["optimizer"]) for name in ("whole", "parts"))
    assert torch.nn.functional.cosine_similarity(mine, theirs, dim=0) > 0.9
    assert (theirs.norm() / mine.norm()).item() == pytest.approx(1, abs=0.3)  # not the sum of two losses


def test_scores_do_not_depend_on_the_number_of_processes(world):
    shutil.rmtree(world / "out/eval", ignore_errors=True)
    scores = []
    for start in (run, torchrun):
        start("05_eval.py", "--checkpoint", "ipm", "--pictures", 4, cwd=world)
        assert sorted(path.name for path in (world / "out/eval").iterdir()) == [
            "confusion.png", "distance.png", "metrics.json", *(f"sample_{k}.png" for k in range(4))]
        scores.append((world / "out/eval/metrics.json").read_text())
    assert scores[0] == scores[1] and json.loads(scores[0])["num_samples"] == 6


def test_processes_share_the_scenes_that_they_score(world, monkeypatch):
    """Counts, not ratios: IoU would be the same if each process scored everything."""
    stage = importlib.import_module("05_eval")
    config = PRESETS["toy"]
    frames = Frames(world / "out", read_splits(world / "out")["val"], config, bev_gt=True)
    counts, quality = [], []
    for rank, ranks in ((0, 1), (0, 2), (1, 2)):
        monkeypatch.setattr(stage, "RANK", rank)
        monkeypatch.setattr(stage, "RANKS", ranks)
        confusion, by_ring, miou = stage.evaluate(frames, None, config)
        assert torch.equal(confusion["all"], by_ring.sum(0))
        counts.append(confusion["all"]), quality.append(miou)
    assert torch.equal(counts[0], counts[1] + counts[2]) and counts[1].any() and counts[2].any()
    assert torch.equal(quality[0], quality[1] + quality[2]) and quality[1].any() and quality[2].any()


# ---------------------------------------------------------------- kill -9

def kill_until_done(eager, script, flags, cwd, moments):
    """Run a stage and kill -9 it after so many seconds, again and again; then let it end, if it has not ended before.
    Returns how often it was killed."""
    for kills, moment in enumerate(moments):
        done = run_script(eager, script, *flags, cwd=cwd, seconds=moment, **LIGHT)
        if done.returncode == 0:
            return kills
        assert done.returncode == -signal.SIGKILL, done.stderr
    run(eager, script, *flags, cwd=cwd)
    return len(moments)


def test_stages_that_were_killed_leave_what_whole_ones_leave(world, tmp_path):
    rng = random.Random(0)
    segmenter = ["--segmenter", ROOT / "tests/toy_segmenter", "--dataroot", world / "data/toy"]
    commands = {"01_pseudolabel.py": segmenter, "02_bev_gt.py": segmenter[2:], "03_pretrain.py": ["--steps", 3],
                "04_finetune.py": ["--steps", 3], "05_eval.py": ["--pictures", 0]}
    kills, eager = {}, tmp_path / "eager.py"
    eager.write_text(EAGER)
    for script, flags in commands.items():
        began = time.time()
        run(script, *flags, "--out", "whole", cwd=tmp_path)
        moments = [rng.uniform(0.1, 0.8) * (time.time() - began) for _ in range(2)]
        kills[script] = kill_until_done(eager, script, flags, tmp_path, moments)
    print(kills)
    assert sum(kills.values()) >= 5  # of 10
    files = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.pt")
                   if "previous" not in path.name)
    assert len(files) == 4 + 4 + 2 + 2
    for path in files:
        killed, whole = (load(tmp_path / folder / path) for folder in ("out", "whole"))
        for content in (killed, whole):
            for key in ("out", "init", "init_digest"):  # the digest is that of a file that holds its own place
                content.get("args", {}).pop(key, None)
        assert same(killed, whole), path
    metrics = [json.loads((tmp_path / folder / "eval/metrics.json").read_text()) for folder in ("out", "whole")]
    assert metrics[0]["iou"] == metrics[1]["iou"]


def test_a_second_run_of_that_name_is_refused(world):
    busy = ROOT / "03_pretrain.py", "--steps", "2000", "--name", "busy"
    first = subprocess.Popen([sys.executable, *busy], cwd=world, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (world / "out/.busy.pt.lock").exists():
            time.sleep(0.1)
        time.sleep(0.5)
        second = run_script(*busy, cwd=world)
    finally:
        first.kill()
        first.wait()
    assert second.returncode == 1
    assert second.stderr.strip() == ("error: another run is writing out/busy.pt: wait for its end or choose another "
                                     "--name or --out")


def test_a_worker_that_outlives_a_killed_run_keeps_nobody_out(tmp_path):
    """As those of a DataLoader do for some seconds after kill -9: they are forked while the run has its lock."""
    run = (f"import os, pathlib, time, reproject; lock = reproject.claim(pathlib.Path({str(tmp_path / 'a.pt')!r})); "
           "os.fork() or time.sleep(20)")
    subprocess.run([sys.executable, "-c", run], cwd=ROOT, check=True)
    claim(tmp_path / "a.pt").close()


@pytest.mark.parametrize("path, command", (("eval", ("05_eval.py", "--checkpoint", "ipm")),
                                           ("tune.pt", ("04_finetune.py", "--init", "scratch", "--name", "tune"))))
def test_two_runs_do_not_mix_what_they_write(world, path, command):
    with open(world / f"out/.{path}.lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        done = run_script(*command, cwd=world)
    assert done.returncode == 1 and f"another run is writing out/{path}: wait for its end" in done.stderr


def test_only_the_first_process_speaks(capfd):
    """What the others print would stand there once for each of them."""
    words = "from reproject import join_ranks; join_ranks(); print('said')"
    for rank in "01":
        subprocess.run([sys.executable, "-c", words], cwd=ROOT, env=os.environ | {"RANK": rank}, check=True)
    assert capfd.readouterr().out == "said\n"
