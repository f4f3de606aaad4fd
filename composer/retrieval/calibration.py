"""Fits the temperature of a router's scores, so that its confidence means what it says.

Knows scores and which expert was right; knows no query.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from composer.retrieval.facts import Array
from experts.errors import DataError

__all__ = ["fit_temperature"]

_LOWEST, _HIGHEST = -7.0, 7.0
_STEPS = 60


def fit_temperature(scores: Array, labels: NDArray[np.integer]) -> float:
    """Minimise the mean negative log-likelihood of ``softmax(scores / T)`` over T (Guo et al. 2017, section 4.2).

    Dividing all scores by one number changes no order, so the choice of an expert stays what it was.

    Args:
        scores: float64 ``(queries, experts)``, of queries that made neither the router nor its labels.
        labels: Which expert was right, int ``(queries,)``.

    Returns:
        The temperature, between exp(-7) and exp(7).

    Raises:
        DataError: The arrays do not fit each other.
    """
    known = np.asarray(scores, dtype=np.float64)
    right = np.asarray(labels)
    fits = known.ndim == 2 and right.shape == known.shape[:1] and right.size > 0
    if not fits or right.min() < 0 or right.max() >= known.shape[1]:
        span = f" from {right.min()} to {right.max()}" if right.size else ""
        raise DataError(
            "A temperature is fitted to scores (queries, experts) and one expert's position for each query; given are "
            f"scores of shape {known.shape} and labels of shape {right.shape}{span}."
        )
    # convex in 1 / T, hence with one minimum in log T; golden section
    low, high = _LOWEST, _HIGHEST
    ratio = (np.sqrt(5.0) - 1) / 2
    for _ in range(_STEPS):
        left, middle = high - ratio * (high - low), low + ratio * (high - low)
        if _loss(known, right, left) < _loss(known, right, middle):
            high = middle
        else:
            low = left
    return float(np.exp((low + high) / 2))


def _loss(scores: Array, right: NDArray[np.integer], log_temperature: float) -> float:
    logits = scores * np.exp(-log_temperature)
    logits = logits - logits.max(axis=1, keepdims=True)
    chosen = np.take_along_axis(logits, right[:, None], axis=1)[:, 0]
    return float((np.log(np.exp(logits).sum(axis=1)) - chosen).mean())
