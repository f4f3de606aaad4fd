"""The index file: schema, pragmas, revisions, foreign and damaged files."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa

from experts.errors import IntegrityError, RegistryError
from registry import Registry
from registry.filesystem import FileSystem
from registry.index import REVISION, Index, empty_index, metadata
from registry.storage import Storage


def test_the_migrations_give_the_tables_that_the_code_declares(registry: Registry) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with registry._storage.write(doing="testing") as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        strict = connection.execute(
            sa.text("SELECT name FROM pragma_table_list WHERE strict AND schema = 'main'")
        )
        assert {row.name for row in strict} == set(metadata.tables)


def test_the_last_migration_is_the_revision_that_the_code_states() -> None:
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    configuration = Config()
    configuration.set_main_option("script_location", "registry:migrations")
    configuration.set_main_option("path_separator", "os")
    assert ScriptDirectory.from_config(configuration).get_heads() == [REVISION]


def test_every_connection_has_the_safe_settings(registry: Registry) -> None:
    with registry._storage.read() as connection:
        settings = {
            name: connection.scalar(sa.text(f"PRAGMA {name}"))
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert settings == {"journal_mode": "delete", "synchronous": 3, "foreign_keys": 1, "busy_timeout": 60_000}


def test_a_writer_holds_the_lock_from_the_start(registry_folder: Path) -> None:
    first, second = (
        Index(registry_folder / "index.sqlite"),
        Index(registry_folder / "index.sqlite", busy_seconds=0),
    )
    with first.write(), pytest.raises(sa.exc.OperationalError, match="database is locked"), second.write():
        pass


def test_a_busy_registry_says_so(registry_folder: Path) -> None:
    waiting = Registry(registry_folder, busy_seconds=0.01)
    with Storage(registry_folder).write(doing="holding it"), pytest.raises(RegistryError) as caught:
        waiting.opt_out("acme", reason="x")
    assert str(caught.value) == (
        f"The registry '{registry_folder}' was busy for too long while opting out 'acme': another process "
        "holds its write lock. Nothing was changed: try again when that process is done."
    )


@pytest.mark.parametrize("table", ["audit", "consents"])
@pytest.mark.parametrize("verb", ["UPDATE {} SET at = ''", "DELETE FROM {}"])
def test_log_and_ledger_refuse_changes(registry: Registry, table: str, verb: str) -> None:
    with sqlite3.connect(registry.path / "index.sqlite") as connection:
        connection.execute("INSERT INTO consents VALUES (9, 'o', 'opt_out', 't', 'w', 'r')")
        with pytest.raises(sqlite3.IntegrityError, match=f"^{table} is append-only$"):
            connection.execute(verb.format(table))
        connection.rollback()


def test_opening_a_current_index_imports_no_alembic(registry_folder: Path) -> None:
    code = (
        "import sys; from registry import Registry; "
        f"assert Registry({str(registry_folder)!r}).experts() == []; "
        "print([name for name in ('alembic', 'pydantic', 'torch', 'numpy') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_a_registry_of_a_newer_schema_is_refused(registry: Registry) -> None:
    with sqlite3.connect(registry.path / "index.sqlite") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '0007'")
    for use in (registry.experts, lambda: registry.opt_out("acme", reason="x")):
        with pytest.raises(RegistryError) as caught:
            use()
        assert str(caught.value) == (
            f"The registry '{registry.path}' has the schema revision 0007, but this program knows revisions "
            f"up to {REVISION}: a newer coterie wrote it. Upgrade coterie to use it."
        )


def test_a_missing_folder_reads_as_empty_and_is_not_created(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "none")
    assert registry.experts() == []
    assert registry.bases() == []
    assert registry.owners() == set()
    assert registry.audit() == []
    assert registry.next_version("acme/contracts") == 1
    assert registry.fsck().ok
    assert not (tmp_path / "none").exists()


def test_the_ledger_of_a_registry_that_does_not_exist_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A misspelt path must not pass for a registry in which nobody has opted out; whoever names none has none."""

    def message(registry: Registry) -> str:
        with pytest.raises(RegistryError) as caught:
            registry.opt_outs()
        return str(caught.value)

    wanted = (
        f"There is no registry '{tmp_path / 'typo'}', so nobody can say who has opted out. Correct the path given by "
        "--registry, COTERIE_REGISTRY or registry=, or name no registry."
    )
    assert message(Registry(tmp_path / "typo")) == wanted
    monkeypatch.setenv("COTERIE_REGISTRY", str(tmp_path / "typo"))
    assert message(Registry()) == wanted
    (tmp_path / "typo").mkdir()
    assert message(Registry()) == wanted  # an empty folder is none either
    monkeypatch.delenv("COTERIE_REGISTRY")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert Registry().opt_outs() == []


def test_an_empty_folder_reads_as_an_empty_registry(tmp_path: Path) -> None:
    assert Registry(tmp_path).experts() == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", [False, True])
def test_a_folder_with_other_files_is_no_registry(tmp_path: Path, base_folder: Path, write: bool) -> None:
    for name in ("notes.txt", "a", "b", "c"):
        (tmp_path / name).touch()
    registry = Registry(tmp_path)
    with pytest.raises(RegistryError) as caught:
        registry.add_base(base_folder, name="pico") if write else registry.experts()
    assert str(caught.value) == (
        f"'{tmp_path}' is not a coterie registry: it holds other files (a, b, c, ...) and no index.sqlite. "
        "Choose a registry, or a new or empty folder, with --registry or COTERIE_REGISTRY."
    )
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "a", "b", "c"}


def test_a_file_is_no_registry(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RegistryError) as caught:
        Registry(tmp_path / "file").experts()
    assert str(caught.value) == (
        f"The registry '{tmp_path / 'file'}' is not a folder: choose a folder with --registry or "
        "COTERIE_REGISTRY."
    )


def test_another_programs_database_is_no_index(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "index.sqlite") as connection:
        connection.execute("CREATE TABLE songs (title TEXT)")
    with pytest.raises(RegistryError) as caught:
        Registry(tmp_path).experts()
    assert str(caught.value) == (
        f"'{tmp_path / 'index.sqlite'}' is an SQLite file, but not the index of a coterie registry: choose "
        "another folder with --registry or COTERIE_REGISTRY."
    )


def test_a_file_that_is_no_database_is_a_damaged_index(tmp_path: Path) -> None:
    (tmp_path / "index.sqlite").write_bytes(b"not a database at all" * 100)
    with pytest.raises(IntegrityError) as caught:
        Registry(tmp_path).experts()
    assert str(caught.value) == (
        f"The index of the registry '{tmp_path}' is damaged (file is not a database). Restore "
        "'index.sqlite' from a copy, or recreate it from the log and the blobs with "
        "`coterie verify --rebuild`."
    )


def test_an_index_without_tables_is_a_new_registry(tmp_path: Path, base_folder: Path) -> None:
    (tmp_path / "index.sqlite").touch()  # what a process leaves that is killed right after creating it
    registry = Registry(tmp_path)
    assert registry.experts() == []
    assert registry.add_base(base_folder, name="pico").name == "pico"


def test_a_damaged_index_is_set_aside_with_the_journal_that_belongs_to_it(tmp_path: Path) -> None:
    """SQLite would roll a stale journal back into the new index."""
    (tmp_path / "index.sqlite").write_bytes(b"damaged")
    (tmp_path / "index.sqlite-journal").write_bytes(b"its journal")
    Index(tmp_path / "index.sqlite").set_aside(files=FileSystem())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "index.sqlite.damaged": b"damaged",
        "index.sqlite.damaged-journal": b"its journal",
    }


def test_a_full_database_is_explained(registry: Registry) -> None:
    def shrink(connection: sa.Connection) -> None:
        connection.exec_driver_sql("PRAGMA max_page_count = 1")

    sa.event.listen(registry._storage.index.engine, "begin", shrink, insert=True)

    def write_much() -> None:
        detail = {"who": "ann", "reason": "r" * 100_000}
        with registry._storage.write(doing="writing much") as connection:
            registry._storage.record(connection, "consent.opt_out", subject="acme", detail=detail)

    with pytest.raises(RegistryError) as caught:
        write_much()
    assert str(caught.value) == (
        f"No space left for the registry '{registry.path}' while writing much. Nothing was changed: free "
        "some space and try again."
    )
    assert registry.opt_out_history() == []


def test_the_default_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COTERIE_REGISTRY", str(tmp_path / "mine"))
    assert Registry().path == tmp_path / "mine"
    monkeypatch.setenv("COTERIE_REGISTRY", "")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert Registry().path == tmp_path / "data" / "coterie" / "registry"
    assert repr(Registry("some/where")) == "Registry('some/where')"


def test_an_index_in_memory_has_every_table() -> None:
    with empty_index() as connection:
        assert set(sa.inspect(connection).get_table_names()) == set(metadata.tables)
