"""The owners' experts with sums over token embeddings beside what they published when they were trained.

Made from registered experts and the owners' pairs, so a work folder of before needs no training. Knows one world; knows
nothing of arms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from experts.routing_artifacts import RoutingArtifacts
from pipelines.experiments.retrieval.world import BASE, RetrieverWorld

if TYPE_CHECKING:
    from pipelines.train.anchor import ResolvedBase

__all__ = ["static_experts"]


def static_experts(world: RetrieverWorld) -> Mapping[str, str]:
    """Publish the experts once more under names of their own; no layer of the base runs.

    Returns:
        Reference by domain.
    """
    from pipelines.train.anchor import resolve_base

    trained = world.experts
    names = {domain: f"{world.owner(domain)}/retriever-static" for domain in world.domains}
    known = {record.name for record in world.registry.experts()}
    missing = [domain for domain, name in names.items() if name not in known]
    if missing:
        with resolve_base(BASE, registry=world.registry) as base:
            for domain in missing:
                _publish(world, domain, trained[domain], name=names[domain], base=base)
    return names


def _publish(world: RetrieverWorld, domain: str, trained: str, *, name: str, base: ResolvedBase) -> None:
    """Add the sums to an expert's artefacts, and register the result."""
    from pipelines.train.query_encoder import RetrievalBase
    from pipelines.train.republish import republish
    from pipelines.train.retrieval_routing import token_sums

    world.tell(f"summing up token embeddings of {domain}")
    card = world.registry.card(trained)
    files = world.registry.files(card)
    assert card.routing is not None, "the job publishes statistics"
    published = RoutingArtifacts.load(files[card.routing.file], card.routing).retrieval
    assert published is not None, "it is a retriever's"
    model = RetrievalBase(base.folder, description=base.description, first=0)
    texts = list(dict.fromkeys(pair.query.strip() for pair in world.data.owned[domain].training))
    static = token_sums(model, texts, second_moment=published.info.second_moment)
    info = published.info.model_copy(update={"static_tokens": True})
    out = world.folder / "experts" / name
    if not out.is_dir():  # a run may have ended between packing and registering
        artifacts = replace(published, info=info, static=static)
        republish(files, card, artifacts, out, base=base, version=1, name=name)
    world.registry.register(out)
