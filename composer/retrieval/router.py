"""Decides which experts answer a query: a scorer solved for the allowed set, a selector, and the base where in doubt.

Pure arithmetic on a query's feature in float64. Knows expert positions and sums; knows no text, no layer and no file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from composer.retrieval.facts import Array, ExpertFacts
from composer.retrieval.scorers.base import RetrievalScorer, Solved
from composer.retrieval.selectors import RetrievalSelector
from composer.routing.recent import Recent

__all__ = ["Decision", "Router"]

Flags = NDArray[np.bool_]
Slots = NDArray[np.int64]

MANY = 4096
"""Above so many experts candidates are found in float32 first; the decision itself stays in float64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Who answers each query of a batch.

    Attributes:
        slots: int64 ``(rows, m)``; 0 is the base, experts count from 1 in canonical order.
        weights: float64 ``(rows, m)``; 0 where a slot is not run. They sum to 1.
        margin: float64 ``(rows,)``: the best expert's lead over the next, or over the base where scores are gains;
            infinite where nobody else is allowed, NaN where nobody is.
        confidence: float64 ``(rows,)``: the logistic function of margin / temperature; NaN where nobody is allowed.
        scores: float64 ``(rows, experts)``, minus infinity for who is not allowed; None where nobody asked.
    """

    slots: Slots
    weights: Array
    margin: Array
    confidence: Array
    scores: Array | None = None

    def dense(self, num_experts: int) -> Array:
        """Return the weights by slot, ``(rows, experts + 1)``, the base first."""
        table = np.zeros((len(self.slots), num_experts + 1))
        np.add.at(table, (np.arange(len(table))[:, None], self.slots), self.weights)
        return table


class Router:
    """Routes queries among a set of experts, for every allowed subset as if the others had never been there.

    Args:
        facts: What every expert published, in canonical order, which is by name.
        scorer: Solves scores from facts.
        selector: Chooses by scores.
        min_margin: Smallest margin that routes; below it the base answers.
        temperature: Of the confidence.
    """

    def __init__(
        self,
        facts: Sequence[ExpertFacts],
        *,
        scorer: RetrievalScorer,
        selector: RetrievalSelector,
        min_margin: float,
        temperature: float,
    ) -> None:
        self.facts = tuple(facts)
        self.scorer = scorer
        self.selector = selector
        self.min_margin = min_margin
        self.temperature = temperature
        self._solved: Recent[tuple[Slots, Solved]] = Recent(size=16)

    def solved(self, experts: Sequence[int]) -> Solved:
        """Return the scores' map for these positions (from 0), solved on first use."""
        flags = np.zeros(len(self.facts), dtype=np.bool_)
        flags[list(experts)] = True
        return self._of(flags)[1]

    def _of(self, flags: Flags) -> tuple[Slots, Solved]:
        """Return an allowed set's positions and the scores' map of exactly these, solved on first use."""

        def solve() -> tuple[Slots, Solved]:
            positions = np.flatnonzero(flags)
            return positions, self.scorer.solve([self.facts[e] for e in positions])

        return self._solved.get(flags.tobytes(), solve)

    def decide(self, features: Array, allowed: Flags, *, trace: bool = False) -> Decision:
        """Route a batch.

        Args:
            features: ``(rows, d)``.
            allowed: ``(1 or rows, experts)``.
            trace: Whether the scores are wanted too.
        """
        rows = len(features)
        slots, weights = np.zeros((rows, 1), dtype=np.int64), np.ones((rows, 1))
        margin = np.full(rows, np.nan)
        scores = np.full((rows, len(self.facts)), -np.inf) if trace else None
        for members, flags in _groups(allowed, rows):
            if not flags.any():
                continue
            experts, solved = self._of(flags)
            chosen = self._decide(features[members], experts, solved, trace=trace)
            slots, weights = _wide(slots, weights, chosen.slots.shape[1])
            slots[members], weights[members] = 0, 0.0
            slots[members, : chosen.slots.shape[1]] = chosen.slots
            weights[members, : chosen.slots.shape[1]] = chosen.weights
            margin[members] = chosen.margin
            if scores is not None:
                assert chosen.scores is not None
                scores[np.ix_(members, experts)] = chosen.scores
        return Decision(
            slots=slots,
            weights=weights,
            margin=margin,
            confidence=_logistic(margin / self.temperature),
            scores=scores,
        )

    def _decide(self, features: Array, experts: Slots, solved: Solved, *, trace: bool) -> Decision:
        """Route rows that allow the same experts."""
        most = self.selector.most
        if most is not None and len(experts) > MANY and solved.one_row_each and not trace:
            return self._among_many(features, experts, solved, most)
        scores = solved.scores(features)
        return self._choose(scores, experts, solved, trace=trace)

    def _choose(self, scores: Array, experts: Slots, solved: Solved, *, trace: bool = False) -> Decision:
        positions, weights = self.selector.select(scores)
        margin = _margin(scores, over_base=solved.over_base)
        weights = np.where(weights > 0, weights, 0.0)
        slots = experts[positions] + 1
        # NaN compares false: whoever has no score at all is the base's
        unsure = ~(margin >= self.min_margin)
        slots[unsure], weights[unsure] = 0, 0.0
        weights[unsure, 0] = 1.0
        return Decision(
            slots=slots, weights=weights, margin=margin, confidence=margin, scores=scores if trace else None
        )

    def _among_many(self, features: Array, experts: Slots, solved: Solved, most: int) -> Decision:
        """Score in float32, and again in float64 whoever could be among the best by the error bound."""
        rows = [self._candidates(row, solved, most) for row in features]
        parts = []
        for row, found in zip(features, rows, strict=True):
            vectors = Solved(
                vectors=solved.vectors[found],
                biases=solved.biases[found],
                unit_queries=solved.unit_queries,
                over_base=solved.over_base,
            )
            parts.append(self._choose(vectors.scores(row[None]), experts[found], vectors))
        return Decision(
            slots=np.concatenate([p.slots for p in parts]),
            weights=np.concatenate([p.weights for p in parts]),
            margin=np.concatenate([p.margin for p in parts]),
            confidence=np.concatenate([p.confidence for p in parts]),
        )

    def _candidates(self, feature: Array, solved: Solved, most: int) -> Slots:
        """Return the positions, ascending, that may hold the best ``most + 1`` scores."""
        length = float(np.linalg.norm(feature))
        if solved.unit_queries and length > 0:
            feature, length = feature / length, 1.0
        coarse = solved.coarse @ feature.astype(np.float32)
        coarse += solved.coarse_biases
        threshold = _nth_highest(coarse, min(most + 1, len(coarse)))
        # of a float32 inner product of d terms (Higham, Accuracy and Stability, section 3.1), twice: for both sides
        size = length * solved.longest + float(np.abs(solved.coarse_biases).max())
        bound = 2 * (len(feature) + 3) * float(np.finfo(np.float32).eps) * size
        return np.flatnonzero(coarse >= threshold - bound)


def _groups(allowed: Flags, rows: int) -> list[tuple[Slots, Flags]]:
    """Return the rows of every allowed set, and the set."""
    if len(allowed) == 1:
        return [(np.arange(rows), allowed[0])]
    found: dict[bytes, list[int]] = {}
    for row, flags in enumerate(allowed):
        found.setdefault(flags.tobytes(), []).append(row)
    return [(np.array(members), allowed[members[0]]) for members in found.values()]


def _nth_highest(values: NDArray[np.float32], n: int) -> float:
    """Return the n-th highest value; a few scans are cheaper than a partition."""
    taken = []
    for _ in range(n):
        position = int(values.argmax())
        taken.append((position, values[position]))
        values[position] = -np.inf
    for position, value in taken:
        values[position] = value
    return float(taken[-1][1])


def _wide(slots: Slots, weights: Array, width: int) -> tuple[Slots, Array]:
    missing = ((0, 0), (0, max(0, width - slots.shape[1])))
    return np.pad(slots, missing), np.pad(weights, missing)


def _margin(scores: Array, *, over_base: bool) -> Array:
    best: Array = scores.max(axis=1)
    if over_base:
        return best
    if scores.shape[1] == 1:
        return np.where(np.isneginf(best), np.nan, np.inf)
    second = np.partition(scores, -2, axis=1)[:, -2]
    with np.errstate(invalid="ignore"):
        margin: Array = best - second
    return margin


def _logistic(x: Array) -> Array:
    with np.errstate(over="ignore"):
        value: Array = 1.0 / (1.0 + np.exp(-x))
    return value
