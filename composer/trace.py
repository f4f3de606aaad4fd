"""One recorder of routing decisions, which evaluation, attribution and plots read.

    with RoutingTrace(model) as trace:
        model(input_ids)
    trace.mass()          # {"anchor": 0.41, "acme": 0.59}

Knows decisions and owners; changes nothing about the forward pass it watches.
"""

from __future__ import annotations

import math
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
        names: The anchor and the owner of each expert, by id; an owner of several experts is there several times.
        experts: The anchor and the name of each expert, by id.
        owners: The anchor and every owner once, in the order of their experts.
        weights: Layer -> float64 ``(num_experts + 1,)``, summed weights; for a model-wide gate one layer.
        used: Layer -> float64 ``(num_experts + 1,)``, tokens that use each expert, with whatever weight.
        chosen: Layer -> float64 ``(len(owners),)``, tokens whose largest weight, summed by owner, is that owner's.
        entropies: Layer -> sum over the tokens of the entropy of the router's distribution, nats.
        tokens: Layer -> number of tokens behind the sums.
        decisions: Layer -> list of (decision, token_mask), filled when ``keep`` is set.
    """

    def __init__(self, model: ComposedForCausalLM, *, keep: bool = False) -> None:
        self.names = [ANCHOR_NAME, *model.owners_of_experts]
        self.experts = [ANCHOR_NAME, *model.expert_names]
        self.owners = list(dict.fromkeys(self.names))
        self.keep = keep
        self._owner_of = torch.tensor([self.owners.index(name) for name in self.names])
        self.weights: dict[int, torch.Tensor] = {}
        self.used: dict[int, torch.Tensor] = {}
        self.chosen: dict[int, torch.Tensor] = {}
        self.entropies: dict[int, float] = {}
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
        weights = decision.weights.detach().double().cpu()
        indices = decision.indices.detach().cpu()
        used = indices >= 0
        real = used.any(-1)
        if token_mask is not None:
            real = real & token_mask.flatten().cpu()
            used = used & real.unsqueeze(-1)
        # a column per expert: slots that no expert takes have weight 0 and are not used
        shape = (len(indices), len(self.experts))
        slots = indices.clamp(min=0)
        spread = torch.zeros(shape, dtype=torch.float64).scatter_add_(1, slots, weights * used)
        counts = torch.zeros(shape, dtype=torch.float64).scatter_add_(1, slots, used.double())
        by_owner = torch.zeros(len(indices), len(self.owners), dtype=torch.float64)
        by_owner.index_add_(1, self._owner_of, spread)
        first = torch.bincount(by_owner[real].argmax(-1), minlength=len(self.owners))
        self.weights[layer] = self.weights.get(layer, 0) + spread.sum(0)
        self.used[layer] = self.used.get(layer, 0) + counts.clamp(max=1).sum(0)
        self.chosen[layer] = self.chosen.get(layer, 0) + first.double()
        self.entropies[layer] = self.entropies.get(layer, 0.0) + _entropy(decision, real)
        self.tokens[layer] = self.tokens.get(layer, 0.0) + float(real.sum())
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

    def load(self) -> dict[str, float]:
        """Return the share of tokens, over all layers, that use each expert, with whatever weight.

        With top-k routing the shares sum to k where every token finds k allowed experts.
        """
        return self._shares(self.experts, self.used)

    def sent(self) -> dict[str, float]:
        """Return the share of tokens, over all layers, whose largest weight is each owner's; they sum to 1.

        The weights of an owner's experts count together, and ties go to the lower id.
        """
        return self._shares(self.owners, self.chosen)

    def entropy(self) -> float:
        """Return the mean over tokens and layers of the entropy of the router's distribution, in nats.

        ``H = -sum_i p_i log p_i`` with ``p = softmax(logits)`` over the experts that the token's row may use, the
        anchor among them, before any are selected. 0 is certainty, and where only the anchor is allowed; ``log n``
        is indifference among n. NaN where nothing was recorded.
        """
        tokens = sum(self.tokens.values())
        return sum(self.entropies.values()) / tokens if tokens else math.nan

    def _shares(self, names: list[str], sums: dict[int, torch.Tensor]) -> dict[str, float]:
        tokens = sum(self.tokens.values())
        if not tokens:
            return dict.fromkeys(names, 0.0)
        total = torch.stack(list(sums.values())).sum(0) / tokens
        return dict(zip(names, total.tolist(), strict=True))


def _entropy(decision: RoutingDecision, real: torch.Tensor) -> float:
    """Sum of the entropies of the tokens that are no padding."""
    if decision.logits is None:  # the anchor alone is allowed: there is nothing to decide
        return 0.0
    probabilities = torch.softmax(decision.logits.detach().double().cpu(), dim=-1)
    return float(torch.special.entr(probabilities).sum(-1)[real].sum())
