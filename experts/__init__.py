"""What an expert is: its card, its folder, its kinds, and the checks that admit it.

Knows the bytes of an expert and of the public anchor it belongs to; knows nothing of where experts are
stored, how they are routed, or torch. Names are imported on first use, so that ``import experts`` is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from experts.admission import ExpertSummary, check_expert, check_files
    from experts.base import BaseDescription
    from experts.card import ExpertCard
    from experts.kinds import get_kind
    from experts.package import pack, read_package
    from experts.routing_artifacts import RoutingArtifacts, RoutingInfo, Statistics

__all__ = [
    "BaseDescription",
    "ExpertCard",
    "ExpertSummary",
    "RoutingArtifacts",
    "RoutingInfo",
    "Statistics",
    "check_expert",
    "check_files",
    "get_kind",
    "pack",
    "read_package",
]

_HOME = {
    "BaseDescription": "experts.base",
    "ExpertCard": "experts.card",
    "ExpertSummary": "experts.admission",
    "RoutingArtifacts": "experts.routing_artifacts",
    "RoutingInfo": "experts.routing_artifacts",
    "Statistics": "experts.routing_artifacts",
    "check_expert": "experts.admission",
    "check_files": "experts.admission",
    "get_kind": "experts.kinds",
    "pack": "experts.package",
    "read_package": "experts.package",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'experts' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
