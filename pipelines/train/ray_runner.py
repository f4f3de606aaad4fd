"""An owner's own Ray on this machine: started for one run, closed to everybody else, stopped without a trace.

The only module that imports Ray. Knows Ray's settings and how a sealed task is run in it; knows nothing of
what the task does. Ray isolates no one inside a cluster, hence one Ray for each owner.
"""

from __future__ import annotations

import os
import secrets
import traceback
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from experts.errors import StartError, TrainingError
from pipelines.train.sealed import SealedResult

__all__ = ["OwnerRay"]

_OBJECT_STORE_BYTES = 80 << 20
"""Ray's least; nothing but a few numbers goes through the store."""

_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_TASK_MAX_RETRIES": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_LOG_TO_STDERR": "0",
    "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",  # a job's cuda:1 stays what it is to the hub
    "RAY_gcs_server_port_wait_time_s": "120",  # Ray's own limit is 30 s, which a busy machine exceeds
}

_STARTS = 3
"""How often Ray is started before it is given up: what it waits for its last process is 30 s, and no setting."""


def _run_sealed(payload: str) -> dict[str, object]:
    """What Ray calls: the sealed training, in a worker process of the owner's Ray."""
    from pipelines.train.agent_task import run_sealed

    return run_sealed(payload).to_wire()


class OwnerRay:
    """A local Ray that only this process can use.

    Token authentication with a token of its own, loopback, no dashboard, no usage statistics, nothing
    streamed to the driver, a temporary folder that only the owner can enter, no retries. Everything is set
    before Ray is imported: some of it is ignored later. Ray's control server listens on every interface all
    the same, so against others on the network it is the token that protects.

    Args:
        folder: An existing folder of mode 0700 with a short path (Ray puts Unix sockets into it).
        cpus: How many cores Ray may use.
        gpus: How many GPUs Ray may count on; each task takes all of them. Which one it computes on the task says, and
            several owners may share one: their Rays know nothing of each other.

    Raises:
        StartError: Ray did not start, tried several times.
    """

    def __init__(self, folder: Path, *, cpus: int, gpus: int = 0) -> None:
        token = folder / "token"
        with os.fdopen(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        # Ray opens its temporary folder to everybody (0777), hence one inside a folder that stays closed
        inner = folder / "r"
        os.environ.update(_ENVIRONMENT, RAY_AUTH_TOKEN_PATH=str(token), RAY_TMPDIR=str(inner))
        for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
            os.environ.pop(name, None)
        import ray

        self._ray = ray
        self._cpus = cpus
        self._start(
            address="local",
            num_cpus=cpus,
            num_gpus=gpus,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            namespace=secrets.token_hex(8),
            _temp_dir=str(inner),
            _node_ip_address="127.0.0.1",
        )
        self._task: Any = ray.remote(
            num_cpus=cpus, num_gpus=gpus, max_retries=0, retry_exceptions=False, max_calls=1, runtime_env={}
        )(_run_sealed)

    def _start(self, **settings: Any) -> None:
        """Start Ray; what it raises where it does not come up in time is a bare ``Exception``."""
        there = _children()
        for _ in range(_STARTS):
            try:
                self._ray.init(**settings)
                return
            except Exception:
                traceback.print_exc()  # to whatever log the caller has opened
                self._ray.shutdown()
                _end(_children() - there)
        raise StartError(
            f"Ray did not start in {_STARTS} attempts. Try again when the machine is less busy, or train without Ray: "
            "coterie train --local."
        )

    def submit(self, payload: str) -> Any:
        """Start the sealed task; returns Ray's reference to its result."""
        return self._task.remote(payload)

    def result(self, reference: Any, *, wait_seconds: float) -> SealedResult | None:
        """The task's result, or None if it is still running after ``wait_seconds``.

        A worker that died is a `TrainingError` by name; nothing of Ray's own message is passed on.
        """
        ready, _ = self._ray.wait([reference], timeout=wait_seconds)
        if not ready:
            return None
        try:
            body: Mapping[str, object] = self._ray.get(reference)
            return SealedResult.from_wire(body)
        except (self._ray.exceptions.RayError, ValueError):
            return SealedResult(error=TrainingError.__name__)

    def stop(self) -> None:
        """Stop every process of this Ray; a second call does nothing."""
        self._ray.shutdown()


def _children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def _end(processes: Collection[psutil.Process]) -> None:
    """Kill what a failed start left running."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(list(processes), timeout=5)
