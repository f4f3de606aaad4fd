"""The demonstration: three owners train apart, their experts become one model, and one owner leaves it.

Light on import: `run_demo` is loaded when it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipelines.demo.settings import FULL, QUICK, DemoInputs, DemoOwner, DemoSettings

if TYPE_CHECKING:
    from pipelines.demo.run import run_demo

__all__ = ["FULL", "QUICK", "DemoInputs", "DemoOwner", "DemoSettings", "run_demo"]


def __getattr__(name: str) -> Any:
    if name == "run_demo":
        from pipelines.demo.run import run_demo

        return run_demo
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
