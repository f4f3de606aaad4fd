"""Merging the same tensor of several models into one, by mergekit's methods or as a plain mean.

mergekit gets tensors, never folders: nothing is written, and its class-level cache of open checkpoints (which serves a
folder that was rewritten in place from its old content) stays empty. Knows nothing of models, owners or files.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from experts.names import unknown_name

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "AVERAGE",
    "BASE",
    "COUNTS",
    "METHODS",
    "SWITCHES",
    "MergeMethod",
    "merge_problems",
    "merge_tensors",
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
    for key, value in (parameters or {}).items():
        problems += _setting_problems(method, found, key, value, models)
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
    if not problems and found.base == "alike" and models:
        total = sum(weights.get(name, 1.0) for name in models)
        if total + weights.get(BASE, 0.0) == 0:
            problems.append("weights: they sum to 0; their mean is not defined")
    return problems


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
            if (wanted := _wanted(key, one))
        ]
    wanted = _wanted(key, value)
    return [f"parameters: '{key}' is {value!r}; {wanted} is needed"] if wanted else []


def _wanted(key: str, value: object) -> str | None:
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
    return None


def merge_tensors(
    tensors: Mapping[str, Tensor],
    *,
    method: str,
    base: Tensor | None = None,
    weights: Mapping[str, float] | None = None,
    parameters: Mapping[str, Any] | None = None,
    name: str,
    seed: int = 0,
) -> Tensor:
    """Merge one tensor of several models.

    The result depends on nothing but the arguments: what a method draws at random comes from the seed and the name.

    Args:
        tensors: By model, all of one shape, in the order of the sums. Not changed.
        method: A name of `METHODS`; the arguments must be free of `merge_problems`.
        base: The base's tensor, if it takes part: as what differences are taken to, or as the first model.
        weights: By model, or `BASE`; 1 where nothing is said.
        parameters: The method's settings; one value, or values by model.
        name: Of the tensor.
        seed: Of the draws.

    Returns:
        float32, on the CPU, so that every machine with one kind of processor rounds alike.
    """
    import torch

    inputs = {**({} if base is None else {BASE: base}), **tensors}
    wanted = {key: (weights or {}).get(key, 1.0) for key in inputs}
    if method == AVERAGE:
        return _mean(inputs, wanted)
    from mergekit.merge_methods import merge_tensors as merge

    found = METHODS[method]
    settings = dict(parameters or {})
    if found.weighted:
        if found.base != "alike":
            wanted.pop(BASE, None)
        settings["weight"] = wanted
    for key in found.each:
        if isinstance(settings.get(key), Mapping):
            settings[key] = _completed(method, key, settings[key], list(tensors))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(_tensor_seed(seed, name))
        merged: Tensor = merge(
            [tensor.cpu() for tensor in inputs.values()],
            method,
            parameters=settings,
            ids=list(inputs),
            base_index=0 if base is not None and found.base != "alike" else None,
            name=name,
            dtype=torch.float32,
        )
    return merged.float()


def _mean(inputs: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Return ``sum_j w_j T_j / sum_j w_j``; models of weight 0 are not touched."""
    import torch

    total: Tensor | None = None
    with torch.no_grad():
        for key, tensor in inputs.items():
            if weights[key] == 0:
                continue
            part = tensor.detach().to("cpu", torch.float32)
            part = part if weights[key] == 1 else part * weights[key]
            total = part.clone() if total is None else total.add_(part)
        assert total is not None
        return total.div_(sum(weights.values()))


def _completed(method: str, key: str, values: Mapping[str, Any], models: Sequence[str]) -> dict[str, Any]:
    """Give every model a value: mergekit's default where the mapping says nothing."""
    from mergekit.merge_methods import get

    default = next(spec.default for spec in get(method).spec.parameters if spec.name == key)
    return {model: values.get(model, default) for model in models}


def _tensor_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")
