"""The network: BEVFormer against an independent implementation, batches against single runs, loss and score by hand."""
import argparse
import importlib
import math
import os
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from rig import pose, surround

import reproject
from model import (MUON, PRESETS, BEVSegmenter, Config, Optimizer, count_confusion, draw_sample, fit, init_guide,
                   initial_model, iou, load_checkpoint, load_official, orthogonal, run_sequence, segmentation_loss,
                   step)
from reproject import (IGNORE, Linear, batch_samples, check_training, deformable_attention, learning_rate,
                       pillars_in_cameras, render, save_pt)

HERE = Path(__file__).parent
# The first may be any other file of its kind; the second is made by tests/peer.py.
VECTORS = {"shared": Path(os.environ.get("REFERENCE_VECTORS", HERE.parents[1] / "shared/golden/bevformer_encoder.pt")),
           "own": HERE / "reference_vectors.pt"}


SMALL = Config(image_size=(72, 128), bev_shape=(20, 10), cell=1.0, channels=16, heads=2, ffn=32, layers=2)


@pytest.fixture(params=VECTORS)
def vectors(request):
    path = VECTORS[request.param]
    if request.param == "shared" and not path.exists():
        pytest.skip(f"no reference vectors at {path}: set REFERENCE_VECTORS")
    return torch.load(path, weights_only=True)


def equal(ours, expected):
    """To 1e-9, or as exactly as float32 stores the expected number."""
    exact = expected.dtype == torch.float64
    torch.testing.assert_close(ours, expected.double(), atol=1e-9 if exact else 1e-6, rtol=0 if exact else 1e-6)


def double(tree):
    """The same dict, or list, in float64."""
    if isinstance(tree, dict):
        return {key: double(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [double(value) for value in tree]
    return tree.double()


def official_config(c):
    """Config of a network with the encoder that reference vectors were made with."""
    x0, y0, z0, x1, y1, z1 = c["pc_range"]
    z = torch.linspace(0.5, z1 - z0 - 0.5, c["num_points_in_pillar"], dtype=torch.float64) + z0
    # LiDAR x is right, y is ahead; ego x is ahead, y is left. Every level is as if it came from stage 1.
    return Config(x_range=(y0, y1), y_range=(-x1, -x0), image_size=tuple(c["img_hw"]), stages=(1,) * c["num_levels"],
                  bev_shape=(c["bev_h"], c["bev_w"]), channels=c["embed_dims"], layers=c["num_layers"],
                  heads=c["num_heads"], ffn=c["ffn_dims"], points_spatial=c["num_points_sca"],
                  points_temporal=c["num_points_tsa"], heights=tuple(z.tolist()))


@pytest.mark.parametrize("history", (False, True))
def test_reference_vectors(vectors, history):
    c, inputs, state = vectors["config"], double(vectors["inputs"]), double(vectors["state_dict"])
    model = BEVSegmenter(official_config(c)).double()
    if history:
        # The official code reads the previous BEV at a shifted place, in fractions of the grid. We warp it beforehand;
        # here the shift goes to the offsets (head, BEV, point, xy), which are in cells.
        shift = inputs["shift_xy"] * torch.tensor([[c["bev_w"], c["bev_h"]]])
        for name in [name for name in state if "attentions.0.sampling_offsets.bias" in name]:
            state[name].view(c["num_heads"], 2, c["num_points_tsa"], 2)[:, 0] += shift
    report = load_official(model, {f"pts_bbox_head.transformer.{key}": value for key, value in state.items()})
    assert len(report["used"]) == len(state) and not any("encoder" in name for name in report["left"])

    def turned(bev):  # (Q, 1, C) with row 0 at the rear -> (1, Q, C) with row 0 ahead
        return bev.view(c["bev_h"], c["bev_w"], -1).flip(0).flatten(0, 1)[None]

    previous = {"previous": turned(inputs["prev_bev"]), "has_previous": torch.tensor([True])} if history else {}
    features = [f.flatten(0, 1).permute(0, 2, 3, 1) for f in inputs["feats"]]
    ego_T_lidar = torch.tensor([[0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.float64)
    # Ours pads images to whole strides: pixels are scaled so that the features cover what they covered there.
    K, scale = inputs["K"].clone(), torch.tensor(model.config.padded_size).double() / torch.tensor(c["img_hw"])
    K[:, :2] *= scale.flip(0).view(2, 1)
    output = model.encoder(turned(inputs["bev_query"]), turned(inputs["bev_pos"]), features, K[None],
                           (ego_T_lidar @ inputs["lidar_T_cam"])[None], **previous)
    expected = vectors["outputs"]["with_history" if history else "without_history"]
    equal(output, turned(expected.transpose(0, 1)))


def test_reference_operator(vectors):
    o = vectors["operator"]
    B, Q, M, L, P, _ = o["locations"].shape
    value, locations, weights = leaves = [o[k].double().requires_grad_() for k in ("value", "locations", "weights")]
    source, output = torch.arange(B, dtype=torch.int32).repeat_interleave(Q).view(-1, 1, 1), 0
    for level, (maps, (h, w)) in enumerate(zip(value.split([h * w for h, w in o["spatial_shapes"]], 1),
                                               o["spatial_shapes"])):
        x, y = locations[:, :, :, level].flatten(0, 1).unbind(-1)  # (B*Q, M, P), in fractions of the map
        output = output + deformable_attention(maps.unflatten(1, (h, w)), x * w, y * h,
                                               weights[:, :, :, level].flatten(0, 1), source)
    equal(output.view(B, Q, -1), o["output"])
    (output.view(B, Q, -1) * o["grad_out"]).sum().backward()
    for leaf, name in zip(leaves, ("grad_value", "grad_locations", "grad_weights")):
        equal(leaf.grad, o[name])


def official_state(model):
    """What a released detector with the body of `model` holds, random; written down from its module tree."""
    c, state = model.config, {}
    (H, W), C, M, L = c.bev_shape, c.channels, c.heads, len(c.stages)
    for key, value in model.backbone.state_dict().items():
        state[f"img_backbone.{key}"] = torch.rand_like(value) if value.is_floating_point() else value
    for i, block in enumerate(model.fpn.inner_blocks):
        weights = {"lateral_convs": torch.rand_like(block[0].weight), "fpn_convs": torch.rand(C, C, 3, 3)}
        for conv, weight in weights.items():
            state |= {f"img_neck.{conv}.{i}.conv.weight": weight, f"img_neck.{conv}.{i}.conv.bias": torch.rand(C)}
    linear = {"0": (18, C // 2), "2": (C // 2, C)}
    shapes = {"transformer.level_embeds": (4, C), "transformer.cams_embeds": (6, C), "bev_embedding.weight": (H * W, C),
              "positional_encoding.row_embed.weight": (H, C // 2), "positional_encoding.col_embed.weight": (W, C // 2),
              "transformer.can_bus_mlp.norm.weight": (C,), "transformer.can_bus_mlp.norm.bias": (C,),
              "query_embedding.weight": (9, 2 * C), "code_weights": (10,), "cls_branches.0.0.weight": (C, C),
              "transformer.reference_points.weight": (3, C),
              "transformer.decoder.layers.0.attentions.1.value_proj.weight": (C, C)}
    for i, (n_in, n_out) in linear.items():
        shapes |= {f"transformer.can_bus_mlp.{i}.weight": (n_out, n_in), f"transformer.can_bus_mlp.{i}.bias": (n_out,)}
    for i in range(c.layers):
        linear = {"attentions.0.sampling_offsets": (2 * C, M * 2 * c.points_temporal * 2),
                  "attentions.0.attention_weights": (2 * C, M * 2 * c.points_temporal),
                  "attentions.0.value_proj": (C, C), "attentions.0.output_proj": (C, C),
                  "attentions.1.deformable_attention.sampling_offsets": (C, M * L * c.points_spatial * 2),
                  "attentions.1.deformable_attention.attention_weights": (C, M * L * c.points_spatial),
                  "attentions.1.deformable_attention.value_proj": (C, C), "attentions.1.output_proj": (C, C),
                  "ffns.0.layers.0.0": (C, c.ffn), "ffns.0.layers.1": (c.ffn, C)}
        for name, (n_in, n_out) in linear.items():
            shapes |= {f"transformer.encoder.layers.{i}.{name}.weight": (n_out, n_in),
                       f"transformer.encoder.layers.{i}.{name}.bias": (n_out,)}
        for n in range(3):
            shapes |= {f"transformer.encoder.layers.{i}.norms.{n}.{kind}": (C,) for kind in ("weight", "bias")}
    return state | {f"pts_bbox_head.{name}": torch.randn(shape) for name, shape in shapes.items()}


def test_a_released_checkpoint_goes_to_its_places():
    """Backbone and FPN by what they compute, embeddings by their place on the ground; the encoder is tested above."""
    model = BEVSegmenter(SMALL).eval()
    state, untouched = official_state(model), {k: v.clone() for k, v in model.state_dict().items()}
    report = load_official(model, state)
    assert sorted(report["used"] + report["ignored"]) == sorted(state)
    assert report["ignored"] == sorted(f"pts_bbox_head.{name}" for name in (
        "query_embedding.weight", "code_weights", "transformer.reference_points.weight", "cls_branches.0.0.weight",
        "transformer.decoder.layers.0.attentions.1.value_proj.weight"))
    assert all(name.startswith(("refine", "classify", "image_head")) for name in report["left"])
    for name, value in model.state_dict().items():
        if "num_batches_tracked" not in name:
            assert torch.equal(value, untouched[name]) == (name in report["left"]), name

    # The neck of mmdet: 1x1 convolutions, coarse added to fine, 3x3 convolutions.
    head = {key.removeprefix("pts_bbox_head."): value for key, value in state.items()}
    fine, coarse = maps = [torch.rand(1, n, *size) for n, size in ((128, (8, 8)), (256, (4, 4)))]
    conv = torch.nn.functional.conv2d
    lateral = [conv(x, state[f"img_neck.lateral_convs.{i}.conv.weight"], state[f"img_neck.lateral_convs.{i}.conv.bias"])
               for i, x in enumerate(maps)]
    lateral[0] = lateral[0] + torch.nn.functional.interpolate(lateral[1], scale_factor=2, mode="nearest")
    for i, (x, ours) in enumerate(zip(lateral, model.fpn({"2": fine, "3": coarse}).values())):
        weight, bias = (state[f"img_neck.fpn_convs.{i}.conv.{kind}"] for kind in ("weight", "bias"))
        torch.testing.assert_close(ours, conv(x, weight, bias, padding=1))

    # Their row 0 is at the rear, ours farthest ahead; column 0 is at the left in both.
    (H, W), C = SMALL.bev_shape, SMALL.channels
    can_bus = torch.nn.Sequential(torch.nn.Linear(18, C // 2), torch.nn.ReLU(), torch.nn.Linear(C // 2, C),
                                  torch.nn.ReLU(), torch.nn.LayerNorm(C))
    can_bus.load_state_dict({key.removeprefix("transformer.can_bus_mlp.").replace("norm", "4"): value
                             for key, value in head.items() if "can_bus" in key})
    query = head["bev_embedding.weight"].view(H, W, C) + can_bus(torch.zeros(18))
    torch.testing.assert_close(model.query.view(H, W, C)[0, 3], query[H - 1, 3])
    torch.testing.assert_close(model.query.view(H, W, C)[H - 2, 0], query[1, 0])
    assert torch.equal(model.row[0], head["positional_encoding.row_embed.weight"][H - 1])
    assert torch.equal(model.column[1], head["positional_encoding.col_embed.weight"][1])
    assert torch.equal(model.level, head["transformer.level_embeds"][:2])
    assert torch.equal(model.camera, head["transformer.cams_embeds"])


@pytest.mark.parametrize("key, value, says", (
    ("pts_bbox_head.transformer.encoder.layers.2.norms.0.weight", torch.ones(16), "layers.2.norms.0.weight has no"),
    ("img_backbone.layer3.0.conv2.conv_offset.weight", torch.ones(1), "conv_offset.weight has no place"),
    ("pts_bbox_head.transformer.cams_embeds", torch.ones(5, 16), "size mismatch for camera"),
    ("pts_bbox_head.bev_embedding.weight", torch.ones(199, 16), "shape"),
    ("pts_bbox_head.transformer.encoder.layers.0.attentions.0.attention_weights.bias", None, "attention_weights.bias")))
def test_a_released_checkpoint_of_another_size_is_refused(key, value, says, tmp_path):
    model = BEVSegmenter(SMALL)
    state = official_state(model) | {key: value}
    state = {k: v for k, v in state.items() if v is not None}
    with pytest.raises(ValueError, match=says):
        load_official(model, state)
    torch.save({"meta": {}, "state_dict": state}, tmp_path / "b.pth")
    with pytest.raises(SystemExit, match=f"b.pth does not fit --preset toy: .*{says}"):
        initial_model(argparse.Namespace(init=str(tmp_path / "b.pth"), preset="toy"), SMALL, tmp_path / "x.pt")


@pytest.mark.parametrize("zipped", (True, False))
def test_training_starts_from_a_released_checkpoint(zipped, tmp_path, capsys):
    state = official_state(BEVSegmenter(SMALL))
    torch.save({"meta": {"CLASSES": ("car",)}, "state_dict": state}, tmp_path / "b.pth",
               _use_new_zipfile_serialization=zipped)
    args = argparse.Namespace(init=str(tmp_path / "b.pth"), preset="toy")
    model = initial_model(args, SMALL, tmp_path / "x.pt")
    assert torch.equal(model.camera, state["pts_bbox_head.transformer.cams_embeds"])
    assert len(args.init_digest) == 12
    assert "5 of the detector ignored; left at their start: refine.0.weight" in capsys.readouterr().out


@pytest.mark.parametrize("content", ("resnet", "no neck", "list", "numbers"))
def test_a_file_that_is_no_bevformer_is_refused(content, tmp_path):
    state = official_state(BEVSegmenter(SMALL))
    without_neck = {key: value for key, value in state.items() if "img_neck" not in key}
    resnet = {key.removeprefix("img_backbone."): value for key, value in state.items() if "img_backbone" in key}
    contents = {"resnet": resnet, "no neck": without_neck, "list": [1], "numbers": {0: torch.zeros(1)}}
    torch.save(contents[content], tmp_path / "b.pth")
    says = "b.pth does not fit --preset toy: .*(nothing in it is our|no attribute|expected string)"
    with pytest.raises(SystemExit, match=says):
        initial_model(argparse.Namespace(init=str(tmp_path / "b.pth"), preset="toy"), SMALL, tmp_path / "x.pt")


# ---------------------------------------------------------------- the whole network

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
        for linear in (layer.temporal.guide, layer.temporal.guide_previous, layer.spatial.guide):
            torch.nn.init.normal_(linear.weight, std=0.3)
    return model


@pytest.mark.parametrize("histories", ((True, False), (True, True), (False, False)))
def test_two_rigs_in_one_batch_equal_two_runs(histories):
    """Each sample has its own cameras and visibility, and one may have a history while the other has none."""
    model = random_model(SMALL)
    first, second = frame(1, SMALL, 1), frame(1, SMALL, 2, yaws=(20, -80, 30, 170, 90, -140), height=1.9)
    previous = torch.randn(2, SMALL.channels, *SMALL.bev_shape)
    with torch.no_grad():
        both, bev = model(*(torch.cat(pair) for pair in zip(first, second)), previous, torch.tensor(histories))
        alone = [model(*inputs, previous[b:b + 1], torch.tensor([True])) if histories[b] else model(*inputs)
                 for b, inputs in enumerate((first, second))]
    for b, (logits, features) in enumerate(alone):
        torch.testing.assert_close(both[b:b + 1], logits, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(bev[b:b + 1], features, atol=1e-6, rtol=1e-6)
    with torch.no_grad():  # and the history makes a difference
        assert not histories[0] or (model(*first)[0] - alone[0][0]).abs().max() > 1e-3


def test_checkpointing_and_bfloat16_change_no_result():
    """Recomputed layers give the same gradients; bfloat16 rounds, and leaves where things are projected alone."""
    model, calls = random_model(SMALL), []
    model.encoder.layers[0].register_forward_pre_hook(lambda *_: calls.append(0))
    batch, results = sequence(), {}
    for how in ("plain", "checkpointing", "bf16"):
        model.encoder.checkpointing = how == "checkpointing"
        model.zero_grad()
        calls.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "bf16"):
            logits, _ = run_sequence(model, batch)
        logits.float().square().mean().backward()
        assert len(calls) == (3 if how == "checkpointing" else 2)  # two frames; the second once more
        results[how] = [logits.detach().float()] + [p.grad.clone() for p in model.parameters() if p.grad is not None]
    for plain, again, rounded in zip(*results.values()):
        torch.testing.assert_close(again, plain)
        assert (rounded - plain).norm() < 0.2 * plain.norm() + 1e-6
    error = (results["bf16"][0] - results["plain"][0]).norm() / results["plain"][0].norm()
    assert 1e-4 < error < 0.05


def test_a_diverged_network_gives_nan_and_no_crash():
    """Training then stops with its own line."""
    maps, nan = torch.randn(2, 3, 4, 2, 5, requires_grad=True), torch.full((6, 2, 3), math.nan, requires_grad=True)
    output = deformable_attention(maps, nan, nan * 1e30, nan, torch.zeros(6, 1, 1, dtype=torch.int32))
    output.sum().backward()
    assert output.isnan().all() and maps.grad.isnan().any()


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-5), (torch.bfloat16, 0.05)))
def test_linear_is_torchs(dtype, tolerance):
    """The 1x1 convolution of float32 and bfloat16, and its gradients; float64 is in the reference vectors."""
    torch.manual_seed(0)
    x, ours = torch.randn(2, 30, 12, dtype=dtype, requires_grad=True), Linear(12, 7).to(dtype)
    results = []
    for function in (ours, lambda x: torch.nn.functional.linear(x, ours.weight, ours.bias)):
        y = function(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), (x, ours.weight, ours.bias))])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, atol=tolerance * b.abs().max().item(), rtol=0)


def test_a_ring_of_cameras_that_sees_no_query():
    """Everything projects below the images: the encoder still runs, and what the cameras show makes no difference."""
    model = random_model(SMALL)
    image, K, ego_T_cam = frame(1, SMALL)
    K[..., 1, 2] = 1e5
    hits = pillars_in_cameras(K, ego_T_cam, SMALL.image_size, SMALL.grid, SMALL.bev_shape, SMALL.heights)
    assert all(len(part) == 0 for part in hits)
    _, bev = model(image, K, ego_T_cam)
    assert torch.equal(bev, model(255 - image, K, ego_T_cam)[1])
    bev.sum().backward()


def test_queries_see_only_what_their_cameras_see():
    """Another picture in the camera that looks ahead, of the same pixels, changes the BEV ahead, and, without BEV
    convolutions, not behind."""
    model = random_model(Config(**{**SMALL.__dict__, "layers": 1}))
    image, K, ego_T_cam = frame(1, SMALL, 3)
    other = image.clone()
    other[:, 0] = image[:, 0].flip(-1, -2)
    with torch.no_grad():
        change = (model(image, K, ego_T_cam)[1] - model(other, K, ego_T_cam)[1]).abs().amax(1)[0]  # (20, 10)
    assert change[:8, 4:6].min() > 1e-4  # rows 0..7 lie 6 m and more ahead
    assert change[10:].max() < 1e-5


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_readmes(name):
    c, readme = PRESETS[name], (HERE.parent / "README.md").read_text()
    millions = sum(p.numel() for p in BEVSegmenter(c).parameters()) / 1e6
    backbone = c.backbone.replace("resnet", "ResNet-") + (", ImageNet" if c.weights else ", no weights")
    row = (f"| `{name}` | {c.image_size[0]} x {c.image_size[1]} | {c.cell} m | {backbone} | {c.bev_shape[0]} x "
           f"{c.bev_shape[1]} | {c.layers} | {c.history} | {millions:.{1 if millions < 10 else 0}f} M |")
    assert row in readme
    assert (c.x_range, c.y_range) == ((-30, 30), (-15, 15))


def test_features_cover_the_padded_image():
    """450 rows at stride 32 are 14.06 feature rows: padded to 480, they are 15, and projections stay in place."""
    tiny = PRESETS["tiny"]
    assert tiny.padded_size == (480, 800) and PRESETS["small"].padded_size == (736, 1280)
    assert PRESETS["toy"].padded_size == PRESETS["toy"].image_size
    odd = random_model(Config(**{**SMALL.__dict__, "image_size": (70, 120)}))
    image, K, ego_T_cam = frame(1, odd.config)
    assert odd.config.padded_size == (80, 128)
    padded = random_model(Config(**{**SMALL.__dict__, "image_size": (80, 128)}))
    # The padding is the mean, 0; it makes the whole image's contrast smaller, and this scale makes up for that.
    image = image - image.mean((1, 3, 4), keepdim=True, dtype=torch.float32)
    std = image.square().mean((1, 3, 4), keepdim=True).sqrt()
    whole = torch.zeros(1, 6, 3, 80, 128)
    whole[..., :70, :120] = image / (1 + std - std * math.sqrt(70 * 120 / (80 * 128)))
    with torch.no_grad():
        torch.testing.assert_close(odd(image, K, ego_T_cam)[0], padded(whole, K, ego_T_cam)[0], atol=1e-4, rtol=0)


def test_images_of_a_frame_are_normalised_together():
    """One camera sees 100, five see 0: mean 100 / 6, deviation 100 sqrt(5) / 6 = 37.27. The other frame is black."""
    model, found = BEVSegmenter(SMALL), []
    model.backbone.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0][:, :, :72].unflatten(0, (2, 6))))
    image, K, ego_T_cam = frame(2, SMALL)
    image[:] = 0
    image[0, 2] = 100
    model(image, K, ego_T_cam)
    assert found[0][0, 2].unique().tolist() == pytest.approx([(100 - 100 / 6) / 38.27], rel=1e-3)
    assert found[0][0, 3].unique().tolist() == pytest.approx([-100 / 6 / 38.27], rel=1e-3) and not found[0][1].any()


def test_exposure_does_not_matter():
    """A frame in half of the light gives the same map; the light of another frame of the batch has no say in it."""
    model = random_model(SMALL)
    image, K, ego_T_cam = frame(2, SMALL)
    dark = image.float() * torch.tensor([0.5, 1.0]).view(2, 1, 1, 1, 1)
    with torch.no_grad():
        bright, dim = (model(x, K, ego_T_cam)[0] for x in (image, dark))
    assert (bright[0] - dim[0]).abs().max() < 0.05 * bright[0].std() and torch.equal(bright[1], dim[1])


def sequence():
    """Two frames of one car that drives 4 m: what run_sequence reads."""
    image, K, ego_T_cam = (t[:, None].expand(-1, 2, *t.shape[1:]).clone() for t in frame(1, SMALL))
    return {"image": image, "K": K, "ego_T_cam": ego_T_cam, "linked": torch.tensor([[False, True]]),
            "world_T_ego": torch.stack((pose(0, 0, 0), pose(4, 0, 0)))[None]}


def test_history_carries_no_gradient_and_is_used():
    model, batch = random_model(SMALL).train(), sequence()
    logits, before = run_sequence(model, batch)
    assert logits.requires_grad and not before.requires_grad
    model.eval()
    with torch.no_grad():
        moved, _ = run_sequence(model, batch)
        batch["world_T_ego"] = torch.stack((pose(0, 0, 0), pose(0, 0, 0)))[None]
        stood, _ = run_sequence(model, batch)
    assert (moved - stood).abs().max() > 1e-4


    batch["linked"][:] = False  # the first frame of another drive: it has no say
    with torch.no_grad():
        alone, _ = model(*(batch[key][:, 1] for key in ("image", "K", "ego_T_cam")))
        torch.testing.assert_close(run_sequence(model, batch)[0], alone, atol=1e-6, rtol=1e-6)


def test_the_last_bev_is_carried_along():
    """6 m on, what was 10.5 m ahead (row 6 of cells of 3 m) is 4.5 m ahead (row 8); `linked` is handed on."""
    model, bev, linked = BEVSegmenter(SMALL), torch.zeros(1, 1, 20, 10), torch.tensor([False])
    model.forward, bev[0, 0, 6, 2] = lambda *inputs: inputs[3:], 1
    now = {"image": 0, "K": 0, "ego_T_cam": 0, "linked": linked, "world_T_ego": pose(6, 0, 0)[None]}
    carried, given = step(model, now, bev, pose(0, 0, 0)[None])
    assert carried[0, 0, 8, 2] > 0.999 and carried.sum() < 1.001 and given is linked


def test_the_map_lies_on_the_ground_of_its_queries():
    """Queries that say where they are: cells of 3 m, made cells of 1 m, say it too (but for the rim)."""
    model, grid = BEVSegmenter(SMALL), SMALL.grid
    model.refine = model.classify = torch.nn.Identity()
    model.encoder.forward = lambda *_: grid.centres(torch.empty(0), SMALL.bev_shape).view(1, 200, 2)
    error = model(*frame(1, SMALL))[0] - grid.centres(torch.empty(0)).permute(2, 0, 1)
    assert error[..., 1:-1, 1:-1].abs().max() < 1e-4


def test_positions_are_columns_then_rows():
    """As BEVFormer's LearnedPositionalEncoding joins them: released weights are used to it."""
    model, found = BEVSegmenter(SMALL), []
    model.encoder.register_forward_pre_hook(lambda _, inputs: found.append(inputs[1].view(20, 10, 16)))
    model(*frame(1, SMALL))
    assert torch.equal(found[0][7, 3], torch.cat((model.column[3], model.row[7])))


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
    optimizer = Optimizer(model)
    for _ in range(40):
        logits, _ = model(image, K, ego_T_cam)
        loss = segmentation_loss(logits, truth, (1.0, 1.0, 1.0, 1.0))
        model.zero_grad()
        loss.backward()
        optimizer.step(3e-3)
    assert iou(count_confusion(logits.argmax(1), truth))["miou"] > 0.9


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
    """Data-set level: cells are summed before they are divided."""
    target = torch.tensor([[1, 1, 1, 0], [2, 2, 0, IGNORE]])
    prediction = torch.tensor([[1, 1, 0, 1], [2, 0, 0, 3]])
    confusion = count_confusion(prediction, target)
    assert confusion.tolist() == [[1, 1, 0, 0], [1, 2, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    score = iou(confusion)
    assert score["iou"] == {"divider": 0.5, "ped_crossing": 0.5, "boundary": None}
    assert score["miou"] == 0.5
    more = count_confusion(torch.tensor([3, 1]), torch.tensor([3, 1]))
    assert iou(confusion + more)["iou"] == {"divider": 3 / 5, "ped_crossing": 0.5, "boundary": 1.0}


def test_learning_rate():
    assert learning_rate(0, 200, 1.0) == pytest.approx(0.1)
    assert learning_rate(10, 200, 1.0) == pytest.approx(1.0)
    assert learning_rate(105, 200, 1.0) == pytest.approx(0.505)
    assert 0.01 < learning_rate(199, 200, 1.0) < 0.011


@pytest.mark.parametrize("name, how", (
    ("backbone.layer2.0.conv1.weight", "muon"), ("encoder.layers.0.ffn.2.weight", "muon"), ("query", "adamw"),
    ("encoder.layers.0.spatial.guide.weight", "adamw"), ("backbone.conv1.weight", "adamw"),
    ("classify.3.weight", "adamw"), ("refine.1.weight", "adamw"), ("image_head.0.weight", "adamw")))
def test_a_step_of_the_optimizer(name, how):
    """Down the gradient: AdamW's first step is its sign, Muon's the nearest orthogonal matrix, here by SVD."""
    torch.manual_seed(0)
    model = BEVSegmenter(Config())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn(p.shape)  # a gradient need not lie in memory as its weight does
    Optimizer(model).step(1e-4)
    after = dict(model.named_parameters())
    assert all((after[name] != before[name]).any() for name in before)
    step = (after[name] - (1 - 0.01 * 1e-4 * (MUON if how == "muon" else 1)) * before[name]).detach()
    if how == "adamw":
        assert torch.allclose(step, -1e-4 * after[name].grad.sign(), atol=1e-6)
    else:
        gradient = after[name].grad.flatten(1)
        U, _, Vh = torch.linalg.svd(gradient, full_matrices=False)
        scale = MUON * 1e-4 * 0.2 * max(gradient.shape) ** 0.5
        values = torch.linalg.svdvals(step.flatten(1)) / scale
        assert 0.6 < values.min() and values.max() < 1.3  # Newton and Schulz come near 1
        assert ((step.flatten(1) * -(U @ Vh)).sum() / step.norm() / (U @ Vh).norm()).item() > 0.95


@pytest.mark.parametrize("layer", (0, 2))
def test_muon_is_torchs(layer):
    """Three steps of one weight beside torch.optim.Muon, which rounds to bfloat16."""
    torch.manual_seed(0)
    model = BEVSegmenter(Config())
    optimizer, weight = Optimizer(model), model.encoder.layers[0].ffn[layer].weight  # (128, 64); (64, 128)
    theirs = torch.nn.Parameter(weight.detach().clone())
    muon = torch.optim.Muon([theirs], lr=MUON * 1e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    before = weight.detach().clone()
    for _ in range(3):
        weight.grad = theirs.grad = torch.randn_like(weight)
        optimizer.step(1e-3)
        muon.step()
    assert (weight - theirs).norm() < 0.03 * (weight - before).norm()
    weight.grad, before = torch.zeros_like(weight), weight.detach().clone()
    Optimizer(model).step(0.1)  # no gradient, no momentum: weights decay
    assert torch.allclose(weight, (1 - 0.01 * MUON * 0.1) * before)


@pytest.mark.parametrize("shape", ((64, 128), (128, 64), (256, 256)))
def test_orthogonal_of_a_nearly_singular_matrix(shape):
    """Singular values from 1 to a millionth, of which the small ones stay small: beside Newton and Schulz's iteration
    on the matrix itself, in float64. The Gram matrix has their squares: rounding errors must not become steps."""
    torch.manual_seed(0)
    U, _, Vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    matrix = (U * torch.logspace(0, -6, min(shape), dtype=torch.float64)) @ Vh
    expected = matrix / matrix.norm()
    for _ in range(5):
        cubic = expected @ expected.T @ expected
        expected = 3.4445 * expected - 4.775 * cubic + 2.0315 * expected @ expected.T @ cubic
    assert torch.linalg.svdvals(expected)[-1] < 1e-3
    assert (orthogonal(matrix.float()) - expected).norm() < 0.01 * expected.norm()


def test_a_backbone_starts_from_torchvisions_weights(monkeypatch, tmp_path):
    """All but their last layer; the others of the network start as without them. A run that goes on fetches nothing."""
    known, fetched = torchvision.models.resnet18().state_dict(), []
    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict",  # no network
                        lambda *_, **__: fetched.append(0) or known)
    config, args = Config(backbone="resnet18", weights="IMAGENET1K_V1"), argparse.Namespace(init="scratch")
    torch.manual_seed(0)
    model = initial_model(args, config, tmp_path / "a.pt")
    torch.manual_seed(0)
    plain = BEVSegmenter(config).state_dict()
    for name, value in model.state_dict().items():
        start = known[name.removeprefix("backbone.")] if name.startswith("backbone.") else plain[name]
        assert torch.equal(value, start), name
    save_pt({"model": plain, "config": asdict(config), "args": vars(args), "step": 1}, tmp_path / "a.pt")
    initial_model(args, config, tmp_path / "a.pt")
    assert len(fetched) == 1


def test_a_backbone_that_has_learnt_keeps_adamw():
    model = BEVSegmenter(Config(weights="IMAGENET1K_V1"))  # not fetched here
    hidden = set(map(id, Optimizer(model).hidden))
    assert not hidden & set(map(id, model.backbone.parameters())) and hidden & set(map(id, model.fpn.parameters()))


def test_batches_are_a_function_of_the_step():
    args = argparse.Namespace(steps=50, batch_size=4, accumulate=1, seed=1)
    whole = batch_samples(10, args, history=2, start=0)
    draws = [draw for batch in whole for draw in batch]
    assert sorted(index for index, _, _ in draws) == sorted(list(range(10)) * 20)  # 200 draws: each sample 20 times
    assert whole[3:] == batch_samples(10, args, history=2, start=3)
    assert 70 < sum(mirrored for _, mirrored, _ in draws) < 130
    assert all(len({back for _, _, back in batch}) == 1 for batch in whole)  # or it could not be stacked
    assert 5 < sum(batch[0][2] == 2 for batch in whole) < 20 and {back for _, _, back in draws} == {0, 2}
    indices = [index for index, _, _ in draws]
    epochs = {tuple(indices[i:i + 10]) for i in range(0, 200, 10)}
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len(epochs) == 20  # 10! orders there are
    args.seed = 2
    assert tuple(index for batch in batch_samples(10, args, 2, 0) for index, _, _ in batch)[:10] not in epochs


def test_ranks_and_parts_share_the_samples_of_a_step(monkeypatch):
    args = argparse.Namespace(steps=3, batch_size=12, accumulate=1, seed=1)
    whole = batch_samples(50, args, history=2, start=0)
    monkeypatch.setattr(reproject, "RANKS", 2)
    args.accumulate = 3
    shares = []
    for rank in range(2):
        monkeypatch.setattr(reproject, "RANK", rank)
        shares.append(batch_samples(50, args, history=2, start=0))
    assert all(len(share) == 3 * 3 and {len(part) for part in share} == {2} for share in shares)
    for step, samples in enumerate(whole):
        given = [sample for share in shares for part in share[3 * step:3 * step + 3] for sample in part]
        assert sorted(given) == sorted(samples)


# ---------------------------------------------------------------- checkpoints

class Pictures(torch.utils.data.Dataset):
    """Four one-frame sequences of random images and maps."""
    samples = [(0, t) for t in range(4)]

    def __len__(self):
        return 4

    def __getitem__(self, sample):
        index = sample[0] if isinstance(sample, tuple) else sample
        image, K, ego_T_cam = frame(1, SMALL, index)
        truth = torch.randint(0, 4, SMALL.grid.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(index))
        return {"image": image, "K": K, "ego_T_cam": ego_T_cam, "linked": torch.tensor([False]), "bev": truth,
                "world_T_ego": pose(0, 0, 0)[None], "token": f"sample {index}"}


def test_attention_starts_in_all_directions():
    """As in Deformable DETR, where the first of four heads looks along +x, the second along +y (down the image). The
    points of one step, a pair here, are at one place, those of the first one where the query projects to."""
    guide = torch.nn.Linear(8, 3 * 4 * 4)
    init_guide(guide, heads=4, levels=1, points=4, group=2)
    x, y, weights = guide(torch.randn(8)).view(3, 4, 4)  # (heads, points) each
    step = torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert torch.allclose(x, torch.stack((step, 0 * step, -step, 0 * step)), atol=1e-6)
    assert torch.allclose(y, torch.stack((0 * step, step, 0 * step, -step)), atol=1e-6) and (weights == 0).all()
    layer = BEVSegmenter(Config()).encoder.layers[0]  # 8 points in space: 4 steps with one for each of 2 heights
    first = layer.spatial.guide(torch.randn(64)).view(3, 4, 2, 4, 2)[0, 0, 0]
    assert torch.allclose(first, torch.arange(4.0)[:, None].expand(4, 2))
    assert layer.temporal.guide(torch.randn(64)).view(3, 4, 2, 4)[0, 0, 0].tolist() == [0, 1, 2, 3]
    assert not layer.temporal.guide_previous.weight.any()  # what was before guides nothing at first


def test_an_empty_split_is_named(tmp_path):
    args = argparse.Namespace(steps=1, batch_size=2, lr=1e-3, seed=0, accumulate=1, workers=0, checkpointing=False)
    with pytest.raises(SystemExit, match="no train scene"):
        fit(BEVSegmenter(SMALL), [], None, args, tmp_path / "x.pt")


@pytest.mark.parametrize("device, processor, gpu, used", (
    ("cpu", {"avx2": True, "avx512_bf16": False, "amx_bf16": False}, True, False),
    ("cpu", {"avx512_bf16": True, "cpu_name": "AMD EPYC"}, False, True),
    ("cpu", {"neon": True, "bf16": True}, False, True),
    ("cpu", {"avx512_bf16": True, "cpu_name": "Intel Xeon"}, True, False),
    ("cpu", {"avx512_bf16": True, "amx_bf16": True, "cpu_name": "Intel Xeon"}, False, True),
    ("cuda:0", {"avx512_bf16": False}, True, True), ("cuda:0", {"avx512_bf16": True}, False, False)))
def test_bfloat16_only_where_it_saves_time(device, processor, gpu, used, monkeypatch, capsys):
    monkeypatch.setattr("reproject.DEVICE", device)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: processor)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: gpu and not including_emulation)
    for asked in (True, False):
        args = argparse.Namespace(steps=1, batch_size=1, accumulate=1, workers=0, seed=0, name="x", bf16=asked, lr=1.0,
                                  image=0.0)
        check_training(args)
        assert args.bf16 == (asked and used)
        assert ("float32 is used" in capsys.readouterr().out) == (asked and not used)


def test_what_processes_cannot_share_is_refused(monkeypatch):
    monkeypatch.setattr("reproject.RANKS", 2)
    args = argparse.Namespace(steps=1, batch_size=3, accumulate=1, workers=0, seed=0, name="x", bf16=False, lr=1.0,
                              image=0.0)
    with pytest.raises(SystemExit, match=r"--batch-size 3 cannot be shared .* the number of processes \(2\)"):
        check_training(args)


def train(path, steps, stop_at=None, bf16=False):
    """fit() on Pictures; stop_at kills it after that many steps, each of which was saved."""
    args = argparse.Namespace(steps=steps, batch_size=2, lr=1e-3, seed=0, accumulate=1, workers=0, bf16=bf16,
                              checkpointing=False, data="labels")
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
    with pytest.raises(SystemExit) as stop:  # finished: says so, does nothing, exit code 0, on any processor
        train(tmp_path / "whole.pt", 6, bf16=True)
    assert stop.value.code == 0 and "finished" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="was made with steps 6, expected 8"):
        train(tmp_path / "whole.pt", 8)
    for key in ("data", "lr", "seed"):
        content = torch.load(tmp_path / "killed.previous.pt", weights_only=True)
        content["args"][key] = "others"
        save_pt(content, tmp_path / "other.pt")
        with pytest.raises(SystemExit, match=f"other.pt was made with {key} others, expected"):
            train(tmp_path / "other.pt", 6)
    content = torch.load(tmp_path / "killed.previous.pt", weights_only=True)
    del content["args"]["optimizer"]  # of the time when it was AdamW alone
    save_pt(content, tmp_path / "older.pt")
    with pytest.raises(SystemExit, match="older.pt was made with optimizer None, expected Muon"):
        train(tmp_path / "older.pt", 6)
    content = torch.load(tmp_path / "killed.previous.pt", weights_only=True)
    content["optimizer"]["muon"].pop()  # as if one more layer were Muon's now
    save_pt(content, tmp_path / "other.pt")
    with pytest.raises(SystemExit, match="other.pt does not fit Optimizer in model.py"):
        train(tmp_path / "other.pt", 6)


def test_steps_follow_the_schedule(tmp_path, monkeypatch):
    """One step of warm-up, then cosines of 0, 60 and 120 degrees: 0.01 + 0.99 * (1, 0.75, 0.25)."""
    rates, take = [], Optimizer.step
    monkeypatch.setattr(Optimizer, "step", lambda self, lr: rates.append(lr) or take(self, lr))
    train(tmp_path / "a.pt", 4)
    assert rates == pytest.approx([1e-3, 1e-3, 7.525e-4, 2.575e-4])


def test_machines_that_do_not_share_a_checkpoint_are_refused(tmp_path, monkeypatch):
    """Of two processes, this one finds a half-done run, and the other, on a machine of its own, finds none."""
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "a.pt", 6, stop_at=2)
    monkeypatch.setattr("model.RANKS", 2)
    monkeypatch.setattr("model.sum_over_ranks", lambda steps: steps + 0)
    with pytest.raises(SystemExit, match="a.pt is not the same on all machines: put --out where all of them see it"):
        train(tmp_path / "a.pt", 6)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    args = argparse.Namespace(steps=9, batch_size=2, lr=1e-3, seed=0, accumulate=1, workers=0, bf16=False,
                              checkpointing=False)
    model, data, losses = BEVSegmenter(SMALL), Pictures(), []

    def loss_fn(batch):
        losses.append(run_sequence(model, batch)[0].square().mean() * (math.nan if len(losses) == 3 else 1))
        return losses[-1], {"loss": losses[-1]}

    samples = ", ".join(f"'sample {index}'" for index, *_ in batch_samples(4, args, 0, 3)[0])
    with pytest.raises(SystemExit, match=rf"step 3 has loss nan, gradient nan, samples \[{samples}\]: use a smaller"):
        fit(model, data, loss_fn, args, tmp_path / "a.pt", minutes=0)
    kept = [load_checkpoint(tmp_path / name, "")[0] for name in ("a.pt", "a.previous.pt")]
    assert [checkpoint["step"] for checkpoint in kept] == [3, 2]
    assert all(value.isfinite().all() for checkpoint in kept for value in checkpoint["model"].values())
    assert kept[0]["curve"] == [{"loss": pytest.approx(loss.item())} for loss in losses[:3]]


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    """The loss is: the root of 0 has an infinite slope."""
    args = argparse.Namespace(steps=9, batch_size=2, lr=1e-3, seed=0, accumulate=1, workers=0, bf16=False,
                              checkpointing=False)
    model, losses = BEVSegmenter(SMALL), []

    def loss_fn(batch):
        logits = run_sequence(model, batch)[0]
        losses.append(logits.square().mean() + ((0 * logits.sum()).sqrt() if len(losses) == 2 else 0))
        return losses[-1], {"loss": losses[-1]}

    with pytest.raises(SystemExit, match=r"step 2 has loss \d.*, gradient nan"):
        fit(model, Pictures(), loss_fn, args, tmp_path / "a.pt", minutes=0)
    assert all(value.isfinite().all() for value in load_checkpoint(tmp_path / "a.pt", "")[0]["model"].values())


def test_checkpoints_are_a_minute_apart(tmp_path, monkeypatch):
    """By a clock that goes on by 25 s a step: after 75 s, after 75 s more, at the end."""
    clock, saves = [0.0], []
    monkeypatch.setattr("model.time", SimpleNamespace(time=lambda: clock[0]))
    monkeypatch.setattr("model.record", lambda *_: None)
    monkeypatch.setattr("model.draw_sample", lambda *_: None)
    monkeypatch.setattr("model.save_checkpoint", lambda *given: saves.append(len(given[3])))
    args = argparse.Namespace(steps=8, batch_size=2, lr=1e-3, seed=0, accumulate=1, workers=0, bf16=True,
                              checkpointing=True)
    model = BEVSegmenter(SMALL)

    def loss_fn(batch):
        clock[0] += 25
        assert model.encoder.checkpointing and torch.is_autocast_enabled("cpu")  # as the flags ask for
        loss = run_sequence(model, batch)[0].float().square().mean()
        return loss, {"loss": loss}

    fit(model, Pictures(), loss_fn, args, tmp_path / "a.pt")
    assert saves == [3, 6, 8]


def test_gradients_are_clipped(tmp_path, monkeypatch):
    norms, model = [], BEVSegmenter(SMALL)
    monkeypatch.setattr("model.Optimizer.step", lambda self, lr: norms.append(
        torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()))
    args = argparse.Namespace(steps=2, batch_size=2, lr=1e-3, seed=0, accumulate=1, workers=0, bf16=False,
                              checkpointing=False)

    def loss_fn(batch):
        loss = 1e4 * segmentation_loss(run_sequence(model, batch)[0], batch["bev"], (1.0,) * 4)
        return loss, {"loss": loss}

    fit(model, Pictures(), loss_fn, args, tmp_path / "a.pt")
    assert norms == pytest.approx([5.0, 5.0], rel=1e-3)


def test_the_curve_has_the_mean_of_the_parts_of_a_step(tmp_path):
    args = argparse.Namespace(steps=2, batch_size=4, lr=1e-3, seed=0, accumulate=2, workers=0, bf16=False,
                              checkpointing=False)
    model, losses, progress = BEVSegmenter(SMALL), [], []

    def loss_fn(batch):
        progress.append(batch["progress"])
        losses.append(run_sequence(model, batch)[0].square().mean() * (1 + len(losses)))
        return losses[-1], {"loss": losses[-1]}

    fit(model, Pictures(), loss_fn, args, tmp_path / "a.pt")
    curve = load_checkpoint(tmp_path / "a.pt", "")[0]["curve"]
    assert curve == [{"loss": pytest.approx((losses[i] + losses[i + 1]).item() / 2)} for i in (0, 2)]
    assert losses[0] != losses[1] and progress == [0, 0, 0.5, 0.5]  # what the temporal loss is weighed by


def test_checkpoints_of_another_kind_are_refused(tmp_path):
    train(tmp_path / "a.pt", 1)
    _, model = load_checkpoint(tmp_path / "a.pt", "", SMALL)
    assert model.config == SMALL
    with pytest.raises(SystemExit, match="a.pt was made with .*, expected .*: run 03"):
        load_checkpoint(tmp_path / "a.pt", "run 03", PRESETS["toy"])
    with pytest.raises(SystemExit, match="missing: run 03"):
        load_checkpoint(tmp_path / "b.pt", "run 03")
    save_pt({"meta": 1}, tmp_path / "c.pt")
    with pytest.raises(SystemExit, match="is no checkpoint"):
        load_checkpoint(tmp_path / "c.pt", "run 03")
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    save_pt({key: value for key, value in content.items() if key != "step"}, tmp_path / "e.pt")
    with pytest.raises(SystemExit, match="is no checkpoint"):
        load_checkpoint(tmp_path / "e.pt", "run 03")
    save_pt(content | {"config": content["config"] | {"stages": (2, 9)}}, tmp_path / "f.pt")
    with pytest.raises(SystemExit, match="f.pt does not fit Config in model.py"):
        load_checkpoint(tmp_path / "f.pt", "run 03")
    content["model"]["query"] = torch.zeros(3, 3)
    save_pt(content, tmp_path / "d.pt")
    with pytest.raises(SystemExit, match="does not fit model.py: size mismatch for query"):
        load_checkpoint(tmp_path / "d.pt", "run 03")


def test_a_mistake_while_a_picture_is_drawn_is_no_full_disk(tmp_path, monkeypatch):
    """Only what goes wrong with the file itself may be called "cannot be written"."""
    stage = importlib.import_module("05_eval")

    def lost(*_):
        raise FileNotFoundError("a font")

    monkeypatch.setattr(stage, "predict", lambda *_: iter([(0, {}, None)]))
    monkeypatch.setattr(stage, "contact_sheet", lost)
    with pytest.raises(FileNotFoundError, match="a font"):
        draw_sample(BEVSegmenter(PRESETS["toy"]), None, tmp_path / "x.pt", 1)
    assert not list(tmp_path.iterdir())
