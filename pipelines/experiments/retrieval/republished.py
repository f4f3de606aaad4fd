"""The owners' experts with more, or less, beside their weights than what they published when they were trained.

Made from registered experts and the owners' pairs, so a work folder of before needs no training. Knows one world; knows
nothing of arms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from experts.routing_artifacts import RoutingArtifacts
from pipelines.experiments.retrieval.world import BASE, RetrieverWorld

if TYPE_CHECKING:
    from experts.retrieval_artifacts import RetrievalArtifacts
    from pipelines.train.anchor import ResolvedBase

    Change = Callable[[RetrieverWorld, str, RetrievalArtifacts, ResolvedBase], RetrievalArtifacts]

__all__ = ["experts_of_means", "static_experts"]


def static_experts(world: RetrieverWorld) -> Mapping[str, str]:
    """Publish the experts once more with sums over token embeddings; no layer of the base runs.

    Returns:
        Reference by domain.
    """
    return _republished(world, "retriever-static", _with_static)


def experts_of_means(world: RetrieverWorld) -> Mapping[str, str]:
    """Publish the experts once more without second moments, as jobs do by themselves where queries are few.

    Returns:
        Reference by domain.
    """
    return _republished(world, "retriever-means", _without_second_moments)


def _republished(world: RetrieverWorld, name: str, change: Change) -> Mapping[str, str]:
    from pipelines.train.anchor import resolve_base

    trained = world.experts
    names = {domain: f"{world.owner(domain)}/{name}" for domain in world.domains}
    known = {record.name for record in world.registry.experts()}
    missing = [domain for domain, name in names.items() if name not in known]
    if missing:
        with resolve_base(BASE, registry=world.registry) as base:
            for domain in missing:
                _publish(world, domain, trained[domain], change, name=names[domain], base=base)
    return names


def _publish(
    world: RetrieverWorld, domain: str, trained: str, change: Change, *, name: str, base: ResolvedBase
) -> None:
    """Change an expert's artefacts, and register the result."""
    from pipelines.train.republish import republish

    card = world.registry.card(trained)
    files = world.registry.files(card)
    assert card.routing is not None, "the job publishes statistics"
    published = RoutingArtifacts.load(files[card.routing.file], card.routing).retrieval
    assert published is not None, "it is a retriever's"
    artifacts = change(world, domain, published, base)
    out = world.folder / "experts" / name
    if not out.is_dir():  # a run may have ended between packing and registering
        republish(files, card, artifacts, out, base=base, version=1, name=name)
    world.registry.register(out)


def _with_static(
    world: RetrieverWorld, domain: str, published: RetrievalArtifacts, base: ResolvedBase
) -> RetrievalArtifacts:
    from pipelines.train.query_encoder import RetrievalBase
    from pipelines.train.retrieval_routing import token_sums

    world.tell(f"summing up token embeddings of {domain}")
    model = RetrievalBase(base.folder, description=base.description, first=0)
    texts = list(dict.fromkeys(pair.query.strip() for pair in world.data.owned[domain].training))
    static = token_sums(model, texts, second_moment=published.info.second_moment)
    info = published.info.model_copy(update={"static_tokens": True})
    return replace(published, info=info, static=static)


def _without_second_moments(
    world: RetrieverWorld, domain: str, published: RetrievalArtifacts, base: ResolvedBase
) -> RetrievalArtifacts:
    return replace(
        published,
        info=published.info.model_copy(update={"second_moment": False}),
        embedding=replace(published.embedding, scatter=None),
        state=published.state and replace(published.state, scatter=None),
        static=published.static and replace(published.static, scatter=None),
    )
