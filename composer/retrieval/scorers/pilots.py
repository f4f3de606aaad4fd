"""Routes by pilots: one mean query for each group of an owner's queries that one expert serves best.

Owners publish how well every expert serves their queries, and the groups are formed here, among the experts that may
answer. Whoever leaves takes their queries and their column along, and the queries that they served best go to whoever
is best among the rest: the pilots are those of a library that they never were in. Knows vectors only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

from composer.retrieval.facts import Array, ExpertFacts
from composer.retrieval.labelling import pilots_among
from composer.retrieval.scorers.base import Need, RetrievalScorer, Solved, unit_rows

__all__ = ["PilotLogSumExp", "PilotMax", "PilotMean", "PilotTopMean"]


class _Pilots(RetrievalScorer):
    """What becomes of the similarities to an expert's pilots is the subclass's business."""

    needs: ClassVar[frozenset[Need]] = frozenset({"pilots"})
    reduce: ClassVar[Literal["max", "logsumexp", "top_mean"] | None]

    def solve(self, experts: Sequence[ExpertFacts]) -> Solved:
        """Form the pilots, and average them where the mean decides: the mean product is the mean's product."""
        options = self.options
        made = pilots_among(
            experts, ties=options.ties, min_group=options.min_group, per_group=options.pilots_per_group
        )
        pilots = list(made.values())
        absent = tuple(i for i, mine in enumerate(pilots) if not mine)
        rows = [self._prepared(np.stack(mine)) for mine in pilots if mine]
        if not rows:  # nobody has a pilot, so nobody is ever ahead
            nothing = [np.zeros((1, len(experts[0].sum)))]
            return self._solved(nothing, absent[1:], biases=np.full(1, -np.inf))
        return self._solved(rows, absent, biases=np.zeros(sum(len(r) for r in rows)))

    def _prepared(self, pilots: Array) -> Array:
        pilots = unit_rows(pilots) if self.cosine else pilots
        return pilots.mean(axis=0, keepdims=True) if self.reduce is None else pilots

    def _solved(self, rows: Sequence[Array], absent: tuple[int, ...], *, biases: Array) -> Solved:
        several = self.reduce is not None
        return Solved(
            vectors=np.concatenate(rows),
            biases=biases if several else biases[: len(rows)],
            starts=tuple(int(n) for n in np.cumsum([0, *(len(r) for r in rows[:-1])])) if several else None,
            reduce=self.reduce,
            top=self.options.pilot_top,
            absent=absent,
            unit_queries=self.cosine,
        )


class PilotMean(_Pilots):
    """Mean similarity to an expert's pilots (RouterRetriever, arXiv 2409.02685, section 3.3)."""

    reduce = None


class PilotMax(_Pilots):
    """Similarity to an expert's nearest pilot, which is what the released code of RouterRetriever computes."""

    reduce = "max"


class PilotLogSumExp(_Pilots):
    """``log sum_p exp(similarity)`` over an expert's pilots."""

    reduce = "logsumexp"


class PilotTopMean(_Pilots):
    """Mean similarity to an expert's ``pilot_top`` nearest pilots."""

    reduce = "top_mean"
