"""Where a plan and a build take names, cards and files from: a registry, or a folder that was composed before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from composer.lock import Lock, LockedExpert
from composer.members import BASE_FOLDER, DESCRIPTION_NAME, PUBLIC_FOLDER
from experts.base import BaseDescription
from experts.card import CARD_FILE, ExpertCard
from experts.errors import IntegrityError
from experts.names import parse_reference, unknown_name
from registry.records import BaseRecord, ExpertRecord

if TYPE_CHECKING:
    from registry.records import OptOut

__all__ = ["FolderSource", "Source"]


class Source(Protocol):
    """What planning and building ask for. `registry.Registry` is one."""

    def base(self, name: str, /) -> BaseRecord:
        """Return an anchor by name."""

    def expert(self, ref: str, /) -> ExpertRecord:
        """Return an expert by reference."""

    def card(self, record: ExpertRecord, /) -> ExpertCard:
        """Return an expert's card."""

    def files(self, record: ExpertRecord, /) -> Mapping[str, Path]:
        """Return where an expert's files are, by their path in the package."""

    def parent_owners(self, card: ExpertCard, /) -> tuple[str, ...]:
        """Return the other owners of the experts that a card's was made from, directly or not, sorted."""

    def opt_outs(self) -> Sequence[OptOut]:
        """Return the owners who are out now."""

    def blob_path(self, sha256: str, /) -> Path:
        """Return where the bytes of a digest are."""


class FolderSource:
    """A composed folder as a source: its own base and experts, and nothing else.

    Args:
        folder: The composed folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = Lock.read(folder)

    def base(self, name: str, /) -> BaseRecord:
        """Return the folder's anchor."""
        locked = self.lock.base
        if name != locked.name:
            raise unknown_name("base", name, [locked.name])
        return BaseRecord(
            name=locked.name,
            fingerprint=locked.fingerprint,
            tokenizer_fingerprint=locked.tokenizer_fingerprint,
            files=locked.files,
            created="",
            routing=locked.routing,
            routing_sha256=locked.routing_sha256,
            describe=lambda: BaseDescription.from_json((self.folder / DESCRIPTION_NAME).read_bytes()),
        )

    def expert(self, ref: str, /) -> ExpertRecord:
        """Return one of the folder's experts."""
        name, version = parse_reference(ref)
        for locked in self.lock.experts:
            if locked.name == name and version in (
                None,
                str(locked.version),
                f"sha256:{locked.digest}",
            ):
                return self._record(locked)
        raise unknown_name("expert", ref, [f"{e.name}@{e.version}" for e in self.lock.experts])

    def _record(self, locked: LockedExpert) -> ExpertRecord:
        return ExpertRecord(
            name=locked.name,
            version=locked.version,
            owner=locked.owner,
            domain=locked.domain,
            kind=locked.kind,
            license=locked.license,
            base_name=self.lock.base.name,
            base_fingerprint=self.lock.base.fingerprint,
            digest=locked.digest,
            parameters=locked.parameters,
            bytes=sum(entry.size for entry in locked.files),
            created="",
            sequence=0,
            opted_out=False,
        )

    def card(self, record: ExpertRecord, /) -> ExpertCard:
        """Return the card, checked against its digest."""
        path = self.folder / "experts" / record.digest / CARD_FILE
        card = ExpertCard.from_bytes(path.read_bytes())
        if card.digest != record.digest:
            raise IntegrityError(f"{path} has digest {card.digest}. Build the folder again.")
        return card

    def files(self, record: ExpertRecord, /) -> Mapping[str, Path]:
        """Return where an expert's files are."""
        folder = self.folder / "experts" / record.digest
        return {entry.path: folder / entry.path for entry in self.card(record).files}

    def parent_owners(self, card: ExpertCard, /) -> tuple[str, ...]:
        """Return what the lock says of the expert."""
        found = (expert.parent_owners for expert in self.lock.experts if expert.digest == card.digest)
        return next(found, ())

    def opt_outs(self) -> Sequence[OptOut]:
        """Return nothing: a folder keeps no consent ledger."""
        return ()

    def blob_path(self, sha256: str, /) -> Path:
        """Return the folder's file of that digest, as the lock lists it (the bytes are not hashed)."""
        path = self._paths.get(sha256)
        if path is None or not path.is_file():
            raise IntegrityError(f"{self.folder} holds no file with sha256 {sha256}. Build it again.")
        return path

    def holds(self, sha256: str) -> bool:
        """Whether the lock lists a file of that digest."""
        return sha256 in self._paths

    @cached_property
    def _paths(self) -> dict[str, Path]:
        base = self.lock.base
        paths = {entry.sha256: self.folder / BASE_FOLDER / entry.path for entry in base.files}
        if base.routing is not None and base.routing_sha256 is not None:
            paths[base.routing_sha256] = self.folder / PUBLIC_FOLDER / base.routing.file
        for expert in self.lock.experts:
            for entry in expert.files:
                paths[entry.sha256] = self.folder / expert.folder / entry.path
        return paths
