"""On a GPU all is as on the CPU, to its precision. The other tests do without one (conftest.py), so ask for it:

    CUDA_VISIBLE_DEVICES=0 python -m pytest -q tests/test_gpu.py
"""
import io
import json
import os

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_model import SMALL, frame, random_model
from test_pipeline import run

from reproject import deformable_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and to be run by itself")


def test_operators_and_network():
    """Deformable attention and its gradients, and the whole network, on both devices."""
    torch.manual_seed(0)
    places = [torch.rand(50, 2, 3) * 12 - 2 for _ in range(3)]
    leaves = [torch.randn(4, 7, 9, 2, 5), *places]
    source = torch.randint(0, 4, (50, 1, 1), dtype=torch.int32)
    results = []
    for device in ("cpu", "cuda"):
        on_device = [t.to(device).requires_grad_() for t in leaves]
        output = deformable_attention(*on_device, source.to(device))
        results.append([output.cpu(), *(g.cpu() for g in torch.autograd.grad(output.square().sum(), on_device))])
    for cpu, gpu in zip(*results):
        torch.testing.assert_close(gpu, cpu, atol=1e-4, rtol=1e-4)
    model, inputs = random_model(SMALL), frame(1, SMALL)
    with torch.no_grad():
        cpu, gpu = model(*inputs)[1], model.cuda()(*(t.cuda() for t in inputs))[1]
    torch.testing.assert_close(gpu.cpu(), cpu, atol=1e-2, rtol=1e-2)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """The five stages on a world of two scenes, on the GPU and on the CPU. Returns the two folders."""
    folders = {device: tmp_path_factory.mktemp(device) for device in ("gpu", "cpu")}
    run("tests/toyworld.py", "--train-scenes", 1, "--val-scenes", 1, "--frames", 3, cwd=folders["gpu"])
    (folders["cpu"] / "data").symlink_to(folders["gpu"] / "data")
    for device, cwd in folders.items():
        where = {"cwd": cwd, "CUDA_VISIBLE_DEVICES": os.environ["CUDA_VISIBLE_DEVICES"] if device == "gpu" else ""}
        run("01_pseudolabel.py", "--segmenter", ROOT / "tests/toy_segmenter", **where)
        if device == "cpu":  # a bfloat16 segmenter differs here and there: from here on, the same labels
            (cwd / "out/frames").rename(cwd / "out/frames_of_cpu")
            (cwd / "out/frames").symlink_to(folders["gpu"] / "out/frames")
        run("02_bev_gt.py", **where)
        run("03_pretrain.py", "--steps", 4, **where)
        run("04_finetune.py", "--steps", 4, "--labels", 1, "--bf16", "--workers", 2, **where)
        # The same weights on both.
        run("05_eval.py", "--checkpoint", folders["gpu"] / "out/pretrain.pt", "--split", "train", **where)
    return folders


def test_labels(worlds):
    """The segmenter computes in bfloat16 on a GPU: all but few pixels have the same label."""
    for path in (worlds["gpu"] / "out/frames").iterdir():
        gpu, cpu = (torch.load(p, weights_only=True) for p in (path, worlds["cpu"] / "out/frames_of_cpu" / path.name))
        for a, b in zip(gpu["label"], cpu["label"]):
            one, other = (np.stack([Image.open(io.BytesIO(x.numpy())) for x in pictures]) for pictures in (a, b))
            assert (one == other).mean() > 0.98


@pytest.mark.parametrize("name, tolerance", (("pretrain", 0.02), ("finetune", 0.1)))
def test_losses(worlds, name, tolerance):
    """The losses of the first step are the same; those after it, nearly: Adam's first steps enlarge rounding."""
    gpu, cpu = (torch.load(worlds[device] / f"out/{name}.pt", weights_only=True) for device in ("gpu", "cpu"))
    for step, (a, b) in enumerate(zip(gpu["curve"], cpu["curve"])):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=1e-3 if (name, step) == ("pretrain", 0) else tolerance), key


def test_scores(worlds):
    gpu, cpu = (json.loads((worlds[device] / "out/eval/metrics.json").read_text()) for device in ("gpu", "cpu"))
    assert gpu["miou"] == pytest.approx(cpu["miou"], abs=2e-3)
