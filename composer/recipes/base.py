"""The recipe's contract: what it accepts, and how it puts experts into a base model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from composer.lock import OptOutClass
from composer.manifest import Manifest, RouterSpec
from experts.base import BaseDescription
from experts.card import ExpertCard
from experts.routing_artifacts import RoutingInfo

if TYPE_CHECKING:
    from composer.members import Members
    from composer.model import ComposedForCausalLM

__all__ = ["Candidate", "Recipe", "unsupported_kinds"]


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
    """

    summary: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]]
    optout_class: ClassVar[OptOutClass]

    def expand(self, manifest: Manifest) -> Manifest:
        """Write this recipe's own defaults out where the builder said nothing."""
        return manifest

    def manifest_problems(self, manifest: Manifest, base: BaseDescription) -> list[str]:
        """Say what the manifest asks for that this recipe does not do, the router left out."""
        if manifest.upcycle is None:
            return []
        return [f"upcycle: recipe '{manifest.recipe}' has no such settings; btx, bam and sparse_upcycle have"]

    def optout(self, manifest: Manifest) -> OptOutClass:
        """Return what opting out can mean for the model of this manifest."""
        return self.optout_class

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
    allowed = ", ".join(kinds)
    return [
        f"{e.card.name} is of kind '{e.card.kind}'; {recipe} composes {allowed}"
        for e in experts
        if e.card.kind not in kinds
    ]
