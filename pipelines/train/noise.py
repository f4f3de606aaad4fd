"""Statistics that no single document can be read from: bounded contributions and Gaussian noise.

Knows states of single documents, the public statistics and a budget; knows nothing of files or jobs.

A document contributes the mean of its states, relative to the public mean, scaled down to a bound (and, on request,
its second moments about the public mean, to another). The average over N documents then moves by at most
``2 * bound / N`` when one document is replaced by another, and gets noise by the analytic Gaussian mechanism (Balle,
Wang, arXiv 1805.06530). What follows is computed from that result and from public numbers alone, which costs nothing:
a projection to moments that states can have. The noise is drawn in floating point and rounded to a grid; it is no
defence against somebody who can exploit the last bits of an unrounded draw (Mironov 2012).
"""

from __future__ import annotations

import hashlib
import hmac
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from experts.errors import DataError
from experts.routing_artifacts import NoiseInfo, Statistics

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Contributions",
    "NoiseBudget",
    "add_noise",
    "noise_multiplier",
    "normalised",
    "project_covariance",
    "release",
    "symmetric_noise",
]

_GRID = 1024.0
"""Noisy numbers are rounded to this part of the noise's standard deviation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseBudget:
    """What may be learned of a document.

    Attributes:
        epsilon: Above 0.
        delta: Between 0 and 1, below 1 / documents.
        release: ``mean`` or ``moments``; see `release`.
        clip: Bound of a document's mean state, relative to the root mean square length of public states.
    """

    epsilon: float
    delta: float
    release: Literal["mean", "moments"]
    clip: float


def noise_multiplier(*, epsilon: float, delta: float) -> float:
    """Return the smallest sigma for which Gaussian noise on a query of sensitivity 1 is (epsilon, delta)-private.

    It solves ``Phi(1/2s - epsilon s) - e^epsilon Phi(-1/2s - epsilon s) = delta`` (arXiv 1805.06530, theorem 8),
    whose left side falls as s grows.

    Args:
        epsilon: Above 0, at most 50.
        delta: Between 0 and 1.
    """

    def leaked(sigma: float) -> float:
        low, high = 0.5 / sigma - epsilon * sigma, -0.5 / sigma - epsilon * sigma
        return _normal_cdf(low) - math.exp(epsilon) * _normal_cdf(high)

    small, large = 1e-4, 1.0
    while leaked(large) > delta:
        large *= 2
    for _ in range(200):
        middle = math.sqrt(small * large)
        small, large = (middle, large) if leaked(middle) > delta else (small, middle)
    return large


def _normal_cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def normalised(states: Tensor, normalization: Literal["none", "rms"]) -> Tensor:
    """Return states ``(..., d)`` as statistics are taken of them, float32: ``x / sqrt(mean(x^2) + 1e-6)`` for rms."""
    import torch

    x = states.float()
    return x if normalization == "none" else x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6)


class Contributions:
    """Sums bounded contributions of documents.

    Args:
        public: Statistics of public text, which contributions are relative to.
        budget: Gives the bounds.
        normalization: As the public statistics'.
    """

    def __init__(
        self, *, public: Statistics, budget: NoiseBudget, normalization: Literal["none", "rms"]
    ) -> None:
        self.public = public
        self.budget = budget
        self.normalization = normalization
        self.documents = 0
        length = math.sqrt(float(np.trace(public.scatter)) / public.count)
        self.clip_norm = budget.clip * length
        self.second_clip_norm = (budget.clip * length) ** 2
        width = public.sum.shape[0]
        self.mean = np.zeros(width)
        """Sum of the documents' bounded mean differences, float64 ``(d,)``."""
        self.second = np.zeros((width, width)) if budget.release == "moments" else None
        """Sum of the documents' bounded second moments, float64 ``(d, d)``, if they are wanted."""

    def add(self, states: Tensor) -> None:
        """Add one document.

        Args:
            states: Of this document's tokens, computed without any other document: ``(tokens, d)``; none: it
                counts as one that contributes nothing.
        """
        self.documents += 1
        if not len(states):
            return
        x = normalised(states, self.normalization).double().cpu().numpy() - self.public.mean
        self.mean += _bounded(x.mean(axis=0), self.clip_norm)
        if self.second is not None:
            self.second += _bounded(x.T @ x / len(x), self.second_clip_norm)


def _bounded(value: NDArray[np.float64], bound: float) -> NDArray[np.float64]:
    length = float(np.linalg.norm(value))  # Frobenius for a matrix
    return value if length <= bound else value * (bound / length)


def release(given: Contributions, *, secret: bytes) -> tuple[Statistics, NoiseInfo]:
    """Make publishable statistics.

    ``mean``: the noisy mean, with the public covariance around it. ``moments``: mean and second moments, both noisy;
    two queries in one, so each has sqrt(2) times the noise that it would have alone. The d^2 entries need many
    documents: noise of standard deviation s has eigenvalues up to ``2 s sqrt(d)``.

    Args:
        given: Contributions of all documents.
        secret: Whoever knows it can take the noise away. The same contributions get the same noise under it, so
            repeating a job gives away nothing more; different contributions get independent noise.

    Returns:
        Statistics in which every document counts as one state, and what is guaranteed.

    Raises:
        DataError: There is no document, or delta is not below 1 / documents, which would allow publishing one.
    """
    count, budget = given.documents, given.budget
    if not count or budget.delta >= 1 / count:
        raise DataError(
            f"statistics.noise: a delta of {budget.delta:g} for {count} documents; it must be below 1 / documents "
            f"({1 / max(count, 1):.3g}), or publishing one of them would be allowed. Give a smaller delta."
        )
    queries = 1 if given.second is None else 2
    multiplier = noise_multiplier(epsilon=budget.epsilon, delta=budget.delta) * math.sqrt(queries)
    random = _generator(secret, given)
    sigma = multiplier * 2 * given.clip_norm / count
    shift = add_noise(given.mean / count, random.normal(scale=sigma, size=given.mean.shape), sigma)
    covariance = given.public.covariance
    if given.second is not None:
        second_sigma = multiplier * 2 * given.second_clip_norm / count
        noise = symmetric_noise(len(shift), second_sigma, random)
        covariance = add_noise(given.second / count, noise, second_sigma) - np.outer(shift, shift)
    statistics = _possible(
        given.public.mean + shift,
        covariance,
        count=count,
        public=given.public,
        rms=given.normalization == "rms",
    )
    info = NoiseInfo(
        mechanism="analytic-gaussian",
        unit="document",
        epsilon=budget.epsilon,
        delta=budget.delta,
        release=budget.release,
        clip_norm=given.clip_norm,
        second_clip_norm=None if given.second is None else given.second_clip_norm,
        noise_std=sigma,
    )
    return statistics, info


def _generator(secret: bytes, given: Contributions) -> np.random.Generator:
    """Seed by a keyed digest of what the noise is for."""
    message = hashlib.sha256(repr((given.budget, given.normalization, given.documents)).encode())
    for array in (given.mean, given.second, given.public.sum, given.public.scatter):
        message.update(b"" if array is None else array.tobytes())
    seed = hmac.new(secret, message.digest(), hashlib.sha256).digest()
    return np.random.default_rng(int.from_bytes(seed, "big"))


def symmetric_noise(width: int, sigma: float, random: np.random.Generator) -> NDArray[np.float64]:
    """Gaussian noise on symmetric matrices with the Frobenius norm: entries off the diagonal count twice in it."""
    draw = random.normal(scale=sigma, size=(width, width))
    upper = np.triu(draw, 1) / math.sqrt(2)
    noise: NDArray[np.float64] = upper + upper.T + np.diag(np.diagonal(draw))
    return noise


def add_noise(value: NDArray[np.float64], noise: NDArray[np.float64], sigma: float) -> NDArray[np.float64]:
    """Add noise of standard deviation ``sigma`` and round to a grid of a small part of it; any shape."""
    step = sigma / _GRID
    rounded: NDArray[np.float64] = np.round((value + noise) / step) * step
    return rounded


def _possible(
    mean: NDArray[np.float64], covariance: NDArray[np.float64], *, count: int, public: Statistics, rms: bool
) -> Statistics:
    """Turn noisy moments into those that states can have: mean and covariance of the right total length."""
    power = float(np.trace(public.scatter)) / public.count  # E |x|^2, which is the same for all under rms
    length = float(mean @ mean)
    if rms and length > 0.99 * power:
        mean = mean * math.sqrt(0.99 * power / length)
    total = power - float(mean @ mean) if rms else max(float(np.trace(covariance)), 1e-3 * power)
    covariance = project_covariance(covariance, trace=total)
    scatter = count * (covariance + np.outer(mean, mean))
    return Statistics(count=float(count), sum=count * mean, scatter=(scatter + scatter.T) / 2)


def project_covariance(matrix: NDArray[np.float64], *, trace: float) -> NDArray[np.float64]:
    """Return the nearest positive semi-definite matrix with this trace, in Frobenius norm.

    Its eigenvalues are the matrix's, moved down together until what stays above 0 sums to ``trace``: the projection
    to a simplex (Duchi et al. 2008). That also takes away most of the spread that noise adds to eigenvalues.

    Args:
        matrix: Symmetric ``(d, d)``.
        trace: Above 0.
    """
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    descending = values[::-1]
    excess = (np.cumsum(descending) - trace) / np.arange(1, len(values) + 1)
    kept = int(np.nonzero(descending > excess)[0][-1])
    projected: NDArray[np.float64] = (vectors * np.maximum(values - excess[kept], 0)) @ vectors.T
    return projected
