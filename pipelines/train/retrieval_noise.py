"""Sums over queries that no single query can be read from: features of bounded length and Gaussian noise.

Knows features of single queries and a budget; knows nothing of files or models. The mechanism and its limits are those
of `pipelines.train.noise`; a query's feature has length 1, so nothing public is needed to bound it.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from experts.errors import DataError
from experts.retrieval_artifacts import Moments
from experts.retrieval_info import RetrievalNoise
from pipelines.train.noise import add_noise, noise_multiplier, project_covariance, symmetric_noise

__all__ = ["noisy_moments"]

Array = NDArray[np.float64]

_SENSITIVITY = {"mean": 2.0, "second": math.sqrt(2.0)}
"""How far the sum of unit vectors, and of their outer products in Frobenius norm, moves when one becomes another:
``|x x^T - y y^T|^2 = 2 - 2 (x . y)^2``."""


def noisy_moments(
    features: Mapping[str, Array],
    *,
    epsilon: float,
    delta: float,
    release: Literal["mean", "moments"],
    secret: bytes,
) -> tuple[dict[str, Moments], RetrievalNoise]:
    """Make publishable sums; one query moves all of them, so they share the budget.

    Each of the m released sums gets sqrt(m) times the noise that it would have alone, which is the noise of one query
    of m parts with the Gaussian mechanism. What follows is computed from the noisy sums alone.

    Args:
        features: Place -> features ``(queries, d)``, the same queries in each; longer than 1 is shortened to 1.
        epsilon: Above 0, at most 50.
        delta: Between 0 and 1 / queries.
        release: ``mean``: sums without second moments; ``moments``: with them.
        secret: Whoever knows it can take the noise away; the same features get the same noise under it.

    Returns:
        Sums by place, and what is guaranteed.

    Raises:
        DataError: There is no query, or delta is not below 1 / queries, which would allow publishing one.
    """
    bounded = {place: _bounded(x) for place, x in features.items()}
    count = len(next(iter(bounded.values())))
    if not count or delta >= 1 / count:
        raise DataError(
            f"statistics.noise: a delta of {delta:g} for {count} queries; it must be below 1 / queries "
            f"({1 / max(count, 1):.3g}), or publishing one of them would be allowed. Give a smaller delta."
        )
    releases = len(bounded) * (2 if release == "moments" else 1)
    multiplier = noise_multiplier(epsilon=epsilon, delta=delta) * math.sqrt(releases)
    random = _generator(secret, bounded, f"{epsilon!r} {delta!r} {release}")
    info = RetrievalNoise(
        epsilon=epsilon,
        delta=delta,
        release=release,
        clip_norm=1.0,
        noise_std=multiplier * _SENSITIVITY["mean"] / count,
    )
    second = release == "moments"
    return {place: _noisy(x, multiplier, random, second=second) for place, x in bounded.items()}, info


def _bounded(x: Array) -> Array:
    wide = np.asarray(x, dtype=np.float64)
    bounded: Array = wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1.0)
    return bounded


def _generator(secret: bytes, features: Mapping[str, Array], budget: str) -> np.random.Generator:
    """Seed by a keyed digest of what the noise is for."""
    message = hashlib.sha256(budget.encode())
    for place in sorted(features):
        message.update(place.encode() + features[place].tobytes())
    seed = hmac.new(secret, message.digest(), hashlib.sha256).digest()
    return np.random.default_rng(int.from_bytes(seed, "big"))


def _noisy(x: Array, multiplier: float, random: np.random.Generator, *, second: bool) -> Moments:
    """Noise on the mean, and on the mean outer product; then the nearest moments that unit vectors can have."""
    count, width = x.shape
    sigma = multiplier * _SENSITIVITY["mean"] / count
    mean = add_noise(x.mean(axis=0), random.normal(scale=sigma, size=width), sigma)
    mean *= min(1.0, math.sqrt(0.99) / max(float(np.linalg.norm(mean)), 1e-12))
    if not second:
        return Moments(count=count, sum=count * mean, scatter=None)
    spread = multiplier * _SENSITIVITY["second"] / count
    products = add_noise(x.T @ x / count, symmetric_noise(width, spread, random), spread)
    covariance = project_covariance(products - np.outer(mean, mean), trace=1.0 - float(mean @ mean))
    scatter = count * (covariance + np.outer(mean, mean))
    return Moments(count=count, sum=count * mean, scatter=(scatter + scatter.T) / 2)
