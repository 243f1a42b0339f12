"""The network: BEVFormer against an independent implementation, batches against single runs, loss and score by hand."""
import argparse
import math
import os
from pathlib import Path

import pytest
import torch
from rig import pose, surround

from model import (PRESETS, BEVSegmenter, Config, Encoder, batch_indices, count_overlap, deformable_attention, fit, iou,
                   learning_rate, load_checkpoint, run_sequence, segmentation_loss)
from reproject import IGNORE, render, save_pt

VECTORS = Path(os.environ.get("REFERENCE_VECTORS", Path(__file__).parents[2] / "shared/golden/bevformer_encoder.pt"))


def from_official(state, heads, points):
    """Official BEVFormer encoder parameters -> our names and axes (their grid has row 0 at the rear)."""
    names = {"attentions.0.sampling_offsets": "temporal.offsets", "attentions.0.attention_weights": "temporal.weights",
             "attentions.0.value_proj": "temporal.value", "attentions.0.output_proj": "temporal.output",
             "attentions.1.deformable_attention.sampling_offsets": "spatial.offsets",
             "attentions.1.deformable_attention.attention_weights": "spatial.weights",
             "attentions.1.deformable_attention.value_proj": "spatial.value",
             "attentions.1.output_proj": "spatial.output",
             "ffns.0.layers.0.0": "ffn.0", "ffns.0.layers.1": "ffn.2", "norms": "norms"}
    ours = {}
    for key, value in state.items():
        key = key.removeprefix("encoder.")
        old = next(name for name in names if f".{name}." in key)
        key = key.replace(old, names[old])
        if "temporal.offsets" in key:  # a step towards higher rows is a step ahead there, a step back here
            value = value.view(heads, 2, 1, points, 2, *value.shape[1:]).clone()
            value[:, :, :, :, 1] *= -1
            value = value.flatten(0, 4)
        ours[key] = value
    return ours


@pytest.fixture(scope="module")
def vectors():
    if not VECTORS.exists():
        pytest.skip(f"no reference vectors at {VECTORS}: set REFERENCE_VECTORS")
    return torch.load(VECTORS, weights_only=True)


@pytest.mark.parametrize("history", (False, True))
def test_reference_vectors(vectors, history):
    c, inputs = vectors["config"], vectors["inputs"]
    x0, y0, z0, x1, y1, z1 = c["pc_range"]
    z = torch.linspace(0.5, z1 - z0 - 0.5, c["num_points_in_pillar"], dtype=torch.float64) + z0
    # LiDAR x is right, y is ahead; ego x is ahead, y is left.
    config = Config(x_range=(y0, y1), y_range=(-x1, -x0), image_size=c["img_hw"], stages=(1,) * c["num_levels"],
                    bev_shape=(c["bev_h"], c["bev_w"]), channels=c["embed_dims"], layers=c["num_layers"],
                    heads=c["num_heads"], ffn=c["ffn_dims"], points_spatial=c["num_points_sca"],
                    points_temporal=c["num_points_tsa"], heights=tuple(z.tolist()))
    encoder = Encoder(config).double()
    encoder.load_state_dict(from_official(vectors["state_dict"], c["num_heads"], c["num_points_tsa"]))
    ego_T_lidar = torch.tensor([[0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.float64)

    def turned(bev):  # (Q, 1, C) with row 0 at the rear -> (1, Q, C) with row 0 ahead
        return bev.view(c["bev_h"], c["bev_w"], -1).flip(0).flatten(0, 1)[None]

    extra = {}
    if history:
        extra = {"previous": turned(inputs["prev_bev"]), "has_previous": torch.tensor([True]),
                 "shift": inputs["shift_xy"] * torch.tensor([1.0, -1.0])}
    features = [f.flatten(0, 1).permute(0, 2, 3, 1) for f in inputs["feats"]]
    output = encoder(turned(inputs["bev_query"]), turned(inputs["bev_pos"]), features, inputs["K"][None],
                     (ego_T_lidar @ inputs["lidar_T_cam"])[None], **extra)
    expected = vectors["outputs"]["with_history" if history else "without_history"]
    torch.testing.assert_close(output, turned(expected.transpose(0, 1)), atol=1e-9, rtol=0)


def test_reference_operator(vectors):
    o = vectors["operator"]
    B, Q = o["locations"].shape[:2]
    leaves = [o[k].clone().requires_grad_() for k in ("value", "locations", "weights")]
    sizes = [h * w for h, w in o["spatial_shapes"]]
    values = [v.unflatten(1, size).permute(0, 3, 4, 1, 2)
              for v, size in zip(leaves[0].split(sizes, 1), o["spatial_shapes"])]
    output = deformable_attention(values, leaves[1].flatten(0, 1), leaves[2].flatten(0, 1),
                                  torch.arange(B).repeat_interleave(Q)).view(B, Q, -1)
    torch.testing.assert_close(output, o["output"], atol=1e-9, rtol=0)
    (output * o["grad_out"]).sum().backward()
    for leaf, name in zip(leaves, ("grad_value", "grad_locations", "grad_weights")):
        torch.testing.assert_close(leaf.grad, o[name], atol=1e-9, rtol=0)


# ---------------------------------------------------------------- the whole network

SMALL = Config(image_size=(72, 128), bev_shape=(20, 10), cell=1.0, channels=16, heads=2, ffn=32, layers=2)


def frame(batch, config, seed=0, **where):
    """Random images and a rig: the arguments of BEVSegmenter.forward."""
    h, w = config.image_size
    image = torch.randint(0, 256, (batch, 6, 3, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    K, ego_T_cam = surround(batch, **where)
    K[..., :2, :] *= w / 256
    return image, K, ego_T_cam


def random_model(config):
    """A network whose attention offsets and weights depend on the query, as after training."""
    torch.manual_seed(0)
    model = BEVSegmenter(config).eval()
    for layer in model.encoder.layers:
        for linear in (layer.temporal.offsets, layer.temporal.weights, layer.spatial.offsets, layer.spatial.weights):
            torch.nn.init.normal_(linear.weight, std=0.3)
    return model


def test_two_rigs_in_one_batch_equal_two_runs():
    """Each sample has its own cameras, its own visibility, and one has a history while the other has none."""
    model = random_model(SMALL)
    first, second = frame(1, SMALL, 1), frame(1, SMALL, 2, yaws=(20, -80, 30, 170, 90, -140), height=1.9)
    previous = torch.randn(2, SMALL.channels, *SMALL.bev_shape)
    has_previous = torch.tensor([True, False])
    with torch.no_grad():
        both, bev = model(*(torch.cat(pair) for pair in zip(first, second)), previous, has_previous)
        with_history = model(*first, previous[:1], has_previous[:1])
        without = model(*second)
    for b, (logits, features) in enumerate((with_history, without)):
        torch.testing.assert_close(both[b:b + 1], logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(bev[b:b + 1], features, atol=1e-5, rtol=1e-5)
    with torch.no_grad():  # and the history makes a difference
        assert (model(*first)[0] - with_history[0]).abs().max() > 1e-3


def test_queries_see_only_what_their_cameras_see():
    """Blacking out the camera that looks ahead changes the BEV ahead, and, without BEV convolutions, not behind."""
    model = random_model(Config(**{**SMALL.__dict__, "layers": 1}))
    image, K, ego_T_cam = frame(1, SMALL, 3)
    dark = image.clone()
    dark[:, 0] = 0
    with torch.no_grad():
        change = (model(image, K, ego_T_cam)[1] - model(dark, K, ego_T_cam)[1]).abs().amax(1)[0]  # (20, 10)
    assert change[:8, 4:6].min() > 1e-4  # rows 0..7 lie 6 m and more ahead
    assert change[10:].max() < 1e-5


def test_features_cover_the_padded_image():
    """450 rows at stride 32 are 14.06 feature rows: padded to 480, they are 15, and projections stay in place."""
    tiny = PRESETS["tiny"]
    assert tiny.padded_size == (480, 800) and PRESETS["small"].padded_size == (736, 1280)
    assert PRESETS["toy"].padded_size == PRESETS["toy"].image_size
    odd = random_model(Config(**{**SMALL.__dict__, "image_size": (70, 120)}))
    image, K, ego_T_cam = frame(1, odd.config)
    assert odd.config.padded_size == (80, 128)
    padded = random_model(Config(**{**SMALL.__dict__, "image_size": (80, 128)}))
    mean = odd.mean.round().byte()[None, None].expand(1, 6, 3, 80, 128).clone()  # what padding with zeros looks like
    mean[..., :70, :120] = image
    with torch.no_grad():
        torch.testing.assert_close(odd(image, K, ego_T_cam)[0], padded(mean, K, ego_T_cam)[0], atol=0.02, rtol=0)


def test_history_carries_no_gradient_and_is_used():
    model = random_model(SMALL).train()
    image, K, ego_T_cam = (t[:, None].expand(-1, 2, *t.shape[1:]).clone() for t in frame(1, SMALL))
    batch = {"image": image, "K": K, "ego_T_cam": ego_T_cam, "linked": torch.tensor([[False, True]]),
             "world_T_ego": torch.stack((pose(0, 0, 0), pose(4, 0, 0)))[None]}
    logits, before = run_sequence(model, batch)
    assert logits.requires_grad and not before.requires_grad
    model.eval()
    with torch.no_grad():
        moved, _ = run_sequence(model, batch)
        batch["world_T_ego"] = torch.stack((pose(0, 0, 0), pose(0, 0, 0)))[None]
        stood, _ = run_sequence(model, batch)
    assert (moved - stood).abs().max() > 1e-4


def test_overfits_one_sample():
    """From six pictures of a painted ground to its map, IoU above 0.9: the whole chain from pixels to cells learns."""
    torch.manual_seed(0)
    config = Config(x_range=(-12.0, 12.0), y_range=(-9.0, 9.0), cell=0.5, image_size=(72, 128), bev_shape=(24, 18),
                    channels=32, heads=2, ffn=64, layers=1)
    xy = config.grid.centres(torch.empty(0))
    truth = torch.zeros(1, *config.grid.shape, dtype=torch.uint8)
    truth[0][(xy[..., 1] - 0.1 * xy[..., 0]).abs() < 0.8] = 1
    truth[0][(xy[..., 0] - 8).abs() < 1.5] = 2
    truth[0][(xy[..., 1] + 6).abs() < 0.8] = 3
    K, ego_T_cam = surround()
    K[..., :2, :] *= 0.5
    one_hot = torch.nn.functional.one_hot(truth.long(), 4).permute(0, 3, 1, 2).float()
    shown, valid = render(one_hot, K, ego_T_cam, (72, 128), config.grid)
    colours = torch.tensor([[80.0, 80, 80], [250, 250, 250], [60, 120, 250], [200, 90, 20]])
    image = (torch.einsum("bnchw,cd->bndhw", shown, colours) * valid.unsqueeze(2)).byte()
    model = BEVSegmenter(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        logits, _ = model(image, K, ego_T_cam)
        loss = segmentation_loss(logits, truth, (1.0, 1.0, 1.0, 1.0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert iou(count_overlap(logits.argmax(1), truth))["miou"] > 0.9


# ---------------------------------------------------------------- loss, score, schedule

def test_loss_by_hand():
    """Two valid pixels of three: -(w1 log p1 + w0 log p0) / 2."""
    logits = torch.tensor([[[2.0, 0.0, 5.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])  # (1, 4, 3)
    target = torch.tensor([[0, 1, IGNORE]], dtype=torch.uint8)
    log_p0 = 2.0 - math.log(math.e ** 2 + 3)
    log_p1 = 1.0 - math.log(math.e + 3)
    expected = -(0.5 * log_p0 + 4.0 * log_p1) / 2
    assert segmentation_loss(logits, target, (0.5, 4.0, 1.0, 1.0)).item() == pytest.approx(expected, rel=1e-5)
    assert segmentation_loss(logits, torch.full((1, 3), IGNORE, dtype=torch.uint8), (1.0,) * 4).item() == 0


def test_iou_by_hand():
    """Data-set level: overlaps are summed before they are divided."""
    target = torch.tensor([[1, 1, 1, 0], [2, 2, 0, IGNORE]])
    prediction = torch.tensor([[1, 1, 0, 1], [2, 0, 0, 3]])
    overlap = count_overlap(prediction, target)
    assert overlap.tolist() == [[1, 2, 1, 0], [4, 4, 2, 0]]
    score = iou(overlap)
    assert score["iou"] == {"divider": 0.5, "ped_crossing": 0.5, "boundary": None}
    assert score["miou"] == 0.5
    more = count_overlap(torch.tensor([3, 1]), torch.tensor([3, 1]))
    assert iou(overlap + more)["iou"] == {"divider": 3 / 5, "ped_crossing": 0.5, "boundary": 1.0}


def test_learning_rate():
    assert learning_rate(0, 200, 1.0) == pytest.approx(0.1)
    assert learning_rate(10, 200, 1.0) == pytest.approx(1.0)
    assert learning_rate(105, 200, 1.0) == pytest.approx(0.505)
    assert 0.01 < learning_rate(199, 200, 1.0) < 0.011


def test_batches_are_a_function_of_the_step():
    whole = batch_indices(10, 4, seed=1, start=0, steps=5)
    assert sorted(sum(whole, [])) == sorted(list(range(10)) * 2)  # 20 draws: each sample twice
    assert whole[3:] == batch_indices(10, 4, seed=1, start=3, steps=5)
    assert whole != batch_indices(10, 4, seed=2, start=0, steps=5)


# ---------------------------------------------------------------- checkpoints

class Pictures(torch.utils.data.Dataset):
    """Four one-frame sequences of random images and maps."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        image, K, ego_T_cam = frame(1, SMALL, index)
        truth = torch.randint(0, 4, SMALL.grid.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(index))
        return {"image": image, "K": K, "ego_T_cam": ego_T_cam, "linked": torch.tensor([False]), "bev": truth,
                "world_T_ego": pose(0, 0, 0)[None]}


def test_an_empty_split_is_named(tmp_path):
    args = argparse.Namespace(steps=1, batch_size=2, lr=1e-3, seed=0, device="cpu", workers=0, out="out")
    with pytest.raises(SystemExit, match="no train scene"):
        fit(BEVSegmenter(SMALL), [], None, args, tmp_path / "x.pt")


def train(path, steps, stop_at=None):
    """fit() on Pictures; stop_at kills it after that many steps, each of which was saved."""
    args = argparse.Namespace(steps=steps, batch_size=2, lr=1e-3, seed=0, device="cpu", workers=0)
    torch.manual_seed(0)
    model, done = BEVSegmenter(SMALL), []

    def loss_fn(batch):
        if len(done) == stop_at:
            raise KeyboardInterrupt
        done.append(0)
        loss = segmentation_loss(run_sequence(model, batch)[0], batch["bev"], (1.0,) * 4)
        return loss, {"loss": loss}

    fit(model, Pictures(), loss_fn, args, path, minutes=0)
    return len(done)


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, capsys):
    assert train(tmp_path / "whole.pt", 6) == 6
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed.pt", 6, stop_at=4)
    assert train(tmp_path / "killed.pt", 6) == 2
    whole, killed = (load_checkpoint(tmp_path / name, "")[0] for name in ("whole.pt", "killed.pt"))
    assert killed["step"] == 6
    for key, value in whole["model"].items():
        assert torch.equal(value, killed["model"][key]), key
    with pytest.raises(SystemExit) as stop:  # finished: says so, does nothing, exit code 0
        train(tmp_path / "whole.pt", 6)
    assert stop.value.code == 0 and "finished" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="was trained with steps 6, not 8"):
        train(tmp_path / "whole.pt", 8)


def test_checkpoints_of_another_kind_are_refused(tmp_path):
    train(tmp_path / "a.pt", 1)
    _, model = load_checkpoint(tmp_path / "a.pt", "", SMALL)
    assert model.config == SMALL
    with pytest.raises(SystemExit, match="another architecture: .*channels 16 .expected 64."):
        load_checkpoint(tmp_path / "a.pt", "", PRESETS["toy"])
    with pytest.raises(SystemExit, match="missing: run 03"):
        load_checkpoint(tmp_path / "b.pt", "run 03")
    save_pt({"meta": 1}, tmp_path / "c.pt")
    with pytest.raises(SystemExit, match="is no checkpoint"):
        load_checkpoint(tmp_path / "c.pt", "run 03")
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    content["model"]["query"] = torch.zeros(3, 3)
    save_pt(content, tmp_path / "d.pt")
    with pytest.raises(SystemExit, match="does not fit model.py: size mismatch for query"):
        load_checkpoint(tmp_path / "d.pt", "run 03")
