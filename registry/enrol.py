"""Registering an expert: staged, admitted, published, then entered in the index.

Knows the order that keeps a publisher from swapping files after the check; what an expert may contain is
`experts.admission`'s business.
"""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from experts.admission import check_embedding, check_expert, check_files
from experts.card import CARD_FILE, ExpertCard, FileEntry
from experts.errors import AdmissionError, RegistryError
from experts.files import open_regular
from experts.package import read_package
from registry import index
from registry.ancestry import ancestry
from registry.bases import all_bases
from registry.blobs import Staging
from registry.consent import require_consent
from registry.lookup import find_expert
from registry.records import BaseRecord, ExpertRecord
from registry.storage import Storage

__all__ = ["register"]


def register(storage: Storage, folder: Path) -> ExpertRecord:
    """Register a packed expert. Errors: see `registry.Registry.register`."""
    card = read_package(folder)
    base = _find_base(storage, card)
    with storage.read() as connection:
        _check_against_index(storage, connection, card)
    check_files(folder, card)
    doing = f"registering '{card.name}' version {card.version}"
    with storage.staging(doing=doing) as staging:
        for entry in card.files:
            _stage(staging, folder, entry)
        staging.add(card.to_bytes(), CARD_FILE)
        # From here on the publisher's folder is not looked at again.
        summary = check_expert(staging.folder, card, base.description)
        staging.publish()
    detail: dict[str, str | int] = {
        "card": card.digest,
        "base": base.name,
        "parameters": summary.parameters,
    }
    with storage.write(doing=doing) as connection:
        if not _check_against_index(storage, connection, card):
            subject = f"{card.name}@{card.version}"
            storage.record(connection, "expert.register", subject=subject, detail=detail)
    return find_expert(storage, f"{card.name}@{card.version}")


def _check_against_index(storage: Storage, connection: sa.Connection, card: ExpertCard) -> bool:
    """Return whether this very card is registered already.

    Raises:
        AdmissionError: It was made from an expert that is not registered.
        ConsentError: Its owner, or one of those from whose experts it was made, has opted out.
        RegistryError: The version is taken by another card, or is below the newest.
    """
    require_consent(connection, card.owner)
    parents, unknown = ancestry(connection, storage.blobs, card)
    if unknown:
        raise AdmissionError(
            f"'{card.name}' was made from experts that the registry '{storage.root}' does not have, so nobody can say "
            "whose opt-out is one of it too. Register them first (card digests):",
            problems=unknown,
        )
    for owner in parents:
        require_consent(connection, owner, of=f"'{card.name}' was made from an expert of '{owner}'. ")
    columns = index.experts.c
    query = sa.select(columns.version, columns.digest, columns.created).where(columns.name == card.name)
    rows = {row.version: row for row in connection.execute(query)}
    newest = max(rows, default=0)
    if (same := rows.get(card.version)) is not None:
        if same.digest == card.digest:
            return True
        raise RegistryError(
            f"'{card.name}' version {card.version} was registered on {same.created} with another content "
            f"(card sha256:{same.digest}, this one is sha256:{card.digest}): a version never changes. Pack "
            f"this one as version {newest + 1}."
        )
    if card.version < newest:
        raise RegistryError(
            f"'{card.name}' has version {newest} already, so version {card.version} cannot be added: "
            f"versions only go up. Pack this one as version {newest + 1}."
        )
    return False


def _find_base(storage: Storage, card: ExpertCard) -> BaseRecord:
    """Return the base with the card's fingerprints, whatever name this registry gives it.

    Raises:
        AdmissionError: No base of the registry has them; says which it has.
    """
    bases = all_bases(storage)
    matching = [
        base
        for base in bases
        if base.fingerprint == card.base.fingerprint
        and base.tokenizer_fingerprint == card.base.tokenizer_fingerprint
    ]
    if matching:
        # the same tensors may be there twice, with other settings of the embedding
        fitting = [base for base in matching if base.description.embedding == card.base.embedding]
        found = fitting or matching
        record = next((base for base in found if base.name == card.base.name), found[0])
        check_embedding(card.name, card.base, record.description)
        return record
    problems = [
        f"base '{base.name}': tensors sha256:{base.fingerprint}, tokenizer "
        f"sha256:{base.tokenizer_fingerprint}"
        for base in bases
    ]
    raise AdmissionError(
        f"'{card.name}' was made for the base '{card.base.name}' (tensors sha256:{card.base.fingerprint}, "
        f"tokenizer sha256:{card.base.tokenizer_fingerprint}), which the registry '{storage.root}' does not "
        "have. Add that base with 'coterie base add', or train the expert on one that is there"
        + (":" if problems else "; there is no base yet."),
        problems=problems,
    )


def _stage(staging: Staging, folder: Path, entry: FileEntry) -> None:
    with open_regular(folder / entry.path) as stream:
        size, sha256 = staging.copy(stream.fileno(), entry.path, limit=entry.size)
    if (size, sha256) != (entry.size, entry.sha256):
        raise AdmissionError(
            f"'{entry.path}' has {size} bytes with the digest sha256:{sha256}, but its card declares "
            f"{entry.size} bytes with sha256:{entry.sha256}: pack the expert again."
        )
