"""Whether a job has been done already, so that an interrupted command over several jobs can be repeated.

Knows a job's digest, the size and time of its text files, and the card it led to; reads no text.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from experts.errors import CoterieError
from experts.files import write_atomic
from experts.package import read_package
from pipelines.train.job import DomainJob

__all__ = ["is_finished", "mark_finished"]

_FILE = "finished.json"


def _key(job: DomainJob) -> str:
    given = [*job.data, *job.public, *([job.held_out] if isinstance(job.held_out, Path) else [])]
    files = [file for path in given for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    states = [(path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps([job.digest(), states]).encode()).hexdigest()


def mark_finished(job: DomainJob, *, out: Path) -> None:
    """Note in the owner's folder that ``out`` is what the job, on its text as it is now, leads to."""
    body = {"key": _key(job), "card": read_package(out).digest}
    write_atomic(job.directory / _FILE, json.dumps(body).encode())


def is_finished(job: DomainJob, *, out: Path) -> bool:
    """Whether ``out`` is the expert that this very job made of the very same text."""
    try:
        body = json.loads((job.directory / _FILE).read_bytes())
        return bool(body == {"key": _key(job), "card": read_package(out).digest})
    except (OSError, ValueError, CoterieError):
        return False
