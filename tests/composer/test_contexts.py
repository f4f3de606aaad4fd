"""The running mean against a loop over positions."""

from __future__ import annotations

import pytest
import torch

from composer.routing.contexts import running_mean, token
from composer.routing.state import RouterState


def _loop(features: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One position after the other: the mean of the real tokens so far, without the row's first one."""
    means, counts = torch.zeros_like(features), torch.ones(features.shape[:2])
    for row in range(features.shape[0]):
        met: list[torch.Tensor] = []
        for t in range(features.shape[1]):
            if mask[row, t]:
                met.append(features[row, t])
            used = met[1:] or met[:1]
            if mask[row, t]:
                means[row, t] = torch.stack(used).mean(0)
                counts[row, t] = len(used)
    return means, counts


def _features(batch: int = 3, length: int = 9) -> torch.Tensor:
    return torch.randn(batch, length, 5, generator=torch.Generator().manual_seed(0))


def _state(batch: int = 3) -> RouterState:
    return RouterState(composition="x", allowed=torch.ones(batch, 2, dtype=torch.bool))


MASKS = {
    "nothing padded": torch.ones(3, 9, dtype=torch.bool),
    "padded left": torch.arange(9) >= torch.tensor([[0], [4], [8]]),
    "padded right": torch.arange(9) < torch.tensor([[9], [5], [1]]),
}


@pytest.mark.parametrize("name", MASKS)
def test_means_and_counts(name: str) -> None:
    mask, features = MASKS[name], _features()
    features[~mask] = float("nan")  # padding may hold anything
    given = None if mask.all() else mask
    means, counts = running_mean(features, layer=0, token_mask=given, state=None)
    expected, expected_counts = _loop(features, mask)
    torch.testing.assert_close(means[mask], expected[mask])
    assert torch.equal(counts[mask], expected_counts[mask])


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("cuts", [(4,), (1, 2), (3, 4, 5, 8)])
def test_any_split_into_cached_pieces_gives_the_same(name: str, cuts: tuple[int, ...]) -> None:
    mask, features, state = MASKS[name], _features(), _state()
    whole, counts = running_mean(features, layer=7, token_mask=mask, state=None)
    pieces = [
        running_mean(part, layer=7, token_mask=part_mask, state=state)
        for part, part_mask in zip(
            torch.tensor_split(features, list(cuts), dim=1),
            torch.tensor_split(mask, list(cuts), dim=1),
            strict=True,
        )
    ]
    torch.testing.assert_close(torch.cat([means for means, _ in pieces], 1)[mask], whole[mask])
    assert torch.equal(torch.cat([n for _, n in pieces], 1)[mask], counts[mask])


def test_layers_keep_apart_in_one_state() -> None:
    features, state = _features(), _state()
    running_mean(features * 100, layer=1, token_mask=None, state=state)
    running_mean(features[:, :4], layer=2, token_mask=None, state=state)
    means, _ = running_mean(features[:, 4:], layer=2, token_mask=None, state=state)
    expected, _ = _loop(features, MASKS["nothing padded"])
    torch.testing.assert_close(means, expected[:, 4:])


def test_low_precision_is_summed_in_float32() -> None:
    """Bfloat16 stops counting at 256: the mean of many equal values must stay that value."""
    features = torch.full((1, 2000, 2), 1.0, dtype=torch.bfloat16)
    means, counts = running_mean(features, layer=0, token_mask=None, state=None)
    assert means.dtype == torch.float32
    assert torch.equal(means, torch.ones(1, 2000, 2))
    assert counts[0, -1] == 1999


def test_token_context_is_the_token() -> None:
    features = _features()
    same, counts = token(features)
    assert same is features
    assert counts is None
