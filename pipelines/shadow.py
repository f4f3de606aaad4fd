"""Finds out whether another package hides one of coterie's four top-level packages.

Knows only where Python would import the names from; imports none of them and repairs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

__all__ = ["PACKAGES", "Shadow", "explain", "find_shadows"]

PACKAGES = ("experts", "registry", "composer", "pipelines")
"""The top-level packages that coterie installs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shadow:
    """One of our packages that Python would not import from our own folder."""

    name: str
    found: Path | None
    """The folder Python would import instead; None where it finds nothing at all."""
    expected: Path
    """Our own folder of that package."""


def find_shadows(*, root: Path | None = None) -> tuple[Shadow, ...]:
    """Return the packages of ours that resolve to a folder outside ``root``; costs about 0.2 ms.

    Args:
        root: The folder that holds our packages; None for the one this module was imported from.
    """
    home = (root or Path(__file__).parents[1]).resolve()
    found = {name: _folder(name) for name in PACKAGES}
    return tuple(
        Shadow(name=name, found=folder, expected=home / name)
        for name, folder in found.items()
        if folder is None or folder != home / name
    )


def explain(shadows: tuple[Shadow, ...]) -> str:
    """Say what hides which package and what to do; looks up the culprit's distribution (about 0.4 s)."""
    return "\n".join(_explain_one(shadow) for shadow in shadows)


def _folder(name: str) -> Path | None:
    try:
        spec = find_spec(name)
    except ValueError:  # a module put into sys.modules by hand has no spec
        return None
    if spec is None or spec.origin is None:
        return None
    origin = Path(spec.origin).resolve()
    return origin.parent if origin.name == "__init__.py" else origin


def _explain_one(shadow: Shadow) -> str:
    if shadow.found is None:
        return (
            f"coterie's package '{shadow.name}' cannot be imported: it should be in {shadow.expected}. "
            "Install coterie again in a fresh virtual environment."
        )
    head = (
        f"Another package named '{shadow.name}' hides coterie's own: "
        f"Python finds {shadow.found}, coterie's is {shadow.expected}."
    )
    owners = _distributions(shadow.name)
    if owners:
        listed = " and ".join(f"'{owner}'" for owner in owners)
        return (
            f"{head} It comes from the distribution {listed}. Install coterie in an environment without it."
        )
    return f"{head} Rename that folder, take it off PYTHONPATH, or start coterie from another directory."


def _distributions(name: str) -> list[str]:
    from importlib.metadata import packages_distributions

    return sorted({owner for owner in packages_distributions().get(name, []) if owner != "coterie"})
