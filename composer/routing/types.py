"""What passes between a model and its router: a context goes in, a decision comes out.

Knows tensors and expert ids; knows nothing of owners, files or any particular model. Ids are positions in the
model that was loaded: 0 is the anchor (the public base model's own FFN), 1..n are the experts in canonical
order, which is by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from composer.routing.state import RouterState

__all__ = ["ANCHOR", "UNUSED", "AllowedGroup", "RoutingContext", "RoutingDecision", "group_rows"]

ANCHOR = 0
"""Id of the anchor, which nobody owns and no opt-out removes."""

UNUSED = -1
"""Fills a slot of a decision that no expert takes (a row may have fewer allowed experts than top_k)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AllowedGroup:
    """The rows of a batch that share one set of allowed experts.

    Attributes:
        experts: Sorted ids, the anchor first.
        rows: int64 indices of the rows, or None for the whole batch.
    """

    experts: tuple[int, ...]
    rows: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingDecision:
    """Which experts every token uses and with which weights.

    Attributes:
        indices: int64 ``(tokens, k)`` expert ids with ``tokens = batch * positions``; `UNUSED` where a slot is empty.
        weights: ``(tokens, k)``, float32 or the model's dtype, 0 where a slot is empty.
        logits: float32 ``(tokens, num_experts + 1)``, ``-inf`` at experts that were not allowed; None unless traced.
        has_unused: Whether any slot is empty.
        anchor_only: Whether every token goes to the anchor alone, so that the base model's own FFN answers.
    """

    indices: torch.Tensor
    weights: torch.Tensor
    logits: torch.Tensor | None = None
    has_unused: bool = False
    anchor_only: bool = False


def group_rows(allowed: torch.Tensor) -> tuple[AllowedGroup, ...]:
    """Partition a batch by its rows' sets of allowed experts.

    Args:
        allowed: bool ``(batch, num_experts + 1)``; the anchor's column is taken as True.

    Returns:
        One group per distinct set, in order of first appearance. A single group has ``rows=None``.
    """
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for row, flags in enumerate(allowed.tolist()):
        experts = (ANCHOR, *(i for i, flag in enumerate(flags) if flag and i != ANCHOR))
        rows_of.setdefault(experts, []).append(row)
    if len(rows_of) == 1:
        return (AllowedGroup(experts=next(iter(rows_of))),)
    return tuple(
        AllowedGroup(experts=experts, rows=torch.tensor(rows, device=allowed.device))
        for experts, rows in rows_of.items()
    )
