"""The table of recipes; the code is imported on demand."""

from __future__ import annotations

from experts.plugins import PluginTable

__all__ = ["RECIPES"]

RECIPES = PluginTable(
    "recipe",
    {
        "flexolmo": "composer.recipes.flexolmo:FlexOlmo",
    },
)
"""name -> class. Others register theirs as an entry point of the group ``coterie.recipes``."""
