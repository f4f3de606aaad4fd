"""The tables of retrieval scorers and selectors; the code is imported on demand."""

from __future__ import annotations

from experts.plugins import PluginTable

__all__ = ["RETRIEVAL_SCORERS", "RETRIEVAL_SELECTORS"]

RETRIEVAL_SCORERS = PluginTable(
    "retrieval scorer",
    {
        "centroid": "composer.retrieval.scorers.centroid:Centroid",
        "lda": "composer.retrieval.scorers.lda:LDA",
        "pilot_logsumexp": "composer.retrieval.scorers.pilots:PilotLogSumExp",
        "pilot_max": "composer.retrieval.scorers.pilots:PilotMax",
        "pilot_mean": "composer.retrieval.scorers.pilots:PilotMean",
        "pilot_top_mean": "composer.retrieval.scorers.pilots:PilotTopMean",
        "ridge_utility": "composer.retrieval.scorers.ridge:RidgeUtility",
    },
)
"""name -> class. Others register theirs as an entry point of the group ``coterie.retrieval_scorers``."""

RETRIEVAL_SELECTORS = PluginTable(
    "retrieval selector",
    {
        "soft": "composer.retrieval.selectors:Soft",
        "top1": "composer.retrieval.selectors:Top1",
        "top2": "composer.retrieval.selectors:Top2",
    },
)
"""name -> class. Others register theirs as an entry point of the group ``coterie.retrieval_selectors``."""
