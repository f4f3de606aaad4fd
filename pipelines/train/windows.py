"""Turns an owner's documents into equal windows of token ids, deterministically for a seed.

Knows text files, tokenizers and packing; knows nothing of models and keeps no path.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experts.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Windows", "document_windows", "make_windows", "read_documents", "split_held_out"]

_CHARACTERS_PER_TOKEN = 8
"""An excerpt of this many characters for every token of a window nearly always fills the window."""

_CHUNK = 32
"""Excerpts tokenised at once: only as many as the job needs are ever tokenised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Token ids in windows of one length.

    Attributes:
        ids: ``(windows, sequence_length)`` int32.
        documents: How many documents contributed.
    """

    ids: np.ndarray[Any, np.dtype[np.int32]]
    documents: int

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    @property
    def tokens(self) -> int:
        """Token positions in all windows."""
        return int(self.ids.size)

    def digest(self) -> str:
        """sha256 of the ids and their shape, to recognise the same text when a job resumes."""
        return hashlib.sha256(repr(self.ids.shape).encode() + self.ids.tobytes()).hexdigest()


def _read_jsonl(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path.name}, line {number}: not JSON. Write one object a line.") from error
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise DataError(
                    f'{path.name}, line {number}: no string under "text". Write {{"text": "..."}} on every line.'
                )
            yield record["text"]


def read_documents(paths: Iterable[Path]) -> list[str]:
    """Every document of ``.jsonl`` files (one object with ``"text"`` a line) and ``.txt`` files (one each).

    Raises:
        DataError: A file is missing, is not a regular file, is not UTF-8, has another ending or another form, or all
            are empty. Messages name files and lines, never their content.
    """
    documents: list[str] = []
    files = list(paths)
    for path in files:
        if path.exists() and not path.is_file():  # a pipe would be waited for, without an end
            raise DataError(f"{path.name} is not a regular file. Write the text to a file first.")
        try:
            documents.extend(
                _read_jsonl(path) if path.suffix == ".jsonl" else [path.read_text(encoding="utf-8")]
            )
        except OSError as error:
            raise DataError(f"{path.name} cannot be read: {error.strerror}.") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path.name} is not UTF-8 (byte {error.start}). Convert it first.") from error
    documents = [text for text in documents if text.strip()]
    if not documents:
        raise DataError(f"No text in {', '.join(path.name for path in files) or 'an empty list of files'}.")
    return documents


def split_held_out(documents: Sequence[str], *, fraction: float) -> tuple[list[str], list[str]]:
    """Split into training and held-out documents by the digest of each text.

    Equal texts land on the same side, and a document stays on its side when others come and go. Where there
    are two different documents at least, neither side is left empty.
    """
    if fraction <= 0:
        return list(documents), []
    ranked = sorted({hashlib.sha256(text.encode()).digest(): text for text in documents}.items())
    limit = int(fraction * 2**64)
    chosen = {digest for digest, _ in ranked if int.from_bytes(digest[:8], "big") < limit}
    if not chosen and len(ranked) > 1:
        chosen = {ranked[0][0]}
    if len(chosen) == len(ranked):
        chosen -= {ranked[-1][0]}
    sides = [hashlib.sha256(text.encode()).digest() in chosen for text in documents]
    return (
        [text for text, out in zip(documents, sides, strict=True) if not out],
        [text for text, out in zip(documents, sides, strict=True) if out],
    )


def _excerpts(documents: Sequence[str], size: int) -> list[tuple[int, int, int]]:
    """``(document, start, end)`` of pieces of about ``size`` characters, cut at white space."""
    pieces = []
    for index, text in enumerate(documents):
        start = 0
        while start < len(text):
            end = min(start + size, len(text))
            if end < len(text):
                cut = max(text.rfind("\n", start + size // 2, end), text.rfind(" ", start + size // 2, end))
                end = cut if cut > start else end
            pieces.append((index, start, end))
            start = end
    return pieces


def _prefix(tokenizer: Any) -> list[int]:
    """``[BOS]`` where the tokenizer itself puts one in front (Gemma derails without), else nothing."""
    plain = tokenizer("a", add_special_tokens=True)["input_ids"]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and plain and plain[0] == bos else []


def _token_windows(
    documents: Sequence[str], tokenizer: Any, *, length: int, seed: int
) -> Iterator[tuple[int, list[int]]]:
    """Yield ``(document, ids)``; long excerpts fill windows of their own, the rest is packed end to end."""
    pieces = _excerpts(documents, size=length * _CHARACTERS_PER_TOKEN)
    random.Random(seed).shuffle(pieces)
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rest: list[int] = []
    for begin in range(0, len(pieces), _CHUNK):
        chunk = pieces[begin : begin + _CHUNK]
        texts = [documents[index][start:end] for index, start, end in chunk]
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        for (index, _, end), ids in zip(chunk, encoded, strict=True):
            closed = ids + separator if end == len(documents[index]) else ids
            whole = len(closed) // length * length
            for start in range(0, whole, length):
                yield index, closed[start : start + length]
            rest += closed[whole:]
            while len(rest) >= length:
                yield index, rest[:length]
                rest = rest[length:]


def document_windows(text: str, tokenizer: Any, *, sequence_length: int, limit: int) -> Tensor:
    """At most ``limit`` windows of one document, evenly spread over it, with nothing of any other.

    Returns:
        int64 ``(windows, sequence_length)``; one shorter row where the document does not fill a window, and none
        where it has no token.
    """
    import torch

    prefix = _prefix(tokenizer)
    room = sequence_length - len(prefix)
    pieces = [text[start:end] for _, start, end in _excerpts([text], size=room * _CHARACTERS_PER_TOKEN)]
    spread = pieces[:: max(1, len(pieces) // limit)][:limit]
    rows = tokenizer(spread, add_special_tokens=False, verbose=False)["input_ids"] if spread else []
    full = [prefix + ids[:room] for ids in rows if len(ids) >= room]
    if full:
        return torch.tensor(full, dtype=torch.int64)
    longest: list[int] = max(rows, key=len, default=[])
    return torch.tensor([prefix + longest] if longest else [], dtype=torch.int64).reshape(bool(longest), -1)


def make_windows(
    documents: Sequence[str],
    tokenizer: Any,
    *,
    sequence_length: int,
    limit: int,
    seed: int,
    what: str = "the data",
) -> Windows:
    """At most ``limit`` windows of ``sequence_length`` tokens from all over ``documents``.

    Documents are cut into excerpts, which are shuffled by ``seed``; an excerpt that fills a window has it to
    itself, shorter ones are packed with the tokenizer's end-of-text token after each document. Only as much
    text as the windows need is tokenised.

    Raises:
        DataError: The text does not fill one window.
    """
    prefix = _prefix(tokenizer)
    room = sequence_length - len(prefix)
    rows, used = [], set()
    for index, ids in _token_windows(documents, tokenizer, length=room, seed=seed):
        rows.append(prefix + ids)
        used.add(index)
        if len(rows) == limit:
            break
    if not rows:
        raise DataError(
            f"{what} does not fill one window of {sequence_length} tokens. "
            "Give more text or a smaller sequence_length."
        )
    return Windows(ids=np.asarray(rows, dtype=np.int32), documents=len(used))
