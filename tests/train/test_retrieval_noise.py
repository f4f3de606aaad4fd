"""Noise on sums over queries: what one query can change, the noise's size, and that routers accept what comes out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from experts.errors import DataError
from experts.retrieval_artifacts import RetrievalArtifacts
from experts.routing_artifacts import RoutingArtifacts, RoutingInfo
from pipelines.train.noise import noise_multiplier
from pipelines.train.retrieval_noise import _SENSITIVITY, _bounded, noisy_moments

WIDTH, COUNT = 8, 60


def features(seed: int = 0, count: int = COUNT) -> np.ndarray:
    x = np.random.default_rng(seed).normal(0.4, 1.0, size=(count, WIDTH))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def noisy(x: dict[str, np.ndarray], kind: str = "moments", secret: bytes = b"k", epsilon: float = 1.0):
    return noisy_moments(x, epsilon=epsilon, delta=1e-4, release=kind, secret=secret)


def test_the_sensitivities_are_the_largest_changes_that_one_query_makes():
    for seed in range(200):
        x, y = features(seed, 1)[0], features(seed + 1000, 1)[0]
        assert np.linalg.norm(x - y) <= _SENSITIVITY["mean"]
        assert np.linalg.norm(np.outer(x, x) - np.outer(y, y)) <= _SENSITIVITY["second"] + 1e-12
    one, other = np.eye(WIDTH)[:2]
    assert np.linalg.norm(one - -one) == _SENSITIVITY["mean"]
    assert np.linalg.norm(np.outer(one, one) - np.outer(other, other)) == pytest.approx(
        _SENSITIVITY["second"]
    )


@pytest.mark.parametrize(("kind", "sums"), [("mean", 2), ("moments", 4)])
def test_all_sums_share_one_budget(kind, sums):
    """Two places, of which means or means and moments are released, with the noise of one query of so many parts."""
    x = {"embedding": features() * 0.3, "state": features(1) * 0.3}
    draws = [noisy(x, kind, bytes([n]), epsilon=2.0) for n in range(200)]
    info = draws[0][1]
    assert info.noise_std == pytest.approx(noise_multiplier(epsilon=2.0, delta=1e-4) * sums**0.5 * 2 / COUNT)
    for place, rows in x.items():
        errors = np.array([moments[place].mean for moments, _ in draws]) - rows.mean(axis=0)
        assert errors.std() == pytest.approx(info.noise_std, rel=0.1)
    assert (info.release, info.unit, info.clip_norm) == (kind, "query", 1.0)
    assert (draws[0][0]["state"].scatter is None) == (kind == "mean")


def test_longer_features_are_shortened_and_equal_queries_get_equal_noise():
    x = features()
    first, again = noisy({"embedding": x})[0]["embedding"], noisy({"embedding": x * 1.0})[0]["embedding"]
    assert np.array_equal(first.sum, again.sum)
    assert np.array_equal(first.scatter, again.scatter)
    loud = x.copy()
    loud[0] *= 1e6
    assert np.allclose(_bounded(loud), x, atol=1e-12)
    assert np.array_equal(_bounded(x * 0.5), x * 0.5)
    other = noisy({"embedding": features(5)})[0]["embedding"]
    noises = first.mean - x.mean(axis=0), other.mean - features(5).mean(axis=0)
    assert np.abs(noises[0] - noises[1]).max() > 0.1 * np.abs(noises[0]).max()
    assert not np.array_equal(noisy({"embedding": x}, secret=b"l")[0]["embedding"].sum, first.sum)


@pytest.mark.parametrize("kind", ["mean", "moments"])
@pytest.mark.parametrize("epsilon", [0.05, 50.0])
def test_what_is_published_is_admitted_however_strong_the_noise(tmp_path: Path, kind, epsilon):
    moments, noise = noisy({"embedding": features(), "static": features(2)}, kind, epsilon=epsilon)
    made = RetrievalArtifacts.create(
        embedding=moments["embedding"], static=moments["static"], normalization="l2", noise=noise
    )
    info = RoutingInfo(retrieval=made.info)
    RoutingArtifacts(info=info, tensors=made.tensors()).save(tmp_path)
    found = RoutingArtifacts.load(tmp_path, info, hidden_size=WIDTH).retrieval
    assert found is not None
    assert found.info.noise == noise
    if epsilon == 50.0 and kind == "moments":
        x = features()
        assert np.abs(found.embedding.scatter / COUNT - x.T @ x / COUNT).max() < 0.05


def test_a_delta_that_allows_publishing_a_query_is_refused():
    with pytest.raises(DataError) as caught:
        noisy_moments({"embedding": features()}, epsilon=1.0, delta=0.1, release="mean", secret=b"k")
    assert str(caught.value) == (
        "statistics.noise: a delta of 0.1 for 60 queries; it must be below 1 / queries (0.0167), or publishing one of "
        "them would be allowed. Give a smaller delta."
    )
