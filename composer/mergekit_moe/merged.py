"""A model with its adapter added, as a folder of its own: for what takes whole models only.

A few rows of one weight are in memory at a time. Knows files and tensors; knows nothing of mixtures.
"""

from __future__ import annotations

from pathlib import Path

from composer.building import link_file
from composer.export.shards import write_shards
from composer.export.tensors import Entry
from composer.mergekit_moe.matrices import Weight
from composer.mergekit_moe.sources import SourceModel
from experts.fingerprint import tokenizer_files
from experts.safetensors_header import TensorSpec

__all__ = ["whole_folder"]


def whole_folder(model: SourceModel, scratch: Path) -> Path:
    """Return the folder of a model as it is, or, where an adapter is to be added, a merged copy.

    Args:
        model: ``W`` becomes ``W + s B A``, summed in float32 and rounded once to the stored dtype.
        scratch: Where the copy is written; must not exist.

    Raises:
        BuildError: The copy cannot be written.
    """
    if model.adapter is None:
        return model.folder
    scratch.mkdir()
    write_shards(scratch, [_entry(model, name) for name in model.tensors])
    for path in (model.folder / "config.json", *tokenizer_files(model.folder)):
        link_file(path, scratch / path.name, copy=True)
    return scratch


def _entry(model: SourceModel, name: str) -> Entry:
    weight = Weight.of(model, name)
    dtype = weight.stored.dtype
    return Entry(name=name, spec=TensorSpec(dtype=dtype, shape=weight.shape), source=weight.parts(dtype))
