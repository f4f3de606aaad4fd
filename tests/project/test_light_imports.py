"""What may be imported by what: nothing heavy on the way to a help page, a card or a list."""

from __future__ import annotations

import json
from typing import Any

import pytest

HEAVY = [
    "torch",
    "transformers",
    "peft",
    "ray",
    "mergekit",
    "sentence_transformers",
    "matplotlib",
    "huggingface_hub",
]

PROBE = """
import json, sys
{statement}
print(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))
"""


def loaded(python: Any, statement: str) -> set[str]:
    result = python("-c", PROBE.format(statement=statement))
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


LIGHT = [
    "experts",
    "experts.card",
    "experts.admission",
    "experts.package",
    "registry",
    "registry.store",
    "composer",
    "composer.manifest",
    "composer.planning",
    "composer.building",
    "composer.export.exporting",
    "composer.export.importing",
    "pipelines",
    "pipelines.baselines",
    "pipelines.baselines.context",
    "pipelines.train",
    "pipelines.train.job",
    "pipelines.cli.main",
    "pipelines.cli.app",
]

ONE_BY_ONE = """
import importlib
for name in {names}:
    importlib.import_module(name)
    heavy = set({heavy}) & set(sys.modules)
    assert not heavy, f"importing {{name}} loads {{sorted(heavy)}}"
"""


def test_nothing_heavy_is_imported(python: Any) -> None:
    loaded(python, ONE_BY_ONE.format(names=LIGHT, heavy=HEAVY))


def test_the_probe_sees_what_is_heavy(python: Any) -> None:
    """The control."""
    with pytest.raises(AssertionError, match=r"importing huggingface_hub loads \['huggingface_hub'\]"):
        loaded(python, ONE_BY_ONE.format(names=[*LIGHT[:2], "huggingface_hub"], heavy=HEAVY))


HELP = """
import contextlib, io
from pipelines.cli.app import command

def pages(group, path):
    yield path
    for name, inner in getattr(group, "commands", {}).items():
        yield from pages(inner, [*path, name])

root = command()
for path in list(pages(root, [])):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        root.main([*path, "--help"], prog_name="coterie")
    assert out.getvalue().startswith("Usage: coterie"), path
"""


def test_no_help_page_loads_anything_heavy(python: Any) -> None:
    assert loaded(python, HELP).isdisjoint([*HEAVY, "numpy", "sqlalchemy", "alembic", "rich"])


LIST = """
from pipelines.cli.app import command
try:
    command().main(["list"], prog_name="coterie")
except SystemExit:
    pass
"""


def test_list_loads_little(python: Any) -> None:
    assert loaded(python, LIST).isdisjoint([*HEAVY, "numpy", "alembic", "rich"])


def test_help_takes_less_than_three_tenths_of_a_second(python: Any) -> None:
    """Processor time, the best of three, so that other processes on the machine do not count."""
    resource = pytest.importorskip("resource")

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert python("-m", "pipelines.cli", "--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return float(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)

    assert min(seconds() for _ in range(3)) < 0.3
