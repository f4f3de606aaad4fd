"""The table of expert kinds.

Names each kind and imports it on first use; other distributions add kinds through the entry-point group
``coterie.expert_kinds``. Knows nothing of any kind in particular.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from experts.errors import AdmissionError
from experts.plugins import PluginTable

if TYPE_CHECKING:
    from experts.kinds.kind import ExpertKind

__all__ = ["KINDS", "detect_kind", "get_kind"]

KINDS = PluginTable(
    "expert kind",
    {
        "dense": "experts.kinds.dense:DenseKind",
        "ffn": "experts.kinds.ffn:FFNKind",
        "lora": "experts.kinds.lora:LoraKind",
        "retriever": "experts.kinds.retriever:RetrieverKind",
    },
)
"""Kind name to ``module:Class``."""


@cache
def get_kind(name: str) -> ExpertKind:
    """Return the kind of that name.

    Raises:
        UnknownNameError: No such kind.
    """
    kind: ExpertKind = KINDS.load(name)()
    return kind


def detect_kind(folder: Path, *, embeds: bool = False) -> ExpertKind:
    """Return the kind whose files the folder holds.

    Args:
        folder: The raw folder.
        embeds: Whether the base is an embedding model; an adapter's files do not say what it is for.

    Raises:
        AdmissionError: None or several fit.
    """
    kinds = [kind for name in KINDS if (kind := get_kind(name)).embeds == embeds]
    fitting = [kind for kind in kinds if kind.detect(folder)]
    if len(fitting) == 1:
        return fitting[0].form({path.name for path in folder.iterdir()})
    if fitting:
        names = " and ".join(kind.name for kind in fitting)
        raise AdmissionError(
            f"'{folder}' holds the files of several kinds of expert: {names}; keep one of them."
        )
    raise AdmissionError(
        f"'{folder}' is not an expert folder{_hint(folder)}. Looked for:",
        problems=[f"{form.name}: {_listed(form.files)}" for kind in kinds for form in kind.forms],
    )


def _listed(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _hint(folder: Path) -> str:
    if not folder.is_dir():
        return ": there is no such folder"
    if (folder / "adapter_model.bin").exists():
        return (
            ": adapter_model.bin is a pickle, which is never read; save the adapter again with "
            "save_pretrained(..., safe_serialization=True)"
        )
    hints = (form.hint(folder) for name in KINDS for form in get_kind(name).forms)
    return next((f": {hint}" for hint in hints if hint), "")
