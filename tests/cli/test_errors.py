"""Whatever a command raises becomes one message on stderr and an exit code."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from experts.errors import AssetError, ManifestError, TrainingError
from pipelines.cli.errors import guarded, resumable, writing_to

Usage = namedtuple("Usage", "total used free")


def raising(error: BaseException) -> Callable[[], Any]:
    def run() -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ManifestError("It is wrong.", problems=["a", "b"]), 2, "Error: It is wrong.\n  - a\n  - b\n"),
        (TrainingError("It failed."), 1, "Error: It failed.\n"),
        (AssetError("Not\x1b[31m there."), 1, "Error: Not\\x1b[31m there.\n"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/data/x\x07"),
            1,
            "Error: Permission denied: /data/x\\x07\n",
        ),
        (OSError(errno.EIO, "Input/output error"), 1, "Error: Input/output error.\n"),
        (TimeoutError(), 1, "Error: TimeoutError.\n"),
        (typer.Abort(), 1, "Aborted.\n"),
        (KeyboardInterrupt(), 130, "Interrupted.\n"),
        (
            KeyError("x"),
            1,
            "Error: something unexpected happened (KeyError: 'x'). This is a fault in coterie; set "
            "COTERIE_TRACEBACK=1 to see where it came from.\n",
        ),
        (
            NotImplementedError(),
            1,
            "Error: something unexpected happened (NotImplementedError). This is a fault in coterie; set "
            "COTERIE_TRACEBACK=1 to see where it came from.\n",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_one_message_and_a_code(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded(raising(error)) == code
    assert capsys.readouterr() == ("", message)


def test_a_result_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(lambda: None) == 0
    assert guarded(lambda: 3) == 3
    assert capsys.readouterr() == ("", "")


def test_traceback_on_request(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COTERIE_TRACEBACK", "1")
    assert guarded(raising(KeyError("x"))) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback (most recent call last):\n")
    assert shown.endswith("to see where it came from.\n")
    monkeypatch.setenv("COTERIE_TRACEBACK", "0")
    guarded(raising(KeyError("x")))
    assert "Traceback" not in capsys.readouterr().err


def test_interrupt_with_advice(capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> None:
        with resumable("the checkpoint is kept."):
            raise KeyboardInterrupt

    assert guarded(run) == 130
    assert capsys.readouterr() == ("", "Interrupted: the checkpoint is kept.\n")


def test_full_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 1234, 1234))

    def run() -> None:
        with writing_to(tmp_path / "not" / "there", needed=5_000_000):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert guarded(run) == 2
    assert capsys.readouterr().err == (
        f"Error: No space is left on the device that holds {tmp_path}/not/there: 5.0 MB are needed, 1.2 kB are "
        "free. Nothing half-written was kept. Free some space or choose another place and try again.\n"
    )


def test_full_device_elsewhere(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10, 10, 0))
    assert guarded(raising(OSError(errno.ENOSPC, "No space left", "/tmp/x.safetensors"))) == 2
    assert guarded(raising(OSError(errno.EDQUOT, "Disk quota exceeded"))) == 2
    assert capsys.readouterr().err == (
        "Error: No space is left on the device that holds /tmp/x.safetensors: 0 bytes are free. Nothing "
        "half-written was kept. Free some space or choose another place and try again.\n"
        "Error: The quota is used up. Nothing half-written was kept. Free some space and try again.\n"
    )


def test_other_errors_pass_through_writing_to(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), writing_to(tmp_path):
        (tmp_path / "x").read_bytes()


class TestUsage:
    """A wrong command line: usage, the way to the help, and the nearest name."""

    def test_command(self, run: Any) -> None:
        outcome = run("lst")
        assert (outcome.code, outcome.out) == (2, "")
        assert outcome.err.startswith(
            "Usage: coterie [OPTIONS] COMMAND [ARGS]...\nTry 'coterie --help' for help.\n\n"
            "Error: Unknown command 'lst'. Did you mean 'list'? Known: add, attribute, audit, base, "
        )

    def test_command_of_a_group(self, run: Any) -> None:
        outcome = run("opt-out", "ad")
        assert (outcome.code, outcome.out) == (2, "")
        assert outcome.err == (
            "Usage: coterie opt-out [OPTIONS] COMMAND [ARGS]...\nTry 'coterie opt-out --help' for help.\n\n"
            "Error: Unknown command 'ad'. Did you mean 'add'? Known: add, list, remove.\n"
        )

    def test_option(self, run: Any) -> None:
        outcome = run("list", "--domian", "law")
        assert (outcome.code, outcome.out) == (2, "")
        assert outcome.err == (
            "Usage: coterie list [OPTIONS]\nTry 'coterie list --help' for help.\n\n"
            "Error: Unknown option '--domian'. Did you mean '--domain'? Known: --all-versions, --base, --domain, "
            "--help, --json, --kind, --owner, --registry, -h.\n"
        )

    def test_missing_argument(self, run: Any) -> None:
        outcome = run("show")
        assert outcome.code == 2
        assert outcome.err.endswith("\n\nError: Missing argument 'EXPERT'.\n")

    def test_wrong_value(self, run: Any) -> None:
        outcome = run("generate", "out", "--prompt", "x", "--max-new-tokens", "many")
        assert outcome.code == 2
        assert outcome.err == (
            "Usage: coterie generate [OPTIONS] {OUT}\nTry 'coterie generate --help' for help.\n\n"
            "Error: Invalid value for '--max-new-tokens': Input should be a valid integer, unable to "
            "parse string as an integer\n"
        )

    def test_no_arguments_show_the_help(self, run: Any) -> None:
        outcome = run()
        assert outcome.code == 2
        assert outcome.err.startswith(
            "Usage: coterie [OPTIONS] COMMAND [ARGS]...\n\n  Compose domain experts"
        )
