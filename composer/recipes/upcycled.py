"""What the recipes have in common that make one mixture of dense models: settings, refusals, costs, the trunk.

Knows who is an expert of what; the parts of the model are made by `composer.upcycling.assembly`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from composer.lock import OptOutClass
from composer.manifest import AttentionSpec, Manifest, RouterSpec, TrunkSpec, UpcycleSpec
from composer.merge_methods import merge_problems
from composer.recipes.base import Candidate, Recipe, prompt_problems, unsupported_kinds
from composer.recipes.routers import router_problems
from composer.upcycling.partition import Partition, partition
from experts.base import BaseDescription
from experts.card import ExpertCard
from experts.errors import PlanError
from experts.names import parse_reference
from experts.routing_artifacts import RoutingInfo

if TYPE_CHECKING:
    from composer.members import Members
    from composer.model import ComposedForCausalLM

__all__ = ["UpcycledRecipe", "left_out"]


class UpcycledRecipe(Recipe):
    """A mixture of whole models that were fine-tuned from one base.

    Attributes:
        name: The recipe's name in messages.
        settings: Keys of ``upcycle`` that it understands.
        router_defaults: What ``router`` means where the manifest says nothing: the paper's.
        defaults: The same for ``upcycle``.
    """

    name: ClassVar[str]
    kinds = ("dense",)
    optout_class: ClassVar[OptOutClass] = "recompose"
    settings: ClassVar[tuple[str, ...]] = ("trunk", "seed_expert")
    router_defaults: ClassVar[Mapping[str, Any]]
    defaults: ClassVar[Mapping[str, Any]] = {"trunk": TrunkSpec(), "seed_expert": True}

    def expand(self, manifest: Manifest) -> Manifest:
        """Write the paper's settings out where the builder said nothing."""
        router = manifest.router
        written = {key: getattr(router, key) for key in router.model_fields_set}
        wish = manifest.upcycle or UpcycleSpec()
        said = {key: value for key in UpcycleSpec.model_fields if (value := getattr(wish, key)) is not None}
        spec = UpcycleSpec(**{**self.defaults, **said}).without(left_out(manifest))
        return manifest.model_copy(
            update={
                "router": RouterSpec(**{**self.router_defaults, **written}),
                "upcycle": spec,
            }
        )

    def optout(self, manifest: Manifest) -> OptOutClass:
        """Exact where the trunk is the base's own: then no tensor mixes owners."""
        return "exact" if _spec(manifest).trunk == "frozen" else "recompose"

    def manifest_problems(self, manifest: Manifest, base: BaseDescription) -> list[str]:
        """Check the keys of ``upcycle``, the trunk's weights, and attention."""
        spec = _spec(manifest)
        found = prompt_problems(manifest)
        found += [
            f"upcycle.{key}: {self.name} has no such setting; it has {', '.join(self.settings)}"
            for key in UpcycleSpec.model_fields
            if getattr(spec, key) is not None and key not in self.settings
        ]
        if isinstance(spec.trunk, TrunkSpec):
            found += _trunk_problems(spec.trunk, manifest, with_base=bool(spec.seed_expert))
        try:
            self.parts(manifest, base)
        except PlanError as error:
            found.append(str(error))
        return found

    def problems(
        self,
        *,
        router: RouterSpec,
        base: BaseDescription,
        public: RoutingInfo | None,
        experts: Sequence[Candidate],
    ) -> list[str]:
        """Check kinds, names of scorer and selector, and the published artefacts."""
        found = unsupported_kinds(self.name, self.kinds, experts)
        return found + router_problems(router, public, [e.card for e in experts])

    def warnings(self, *, manifest: Manifest, experts: Sequence[ExpertCard]) -> list[str]:
        """Say where a token is sent to more experts than a layer has, as whoever leaves may bring about."""
        spec = _spec(manifest)
        seats = self.seats(spec, len(experts))
        wanted = {
            "router.top_k": manifest.router.top_k,
            "upcycle.attention.top_k": (spec.attention and spec.attention.top_k) or 0,
        }
        return [
            f"{key} is {top_k}, but a layer has {seats} expert{'' if seats == 1 else 's'}"
            f"{', the base counted' if spec.seed_expert else ''}; every token uses all of them."
            for key, top_k in wanted.items()
            if top_k > seats
        ]

    def active_experts(self, *, router: RouterSpec, experts: Sequence[ExpertCard]) -> int:
        """Count experts beside the anchor's place; `parameters` counts what they weigh."""
        return min(router.top_k, len(experts) + 1) - 1

    def parts(self, manifest: Manifest, base: BaseDescription) -> Partition:
        """Return what is copied per expert and what is trunk."""
        return partition(base, _kv(_spec(manifest).attention))

    def parameters(
        self, *, manifest: Manifest, base: BaseDescription, experts: Sequence[ExpertCard]
    ) -> tuple[int, int]:
        """Count all experts, and those that one token meets: of attention all, since all keep keys and values."""
        spec, parts = _spec(manifest), self.parts(manifest, base)
        seats = self.seats(spec, len(experts))
        rows = seats * (1 if spec.attention is None else 2) if _has_rows(manifest.router) else 0
        attention = 1 if spec.attention is None else seats
        active = min(manifest.router.top_k, seats)
        return (
            parts.parameters(ffn=seats, attention=attention, rows=rows),
            parts.parameters(ffn=active, attention=attention, rows=rows),
        )

    def seats(self, spec: UpcycleSpec, experts: int) -> int:
        """Return how many experts a layer has, the base among them if it is one."""
        return experts + bool(spec.seed_expert)

    def assemble(self, model: ComposedForCausalLM, members: Members) -> None:
        """Merge the trunk, stack the experts and install the routers."""
        from composer.upcycling.assembly import assemble

        if members.experts:  # else the base model answers alone, untouched
            assemble(model, members)


def left_out(manifest: Manifest) -> set[str]:
    """Return the experts that a manifest lists and opts out."""
    names = {parse_reference(entry.ref)[0] for entry in manifest.experts}
    return {name for name in names if name.partition("/")[0] in manifest.opt_out}


def _spec(manifest: Manifest) -> UpcycleSpec:
    assert manifest.upcycle is not None, "the plan wrote it out"
    return manifest.upcycle


def _kv(attention: AttentionSpec | None) -> Literal["own", "shared"] | None:
    return None if attention is None else attention.kv


def _has_rows(router: RouterSpec) -> bool:
    """Whether the router has parameters: a row per expert in every layer."""
    from composer.routing.scorers import SCORERS

    return bool(SCORERS.load(router.scorer).trainable)


def _trunk_problems(spec: TrunkSpec, manifest: Manifest, *, with_base: bool) -> list[str]:
    names = [parse_reference(entry.ref)[0] for entry in manifest.experts]
    kept = [name for name in names if name.partition("/")[0] not in manifest.opt_out]
    problems = merge_problems(
        spec.method, kept, base=with_base, weights=spec.weights, parameters=spec.parameters
    )
    return [f"upcycle.trunk: {problem}" for problem in problems]
