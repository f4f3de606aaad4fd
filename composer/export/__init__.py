"""The table of stock checkpoints that a composition can be written as; the code is imported on demand.

Knows names; knows nothing of the classes.
"""

from __future__ import annotations

from experts.plugins import PluginTable

__all__ = ["TARGETS"]

TARGETS = PluginTable(
    "export target",
    {
        "flex_olmo": "composer.export.flex_olmo:FlexOlmoTarget",
        "mixtral": "composer.export.mixtral:MixtralTarget",
        "olmoe": "composer.export.olmoe:OlmoeTarget",
        "qwen3_moe": "composer.export.qwen3_moe:Qwen3MoeTarget",
    },
)
"""name -> class. Others register theirs as an entry point of the group ``coterie.export_targets``."""
