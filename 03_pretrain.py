"""Stage 03: learn the BEV map from the cameras alone. No BEV label is read.

The network predicts a BEV map; where a camera sees the ground, cross-entropy compares the map with the pseudo-label of
that camera. (Phase 1 of the paper.) There are two ways to do so, the second in two styles:

- `--target rendered`, as in the paper: at each step `render` looks at the predicted map through its frame's cameras.
- `--target consensus`, the default: markings do not move, so the cameras of *all* frames of a scene can look at the
  same map. Every pixel votes for its class where its ray meets the ground: cross-entropy with all votes is what
  rendering the map into all cameras would give. The votes are cast once, and what they agree on is drawn as a map, the
  target: lines as wide as in the ground truth, dashes joined. A hundred views cost as much as one. `--target painted`
  draws no lines: a cell keeps the class with most votes.

Two more losses: the image features must also predict the pseudo-labels (to learn in fewer steps what to look for), and
the prediction must not change much from one frame to the next (in the quarter of the steps that have a history).

Reads  out/frames/<scene>.pt of the training scenes, out/splits.json, a released BEVFormer if --init names one
Writes out/pretrain.pt (model, config, args, optimizer, step, rng, curve), every minute and at the end; with it
       out/pretrain.previous.pt: the one before; out/pretrain_sample.png: what it makes of the first key frame;
       out/pretrain.jsonl and out/pretrain.png: the losses, a line a step, and their curve;
       out/pretrain/<scene>.pt {meta, scene, token [T], bev (T, H, W) uint8}: the consensus, laid out like bev_gt

    python 03_pretrain.py
    torchrun --nproc-per-node 8 03_pretrain.py --preset paper --steps 7500 --batch-size 32 --lr 4e-4 --workers 8
"""
import math
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm

from model import IMAGE_WEIGHTS, PRESETS, fit, image_loss, initial_model, run_sequence, segmentation_loss
from reproject import (CLASS_WEIGHTS, CLASSES, CONSENSUS_FLAGS, FRAMES_META, GRID_META, IGNORE, NUM_CLASSES, RANK,
                       RANKS, SPLITS, Frames, cells_in_cameras, check_training, claim, is_finished, join_ranks,
                       load_artifact, make_meta, pixels_to_ground, read_splits, relative_pose, render, rules_of,
                       save_pt, sum_over_ranks, warp, watched)

MAX_RANGE = 20.0  # m; pixels that look at ground farther from their camera do not count
RASTER = 0.15  # m; the cells of the ground on which labels vote are as wide as paint
TEMPORAL = {"off": 0.0, "within": 5.0, "smear": 0.5}  # the usual weight of each form of the temporal loss
STRAY = 3  # a cell between dashes is drawn where more walks than this, from different cells of the line, cross it
# Thin classes: the longest gap in m that is no gap (parked cars, most dashes), the same between two dashes (in the US
# 9 m are usual), the shortest line (no stop line, no arrow).
LINES = {"divider": (7.0, 11.0, 6.0), "boundary": (3.0, 3.0, 0.0)}
BENDS = (0.0, 0.01, -0.01, 0.02, -0.02)  # 1/m; how lines may be curved, or they could not be followed over gaps


def parse_args():
    """The flags of this stage."""
    parser = ArgumentParser(description=__doc__.splitlines()[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", default="out", help="folder of the artifacts")
    parser.add_argument("--preset", default="toy", choices=PRESETS, help="sizes of network, images and grid (model.py)")
    parser.add_argument("--split", default="official", choices=SPLITS, help="which one's train scenes (02_bev_gt.py)")
    parser.add_argument("--init", default="scratch", help="scratch, or a released BEVFormer checkpoint (.pth)")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=2, help="sequences a step, of all processes together")
    parser.add_argument("--accumulate", type=int, default=1, help="parts a step is computed in, one after the other")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="peak learning rate of AdamW; Muon's is 8 times it")
    parser.add_argument("--seed", type=int, default=0, help="decides the initial weights and the order of the samples")
    parser.add_argument("--name", default="pretrain", help="the checkpoint is <out>/<name>.pt")
    parser.add_argument("--target", default="consensus", choices=("consensus", "painted", "rendered"),
                        help="what the map is compared with: what the scene's cameras agree on, in the style of a map "
                        "or as painted; or the labels of its own frame's cameras, into which it is rendered")
    parser.add_argument("--view-range", type=float, default=math.inf,
                        help="s; views within this time of a frame take part in its consensus (0: it alone)")
    parser.add_argument("--margin", type=int, default=1, help="pixels around what hides the ground that do not vote "
                        "(-1: not even what hides it is left out; it votes for background)")
    parser.add_argument("--slope", action="store_true", help="look for the slope of each scene's ground first")
    parser.add_argument("--image", type=float, default=3.0, help="weight of the loss on the image features")
    parser.add_argument("--temporal", default="within", choices=TEMPORAL, help="form of the temporal loss")
    parser.add_argument("--temporal-weight", type=float, help="its weight at the end, to which it grows from 0 "
                        "(by default the form's usual one)")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16 where that is safe (torch.autocast)")
    parser.add_argument("--checkpointing", action="store_true", help="less memory, more time: recompute encoder layers")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images")
    return parser.parse_args()


# ---------------------------------------------------------------- what the cameras of a scene agree on
def find_slope(frames, index, args):
    """The slope of a scene's ground along the car, radians, on which its cameras agree best; positive: it rises ahead.

    On a slope that nobody knows of, each camera takes the same paint for another place, where the others see bare
    ground. Agreement is the share that a marking's votes have in the votes of their cells, on average."""
    views = range(0, len(frames.scenes[index]["token"]), 3)

    def agreement(slope):  # and how level it is, for where nothing is painted
        votes, _ = cast_votes(frames, index, views, args, slope)
        return (votes[1:].square().sum() / (votes[1:] * votes.sum(0)).sum().clamp(min=1e-6)).item(), -abs(slope)

    return max((math.radians(quarters / 4) for quarters in range(-12, 13)), key=agreement)


def cast_votes(frames, index, views, args, slope=0.0):
    """Lay the labels of some views of a scene (key frames, then those between them) on the ground, and count.

    Returns votes (classes, X, Y) and the raster's corner (2,) in world metres. Rows follow the world's x axis, columns
    its y axis, RASTER metres each. For a map of log probabilities, -(votes * map).sum() is the cross-entropy of all
    these pixels, each with the weight of its vote, were the map rendered into all these cameras."""
    scene = frames.scenes[index]
    car = scene["world_T_ego"][list(views), :2, 3]  # (V, 2)
    reach = MAX_RANGE + scene["ego_T_cam"][..., :2, 3].norm(dim=-1).max() + 1  # m from the car's origin
    corner = car.amin(0) - reach
    X, Y = ((car.amax(0) + reach - corner) / RASTER).ceil().long().tolist()
    votes, c, s, margin = torch.zeros(NUM_CLASSES * X * Y), math.cos(slope), math.sin(slope), max(args.margin, 0)
    level_T_ego = torch.tensor([[c, 0, s, 0], [0, 1, 0, 0], [-s, 0, c, 0], [0, 0, 0, 1]])  # lays the slope into z = 0
    for t in views:
        label = frames.decode(index, t, "label")  # (N, h, w)
        ego_T_cam = level_T_ego @ scene["ego_T_cam"][t]
        xy_ego, distance = pixels_to_ground(scene["K"][t], ego_T_cam, label.shape[-2:])  # (N, h, w, 2), (N, h, w)
        if args.margin < 0:
            label = torch.where(label == IGNORE, 0, label)
        # What hides the ground is labelled by a segmenter that errs at its edges by a pixel or so.
        hidden = F.max_pool2d((label == IGNORE).float(), 2 * margin + 1, 1, margin) > 0
        voting = (distance <= MAX_RANGE) & ~hidden
        world_T_ego = scene["world_T_ego"][t]
        xy_world = xy_ego[voting].double() @ world_T_ego[:2, :2].T + world_T_ego[:2, 3]  # (P, 2)
        row, column = ((xy_world - corner) / RASTER).long().unbind(-1)  # (P,) each; the corner lies below all
        # Beyond 6 m or so, a pixel of an image with 144 rows covers more ground than a cell, ever more with d squared.
        weight = 1 / (1 + (distance[voting] / 6) ** 2 * (144 / label.shape[1]))
        votes += torch.bincount((label[voting].long() * X + row) * Y + column, weight, len(votes))
    return votes.view(-1, X, Y), corner


def middle_of_lines(share):
    """Where share (X, Y), a class's votes, has the middle of a line.

    Returns row (P,), column (P,) of these cells and the direction of the line there (P,): radians, from a step in rows
    (0) to one in columns (pi / 2), modulo pi. A spot that is as wide as it is long has no direction and is left out."""
    radius, angle = round(1.5 / RASTER), torch.arange(16) * (math.pi / 16)
    dx, dy = torch.meshgrid(*[torch.arange(-radius, radius + 1.0)] * 2, indexing="ij")
    aside = RASTER * (dy * angle.cos().view(-1, 1, 1) - dx * angle.sin().view(-1, 1, 1))  # (16, n, n) m
    stroke = torch.exp(-(aside / 0.2) ** 2 / 2) * (dx ** 2 + dy ** 2 <= radius ** 2)  # 0.2 m as in draw
    stroke = stroke / stroke.sum((1, 2), keepdim=True)
    # In the middle of paint that is 0.1 m wide, the share is 0.2, in 0.3 m it is 0.5: so the best here decide.
    some = share[share > 0.1]
    least = min(0.25, 0.7 * some.quantile(0.9).item()) if len(some) else 0.25
    row, column = (share > least).nonzero(as_tuple=True)
    around = F.pad(share, [radius] * 4).unfold(0, len(dx), 1).unfold(1, len(dx), 1)[row, column]  # (P, n, n)
    # A high power of each stroke's response, so that only the best count: a parallel line, a metre aside (a median
    # strip has two kerbs), does not turn this one.
    response = (around.flatten(1) @ stroke.flatten(1).T) ** 8  # (P, 16)
    # Twice the angle, as a line that is turned by pi is the same line.
    cos, sin = (response @ (2 * angle).cos()), (response @ (2 * angle).sin())  # (P,) each
    elongated = (cos ** 2 + sin ** 2).sqrt() > 0.85 * response.sum(1)  # 1: all in one direction, 0: a round spot
    row, column, direction = (x[elongated] for x in (row, column, torch.atan2(sin, cos) / 2))
    across = torch.stack((-direction.sin(), direction.cos()))  # (2, P); of the cells across a line, its ridge is kept
    highest = torch.ones_like(row, dtype=torch.bool)
    for step in (-2, -1, 1, 2):
        x, y = (torch.stack((row, column)) + step * across).round().long()
        highest &= share[row, column] >= share[x.clamp(0, share.shape[0] - 1), y.clamp(0, share.shape[1] - 1)]
    return row[highest], column[highest], direction[highest]


def join_dashes(row, column, direction, shape, gap, dash_gap, shortest):
    """Go along the line from each of its cells; where it goes on within `gap` metres, what lies between belongs to it.
    From a dash it may go on within `dash_gap` metres. Of the BENDS, a cell takes the one on which it meets most line.

    The first arguments are as middle_of_lines returns them. Cells from which the line goes on for less than `shortest`
    metres, both ways together, are left out. Returns the cells of the joined lines (X, Y) bool."""
    nothing = -10.0  # radians; no direction
    line = torch.full(shape, nothing)
    line[row, column] = direction
    line = F.max_pool2d(line[None, None], 3, 1, 1)[0, 0]  # a cell to the side still hits it (of two, the larger angle)
    steps = torch.arange(1, round(dash_gap / RASTER) + 1)
    steps = torch.cat((-steps.flip(0), steps))  # back and ahead: (S,)
    row, column, direction = (values[:, None] for values in (row, column, direction))  # (P, 1) each
    x = y = torch.zeros(len(row), len(steps), dtype=torch.long)  # (P, S) each: where the walk leads
    goes_on = x.bool()  # where it meets the line
    for bend in BENDS:
        turned = bend * RASTER * steps  # radians, away from the direction of the cell: (S,)
        aside = turned * steps / 2  # cells
        x_bent = (row + steps * direction.cos() - aside * direction.sin()).round().long().clamp(0, shape[0] - 1)
        y_bent = (column + steps * direction.sin() + aside * direction.cos()).round().long().clamp(0, shape[1] - 1)
        there = line[x_bent, y_bent]
        turn = (there - direction - turned + math.pi / 2) % math.pi - math.pi / 2
        meets = (there > nothing) & (turn.abs() < 0.15)  # 9 degrees
        better = meets.sum(1, keepdim=True) > goes_on.sum(1, keepdim=True)
        x, y, goes_on = (torch.where(better, *pair) for pair in ((x_bent, x), (y_bent, y), (meets, goes_on)))
    # A cell of a dash has less than 4.5 m of line in the 10 m around it. Where a solid line ends, there are 5.
    dash = (goes_on & (steps.abs() <= 5 / RASTER)).sum(1, keepdim=True) < 4.5 / RASTER  # (P, 1)
    goes_on &= dash | (steps.abs() <= round(gap / RASTER))
    first, last = (goes_on * steps).aminmax(dim=1, keepdim=True)  # (P, 1) each; 0: nowhere
    long = last - first >= shortest / RASTER
    between = (steps >= first) & (steps <= last) & long  # (P, S)
    walks = torch.zeros(shape)  # how many of them came through each cell
    walks.view(-1).index_add_(0, (x * shape[1] + y)[between], torch.ones(between.sum()))
    walks[row[long], column[long]] = STRAY + 1
    return walks > STRAY


def consensus(frames, index, config, args):
    """What the labels of a scene's views agree on, as a BEV map for each of its key frames: (T, H, W) uint8.

    Cells that no camera has seen, and no line crosses, are IGNORE. With --target painted, lines stay as labelled."""
    scene, maps, drawn = frames.scenes[index], [], {}
    slope = find_slope(frames, index, args) if args.slope else 0.0
    cells = config.grid.centres(scene["world_T_ego"])  # (H, W, 2)
    for t, world_T_ego in enumerate(scene["world_T_ego"][:len(scene["token"])]):
        away = (scene["timestamp"] - scene["timestamp"][t]).abs()  # (views,) microseconds
        views = tuple((away <= 1e6 * args.view_range).nonzero().flatten().tolist())
        if views not in drawn:
            votes, corner = cast_votes(frames, index, views, args, slope)
            drawn[views] = draw(votes, config, args.target == "painted"), corner
        ground_map, corner = drawn[views]  # (X, Y), (2,)
        row, column = ((cells @ world_T_ego[:2, :2].T + world_T_ego[:2, 3] - corner) / RASTER).floor().long().unbind(-1)
        inside = (row >= 0) & (row < ground_map.shape[0]) & (column >= 0) & (column < ground_map.shape[1])  # (H, W)
        maps.append(torch.where(inside, ground_map[row * inside, column * inside], IGNORE))
    return torch.stack(maps)


@watched()
def stored_consensus(path, frames, index, config, args):
    """What `consensus` returns, from the file where it is already there; else it is written, for this stage and 04."""
    scene, remedy = frames.scenes[index], f"delete {path.parent} and {path.parent}.pt or choose another --name"
    meta = make_meta(config, {**scene["meta"]["source"], **{key: getattr(args, key) for key in CONSENSUS_FLAGS}})
    if not is_finished(path, meta, FRAMES_META + GRID_META, scene["token"], remedy):
        save_pt({"meta": meta, "scene": scene["scene"], "token": scene["token"],
                 "bev": consensus(frames, index, config, args)}, path)
    return load_artifact(path, remedy)["bev"]


def draw(votes, config, as_painted):
    """The map (X, Y) uint8 that the votes (classes, X, Y) stand for: in the style of the ground truth or, as_painted,
    the class with most votes in each cell."""
    if as_painted:
        return torch.where(votes.sum(0) > 0, votes.argmax(0), IGNORE).byte()
    votes = gaussian_blur(votes, 7, 0.2 / RASTER)  # 0.2 m: what poses and pixels are good for
    total = votes.sum(0)  # (X, Y)
    share = votes / total.clamp(min=1e-6)  # (classes, X, Y)
    ground_map = torch.where(total > 1e-4, 0, IGNORE).byte()
    ground_map[share[CLASSES.index("ped_crossing")] > 0.4] = CLASSES.index("ped_crossing")
    radius = int(config.line_width / 2 / RASTER)
    dx, dy = torch.meshgrid(*[torch.arange(-radius, radius + 1)] * 2, indexing="ij")
    disc = (dx ** 2 + dy ** 2 <= radius ** 2).float()[None, None]
    for name, lengths in LINES.items():  # in the order in which classes lie over each other in the ground truth
        line = join_dashes(*middle_of_lines(share[CLASSES.index(name)]), total.shape, *lengths)  # (X, Y)
        ground_map[F.conv2d(line[None, None].float(), disc, padding=radius)[0, 0] > 0] = CLASSES.index(name)
    return ground_map


# ---------------------------------------------------------------- losses
def reprojection_loss(logits, batch, grid, class_weights, max_range=MAX_RANGE):
    """Cross-entropy between the BEV logits (B, classes, H, W), rendered into the cameras, and the pseudo-labels."""
    label = batch["label"]  # (B, N, h, w)
    image, valid = render(logits, batch["K"][:, -1], batch["ego_T_cam"][:, -1], label.shape[-2:], grid, max_range)
    # Cameras are samples to the loss: (B*N, classes, h, w) against (B*N, h, w).
    return segmentation_loss(image.flatten(0, 1), torch.where(valid, label, IGNORE).flatten(0, 1), class_weights)


def temporal_loss(logits, before, batch, grid, smear=False):
    """How far this frame's prediction is from the last one: the mean squared distance of their probabilities, over the
    cells where both see the ground.

    logits, before (B, classes, H, W); `before` carries no gradient: it is the target, or the loss would pull the
    prediction that had better views towards the one that had worse. Warping blurs it, and a loss that asks for just
    these probabilities (`smear`) asks for a blurred map. So they need but lie within what the 3 x 3 cells around have
    there: a sharp line does, and one that is a cell aside; one that comes or goes does not."""
    pose, K, ego_T_cam = batch["world_T_ego"], batch["K"], batch["ego_T_cam"]
    seen = [cells_in_cameras(K[:, t], ego_T_cam[:, t], batch["label"].shape[-2:], grid)[1].any(1) for t in (-2, -1)]
    # Visibility of the last frame travels as one more channel; a cell counts where all of it was visible.
    last = torch.cat((before.float().softmax(1), seen[0].unsqueeze(1).float()), 1)  # (B, classes + 1, H, W)
    carried = warp(last, relative_pose(pose[:, -2], pose[:, -1]), grid)
    both = seen[1] & (carried[:, -1] > 0.999) & batch["linked"][:, -1].view(-1, 1, 1)  # (B, H, W)
    now, then = logits.float().softmax(1), carried[:, :-1]  # (B, classes, H, W) each
    low, high = (then, then) if smear else (-F.max_pool2d(-then, 3, 1, 1), F.max_pool2d(then, 3, 1, 1))
    distance = (now - now.clamp(low, high)).square().sum(1)  # (B, H, W)
    return (distance * both).sum() / (sum_over_ranks(both.sum()) / RANKS).clamp(min=1 / RANKS)


if __name__ == "__main__":
    args = parse_args()
    check_training(args)
    args.temporal_weight = TEMPORAL[args.temporal] if args.temporal_weight is None else args.temporal_weight
    if args.margin < -1 or not (args.view_range >= 0 and 0 <= args.temporal_weight < math.inf):
        sys.exit("error: --margin is at least -1, --view-range and --temporal-weight are numbers of at least 0")
    if args.target == "rendered" and (args.slope or args.margin != 1 or args.view_range < math.inf):
        sys.exit("error: --slope, --margin and --view-range are of the consensus: not with --target rendered")
    if args.init != "scratch" and not args.init.endswith(".pth"):
        sys.exit(f"error: --init {args.init}: give scratch or a released BEVFormer (.pth), as no BEV label may be seen")
    path = Path(args.out) / f"{args.name}.pt"
    lock = claim(path)  # held as long as this process lives
    join_ranks()
    torch.manual_seed(args.seed)
    config = PRESETS[args.preset]
    train = read_splits(args.out, *SPLITS[args.split])[SPLITS[args.split][0]]
    frames = Frames(args.out, train, config, config.history)
    model = initial_model(args, config, path)
    args.seen = sorted({*args.seen, *train})
    # With other labels or other rules, a stored consensus and what was learnt from it are refused.
    args.data, args.rules = frames.digest, rules_of(MAX_RANGE, RASTER, STRAY, LINES, BENDS, find_slope, cast_votes,
                                                    middle_of_lines, join_dashes, consensus, draw, pixels_to_ground)
    if args.target != "rendered":
        # Each process begins with a share of its own, and finds the files of the others when it comes to theirs.
        order = sorted(range(len(frames.scenes)), key=lambda index: index % RANKS != RANK)
        for index in tqdm(order, desc="consensus", unit="scene", disable=RANK > 0):
            scene = frames.scenes[index]
            scene["bev"] = stored_consensus(path.with_suffix("") / f"{scene['scene']}.pt", frames, index, config, args)

    def loss_fn(batch):
        logits, before = run_sequence(model, batch)
        parts = {args.target: reprojection_loss(logits, batch, config.grid, IMAGE_WEIGHTS)
                 if args.target == "rendered" else segmentation_loss(logits, batch["bev"], CLASS_WEIGHTS)}
        if args.image:
            parts["image"] = image_loss(model, batch["label"])
        if args.temporal != "off" and before is not None:
            parts["temporal"] = temporal_loss(logits, before, batch, config.grid, args.temporal == "smear")
        # The last prediction is worth little at first: to stay near it then would only mean to learn slowly.
        weights = {"image": args.image, "temporal": args.temporal_weight * batch["progress"]}
        return sum(weights.get(name, 1) * part for name, part in parts.items()), parts

    fit(model, frames, loss_fn, args, path)
