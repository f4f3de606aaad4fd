"""A router is a context, a scorer and a selector in a row.

Knows ids and tensors; knows nothing of owners, files or the layers it routes for.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from composer.routing.contexts import ContextName, prompt_mean, running_mean, token
from composer.routing.recent import Recent
from composer.routing.scorers.base import Scorer
from composer.routing.selectors.base import Selector
from composer.routing.types import ANCHOR, UNUSED, AllowedGroup, Groups, RoutingContext, RoutingDecision

__all__ = ["Router"]


class Router(nn.Module):
    """Decides, per token, which allowed experts answer and with which weights.

    The batch is split by allowed set and each part is scored with the rows, or the solved gate, of its own set:
    nothing of an opted-out owner is computed with, not even multiplied by zero.

    Args:
        scorer: Features to logits.
        selector: Logits to choices.
        context: ``"token"``, ``"running_mean"`` or ``"prompt_mean"``.
        token_weight: Share ``l`` of the token's own features beside the context's mean: ``(1 - l) mean + l token``
            is scored, which for linear scores is MetaMoE's context router (arXiv 2605.14289) made causal.
        num_experts: Experts beside the anchor.
        present: Ids that can be routed to here, or None for all of them.
        with_anchor: Whether the anchor can be routed to.
    """

    parameter_group = "routers"

    def __init__(
        self,
        *,
        scorer: Scorer,
        selector: Selector,
        context: ContextName,
        num_experts: int,
        present: Collection[int] | None = None,
        token_weight: float = 0.0,
        with_anchor: bool = True,
    ) -> None:
        super().__init__()
        here = range(1, num_experts + 1) if present is None else present
        anchor = (ANCHOR,) if with_anchor else ()
        self.present = None if present is None and with_anchor else frozenset((*anchor, *here))
        self.with_anchor = with_anchor
        self.scorer = scorer
        self.selector = selector
        self.adaptive = selector.adaptive
        self.context = context
        self.token_weight = token_weight
        self.num_experts = num_experts
        self._id_tables: Recent[torch.Tensor] = Recent()

    def forward(self, context: RoutingContext, *, trace: bool = False) -> RoutingDecision:
        """Route every token of a batch.

        Args:
            context: What may be looked at.
            trace: Whether to keep the logits.
        """
        groups = Groups.of(context.groups)
        if self.present is not None:
            groups = groups.within(self.present)
        # the features come first: a running mean advances whoever is allowed
        features, counts = self._features(context)
        if groups.anchor_only:
            return self._anchor_only(context)
        if groups.width is None:
            return self._route_apart(features, counts, groups, context, trace=trace)
        logits = self._score_together(features, counts, groups)
        if context.logit_bias is not None:
            logits = logits + self._bias(context.logit_bias, groups)
        # .forward: once per layer and token, what a module's call costs shows in decoding
        positions, weights = self.selector.forward(logits.flatten(0, 1))
        return RoutingDecision(
            indices=self._ids(groups, positions, features.shape[1]),
            weights=weights,
            logits=self._spread(groups, logits) if trace else None,
            has_unused=self.adaptive,
        )

    def _anchor_only(self, context: RoutingContext) -> RoutingDecision:
        tokens = context.hidden_states.shape[0] * context.hidden_states.shape[1]
        device = context.hidden_states.device
        return RoutingDecision(
            indices=torch.zeros(tokens, 1, dtype=torch.int64, device=device),
            weights=torch.ones(tokens, 1, device=device),
            anchor_only=True,
        )

    def _features(self, context: RoutingContext) -> tuple[torch.Tensor, torch.Tensor | None]:
        features = self.scorer.features(context.hidden_states)
        if self.context == "token":
            return token(features)
        mean = running_mean if self.context == "running_mean" else prompt_mean
        means, counts = mean(
            features, layer=context.layer, token_mask=context.token_mask, state=context.state
        )
        if self.token_weight:
            means = torch.lerp(means, features.float(), self.token_weight)
        return means, counts

    def _score_together(
        self, features: torch.Tensor, counts: torch.Tensor | None, groups: Groups
    ) -> torch.Tensor:
        """Return the logits ``(batch, positions, n)`` of rows that may use equally many experts."""
        if len(groups) == 1:
            return self.scorer.forward(features, counts, groups[0].experts)
        logits = self.scorer.score_apart(features, counts, groups.table)
        if logits is not None:
            return logits
        return torch.cat(self._score_groups(features, counts, groups)).index_select(0, groups.places)

    def _score_groups(
        self, features: torch.Tensor, counts: torch.Tensor | None, groups: Groups
    ) -> list[torch.Tensor]:
        """Return the logits ``(rows, positions, n)`` of each group, scored for its own experts only."""
        parts = torch.split(features.index_select(0, groups.rows), groups.sizes)
        numbers: Sequence[torch.Tensor | None] = [None] * len(groups)
        if counts is not None:
            numbers = torch.split(counts.index_select(0, groups.rows), groups.sizes)
        return [self.scorer(x, n, group.experts) for group, x, n in zip(groups, parts, numbers, strict=True)]

    def _bias(self, bias: torch.Tensor, groups: Groups) -> torch.Tensor:
        if len(groups) == 1:
            return bias[list(groups[0].experts)]
        return bias[groups.table].unsqueeze(1)

    def _ids(self, groups: Groups, positions: torch.Tensor, length: int) -> torch.Tensor:
        """Turn positions among the allowed experts into ids, int64 ``(tokens, k)``."""
        if groups.width == self.num_experts + 1:  # positions are ids
            return positions
        if len(groups) == 1:
            return self._ids_of(groups[0], positions)
        table = groups.table if length == 1 else groups.table.repeat_interleave(length, dim=0)
        if not self.adaptive:
            return table.gather(1, positions)
        return torch.where(positions == UNUSED, positions, table.gather(1, positions.clamp(min=0)))

    def _ids_of(self, group: AllowedGroup, positions: torch.Tensor) -> torch.Tensor:
        key = (group.experts, positions.device)
        # an empty slot is -1, the last entry
        ids = self._id_tables.get(
            key, lambda: torch.tensor((*group.experts, UNUSED), device=positions.device)
        )
        return ids[positions]

    def _spread(self, groups: Groups, logits: torch.Tensor) -> torch.Tensor:
        """Give every expert a column, float32 ``(tokens, num_experts + 1)``; those not allowed get ``-inf``."""
        shape = (*logits.shape[:2], self.num_experts + 1)
        spread = logits.new_full(shape, float("-inf"), dtype=torch.float32)
        if len(groups) == 1:
            spread[..., list(groups[0].experts)] = logits.float()
        else:
            spread.scatter_(2, groups.table.unsqueeze(1).expand_as(logits), logits.float())
        return spread.flatten(0, 1)

    def _route_apart(
        self,
        features: torch.Tensor,
        counts: torch.Tensor | None,
        groups: Groups,
        context: RoutingContext,
        *,
        trace: bool,
    ) -> RoutingDecision:
        """Route rows that may use different numbers of experts: score and select set by set."""
        parts, spread = [], []
        for group, scored in zip(groups, self._score_groups(features, counts, groups), strict=True):
            own = Groups((AllowedGroup(experts=group.experts),))
            logits = scored if context.logit_bias is None else scored + self._bias(context.logit_bias, own)
            positions, weights = self.selector(logits.flatten(0, 1))
            parts.append((self._ids_of(group, positions), weights))
            spread.append(self._spread(own, logits) if trace else logits.flatten(0, 1))
        k = max(ids.shape[1] for ids, _ in parts)
        wide = [(_widen(ids, k, UNUSED), _widen(weights, k, 0)) for ids, weights in parts]
        indices, weights = (
            _in_batch_order(column, groups, features.shape[1]) for column in zip(*wide, strict=True)
        )
        return RoutingDecision(
            indices=indices,
            weights=weights,
            logits=_in_batch_order(spread, groups, features.shape[1]) if trace else None,
            has_unused=self.adaptive or any(ids.shape[1] < k for ids, _ in parts),
        )


def _in_batch_order(parts: Sequence[torch.Tensor], groups: Groups, length: int) -> torch.Tensor:
    """Put ``(tokens, n)`` of each group where the batch has their rows."""
    together = torch.cat(list(parts))
    return together.view(-1, length, together.shape[1]).index_select(0, groups.places).flatten(0, 1)


def _widen(values: torch.Tensor, width: int, fill: int) -> torch.Tensor:
    return F.pad(values, (0, width - values.shape[1]), value=fill)
