"""One linear and every expert's low-rank update of it, chosen row by row.

``y = W x + b + B_i A_i x`` where ``i`` is the slot of the batch row; slot 0 is nobody's and holds zeros. Knows factors
and slots; who decides them, and that they belong to somebody, is not its business.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from composer.retrieval.request import Slots, current_slots

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
        # by rank, since zeros to pad with would change how a product is summed up: whoever does not occur, or occurs
        # in another row, must not be seen in a row's last bits
        for rank in sorted({self.ranks[slot] for slot in slots.present} - {0}):
            result = self._updated(result, x, slots, rank)
        return result

    def _updated(self, result: torch.Tensor, x: torch.Tensor, slots: Slots, rank: int) -> torch.Tensor:
        """Add the updates of one rank to the rows that have one."""
        mine = tuple(slot for slot in slots.present if self.ranks[slot] == rank)
        others = any(self.ranks[slot] not in (0, rank) for slot in slots.present)
        if not others:  # rows without an update multiply nobody's zeros, which changes no bit
            return self._product(result, x, slots.index, rank)
        wanted = torch.tensor(mine, device=slots.index.device)
        rows = torch.isin(slots.index, wanted).nonzero()[:, 0]
        update = self._product(result[rows], x[rows], slots.index[rows], rank)
        return result.index_copy(0, rows, update)

    def _product(self, result: torch.Tensor, x: torch.Tensor, index: torch.Tensor, rank: int) -> torch.Tensor:
        low = torch.bmm(x, self.down[index, :, :rank])
        return torch.baddbmm(result, low, self.up[index, :rank])

    def extra_repr(self) -> str:
        """Show the ranks."""
        return f"ranks={self.ranks[1:]}"
