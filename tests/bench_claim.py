"""The claim, measured: pretraining without BEV labels, then half of them, against full supervision on all of them.

    python tests/toyworld.py && python 01_pseudolabel.py && python 02_bev_gt.py
    python tests/bench_claim.py --seeds 5                # the main rows
    python tests/bench_claim.py --quick                  # one seed, without 300 + 1,150 steps: 16 minutes on two cores
    python tests/bench_claim.py --all                    # and, with seed 0, what the claim does not rest on
    python tests/bench_claim.py --length                 # how long supervision must be trained: on train scenes alone
    python tests/bench_claim.py --ablations --seeds 2    # what each part adds
    python tests/bench_claim.py --seeds 1 --rows "supervised 100%" "pretraining + 50%"    # some of the rows of --all

All rows have the same network, optimizer, augmentation, batch and arithmetic (bfloat16; float32 on a CPU that is not
faster in bfloat16). Seconds are those of the whole command, from its start to its end, loading and voting included. On
CPUs two commands run at a time, each with half of the cores: two cores do a fifth more steps so, and the commands do
not slow each other down. But for the length of the baseline, where they speak in its favour, and for how the memory of
05 carries maps along, nothing was chosen on the val scenes: `--length`, and the trials that chose settings (trials.md),
train on three quarters of the train scenes and score on the others.

Each result is kept in <out>/claim/results.json as it comes: a run that was stopped goes on, and can be done in parts. A
row whose flags were changed is measured again; after a change of code or world, delete the folder. The preset is `toy`.
With the main rows, the last line is the claim in numbers (JSON; the interval of one seed is null).
"""
import argparse
import importlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from model import load_checkpoint
from reproject import DEVICE, Frames, read_splits, relative_pose, save_json, warp

CORES = torch.get_num_threads()
LANES = min(2, CORES) if DEVICE == "cpu" else 1  # commands at a time; on one GPU, two would slow each other down
SCORING = threading.Lock()  # 05 writes to one place, and so do the results
SUPERVISED = 2400  # steps; in its favour: on held-out train scenes 1,200 do as well, in short drives 4,800 do no better
MEMORIES = ("none", "bev")  # of 05: mIoU with them, beside that with the default, `map`
COLUMNS = (*MEMORIES, "0-10 m", "10-20 m", "20-30 m")
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # 95%, by n


def pretrained(steps):
    """A row of pretraining: script, flags, the row whose checkpoint it starts from."""
    return "03_pretrain.py", ["--steps", steps], None


def tuned(labels, steps, start, *flags):
    """A row of fine-tuning."""
    return "04_finetune.py", ["--labels", labels, "--steps", steps, *flags], start


def supervised(steps, labels=1.0):
    """A row of the baseline."""
    return "04_finetune.py", ["--init", "scratch", "--labels", labels, "--steps", steps, "--lr", 1.5e-3], None


LONG = "pretraining + 50%, 1450 steps in all"
MAIN = {  # {name: (stage, flags, start)}: what the claim rests on
    "supervised 100%": supervised(SUPERVISED),
    "pretraining": pretrained(140),
    # A third of the seconds of full supervision, those of pretraining included; then more of them.
    "pretraining + 50%": tuned(0.5, 530, "pretraining"),
    "pretraining, 300 steps": pretrained(300),
    LONG: tuned(0.5, 1150, "pretraining, 300 steps"),
    "pretraining alone": pretrained(1500),
    # A few streets are soon learnt by heart: small steps, away from a network that knows all of them by sight.
    "pretraining + 10%": tuned(0.1, 200, "pretraining alone", "--lr", 1.5e-4),
}
PAPER = ["--target", "rendered", "--image", 0]
ROWS = MAIN | {  # what belongs beside it
    "supervised 100%, 600 steps": supervised(600),
    "supervised 100%, 1200 steps": supervised(1200),
    "supervised 100%, 4800 steps": supervised(4800),
    "supervised 50%": supervised(600, 0.5),  # fewer scenes are learnt by heart in fewer steps
    "supervised 10%": supervised(300, 0.1),
    # What of the gain is pretraining's, and what that of the consensus in the streets without labels.
    "pretraining + 50%, without consensus": tuned(0.5, 530, "pretraining", "--labelled-only"),
    "pretraining, 1 step": pretrained(1),
    "50% and consensus at once": tuned(0.5, 669, "pretraining, 1 step"),
    "pretraining, 300 steps, + 100%": tuned(1.0, 1150, "pretraining, 300 steps"),
    "losses of the paper, 1500 steps": ("03_pretrain.py", ["--steps", 1500, *PAPER, "--temporal", "smear"], None),
}
ABLATIONS = {name: ("03_pretrain.py", ["--steps", 300, *flags], None) for name, flags in {
    "all": [],
    "its own cameras alone": ["--view-range", 0],
    "labels as painted": ["--target", "painted"],
    "hidden ground not left out": ["--margin", -1],
    "no margin around what hides": ["--margin", 0],
    "no loss on the image features": ["--image", 0],
    "no temporal loss": ["--temporal", "off"],
    "within, weight 50": ["--temporal-weight", 50],
    "smear, weight 50": ["--temporal", "smear", "--temporal-weight", 50],
    "rendered into its own cameras": [*PAPER, "--temporal", "off"],
    "the same, smear": [*PAPER, "--temporal", "smear"],
}.items()}


def parse_args():
    """The flags."""
    parser = argparse.ArgumentParser(description="Half of the labels and pretraining, against all labels.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", default="out", help="folder with frames and bev_gt of a world")
    parser.add_argument("--seeds", type=int, default=5, choices=range(1, 11),
                        help="seeds 0 .. N-1")
    parser.add_argument("--quick", action="store_true", help="--seeds 1, without the longer training")
    parser.add_argument("--all", action="store_true", help="also the rows that the claim does not rest on, with seed 0")
    parser.add_argument("--rows", nargs="+", choices=ROWS, metavar="ROW", help="no rows but these, with all seeds")
    parser.add_argument("--length", action="store_true", help="supervision at half, full and twice its length, scored "
                                                              "on held-out train scenes")
    parser.add_argument("--ablations", action="store_true", help="pretraining alone, without one part at a time")
    return parser.parse_args()


def run(script, *words):
    """Run one stage; returns its seconds, or stops with its error."""
    began = time.time()
    done = subprocess.run([sys.executable, ROOT / script, *map(str, words)], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": str(CORES // LANES)})
    if done.returncode:
        sys.exit(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"error: {script} was stopped")
    return time.time() - began


def known_results(out):
    """{"<row>, seed <n>": result} of what has been measured."""
    path = Path(out) / "claim/results.json"
    return json.loads(path.read_text()) if path.exists() else {}


def result(out, store, row, seed):
    """Train and score one row with one seed, or look it up. Returns {"seconds", "iou", "miou", ...}."""
    known, key, command = known_results(out), f"{row}, seed {seed}", command_of(store, row)
    if known.get(key, {}).get("command") != command:
        checkpoint, seconds = "ipm", 0
        if row != "ipm":
            script, flags, start = store[row]
            if start:
                seconds += result(out, store, start, seed)["seconds"]
                flags = ["--init", checkpoint_of(out, start, seed), *flags]
            checkpoint = checkpoint_of(out, row, seed)
            checkpoint.unlink(missing_ok=True)  # half a run would hide half of the seconds
            shutil.rmtree(checkpoint.with_suffix(""), ignore_errors=True)  # and so would a consensus
            name = checkpoint.relative_to(out).with_suffix("")
            seconds += run(script, "--out", out, "--name", name, "--seed", seed, "--bf16", *flags)
        with SCORING:
            scores = {}
            for memory in (*MEMORIES, "map"):
                run("05_eval.py", "--out", out, "--checkpoint", checkpoint, "--memory", memory, "--pictures", 0)
                scores[memory] = json.loads((Path(out) / "eval/metrics.json").read_text())
            new = {"command": command, "seconds": round(seconds, 1), "miou": scores["map"]["miou"],
                   "iou": scores["map"]["iou"], **{memory: scores[memory]["miou"] for memory in MEMORIES},
                   **{f"{ring} m": score["miou"] for ring, score in scores["map"]["by_range"].items()}}
            if row in ABLATIONS:
                new |= sharpness(out, checkpoint)
            known = known_results(out) | {key: new}  # others may be new, too
            save_json(known, Path(out) / "claim/results.json")
        tqdm.write(f"{key}: mIoU {new['miou']:.3f}, {seconds:.0f} s")
    return known[key]


def measure(out, store, rows):
    """Measure the rows, {row: number of seeds}, with a bar that moves as they end. A row that starts from another one
    follows it in the same lane; the longest come first, so that the lanes end together."""
    jobs = {}  # (the row that a chain of rows begins with, seed) -> [rows]
    for row, seeds in rows.items():
        first = row
        while first in store and store[first][2]:
            first = store[first][2]
        for seed in range(seeds):
            jobs.setdefault((first, seed), []).append(row)

    def steps_of(row):
        return store[row][1][store[row][1].index("--steps") + 1] if row in store else 0

    def work(seed, chain):
        for row in chain:
            result(out, store, row, seed)
            bar.update(steps_of(row))

    jobs = sorted(jobs.items(), key=lambda job: -sum(map(steps_of, job[1])))
    bar = tqdm(total=sum(steps_of(row) for _, chain in jobs for row in chain), unit="step", desc="claim", mininterval=0)
    with bar, ThreadPoolExecutor(LANES) as pool:
        try:
            for done in as_completed([pool.submit(work, seed, chain) for (_, seed), chain in jobs]):
                done.result()
        except BaseException:  # what runs ends, what waits does not begin
            pool.shutdown(cancel_futures=True)
            raise


def command_of(store, row):
    """A row's stages and flags, in words."""
    if row == "ipm":
        return "ipm"
    script, flags, start = store[row]
    return " ".join(map(str, ((command_of(store, start), "then") if start else ()) + (script, *flags)))


def checkpoint_of(out, row, seed):
    """Where a row's checkpoint lies."""
    return Path(out) / "claim" / f"{row.replace('%', '').replace(',', '').replace(' ', '_')}_{seed}.pt"


def sharpness(out, checkpoint):
    """What a temporal loss is for, and what it costs, on the val scenes, with the memory that it trains: `bev`. All are
    0 for a map without lines.

    edges: sum of squared differences of class probabilities between neighbouring cells, over that of the truth (1: as
    sharp); width: expected cells of divider and boundary over those of the truth; flicker: mean difference (1/2 L1) of
    the class probabilities of one frame and the next, carried along, where both frames see the ground and either
    says more than background."""
    torch.set_num_threads(CORES // LANES)
    stage = importlib.import_module("05_eval")
    model = load_checkpoint(checkpoint, "")[1].eval()
    frames = Frames(out, read_splits(out)["val"], model.config, bev_gt=True)
    edges, truth_edges, width, truth_width, moved, places, before = 0, 0, 0, 0, 0, 0, None
    with torch.no_grad():
        for _, frame, logits in stage.predict(frames, model, model.config, range(len(frames.scenes)), "bev"):
            p, truth = logits.softmax(1), stage.one_hot(frame["bev"])  # (1, classes, H, W) each
            edges, truth_edges = edges + energy(p), truth_edges + energy(truth)
            width, truth_width = width + p[:, (1, 3)].sum(), truth_width + truth[:, (1, 3)].sum()
            seen = stage.seen_ground(frame, model.config.grid).unsqueeze(0)  # (1, H, W)
            now = torch.cat((p, seen[:, None].float()), 1)
            if frame["linked"].item():
                then = warp(before[1], relative_pose(before[0], frame["world_T_ego"]), model.config.grid)
                both = (then[:, -1] > 0.999) & seen & ((p[:, 0] < 0.5) | (then[:, 0] < 0.5))
                moved, places = moved + ((p - then[:, :-1]).abs().sum(1) / 2 * both).sum(), places + both.sum()
            before = frame["world_T_ego"], now
    return {"edges": (edges / truth_edges).item(), "width": (width / truth_width).item(),
            "flicker": (moved / places).item() if places else 0.0}


def energy(p):
    """Sum of squared differences between neighbours of (1, classes, H, W), over all but background."""
    return p[:, 1:].diff(dim=2).square().sum() + p[:, 1:].diff(dim=3).square().sum()


def interval(values):
    """Mean and half the width of its 95% interval (Student's t); nan for a single value."""
    n = len(values)
    half = STUDENT[n] * statistics.stdev(values) / math.sqrt(n) if n in STUDENT else math.nan
    return statistics.mean(values), half


def with_interval(values, digits=3):
    """'mean' or 'mean ± half width'; '-' of a class or a range that the val scenes do not have."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    mean, half = interval(values)
    return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def points(row, base):
    """By how many points of mIoU a row is above another, seed by seed, and the 95% interval [low, high]; or None."""
    if not row:
        return None, None
    mean, half = interval([100 * (a["miou"] - b["miou"]) for a, b in zip(row, base)])
    return round(mean, 2), None if math.isnan(half) else [round(mean - half, 2), round(mean + half, 2)]


def median_seconds(row):
    """Of a row's seeds: one may have been slowed by something else on the machine."""
    return statistics.median(result["seconds"] for result in row)


def table(out, store, rows, extra=()):
    """Measure the rows, {row: number of seeds}, and print them as a table; `extra`: more keys of the results, as
    columns. Returns {row: results}."""
    measure(out, store, rows)
    found = {row: [result(out, store, row, seed) for seed in range(seeds)] for row, seeds in rows.items()}
    print("\nmean ± half of the 95% interval\n"
          f"| row | seeds | divider | ped_crossing | boundary | mIoU | s | {''.join(f'{name} | ' for name in extra)}")
    print("|---|---|---|---|---|---|---|" + "---|" * len(extra))
    for row, results in found.items():
        cells = [[r["iou"][name] for r in results] for name in ("divider", "ped_crossing", "boundary")]
        cells = [with_interval(v) for v in (*cells, [r["miou"] for r in results])]
        cells += [with_interval([r["seconds"] for r in results], 0)]
        cells += [with_interval([r.get(name) for r in results]) for name in extra]
        print(f"| {row} | {len(results)} | {' | '.join(cells)} |")
    return found


def picture(found, path):
    """mIoU against training seconds: a line a method, a bar a 95% interval, where there are three seeds or more."""
    from matplotlib import pyplot as plt  # comes with nuscenes-devkit
    plt.figure(figsize=(7, 4.2), dpi=120)

    def draw(results, label, colour, marker):
        pairs = sorted((median_seconds(row), [r["miou"] for r in row]) for row in results)
        x, y = zip(*[(seconds, statistics.mean(values)) for seconds, values in pairs])
        plt.plot(x, y, color=colour, marker=marker, label=label)
        for seconds, values in pairs:
            if len(values) > 2:
                plt.errorbar(seconds, *interval(values), color=colour, capsize=3)

    for rows, label, colour, marker in (
            (("supervised 100%, 600 steps", "supervised 100%, 1200 steps", "supervised 100%",
              "supervised 100%, 4800 steps"),
             "supervised, 100% of the labels", "#0072B2", "o"),
            (("supervised 50%",), "supervised, 50%", "#56B4E9", "s"),
            (("supervised 10%",), "supervised, 10%", "#999999", "^"),
            (("pretraining", "pretraining, 300 steps", "pretraining alone"),
             "pretraining alone, no BEV label", "#000000", "v"),
            (("pretraining + 50%", LONG), "pretraining, then 50%", "#D55E00", "s"),
            (("pretraining + 10%",), "pretraining, then 10%", "#CC79A7", "^"),
            (("pretraining, 300 steps, + 100%",), "pretraining, then 100%", "#009E73", "D")):
        known = [found[row] for row in rows if row in found]
        if known:
            draw(known, label, colour, marker)
    plt.xlabel("training seconds")
    plt.ylabel("mIoU on the val scenes")
    plt.xlim(left=0)
    plt.ylim(bottom=0)
    plt.grid(alpha=0.3)
    plt.legend(fontsize=8, loc="lower right")
    plt.tight_layout()
    plt.savefig(path)


def hold_out(out):
    """A copy of the world (links) whose val scenes are every fourth train scene. Returns its folder."""
    folder = Path(out) / "claim/held_out"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("frames", "bev_gt"):
        link = folder / name
        link.is_symlink() or link.symlink_to((Path(out) / name).resolve())
    train = json.loads((Path(out) / "splits.json").read_text())["train"]
    splits = {"train": [s for i, s in enumerate(train) if i % 4], "val": train[::4]}
    (folder / "splits.json").write_text(json.dumps(splits))
    (folder / "claim").mkdir(exist_ok=True)
    return folder


def summary(found):
    """The claim in numbers; gains are points of mIoU above full supervision, times are shares of its."""
    base = found["supervised 100%"]

    def against(row):
        gain, ci95 = points(found[row], base)
        ratio = median_seconds(found[row]) / median_seconds(base)
        return {"gain_points": gain, "gain_ci95": ci95, "time_ratio": round(ratio, 3)}

    alone, full = (statistics.mean(r["miou"] for r in row) for row in (found["pretraining alone"], base))
    return against("pretraining + 50%") | {
        "pretrain_only_share": round(alone / full, 3),
        "ten_percent_gain_points": points(found["pretraining + 10%"], base)[0],
        **({"longer": against(LONG)} if LONG in found else {})}


def main(args):
    """All of a mode."""
    (Path(args.out) / "claim").mkdir(parents=True, exist_ok=True)
    if args.length:
        lengths = {f"supervised 100%, {steps} steps": supervised(steps)
                   for steps in (SUPERVISED // 2, SUPERVISED, 2 * SUPERVISED)}
        table(hold_out(args.out), lengths, dict.fromkeys(lengths, args.seeds), MEMORIES)
    elif args.ablations:
        table(args.out, ABLATIONS, dict.fromkeys(ABLATIONS, args.seeds), (*MEMORIES, "edges", "width", "flicker"))
    elif args.rows:
        table(args.out, ROWS, dict.fromkeys(args.rows, args.seeds), COLUMNS)
    else:
        rows = {"ipm": 1} | dict.fromkeys(MAIN, args.seeds)
        if args.quick:
            rows = {row: 1 for row in rows if row not in (LONG, MAIN[LONG][2])}
        if args.all:
            rows |= {row: 1 for row in ROWS if row not in rows}
        found = table(args.out, ROWS, rows, COLUMNS)
        picture(found, Path(args.out) / "claim/claim.png")
        print(json.dumps(summary(found)))


if __name__ == "__main__":
    main(parse_args())
