"""A router is a context, a scorer and a selector in a row.

Knows ids and tensors; knows nothing of owners, files or the layers it routes for.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

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

    def forward(self, context: RoutingContext, *, trace: bool = False) -> RoutingDecision:
        """Route every token of a batch.

        Args:
            context: What may be looked at.
            trace: Whether to keep the logits.
        """
        groups = [self._here(group) for group in context.groups]
        # the features come first: a running mean advances whoever is allowed
        features, counts = self._features(context)
        if all(group.experts == (ANCHOR,) for group in groups):
            return self._anchor_only(context)
        parts = [self._route_group(features, counts, group, context) for group in groups]
        if len(parts) == 1:
            indices, weights, logits = parts[0]
            kept = self._spread(logits, groups[0].experts) if trace else None
            return RoutingDecision(indices=indices, weights=weights, logits=kept)
        return self._gather(context, groups, parts, trace=trace)

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

    def _route_group(
        self,
        features: torch.Tensor,
        counts: torch.Tensor,
        group: AllowedGroup,
        context: RoutingContext,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return ids ``(tokens, k)``, weights ``(tokens, k)`` and logits ``(tokens, n)`` of one group."""
        if group.rows is not None:
            features, counts = features[group.rows], counts[group.rows]
        logits = self.scorer(features.flatten(0, 1), counts.flatten(), group.experts)
        if context.logit_bias is not None:
            logits = logits + context.logit_bias[list(group.experts)]
        positions, weights = self.selector(logits)
        if len(group.experts) == self.num_experts + 1:  # positions are ids
            return positions, weights, logits
        ids = torch.tensor(group.experts, device=positions.device)
        return ids[positions], weights, logits

    def _gather(
        self,
        context: RoutingContext,
        groups: list[AllowedGroup],
        parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
        *,
        trace: bool,
    ) -> RoutingDecision:
        """Put the groups' decisions back in the order of the batch's rows."""
        batch, length = context.hidden_states.shape[:2]
        k = max(ids.shape[1] for ids, _, _ in parts)
        has_unused = any(ids.shape[1] < k for ids, _, _ in parts)
        indices = parts[0][0].new_full((batch, length, k), UNUSED)
        weights = parts[0][1].new_zeros((batch, length, k))
        for group, (ids, w, _) in zip(groups, parts, strict=True):
            indices[group.rows, :, : ids.shape[1]] = ids.view(-1, length, ids.shape[1])
            weights[group.rows, :, : ids.shape[1]] = w.view(-1, length, w.shape[1])
        logits = None
        if trace:
            spread = weights.new_full((batch, length, self.num_experts + 1), float("-inf"))
            for group, (_, _, part) in zip(groups, parts, strict=True):
                spread[group.rows] = self._spread(part, group.experts).view(-1, length, spread.shape[2])
            logits = spread.flatten(0, 1)
        return RoutingDecision(
            indices=indices.flatten(0, 1),
            weights=weights.flatten(0, 1),
            logits=logits,
            has_unused=has_unused,
        )

    def _spread(self, logits: torch.Tensor, experts: tuple[int, ...]) -> torch.Tensor:
        """Give every expert a column; those that were not allowed get ``-inf``."""
        spread = logits.new_full((logits.shape[0], self.num_experts + 1), float("-inf")).float()
        spread[:, list(experts)] = logits.float()
        return spread
