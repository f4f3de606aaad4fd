"""FlexOlmo: independently trained FFN experts beside a frozen public anchor, concatenated without joint training.

``MoE(h) = sum_e p_e(h) FFN_e(h)``, where the anchor is one of the experts and ``p`` comes from a router that is
made of the owners' own artefacts (arXiv 2507.07024). No stored tensor mixes owners, so an owner leaves by not
being opened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from composer.lock import OptOutClass
from composer.manifest import RouterSpec
from composer.recipes.base import Candidate, Recipe, unsupported_kinds
from composer.routing.scorers import SCORERS
from composer.routing.selectors import SELECTORS
from experts.base import BaseDescription
from experts.card import ExpertCard
from experts.errors import CoterieError, PlanError
from experts.routing_artifacts import RoutingInfo
from experts.strict import validate

if TYPE_CHECKING:
    from composer.members import Members
    from composer.model import ComposedForCausalLM
    from composer.routing.router import Router

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
        return found + _router_problems(router, public, [e.card for e in experts])

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
        makers = _RouterMaker(spec, members, model)
        install_experts(model, members, router_for=makers.per_layer, normalized=spec.normalize)
        makers.install_gate()


def _router_problems(
    router: RouterSpec, public: RoutingInfo | None, experts: Sequence[ExpertCard]
) -> list[str]:
    found = []
    for table, name in ((SCORERS, router.scorer), (SELECTORS, router.selector)):
        try:
            table[name]
        except CoterieError as error:
            found.append(str(error))
    if found:
        return found
    scorer, selector = SCORERS.load(router.scorer), SELECTORS.load(router.selector)
    found += _option_problems(scorer, router.scorer, router.options, what="router.options")
    found += _option_problems(
        selector, router.selector, router.selector_options, what="router.selector_options"
    )
    if router.token_weight and router.context == "token":
        found.append(
            f"router.token_weight is {router.token_weight:g}, but the context 'token' has no mean to blend with; "
            "leave it out, or write `context: running_mean`"
        )
    published = {card.name: (card.routing, card.layers) for card in experts}
    found += scorer.problems(public=public, experts=published, layer=router.layer)
    return found


def _option_problems(plugin: Any, name: str, options: Mapping[str, object], *, what: str) -> list[str]:
    if options and not plugin.Options.model_fields:
        return [f"{what}: '{name}' has no options; leave out {', '.join(sorted(options))}"]
    try:
        validate(plugin.Options, dict(options), what=what, error=PlanError)
    except PlanError as error:
        return [f"{what}.{problem}" for problem in error.problems] or [str(error)]
    return []


class _RouterMaker:
    """Makes the routers of one model from the published artefacts."""

    def __init__(self, spec: RouterSpec, members: Members, model: ComposedForCausalLM) -> None:
        self.spec = spec
        self.members = members
        self.model = model
        self.scorer_class: Any = SCORERS.load(spec.scorer)
        self.options = self.scorer_class.Options(**spec.options)
        self.public = members.public()
        width = members.description.hidden_size
        self.artifacts = {member.id: member.routing(width) for member in members.experts}

    def per_layer(self, layer: int, present: Sequence[int]) -> Router | None:
        """Return the router of one expert layer, or None where the model-wide gate decides."""
        if self.scorer_class.depth == "model":
            return None
        return self._router(layer, present)

    def install_gate(self) -> None:
        """Install the model-wide gate, if the scorer is one."""
        from composer.model import Gate, decoder_layer

        layer = self.scorer_class.gate_layer(public=self.public.info, layer=self.spec.layer)
        if layer is None:
            return
        gate = Gate(router=self._router(layer, tuple(self.artifacts)), layer=layer)
        at = decoder_layer(self.model.base, self.members.description.layers_prefix, layer)
        self.model.install_gate(gate, at)

    def _router(self, layer: int, present: Sequence[int]) -> Router:
        from composer.routing.router import Router
        from composer.routing.scorers.base import ScorerInputs

        inputs = ScorerInputs(
            public=self.public,
            experts={expert: self.artifacts[expert] for expert in present},
            layer=layer,
            dtype=self.model.dtype,
            device=self.model.device,
        )
        selector = SELECTORS.load(self.spec.selector)
        wanted = selector.Options(**self.spec.selector_options).model_dump()
        return Router(
            scorer=self.scorer_class.make(inputs, self.options),
            selector=selector(top_k=self.spec.top_k, normalize=self.spec.normalize, **wanted),
            context=self.spec.context,
            token_weight=self.spec.token_weight,
            num_experts=len(self.artifacts),
            present=None if len(present) == len(self.artifacts) else present,
        )
