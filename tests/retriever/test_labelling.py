"""Labels and pilots: ties by rule and never by the order of a list, small groups unpublished."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from composer.retrieval.labelling import label_shares, make_pilots
from experts.errors import DataError, UnknownNameError

EXPERTS = ("acme/a", "bob/b", "cleo/c")
QUALITY = np.array([[1.0, 0.5, 0.2], [0.7, 0.7, 0.1], [0.3, 0.3, 0.3], [0.1, 0.4, 0.4], [0.0, 0.0, 1.0]])


@pytest.mark.parametrize(
    ("ties", "expected"),
    [
        ("fractional", [[1, 0, 0], [1 / 2, 1 / 2, 0], [1 / 3] * 3, [0, 1 / 2, 1 / 2], [0, 0, 1]]),
        ("own_domain", [[1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1]]),
        ("drop", [[1, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 1]]),
    ],
)
def test_r11_ties(ties: Any, expected: list[list[float]]) -> None:
    shares = label_shares(QUALITY, EXPERTS, ties=ties, own="bob/b")
    assert np.allclose(shares, expected)
    for order in itertools.permutations(range(3)):
        turned = label_shares(QUALITY[:, order], [EXPERTS[i] for i in order], ties=ties, own="bob/b")
        assert np.array_equal(turned, shares[:, order])


def test_pilots_are_weighted_means_of_large_groups() -> None:
    vectors = np.random.default_rng(0).normal(size=(5, 4))
    shares = label_shares(QUALITY, EXPERTS)
    # 1 + 1/2 + 1/3, 1/2 + 1/3 + 1/2 and 1/3 + 1/2 + 1 queries
    pilots = make_pilots(vectors, shares, EXPERTS, min_group=1)
    assert [(p.expert, p.queries) for p in pilots] == [(name, 1) for name in EXPERTS]
    expected = (vectors[0] + vectors[1] / 2 + vectors[2] / 3) / (1 + 1 / 2 + 1 / 3)
    assert np.allclose(pilots[0].vector, expected)
    assert make_pilots(vectors, shares, EXPERTS, min_group=2) == []
    turned = make_pilots(vectors, shares[:, ::-1], EXPERTS[::-1], min_group=1)
    assert [p.vector.tobytes() for p in turned] == [p.vector.tobytes() for p in pilots]


def test_several_pilots_of_a_group_are_the_means_of_its_clusters() -> None:
    """Two far clouds: the clusters are the clouds, whatever the order of the rows."""
    chosen = np.random.default_rng(0)
    clouds = np.concatenate([chosen.normal(size=(6, 4)), chosen.normal(size=(4, 4)) + 50.0])
    shares, counts = np.ones((10, 1)), np.arange(1.0, 11.0)
    for order in (np.arange(10), chosen.permutation(10)):
        made = make_pilots(clouds[order], shares, ["acme/a"], min_group=3, counts=counts[order], per_group=2)
        assert sorted(p.queries for p in made) == [21, 34]
        for pilot, rows in zip(
            sorted(made, key=lambda p: p.queries), (slice(0, 6), slice(6, 10)), strict=True
        ):
            assert np.allclose(pilot.vector, np.average(clouds[rows], axis=0, weights=counts[rows]))
    (small,) = make_pilots(clouds[:6], shares[:6], ["acme/a"], min_group=5, per_group=3)
    assert (small.queries, small.vector.tobytes()) == (6, (np.ones(6) @ clouds[:6] / 6.0).tobytes())
    alike = make_pilots(np.ones((6, 4)), shares[:6], ["acme/a"], min_group=1, per_group=4)
    assert [p.queries for p in alike] == [6]


def test_what_does_not_fit() -> None:
    with pytest.raises(DataError) as caught:
        label_shares(QUALITY * np.nan, EXPERTS[:2])
    assert str(caught.value) == (
        "Qualities must be numbers, a row for each query and a column for each of the 2 experts; given is an array of "
        "shape (5, 3) with NaN."
    )
    with pytest.raises(UnknownNameError, match=r"^Unknown expert 'bob/x'\. Did you mean 'bob/b'\?"):
        label_shares(QUALITY, EXPERTS, ties="own_domain", own="bob/x")
