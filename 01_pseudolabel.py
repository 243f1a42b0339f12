"""Stage 01: a Mask2Former, trained on other street images, labels every camera image. No map and no BEV label is read.

Reads:  the tables and the camera images of a nuScenes data set; a Mask2Former with Mapillary Vistas' label names.
Writes: out/frames/<scene>.pt  {meta, scene, location, description, token [T], timestamp (T,) microseconds,
            image T x 6 JPEG, label T x 6 PNG (class index, 255: ignore), K (T, 6, 3, 3), ego_T_cam (T, 6, 4, 4),
            world_T_ego (T, 4, 4)}, all for images of the preset's size; frames as at the top of reproject.py.
            With --sweeps, S more views follow the T key frames in timestamp, label, K, ego_T_cam and world_T_ego:
            six images that were taken between two key frames, for the votes of stage 03

    python 01_pseudolabel.py                                                           # the embedded toy world
    python 01_pseudolabel.py --dataroot data/nuscenes --preset paper --segmenter-size 768 1344 \\
        --segmenter facebook/mask2former-swin-large-mapillary-vistas-semantic

Stop it when you like: scenes that are written are skipped the next time. torchrun's processes share the scenes out.
"""
import logging
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from nuscenes.nuscenes import NuScenes
from PIL import Image
from tqdm import tqdm

from model import PRESETS
from reproject import (CAMERAS, CLASSES, DEVICE, FRAMES_META, IGNORE, RANK, RANKS, UNPACK, drive_of, encode,
                       fingerprint, has_bfloat16, is_finished, keep_freed_memory, key_frames, levelled, look_up,
                       make_meta, open_tables, pose_matrix, pose_of, read_image, recorded, rules_of, save_pt,
                       watched, world_from_ego)

# What Mapillary's labels mean to us. Carriageway and verge are background; where they touch, with no kerb between, is
# the edge of the road, so boundary = kerb + contact line. Whatever is not ground hides the ground: ignored.
GROUPS = {
    "divider": ("Lane Marking - General",),
    "ped_crossing": ("Lane Marking - Crosswalk", "Crosswalk - Plain"),
    "kerb": ("Curb",),
    "carriageway": ("Road", "Bike Lane", "Service Lane", "Parking", "Rail Track", "Manhole", "Catch Basin", "Pothole"),
    "verge": ("Sidewalk", "Pedestrian Area", "Curb Cut", "Terrain", "Sand", "Snow"),
    "not ground": ("Bird", "Ground Animal", "Fence", "Guard Rail", "Barrier", "Wall", "Bridge", "Building", "Tunnel",
        "Person", "Bicyclist", "Motorcyclist", "Other Rider", "Mountain", "Sky", "Vegetation", "Water", "Banner",
        "Bench", "Bike Rack", "Billboard", "CCTV Camera", "Fire Hydrant", "Junction Box", "Mailbox", "Phone Booth",
        "Street Light", "Pole", "Traffic Sign Frame", "Utility Pole", "Traffic Light", "Traffic Sign (Back)",
        "Traffic Sign (Front)", "Trash Can", "Bicycle", "Boat", "Bus", "Car", "Caravan", "Motorcycle", "On Rails",
        "Other Vehicle", "Trailer", "Truck", "Wheeled Slow", "Car Mount", "Ego Vehicle", "Unlabeled")}
LINE_GAIN = 2.0  # paint and kerbs are often narrower than a pixel of the network: they win it from 35% of its area


def parse_args():
    """The flags of this stage."""
    parser = ArgumentParser(description=__doc__.splitlines()[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--dataroot", default="data/toy", help="folder of the nuScenes data set")
    parser.add_argument("--version", default="v1.0-trainval", help="version of its tables: the folder's name")
    parser.add_argument("--segmenter", default="tests/toy_segmenter", help="folder or hub id of a Mask2Former")
    parser.add_argument("--segmenter-size", type=int, nargs=2, default=(288, 512), metavar=("H", "W"),
                        help="size of the images that it is shown")
    parser.add_argument("--min-confidence", type=float, default=0.35, help="pixels that are less sure are ignored")
    parser.add_argument("--sweeps", type=int, default=0,
                        help="images of each camera between two key frames that are labelled as well (12 Hz: up to 5)")
    parser.add_argument("--preset", default="toy", choices=PRESETS, help="size of grid and images (model.py)")
    parser.add_argument("--out", default="out", help="folder of everything the stages write")
    parser.add_argument("--batch-size", type=int, default=6, help="images the segmenter is shown at once")
    parser.add_argument("--workers", type=int, default=4, help="threads, each with a batch in hand")
    return parser.parse_args()


# ---------------------------------------------------------------- the segmenter
def segmenter_names(name):
    """The checkpoint's label names and its revision: the hub's commit, or a hash of a folder's files."""
    folder = Path(name)
    import transformers  # here, as it takes seconds, which --help need not wait for
    transformers.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # without a network it would tell of each of its tries
    transformers.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        names = [config.id2label[i] for i in range(config.num_labels)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        what = ("is a folder without the config.json of a model" if folder.is_dir() else
                "is neither a folder nor to be had from the Hugging Face hub (no such model, or no network)")
        sys.exit(f"error: --segmenter {name} {what}: give a folder or a hub id of a Mask2Former with Mapillary labels")
    if config.model_type != "mask2former":
        sys.exit(f"error: --segmenter {name} is a {config.model_type}, not a Mask2Former: give another one")
    if not folder.is_dir():
        return names, config._commit_hash
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".bin", ".json")]
    if all(path.suffix == ".json" for path in files):
        sys.exit(f"error: --segmenter {name} holds no weights (*.safetensors): copy them there")
    return names, fingerprint(b"".join(path.read_bytes() for path in files))


@watched()
def load_segmenter(name, device):
    """A function: images (B, 3, h, w) uint8 -> class logits (B, Q, L + 1) and mask logits (B, Q, h / 4, w / 4)."""
    from safetensors import SafetensorError
    from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor
    try:
        model, report = Mask2FormerForUniversalSegmentation.from_pretrained(name, output_loading_info=True)
        processor = Mask2FormerImageProcessor.from_pretrained(name)  # for the colours that it was trained on
        mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (processor.image_mean, processor.image_std))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        sys.exit(f"error: --segmenter {name} cannot be loaded ({str(error).splitlines()[0]}): get it again")
    # Published checkpoints with a Swin backbone lack its last norm, which takes no part in feature maps.
    if missing := sorted(key for key in report["missing_keys"] if ".swin.layernorm." not in key):
        sys.exit(f"error: --segmenter {name} lacks weights ({missing[0]}, ...): get it again")
    model = model.eval().to(device)

    def segment(images):
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=device != "cpu" and has_bfloat16()):
            # With a pixel's colours side by side, the model takes three quarters of the time on a CPU.
            answer = model((images.to(device, memory_format=torch.channels_last) / 255 - mean) / std)
        return answer.class_queries_logits, answer.masks_queries_logits

    return segment


def group_labels(names):
    """(L, G) 0/1: to which of the GROUPS each of the checkpoint's L label names belongs."""
    known = {name: group for group, members in GROUPS.items() for name in members}
    if missing := [group for group, members in GROUPS.items() if group != "not ground" and not {*members} & {*names}]:
        sys.exit(f"error: the segmenter has no label for {missing}; it has {sorted(names)}: give one that was trained "
                 "on Mapillary Vistas, or edit GROUPS in 01_pseudolabel.py")
    if unknown := sorted(set(names) - set(known)):
        sys.exit(f"error: the segmenter has labels that GROUPS does not place: {unknown}; it knows {sorted(known)}: "
                 "add them to the table in 01_pseudolabel.py")
    return torch.tensor([[known[name] == group for group in GROUPS] for name in names]).float()


def labels_from_queries(class_logits, mask_logits, membership, segmenter_size, image_size, min_confidence):
    """One image's Mask2Former output -> pseudo-label (H, W) uint8 at image_size: class index, or 255 for ignore.

    class_logits (Q, L + 1), the last one is "no object"; mask_logits (Q, h, w); membership (L, G) from group_labels."""
    # What each query says of each group, spread over the query's mask; in groups from the start, as 6 are less than 65.
    says = class_logits.float().softmax(-1)[:, :-1] @ membership  # (Q, G)
    masks = F.interpolate(mask_logits[None].float(), segmenter_size, mode="bilinear", align_corners=False)[0].sigmoid_()
    scores = torch.einsum("qg,qhw->ghw", says, masks)
    probability = scores / scores.sum(0).clamp(min=1e-6)  # (G, h, w), sums to 1
    contact = contact_line(probability.max(0).indices)  # argmax takes 15 times as long on a CPU

    # Down to the network's size by area: nearest neighbour would skip a line that is thinner than its step.
    divider, crossing, kerb, carriageway, verge, other = F.adaptive_avg_pool2d(probability, image_size)
    share = torch.stack((carriageway + verge, divider, crossing, kerb, other))  # the CLASSES, and what is no ground
    gain = torch.tensor((1, LINE_GAIN, 1, LINE_GAIN, 1), device=share.device).view(-1, 1, 1)
    label = (share * gain).max(0).indices
    confidence = share.gather(0, label[None])[0]
    contact = F.adaptive_max_pool2d(contact[None].float(), image_size)[0] > 0
    label[contact & (label == CLASSES.index("background"))] = CLASSES.index("boundary")
    label[(label == len(share) - 1) | (confidence < min_confidence)] = IGNORE
    return label.to(torch.uint8)


def contact_line(group):
    """Pixels (h, w) bool of the carriageway, or of paint on it, that touch the verge, and the other way round."""
    _, _, kerb, carriageway, verge, _ = range(len(GROUPS))
    on, off = (group < kerb) | (group == carriageway), group == verge
    framed = F.pad(torch.stack((on, off)), (1, 1, 1, 1))  # (2, h + 2, w + 2); then above, below, left, right of a pixel
    by_on, by_off = framed[:, :-2, 1:-1] | framed[:, 2:, 1:-1] | framed[:, 1:-1, :-2] | framed[:, 1:-1, 2:]
    return (on & by_off) | (off & by_on)


# ---------------------------------------------------------------- the data set
def views_between(nusc, now, after, sweeps):
    """Up to `sweeps` views between two key frames, given by their sample_data records in the order of CAMERAS.

    Evenly spread in time, as far as each camera's images allow; only as many as every camera has. Returns
    [(timestamp, world_T_ego levelled, 6 records)]: time and place are those of CAM_FRONT."""
    between = []  # a list a camera: what it took between the two
    for first in now:
        there, data = [], look_up(nusc, "sample_data", first["next"])
        while not data["is_key_frame"]:
            if data in there:
                sys.exit(f"error: {nusc.table_root}/sample_data.json: {data['filename']} follows itself: {UNPACK}")
            there.append(data)
            data = look_up(nusc, "sample_data", data["next"])
        between.append(there)
    n, chosen = min(sweeps, *map(len, between)), []
    for first, last, there in zip(now, after, between):
        times = np.linspace(first["timestamp"], last["timestamp"], n + 2)[1:-1]
        chosen.append([there.pop(np.argmin([abs(data["timestamp"] - time) for data in there])) for time in times])
    return [(records[0]["timestamp"], levelled(pose_of(nusc, records[0])), records) for records in zip(*chosen)]


def read_scene(nusc, scene, image_size, sweeps=0):
    """Everything about a scene that the tables know, as it goes into its file, and the image paths, views x 6: those
    of the key frames, then those of `sweeps` more views (views_between) from each key frame to the next one."""
    samples, K, ego_T_cam, paths = key_frames(nusc, scene), [], [], []
    views = [(sample["timestamp"], world_from_ego(nusc, sample),
              [recorded(nusc, sample, camera) for camera in CAMERAS]) for sample in samples]
    if sweeps:
        views += sum((views_between(nusc, now, after, sweeps) for (*_, now), (*_, after) in zip(views, views[1:])), [])
        if len(views) == len(samples) > 1:
            sys.exit(f"error: {nusc.table_root}/sample_data.json has no images between the key frames of "
                     f"{scene['name']}: use --sweeps 0")
    for _, world_T_ego, records in views:
        for data in records:
            sensor = look_up(nusc, "calibrated_sensor", data["calibrated_sensor_token"])
            # The car has moved on since the time of the view: that of LIDAR_TOP, or between key frames of CAM_FRONT.
            ego_T_cam.append(torch.linalg.inv(world_T_ego) @ pose_of(nusc, data) @ pose_matrix(sensor))
            if min(data["width"], data["height"], *torch.tensor(sensor["camera_intrinsic"]).diagonal()) < 1:
                sys.exit(f"error: {nusc.table_root} gives {data['filename']} no size or focal length: {UNPACK}")
            # Pixel centres lie at +0.5, so scaling an image by s takes u to s * u, with nothing to add.
            scale = torch.tensor((image_size[1] / data["width"], image_size[0] / data["height"], 1))
            K.append(torch.tensor(sensor["camera_intrinsic"]) * scale[:, None])
            paths.append(Path(nusc.dataroot) / data["filename"])
    K, ego_T_cam = (torch.stack(matrices).float().unflatten(0, (-1, len(CAMERAS))) for matrices in (K, ego_T_cam))
    timestamps, poses, _ = zip(*views)
    return {"scene": scene["name"], "location": look_up(nusc, "log", scene["log_token"])["location"],
            "description": scene["description"], "token": [sample["token"] for sample in samples], "K": K,
            "ego_T_cam": ego_T_cam, "timestamp": torch.tensor(timestamps), "world_T_ego": torch.stack(poses)}, paths


def load_image(path, image_size, segmenter_size):
    """Read a camera image; return it as JPEG bytes at the network's size and as (3, h, w) uint8 for the segmenter."""
    image = read_image(path, "unpack the data set's images again")
    # Pillow's resize is antialiased, and its threads do not fight for the cores as PyTorch's would.
    small, shown = (image.resize((w, h), Image.Resampling.BILINEAR) for h, w in (image_size, segmenter_size))
    return encode(small, "JPEG"), torch.from_numpy(np.array(shown)).permute(2, 0, 1)


@watched()
def label_images(paths, segment, membership, segmenter_size, image_size, min_confidence):
    """Image paths -> [(JPEG bytes at image_size, PNG bytes of the pseudo-label)]."""
    small, shown = zip(*(load_image(path, image_size, segmenter_size) for path in paths))
    labels = (labels_from_queries(*answer, membership, segmenter_size, image_size, min_confidence)
              for answer in zip(*segment(torch.stack(shown))))
    return [(jpeg, encode(Image.fromarray(label.cpu().numpy()), "PNG")) for jpeg, label in zip(small, labels)]


if __name__ == "__main__":
    args = parse_args()
    if min(args.batch_size, args.workers, *args.segmenter_size) < 1 or args.sweeps < 0:
        sys.exit("error: --batch-size, --workers and --segmenter-size are at least 1, --sweeps at least 0")
    if any(size % 32 for size in args.segmenter_size):
        sys.exit("error: --segmenter-size: give multiples of 32, or its masks are shifted against the image")
    if not 0 <= args.min_confidence <= 1:
        sys.exit(f"error: --min-confidence {args.min_confidence} is no probability: give a number from 0 to 1")

    config, folder = PRESETS[args.preset], Path(args.out) / "frames"
    nusc = open_tables(NuScenes, args.dataroot, args.version)
    names, revision = segmenter_names(args.segmenter)
    membership = group_labels(names)
    rules = rules_of(GROUPS, LINE_GAIN, labels_from_queries, contact_line, load_image, views_between, read_scene)
    source = {"version": args.version, "revision": revision, "rules": rules,
              "segmenter": Path(args.segmenter).name if Path(args.segmenter).is_dir() else args.segmenter,
              "segmenter_size": list(args.segmenter_size), "min_confidence": args.min_confidence, "sweeps": args.sweeps}

    # The share comes first: as files appear meanwhile, each process would share out another list.
    share, todo = nusc.scene[RANK::RANKS], []
    for scene in share:
        samples = key_frames(nusc, scene)
        mounts = [recorded(nusc, sample, camera)["calibrated_sensor_token"] for sample in samples for camera in CAMERAS]
        rig = fingerprint(repr([look_up(nusc, "calibrated_sensor", token) for token in dict.fromkeys(mounts)]))
        meta = make_meta(config, source | {"drive": drive_of(nusc, samples), "rig": rig})
        if not is_finished(folder / f"{scene['name']}.pt", meta, FRAMES_META, [sample["token"] for sample in samples]):
            todo.append((scene, meta))
    if not todo:
        print(f"{folder} is finished ({len(share)} scenes): nothing to do")
        sys.exit()

    # Each worker takes a batch all the way. PyTorch's own threads would only fight with the workers for the cores.
    torch.set_num_threads(1)
    keep_freed_memory()
    label = partial(label_images, segment=load_segmenter(args.segmenter, DEVICE), min_confidence=args.min_confidence,
                    image_size=config.image_size, segmenter_size=args.segmenter_size, membership=membership.to(DEVICE))
    total = sum(T + args.sweeps * (T - 1) for T in (scene["nbr_samples"] for scene, _ in todo)) * len(CAMERAS)
    with ThreadPoolExecutor(args.workers) as pool, tqdm(total=total, unit="image", position=RANK) as progress:
        for scene, meta in todo:
            frames, paths = read_scene(nusc, scene, config.image_size, args.sweeps)
            labelled = []
            for batch in pool.map(label, [paths[i:i + args.batch_size] for i in range(0, len(paths), args.batch_size)]):
                labelled += batch
                progress.update(len(batch))
            for key, flat in zip(("image", "label"), zip(*labelled)):  # (views * 6) -> views x 6
                frames[key] = [list(flat[i:i + len(CAMERAS)]) for i in range(0, len(flat), len(CAMERAS))]
            del frames["image"][len(frames["token"]):]  # of the other views, only the labels are used
            save_pt({"meta": meta, **frames}, folder / f"{scene['name']}.pt")
    print(f"wrote {folder}: {len(todo)} scenes")
