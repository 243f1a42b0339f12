"""Stage 05: score a checkpoint against the BEV ground truth, and draw what it sees.

Scenes are run frame by frame, and what the last frames have seen is remembered: `--memory map`, the default, averages
the maps predicted for them and for the current one; `bev`, as in BEVFormer, hands on BEV features.
`--checkpoint ipm` scores the reference that needs no learning: the pseudo-labels lifted straight into BEV.

Reads  out/frames/<scene>.pt and out/bev_gt/<scene>.pt of the split, out/splits.json, the checkpoint
Writes out/eval/metrics.json, out/eval/sample_<k>.png, best to worst: cameras with pseudo-labels and with the rendered
       prediction laid over them; ground truth, prediction and each class's errors as maps (ahead is up);
       out/eval/distance.png: IoU against distance from the car; out/eval/confusion.png: of classes with each other;
       with --animate, out/eval/animation.webp: the median key frame as each checkpoint in turn predicts it;
       with --images, only out/eval/rig.png and rig.pt {bev (H, W) uint8, probability (classes, H, W),
       seen (H, W) bool: whether any camera sees the cell}

    python 05_eval.py
    python 05_eval.py --animate out/pretrain.pt out/finetune.pt
    python 05_eval.py --checkpoint ipm
    python 05_eval.py --images my_car/images --calibration my_car/rig.json
"""
import re
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from model import PRESETS, count_confusion, iou, load_checkpoint, remember, step
from reproject import (CAMERAS, CLASSES, DEVICE, IGNORE, NUM_CLASSES, RANK, RANKS, SPLITS, Frames, cells_in_cameras,
                       claim, join_ranks, lift, read_image, read_json, read_splits, render, save_json, save_pt,
                       sum_over_ranks, watched, write_whole)

RANGES = ((0, 10), (10, 20), (20, 30))  # m from the car
RING = 2.5  # m; ground this wide is one point of IoU against distance
CONDITIONS = ("day", "night", "rain")
# Okabe and Ito's palette, distinguishable by colour-blind readers
COLOURS = {"divider": (240, 228, 66), "ped_crossing": (86, 180, 233), "boundary": (213, 94, 0)}
IGNORED, GROUND, INK, PAPER = (110, 110, 110), (45, 45, 45), (20, 20, 20), (255, 255, 255)
ERRORS = {"hit": (0, 158, 115), "missed": (0, 114, 178), "false": (204, 121, 167)}  # of the same palette
YAWS = (0, -55, 55, 180, 110, -110)  # degrees to the left: where CAMERAS look
VIEWS = ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT")


def parse_args():
    """The flags of this stage."""
    parser = ArgumentParser(description=__doc__.splitlines()[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", default="out", help="folder of the artifacts")
    parser.add_argument("--checkpoint", default="{out}/finetune.pt", help="a checkpoint of 03 or 04, or ipm")
    parser.add_argument("--split", default="val", choices=(*SPLITS, *sum(SPLITS.values(), ())),
                        help="which scenes; official stands for val, geo for geo_val")
    parser.add_argument("--preset", default="toy", choices=PRESETS, help="sizes of the artifacts, for --checkpoint ipm")
    parser.add_argument("--memory", default="map", choices=("map", "bev", "none"),
                        help="of the last key frames: their predicted maps, or BEV features as in BEVFormer")
    parser.add_argument("--pictures", type=int, default=3, help="how many key frames to draw, from best to worst")
    parser.add_argument("--animate", nargs="+", default=(), metavar="CHECKPOINT",
                        help="also draw one key frame under each of these checkpoints, as a moving picture")
    parser.add_argument("--images", help="folder with an image of each camera of a rig of one's own: predict, no score")
    parser.add_argument("--calibration", metavar="FILE.json", help="their K and ego_T_cam (README: Your own cameras)")
    return parser.parse_args()


def one_hot(label):
    """Class indices (..., h, w) -> scores (..., classes, h, w); IGNORE is zero in all of them."""
    return torch.stack([label == c for c in range(NUM_CLASSES)], -3).float()


@torch.no_grad()
def predict(frames, model, config, scenes, memory="map"):
    """Yield (index, frame, BEV logits (1, classes, H, W)) for the key frames of these scenes (their numbers).
    memory: see --memory; model: None for `ipm`."""
    bev, pose, past = None, None, []
    for index in (i for i, (scene, _) in enumerate(frames.samples) if scene in scenes):
        frame = {k: v[None].to(DEVICE) for k, v in frames[index].items() if k != "token"}
        frame |= {k: frame[k][:, -1] for k in ("image", "K", "ego_T_cam", "world_T_ego", "linked")}
        if model:
            logits, bev = step(model, frame, bev if memory == "bev" else None, pose)
        else:  # ignored pixels score 0 in all classes: they have no say, neither here nor in what `remember` averages
            logits = lift(one_hot(frame["label"]), frame["K"], frame["ego_T_cam"], config.grid).clamp(min=1e-6).log()
        if memory == "map":
            logits = remember(past, logits, frame, config.grid)
        pose = frame["world_T_ego"]
        yield index, frame, logits


@watched()
def evaluate(frames, model, config, memory="map"):
    """Score every key frame; the scenes are shared out among all processes.

    Returns {"all" | "0-10" | ... | "day" | ...: cells (classes, classes) of each [ground truth, prediction]}, the same
    of each ring around the car (rings, classes, classes), and the mIoU of each key frame (frames,)."""
    ring = (config.grid.centres(torch.empty(0, device=DEVICE)).norm(dim=-1) / RING).long()  # (H, W): each cell's
    by_ring = torch.zeros(ring.max() + 1, NUM_CLASSES, NUM_CLASSES, dtype=torch.int64, device=DEVICE)
    by_condition = by_ring.new_zeros(len(CONDITIONS), *by_ring.shape[1:])
    quality = torch.zeros(len(frames), device=DEVICE)
    for index, frame, logits in tqdm(predict(frames, model, config, range(RANK, len(frames.scenes), RANKS), memory),
                                     desc="eval", unit="frame", total=-(-len(frames) // RANKS), disable=RANK > 0):
        prediction, truth = logits.argmax(1), frame["bev"]  # (1, H, W)
        counts = torch.stack([count_confusion(prediction, torch.where(ring == k, truth, IGNORE))
                              for k in range(len(by_ring))])  # (rings, classes, classes)
        by_ring += counts
        words = re.findall(r"\w+", frames.scenes[frames.samples[index][0]]["description"].lower())
        for key in [word for word in CONDITIONS[1:] if word in words] or ["day"]:
            by_condition[CONDITIONS.index(key)] += counts.sum(0)
        quality[index] = quality_of(counts.sum(0))
    by_ring, by_condition, quality = (sum_over_ranks(x).cpu() for x in (by_ring, by_condition, quality))
    by_range = {f"{near}-{far}": by_ring[int(near / RING):int(far / RING)].sum(0) for near, far in RANGES}
    return {"all": by_ring.sum(0), **by_range, **dict(zip(CONDITIONS, by_condition))}, by_ring, quality


def quality_of(confusion):
    """The mIoU of one key frame; 1 where there is nothing and nothing was found."""
    score = iou(confusion)["miou"]
    return 1.0 if score is None else score


def from_best_to_worst(quality, pictures):
    """Indices of that many key frames: the best, the worst and those at even steps between; of one, the median."""
    ranked = quality.argsort(descending=True, stable=True).tolist()
    places = torch.linspace(0, len(ranked) - 1, pictures) if pictures > 1 else torch.tensor([(len(ranked) - 1) / 2])
    return [ranked[round(place)] for place in places.tolist()[:pictures]]


@watched()
def draw_sheet(frames, model, config, index, title, memory):
    """The contact sheet of one key frame; its scene is run anew, as the prediction knows the frames before it."""
    scene, t = frames.samples[index]
    _, frame, logits = next(found for found in predict(frames, model, config, (scene,), memory) if found[0] == index)
    score = quality_of(count_confusion(logits.argmax(1), frame["bev"]))
    place = f", {frames.scenes[scene]['scene']}, key frame {t}"
    return contact_sheet(frame, logits, config.grid, f"{title}, mIoU {score:.2f}", place)


def paint(classes):
    """Class indices (h, w) -> RGB (h, w, 3) uint8."""
    colours = [COLOURS.get(name, GROUND) for name in CLASSES] + [IGNORED] * (256 - NUM_CLASSES)
    return torch.tensor(colours, dtype=torch.uint8)[classes.long().cpu()]


def camera_block(images, classes):
    """Class colours laid over cameras, background left as it is, three a row: RGB (rows * h, 3w, 3) uint8, PAPER where
    no camera is left. images (N, 3, h, w), classes (N, h, w)."""
    images, strength = images.permute(0, 2, 3, 1).cpu(), classes.cpu().unsqueeze(-1)
    strength = torch.where(strength == IGNORE, 0.5, torch.where(strength == 0, 0.0, 0.75))  # (N, h, w, 1)
    tiles = list(((1 - strength) * images + strength * paint(classes)).byte())  # (h, w, 3) each
    tiles += [torch.tensor(PAPER, dtype=torch.uint8).expand_as(tiles[0])] * (-len(tiles) % 3)
    return torch.cat([torch.cat(tiles[k:k + 3], 1) for k in range(0, len(tiles), 3)], 0)


def error_map(prediction, truth, number):
    """Where the class of that number is hit, missed and falsely found: RGB (H, W, 3) uint8."""
    found, there = prediction == number, truth == number  # (H, W) each
    error = torch.where(there, torch.where(found, 1, 2), torch.where(found, 3, 0))  # 1 to 3 as in ERRORS
    error[truth == IGNORE] = 4
    return torch.tensor((GROUND, *ERRORS.values(), IGNORED), dtype=torch.uint8)[error.cpu()]


def seen_ground(frame, grid):
    """Which cells any camera of a frame, a batch of one, sees: (H, W) bool."""
    return cells_in_cameras(frame["K"], frame["ego_T_cam"], frame["image"].shape[-2:], grid)[1][0].any(0)


def contact_sheet(frame, logits, grid, title="prediction", place=""):
    """One key frame on one page. frame: a batch of one, without "bev" there is nothing to compare it with;
    logits (1, classes, H, W); title: of the predicted map; place: which key frame, for the title of its cameras."""
    # From left to right; cameras of one's own as they are given.
    order = [CAMERAS.index(view) for view in VIEWS] if "label" in frame else list(range(frame["image"].shape[1]))
    images = frame["image"][0, order]  # (N, 3, h, w)
    rendered, valid = render(logits, frame["K"][:, order], frame["ego_T_cam"][:, order], images.shape[-2:], grid)
    predicted = torch.where(valid, rendered.argmax(2), 0)[0]  # (N, h, w)
    prediction = logits[0].argmax(0)  # (H, W)
    blocks = {"cameras with the prediction, rendered": camera_block(images, predicted)}
    if "bev" not in frame:
        dark = torch.where(seen_ground(frame, grid), 1, 3).byte().unsqueeze(-1).cpu()  # (H, W, 1)
        legend = {"dark: seen by no camera": tuple(c // 3 for c in GROUND), "car, pointing ahead": PAPER}
        return page_of(blocks, {title: paint(prediction) // dark}, legend, grid)
    truth = frame["bev"][0]
    blocks = {f"cameras with pseudo-labels{place}": camera_block(images, frame["label"][0, order]), **blocks}
    maps = {"ground truth": paint(truth), title: paint(prediction),
            **{f"errors: {CLASSES[c]}": error_map(prediction, truth, c) for c in range(1, NUM_CLASSES)}}
    return page_of(blocks, maps, {"ignored": IGNORED, **ERRORS, "car, pointing ahead": PAPER}, grid)


def page_of(blocks, maps, legend, grid):
    """Blocks of cameras below each other, maps of `grid` to their right, the legend below: a PIL image.
    blocks, maps: {title: RGB (h, w, 3) uint8}; legend: {name: RGB} beside the classes."""
    bar, gap, block_h, width = 24, 8, *next(iter(blocks.values())).shape[:2]
    height = max(len(blocks) * block_h, 400)
    maps = {title: Image.fromarray(m.numpy()).resize((height * m.shape[1] // m.shape[0], height), Image.NEAREST)
            for title, m in maps.items()}
    foot = height + len(blocks) * bar
    page = Image.new("RGB", (max(width + sum(m.width + gap for m in maps.values()), 700), foot + bar), PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(15)
    for k, (title, block) in enumerate(blocks.items()):
        draw.text((4, 3 + k * (block_h + bar)), title, INK, font)
        page.paste(Image.fromarray(block.numpy()), (0, bar + k * (block_h + bar)))
    left = width + gap
    for title, m in maps.items():
        draw.text((left, 3), title, INK, font)
        page.paste(m, (left, bar))
        down, right = grid.cells(np.zeros(2)) / grid.shape * (height, m.width)  # of the car, in pixels
        draw.polygon([(left + right + x, bar + down + y) for x, y in ((0, -10), (-6, 8), (6, 8))], PAPER)
        left += m.width + gap
    x = 4
    for name, colour in {"background": GROUND, **COLOURS, **legend}.items():
        draw.rectangle((x, foot + 6, x + 12, foot + 18), colour, INK)
        draw.text((x + 18, foot + 3), name, INK, font)
        x += 40 + 9 * len(name)
    return page


# ---------------------------------------------------------------- cameras of one's own
def read_rig(folder, calibration, config):
    """One moment of any rig of 1 to 8 cameras, as a frame for the network, without label and bev.

    calibration: a JSON file {image file: {"K": 3 x 3, for the image as viewers show it, "ego_T_cam": 4 x 4}}; ego: x
    ahead, y left, z up in metres from a point on the ground. Returns the frame, a batch of one, and for each camera the
    number of the nuScenes camera that looks most nearly its way, whose embedding it is given."""
    remedy = "give {image file: {\"K\": 3 x 3 numbers, \"ego_T_cam\": 4 x 4}} of 1 to 8 cameras"
    rig = read_json(calibration, remedy)
    if not isinstance(rig, dict) or not 1 <= len(rig) <= 8:
        sys.exit(f"error: {calibration} lists no 1 to 8 cameras: {remedy}")
    views, (h, w) = [], config.image_size
    for name, camera in rig.items():
        try:
            K, ego_T_cam = (torch.tensor(camera[key], dtype=torch.float32) for key in ("K", "ego_T_cam"))
            R = ego_T_cam[:3, :3]
            if (K.shape != (3, 3) or ego_T_cam.shape != (4, 4) or min(K[0, 0], K[1, 1]) <= 0 or K.det() <= 0
                    or K[2].tolist() != [0, 0, 1] or ego_T_cam[3].tolist() != [0, 0, 0, 1] or ego_T_cam[2, 3] <= 0
                    or not (K.isfinite().all() and ego_T_cam.isfinite().all())
                    or not torch.allclose(R @ R.T, torch.eye(3), atol=1e-3) or R.det() < 0):
                raise ValueError
        except (LookupError, TypeError, ValueError, RuntimeError, ArithmeticError):
            sys.exit(f"error: {calibration}: {name} has no camera matrix K and rigid ego_T_cam with z > 0: {remedy}")
        image = read_image(Path(folder) / name, f"give the images that {calibration} names")
        if not (0 < K[0, 2] < image.width and 0 < K[1, 2] < image.height):
            sys.exit(f"error: {calibration}: {name} has {image.width} x {image.height} pixels, and the centre of its K "
                     "lies outside: give the K of the image at this size")
        K = torch.tensor((w / image.width, h / image.height, 1))[:, None] * K  # pixel centres lie at +0.5
        image = torch.from_numpy(np.array(image.resize((w, h), Image.Resampling.BILINEAR))).permute(2, 0, 1)
        views.append({"image": image, "K": K, "ego_T_cam": ego_T_cam})
    frame = torch.utils.data.default_collate(views)  # (N, ...) each
    ahead, left = frame["ego_T_cam"][:, :2, 2].unbind(1)  # the optical axes on the ground, (N,) each
    turn = torch.rad2deg(torch.atan2(left, ahead))[:, None] - torch.tensor(YAWS)  # (N, 6)
    nearest = ((turn + 180) % 360 - 180).abs().argmin(1)  # (N,)
    return {key: value[None].to(DEVICE) for key, value in frame.items()}, nearest


@watched()
def predict_rig(args, model):
    """Predict and draw one moment of one's own cameras: out/eval/rig.png and rig.pt."""
    frame, nearest = read_rig(args.images, args.calibration, model.config)
    seen = seen_ground(frame, model.config.grid).cpu()
    if not seen.any():
        sys.exit(f"error: {args.calibration}: no camera sees any ground of the map: give as the columns of ego_T_cam "
                 "where a camera's x (right), y (down) and z (ahead) point, in the ego frame")
    model.camera = torch.nn.Parameter(model.camera[nearest])
    with torch.no_grad():
        logits, _ = model(frame["image"], frame["K"], frame["ego_T_cam"])
    folder, sheet = Path(args.out) / "eval", contact_sheet(frame, logits, model.config.grid)
    write_whole(folder / "rig.png", lambda file: sheet.save(file, "PNG"))
    bev, probability = logits[0].argmax(0).byte().cpu(), logits[0].softmax(0).cpu()
    save_pt({"bev": bev, "probability": probability, "seen": seen}, folder / "rig.pt")
    wide = torch.rad2deg(2 * torch.atan(model.config.image_size[1] / 2 / frame["K"][0, :, 0, 0]))  # (N,)
    print(f"{folder}/rig.png and rig.pt written; cameras: {len(nearest)}, taken for "
          + ", ".join(f"{CAMERAS[n]} ({degrees:.0f} degrees wide)" for n, degrees in zip(nearest, wide)))


# ---------------------------------------------------------------- scores as pictures
def draw_distance(by_ring, title):
    """IoU against distance from the car, a line a class, as a figure. by_ring is evaluate's."""
    from matplotlib.figure import Figure  # comes with nuscenes-devkit; here, as it takes a second
    figure = Figure((7, 4), dpi=120, layout="tight")
    axes = figure.subplots()
    scores = [iou(counts)["iou"] for counts in by_ring]
    for name, colour in COLOURS.items():
        known = [(RING * (k + 0.5), score[name]) for k, score in enumerate(scores) if score[name] is not None]
        axes.plot(*zip(*known) if known else ((), ()), color=[c / 255 for c in colour], marker="o", label=name)
    axes.set(xlabel="distance from the car, m", ylabel="IoU", ylim=(0, 1), title=title,
             facecolor=[c / 255 for c in GROUND])  # yellow cannot be seen on white
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def draw_confusion(confusion, title):
    """What the cells of each class were taken for, as shares of its cells (classes, classes), as a figure."""
    from matplotlib.figure import Figure
    figure = Figure((6, 5), dpi=120, layout="tight")
    axes, shares = figure.subplots(), confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), share in np.ndenumerate(shares):
        axes.text(column, row, f"{share:.2f}", ha="center", va="center", color="white" if share > 0.5 else "black")
    axes.set(xlabel="taken for", ylabel="is", title=title)
    axes.set_xticks(range(NUM_CLASSES), CLASSES)
    axes.set_yticks(range(NUM_CLASSES), CLASSES)
    return figure


if __name__ == "__main__":
    args = parse_args()
    join_ranks()
    args.checkpoint = title = args.checkpoint.replace("{out}", args.out)
    args.split = SPLITS[args.split][1] if args.split in SPLITS else args.split
    if args.pictures < 0:
        sys.exit(f"error: --pictures {args.pictures}: give 0 or more")
    if args.checkpoint == "ipm":
        model, config, seen = None, PRESETS[args.preset], []
    else:
        checkpoint, model = load_checkpoint(args.checkpoint, "run 04_finetune.py, or give another one's path")
        title += f" (step {checkpoint['step']} of {checkpoint['args']['steps']})"
        config, seen = model.eval().config, checkpoint["args"].get("seen", [])
    if (args.images is None) != (args.calibration is None) or (args.images is not None and model is None):
        sys.exit("error: --images and --calibration go together, and with a checkpoint: give both, or neither")
    if args.images is not None:
        predict_rig(args, model)
        sys.exit()
    remedy = "give checkpoints of 03 or 04 that are all of one architecture"
    animated = [load_checkpoint(path, remedy, config) for path in args.animate]  # before the minutes of scoring
    scenes = read_splits(args.out, args.split)[args.split]
    if not scenes:
        sys.exit(f"error: {args.out}/splits.json has no {args.split} scene: choose another --split")
    if (known := set(scenes) & set(seen)) and not args.split.endswith("train"):
        print(f"warning: {args.checkpoint} was trained on {len(known)} of the {len(scenes)} scenes of {args.split}")
    frames = Frames(args.out, scenes, config, bev_gt=True)
    # Everything is of one checkpoint: what is there goes before anything new comes.
    folder = Path(args.out) / "eval"
    lock = claim(folder)  # held as long as this process lives
    if RANK == 0:
        for pattern in ("sample_*.png", "metrics.json", "distance.png", "confusion.png", "animation.webp"):
            for old in folder.glob(pattern):
                old.unlink()
    args.pictures = min(args.pictures, len(frames))
    confusion, by_ring, quality = evaluate(frames, model, config, args.memory)
    scores = {key: iou(counts) for key, counts in confusion.items() if key == "all" or counts.sum()}
    metrics = {"checkpoint": args.checkpoint, "split": args.split, "memory": args.memory, "num_samples": len(frames),
               **scores["all"], "by_range": {key: scores[key] for key in scores if "-" in key},
               "by_condition": {key: scores[key] for key in scores if key in CONDITIONS},
               "confusion": confusion["all"].tolist()}
    if RANK == 0:
        save_json(metrics, folder / "metrics.json")
        for name, figure in (("distance", draw_distance(by_ring, title)),
                             ("confusion", draw_confusion(confusion["all"], title))):
            write_whole(folder / f"{name}.png", partial(figure.savefig, format="png"))
    for k, index in enumerate(from_best_to_worst(quality, args.pictures)):
        if k % RANKS == RANK:
            sheet = draw_sheet(frames, model, config, index, f"prediction {k + 1} of {args.pictures}", args.memory)
            write_whole(folder / f"sample_{k}.png", lambda file: sheet.save(file, "PNG"))
    if args.animate and RANK == 0:
        index, = from_best_to_worst(quality, 1)  # the median
        first, *rest = [draw_sheet(frames, model.eval(), config, index, f"{Path(name).stem[:16]}, step {known['step']}",
                                   args.memory) for name, (known, model) in zip(args.animate, animated)]
        write_whole(folder / "animation.webp", lambda file: first.save(
            file, "WEBP", save_all=True, append_images=rest, duration=[1500] * len(rest) + [4000], loop=0, quality=85))
    print(f"{folder}/metrics.json and {args.pictures} pictures written")
    print(f"{title} on {args.split}: {len(frames)} key frames, scenes: {len(scenes)}")
    print(f"{'IoU':>10} " + " ".join(f"{name:>12}" for name in (*CLASSES[1:], "mIoU")))
    for key, score in scores.items():  # the whole split, each range and each condition that is there
        print(f"{key + (' m' if '-' in key else ''):>10} "
              + " ".join(f"{'-' if v is None else f'{v:.3f}':>12}" for v in (*score["iou"].values(), score["miou"])))
