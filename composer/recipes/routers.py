"""Routers of a recipe: what a manifest's ``router`` may say, and the routers it means, made of published artefacts.

Knows scorers, selectors and artefacts; knows nothing of the experts that are routed to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from composer.manifest import RouterSpec
from composer.routing.scorers import SCORERS
from composer.routing.selectors import SELECTORS
from experts.card import ExpertCard
from experts.errors import CoterieError, PlanError
from experts.routing_artifacts import RoutingArtifacts, RoutingInfo
from experts.strict import validate

if TYPE_CHECKING:
    from composer.members import Members
    from composer.model import ComposedForCausalLM
    from composer.routing.router import Router

__all__ = ["ANCHOR_NAME", "NOTHING", "RouterMaker", "router_problems"]

ANCHOR = 0  # composer.routing.types.ANCHOR, which would load torch
ANCHOR_NAME = "anchor"  # composer.trace.ANCHOR_NAME
NOTHING = RoutingArtifacts(info=RoutingInfo(), tensors={})
"""The artefacts of somebody who publishes none."""


def router_problems(
    router: RouterSpec, public: RoutingInfo | None, experts: Sequence[ExpertCard]
) -> list[str]:
    """Say what is wrong with a manifest's ``router`` for these experts; empty when their routers can be made."""
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


class RouterMaker:
    """Makes the routers of one model from the published artefacts.

    Args:
        spec: What the manifest says.
        members: The experts, with their files.
        model: Whose routers they are. Its FFNs and attention are still the base's own, and its trunk as it shall be:
            what public prompts give is measured there.
        names: Id -> name of everybody who can be routed to, the anchor (0) first if it can; None: the anchor and the
            members.
        branch: What is routed to.
    """

    def __init__(
        self,
        spec: RouterSpec,
        members: Members,
        model: ComposedForCausalLM,
        *,
        names: Mapping[int, str] | None = None,
        branch: Literal["ffn", "attention"] = "ffn",
    ) -> None:
        self.spec = spec
        self.members = members
        self.model = model
        self.branch = branch
        self.names = names or {ANCHOR: ANCHOR_NAME, **{m.id: m.locked.name for m in members.experts}}
        self.others = tuple(expert for expert in self.names if expert != ANCHOR)
        self.scorer_class: Any = SCORERS.load(spec.scorer)
        self.options = self.scorer_class.Options(**spec.options)
        self.public = NOTHING
        self.artifacts = dict.fromkeys(self.others, NOTHING)
        if self.scorer_class.needs_artifacts:
            width = members.description.hidden_size
            self.public = members.public()
            self.artifacts = {member.id: member.routing(width) for member in members.experts}
        self.public_inputs: Mapping[int, Any] = {}
        if self.scorer_class.from_prompts:
            from composer.upcycling.measuring import public_inputs

            self.public_inputs = public_inputs(model, members, branch=branch)

    def per_layer(self, layer: int, present: Sequence[int]) -> Router | None:
        """Return the router of one expert layer, or None where the model-wide gate decides."""
        if self.scorer_class.depth == "model":
            return None
        return self._router(layer, present)

    def finish(self) -> None:
        """Install the model-wide gate, if the scorer is one, or fill in rows that are made of prompts."""
        from composer.model import Gate, decoder_layer

        if self.scorer_class.from_prompts:
            from composer.upcycling.measuring import fill_prompt_rows

            fill_prompt_rows(self.model, self.members, branch=self.branch, public=self.public_inputs)
        if self.scorer_class.depth != "model":
            return
        layer = self.scorer_class.gate_layer(public=self.public.info, layer=self.spec.layer)
        gate = Gate(router=self._router(layer, self.others), layer=layer)
        at = decoder_layer(self.model.base, self.members.description.layers_prefix, layer)
        self.model.install_gate(gate, at, branch=self.branch)

    def _router(self, layer: int, present: Sequence[int]) -> Router:
        from composer.routing.router import Router
        from composer.routing.scorers.base import ScorerInputs

        inputs = ScorerInputs(
            public=self.public,
            experts={expert: self.artifacts[expert] for expert in present},
            layer=layer,
            dtype=self.model.dtype,
            device=self.model.device,
            hidden_size=self.members.description.hidden_size,
            names={expert: name for expert, name in self.names.items() if expert in (ANCHOR, *present)},
            branch=self.branch,
        )
        selector = SELECTORS.load(self.spec.selector)
        wanted = selector.Options(**self.spec.selector_options).model_dump()
        return Router(
            scorer=self.scorer_class.make(inputs, self.options),
            selector=selector(top_k=self.spec.top_k, normalize=self.spec.normalize, **wanted),
            context=self.spec.context,
            token_weight=self.spec.token_weight,
            num_experts=len(self.others),
            present=None if len(present) == len(self.others) else present,
            with_anchor=ANCHOR in self.names,
        )
