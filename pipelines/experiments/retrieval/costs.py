"""What a query costs in the arms of a comparison of retrievers, in passes through the base.

Counted from what the engine runs, layer by layer; tests hold that against the rows that layers see. Knows routers and
numbers of layers; measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from composer.retrieval.options import RetrievalRouter
from composer.retrieval.scorers import RETRIEVAL_SELECTORS
from pipelines.experiments.retrieval.arms import OURS

if TYPE_CHECKING:
    from pipelines.experiments.retrieval.settings import RetrieverExperiment

__all__ = ["query_passes", "routed_passes"]

_SINGLE = ("base", "best_single_expert", "multi_task", "multi_task_pooled")
_AFTER_THE_BASE = ("dataset_router", "classifier_router", "paper")
"""The base embeds the query, a router chooses, one expert embeds it again."""


def routed_passes(router: Mapping[str, Any], *, experts: int, first: int, layers: int) -> float:
    """Count the passes of a query through a composed retriever, where no expert is left out and none abstains.

    Fusing E experts decided by the base's embedding takes the base and every expert, 1 + E; from layer ``first`` on
    where they share what lies below. Decided before, by a lower layer's state or by token embeddings, the base itself
    is not needed.

    Args:
        router: Of the manifest.
        experts: How many are composed.
        first: Lowest layer that an expert changes.
        layers: Layers of the base.
    """
    options = RetrievalRouter.model_validate(dict(router))
    most = RETRIEVAL_SELECTORS.load(options.selector).most
    chosen = experts if most is None else min(most, experts)
    if options.route_on == "embedding" and most is not None:
        return 1.0 + chosen
    rows = chosen + (options.route_on == "embedding")
    # what is routed on a layer's state has shared what lies below it anyway
    shared = first / layers if options.share_lower_layers or options.route_on == "layer_state" else 0.0
    return shared + (1 - shared) * rows


def query_passes(experiment: RetrieverExperiment, *, num_layers: int) -> dict[str, float]:
    """Return passes by arm; oracles, which no query can be answered with, are not among them.

    Args:
        experiment: Says how many experts there are, and on which layers.
        num_layers: Layers of the base.
    """
    from pipelines.train.layer_choice import parse_layers

    first = min(parse_layers(experiment.layers, num_layers=num_layers))
    count = len(experiment.domains)
    sizes = {"first": first, "layers": num_layers}
    passes = dict.fromkeys(_SINGLE, 1.0)
    passes |= {f"expert:{domain}": 1.0 for domain in experiment.domains}
    passes |= {"uniform": routed_passes({"route_on": "static_tokens"}, experts=count, **sizes)}
    passes |= dict.fromkeys(_AFTER_THE_BASE, 2.0)
    routers = {arm: {**experiment.router, **changes} for arm, changes in OURS.items()}
    passes |= {arm: routed_passes(router, experts=count, **sizes) for arm, router in routers.items()}
    passes["coterie-without-own"] = routed_passes(routers["coterie"], experts=count - 1, **sizes)
    return passes
