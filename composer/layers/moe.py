"""The mixture-of-experts layer that stands where a decoder layer had its own FFN.

It asks its router, or follows the decision that a model-wide router took below it, and lets the expert blocks
answer. Knows ids; knows nothing of owners, files or recipes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from composer.blocks.low_rank import LowRankFFN
from composer.blocks.mixed import MixedFFN
from composer.blocks.stacked import StackedFFN
from composer.forward import current_forward
from composer.routing.router import Router
from composer.routing.types import ANCHOR, UNUSED, RoutingDecision

__all__ = ["MoELayer"]


class MoELayer(nn.Module):
    """One decoder layer's experts.

    Args:
        layer: Index of the decoder layer.
        experts: The blocks, addressed by local index, 0 being the anchor.
        present: Ids of the experts that have a block here, in local order from 1.
        num_experts: Experts of the whole model beside the anchor.
        router: This layer's own router, or None to follow the model's.
        with_anchor: Whether the anchor has a block, the first one; without it nobody is routed there.
    """

    parameter_group = "experts"

    def __init__(
        self,
        *,
        layer: int,
        experts: LowRankFFN | StackedFFN | MixedFFN,
        present: Sequence[int],
        num_experts: int,
        router: Router | None,
        with_anchor: bool = True,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.experts = experts
        self.router = router
        self.present = tuple(present)
        # an expert without a block here is the anchor here: its W + 0; place -1 of a stack is somebody else's block
        assert with_anchor or len(self.present) == num_experts, "without the anchor everybody has a block"
        local = [ANCHOR if with_anchor else UNUSED] * (num_experts + 1)
        for position, expert in enumerate(self.present, start=int(with_anchor)):
            local[expert] = position
        self.is_identity = local == list(range(num_experts + 1))
        self.register_buffer("local", torch.tensor([*local, UNUSED]), persistent=False)
        self.local: torch.Tensor

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Replace the FFN on ``(batch, positions, d)``; same shape out."""
        decision = self._decide(hidden_states)
        if decision.anchor_only:
            return self._anchor()(hidden_states)
        indices = decision.indices
        if not self.is_identity:
            indices = self.local[indices]  # UNUSED is -1, the last entry
        x = hidden_states.flatten(0, 1)
        out = self.experts(x, indices, decision.weights, has_unused=decision.has_unused)
        return out.view_as(hidden_states)  # type: ignore[no-any-return]

    def _decide(self, hidden_states: torch.Tensor) -> RoutingDecision:
        forward = current_forward()
        if self.router is None:
            return forward.decision()
        return forward.route(self.router, hidden_states, layer=self.layer)

    def _anchor(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the base model's FFN, with the very products that the base model makes."""
        match self.experts:
            case LowRankFFN(anchor=anchor):
                return anchor
            case MixedFFN(low_rank=low_rank):
                return low_rank.anchor
            case StackedFFN() as stacked:
                return lambda x: stacked.one(ANCHOR, x)
