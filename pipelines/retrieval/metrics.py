"""Measures of a ranking against judgements: nDCG, recall and reciprocal rank, with the conventions of trec_eval.

Knows scores and judgements by document id; knows nothing of models or files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

__all__ = ["METRICS", "dcg", "measure", "ndcg", "rank", "recall", "reciprocal_rank"]

METRICS = ("ndcg@10", "recall@10", "recall@100", "mrr@10")
"""What `measure` gives for every query, each between 0 and 1."""


def rank(scores: Mapping[str, float], depth: int | None = None) -> list[str]:
    """Return document ids, best first; equal scores in descending order of the id, as trec_eval has it."""
    by_id = sorted(scores, reverse=True)
    return sorted(by_id, key=lambda document: -scores[document])[:depth]


def dcg(gains: Sequence[int]) -> float:
    """Discounted cumulative gain, ``sum_i gain_i / log2(i + 1)`` for ranks i from 1 (Järvelin and Kekäläinen 2002)."""
    return sum(max(gain, 0) / math.log2(position + 2) for position, gain in enumerate(gains))


def ndcg(ranking: Sequence[str], judged: Mapping[str, int], *, k: int) -> float:
    """DCG of the first ``k`` over the largest that the judgements allow; 0 where none is positive.

    Args:
        ranking: Document ids, best first.
        judged: Grade by document id; a document without one, or with a negative one, gains nothing.
        k: How many are looked at.
    """
    best = dcg(sorted(judged.values(), reverse=True)[:k])
    return dcg([judged.get(document, 0) for document in ranking[:k]]) / best if best else 0.0


def recall(ranking: Sequence[str], judged: Mapping[str, int], *, k: int) -> float:
    """Share of the relevant documents (grade 1 and above) among the first ``k``; 0 where there is none."""
    relevant = {document for document, grade in judged.items() if grade >= 1}
    return len(relevant.intersection(ranking[:k])) / len(relevant) if relevant else 0.0


def reciprocal_rank(ranking: Sequence[str], judged: Mapping[str, int], *, k: int) -> float:
    """One over the rank of the first relevant document; 0 where none is among the first ``k``."""
    hits = (
        position for position, document in enumerate(ranking[:k], start=1) if judged.get(document, 0) >= 1
    )
    return 1.0 / next(hits, math.inf)


def measure(
    run: Mapping[str, Mapping[str, float]], judgements: Mapping[str, Mapping[str, int]]
) -> dict[str, dict[str, float]]:
    """Measure every judged query.

    Args:
        run: Score by query and document, for the documents that were found.
        judgements: Grade by query and document. A query of which nothing was found counts as 0.

    Returns:
        Metric -> query -> value, for the metrics of `METRICS`.
    """
    values: dict[str, dict[str, float]] = {metric: {} for metric in METRICS}
    for query, judged in judgements.items():
        ranking = rank(run.get(query, {}))
        values["ndcg@10"][query] = ndcg(ranking, judged, k=10)
        values["recall@10"][query] = recall(ranking, judged, k=10)
        values["recall@100"][query] = recall(ranking, judged, k=100)
        values["mrr@10"][query] = reciprocal_rank(ranking, judged, k=10)
    return values
