"""Branch-Attend-Mix: FFNs and attention of dense models become experts, with a router each in every layer.

``MoE(u) = sum_(i in TopK(p, k)) p_i(u) FFN_i(u)`` with ``p = softmax(W_ffn u)``, not renormalised as published, and
``MoA(u) = sum_j g_j(u) MHA_j(u)`` over all experts with ``g = softmax(W_attn u)`` (arXiv 2408.08274, section 3). Where
the base's block is parallel both read the same normed state, elsewhere each reads what the base's module reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from composer.manifest import AttentionSpec, RouterSpec, TrunkSpec
from composer.recipes.base import Candidate
from composer.recipes.upcycled import UpcycledRecipe
from experts.base import BaseDescription
from experts.routing_artifacts import RoutingInfo

__all__ = ["BAM"]


class BAM(UpcycledRecipe):
    """FFN and attention experts of dense models; keys and values shared, or each expert's own."""

    name = "bam"
    summary = "FFN and attention experts of dense models, each with its router (Branch-Attend-Mix)"
    settings = ("trunk", "seed_expert", "attention")
    defaults: ClassVar[Mapping[str, Any]] = {
        "trunk": TrunkSpec(),
        "seed_expert": True,
        "attention": AttentionSpec(),
    }
    router_defaults: ClassVar[Mapping[str, Any]] = {
        "scorer": "random",
        "context": "token",
        "top_k": 1,
        "normalize": False,
    }

    def problems(
        self,
        *,
        router: RouterSpec,
        base: BaseDescription,
        public: RoutingInfo | None,
        experts: tuple[Candidate, ...] | list[Candidate] | Any,
    ) -> list[str]:
        """Refuse rows that were trained for FFNs only, beside what every upcycling recipe refuses."""
        found = super().problems(router=router, base=base, public=public, experts=experts)
        if router.scorer == "learned":
            found.append(
                "router.scorer: 'learned' has rows for FFNs only, and bam routes attention too; use 'random', "
                "'prompts', 'lda', 'ridge' or 'dume'"
            )
        if router.scorer == "dume":
            published = [("the base", public), *((e.card.name, e.card.routing) for e in experts)]
            found += [
                f"{name} publishes no statistics of what attention routers read; make them with `coterie "
                + (
                    "base public-routing NAME --inputs`"
                    if info is public
                    else f"expert statistics {name} --attention`"
                )
                for name, info in published
                if info is not None and info.inputs is not None and "attention" not in info.inputs.branches
            ]
        return found
