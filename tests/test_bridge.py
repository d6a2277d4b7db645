"""The bridge and its controls: what they give the decoder, what they cost, and what learns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bridge import BRIDGES, Bridge, BridgeConfig

CONFIG = BridgeConfig(visual_width=24, width=48, vocabulary=10, queries=5, heads=3)
GIVEN = {"align": 5, "align-all": 12, "mlp": 12, "mlp-queries": 5, "unshuffle": 4}  # of a grid of 3 x 4


@pytest.mark.parametrize("name", BRIDGES)
def test_every_registered_bridge_costs_and_gives_what_it_says(name: str) -> None:
    config = replace(CONFIG, name=name)
    bridge, table = Bridge(config).requires_grad_(False), torch.randn(10, 48)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        read = bridge(torch.randn(2, 12, 24), table, grid=(3, 4))
    assert read.shape == (2, GIVEN[name], 48)
    assert config.given(3, 4) == GIVEN[name]
    assert config.parameters == sum(weight.numel() for weight in bridge.parameters())
    assert config.flops(3, 4) * 2 == counter.get_total_flops()


@pytest.mark.parametrize("name", [name for name, design in BRIDGES.items() if design.into == "align"])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.floats(1e-3, 1e3))
def test_aligned_tokens_are_convex_combinations_of_embeddings(name: str, seed: int, size: float) -> None:
    torch.manual_seed(seed)
    table = torch.eye(10, 48)  # with these rows a token's coordinates are its weights
    read = Bridge(replace(CONFIG, name=name))(torch.randn(2, 16, 24) * size, table)
    assert read[..., 10:].abs().max() == 0
    assert read.min() >= 0
    torch.testing.assert_close(read.sum(-1), torch.ones(read.shape[:2]))


@pytest.mark.parametrize("name", BRIDGES)
def test_every_weight_learns(name: str) -> None:
    torch.manual_seed(0)
    bridge, table = Bridge(replace(CONFIG, name=name)), torch.randn(10, 48, requires_grad=True)
    bridge(torch.randn(2, 16, 24), table).square().sum().backward()
    still = [key for key, weight in bridge.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert not still
    assert (table.grad is not None) == (BRIDGES[name].into == "align")


@pytest.mark.parametrize("name", BRIDGES)
def test_where_a_token_stands_matters(name: str) -> None:
    torch.manual_seed(0)
    bridge, visual, table = Bridge(replace(CONFIG, name=name)), torch.randn(1, 12, 24), torch.randn(10, 48)
    there, turned = bridge(visual, table, grid=(3, 4)), bridge(visual, table, grid=(4, 3))
    assert there.shape != turned.shape or not torch.allclose(there, turned, atol=1e-4)
    moved = bridge(visual.roll(4, 1), table, grid=(3, 4))
    assert not torch.allclose(there.sum(1), moved.sum(1), atol=1e-4)


def test_unshuffled_tokens_hold_their_square_and_nothing_else() -> None:
    torch.manual_seed(0)
    bridge, visual = Bridge(replace(CONFIG, name="unshuffle")), torch.randn(1, 12, 24)
    changed = visual.clone()
    changed[0, 2 * 4 + 1] += 1  # row 2, column 1: the lower left of four squares
    moved = (bridge(visual, torch.randn(10, 48), (3, 4)) != bridge(changed, torch.randn(10, 48), (3, 4))).any(-1)
    assert moved.tolist() == [[False, False, True, False]]


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"no bridge 'perceiver'; choose from: align, align-all, mlp"):
        replace(CONFIG, name="perceiver")
    with pytest.raises(ValueError, match="heads that divide the width"):
        replace(CONFIG, heads=5)
    with pytest.raises(ValueError, match=r"12 visual tokens are not a square grid: give grid=\(rows, columns\)"):
        Bridge(CONFIG)(torch.randn(1, 12, 24), torch.randn(10, 48))
    with pytest.raises(ValueError, match="not a grid of 5 x 3"):
        Bridge(CONFIG)(torch.randn(1, 12, 24), torch.randn(10, 48), (5, 3))
