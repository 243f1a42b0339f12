"""What bench_claim.py computes beside running the stages: intervals, sharpness, the split of its trials."""
import importlib
import json
import math
import time

import bench_claim
import pytest
import torch
from bench_claim import (ABLATIONS, LONG, MAIN, ROWS, command_of, energy, hold_out, interval, points, summary,
                         table, tuned, with_interval)
from reproject import CLASSES


def test_interval_is_students():
    mean, half = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(2.776 * math.sqrt(2.5) / math.sqrt(5))
    assert math.isnan(interval([0.3])[1]) and with_interval([0.3]) == "0.300"
    assert with_interval([0.3, 0.3]) == "0.300 ± 0.000"
    assert with_interval([None, 0.3]) == "0.300" and with_interval([None, None]) == "-"


def test_points_are_those_of_the_same_seed():
    rows = [[{"miou": value} for value in values] for values in ((0.5, 0.7), (0.4, 0.5))]
    mean, (low, high) = points(*rows)
    assert mean == 15 and (low, high) == pytest.approx((15 - 63.53, 15 + 63.53), abs=0.01)
    assert points([], rows[1]) == (None, None) and points(rows[0][:1], rows[1]) == (10.0, None)


def test_summary_by_hand():
    found = {row: [{"miou": 0.4, "seconds": 100.0}] for row in MAIN}
    found["pretraining + 50%"] = [{"miou": 0.43, "seconds": 30.0}]
    found[LONG] = [{"miou": 0.45, "seconds": 120.0}]
    found["pretraining alone"], found["pretraining + 10%"] = ([{"miou": miou, "seconds": 9.0}] for miou in (0.36, 0.38))
    gains = [{"gain_points": gain, "gain_ci95": None, "time_ratio": ratio}
             for gain, ratio in ((3.0, 0.3), (5.0, 1.2))]
    assert summary(found) == gains[0] | {"pretrain_only_share": 0.9, "ten_percent_gain_points": -2.0,
                                         "longer": gains[1]}


def test_a_blurred_line_has_less_energy():
    sharp = torch.zeros(1, 4, 20, 10)
    sharp[:, 1, :, 4:6] = 1
    assert energy(sharp) == 40  # two edges of 20 cells
    blurred = torch.nn.functional.avg_pool2d(sharp, (1, 3), 1, (0, 1))
    assert energy(blurred) < 0.7 * energy(sharp)
    assert energy(torch.ones(1, 4, 5, 5)) == 0


def test_trials_never_see_the_val_scenes(tmp_path):
    for folder in ("frames", "bev_gt"):
        (tmp_path / folder).mkdir()
    names = [f"scene-{i:04d}" for i in range(10)]
    (tmp_path / "splits.json").write_text(json.dumps({"train": names[:8], "val": names[8:]}))
    for _ in range(2):  # the second time it is there already
        folder = hold_out(tmp_path)
    splits = json.loads((folder / "splits.json").read_text())
    assert splits["val"] == [names[0], names[4]] and set(splits["train"]) == set(names[:8]) - set(splits["val"])
    assert (folder / "frames").resolve() == (tmp_path / "frames").resolve()


def test_known_results_are_not_measured_again(tmp_path, capsys):
    (tmp_path / "claim").mkdir()
    score = {"command": command_of(ROWS, "supervised 100%"), "seconds": 10.0, "miou": 0.4, "none": 0.3,
             "iou": {"divider": 0.3, "ped_crossing": 0.5, "boundary": 0.4}}
    known = {f"supervised 100%, seed {seed}": score | {"miou": 0.4 + seed / 10} for seed in range(2)}
    (tmp_path / "claim/results.json").write_text(json.dumps(known))
    found = table(tmp_path, ROWS, {"supervised 100%": 2})
    assert [r["miou"] for r in found["supervised 100%"]] == [0.4, 0.5]
    line = "| supervised 100% | 2 | 0.300 ± 0.000 | 0.500 ± 0.000 | 0.400 ± 0.000 | 0.450 ± 0.635 | 10 ± 0 |"
    assert line in capsys.readouterr().out


def test_lanes_measure_each_row_once_and_after_the_one_it_starts_from(tmp_path, monkeypatch, capsys):
    """Stages that do nothing, but in the time they would take."""
    trained = []

    def run(script, *words):
        words = list(map(str, words))
        if script == "05_eval.py":
            miou = {"map": 0.5, "bev": 0.4, "none": 0.3}[words[words.index("--memory") + 1]]
            (tmp_path / "eval").mkdir(exist_ok=True)
            metrics = {"miou": miou, "iou": dict.fromkeys(CLASSES, miou),
                       "by_range": {ring: {"miou": miou + 0.1} for ring in ("0-10", "10-20", "20-30")}}
            (tmp_path / "eval/metrics.json").write_text(json.dumps(metrics))
            return 0
        if "--init" in words and "scratch" not in words:
            assert words[words.index("--init") + 1] in trained
        steps = int(words[words.index("--steps") + 1])
        time.sleep(steps / 20000)
        trained.append(str(tmp_path / words[words.index("--name") + 1]) + ".pt")
        return steps

    (tmp_path / "claim").mkdir()
    monkeypatch.setattr(bench_claim, "run", run)
    bench_claim.measure(tmp_path, ROWS, {"ipm": 1} | dict.fromkeys(MAIN, 2))
    found = json.loads((tmp_path / "claim/results.json").read_text())
    assert len(trained) == len(set(trained)) == 2 * len(MAIN) and len(found) == 2 * len(MAIN) + 1
    assert [found["ipm, seed 0"][key] for key in ("miou", "bev", "none", "0-10 m")] == [0.5, 0.4, 0.3, 0.6]
    assert found[f"{LONG}, seed 1"]["seconds"] == 1450 and found["pretraining + 10%, seed 0"]["seconds"] == 1700

    (tmp_path / "claim/results.json").unlink()
    trained.clear()
    monkeypatch.setattr("sys.argv", ["bench_claim.py", "--quick", "--out", str(tmp_path)])
    bench_claim.main(bench_claim.parse_args())
    assert len(trained) == len(MAIN) - 2 and not any("1450" in name or "300_steps" in name for name in trained)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(last) == ["gain_points", "gain_ci95", "time_ratio", "pretrain_only_share", "ten_percent_gain_points"]

    rows = {"first": ROWS["pretraining"], "second": tuned(0.5, 130, "first"), "third": tuned(0.1, 120, "first")}
    trained.clear()
    bench_claim.measure(tmp_path, rows, dict.fromkeys(rows, 1))  # a lane for each row would train the first one twice
    assert len(trained) == 3


def test_a_stage_that_fails_ends_the_measurement_with_its_own_words(tmp_path):
    (tmp_path / "claim").mkdir()
    with pytest.raises(SystemExit, match="splits.json is missing: run 02_bev_gt.py"):
        bench_claim.measure(tmp_path, ROWS, dict.fromkeys(MAIN, 1))
    assert not (tmp_path / "claim/results.json").exists()


def test_every_row_has_flags_that_its_stage_takes(monkeypatch):
    for script, flags, start in (ROWS | ABLATIONS).values():
        assert start is None or start in ROWS
        monkeypatch.setattr("sys.argv", [script, *map(str, flags)])
        importlib.import_module(script.removesuffix(".py")).parse_args()
