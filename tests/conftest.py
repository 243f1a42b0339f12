"""Tests run from the repository root, with the top-level modules importable, and on the CPU, where what two processes
compute can be the same bit by bit; test_gpu.py says how to run it on a GPU."""
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def pytest_configure(config):
    """pytest resets the warning filter of reproject.py."""
    config.addinivalue_line("filterwarnings", "ignore:Sparse CSR tensor support is in beta")
