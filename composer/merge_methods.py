"""Methods of merging models, by mergekit's names: what each takes, and what stands in the way of a merge.

Knows names, counts and bounds of settings; imports neither torch nor mergekit, so that a plan can ask.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from experts.names import unknown_name

__all__ = [
    "AVERAGE",
    "BASE",
    "COUNTS",
    "METHODS",
    "SWITCHES",
    "MergeMethod",
    "merge_problems",
]

AVERAGE = "average"
"""The weighted mean, summed in float32 in the order given; needs no mergekit."""
BASE = "base"
"""How weights and parameters name the base."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeMethod:
    """What a method of mergekit 0.1.5 takes; the tests compare with mergekit itself."""

    base: Literal["needed", "possible", "alike"]
    """Whether differences to the base are merged: always, if there is one, or never (it is a model like the others)."""
    weighted: bool = False
    """Whether every model has a weight."""
    settings: tuple[str, ...] = ()
    """Its other settings, one value for all models."""
    each: tuple[str, ...] = ()
    """Its other settings that may differ from model to model."""
    needed: tuple[str, ...] = ()
    """Settings without a default."""
    fewest: int = 1
    """Fewest models beside the base."""
    most: int | None = None
    """Most models beside the base."""


def _arithmetic(*each: str) -> MergeMethod:
    settings = ("int8_mask", "normalize", "rescale", "lambda")
    return MergeMethod(base="needed", weighted=True, settings=settings, each=("density", *each))


METHODS: dict[str, MergeMethod] = {
    AVERAGE: MergeMethod(base="alike", weighted=True),
    "arcee_fusion": MergeMethod(base="needed", most=1),
    "breadcrumbs": _arithmetic("gamma"),
    "breadcrumbs_ties": _arithmetic("gamma"),
    "dare_linear": _arithmetic(),
    "dare_ties": _arithmetic(),
    "della": _arithmetic("epsilon"),
    "della_linear": _arithmetic("epsilon"),
    "karcher": MergeMethod(base="alike", settings=("max_iter", "tol")),
    "linear": MergeMethod(base="alike", weighted=True, settings=("normalize",)),
    "model_stock": MergeMethod(base="needed", settings=("filter_wise",), fewest=2),
    "multislerp": MergeMethod(base="possible", weighted=True, settings=("normalize_weights", "eps")),
    "nearswap": MergeMethod(base="needed", settings=("t",), needed=("t",), most=1),
    "nuslerp": MergeMethod(
        base="possible", weighted=True, settings=("nuslerp_row_wise", "nuslerp_flatten"), fewest=2, most=2
    ),
    "passthrough": MergeMethod(base="alike", each=("scale",), most=1),
    "ram": MergeMethod(base="needed", settings=("epsilon",)),
    "ramplus_tl": MergeMethod(base="needed", settings=("r", "alpha", "epsilon")),
    "sce": MergeMethod(base="needed", settings=("int8_mask", "select_topk")),
    "slerp": MergeMethod(base="needed", settings=("t",), needed=("t",), most=1),
    "task_arithmetic": _arithmetic(),
    "ties": _arithmetic(),
}
"""Every method by mergekit's name, and `AVERAGE`."""

SWITCHES = frozenset(
    {
        "filter_wise",
        "int8_mask",
        "normalize",
        "normalize_weights",
        "nuslerp_flatten",
        "nuslerp_row_wise",
        "rescale",
    }
)
"""Settings that are true or false."""
COUNTS = frozenset({"max_iter"})
"""Settings that are whole numbers; all others are numbers."""
_SHARES = frozenset({"density", "select_topk"})
"""Numbers that say which part of a difference is kept."""
_POSITIVE = frozenset({("karcher", "tol"), ("multislerp", "eps"), ("ramplus_tl", "epsilon")})
"""Settings that mergekit divides by."""
_NOT_NEGATIVE = frozenset(
    {
        ("della", "epsilon"),
        ("della_linear", "epsilon"),
        ("nearswap", "t"),
        ("ram", "epsilon"),
        ("ramplus_tl", "alpha"),
    }
)
_DENSITY, _EPSILON = 1.0, 0.15
"""mergekit's defaults; the tests compare."""


def merge_problems(
    method: str,
    models: Sequence[str],
    *,
    base: bool = True,
    weights: Mapping[str, float] | None = None,
    parameters: Mapping[str, object] | None = None,
) -> list[str]:
    """Say what stands in the way of a merge; empty when nothing does. Imports neither torch nor mergekit.

    Args:
        method: A name of `METHODS`.
        models: The models beside the base.
        base: Whether the base takes part.
        weights: By model, or `BASE`.
        parameters: The method's settings by mergekit's names; one value, or values by model.
    """
    found = METHODS.get(method)
    if found is None:
        return [str(unknown_name("merge method", method, METHODS))]
    problems = _count_problems(method, found, len(models), base=base)
    problems += _weight_problems(method, found, models, weights or {})
    if not problems and _divides_by_sum(found, parameters or {}):
        problems += _sum_problems(models, weights or {}, base=base and found.base == "alike")
    for key, value in (parameters or {}).items():
        problems += _setting_problems(method, found, key, value, models)
    if not problems and "epsilon" in found.each:
        problems += _spread_problems(method, models, parameters or {})
    absent = [key for key in found.needed if key not in (parameters or {})]
    return problems + [f"parameters: method '{method}' needs '{key}'" for key in absent]


def _count_problems(method: str, found: MergeMethod, count: int, *, base: bool) -> list[str]:
    problems = []
    if found.base == "needed" and not base:
        problems.append(f"method '{method}' merges differences to the base, which is left out")
    count += base and found.base == "alike"
    if count < found.fewest or (found.most is not None and count > found.most):
        wanted = f"exactly {found.most}" if found.most == found.fewest else f"at least {found.fewest}"
        beside = "" if found.base == "alike" else " beside the base"
        problems.append(f"method '{method}' merges {wanted} models{beside}; {count} given")
    return problems


def _weight_problems(
    method: str, found: MergeMethod, models: Sequence[str], weights: Mapping[str, float]
) -> list[str]:
    if weights and not found.weighted:
        return [f"weights: method '{method}' has none; leave them out"]
    known = [*models, *([BASE] if found.base == "alike" else [])]
    problems = [f"weights: {unknown_name('model', name, known)}" for name in weights if name not in known]
    problems += [
        f"weights: {name} has {value}; a finite number is needed"
        for name, value in weights.items()
        if not math.isfinite(value)
    ]
    return problems


def _divides_by_sum(found: MergeMethod, parameters: Mapping[str, object]) -> bool:
    """Whether the weights are divided by their sum, as a mean's are, so that it must not be 0."""
    if not found.weighted:
        return False
    switch = next((key for key in ("normalize", "normalize_weights") if key in found.settings), None)
    on = switch is None or parameters.get(switch) is not False
    return on and (found.base == "alike" or switch == "normalize_weights")


def _sum_problems(models: Sequence[str], weights: Mapping[str, float], *, base: bool) -> list[str]:
    total = sum(weights.get(name, 1.0) for name in (*models, *([BASE] if base else [])))
    if models and math.isclose(total, 0, abs_tol=1e-8):
        return ["weights: they sum to 0; their mean is not defined"]
    return []


def _spread_problems(method: str, models: Sequence[str], parameters: Mapping[str, object]) -> list[str]:
    """Say where the odds of keeping a number, which go from density - epsilon to density + epsilon, are none."""

    def value(key: str, model: str, default: float) -> float:
        given = parameters.get(key, default)
        one = given.get(model, default) if isinstance(given, Mapping) else given
        assert isinstance(one, int | float), "checked before"
        return one

    found: dict[str, list[str]] = {}
    for model in models:
        density, epsilon = value("density", model, _DENSITY), value("epsilon", model, _EPSILON)
        if density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
            found.setdefault(f"density {density:g} and epsilon {epsilon:g}", []).append(model)
    rule = "density - epsilon must be above 0 and density + epsilon below 1, unless density is 1"
    shown = {
        values: "" if len(who) == len(models) else f" for {', '.join(who)}" for values, who in found.items()
    }
    return [f"parameters: method '{method}' has {values}{who}; {rule}" for values, who in shown.items()]


def _setting_problems(
    method: str, found: MergeMethod, key: str, value: object, models: Sequence[str]
) -> list[str]:
    allowed = [*found.settings, *found.each]
    if key not in allowed:
        near = difflib.get_close_matches(key, allowed, n=1, cutoff=0.5)
        guess = f"; did you mean '{near[0]}'?" if near else ""
        hint = " (give the models' weights under 'weights')" if key == "weight" else ""
        listed = f"; allowed are {', '.join(sorted(allowed))}" if allowed else "; it has none"
        return [f"parameters: method '{method}' has no '{key}'{hint}{guess or listed}"]
    if isinstance(value, Mapping):
        if key not in found.each:
            return [f"parameters: '{key}' of method '{method}' is one value for all models"]
        strangers = [
            f"parameters.{key}: {unknown_name('model', name, models)}" for name in value if name not in models
        ]
        return strangers + [
            f"parameters.{key}: '{name}' is {one!r}; {wanted} is needed"
            for name, one in value.items()
            if (wanted := _wanted(method, key, one))
        ]
    wanted = _wanted(method, key, value)
    return [f"parameters: '{key}' is {value!r}; {wanted} is needed"] if wanted else []


def _wanted(method: str, key: str, value: object) -> str | None:
    """Return what a setting's value should be; None where it is that already."""
    if key in SWITCHES:
        return None if isinstance(value, bool) else "true or false"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "a whole number" if key in COUNTS else "a number"
    if not math.isfinite(value):
        return "a finite number"
    if key in COUNTS:
        return None if isinstance(value, int) and value > 0 else "a whole number above 0"
    if key in _SHARES and not 0 < value <= 1:
        return "a number above 0 and at most 1"
    if key == "gamma" and not 0 <= value <= 1:  # the share of a difference's largest numbers that is dropped
        return "a number from 0 to 1"
    if (method, key) in _POSITIVE and value <= 0:
        return "a number above 0"
    if (method, key) in _NOT_NEGATIVE and value < 0:
        return "a number of at least 0"
    return None
