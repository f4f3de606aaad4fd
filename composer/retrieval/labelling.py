"""Labels owners' queries with the experts that serve them best, among those that may answer, and makes pilots of them.

Done anew for every set of experts from the qualities that owners published, so whoever is not in the set has no part in
any label. Knows qualities and embeddings; how a quality was measured is declared beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from composer.retrieval.facts import Array, ExpertFacts
from experts.errors import DataError
from experts.names import unknown_name
from experts.retrieval_artifacts import Pilot

__all__ = ["Ties", "label_shares", "make_pilots", "pilots_among"]

_ROUNDS = 100
"""Most rounds of k-means; it ends far earlier."""

Ties = Literal["fractional", "own_domain", "drop"]
"""Queries that several experts serve equally well: shared among them, given to the owner's own expert if it is one of
them (else shared), or dropped. Never the first of a list: equal qualities are the rule rather than the exception, and
a list's order would decide most routes."""


def label_shares(
    quality: Array, experts: Sequence[str], *, ties: Ties = "fractional", own: str | None = None
) -> Array:
    """Give every query to its best experts; the order of the experts decides nothing.

    Args:
        quality: float64 ``(queries, experts)``; higher is better.
        experts: Their names.
        ties: What becomes of queries with several best experts.
        own: The owner's own expert, for ``own_domain``.

    Returns:
        float64 ``(queries, experts)``; a row sums to 1, or to 0 where it was dropped.

    Raises:
        DataError: ``quality`` has another shape or holds NaN.
        UnknownNameError: ``own`` is no expert.
    """
    if quality.ndim != 2 or quality.shape[1] != len(experts) or np.isnan(quality).any():
        raise DataError(
            f"Qualities must be numbers, a row for each query and a column for each of the {len(experts)} experts; "
            f"given is an array of shape {quality.shape}{' with NaN' if np.isnan(quality).any() else ''}."
        )
    best = quality == quality.max(axis=1, keepdims=True)
    shares: Array = best / best.sum(axis=1, keepdims=True)
    if ties == "drop":
        shares[best.sum(axis=1) > 1] = 0.0
    elif ties == "own_domain":
        if own is None or own not in experts:
            raise unknown_name("expert", str(own), experts)
        column = list(experts).index(own)
        mine = best[:, column]
        shares[mine] = 0.0
        shares[mine, column] = 1.0
    return shares


def make_pilots(
    vectors: Array,
    shares: Array,
    experts: Sequence[str],
    *,
    min_group: int,
    counts: Array | None = None,
    per_group: int = 1,
) -> list[Pilot]:
    """Average the queries of every expert, or those of each of some clusters of them.

    Args:
        vectors: The base's embeddings of the queries, or their means over bundles of queries, ``(rows, d)``.
        shares: From `label_shares`, ``(rows, experts)``.
        experts: Their names.
        min_group: Fewest queries, parts of queries added up, that make a pilot.
        counts: Queries of each row; None: one.
        per_group: Most pilots of an expert; smaller clusters than ``min_group`` give none.

    Returns:
        By name, without experts of too few queries.
    """
    weights = shares if counts is None else shares * counts[:, None]
    found = []
    for column in np.argsort(np.asarray(experts)):
        mine = np.ascontiguousarray(weights[:, column])
        for part in _parts(vectors, mine, per_group=per_group, min_group=max(1, min_group)):
            mean: Array = part @ vectors / float(part.sum())
            found.append(Pilot(expert=experts[column], queries=_whole(part), vector=mean))
    return found


def _parts(vectors: Array, weights: Array, *, per_group: int, min_group: int) -> list[Array]:
    """Divide a group into parts of enough queries; where clusters are all too small, it stays whole."""
    if _whole(weights) < min_group:
        return []
    if per_group == 1:
        return [weights]
    of = _clusters(vectors, weights, min(per_group, _whole(weights) // min_group))
    parts = [np.where(of == number, weights, 0.0) for number in range(int(of.max()) + 1)]
    return [part for part in parts if _whole(part) >= min_group] or [weights]


def _whole(weights: Array) -> int:
    return math.floor(
        float(weights.sum()) + 1e-9
    )  # a sum of thirds may fall short of a whole number by rounding


def _clusters(vectors: Array, weights: Array, k: int) -> NDArray[np.int64]:
    """Weighted k-means without chance: the heaviest row first, then whoever is farthest from all chosen (Lloyd 1982).

    Args:
        vectors: ``(rows, d)``.
        weights: ``(rows,)``; rows of weight 0 pull nothing.
        k: Clusters at most.

    Returns:
        The cluster of every row; ties go to the first.
    """
    rows = np.flatnonzero(weights > 0)
    of = np.zeros(len(weights), dtype=np.int64)
    if k < 2 or len(rows) < 2:
        return of
    points, pull = vectors[rows], weights[rows]
    chosen = [int(np.argmax(pull))]
    while len(chosen) < min(k, len(rows)):
        chosen.append(int(np.argmax(_distances(points, points[chosen]).min(axis=1))))
    centres = points[chosen]
    before = np.full(len(rows), -1)
    for _ in range(_ROUNDS):
        nearest = _distances(points, centres).argmin(axis=1)
        if np.array_equal(nearest, before):
            break
        before = nearest
        centres = np.stack(
            [
                np.average(points[nearest == n], axis=0, weights=pull[nearest == n])
                if (nearest == n).any()
                else centre
                for n, centre in enumerate(centres)
            ]
        )
    of[rows] = before
    return of


def _distances(points: Array, centres: Array) -> Array:
    return np.stack([((points - centre) ** 2).sum(axis=1) for centre in centres], axis=1)


def pilots_among(
    experts: Sequence[ExpertFacts], *, ties: Ties, min_group: int, per_group: int = 1
) -> dict[str, list[Array]]:
    """Make the pilots of a set of experts: their owners' queries, labelled among exactly these experts.

    Args:
        experts: What every one of them published, labels among it; by name.
        ties: See `label_shares`.
        min_group: See `make_pilots`.
        per_group: See `make_pilots`.

    Returns:
        Every expert's pilots, at most ``per_group`` for each owner's labels, in the order of ``experts``.
    """
    found: dict[str, list[Array]] = {e.name: [] for e in experts}
    for source in experts:
        labels = source.labels
        assert labels is not None, "the plan asked for it"
        shares = label_shares(labels.of(list(found)), list(found), ties=ties, own=source.name)
        made = make_pilots(
            labels.vectors,
            shares,
            list(found),
            min_group=min_group,
            counts=labels.counts,
            per_group=per_group,
        )
        for pilot in made:
            found[pilot.expert].append(pilot.vector)
    return found
