"""Parts of a training job that have settings of their own: statistics and their noise, biases, coordination.

Knows fields, ranges and defaults; knows nothing of how any of them is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

__all__ = [
    "AsSwitch",
    "BiasSettings",
    "CoordinationSettings",
    "Count",
    "Flag",
    "Integer",
    "JobSettings",
    "NoiseSettings",
    "Number",
    "StatisticsSettings",
    "as_list",
    "as_switch",
]

# YAML has numbers and booleans of its own: a string in their place is a mistake, not a spelling
Integer = Annotated[int, Field(strict=True)]
Number = Annotated[float, Field(strict=True)]
Count = Annotated[int, Field(strict=True, gt=0)]
Flag = Annotated[bool, Field(strict=True)]


def as_switch(value: object) -> object:
    """``statistics: false`` is short for ``statistics: {enabled: false}``."""
    return {"enabled": value} if isinstance(value, bool) else value


AsSwitch = BeforeValidator(as_switch)


def as_list(value: object) -> object:
    """One path is short for a list of one."""
    return [value] if isinstance(value, str | Path) else value


class JobSettings(BaseModel):
    """What all of them have: nothing unknown, nothing changed afterwards."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class NoiseSettings(JobSettings):
    """Gaussian noise on the statistics, so that they say little about any single document.

    The guarantee is (epsilon, delta)-differential privacy of the statistics for one document replaced by another; it
    is no guarantee for the expert's weights. It holds as long as the noise is secret: the key lies in ``workdir``.
    """

    epsilon: Number = Field(gt=0, le=50)
    """The smaller, the more noise: about 1 is strict, 8 is mild."""
    delta: Number = Field(default=1e-6, gt=0, lt=1)
    """Must be below 1 / documents."""
    release: Literal["mean", "moments"] = "mean"
    """``mean``: publish only where the domain's mean lies, with the public covariance about it. ``moments``: the
    covariance too, which needs a great many documents to be more than noise."""
    clip: Number = Field(default=0.5, gt=0, le=2)
    """How far a document's mean may lie from the public mean, relative to the length of states; beyond, it is moved
    closer. Noise is in proportion to it."""
    seed: Annotated[int, Field(strict=True, ge=0)] | None = None
    """In the place of the secret key, to repeat an experiment. Whoever knows it can take the noise away."""


class StatisticsSettings(JobSettings):
    """The additive statistics (n, sum of x, sum of x xT) of the anchor's states on the domain's text."""

    enabled: Flag = True
    """Publish them, so that builders can solve a router without any training. They are averages of the data."""
    normalization: Literal["none", "rms"] = "rms"
    """``rms``: divide each token's state by its root mean square first. The states of first tokens are tens of
    times larger than all others; without this they dominate the covariance."""
    skip_first: Flag = False
    """Leave out the first position of every window. It sees no context, but it is what generation starts from,
    so it is included by default."""
    noise: NoiseSettings | None = None
    """Differential privacy for the documents behind them, or the queries of a retriever; none by default. For language
    models the base must publish statistics."""


class BiasSettings(JobSettings):
    """The owner's router bias, never above zero: it tightens the domain's boundary against the public expert."""

    enabled: Flag = True
    """Train one per layer, where rows are trained."""
    init: Number = Field(default=-0.1, lt=0)
    """Starting value, below zero."""
    form: Literal["softplus", "clamp"] = "softplus"
    """``-softplus(raw)``, smooth everywhere, or the paper's ``min(raw, 0)``."""


class CoordinationSettings(JobSettings):
    """Training inside a two-expert mixture with the frozen anchor (FlexOlmo, arXiv 2507.07024, section 3.2)."""

    enabled: Flag = False
    """Off by default: under a context router plain training measured better. Rows and biases exist only with it."""
    router_z_loss: Number = Field(default=1e-3, ge=0)
    """Weight of the mean squared log-partition of the router's logits."""
    softmax_z_loss: Number = Field(default=1e-5, ge=0)
    """Weight of the mean squared log-partition of the language model's logits."""
