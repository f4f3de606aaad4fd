"""The recipe's contract: what it accepts, and how it puts experts into a base model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from composer.lock import Lock, OptOutClass
from composer.manifest import Manifest, RouterSpec
from experts.base import BaseDescription
from experts.card import ExpertCard
from experts.routing_artifacts import RoutingInfo

if TYPE_CHECKING:
    from composer.members import Members
    from composer.model import ComposedForCausalLM
    from composer.planning import Plan
    from composer.probes import Probe

__all__ = ["Candidate", "Recipe", "prompt_problems", "unsupported_kinds"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An expert that a manifest names.

    Attributes:
        card: Its card.
        ffn_only: Whether it changes nothing but feed-forward linears.
    """

    card: ExpertCard
    ffn_only: bool


class Recipe(ABC):
    """Makes one model out of experts.

    Attributes:
        summary: One line for tables.
        kinds: Expert kinds it composes.
        optout_class: What opting out can mean for models it makes.
        manifest: The class of its manifests.
        lock: The class of its locks.
        top_files: Files of the base that also stand at the top of a folder, beside the tokenizer's.
        generates: Whether its models predict tokens.
        routes: Whether its models choose among the experts.
    """

    summary: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]]
    optout_class: ClassVar[OptOutClass]
    manifest: ClassVar[type[Manifest]] = Manifest
    lock: ClassVar[type[Lock]] = Lock
    top_files: ClassVar[tuple[str, ...]] = ()
    generates: ClassVar[bool] = True
    routes: ClassVar[bool] = True

    def expand(self, manifest: Manifest) -> Manifest:
        """Write this recipe's own defaults out where the builder said nothing."""
        return manifest

    def manifest_problems(self, manifest: Manifest, base: BaseDescription) -> list[str]:
        """Say what the manifest asks for that this recipe does not do, the router left out."""
        found = prompt_problems(manifest)
        if manifest.upcycle is not None:
            found.append(
                f"upcycle: recipe '{manifest.recipe}' has none; btx, bam, sparse_upcycle, merge and soup do"
            )
        return found

    def optout(self, manifest: Manifest) -> OptOutClass:
        """Return what opting out can mean for the model of this manifest."""
        return self.optout_class

    def warnings(self, *, manifest: Manifest, experts: Sequence[ExpertCard]) -> list[str]:
        """Say what the builder should know about a composition that is possible."""
        top_k = manifest.router.top_k
        if top_k <= len(experts) + 1:
            return []
        return [
            f"router.top_k is {top_k}; with {len(experts)} experts and the anchor every token "
            f"uses all {len(experts) + 1}."
        ]

    def write_files(self, folder: Path, plan: Plan, lock: Lock) -> None:
        """Write what a library needs to open the folder; files of base and experts are there, others are not."""
        from composer.building import write_config

        write_config(folder, plan, lock)

    def model_card(self, lock: Lock, *, description: str) -> str:
        """Return the text of ``README.md``."""
        from composer.model_card import language_model_card

        return language_model_card(lock, description)

    def load(self, members: Members, lock: Lock, **options: Any) -> Any:
        """Load the model; see `composer.loading.load` for the options."""
        from composer.loading import load_language_model

        return load_language_model(members, lock, **options)

    def probe(self, folder: Path, prompts: Sequence[str], *, seed: int) -> Probe:
        """Return what models of this recipe are compared by."""
        from composer.probes import LogitProbe

        return LogitProbe(folder, prompts, seed=seed)

    def parameters(
        self, *, manifest: Manifest, base: BaseDescription, experts: Sequence[ExpertCard]
    ) -> tuple[int, int] | None:
        """Return how many parameters the model has and how many one token meets at most.

        None: those of the anchor and its experts, as `active_experts` counts them.
        """
        return None

    @abstractmethod
    def problems(
        self,
        *,
        router: RouterSpec,
        base: BaseDescription,
        public: RoutingInfo | None,
        experts: Sequence[Candidate],
    ) -> list[str]:
        """Say why these experts cannot be composed; empty when they can. Opens no tensor."""

    @abstractmethod
    def active_experts(self, *, router: RouterSpec, experts: Sequence[ExpertCard]) -> int:
        """Return how many experts' weights a token meets at most in addition to the anchor's."""

    @abstractmethod
    def assemble(self, model: ComposedForCausalLM, members: Members) -> None:
        """Put the experts into the model.

        Args:
            model: Holds the base model, still untouched.
            members: The experts to put in, with their files.
        """


def unsupported_kinds(recipe: str, kinds: Sequence[str], experts: Sequence[Candidate]) -> list[str]:
    """Return one problem for each expert of a kind that the recipe does not compose."""
    from composer.recipes import RECIPES

    def others(kind: str) -> str:
        return ", ".join(name for name in RECIPES if kind in RECIPES.load(name).kinds) or "none"

    allowed = ", ".join(kinds)
    return [
        f"{e.card.name} is of kind '{e.card.kind}'; {recipe} composes {allowed} (recipes for {e.card.kind}: "
        f"{others(e.card.kind)})"
        for e in experts
        if e.card.kind not in kinds
    ]


def prompt_problems(manifest: Manifest) -> list[str]:
    """Say where prompts are missing or blank, or given to a scorer that is not made of them."""
    from composer.routing.scorers import SCORERS

    router = manifest.router
    if router.scorer not in SCORERS:
        return []  # said elsewhere
    if not SCORERS.load(router.scorer).from_prompts:
        given = [entry.ref for entry in manifest.experts if entry.positive_prompts or entry.negative_prompts]
        given += ["router.public_prompts"] if router.public_prompts else []
        return [
            f"{name}: prompts are given, but scorer '{router.scorer}' is not made of them; write `scorer: prompts`"
            for name in given
        ]
    kept = [entry for entry in manifest.experts if entry.ref.partition("/")[0] not in manifest.opt_out]
    lacking = [
        f"{entry.ref}: scorer '{router.scorer}' needs positive_prompts, some texts of the expert's domain"
        for entry in kept
        if not entry.positive_prompts
    ]
    texts = {"router.public_prompts": router.public_prompts}
    for entry in kept:
        texts[f"{entry.ref}: positive_prompts"] = entry.positive_prompts
        texts[f"{entry.ref}: negative_prompts"] = entry.negative_prompts
    return lacking + [
        f"{where}[{number}] is {text!r}; some text is needed, since a row is made of its words"
        for where, prompts in texts.items()
        for number, text in enumerate(prompts)
        if not text.strip()
    ]
