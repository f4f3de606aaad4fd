"""What must hold of a retriever's routing artefacts: their names and shapes, and that they are sums over embeddings.

Knows the declared contents and numbers; knows nothing of files, nor of how a router uses what it reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from experts.retrieval_artifacts import unpacked
from experts.retrieval_info import BASE_NAME, RetrievalInfo
from experts.safetensors_header import TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["MAX_NORM", "retrieval_problems", "retrieval_tensors"]

MAX_NORM = 1e4
"""Largest length of an embedding that is not normalised."""
_ROUNDING = 1e-3
"""Relative; embeddings come in 32 bits."""


def retrieval_tensors(info: RetrievalInfo, width: int) -> dict[str, TensorSpec]:
    """Return exactly the tensors that ``info`` declares on a base of this width, all F64.

    ``retrieval.embedding.sum`` and ``retrieval.state.sum`` ``(d,)``, ``retrieval.embedding.scatter``,
    ``retrieval.state.scatter`` and ``retrieval.utility.gram`` ``(d (d + 1) / 2,)``: upper triangles row by row,
    ``retrieval.pilots`` ``(groups, d)``, ``retrieval.utility.cross`` ``(d, 1 + experts)``, ``retrieval.scores.counts``
    ``(rows,)``, ``retrieval.scores.vectors`` ``(rows, d)`` and ``retrieval.scores.quality`` ``(rows, 1 + experts)``.
    ``retrieval.static`` are sums like those of ``retrieval.state``.
    """
    triangle = (width * (width + 1) // 2,)
    shapes: dict[str, tuple[int, ...]] = {}
    for place in ("embedding", *_further_places(info)):
        shapes[f"retrieval.{place}.sum"] = (width,)
        if info.second_moment:
            shapes[f"retrieval.{place}.scatter"] = triangle
    if info.pilots:
        shapes["retrieval.pilots"] = (len(info.pilots.groups), width)
    if info.utility:
        shapes["retrieval.utility.gram"] = triangle
        shapes["retrieval.utility.cross"] = (width, 1 + len(info.utility.experts))
    if info.scores:
        rows = info.scores.rows
        shapes["retrieval.scores.counts"] = (rows,)
        shapes["retrieval.scores.vectors"] = (rows, width)
        shapes["retrieval.scores.quality"] = (rows, 1 + len(info.scores.experts))
    return {name: TensorSpec(dtype="F64", shape=shape) for name, shape in shapes.items()}


def _further_places(info: RetrievalInfo) -> list[str]:
    """Where queries were summed beside their embeddings; features of these places always have length 1."""
    return (["state"] if info.state else []) + (["static"] if info.static_tokens else [])


def retrieval_problems(info: RetrievalInfo, tensors: Mapping[str, NDArray[np.floating]]) -> list[str]:
    """Say what cannot be sums over the declared number of embeddings; values are known to be finite."""
    problems = _moment_problems("embedding", info, tensors, unit=info.normalization == "l2")
    for place in _further_places(info):
        problems += _moment_problems(place, info, tensors, unit=True)
    if info.pilots:
        problems += _pilot_problems(info, tensors["retrieval.pilots"])
    if info.utility:
        problems += _utility_problems(info, tensors)
    if info.scores:
        problems += _score_problems(info, tensors)
    return problems


def _moment_problems(
    place: str, info: RetrievalInfo, tensors: Mapping[str, NDArray[np.floating]], *, unit: bool
) -> list[str]:
    import numpy as np

    name = f"retrieval.{place}"
    total = tensors[f"{name}.sum"]
    limit = info.queries * (1.0 if unit else MAX_NORM) * (1 + _ROUNDING)
    length = float(np.linalg.norm(total))
    if length > limit:
        return [
            f"tensor '{name}.sum': length {length:.6g}; {info.queries} vectors sum to at most {limit:.6g}"
        ]
    if not info.second_moment:
        return []
    matrix = unpacked(tensors[f"{name}.scatter"])
    problems = _gram_problems(f"{name}.scatter", matrix, count=info.queries, unit=unit)
    if problems:
        return problems
    if not _is_positive(matrix - np.outer(total, total) / info.queries, scale=matrix):
        return [f"tensor '{name}.sum': too large for the declared queries and {name}.scatter"]
    return []


def _gram_problems(name: str, matrix: NDArray[np.float64], *, count: int, unit: bool) -> list[str]:
    trace = float(matrix.trace())
    if unit and abs(trace - count) > _ROUNDING * count:
        return [f"tensor '{name}': trace {trace:.6g}; {count} vectors of length 1 have {count}"]
    if not 0 <= trace <= count * MAX_NORM**2:
        return [f"tensor '{name}': trace {trace:.6g}; 0 to {count * MAX_NORM**2:.6g} is allowed"]
    if not _is_positive(matrix, scale=matrix):
        return [f"tensor '{name}': not positive semi-definite; it must be a sum of x xᵀ"]
    return []


def _is_positive(matrix: NDArray[np.float64], *, scale: NDArray[np.float64]) -> bool:
    """Semi-definite up to what rounding does to embeddings of 32 bits."""
    from experts.routing_checks import is_positive

    return is_positive(matrix, slack=1e-6 * float(scale.diagonal().max(initial=0.0)))


def _pilot_problems(info: RetrievalInfo, rows: NDArray[np.floating]) -> list[str]:
    import numpy as np

    assert info.pilots is not None
    limit = (1.0 if info.normalization == "l2" else MAX_NORM) * (1 + _ROUNDING)
    lengths = np.linalg.norm(rows, axis=1)
    return [
        f"tensor 'retrieval.pilots': the pilot of '{group.expert}' has length {length:.6g}; at most {limit:.6g} is "
        "allowed"
        for group, length in zip(info.pilots.groups, lengths, strict=True)
        if length > limit
    ]


def _score_problems(info: RetrievalInfo, tensors: Mapping[str, NDArray[np.floating]]) -> list[str]:
    """Rows must be means of whole numbers of queries, none of too few, and qualities what they can be."""
    import numpy as np

    assert info.scores is not None
    counts, problems = tensors["retrieval.scores.counts"], []
    if not np.array_equal(counts, np.round(counts)) or counts.min() < info.min_group:
        problems.append(
            f"tensor 'retrieval.scores.counts': {counts.min():.6g} queries in a row; whole numbers from "
            f"{info.min_group}, the minimum group size, are allowed"
        )
    elif counts.sum() != info.scores.queries:
        problems.append(
            f"tensor 'retrieval.scores.counts': sums to {counts.sum():.0f}, declared are {info.scores.queries} queries"
        )
    unit = info.normalization == "l2"
    limits = {"vectors": (1.0 if unit else MAX_NORM, 1), "quality": (2.0 if unit else 2 * MAX_NORM**2, None)}
    for name, (limit, axis) in limits.items():
        rows = tensors[f"retrieval.scores.{name}"]
        largest = float((np.abs(rows) if axis is None else np.linalg.norm(rows, axis=axis)).max())
        if largest > limit * (1 + _ROUNDING):
            problems.append(
                f"tensor 'retrieval.scores.{name}': {largest:.6g}; at most {limit:.6g} is allowed"
            )
    return problems


def _utility_problems(info: RetrievalInfo, tensors: Mapping[str, NDArray[np.floating]]) -> list[str]:
    import numpy as np

    assert info.utility is not None
    unit, count = info.normalization == "l2", info.utility.queries
    name = "retrieval.utility.gram"
    problems = _gram_problems(name, unpacked(tensors[name]), count=count, unit=unit)
    # a margin of cosines lies within 2 of 0, a measure within 1
    limit = count * (2.0 if unit else 2 * MAX_NORM**3) * (1 + _ROUNDING)
    lengths = np.linalg.norm(tensors["retrieval.utility.cross"], axis=0)
    names = (BASE_NAME, *info.utility.experts)
    return problems + [
        f"tensor 'retrieval.utility.cross': the column of '{expert}' has length {length:.6g}; at most {limit:.6g} is "
        "allowed"
        for expert, length in zip(names, lengths, strict=True)
        if length > limit
    ]
