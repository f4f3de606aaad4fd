"""Turning pydantic's findings into one line each: the path, what is wrong, the nearest allowed key.

Knows pydantic's error records and model fields; knows nothing of any model in particular.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from pydantic import BaseModel

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

__all__ = ["describe_mistakes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mistake:
    path: tuple[str | int, ...]
    text: str
    wrong_branch: bool
    """One member of a union was given another member's type: noise if another member has something to say."""


def describe_mistakes(model: type[BaseModel], data: object, failure: ValidationError) -> list[str]:
    """Return one line ``path: problem`` for each mistake, without pydantic's own union markers."""
    mistakes = [_describe(model, data, record) for record in failure.errors(include_url=False)]
    lines = []
    for mistake in mistakes:
        heard = any(_covers(mistake, other) for other in mistakes)
        line = f"{_dotted(mistake.path)}{mistake.text}"
        if not heard and line not in lines:
            lines.append(line)
    return lines


def _covers(mistake: _Mistake, other: _Mistake) -> bool:
    below = other.path[: len(mistake.path)] == mistake.path
    return mistake.wrong_branch and below and not other.wrong_branch


def _describe(model: type[BaseModel], data: object, record: ErrorDetails) -> _Mistake:
    path, models, branched = _locate(model, data, record)
    kind = record["type"]
    if kind == "extra_forbidden":
        text = _unknown_key(str(path[-1]), models)
    elif kind == "missing":
        text = "missing"
    else:
        text = _sentence(record)
    # a mapping is never meant to be one of a few words
    elsewhere = kind.endswith("_type") or (kind == "literal_error" and isinstance(record["input"], Mapping))
    return _Mistake(path=path, text=f": {text}" if path else text, wrong_branch=branched and elsewhere)


def _locate(
    model: type[BaseModel], data: object, record: ErrorDetails
) -> tuple[tuple[str | int, ...], list[type[BaseModel]], bool]:
    """Follow a location through the data: the real path, the models possible there, any union marker."""
    path: list[str | int] = []
    models, branched, here = [model], False, data
    for position, part in enumerate(record["loc"]):
        last = position == len(record["loc"]) - 1
        if isinstance(here, Mapping) and part in here:
            here = here[part]
        elif isinstance(here, Sequence) and not isinstance(here, str) and isinstance(part, int):
            here = here[part] if part < len(here) else None
        elif not (last and record["type"] == "missing"):
            models, branched = _narrow(models, str(part)), True
            continue
        path.append(part)
        if not last:
            models = _step(models, part)
    return tuple(path), models, branched


def _narrow(models: list[type[BaseModel]], marker: str) -> list[type[BaseModel]]:
    """Keep the members of a union that pydantic's marker (class name or discriminator value) speaks of."""
    chosen = [m for m in models if m.__name__ == marker or marker in _literals(m)]
    return chosen or models


def _literals(model: type[BaseModel]) -> set[object]:
    return {value for field in model.model_fields.values() for value in get_args(field.annotation)}


def _step(models: list[type[BaseModel]], part: str | int) -> list[type[BaseModel]]:
    annotations = [m.model_fields[part].annotation for m in models if part in m.model_fields]
    return [found for annotation in annotations for found in _models_in(annotation)] or models


def _models_in(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _models_in(argument)]


def _unknown_key(key: str, models: list[type[BaseModel]]) -> str:
    allowed = sorted({field.alias or name for m in models for name, field in m.model_fields.items()})
    near = difflib.get_close_matches(key, allowed, n=1, cutoff=0.5)
    guess = f"did you mean '{near[0]}'? " if near else ""
    return f"unknown key; {guess}Allowed: {', '.join(allowed)}"


def _sentence(record: ErrorDetails) -> str:
    message = record["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if record["type"] in {"value_error", "assertion_error"}:
        return message
    given = record["input"]
    shown = f", given {given!r}" if isinstance(given, str | int | float | bool) or given is None else ""
    return f"{message[:1].lower()}{message[1:]}{shown[:200]}"


def _dotted(path: tuple[str | int, ...]) -> str:
    return ".".join(str(part) for part in path)
