"""Public anchors in the registry: their files, their description, and public routing artefacts beside them.

Knows which files of a model folder an anchor consists of; knows nothing of the experts made for it.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Literal, Self

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict

from experts.base import ENCODER_PREFIX, BaseDescription
from experts.card import Digest, FileEntry
from experts.embedding import EMBEDDING_FILES
from experts.errors import IntegrityError, RegistryError
from experts.files import open_regular, sha256_file
from experts.fingerprint import checkpoint_files, tokenizer_fingerprint
from experts.names import OWNER_PATTERN, unknown_name
from experts.routing_artifacts import RoutingInfo
from experts.routing_origin import AnchorInfo, check_anchor, load_public
from experts.strict import load_json, validate
from registry import index
from registry.blobs import Staging
from registry.records import BaseRecord
from registry.storage import Storage

__all__ = ["Progress", "StoredBase", "StoredRouting", "add_base", "all_bases", "get_base", "set_base_routing"]

Progress = Callable[[int, int], None]
"""Called with the bytes copied and hashed so far and the bytes in all."""

_SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "model.safetensors.index.json",
    "README.md",
    "LICENSE*",
)
_MAX_RECORD_BYTES = 4 << 20


class _Stored(BaseModel):
    """A record that is kept as a blob."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format_version: Literal[1] = 1

    def to_bytes(self) -> bytes:
        """Return the canonical bytes, whose SHA-256 names the blob."""
        import rfc8785

        return rfc8785.dumps(self.model_dump(mode="json"))

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read what `to_bytes` wrote.

        Raises:
            IntegrityError: The bytes are something else.
        """
        what = cls.__doc__ or cls.__name__
        value = load_json(data, what=what, max_bytes=_MAX_RECORD_BYTES, error=IntegrityError)
        return validate(cls, value, what=what, error=IntegrityError)


class StoredBase(_Stored):
    """record of a base"""  # noqa: D415 (used as a noun in messages)

    name: str
    fingerprint: Digest
    tokenizer_fingerprint: Digest
    files: tuple[FileEntry, ...]
    description: Digest


class StoredRouting(_Stored):
    """record of a base's routing artefacts"""  # noqa: D415 (used as a noun in messages)

    base: str
    info: RoutingInfo
    sha256: Digest
    size: int


def add_base(storage: Storage, folder: Path, *, name: str, progress: Progress | None) -> BaseRecord:
    """Copy an anchor's files into the registry. Errors: see `registry.Registry.add_base`."""
    _check_base_name(name)
    paths = _anchor_files(folder)
    with storage.read() as connection:
        present = _find_base(storage, connection, name)
    if present is not None:
        _require_same_files(present, folder, paths)
        return present
    doing = f"adding the base '{name}'"
    with storage.staging(doing=doing) as staging:
        # Every byte is read twice, once to copy it and once for the fingerprint.
        meter = _Meter(progress, total=2 * sum(path.stat().st_size for path in paths.values()))
        files = _stage_files(staging, paths, meter=meter)
        description = BaseDescription.from_folder(staging.folder, progress=meter.advance)
        stored = StoredBase(
            name=name,
            fingerprint=description.fingerprint,
            tokenizer_fingerprint=tokenizer_fingerprint(staging.folder),
            files=files,
            description=staging.add(description.to_json().encode(), ".description.json"),
        )
        digest = staging.add(stored.to_bytes(), ".record.json")
        staging.publish()
        meter.finish()
    with storage.write(doing=doing) as connection:
        if _find_base(storage, connection, name) is None:
            detail = {"fingerprint": stored.fingerprint, "record": digest}
            storage.record(connection, "base.add", subject=name, detail=detail)
    # Another process may have added a base of this name meanwhile.
    record = get_base(storage, name)
    _require_same_files(record, folder, paths)
    return record


def set_base_routing(storage: Storage, name: str, *, folder: Path, info: RoutingInfo) -> BaseRecord:
    """Attach public routing artefacts. Errors: see `registry.Registry.set_base_routing`."""
    base = get_base(storage, name)
    doing = f"attaching routing artefacts to the base '{name}'"
    with storage.staging(doing=doing) as staging:
        with open_regular(folder / info.file) as stream:
            size, sha256 = staging.copy(stream.fileno(), info.file)
        load_public(staging.folder, info, hidden_size=base.description.hidden_size)
        check_anchor(
            info.anchor,
            AnchorInfo.of(base),
            what=f"the base '{name}'",
            advice=f"Make them on this base: coterie base public-routing {name} --text FILE",
        )
        stored = StoredRouting(base=name, info=info, sha256=sha256, size=size)
        digest = staging.add(stored.to_bytes(), ".record.json")
        staging.publish()
    with storage.write(doing=doing) as connection:
        version, present = _newest_routing(connection, name) or (0, "")
        if present != digest:
            storage.record(
                connection, "base.routing", subject=name, detail={"version": version + 1, "record": digest}
            )
    return get_base(storage, name)


def all_bases(storage: Storage) -> list[BaseRecord]:
    """Return every base by name."""
    with storage.read() as connection:
        names = connection.scalars(sa.select(index.bases.c.name).order_by(index.bases.c.name)).all()
        found = [_find_base(storage, connection, name) for name in names]
    return [record for record in found if record is not None]


def get_base(storage: Storage, name: str) -> BaseRecord:
    """Return one base.

    Raises:
        UnknownNameError: There is none of this name.
    """
    with storage.read() as connection:
        record = _find_base(storage, connection, name)
        known = connection.scalars(sa.select(index.bases.c.name)).all()
    if record is None:
        advice = f"Add it to the registry '{storage.root}' with: coterie base add PATH --name {name}"
        raise unknown_name("base", name, known, advice=advice)
    return record


def _find_base(storage: Storage, connection: sa.Connection, name: str) -> BaseRecord | None:
    row = connection.execute(sa.select(index.bases).where(index.bases.c.name == name)).one_or_none()
    if row is None:
        return None
    stored = StoredBase.from_bytes(storage.blobs.read(row.record))
    newest = _newest_routing(connection, name)
    routing = StoredRouting.from_bytes(storage.blobs.read(newest[1])) if newest else None
    return BaseRecord(
        name=name,
        fingerprint=stored.fingerprint,
        tokenizer_fingerprint=stored.tokenizer_fingerprint,
        files=stored.files,
        created=row.created,
        routing=routing.info if routing else None,
        routing_sha256=routing.sha256 if routing else None,
        describe=cache(lambda: BaseDescription.from_json(storage.blobs.read(stored.description))),
    )


def _newest_routing(connection: sa.Connection, base: str) -> tuple[int, str] | None:
    """Return the version and the record's digest."""
    columns = index.base_routings.c
    query = sa.select(columns.version, columns.record).where(columns.base == base)
    row = connection.execute(query.order_by(columns.version.desc()).limit(1)).one_or_none()
    return (row.version, row.record) if row else None


def _check_base_name(name: str) -> None:
    if not OWNER_PATTERN.fullmatch(name):
        raise RegistryError(
            f"'{name}' is not a name for a base: use 1 to 64 lower-case letters, digits, '_', '.' or '-', "
            "starting with a letter or digit, for instance 'smollm2'."
        )


def _anchor_files(folder: Path) -> dict[str, Path]:
    """Return the files to take, by path in the folder: the checkpoint's own shards and the listed files beside them.

    Links are followed: the caches of model hubs consist of them, and the folder is the user's own.
    """
    if not folder.is_dir():
        raise RegistryError(
            f"The base folder '{folder}' does not exist or is not a folder: give a model's folder."
        )
    weights = checkpoint_files(folder)
    beside = [
        path
        for path in folder.iterdir()
        if path.is_file() and any(fnmatch.fnmatchcase(path.name, pattern) for pattern in _SIDE_FILES)
    ]
    names = {path.name for path in (*weights, *beside)}
    if any(spec_name.startswith(f"{ENCODER_PREFIX}.") for held in weights.values() for spec_name in held):
        names |= {name for name in EMBEDDING_FILES if (folder / name).is_file()}
    return {name: folder / name for name in sorted(names)}


class _Meter:
    """Adds up bytes and passes the sum on."""

    def __init__(self, progress: Progress | None, *, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def advance(self, count: int) -> None:
        self._done = min(self._done + count, self._total)
        if self._progress is not None:
            self._progress(self._done, self._total)

    def finish(self) -> None:
        self.advance(self._total - self._done)


def _stage_files(staging: Staging, paths: Mapping[str, Path], *, meter: _Meter) -> tuple[FileEntry, ...]:
    entries = []
    for name, path in paths.items():
        with open_regular(path, follow_symlinks=True) as stream:
            size, sha256 = staging.copy(stream.fileno(), name, progress=meter.advance)
        entries.append(FileEntry(path=name, size=size, sha256=sha256))
    return tuple(entries)


def _require_same_files(record: BaseRecord, folder: Path, given: Mapping[str, Path]) -> None:
    """Raise `RegistryError` if the folder's files are not those of the base that has the name."""
    stored = {entry.path: entry for entry in record.files}
    problems = [f"'{name}' is not among the base's files" for name in sorted(given.keys() - stored.keys())]
    problems += [f"'{name}' is missing" for name in sorted(stored.keys() - given.keys())]
    problems += [
        f"'{name}' has other bytes"
        for name in sorted(given.keys() & stored.keys())
        if sha256_file(given[name], follow_symlinks=True) != stored[name].sha256
    ]
    if problems:
        raise RegistryError(
            f"The registry has a base '{record.name}' already, and '{folder}' holds other files; a base "
            "never changes. Add this one under another name:",
            problems=problems,
        )
