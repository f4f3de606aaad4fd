"""The table of selectors; the code is imported on demand."""

from __future__ import annotations

from experts.plugins import PluginTable

__all__ = ["SELECTORS"]

SELECTORS = PluginTable(
    "selector",
    {
        "topk": "composer.routing.selectors.topk:TopK",
        "topp": "composer.routing.selectors.topp:TopP",
    },
)
"""name -> class. Others register theirs as an entry point of the group ``coterie.selectors``."""
