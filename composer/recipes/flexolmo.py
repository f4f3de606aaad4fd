"""FlexOlmo: independently trained FFN experts beside a frozen public anchor, concatenated without joint training.

``MoE(h) = sum_e p_e(h) FFN_e(h)``, where the anchor is one of the experts and ``p`` comes from a router that is
made of the owners' own artefacts (arXiv 2507.07024). No stored tensor mixes owners, so an owner leaves by not
being opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from composer.lock import OptOutClass
from composer.manifest import RouterSpec
from composer.recipes.base import Candidate, Recipe, unsupported_kinds
from composer.recipes.routers import RouterMaker, router_problems
from experts.base import BaseDescription
from experts.card import ExpertCard
from experts.routing_artifacts import RoutingInfo

if TYPE_CHECKING:
    from composer.members import Members
    from composer.model import ComposedForCausalLM

__all__ = ["FlexOlmo"]


class FlexOlmo(Recipe):
    """Domain routing over FFN experts, full or low-rank, on any declared set of layers."""

    summary = "FFN experts beside the anchor, routed per token by domain"
    kinds = ("lora", "ffn")
    optout_class: ClassVar[OptOutClass] = "exact"

    def problems(
        self,
        *,
        router: RouterSpec,
        base: BaseDescription,
        public: RoutingInfo | None,
        experts: Sequence[Candidate],
    ) -> list[str]:
        """Check kinds, the adapters' targets, names of scorer and selector, and the published artefacts."""
        found = unsupported_kinds("flexolmo", self.kinds, experts)
        found += [
            f"{e.card.name} adapts linears outside of the FFN; flexolmo routes FFN experts only"
            for e in experts
            if e.card.kind in self.kinds and not e.ffn_only
        ]
        return found + router_problems(router, public, [e.card for e in experts])

    def active_experts(self, *, router: RouterSpec, experts: Sequence[ExpertCard]) -> int:
        """Count the worst case: low-rank experts always need the anchor's FFN, full ones stand in for it."""
        if all(card.kind == "ffn" for card in experts):
            return min(router.top_k, len(experts) + 1) - 1
        return min(router.top_k, len(experts))

    def assemble(self, model: ComposedForCausalLM, members: Members) -> None:
        """Replace the FFN of every layer that has experts, and install the router."""
        from composer.layers.install import install_experts

        if not members.experts:
            return  # the base model answers alone, untouched
        spec = members.lock.router
        makers = RouterMaker(spec, members, model)
        install_experts(model, members, router_for=makers.per_layer, normalized=spec.normalize)
        makers.finish()
