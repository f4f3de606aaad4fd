"""Predicts how much better than the base each expert would serve a query, by one ridge regression.

Every owner publishes, for every expert and for the base, the sum of its queries' features weighted by the quality that
one reached. Knows the equation only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from composer.retrieval.facts import Array, ExpertFacts
from composer.retrieval.scorers.base import Need, RetrievalScorer, Solved
from experts.retrieval_info import BASE_NAME

__all__ = ["RidgeUtility"]


class RidgeUtility(RetrievalScorer):
    """``W = (sum_i X_i^T X_i + ridge I)^-1 sum_i X_i^T (Y_i - base_i)``: gain over the base, per expert.

    A score below 0 predicts harm, so ``min_margin`` is the least gain worth a second pass.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"utility"})

    def solve(self, experts: Sequence[ExpertFacts]) -> Solved:
        """Solve for the gains."""
        d = len(experts[0].sum)
        moment, gains = np.zeros((d, d)), np.zeros((d, len(experts)))
        for source in experts:
            assert source.gram is not None, "the plan asked for it"
            moment += source.gram
            base = source.utility[BASE_NAME]
            for column, expert in enumerate(experts):
                gains[:, column] += source.utility[expert.name] - base
        moment[np.diag_indices(d)] += self.options.ridge
        weights: Array = np.linalg.solve(moment, gains).T.astype(np.float64)
        return Solved(vectors=np.ascontiguousarray(weights), biases=np.zeros(len(experts)), over_base=True)
