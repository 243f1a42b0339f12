"""BEVFormer as the public package vis4d 1.0.0 has it: an independent implementation to test and to measure against.

It is no dependency of this project. Where it is installed, `python tests/peer.py` writes tests/reference_vectors.pt
anew, and bench_speed.py compares with it. Its axes are those of the official code: LiDAR frame (x right, y ahead), BEV
row 0 at the rear, heights linspace(0.5, top - bottom - 0.5) above the bottom of `pc_range`.

    pip install --no-deps vis4d==1.0.0
    pip install --no-deps absl-py ml_collections opencv-python-headless pyyaml contextlib2 six termcolor
    python tests/peer.py
"""
import argparse
import importlib.machinery
import sys
import types
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from rig import camera, intrinsics

EGO_T_LIDAR = torch.tensor([[0.0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])  # both as if on the ground


def build(c):
    """vis4d's BEVFormerEncoder, without dropout, for a `config` as in reference_vectors.pt."""
    stub = types.ModuleType("vis4d_cuda_ops")  # asked for at import; the CPU path does without
    stub.__spec__ = importlib.machinery.ModuleSpec("vis4d_cuda_ops", None)
    stub.ms_deform_attn_forward = stub.ms_deform_attn_backward = None
    sys.modules["vis4d_cuda_ops"] = stub
    from vis4d.op.detect3d.bevformer.encoder import BEVFormerEncoder, BEVFormerEncoderLayer
    from vis4d.op.detect3d.bevformer.spatial_cross_attention import MSDeformableAttention3D, SpatialCrossAttention
    from vis4d.op.detect3d.bevformer.temporal_self_attention import TemporalSelfAttention
    C, M = c["embed_dims"], c["num_heads"]
    spatial = MSDeformableAttention3D(C, M, c["num_levels"], c["num_points_sca"])
    layer = BEVFormerEncoderLayer(C, TemporalSelfAttention(C, M, 1, c["num_points_tsa"]),
                                  SpatialCrossAttention(C, c["num_cams"], deformable_attention=spatial), c["ffn_dims"])
    return BEVFormerEncoder(c["num_layers"], layer, C, c["num_points_in_pillar"], c["pc_range"]).eval()


def forward(encoder, c, inputs, history):
    """Its output (B, bev_h * bev_w, C) for `inputs` as in reference_vectors.pt, K and lidar_T_cam being (B, N, ..)."""
    K, lidar_T_cam, feats = inputs["K"], inputs["lidar_T_cam"], inputs["feats"]  # feats: (B, N, C, h, w) a level
    B, sizes = len(K), torch.tensor([f.shape[-2:] for f in feats], device=K.device)
    values = torch.cat([f.flatten(3).permute(1, 3, 0, 2) for f in feats], 1)  # (N, pixels of all levels, B, C)
    starts = torch.cat((sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]))
    shift = inputs["shift_xy"] if history else torch.zeros(B, 2).to(K)
    return encoder(inputs["bev_query"], values, c["bev_h"], c["bev_w"], inputs["bev_pos"], sizes, starts,
                   inputs["prev_bev"] if history else None, shift, c["img_hw"], list(K[0]),  # one K for all samples
                   list(lidar_T_cam.unbind(1)), torch.eye(4).to(K).expand(B, 4, 4))


def random_inputs(c, feature_sizes, dtype=torch.float32):
    """A ring of cameras and random features, queries and history for one sample."""
    Q, C, N, (h, w) = c["bev_h"] * c["bev_w"], c["embed_dims"], c["num_cams"], c["img_hw"]
    ego_T_cam = torch.stack([camera(360 * n / N, 5.0, x=0.5, y=0.2 * n, dtype=dtype) for n in range(N)])
    return {"bev_query": torch.randn(Q, 1, C, dtype=dtype), "bev_pos": torch.randn(Q, 1, C, dtype=dtype),
            "prev_bev": torch.randn(Q, 1, C, dtype=dtype), "shift_xy": torch.tensor([[0.04, -0.07]], dtype=dtype),
            "feats": [torch.randn(1, N, C, *size, dtype=dtype) for size in feature_sizes],
            "K": intrinsics(0.6 * w, w / 2, h / 2, dtype).repeat(N, 1, 1),
            "lidar_T_cam": EGO_T_LIDAR.to(dtype).T @ ego_T_cam}


def random_operator(c, feature_sizes, B=2, Q=7):
    """Deformable attention alone: inputs, output and gradients."""
    M, L, P, D = c["num_heads"], len(feature_sizes), c["num_points_tsa"], c["embed_dims"] // c["num_heads"]
    value = torch.randn(B, sum(h * w for h, w in feature_sizes), M, D)
    locations, weights = torch.rand(B, Q, M, L, P, 2) * 1.4 - 0.2, torch.rand(B, Q, M, L, P)
    grad_out = torch.randn(B, Q, M * D)
    from vis4d.op.layer.ms_deform_attn import ms_deformable_attention_cpu
    leaves = [t.double().requires_grad_() for t in (value, locations, weights)]
    output = ms_deformable_attention_cpu(leaves[0], torch.tensor(feature_sizes), leaves[1], leaves[2])
    grads = torch.autograd.grad(output, leaves, grad_out.double())
    return {"value": value, "spatial_shapes": feature_sizes, "locations": locations, "weights": weights,
            "grad_out": grad_out, "output": output.detach(), "grad_value": grads[0], "grad_locations": grads[1],
            "grad_weights": grads[2]}


def make_vectors(c, feature_sizes, seed):
    """A dict as in reference_vectors.pt: float32 inputs, and what vis4d makes of them in float64."""
    torch.manual_seed(seed)
    encoder, inputs = build(c), random_inputs(c, feature_sizes)
    for parameter in encoder.parameters():  # so that no parameter is left out by being zero or equal in all layers
        torch.nn.init.normal_(parameter, std=0.3)
    state = {f"encoder.{key}": value.clone() for key, value in encoder.state_dict().items()}
    exact = {k: [f.double() for f in v] if k == "feats" else v.double() for k, v in inputs.items()}
    exact |= {k: exact[k][None] for k in ("K", "lidar_T_cam")}
    torch.set_default_dtype(torch.float64)  # vis4d makes some of its matrices in the default type
    with torch.no_grad():
        outputs = {name: forward(encoder.double(), c, exact, history)
                   for name, history in (("without_history", False), ("with_history", True))}
    torch.set_default_dtype(torch.float32)
    return {"config": c, "state_dict": state, "inputs": inputs, "outputs": outputs,
            "operator": random_operator(c, feature_sizes)}


def to_float32(tree):
    """The same nest of dicts and lists with float32 tensors."""
    if isinstance(tree, dict):
        return {key: to_float32(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [to_float32(value) for value in tree]
    return tree.detach().float().clone() if isinstance(tree, torch.Tensor) and tree.is_floating_point() else tree


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write reference vectors of the BEVFormer encoder, made with vis4d.")
    parser.add_argument("--path", default=Path(__file__).parent / "reference_vectors.pt", help="the file")
    args = parser.parse_args()
    config = {"embed_dims": 18, "num_heads": 3, "num_levels": 3, "bev_h": 6, "bev_w": 5, "num_cams": 3, "num_layers": 2,
              "num_points_sca": 4, "num_points_tsa": 3, "num_points_in_pillar": 2, "img_hw": (70, 102), "ffn_dims": 12,
              "pc_range": (-9.0, -12.0, -2.0, 11.0, 16.0, 1.5)}
    torch.save(to_float32(make_vectors(config, [(7, 11), (4, 5), (2, 3)], seed=0)), args.path)
