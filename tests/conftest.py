"""Tests run from the repository root, with the top-level modules importable."""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def pytest_configure(config):
    """pytest resets the warning filter of reproject.py."""
    config.addinivalue_line("filterwarnings", "ignore:Sparse CSR tensor support is in beta")
