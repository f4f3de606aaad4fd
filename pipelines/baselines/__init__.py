"""Training-free ways to use several experts without composing them: what a composition is compared with.

Names each baseline and imports it on first use; other distributions add baselines through the entry-point group
``coterie.baselines``. Light on import.
"""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any

from experts.errors import ManifestError
from experts.names import unknown_name
from experts.plugins import PluginTable

if TYPE_CHECKING:
    from pipelines.baselines.arm import Arm, score
    from pipelines.baselines.comparison import compare
    from pipelines.baselines.context import BaselineContext
    from pipelines.baselines.dense import write_dense

__all__ = ["BASELINES", "Arm", "BaselineContext", "compare", "make_baseline", "score", "write_dense"]

BASELINES = PluginTable(
    "baseline",
    {
        "anchor": "pipelines.baselines.dense:make_anchor",
        "btm": "pipelines.baselines.btm:make",
        "dare_ties": "pipelines.baselines.merge:make_dare_ties",
        "oracle": "pipelines.baselines.oracle:make",
        "prompt_router": "pipelines.baselines.prompt_router:make",
        "single": "pipelines.baselines.dense:make_single",
        "soup": "pipelines.baselines.merge:make_soup",
        "ties": "pipelines.baselines.merge:make_ties",
        "weighted_soup": "pipelines.baselines.merge:make_weighted_soup",
    },
)
"""Baseline name to ``module:callable``; called with a `BaselineContext` and keyword options, it returns an `Arm`."""

_HOME = {
    "Arm": "pipelines.baselines.arm",
    "BaselineContext": "pipelines.baselines.context",
    "compare": "pipelines.baselines.comparison",
    "score": "pipelines.baselines.arm",
    "write_dense": "pipelines.baselines.dense",
}


def make_baseline(name: str, context: BaselineContext, **options: Any) -> Arm:
    """Make one arm of a comparison.

    Args:
        name: A row of `BASELINES`.
        context: The anchor and the experts. Leaving an owner out is not listing them.
        options: The baseline's own; see its ``make``.

    Raises:
        UnknownNameError: There is no such baseline, or an option names an unknown domain.
        ManifestError: The baseline has no such option, lacks one, or one has a value that is not allowed.
        ConsentError: An expert's owner has opted out.
        PlanError: An expert does not belong to the anchor, or publishes too little for this baseline.
    """
    make = BASELINES.load(name)
    allowed = {
        parameter.name: parameter
        for parameter in inspect.signature(make).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    for given in options:
        if given not in allowed:
            raise ManifestError(f"Baseline '{name}': {unknown_name('option', given, allowed)}")
    needed = [key for key, parameter in allowed.items() if parameter.default is parameter.empty]
    missing = [key for key in needed if key not in options]
    if missing:
        raise ManifestError(f"Baseline '{name}' needs the option '{missing[0]}'; it was not given.")
    arm: Arm = make(context, **options)
    return arm


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'pipelines.baselines' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
