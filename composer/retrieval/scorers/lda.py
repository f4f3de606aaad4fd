"""Routes by linear discriminants of the owners' query embeddings: a class for each expert, one covariance.

No expert is run to make it and no text leaves an owner. Knows the equations only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from composer.retrieval.facts import Array, ExpertFacts
from composer.retrieval.scorers.base import Need, RetrievalScorer, Solved

__all__ = ["LDA"]


class LDA(RetrievalScorer):
    """Log-posterior of each domain given a query's feature, all domains being as likely.

    With ``n_i``, ``s_i`` and ``C_i`` the number, the sum and the summed outer products of an owner's features:
    ``m_i = s_i / n_i``, ``S = sum_i (C_i - s_i s_i^T / n_i) / N + shrinkage * (tr S / d) I``, ``w_i = S^-1 (m_i - m)``,
    ``b_i = -(m_i + m) . w_i / 2`` with ``m`` the mean of the ``m_i`` (Hastie, Tibshirani, Friedman, The Elements of
    Statistical Learning, section 4.3; Friedman 1989 for the shrinkage). The book's ``S^-1 m_i`` differ from these
    by what is common to all classes.

    An owner who keeps ``C_i``, and whose features have length 1, has ``tr C_i = n_i``: its part of ``S`` is then taken
    to be the same in all directions, ``(n_i - |s_i|^2 / n_i) / d I``, which has the right trace. Where nobody publishes
    ``C_i``, domains are told apart by the distance to their means.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"sum", "scatter"})

    def solve(self, experts: Sequence[ExpertFacts]) -> Solved:
        """Solve the discriminants."""
        means = np.stack([e.mean for e in experts])
        middle = means.mean(axis=0)
        weights: Array = np.linalg.solve(self._covariance(experts), (means - middle).T).T
        return Solved(
            vectors=np.ascontiguousarray(weights),
            biases=-0.5 * np.einsum("cd,cd->c", means + middle, weights),
        )

    def _covariance(self, experts: Sequence[ExpertFacts]) -> Array:
        d = len(experts[0].sum)
        within, total = np.zeros((d, d)), 0.0
        for e in experts:
            if e.scatter is not None:
                within += e.scatter - np.outer(e.sum, e.sum) / e.count
            else:
                assert e.unit, "the plan asked for it"
                # noise may have made the sum longer than sums of unit vectors are
                within[np.diag_indices(d)] += max(0.0, e.count - float(e.sum @ e.sum) / e.count) / d
            total += e.count
        within /= total
        # a domain of equal queries has no variance of its own to shrink towards
        spread = float(np.trace(within)) / d
        within[np.diag_indices(d)] += self.options.shrinkage * (spread if spread > 0 else 1.0)
        return within
