"""Self-supervised training of the glance's backbone: two views of a picture get one code, without any label.

The code keeps its spread (variance) and says nothing twice (covariance), so that it cannot become one and the same for
every picture. Both views are mirrored alike: which side is which must stay visible.
Shapes: B pictures, P side of a view, C channels, Z width of the code.
Source: VICReg (arXiv 2105.04906).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoders.resnet import WIDTHS, ResNet18D
from pipelines.inputs import MEAN, STD
from pipelines.training.augment import Augmentation, photometric, sample
from pipelines.training.encoders import fit
from pipelines.training.run import Run
from pipelines.training.streams import Stream, load_streams


class Coder(nn.Module):
    """A backbone, and the projection of its mean features to the code, which only training needs."""

    def __init__(self, last_stage: int, code: int) -> None:
        super().__init__()
        self.backbone = ResNet18D((*WIDTHS[:3], last_stage))
        layers: list[nn.Module] = []
        for inputs in (last_stage, code):
            layers += [nn.Linear(inputs, code), nn.BatchNorm1d(code), nn.ReLU()]
        self.projection = nn.Sequential(*layers, nn.Linear(code, code))

    def forward(self, x_B3PP: Tensor) -> Tensor:
        code_BZ: Tensor = self.projection(self.backbone(x_B3PP)[-1].mean((2, 3)))
        return code_BZ


def _crops(
    stream: Stream, index_B: Tensor, mirror_B: Tensor, side: int, share: tuple[float, float], how: Augmentation
) -> Tensor:
    """One view a picture, `[B, 3, P, P]`: a turned crop whose sides are that share of the picture's longest."""
    n, device = len(index_B), index_B.device
    size = stream.sizes[index_B]
    low, high = math.log(share[0]), math.log(share[1])
    shown = torch.exp(torch.rand(n, device=device) * (high - low) + low)
    aspect = torch.exp(torch.randn(n, device=device) * how.aspect / 2)
    extent = torch.stack((shown * aspect, shown / aspect), 1).clamp(max=1.1) * size.amax(1, keepdim=True)
    slack = torch.where(size > extent, (size - extent) / 2, 0.1 * size)
    centre = size / 2 + (torch.rand(n, 2, device=device) * 2 - 1) * slack
    angle = torch.deg2rad((torch.rand(n, device=device) * 2 - 1) * how.rotate)
    cos, sin = angle.cos(), angle.sin()
    turn = torch.stack((torch.stack((cos, -sin), 1), torch.stack((sin, cos), 1)), 1)
    axis = torch.linspace(-0.5, 0.5, side, device=device)
    yy, xx = torch.meshgrid(axis, axis, indexing="ij")
    points = (
        torch.stack((xx, yy), -1).reshape(1, -1, 2) * torch.stack((mirror_B, torch.ones_like(mirror_B)), 1)[:, None]
    )
    canvas = ((points @ turn) * extent[:, None] + centre[:, None]).reshape(n, side, side, 2)
    x = photometric((sample(stream.pictures[index_B][:, :1], size, canvas) - MEAN) / STD, how)
    return torch.cat((x, x, torch.zeros_like(x)), 1)


def draw_pairs(streams: list[tuple[Stream, int]], side: int, views: dict[str, Any]) -> Tensor:
    """`[2 B, 3, P, P]`: the first views of all pictures, then the second ones in the same order."""
    share = tuple(views["share"])
    how = Augmentation(**{key: value for key, value in views.items() if key != "share"})
    pairs = []
    for stream, n in streams:
        index = torch.randint(len(stream), (n,), device=stream.pictures.device)
        mirror = (torch.rand(n, device=index.device) < 0.5).float() * 2 - 1
        pairs.append([_crops(stream, index, mirror, side, share, how) for _ in range(2)])
    views_B3PP = torch.cat([view for turn in zip(*pairs, strict=True) for view in turn])
    return views_B3PP.contiguous(memory_format=torch.channels_last)


def code_losses(code_BZ: Tensor) -> dict[str, Tensor]:
    """Of codes of `draw_pairs`: how far the two of a picture are apart, too little spread, and what is said twice."""
    first, second = code_BZ.float().chunk(2)

    def said_twice(z: Tensor) -> Tensor:
        z = z - z.mean(0)
        covariance = z.T @ z / (len(z) - 1)
        return (covariance.square().sum() - covariance.diagonal().square().sum()) / z.shape[1]

    spread = [F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() for z in (first, second)]
    return {
        "invariance": F.mse_loss(first, second),
        "variance": (spread[0] + spread[1]) / 2,
        "covariance": said_twice(first) + said_twice(second),
    }


def train_backbone(run: Run, data: Path, device: torch.device) -> ResNet18D:
    """Runs the recipe `pretrain` and returns the averaged backbone. Raises as `train_glance` does."""
    recipe = run.recipe
    torch.manual_seed(recipe["seed"])
    known = {stream.name: stream for stream in load_streams(data, "train")}
    shares = {name: table["batch"] for name, table in recipe["streams"].items() if table["batch"] > 0}
    if missing := sorted(set(shares) - set(known)):
        raise ValueError(f"the recipe names data sets that are not there: {', '.join(missing)}")
    streams = [(known[name].to(device), n) for name, n in shares.items()]

    def losses(network: Coder, views_B3PP: Tensor) -> dict[str, Tensor]:
        code_BZ = network(views_B3PP)
        with torch.autocast(device.type, enabled=False):  # a covariance in bfloat16 is noise
            parts = code_losses(code_BZ)
        return {name: loss * recipe["loss"][name] for name, loss in parts.items()}

    def draw(_late: bool) -> Tensor:
        return draw_pairs(streams, recipe["side"], recipe["views"])

    network = Coder(recipe["last_stage"], recipe["code"]).to(device).to(memory_format=torch.channels_last)
    return fit(run, draw, network.train(), losses, device).backbone
