"""Tables of plug-ins: one visible dict from a name to ``"module:Class"``, imported on demand.

Third parties add rows through entry points of the group named after the table (``coterie.scorers``,
``coterie.recipes``, ...). Knows how to look a name up; knows nothing of what the plug-ins do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from experts.errors import CoterieError
from experts.names import unknown_name

__all__ = ["PluginTable"]


class PluginTable(Mapping[str, str]):
    """A read-only mapping from plug-in names to import paths.

    Args:
        noun: What a row is, in the singular (``"scorer"``); the entry-point group is ``coterie.<noun>s``.
        builtin: The rows that ship with coterie.
    """

    def __init__(self, noun: str, builtin: Mapping[str, str]) -> None:
        self.noun = noun
        self.group = f"coterie.{noun.replace(' ', '_')}s"
        self.builtin = dict(builtin)

    @cached_property
    def _foreign(self) -> dict[str, EntryPoint]:
        """Rows that other distributions add.

        Raises:
            CoterieError: Two rows have one name.
        """
        rows: dict[str, EntryPoint] = {}
        for point in entry_points(group=self.group):
            if point.name in self.builtin or point.name in rows:
                raise CoterieError(
                    f"The {self.noun} '{point.name}' of {point.value} is already registered as "
                    f"{self.builtin.get(point.name) or rows[point.name].value}. Rename one of them."
                )
            rows[point.name] = point
        return rows

    def __getitem__(self, name: str) -> str:
        if name in self.builtin:
            return self.builtin[name]
        if name in self._foreign:
            return self._foreign[name].value
        raise unknown_name(self.noun, name, self)

    def __contains__(self, name: object) -> bool:
        return name in self.builtin or name in self._foreign

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self.builtin, *self._foreign}))

    def __len__(self) -> int:
        return len(self.builtin) + len(self._foreign)

    def load(self, name: str) -> Any:
        """Import and return the plug-in.

        Raises:
            UnknownNameError: No row has this name; the message lists the names and the nearest one.
        """
        module, _, attribute = self[name].partition(":")
        return getattr(import_module(module), attribute)
