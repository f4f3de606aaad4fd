"""One recorder of routing decisions, which evaluation, attribution and plots read.

    with RoutingTrace(model) as trace:
        model(input_ids)
    trace.mass()          # {"anchor": 0.41, "acme": 0.59}

Knows decisions and owners; changes nothing about the forward pass it watches.
"""

from __future__ import annotations

from contextvars import Token
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from composer.forward import RECORDER
from composer.routing.types import RoutingDecision

if TYPE_CHECKING:
    from composer.model import ComposedForCausalLM

__all__ = ["ANCHOR_NAME", "RoutingTrace"]

ANCHOR_NAME = "anchor"
"""Name under which the public base model's own FFN appears beside the owners."""


class RoutingTrace:
    """Sums the routed weight per layer and expert over all tokens that are not padding.

    Args:
        model: The composed model that will run inside the ``with`` block (in the same thread).
        keep: Whether to keep every decision (indices, weights, logits) as well, for per-token analysis.

    Attributes:
        weights: Layer -> float64 ``(num_experts + 1,)``, summed weights; for a model-wide gate one layer.
        tokens: Layer -> number of tokens behind the sums.
        decisions: Layer -> list of (decision, token_mask), filled when ``keep`` is set.
    """

    def __init__(self, model: ComposedForCausalLM, *, keep: bool = False) -> None:
        self.names = [ANCHOR_NAME, *model.owners_of_experts]
        self.experts = [ANCHOR_NAME, *model.expert_names]
        self.keep = keep
        self.weights: dict[int, torch.Tensor] = {}
        self.tokens: dict[int, float] = {}
        self.decisions: dict[int, list[tuple[RoutingDecision, torch.Tensor | None]]] = {}
        self._token: Token[Any] | None = None

    def __enter__(self) -> RoutingTrace:
        self._token = RECORDER.set(self._record)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._token is not None
        RECORDER.reset(self._token)

    def _record(self, layer: int, decision: RoutingDecision, token_mask: torch.Tensor | None) -> None:
        weights = decision.weights.detach().double()
        indices = decision.indices.detach()
        used = indices >= 0
        if token_mask is not None:
            used = used & token_mask.flatten().to(indices.device).unsqueeze(-1)
        total = torch.zeros(len(self.experts), dtype=torch.float64)
        total.index_add_(0, indices[used].cpu(), weights[used].cpu())
        self.weights[layer] = self.weights.get(layer, 0) + total
        tokens = float(used.any(-1).sum())
        self.tokens[layer] = self.tokens.get(layer, 0.0) + tokens
        if self.keep:
            self.decisions.setdefault(layer, []).append((decision, token_mask))

    def mass(self) -> dict[str, float]:
        """Return each owner's share of the routed weight over all layers; the shares sum to 1."""
        total = torch.stack(list(self.weights.values())).sum(0) if self.weights else None
        shares = dict.fromkeys(self.names, 0.0)
        if total is not None:
            normal = float(total.sum()) or 1.0
            for name, value in zip(self.names, total.tolist(), strict=True):
                shares[name] += value / normal
        return shares

    def mass_by_layer(self) -> dict[int, dict[str, float]]:
        """Return each expert's share of the routed weight, per layer that routed."""
        return {
            layer: {
                name: value / (float(total.sum()) or 1.0)
                for name, value in zip(self.experts, total.tolist(), strict=True)
            }
            for layer, total in sorted(self.weights.items())
        }
