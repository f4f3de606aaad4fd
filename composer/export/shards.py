"""Writes tensors to safetensors shards one after the other; memory does not grow with the bytes.

What lies in a file already is copied by the kernel. Knows the format
(https://github.com/huggingface/safetensors#format) and transformers' index; knows nothing of the tensors' use.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from composer.export.tensors import Entry, Part, Slice
from experts.errors import BuildError
from experts.files import capped
from experts.fingerprint import MAX_BASE_TENSORS
from experts.safetensors_header import MAX_BASE_HEADER, read_header
from experts.schema import compare_schema

__all__ = ["SHARD_BYTES", "write_file", "write_shards"]

SHARD_BYTES = 5_000_000_000
"""Tensor bytes of a shard, transformers' own default; a larger tensor has a shard of its own."""

INDEX = "model.safetensors.index.json"

_BLOCK = 8 << 20
_FLUSH_BYTES = 16 << 20
_FALL_BACK = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)

Progress = Callable[[str, int], None]
"""Called with the name and the bytes of every tensor that was written."""


def write_shards(
    folder: Path,
    entries: Sequence[Entry],
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> list[Path]:
    """Write ``model.safetensors``, or shards with their index, and read every header back.

    Args:
        folder: An existing folder.
        entries: The tensors, in the order in which they are written.
        shard_bytes: Tensor bytes of a shard.
        progress: Told of every tensor.

    Returns:
        The files.

    Raises:
        BuildError: A tensor that was to be written is not in its file, or the header differs.
    """
    groups = list(_grouped(entries, shard_bytes))
    if len(groups) == 1:
        names = ["model.safetensors"]
    else:
        names = [f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)]
    for name, group in zip(names, groups, strict=True):
        write_file(folder / name, group, progress=progress)
    if len(groups) > 1:
        weight_map = {entry.name: name for name, group in zip(names, groups, strict=True) for entry in group}
        index = {
            "metadata": {"total_size": sum(entry.spec.nbytes for entry in entries)},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [folder / name for name in names]


def _grouped(entries: Sequence[Entry], shard_bytes: int) -> Iterator[list[Entry]]:
    group: list[Entry] = []
    size = 0
    for entry in entries:
        if group and size + entry.spec.nbytes > shard_bytes:
            yield group
            group, size = [], 0
        group.append(entry)
        size += entry.spec.nbytes
    yield group


def write_file(path: Path, entries: Sequence[Entry], *, progress: Progress | None = None) -> None:
    """Write one safetensors file and check that every tensor reached it; see `write_shards`."""
    header = _header(entries)
    with path.open("xb", buffering=0) as out, _OpenFiles() as files, _Flusher(out) as flusher:
        out.write(header)
        for entry in entries:
            parts = entry.source if isinstance(entry.source, tuple) else (entry.source,)
            written = sum(_write(part, out, files) for part in parts)
            assert written == entry.spec.nbytes, entry.name
            flusher.wrote(written)
            if progress is not None:
                progress(entry.name, entry.spec.nbytes)
    _check(path, entries, header)


def _header(entries: Sequence[Entry]) -> bytes:
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for entry in entries:
        end = position + entry.spec.nbytes
        table[entry.name] = {
            "dtype": entry.spec.dtype,
            "shape": list(entry.spec.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks for aligned tensors
    return len(text).to_bytes(8, "little") + text


def _write(part: Part, out: BinaryIO, files: _OpenFiles) -> int:
    if isinstance(part, Slice):
        _copy(files.open(part.path), out, start=part.start, count=part.spec.nbytes)
        return part.spec.nbytes
    data = memoryview(part())
    size = len(data)
    while data:
        data = data[out.write(data) :]
    return size


def _copy(source: BinaryIO, out: BinaryIO, *, start: int, count: int) -> None:
    """Copy bytes within the kernel where the file systems can, else through a buffer of a fixed size."""
    end = start + count
    try:
        while start < end:
            done = os.copy_file_range(source.fileno(), out.fileno(), end - start, start)
            if not done:
                break
            start += done
    except OSError as error:
        if error.errno not in _FALL_BACK:
            raise
    while start < end:
        block = os.pread(source.fileno(), min(_BLOCK, end - start), start)
        if not block:
            raise BuildError(f"{source.name} became shorter while it was copied. Build the folder again.")
        start += len(block)
        view = memoryview(block)
        while view:
            view = view[out.write(view) :]


class _Flusher:
    """Context manager: lets the disk work while the file is still being written, so that its last sync is short.

    An error of a sync is raised here: the system tells it once, so whoever syncs later would not meet it.
    """

    def __init__(self, out: BinaryIO) -> None:
        self._descriptor = out.fileno()
        self._pending = 0
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="flush")
        self._running: Future[None] | None = None

    def wrote(self, count: int) -> None:
        """Begin a sync where enough has been written since the last one began, and that one is done."""
        self._pending += count
        if self._pending < _FLUSH_BYTES or not (self._running is None or self._running.done()):
            return
        if self._running is not None:
            self._running.result()
        self._pending = 0
        self._running = self._worker.submit(os.fdatasync, self._descriptor)

    def __enter__(self) -> _Flusher:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._worker.shutdown()
        if kind is None and self._running is not None:
            self._running.result()


class _OpenFiles:
    """Context manager: keeps the file open that was read last, as neighbours usually lie in one file."""

    def __enter__(self) -> _OpenFiles:
        self._path: Path | None = None
        self._file: BinaryIO | None = None
        return self

    def open(self, path: Path) -> BinaryIO:
        """Return the file, open for reading."""
        if self._file is None or path != self._path:
            self.__exit__()
            self._path, self._file = path, path.open("rb", buffering=0)
        return self._file

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _check(path: Path, entries: Sequence[Entry], header: bytes) -> None:
    """Read the header back: loaders say nothing of a tensor that is missing under the name they expect."""
    with path.open("rb") as file:
        found = hashlib.sha256(file.read(len(header))).hexdigest()
    tensors = read_header(path, max_header=MAX_BASE_HEADER, max_tensors=MAX_BASE_TENSORS).tensors
    problems = compare_schema(tensors, {entry.name: entry.spec for entry in entries})
    if found != hashlib.sha256(header).hexdigest():
        problems.append(f"the header's sha256 is {found}, another one was written")
    if problems:
        raise BuildError(f"{path.name} does not hold what was written to it:", problems=capped(problems))
