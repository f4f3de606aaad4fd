"""Measures an embedding model on test collections: rankings, who answered, and whether it beats the base.

Knows encoders, collections and measures; knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from composer.optout import check_owners, owner_names
from pipelines.retrieval import collection as collections
from pipelines.retrieval.encoders import Encoder, Route
from pipelines.retrieval.metrics import METRICS, measure
from pipelines.retrieval.search import Vectors, search_exactly
from pipelines.retrieval.significance import Comparison, compare

__all__ = ["CollectionScore", "evaluate", "leave_one_out"]

_DEPTH = 100
_PART = 512

Progress = Callable[[int, int], None]
"""Called with the documents encoded so far and in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectionScore:
    """One model on one collection.

    Attributes:
        metrics: Mean over the queries, by metric of `pipelines.retrieval.metrics.METRICS`.
        base: The same for the base alone.
        against_base: nDCG@10 against the base's.
        routing: Mean weight of ``base`` and of each owner; empty for a stock model.
        queries: How many were measured.
        cut: How many queries are longer than what the model reads.
    """

    metrics: Mapping[str, float]
    base: Mapping[str, float]
    against_base: Comparison
    routing: Mapping[str, float]
    queries: int
    cut: int


def evaluate(
    encoder: Encoder,
    tests: Sequence[collections.Collection],
    *,
    opt_out: Collection[str] = (),
    batch_size: int = 32,
    progress: Progress | None = None,
) -> dict[str, CollectionScore]:
    """Measure a model, and its base on the same vectors of the documents.

    Args:
        encoder: The model.
        tests: Collections with names of their own.
        opt_out: Owners whose experts must not answer and whose documents must not be found: the result is that of a
            model and of collections without them, see `pipelines.retrieval.collection.without_owners`.
        batch_size: Texts encoded at once.
        progress: Told how many documents are encoded.

    Returns:
        Results by the collection's name.

    Raises:
        DataError: A collection has nothing left to measure.
        OptOutError: ``opt_out`` is no collection of names.
        UnknownNameError: ``opt_out`` names somebody who has neither an expert nor a document.
    """
    left_out = owner_names(opt_out)
    owners = {document.owner for test in tests for document in test.documents if document.owner}
    check_owners(left_out, owners.union(encoder.known))
    kept = [collections.without_owners(test, left_out) for test in tests]
    experts = left_out.intersection(encoder.known)
    (scores,) = _arms(encoder, kept, [experts], batch_size=batch_size, progress=progress)
    return scores


def leave_one_out(
    encoder: Encoder,
    tests: Sequence[collections.Collection],
    *,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> dict[str, dict[str, CollectionScore]]:
    """Measure the whole (``composed``) and, in turn, without each owner (``without OWNER``).

    Owners are also those from whose experts others were made, which leave with them. Documents stay in every arm: what
    is compared is who answers the same queries on the same documents.
    """
    sets = [(), *((owner,) for owner in encoder.involved)]
    names = ["composed", *(f"without {owner}" for owner in encoder.involved)]
    return dict(
        zip(names, _arms(encoder, tests, sets, batch_size=batch_size, progress=progress), strict=True)
    )


def _arms(
    encoder: Encoder,
    tests: Sequence[collections.Collection],
    opt_outs: Sequence[Collection[str]],
    *,
    batch_size: int,
    progress: Progress | None,
) -> list[dict[str, CollectionScore]]:
    """Encode documents once, and queries once for each set of owners."""
    found: list[dict[str, CollectionScore]] = [{} for _ in opt_outs]
    done, total = 0, sum(len(test.documents) for test in tests)
    for test in tests:
        parts = []
        for start in range(0, len(test.documents), _PART):
            part = [document.text for document in test.documents[start : start + _PART]]
            parts.append(encoder.documents(part, batch_size=batch_size))
            done += len(part)
            if progress is not None:
                progress(done, total)
        base = _values(test, encoder.queries(_texts(test), opt_out=encoder.owners), parts)
        for arm, opt_out in zip(found, opt_outs, strict=True):
            arm[test.name] = _score(encoder, test, parts, base, opt_out)
    return found


def _texts(test: collections.Collection) -> list[str]:
    return list(test.queries.values())


def _values(
    test: collections.Collection, queries: Vectors, parts: Sequence[Vectors]
) -> dict[str, dict[str, float]]:
    hits = search_exactly(
        parts,
        queries,
        ids=[document.id for document in test.documents],
        owners=[document.owner for document in test.documents],
        k=_DEPTH,
        allow=None,
        dimension=queries.shape[1],
    )
    run = {
        query: {hit.id: hit.score for hit in found} for query, found in zip(test.queries, hits, strict=True)
    }
    return measure(run, test.judgements)


def _score(
    encoder: Encoder,
    test: collections.Collection,
    parts: Sequence[Vectors],
    base: Mapping[str, Mapping[str, float]],
    opt_out: Collection[str],
) -> CollectionScore:
    queries, routes = encoder.routed(_texts(test), opt_out=opt_out)
    values = _values(test, queries, parts)
    return CollectionScore(
        metrics={metric: fmean(values[metric].values()) for metric in METRICS},
        base={metric: fmean(base[metric].values()) for metric in METRICS},
        against_base=compare(values["ndcg@10"], base["ndcg@10"]),
        routing=_routing(encoder, routes),
        queries=len(test.queries),
        cut=sum(encoder.tokens(text) > encoder.longest for text in test.queries.values()),
    )


def _routing(encoder: Encoder, routes: Sequence[Route]) -> dict[str, float]:
    if not encoder.owners:
        return {}
    names = ("base", *encoder.owners)
    return {name: fmean(route.weights.get(name, 0.0) for route in routes) for name in names}
