"""Where a changed folder takes names, cards and files from: what stays from itself, what joins from a registry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from composer.lock import Lock
from composer.source import FolderSource, Source
from experts.files import copy_file
from experts.names import parse_reference
from registry.records import BaseRecord, ExpertRecord

if TYPE_CHECKING:
    from experts.card import ExpertCard
    from registry.records import OptOut

__all__ = ["EditSource"]


class EditSource:
    """The folder for what stays, the registry for what joins.

    Args:
        own: The folder.
        registry: None where nobody joins.
        joining: Name -> reference, record.
    """

    def __init__(
        self,
        own: FolderSource,
        registry: Source | None,
        joining: Mapping[str, tuple[str, ExpertRecord]],
    ) -> None:
        self._own = own
        self._registry = registry
        self._joining = joining
        self._copies: Path | None = None

    def copied_to(self, folder: Path) -> EditSource:
        """Return a source that copies the registry's files to ``folder``, which it makes, and hands out the copies."""
        source = EditSource(self._own, self._registry, self._joining)
        source._copies = folder
        return source

    def base(self, name: str, /) -> BaseRecord:
        """Return the folder's anchor."""
        return self._own.base(name)

    def expert(self, ref: str, /) -> ExpertRecord:
        """Return an expert of the folder or a new one; one that the manifest leaves out is a name without files."""
        name = parse_reference(ref)[0]
        if name in self._joining:
            return self._joining[name][1]
        if any(expert.name == name for expert in self._own.lock.experts):
            return self._own.expert(name)
        return _left_out(name, self._own.lock)

    def card(self, record: ExpertRecord, /) -> ExpertCard:
        """Return an expert's card."""
        return self._of(record).card(record)

    def files(self, record: ExpertRecord, /) -> Mapping[str, Path]:
        """Return where an expert's files are."""
        return self._of(record).files(record)

    def parent_owners(self, card: ExpertCard, /) -> tuple[str, ...]:
        """Return the other owners of the experts that a card's was made from."""
        return self._of(card).parent_owners(card)

    def _of(self, record: ExpertRecord | ExpertCard) -> Source:
        if record.name in self._joining:
            assert self._registry is not None
            return self._registry
        return self._own

    def opt_outs(self) -> Sequence[OptOut]:
        """Return nothing: consent is checked where experts join."""
        return ()

    def blob_path(self, sha256: str, /) -> Path:
        """Return where the bytes of a digest are, in the folder if it has them."""
        if self._registry is None or self._own.holds(sha256):
            return self._own.blob_path(sha256)
        path = self._registry.blob_path(sha256)
        if self._copies is None:
            return path
        self._copies.mkdir(exist_ok=True)
        target = self._copies / sha256
        if not target.exists():
            copy_file(path, target)
        return target


def _left_out(name: str, lock: Lock) -> ExpertRecord:
    """Return a record of somebody whom the manifest leaves out: the plan asks for the name and the owner only."""
    return ExpertRecord(
        name=name,
        version=0,
        owner=name.partition("/")[0],
        domain="",
        kind="",
        license="",
        base_name=lock.base.name,
        base_fingerprint=lock.base.fingerprint,
        digest="",
        parameters=0,
        bytes=0,
        created="",
        sequence=0,
        opted_out=True,
    )
