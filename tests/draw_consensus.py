"""How a consensus comes about, as one picture: pseudo-labels, what they say of the ground, what stage 03 makes of it.

Reads  out/frames/<scene>.pt and out/bev_gt/<scene>.pt
Writes out/consensus.webp, of which the README shows a copy

    python tests/draw_consensus.py    # after the README's first block, or 01 and 02
"""
import argparse
import importlib
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from model import PRESETS
from reproject import CAMERAS, Frames, write_whole

stage_03, stage_05 = importlib.import_module("03_pretrain"), importlib.import_module("05_eval")
STEPS = {"votes: its own cameras": ("painted", 0.0), "votes: all of the drive": ("painted", math.inf),
         "consensus": ("consensus", math.inf)}  # {title: (--target, --view-range)}


def parse_args():
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", default="out", help="folder of the artifacts")
    parser.add_argument("--preset", default="toy", choices=PRESETS, help="their sizes (model.py)")
    parser.add_argument("--scene", default="scene-0158", help="name of the scene")
    parser.add_argument("--frame", type=int, default=6, help="number of the key frame in it")
    return parser.parse_args()


if __name__ == "__main__":
    args = parse_args()
    config = PRESETS[args.preset]
    frames = Frames(args.out, [args.scene], config, bev_gt=True)
    maps = {}
    for title, (target, view_range) in STEPS.items():
        flags = argparse.Namespace(target=target, view_range=view_range, margin=1, slope=False)
        maps[title] = stage_05.paint(stage_03.consensus(frames, 0, config, flags)[args.frame])
    item, order = frames[args.frame], [CAMERAS.index(view) for view in stage_05.VIEWS]
    image, label = item["image"][-1, order], item["label"][order]
    maps["ground truth"] = stage_05.paint(item["bev"])
    blocks = {"cameras": stage_05.camera_block(image, 0 * label),
              "cameras with pseudo-labels": stage_05.camera_block(image, label)}
    legend = {"hidden, unclear, not seen": stage_05.IGNORED, "car": stage_05.PAPER}
    page = stage_05.page_of(blocks, maps, legend, config.grid)
    write_whole(Path(args.out) / "consensus.webp", lambda file: page.save(file, "WEBP", quality=85))
    print(f"wrote {args.out}/consensus.webp")
