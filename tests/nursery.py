"""Runs scripts for conftest.run_script: a process that has imported the packages, which takes seconds, and then forks
off a script's process in no time. Each has its own exit code and output, as if started from a shell.

Reads a line of JSON a script from stdin: words (the script and its arguments), cwd, environment (additions), out and
err (files), seconds (after which it is killed). Writes its exit code to stdout; one script at a time.
"""
import gc
import json
import os
import runpy
import signal
import sys

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's library starts its threads when it is imported
import matplotlib.figure
import nuscenes.nuscenes
import torch
import torchvision
import transformers.models.mask2former.modeling_mask2former

assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot be forked"
gc.freeze()  # or each fork would tidy up all that was imported before it ends
for line in sys.stdin:
    order = json.loads(line)
    pid = os.fork()
    if not pid:
        break
    signal.signal(signal.SIGALRM, lambda *_: os.kill(pid, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, order["seconds"])
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(code, flush=True)
else:
    os._exit(0)

# From here on, this is the script's process.
for number, name in enumerate((os.devnull, order["out"], order["err"])):
    os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
os.chdir(order["cwd"])
os.environ.update(order["environment"])
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
sys.argv, sys.path[0] = order["words"], os.path.dirname(order["words"][0])
runpy.run_path(sys.argv[0], run_name="__main__")
