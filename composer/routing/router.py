"""A router is a context, a scorer and a selector in a row.

Knows ids and tensors; knows nothing of owners, files or the layers it routes for.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from composer.routing.contexts import ContextName, running_mean, token
from composer.routing.scorers.base import Scorer
from composer.routing.selectors.base import Selector
from composer.routing.types import ANCHOR, UNUSED, AllowedGroup, RoutingContext, RoutingDecision

__all__ = ["Router"]


class Router(nn.Module):
    """Decides, per token, which allowed experts answer and with which weights.

    The batch is split by allowed set and each part is scored with the rows, or the solved gate, of its own set:
    nothing of an opted-out owner is computed with, not even multiplied by zero.

    Args:
        scorer: Features to logits.
        selector: Logits to choices.
        context: ``"token"`` or ``"running_mean"``.
        num_experts: Experts beside the anchor.
        present: Ids that can be routed to here, or None for all of them.
    """

    def __init__(
        self,
        *,
        scorer: Scorer,
        selector: Selector,
        context: ContextName,
        num_experts: int,
        present: Collection[int] | None = None,
    ) -> None:
        super().__init__()
        self.present = None if present is None else frozenset((ANCHOR, *present))
        self.scorer = scorer
        self.selector = selector
        self.context = context
        self.num_experts = num_experts
        self._id_tables: dict[tuple[tuple[int, ...], torch.device], torch.Tensor] = {}

    def forward(self, context: RoutingContext, *, trace: bool = False) -> RoutingDecision:
        """Route every token of a batch.

        Args:
            context: What may be looked at.
            trace: Whether to keep the logits.
        """
        groups = context.groups if self.present is None else [self._here(group) for group in context.groups]
        # the features come first: a running mean advances whoever is allowed
        features, counts = self._features(context)
        if all(group.experts == (ANCHOR,) for group in groups):
            return self._anchor_only(context)
        scores = [self._score(features, counts, group, context) for group in groups]
        parts = self._select(groups, scores)
        if len(parts) == 1:
            (indices, weights), has_unused = parts[0], False
        else:
            indices, weights, has_unused = self._in_batch_order(context, groups, parts)
        logits = self._spread(context, groups, scores) if trace else None
        return RoutingDecision(indices=indices, weights=weights, logits=logits, has_unused=has_unused)

    def _here(self, group: AllowedGroup) -> AllowedGroup:
        """Leave out the experts that have nothing at this layer."""
        if self.present is None:
            return group
        experts = tuple(expert for expert in group.experts if expert in self.present)
        return AllowedGroup(experts=experts, rows=group.rows)

    def _anchor_only(self, context: RoutingContext) -> RoutingDecision:
        tokens = context.hidden_states.shape[0] * context.hidden_states.shape[1]
        device = context.hidden_states.device
        return RoutingDecision(
            indices=torch.zeros(tokens, 1, dtype=torch.int64, device=device),
            weights=torch.ones(tokens, 1, device=device),
            anchor_only=True,
        )

    def _features(self, context: RoutingContext) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.scorer.features(context.hidden_states)
        if self.context == "token":
            return token(features)
        return running_mean(features, layer=context.layer, token_mask=context.token_mask, state=context.state)

    def _score(
        self,
        features: torch.Tensor,
        counts: torch.Tensor,
        group: AllowedGroup,
        context: RoutingContext,
    ) -> torch.Tensor:
        """Return the logits ``(tokens, n)`` of one group: its rows, scored for its own experts only."""
        if group.rows is not None:
            features, counts = features.index_select(0, group.rows), counts.index_select(0, group.rows)
        logits: torch.Tensor = self.scorer(features.flatten(0, 1), counts.flatten(), group.experts)
        if context.logit_bias is not None:
            logits = logits + context.logit_bias[list(group.experts)]
        return logits

    def _select(
        self, groups: Sequence[AllowedGroup], scores: Sequence[torch.Tensor]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return ids ``(tokens, k)`` and weights ``(tokens, k)`` of each group."""
        if len(groups) == 1:
            positions, weights = self.selector(scores[0])
            return [(self._ids(groups[0], positions), weights)]
        if len({logits.shape[1] for logits in scores}) == 1:  # alike in width: one call for all of them
            sizes = [logits.shape[0] for logits in scores]
            positions, weights = self.selector(torch.cat(list(scores)))
            chosen = list(zip(positions.split(sizes), weights.split(sizes), strict=True))
        else:
            chosen = [self.selector(logits) for logits in scores]
        return [(self._ids(group, at), weights) for group, (at, weights) in zip(groups, chosen, strict=True)]

    def _ids(self, group: AllowedGroup, positions: torch.Tensor) -> torch.Tensor:
        """Turn positions among a group's experts into ids."""
        if len(group.experts) == self.num_experts + 1:  # positions are ids
            return positions
        key = (group.experts, positions.device)
        if key not in self._id_tables:
            with torch.inference_mode(False):  # kept for calls that train
                self._id_tables[key] = torch.tensor(group.experts, device=positions.device)
        return self._id_tables[key][positions]

    @staticmethod
    def _in_batch_order(
        context: RoutingContext,
        groups: Sequence[AllowedGroup],
        parts: Sequence[tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """Put the groups' decisions back in the order of the batch's rows; say whether any slot is empty."""
        batch, length = context.hidden_states.shape[:2]
        k = max(ids.shape[1] for ids, _ in parts)
        has_unused = any(ids.shape[1] < k for ids, _ in parts)
        if has_unused:
            parts = [(_widen(ids, k, UNUSED), _widen(weights, k, 0)) for ids, weights in parts]
        rows = torch.cat([group.rows for group in groups if group.rows is not None])
        ordered = []
        for column in zip(*parts, strict=True):
            together = torch.cat(column).view(batch, length, k)
            ordered.append(torch.empty_like(together).index_copy_(0, rows, together).view(-1, k))
        return ordered[0], ordered[1], has_unused

    def _spread(
        self, context: RoutingContext, groups: Sequence[AllowedGroup], scores: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Give every expert a column, in the order of the batch's rows; those not allowed get ``-inf``."""
        batch, length = context.hidden_states.shape[:2]
        spread = scores[0].new_full((batch, length, self.num_experts + 1), float("-inf"), dtype=torch.float32)
        for group, logits in zip(groups, scores, strict=True):
            rows = slice(None) if group.rows is None else group.rows
            wide = spread.new_full((logits.shape[0], spread.shape[2]), float("-inf"))
            wide[:, list(group.experts)] = logits.float()
            spread[rows] = wide.view(-1, length, spread.shape[2])
        return spread.flatten(0, 1)


def _widen(values: torch.Tensor, width: int, fill: int) -> torch.Tensor:
    return F.pad(values, (0, width - values.shape[1]), value=fill)
