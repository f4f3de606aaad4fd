"""Many processes at once, and processes that are killed: in processes of their own, where forking is safe."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experts.card import ExpertCard
from registry import Registry

CONCURRENT = """
import json, os, sys
from pathlib import Path
from registry import Registry
import registry.enrol, registry.bases

root, packages, workers = Path(sys.argv[1]), sorted(Path(sys.argv[2]).iterdir()), int(sys.argv[3])
children = []
for number in range(workers):
    child = os.fork()
    if child == 0:
        try:
            own = Registry(root)
            for folder in packages[number::workers]:
                record = own.register(folder)
                assert record in own.experts(owner=record.owner)
            own.opt_out(record.owner, reason="done", by="worker")
            os._exit(0)
        except BaseException as error:
            print(type(error).__name__, error, file=sys.stderr, flush=True)
            os._exit(1)
    children.append(child)
print(json.dumps([os.waitpid(child, 0)[1] for child in children]))
"""

KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
from registry import Registry
import registry.enrol, registry.bases

root, packages = Path(sys.argv[1]), sorted(Path(sys.argv[2]).iterdir())
random.seed(7)
acknowledged, kills = [], 0
while len(acknowledged) < len(packages) and kills < int(sys.argv[3]):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        own = Registry(root)
        for number in range(len(acknowledged), len(packages)):
            record = own.register(packages[number])
            os.write(write, json.dumps(record.ref).encode() + b"\\n")
        os._exit(0)
    os.close(write)
    time.sleep(random.uniform(0.0, 0.15))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    kills += os.WIFSIGNALED(status)
    with os.fdopen(read) as answers:
        acknowledged += [json.loads(line) for line in answers]
    # Every answer holds, and at most the one change that was under way counts without having been answered.
    present = [record.ref for record in Registry(root).experts(all_versions=True)]
    assert set(acknowledged) <= set(present) and len(present) <= len(acknowledged) + 1, (acknowledged, present)
    report = Registry(root).fsck()
    assert report.ok, report
print(json.dumps({"acknowledged": acknowledged, "kills": kills}))
"""


def run(script: str, *arguments: object) -> Any:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    return json.loads(result.stdout)


@pytest.fixture
def make_packages(make_expert: Any, tmp_path: Path) -> Any:
    """Make packages quickly: one adapter under many names."""

    def make(names: list[str]) -> Path:
        model = make_expert("acme/contracts")
        fields = json.loads((model / "card.json").read_text())
        for number, name in enumerate(names):
            folder = tmp_path / "packages" / f"{number:04d}"
            shutil.copytree(model, folder)
            card = ExpertCard.create(**{**fields, "name": name, "owner": name.partition("/")[0]})
            (folder / "card.json").write_bytes(card.to_bytes())
        return tmp_path / "packages"

    return make


def test_eight_processes_lose_and_tear_nothing(registry: Registry, make_packages: Any) -> None:
    workers, each = 8, 25
    names = [f"owner{number % workers}/expert{number}" for number in range(workers * each)]
    assert run(CONCURRENT, registry.path, make_packages(names), workers) == [0] * workers
    found = registry.experts()
    assert sorted(record.name for record in found) == sorted(names)
    assert sorted(record.sequence for record in found) == list(range(1, workers * each + 1))
    assert [record.owner for record in registry.opt_outs()] == [f"owner{number}" for number in range(workers)]
    assert registry.verify_audit().entries == 1 + workers * each + workers
    report = registry.fsck()
    assert report.ok
    assert report.orphans == ()


def test_processes_that_create_one_registry_together(tmp_path: Path, base_folder: Path) -> None:
    script = CONCURRENT.replace("for folder in packages[number::workers]:", "for _ in ():")
    script = script.replace(
        'own.opt_out(record.owner, reason="done", by="worker")',
        'own.add_base(sys.argv[2], name=f"base{number % 2}")',
    )
    root = tmp_path / "registry"
    assert run(script, root, base_folder, 4) == [0] * 4
    registry = Registry(root)
    assert [base.name for base in registry.bases()] == ["base0", "base1"]
    assert registry.verify_audit().entries == 2
    assert registry.fsck().ok


def test_killed_processes_lose_no_answer_and_leave_nothing_torn(
    registry: Registry, make_packages: Any
) -> None:
    names = [f"acme/expert{number:02d}" for number in range(60)]
    packages = make_packages(names)
    result = run(KILLED, registry.path, packages, 12)
    assert result["kills"] >= 5
    for folder in sorted(packages.iterdir()):  # the retry of everything succeeds
        registry.register(folder)
    found = registry.experts()
    assert [record.name for record in found] == names
    assert sorted(record.sequence for record in found) == list(range(1, len(names) + 1))
    report = registry.fsck()
    assert report.ok
    assert registry.verify_audit().entries == 1 + len(names)
