"""The table of recipes; the code is imported on demand."""

from __future__ import annotations

from experts.plugins import PluginTable

__all__ = ["RECIPES"]

RECIPES = PluginTable(
    "recipe",
    {
        "bam": "composer.recipes.bam:BAM",
        "btx": "composer.recipes.btx:BTX",
        "flexolmo": "composer.recipes.flexolmo:FlexOlmo",
        "merge": "composer.recipes.merge:Merge",
        "router_retriever": "composer.recipes.router_retriever:RouterRetriever",
        "soup": "composer.recipes.merge:Soup",
        "sparse_upcycle": "composer.recipes.sparse_upcycle:SparseUpcycle",
    },
)
"""name -> class. Others register theirs as an entry point of the group ``coterie.recipes``."""
