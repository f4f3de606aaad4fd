"""Finding experts in the index: by reference, by property, newest versions first choice.

Reads index columns only, so that a list of ten thousand experts costs milliseconds; knows nothing of cards'
contents or files.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa

from experts.errors import UnknownNameError
from experts.names import parse_reference, unknown_name
from registry import index
from registry.consent import current_opt_outs, known_owners
from registry.records import ExpertRecord
from registry.storage import Storage

__all__ = ["find_expert", "list_experts", "next_version"]

_COLUMNS = index.experts.c


def list_experts(
    storage: Storage,
    *,
    domain: str | None,
    owner: str | None,
    kind: str | None,
    base: str | None,
    all_versions: bool,
) -> list[ExpertRecord]:
    """Return experts by name and version. Errors: see `registry.Registry.experts`."""
    wanted = {"domain": domain, "owner": owner, "kind": kind, "base_name": base}
    filters = {column: value for column, value in wanted.items() if value is not None}
    with storage.read() as connection:
        query = sa.select(index.experts).order_by(_COLUMNS.name, _COLUMNS.version)
        if not all_versions:
            query = query.where(_is_newest())
        for column, value in filters.items():
            query = query.where(_COLUMNS[column] == value)
        found = _records(connection, query)
        if not found:
            for column, value in filters.items():
                _require_known(connection, column, value, root=str(storage.root))
    return found


def find_expert(storage: Storage, reference: str) -> ExpertRecord:
    """Return one version of an expert. Errors: see `registry.Registry.expert`."""
    name, label = parse_reference(reference)
    with storage.read() as connection:
        query = sa.select(index.experts).where(_COLUMNS.name == name).order_by(_COLUMNS.version)
        versions = _records(connection, query)
        if not versions:
            known = connection.scalars(sa.select(_COLUMNS.name).distinct())
            raise unknown_name("expert", name, known, advice=f"The registry is '{storage.root}'.")
    return versions[-1] if label is None else _pick_version(versions, label)


def next_version(storage: Storage, name: str) -> int:
    """Return 1 for a new name, else one more than the newest version."""
    with storage.read() as connection:
        newest = connection.scalar(sa.select(sa.func.max(_COLUMNS.version)).where(_COLUMNS.name == name))
    return (newest or 0) + 1


def _pick_version(versions: list[ExpertRecord], label: str) -> ExpertRecord:
    by_label = {str(record.version): record for record in versions}
    by_label |= {f"sha256:{record.digest}": record for record in versions}
    label = label if label.startswith("sha256:") else str(int(label))
    if label not in by_label:
        shown = ", ".join(str(record.version) for record in versions)
        raise UnknownNameError(
            f"Expert '{versions[0].name}' has no version '{label}'. It has: {shown}. Leave out '@...' for "
            "the newest."
        )
    return by_label[label]


def _is_newest() -> sa.ColumnElement[bool]:
    newer = index.experts.alias()
    return ~sa.exists().where(newer.c.name == _COLUMNS.name, newer.c.version > _COLUMNS.version)


def _records(connection: sa.Connection, query: sa.Select[Any]) -> list[ExpertRecord]:
    """Run a query for whole rows; unpacked by hand, since a mapping for each row would double the time."""
    out = {record.owner for record in current_opt_outs(connection)}
    names = _COLUMNS.keys()
    owner = names.index("owner")
    rows = connection.execute(query).all()
    return [ExpertRecord(**dict(zip(names, row, strict=True)), opted_out=row[owner] in out) for row in rows]


def _require_known(connection: sa.Connection, column: str, value: str, *, root: str) -> None:
    known = _known_values(connection, column)
    if value not in known:
        what = column.removesuffix("_name")
        raise unknown_name(what, value, known, advice=f"The registry is '{root}'.")


def _known_values(connection: sa.Connection, column: str) -> Iterable[str]:
    if column == "owner":
        return known_owners(connection)
    if column == "base_name":
        return set(connection.scalars(sa.select(index.bases.c.name)))
    values = set(connection.scalars(sa.select(_COLUMNS[column]).distinct()))
    if column == "kind":
        from experts.kinds import KINDS

        values |= set(KINDS)
    return values
