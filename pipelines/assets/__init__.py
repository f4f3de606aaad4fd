"""Public models and text that the demo, the experiments and the benchmarks use, out of package registries.

Knows where each asset comes from, its digest and its licence, and caches what was fetched; knows nothing of
what is done with it. Light on import: the anchor's conversion is loaded when it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipelines.assets.fetch import asset_files, cache_folder
from pipelines.assets.table import ASSETS, Asset
from pipelines.assets.texts import TEXTS, DomainText, domain_text

if TYPE_CHECKING:
    from pipelines.assets.anchor import smollm2
    from pipelines.assets.embedder import minilm

__all__ = [
    "ASSETS",
    "TEXTS",
    "Asset",
    "DomainText",
    "asset_files",
    "cache_folder",
    "domain_text",
    "minilm",
    "smollm2",
]


def __getattr__(name: str) -> Any:
    if name == "smollm2":
        from pipelines.assets.anchor import smollm2

        return smollm2
    if name == "minilm":
        from pipelines.assets.embedder import minilm

        return minilm
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
