"""What passes between a model and its router: a context goes in, a decision comes out.

Knows tensors and expert ids; knows nothing of owners, files or any particular model. Ids are positions in the
model that was loaded: 0 is the anchor (the public base model's own FFN), 1..n are the experts in canonical
order, which is by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from composer.routing.state import RouterState

__all__ = ["ANCHOR", "UNUSED", "AllowedGroup", "Groups", "RoutingContext", "RoutingDecision", "group_rows"]

ANCHOR = 0
"""Id of the anchor, which nobody owns and no opt-out removes."""

UNUSED = -1
"""Fills a slot of a decision that no expert takes: a row may have fewer allowed experts than top_k, and an adaptive
selector may want fewer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AllowedGroup:
    """The rows of a batch that share one set of allowed experts.

    Attributes:
        experts: Sorted ids, the anchor first.
        rows: int64 indices of the rows, or None for the whole batch.
    """

    experts: tuple[int, ...]
    rows: torch.Tensor | None = None


class Groups(tuple[AllowedGroup, ...]):
    """The groups of one batch, with what all layers need to know of them and none needs to compute again."""

    @classmethod
    def of(cls, groups: Iterable[AllowedGroup]) -> Groups:
        """Return the groups themselves if they are ``Groups`` already."""
        return groups if isinstance(groups, Groups) else cls(groups)

    @cached_property
    def width(self) -> int | None:
        """How many experts every group may use, or None if they differ."""
        widths = {len(group.experts) for group in self}
        return widths.pop() if len(widths) == 1 else None

    @cached_property
    def anchor_only(self) -> bool:
        """Whether nobody may use any expert."""
        return all(group.experts == (ANCHOR,) for group in self)

    @cached_property
    def rows(self) -> torch.Tensor:
        """The batch's rows, group after group, int64 ``(batch,)``; there are several groups."""
        with torch.inference_mode(False):  # kept for calls that train
            return torch.cat([group.rows for group in self if group.rows is not None])

    @cached_property
    def sizes(self) -> list[int]:
        """Number of rows of each group; there are several groups."""
        return [len(group.rows) for group in self if group.rows is not None]

    @cached_property
    def rows_by_expert(self) -> dict[int, torch.Tensor | None]:
        """Expert id -> the rows that may use it, int64, or None where all may; who is not here, nobody may use."""
        if len(self) == 1:
            return dict.fromkeys(self[0].experts)
        everybody = sorted({expert for group in self for expert in group.experts})
        with torch.inference_mode(False):
            return {expert: self._rows_of(expert) for expert in everybody}

    def _rows_of(self, expert: int) -> torch.Tensor | None:
        rows = [group.rows for group in self if expert in group.experts and group.rows is not None]
        return None if len(rows) == len(self) else torch.cat(rows)

    @cached_property
    def places(self) -> torch.Tensor:
        """Where each row of the batch stands in `rows`, int64 ``(batch,)``."""
        with torch.inference_mode(False):
            return torch.argsort(self.rows)

    @cached_property
    def table(self) -> torch.Tensor:
        """Ids that each row may use, int64 ``(batch, width)``; there are several groups of one width."""
        device = self.rows.device
        with torch.inference_mode(False):
            ids = torch.tensor([group.experts for group in self], device=device)
            return ids.repeat_interleave(torch.tensor(self.sizes, device=device), dim=0)[self.places]

    @cached_property
    def _within(self) -> dict[frozenset[int], Groups]:
        return {}

    def within(self, present: frozenset[int]) -> Groups:
        """Leave out the experts that are not present at a layer."""
        if present not in self._within:
            self._within[present] = Groups(
                AllowedGroup(experts=tuple(e for e in group.experts if e in present), rows=group.rows)
                for group in self
            )
        return self._within[present]


@dataclass(slots=True, kw_only=True)  # not frozen: one is made for every layer and step, and freezing costs
class RoutingContext:
    """Everything a router may look at.

    Attributes:
        hidden_states: ``(batch, positions, d)``, any floating dtype.
        layer: Index of the decoder layer that asks.
        groups: Which experts each row may use; the groups partition the batch.
        token_mask: bool ``(batch, positions)``, False on padding; None when nothing is padded.
        state: What a causal context carries from earlier positions; None outside of cached decoding.
        logit_bias: float32 ``(num_experts + 1,)`` added to the logits before selection, or None.
    """

    hidden_states: torch.Tensor
    layer: int
    groups: Sequence[AllowedGroup]
    token_mask: torch.Tensor | None = None
    state: RouterState | None = None
    logit_bias: torch.Tensor | None = None


@dataclass(slots=True, kw_only=True)  # not frozen, as above
class RoutingDecision:
    """Which experts every token uses and with which weights.

    Attributes:
        indices: int64 ``(tokens, k)`` expert ids with ``tokens = batch * positions``; `UNUSED` where a slot is empty.
        weights: ``(tokens, k)``, float32 or the model's dtype, 0 where a slot is empty.
        logits: float32 ``(tokens, num_experts + 1)``, ``-inf`` at experts that were not allowed; None unless traced.
        has_unused: Whether any slot may be empty.
        anchor_only: Whether every token goes to the anchor alone, so that the base model's own FFN answers.
    """

    indices: torch.Tensor
    weights: torch.Tensor
    logits: torch.Tensor | None = None
    has_unused: bool = False
    anchor_only: bool = False


def group_rows(allowed: torch.Tensor, *, device: torch.device | None = None) -> Groups:
    """Partition a batch by its rows' sets of allowed experts.

    Args:
        allowed: bool ``(batch, num_experts + 1)``; the anchor's column is taken as True.
        device: Where the model is; None: where ``allowed`` is.

    Returns:
        One group per distinct set, in order of first appearance. A single group has ``rows=None``.
    """
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for row, flags in enumerate(allowed.tolist()):
        experts = (ANCHOR, *(i for i, flag in enumerate(flags) if flag and i != ANCHOR))
        rows_of.setdefault(experts, []).append(row)
    if len(rows_of) == 1:
        return Groups((AllowedGroup(experts=next(iter(rows_of))),))
    device = allowed.device if device is None else device
    with torch.inference_mode(False):  # groups are kept for other calls, which may train
        return Groups(
            AllowedGroup(experts=experts, rows=torch.tensor(rows, device=device))
            for experts, rows in rows_of.items()
        )
