"""The selector's contract: logits over the allowed experts in, chosen positions and their weights out."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import nn

__all__ = ["Selector"]


class Selector(nn.Module):
    """Turns logits into a choice.

    A selector sees the allowed experts only, so whatever it computes is what it would compute had the others
    never been composed; and each token by itself, so rows with different sets may share a call. Weights are
    non-negative; they sum to 1 where ``normalize`` is set.
    """

    normalize: bool

    @abstractmethod
    def forward(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose experts.

        Args:
            logits: ``(tokens, n)``, one column per allowed expert.

        Returns:
            Positions among the ``n`` columns, int64 ``(tokens, k)``, and weights, float32 ``(tokens, k)``, with
            ``k <= n``.
        """
