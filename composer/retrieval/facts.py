"""What a retrieval router knows of the experts: sums that their owners published, as float64 arrays.

Nothing here mixes owners, so a router is a function of a set of these and of nothing else. Knows arrays; knows no
file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["Array", "ExpertFacts", "Labels"]

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """How well experts serve one owner's queries; rows are queries, or bundles of them.

    Attributes:
        counts: Queries of every row, ``(rows,)``.
        vectors: Mean base embedding of every row, ``(rows, d)``.
        quality: Expert name -> mean quality on every row, ``(rows,)``.
    """

    counts: Array
    vectors: Array
    quality: Mapping[str, Array]

    def of(self, experts: Sequence[str]) -> Array:
        """Return the qualities of some experts, ``(rows, experts)``; nobody else's are read."""
        return np.stack([self.quality[name] for name in experts], axis=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertFacts:
    """What the owner of one expert published about queries of its domain.

    Attributes:
        name: ``owner/expert``.
        count: Number of queries.
        sum: Of their features, ``(d,)``.
        scatter: Sum of outer products, ``(d, d)``; None: not published.
        unit: Whether every feature has length 1, so that count and sum tell how much they vary in all.
        labels: How well experts serve the owner's queries; None: not published, or not asked for.
        gram: Sum of outer products of the queries behind ``utility``, ``(d, d)``.
        utility: Expert name, ``base`` among them -> sum of features times the quality it reached, ``(d,)``.
    """

    name: str
    count: float
    sum: Array
    scatter: Array | None = None
    unit: bool = False
    labels: Labels | None = None
    gram: Array | None = None
    utility: Mapping[str, Array] = field(default_factory=dict)

    @property
    def mean(self) -> Array:
        """Mean feature, ``(d,)``."""
        return self.sum / self.count
