"""Random rows: a linear router that knows nothing yet, where training of a mixture starts.

Every row follows from a seed and its expert's name, so it does not change with who else is there.
"""

from __future__ import annotations

import hashlib
from typing import Any, ClassVar, Literal, Self

import torch

from composer.routing.scorers.base import ScorerInputs, ScorerOptions
from composer.routing.scorers.made import MadeScorer

__all__ = ["RandomScorer"]


class RandomOptions(ScorerOptions):
    """Settings of random rows."""

    seed: int = 0
    distribution: Literal["uniform", "normal"] = "uniform"


class RandomScorer(MadeScorer):
    """Dot products with rows that are drawn: ``s_e(h) = r_e . h``.

    ``uniform`` draws from ``U(-1/sqrt(d), 1/sqrt(d))``, as linear layers start (He et al., arXiv 1502.01852, with
    PyTorch's gain); ``normal`` draws from ``N(0, 1)``, which is near one-hot routing to random experts.
    """

    Options: ClassVar[type[ScorerOptions]] = RandomOptions
    rows_name = "random rows"

    @classmethod
    def make(cls, inputs: ScorerInputs, options: Any) -> Self:
        """Draw the rows of one layer."""
        width = inputs.hidden_size
        rows = [_draw(name, inputs, options, width) for name in inputs.names.values()]
        return cls(ids=tuple(inputs.names), rows=torch.stack(rows).to(inputs.device, inputs.dtype))


def _draw(name: str, inputs: ScorerInputs, options: RandomOptions, width: int) -> torch.Tensor:
    text = f"{options.seed} {inputs.branch} {inputs.layer} {name}"
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
    generator = torch.Generator().manual_seed(seed)
    if options.distribution == "normal":
        return torch.randn(width, generator=generator)
    return torch.empty(width).uniform_(-(width**-0.5), width**-0.5, generator=generator)
