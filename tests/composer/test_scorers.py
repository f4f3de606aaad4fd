"""Scorers against scikit-learn and plain loops."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from composer.routing.scorers.base import ScorerInputs
from composer.routing.scorers.lda import LDAScorer
from composer.routing.scorers.learned import LearnedScorer
from experts.errors import PlanError
from experts.routing_artifacts import RoutingInfo, RowsInfo, Statistics, StatisticsInfo
from experts.strict import validate

D = 12


def _classes(*, count: int = 4, offset: float = 0.0) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    mixing = random.normal(size=(D, D))
    return [
        random.normal(size=(60 + 30 * c, D)) @ mixing + random.normal(size=D) * 2 + offset
        for c in range(count)
    ]


def _statistics(classes: list[np.ndarray]) -> list[Statistics]:
    return [Statistics.from_states(x) for x in classes]


@pytest.mark.parametrize("shrinkage", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("prior", [None, 0.7])
def test_lda_posteriors_are_scikit_learns(shrinkage: float, prior: float | None) -> None:
    """scikit-learn shrinks as (1 - s) S + s tr(S)/d I: ours, divided by 1 + shrinkage, with s = a / (1 + a)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    classes = _classes()
    n = len(classes)
    priors = [1 / n] * n if prior is None else [prior, *[(1 - prior) / (n - 1)] * (n - 1)]
    # equal class weights in the covariance, whatever the priors: so repeat every class to one size
    size = int(np.lcm.reduce([len(x) for x in classes]))
    x = np.concatenate([np.repeat(c, size // len(c), axis=0) for c in classes])
    y = np.repeat(np.arange(n), size)
    oracle = LinearDiscriminantAnalysis(
        solver="lsqr", shrinkage=shrinkage / (1 + shrinkage), priors=[1 / n] * n
    ).fit(x, y)
    scorer = LDAScorer(
        statistics=dict(enumerate(_statistics(classes))),
        shrinkage=shrinkage,
        anchor_prior=prior,
        normalization="none",
    )
    probes = np.random.default_rng(1).normal(size=(200, D)).astype(np.float32) * 5
    # its covariance is 1 + shrinkage times smaller, which multiplies the likelihood part of its logits
    likelihood = oracle.decision_function(probes) / (1 + shrinkage)
    ours = scorer(torch.from_numpy(probes)[None], None, list(range(n)))[0].double().numpy()
    theirs = likelihood + np.log(priors)
    np.testing.assert_allclose(
        ours - ours.mean(1, keepdims=True), theirs - theirs.mean(1, keepdims=True), rtol=1e-5, atol=1e-5
    )


def test_lda_of_a_subset_is_lda_without_the_rest() -> None:
    """Solving for a set never sees the others, so leaving is bit for bit never having joined."""
    public, *owners = _statistics(_classes())
    scorer = LDAScorer(statistics=dict(enumerate([public, *owners])))
    alone = LDAScorer(statistics={0: public, 1: owners[0], 2: owners[2]})
    device = torch.device("cpu")
    for ours, theirs in zip(
        scorer.discriminants([0, 1, 3], device), alone.discriminants([0, 1, 2], device), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_lda_survives_a_large_common_mean() -> None:
    """Hidden states share a large mean; the logits must not drown in what all classes have in common."""
    features = torch.randn(40, D, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(40)
    near = LDAScorer(statistics=dict(enumerate(_statistics(_classes()))), evidence=0.0)
    far = LDAScorer(statistics=dict(enumerate(_statistics(_classes(offset=100.0)))), evidence=0.0)
    expected = near(features, ones, [0, 1, 2, 3]).softmax(-1)
    torch.testing.assert_close(
        far(features + 100.0, ones, [0, 1, 2, 3]).softmax(-1), expected, rtol=0, atol=2e-4
    )


@pytest.mark.parametrize("prior", [None, 0.2])
def test_lda_logits_grow_with_evidence_and_shrink_with_temperature(prior: float | None) -> None:
    """All but the prior, which is known once, however much was read."""
    statistics = dict(enumerate(_statistics(_classes())))
    features = torch.randn(2, 3, D, generator=torch.Generator().manual_seed(0))
    counts = torch.tensor([[1.0, 2.0, 4.0], [9.0, 16.0, 100.0]])
    plain = LDAScorer(statistics=statistics, evidence=0.0, anchor_prior=None)(features, counts, [0, 2, 3])
    offset = torch.tensor([0.0 if prior is None else math.log(0.2 / 0.4), 0.0, 0.0])
    for evidence in (0.5, 1.0):
        scaled = LDAScorer(statistics=statistics, evidence=evidence, temperature=2.0, anchor_prior=prior)(
            features, counts, [0, 2, 3]
        )
        torch.testing.assert_close(scaled, plain / 2.0 * counts.pow(evidence)[..., None] + offset)


def test_lda_of_nobody_scores_the_anchor_alone() -> None:
    scorer = LDAScorer(statistics=dict(enumerate(_statistics(_classes()))))
    assert torch.equal(scorer(torch.randn(1, 3, D), None, [0]), torch.zeros(1, 3, 1))


def test_lda_scales_states_as_the_statistics_were() -> None:
    states = torch.randn(2, 3, D) * 7
    statistics = dict(enumerate(_statistics(_classes())))
    scaled = LDAScorer(statistics=statistics, normalization="rms").features(states)
    expected = torch.stack(
        [torch.stack([x / (x.square().mean() + 1e-6).sqrt() for x in row]) for row in states]
    )
    torch.testing.assert_close(scaled, expected)
    assert torch.equal(LDAScorer(statistics=statistics, normalization="none").features(states), states)


def test_learned_rows_are_dot_products_with_negative_biases() -> None:
    rows = torch.randn(3, D, generator=torch.Generator().manual_seed(0))
    scorer = LearnedScorer(ids=[0, 2, 5], rows=rows, bias=torch.tensor([-9.0, -0.5, 0.25]))
    x = torch.randn(4, D, generator=torch.Generator().manual_seed(1))
    logits = scorer(x.view(2, 2, D), None, [0, 2, 5]).flatten(0, 1)
    for t in range(4):
        assert logits[t, 0].item() == pytest.approx(float(rows[0] @ x[t]), abs=1e-5)
        assert logits[t, 1].item() == pytest.approx(float(rows[1] @ x[t]) - 0.5, abs=1e-5)
        assert logits[t, 2].item() == pytest.approx(float(rows[2] @ x[t]), abs=1e-5), (
            "a bias above 0 counts as 0"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_learned_rows_are_sliced_before_the_product(dtype: torch.dtype) -> None:
    """F1: scoring a subset equals, bit for bit, a scorer that was made from the subset."""
    rows = torch.randn(6, D, generator=torch.Generator().manual_seed(0)).to(dtype)
    bias = -torch.rand(6, generator=torch.Generator().manual_seed(1)).to(dtype)
    whole = LearnedScorer(ids=range(6), rows=rows, bias=bias)
    x = torch.randn(3, 11, D, generator=torch.Generator().manual_seed(2)).to(dtype)
    for kept in ([0, 1], [0, 2, 5], [0, 1, 2, 4, 5]):
        alone = LearnedScorer(ids=range(len(kept)), rows=rows[kept].clone(), bias=bias[kept].clone())
        assert torch.equal(whole(x, None, kept), alone(x, None, range(len(kept))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 2, 11])
def test_learned_rows_score_rows_that_differ_in_who_is_allowed_as_if_each_came_alone(
    dtype: torch.dtype, length: int
) -> None:
    rows = torch.randn(4, D, generator=torch.Generator().manual_seed(0)).to(dtype)
    bias = -torch.rand(4, generator=torch.Generator().manual_seed(1)).to(dtype)
    ids = [0, 2, 3, 5]
    x = torch.randn(3, length, D, generator=torch.Generator().manual_seed(2)).to(dtype)
    table = torch.tensor([[0, 2, 5], [0, 3, 5], [0, 2, 3]])
    for scorer in (LearnedScorer(ids=ids, rows=rows, bias=bias), LearnedScorer(ids=ids, rows=rows)):
        scorer.requires_grad_(False)
        together = scorer.score_apart(x, None, table)
        for row, allowed in enumerate(table.tolist()):
            assert torch.equal(together[row], scorer(x[row : row + 1], None, allowed)[0])


def test_slices_follow_the_parameters() -> None:
    """What is kept of a set of experts is dropped when a row changes, and made anew where gradients are wanted."""
    scorer = LearnedScorer(ids=range(3), rows=torch.zeros(3, D), bias=torch.zeros(3))
    x = torch.ones(1, 2, D)
    with torch.no_grad():
        assert torch.equal(scorer(x, None, [0, 2]), torch.zeros(1, 2, 2))
        scorer.rows[2] += 1.0
        assert torch.equal(scorer(x, None, [0, 2])[..., 1], torch.full((1, 2), float(D)))
    scorer(x, None, [0, 2]).sum().backward()
    assert scorer.rows.grad is not None
    assert torch.equal(scorer.rows.grad.sum(1), torch.tensor([2.0 * D, 0.0, 2.0 * D]))


def test_learned_rows_without_biases(pico: Any) -> None:
    inputs = ScorerInputs(
        public=pico.artifacts(seed=0),
        experts={1: pico.artifacts(seed=1)},
        layer=2,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    assert LearnedScorer.make(inputs, LearnedScorer.Options(bias=False)).bias is None
    with_bias = LearnedScorer.make(inputs, LearnedScorer.Options())
    assert with_bias.bias is not None
    assert with_bias.bias.tolist() == [0.0, -1.0]
    np.testing.assert_array_equal(with_bias.rows[1].detach().numpy(), inputs.experts[1].row(2)[0])


def _info(
    *, layer: int = 1, normalization: str = "rms", rows: tuple[int, ...] = (), digest: str = "0"
) -> Any:
    return RoutingInfo(
        statistics=StatisticsInfo(layer=layer, normalization=normalization, tokens=9, documents=1),  # type: ignore[arg-type]
        rows=RowsInfo(layers=rows, has_bias=True, public_digest=digest * 64, init="x") if rows else None,
    )


def test_what_lda_asks_of_the_artefacts() -> None:
    experts = {
        "a/fine": (_info(), (1, 2)),
        "a/none": (None, (2,)),
        "a/low": (_info(), (0, 3)),
        "a/other": (_info(layer=2, normalization="none"), (2,)),
    }
    assert LDAScorer.problems(public=None, experts=experts, layer=None) == [
        "the base publishes no public statistics, which are the class of text that is nobody's "
        "(see `coterie base public-routing --help`)"
    ]
    assert LDAScorer.problems(public=_info(), experts=experts, layer=3) == [
        "router.layer is 3, but the statistics were taken at layer 1",
        "a/none publishes no statistics (train it with `statistics: true`)",
        "a/low changes layer 0, below layer 1, where the gate decides",
        "a/other took its statistics at layer 2 with normalization 'none', the base at layer 1 with 'rms'",
    ]


def test_what_learned_rows_ask_of_the_artefacts() -> None:
    experts = {
        "a/fine": (_info(rows=(1, 2)), (1, 2)),
        "a/none": (_info(), (2,)),
        "a/few": (_info(rows=(1,)), (1, 3)),
        "a/other": (_info(rows=(2,), digest="1"), (2,)),
    }
    assert LearnedScorer.problems(public=_info(rows=(1, 2)), experts=experts, layer=1) == [
        "router.layer: the learned rows score every expert layer; leave it out",
        "a/none publishes no router rows (train it with `coordination: {enabled: true}`)",
        "a/few has no router row for its layers [3]",
        "a/few changes layers [3], for which the base publishes no public row",
        "the experts' rows were trained beside different public rows (000000000000, 111111111111)",
    ]
    assert LearnedScorer.problems(public=None, experts={}, layer=None) == [
        "the base publishes no public rows (see `coterie base public-routing --help`)"
    ]


@pytest.mark.parametrize(
    "options", [{"shrinkage": 0.0}, {"temperature": 0.0}, {"evidence": 1.5}, {"anchor_prior": 1.0}]
)
def test_options_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(PlanError):
        validate(LDAScorer.Options, options, what="router.options", error=PlanError)
