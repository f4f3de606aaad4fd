"""What a training job may say while it runs: a stage and a handful of numbers, one JSON line each.

Knows the allow-list and how a line is written and read; knows nothing of who trains what, and nothing that is
not on the list passes it.
"""

from __future__ import annotations

import builtins
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import experts.errors

__all__ = ["ERROR_NAMES", "SCALARS", "STAGES", "Progress", "ProgressFn", "allowed_scalars", "error_name"]

STAGES = (
    "queued",
    "starting",
    "reading",
    "loading",
    "states",
    "training",
    "packing",
    "done",
    "stopped",
    "failed",
)
"""Every stage a job can be in, in order; the last three are final."""

SCALARS = (
    "step",
    "steps",
    "tokens",
    "documents",
    "seconds",
    "tokens_per_second",
    "eta_seconds",
    "loss",
    "held_out_nll",
    "anchor_held_out_nll",
    "queries",
    "held_out_ndcg10",
    "base_held_out_ndcg10",
    "resumed_from",
    "cached",
)
"""Every number a job may report; a name that is not here does not leave the owner."""

ERROR_NAMES = frozenset(
    {name for name in experts.errors.__all__}
    | {
        name
        for name, value in vars(builtins).items()
        if isinstance(value, type) and issubclass(value, BaseException)
    }
)
"""Every class name an error may be reduced to; any other class is reported as ``Exception``."""


def error_name(error: BaseException) -> str:
    """Reduce an exception to a class name from the closed list: the nearest listed class it derives from."""
    return next((kind.__name__ for kind in type(error).__mro__ if kind.__name__ in ERROR_NAMES), "Exception")


def allowed_scalars(values: Mapping[str, object]) -> dict[str, int | float]:
    """Keep ``values`` only if every name is listed and every value is a finite number; round it.

    Raises:
        ValueError: A name is not on the list or a value is not a finite number. The message names neither.
    """
    result: dict[str, int | float] = {}
    for name, value in values.items():
        if name not in SCALARS:
            raise ValueError("a reported name is not on the list of scalars that may leave the owner")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError("a reported value is not a finite number")
        result[name] = value if isinstance(value, int) else float(f"{value:.6g}")
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """One report of one job.

    ``name`` (the expert's) is never sent: the reader of a pipe knows whose pipe it is.
    """

    name: str
    stage: str = "queued"
    scalars: Mapping[str, int | float] = field(default_factory=dict)
    error: str | None = None

    @property
    def owner(self) -> str:
        """The owner's name, the first part of the expert's."""
        return self.name.partition("/")[0]

    @property
    def final(self) -> bool:
        """Whether the job is over."""
        return self.stage in STAGES[-3:]

    def to_line(self) -> str:
        """One line of JSON without the name, ending in a newline."""
        body = {"stage": self.stage, "scalars": allowed_scalars(self.scalars), "error": self.error}
        return json.dumps(body, separators=(",", ":")) + "\n"

    @classmethod
    def from_line(cls, line: str | bytes, *, name: str) -> Progress:
        """Read a line that another process wrote, and trust nothing in it.

        Raises:
            ValueError: The line holds anything that is not on the lists above.
        """
        body = json.loads(line)
        if not isinstance(body, dict) or set(body) != {"stage", "scalars", "error"}:
            raise ValueError("a progress line has other fields than stage, scalars and error")
        if body["stage"] not in STAGES or not isinstance(body["scalars"], dict):
            raise ValueError("a progress line names an unknown stage")
        if body["error"] is not None and body["error"] not in ERROR_NAMES:
            raise ValueError("a progress line names an unknown error class")
        return cls(
            name=name, stage=body["stage"], scalars=allowed_scalars(body["scalars"]), error=body["error"]
        )

    def with_stage(self, stage: str, **scalars: int | float) -> Progress:
        """The next report of the same job."""
        return replace(self, stage=stage, scalars=scalars)


ProgressFn = Callable[[Progress], None]
"""Called with every report."""
