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
from composer.routing.types import ANCHOR, UNUSED, AllowedGroup, Groups, RoutingContext, RoutingDecision

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
        groups = Groups.of(context.groups)
        if self.present is not None:
            groups = groups.within(self.present)
        # the features come first: a running mean advances whoever is allowed
        features, counts = self._features(context)
        if groups.anchor_only:
            return self._anchor_only(context)
        scores = self._score(features, counts, groups, context)
        if groups.width is None:
            indices, weights, has_unused = self._select_apart(groups, scores, features.shape[1])
        else:
            (indices, weights), has_unused = self._select_together(groups, scores, features.shape[1]), False
        return RoutingDecision(
            indices=indices,
            weights=weights,
            logits=self._spread(context, groups, scores) if trace else None,
            has_unused=has_unused,
        )

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
        self, features: torch.Tensor, counts: torch.Tensor, groups: Groups, context: RoutingContext
    ) -> list[torch.Tensor]:
        """Return the logits ``(tokens, n)`` of each group: its rows, scored for its own experts only."""
        if len(groups) == 1:
            parts = [(features, counts)]
        else:
            ordered = features.index_select(0, groups.rows), counts.index_select(0, groups.rows)
            parts = list(zip(*(values.split(groups.sizes) for values in ordered), strict=True))
        scores = []
        for group, (x, n) in zip(groups, parts, strict=True):
            logits = self.scorer(x.flatten(0, 1), n.flatten(), group.experts)
            if context.logit_bias is not None:
                logits = logits + context.logit_bias[list(group.experts)]
            scores.append(logits)
        return scores

    def _select_together(
        self, groups: Groups, scores: Sequence[torch.Tensor], length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and weights ``(tokens, k)`` of groups that have the same number of experts."""
        if len(groups) == 1:
            positions, weights = self.selector(scores[0])
            return self._ids(groups[0], positions), weights
        logits = torch.cat(list(scores)).unflatten(0, (-1, length)).index_select(0, groups.places)
        positions, weights = self.selector(logits.flatten(0, 1))
        ids = groups.table.unsqueeze(1).expand_as(logits).gather(2, positions.unflatten(0, (-1, length)))
        return ids.flatten(0, 1), weights

    def _select_apart(
        self, groups: Groups, scores: Sequence[torch.Tensor], length: int
    ) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """Return ids and weights ``(tokens, k)`` of groups of any size, and whether any slot is empty."""
        parts = []
        for group, logits in zip(groups, scores, strict=True):
            positions, weights = self.selector(logits)
            parts.append((self._ids(group, positions), weights))
        k = max(ids.shape[1] for ids, _ in parts)
        padded = [(_widen(ids, k, UNUSED), _widen(weights, k, 0)) for ids, weights in parts]
        columns = (torch.cat(column).unflatten(0, (-1, length)) for column in zip(*padded, strict=True))
        indices, weights = (column.index_select(0, groups.places).flatten(0, 1) for column in columns)
        return indices, weights, any(ids.shape[1] < k for ids, _ in parts)

    def _ids(self, group: AllowedGroup, positions: torch.Tensor) -> torch.Tensor:
        """Turn positions among a group's experts into ids."""
        if len(group.experts) == self.num_experts + 1:  # positions are ids
            return positions
        return torch.tensor(group.experts, device=positions.device)[positions]

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
