"""Full and low-rank experts in one layer: the anchor and the low-rank experts share products, the rest is a stack."""

from __future__ import annotations

import torch
from torch import nn

from composer.blocks.low_rank import LowRankFFN
from composer.blocks.stacked import StackedFFN

__all__ = ["MixedFFN"]


class MixedFFN(nn.Module):
    """Local indices ``0 .. n`` are the anchor and the low-rank experts, ``n + 1 ..`` the full ones.

    Args:
        low_rank: The anchor with its low-rank experts.
        stacked: The full experts, without the anchor.
    """

    def __init__(self, *, low_rank: LowRankFFN, stacked: StackedFFN) -> None:
        super().__init__()
        self.low_rank = low_rank
        self.stacked = stacked
        self.first_full = len(low_rank.experts) + 1
        # the low-rank part never holds the whole mass, so its down bias must be weighted
        low_rank.normalized = False

    def forward(
        self,
        x: torch.Tensor,
        indices: torch.Tensor,
        weights: torch.Tensor,
        *,
        has_unused: bool = False,
    ) -> torch.Tensor:
        """Return ``sum_e w_e FFN_e(x)``; arguments as in `StackedFFN.forward`."""
        out: torch.Tensor = self.low_rank(x, indices, weights)
        for slot in range(
            indices.shape[-1]
        ):  # a token meets an expert once per slot: adding is deterministic
            tokens = torch.where(indices[:, slot] >= self.first_full)[0]
            if tokens.numel():
                chosen = indices[tokens, slot, None] - self.first_full
                y = self.stacked(x[tokens], chosen, weights[tokens, slot, None])
                out = out.index_add(0, tokens, y.to(out.dtype))
        return out
