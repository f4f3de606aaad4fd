"""Labels owners' queries with the experts that serve them best, among those that may answer, and makes pilots of them.

Done anew for every set of experts from the qualities that owners published, so whoever is not in the set has no part in
any label. Knows qualities and embeddings; how a quality was measured is declared beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from composer.retrieval.facts import Array, ExpertFacts
from experts.errors import DataError
from experts.names import unknown_name
from experts.retrieval_artifacts import Pilot

__all__ = ["Ties", "label_shares", "make_pilots", "pilots_among"]

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
) -> list[Pilot]:
    """Average the queries of every expert.

    Args:
        vectors: The base's embeddings of the queries, or their means over bundles of queries, ``(rows, d)``.
        shares: From `label_shares`, ``(rows, experts)``.
        experts: Their names.
        min_group: Fewest queries, parts of queries added up, that make a pilot.
        counts: Queries of each row; None: one.

    Returns:
        By name, without experts of too few queries.
    """
    found = []
    weights = shares if counts is None else shares * counts[:, None]
    for column in np.argsort(np.asarray(experts)):
        mine = np.ascontiguousarray(weights[:, column])
        total = float(mine.sum())
        # a float sum of thirds may fall short of a whole number by rounding
        queries = math.floor(total + 1e-9)
        if queries >= max(1, min_group):
            mean: Array = mine @ vectors / total
            found.append(Pilot(expert=experts[column], queries=queries, vector=mean))
    return found


def pilots_among(experts: Sequence[ExpertFacts], *, ties: Ties, min_group: int) -> dict[str, list[Array]]:
    """Make the pilots of a set of experts: their owners' queries, labelled among exactly these experts.

    Args:
        experts: What every one of them published, labels among it; by name.
        ties: See `label_shares`.
        min_group: See `make_pilots`.

    Returns:
        Every expert's pilots, at most one for each owner's labels, in the order of ``experts``.
    """
    found: dict[str, list[Array]] = {e.name: [] for e in experts}
    for source in experts:
        labels = source.labels
        assert labels is not None, "the plan asked for it"
        shares = label_shares(labels.of(list(found)), list(found), ties=ties, own=source.name)
        made = make_pilots(labels.vectors, shares, list(found), min_group=min_group, counts=labels.counts)
        for pilot in made:
            found[pilot.expert].append(pilot.vector)
    return found
