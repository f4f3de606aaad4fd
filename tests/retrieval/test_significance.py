"""The paired test against scipy's exact one, and what the interval must do."""

from __future__ import annotations

import random

import numpy as np
import pytest
from scipy.stats import permutation_test

from experts.errors import DataError
from pipelines.retrieval.significance import compare


def _pairs(count: int, shift: float) -> tuple[dict[str, float], dict[str, float]]:
    draw = random.Random(3)
    theirs = {f"q{number}": draw.random() for number in range(count)}
    return {query: value + draw.gauss(shift, 0.3) for query, value in theirs.items()}, theirs


@pytest.mark.parametrize("shift", [0.0, 0.15, 0.4])
def test_the_p_value_is_that_of_the_exact_test(shift: float) -> None:
    ours, theirs = _pairs(12, shift)
    pairs = [np.array([system[query] for query in ours]) for system in (ours, theirs)]
    exact = permutation_test(
        pairs, lambda a, b: np.mean(a - b), permutation_type="samples", n_resamples=np.inf
    ).pvalue
    found = compare(ours, theirs)
    assert found.p_value == pytest.approx(exact, abs=0.02)
    assert found.difference == pytest.approx(np.mean(pairs[0] - pairs[1]))
    assert found.low < found.difference < found.high
    assert (found.low > 0 or found.high < 0) == (exact < 0.05)


def test_equal_systems_differ_by_nothing() -> None:
    ours, _ = _pairs(5, 0.1)
    found = compare(ours, ours)
    assert (found.difference, found.low, found.high, found.p_value, found.queries) == (0.0, 0.0, 0.0, 1.0, 5)


def test_the_order_of_the_queries_does_not_matter() -> None:
    ours, theirs = _pairs(20, 0.1)
    assert compare(dict(reversed(ours.items())), theirs) == compare(ours, theirs)


def test_other_queries_are_refused() -> None:
    with pytest.raises(DataError) as caught:
        compare({"a": 1.0, "b": 1.0}, {"a": 1.0})
    assert str(caught.value) == (
        "Two systems are compared on the same queries; one has 2 queries, the other 1, and 1 are shared."
    )
