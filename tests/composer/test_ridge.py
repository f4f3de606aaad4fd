"""The ridge gate against scikit-learn, and what leaving means for sums."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from composer.routing.scorers.ridge import RidgeScorer, solve_ridge
from experts.errors import PlanError
from experts.routing_artifacts import Statistics
from experts.strict import validate

D = 12
CPU = torch.device("cpu")


def _classes(*, count: int = 4, offset: float = 0.0) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    mixing = random.normal(size=(D, D))
    return [
        random.normal(size=(60 + 90 * c, D)) @ mixing + random.normal(size=D) * 2 + offset
        for c in range(count)
    ]


def _statistics(classes: list[np.ndarray]) -> list[Statistics]:
    return [Statistics.from_states(x) for x in classes]


@pytest.mark.parametrize("ridge", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("balanced", [True, False])
def test_scores_are_scikit_learns(ridge: float, balanced: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sklearn.linear_model import Ridge

    classes = _classes()
    x, y = np.concatenate(classes), np.repeat(np.arange(4), [len(c) for c in classes])
    share = np.array([1 / 4] * 4) if balanced else np.array([len(c) / len(x) for c in classes])
    sample_weight = (share / [len(c) for c in classes])[y]
    middle = sample_weight @ x
    variance = float((sample_weight @ np.square(x - middle)).mean())
    oracle = Ridge(alpha=ridge * variance).fit(x, np.eye(4)[y], sample_weight=sample_weight)
    weights, biases = solve_ridge(_statistics(classes), ridge=ridge, balanced=balanced)
    np.testing.assert_allclose(weights, oracle.coef_, rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(biases, oracle.intercept_, rtol=1e-7, atol=1e-10)


def test_f15_summing_again_is_never_having_joined_and_subtracting_is_only_close() -> None:
    public, *owners = _statistics(_classes(count=5))
    whole = RidgeScorer(statistics=dict(enumerate([public, *owners])))
    never = RidgeScorer(statistics=dict(enumerate([public, owners[0], owners[2], owners[3]])))
    summed = whole.discriminants([0, 1, 3, 4], CPU)
    joined = never.discriminants([0, 1, 2, 3], CPU)
    assert all(torch.equal(a, b) for a, b in zip(summed, joined, strict=True))
    features = torch.randn(3, 7, D, generator=torch.Generator().manual_seed(0))
    assert torch.equal(whole(features, None, [0, 1, 3, 4]), never(features, None, [0, 1, 2, 3]))
    # the control: what remains when the one who leaves is taken out of the sum of all
    left = sum(owners, public)
    kept = sum((owners[i] for i in (0, 2, 3)), public)
    taken = left.scatter - owners[1].scatter
    assert not np.array_equal(taken, kept.scatter)
    np.testing.assert_allclose(taken, kept.scatter, rtol=1e-10, atol=1e-10 * np.abs(kept.scatter).max())


def test_the_size_of_an_owner_matters_only_where_classes_are_not_balanced() -> None:
    classes = _classes(count=3)
    larger = [*classes[:2], np.concatenate([classes[2]] * 10)]
    for balanced in (True, False):
        small, large = (solve_ridge(_statistics(c), balanced=balanced) for c in (classes, larger))
        if balanced:
            np.testing.assert_allclose(large[0], small[0], rtol=1e-8, atol=1e-12)
            np.testing.assert_allclose(large[1], small[1], rtol=1e-8, atol=1e-12)
        else:
            assert large[1][2] > small[1][2] + 0.1, "the larger owner is expected everywhere"


def test_scores_sum_to_one_and_tell_classes_apart() -> None:
    classes = _classes()
    weights, biases = solve_ridge(_statistics(classes), ridge=0.01)
    for c, states in enumerate(classes):
        scores = states @ weights.T + biases
        np.testing.assert_allclose(scores.sum(1), 1.0, rtol=0, atol=1e-10)
        assert (scores.argmax(1) == c).mean() > 0.5


def test_a_large_common_mean_changes_nothing() -> None:
    near, far = (solve_ridge(_statistics(_classes(offset=o))) for o in (0.0, 1000.0))
    probes = np.random.default_rng(1).normal(size=(50, D)) * 3
    np.testing.assert_allclose((probes + 1000) @ far[0].T + far[1], probes @ near[0].T + near[1], atol=1e-6)


def test_temperature_and_evidence_scale_the_scores() -> None:
    statistics = dict(enumerate(_statistics(_classes())))
    features = torch.randn(1, 2, D, generator=torch.Generator().manual_seed(0))
    counts = torch.tensor([[1.0, 16.0]])
    weights, biases = solve_ridge(list(statistics.values()))
    expected = torch.from_numpy(features[0].double().numpy() @ weights.T + biases).float()
    got = RidgeScorer(statistics=statistics, evidence=0.0, temperature=1.0)(features, counts, [0, 1, 2, 3])
    torch.testing.assert_close(got[0], expected)
    got = RidgeScorer(statistics=statistics, evidence=0.5, temperature=0.5)(features, counts, [0, 1, 2, 3])
    torch.testing.assert_close(got[0], expected * torch.tensor([[2.0], [8.0]]))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"ridge": 0.0}, "ridge: input should be greater than 0, given 0.0"),
        ({"temperature": 0.0}, "temperature: input should be greater than 0, given 0.0"),
        (
            {"shrinkage": 0.1},
            "shrinkage: unknown key; did you mean 'ridge'? Allowed: balanced, evidence, ridge, temperature",
        ),
    ],
)
def test_options_out_of_range(options: dict[str, float], problem: str) -> None:
    with pytest.raises(PlanError) as caught:
        validate(RidgeScorer.Options, options, what="router.options", error=PlanError)
    assert str(caught.value) == f"router.options has 1 problem:\n  - {problem}"
