"""The SQLite index: tables, connections and the schema's revision.

Knows how a transaction is made safe against crashes and other processes; knows nothing of what the rows
mean.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa

from experts.errors import RegistryError
from registry.filesystem import FileSystem

__all__ = [
    "REVISION",
    "Index",
    "audit",
    "base_routings",
    "bases",
    "consents",
    "empty_index",
    "experts",
    "metadata",
    "select_all",
]

REVISION = "0001"
"""The newest numbered migration; a registry that states it is opened without importing alembic."""

BUSY_SECONDS = 60.0
"""How long a writer waits for the others before it gives up."""

metadata = sa.MetaData()


def _table(name: str, *columns: sa.schema.SchemaItem) -> sa.Table:
    return sa.Table(name, metadata, *columns, sqlite_strict=True)


def _text(name: str, *items: sa.schema.SchemaItem, **options: Any) -> sa.Column[str]:
    return sa.Column(name, sa.Text, *items, nullable=False, **options)


def _integer(name: str, **options: Any) -> sa.Column[int]:
    return sa.Column(name, sa.Integer, nullable=False, **options)


audit = _table(
    "audit",
    _integer("sequence", primary_key=True, autoincrement=False),
    _text("at"),
    _text("action"),
    _text("subject"),
    _text("detail"),
    _text("previous"),
    _text("digest", unique=True),
)
"""The audit log; the other tables follow from it and the blobs."""

bases = _table(
    "bases",
    _text("name", primary_key=True),
    _text("fingerprint"),
    _text("tokenizer_fingerprint"),
    _text("record"),
    _text("created"),
)

base_routings = _table(
    "base_routings",
    _text("base", sa.ForeignKey("bases.name"), primary_key=True),
    _integer("version", primary_key=True),
    _text("record"),
    _text("created"),
)

experts = _table(
    "experts",
    _integer("sequence", primary_key=True, autoincrement=False),
    _text("name"),
    _integer("version"),
    _text("owner"),
    _text("domain"),
    _text("kind"),
    _text("license"),
    _text("base_name", sa.ForeignKey("bases.name")),
    _text("base_fingerprint"),
    _text("digest", unique=True),
    _integer("parameters"),
    _integer("bytes"),
    _text("created"),
    sa.UniqueConstraint("name", "version"),
)

consents = _table(
    "consents",
    _integer("sequence", primary_key=True, autoincrement=False),
    _text("owner"),
    _text("action"),
    _text("at"),
    _text("who"),
    _text("reason"),
)
"""The consent ledger; ``sequence`` is that of the audit entry."""


class Index:
    """Connections to one index file.

    Args:
        path: The SQLite file; it is created by `create`, never by reading.
        busy_seconds: How long a transaction waits for other processes.
    """

    def __init__(self, path: Path, *, busy_seconds: float = BUSY_SECONDS) -> None:
        self.path = path
        self.engine = _engine(path, busy_seconds=busy_seconds)

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """Open one consistent view; an index that does not exist reads as an empty one.

        Raises:
            RegistryError: The file is no index, or of a revision this program cannot read.
        """
        if not self.path.exists():
            with empty_index() as connection:
                yield connection
            return
        with self.engine.connect() as connection, connection.begin():
            revision = self._revision(connection)
            if revision == REVISION:
                yield connection
                return
            if revision is None:  # created by a process that was killed before its first commit
                with empty_index() as empty:
                    yield empty
                return
        with self.write() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """Open the one write transaction: alone from the start, committed at the end or not at all.

        Raises:
            RegistryError: The file is no index, or of a revision this program cannot read.
        """
        engine = self.engine.execution_options(begin="BEGIN IMMEDIATE")
        with engine.connect() as connection, connection.begin():
            if self._revision(connection) != REVISION:
                _migrate(connection)
            yield connection

    def clear(self, connection: sa.Connection) -> None:
        """Empty the index within the caller's write transaction."""
        metadata.drop_all(connection)
        connection.execute(sa.text("DROP TABLE alembic_version"))
        _migrate(connection)

    def set_aside(self, *, files: FileSystem) -> None:
        """Rename a damaged index and the journal that belongs to it, to make room for a new one."""
        for suffix in ("-journal", ""):
            path = self.path.with_name(self.path.name + suffix)
            if path.exists():
                files.rename(path, self.path.with_name(f"{self.path.name}.damaged{suffix}"))
        files.sync_folder(self.path.parent)

    def _revision(self, connection: sa.Connection) -> str | None:
        """Return the schema's revision, or None for a file without a single table."""
        tables = set(connection.scalars(sa.text("SELECT name FROM sqlite_schema WHERE type = 'table'")))
        if not tables:
            return None
        if "alembic_version" not in tables or not tables >= {"audit", "experts"}:
            raise RegistryError(
                f"'{self.path}' is an SQLite file, but not the index of a coterie registry: choose another "
                "folder with --registry or COTERIE_REGISTRY."
            )
        revision = str(connection.scalar(sa.text("SELECT version_num FROM alembic_version")))
        if not re.fullmatch(r"\d{4}", revision) or revision > REVISION:
            raise RegistryError(
                f"The registry '{self.path.parent}' has the schema revision {revision}, but this program "
                f"knows revisions up to {REVISION}: a newer coterie wrote it. Upgrade coterie to use it."
            )
        return revision


@contextmanager
def empty_index() -> Iterator[sa.Connection]:
    """Open a fresh index in memory, in the current schema."""
    engine = sa.create_engine("sqlite://", poolclass=sa.StaticPool)
    with engine.connect() as connection:
        metadata.create_all(connection, checkfirst=False)
        yield connection
    engine.dispose()


def select_all(connection: sa.Connection, table: sa.Table) -> list[tuple[Any, ...]]:
    """Return every row of a table in the order of its primary key."""
    return [tuple(row) for row in connection.execute(sa.select(table).order_by(*table.primary_key))]


def _engine(path: Path, *, busy_seconds: float) -> sa.Engine:
    def connect() -> sqlite3.Connection:
        # isolation_level None: the driver begins nothing by itself, `_begin` does.
        connection = sqlite3.connect(
            f"file:{quote(str(path.absolute()))}?mode=rwc",
            uri=True,
            timeout=busy_seconds,
            isolation_level=None,
        )
        # DELETE, not WAL: SQLite up to 3.51.2 can corrupt a WAL database that two processes write to.
        # EXTRA also syncs the folder after the journal is gone, so that a commit survives a power cut.
        for pragma in ("journal_mode=DELETE", "synchronous=EXTRA", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}").close()
        return connection

    engine = sa.create_engine("sqlite://", creator=connect, poolclass=sa.NullPool)
    sa.event.listen(engine, "begin", _begin)
    return engine


def _begin(connection: sa.Connection) -> None:
    connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN"))


def _migrate(connection: sa.Connection) -> None:
    """Bring the schema to `REVISION` inside the caller's transaction."""
    from alembic import command
    from alembic.config import Config

    configuration = Config()
    configuration.set_main_option("script_location", "registry:migrations")
    configuration.set_main_option("path_separator", "os")
    configuration.attributes["connection"] = connection
    command.upgrade(configuration, REVISION)
