"""Rows made of prompts: the direction in which an expert's texts lie from public ones, where the router reads.

Every row follows from its own expert's prompts, so it does not change with who else is there. Knows rows; how the
model is run on prompts is in `composer.upcycling.measuring`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch

from composer.routing.scorers.base import ScorerInputs, ScorerOptions
from composer.routing.scorers.made import MadeScorer

__all__ = ["PromptScorer"]


class PromptOptions(ScorerOptions):
    """Settings of rows that are made of prompts; see `PromptScorer`."""

    scale: float = 1.0


class PromptScorer(MadeScorer):
    """Dot products with the experts' directions: ``s_e(h) = scale * (m_e - n_e - m_0) / |m_e - n_e - m_0| . h``.

    ``m_e`` is the mean over the tokens of an expert's positive prompts of the very states that the layer's router
    reads while all tokens are routed to that expert; ``n_e`` the same of its negative prompts. ``m_0`` is that of
    public prompts, where there are any, with the base's own modules in every layer, whether or not the base is an
    expert. The anchor's row is 0: the others have to beat it. The gate that merging tools make of prompts
    (mergekit-moe's ``hidden``) takes the last token's state before the attention instead, which the router never sees.
    """

    Options: ClassVar[type[ScorerOptions]] = PromptOptions
    rows_name = "rows made of prompts"
    from_prompts = True

    @classmethod
    def make(cls, inputs: ScorerInputs, options: Any) -> Self:
        """Make rows of zeros, which `composer.upcycling.measuring` fills in once the model can run."""
        rows = torch.zeros(len(inputs.names), inputs.hidden_size, device=inputs.device, dtype=inputs.dtype)
        scorer = cls(ids=tuple(inputs.names), rows=rows)
        scorer.scale = options.scale
        return scorer

    scale: float

    def set_row(self, expert: int, direction: torch.Tensor) -> None:
        """Take an expert's direction, float ``(d,)``."""
        row = self.scale * direction / direction.norm().clamp(min=1e-12)
        with torch.no_grad():
            self.rows[self.position[expert]] = row.to(self.rows)
