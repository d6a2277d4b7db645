"""The vision encoder: equal to timm where it stands in for it, and its evidence selected as torchvision would."""

from __future__ import annotations

import pytest
import torch

from encoders import EncoderConfig, EvidenceEncoder
from encoders.evidence import decode_boxes
from encoders.resnet import ResNet18D
from encoders.select import box_iou, select_boxes, select_regions

CONFIG = EncoderConfig(box_types=4, map_types=3, fields={"line": 4, "region": 5})


@pytest.fixture(scope="module")
def encoder() -> EvidenceEncoder:
    torch.manual_seed(0)
    made = EvidenceEncoder(CONFIG)
    with torch.no_grad():
        for name, buffer in made.named_buffers():  # batch norms that have seen data
            if name.endswith("running_mean"):
                buffer.normal_(std=0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
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


def test_an_encoder_trained_through_timm_loads_without_it() -> None:
    through = EvidenceEncoder(CONFIG, via_timm=True)
    assert EvidenceEncoder(CONFIG).load_state_dict(through.state_dict()).missing_keys == []


def test_folding_batch_norms_changes_nothing(encoder: EvidenceEncoder) -> None:
    x = torch.randn(2, 3, 64, 96)
    before = encoder(x)
    folded = EvidenceEncoder(CONFIG)
    folded.load_state_dict(encoder.state_dict())
    after = folded.fuse()(x)
    assert before.types_BAT is not None and after.types_BAT is not None
    torch.testing.assert_close(after.types_BAT, before.types_BAT, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(after.maps_BTHW, before.maps_BTHW, atol=1e-3, rtol=1e-3)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())


def test_shapes_follow_the_input(encoder: EvidenceEncoder) -> None:
    output = encoder(torch.randn(3, 3, 64, 96), boxes=2)
    points = 8 * 12 + 4 * 6 + 2 * 3
    assert output.visual_BND.shape == (3, 6, 512)
    assert output.maps_BTHW.shape == (3, 3, 2, 3)
    assert output.types_BAT is not None and output.types_BAT.shape == (2, points, 4)
    assert encoder(torch.randn(1, 3, 64, 64), boxes=False).types_BAT is None


def test_distances_around_a_point_make_its_box() -> None:
    distances = torch.full((1, 1, 4, 16), -50.0)
    for side, distance in enumerate((1, 2, 3, 4)):
        distances[0, 0, side, distance] = 50
    box = decode_boxes(distances, torch.tensor([[40.0, 60.0]]), torch.tensor([8.0]))
    torch.testing.assert_close(box[0, 0], torch.tensor([32.0, 44.0, 64.0, 92.0]))


def test_selection_is_torchvisions_suppression(encoder: EvidenceEncoder) -> None:
    torchvision = pytest.importorskip("torchvision")
    with torch.inference_mode():
        output = encoder(torch.randn(1, 3, 128, 128))
    assert output.types_BAT is not None and output.distances_BA4R is not None
    assert output.points_A2 is not None and output.strides_A is not None
    items = select_boxes(output, keep=50, overlap=0.6, candidates=300, threshold=0.0)
    scores, flat = output.types_BAT[0].sigmoid().flatten().topk(300)
    boxes = decode_boxes(output.distances_BA4R, output.points_A2, output.strides_A)[0][flat // 4]
    kept = torchvision.ops.batched_nms(boxes, scores, flat % 4, 0.6)[:50]
    count = int((items.scores[0] > 0).sum())
    assert count == len(kept)
    torch.testing.assert_close(items.boxes[0, :count], boxes[kept])
    assert items.types[0, :count].tolist() == (flat % 4)[kept].tolist()


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
