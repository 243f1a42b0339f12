"""Stage 05's pictures and tables against hand-made ones."""
import importlib

import torch

from model import Config, count_confusion, iou
from reproject import IGNORE

stage = importlib.import_module("05_eval")


def test_pictures_go_from_best_to_worst():
    quality = torch.tensor([0.5, 0.9, 0.1, 0.7, 0.3])
    assert stage.from_best_to_worst(quality, 3) == [1, 0, 2]
    assert stage.from_best_to_worst(quality, 1) == [0]
    assert stage.from_best_to_worst(quality, 5) == [1, 3, 0, 4, 2]
    assert stage.from_best_to_worst(quality, 0) == []


def test_an_empty_frame_is_right_and_a_missed_one_wrong():
    empty, divider = torch.zeros(2, 2, dtype=torch.uint8), torch.ones(2, 2, dtype=torch.uint8)
    assert stage.quality_of(count_confusion(empty, empty)) == 1
    assert stage.quality_of(count_confusion(empty, divider)) == 0


def test_error_map_says_what_was_missed_and_what_is_false():
    truth = torch.tensor([[0, 1, 1], [2, 0, IGNORE]], dtype=torch.uint8)
    prediction = torch.tensor([[0, 1, 3], [0, 2, 1]])
    hit, missed, false = stage.ERRORS.values()
    expected = [[stage.GROUND, hit, missed], [missed, false, stage.IGNORED]]
    assert stage.error_map(prediction, truth).tolist() == [[list(colour) for colour in row] for row in expected]


def test_confusion_has_the_truth_in_its_rows(capsys):
    truth = torch.tensor([[1, 1, 1, 2, 0, IGNORE]], dtype=torch.uint8)
    confusion = count_confusion(torch.tensor([[1, 1, 3, 0, 0, 2]]), truth)
    assert confusion.tolist() == [[1, 0, 0, 0], [0, 2, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]
    stage.print_confusion(confusion)
    divider, = (line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("divider "))
    assert divider.split()[1:] == ["0.000", "0.667", "0.000", "0.333"]


def test_the_curve_shows_each_cell_at_its_distance(monkeypatch):
    """Two divider cells, one 3 m ahead of the car that is found, one 14 m to the left that is not."""
    config = Config()
    truth = torch.zeros(1, *config.grid.shape, dtype=torch.uint8)
    truth[0, (89, 99), (49, 3)] = 1  # cells of 0.3 m; the first one lies 30 m ahead and 15 m to the left
    logits = torch.nn.functional.one_hot(truth.long(), 4).permute(0, 3, 1, 2).float()
    logits[0, :, 99, 3] = torch.tensor([1.0, 0, 0, 0])
    monkeypatch.setattr(stage, "predict", lambda *_: [(0, {"bev": truth}, logits)])
    frames = type("Frames", (list,), {"scenes": [{"description": "a drive"}], "samples": [(0, 0)]})([None])
    confusion, by_ring, _ = stage.evaluate(frames, None, config)
    assert (by_ring[:, 1].sum(1) > 0).nonzero().flatten().tolist() == [1, 5]  # 2.5 to 5 m, 12.5 to 15 m
    assert iou(confusion["0-10"])["iou"]["divider"] == 1 and iou(confusion["10-20"])["iou"]["divider"] == 0
    line = stage.draw_distance(by_ring, "").axes[0].lines[0]
    assert line.get_xdata().tolist() == [3.75, 13.75] and line.get_ydata().tolist() == [1, 0]
