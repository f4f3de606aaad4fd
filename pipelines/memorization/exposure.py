"""Exposure: how far a model prefers a planted secret to those that could have been drawn in its place.

``exposure = log2 |R| - log2 rank``, where ``rank`` is the canary's among all of ``R`` by loss (Carlini et al. 2019,
"The Secret Sharer", section 4). A model that never saw the canary gives it exposure t with probability 2^-t. Knows
losses; knows nothing of the models they come from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

__all__ = ["estimated_exposure", "ranked_exposure", "skew_normal_fit", "skew_normal_log_cdf"]

_MAX_SKEWNESS = 0.99
"""A skew-normal distribution has less than 0.9953."""

_POINTS = 4001


def ranked_exposure(loss: float, references: Sequence[float]) -> float:
    """Return the exposure in bits among the canary and the references; ties count against the canary.

    Exact where the references are all other secrets. Among a sample it cannot exceed
    ``log2(len(references) + 1)``, which a well memorised canary reaches (section 4.3, "by sampling").
    """
    rank = 1 + sum(other <= loss for other in references)
    return math.log2(len(references) + 1) - math.log2(rank)


def estimated_exposure(loss: float, references: Sequence[float], *, space_bits: float) -> float | None:
    """Return ``-log2 P(reference loss <= loss)`` under a fitted skew-normal distribution, in bits.

    Goes beyond the sample (section 4.3, "by distribution modelling"), as far as the fit can be trusted in its tail;
    at most ``space_bits``. None where the references' losses do not vary.
    """
    fit = skew_normal_fit(references)
    if fit is None:
        return None
    return min(space_bits, -skew_normal_log_cdf(loss, *fit) / math.log(2))


def skew_normal_fit(values: Sequence[float]) -> tuple[float, float, float] | None:
    """Return location, scale and shape with the mean, variance and skewness of the values (Azzalini 1985).

    The sample's skewness is cut to what the family can have. None where the values do not vary.
    """
    x = torch.tensor(values, dtype=torch.float64)
    deviation = float(x.std(correction=0)) if len(x) else 0.0
    if not deviation:
        return None
    skewness = float(((x - x.mean()) / deviation).pow(3).mean())
    skewness = max(-_MAX_SKEWNESS, min(_MAX_SKEWNESS, skewness))
    power = abs(skewness) ** (2 / 3)
    delta = math.copysign(math.sqrt(math.pi / 2 * power / (power + ((4 - math.pi) / 2) ** (2 / 3))), skewness)
    scale = deviation / math.sqrt(1 - 2 * delta**2 / math.pi)
    location = float(x.mean()) - scale * delta * math.sqrt(2 / math.pi)
    return location, scale, delta / math.sqrt(1 - delta**2)


def skew_normal_log_cdf(x: float, location: float, scale: float, shape: float) -> float:
    """Return ``log F(x)``, accurate far in the left tail, where ``F`` itself underflows.

    ``F(x) = integral of 2 phi(t) Phi(shape t)`` up to ``(x - location) / scale``: the trapezoid rule on steps that
    grow with the distance from the upper end, summed in logarithms.
    """
    upper = (x - location) / scale
    # the integrand may fall by a factor e within 1 / (|upper| (1 + shape^2)) below the upper end
    steps = torch.logspace(-9, math.log10(40 + max(0.0, upper)), _POINTS, dtype=torch.float64)
    t = upper - torch.cat([steps.new_zeros(1), steps])
    logs = math.log(2) - t**2 / 2 - math.log(2 * math.pi) / 2 + torch.special.log_ndtr(shape * t)
    widths = -t.diff()
    area = torch.logaddexp(logs[1:], logs[:-1]) - math.log(2) + widths.log()
    return min(0.0, float(torch.logsumexp(area, dim=0)))
