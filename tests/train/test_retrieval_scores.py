"""Owners' tables of scores: every cell measured once, test queries never, and libraries without an owner exact."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from composer.retrieval.facts import ExpertFacts
from composer.retrieval.options import RetrievalRouter
from composer.retrieval.published import _labels
from composer.retrieval.scorers import RETRIEVAL_SCORERS
from experts.errors import DataError
from experts.retrieval_artifacts import Moments, RetrievalArtifacts
from pipelines.retrieval.metrics import measure
from pipelines.train.pairs import Domain, split_domain
from pipelines.train.retrieval_scores import ScoreTable, bundles

D = 6
OWNERS = ("acme", "bob", "cleo")


def vectors_of(name: str) -> Callable[[Sequence[str]], Any]:
    """An encoder: what it makes of a text depends on its name and on the text."""

    def encode(texts: Sequence[str]) -> Any:
        rows = []
        for text in texts:
            seed = int.from_bytes(hashlib.sha256(f"{name}|{text}".encode()).digest()[:8], "big")
            own = np.random.default_rng(seed).normal(size=D)
            shared = np.random.default_rng(len(text) + ord(text[0])).normal(size=D)
            rows.append((own + shared) / np.linalg.norm(own + shared))
        return np.stack(rows)

    return encode


def domain(owner: str, count: int = 60) -> Domain:
    return Domain(
        documents=tuple(f"{owner} answers {n}" for n in range(count)),
        queries=tuple(f"{owner} asks {n}" for n in range(count)),
        judgements=tuple({n: 1, (n + 1) % count: 2} if n % 5 == 0 else {n: 1} for n in range(count)),
    )


def table(owner: str, **settings: Any) -> ScoreTable:
    pairs = domain(owner)
    return ScoreTable(pairs, split_domain(pairs, test=0.2, label=0.4), **settings)


def filled(owner: str, experts: Sequence[str], **settings: Any) -> tuple[ScoreTable, int]:
    made = table(owner, **settings)
    documents = vectors_of("base")(made.documents)
    counted = made.add_base(vectors_of("base"), documents)
    return made, counted + made.add({name: vectors_of(name) for name in experts}, documents)


def names(owners: Sequence[str] = OWNERS) -> list[str]:
    return [f"{owner}/search@1" for owner in owners]


def test_r12_test_queries_and_their_documents_are_never_looked_at() -> None:
    pairs = domain("acme")
    split = split_domain(pairs, test=0.2, label=0.4)
    for side, other in (("heldout", split.label), ("train", split.train)):
        made = ScoreTable(pairs, split, side=side)  # type: ignore[arg-type]
        assert made.queries == [pairs.queries[n] for n in other]
        assert not {pairs.queries[n] for n in split.test} & set(made.queries)
        answers = {pairs.documents[d] for documents in split.test.values() for d in documents}
        assert answers
        assert not answers & set(made.documents)
    with pytest.raises(DataError) as caught:
        ScoreTable(pairs, split_domain(pairs, test=0.2, label=0.0))
    assert str(caught.value) == (
        "There are no heldout queries to score. Keep some (retrieval.label), or score the train side."
    )


def test_columns_are_margins_or_measures_of_rankings() -> None:
    for metric in ("margin", "ndcg@10", "mrr@10"):
        made, _ = filled("acme", names(), metric=metric)
        published = made.published(names(), min_group=1)
        documents = vectors_of("base")(made.documents)
        for column, name in enumerate(["base", *names()]):
            scores = vectors_of(name)(made.queries) @ documents.T
            if metric == "margin":
                expected = []
                for row, judged in zip(scores, made._judged, strict=True):
                    right = max(row[n] for n in judged)
                    expected.append(right - max(value for n, value in enumerate(row) if n not in judged))
            else:
                run = {str(q): {f"{n:03d}": v for n, v in enumerate(row)} for q, row in enumerate(scores)}
                judgements = {
                    str(q): {f"{n:03d}": g for n, g in j.items()} for q, j in enumerate(made._judged)
                }
                found = measure(run, judgements)[metric]
                expected = [found[str(q)] for q in range(len(scores))]
            assert np.allclose(published.quality[:, column], expected), (metric, name)


def test_an_expert_who_joins_is_one_column_more(tmp_path: Path) -> None:
    """Nothing is measured twice, within a run and across runs, and the order of joining leaves no trace."""
    path = tmp_path / "scores.safetensors"
    made, first = filled("acme", names()[:2], path=path)
    queries = len(made.queries)
    assert first == 3 * queries
    again, none = filled("acme", names()[:2], path=path)
    assert none == 0
    documents = vectors_of("base")(again.documents)
    assert again.add({name: vectors_of(name) for name in names()}, documents) == queries
    assert path.stat().st_mode & 0o777 == 0o600
    scratch, _ = filled("acme", names()[::-1])
    for min_group in (1, 4):
        whole, one = (t.published(names(), min_group=min_group) for t in (scratch, again))
        for field in ("counts", "vectors", "quality"):
            assert getattr(whole, field).tobytes() == getattr(one, field).tobytes()
        # without somebody: what was published before they joined, to the bit
        before, after = (t.published(names()[:2], min_group=min_group) for t in (made, again))
        assert before.quality.tobytes() == after.quality.tobytes()
        assert before.counts.min() >= min_group
    assert again.add({"bob/search@2": vectors_of("bob/search@2")}, documents) == queries
    assert again.published(["bob/search@2"], min_group=1).experts == ("bob/search",)
    with pytest.raises(DataError, match=r"^Not measured yet: dan/x\.$"):
        again.published(["dan/x"], min_group=1)


@pytest.mark.parametrize("min_group", [1, 5])
@pytest.mark.parametrize("scorer", ["pilot_mean", "pilot_max"])
def test_r3_a_library_without_an_owner_is_one_they_never_were_in(scorer: str, min_group: int) -> None:
    def solved(owners: Sequence[str], scored: Sequence[str]) -> bytes:
        """Solve for the experts of some owners, who scored those of others too."""
        facts = []
        here = frozenset(f"{owner}/search" for owner in owners)
        for owner in sorted(owners):
            made, _ = filled(owner, names(scored))
            scores = made.published(names(scored), min_group=min_group)
            artifacts = RetrievalArtifacts.create(
                embedding=Moments.from_vectors(made._base_vectors),
                normalization="l2",
                min_group=min_group,
                scores=scores,
            )
            assert artifacts.scores is not None
            facts.append(
                ExpertFacts(
                    name=f"{owner}/search",
                    count=float(artifacts.embedding.count),
                    sum=artifacts.embedding.sum,
                    labels=_labels(artifacts.scores, here),
                )
            )
        options = RetrievalRouter(scorer=scorer, min_group=min_group)
        return RETRIEVAL_SCORERS.load(scorer)(options, similarity="dot").solve(facts).to_bytes()

    for gone in OWNERS:
        kept = [owner for owner in OWNERS if owner != gone]
        assert solved(kept, OWNERS) == solved(kept, kept)
    assert solved(OWNERS, OWNERS) == solved(OWNERS[::-1], OWNERS[::-1])


def test_bundles_are_whole_large_enough_and_alike() -> None:
    x = np.random.default_rng(0).normal(size=(61, D))
    x[:30] += 8
    parts = bundles(x, min_group=7)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(61))
    assert all(7 <= len(part) < 15 for part in parts)
    assert sum(bool((part < 30).all() or (part >= 30).all()) for part in parts) >= len(parts) - 1
    assert [part.tolist() for part in bundles(x, min_group=1)] == [[n] for n in range(61)]
    with pytest.raises(DataError) as caught:
        bundles(x[:3], min_group=4)
    assert str(caught.value) == "3 queries; a bundle must have at least 4, the minimum group size."
