"""Whether one system beats another on the same queries: a paired randomisation test and a bootstrap interval.

Knows numbers in pairs; knows nothing of what they measure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from experts.errors import DataError

__all__ = ["Comparison", "compare"]

_BLOCK = 1000
"""Resamples drawn at once, which bounds memory."""

_SLACK = 1e-12
"""Relative difference below which two sums are the same: rounding must not hide a tie with what was observed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One system against another.

    Attributes:
        difference: Mean over queries of ours minus theirs.
        low: Lower end of the 95 % bootstrap interval (percentiles) of the difference.
        high: Its upper end.
        p_value: Two-sided, of the paired randomisation test: how often a difference at least as large comes out when
            the two systems' values are swapped at random, query by query.
        queries: How many pairs.
    """

    difference: float
    low: float
    high: float
    p_value: float
    queries: int


def compare(
    ours: Mapping[str, float], theirs: Mapping[str, float], *, samples: int = 10_000, seed: int = 0
) -> Comparison:
    """Compare two systems query by query (Smucker, Allan and Carterette 2007).

    Args:
        ours: Value by query.
        theirs: Value by query, of the same queries.
        samples: Random resamples for each of test and interval.
        seed: Of the resamples.

    Raises:
        DataError: The queries differ, or there is none.
    """
    if set(ours) != set(theirs) or not ours:
        raise DataError(
            f"Two systems are compared on the same queries; one has {len(ours)} queries, the other {len(theirs)}, "
            f"and {len(set(ours) & set(theirs))} are shared."
        )
    differences = np.array([ours[query] - theirs[query] for query in sorted(ours)], dtype=np.float64)
    count, random = len(differences), np.random.default_rng(seed)
    observed = abs(differences.sum()) * (1 - _SLACK)
    extreme, means = 0, []
    for size in _blocks(samples):
        signs = random.integers(0, 2, (size, count), dtype=np.int8) * 2.0 - 1.0
        extreme += int(np.count_nonzero(np.abs(signs @ differences) >= observed))
        means.append(differences[random.integers(0, count, (size, count))].mean(axis=1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Comparison(
        difference=float(differences.mean()),
        low=float(low),
        high=float(high),
        p_value=(extreme + 1) / (samples + 1),  # what was observed is one of the assignments
        queries=count,
    )


def _blocks(samples: int) -> Iterator[int]:
    return (min(_BLOCK, samples - start) for start in range(0, samples, _BLOCK))
