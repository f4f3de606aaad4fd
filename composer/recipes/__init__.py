"""The table of recipes; the code is imported on demand."""

from __future__ import annotations

from pathlib import Path

from experts.errors import BuildError
from experts.plugins import PluginTable

__all__ = ["RECIPES", "require_language_model"]

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


def require_language_model(source: Path, recipe: str) -> None:
    """Refuse what only language models can do.

    Args:
        source: The composed folder, or the manifest.
        recipe: Its recipe.

    Raises:
        BuildError: The recipe's models encode texts and predict none.
    """
    if not RECIPES.load(recipe).generates:
        raise BuildError(
            f"{source} is a retriever (recipe '{recipe}'): it encodes texts and predicts none. Search with it: "
            "coterie index, coterie search; measure it: coterie evaluate."
        )
