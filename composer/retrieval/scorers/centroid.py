"""Routes to the expert whose domain's mean query is nearest; the one to take where queries are few.

Knows sums and counts only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from composer.retrieval.facts import ExpertFacts
from composer.retrieval.scorers.base import Need, RetrievalScorer, Solved, unit_rows

__all__ = ["Centroid"]


class Centroid(RetrievalScorer):
    """Similarity of a query's feature to the mean feature of each domain."""

    needs: ClassVar[frozenset[Need]] = frozenset({"sum"})

    def solve(self, experts: Sequence[ExpertFacts]) -> Solved:
        """Take the means."""
        means = np.stack([e.mean for e in experts])
        return Solved(
            vectors=unit_rows(means) if self.cosine else means,
            biases=np.zeros(len(means)),
            unit_queries=self.cosine,
        )
