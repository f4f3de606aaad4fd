"""Seconds and peak memory of each stage of a run.

Knows the clock and the memory of this process and its children; knows nothing of what a stage does.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import psutil

__all__ = ["Stages"]

_SAMPLE_SECONDS = 0.2


class Stages:
    """Times named stages, one after the other.

    Attributes:
        seconds: Stage -> wall-clock seconds.
        peak_rss_mb: Stage -> largest resident memory seen in it, of this process and its children together, in
            megabytes (10^6 bytes). Sampled, so a shorter peak may be missed; pages that processes share count once
            in each.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak_rss_mb: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure the block as stage ``name``; the same name again adds to it."""
        ended = threading.Event()
        peak = [_resident_bytes()]

        def sample() -> None:
            while not ended.wait(_SAMPLE_SECONDS):
                peak[0] = max(peak[0], _resident_bytes())

        sampler = threading.Thread(target=sample, name=f"memory of {name}", daemon=True)
        sampler.start()
        started = perf_counter()
        try:
            yield
        finally:
            seconds = perf_counter() - started
            ended.set()
            sampler.join()
            megabytes = max(peak[0], _resident_bytes()) / 1e6
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
            self.peak_rss_mb[name] = max(self.peak_rss_mb.get(name, 0.0), megabytes)

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Return ``{stage: {"seconds": s, "peak_rss_mb": m}}``."""
        return {
            name: {"seconds": round(seconds, 2), "peak_rss_mb": round(self.peak_rss_mb[name], 1)}
            for name, seconds in self.seconds.items()
        }


def _resident_bytes() -> int:
    own = psutil.Process()
    total = own.memory_info().rss
    for child in own.children(recursive=True):
        try:
            total += child.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return int(total)
