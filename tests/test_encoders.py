"""The vision encoder: equal to timm where it stands in for it, and its evidence selected as torchvision would."""

from __future__ import annotations

import pytest
import torch

from encoders import Dense, Detector, DetectorConfig, GlanceConfig, GlanceNet
from encoders.detector import decode_boxes
from encoders.flips import look_from_all_sides
from encoders.resnet import ResNet18D
from encoders.select import box_iou, select_boxes, select_regions

GLANCE = GlanceConfig(map_types=3, fields={"line": 4, "region": 5})


def worn(network: torch.nn.Module) -> None:
    """Batch norms that have seen data."""
    with torch.no_grad():
        for name, buffer in network.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)


@pytest.fixture(scope="module")
def detector() -> Detector:
    torch.manual_seed(0)
    made = Detector(DetectorConfig(types=4))
    worn(made)
    with torch.no_grad():
        made.boxes.types.bias.fill_(0)
    return made.eval()


def test_resnet_is_timms_resnet18d() -> None:
    timm = pytest.importorskip("timm")
    ours = ResNet18D().eval()
    theirs = timm.create_model("resnet18d", features_only=True, out_indices=(2, 3, 4)).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 96, 128)
    for a, b in zip(ours(x), theirs(x), strict=True):
        torch.testing.assert_close(a, b)


def test_a_glance_trained_through_timm_loads_without_it() -> None:
    through = GlanceNet(GLANCE, via_timm=True)
    assert GlanceNet(GLANCE).load_state_dict(through.state_dict()).missing_keys == []


def test_folding_batch_norms_changes_nothing(detector: Detector) -> None:
    x = torch.randn(2, 3, 64, 96)
    folded = Detector(detector.config)
    folded.load_state_dict(detector.state_dict())
    for before, after in zip(detector(x), folded.fuse()(x), strict=True):
        torch.testing.assert_close(after, before, atol=1e-3, rtol=1e-3)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    glance = GlanceNet(GLANCE)
    worn(glance)
    before_maps = glance.eval()(x).maps_BTHW
    torch.testing.assert_close(glance.fuse()(x).maps_BTHW, before_maps, atol=1e-3, rtol=1e-3)


def test_shapes_follow_the_input(detector: Detector) -> None:
    x = torch.randn(3, 3, 64, 96)
    points = 8 * 12 + 4 * 6 + 2 * 3
    dense = detector(x)
    assert dense.types_BAT.shape == (3, points, 4) and dense.distances_BA4R.shape == (3, points, 4, 16)
    assert dense.presence_BT.shape == (3, 4)
    output = GlanceNet(GLANCE).eval()(x)
    assert output.visual_BNC.shape == (3, 6, 512) and output.maps_BTHW.shape == (3, 3, 2, 3)
    assert [f.shape[-1] for f in output.features] == [12, 6, 3]


def test_all_sides_of_a_picture_give_what_all_sides_of_its_mirror_image_give(detector: Detector) -> None:
    x = torch.randn(1, 3, 64, 96)
    one, other = look_from_all_sides([detector], x), look_from_all_sides([detector], x.flip(3))
    torch.testing.assert_close(one.presence_BT, other.presence_BT)
    here, there = (select_boxes(dense, keep=5).boxes[0] for dense in (one, other))
    there = torch.stack((96 - there[:, 2], there[:, 1], 96 - there[:, 0], there[:, 3]), 1)
    torch.testing.assert_close(here, there, atol=1e-2, rtol=1e-3)


def test_what_two_detectors_see_from_all_sides_is_averaged(detector: Detector) -> None:
    torch.manual_seed(3)
    x, other = torch.randn(1, 3, 64, 64), Detector(detector.config).eval()
    one, two = (look_from_all_sides([network], x) for network in (detector, other))
    both = look_from_all_sides([detector, other], x)
    for part in ("types_BAT", "presence_BT"):
        mean = (getattr(one, part).sigmoid() + getattr(two, part).sigmoid()) / 2
        torch.testing.assert_close(getattr(both, part).sigmoid(), mean)
    mean = (one.distances_BA4R.exp() + two.distances_BA4R.exp()) / 2
    torch.testing.assert_close(both.distances_BA4R.exp(), mean)


def test_distances_around_a_point_make_its_box() -> None:
    distances = torch.full((1, 1, 4, 16), -50.0)
    for side, distance in enumerate((1, 2, 3, 4)):
        distances[0, 0, side, distance] = 50
    box = decode_boxes(distances, torch.tensor([[40.0, 60.0]]), torch.tensor([8.0]))
    torch.testing.assert_close(box[0, 0], torch.tensor([32.0, 44.0, 64.0, 92.0]))


def test_selection_is_torchvisions_suppression(detector: Detector) -> None:
    torchvision = pytest.importorskip("torchvision")
    with torch.inference_mode():
        dense = detector(torch.randn(1, 3, 128, 128))
    items = select_boxes(dense, presence=0.0, keep=50, overlap=0.6, candidates=300, threshold=0.0)
    scores, flat = dense.types_BAT[0].sigmoid().flatten().topk(300)
    types, boxes = flat % 4, decode_boxes(dense.distances_BA4R, dense.points_A2, dense.strides_A)[0][flat // 4]
    kept = torchvision.ops.batched_nms(boxes, scores, types, 0.6)[:50]
    count = int((items.scores[0] > 0).sum())
    assert count == len(kept)
    assert items.types[0, :count].tolist() == types[kept].tolist()
    torch.testing.assert_close(items.scores[0, :count], scores[kept])
    # A kept box is the mean of those that it stands for.
    first = kept[0]
    iou = torchvision.ops.box_iou(boxes[first][None], boxes)[0] * (types == types[first])
    weight = iou.square() * scores * (iou > 0.6)
    torch.testing.assert_close(items.boxes[0, 0], (weight @ boxes) / weight.sum(), atol=1e-3, rtol=1e-4)


def test_a_box_of_a_type_that_the_picture_does_not_show_counts_less() -> None:
    sides = torch.full((1, 2, 4, 16), -50.0)
    sides[..., 2] = 50.0
    points, strides = torch.tensor([[40.0, 40.0], [200.0, 40.0]]), torch.full((2,), 8.0)
    types = torch.tensor([[[2.0, -9.0], [-9.0, 2.0]]])
    items = select_boxes(Dense(types, sides, points, strides, torch.tensor([[-3.0, 3.0]])), presence=0.5)
    assert items.types[0, :2].tolist() == [1, 0]
    expected = (torch.tensor([2.0, 3.0]).sigmoid().prod().sqrt(), torch.tensor([2.0, -3.0]).sigmoid().prod().sqrt())
    torch.testing.assert_close(items.scores[0, :2], torch.stack(expected))


def test_iou_of_known_boxes() -> None:
    a = torch.tensor([[0.0, 0, 10, 10]])
    b = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30]])
    torch.testing.assert_close(box_iou(a, b), torch.tensor([[1.0, 1 / 3, 0.0]]))


def test_region_surrounds_the_hot_part_of_its_map() -> None:
    maps = torch.zeros(1, 3, 8, 8) - 5
    maps[0, 1, 2:4, 5:7] = 40
    items = select_regions(maps, (256, 256), keep=3)
    assert items.types[0, 0] == 1
    x0, y0, x1, y1 = items.boxes[0, 0].tolist()
    assert 140 <= x0 <= 170 and 200 <= x1 <= 240
    assert 48 <= y0 <= 72 and 110 <= y1 <= 144
