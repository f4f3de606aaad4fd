"""Arms that change one thing about our default, to see what each setting is worth.

Knows settings of the router; what the default is stands in `pipelines.experiments.arms`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipelines.experiments.arms import COORDINATED, Results, measured, plain

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pipelines.experiments.world import World

__all__ = ["coordinated", "low_anchor_prior", "token_context", "top_p"]


def _variant(world: World, arm: str, router: Mapping[str, Any], names: Mapping[str, str]) -> Results:
    model = world.compose(arm, list(names.values()), {"top_k": world.experiment.top_k, **router})
    return {arm: measured(world, model)}


def token_context(world: World) -> Results:
    """Every token scored by itself, as in the paper, instead of the running mean."""
    return _variant(world, "coterie_token", {"context": "token"}, plain(world))


def top_p(world: World) -> Results:
    """As many experts as hold 0.9 of the probability, at most all of them."""
    everybody = len(world.experiment.domains) + 1
    return _variant(world, "coterie_topp", {"selector": "topp", "top_k": everybody}, plain(world))


def low_anchor_prior(world: World) -> Results:
    """A prior of 1 % for text that is nobody's."""
    return _variant(world, "coterie_anchor_prior", {"options": {"anchor_prior": 0.01}}, plain(world))


def coordinated(world: World) -> Results:
    """Experts that were trained beside the anchor, as the paper's, under our router."""
    return _variant(world, "coterie_coordinated", {}, world.train("paper", **COORDINATED))
