"""Whose expert stands at which index of a stock checkpoint: a small YAML beside it.

A stock checkpoint knows experts by their position alone. Knows names, domains and licences; knows no tensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator

from experts.errors import ManifestError
from experts.license import check_license
from experts.names import check_expert_name
from experts.strict import load_yaml, validate

__all__ = ["ImportedExpert", "OwnersFile"]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ImportedExpert(_Strict):
    """One expert of the checkpoint."""

    name: str
    """``owner/expert``."""
    domain: str = Field(min_length=1)
    """What it is for, one label."""
    license: str
    """SPDX expression."""
    version: int = Field(default=1, ge=1)
    """Version of the card that is made."""
    description: str = ""
    """Free text for the card."""

    @field_validator("name")
    @classmethod
    def _well_formed(cls, name: str) -> str:
        try:
            return check_expert_name(name)
        except Exception as error:
            raise ValueError(str(error)) from None

    @field_validator("license")
    @classmethod
    def _spdx(cls, text: str) -> str:
        try:
            return check_license(text)
        except Exception as error:
            raise ValueError(str(error).replace("\n  - ", " ")) from None  # one line


class OwnersFile(_Strict):
    """The whole file."""

    format_version: Literal[1] = 1
    """Version of this format."""
    base: str = Field(min_length=1, max_length=200)
    """What the anchor, expert 0 of the checkpoint, will be called."""
    experts: tuple[ImportedExpert, ...]
    """Experts 1, 2, ... of the checkpoint, in its order."""

    @field_validator("experts", mode="before")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if isinstance(value, list | tuple) and not value:
            raise ValueError(
                "name at least one expert"
            )  # counted here: pydantic counts the well-formed ones only
        return tuple(value) if isinstance(value, list) else value

    @field_validator("experts")
    @classmethod
    def _distinct(cls, experts: tuple[ImportedExpert, ...]) -> tuple[ImportedExpert, ...]:
        names = [expert.name for expert in experts]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"{', '.join(twice)} is listed more than once; every expert needs a name of its own"
            )
        return experts

    @classmethod
    def from_file(cls, path: Path | str) -> Self:
        """Read the file.

        Raises:
            ManifestError: It is missing, is not plain YAML, or has mistakes; all of them are listed.
        """
        path = Path(path)
        what = f"owners file {path.name}"
        if not path.is_file():
            raise ManifestError(f"There is no owners file at {path}.")
        return validate(cls, load_yaml(path, what=what), what=what)
