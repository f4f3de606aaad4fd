"""Canaries: texts with a random secret that an owner plants in the training data, and what else it could have been.

Knows strings and counts; knows nothing of models or tokens.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import string
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from experts.errors import DataError
from experts.strict import validate

__all__ = ["Canary", "read_canaries"]

_CLASSES = (string.digits, string.ascii_lowercase, string.ascii_uppercase)


class Canary(BaseModel):
    """A planted text, and which part of it was drawn at random.

    ``{"text": "The safe opens with 281265.", "secret": "281265"}``
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str
    secret: str
    """Occurs once in the text."""
    alphabet: str | None = None
    """What the secret's characters were drawn from; characters outside of it are no secret. By default a digit was
    drawn from the digits, a letter from the 26 letters of its case, and everything else is no secret."""

    @property
    def prefix(self) -> str:
        """The text before the secret."""
        return self.text[: self.text.index(self.secret)]

    @property
    def through_secret(self) -> str:
        """The text up to the secret's end."""
        return self.prefix + self.secret

    @property
    def space_bits(self) -> float:
        """``log2 |R|``: bits of the space that the secret was drawn from, which bound the exposure."""
        return sum(math.log2(len(choices)) for choices in self._choices())

    def references(self, count: int, *, seed: int) -> list[str]:
        """Return texts with other secrets: ``count`` random ones, or all others where there are no more.

        Distinct, and a function of the canary, ``count`` and ``seed``.
        """
        choices = self._choices()
        if self.space_bits <= math.log2(count + 1) + 1e-9:
            others = ("".join(characters) for characters in itertools.product(*choices))
            return [self._with(other) for other in others if other != self.secret]
        draw = random.Random(f"{seed} {self.text}")
        drawn: dict[str, None] = {}
        while len(drawn) < count:
            other = "".join(draw.choice(some) for some in choices)
            if other != self.secret:
                drawn[other] = None
        return [self._with(other) for other in drawn]

    def problem(self) -> str | None:
        """Return what is wrong with it, in one sentence, or None."""
        if not self.secret or self.text.count(self.secret) != 1:
            return (
                f'the secret is {self.text.count(self.secret) if self.secret else 0} times in the "text"; it must be '
                "there once"
            )
        if self.alphabet is not None and len(set(self.alphabet)) < len(self.alphabet):
            return 'the "alphabet" has a character twice'
        if not self.space_bits:
            return 'no character of the secret can have been another; give its "alphabet"'
        return None

    def _with(self, secret: str) -> str:
        start = self.text.index(self.secret)
        return self.text[:start] + secret + self.text[start + len(self.secret) :]

    def _choices(self) -> list[str]:
        """What each character of the secret was drawn from."""
        classes = _CLASSES if self.alphabet is None else (self.alphabet,)
        return [next((some for some in classes if character in some), character) for character in self.secret]


def read_canaries(path: Path) -> list[Canary]:
    """Read a ``.jsonl`` file with a canary on every line.

    Raises:
        DataError: The file is missing, or a line is no canary; the message names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}). Convert it first.") from error
    canaries = [
        _canary(line, f"{path.name}, line {number}") for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not canaries:
        raise DataError(f'No canary in {path.name}. Write {{"text": ..., "secret": ...}} on every line.')
    return canaries


def _canary(line: str, where: str) -> Canary:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON. Write one object a line.") from error
    canary = validate(Canary, record, what=where, error=DataError)
    if problem := canary.problem():
        raise DataError(f"{where}: {problem}.")
    return canary
