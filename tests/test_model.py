"""The network: BEVFormer against an independent implementation, batches against single runs, loss and score by hand."""
import math
import os
from pathlib import Path

import pytest
import torch

from model import (PRESETS, BEVSegmenter, Config, Encoder, batch_indices, count_overlap, deformable_attention, iou,
                   learning_rate, segmentation_loss)
from reproject import IGNORE

VECTORS = Path(os.environ.get("REFERENCE_VECTORS", Path(__file__).parents[2] / "shared/golden/bevformer_encoder.pt"))


def from_official(state, heads, points):
    """Official BEVFormer encoder parameters -> our names and axes (their grid has row 0 at the rear)."""
    names = {"attentions.0.sampling_offsets": "temporal.offsets", "attentions.0.attention_weights": "temporal.weights",
             "attentions.0.value_proj": "temporal.value", "attentions.0.output_proj": "temporal.output",
             "attentions.1.deformable_attention.sampling_offsets": "spatial.offsets",
             "attentions.1.deformable_attention.attention_weights": "spatial.weights",
             "attentions.1.deformable_attention.value_proj": "spatial.value", "attentions.1.output_proj": "spatial.output",
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
