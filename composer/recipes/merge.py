"""Whole models merged into one of the base's size: any merge method, or the plain mean of a soup.

Merging happens where the model is loaded, from the files of whoever is in it: nothing that mixes owners is stored, and
leaving somebody out gives the merge that they never were in. Knows what a manifest may ask for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from composer.lock import OptOutClass
from composer.manifest import Manifest, RouterSpec, TrunkSpec, UpcycleSpec
from composer.merge_methods import AVERAGE, METHODS, merge_problems
from composer.recipes.base import Candidate, Recipe, unsupported_kinds
from composer.recipes.upcycled import left_out
from experts.base import BaseDescription
from experts.card import ExpertCard
from experts.names import parse_reference
from experts.routing_artifacts import RoutingInfo

if TYPE_CHECKING:
    from composer.members import Members
    from composer.model import ComposedForCausalLM

__all__ = ["Merge", "Soup"]

_ONLY = ("trunk", "seed_expert")


class Merge(Recipe):
    """One dense model, merged tensor by tensor by any method of mergekit.

    Under ``upcycle``, ``trunk`` names method, weights and settings; ``seed_expert`` says whether the base is merged too
    where the method treats it as a model like the others.
    """

    name: ClassVar[str] = "merge"
    summary = "Models merged into one dense model by a method of mergekit (TIES, DARE, SLERP, ...)"
    kinds = ("dense", "ffn", "lora")
    optout_class: ClassVar[OptOutClass] = "recompose"
    routes = False
    methods: ClassVar[Sequence[str]] = tuple(METHODS)
    defaults: ClassVar[Mapping[str, Any]] = {"seed_expert": False}

    def expand(self, manifest: Manifest) -> Manifest:
        """Write the defaults out, and drop the weights of those who are opted out."""
        wish = manifest.upcycle or UpcycleSpec()
        said = {key: value for key in UpcycleSpec.model_fields if (value := getattr(wish, key)) is not None}
        spec = UpcycleSpec(**{**self.defaults, **said})
        return manifest.model_copy(update={"upcycle": spec.without(left_out(manifest))})

    def manifest_problems(self, manifest: Manifest, base: BaseDescription) -> list[str]:
        """Check method, weights and settings, and that nothing is said about routing."""
        spec = manifest.upcycle
        assert spec is not None, "the plan wrote it out"
        found = [
            f"upcycle.{key}: {self.name} has no such setting; it has {', '.join(_ONLY)}"
            for key in UpcycleSpec.model_fields
            if getattr(spec, key) is not None and key not in _ONLY
        ]
        if manifest.router != RouterSpec():
            found.append(f"router: {self.name} makes one dense model, which routes nothing; leave it out")
        asked = [name for entry in manifest.experts if entry.positive_prompts for name in [entry.ref]]
        found += [f"{name}: {self.name} has no use for prompts; leave them out" for name in asked]
        if not isinstance(spec.trunk, TrunkSpec):
            method = "trunk: {method: ties, parameters: {density: 0.5}}"
            return [*found, f"upcycle.trunk: {self.name} needs a merge method, for instance `{method}`"]
        if spec.trunk.method not in self.methods and spec.trunk.method in METHODS:
            allowed = ", ".join(self.methods)
            found.append(f"upcycle.trunk: {self.name} knows {allowed}; for others use recipe 'merge'")
        return found + self._method_problems(manifest, spec.trunk, with_base=bool(spec.seed_expert))

    def _method_problems(self, manifest: Manifest, trunk: TrunkSpec, *, with_base: bool) -> list[str]:
        gone = left_out(manifest)
        names = [parse_reference(entry.ref)[0] for entry in manifest.experts]
        method = METHODS.get(trunk.method)
        problems = merge_problems(
            trunk.method,
            [name for name in names if name not in gone],
            base=with_base or (method is not None and method.base == "needed"),
            weights=trunk.weights,
            parameters=trunk.parameters,
        )
        return [f"upcycle.trunk: {problem}" for problem in problems]

    def problems(
        self,
        *,
        router: RouterSpec,
        base: BaseDescription,
        public: RoutingInfo | None,
        experts: Sequence[Candidate],
    ) -> list[str]:
        """Check the kinds."""
        return unsupported_kinds(self.name, self.kinds, experts)

    def active_experts(self, *, router: RouterSpec, experts: Sequence[ExpertCard]) -> int:
        """Count none: a token meets one dense model."""
        return 0

    def parameters(
        self, *, manifest: Manifest, base: BaseDescription, experts: Sequence[ExpertCard]
    ) -> tuple[int, int]:
        """Count the base's, all of which every token meets."""
        return base.num_parameters, base.num_parameters

    def assemble(self, model: ComposedForCausalLM, members: Members) -> None:
        """Merge every tensor that some expert changes."""
        from composer.upcycling.whole import merge_whole

        if members.experts:  # else the base model answers alone, untouched
            merge_whole(model, members)


class Soup(Merge):
    """The weighted mean of the models, ``sum_j w_j W_j / sum_j w_j`` (model soups, arXiv 2203.05482)."""

    name = "soup"
    summary = "The weighted mean of models, as one dense model"
    methods = (AVERAGE, "linear")
    defaults: ClassVar[Mapping[str, Any]] = {"trunk": TrunkSpec(), "seed_expert": False}
