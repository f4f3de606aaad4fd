"""Pickled checkpoints: found by name, never read, and how their owner turns them into safetensors.

Knows file names; opens none of them.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["conversion"]

_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "model.pt")


def conversion(folder: Path) -> str | None:
    """Return which pickle a folder holds and the command that converts it; None where there is none."""
    found = next((name for name in _PICKLES if (folder / name).exists()), None)
    if found is None:
        return None
    if not found.startswith("pytorch_model"):
        return (
            f"{found} is a pickle, which is never read; convert it where you trust it, with the script of transformers "
            "for this model, into a folder of safetensors"
        )
    if (folder / "modules.json").exists():
        call = f"from sentence_transformers import SentenceTransformer as M; M('{folder}')"
    else:
        call = (
            f"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{folder}', dtype='auto')"
        )
    return (
        f"{found} is a pickle, which is never read; convert it where you trust it: "
        f"python -c \"{call}.save_pretrained('NEW_FOLDER')\""
    )
