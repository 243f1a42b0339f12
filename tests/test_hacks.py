"""The README's "Things to try": each diff is applied to a copy of the scripts, as it stands there, and run."""
import re
import shutil

import pytest
from conftest import ROOT, run_script

SECTION = (ROOT / "README.md").read_text().partition("## Things to try")[2].partition("\n## ")[0]
HACKS = dict(re.findall(r"\*\*(.+?)\*\*.*?```diff\n(.*?)```", SECTION, re.S))

RUNS = {  # what is run in the copy after the change, and must hold there
    "Another backbone.": """
import torch
from model import PRESETS, BEVSegmenter
from rig import surround
model = BEVSegmenter(PRESETS["toy"]).eval()
assert [len(model.backbone[f"layer{k}"]) for k in (1, 2, 3)] == [3, 4, 6]  # a ResNet-34
logits, _ = model(torch.randint(0, 256, (1, 6, 3, 144, 256), dtype=torch.uint8), *surround())
logits.sum().backward()
assert logits.shape == (1, 4, 200, 100) and model.backbone.conv1.weight.grad.any()
""",
    "Another camera rig to train on": """
import importlib, torch
from model import PRESETS, BEVSegmenter
from reproject import mirror
from rig import surround
K, ego_T_cam = surround(yaws=(0, -55, 55, 110, -110))
item = {"image": torch.arange(5).byte().view(1, 5, 1, 1, 1).expand(1, 5, 3, 144, 256), "K": K, "ego_T_cam": ego_T_cam,
        "label": torch.zeros(5, 144, 256), "world_T_ego": torch.eye(4)[None]}
assert mirror(item)["image"][0, :, 0, 0, 0].tolist() == [0, 2, 1, 4, 3]  # left and right exchanged, front kept
logits, _ = BEVSegmenter(PRESETS["toy"]).eval()(item["image"], K, ego_T_cam)
frame = {"image": item["image"], "K": K, "ego_T_cam": ego_T_cam, "label": item["label"][None].byte(),
         "bev": torch.zeros(1, 200, 100, dtype=torch.uint8)}
importlib.import_module("05_eval").contact_sheet(frame, logits.detach(), PRESETS["toy"].grid)
""",
    "Another segmenter": """
import importlib
stage = importlib.import_module("01_pseudolabel")
names = ["Road", "Sidewalk", "Curb", "Lane Marking - Dashed Line", "Lane Marking - Crosswalk", "Sky"]
groups = [list(stage.GROUPS)[row.argmax()] for row in stage.group_labels(names)]
assert groups == ["carriageway", "verge", "kerb", "divider", "ped_crossing", "not ground"]
""",
    "Another class": """
import importlib, json, torch
from model import PRESETS, BEVSegmenter, count_confusion, image_loss, iou, segmentation_loss
from reproject import CLASS_WEIGHTS, Grid
stage = importlib.import_module("02_bev_gt")
square = [(0, 0), (2, 0), (2, 1), (0, 1)]  # m: from the car 2 m ahead, 1 m to the left
table = {"version": "1.3", "node": [{"token": str(i), "x": x, "y": y} for i, (x, y) in enumerate(square)],
         "line": [], "polygon": [{"token": "p", "exterior_node_tokens": list("0123"), "holes": []}],
         "stop_line": [{"polygon_token": "p"}],
         **{layer: [] for layer in ("ped_crossing", "road_segment", "lane", "lane_divider", "road_divider")}}
open("map.json", "w").write(json.dumps(table))
bev = stage.rasterise(stage.read_map("map.json"), torch.eye(4).double(), Grid((-2, 3), (-2, 2), 1.0), 0.5)
assert bev.tolist() == [[0, 0, 0, 0], [0, 4, 0, 0], [0, 4, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
truth = torch.from_numpy(bev)[None]
assert "stop_line" in iou(count_confusion(truth, truth))["iou"]
assert BEVSegmenter(PRESETS["toy"]).classify[-1].out_channels == 5
segmentation_loss(torch.zeros(1, 5, 5, 4), truth, CLASS_WEIGHTS)
assert importlib.import_module("05_eval").paint(truth[0])[1, 1].tolist() == [230, 159, 0]
""",
    "A height per cell.": """
import torch
from reproject import Grid, render
from rig import camera, intrinsics
grid = Grid((-20.0, 20.0), (-10.0, 10.0), 0.5)
ahead = grid.centres(torch.empty(0))[None, None, ..., 0]  # (1, 1, H, W): each cell says how far ahead it is
height = torch.full_like(ahead, 0.5, requires_grad=True)
image, valid = render(ahead, intrinsics()[None, None], camera()[None, None], (144, 256), grid, height=height)
# A level camera 1.5 m up, focal length 200, horizon at 72: row 99 is 27.5 below it, so 200 * (1.5 - 0.5) / 27.5 ahead.
assert valid[0, 0, 99, 128] and abs(image[0, 0, 0, 99, 128].item() - 200 / 27.5) < 1e-3
image[0, 0, 0, 99, 128].backward()
assert height.grad.sum() < 0  # higher ground is met nearer
"""}


def apply(diff, folder):
    """Make the changes of a README diff: a file's name, then its hunks, parted by @@, each found once in the file."""
    for name, hunks in re.findall(r"^(\w+\.py)\n((?:[-+ @].*\n)+)", diff, re.M):
        text = (folder / name).read_text()
        for hunk in hunks.split("@@\n"):
            lines = hunk.splitlines()
            old, new = ("\n".join(line[1:] for line in lines if line[0] in (" ", sign)) for sign in "-+")
            assert text.count(old) == 1, f"{name} has changed, README's diff does not apply any more: {old}"
            text = text.replace(old, new)
        (folder / name).write_text(text)


def test_all_things_to_try_are_tried():
    assert set(HACKS) == set(RUNS)
    assert all(sum(line.startswith("+") for line in diff.splitlines()) < 10 for diff in HACKS.values())


@pytest.mark.parametrize("name", RUNS)
def test_thing_to_try(name, tmp_path):
    for path in (*ROOT.glob("*.py"), ROOT / "tests/rig.py"):
        shutil.copy(path, tmp_path)
    apply(HACKS[name], tmp_path)
    (tmp_path / "try.py").write_text(RUNS[name])
    done = run_script(tmp_path / "try.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
