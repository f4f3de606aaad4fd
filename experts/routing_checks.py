"""What must hold of a routing file: its tensors' names, shapes and dtypes, and the bounds of their values.

Knows the declared contents and numbers; knows nothing of files, nor of how a router uses what it reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from experts.errors import AdmissionError
from experts.files import capped
from experts.retrieval_checks import retrieval_problems, retrieval_tensors
from experts.safetensors_header import TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from experts.routing_artifacts import RoutingInfo

__all__ = [
    "MAX_BIAS",
    "MAX_EMBEDDING",
    "MAX_ROW_RMS",
    "MAX_STATE",
    "check_schema",
    "check_values",
    "is_positive",
]

MAX_ROW_RMS = 8.0
"""Largest root mean square of a router row's entries. Rows are initialised below 1 and move little; a row far
above would take every token from the other owners."""
MAX_BIAS = 1e4
"""Largest magnitude of an owner's (never positive) router bias."""
MAX_STATE = 1e6
"""Largest root mean square of a hidden state's coordinate that statistics may claim."""
MAX_EMBEDDING = 1e4
"""Largest magnitude of an entry of a domain embedding."""

_SLACK = 1e-6
"""Of the largest diagonal entry: what rounding may do to sums."""


def check_schema(
    tensors: Mapping[str, TensorSpec], info: RoutingInfo, *, what: str, hidden_size: int | None
) -> None:
    """Hold names, shapes and dtypes against what is declared.

    Args:
        tensors: What the file holds.
        info: What it is declared to hold.
        what: How messages call the file.
        hidden_size: Width of the base's states; None: the width that the first tensor has.

    Raises:
        AdmissionError: Every tensor that is not as declared.
    """
    from experts.schema import compare_schema

    if hidden_size is None:
        hidden_size = _width(tensors)
    problems = compare_schema(tensors, _expected(info, hidden_size))
    if info.retrieval is not None and info.retrieval.dimension != hidden_size:
        problems.append(
            f"retrieval.dimension: {info.retrieval.dimension} declared, the base's embeddings have {hidden_size}"
        )
    if problems:
        raise AdmissionError(f"{what} does not hold what it declares:", problems=capped(problems))


def _expected(info: RoutingInfo, hidden_size: int) -> dict[str, TensorSpec]:
    expected = {}
    if info.embedding:
        expected["embedding"] = TensorSpec(dtype="F32", shape=(info.embedding.dim,))
    for layer in info.rows.layers if info.rows else ():
        expected[f"row.{layer}.weight"] = TensorSpec(dtype="F32", shape=(hidden_size,))
        if info.rows and info.rows.has_bias:
            expected[f"row.{layer}.bias"] = TensorSpec(dtype="F32", shape=(1,))
    if info.retrieval:
        expected |= retrieval_tensors(info.retrieval, hidden_size)
    for name in _summed(info):
        expected[f"{name}.count"] = TensorSpec(dtype="F64", shape=(1,))
        expected[f"{name}.sum"] = TensorSpec(dtype="F64", shape=(hidden_size,))
        expected[f"{name}.scatter"] = TensorSpec(dtype="F64", shape=(hidden_size, hidden_size))
    return expected


def _summed(info: RoutingInfo) -> list[str]:
    """Return the names under which statistics are declared."""
    names = ["statistics"] if info.statistics else []
    if info.inputs:
        names += [
            f"inputs.{branch}.{layer}" for branch in info.inputs.branches for layer in info.inputs.layers
        ]
    return names


def _width(tensors: Mapping[str, TensorSpec]) -> int:
    """Take the width from the first tensor that has it; the others are then held to it."""
    for name, spec in tensors.items():
        if name.endswith((".sum", ".weight")):
            return spec.shape[0] if spec.shape else 1
    return 1


def check_values(tensors: Mapping[str, NDArray[np.floating]], info: RoutingInfo, *, what: str) -> None:
    """Hold values against their bounds.

    Raises:
        AdmissionError: A value is not finite, a bound is broken, or statistics are not sums over states.
    """
    import numpy as np

    problems = [
        f"tensor '{name}': holds NaN or infinity; every value must be finite"
        for name, array in tensors.items()
        if not np.isfinite(array).all()
    ]
    problems = problems or [text for name, array in tensors.items() for text in _bounds(name, array)]
    for name in _summed(info) if not problems else ():
        declared = info.statistics if name == "statistics" else info.inputs
        assert declared is not None, "it is declared, see _summed"
        normed = declared is info.statistics and declared.normalization == "rms"
        problems += _statistics_problems(tensors, name, tokens=declared.tokens, normed=normed)
    if not problems and info.retrieval is not None:
        problems = retrieval_problems(info.retrieval, tensors)
    if problems:
        raise AdmissionError(f"{what} holds values that are not allowed:", problems=capped(problems))


def _bounds(name: str, array: NDArray[np.floating]) -> list[str]:
    import numpy as np

    if name == "embedding":
        largest = float(np.abs(array).max())
        if not 0 < largest <= MAX_EMBEDDING:
            return [
                f"tensor 'embedding': largest magnitude {largest:.3g}; more than 0 and at most "
                f"{MAX_EMBEDDING:g} is allowed"
            ]
    elif name.endswith(".bias"):
        value = float(array[0])
        if not -MAX_BIAS <= value <= 0:
            return [f"tensor '{name}': {value:g}; an owner's router bias must lie in [{-MAX_BIAS:g}, 0]"]
    elif name.startswith("row."):
        rms = math.sqrt(float(np.square(array, dtype=np.float64).mean()))
        if rms > MAX_ROW_RMS:
            return [f"tensor '{name}': root mean square {rms:.3g}; at most {MAX_ROW_RMS:g} is allowed"]
    return []


def _statistics_problems(
    tensors: Mapping[str, NDArray[np.floating]], name: str, *, tokens: int, normed: bool
) -> list[str]:
    """Check what holds of any n, Σx, Σxxᵀ; noisy statistics are published after a projection, so it holds of them."""
    import numpy as np

    count = float(tensors[f"{name}.count"][0])
    total, scatter = tensors[f"{name}.sum"], tensors[f"{name}.scatter"]
    if count != tokens:
        return [
            f"tensor '{name}.count': {count:.17g}, but {name.partition('.')[0]}.tokens is {tokens}; they must be equal"
        ]
    diagonal = np.diagonal(scatter)
    slack = _SLACK * float(np.abs(diagonal).max())
    problems = []
    if not np.allclose(scatter, scatter.T, rtol=0, atol=slack):
        problems.append(f"tensor '{name}.scatter': not symmetric; it must be the sum of x xᵀ")
    if float(diagonal.min()) < 0 or float(diagonal.max()) > count * MAX_STATE**2:
        problems.append(
            f"tensor '{name}.scatter': its diagonal must lie between 0 and count * {MAX_STATE**2:g}"
        )
    elif normed and float(diagonal.sum()) > count * len(total) * (1 + 1e-3):
        problems.append(
            f"tensor '{name}.scatter': trace {float(diagonal.sum()):.6g}; states of unit root mean square have "
            f"count * width = {count * len(total):.6g}"
        )
    # the covariance's factor is enough: the scatter matrix is the sum of two semi-definite ones then
    elif not problems and not is_positive(scatter - np.outer(total, total) / count, slack=slack):
        problems.append(
            f"tensor '{name}.sum': too large for {name}.count and {name}.scatter; all three must "
            "be sums over the same states"
            if is_positive(scatter, slack=slack)
            else f"tensor '{name}.scatter': not positive semi-definite; it must be the sum of x xᵀ"
        )
    return problems


def is_positive(matrix: NDArray[np.floating], *, slack: float) -> bool:
    """Say whether a symmetric matrix is positive semi-definite up to rounding: whether Cholesky's factor exists."""
    import numpy as np

    lifted = np.array(matrix, dtype=np.float64)
    # rounding grows with the width; the least normal number lets all-zero states pass
    lifted[np.diag_indices(len(lifted))] += slack * len(lifted) ** 0.5 + 1e-300
    try:
        np.linalg.cholesky(lifted)
    except np.linalg.LinAlgError:
        return False
    return True
