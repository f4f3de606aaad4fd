"""Selectors turn an allowed set's scores into experts and weights.

Knows scores, by expert name; what they were made of and who was allowed is decided before.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from composer.retrieval.facts import Array

__all__ = ["RetrievalSelector", "Soft", "Top1", "Top2"]

Positions = NDArray[np.int64]


class RetrievalSelector(ABC):
    """Chooses experts.

    Attributes:
        most: How many experts a query meets at most; None: all that are allowed.

    Args:
        temperature: Divides scores before a softmax.
    """

    most: int | None

    def __init__(self, *, temperature: float) -> None:
        self.temperature = temperature

    @abstractmethod
    def select(self, scores: Array) -> tuple[Positions, Array]:
        """Choose by scores ``(rows, experts)``; equal ones go to the first name.

        Returns:
            Positions ``(rows, m)`` and weights ``(rows, m)``, which sum to 1; an expert that is not to be run has
            weight 0.
        """


def _best(scores: Array, most: int) -> Positions:
    order: Positions = np.argsort(-scores, axis=1, kind="stable")[:, :most]
    return order


def _softmax(scores: Array) -> Array:
    with np.errstate(invalid="ignore"):  # a row without any score; whoever asks gives it to the base
        powers = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights: Array = powers / powers.sum(axis=1, keepdims=True)
    return weights


class Top1(RetrievalSelector):
    """The best expert alone."""

    most = 1

    def select(self, scores: Array) -> tuple[Positions, Array]:
        """Take the highest score."""
        positions = scores.argmax(axis=1)[:, None].astype(np.int64)
        return positions, np.ones(positions.shape)


class Top2(RetrievalSelector):
    """The two best experts, weighed by a softmax of their scores."""

    most = 2

    def select(self, scores: Array) -> tuple[Positions, Array]:
        """Take the two highest scores."""
        positions = _best(scores, 2)
        return positions, _softmax(np.take_along_axis(scores, positions, axis=1) / self.temperature)


class Soft(RetrievalSelector):
    """All experts, weighed by a softmax of their scores; the embeddings are fused, so there is one search."""

    most = None

    def select(self, scores: Array) -> tuple[Positions, Array]:
        """Weigh everybody."""
        positions = np.broadcast_to(np.arange(scores.shape[1], dtype=np.int64), scores.shape)
        return positions, _softmax(scores / self.temperature)
