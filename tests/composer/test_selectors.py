"""Top-k selection against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from composer.routing.selectors.topk import TopK

_logits = st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=6)


@settings(max_examples=80, deadline=None)
@given(logits=_logits, k=st.integers(1, 8), normalize=st.booleans())
def test_softmax_then_the_k_largest(logits: list[float], k: int, normalize: bool) -> None:
    positions, weights = TopK(top_k=k, normalize=normalize)(torch.tensor([logits]))
    exponentials = [math.exp(x - max(logits)) for x in logits]
    shares = [e / sum(exponentials) for e in exponentials]
    chosen = positions[0].tolist()
    assert len(chosen) == min(k, len(logits)) == len(set(chosen))
    kept = [shares[i] for i in chosen]
    assert min(kept) >= max([s for i, s in enumerate(shares) if i not in chosen], default=0.0) - 1e-6
    expected = [s / sum(kept) for s in kept] if normalize else kept
    assert weights[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_equal_logits_go_to_the_lower_id_whatever_stands_beside_them() -> None:
    for columns in range(3, 40):
        positions, _ = TopK(top_k=3)(torch.zeros(5, columns))
        assert positions.tolist() == [[0, 1, 2]] * 5


def test_normalised_top_k_is_a_softmax_over_the_chosen_logits() -> None:
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    positions, weights = TopK(top_k=3)(logits)
    torch.testing.assert_close(weights, logits.gather(1, positions).softmax(-1))


def test_bfloat16_logits_are_weighted_in_float32() -> None:
    _, weights = TopK(top_k=2)(torch.randn(4, 5, dtype=torch.bfloat16))
    assert weights.dtype == torch.float32


@pytest.mark.parametrize("normalize", [True, False])
def test_a_choice_of_one_trains_only_through_the_raw_probability(normalize: bool) -> None:
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    TopK(top_k=1, normalize=normalize)(logits)[1].sum().backward()
    assert logits.grad is not None
    largest = float(logits.grad.abs().max())
    assert largest < 1e-6 if normalize else largest > 0.01


def test_top_k_must_be_positive() -> None:
    with pytest.raises(ValueError, match=r"^top_k must be at least 1, got 0\.$"):
        TopK(top_k=0)
