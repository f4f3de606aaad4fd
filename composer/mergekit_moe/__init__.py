"""Mixtures from mergekit-moe's manifests, unchanged: the same checkpoints, and those that mergekit gets wrong.

What is written is a stock checkpoint without owners; compositions that an owner can leave are made from coterie's own
manifests.
"""

from __future__ import annotations

from composer.mergekit_moe.manifest import MoEManifest, is_mergekit_moe, read_manifest
from composer.mergekit_moe.planning import MoEPlan, plan_moe

__all__ = ["MoEManifest", "MoEPlan", "is_mergekit_moe", "plan_moe", "read_manifest"]
