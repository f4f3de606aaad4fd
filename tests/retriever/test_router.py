"""Scorers, selectors and the router: closed forms, ties, order, abstention, very many experts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from composer.retrieval.calibration import fit_temperature
from composer.retrieval.facts import Array, ExpertFacts, Labels
from composer.retrieval.options import RetrievalRouter
from composer.retrieval.router import Router
from composer.retrieval.scorers import RETRIEVAL_SCORERS, RETRIEVAL_SELECTORS

D = 8
NAMES = ("acme/a", "bob/b", "cleo/c", "dan/d")


def facts(names: Sequence[str] = NAMES, *, seed: int = 0, count: int = 40) -> list[ExpertFacts]:
    """Facts of random domains; an expert's do not depend on who else is there."""
    made = []
    for name in names:
        random = np.random.default_rng([seed, NAMES.index(name)])
        x = random.normal(size=(count, D)) + 2 * random.normal(size=D)
        quality = random.random(size=(count, len(NAMES) + 1))
        # a few values, as of nDCG, so that ties are the rule
        tied = np.round(quality[:, 1:] * 2) / 2
        made.append(
            ExpertFacts(
                name=name,
                count=count,
                sum=x.sum(axis=0),
                scatter=x.T @ x,
                labels=Labels(
                    counts=np.ones(count),
                    vectors=x,
                    quality={n: tied[:, i] for i, n in enumerate(NAMES) if n in names},
                ),
                gram=x.T @ x,
                utility={n: x.T @ quality[:, i] for i, n in enumerate(("base", *NAMES))},
            )
        )
    return made


def scorer(name: str, *, similarity: str = "cosine", **options: Any) -> Any:
    settings = RetrievalRouter(scorer=name, **options)
    return RETRIEVAL_SCORERS.load(name)(settings, similarity=similarity)


def router(
    known: Sequence[ExpertFacts],
    name: str = "lda",
    selector: str = "top1",
    *,
    temperature: float = 3.0,
    min_margin: float = 0.0,
    **options: Any,
) -> Router:
    return Router(
        known,
        scorer=scorer(name, **options),
        selector=RETRIEVAL_SELECTORS.load(selector)(temperature=temperature),
        min_margin=min_margin,
        temperature=temperature,
    )


def queries(rows: int = 50) -> Array:
    return np.random.default_rng(9).normal(size=(rows, D)) * 2


def by_hand(known: Sequence[ExpertFacts], names: Sequence[str], ties: str = "fractional") -> dict[str, Any]:
    """Pilots query by query, of the owners of ``names`` alone: a mean for each owner's queries and each best expert."""
    pilots: dict[str, list[Array]] = {name: [] for name in names}
    for f in known:
        if f.name not in names or f.labels is None:
            continue
        parts: dict[str, list[tuple[float, Array]]] = {name: [] for name in names}
        for row, vector in enumerate(f.labels.vectors):
            top = max(f.labels.quality[name][row] for name in names)
            best = [name for name in names if f.labels.quality[name][row] == top]
            if len(best) > 1 and ties == "drop":
                continue
            if ties == "own_domain" and f.name in best:
                best = [f.name]
            for name in best:
                parts[name].append((1 / len(best), vector))
        for name, found in parts.items():
            total = sum(share for share, _ in found)
            if total >= 1:
                pilots[name].append(sum(share * vector for share, vector in found) / total)
    return pilots


def everybody(n: int = len(NAMES)) -> Any:
    return np.ones((1, n), dtype=bool)


# -------------------------------------------------------------------- closed forms


def test_lda_is_the_textbook_rule_up_to_what_all_classes_share() -> None:
    known = facts()
    total = sum(f.count for f in known)
    mu = np.stack([f.sum / f.count for f in known])
    sigma = sum(f.scatter - np.outer(f.sum, f.sum) / f.count for f in known) / total
    sigma = sigma + 0.1 * np.trace(sigma) / D * np.eye(D)
    w = mu @ np.linalg.inv(sigma)
    expected = queries() @ w.T - 0.5 * np.diag(w @ mu.T)
    got = scorer("lda").solve(known).scores(queries())
    difference = got - expected
    assert np.allclose(difference, difference[:, :1], atol=1e-9)


def test_centroid_compares_with_means() -> None:
    known, x = facts(), queries()
    means = np.stack([f.mean for f in known])
    cosine = (x @ means.T) / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(means, axis=1)
    assert np.allclose(scorer("centroid").solve(known).scores(x), cosine)
    assert np.allclose(scorer("centroid", similarity="dot").solve(known).scores(x), x @ means.T)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_pilots_against_one_product_each(similarity: str) -> None:
    known, x = facts(), queries()

    def like(a: Array, b: Array) -> float:
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b) if similarity == "cosine" else 1.0))

    every = [[[like(q, pilot) for pilot in by_hand(known, NAMES)[name]] for name in NAMES] for q in x]
    reduced = {
        "pilot_mean": [[np.mean(s) for s in row] for row in every],
        "pilot_max": [[max(s) for s in row] for row in every],
        "pilot_logsumexp": [[np.log(np.sum(np.exp(s))) for s in row] for row in every],
        "pilot_top_mean": [[np.mean(sorted(s)[-2:]) for s in row] for row in every],
    }
    for name, expected in reduced.items():
        solved = scorer(name, similarity=similarity, pilot_top=2).solve(known)
        assert np.allclose(solved.scores(x), expected, atol=1e-9), name


def test_r9_the_mean_over_pilots_is_one_vector_an_expert() -> None:
    known = facts()
    assert scorer("pilot_mean").solve(known).vectors.shape == (len(NAMES), D)
    assert scorer("pilot_max").solve(known).vectors.shape == (len(NAMES) ** 2, D)


def test_ridge_is_the_regression_on_all_queries_at_once() -> None:
    random = np.random.default_rng(3)
    parts = [random.normal(size=(30, D)) for _ in NAMES]
    qualities = [random.random(size=(30, 5)) for _ in NAMES]
    known = [
        ExpertFacts(
            name=name,
            count=30,
            sum=x.sum(axis=0),
            gram=x.T @ x,
            utility={n: x.T @ y[:, i] for i, n in enumerate(("base", *NAMES))},
        )
        for name, x, y in zip(NAMES, parts, qualities, strict=True)
    ]
    # ridge as ordinary least squares with sqrt(3) I appended
    x = np.concatenate([*parts, np.sqrt(3.0) * np.eye(D)])
    gains = np.concatenate([*(y[:, 1:] - y[:, :1] for y in qualities), np.zeros((D, 4))])
    expected = queries() @ np.linalg.lstsq(x, gains, rcond=None)[0]
    assert np.allclose(scorer("ridge_utility").solve(known).scores(queries()), expected)


# -------------------------------------------------------------------- functions of a set


def without_column(labels: Any, name: str) -> Labels:
    return replace(labels, quality={n: v for n, v in labels.quality.items() if n != name})


def with_quality(labels: Any, name: str, value: float, *, everybody: bool = False) -> Labels:
    """One expert's quality, or everybody's, is the same on all queries."""
    changed = {n: np.full(len(v), value) for n, v in labels.quality.items() if everybody or n == name}
    return replace(labels, quality={**labels.quality, **changed})


def poisoned(labels: Any, *, only: str | None = None) -> Labels:
    """NaN everywhere, or in one expert's column."""
    quality = {n: v * np.nan if only in (None, n) else v for n, v in labels.quality.items()}
    return replace(labels, vectors=labels.vectors * (np.nan if only is None else 1.0), quality=quality)


@pytest.mark.parametrize("ties", ["fractional", "own_domain", "drop"])
def test_r3_a_removed_owners_queries_vanish_and_the_others_are_labelled_anew(ties: str) -> None:
    known, changed = facts(), 0
    for gone in [(), *((name,) for name in NAMES), ("acme/a", "dan/d")]:
        kept = [n for n in NAMES if n not in gone]
        positions = [i for i, n in enumerate(NAMES) if n in kept]
        solved = router(known, "pilot_max", ties=ties, similarity="dot", min_group=1).solved(positions)
        never = by_hand(known, kept, ties)
        expected = np.stack([pilot for name in kept for pilot in never[name]])
        assert solved.vectors.shape == expected.shape
        assert np.allclose(solved.vectors, expected, atol=1e-12)
        # the control: to delete an owner's pilots, and those made of their queries, is not the same
        whole = by_hand(known, NAMES, ties)
        deleted = [p for n in kept for p, source in zip(whole[n], NAMES, strict=True) if source in kept]
        changed += not np.allclose(np.stack(deleted), expected)
    assert changed == 5


def test_ties_and_small_groups_are_the_manifests_business() -> None:
    known = facts()
    bytes_by_rule = {
        router(known, "pilot_mean", ties=ties).solved(range(4)).to_bytes()
        for ties in ("fractional", "own_domain", "drop")
    }
    assert len(bytes_by_rule) == 3
    assert router(known, "pilot_max", ties="drop", min_group=10_000).solved(range(4)).vectors.shape == (1, D)


@pytest.mark.parametrize("name", sorted(RETRIEVAL_SCORERS))
def test_r3_r11_a_subset_of_a_router_is_the_subsets_own_router(name: str) -> None:
    whole = router(facts(), name)
    for gone in NAMES:
        kept = tuple(n for n in NAMES if n != gone)
        alone = router(facts(kept), name)
        without = tuple(i for i, n in enumerate(NAMES) if n != gone)
        # the sums that the remaining owners published about whoever left are dropped before the arithmetic
        dropped = [
            ExpertFacts(
                name=f.name,
                count=f.count,
                sum=f.sum,
                scatter=f.scatter,
                labels=without_column(f.labels, gone),
                gram=f.gram,
                utility=f.utility,
            )
            for f in facts()
        ]
        assert router(dropped, name).solved(without).to_bytes() == alone.solved((0, 1, 2)).to_bytes()
        assert whole.solved(without).to_bytes() != whole.solved((0, 1, 2, 3)).to_bytes()


@pytest.mark.parametrize("selector", sorted(RETRIEVAL_SELECTORS))
@pytest.mark.parametrize("name", sorted(RETRIEVAL_SCORERS))
def test_who_is_not_allowed_is_never_scored(name: str, selector: str) -> None:
    known = facts()
    poison = ExpertFacts(
        name="bob/b",
        count=np.nan,
        sum=known[1].sum * np.nan,
        scatter=np.full((D, D), np.nan),
        gram=np.full((D, D), np.nan),
        labels=poisoned(known[1].labels),
        utility={n: v * np.nan for n, v in known[1].utility.items()},
    )
    allowed = np.array([[True, False, True, True]])
    clean = router(known, name, selector).decide(queries(), allowed, trace=True)
    # and what the others say of them
    rest = [replace(f, labels=poisoned(f.labels, only="bob/b")) for f in (known[0], *known[2:])]
    found = router([rest[0], poison, *rest[1:]], name, selector).decide(queries(), allowed, trace=True)
    for field in ("slots", "weights", "margin", "scores"):
        assert np.array_equal(getattr(found, field), getattr(clean, field)), field
    assert 2 not in found.slots
    assert np.isneginf(found.scores[:, 1]).all()


def unit_facts(*, kept: Sequence[str] = NAMES, names: Sequence[str] = NAMES) -> list[ExpertFacts]:
    """Facts of features of length 1; those in ``kept`` keep their second moments."""
    made = []
    for name in names:
        random = np.random.default_rng([5, NAMES.index(name)])
        x = random.normal(size=(40, D)) + random.normal(size=D)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        scatter = None if name in kept else x.T @ x
        made.append(ExpertFacts(name=name, count=40, sum=x.sum(axis=0), scatter=scatter, unit=True))
    return made


def test_without_any_second_moment_the_nearest_mean_is_chosen() -> None:
    known, x = unit_facts(), queries()
    means = np.stack([f.sum / 40 for f in known])
    nearest = np.linalg.norm(x[:, None] - means, axis=2).argmin(axis=1)
    assert np.array_equal(router(known).decide(x, everybody()).slots[:, 0] - 1, nearest)


def test_a_second_moment_that_is_kept_is_even_and_has_the_right_trace() -> None:
    mixed, whole = unit_facts(kept=NAMES[:2]), unit_facts(kept=())
    assert all(np.trace(f.scatter) == pytest.approx(40) for f in whole)
    even = [
        f
        if f.scatter is not None
        else replace(f, scatter=np.outer(f.sum, f.sum) / 40 + np.eye(D) * (40 - f.sum @ f.sum / 40) / D)
        for f in mixed
    ]
    got, wanted = scorer("lda").solve(mixed), scorer("lda").solve(even)
    np.testing.assert_allclose(got.vectors, wanted.vectors, rtol=1e-9)
    np.testing.assert_allclose(got.biases, wanted.biases, rtol=1e-9)
    noisy = [replace(f, sum=f.sum * 1e3) for f in unit_facts()]  # longer than any sum of unit vectors
    assert np.isfinite(scorer("lda").solve(noisy).vectors).all()


@pytest.mark.parametrize("gone", NAMES)
def test_whoever_keeps_or_publishes_leaves_exactly(gone: str) -> None:
    rest = tuple(n for n in NAMES if n != gone)
    whole, alone = router(unit_facts(kept=NAMES[:2])), router(unit_facts(kept=NAMES[:2], names=rest))
    left = tuple(i for i, n in enumerate(NAMES) if n != gone)
    assert whole.solved(left).to_bytes() == alone.solved((0, 1, 2)).to_bytes()


def test_equal_scores_go_to_the_first_name_whatever_the_scores_are() -> None:
    one = facts()[0]
    same = [ExpertFacts(name=name, count=one.count, sum=one.sum, scatter=one.scatter) for name in NAMES]
    for name in ("centroid", "lda"):
        decision = router(same, name).decide(queries(), everybody())
        assert (decision.slots == 1).all()
        assert (decision.margin == 0).all()
    assert (router(same, "centroid", min_margin=1e-9).decide(queries(), everybody()).slots == 0).all()


# -------------------------------------------------------------------- selectors and the base


def test_selectors_weigh_by_a_softmax() -> None:
    known, x = facts(), queries()
    scores = scorer("lda").solve(known).scores(x)
    best = np.argsort(-scores, axis=1)
    top1 = router(known).decide(x, everybody()).dense(4)
    assert np.array_equal(top1[np.arange(50), best[:, 0] + 1], np.ones(50))
    assert np.array_equal(top1.sum(axis=1), np.ones(50))
    soft = router(known, selector="soft").decide(x, everybody()).dense(4)
    powers = np.exp(scores / 3.0 - (scores / 3.0).max(axis=1, keepdims=True))
    assert np.allclose(soft[:, 1:], powers / powers.sum(axis=1, keepdims=True))
    assert (soft[:, 0] == 0).all()
    top2 = router(known, selector="top2").decide(x, everybody()).dense(4)
    lead = np.take_along_axis(scores, best[:, :2], axis=1)
    assert np.allclose(
        np.take_along_axis(top2[:, 1:], best[:, :1], axis=1)[:, 0],
        1 / (1 + np.exp((lead[:, 1] - lead[:, 0]) / 3.0)),
    )
    assert ((top2 > 0).sum(axis=1) <= 2).all()


@pytest.mark.parametrize("selector", sorted(RETRIEVAL_SELECTORS))
def test_the_base_answers_where_nobody_is_allowed_or_ahead(selector: str) -> None:
    known, x = facts(), queries()
    nobody = router(known, selector=selector).decide(x, np.zeros((1, 4), dtype=bool))
    assert np.array_equal(nobody.dense(4), np.eye(5)[np.zeros(50, dtype=int)])
    assert np.isnan(nobody.margin).all()
    free = router(known, selector=selector).decide(x, everybody())
    threshold = float(np.median(free.margin))
    held = router(known, selector=selector, min_margin=threshold).decide(x, everybody())
    unsure = free.margin < threshold
    assert 0 < unsure.sum() < 50
    assert np.array_equal(held.dense(4)[unsure], np.eye(5)[np.zeros(unsure.sum(), dtype=int)])
    assert np.array_equal(held.dense(4)[~unsure], free.dense(4)[~unsure])


def test_rows_may_allow_different_experts() -> None:
    known, x = facts(), queries(16)
    flags = np.array(list(itertools.product([False, True], repeat=4)))
    together = router(known, selector="soft").decide(x, flags).dense(4)
    for row in range(16):
        alone = router(known, selector="soft").decide(x[row : row + 1], flags[row : row + 1]).dense(4)
        assert np.allclose(together[row], alone[0], atol=1e-12)
        assert (together[row, 1:][~flags[row]] == 0).all()


def test_an_expert_without_a_pilot_is_never_chosen() -> None:
    known = facts()
    lonely = [replace(f, labels=with_quality(f.labels, "bob/b", -1.0)) for f in known]
    for name in ("pilot_mean", "pilot_max"):
        decision = router(lonely, name, "soft").decide(queries(), everybody())
        assert (decision.dense(4)[:, 2] == 0).all()
    none = [replace(f, labels=with_quality(f.labels, "acme/a", 0.0, everybody=True)) for f in known]
    decision = router(none, "pilot_max", ties="drop").decide(queries(), everybody())
    assert (decision.dense(4)[:, 0] == 1).all()


def test_r17_harmful_experts_are_not_asked() -> None:
    """Owners saw one expert lose everywhere and another win on some queries only; embeddings share a direction."""
    random = np.random.default_rng(5)

    def embeddings(count: int) -> Array:
        x = random.normal(size=(count, D)) * 0.5 + np.eye(D)[-1] * 2
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    def gain(x: Array, expert: int) -> Array:
        return 0.8 * x[:, 0] if expert == 1 else np.full(len(x), -0.3)

    def published(x: Array, names: Sequence[str]) -> list[ExpertFacts]:
        base = random.random(len(x))
        utility = {"base": x.T @ base}
        utility |= {n: x.T @ (base + gain(x, 1 if n == "acme/a" else 2)) for n in names}
        return [ExpertFacts(name=n, count=1, sum=x[0], gram=x.T @ x, utility=utility) for n in names]

    x, new = embeddings(2000), embeddings(300)
    bad = router(published(x, ["bob/b"]), "ridge_utility").decide(new, everybody(1))
    assert (bad.slots == 0).all()
    assert (bad.margin < -0.1).all()
    both = router(published(x, ["acme/a", "bob/b"]), "ridge_utility").decide(new, everybody(2))
    chosen = both.slots[:, 0]
    assert set(chosen) == {0, 1}
    assert np.select([chosen == 1], [gain(new, 1)], 0.0).mean() > 0.05
    # the control: a router that likens instead of predicting asks the only expert there is
    assert (router(facts()[:1], "lda").decide(new, everybody(1)).slots == 1).all()


# -------------------------------------------------------------------- confidence


def test_r18_confidence_is_monotone_and_leaves_the_choice_alone() -> None:
    known, x = facts(), queries()
    decisions = [router(known, temperature=t).decide(x, everybody()) for t in (0.3, 1.0, 7.0)]
    for decision in decisions:
        assert np.array_equal(decision.slots, decisions[0].slots)
        order = np.argsort(decision.margin, kind="stable")
        assert (np.diff(decision.confidence[order]) >= 0).all()
        assert ((decision.confidence >= 0.5) & (decision.confidence <= 1)).all()


@pytest.mark.parametrize("true", [0.5, 2.0, 8.0])
def test_r18_the_fitted_temperature_is_the_one_that_labels_were_drawn_with(true: float) -> None:
    random = np.random.default_rng(4)
    scores = random.normal(size=(4000, 4)) * 6
    powers = np.exp(scores / true)
    chances = (powers / powers.sum(axis=1, keepdims=True)).cumsum(axis=1)
    labels = (random.random((4000, 1)) > chances).sum(axis=1)
    assert fit_temperature(scores, labels) == pytest.approx(true, rel=0.1)


def test_a_temperature_needs_scores_and_labels_that_fit() -> None:
    from experts.errors import DataError

    with pytest.raises(DataError) as caught:
        fit_temperature(np.zeros((3, 2)), np.array([0, 1, 2]))
    assert str(caught.value) == (
        "A temperature is fitted to scores (queries, experts) and one expert's position for each query; given are "
        "scores of shape (3, 2) and labels of shape (3,) from 0 to 2."
    )


# -------------------------------------------------------------------- very many experts


@pytest.mark.parametrize("name", ["centroid", "lda"])
@pytest.mark.parametrize("selector", ["top1", "top2"])
def test_many_experts_are_chosen_among_as_few_are(
    name: str, selector: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(7)
    known = [
        ExpertFacts(name=f"o{i:05d}/x", count=9, sum=random.normal(size=D), scatter=np.eye(D) * 3)
        for i in range(600)
    ]
    allowed = random.random((1, 600)) > 0.1
    exact = router(known, name, selector).decide(queries(), allowed)
    monkeypatch.setattr("composer.retrieval.router.MANY", 100)
    found = router(known, name, selector).decide(queries(), allowed)
    assert np.array_equal(found.slots, exact.slots)
    assert np.allclose(found.weights, exact.weights, atol=1e-12)
    assert np.allclose(found.margin, exact.margin, atol=1e-12)
