"""A training-free gate in every layer: ridge regression at the very states that the layer's router reads.

DUME (arXiv 2603.29765): every owner runs their text routed to their own expert, on the base's trunk, and publishes
the sums of the routers' inputs. Knows where the sums are taken; the regression is `composer.routing.scorers.ridge`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from composer.routing.scorers.base import ScorerInputs, ScorerOptions
from composer.routing.scorers.ridge import RidgeOptions, RidgeScorer
from composer.routing.types import ANCHOR
from experts.routing_artifacts import RoutingInfo, Statistics

__all__ = ["DumeScorer"]


class DumeOptions(RidgeOptions):
    """Settings of the gate; see `RidgeScorer`. Tokens are scored one by one, so evidence does not add up."""

    evidence: float = 0.0


class DumeScorer(RidgeScorer):
    """Regressed share of each owner's domain in a router's input, layer by layer.

    Leaving an owner out solves the regression anew from the others' sums, in canonical order: bit for bit the gate of
    a composition they never joined.
    """

    depth = "layer"
    Options: ClassVar[type[ScorerOptions]] = DumeOptions

    @classmethod
    def problems(
        cls,
        *,
        public: RoutingInfo | None,
        experts: Mapping[str, tuple[RoutingInfo | None, Sequence[int]]],
        layer: int | None,
    ) -> list[str]:
        """Everybody, the anchor included, must have sums of every layer that is routed; `Scorer.problems`."""
        found = []
        if layer is not None:
            found.append("router.layer: 'dume' scores every expert layer; leave it out")
        wanted = sorted({number for _, layers in experts.values() for number in layers})
        for name, info, layers in [
            ("the base", public, wanted),
            *((name, info, layers) for name, (info, layers) in experts.items()),
        ]:
            there = set() if info is None or info.inputs is None else set(info.inputs.layers)
            lacking = sorted(set(layers) - there)
            if lacking:
                base = name == "the base"
                cure = "base public-routing NAME --inputs" if base else f"expert statistics {name}"
                bam = "" if base else " (with --attention for bam)"
                found.append(
                    f"{name} publishes no statistics of what the routers of layers {lacking} read; make them with "
                    f"`coterie {cure}`{bam}"
                )
        return found

    @classmethod
    def make(cls, inputs: ScorerInputs, options: Any) -> Self:
        """Collect the sums of one layer and branch; gates are solved when a set of experts is first asked for."""
        statistics: dict[int, Statistics] = {}
        for expert, artifacts in {ANCHOR: inputs.public, **inputs.experts}.items():
            own = artifacts.inputs(inputs.layer, inputs.branch)
            assert own is not None, "problems() was empty"
            statistics[expert] = own
        return cls(statistics=statistics, normalization="none", **options.model_dump())
