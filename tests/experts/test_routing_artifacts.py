from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.numpy import load_file, save_file

from experts.errors import AdmissionError, ManifestError
from experts.routing_artifacts import (
    EmbeddingInfo,
    RoutingArtifacts,
    RoutingInfo,
    RowsInfo,
    Statistics,
    StatisticsInfo,
)
from experts.strict import validate

D = 6
INFO = RoutingInfo(
    statistics=StatisticsInfo(layer=1, normalization="rms", tokens=40, documents=4),
    rows=RowsInfo(layers=(1, 3), has_bias=True, public_digest="a" * 64, init="domain_embedding"),
    embedding=EmbeddingInfo(model="minilm", digest="e" * 64, dim=3),
)


def tensors() -> dict[str, np.ndarray]:
    x = np.random.default_rng(1).normal(size=(40, D))
    x /= np.sqrt(np.mean(x**2, axis=1, keepdims=True))
    statistics = Statistics.from_states(x)
    return {
        "embedding": np.array([0.1, -2.0, 0.0], np.float32),
        "row.1.weight": x[1].astype(np.float32),
        "row.1.bias": np.array([-1.5], np.float32),
        "row.3.weight": x[3].astype(np.float32),
        "row.3.bias": np.array([0.0], np.float32),
        "statistics.count": np.array([statistics.count]),
        "statistics.sum": statistics.sum,
        "statistics.scatter": statistics.scatter,
    }


def test_round_trip(tmp_path: Path) -> None:
    artifacts = RoutingArtifacts(info=INFO, tensors=tensors())
    path = artifacts.save(tmp_path)
    assert path == tmp_path / "routing.safetensors"
    for place in (tmp_path, path, path.rename(tmp_path / "blob")):
        if place.is_dir() and not (place / "routing.safetensors").exists():
            continue
        loaded = RoutingArtifacts.load(place if place.exists() else tmp_path / "blob", INFO, hidden_size=D)
        assert set(loaded.tensors) == set(artifacts.tensors)
        for name, array in artifacts.tensors.items():
            assert loaded.tensors[name].dtype == array.dtype
            assert np.array_equal(loaded.tensors[name], array)
    weight, bias = loaded.row(3)
    assert np.array_equal(weight, tensors()["row.3.weight"])
    assert bias is not None
    assert bias.tolist() == [0.0]
    assert loaded.embedding is not None
    assert loaded.embedding.tolist() == pytest.approx([0.1, -2.0, 0.0])
    with pytest.raises(AdmissionError) as caught:
        loaded.row(2)
    assert str(caught.value) == "No router row for layer 2; the artefact has rows for [1, 3]."


def test_parts_are_optional(tmp_path: Path) -> None:
    info = RoutingInfo(rows=RowsInfo(layers=(0,), has_bias=False, public_digest="a" * 64, init="zeros"))
    artifacts = RoutingArtifacts(info=info, tensors={"row.0.weight": np.zeros(D, np.float32)})
    artifacts.save(tmp_path)
    loaded = RoutingArtifacts.load(tmp_path, info)
    assert loaded.statistics is None
    assert loaded.embedding is None
    assert loaded.row(0)[1] is None


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 30), st.integers(2, 30), st.integers(0, 99))
def test_statistics_add_up(n: int, m: int, seed: int) -> None:
    x = np.random.default_rng(seed).normal(3, 2, size=(n + m, D)).astype(np.float32)
    both = Statistics.from_states(x[:n]) + Statistics.from_states(x[n:])
    assert both.count == n + m
    # numpy's own estimators are the oracle
    np.testing.assert_allclose(both.mean, x.astype(np.float64).mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(
        both.covariance, np.cov(x.astype(np.float64).T, bias=True), rtol=1e-9, atol=1e-10
    )


HEAD = "'routing.safetensors' holds values that are not allowed:\n  - "
SCHEMA = "'routing.safetensors' does not hold what it declares:\n  - "


def scaled(name: str, factor: float) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    return lambda t: t | {name: (t[name] * factor).astype(t[name].dtype)}


def at(name: str, index: Any, value: float) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    def change(t: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        array = t[name].copy()
        array[index] = value
        return t | {name: array}

    return change


_BLOCK = np.zeros((D, D))
_BLOCK[:3, :3] = 1
REFUSED: dict[str, tuple[Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], str]] = {
    "extra": (
        lambda t: t | {"row.2.weight": np.zeros(D, np.float32)},
        f"{SCHEMA}tensor 'row.2.weight': F32 (6) found, not allowed here",
    ),
    "missing": (
        lambda t: {n: a for n, a in t.items() if n != "row.3.bias"},
        f"{SCHEMA}tensor 'row.3.bias': missing, F32 (1) expected",
    ),
    "dtype": (
        lambda t: t | {"statistics.sum": t["statistics.sum"].astype(np.float32)},
        f"{SCHEMA}tensor 'statistics.sum': F32 (6) found, F64 (6) expected",
    ),
    "shape": (
        lambda t: t | {"statistics.scatter": np.eye(5), "embedding": np.ones(4, np.float32)},
        f"{SCHEMA}tensor 'embedding': F32 (4) found, F32 (3) expected\n"
        "  - tensor 'statistics.scatter': F64 (5, 5) found, F64 (6, 6) expected",
    ),
    "NaN": (
        at("row.1.weight", 0, np.nan),
        f"{HEAD}tensor 'row.1.weight': holds NaN or infinity; every value must be finite",
    ),
    "infinite": (
        at("statistics.scatter", (0, 0), np.inf),
        f"{HEAD}tensor 'statistics.scatter': holds NaN or infinity; every value must be finite",
    ),
    "positive bias": (
        at("row.1.bias", 0, 0.25),
        f"{HEAD}tensor 'row.1.bias': 0.25; an owner's router bias must lie in [-10000, 0]",
    ),
    "endless bias": (
        at("row.1.bias", 0, -1e9),
        f"{HEAD}tensor 'row.1.bias': -1e+09; an owner's router bias must lie in [-10000, 0]",
    ),
    "zero embedding": (
        scaled("embedding", 0),
        f"{HEAD}tensor 'embedding': largest magnitude 0; more than 0 and at most 10000 is allowed",
    ),
    "other count": (
        at("statistics.count", 0, 1e9),
        f"{HEAD}tensor 'statistics.count': 1000000000, but statistics.tokens is 40; they must be equal",
    ),
    "not normalised": (
        lambda t: scaled("statistics.scatter", 100)(scaled("statistics.sum", 10)(t)),
        f"{HEAD}tensor 'statistics.scatter': trace 24000; states of unit root mean square have count * width = 240",
    ),
    "not symmetric": (
        at("statistics.scatter", (0, 1), 0.5),
        f"{HEAD}tensor 'statistics.scatter': not symmetric; it must be the sum of x xᵀ",
    ),
    "negative diagonal": (
        at("statistics.scatter", (2, 2), -1.0),
        f"{HEAD}tensor 'statistics.scatter': its diagonal must lie between 0 and count * 1e+12",
    ),
    "indefinite": (
        lambda t: at("statistics.scatter", (0, 1), 1e3)(at("statistics.scatter", (1, 0), 1e3)(t)),
        f"{HEAD}tensor 'statistics.scatter': not positive semi-definite; it must be the sum of x xᵀ",
    ),
    # every pair of coordinates is possible, all three together are not
    "indefinite in three coordinates": (
        lambda t: (
            t
            | {
                "statistics.scatter": np.diag([40.0] * 3 + [0.0] * 3)
                - 36.0 * (_BLOCK - np.diag([1] * 3 + [0] * 3))
            }
        ),
        f"{HEAD}tensor 'statistics.scatter': not positive semi-definite; it must be the sum of x xᵀ",
    ),
    "sum beyond the scatter in no coordinate but along (1, 1, 1)": (
        lambda t: (
            t
            | {
                "statistics.scatter": np.diag([40.0] * 3 + [0.0] * 3),
                "statistics.sum": np.array([39.0] * 3 + [0.0] * 3),
            }
        ),
        f"{HEAD}tensor 'statistics.sum': too large for statistics.count and statistics.scatter; all three must be "
        "sums over the same states",
    ),
    "sum too large": (
        scaled("statistics.sum", 1e4),
        f"{HEAD}tensor 'statistics.sum': too large for statistics.count and statistics.scatter; all three must be "
        "sums over the same states",
    ),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(
    tmp_path: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], message: str
) -> None:
    save_file(change(tensors()), tmp_path / "routing.safetensors")
    with pytest.raises(AdmissionError) as caught:
        RoutingArtifacts.load(tmp_path, INFO, hidden_size=D)
    assert str(caught.value) == message
    with pytest.raises(AdmissionError) as caught:
        RoutingArtifacts(info=INFO, tensors=change(tensors())).save(tmp_path)
    assert str(caught.value).splitlines()[0] == message.splitlines()[0]


def test_row_that_would_take_every_token(tmp_path: Path) -> None:
    changed = scaled("row.1.weight", 1e6)(tensors())
    save_file(changed, tmp_path / "routing.safetensors")
    rms = float(np.sqrt(np.mean(changed["row.1.weight"].astype(np.float64) ** 2)))
    with pytest.raises(AdmissionError) as caught:
        RoutingArtifacts.load(tmp_path, INFO)
    assert str(caught.value) == (
        f"{HEAD}tensor 'row.1.weight': root mean square {rms:.3g}; at most 8 is allowed"
    )


def test_width_of_the_base(tmp_path: Path) -> None:
    RoutingArtifacts(info=INFO, tensors=tensors()).save(tmp_path)
    with pytest.raises(AdmissionError) as caught:
        RoutingArtifacts.load(tmp_path, INFO, hidden_size=8)
    assert caught.value.problems == (
        "tensor 'row.1.weight': F32 (6) found, F32 (8) expected",
        "tensor 'row.3.weight': F32 (6) found, F32 (8) expected",
        "tensor 'statistics.sum': F64 (6) found, F64 (8) expected",
        "tensor 'statistics.scatter': F64 (6, 6) found, F64 (8, 8) expected",
    )


def test_metadata(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "routing.safetensors", metadata={"owner": "x"})
    with pytest.raises(AdmissionError) as caught:
        RoutingArtifacts.load(tmp_path, INFO)
    assert str(caught.value) == (
        "'routing.safetensors' carries metadata ['owner']; only 'format' is allowed. Remove it."
    )


def test_statistics_of_real_states_are_admitted(tmp_path: Path) -> None:
    # one state, states on a line, constant coordinates, large offsets: all must pass the checks
    rng = np.random.default_rng(0)
    line = rng.normal(size=(30, 1)) * np.ones((1, D))
    for x in (
        rng.normal(size=(1, D)),
        line,
        line * 0 + 5,
        rng.normal(1e4, 1, size=(20, D)),
        np.zeros((3, D)),
    ):
        statistics = Statistics.from_states(x)
        info = RoutingInfo(
            statistics=StatisticsInfo(layer=0, normalization="none", tokens=len(x), documents=1)
        )
        values = {
            "statistics.count": np.array([statistics.count]),
            "statistics.sum": statistics.sum,
            "statistics.scatter": statistics.scatter,
        }
        RoutingArtifacts(info=info, tensors=values).save(tmp_path)
        assert RoutingArtifacts.load(tmp_path, info).statistics is not None


@pytest.mark.parametrize(
    ("data", "problems"),
    [
        (
            {"rows": {"layers": [2, 1], "has_bias": True, "public_digest": "a" * 64, "init": "x"}},
            ["rows.layers: layers must ascend without repetition"],
        ),
        (
            {"file": "../x.safetensors"},
            ["file: '../x.safetensors' is not the name of a .safetensors file in the folder"],
        ),
        ({"file": "x.bin"}, ["file: 'x.bin' is not the name of a .safetensors file in the folder"]),
        (
            {"statistics": {"layer": -1, "normalization": "l2", "tokens": 0, "documents": 1}},
            [
                "statistics.layer: input should be greater than or equal to 0, given -1",
                "statistics.normalization: input should be 'none' or 'rms', given 'l2'",
                "statistics.tokens: input should be greater than or equal to 1, given 0",
            ],
        ),
        (
            {"embeding": {}},
            [
                "embeding: unknown key; did you mean 'embedding'? Allowed: anchor, embedding, file, inputs, "
                "retrieval, rows, statistics"
            ],
        ),
    ],
)
def test_info_refused(data: dict[str, object], problems: list[str]) -> None:
    with pytest.raises(ManifestError) as caught:
        validate(RoutingInfo, data, what="routing")
    assert list(caught.value.problems) == problems


def test_info_is_frozen() -> None:
    with pytest.raises(ValidationError):
        INFO.file = "x"  # type: ignore[misc]


def test_saved_file_is_plain(tmp_path: Path) -> None:
    path = RoutingArtifacts(info=INFO, tensors=tensors()).save(tmp_path)
    assert set(load_file(path)) == set(tensors())
    assert path.stat().st_mode & 0o777 == 0o644
    assert [p.name for p in tmp_path.iterdir()] == ["routing.safetensors"]
