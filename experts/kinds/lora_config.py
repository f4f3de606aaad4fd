"""The keys of a PEFT ``adapter_config.json`` that are admitted, each with its range.

Everything that would change the base, run code or need tensors beyond A and B must be off. Knows PEFT's option
names; knows nothing of the base.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from experts.errors import AdmissionError
from experts.files import capped

__all__ = ["KNOWN_KEYS", "MAX_RANK", "LoraConfig", "parse_lora_config"]

MAX_RANK = 4096
MAX_ALPHA = 1e6
MAX_ENTRIES = 1024
"""Largest number of targets, layers or patterns."""

_MODULE = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
# PEFT reads the keys of rank_pattern and alpha_pattern as regular expressions. Admitted are literals, classes,
# anchors, plain groups and a few of .* .+ \d* \d+, so that no pattern takes exponential time.
_PATTERN = re.compile(r"(?:[A-Za-z0-9_^$|()]|\\\.|\\d[*+]?|\.[*+]?|\[[A-Za-z0-9_-]+\])+")
_REPEATS = 2
_REPEATS_IN_ALL = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """The keys that decide which tensors an adapter has and how they are scaled."""

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: tuple[str, ...]
    layers_to_transform: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]


class _Rule(NamedTuple):
    accepts: Callable[[object], bool]
    allowed: str


def _is_rank(value: object) -> bool:
    return type(value) is int and 1 <= value <= MAX_RANK


def _is_alpha(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and 0 < value <= MAX_ALPHA  # type: ignore[arg-type, operator]


def _is_text(pattern: str) -> Callable[[object], bool]:
    compiled = re.compile(pattern)
    return lambda value: isinstance(value, str) and compiled.fullmatch(value) is not None


def _is_pattern(text: str) -> bool:
    if len(text) > 255 or not _PATTERN.fullmatch(text) or _repeats(text) > _REPEATS:
        return False
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _repeats(text: str) -> int:
    return text.count("*") + text.count("+")


def _mapping_of(accepts: Callable[[object], bool]) -> Callable[[object], bool]:
    def check(value: object) -> bool:
        return (
            isinstance(value, dict)
            and len(value) <= MAX_ENTRIES
            and sum(map(_repeats, value)) <= _REPEATS_IN_ALL
            and all(_is_pattern(key) and accepts(inner) for key, inner in value.items())
        )

    return check


def _is_targets(value: object) -> bool:
    return (
        isinstance(value, list)
        and 0 < len(value) <= MAX_ENTRIES
        and len({str(item) for item in value}) == len(value)
        and all(isinstance(item, str) and len(item) <= 255 and _MODULE.fullmatch(item) for item in value)
    )


def _is_layers(value: object) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return value is None or (len(numbers) <= MAX_ENTRIES and all(type(n) is int and n >= 0 for n in numbers))


def _is_layers_pattern(value: object) -> bool:
    names = value if isinstance(value, list) else [value]
    return value is None or all(
        isinstance(n, str) and len(n) <= 255 and (not n or _MODULE.fullmatch(n)) for n in names
    )


def _one_of(*values: object) -> Callable[[object], bool]:
    # compared with their types, since True == 1
    return lambda value: any(type(value) is type(v) and value == v for v in values)


_OFF = _Rule(_one_of(None, False, [], {}, ""), "off (null or false): not part of a lora expert")
_FALSE = _Rule(_one_of(False, None), "false")
_PATTERN_HINT = "a mapping of module names, or simple patterns of them, to"

_RULES: dict[str, _Rule] = {
    "peft_type": _Rule(_one_of("LORA"), "'LORA'"),
    "peft_version": _Rule(lambda v: v is None or _is_text(r"[0-9A-Za-z.+@-]{1,100}")(v), "a version"),
    "base_model_name_or_path": _Rule(
        lambda v: v is None or (isinstance(v, str) and len(v) <= 4096), "a name"
    ),
    "revision": _Rule(lambda v: v is None or (isinstance(v, str) and len(v) <= 200), "a name or null"),
    "inference_mode": _Rule(lambda v: isinstance(v, bool), "true or false"),
    "r": _Rule(_is_rank, f"a whole number from 1 to {MAX_RANK}"),
    "lora_alpha": _Rule(_is_alpha, f"a number above 0, at most {MAX_ALPHA:g}"),
    "lora_dropout": _Rule(lambda v: type(v) in (int, float) and 0 <= v <= 1, "a number from 0 to 1"),  # type: ignore[operator]
    "use_rslora": _Rule(lambda v: isinstance(v, bool), "true or false"),
    "rank_pattern": _Rule(_mapping_of(_is_rank), f"{_PATTERN_HINT} whole numbers from 1 to {MAX_RANK}"),
    "alpha_pattern": _Rule(_mapping_of(_is_alpha), f"{_PATTERN_HINT} numbers above 0, at most {MAX_ALPHA:g}"),
    "target_modules": _Rule(
        _is_targets, "a list of module names without repetition (not a regular expression)"
    ),
    "layers_to_transform": _Rule(_is_layers, "null, a layer number or a list of layer numbers"),
    "layers_pattern": _Rule(_is_layers_pattern, "null, a module name or a list of module names"),
    "bias": _Rule(_one_of("none"), "'none': biases belong to the base"),
    # the other initialisations subtract something from the base's own weights
    "init_lora_weights": _Rule(
        _one_of(True, False, "gaussian", "orthogonal"),
        "true, false, 'gaussian' or 'orthogonal' (others alter the base; convert the adapter to plain LoRA first)",
    ),
    "auto_mapping": _Rule(_one_of(None), "null: it names code; train with a task_type"),
    "megatron_core": _Rule(_one_of(None, "megatron.core"), "PEFT's default 'megatron.core' or null"),
    "qalora_group_size": _Rule(lambda v: type(v) is int and 0 < v <= 1 << 20, "a whole number"),
    "fan_in_fan_out": _FALSE,
    "lora_bias": _FALSE,
    "use_dora": _FALSE,
    "use_qalora": _FALSE,
    "ensure_weight_tying": _FALSE,
    **dict.fromkeys(
        (
            "alora_invocation_tokens",
            "arrow_config",
            "corda_config",
            "eva_config",
            "exclude_modules",
            "kasa_config",
            "layer_replication",
            "loftq_config",
            "lora_ga_config",
            "megatron_config",
            "modules_to_save",
            "monteclora_config",
            "target_parameters",
            "trainable_token_indices",
            "use_bdlora",
            "velora_config",
        ),
        _OFF,
    ),
}

KNOWN_KEYS = frozenset({*_RULES, "task_type"})
"""Every key that may occur."""
_TASKS = {
    False: _Rule(_one_of("CAUSAL_LM", None), "'CAUSAL_LM' (other tasks add tensors) or null"),
    True: _Rule(
        _one_of("FEATURE_EXTRACTION", None), "'FEATURE_EXTRACTION' (other tasks add tensors) or null"
    ),
}
"""The task that a kind's adapters may name, by whether they are made for embedding models."""
_NEEDED = ("peft_type", "r", "lora_alpha", "target_modules")


def parse_lora_config(config: Mapping[str, object], *, embeds: bool = False) -> LoraConfig:
    """Check every key of an ``adapter_config.json`` and return those that matter.

    Args:
        config: The file's content.
        embeds: Whether the adapter is for an embedding model.

    Raises:
        AdmissionError: Unknown, missing or disallowed keys; all are listed.
    """
    rules = {**_RULES, "task_type": _TASKS[embeds]}
    problems = [problem for key, value in config.items() if (problem := _problem(key, value, rules))]
    problems += [f"{key}: missing; allowed is {rules[key].allowed}" for key in _NEEDED if key not in config]
    if config.get("layers_pattern") and config.get("layers_to_transform") is None:
        problems.append("layers_pattern: needs layers_to_transform as well")
    if problems:
        raise AdmissionError(
            f"adapter_config.json is not allowed for a {'retriever' if embeds else 'lora'} expert:",
            problems=capped(problems),
        )
    return _parsed(config)


def _problem(key: str, value: object, rules: Mapping[str, _Rule]) -> str | None:
    rule = rules.get(key)
    if rule is None:
        near = difflib.get_close_matches(key, rules, n=1, cutoff=0.6)
        return f"{key}: unknown key" + (f"; did you mean '{near[0]}'?" if near else "")
    return None if rule.accepts(value) else f"{key}: {_shown(value)} found; allowed is {rule.allowed}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _parsed(config: Mapping[str, object]) -> LoraConfig:
    found = _Reader(config)
    layers = config.get("layers_to_transform")
    return LoraConfig(
        r=found.integer("r"),
        lora_alpha=found.number("lora_alpha"),
        use_rslora=bool(config.get("use_rslora", False)),
        rank_pattern={key: int(value) for key, value in found.mapping("rank_pattern").items()},
        alpha_pattern={key: float(value) for key, value in found.mapping("alpha_pattern").items()},
        target_modules=tuple(str(name) for name in found.items("target_modules")),
        layers_to_transform=None
        if layers is None
        else tuple(int(n) for n in found.items("layers_to_transform")),
        layers_pattern=tuple(str(name) for name in found.items("layers_pattern") if name),
    )


class _Reader:
    """Typed access to values that the rules have already checked."""

    def __init__(self, config: Mapping[str, object]) -> None:
        self.config = config

    def integer(self, key: str) -> int:
        value = self.config[key]
        assert isinstance(value, int)
        return value

    def number(self, key: str) -> float:
        value = self.config[key]
        assert isinstance(value, int | float)
        return float(value)

    def mapping(self, key: str) -> dict[str, int | float]:
        value = self.config.get(key) or {}
        assert isinstance(value, dict)
        return value

    def items(self, key: str) -> list[int | str]:
        value = self.config.get(key)
        if value is None:
            return []
        assert isinstance(value, int | str | list)
        return value if isinstance(value, list) else [value]
