"""Makes one model out of experts and runs it: manifest, plan, build, load, routing, opt-out.

Importing this package loads no torch; names are imported on first use. ``import composer.hf`` registers composed
models with the Auto classes of transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from composer.building import build
    from composer.editing import add_experts, remove_experts
    from composer.loading import load
    from composer.manifest import Manifest
    from composer.planning import Plan, plan
    from composer.trace import RoutingTrace
    from composer.verify import verify_optout

__all__ = [
    "Manifest",
    "Plan",
    "RoutingTrace",
    "add_experts",
    "build",
    "load",
    "plan",
    "remove_experts",
    "verify_optout",
]

_HOME = {
    "Manifest": "composer.manifest",
    "Plan": "composer.planning",
    "RoutingTrace": "composer.trace",
    "add_experts": "composer.editing",
    "build": "composer.building",
    "load": "composer.loading",
    "plan": "composer.planning",
    "remove_experts": "composer.editing",
    "verify_optout": "composer.verify",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'composer' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
