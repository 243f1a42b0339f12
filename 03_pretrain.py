"""Stage 03: learn the BEV map from the cameras alone. No BEV label is read.

The network predicts a BEV map; `render` lays it on the ground and looks at it through the six cameras; cross-entropy
compares what each camera would see with the pseudo-label of that camera. A temporal loss keeps the prediction equal to
that of the frame before, carried into the current frame by the known motion. (Phase 1 of the paper.)

Reads  out/frames/<scene>.pt of the training scenes, out/splits.json, a released BEVFormer if --init names one
Writes out/pretrain.pt (model, config, args, optimizer, step, rng), every minute and at the end

    python 03_pretrain.py
    python 03_pretrain.py --out out --preset paper --steps 60000 --batch-size 4 --lr 2e-4
"""
import argparse
from pathlib import Path

import torch

from model import PRESETS, fit, initial_model, run_sequence, segmentation_loss
from reproject import (IGNORE, Frames, cells_in_cameras, check_training, positive, read_splits, relative_pose, render,
                       warp)


def parse_args():
    """The flags of this stage."""
    parser = argparse.ArgumentParser(description="Pretrain by reprojection: no BEV label is read.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", default="out", help="folder of the artifacts")
    parser.add_argument("--preset", default="toy", choices=PRESETS, help="sizes of network, images and grid (model.py)")
    parser.add_argument("--init", default="scratch", help="scratch, or a released BEVFormer checkpoint (.pth)")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=2, help="sequences a step")
    parser.add_argument("--lr", type=positive, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="decides the initial weights and the order of the samples")
    parser.add_argument("--name", default="pretrain", help="the checkpoint is <out>/<name>.pt")
    parser.add_argument("--class-weights", type=positive, nargs=4, default=[1.0, 5.0, 2.0, 5.0], metavar="W",
                        help="cross-entropy weights of background, divider, ped_crossing, boundary")
    parser.add_argument("--temporal", type=float, default=0.5, help="weight of the temporal loss")
    parser.add_argument("--max-range", type=positive, default=25.0,
                        help="m; pixels that look at ground farther from their camera do not count")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16 where that is safe (torch.autocast)")
    parser.add_argument("--checkpointing", action="store_true", help="less memory, more time: recompute encoder layers")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    return parser.parse_args()


def reprojection_loss(logits, batch, grid, class_weights, max_range):
    """Cross-entropy between the BEV logits (B, classes, H, W), rendered into the cameras, and the pseudo-labels."""
    label = batch["label"]  # (B, N, h, w)
    image, valid = render(logits, batch["K"][:, -1], batch["ego_T_cam"][:, -1], label.shape[-2:], grid, max_range)
    label = torch.where(valid, label, IGNORE)
    # Cameras are samples to the loss: (B*N, classes, h, w) against (B*N, h, w).
    return segmentation_loss(image.flatten(0, 1), label.flatten(0, 1), class_weights)


def temporal_loss(logits, before, batch, grid):
    """Mean squared difference of the class probabilities of this frame and the last, where both see the ground.

    logits, before (B, classes, H, W); `before` carries no gradient: it is the target, or the loss would pull the
    prediction that had better views towards the one that had worse.
    """
    pose, K, ego_T_cam = batch["world_T_ego"], batch["K"], batch["ego_T_cam"]
    prev_T_cur = relative_pose(pose[:, -2], pose[:, -1])
    seen = [cells_in_cameras(K[:, t], ego_T_cam[:, t], batch["label"].shape[-2:], grid)[1].any(1) for t in (-2, -1)]
    # Visibility of the last frame travels as one more channel; a cell counts where all of it was visible.
    carried, _ = warp(torch.cat((before.float().softmax(1), seen[0].unsqueeze(1).float()), 1), prev_T_cur, grid)
    both = seen[1] & (carried[:, -1] > 0.999) & batch["linked"][:, -1].view(-1, 1, 1)  # (B, H, W)
    difference = (logits.float().softmax(1) - carried[:, :-1]).square().sum(1)  # (B, H, W)
    return (difference * both).sum() / both.sum().clamp(min=1)


if __name__ == "__main__":
    args = parse_args()
    check_training(args)
    torch.manual_seed(args.seed)
    config = PRESETS[args.preset]
    frames = Frames(args.out, read_splits(args.out)["train"], config, config.history)
    path = Path(args.out) / f"{args.name}.pt"
    model = initial_model(args, config, path).to(args.device)
    args.data = frames.digest  # into the checkpoint, or going on with other pseudo-labels would go unnoticed

    def loss_fn(batch):
        logits, before = run_sequence(model, batch)
        reprojection = reprojection_loss(logits, batch, config.grid, args.class_weights, args.max_range)
        temporal = temporal_loss(logits, before, batch, config.grid) if config.history else 0 * reprojection
        return reprojection + args.temporal * temporal, {"reprojection": reprojection, "temporal": temporal}

    fit(model, frames, loss_fn, args, path)
