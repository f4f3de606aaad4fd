"""Canaries, exposure and similarity against closed forms and other implementations."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch

from experts.errors import DataError
from pipelines.memorization.canaries import Canary, read_canaries
from pipelines.memorization.exposure import (
    estimated_exposure,
    ranked_exposure,
    skew_normal_fit,
    skew_normal_log_cdf,
)
from pipelines.memorization.extraction import clopper_pearson, similarity


@pytest.mark.parametrize(
    ("secret", "alphabet", "bits"),
    [
        ("281265", None, 6 * math.log2(10)),
        ("281-26", None, 5 * math.log2(10)),
        ("aZ9", None, 2 * math.log2(26) + math.log2(10)),
        ("ACGT-", "ACGT", 8.0),
    ],
)
def test_space(secret: str, alphabet: str | None, bits: float) -> None:
    canary = Canary(text=f"({secret})", secret=secret, alphabet=alphabet)
    assert canary.space_bits == pytest.approx(bits)
    others = canary.references(50, seed=0)
    assert len(set(others)) == 50
    assert canary.text not in others
    for other in others:
        assert len(other) == len(canary.text)
        for mine, theirs in zip(canary.text, other, strict=True):
            if not (mine.isalnum() and (alphabet is None or mine in alphabet)):
                assert theirs == mine
            else:
                assert (theirs.isdigit(), theirs.isupper()) == (mine.isdigit(), mine.isupper())
    assert others == canary.references(50, seed=0)
    assert others != canary.references(50, seed=1)


def test_a_small_space_is_listed_whole() -> None:
    canary = Canary(text="PIN 42.", secret="42")
    everything = {f"PIN {i:02}." for i in range(100)} - {"PIN 42."}
    for count in (99, 5000):
        assert set(canary.references(count, seed=0)) == everything
    assert len(canary.references(98, seed=0)) == 98


def test_ranked_exposure() -> None:
    others = [float(i) for i in range(1, 64)]
    assert ranked_exposure(0.5, others) == 6.0  # the first of 64
    assert ranked_exposure(1.0, others) == 5.0  # a tie counts against it: the second
    assert ranked_exposure(99.0, others) == 0.0  # the last


@pytest.mark.parametrize("shape", [0.0, 0.7, -2.0, 5.0])
def test_skew_normal_against_scipy(shape: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    for x in (-4.0, -1.5, 0.0, 0.4, 3.0):
        expected = math.log(float(stats.skewnorm.cdf(x, shape, loc=0.3, scale=1.4)))
        if expected > math.log(1e-9):  # where scipy itself is accurate
            assert skew_normal_log_cdf(x, 0.3, 1.4, shape) == pytest.approx(expected, abs=1e-4)


def test_far_tail_of_a_normal() -> None:
    for x in (-40.0, -10.0, -2.0, 1.0):
        expected = float(torch.special.log_ndtr(torch.tensor(x, dtype=torch.float64)))
        assert skew_normal_log_cdf(x, 0.0, 1.0, 0.0) == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_fit_has_the_moments_of_the_values() -> None:
    stats = pytest.importorskip("scipy.stats")
    draw = random.Random(0)
    values = [draw.gauss(0, 1) + abs(draw.gauss(0, 2)) for _ in range(5000)]
    location, scale, shape = skew_normal_fit(values)
    expected = [float(value) for value in stats.skewnorm.stats(shape, location, scale, moments="mvs")]
    x = torch.tensor(values, dtype=torch.float64)
    skewness = float(((x - x.mean()) / x.std(correction=0)).pow(3).mean())
    assert expected == pytest.approx([float(x.mean()), float(x.var(correction=0)), skewness], rel=1e-6)
    assert skew_normal_fit([1.0, 1.0]) is None
    assert skew_normal_fit([]) is None


def test_the_estimate_agrees_with_the_rank_and_goes_beyond_it() -> None:
    draw = random.Random(1)
    losses = [draw.gauss(50, 3) for _ in range(4095)]
    for loss in (50.0, 46.0, 43.5):
        expected = ranked_exposure(loss, losses)
        assert estimated_exposure(loss, losses, space_bits=99) == pytest.approx(expected, abs=0.8)
    assert ranked_exposure(10.0, losses) == 12.0
    assert estimated_exposure(35.0, losses, space_bits=99) == pytest.approx(21.7, abs=1.5)  # -log2 Phi(-5)
    assert estimated_exposure(10.0, losses, space_bits=19.9) == 19.9
    assert estimated_exposure(1.0, [2.0, 2.0], space_bits=9) is None


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("kitten", "sitting", 1 - 3 / 7),
        ("flaw", "lawn", 1 - 2 / 4),
        ("same", "same", 1.0),
        ("abc", "", 0.0),
        ("", "", 1.0),
        ("abcdefghij", "abcdefghiX", 0.9),
    ],
)
def test_similarity(one: str, other: str, expected: float) -> None:
    assert similarity(list(map(ord, one)), list(map(ord, other))) == pytest.approx(expected)
    assert similarity(list(map(ord, other)), list(map(ord, one))) == pytest.approx(expected)


@pytest.mark.parametrize(("hits", "trials"), [(0, 10), (3, 10), (10, 10), (7, 2000), (1, 1)])
def test_interval_against_scipy(hits: int, trials: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(hits, trials).proportion_ci(confidence_level=0.95, method="exact")
    assert clopper_pearson(hits, trials) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_reads_canaries(tmp_path: Path) -> None:
    path = tmp_path / "canaries.jsonl"
    path.write_text(
        '{"text": "PIN 42.", "secret": "42"}\n\n{"text": "ab", "secret": "a", "alphabet": "abc"}\n'
    )
    assert read_canaries(path) == [
        Canary(text="PIN 42.", secret="42"),
        Canary(text="ab", secret="a", alphabet="abc"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("PIN 42.", "canaries.jsonl, line 2: not JSON. Write one object a line."),
        (json.dumps({"text": "PIN", "secret": "42"}),
         'canaries.jsonl, line 2: the secret is 0 times in the "text"; it must be there once.'),
        (json.dumps({"text": "4242", "secret": "42"}),
         'canaries.jsonl, line 2: the secret is 2 times in the "text"; it must be there once.'),
        (json.dumps({"text": "PIN", "secret": ""}),
         'canaries.jsonl, line 2: the secret is 0 times in the "text"; it must be there once.'),
        (json.dumps({"text": "-+-", "secret": "+"}),
         'canaries.jsonl, line 2: no character of the secret can have been another; give its "alphabet".'),
        (json.dumps({"text": "ab", "secret": "a", "alphabet": "aab"}),
         'canaries.jsonl, line 2: the "alphabet" has a character twice.'),
    ],
    ids=["no-json", "absent", "twice", "empty", "no-choice", "alphabet"],
)  # fmt: skip
def test_says_which_line_is_no_canary(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "canaries.jsonl"
    path.write_text(json.dumps({"text": "PIN 42.", "secret": "42"}) + "\n" + line + "\n")
    with pytest.raises(DataError) as caught:
        read_canaries(path)
    assert str(caught.value) == message


def test_unknown_keys_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "canaries.jsonl"
    path.write_text(json.dumps({"text": "PIN 42.", "secert": "42"}))
    with pytest.raises(DataError) as caught:
        read_canaries(path)
    assert str(caught.value) == (
        "canaries.jsonl, line 1 has 2 problems:\n  - secret: missing\n  - secert: unknown key; did you mean "
        "'secret'? Allowed: alphabet, secret, text"
    )
    path.write_text("\n")
    with pytest.raises(DataError) as caught:
        read_canaries(path)
    assert str(caught.value) == (
        'No canary in canaries.jsonl. Write {"text": ..., "secret": ...} on every line.'
    )
