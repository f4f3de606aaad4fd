"""Texts of one's own in an experiment: how they are written in its YAML, found, read and divided.

Knows files of documents and their names; knows nothing of tokens, arms or models. Light to import.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from experts.errors import DataError
from experts.files import write_atomic
from experts.strict import validate

if TYPE_CHECKING:
    from pipelines.experiments.world import Texts

__all__ = ["OwnText", "check_apart", "check_unchanged", "gather", "locate", "read_own"]

_LISTS = ("domains", "public", "unowned")
_HELD_OUT = 0.2
"""Share of a domain's documents that is held out, as of the texts that the project fetches."""
_DIGESTS = "texts.json"
_TAKEN = ("anchor", "mean")
"""Names that stand for something else in results."""


def _as_tuple(value: object) -> object:
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


Files = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]


class OwnText(BaseModel):
    """A text that is not among those the project can fetch."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$")
    """What the lists and the tables call it."""
    text: Files = Field(min_length=1)
    """Files or patterns such as ``law/*.jsonl``: .jsonl with a ``text`` field a line, or .txt, one document each."""
    held_out: Files = ()
    """Files of a domain's documents that are only measured; none: a fifth of ``text``, chosen by its digests."""

    @field_validator("name")
    @classmethod
    def _free(cls, value: str) -> str:
        from pipelines.assets import TEXTS

        if value in TEXTS:
            raise ValueError(f"'{value}' is a text that the project can fetch; call your own another name")
        if value in _TAKEN:
            raise ValueError(f"'{value}' means something else in results; call your text another name")
        return value


# ---------------------------------------------------------------- as written in the YAML


def locate(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return an experiment's plain data with the relative paths of its own texts looked for in a folder."""

    def located(value: object) -> object:
        if isinstance(value, list):
            return [located(each) for each in value]
        return (folder / value).as_posix() if isinstance(value, str) else value

    def entry(value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {key: located(each) if key in ("text", "held_out") else each for key, each in value.items()}

    return {
        key: [entry(each) for each in value]
        if key in (*_LISTS, "own_texts") and isinstance(value, list)
        else value
        for key, value in data.items()
    }


def gather(data: dict[str, Any], *, what: str) -> dict[str, Any]:
    """Return an experiment's plain data with mappings in its lists replaced by their names, and moved to ``own_texts``.

    Raises:
        ManifestError: A mapping has mistakes.
    """
    own: list[object] = []

    def name(value: object, place: str) -> object:
        if not isinstance(value, dict):
            return value
        own.append(validate(OwnText, value, what=f"{what}, {place}").model_dump(mode="json"))
        return value["name"]

    moved = {
        key: [name(each, f"{key}[{index}]") for index, each in enumerate(data[key])]
        for key in _LISTS
        if isinstance(data.get(key), list)
    }
    given = data.get("own_texts", [])
    if not own or not isinstance(given, list):
        return {**data, **moved}
    return {**data, **moved, "own_texts": [*given, *own]}


# ---------------------------------------------------------------- read and divided


def read_own(own: OwnText, *, divide: bool) -> tuple[list[str], list[str]]:
    """Read a text's documents, in an order that depends on their digests alone.

    Args:
        own: The text.
        divide: Whether some are held out: those of ``held_out``, or a fifth, on the side that their digests say.

    Returns:
        Documents to train on, and held-out ones; all and none where they are not divided.

    Raises:
        DataError: A file is missing, empty or of another form, or too few documents are left to divide.
    """
    from pipelines.train.windows import split_held_out

    documents = _read(own.name, own.text)
    if not divide:
        return documents, []
    if own.held_out:
        return documents, _read(own.name, own.held_out)
    training, held_out = split_held_out(documents, fraction=_HELD_OUT)
    if not held_out:
        raise DataError(
            f"{own.name}: {_documents(len(documents))} in {', '.join(own.text)}, none of which can be held out. Give "
            "at least two that differ, or other files with 'held_out'."
        )
    return training, held_out


def _read(name: str, patterns: Sequence[str]) -> list[str]:
    from pipelines.train.windows import read_documents

    documents: list[str] = []
    for path in dict.fromkeys(path for pattern in patterns for path in _found(name, pattern)):
        if path.suffix not in (".jsonl", ".txt"):
            raise DataError(
                f"{name}: '{path}' is neither .jsonl nor .txt. Give a .jsonl file with {{\"text\": ...}} on every "
                "line, or a .txt file that is one document."
            )
        try:
            documents += read_documents([path])
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
    return sorted(documents, key=_digest)


def _found(name: str, pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.exists():
        return [path]
    folder = next(parent for parent in path.parents if parent.is_dir())  # whatever its own name looks like
    rest = str(path.relative_to(folder))
    pattern_given = any(letter in rest for letter in "*?[")
    found = sorted(folder.glob(rest)) if pattern_given else []
    if not found:
        what = f"no file matches '{path}'" if pattern_given else f"there is no file '{path}'"
        raise DataError(f"{name}: {what}. Relative paths start beside the experiment's file.")
    return found


def _digest(document: str) -> str:
    return hashlib.sha256(document.encode()).hexdigest()


def _documents(count: int) -> str:
    return "1 document" if count == 1 else f"{count} documents"


# ---------------------------------------------------------------- checked


def check_apart(
    trained: Mapping[str, Iterable[str]], held_out: Mapping[str, Iterable[str]], *, own: Iterable[str]
) -> None:
    """Refuse held-out documents that are trained on as well, where one of the two is a text of one's own.

    Args:
        trained: Documents that any arm may train on, by the name of their text.
        held_out: Documents that are measured, by the name of their text.
        own: Names of the texts of one's own.

    Raises:
        DataError: There are such documents; spaces and line ends do not count.
    """
    own = set(own)
    where = {" ".join(text.split()): name for name, documents in trained.items() for text in documents}
    for name, documents in held_out.items():
        texts = [" ".join(text.split()) for text in documents]
        shared = [where[text] for text in texts if text in where and own & {name, where[text]}]
        if shared:
            raise DataError(
                f"{name}: {len(shared)} of {_documents(len(texts))} that are to be measured are trained on as well "
                f"(in {', '.join(sorted(set(shared)))}). Take them out of one of the two."
            )


def check_unchanged(texts: Texts, folder: Path) -> None:
    """Note what was read in a work folder, or check that it still says the same.

    Raises:
        DataError: The folder's results are of other text.
    """
    parts = {"public": texts.public, **texts.owned}
    parts |= {f"{name} (held out)": documents for name, documents in texts.held_out.items()}
    now = {name: _digest("\0".join(map(_digest, documents))) for name, documents in parts.items()}
    path = folder / _DIGESTS
    if not path.is_file():
        write_atomic(path, (json.dumps(now, indent=1) + "\n").encode())
        return
    before = json.loads(path.read_text())
    changed = sorted(name for name in {*now, *before} if now.get(name) != before.get(name))
    if changed:
        raise DataError(
            f"{folder} holds results on other text ({', '.join(changed)}). Put the files back, or choose another "
            "--work folder."
        )
