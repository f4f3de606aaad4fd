"""What one forward pass carries past the base model's own code to the expert layers.

Stock decoder layers call ``mlp(hidden_states)`` and nothing else, so the allowed sets, the padding mask and the
router's state travel in a context variable: it is per thread and per task, and there is no global to leak from
one request into another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal

import torch

from composer.routing.router import Router
from composer.routing.state import RouterState
from composer.routing.types import ANCHOR, AllowedGroup, RoutingContext, RoutingDecision

__all__ = [
    "FORCED",
    "RECORDER",
    "Branch",
    "Forced",
    "ForwardPass",
    "Recorder",
    "current_forward",
    "forward_pass",
]

Branch = Literal["ffn", "attention"]
"""Which part of a decoder layer asks: its FFN or its attention."""

Recorder = Callable[[int, RoutingDecision, torch.Tensor | None], None]

RECORDER: ContextVar[Recorder | None] = ContextVar("composer_recorder", default=None)
"""Who watches the decisions of this thread or task; set by `composer.trace.RoutingTrace`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forced:
    """Sends every token of this thread or task to one expert, and shows what routers would have read.

    Attributes:
        expert: Its id.
        watch: Called with layer, branch, the router's input ``(batch, positions, d)`` and the padding mask.
    """

    expert: int
    watch: Callable[[int, Branch, torch.Tensor, torch.Tensor | None], None]

    def decision(self, hidden_states: torch.Tensor) -> RoutingDecision:
        """Return the decision for ``(batch, positions, d)`` states."""
        tokens = hidden_states.shape[0] * hidden_states.shape[1]
        return RoutingDecision(
            indices=torch.full((tokens, 1), self.expert, device=hidden_states.device),
            weights=hidden_states.new_ones(tokens, 1),
        )


FORCED: ContextVar[Forced | None] = ContextVar("composer_forced_routing", default=None)
"""Set by `composer.upcycling.measuring`; no request can ask for it."""


@dataclass(slots=True, kw_only=True)
class ForwardPass:
    """The routing side of one forward pass.

    Attributes:
        groups: The batch's rows by allowed set.
        token_mask: bool ``(batch, positions)``, False on padding, or None.
        state: The causal context's state, or None.
    """

    groups: Sequence[AllowedGroup]
    token_mask: torch.Tensor | None = None
    state: RouterState | None = None
    _decisions: dict[Branch, RoutingDecision] = field(default_factory=dict)

    def route(
        self, router: Router, hidden_states: torch.Tensor, *, layer: int, branch: Branch = "ffn"
    ) -> RoutingDecision:
        """Let a router decide about ``(batch, positions, d)`` states; who watches sees decisions about FFNs.

        Raises:
            ValueError: All tokens are sent to the anchor, which is no expert here.
        """
        forced = FORCED.get()
        if forced is not None:
            if forced.expert == ANCHOR and not router.with_anchor:  # no block to send them to
                raise ValueError(
                    "All tokens were to go to the base's own modules, but the base is no expert of this composition "
                    "(seed_expert: false). Measure them in the base itself, or in a composition with seed_expert: true."
                )
            forced.watch(layer, branch, hidden_states, self.token_mask)
            return forced.decision(hidden_states)
        context = RoutingContext(
            hidden_states=hidden_states,
            # a router's running sums are kept by layer, and the two branches of one layer must not share them
            layer=layer if branch == "ffn" else -1 - layer,
            groups=self.groups,
            token_mask=self.token_mask,
            state=self.state,
        )
        recorder = RECORDER.get() if branch == "ffn" else None
        decision: RoutingDecision = router(context, trace=recorder is not None)
        if recorder is not None:
            recorder(layer, decision, self.token_mask)
        return decision

    def decide(
        self, router: Router, hidden_states: torch.Tensor, *, layer: int, branch: Branch = "ffn"
    ) -> None:
        """Take the decision that every expert layer above follows."""
        self._decisions[branch] = self.route(router, hidden_states, layer=layer, branch=branch)

    def decision(self, branch: Branch = "ffn") -> RoutingDecision:
        """Return the model-wide decision."""
        assert branch in self._decisions, "the gate's layer runs below every expert layer"
        return self._decisions[branch]


_CURRENT: ContextVar[ForwardPass | None] = ContextVar("composer_forward_pass", default=None)


def current_forward() -> ForwardPass:
    """Return the forward pass that is under way in this context.

    Raises:
        RuntimeError: An expert layer was called from outside of the composed model.
    """
    forward = _CURRENT.get()
    if forward is None:
        raise RuntimeError(
            "An expert layer was called outside of a composed model's forward pass, so it does not know which "
            "experts are allowed. Call the composed model, not the base model inside it."
        )
    return forward


class forward_pass:  # noqa: N801 - a context manager; a generator would cost more than it holds
    """Make ``forward`` current for the enclosed code."""

    __slots__ = ("_forward", "_token")

    def __init__(self, forward: ForwardPass) -> None:
        self._forward = forward

    def __enter__(self) -> ForwardPass:
        self._token = _CURRENT.set(self._forward)
        return self._forward

    def __exit__(self, *_: object) -> None:
        _CURRENT.reset(self._token)
