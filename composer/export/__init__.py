"""The table of stock checkpoints that a composition can be written as; the code is imported on demand.

No dense family of transformers has OLMoE's blocks (norms before them, and QK-norm over the whole projection), so
no composition is exactly an OLMoE and there is no such target.
"""

from __future__ import annotations

from experts.plugins import PluginTable

__all__ = ["TARGETS"]

TARGETS = PluginTable(
    "export target",
    {
        "flex_olmo": "composer.export.flex_olmo:FlexOlmoTarget",
        "mixtral": "composer.export.mixtral:MixtralTarget",
        "qwen3_moe": "composer.export.qwen3_moe:Qwen3MoeTarget",
    },
)
"""name -> class. Others register theirs as an entry point of the group ``coterie.export_targets``."""
