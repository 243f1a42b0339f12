"""Stage 05's pictures and tables against hand-made ones."""
import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rig import surround

from model import REMEMBERED, Config, count_confusion, iou, remember
from reproject import CLASSES, IGNORE, cells_in_cameras

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


def test_cameras_are_laid_out_as_one_looks_around():
    """Of a key frame, with a ground truth or without: from left to right, ahead above behind. Each camera shows its
    number in CAMERAS; nothing is predicted but background, which is not painted over."""
    images = torch.arange(6, dtype=torch.uint8).view(1, 6, 1, 1, 1).expand(1, 6, 3, 144, 256)
    K = torch.tensor([[200.0, 0, 128], [0, 200, 72], [0, 0, 1]]).expand(1, 6, 3, 3)
    frame = {"image": images, "K": K, "ego_T_cam": torch.eye(4).expand(1, 6, 4, 4),  # they look up
             "label": torch.zeros(1, 6, 144, 256, dtype=torch.uint8)}
    logits, grid = torch.zeros(1, 4, 200, 100), Config().grid
    names = [stage.CAMERAS[n] for n in (2, 0, 1, 4, 3, 5)]
    assert names == ["CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT"]
    for bev in ({}, {"bev": torch.zeros(1, 200, 100, dtype=torch.uint8)}):
        sheet = stage.contact_sheet(frame | bev, logits, grid)
        places = [(256 * column + 128, 24 + 144 * row + 72) for row in (0, 1) for column in (0, 1, 2)]
        assert [sheet.getpixel(place)[0] for place in places] == [2, 0, 1, 4, 3, 5]


def test_each_error_map_shows_its_own_class():
    """Truth: divider in the upper half; prediction: boundary in the left half. Five maps of 288 x 576 pixels stand to
    the right of the cameras, errors from the third on; their quarters, clockwise from the upper left one."""
    (K, ego_T_cam), logits, truth = surround(), torch.zeros(1, 4, 200, 100), torch.zeros(1, 200, 100).byte()
    truth[:, :100], logits[:, 3, :, :50] = 1, 9
    frame = {"image": torch.zeros(1, 6, 3, 144, 256).byte(), "label": torch.zeros(1, 6, 144, 256).byte()}
    sheet = stage.contact_sheet(frame | {"K": K, "ego_T_cam": ego_T_cam, "bev": truth}, logits, Config().grid)
    (_, missed, false), none = stage.ERRORS.values(), stage.GROUND
    for number, expected in ((2, [missed, missed, none, none]), (3, 4 * [none]), (4, [false, none, none, false])):
        left = 776 + 296 * number
        corners = ((left + x, 24 + y) for x, y in ((60, 120), (220, 120), (220, 460), (60, 460)))
        assert [sheet.getpixel(place) for place in corners] == expected


def test_each_camera_shows_its_own_labels_and_prediction():
    """The map is divider left of the car, and CAM_FRONT_LEFT (number 2) is labelled boundary: over the middle of the
    tiles of cameras 2, 0 and 1, as far down as the ground. A quarter of the image shows through."""
    (K, ego_T_cam), logits = surround(), torch.zeros(1, 4, 200, 100)
    logits[:, 1, :, :50], label = 9, torch.zeros(1, 6, 144, 256, dtype=torch.uint8)
    label[0, 2] = 3
    images = torch.arange(6, dtype=torch.uint8).view(1, 6, 1, 1, 1).expand(1, 6, 3, 144, 256)
    sheet = stage.contact_sheet({"image": images, "K": K, "ego_T_cam": ego_T_cam, "label": label,
                                 "bev": torch.zeros(1, 200, 100, dtype=torch.uint8)}, logits, Config().grid)

    def red(block, tile, v):  # titles are 24 pixels high, the rows of a block 144 each
        return sheet.getpixel((256 * tile + 128, 24 + 312 * block + v))[0]

    assert [red(0, tile, 110) for tile in range(3)] == [160, 0, 1]  # 0.75 * 213 + 0.25 * 2
    assert red(1, 0, 110) == 180 and red(1, 2, 110) == 1 and red(1, 0, 20) == 2  # 0.75 * 240 + 0.5; the sky


def test_a_sheet_shows_its_key_frame_with_the_memory_that_is_scored(monkeypatch):
    bev, asked = torch.zeros(1, 200, 100, dtype=torch.uint8), []
    found = [(4, {"bev": bev}, certain()), (5, {"bev": bev}, certain([(93, 39)]))]
    monkeypatch.setattr(stage, "predict", lambda *args: asked.append(args[3:]) or iter(found))
    monkeypatch.setattr(stage, "contact_sheet", lambda frame, logits, *rest: (logits, rest))
    frames = SimpleNamespace(samples=[(0, 0)] * 4 + [(1, 0), (1, 1)], scenes=[{}, {"scene": "b"}])
    logits, (_, title, place) = stage.draw_sheet(frames, None, Config(), 5, "x", "none")
    assert asked == [((1,), "none")] and logits is found[1][2]
    assert title == "x, mIoU 0.00" and place == ", b, key frame 1"


def drive(metres, linked=True):
    """A key frame of a car that looks along the world's y axis and has gone so far along it."""
    pose = torch.tensor([[0.0, -1, 0, 700], [1, 0, 0, 400 + metres], [0, 0, 1, 0], [0, 0, 0, 1]]).double()
    return {"world_T_ego": pose[None], "linked": torch.tensor([linked])}


def certain(cells=()):
    """Logits of a map that is background but for the cells (row, column) of a crossing, as good as certain of both."""
    logits = torch.zeros(1, 4, 200, 100)
    logits[:, 0] = 30
    for row, column in cells:
        logits[0, :, row, column] = torch.tensor([0.0, 0, 30, 0])
    return logits


def test_memory_keeps_what_was_seen_from_near_by():
    """A crossing 1.95 m ahead and 3.15 m to the left of the car (row 93, column 39 of cells of 0.3 m) that it no longer
    sees when it has gone 6 m or 18 m on. By hand: a frame's word for ground at a distance of d metres has the weight
    1 / (1 + (d / 10)^8), and the distances are 3.705, 5.131 and 16.356 m."""
    grid = Config().grid
    for metres, row, share in ((6, 113, 0.99965 / (0.99965 + 0.99522)), (18, 153, 0.99965 / (0.99965 + 0.01915))):
        past = []
        alone = remember(past, certain([(93, 39)]), drive(0), grid).exp()
        assert alone[0, 2, 93, 39] > 0.999 and (alone[0, 2] > 0.01).sum() == 1
        both = remember(past, certain(), drive(metres), grid).exp()
        assert abs(both[0, 2, row, 39].item() - share) < 1e-4 and (both[0, 2] > 0.01).sum() == 1
        torch.testing.assert_close(both.sum(1), torch.ones(1, 200, 100), atol=1e-4, rtol=0)
    past = []
    remember(past, certain([(46, 49)]), drive(0), grid)
    assert remember(past, certain(), drive(12), grid).exp()[0, 2, 86, 49] < 0.03  # near by, there was nothing


def test_memory_turns_with_the_car():
    """What was 1.95 m ahead and 3.15 m to the left is 3.15 m ahead and 1.95 m to the right after a quarter turn to the
    left on the spot: row 89, column 56."""
    turned, past, grid = drive(0), [], Config().grid
    turned["world_T_ego"][0, :2, :2] = -torch.eye(2)  # from the world's y axis to where x is negative
    remember(past, certain([(93, 39)]), drive(0), grid)
    both = remember(past, certain(), turned, grid).exp()
    assert abs(both[0, 2, 89, 56].item() - 0.5) < 1e-4 and (both[0, 2] > 0.01).sum() == 1


def test_pseudo_labels_that_are_hidden_now_are_not_forgotten():
    """A car that stands, with cameras all around: first they see dividers everywhere, then twice nothing but what hides
    the ground. Where they have seen nothing at all, under the car, there is background."""
    K, ego_T_cam = surround()
    frames = [drive(0) | {"image": torch.zeros(1), "K": K, "ego_T_cam": ego_T_cam,
                          "label": torch.full((6, 144, 256), label, dtype=torch.uint8)}
              for label in (1, IGNORE, IGNORE)]
    frames = type("Frames", (list,), {"samples": [(0, t) for t in range(3)]})(frames)
    *_, (_, _, logits) = stage.predict(frames, None, Config(), [0])
    answer = logits.argmax(1)
    seen = cells_in_cameras(K, ego_T_cam, (144, 256), Config().grid)[1].any(1)  # (1, H, W)
    assert (answer[seen] == 1).all() and 0.5 < seen.float().mean() < 1
    assert not answer[0, 95:105, 45:55].any()  # less than 2.5 m from the middle


def test_memory_ends_with_the_drive_and_after_five_seconds():
    grid, past = Config().grid, []
    remember(past, certain([(93, 39)]), drive(0), grid)
    for still in range(REMEMBERED - 1):
        share = remember(past, certain(), drive(0), grid).exp()[0, 2, 93, 39].item()
        assert abs(share - 1 / (still + 2)) < 1e-3
    assert remember(past, certain(), drive(0), grid).exp()[0, 2, 93, 39] < 1e-3 and len(past) == REMEMBERED
    past = []
    remember(past, certain([(93, 39)]), drive(0), grid)
    assert remember(past, certain(), drive(0, linked=False), grid).exp()[0, 2, 93, 39] < 1e-3 and len(past) == 1


def test_what_is_handed_on_from_frame_to_frame(monkeypatch):
    """A network that sees a crossing in the first of two frames: of what has it a memory in the second one?"""
    first, second = drive(0, linked=False), drive(6)
    frames = [{"image": torch.zeros(1), "K": torch.zeros(1), "ego_T_cam": torch.zeros(1), "linked": frame["linked"],
               "world_T_ego": frame["world_T_ego"]} for frame in (first, second)]
    frames = type("Frames", (list,), {"samples": [(0, 0), (0, 1)]})(frames)
    maps, asked = [certain([(93, 39)]), certain()], []
    monkeypatch.setattr(stage, "step", lambda _, frame, bev, pose: (maps[len(asked)], asked.append(bev) or "features"))
    for memory, given, share in (("none", None, 0), ("bev", "features", 0), ("map", None, 0.501)):
        asked.clear()
        *_, (index, _, logits) = stage.predict(frames, "network", Config(), [0], memory)
        assert index == 1 and asked == [None, given]
        assert abs(logits.softmax(1)[0, 2, 113, 39].item() - share) < 1e-3
    poses = []  # features are carried from where the car was
    monkeypatch.setattr(stage, "step", lambda _, frame, bev, pose: (certain(), poses.append(pose) or "features"))
    list(stage.predict(frames, "network", Config(), [0], "bev"))
    assert poses[0] is None and torch.equal(poses[1], first["world_T_ego"])


def test_error_map_says_what_was_missed_and_what_is_false():
    """A divider that was taken for a boundary is one divider less and one boundary too many."""
    truth = torch.tensor([[0, 1, 1], [2, 0, IGNORE]], dtype=torch.uint8)
    prediction = torch.tensor([[0, 1, 3], [0, 2, 1]])
    (hit, missed, false), none, ignored = stage.ERRORS.values(), stage.GROUND, stage.IGNORED
    for number, expected in ((1, [[none, hit, missed], [none, none, ignored]]),
                             (2, [[none, none, none], [missed, false, ignored]]),
                             (3, [[none, none, false], [none, none, ignored]])):
        found = stage.error_map(prediction, truth, number).tolist()
        assert found == [[list(colour) for colour in row] for row in expected]


def test_classes_have_their_colours():
    colours = stage.paint(torch.tensor([[0, 1, 2, 3, IGNORE]])).tolist()
    assert colours == [[list(c) for c in (stage.GROUND, *(stage.COLOURS[name] for name in CLASSES[1:]), stage.IGNORED)]]


def test_confusion_has_the_truth_in_its_rows():
    truth = torch.tensor([[1, 1, 1, 2, 0, IGNORE]], dtype=torch.uint8)
    confusion = count_confusion(torch.tensor([[1, 1, 3, 0, 0, 2]]), truth)
    assert confusion.tolist() == [[1, 0, 0, 0], [0, 2, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]
    axes, = stage.draw_confusion(confusion, "").axes
    assert axes.images[0].get_array()[1].tolist() == pytest.approx([0, 2 / 3, 0, 1 / 3])
    assert [text.get_text() for text in axes.texts[4:8]] == ["0.00", "0.67", "0.00", "0.33"]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(CLASSES)


def test_the_car_lies_where_it_is():
    """On a map of 10 m to the rear, 50 m ahead, 15 m to both sides, drawn 400 pixels high, 28 to the right, 24 down."""
    grid = Config(x_range=(-10.0, 50.0)).grid
    page = stage.page_of({"": torch.zeros(10, 20, 3).byte()}, {"": torch.zeros(200, 100, 3).byte()}, {}, grid)
    white = torch.from_numpy(np.array(page))[24:424, 28:228].eq(255).all(-1).nonzero().float()  # (pixels, 2)
    assert (white.mean(0) - torch.tensor([400 * 50 / 60 + 2, 100])).abs().max() < 2 and 80 < len(white) < 160


def test_counts_go_to_the_right_ring_range_condition_and_frame(monkeypatch):
    """Two divider cells by day, one 3 m ahead of the car that is found, one 14 m to the left that is not; and on a
    rainy night one boundary cell 11 m behind that is found."""
    config = Config()
    truth = torch.zeros(2, *config.grid.shape, dtype=torch.uint8)
    truth[0, (89, 99), (49, 3)] = 1  # cells of 0.3 m; the first one lies 30 m ahead and 15 m to the left
    truth[1, 136, 49] = 3
    logits = torch.nn.functional.one_hot(truth.long(), 4).permute(0, 3, 1, 2).float()
    logits[0, :, 99, 3] = torch.tensor([1.0, 0, 0, 0])
    drive = [(i, {"bev": truth[i:i + 1]}, logits[i:i + 1]) for i in (0, 1)]
    monkeypatch.setattr(stage, "predict", lambda *_: drive)
    scenes = [{"description": "Behind a train"}, {"description": "Night, rain"}]
    frames = type("Frames", (list,), {"scenes": scenes, "samples": [(0, 0), (1, 0)]})([None] * 2)
    confusion, by_ring, quality = stage.evaluate(frames, None, config)
    assert (by_ring[:, 1].sum(1) > 0).nonzero().flatten().tolist() == [1, 5]  # 2.5 to 5 m, 12.5 to 15 m
    scores = {key: iou(counts)["iou"] for key, counts in confusion.items()}
    assert [scores[key]["divider"] for key in ("0-10", "10-20", "20-30", "all")] == [1, 0, None, 0.5]
    assert [scores[key]["boundary"] for key in ("0-10", "10-20", "20-30", "all")] == [None, 1, None, 1]
    assert [scores[key]["divider"] for key in ("day", "night", "rain")] == [0.5, None, None]
    assert [scores[key]["boundary"] for key in ("day", "night", "rain")] == [None, 1, 1]
    assert quality.tolist() == [0.5, 1]
    line = stage.draw_distance(by_ring, "").axes[0].lines[0]
    assert line.get_xdata().tolist() == [3.75, 13.75] and line.get_ydata().tolist() == [1, 0]
