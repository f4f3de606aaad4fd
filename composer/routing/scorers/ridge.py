"""A training-free gate from additive statistics: ridge regression of the hidden states onto whose text they are.

Knows the equations; how statistics are collected and a gate is asked for is in `composer.routing.scorers.solved`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from composer.routing.scorers.base import ScorerOptions
from composer.routing.scorers.solved import SolvedOptions, SolvedScorer
from experts.routing_artifacts import Statistics

__all__ = ["RidgeScorer", "solve_ridge"]


def solve_ridge(
    classes: Sequence[Statistics], *, ridge: float = 0.1, balanced: bool = True
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Solve the ridge regression of one-hot class labels on hidden states, with an intercept.

    With class weights ``v_c`` that sum to 1 (alike if ``balanced``, else ``n_c / sum n``), ``W`` minimises
    ``sum_c v_c mean_{x in c} |W x + b - e_c|^2 + l |W|^2``, ``l = ridge * tr(A) / d``. The intercept is not
    penalised, so the augmented normal equations ``(A1 + l I) W1 = B1`` of a training-free BTX router (DUME,
    arXiv 2603.29765) reduce to centred ones, which do not drown where all states share a large mean:
    ``A = sum_c v_c scatter_c / n_c - m m^T``, ``m = sum_c v_c m_c``, ``w_c = v_c (A + l I)^-1 (m_c - m)``,
    ``b_c = v_c - w_c . m``. The strength is relative to the mean variance because the scale of hidden states is
    the base's own. Labels are shares in [0, 1], so columns are comparable as they are and are not normalised.

    Args:
        classes: Statistics of the classes in canonical order, the public one first; at least one.
        ridge: Strength of the penalty, relative to the mean variance of a coordinate; above 0.
        balanced: Whether classes weigh alike, whatever their size. Otherwise an owner with ten times the text pulls
            every decision towards their own domain, and what others publish changes with how much they have.

    Returns:
        Weights float64 ``(classes, d)`` and biases float64 ``(classes,)``; the scores of a state sum to 1.
    """
    d = classes[0].sum.shape[0]
    total = float(sum(c.count for c in classes))
    shares = [1.0 / len(classes) if balanced else c.count / total for c in classes]
    moment, middle = np.zeros((d, d)), np.zeros(d)
    for share, c in zip(shares, classes, strict=True):
        moment += share / c.count * c.scatter
        middle += share / c.count * c.sum
    scatter = moment - middle[:, None] * middle[None, :]
    scatter[np.diag_indices(d)] += ridge * np.trace(scatter) / d
    targets = np.stack([share * (c.mean - middle) for share, c in zip(shares, classes, strict=True)])
    weights: NDArray[np.float64] = np.linalg.solve(scatter, targets.T).T.astype(np.float64)
    biases: NDArray[np.float64] = np.asarray(shares) - weights @ middle
    return weights, biases


class RidgeOptions(SolvedOptions):
    """Settings of the ridge gate; see `RidgeScorer`."""

    ridge: float = Field(default=0.1, gt=0)
    balanced: bool = True
    temperature: float = Field(default=0.1, gt=0)


class RidgeScorer(SolvedScorer):
    """Regressed share of each owner's domain in the hidden states seen so far.

    The scores estimate probabilities linearly, so they lie near [0, 1] and need a temperature well below 1.

    Args:
        ridge: See `solve_ridge`.
        balanced: See `solve_ridge`.
        shared: See `SolvedScorer`.
    """

    Options: ClassVar[type[ScorerOptions]] = RidgeOptions

    def __init__(self, *, ridge: float = 0.1, balanced: bool = True, **shared: Any) -> None:
        super().__init__(**{"temperature": 0.1, **shared})
        self.ridge = ridge
        self.balanced = balanced

    def solve(self, classes: Sequence[Statistics]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Solve the regression; see `solve_ridge`."""
        return solve_ridge(classes, ridge=self.ridge, balanced=self.balanced)
