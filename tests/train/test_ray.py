"""Two owners in Rays of their own: nothing of the text of one is found anywhere but with that owner.

Canaries in four encodings are planted in one owner's text. While the other owner still trains, the memory of
the hub and of all of the other owner's processes is read, and every file that was written outside the first
owner's folders. The same search has to find a deliberate leak.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="reads memory through /proc"),
    pytest.mark.timeout(600),
]

CANARIES = 50
CHUNK = 16 << 20

HUB = """
import signal
import sys
from pathlib import Path
from pipelines.train import DomainJob, train_jobs
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
jobs = [DomainJob.model_validate_json(line) for line in Path(sys.argv[1]).read_text().splitlines()]
def say(report):
    print(report.name, report.stage, report.error, flush=True)
train_jobs(jobs, out_dir=Path(sys.argv[2]), progress=say, threads=1)
"""

LEAK = """
import sys
from pathlib import Path
from pipelines.train.ray_runner import OwnerRay

def unsealed(path):
    int(Path(path).read_text())

own = OwnerRay(Path(sys.argv[1]), cpus=1)
try:
    own._ray.get(own._ray.remote(max_retries=0)(unsealed).remote(sys.argv[2]))
except Exception as error:
    kept = error
print("leaked", flush=True)
sys.stdin.readline()
own.stop()
"""


@pytest.fixture(scope="module")
def canaries():
    """A mark that all canaries begin with, and the canaries."""
    mark = f"canary-{secrets.token_hex(8)}-"
    return mark, [f"{mark}{number:02}-{secrets.token_hex(4)}" for number in range(CANARIES)]


def _encodings(mark: str) -> dict[str, bytes]:
    ids = mark.encode()  # the tokenizer's ids are the bytes
    return {
        "utf-8": mark.encode(),
        "utf-16": mark.encode("utf-16-le"),
        "token ids int32": b"".join(value.to_bytes(4, "little") for value in ids),
        "token ids int64": b"".join(value.to_bytes(8, "little") for value in ids),
    }


def _found_in(read, size: int, patterns: dict[str, bytes]) -> set[str]:
    """Which patterns occur in ``size`` bytes that ``read(offset, length)`` gives."""
    # one expression for all: plain search is slow on patterns with zeros in memory full of zeros
    search = re.compile(b"|".join(map(re.escape, patterns.values())))
    names = {pattern: name for name, pattern in patterns.items()}
    overlap = max(map(len, names)) - 1
    found: set[str] = set()
    for offset in range(0, size, CHUNK):
        data = read(offset, min(CHUNK + overlap, size - offset))
        found |= {names[hit.group()] for hit in search.finditer(data)}
    return found


def _present(pagemap: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Spans of an anonymous mapping that hold something: pages in memory or in swap, with a page around each span.

    All others read as zeros, and nearly all pages of a thread's stack are such.
    """
    size = os.sysconf("SC_PAGE_SIZE")
    entries = np.frombuffer(os.pread(pagemap, (end - start) // size * 8, start // size * 8), dtype=np.uint64)
    if len(entries) < (end - start) // size:  # nothing is passed over unseen
        yield start, end
        return
    held = np.concatenate([[False], entries >> np.uint64(62) != 0, [False]])  # bit 63: in memory, 62: in swap
    edges = np.flatnonzero(held[1:] != held[:-1])
    for first, last in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        yield max(start, start + (first - 1) * size), min(end, start + (last + 1) * size)


def _in_memory(pid: int, patterns: dict[str, bytes]) -> set[str]:
    """Search every writable mapping of a process."""
    found: set[str] = set()
    try:
        maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
        memory, pagemap = (os.open(f"/proc/{pid}/{name}", os.O_RDONLY) for name in ("mem", "pagemap"))
    except (FileNotFoundError, ProcessLookupError):
        return found
    try:
        for line in maps:
            span, mode, *_, inode = line.split(maxsplit=5)[:5]
            if not mode.startswith("rw"):
                continue
            start, end = (int(part, 16) for part in span.split("-"))
            for first, last in _present(pagemap, start, end) if inode == "0" else [(start, end)]:

                def read(offset: int, length: int, first: int = first) -> bytes:
                    try:
                        return os.pread(memory, length, first + offset)
                    except OSError:
                        return b""

                found |= _found_in(read, last - first, patterns)
    finally:
        os.close(memory)
        os.close(pagemap)
    return found


def _in_files(folders, patterns, *, but: Path) -> dict[str, set[str]]:
    hits = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.is_symlink() and but not in path.parents:
                data = path.read_bytes()
                names = {name for name, pattern in patterns.items() if pattern in data}
                names |= {name for name, pattern in patterns.items() if pattern in os.fsencode(path.name)}
                if names:
                    hits[str(path)] = names
    return hits


def _start(script: str, *arguments: Path, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=cwd,
    )


def _descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def _without_ended(hub: subprocess.Popen[str]) -> list[psutil.Process]:
    """Wait until one of the two agents has ended; the processes of the other."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        agents = [p for p in psutil.Process(hub.pid).children() if p.status() != psutil.STATUS_ZOMBIE]
        if len(agents) == 1:
            return [*agents, *agents[0].children(recursive=True)]
        time.sleep(0.1)
    raise AssertionError("the first owner's agent has not ended")


def _trainers(family: list[psutil.Process], folder: Path) -> list[psutil.Process]:
    """The processes that hold the lock of the job in a folder."""
    return [p for p in family if any(file.path == str(folder / "lock") for file in p.open_files())]


def _suspend(trainers: list[psutil.Process]) -> None:
    assert trainers != []
    for trainer in trainers:
        trainer.suspend()


def _setting(process: psutil.Process, name: str) -> str | None:
    return process.environ().get(name)


def _core_limit(process: psutil.Process) -> str:
    lines = Path(f"/proc/{process.pid}/limits").read_text().splitlines()
    return next(line for line in lines if line.startswith("Max core file size")).split()[4]


@pytest.fixture
def processes():
    """Processes started by a test; whatever is left of them is killed afterwards."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        if process.poll() is None:
            family = _descendants(process.pid)
            process.kill()
            for member in family:
                if member.is_running():
                    member.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_one_owners_text_is_with_that_owner_alone(make_job, tmp_path, canaries, processes):
    mark, words = canaries
    patterns = _encodings(mark)
    acme, hub_folder = tmp_path / "acme", tmp_path / "hub"
    acme.mkdir()
    hub_folder.mkdir()
    text = [f"{word} hereby licenses {word} to the licensee of {word}" for word in words]
    (acme / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in text))
    (acme / "broken.jsonl").write_text("".join(text) + "\n")
    mine = {"data": str(acme / "text.jsonl"), "workdir": str(acme / "private"), "held_out": 0.1}
    jobs = [
        make_job(name="acme/good", steps=40, **mine),
        make_job(name="acme/whole", kind="dense", rank=16, steps=4, **mine),
        make_job(name="acme/broken", **{**mine, "data": str(acme / "broken.jsonl")}),
        make_job(name="bell/slow", steps=100_000, workdir=str(tmp_path / "bell"), checkpoint_every=1000),
    ]
    (hub_folder / "jobs.jsonl").write_text("".join(job.model_dump_json() + "\n" for job in jobs))
    out = hub_folder / "out"
    temporary = Path(tempfile.gettempdir())
    there_before = {*temporary.iterdir(), *Path("/dev/shm").iterdir()}

    hub = _start(HUB, hub_folder / "jobs.jsonl", out, cwd=hub_folder)
    processes.append(hub)
    stages: dict[str, str] = {}
    trainers: list[psutil.Process] = []
    for line in hub.stdout:
        name, stage, _ = line.split()
        stages[name] = stage
        if stages.get("bell/slow") == "training" and not trainers:
            trainers = _trainers(_descendants(hub.pid), tmp_path / "bell" / "bell--slow")
            _suspend(trainers)  # its steps would only take time from the first owner's
        assert stages.get("bell/slow") not in ("failed", "stopped"), (tmp_path / "bell").rglob("*.log")
        if [stages.get(job.name) for job in jobs] == ["done", "done", "failed", "training"]:
            break
    family = _without_ended(hub)
    assert len(family) >= 5  # the other owner's agent and Ray
    for trainer in trainers:
        trainer.resume()
    time.sleep(1)  # whatever came for the other owner meanwhile arrives
    _suspend(trainers)

    # a job that was done leaves its expert and nothing else; its owner has the whole log
    assert sorted(path.name for path in out.rglob("*") if path.is_dir()) == ["acme", "good", "whole"]
    assert "text.jsonl" not in (acme / "private" / "acme--good" / "train.log").read_text()
    assert "broken.jsonl, line 1: not JSON" in (acme / "private" / "acme--broken" / "train.log").read_text()

    in_memory = {
        p.pid: hits for p in [psutil.Process(hub.pid), *family] if (hits := _in_memory(p.pid, patterns))
    }
    assert in_memory == {}
    new = {*temporary.iterdir(), *Path("/dev/shm").iterdir()} - there_before
    written = _in_files([tmp_path, *(path for path in new if path.is_dir())], patterns, but=acme)
    assert written == {}
    # the search itself works on this text, in every encoding that is on the disk
    assert _in_files([acme], patterns, but=tmp_path / "nothing") != {}

    # permissions: only the owner enters the temporary folder, only the owner reads the token and the log
    folders = [path for path in new if path.name.startswith("coterie-") and (path / "token").exists()]
    assert folders != []
    for folder in folders:
        assert folder.stat().st_mode & 0o777 == 0o700
        assert (folder / "token").stat().st_mode & 0o777 == 0o600
    log = acme / "private" / "acme--good" / "train.log"
    assert log.stat().st_mode & 0o777 == 0o600

    assert {_setting(p, "RAY_AUTH_MODE") for p in family} == {"token", None}
    server = next(p for p in family if "gcs_server" in p.name())
    assert _setting(server, "RAY_AUTH_MODE") == "token"
    assert any(_setting(server, "RAY_AUTH_TOKEN_PATH") == str(folder / "token") for folder in folders)
    assert all(_core_limit(p) == "0" for p in family)

    # Ctrl-C: a checkpoint, no half-written folder, no process left
    for trainer in trainers:
        trainer.resume()
    hub.send_signal(signal.SIGINT)
    rest = hub.communicate(timeout=60)[0]
    assert hub.returncode != 0
    assert "bell/slow stopped KeyboardInterrupt" in rest
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []
    assert len(list((tmp_path / "bell" / "bell--slow").glob("checkpoint-*.safetensors"))) == 1
    assert not (out / "bell").exists()
    assert [folder for folder in folders if folder.exists()] == []


def test_the_search_finds_an_unsealed_exception(tmp_path, canaries, processes):
    """The positive control: the same Ray, the same search, no seal."""
    mark, words = canaries
    secret = tmp_path / "secret.txt"
    secret.write_text(" ".join(words))
    with tempfile.TemporaryDirectory(prefix="coterie-") as folder:
        process = _start(LEAK, Path(folder), secret, cwd=tmp_path)
        processes.append(process)
        assert process.stdout.readline() == "leaked\n"
        members = [psutil.Process(process.pid), *_descendants(process.pid)]
        hits = {
            " ".join(p.cmdline())[:80]: found
            for p in members
            if (found := _in_memory(p.pid, _encodings(mark)))
        }
        process.communicate("\n", timeout=60)
    assert any(hits.values())
    assert any("python" in name or "gcs_server" in name for name in hits)


def test_a_hub_that_is_killed_takes_its_agents_along(make_job, tmp_path, processes):
    job = make_job(steps=100_000, checkpoint_every=1000)
    (tmp_path / "jobs.jsonl").write_text(job.model_dump_json() + "\n")
    hub = _start(HUB, tmp_path / "jobs.jsonl", tmp_path / "out", cwd=tmp_path)
    processes.append(hub)
    for line in hub.stdout:
        if line.split()[1] in ("training", "failed"):
            break
    family = _descendants(hub.pid)
    assert len(family) >= 5
    started = time.monotonic()
    hub.kill()
    _, alive = psutil.wait_procs(family, timeout=40)
    assert alive == []
    assert time.monotonic() - started < 40
    assert not (tmp_path / "out").exists()
