"""Fingerprints: which public anchor and which tokenizer an expert was made for.

Streams the files, so memory does not grow with them. Knows checkpoints in safetensors, in one file or in
shards with an index; knows nothing of what the tensors mean.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from experts.errors import AdmissionError
from experts.files import CHUNK, capped, open_regular, sha256_file
from experts.pickles import conversion
from experts.safetensors_header import (
    MAX_BASE_HEADER,
    StoredTensor,
    TensorSpec,
    read_header,
    read_header_from,
)
from experts.strict import load_json

__all__ = [
    "INDEX",
    "MAX_BASE_TENSORS",
    "WEIGHTS",
    "checkpoint_files",
    "describe_checkpoint",
    "fingerprint_tensors",
    "tokenizer_files",
    "tokenizer_fingerprint",
]

MAX_BASE_TENSORS = 1 << 16

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_VOCABULARIES = (
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "added_tokens.json",
)

Progress = Callable[[int], None]
"""Called with the number of bytes just read."""


def fingerprint_tensors(folder: Path, *, progress: Progress | None = None) -> str:
    """Return the sha256, in hexadecimal, over the sorted (name, dtype, shape, sha256) of every tensor.

    Independent of how the checkpoint is split into files and of the order within them.

    Raises:
        AdmissionError: The folder holds no well-formed safetensors checkpoint.
    """
    return describe_checkpoint(folder, progress=progress)[1]


def describe_checkpoint(
    folder: Path, *, progress: Progress | None = None
) -> tuple[dict[str, TensorSpec], str]:
    """Return every tensor's dtype and shape by sorted name, and the fingerprint of them all."""
    lines: list[bytes] = []
    specs: dict[str, TensorSpec] = {}
    for path, tensors in checkpoint_files(folder).items():
        with open_regular(path, follow_symlinks=True) as stream:
            # the header is read again from this very handle: what is hashed is what was described
            header = read_header_from(
                stream, what=f"'{path.name}'", max_header=MAX_BASE_HEADER, max_tensors=MAX_BASE_TENSORS
            )
            if header.tensors != tensors:
                raise AdmissionError(f"'{path.name}' changed while it was read; try again.")
            for name, tensor in header.tensors.items():
                stream.seek(tensor.start)
                digest = _digest(stream.readinto, tensor, progress=progress)  # type: ignore[attr-defined]
                specs[name] = TensorSpec(dtype=tensor.dtype, shape=tensor.shape)
                lines.append(json.dumps([name, tensor.dtype, list(tensor.shape), digest]).encode() + b"\n")
    ordered = {name: specs[name] for name in sorted(specs)}
    return ordered, hashlib.sha256(b"".join(sorted(lines))).hexdigest()


def _digest(readinto: Callable[[memoryview], int], tensor: StoredTensor, *, progress: Progress | None) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(CHUNK, tensor.nbytes)))
    left = tensor.nbytes
    while left:
        count = readinto(buffer[: min(len(buffer), left)])
        if not count:
            raise AdmissionError("The file became shorter while it was read; try again.")
        digest.update(buffer[:count])
        left -= count
        if progress is not None:
            progress(count)
    return digest.hexdigest()


def checkpoint_files(folder: Path) -> dict[Path, Mapping[str, StoredTensor]]:
    """Return the files of a checkpoint and the tensors in each, checked against the index where there is one.

    Raises:
        AdmissionError: No checkpoint, a tensor in two shards, or an index that does not match the shards.
    """
    if (folder / INDEX).exists():
        return _sharded(folder)
    if (folder / WEIGHTS).exists():
        return {folder / WEIGHTS: _read(folder / WEIGHTS)}
    pickle = conversion(folder)
    if pickle is not None:
        raise AdmissionError(f"'{folder}' holds no safetensors: {pickle}")
    raise AdmissionError(
        f"'{folder}' holds neither {WEIGHTS} nor {INDEX}; save the base with save_pretrained "
        "(pickled checkpoints are never read)."
    )


def _read(path: Path) -> Mapping[str, StoredTensor]:
    return read_header(
        path, max_header=MAX_BASE_HEADER, max_tensors=MAX_BASE_TENSORS, follow_symlinks=True
    ).tensors


def _sharded(folder: Path) -> dict[Path, Mapping[str, StoredTensor]]:
    weight_map = _weight_map(folder / INDEX)
    _check_present(folder, weight_map)
    shards = {folder / name: _read(folder / name) for name in sorted(set(weight_map.values()))}
    held: dict[str, str] = {}
    problems = []
    for path, tensors in shards.items():
        for name in tensors:
            if name in held:
                problems.append(f"tensor '{name}': in {held[name]} and in {path.name}; keep one")
            elif weight_map.get(name) != path.name:
                listed = weight_map.get(name, "no file")
                problems.append(f"tensor '{name}': found in {path.name}, listed under {listed}")
            held[name] = path.name
    problems += [
        f"tensor '{n}': listed under {f}, not found there" for n, f in weight_map.items() if n not in held
    ]
    if problems:
        raise AdmissionError(f"The shards in '{folder}' do not match {INDEX}:", problems=capped(problems))
    return shards


def _check_present(folder: Path, weight_map: Mapping[str, str]) -> None:
    counts = Counter(weight_map.values())
    absent = [name for name in sorted(counts) if not (folder / name).exists()]
    if absent:
        raise AdmissionError(
            f"{INDEX} lists {len(counts)} shards, and {len(absent)} of them are not in '{folder}'; download or copy "
            "them there:",
            problems=capped([f"{name}: {counts[name]} tensors" for name in absent]),
        )


def _weight_map(path: Path) -> dict[str, str]:
    index = load_json(path, what=INDEX, max_bytes=MAX_BASE_HEADER, error=AdmissionError)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise AdmissionError(f"{INDEX} has no weight_map of tensor names to file names.")
    for name, file in weight_map.items():
        if not isinstance(file, str) or "/" in file or "\0" in file or not file.endswith(".safetensors"):
            raise AdmissionError(
                f"{INDEX} lists tensor {name!r} under {file!r}; a .safetensors file in the same folder is "
                "needed."
            )
    return weight_map


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files that decide which ids a text gets: ``tokenizer.json``, else the vocabulary files."""
    fast = folder / "tokenizer.json"
    return [fast] if fast.exists() else [folder / name for name in _VOCABULARIES if (folder / name).exists()]


def tokenizer_fingerprint(folder: Path) -> str:
    """Return the sha256, in hexadecimal, over (name, sha256) of the `tokenizer_files`.

    A folder without any of them has the fingerprint of the empty list.
    """
    entries = [[path.name, sha256_file(path, follow_symlinks=True)] for path in tokenizer_files(folder)]
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()
