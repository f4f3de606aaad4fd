"""The command as a process: entry points, pipes, signals, shell completion."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

Call = Callable[..., "subprocess.CompletedProcess[str]"]


def environment(**extra: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)} | extra


@pytest.fixture
def call(tmp_path: Path) -> Call:
    def run(*args: object, **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pipelines.cli", *map(str, args)],
            cwd=tmp_path,
            env=environment(**extra),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


def test_version(call: Call) -> None:
    result = call("--version")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("coterie 0")


def test_an_error_has_no_traceback_unless_asked_for(call: Call, tmp_path: Path) -> None:
    result = call("show", "acme/x", COTERIE_REGISTRY=str(tmp_path / "none"))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        f"Error: Unknown expert 'acme/x'. There is no expert yet. The registry is '{tmp_path}/none'.\n"
    )
    asked = call("show", "acme/x", COTERIE_REGISTRY=str(tmp_path / "none"), COTERIE_TRACEBACK="1")
    assert asked.returncode == 2
    assert asked.stderr.startswith("Traceback (most recent call last):\n")
    assert asked.stderr.endswith(result.stderr)


def test_a_closed_pipe_is_no_error(filled: Path) -> None:
    """As in ``coterie list | head -0``."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    result = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "--registry", str(filled), "list"],
        env=environment(),
        stdout=write_end,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(write_end)
    assert result.stderr == ""


INTERRUPTED = """
import os, signal, sys, time
from pipelines.cli.main import main

# a shell's background jobs inherit that the signal is ignored
signal.signal(signal.SIGINT, signal.default_int_handler)

class Stdin:
    def read(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(90)

sys.stdin = Stdin()
sys.argv = ["coterie", "generate", "anywhere", "--prompt", "-"]
main()
"""


def test_ctrl_c(tmp_path: Path) -> None:
    """A real SIGINT, while the command waits for stdin."""
    result = subprocess.run(
        [sys.executable, "-c", INTERRUPTED],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "Interrupted.\n")


@pytest.mark.parametrize(
    ("words", "suggested"),
    [
        ("coterie sh", {"show"}),
        ("coterie show ac", {"acme/contracts"}),
        ("coterie opt-out add h", {"hosp"}),
        ("coterie generate out --opt-out ", {"acme", "hosp", "soft"}),
        ("coterie base show ", {"pico"}),
        ("coterie list --dom", {"--domain"}),
    ],
)
def test_completion(words: str, suggested: set[str], call: Call, filled: Path) -> None:
    result = call(
        COTERIE_REGISTRY=str(filled),
        _COTERIE_COMPLETE="complete_bash",
        COMP_WORDS=words,
        COMP_CWORD=str(len(words.split(" ")) - 1),
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert set(result.stdout.split()) == suggested


def test_completion_stays_silent_where_there_is_no_registry(call: Call, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = call(
        COTERIE_REGISTRY=str(tmp_path / "file"),
        _COTERIE_COMPLETE="complete_bash",
        COMP_WORDS="coterie show ",
        COMP_CWORD="2",
    )
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "", "")


def test_ten_thousand_experts_are_listed_within_a_second(call: Call, registry: Path) -> None:
    """Processor time of the whole command, so that other processes on the machine do not count."""
    resource = pytest.importorskip("resource")
    index = sqlite3.connect(registry / "index.sqlite")
    (row,) = index.execute("SELECT * FROM experts WHERE name = 'acme/contracts'").fetchall()
    columns = [name for _, name, *_ in index.execute("PRAGMA table_info(experts)")]
    template = dict(zip(columns, row, strict=True))
    rows = [
        template
        | {
            "sequence": 100 + i,
            "name": f"owner{i % 97}/expert{i}",
            "owner": f"owner{i % 97}",
            "digest": f"{i:064x}",
        }
        for i in range(10_000)
    ]
    index.executemany(f"INSERT INTO experts VALUES ({', '.join(f':{name}' for name in columns)})", rows)
    index.commit()
    index.close()

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = call("--registry", registry, "list")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert len(result.stdout.splitlines()) == 10_004
        return float(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)

    assert any(seconds() < 1.0 for _ in range(3))


def test_a_terminal_sees_progress_and_stdout_stays_clean(base_folder: Path, tmp_path: Path) -> None:
    """A bar with bytes and a rate, on stderr only, where stderr is a terminal."""
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", "base", "add", str(base_folder), "--name", "pico", "--json"],
        cwd=tmp_path,
        env=environment(COTERIE_REGISTRY=str(tmp_path / "r"), TERM="xterm", COLUMNS="100"),
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # what Linux raises when the other side is closed
        while data := os.read(ours, 1 << 16):
            shown += data
    os.close(ours)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert json.loads(out)["name"] == "pico"
    assert b"Adding pico" in shown
    assert b"kB" in shown
    assert b"B/s" in shown
