"""The table of scorers; the code is imported on demand."""

from __future__ import annotations

from experts.plugins import PluginTable

__all__ = ["SCORERS"]

SCORERS = PluginTable(
    "scorer",
    {
        "dume": "composer.routing.scorers.dume:DumeScorer",
        "lda": "composer.routing.scorers.lda:LDAScorer",
        "learned": "composer.routing.scorers.learned:LearnedScorer",
        "prompts": "composer.routing.scorers.prompts:PromptScorer",
        "random": "composer.routing.scorers.random:RandomScorer",
        "ridge": "composer.routing.scorers.ridge:RidgeScorer",
    },
)
"""name -> class. Others register theirs as an entry point of the group ``coterie.scorers``."""
