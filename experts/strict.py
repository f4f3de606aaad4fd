"""Reading YAML, JSON and the models made from them without surprises.

Accepts plain data only: no anchors, aliases, tags or duplicate keys, bounded size, depth and number of nodes,
every mistake reported at once with its path. Knows nothing of what the data mean.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

from experts.errors import CoterieError, ManifestError
from experts.files import capped, read_bounded

if TYPE_CHECKING:
    from pydantic import BaseModel

    Model = TypeVar("Model", bound=BaseModel)

__all__ = ["MAX_DEPTH", "MAX_NODES", "MAX_YAML_BYTES", "load_json", "load_yaml", "validate"]

MAX_YAML_BYTES = 256 * 1024
MAX_DEPTH = 32
MAX_NODES = 10_000
MAX_DIGITS = 40
"""Longest integer literal read; anything longer is a mistake or an attack."""

# YAML 1.2 core schema: `no`, `1:30` and `2024-01-01` stay strings.
_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_BOOLS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+")
_BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def load_yaml(source: Path | str | bytes, *, what: str, error: type[CoterieError] = ManifestError) -> object:
    """Parse one YAML document into plain dicts, lists, strings, numbers, booleans and None.

    Scalars follow the YAML 1.2 core schema. At most 256 kB, 32 levels and 10,000 nodes.

    Args:
        source: A file, or the text itself.
        what: How to call it in messages, for instance ``"manifest demo.yaml"``.
        error: Class of the error raised.

    Raises:
        CoterieError: Of class ``error``, naming line and column: bad syntax, an anchor, an alias, a tag, a
            duplicate key, a key that is not a string, a non-finite number, more than one document, too large.
    """
    import yaml

    text = _yaml_text(source, what=what, error=error)
    try:
        return _YamlReader(what=what, error=error).read(yaml.parse(text, Loader=yaml.CSafeLoader))
    except yaml.MarkedYAMLError as failure:
        mark = failure.problem_mark or failure.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise error(f"{what}{where}: not valid YAML: {failure.problem or failure.context}.") from None
    except yaml.YAMLError as failure:
        raise error(f"{what}: not valid YAML: {' '.join(str(failure).split())}.") from None


def _yaml_text(source: Path | str | bytes, *, what: str, error: type[CoterieError]) -> str:
    if isinstance(source, Path):
        source = read_bounded(source, max_bytes=MAX_YAML_BYTES, follow_symlinks=True, error=error)
    data = source.encode("utf-8", "surrogatepass") if isinstance(source, str) else source
    if len(data) > MAX_YAML_BYTES:
        raise error(f"{what}: {len(data):,} bytes; at most {MAX_YAML_BYTES:,} are allowed.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as failure:
        raise error(f"{what}: not UTF-8 text (byte {failure.start}); save it as UTF-8.") from None


class _YamlReader:
    """Builds plain data from the parser's events; no node graph, hence nothing to alias or to expand."""

    def __init__(self, *, what: str, error: type[CoterieError]) -> None:
        self.what = what
        self.error = error
        self.nodes = 0

    def fail(self, event: object, problem: str) -> NoReturn:
        mark = getattr(event, "start_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise self.error(f"{self.what}{where}: {problem}")

    def read(self, events: Iterator[object]) -> object:
        import yaml

        documents: list[object] = []
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                if documents:
                    self.fail(event, "a second document starts here; write one document only.")
                documents.append(self._node(next(events), events, depth=1))
        if not documents:
            raise self.error(f"{self.what}: empty; write at least one key.")
        return documents[0]

    def _node(self, event: object, events: Iterator[object], *, depth: int) -> object:
        import yaml

        self._check(event, depth=depth)
        if isinstance(event, yaml.ScalarEvent):
            return event.value if not event.implicit[0] else self._plain(event, event.value)
        if isinstance(event, yaml.SequenceStartEvent):
            items = []
            while not isinstance(child := next(events), yaml.SequenceEndEvent):
                items.append(self._node(child, events, depth=depth + 1))
            return items
        return self._mapping(events, depth=depth)

    def _mapping(self, events: Iterator[object], *, depth: int) -> dict[str, object]:
        import yaml

        mapping: dict[str, object] = {}
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                self._check(event, depth=depth + 1)
                self.fail(event, "a list or a mapping is used as a key; keys are strings.")
            key = self._node(event, events, depth=depth + 1)
            if not isinstance(key, str):
                self.fail(event, f"key '{event.value}' is not a string; put it in quotes.")
            if key in mapping:
                self.fail(event, f"key '{key}' occurs twice; keep one of them.")
            mapping[key] = self._node(next(events), events, depth=depth + 1)
        return mapping

    def _check(self, event: object, *, depth: int) -> None:
        import yaml

        self.nodes += 1
        if isinstance(event, yaml.AliasEvent):
            self.fail(event, f"alias '*{event.anchor}' is not allowed; write the value out.")
        if getattr(event, "anchor", None) is not None:
            self.fail(event, f"anchor '&{getattr(event, 'anchor', '')}' is not allowed; remove it.")
        if getattr(event, "tag", None) is not None:
            self.fail(event, f"tag '{getattr(event, 'tag', '')}' is not allowed; remove it.")
        if depth > MAX_DEPTH:
            self.fail(event, f"nested more than {MAX_DEPTH} levels deep.")
        if self.nodes > MAX_NODES:
            self.fail(event, f"more than {MAX_NODES:,} values.")

    def _plain(self, event: object, text: str) -> object:
        if text in _NULLS:
            return None
        if text in _BOOLS:
            return _BOOLS[text]
        if _INT.fullmatch(text) or _BASED.fullmatch(text):
            if len(text) > MAX_DIGITS:
                self.fail(event, f"an integer of more than {MAX_DIGITS} digits.")
            return int(text, 0) if _BASED.fullmatch(text) else int(text)
        if _NOT_FINITE.fullmatch(text):
            self.fail(event, f"'{text}' is not a finite number.")
        if _FLOAT.fullmatch(text):
            number = float(text)
            if not math.isfinite(number):
                self.fail(event, f"'{text}' is not a finite number.")
            return number
        return text


def load_json(
    data: bytes | Path,
    *,
    what: str,
    max_bytes: int,
    max_depth: int = MAX_DEPTH,
    error: type[CoterieError] = ManifestError,
) -> object:
    """Parse JSON text; duplicate keys, non-finite numbers, deep nesting and lone surrogates are refused.

    Args:
        data: The bytes, or the file that holds them.
        what: How to call it in messages.
        max_bytes: Largest size read.
        max_depth: Deepest nesting accepted.
        error: Class of the error raised.

    Raises:
        CoterieError: Of class ``error``.
    """
    if isinstance(data, Path):
        data = read_bounded(data, max_bytes=max_bytes, follow_symlinks=True, error=error)
    if len(data) > max_bytes:
        raise error(f"{what}: {len(data):,} bytes; at most {max_bytes:,} are allowed.")
    duplicates: list[str] = []

    def pairs(items: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(items)
        if len(result) != len(items):
            counts = Counter(key for key, _ in items)
            duplicates.extend(f"key {key!r} occurs {n} times" for key, n in counts.items() if n > 1)
        return result

    try:
        value: object = json.loads(
            data.decode("utf-8"), object_pairs_hook=pairs, parse_constant=_constant, parse_float=_finite
        )
    except UnicodeDecodeError as failure:
        raise error(f"{what}: not UTF-8 text (byte {failure.start}).") from None
    except json.JSONDecodeError as failure:
        raise error(
            f"{what}, line {failure.lineno}, column {failure.colno}: not valid JSON: {failure.msg}."
        ) from None
    except RecursionError:
        raise error(f"{what}: nested more than {max_depth} levels deep.") from None
    except ValueError as failure:
        raise error(f"{what}: {failure}.") from None
    if duplicates:
        raise error(f"{what}: duplicate keys; keep one of each:", problems=capped(duplicates))
    _check_json(value, what=what, max_depth=max_depth, error=error)
    return value


def _constant(text: str) -> NoReturn:
    raise ValueError(f"'{text}' is not a finite number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        _constant(text)
    return number


def _check_json(value: object, *, what: str, max_depth: int, error: type[CoterieError]) -> None:
    level: list[object] = [value]
    for _ in range(max_depth + 1):
        for item in level:
            _check_text(item, what=what, error=error)
        level = [child for item in level for child in _children(item)]
        if not level:
            return
    raise error(f"{what}: nested more than {max_depth} levels deep.")


def _children(value: object) -> list[object]:
    if isinstance(value, dict):
        return [part for item in value.items() for part in item]
    return value if isinstance(value, list) else []


def _check_text(value: object, *, what: str, error: type[CoterieError]) -> None:
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise error(f"{what}: the text {value!r} has half of a surrogate pair.") from None


def validate(
    model: type[Model], data: object, *, what: str, error: type[CoterieError] = ManifestError
) -> Model:
    """Build a pydantic model from data that came out of a file, reporting every mistake at once.

    The data are taken as JSON would be: lists fill tuples, strings never become numbers. An unknown key is
    answered with the nearest allowed one.

    Args:
        model: The model class.
        data: Plain data, as from `load_yaml` or `load_json`.
        what: How to call the data in messages.
        error: Class of the error raised.

    Raises:
        CoterieError: Of class ``error``; ``problems`` holds one line ``path: problem`` for each mistake.
    """
    from pydantic import ValidationError

    from experts.mistakes import describe_mistakes

    try:
        return model.model_validate_json(json.dumps(data, allow_nan=False))
    except ValidationError as failure:
        problems = describe_mistakes(model, data, failure)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise error(f"{what} has {count}:", problems=capped(problems)) from None
    except TypeError as failure:
        raise error(f"{what}: not plain data: {failure}.") from None
    except (ValueError, RecursionError):
        raise error(
            f"{what}: not plain data: a number is not finite, or the data contain themselves."
        ) from None
