"""A Ray that does not come up: tried again, its processes ended, then one message that says what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from experts.errors import StartError
from pipelines.train.hub import train_jobs

TIMED_OUT = (
    "The current node timed out during startup. This could happen because some of the raylet failed to startup or "
    "the GCS has become overloaded."
)


class Slow:
    """Stands in for Ray: ``init`` leaves a process and raises Ray's own bare exception, ``failures`` times."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.started: list[subprocess.Popen[bytes]] = []
        self.shutdowns = 0

    def init(self, **settings: object) -> None:
        self.limit = {name: text for name, text in os.environ.items() if "wait_time" in name}
        self.started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]))
        if len(self.started) <= self.failures:
            raise Exception(TIMED_OUT)

    def shutdown(self) -> None:
        self.shutdowns += 1

    def remote(self, **options: object) -> object:
        return lambda function: function

    def alive(self) -> list[bool]:
        return [process.poll() is None for process in self.started]


@pytest.fixture
def slow(monkeypatch):
    """Install a stand-in for Ray; the environment is put back afterwards, what still runs is ended."""
    made = []

    def install(failures: int) -> Slow:
        made.append(Slow(failures))
        monkeypatch.setattr(os, "environ", dict(os.environ))
        monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(**_methods(made[-1])))
        return made[-1]

    yield install
    for process in (process for one in made for process in one.started):
        process.kill()
        process.wait()


def _methods(slow: Slow) -> dict[str, object]:
    return {name: getattr(slow, name) for name in ("init", "shutdown", "remote")}


def test_a_start_that_takes_too_long_is_tried_again(slow, tmp_path, capsys):
    from pipelines.train.ray_runner import OwnerRay

    ray, beside = slow(2), subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        OwnerRay(tmp_path, cpus=1)
        assert ray.alive() == [False, False, True]
        assert beside.poll() is None, "what was there before is left alone"
    finally:
        beside.kill()
        beside.wait()
    assert (ray.shutdowns, ray.limit) == (2, {"RAY_gcs_server_port_wait_time_s": "120"})
    assert capsys.readouterr().err.count(TIMED_OUT) == 2


def test_a_start_that_fails_for_good(slow, tmp_path):
    from pipelines.train.ray_runner import OwnerRay

    ray = slow(9)
    with pytest.raises(StartError) as caught:
        OwnerRay(tmp_path, cpus=1)
    assert str(caught.value) == (
        "Ray did not start in 3 attempts. Try again when the machine is less busy, or train without Ray: coterie train "
        "--local."
    )
    assert caught.value.exit_code == 1
    assert ray.alive() == [False, False, False]


def test_the_hub_says_what_to_do(make_job, tmp_path, monkeypatch):
    """In an agent of its own, whose Ray is one that never starts."""
    fake = tmp_path / "path" / "ray"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text(
        f"def init(**settings):\n    raise Exception({TIMED_OUT!r})\ndef shutdown():\n    pass\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(fake.parent), prepend=os.pathsep)
    job = make_job(steps=2)
    job.directory.mkdir(parents=True)
    job.log_path.write_text("of an earlier run\n")
    (outcome,) = train_jobs([job], out_dir=tmp_path / "out", threads=1)
    assert (outcome.folder, outcome.error, outcome.log) == (None, "StartError", job.agent_log_path)
    assert outcome.message == (
        "Ray did not start in time. Try again when the machine is less busy, with fewer owners at once, or one job "
        "after the other without Ray (--local)."
    )
    assert TIMED_OUT in job.agent_log_path.read_text()
