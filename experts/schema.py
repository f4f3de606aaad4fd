"""Comparing the tensors found in a file with the ones expected, naming every difference.

Knows names, dtypes and shapes; knows nothing of where the expectation comes from.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from experts.safetensors_header import TensorSpec

__all__ = ["compare_schema"]


def compare_schema(found: Mapping[str, TensorSpec], expected: Mapping[str, TensorSpec]) -> list[str]:
    """Return one line for each tensor that is not allowed, missing, or of another dtype or shape."""
    extra = sorted(set(found) - set(expected))
    missing = sorted(set(expected) - set(found))
    problems = [
        f"tensor '{name}': {_show(found[name])} found, not allowed here{_near(name, missing)}"
        for name in extra
    ]
    problems += [f"tensor '{name}': missing, {_show(expected[name])} expected" for name in missing]
    problems += [
        f"tensor '{name}': {_show(found[name])} found, {_show(spec)} expected"
        for name, spec in expected.items()
        if name in found and _show(found[name]) != _show(spec)
    ]
    return problems


def _show(spec: TensorSpec) -> str:
    return f"{spec.dtype} ({', '.join(map(str, spec.shape))})"


def _near(name: str, missing: list[str]) -> str:
    # quadratic in the number of names, so only where a person would look
    near = difflib.get_close_matches(name, missing, n=1, cutoff=0.8) if len(missing) <= 50 else []
    return f"; did you mean '{near[0]}'?" if near else ""
