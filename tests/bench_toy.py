"""The result table of the README: stages 03 to 05 on the embedded world, over several seeds.

    python tests/toyworld.py && python 01_pseudolabel.py && python 02_bev_gt.py && python tests/bench_toy.py --seeds 3

Every row but `ipm` and `pretraining alone` has the same number of steps on BEV labels. A run goes on where it was
stopped: each training leaves its checkpoint as <out>/bench_<row>_<seed>.pt.
"""
import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROWS = ("ipm", "pretrain", "finetune_50", "scratch_50", "scratch_100")


def parse_args():
    """The flags."""
    parser = argparse.ArgumentParser(description="IoU table of ipm, pretraining, fine-tuning and the baselines.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", default="out", help="folder with frames and bev_gt of the embedded world")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 .. N-1")
    parser.add_argument("--pretrain-steps", type=int, default=400, help="steps of stage 03")
    parser.add_argument("--steps", type=int, default=250, help="steps of stage 04")
    return parser.parse_args()


def run(script, *words):
    """Run one stage; stops with its error if it fails."""
    if subprocess.run([sys.executable, ROOT / script, *map(str, words)]).returncode:
        sys.exit(f"error: {script} failed")


def train(args, row, seed):
    """Train what a row needs and return its checkpoint."""
    name = f"bench_{row}_{seed}"
    common = ["--out", args.out, "--seed", seed, "--name", name]
    if row == "pretrain":
        run("03_pretrain.py", *common, "--steps", args.pretrain_steps)
    elif row != "ipm":
        init = f"{args.out}/bench_pretrain_{seed}.pt" if row.startswith("finetune") else "scratch"
        run("04_finetune.py", *common, "--steps", args.steps, "--init", init, "--labels", int(row.split("_")[1]) / 100)
    return "ipm" if row == "ipm" else f"{args.out}/{name}.pt"


def evaluate(args, checkpoint):
    """metrics.json of a checkpoint on the val scenes."""
    run("05_eval.py", "--out", args.out, "--checkpoint", checkpoint, "--pictures", 1)
    return json.loads((Path(args.out) / "eval/metrics.json").read_text())


if __name__ == "__main__":
    args = parse_args()
    scores = {row: [] for row in ROWS}
    for seed in range(args.seeds):
        for row in ROWS:
            metrics = evaluate(args, train(args, row, seed))
            scores[row].append([*metrics["iou"].values(), metrics["miou"]])
    print(f"\n{args.seeds} seeds, mean (lowest .. highest)")
    print("| row | divider | ped_crossing | boundary | mIoU |\n|---|---|---|---|---|")
    for row in ROWS:
        cells = [f"{statistics.mean(v):.3f} ({min(v):.3f} .. {max(v):.3f})" for v in zip(*scores[row])]
        print(f"| {row} | " + " | ".join(cells) + " |")
    print(json.dumps({row: [round(s[-1], 4) for s in scores[row]] for row in ROWS}))
