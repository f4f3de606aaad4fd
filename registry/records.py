"""What the registry tells: frozen records of experts, bases, consents, log entries and checks.

Plain values that cost nothing to import; how they are stored is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from experts.base import BaseDescription
    from experts.card import BaseRef, FileEntry
    from experts.routing_artifacts import RoutingInfo

__all__ = [
    "AuditEntry",
    "AuditHead",
    "BaseRecord",
    "ConsentAction",
    "ConsentRecord",
    "ExpertRecord",
    "FileCheck",
    "FsckReport",
    "OptOut",
    "VerifyReport",
]

ConsentAction = Literal["opt_out", "opt_in"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertRecord:
    """One version of a registered expert: what can be known of it without opening its card.

    Attributes:
        name: ``owner/expert``.
        version: 1, 2, ...
        owner: Whose data it was trained on.
        domain: What it knows about.
        kind: ``lora``, ``ffn``, ...
        license: SPDX expression.
        base_name: The registry's name of the base it belongs to.
        base_fingerprint: Digest of that base's tensors.
        digest: SHA-256 of the card's canonical bytes, which lists the digests of all files.
        parameters: Number of weights.
        bytes: Size of all files without the card.
        created: When it was registered, in UTC, as ``2026-01-31T12:00:00Z``.
        sequence: 1 for the first registration in this registry, 2 for the second, ...
        opted_out: Whether its owner has opted out.
    """

    name: str
    version: int
    owner: str
    domain: str
    kind: str
    license: str
    base_name: str
    base_fingerprint: str
    digest: str
    parameters: int
    bytes: int
    created: str
    sequence: int
    opted_out: bool

    @property
    def ref(self) -> str:
        """``owner/expert@version``."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseRecord:
    """A public anchor model whose files are in the registry.

    Attributes:
        name: The name it was added under.
        fingerprint: Digest of its tensors.
        tokenizer_fingerprint: Digest of its tokenizer.
        files: Path, size and digest of every file.
        created: When it was added, in UTC.
        routing: The newest public routing artefacts, if any were attached.
        routing_sha256: Digest of their file.
    """

    name: str
    fingerprint: str
    tokenizer_fingerprint: str
    files: tuple[FileEntry, ...]
    created: str
    routing: RoutingInfo | None
    routing_sha256: str | None
    describe: Callable[[], BaseDescription] = field(repr=False, compare=False)

    @property
    def description(self) -> BaseDescription:
        """Config, tensor table and FFN layout, read from the registry at each access."""
        return self.describe()

    @property
    def ref(self) -> BaseRef:
        """What the card of an expert made for this base says about it."""
        from experts.card import BaseRef

        return BaseRef(
            name=self.name,
            fingerprint=self.fingerprint,
            tokenizer_fingerprint=self.tokenizer_fingerprint,
            embedding=self.description.embedding,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OptOut:
    """An owner who is out now: since when (UTC), by whom and why."""

    owner: str
    when: str
    who: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsentRecord:
    """One line of the consent ledger."""

    sequence: int
    owner: str
    action: ConsentAction
    when: str
    who: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """One line of the audit log.

    Attributes:
        sequence: 1, 2, ... without gaps.
        at: When, in UTC.
        action: ``base.add``, ``base.routing``, ``expert.register``, ``consent.opt_out``, ``consent.opt_in``.
        subject: The base, expert or owner concerned.
        detail: Digests and scalars that, with the blobs, suffice to repeat the change.
        previous: Digest of the entry before.
        digest: SHA-256 of this entry's canonical bytes.
    """

    sequence: int
    at: str
    action: str
    subject: str
    detail: Mapping[str, str | int]
    previous: str
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditHead:
    """How long the audit log is and the digest of its last entry; whoever keeps one can detect a rewrite."""

    entries: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FileCheck:
    """One file of an expert or a base, compared with its digest."""

    subject: str
    path: str
    sha256: str
    status: Literal["ok", "missing", "altered"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """The files that were read and compared with their digests."""

    files: tuple[FileCheck, ...]

    @property
    def ok(self) -> bool:
        """Whether every file is there and intact."""
        return not self.damaged

    @property
    def damaged(self) -> tuple[FileCheck, ...]:
        """The files that are missing or altered."""
        return tuple(check for check in self.files if check.status != "ok")


@dataclass(frozen=True, slots=True, kw_only=True)
class FsckReport:
    """Everything that a full check of the registry found.

    Attributes:
        files: Every file of every expert and base.
        problems: Contradictions between index, audit log and blobs, one sentence each.
        orphans: Digests of blobs that nothing refers to; harmless.
        abandoned: Entries of ``tmp`` that killed processes left; harmless.
        rebuilt: Whether the index was recreated.
    """

    files: VerifyReport
    problems: tuple[str, ...]
    orphans: tuple[str, ...]
    abandoned: tuple[str, ...]
    rebuilt: bool

    @property
    def ok(self) -> bool:
        """Whether nothing is missing, altered or contradictory."""
        return self.files.ok and not self.problems
