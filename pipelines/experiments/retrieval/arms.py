"""The arms of a comparison of retrievers: one function each, from a seed's world to measured rankings.

Knows how each arm differs from the others; training, composing and searching are done elsewhere. Arms and what they are
compared for follow RouterRetriever (arXiv 2409.02685, tables 1 and 2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experts.plugins import PluginTable
from pipelines.experiments.retrieval.republished import experts_of_means, static_experts
from pipelines.experiments.retrieval.world import Queries, RetrieverWorld, Weights

__all__ = ["ARMS", "OURS", "ArmFunction", "Measured", "Scores"]

Scores = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Collection -> metric -> query -> value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What an arm gave.

    Attributes:
        scores: Of every test query.
        weights: Who answered, by collection; empty where nobody was chosen.
    """

    scores: Scores
    weights: Mapping[str, Weights] = field(default_factory=dict)


Results = dict[str, Measured]
ArmFunction = Callable[[RetrieverWorld], Results]
"""Results by the name of the arm; most functions give one."""

_HOME = "pipelines.experiments.retrieval.arms"
_NAMES = {
    "base": "base",
    "expert": "single_experts",
    "best_single_expert": "best_single_expert",
    "uniform": "uniform",
    "multi_task": "multi_task",
    "multi_task_pooled": "multi_task_pooled",
    "dataset_router": "dataset_router",
    "classifier_router": "classifier_router",
    "paper": "paper",
    "coterie": "coterie",
    "coterie_top1": "coterie_top1",
    "coterie_means": "coterie_means",
    "coterie_one_pass": "coterie_one_pass",
    "coterie_one_pass_soft": "coterie_one_pass_soft",
    "coterie_static_tokens": "coterie_static_tokens",
    "coterie_static_tokens_soft": "coterie_static_tokens_soft",
    "without": "without_the_own_expert",
    "dataset_oracle": "dataset_oracle",
    "instance_oracle": "instance_oracle",
}
ARMS = PluginTable("retriever arm", {name: f"{_HOME}:{function}" for name, function in _NAMES.items()})
"""Every arm, in the order of the tables."""


def _measured(
    world: RetrieverWorld, queries: Queries, weights: Mapping[str, Weights] | None = None
) -> Measured:
    return Measured(scores=world.scores(queries), weights=weights or {})


# ---------------------------------------------------------------- without a router


def base(world: RetrieverWorld) -> Results:
    """The base alone."""
    return {"base": _measured(world, world.base_queries)}


def single_experts(world: RetrieverWorld) -> Results:
    """Each owner's expert alone, on every collection."""
    return {f"expert:{domain}": _measured(world, world.expert_queries(domain)) for domain in world.domains}


def _single(world: RetrieverWorld) -> dict[str, Measured]:
    return {domain: _measured(world, world.expert_queries(domain)) for domain in world.domains}


def _mean_ndcg(scores: Scores, collections: tuple[str, ...]) -> float:
    return fmean(fmean(scores[name]["ndcg@10"].values()) for name in collections)


def best_single_expert(world: RetrieverWorld) -> Results:
    """The expert that is best on average over the owners' domains; chosen by the test queries, in its favour."""
    each = _single(world)
    best = max(each, key=lambda domain: _mean_ndcg(each[domain].scores, world.domains))
    return {"best_single_expert": each[best]}


def uniform(world: RetrieverWorld) -> Results:
    """The mean of all experts' query vectors."""
    weights = {name: _constant(world, len(texts)) for name, texts in world.texts.items()}
    return {"uniform": _fused(world, weights)}


def _constant(world: RetrieverWorld, rows: int) -> Weights:
    weights = np.full((rows, 1 + len(world.domains)), 1.0 / len(world.domains))
    weights[:, 0] = 0.0
    return weights


def _fused(world: RetrieverWorld, weights: Mapping[str, Weights]) -> Measured:
    """Weigh the experts' query vectors; searching once by the sum equals summing the scores."""
    each = [world.base_queries, *(world.expert_queries(domain) for domain in world.domains)]
    queries = {}
    for name, shares in weights.items():
        stacked = np.stack([vectors[name] for vectors in each], axis=1).astype(np.float64)
        sums = (shares[:, :, None] * stacked).sum(axis=1)
        queries[name] = (sums / np.linalg.norm(sums, axis=1, keepdims=True)).astype(np.float32)
    return _measured(world, queries, weights)


def multi_task(world: RetrieverWorld) -> Results:
    """One adapter on all domains, each cut to the size of the smallest, with one owner's budget (the paper's)."""
    smallest = min(len(owned.training) for owned in world.data.owned.values())
    return _jointly(world, "multi_task", count=smallest, steps=world.experiment.steps)


def multi_task_pooled(world: RetrieverWorld) -> Results:
    """One adapter on everybody's pairs, with all owners' budgets together; needs the sharing that is to be avoided."""
    return _jointly(world, "multi_task_pooled", count=None, steps=world.experiment.steps * len(world.domains))


def _jointly(world: RetrieverWorld, arm: str, *, count: int | None, steps: int) -> Results:
    pairs = [pair for owned in world.data.owned.values() for pair in owned.training[:count]]
    world.train({f"everybody/{arm}": ("everything", pairs)}, steps=steps)
    return {arm: _measured(world, world.queries_of(f"everybody/{arm}"))}


# ---------------------------------------------------------------- routed by others' methods

_NEIGHBOURS = 100


def _chosen(world: RetrieverWorld, choose: Callable[[NDArray[np.float64]], NDArray[np.int64]]) -> Measured:
    """One expert for each query, chosen by the base's vector of it: positions in the order of the domains."""
    weights = {}
    for name, vectors in world.base_queries.items():
        shares = np.zeros((len(vectors), 1 + len(world.domains)))
        shares[np.arange(len(vectors)), 1 + choose(vectors.astype(np.float64))] = 1.0
        weights[name] = shares
    return _fused(world, weights)


def dataset_router(world: RetrieverWorld) -> Results:
    """The domain of the nearest of 100 training queries of each owner."""
    texts = [[pair.query for pair in owned.training[:_NEIGHBOURS]] for owned in world.data.owned.values()]
    vectors = world.base.queries([text for part in texts for text in part]).astype(np.float64)
    labels = np.repeat(np.arange(len(texts)), [len(part) for part in texts])
    return {"dataset_router": _chosen(world, lambda queries: labels[(queries @ vectors.T).argmax(axis=1)])}


def classifier_router(world: RetrieverWorld) -> Results:
    """Softmax regression on which expert is best for an owner's query, where one alone is; classes are balanced."""
    features, labels = [], []
    for domain, scores in world.label_scores.items():
        unique = (scores == scores.max(axis=1, keepdims=True)).sum(axis=1) == 1
        features.append(world.base_queries[f"{domain} labelled"][unique])
        labels.append(scores[unique].argmax(axis=1))
    weight, bias = _softmax_regression(
        np.concatenate(features), np.concatenate(labels), classes=len(world.domains)
    )
    return {"classifier_router": _chosen(world, lambda queries: (queries @ weight.T + bias).argmax(axis=1))}


def _softmax_regression(
    features: NDArray[np.floating[Any]], labels: NDArray[np.int64], *, classes: int, penalty: float = 1e-3
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fit by L-BFGS; a class without examples is never chosen. Weights ``(classes, d)`` and biases ``(classes,)``."""
    import torch

    x, y = torch.from_numpy(features.astype(np.float64)), torch.from_numpy(labels)
    counts = torch.bincount(y, minlength=classes).double()
    balance = torch.where(counts > 0, len(y) / counts.clamp(min=1), 0.0)
    weight = torch.zeros(classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Any:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(x @ weight.T + bias, y, weight=balance)
        loss = loss + penalty * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    biases = torch.where(counts > 0, bias, -torch.inf)
    return weight.detach().numpy(), biases.detach().numpy()


def paper(world: RetrieverWorld) -> Results:
    """Pilots: the mean of each owner's queries that an expert is best for; the mean product with them decides.

    Where several experts are best, each gets its part of the query: the paper says nothing of ties, its code takes the
    first of a list.
    """
    pilots: list[list[NDArray[np.float64]]] = [[] for _ in world.domains]
    for domain, scores in world.label_scores.items():
        best = scores == scores.max(axis=1, keepdims=True)
        parts = best / best.sum(axis=1, keepdims=True)
        vectors = world.base_queries[f"{domain} labelled"].astype(np.float64)
        for expert in range(len(world.domains)):
            if parts[:, expert].sum() > 0:
                pilots[expert].append(parts[:, expert] @ vectors / parts[:, expert].sum())
    means = [np.mean(found, axis=0) if found else np.full(vectors.shape[1], np.nan) for found in pilots]
    return {"paper": _chosen(world, lambda queries: np.nanargmax(queries @ np.stack(means).T, axis=1))}


# ---------------------------------------------------------------- ours


OURS: Mapping[str, Mapping[str, str]] = {
    "coterie": {},
    "coterie_top1": {"selector": "top1"},
    "coterie_means": {},
    "coterie_one_pass": {"selector": "top1", "route_on": "layer_state"},
    "coterie_one_pass_soft": {"route_on": "layer_state"},
    "coterie_static_tokens": {"selector": "top1", "route_on": "static_tokens"},
    "coterie_static_tokens_soft": {"route_on": "static_tokens"},
}
"""Our arms, by where their router differs from the experiment's."""


def _ours(world: RetrieverWorld, arm: str) -> Results:
    router = {**world.experiment.router, **OURS[arm]}
    if arm == "coterie_means":
        experts = experts_of_means(world)
    else:
        experts = static_experts(world) if router.get("route_on") == "static_tokens" else world.experts
    queries, weights = world.composed_queries(arm, router, experts=experts)
    return {arm: _measured(world, queries, weights)}


def coterie(world: RetrieverWorld) -> Results:
    """Our default: discriminant analysis from the owners' sums and second moments, all experts' vectors fused."""
    return _ours(world, "coterie")


def coterie_top1(world: RetrieverWorld) -> Results:
    """The same with the best expert alone: two passes a query."""
    return _ours(world, "coterie_top1")


def coterie_means(world: RetrieverWorld) -> Results:
    """Our default where owners keep their second moments, as jobs do below two queries a dimension."""
    return _ours(world, "coterie_means")


def coterie_one_pass(world: RetrieverWorld) -> Results:
    """The best expert alone, decided by the states that enter the first layer with adapters: one pass a query."""
    return _ours(world, "coterie_one_pass")


def coterie_one_pass_soft(world: RetrieverWorld) -> Results:
    """All experts fused, decided by those states: the lower layers run once, the upper ones once for each expert."""
    return _ours(world, "coterie_one_pass_soft")


def coterie_static_tokens(world: RetrieverWorld) -> Results:
    """The best expert alone, decided by the mean of the query's token embeddings before any layer runs: one pass."""
    return _ours(world, "coterie_static_tokens")


def coterie_static_tokens_soft(world: RetrieverWorld) -> Results:
    """All experts fused, decided by the token embeddings: one pass up to the first adapted layer, then E."""
    return _ours(world, "coterie_static_tokens_soft")


def without_the_own_expert(world: RetrieverWorld) -> Results:
    """Our default on each domain with the domain's own owner left out: every domain as an unseen one."""
    encoder = world.composed("coterie", world.experiment.router)
    scores = {}
    for domain, owned in world.data.owned.items():
        queries = encoder.queries(list(owned.collection.queries.values()), opt_out={world.owner(domain)})
        scores[domain] = world.score(owned.collection, queries, world.documents[domain])
    return {"coterie-without-own": Measured(scores=scores)}


# ---------------------------------------------------------------- oracles


def dataset_oracle(world: RetrieverWorld) -> Results:
    """The best expert for each collection, chosen by its test queries."""
    each = _single(world)
    scores = {}
    for name in world.data.collections:
        best = max(each, key=lambda domain: _mean_ndcg(each[domain].scores, (name,)))
        scores[name] = each[best].scores[name]
    return {"dataset_oracle": Measured(scores=scores)}


def instance_oracle(world: RetrieverWorld) -> Results:
    """The best expert for each test query: a maximum over noisy values, so it is biased upwards."""
    each = [measured.scores for measured in _single(world).values()]
    scores = {
        name: {
            metric: {query: max(one[name][metric][query] for one in each) for query in values}
            for metric, values in each[0][name].items()
        }
        for name in world.data.collections
    }
    return {"instance_oracle": Measured(scores=scores)}
