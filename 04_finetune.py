"""Stage 04: fine-tune on a share of the BEV labels. With --init scratch the same script is the supervised baseline.

The other scenes keep their target of pretraining, what their cameras agree on, and the image features must still
predict the pseudo-labels. So the network, fine-tuned on half of the streets, does not forget the other half. The
baseline uses no pseudo-labels.

The labelled scenes are chosen by a hash of their names: those of --labels 0.25 are among those of 0.5, on any machine.

Reads  out/frames/<scene>.pt of all train scenes, out/bev_gt/<scene>.pt of those with labels, out/splits.json, the
       checkpoint of --init, e.g. out/pretrain.pt, and out/pretrain/<scene>.pt of the other scenes
Writes out/finetune.pt, every minute and at the end, and with it .previous.pt, .jsonl, .png and _sample.png, as 03

    python 04_finetune.py
    python 04_finetune.py --init scratch --labels 1.0 --steps 2400 --name scratch_100
"""
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from pathlib import Path

import torch

from model import PRESETS, fit, image_loss, initial_model, run_sequence, segmentation_loss
from reproject import CLASS_WEIGHTS, SPLITS, Frames, check_training, claim, fingerprint, join_ranks, read_splits


def parse_args():
    """The flags of this stage."""
    parser = ArgumentParser(description=__doc__.splitlines()[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", default="out", help="folder of the artifacts")
    parser.add_argument("--preset", default="toy", choices=PRESETS, help="sizes of network, images and grid (model.py)")
    parser.add_argument("--split", default="official", choices=SPLITS, help="which one's train scenes (02_bev_gt.py)")
    parser.add_argument("--init", default="{out}/pretrain.pt",
                        help="checkpoint of 03_pretrain.py, scratch, or a released BEVFormer (.pth)")
    parser.add_argument("--labels", type=float, default=0.5, help="share of the training scenes whose labels are used")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=2, help="sequences a step, of all processes together")
    parser.add_argument("--accumulate", type=int, default=1, help="parts a step is computed in, one after the other")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="peak learning rate of AdamW; Muon's is 8 times it")
    parser.add_argument("--seed", type=int, default=0, help="decides the initial weights and the order of the samples")
    parser.add_argument("--name", default="finetune", help="the checkpoint is <out>/<name>.pt")
    parser.add_argument("--labelled-only", action="store_true", help="leave out the scenes without labels")
    parser.add_argument("--image", type=float, help="weight of the loss on image features (1; from scratch 0)")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16 where that is safe (torch.autocast)")
    parser.add_argument("--checkpointing", action="store_true", help="less memory, more time: recompute encoder layers")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images")
    return parser.parse_args()


def choose_scenes(scenes, share):
    """The round(share * n) scenes, at least one, whose names have the smallest SHA-256."""
    if not 0 < share <= 1:
        sys.exit(f"error: --labels {share} is no share: give a number above 0 and at most 1")
    return sorted(sorted(scenes, key=fingerprint)[:max(1, round(share * len(scenes)))])


if __name__ == "__main__":
    args = parse_args()
    args.image = float(args.init != "scratch") if args.image is None else args.image
    check_training(args)
    path, args.init = Path(args.out) / f"{args.name}.pt", args.init.replace("{out}", args.out)
    lock = claim(path)  # held as long as this process lives
    join_ranks()
    torch.manual_seed(args.seed)
    config = PRESETS[args.preset]
    train = read_splits(args.out, *SPLITS[args.split])[SPLITS[args.split][0]]
    args.scenes = choose_scenes(train, args.labels)  # into the checkpoint, with args
    model = initial_model(args, config, path)
    if args.init != "scratch" and not args.init.endswith(".pth") and not args.consensus.get("target"):
        sys.exit(f"error: {args.init} is no checkpoint of 03_pretrain.py: give one, scratch, or a released BEVFormer")
    keep = [] if args.labelled_only or args.consensus.get("target") not in ("consensus", "painted") else train
    rest = {scene: Path(args.init).with_suffix("") / f"{scene}.pt" for scene in keep if scene not in args.scenes}
    frames = Frames(args.out, args.scenes + list(rest), config, config.history, True, rest, args.consensus)
    args.data = frames.digest  # compared when a run goes on: names may stay while the labels behind them change
    args.seen = sorted({*args.seen, *args.scenes, *rest})

    def loss_fn(batch):
        logits, _ = run_sequence(model, batch)
        parts = {"map": segmentation_loss(logits, batch["bev"], CLASS_WEIGHTS)}
        if args.image:
            parts["image"] = image_loss(model, batch["label"])
        return parts["map"] + args.image * parts.get("image", 0), parts

    print(f"scenes with labels: {len(args.scenes)}, with the consensus of pretraining: {len(rest)}; init: {args.init}")
    fit(model, frames, loss_fn, args, path)
