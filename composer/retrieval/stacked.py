"""One linear and every expert's low-rank update of it, chosen row by row.

``y = W x + b + B_i A_i x`` where ``i`` is the slot of the batch row; slot 0 is nobody's and holds zeros. Knows factors
and slots; who decides them, and that they belong to somebody, is not its business.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from composer.retrieval.request import current_slots

__all__ = ["Factors", "StackedLoRA"]


class Factors(NamedTuple):
    """The update ``scaling * up @ down`` of one linear by one expert."""

    down: torch.Tensor
    """``(rank, in_features)``, PEFT's A."""
    up: torch.Tensor
    """``(out_features, rank)``, PEFT's B."""
    scaling: float


class StackedLoRA(nn.Module):
    """A frozen linear with a stack of low-rank updates.

    Where no slots are set, or all of them are 0, the result is the linear's own. Slots travel in a context variable,
    so threads do not see each other's. No factor of a slot that does not occur in the batch is read.

    Args:
        base: The linear.
        factors: Slot (from 1) -> its update; slots may lack one.
        num_slots: Number of experts.
    """

    def __init__(self, base: nn.Linear, factors: Mapping[int, Factors], *, num_slots: int) -> None:
        super().__init__()
        self.base = base
        self.ranks = [0] * (num_slots + 1)
        widest = max((f.down.shape[0] for f in factors.values()), default=0)
        like = base.weight
        down = like.new_zeros(num_slots + 1, base.in_features, widest)
        up = like.new_zeros(num_slots + 1, widest, base.out_features)
        for slot, (a, b, scaling) in factors.items():
            rank = self.ranks[slot] = a.shape[0]
            down[slot, :, :rank] = a.T.to(like.dtype)
            # scaled once, here, and in float32 as PEFT's own factors are
            up[slot, :rank] = (b.float() * scaling).T.to(like.dtype)
        self.down = nn.Parameter(down, requires_grad=False)
        self.up = nn.Parameter(up, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply to ``(rows, positions, in_features)``; returns ``(rows, positions, out_features)``."""
        result: torch.Tensor = self.base(x)
        slots = current_slots()
        if slots is None:
            return result
        # only as wide as the widest that occurs: who does not occur must not even change a product's shape
        rank = max(self.ranks[slot] for slot in slots.present)
        if rank == 0:
            return result
        down = self.down[slots.index, :, :rank]
        return torch.baddbmm(result, torch.bmm(x, down), self.up[slots.index, :rank])

    def extra_repr(self) -> str:
        """Show the ranks."""
        return f"ranks={self.ranks[1:]}"
