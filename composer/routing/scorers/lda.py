"""A training-free gate from additive statistics: linear discriminant analysis over the owners' hidden states.

Knows the equations; how statistics are collected and a gate is asked for is in `composer.routing.scorers.solved`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from composer.routing.scorers.solved import SolvedOptions, SolvedScorer
from composer.routing.types import ANCHOR
from experts.routing_artifacts import Statistics

__all__ = ["LDAScorer", "solve_lda"]


def solve_lda(
    classes: Sequence[Statistics], *, shrinkage: float = 0.1
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Solve linear discriminants with one shared covariance.

    ``S = mean_c (scatter_c / n_c - m_c m_c^T)``, ``S += shrinkage * (tr S / d) I``,
    ``w_c = S^-1 (m_c - m)``, ``b_c = -(m_c + m) . w_c / 2`` with ``m = mean_c m_c`` (Hastie,
    Tibshirani, Friedman, The Elements of Statistical Learning, section 4.3; shrinkage towards the identity as in
    Friedman 1989). Classes weigh alike in ``S``, whatever their size, so that an owner with much text does not set
    everybody's scale. The book's ``w_c = S^-1 m_c`` differ by a vector common to all classes, which a softmax does
    not see; left in, it makes large terms that float32 cannot cancel where the states share a large mean.

    Args:
        classes: Statistics of the classes, the public one first; at least one.
        shrinkage: Weight of the identity, relative to the mean variance; above 0.

    Returns:
        Weights float64 ``(classes, d)`` and biases float64 ``(classes,)``: the log-likelihoods of the classes, up to
        what they have in common.
    """
    d = classes[0].sum.shape[0]
    within = np.zeros((d, d))
    for c in classes:
        within += c.covariance
    covariance = within / len(classes)
    covariance[np.diag_indices(d)] += shrinkage * np.trace(covariance) / d
    means = np.stack([c.mean for c in classes])
    middle = means.mean(axis=0)
    weights: NDArray[np.float64] = np.linalg.solve(covariance, (means - middle).T).T.astype(np.float64)
    biases: NDArray[np.float64] = -0.5 * np.einsum("cd,cd->c", means + middle, weights)
    return weights, biases


class LDAOptions(SolvedOptions):
    """Settings of the discriminant gate; see `LDAScorer`."""

    shrinkage: float = Field(default=0.1, gt=0)
    anchor_prior: float | None = Field(default=None, gt=0, lt=1)


class LDAScorer(SolvedScorer):
    """Log-posterior of each owner's domain given the hidden states seen so far.

    Args:
        shrinkage: See `solve_lda`.
        anchor_prior: Probability, before anything is read, that a text is nobody's here; the owners share the rest
            alike. None: the public class counts as one more owner. Unlike the likelihood it does not grow with the
            text, so it mostly decides the first tokens. A small one serves text of the owners better whose experts
            do little harm elsewhere, and text that nobody owns, a leaver's too, worse where they do.
        shared: See `SolvedScorer`.
    """

    Options = LDAOptions

    def __init__(self, *, shrinkage: float = 0.1, anchor_prior: float | None = None, **shared: Any) -> None:
        super().__init__(**shared)
        self.shrinkage = shrinkage
        self.anchor_prior = anchor_prior

    def solve(self, classes: Sequence[Statistics]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Solve linear discriminants; see `solve_lda`."""
        return solve_lda(classes, shrinkage=self.shrinkage)

    def forward(
        self, features: torch.Tensor, counts: torch.Tensor | None, experts: Sequence[int]
    ) -> torch.Tensor:
        """Add the log-odds of the anchor's prior to its likelihood; see `Scorer.forward`."""
        logits = super().forward(features, counts, experts)
        owners = len(experts) - 1
        if self.anchor_prior is None or owners == 0 or experts[0] != ANCHOR:
            return logits
        odds = self.anchor_prior * owners / (1.0 - self.anchor_prior)
        offset = logits.new_zeros(len(experts))
        offset[0] = math.log(odds)
        return logits + offset
