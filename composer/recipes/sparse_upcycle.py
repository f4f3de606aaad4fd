"""Sparse upcycling: the FFN of one dense model, copied; the mixture starts as that model and is trained on.

``y = sum_i g_i(x) FFN(x)`` with all copies alike and a random router (arXiv 2212.05055, section 3), so that any gate
whose weights sum to 1 gives the dense model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from composer.lock import OptOutClass
from composer.manifest import Manifest, RouterSpec, UpcycleSpec
from composer.recipes.base import Candidate
from composer.recipes.upcycled import UpcycledRecipe
from experts.base import BaseDescription
from experts.routing_artifacts import RoutingInfo

__all__ = ["SparseUpcycle"]


class SparseUpcycle(UpcycledRecipe):
    """Copies of one dense model; nothing of the base stays but what the model left as it was."""

    name = "sparse_upcycle"
    summary = "Copies of one dense model, which a router learns to tell apart (sparse upcycling)"
    settings = ("copies",)
    defaults: ClassVar[Mapping[str, Any]] = {"copies": 4}
    router_defaults: ClassVar[Mapping[str, Any]] = {
        "scorer": "random",
        "context": "token",
        "top_k": 2,
        "normalize": True,
    }

    def optout(self, manifest: Manifest) -> OptOutClass:
        """Every tensor is of the one owner, who leaves with all of it: the base is left."""
        return "recompose"

    def seats(self, spec: UpcycleSpec, experts: int) -> int:
        """Return the number of copies."""
        assert spec.copies is not None, "the plan wrote it out"
        return spec.copies

    def problems(
        self,
        *,
        router: RouterSpec,
        base: BaseDescription,
        public: RoutingInfo | None,
        experts: Sequence[Candidate],
    ) -> list[str]:
        """One model, and a router that nobody published."""
        found = super().problems(router=router, base=base, public=public, experts=experts)
        if len(experts) != 1:
            found.append(
                f"sparse_upcycle copies one dense model, and {len(experts)} are named; name one, or use recipe `btx`"
            )
        if router.scorer != "random":
            found.append(f"router.scorer: '{router.scorer}' cannot tell copies apart; use 'random'")
        return found
