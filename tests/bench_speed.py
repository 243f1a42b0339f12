"""How fast, and in how much memory: the encoder beside vis4d's, how it grows, a training step, the five stages and
their memory, stage 01 beside what the segmenter's model card shows, and the rasteriser of stage 02 beside the devkit's.

    python tests/bench_speed.py
    python tests/bench_speed.py --parts encoder --sizes tiny

Every measurement runs in a process of its own, with the allocator setting of the training scripts. Encoders of ours
and of vis4d 1.0.0 (where it is installed, see peer.py) take turns, run by run, on the same inputs, with a history; in
float32 they are first seen to give the same result. Memory is the growth of the process's peak in the first forward and
backward pass; on a GPU, what PyTorch has allocated at most. FLOPs are those of matrix products and convolutions.

The last line is JSON: time and memory of our encoder over vis4d's, the worst of the float32 and of the bfloat16 rows
(null without vis4d); images a second of stage 01 over those of the model card's way, and how many times the devkit's
samples a second our rasteriser draws (the worst row), where these parts ran.
"""
import argparse
import importlib
import importlib.util
import json
import math
import multiprocessing
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import shapely
import torch
from peer import EGO_T_LIDAR, build, forward
from PIL import Image
from rig import pose, surround
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from model import PRESETS, BEVSegmenter, Encoder, Optimizer, load_official, run_sequence, segmentation_loss
from reproject import Linear, keep_freed_memory, key_frames, look_up, save_pt, world_from_ego

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("encoder", "scaling", "step", "stages", "memory", "pseudolabel", "bev_gt")
SEGMENTER = ROOT / "tests/toy_segmenter"
SCALING = {"queries": (25, 50, 100), "cameras": (1, 2, 3, 6), "levels": (1, 2, 4), "batch": (1, 2, 4)}


def parse_args():
    """The flags."""
    parser = argparse.ArgumentParser(description="Time and memory of the encoder, of a training step, of the stages.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="what is measured")
    parser.add_argument("--sizes", nargs="+", default=("tiny", "small"), choices=PRESETS, help="presets")
    parser.add_argument("--batch", nargs="+", type=int, help="batch sizes (1 and 4 of the encoder, 1 of a step)")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    return parser.parse_args()


# ---------------------------------------------------------------- what is run

def cameras_of(config, batch, cameras=6):
    """K and ego_T_cam of a ring of cameras with the image size of `config`."""
    yaws = (0, -55, 55, 180, 110, -110)[:cameras]
    K, ego_T_cam = surround(batch, yaws)
    K[..., :2, :] *= config.image_size[1] / 256
    return K, ego_T_cam


def encoder_inputs(config, batch, cameras=6):
    """Random queries, positions (1, Q, C), history (B, Q, C) and features, (B*N, h, w, C) a level."""
    generator = torch.Generator().manual_seed(0)
    Q, C = math.prod(config.bev_shape), config.channels
    sizes = [[n // 2 ** (stage + 1) for n in config.padded_size] for stage in config.stages]
    first, position = (torch.randn(1, Q, C, generator=generator) for _ in range(2))
    features = [torch.randn(batch * cameras, *size, C, generator=generator) for size in sizes]
    return first, position, torch.randn(batch, Q, C, generator=generator), features


def our_encoder(config, batch, device, cameras=6, weights=None, bf16=False):
    """A function that runs forward and backward and returns the output (B, Q, C)."""
    torch.manual_seed(0)
    encoder = Encoder(config)
    if weights:
        encoder.load_state_dict(torch.load(weights, weights_only=True))
    encoder.to(device)
    K, ego_T_cam = (t.to(device) for t in cameras_of(config, batch, cameras))
    first, position, previous, features = encoder_inputs(config, batch, cameras)
    first, position, *features = (t.to(device).requires_grad_() for t in (first, position, *features))
    previous, has_previous = previous.to(device), torch.ones(batch, dtype=torch.bool, device=device)
    gradient = torch.ones_like(previous)

    def run():
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            output = encoder(first, position, features, K, ego_T_cam, previous, has_previous)
        output.backward(gradient.to(output.dtype))
        return output.detach()
    return run


def vis4d_config(config):
    """The `config` of peer.py for one of ours."""
    (x0, x1), (y0, y1), z = config.x_range, config.y_range, config.heights
    return {"embed_dims": config.channels, "num_heads": config.heads, "num_levels": len(config.stages), "num_cams": 6,
            "num_points_sca": config.points_spatial, "num_points_tsa": config.points_temporal, "ffn_dims": config.ffn,
            "num_points_in_pillar": len(z), "num_layers": config.layers, "bev_h": config.bev_shape[0],
            "bev_w": config.bev_shape[1], "img_hw": config.padded_size,
            "pc_range": (-y1, x0, z[0] - 0.5, -y0, x1, z[-1] + 0.5)}


def vis4d_encoder(config, batch, device, bf16=False):
    """As our_encoder, in vis4d's axes: rows from the rear, queries first. The seed decides its weights."""
    torch.manual_seed(0)
    c, (H, W) = vis4d_config(config), config.bev_shape
    encoder = build(c).to(device)
    K, ego_T_cam = cameras_of(config, batch)
    first, position, previous, features = encoder_inputs(config, batch)

    def turned(bev):  # (B, Q, C), row 0 ahead -> (Q, B, C), row 0 at the rear
        return bev.unflatten(1, (H, W)).flip(1).flatten(1, 2).transpose(0, 1).to(device)

    feats = [f.unflatten(0, (batch, 6)).permute(0, 1, 4, 2, 3).to(device).requires_grad_() for f in features]
    leaves = [turned(t).requires_grad_() for t in (first, position)]
    inputs = {"prev_bev": turned(previous), "shift_xy": torch.zeros(batch, 2, device=device), "feats": feats,
              "K": K.to(device), "lidar_T_cam": (EGO_T_LIDAR.T @ ego_T_cam).to(device)}

    gradient = torch.ones(batch, H * W, config.channels, device=device)

    def run():
        queries = {k: v.expand(-1, batch, -1) for k, v in zip(("bev_query", "bev_pos"), leaves)}
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            output = forward(encoder, c, inputs | queries, history=True)  # (B, Q, C)
        output.backward(gradient.to(output.dtype))
        return turned(output.detach()).transpose(0, 1)
    return run


def training_step(config, batch, device, bf16=False, checkpointing=False):
    """One step of stage 04 on random pictures and maps: history, loss, gradients, optimizer."""
    torch.manual_seed(0)
    model = BEVSegmenter(config).to(device).train()
    model.encoder.checkpointing = checkpointing
    optimizer = Optimizer(model)
    T, (K, ego_T_cam) = config.history + 1, cameras_of(config, batch)
    data = {"image": torch.randint(0, 256, (batch, T, 6, 3, *config.image_size), dtype=torch.uint8),
            "K": K[:, None].expand(-1, T, -1, -1, -1), "ego_T_cam": ego_T_cam[:, None].expand(-1, T, -1, -1, -1),
            "linked": torch.arange(T).expand(batch, T) > 0,
            "world_T_ego": torch.stack([pose(t, 0, 0) for t in range(T)]).expand(batch, T, 4, 4)}
    data = {key: value.to(device) for key, value in data.items()}
    truth = torch.randint(0, 4, (batch, *config.grid.shape), dtype=torch.uint8, device=device)

    def run():
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            logits, _ = run_sequence(model, data)
            loss = segmentation_loss(logits, truth, (1.0, 4.0, 2.0, 4.0))
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step(1e-3)
    return run


# ---------------------------------------------------------------- how it is measured

def resident(what):
    """VmRSS (now) or VmHWM (the most since it was set back) of this process, in bytes; Linux."""
    return int(re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def serve(pipe, make, kwargs):
    """In a process of its own: build, answer with memory, FLOPs and output of a first run, then time each more."""
    keep_freed_memory()
    device = kwargs["device"]
    run = make(**kwargs)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back
        before = resident("VmRSS")
    output = run()
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")
    with Flops() as counter:
        run()
    pipe.send((peak - before, counter.total, None if output is None else output[0, ::97].cpu()))
    while pipe.recv():
        began = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        pipe.send(time.perf_counter() - began)


class Flops(TorchDispatchMode):
    """Counts what torch's FLOP formulas know; its own FlopCounterMode fails on modules that run without gradients."""
    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if formula := flop_registry.get(function._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=output)
        return output


class Worker:
    """A process that runs what `make(**kwargs)` returns. `failed`: it was killed, most likely for want of memory."""

    def __init__(self, make, **kwargs):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, make, kwargs), daemon=True)
        self.process.start()
        theirs.close()
        self.seconds, self.failed = [], False
        self.memory, self.flops, self.output = self.answer() or (None, None, None)

    def answer(self):
        """What the process sends next, or None if it is no more."""
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            self.failed = True

    def time(self, count=True):
        """One more run, counted or not."""
        if self.failed or not self.process.is_alive():
            self.failed = True
            return
        self.pipe.send(True)
        seconds = self.answer()
        if count and not self.failed:
            self.seconds.append(seconds)

    def stop(self):
        """End the process and free its memory."""
        self.process.kill()
        self.process.join()
        return self


def measure(make, runs, warm_up=2, **kwargs):
    """A finished Worker with `runs` timed runs."""
    worker = Worker(make, **kwargs)
    for i in range(warm_up + runs):
        worker.time(count=i >= warm_up)
    return worker.stop()


def spread(values, scale=1.0, digits=2):
    """Median and (lowest .. highest)."""
    return (f"{statistics.median(values) * scale:.{digits}f} "
            f"({min(values) * scale:.{digits}f} .. {max(values) * scale:.{digits}f})")


def matmul_peak(device):
    """FLOP/s of a 2048^3 float32 product: the best of twenty, by BLAS and as a 1x1 convolution, as Linear does it."""
    a, seconds = torch.randn(2048, 2048, device=device), []
    linear = Linear(2048, 2048, bias=False, device=device)
    with torch.no_grad():
        for product in 10 * (lambda: a @ linear.weight, lambda: linear(a)):
            began = time.perf_counter()
            product()[0, 0].item()
            seconds.append(time.perf_counter() - began)
    return 2 * 2048 ** 3 / min(seconds)


def row(*cells):
    """A line of a Markdown table, shown at once."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


# ---------------------------------------------------------------- the parts

def compare_encoders(args, peak):
    """The side-by-side table. Returns {"": (time, memory) ratios of the float32 rows, "_bf16": of the others}."""
    row("encoder, forward + backward", "batch", "ours s", "GFLOP", "of peak", "ours MB", "vis4d s", "vis4d MB",
        "time", "memory")
    row(*["---"] * 10)
    ratios = {"": [], "_bf16": []}
    for size in args.sizes:
        for batch, bf16 in [(batch, False) for batch in args.batch or (1, 4)] + [(1, True)]:
            ours, peer = take_turns(args, config=PRESETS[size], batch=batch, device=args.device, bf16=bf16)
            if ours.failed:
                sys.exit(f"error: our encoder failed at {size}, batch {batch}: see above, or it lacked memory")
            share = ours.flops / statistics.median(ours.seconds) / peak  # the peak is that of float32
            cells = [size + " bf16" * bf16, batch, spread(ours.seconds), round(ours.flops / 1e9),
                     "" if bf16 else f"{share:.0%}", round(ours.memory / 1e6)]
            if peer and not peer.failed:
                if batch == 1 and not bf16:  # with more, vis4d mixes up samples, as the official code does
                    torch.testing.assert_close(ours.output, peer.output, atol=1e-3, rtol=1e-3)
                pairs = [a / b for a, b in zip(ours.seconds, peer.seconds)]
                memory = ours.memory / peer.memory
                ratios["_bf16" * bf16].append((statistics.median(pairs), memory))
                cells += [spread(peer.seconds), round(peer.memory / 1e6), spread(pairs), f"{memory:.2f}"]
            else:
                cells += ["out of memory" if peer else "not installed", "", "", ""]
            row(*cells)
    return ratios


def take_turns(args, **case):
    """Finished Workers of ours and of vis4d (None where it is not installed), timed alternately."""
    with tempfile.TemporaryDirectory() as folder:
        if importlib.util.find_spec("vis4d") is None:
            return measure(our_encoder, args.runs, 3, **case), None
        weights = f"{folder}/weights.pt"
        save_peer_weights(case["config"], weights)
        peer, ours = Worker(vis4d_encoder, **case), Worker(our_encoder, weights=weights, **case)
        for i in range(3 + args.runs):
            ours.time(count=i >= 3), peer.time(count=i >= 3)
        ours.stop(), peer.stop()
        if ours.failed or peer.failed:  # too large to be there at the same time: one after the other
            ours = measure(our_encoder, args.runs, 3, weights=weights, **case)
            peer = measure(vis4d_encoder, args.runs, 3, **case)
        return ours, peer


def save_peer_weights(config, path):
    """The weights with which vis4d_encoder starts, for ours."""
    torch.manual_seed(0)
    theirs = build(vis4d_config(config)).state_dict()
    model = BEVSegmenter(replace(config, backbone="resnet10"))  # the backbone plays no part
    load_official(model, {f"pts_bbox_head.transformer.encoder.{key}": value for key, value in theirs.items()})
    torch.save(model.encoder.state_dict(), path)


def scaling(args):
    """Time and memory of our encoder against queries, cameras, levels and batch, with the fitted exponents."""
    base = replace(PRESETS["tiny"], channels=128, layers=2)
    row("grows with", "values", "seconds", "MB", "exponent of time", "of memory")
    row(*["---"] * 6)
    for axis, values in SCALING.items():
        workers = []
        for value in values:
            config, batch, cameras = base, 1, 6
            if axis == "queries":
                config = replace(base, bev_shape=(value, value))
            elif axis == "levels":
                config = replace(base, stages=(4,) * value)
            else:
                batch, cameras = (value, 6) if axis == "batch" else (1, value)
            workers.append(measure(our_encoder, args.runs, config=config, batch=batch, cameras=cameras,
                                   device=args.device))
        numbers = [value ** 2 for value in values] if axis == "queries" else values
        seconds, memory = [statistics.median(w.seconds) for w in workers], [w.memory for w in workers]
        row(axis, ", ".join(map(str, numbers)), ", ".join(f"{s:.3f}" for s in seconds),
            ", ".join(f"{m / 1e6:.0f}" for m in memory), f"{exponent(numbers, seconds):.2f}",
            f"{exponent(numbers, memory):.2f}")


def exponent(x, y):
    """The slope of log y over log x, by least squares."""
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (x, y))
    return ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()


def training_steps(args, peak):
    """A whole training step, also in bfloat16 and with checkpointing."""
    row("training step", "batch", "seconds", "GFLOP", "of float32 peak", "MB")
    row(*["---"] * 6)
    for size, batch, how in product(args.sizes, args.batch or (1,), ({}, {"bf16": True}, {"checkpointing": True})):
        worker = measure(training_step, args.runs, 1, config=PRESETS[size], batch=batch, device=args.device, **how)
        name = " ".join((size, *how))
        if worker.failed:
            row(name, batch, "out of memory", "", "", "")
            continue
        share = worker.flops / statistics.median(worker.seconds) / peak
        row(name, batch, spread(worker.seconds), round(worker.flops / 1e9), f"{share:.0%}", round(worker.memory / 1e6))


def stages(args):
    """Items a second of the five stages on a small embedded world, as their progress bars say."""
    commands = {"01_pseudolabel.py": [], "02_bev_gt.py": [], "03_pretrain.py": ["--steps", 30],
                "04_finetune.py": ["--steps", 30], "05_eval.py": ["--split", "train"]}
    row("stage (toy preset)", "throughput")
    row(*["---"] * 2)
    with tempfile.TemporaryDirectory() as folder:
        small = ["--train-scenes", 6, "--val-scenes", 1]
        subprocess.run([sys.executable, ROOT / "tests/toyworld.py", *map(str, small)], cwd=folder, check=True,
                       capture_output=True)
        for script, flags in commands.items():
            if script == "01_pseudolabel.py":
                flags += ["--segmenter", ROOT / "tests/toy_segmenter"]
            command = [sys.executable, ROOT / script, *map(str, flags)]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"error: {script} failed: {done.stderr}")
            rate, per, unit = re.findall(r"([\d.]+) ?(s/)?(image|scene|step|frame)(?:/s)?[,\]]", done.stderr)[-1]
            row(script, f"{1 / float(rate) if per else float(rate):.2f} {unit}s a second")


def anonymous(pid):
    """Bytes of memory, without mapped files, of a process and its children; Linux."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has just ended
        return 0
    return sum(1024 * int(kb) for kb in re.findall(r"RssAnon:\s+(\d+)", status)) + sum(map(anonymous, children))


def peak_memory(args):
    """The most memory of each stage's processes on two worlds, one with four times the scenes of the other, looked at
    twenty times a second. Files that are mapped do not count: the system takes their pages back when it needs them."""
    row("stage (toy preset)", "MB, 3 + 1 scenes", "MB, 12 + 4 scenes")
    row(*["---"] * 3)
    commands = {"01_pseudolabel.py": ["--segmenter", SEGMENTER], "02_bev_gt.py": [], "03_pretrain.py": ["--steps", 8],
                "04_finetune.py": ["--steps", 8], "05_eval.py": []}
    with tempfile.TemporaryDirectory() as folder:
        peaks = {script: [] for script in commands}
        for scenes in (1, 4):
            world = f"{folder}/{scenes}"
            Path(world).mkdir()
            subprocess.run([sys.executable, ROOT / "tests/toyworld.py", "--frames", "4", "--train-scenes",
                            str(3 * scenes), "--val-scenes", str(scenes)], cwd=world, check=True, capture_output=True)
            for script, flags in commands.items():
                process = subprocess.Popen([sys.executable, ROOT / script, *map(str, flags)], cwd=world,
                                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                peak = 0
                while process.poll() is None:
                    peak = max(peak, anonymous(process.pid))
                    time.sleep(0.05)
                if process.returncode:
                    sys.exit(f"error: {script} failed in {world}")
                peaks[script].append(peak)
    for script, both in peaks.items():
        row(script, *(round(peak / 1e6) for peak in both))


def rasterisers(args):
    """Samples a second of stage 02's `rasterise` and of the devkit's get_map_mask, in turns: the same map, poses, grids
    and layers, all geometry read before. Returns the speed-up of each row.

    The devkit fills road segments and lanes, where ours draws the contour of their union; its lines are 2 pixels wide.
    It goes through the whole map for each sample: the map is taken as it is, and ten times."""
    from nuscenes.map_expansion.map_api import NuScenesMap, NuScenesMapExplorer
    from nuscenes.nuscenes import NuScenes
    # On Shapely 2 the devkit cannot go through a MultiLineString; it gets its parts, one by one.
    one_line = NuScenesMapExplorer.mask_for_lines
    NuScenesMapExplorer.mask_for_lines = staticmethod(
        lambda lines, mask: [one_line(line, mask) for line in shapely.get_parts(lines)] and mask)
    stage, speedups = importlib.import_module("02_bev_gt"), []
    keep_freed_memory()  # as stage 02 does; both gain from it
    layers = ["ped_crossing", "lane_divider", "road_divider", "road_segment", "lane"]
    row("rasteriser, one process", "records", "grid", "ours samples/s", "devkit samples/s", "times")
    row(*["---"] * 6)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, ROOT / "tests/toyworld.py", "--train-scenes", "6", "--val-scenes", "1"],
                       cwd=folder, check=True, capture_output=True)
        nusc = NuScenes("v1.0-trainval", f"{folder}/data/toy", verbose=False)
        town = [look_up(nusc, "log", scene["log_token"])["location"] for scene in nusc.scene]
        poses = [world_from_ego(nusc, sample) for scene, name in zip(nusc.scene, town) if name == town[0]
                 for sample in key_frames(nusc, scene)]
        path = Path(nusc.dataroot) / f"maps/expansion/{town[0]}.json"
        for copies, size in ((1, "tiny"), (1, "paper"), (10, "tiny"), (10, "paper")):
            if (copies, size) == (10, "tiny"):
                repeat_map(path, copies)
            ours, devkit, config = stage.read_map(path), NuScenesMap(nusc.dataroot, town[0]), PRESETS[size]
            box = [end - start for start, end in (config.y_range, config.x_range)]  # the devkit's canvas is turned

            def draw():
                return [stage.rasterise(ours, pose, config.grid, config.line_width) for pose in poses]

            def peer():
                return [devkit.get_map_mask((*pose[:2, 3].tolist(), *box), math.degrees(math.atan2(pose[1, 0],
                        pose[0, 0])), layers, config.grid.shape[::-1]) for pose in poses]

            check_masks(draw(), peer())
            rates = [[len(poses) / seconds(function) for function in (draw, peer)] for _ in range(args.runs)]
            speedups.append(statistics.median(a / b for a, b in rates))
            row(f"{len(poses)} samples", sum(len(getattr(devkit, layer)) for layer in layers),
                "x".join(map(str, config.grid.shape)), *(spread(side, digits=0) for side in zip(*rates)),
                spread([a / b for a, b in rates], digits=0))
    return speedups


def repeat_map(path, copies):
    """Make a map as large as `copies` of it, 10 km apart; the tokens of each get an ending of their own."""
    text, shift = path.read_text(), 10_000.0
    table = json.loads(text)
    for k in range(1, copies):
        more = json.loads(re.sub(r'"([0-9a-f]{32})"', rf'"\1-{k}"', text))
        for node in more["node"]:
            node["x"] += k * shift
        for layer, records in more.items():
            if isinstance(records, list) and layer != "canvas_edge":
                table[layer] += records
    path.write_text(json.dumps(table))


def check_masks(ours, devkit):
    """Both look at the same places: where ours has a crossing, the devkit has one, but for a few cells at the rims."""
    ours = torch.stack([torch.from_numpy(bev) for bev in ours]) == 2
    theirs = torch.stack([torch.from_numpy(masks[0]).bool().T.flip(0, 1) for masks in devkit])
    if (ours & ~theirs).sum() > 0.05 * ours.sum() or not ours.any():
        sys.exit("error: the two rasterisers draw different things")


def seconds(function):
    """How long a call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


# ---------------------------------------------------------------- stage 01 beside the model card

def our_labelling(paths, folder, device):
    """A function that labels images as stage 01 does, with its batches and workers, and writes them to `folder`."""
    stage = importlib.import_module("01_pseudolabel")
    sys.argv = sys.argv[:1]  # in this process alone: the flags are those of stage 01, at their defaults
    args, size = stage.parse_args(), PRESETS["toy"].image_size
    names = stage.segmenter_names(SEGMENTER)[0]
    torch.set_num_threads(1)
    label = partial(stage.label_images, segment=stage.load_segmenter(SEGMENTER, device),
                    membership=stage.group_labels(list(names)).to(device), segmenter_size=args.segmenter_size,
                    image_size=size, min_confidence=args.min_confidence)

    def run():
        batches = [paths[i:i + args.batch_size] for i in range(0, len(paths), args.batch_size)]
        with ThreadPoolExecutor(args.workers) as pool:
            save_pt({"labelled": list(pool.map(label, batches))}, Path(folder) / "scene.pt")
    return run


def stock_labelling(paths, folder, device, threads):
    """The same by what the model card shows, an image at a time, at the same size: the most probable label of each
    pixel as a PNG, and the image as a JPEG, both of the network's size, in `folder`."""
    from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation
    torch.set_num_threads(threads)
    (h, w), (height, width) = PRESETS["toy"].image_size, (288, 512)  # of the network's images; as --segmenter-size
    processor = AutoImageProcessor.from_pretrained(SEGMENTER, size={"height": height, "width": width})
    model = Mask2FormerForUniversalSegmentation.from_pretrained(SEGMENTER).eval().to(device)

    def run():
        for path in paths:
            image = Image.open(path)
            inputs = processor(images=image, return_tensors="pt").to(device)
            assert inputs["pixel_values"].shape == (1, 3, height, width)
            with torch.no_grad():
                outputs = model(**inputs)
            label = processor.post_process_semantic_segmentation(outputs, target_sizes=[(h, w)])[0]
            Image.fromarray(label.to("cpu", torch.uint8).numpy()).save(Path(folder) / f"{path.stem}.png")
            image.resize((w, h), Image.Resampling.BILINEAR).save(Path(folder) / path.name, quality=95)
    return run


def label_side_by_side(args):
    """Images a second of both, in turns, on the 48 images of a small embedded world. Returns the median ratio.

    The model card's way has one thread and all cores by turns, as the threads of so small a model wait for each other
    where the machine has other work: the quicker one counts."""
    cores = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, ROOT / "tests/toyworld.py", "--train-scenes", "1", "--val-scenes", "1",
                        "--frames", "4"], cwd=folder, check=True, capture_output=True)
        case = {"folder": folder, "paths": sorted(Path(folder).glob("data/toy/samples/*/*.jpg")), "device": args.device}
        workers = {"stage 01": Worker(our_labelling, **case)}
        for threads in sorted({1, cores}):
            workers[f"model card, {threads} threads"] = Worker(stock_labelling, threads=threads, **case)
        for i in range(1 + args.runs):
            for worker in workers.values():
                worker.time(count=i >= 1)
        if any([worker.stop().failed for worker in workers.values()]):
            sys.exit("error: a labelling process failed: see above, or it lacked memory")
    row("labelling (toy preset and segmenter)", "images a second")
    row(*["---"] * 2)
    for name, worker in workers.items():
        row(name, spread([len(case["paths"]) / seconds for seconds in worker.seconds], digits=1))
    ours, *stock = (worker.seconds for worker in workers.values())
    ratios = [min(theirs) / mine for mine, *theirs in zip(ours, *stock)]
    row("stage 01 over the quicker of the others", spread(ratios))
    return statistics.median(ratios)


if __name__ == "__main__":
    args = parse_args()
    peak = matmul_peak(args.device)
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{machine}, torch {torch.__version__}, float32 matmul peak {peak / 1e9:.0f} GFLOP/s; "
          f"median (lowest .. highest) of {args.runs} runs\n")
    ratios = compare_encoders(args, peak) if "encoder" in args.parts else {"": [], "_bf16": []}
    for part, function in (("scaling", lambda: scaling(args)), ("step", lambda: training_steps(args, peak)),
                           ("stages", lambda: stages(args)), ("memory", lambda: peak_memory(args))):
        if part in args.parts:
            print()
            function()
    summary = {f"encoder_{what}_ratio{kind}": round(max(pair[i] for pair in pairs), 3) if pairs else None
               for kind, pairs in ratios.items() for i, what in enumerate(("time", "memory"))}
    if "pseudolabel" in args.parts:
        print()
        summary["pseudolabel_speed_ratio"] = round(label_side_by_side(args), 3)
    if "bev_gt" in args.parts:
        print()
        summary["bev_gt_speedup"] = round(min(rasterisers(args)), 1)
    print(json.dumps(summary))
