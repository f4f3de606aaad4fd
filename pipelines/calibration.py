"""What it costs to leave the owners' router biases out, as a stock checkpoint has to: measured on held-out text.

Knows composed models and texts; knows nothing of checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from composer.routing.scorers.learned import LearnedScorer
from pipelines.evaluate import measure, prepare

__all__ = ["BiasCost", "bias_cost", "without_bias"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BiasCost:
    """One domain's loss, in nats per token, with the biases and without."""

    nll: float
    nll_without_bias: float

    @property
    def change(self) -> float:
        """Nats per token that dropping the biases adds; below 0 where it helps."""
        return self.nll_without_bias - self.nll

    def to_dict(self) -> dict[str, float]:
        """Return plain data for ``--json``."""
        return {"nll": self.nll, "nll_without_bias": self.nll_without_bias, "change": self.change}


def bias_cost(
    model: nn.Module, tokenizer: Any, data: Mapping[str, Sequence[str]], **size: Any
) -> dict[str, BiasCost]:
    """Measure a composed model twice on the same windows.

    Args:
        model: A composed model in eval mode.
        tokenizer: Its tokenizer.
        data: Documents by domain.
        size: ``sequence_length`` and ``max_tokens`` as `pipelines.evaluate.prepare` takes them.

    Raises:
        DataError: There is no domain, or one does not fill a window.
    """
    windows = prepare(data, tokenizer, **size)
    before = measure(model, windows)
    with without_bias(model):
        after = measure(model, windows)
    return {
        domain: BiasCost(nll=score.nll, nll_without_bias=after.domains[domain].nll)
        for domain, score in before.domains.items()
    }


@contextmanager
def without_bias(model: nn.Module) -> Iterator[None]:
    """Let every router of learned rows score without biases inside the block."""
    scorers = [module for module in model.modules() if isinstance(module, LearnedScorer)]
    kept = [scorer.bias for scorer in scorers]
    try:
        for scorer in scorers:
            scorer.bias = None
        yield
    finally:
        for scorer, bias in zip(scorers, kept, strict=True):
            scorer.bias = bias
