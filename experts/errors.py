"""The errors coterie raises for a user's mistake or a broken promise.

Every message says what was given, what is allowed and what to do. The command line prints it without a
traceback and exits with ``exit_code``: 2 for bad input, 1 for a failure.

    CoterieError
    ├── UnknownNameError  an unknown or malformed name (expert, owner, recipe, scorer, ...)
    ├── CardError         an expert card that is not well formed
    ├── IntegrityError    bytes that are not what their digest says, or a store that contradicts itself
    ├── AdmissionError    an expert folder with something its kind does not allow
    ├── ConsentError      an owner has opted out, or a consent record is missing
    ├── OptOutError       an opt-out that cannot be honoured as asked
    ├── RegistryError     the registry cannot do what was asked
    ├── ManifestError     a manifest or job file that is not well formed
    ├── PlanError         a manifest that cannot be composed from this registry
    ├── BuildError        a composed folder that cannot be written or read
    ├── DataError         text that is missing or not in the stated format
    ├── AssetError        a public asset that could not be fetched or does not match its digest
    └── TrainingError     a training job that failed (exit code 1)
        └── StartError    what a training job runs in did not start; the job itself was not begun

`ExpertWarning` is no error: something an owner should look at before publishing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

__all__ = [
    "AdmissionError",
    "AssetError",
    "BuildError",
    "CardError",
    "ConsentError",
    "CoterieError",
    "DataError",
    "ExpertWarning",
    "IntegrityError",
    "ManifestError",
    "OptOutError",
    "PlanError",
    "RegistryError",
    "StartError",
    "TrainingError",
    "UnknownNameError",
]


class CoterieError(Exception):
    """Base of every error that coterie raises on purpose.

    Args:
        message: One sentence, or one sentence followed by indented lines.
        problems: The single findings, where a check collects several before it fails.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, message: str, *, problems: Iterable[str] = ()) -> None:
        self.problems: tuple[str, ...] = tuple(problems)
        super().__init__("\n".join([message, *(f"  - {problem}" for problem in self.problems)]))


class ExpertWarning(UserWarning):
    """An expert that is well formed and probably not what its owner meant."""


class UnknownNameError(CoterieError):
    """A name that is unknown or malformed."""


class CardError(CoterieError):
    """An expert card that is not well formed."""


class IntegrityError(CoterieError):
    """Bytes that differ from their digest, or a store that contradicts itself."""


class AdmissionError(CoterieError):
    """An expert folder that holds something its kind does not allow on its base."""


class ConsentError(CoterieError):
    """An owner who has opted out is asked for."""


class OptOutError(CoterieError):
    """An opt-out that cannot be honoured as asked."""


class RegistryError(CoterieError):
    """The registry cannot do what was asked."""


class ManifestError(CoterieError):
    """A manifest or a job file that is not well formed."""


class PlanError(CoterieError):
    """A manifest that cannot be composed from this registry."""


class BuildError(CoterieError):
    """A composed folder that cannot be written or read."""


class DataError(CoterieError):
    """Text that is missing or not in the stated format."""


class AssetError(CoterieError):
    """A public asset that could not be fetched or does not match its digest."""

    exit_code = 1


class TrainingError(CoterieError):
    """A training job that failed."""

    exit_code = 1


class StartError(TrainingError):
    """What a training job runs in did not start; nothing of the job was read."""
