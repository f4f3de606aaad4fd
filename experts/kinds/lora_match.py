"""Which modules a LoRA configuration targets, by PEFT 0.21's rules.

Restates ``check_target_module_exists`` and ``get_pattern_key`` for the configurations that are admitted; the
tests compare both with PEFT itself. Knows names only.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from experts.kinds.lora_config import LoraConfig

__all__ = ["TargetMatcher", "pattern_values", "target_reason"]

Number = TypeVar("Number", int, float)


class TargetMatcher:
    """Finds the targets that match a module.

    A full name always matches; a suffix (at a dot) matches if the module's layer number is among
    ``layers_to_transform``.
    """

    def __init__(self, config: LoraConfig) -> None:
        self.names = config.target_modules
        self._set = frozenset(config.target_modules)
        self._layers = frozenset(config.layers_to_transform or ())
        patterns = [rf"(?:^|.*?\.){name}\.(?P<index>\d+)\." for name in config.layers_pattern]
        self._numbered = [re.compile(p) for p in patterns or [r".*?\.[^.]*\.(?P<index>\d+)\."]]

    def matches(self, module: str) -> list[str]:
        """Return every target that PEFT would adapt ``module`` for."""
        parts = module.split(".")
        suffixes = [".".join(parts[n:]) for n in range(1, len(parts))]
        found = [suffix for suffix in suffixes if suffix in self._set]
        if found and self._layers and self._layer_number(module) not in self._layers:
            found = []
        return [module, *found] if module in self._set else found

    def _layer_number(self, module: str) -> int | None:
        match = next((hit for pattern in self._numbered if (hit := pattern.match(module))), None)
        return int(match["index"]) if match else None


def pattern_values(
    patterns: Mapping[str, Number], modules: Sequence[str], *, default: Number
) -> list[Number]:
    """Return for each module the value of the first pattern that matches its end at a dot, else ``default``."""
    compiled = [(re.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in patterns.items()]
    return [
        next((value for pattern, value in compiled if pattern.match(module)), default) for module in modules
    ]


def target_reason(target: str, linears: Iterable[str]) -> str:
    """Say that a target matches no linear of the base, and which is near."""
    known = sorted({name.rpartition(".")[2] for name in linears})
    near = difflib.get_close_matches(target, known, n=1, cutoff=0.5)
    guess = f"; did you mean '{near[0]}'?" if near else "."
    return (
        f"target_modules: '{target}' matches no linear of the base's layers{guess} Known: {', '.join(known)}"
    )
