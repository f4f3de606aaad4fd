"""Interrupting changes at every call: nothing is half there, nothing acknowledged is lost, the retry succeeds."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from experts.errors import RegistryError
from registry import Registry

SAMPLED = [("KILL", 1), ("ENOSPC", 3), ("EIO", 4), ("EROFS", 5), ("CTRL-C", 4)]
"""Each fault, and at every how many calls it is tried in the fast suite."""
IN_FULL = [pytest.param(name, 1, marks=pytest.mark.slow) for name, step in SAMPLED if step > 1]
MESSAGES = {
    "ENOSPC": "No space left for the registry '{root}' while {doing}. Nothing was changed: free some space and try "
    "again.",
    "EIO": "The registry '{root}' failed while {doing}: Input/output error. Nothing was changed: try again.",
    "EROFS": "The registry '{root}' cannot be written while {doing}: Read-only file system. Nothing was changed: "
    "check the folder's permissions, or choose another folder with --registry or COTERIE_REGISTRY.",
}


@pytest.fixture
def make_fault(killed: type[BaseException]) -> Callable[[str], BaseException]:
    def make(name: str) -> BaseException:
        if name == "KILL":
            return killed()
        if name == "CTRL-C":
            return KeyboardInterrupt()
        number = getattr(errno, name)
        return OSError(number, os.strerror(number))

    return make


def fresh(template: Path, root: Path) -> Path:
    shutil.rmtree(root, ignore_errors=True)
    return shutil.copytree(template, root)


def attempts(
    template: Path,
    root: Path,
    change: Callable[[Registry], object],
    faulty: Any,
    fault: BaseException,
    step: int = 1,
) -> Iterator[tuple[str, BaseException | None, Registry]]:
    """Run the change once for every ``step``-th call, failing there; yield call, what was raised, registry."""
    clean = faulty()
    change(Registry(fresh(template, root), files=clean))
    assert len(clean.calls) > 5
    for number, call in list(enumerate(clean.calls))[::step]:
        files = faulty(at=number, fault=fault)
        raised: BaseException | None = None
        try:
            change(Registry(fresh(template, root), files=files))
        except (RegistryError, KeyboardInterrupt, type(fault)) as error:
            raised = error
        assert len(files.calls) > number
        yield call, raised, Registry(root)


@pytest.mark.parametrize(("fault_name", "step"), [*SAMPLED, *IN_FULL])
def test_a_registration_interrupted_at_any_call(
    template: Path, root: Path, make_expert: Any, faulty: Any, make_fault: Any, fault_name: str, step: int
) -> None:
    folder = make_expert()
    failed = 0
    for call, raised, registry in attempts(
        template, root, lambda registry: registry.register(folder), faulty, make_fault(fault_name), step
    ):
        # A failing removal of leftovers, after all is well, is no failure.
        assert raised is not None or call in {"remove", "remove_folder"}
        assert [record.ref for record in registry.experts()] == ([] if raised else ["acme/contracts@1"])
        assert len(registry.audit()) == (1 if raised else 2)
        assert registry.fsck().ok
        if fault_name in MESSAGES and raised:
            doing = "registering 'acme/contracts' version 1"
            assert str(raised) == MESSAGES[fault_name].format(root=root, doing=doing)
        assert registry.register(folder).sequence == 1  # the retry
        report = registry.fsck()
        assert report.ok
        assert report.orphans == ()
        assert registry.verify_audit().entries == 2
        registry._storage.blobs.clean(older_than=-1)
        assert list((root / "tmp").iterdir()) == []
        failed += raised is not None
    assert failed > 20 / step


@pytest.mark.parametrize("fault_name", ["KILL", "ENOSPC"])
def test_an_opt_out_interrupted_at_any_call(
    build_library: Any, root: Path, make_expert: Any, faulty: Any, make_fault: Any, fault_name: str
) -> None:
    library = build_library(lambda registry: registry.register(make_expert()))
    for call, raised, registry in attempts(
        library,
        root,
        lambda it: it.opt_out("acme", reason="x"),
        faulty,
        make_fault(fault_name),
        step=2,
    ):
        assert raised is not None or call in {"remove", "remove_folder"}
        assert len(registry.opt_outs()) == (0 if raised else 1)
        assert registry.fsck().ok
        if raised is None:
            continue
        assert registry.opt_out("acme", reason="y").reason == "y"
        assert registry.audit()[-1].detail["reason"] == "y"
        assert registry.fsck().ok
        assert registry.verify_audit().entries == 3


@pytest.mark.parametrize("fault_name", ["KILL", "EIO"])
def test_routing_artefacts_interrupted_at_any_call(
    template: Path,
    root: Path,
    tmp_path: Path,
    write_routing: Any,
    faulty: Any,
    make_fault: Any,
    fault_name: str,
) -> None:
    info = write_routing(tmp_path / "routing")

    def change(registry: Registry) -> object:
        return registry.set_base_routing("pico", tmp_path / "routing", info)

    for call, raised, registry in attempts(template, root, change, faulty, make_fault(fault_name)):
        assert raised is not None or call in {"remove", "remove_folder"}
        assert registry.base("pico").routing == (None if raised else info)
        change(registry)
        assert registry.base("pico").routing == info
        assert registry.fsck().ok
        assert len(registry.audit()) == 2


def test_creating_a_registry_interrupted_at_any_early_call(
    tmp_path: Path, base_folder: Path, faulty: Any, killed: Any
) -> None:
    files = faulty()
    Registry(tmp_path / "clean", files=files).add_base(base_folder, name="pico")
    first_file = files.calls.index("create")
    assert first_file > 5
    root = tmp_path / "registry"
    for number in range(first_file + 1):
        with pytest.raises(killed):
            Registry(root, files=faulty(at=number, fault=killed())).add_base(base_folder, name="pico")
        assert Registry(root).bases() == []
    Registry(root).add_base(base_folder, name="pico")
    assert Registry(root).fsck().ok


@pytest.mark.parametrize("moment", ["before_cursor_execute", "after_cursor_execute", "commit"])
def test_a_registration_killed_at_any_statement(
    template: Path, root: Path, make_expert: Any, killed: type[BaseException], moment: str
) -> None:
    folder = make_expert()
    count, number = 0, 0

    def run(*, at: int | None) -> None:
        nonlocal count
        registry = Registry(fresh(template, root))
        count = 0

        def interrupt(*_: Any) -> None:
            nonlocal count
            count += 1
            if count - 1 == at:
                raise killed

        sa.event.listen(registry._storage.index.engine, moment, interrupt)
        registry.register(folder)

    run(at=None)
    total = count
    assert total >= 3
    for number in range(0, total, 1 if moment == "commit" else 3):
        with pytest.raises(killed):
            run(at=number)
        registry = Registry(root)
        assert registry.fsck().ok
        before = len(registry.experts())
        assert before in (0, 1)  # 1: killed after the commit, before the answer
        assert len(registry.audit()) == 1 + before
        assert registry.register(folder).sequence == 1
        assert registry.verify_audit().entries == 2


def test_a_rebuild_takes_up_an_entry_that_was_logged_but_not_committed(
    template: Path, tmp_path: Path, make_expert: Any, killed: type[BaseException]
) -> None:
    """Killed between the two, a change may count or not; after a rebuild it is whole."""
    root = fresh(template, tmp_path / "registry")
    registry = Registry(root)

    def kill(_: Any) -> None:
        if (root / "log" / "00000002.json").exists():
            raise killed

    sa.event.listen(registry._storage.index.engine, "commit", kill)
    with pytest.raises(killed):
        registry.register(make_expert())
    survivor = Registry(root)
    assert survivor.experts() == []
    assert survivor.fsck().ok
    assert survivor.fsck(rebuild=True).ok
    assert [record.ref for record in survivor.experts()] == ["acme/contracts@1"]


@pytest.mark.parametrize("fault_name", ["KILL", "ENOSPC"])
def test_a_rebuild_interrupted_keeps_what_there_was(
    build_library: Any, root: Path, make_expert: Any, make_fault: Any, fault_name: str
) -> None:
    library = build_library(lambda registry: registry.register(make_expert()))
    for number in itertools.count(step=7):
        registry = Registry(fresh(library, root))
        before, count = registry.experts(), 0

        def interrupt(*_: Any, number: int = number) -> None:
            nonlocal count
            count += 1
            if count - 1 == number:
                raise make_fault(fault_name)

        sa.event.listen(registry._storage.index.engine, "before_cursor_execute", interrupt)
        try:
            registry.fsck(rebuild=True)
        except (RegistryError, type(make_fault(fault_name))):
            assert Registry(root).experts() == before
            assert Registry(root).fsck().ok
        else:
            break  # it was through before that statement
    assert number > 30


def test_everything_is_on_the_disk_before_the_commit(
    build_library: Any, root: Path, tmp_path: Path, make_expert: Any, faulty: Any, write_routing: Any
) -> None:
    """A power cut takes whatever was not synced, in any order."""
    library = build_library(lambda registry: registry.register(make_expert()))
    info = write_routing(tmp_path / "routing", seed=5)
    files = faulty()
    registry = Registry(fresh(library, root), files=files)
    commits: list[int] = []
    sa.event.listen(registry._storage.index.engine, "commit", lambda _: commits.append(len(files.done)))
    registry.register(make_expert("hosp/icd", routing=True, seed=3))
    registry.set_base_routing("pico", tmp_path / "routing", info)
    registry.opt_out("acme", reason="x")
    moved = 0
    created, synced = dict[int, Path](), set[Path]()
    for position, (call, arguments, result) in enumerate(files.done):
        if call == "create":
            created[result] = arguments[0]
        elif call == "write":
            synced.discard(created[arguments[0]])
        elif call == "sync":
            synced.add(created[arguments[0]])
        elif call == "rename":
            source, target = arguments
            assert source in synced
            until = min(commit for commit in commits if commit > position)
            assert ("sync_folder", (target.parent,), None) in files.done[position:until]
            moved += 1
    # Weights, routing and card (the config was there); artefacts and their record; three log entries.
    assert moved == 3 + 2 + 3


def test_what_a_killed_process_left_is_cleaned_when_it_is_old(
    template: Path, tmp_path: Path, make_expert: Any, faulty: Any, killed: Any
) -> None:
    root = fresh(template, tmp_path / "registry")
    clean = faulty()
    Registry(fresh(template, tmp_path / "clean"), files=clean).register(make_expert())
    with pytest.raises(killed):
        Registry(root, files=faulty(at=clean.calls.index("protect"), fault=killed())).register(make_expert())
    (left,) = (root / "tmp").iterdir()
    Registry(root).register(make_expert())
    assert left.exists()
    assert Registry(root).fsck().abandoned == ()
    for path in (*left.rglob("*"), left):
        os.utime(path, (0, 0))
    assert Registry(root).fsck().abandoned == (left.name,)
    Registry(root).register(make_expert("hosp/icd"))
    assert not left.exists()
