"""Every command and option of the command line, frozen: scripts depend on them.

When a change is meant, write the list anew and review the difference:

    COTERIE_UPDATE_SURFACE=1 .venv/bin/python -m pytest tests/project/test_cli_surface.py
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SURFACE = Path(__file__).with_name("cli_surface.txt")


def describe(command: Any, path: str) -> Iterator[str]:
    """One line a command, then one a parameter: its names, its type, whether it must be given, its default."""
    yield path
    for parameter in command.params:
        kind = parameter.type_descriptor.annotation
        names = (
            ", ".join(parameter.opts)
            if parameter.opts[0].startswith("-")
            else parameter.metavar or parameter.name
        )
        details = [getattr(kind, "__name__", str(kind))]
        details += ["required"] if parameter.required else []
        details += [f"default {parameter.default}"] if parameter.default not in (None, False) else []
        yield f"    {names}  ({'; '.join(details)})"
    for name, inner in sorted(getattr(command, "commands", {}).items()):
        yield from describe(inner, f"{path} {name}")


def surface() -> str:
    from pipelines.cli.app import command

    return "\n".join(describe(command(), "coterie")) + "\n"


def test_surface_is_as_frozen() -> None:
    current = surface()
    if os.environ.get("COTERIE_UPDATE_SURFACE"):
        SURFACE.write_text(current)
    assert current == SURFACE.read_text(), (
        "the command line has changed; if that is meant, run "
        "COTERIE_UPDATE_SURFACE=1 .venv/bin/python -m pytest tests/project/test_cli_surface.py"
    )


def test_every_command_has_help_and_an_example(run_help: Any) -> None:
    for line in SURFACE.read_text().splitlines():
        if line.startswith("coterie"):
            page = run_help(line.split()[1:])
            assert "\n  Examples:\n    " in page, f"{line}: no example"
            assert f"    {line}" in page, f"{line}: no example of this command"


def test_every_option_is_explained() -> None:
    from pipelines.cli.app import command

    def check(inner: Any, path: str) -> None:
        for parameter in inner.params:
            assert parameter.help, f"{path}: {parameter.name} has no help"
        for name, child in getattr(inner, "commands", {}).items():
            check(child, f"{path} {name}")

    check(command(), "coterie")


def test_no_summary_is_cut_off(run_help: Any) -> None:
    for path in ([], ["base"], ["opt-out"], ["audit"]):
        assert "..." not in run_help(path).split("Commands:")[1], path
