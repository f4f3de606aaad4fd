"""nDCG, recall and reciprocal rank against trec_eval's own code, and by hand."""

from __future__ import annotations

import random

import pytest

from pipelines.retrieval.metrics import measure, ndcg, rank, recall, reciprocal_rank

_THEIRS = {
    "ndcg@10": "ndcg_cut_10",
    "recall@10": "recall_10",
    "recall@100": "recall_100",
    "mrr@10": "recip_rank",
}


def _random_run(seed: int) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, int]]]:
    """Runs with ties and grades from -1 to 3, queries without hits, and documents nobody judged."""
    draw = random.Random(seed)
    documents = [f"d{number}" for number in range(150)]
    run = {
        f"q{query}": {
            name: draw.choice((0.0, 0.25, 0.5, draw.random())) for name in draw.sample(documents, 120)
        }
        for query in range(12)
    }
    judgements = {
        f"q{query}": {name: draw.randint(-1, 3) for name in draw.sample(documents, draw.randint(1, 25))}
        for query in range(12)
    }
    return run, judgements


@pytest.mark.parametrize("seed", range(4))
def test_values_are_those_of_trec_eval(seed: int) -> None:
    trec = pytest.importorskip("pytrec_eval")
    run, judgements = _random_run(seed)
    ours = measure(run, judgements)
    theirs = trec.RelevanceEvaluator(judgements, set(_THEIRS.values())).evaluate(run)
    for metric, name in _THEIRS.items():
        for query in judgements:
            expected = theirs[query][name]
            if metric == "mrr@10" and expected < 1 / 10:  # trec_eval looks further down
                expected = 0.0
            assert ours[metric][query] == pytest.approx(expected, abs=1e-9), (metric, query)


def test_values_by_hand() -> None:
    judged = {"a": 3, "b": 0, "c": 1}
    # gains 0, 3, 1 against the ideal 3, 1
    assert ndcg(["b", "a", "c"], judged, k=10) == pytest.approx(
        (3 / 1.5849625007 + 1 / 2) / (3 + 1 / 1.5849625007)
    )
    assert recall(["b", "a"], judged, k=2) == 0.5
    assert reciprocal_rank(["b", "a"], judged, k=10) == 0.5
    assert reciprocal_rank(["b", "a"], judged, k=1) == 0.0


def test_ties_are_broken_by_id_whatever_the_order() -> None:
    scores = {"a": 1.0, "c": 0.5, "b": 0.5, "d": 0.5}
    assert rank(scores) == ["a", "d", "c", "b"]
    assert rank(dict(reversed(scores.items()))) == rank(scores)
    assert rank(scores, 2) == ["a", "d"]


def test_nothing_relevant_and_nothing_found_are_zero() -> None:
    values = measure({"q": {}}, {"q": {"a": 1}, "r": {"a": 0}})
    assert all(value == {"q": 0.0, "r": 0.0} for value in values.values())
