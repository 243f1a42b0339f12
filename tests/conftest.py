"""Tests run from the repository root, with the top-level modules importable, and on the CPU, where what two processes
compute can be the same bit by bit; test_gpu.py says how to run it on a GPU."""
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not any("test_gpu" in word for word in sys.argv):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a cluster's scheduler may have set it
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def pytest_configure(config):
    """pytest resets the warning filter of reproject.py."""
    config.addinivalue_line("filterwarnings", "ignore:Sparse CSR tensor support is in beta")


@cache
def nursery():
    """The one nursery.py of this test run."""
    return subprocess.Popen([sys.executable, ROOT / "tests/nursery.py"], text=True, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE)


def run_script(script, *words, cwd=ROOT, seconds=300, **environment):
    """Run a script of the repository as a process of its own, or kill -9 it after that many seconds. Returns a
    subprocess.CompletedProcess with its output."""
    words = [str(ROOT / script), *map(str, words)]
    if sys.platform != "linux":  # elsewhere a process is not to be forked after such imports
        try:
            return subprocess.run([sys.executable, *words], cwd=cwd, env=os.environ | environment, text=True,
                                  capture_output=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(words, -9, "", "")
    with tempfile.TemporaryDirectory() as folder:
        out, err = (Path(folder) / name for name in ("out", "err"))
        order = {"words": words, "cwd": str(cwd), "seconds": seconds, "environment": environment, "out": str(out),
                 "err": str(err)}
        process = nursery()
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        code = int(process.stdout.readline())
        return subprocess.CompletedProcess(words, code, out.read_text(), err.read_text())
