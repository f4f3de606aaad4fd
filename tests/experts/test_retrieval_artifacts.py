"""Retrieval artefacts: additive sums that survive a file to the bit, and everything that is no such sum refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from experts.errors import AdmissionError
from experts.retrieval_artifacts import (
    Moments,
    Pilot,
    RetrievalArtifacts,
    Scores,
    Utility,
    packed,
    unpacked,
)
from experts.retrieval_info import RetrievalInfo, RetrievalNoise
from experts.routing_artifacts import RoutingArtifacts, RoutingInfo

WIDTH = 6


def vectors(count: int = 40, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(count, WIDTH)).astype("f4")
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def artifacts(**changes: Any) -> RetrievalArtifacts:
    x, y = vectors(), vectors(seed=1)
    quality = np.random.default_rng(2).random((40, 2))
    gram = Moments.from_vectors(x).scatter
    settings: dict[str, Any] = {
        "embedding": Moments.from_vectors(x),
        "normalization": "l2",
        "state": Moments.from_vectors(y),
        "state_layer": 2,
        "pilots": [
            Pilot(expert="zoe/search", queries=25, vector=x[:25].astype("f8").mean(axis=0)),
            Pilot(expert="base", queries=15, vector=x[25:].astype("f8").mean(axis=0)),
        ],
        "utility": Utility(queries=40, experts=("zoe/search",), gram=gram, cross=x.T.astype("f8") @ quality),
        "static": Moments.from_vectors(vectors(seed=3)),
        "scores": Scores(
            experts=("acme/search", "zoe/search"),
            counts=np.array([10.0, 10.0, 11.0]),
            vectors=np.stack([x[i : i + 10].astype("f8").mean(axis=0) for i in (0, 10, 20)]),
            quality=np.full((3, 3), 0.5),
        ),
        "min_group": 10,
    }
    return RetrievalArtifacts.create(**settings | changes)


def routed(made: RetrievalArtifacts, **tensors: Any) -> RoutingArtifacts:
    return RoutingArtifacts(info=RoutingInfo(retrieval=made.info), tensors=made.tensors() | tensors)


def test_moments_are_sums() -> None:
    x, y = vectors(), vectors(30, seed=1)
    both = Moments.from_vectors(x) + Moments.from_vectors(y)
    whole = np.concatenate([x, y]).astype("f8")
    assert both.count == 70
    np.testing.assert_allclose(both.mean, whole.mean(axis=0), atol=1e-15)
    np.testing.assert_allclose(both.scatter, np.einsum("ni,nj->ij", whole, whole), atol=1e-13)
    first_only = Moments.from_vectors(y, second_moment=False)
    assert (Moments.from_vectors(x) + first_only).scatter is None


def test_triangles_round_trip_to_the_bit() -> None:
    matrix = Moments.from_vectors(vectors()).scatter
    assert packed(matrix).shape == (WIDTH * (WIDTH + 1) // 2,)
    restored = unpacked(packed(matrix))
    assert np.array_equal(restored, restored.T)
    assert np.array_equal(np.triu(restored), np.triu(matrix))


def test_a_file_gives_back_every_bit(tmp_path: Path) -> None:
    made = artifacts()
    path = routed(made).save(tmp_path)
    read = RoutingArtifacts.load(path, RoutingInfo(retrieval=made.info), hidden_size=WIDTH)
    again = read.retrieval
    assert again is not None
    assert again.info == made.info
    assert {name: value.tobytes() for name, value in again.tensors().items()} == {
        name: value.tobytes() for name, value in made.tensors().items()
    }
    assert [(pilot.expert, pilot.queries) for pilot in again.pilots] == [("base", 15), ("zoe/search", 25)]
    first = path.read_bytes()
    (tmp_path / "again").mkdir()
    assert routed(again).save(tmp_path / "again").read_bytes() == first


def test_everything_but_the_first_sum_is_optional(tmp_path: Path) -> None:
    made = artifacts(
        embedding=Moments.from_vectors(vectors(), second_moment=False),
        state=None,
        state_layer=None,
        static=None,
        pilots=(),
        utility=None,
        scores=None,
    )
    assert list(made.tensors()) == ["retrieval.embedding.sum"]
    routed(made).save(tmp_path)
    read = RoutingArtifacts.load(tmp_path, RoutingInfo(retrieval=made.info), hidden_size=WIDTH).retrieval
    assert read is not None
    assert (read.state, read.pilots, read.utility, read.embedding.scatter) == (None, (), None, None)


def test_groups_below_the_minimum_are_absent() -> None:
    made = artifacts(min_group=20, scores=None)
    assert [pilot.expert for pilot in made.pilots] == ["zoe/search"]
    assert made.tensors()["retrieval.pilots"].shape == (1, WIDTH)


def test_a_small_group_is_refused() -> None:
    info = artifacts().info.model_dump(mode="json")
    with pytest.raises(ValidationError) as caught:
        RetrievalInfo.model_validate_json(json.dumps(info | {"min_group": 30}))
    (error,) = caught.value.errors()
    assert error["msg"] == (
        "Value error, below the minimum group size of 30 queries, so that nothing may be published: pilots of base: "
        "15, pilots of zoe/search: 25, a row of scores: 10"
    )
    with pytest.raises(ValidationError, match=r"below the minimum group size of 41 queries.*: queries: 40"):
        artifacts(min_group=41, pilots=(), scores=None)


@pytest.mark.parametrize("name", ["zoe", "Zoe/search", "../x", ""])
def test_pilots_name_experts(name: str) -> None:
    with pytest.raises(ValidationError, match="is not an expert name"):
        artifacts(pilots=[Pilot(expert=name, queries=20, vector=np.zeros(WIDTH))])


def test_nothing_exact_stands_beside_noise() -> None:
    noise = RetrievalNoise(epsilon=2.0, delta=1e-6, release="mean", clip_norm=1.0, noise_std=0.1)
    with pytest.raises(ValidationError) as caught:
        artifacts(noise=noise, pilots=())
    (error,) = caught.value.errors()
    assert error["msg"] == (
        "Value error, noise covers the sums alone; utility, scores beside it would undo it"
    )
    made = artifacts(noise=noise, pilots=(), utility=None, scores=None)
    assert RetrievalInfo.model_validate_json(made.info.model_dump_json()) == made.info


NO_SUM: list[tuple[dict[str, Any], str]] = [
    (
        {"retrieval.embedding.sum": np.full(WIDTH, np.nan)},
        "tensor 'retrieval.embedding.sum': holds NaN or infinity; every value must be finite",
    ),
    (
        {"retrieval.embedding.sum": np.full(WIDTH, 40.0)},
        "tensor 'retrieval.embedding.sum': length 97.9796; 40 vectors sum to at most 40.04",
    ),
    (
        {"retrieval.embedding.sum": np.full(WIDTH, 15.0)},
        "tensor 'retrieval.embedding.sum': too large for the declared queries and retrieval.embedding.scatter",
    ),
    (
        {"retrieval.state.scatter": packed(np.eye(WIDTH))},
        "tensor 'retrieval.state.scatter': trace 6; 40 vectors of length 1 have 40",
    ),
    (
        {"retrieval.embedding.scatter": packed(np.diag([50.0, -10.0, 0, 0, 0, 0]))},
        "tensor 'retrieval.embedding.scatter': not positive semi-definite; it must be a sum of x xᵀ",
    ),
    (
        {"retrieval.pilots": np.full((2, WIDTH), 0.3) * [[1.0], [2.0]]},
        "tensor 'retrieval.pilots': the pilot of 'zoe/search' has length 1.46969; at most 1.001 is allowed",
    ),
    (
        {"retrieval.utility.cross": np.full((WIDTH, 2), 1.0) * [1.0, 40.0]},
        "tensor 'retrieval.utility.cross': the column of 'zoe/search' has length 97.9796; at most 80.08 is allowed",
    ),
    (
        {"retrieval.static.scatter": packed(np.eye(WIDTH))},
        "tensor 'retrieval.static.scatter': trace 6; 40 vectors of length 1 have 40",
    ),
    (
        {"retrieval.scores.counts": np.array([10.0, 9.0, 12.0])},
        "tensor 'retrieval.scores.counts': 9 queries in a row; whole numbers from 10, the minimum group size, are "
        "allowed",
    ),
    (
        {"retrieval.scores.counts": np.array([10.0, 10.0, 12.0])},
        "tensor 'retrieval.scores.counts': sums to 32, declared are 31 queries",
    ),
    (
        {"retrieval.scores.vectors": np.full((3, WIDTH), 0.5)},
        "tensor 'retrieval.scores.vectors': 1.22474; at most 1 is allowed",
    ),
    (
        {"retrieval.scores.quality": np.full((3, 3), -2.5)},
        "tensor 'retrieval.scores.quality': 2.5; at most 2 is allowed",
    ),
]


@pytest.mark.parametrize(("tensors", "problem"), NO_SUM)
def test_what_is_no_sum_over_embeddings_is_refused(
    tmp_path: Path, tensors: dict[str, Any], problem: str
) -> None:
    with pytest.raises(AdmissionError) as caught:
        routed(artifacts(), **tensors).save(tmp_path)
    assert str(caught.value) == f"'routing.safetensors' holds values that are not allowed:\n  - {problem}"


NOT_DECLARED: list[tuple[dict[str, Any], str]] = [
    (
        {"retrieval.texts": np.zeros(3)},
        "tensor 'retrieval.texts': F64 (3) found, not allowed here",
    ),
    (
        {"retrieval.pilots": np.zeros((3, WIDTH))},
        "tensor 'retrieval.pilots': F64 (3, 6) found, F64 (2, 6) expected",
    ),
    (
        {"retrieval.state.sum": np.zeros(WIDTH, dtype="f4")},
        "tensor 'retrieval.state.sum': F32 (6) found, F64 (6) expected",
    ),
]


@pytest.mark.parametrize(("tensors", "problem"), NOT_DECLARED)
def test_exactly_the_declared_tensors(tmp_path: Path, tensors: dict[str, Any], problem: str) -> None:
    with pytest.raises(AdmissionError) as caught:
        routed(artifacts(), **tensors).save(tmp_path)
    assert str(caught.value) == f"'routing.safetensors' does not hold what it declares:\n  - {problem}"


def test_the_width_is_the_bases(tmp_path: Path) -> None:
    made = artifacts(pilots=(), utility=None, scores=None, static=None, state=None, state_layer=None)
    routed(made).save(tmp_path)
    with pytest.raises(AdmissionError) as caught:
        RoutingArtifacts.load(tmp_path, RoutingInfo(retrieval=made.info), hidden_size=8)
    assert caught.value.problems == (
        "tensor 'retrieval.embedding.sum': F64 (6) found, F64 (8) expected",
        "tensor 'retrieval.embedding.scatter': F64 (21) found, F64 (36) expected",
        "retrieval.dimension: 6 declared, the base's embeddings have 8",
    )


def test_a_routing_block_of_old_keeps_its_bytes() -> None:
    old = {"file": "routing.safetensors", "statistics": None, "rows": None, "embedding": None}
    assert RoutingInfo.model_validate(old).model_dump(mode="json", exclude_unset=True) == old
