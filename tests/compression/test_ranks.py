"""How a rank is written and chosen."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.compression import CompressionError
from pipelines.compression.ranks import RankRule, parse_rank

SQUARED = np.array([6.0, 3.0, 0.9, 0.1, 0.0, 0.0])


@pytest.mark.parametrize(
    ("text", "rank"),
    [
        ("1", 1),
        ("4", 4),
        ("16", 6),  # no more than there are
        ("energy=0.6", 1),
        ("energy=0.61", 2),
        ("energy=0.9", 2),
        ("energy=0.901", 3),
        ("energy=0.99", 3),
        ("energy=1", 4),  # zeros hold nothing
        ("energy=1e-9", 1),
    ],
)
def test_choose(text: str, rank: int) -> None:
    assert parse_rank(text).choose(SQUARED, shape=(6, 1000)) == rank


@pytest.mark.parametrize(("shape", "rank"), [((6, 1000), 1), ((6, 6), 1), ((60, 60), 2), ((30, 6), 1)])
def test_auto_is_the_energy_within_a_third_of_the_bytes(shape: tuple[int, int], rank: int) -> None:
    assert parse_rank("auto").choose(SQUARED, shape=shape) == rank


@pytest.mark.parametrize(("shape", "capped"), [((6, 6), True), ((60, 60), False), ((6, 1000), True)])
def test_whether_the_bytes_decided(shape: tuple[int, int], capped: bool) -> None:
    """Nine tenths of the energy are two values."""
    rule = parse_rank("auto")
    assert rule.capped(SQUARED, rank=rule.choose(SQUARED, shape=shape)) is capped
    assert not parse_rank("1").capped(SQUARED, rank=1)
    assert not parse_rank("energy=0.9").capped(SQUARED, rank=2)
    assert not rule.capped(np.zeros(6), rank=1)


def test_auto_on_real_shapes() -> None:
    """Of SmolLM2-135M; an even spectrum, whose energy would take nine tenths of the rank."""
    rank = parse_rank("auto").choose(np.ones(576), shape=(1536, 576))
    assert rank == 139
    assert rank * (1536 + 576) <= 1536 * 576 / 3 < (rank + 1) * (1536 + 576)


def test_nothing_to_keep_is_rank_one() -> None:
    for text in ("energy=0.9", "auto", "energy=1"):
        assert parse_rank(text).choose(np.zeros(6), shape=(6, 60)) == 1


def test_the_text_is_kept() -> None:
    assert parse_rank("energy=0.90") == RankRule(energy=0.9, text="energy=0.90")


@pytest.mark.parametrize(
    "text",
    ["0", "-1", "4097", "1.5", "", "all", "energy", "energy=", "energy=0", "energy=1.1", "energy=nan", "²"],
)
def test_another_form(text: str) -> None:
    with pytest.raises(CompressionError) as caught:
        parse_rank(text)
    assert str(caught.value) == (
        f"--rank '{text}' is not a rank: write a whole number from 1 to 4096, 'auto', or 'energy=SHARE' with a share "
        "above 0 and at most 1, for instance 'energy=0.9'."
    )
