"""Attention experts: several copies of the base model's own attention in one decoder layer, mixed by a router.

``MoA(u) = sum_j g_j(u) MHA_j(u)`` (Branch-Attend-Mix, arXiv 2408.08274, section 3.2). The copies are modules of the
base's own class, so grouped queries, rotary embeddings, windows and norms of queries and keys are as they are there;
nothing here knows how attention is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from composer.forward import current_forward
from composer.layers.attention_cache import OwnCache, SharedCache
from composer.routing.router import Router
from composer.routing.types import ANCHOR, UNUSED, Groups, RoutingDecision

__all__ = ["MoALayer", "RowWise", "SharedProjection", "separate"]

_ROWS: ContextVar[torch.Tensor | None] = ContextVar("composer_attention_rows", default=None)
_SHARED: ContextVar[dict[int, torch.Tensor] | None] = ContextVar("composer_shared_projections", default=None)


class RowWise(nn.Module):
    """A linear or norm of one expert's attention, applied to the rows that may use the expert, and to no others.

    The other rows get zeros, which are not computed: an expert that a row leaves out never meets that row.

    Args:
        inner: The module.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the module to ``(batch, ...)``."""
        rows = _ROWS.get()
        if rows is None:
            return self.inner(x)  # type: ignore[no-any-return]
        some = self.inner(x.index_select(0, rows))
        return some.new_zeros(x.shape[0], *some.shape[1:]).index_copy(0, rows, some)  # type: ignore[no-any-return]


class SharedProjection(nn.Module):
    """A projection to keys or values that all experts of a layer share: computed once for all of them.

    Args:
        inner: The module, of the trunk.
    """

    parameter_group = "trunk"

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the module to ``(batch, ...)``, or return what it gave to the expert before."""
        kept = _SHARED.get()
        if kept is None:
            return self.inner(x)  # type: ignore[no-any-return]
        if id(self) not in kept:
            kept[id(self)] = self.inner(x)
        return kept[id(self)]


def separate(attention: nn.Module, shared: Sequence[str] = ()) -> None:
    """Wrap what computes in an attention module: `SharedProjection` for the named children, `RowWise` for the rest."""
    for name, module in list(attention.named_modules()):
        if name and not list(module.children()) and list(module.parameters()):
            parent, _, child = name.rpartition(".")
            wrapper = SharedProjection if name in shared else RowWise
            setattr(attention.get_submodule(parent), child, wrapper(module))


class MoALayer(nn.Module):
    """One decoder layer's attention experts.

    Args:
        layer: Index of the decoder layer.
        depth: Number of decoder layers, which is the distance between two experts' places in a cache.
        experts: Attention modules of the base's class, as `separate` made them; the anchor's is the first one where
            ``with_anchor`` is set.
        num_experts: Experts of the whole model beside the anchor; all of them are present.
        router: This layer's own router, or None to follow the model's.
        shared_kv: Whether the experts share keys and values, and one cache.
        with_anchor: Whether the anchor is an expert.
    """

    parameter_group = "experts"

    def __init__(
        self,
        *,
        layer: int,
        depth: int,
        experts: Sequence[nn.Module],
        num_experts: int,
        router: Router | None,
        shared_kv: bool,
        with_anchor: bool = True,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.depth = depth
        self.experts = nn.ModuleList(experts)
        self.router = router
        self.shared_kv = shared_kv
        self.ids = tuple(range(0 if with_anchor else 1, num_experts + 1))
        self.width = num_experts + 1

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """Replace the base's attention on ``(batch, positions, d)``; what else it is given goes to every expert."""
        decision = self._decide(hidden_states)
        if decision.anchor_only:
            return self._anchor(hidden_states, args, kwargs), None
        gates = self._gates(decision, hidden_states)
        out = torch.zeros_like(hidden_states)
        with self._sharing(kwargs) as kwargs_of:
            for place, (expert, rows) in enumerate(self._running()):
                answer = self._run(expert, rows, hidden_states, args, kwargs_of(place))
                gate = gates[..., expert, None]
                if rows is None:
                    out = torch.addcmul(out, gate, answer)
                else:
                    out = out.index_add(0, rows, gate.index_select(0, rows) * answer.index_select(0, rows))
        return out, None

    def _decide(self, hidden_states: torch.Tensor) -> RoutingDecision:
        forward = current_forward()
        if self.router is None:
            return forward.decision("attention")
        return forward.route(self.router, hidden_states, layer=self.layer, branch="attention")

    def _gates(self, decision: RoutingDecision, hidden_states: torch.Tensor) -> torch.Tensor:
        """Give every expert a column, ``(batch, positions, width)``; 0 where it was not chosen."""
        weights = decision.weights.to(hidden_states.dtype)
        # an empty slot goes to a column that nobody reads
        columns = torch.where(decision.indices == UNUSED, self.width, decision.indices)
        gates = weights.new_zeros(len(weights), self.width + 1).scatter_add(1, columns, weights)
        return gates.view(*hidden_states.shape[:2], -1)

    def _running(self) -> list[tuple[int, torch.Tensor | None]]:
        """Return who runs, in canonical order, and for which rows; None: for all."""
        rows = Groups.of(current_forward().groups).rows_by_expert
        return [(expert, rows[expert]) for expert in self.ids if expert in rows]

    def _module(self, expert: int) -> nn.Module:
        return self.experts[expert - self.ids[0]]

    def _run(
        self,
        expert: int,
        rows: torch.Tensor | None,
        hidden_states: torch.Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        token = _ROWS.set(rows)
        try:
            return self._module(expert)(hidden_states, *args, **kwargs)[0]  # type: ignore[no-any-return]
        finally:
            _ROWS.reset(token)

    def _anchor(
        self, hidden_states: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor:
        return self._run(ANCHOR, None, hidden_states, args, kwargs)

    @contextmanager
    def _sharing(self, kwargs: dict[str, Any]) -> Iterator[Any]:
        """Yield what makes the keyword arguments of the expert that runs at a place: each with its cache."""
        caches = {name: value for name, value in kwargs.items() if isinstance(value, Cache)}
        if not self.shared_kv:
            yield lambda place: {
                **kwargs,
                **{name: OwnCache(cache, place * self.depth) for name, cache in caches.items()},
            }
            return
        shared = {**kwargs, **{name: SharedCache(cache) for name, cache in caches.items()}}
        token = _SHARED.set({})
        try:
            yield lambda place: shared
        finally:
            _SHARED.reset(token)
