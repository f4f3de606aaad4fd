"""`Registry`: everything that can be asked of one registry folder.

A thin front: what needs pydantic or hashing is imported by the method that needs it, so that listing stays
fast. It does not know how anything is done.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from experts.errors import RegistryError
from registry import consent, lookup
from registry.audit import read_entries, utc_now
from registry.filesystem import FileSystem
from registry.records import (
    AuditEntry,
    AuditHead,
    BaseRecord,
    ConsentRecord,
    ExpertRecord,
    FsckReport,
    OptOut,
    VerifyReport,
)
from registry.storage import Storage

if TYPE_CHECKING:
    from experts.card import ExpertCard
    from experts.routing_artifacts import RoutingInfo

__all__ = ["Registry", "default_path"]


def default_path() -> Path:
    """Return ``$COTERIE_REGISTRY``, else the folder for this user's data."""
    if given := os.environ.get("COTERIE_REGISTRY"):
        return Path(given).expanduser()
    import platformdirs

    return Path(platformdirs.user_data_dir("coterie", appauthor=False)) / "registry"


class Registry:
    """Which experts exist, who owns them, whether they are intact, and who has withdrawn.

    A folder of immutable blobs, an SQLite index, a consent ledger and an audit log. Any number of processes
    may use it at once. A change is whole or absent, also after a kill at any moment, and is durable when the
    method returns.

    Every method raises `RegistryError` when the folder is not a registry, was written by a newer coterie, is
    busy for too long, or (for changes) cannot be written or is full; and `IntegrityError` when the index is
    damaged or missing. A folder that does not exist reads as an empty registry, save for `opt_outs`; the first
    change creates it.

    Args:
        path: The registry's folder; None: see `default_path`.
        files: How files are changed; tests inject faults here.
        clock: What time it is.
        busy_seconds: How long to wait for other processes' changes.
    """

    def __init__(
        self,
        path: Path | str | None = None,
        *,
        files: FileSystem | None = None,
        clock: Callable[[], datetime] = utc_now,
        busy_seconds: float = 60.0,
    ) -> None:
        self.path = default_path() if path is None else Path(path)
        self._is_named = path is not None or bool(os.environ.get("COTERIE_REGISTRY"))
        self._storage = Storage(self.path, files=files, clock=clock, busy_seconds=busy_seconds)

    def __repr__(self) -> str:
        return f"Registry({str(self.path)!r})"

    # Bases

    def add_base(
        self, folder: Path | str, *, name: str, progress: Callable[[int, int], None] | None = None
    ) -> BaseRecord:
        """Copy a public anchor into the registry: its checkpoint, config, tokenizer, README and licence.

        Adding the same files under the same name again changes nothing.

        Args:
            folder: A model folder with ``config.json`` and safetensors; links in it are followed.
            name: What manifests will call it.
            progress: Called with the bytes copied and hashed so far and the bytes in all.

        Raises:
            AdmissionError: No checkpoint, or one whose layout is not known.
            RegistryError: The name is malformed, or taken by a base with other files.
        """
        from registry.bases import add_base

        return add_base(self._storage, Path(folder), name=name, progress=progress)

    def set_base_routing(self, name: str, folder: Path | str, info: RoutingInfo) -> BaseRecord:
        """Attach public routing artefacts (statistics and rows of public text) to a base; the newest count.

        Args:
            name: The base.
            folder: Holds the file that ``info`` names.
            info: What the file holds.

        Raises:
            UnknownNameError: There is no such base.
            AdmissionError: The file is not what ``info`` declares, does not fit the base, or was made on another one.
        """
        from registry.bases import set_base_routing

        return set_base_routing(self._storage, name, folder=Path(folder), info=info)

    def bases(self) -> list[BaseRecord]:
        """Return every base by name."""
        from registry.bases import all_bases

        return all_bases(self._storage)

    def base(self, name: str) -> BaseRecord:
        """Return one base.

        Raises:
            UnknownNameError: There is none of this name.
        """
        from registry.bases import get_base

        return get_base(self._storage, name)

    # Experts

    def register(self, folder: Path | str) -> ExpertRecord:
        """Copy a packed expert into the registry, check the copy, and enter it in the index.

        Registering the same expert again changes nothing.

        Raises:
            CardError: The card is not well formed.
            AdmissionError: The folder is not what the card says, holds something its kind does not allow,
                belongs to a base or was made from an expert that the registry does not have.
            ConsentError: The owner, or one of those from whose experts it was made, has opted out.
            RegistryError: The version exists with another content, or a newer one exists.
        """
        from registry.enrol import register

        return register(self._storage, Path(folder))

    def experts(
        self,
        *,
        domain: str | None = None,
        owner: str | None = None,
        kind: str | None = None,
        base: str | None = None,
        all_versions: bool = False,
    ) -> list[ExpertRecord]:
        """Return the newest version of every expert that matches, by name; opted-out ones are marked.

        Args:
            domain: Only this domain.
            owner: Only this owner's.
            kind: Only this kind.
            base: Only those made for the base of this name.
            all_versions: Older versions too.

        Raises:
            UnknownNameError: A domain, owner, kind or base that the registry has never seen.
        """
        return lookup.list_experts(
            self._storage, domain=domain, owner=owner, kind=kind, base=base, all_versions=all_versions
        )

    def expert(self, ref: str) -> ExpertRecord:
        """Return one version of an expert, also of an owner who has opted out.

        Args:
            ref: ``owner/expert`` (the newest), ``owner/expert@3`` or ``owner/expert@sha256:<card digest>``.

        Raises:
            UnknownNameError: The reference is malformed, or there is no such expert or version.
        """
        return lookup.find_expert(self._storage, ref)

    def next_version(self, name: str) -> int:
        """Return 1 for a new name, else one more than the newest version."""
        return lookup.next_version(self._storage, name)

    def card(self, expert: ExpertRecord | str) -> ExpertCard:
        """Return an expert's card after checking its bytes.

        Raises:
            UnknownNameError: A reference to an expert that does not exist.
            IntegrityError: The card's blob is missing or damaged.
        """
        from experts.card import ExpertCard

        record = self.expert(expert) if isinstance(expert, str) else expert
        return ExpertCard.from_bytes(self.read_blob(record.digest))

    def files(self, item: ExpertRecord | ExpertCard | BaseRecord) -> dict[str, Path]:
        """Return where each file of an expert (without its card) or a base lies, by its relative path.

        Raises:
            IntegrityError: A blob is missing.
        """
        source = self.card(item) if isinstance(item, ExpertRecord) else item
        return {entry.path: self.blob_path(entry.sha256) for entry in source.files}

    def parent_owners(self, card: ExpertCard) -> tuple[str, ...]:
        """Return the other owners of the experts that a card's was made from, directly or not, sorted.

        Raises:
            RegistryError: One of those experts is not registered, so its owner is not known.
            IntegrityError: The card of one of them is missing or damaged.
        """
        if not card.derived_from:
            return ()
        from registry.ancestry import ancestry

        with self._storage.read() as connection:
            owners, unknown = ancestry(connection, self._storage.blobs, card)
        if unknown:
            raise RegistryError(
                f"{card.name} was made from experts that the registry '{self.path}' does not have, so nobody can say "
                f"whose opt-out is one of it too. Register them first (card digests): {', '.join(unknown)}."
            )
        return owners

    # Blobs

    def blob_path(self, sha256: str) -> Path:
        """Return where a blob lies; it must not be written to.

        Raises:
            IntegrityError: It is missing.
        """
        return self._storage.blobs.require(sha256)

    def read_blob(self, sha256: str) -> bytes:
        """Return the bytes of a (small) blob after checking them against the digest.

        Raises:
            IntegrityError: It is missing or damaged.
        """
        return self._storage.blobs.read(sha256)

    # Consent

    def opt_out(
        self, owner: str, *, reason: str, by: str | None = None, allow_unknown: bool = False
    ) -> OptOut:
        """Record that an owner leaves: nothing of theirs is registered or composed from now on.

        Args:
            owner: Somebody with a registered expert, or who is in the ledger.
            reason: Why, on one line.
            by: Who says so; None: the name of the user who runs this.
            allow_unknown: Whether to take anybody's name: text that was tuned on and documents in an index have
                owners too, and the registry does not know them.

        Raises:
            UnknownNameError: There is no such owner, or the name is malformed.
            RegistryError: The owner is out already; or a reason or name that is empty or not printable.
        """
        return consent.opt_out(self._storage, owner, reason=reason, by=by, allow_unknown=allow_unknown)

    def opt_in(self, owner: str, *, reason: str, by: str | None = None) -> ConsentRecord:
        """Record that an owner comes back.

        Raises:
            UnknownNameError: There is no such owner.
            RegistryError: The owner is not out; or a reason or name that is empty or not printable.
        """
        return consent.opt_in(self._storage, owner, reason=reason, by=by)

    def opt_outs(self) -> list[OptOut]:
        """Return the owners who are out now, by name.

        Raises:
            RegistryError: A path was given, here or in ``COTERIE_REGISTRY``, and no registry is there: a ledger that
                nobody wrote must not pass for one that leaves nobody out. Somebody without any registry asks nobody.
        """
        with self._storage.read() as connection:
            found = consent.current_opt_outs(connection)
        if self._is_named and not self._storage.index.path.exists():
            raise RegistryError(
                f"There is no registry '{self.path}', so nobody can say who has opted out. Correct the path given by "
                "--registry, COTERIE_REGISTRY or registry=, or name no registry."
            )
        return found

    def opt_out_history(self) -> list[ConsentRecord]:
        """Return the whole consent ledger in order."""
        with self._storage.read() as connection:
            return consent.history(connection)

    def owners(self) -> set[str]:
        """Return every owner with a registered expert, opted out or not."""
        with self._storage.read() as connection:
            return consent.known_owners(connection)

    # Integrity

    def verify(self, ref: str | None = None) -> VerifyReport:
        """Read every file of one expert, or of everything, and compare it with its digest.

        Raises:
            UnknownNameError: There is no such expert.
        """
        from registry.check import verify

        return verify(self._storage, ref)

    def audit(self) -> list[AuditEntry]:
        """Return the audit log in order."""
        with self._storage.read() as connection:
            return read_entries(connection)

    def verify_audit(self, *, held: AuditHead | None = None) -> AuditHead:
        """Check that the audit log was not edited, reordered or cut, and return its head.

        Args:
            held: A head that an earlier call returned and that was kept elsewhere. Only with it can a log be
                caught whose index and files were rewritten together.

        Raises:
            IntegrityError: The log is damaged; every finding is listed.
        """
        from registry.check import verify_audit

        return verify_audit(self._storage, held=held)

    def fsck(self, *, rebuild: bool = False) -> FsckReport:
        """Check everything: files, audit log, and that every row is what the log says.

        Args:
            rebuild: First recreate the index from the log's files and the blobs. A change whose process was
                stopped between writing its log entry and its commit then takes effect.

        Raises:
            IntegrityError: The index is damaged or missing (without ``rebuild``), or the log's files or the
                blobs of a change are (with it); the index is then as it was.
        """
        from registry import check

        return check.rebuild(self._storage) if rebuild else check.fsck(self._storage)
