"""Which owners a file of a composed folder was computed from, and what opting out can therefore mean."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from composer.lock import OptOutClass

__all__ = ["optout_class", "reachable_without"]


def optout_class(lineage: Mapping[str, Collection[str]]) -> OptOutClass:
    """Return ``exact`` if no file mixes owners, else ``recompose``.

    An expert that was made from another owner's mixes both, but leaves as a whole with either: it is nobody else's.

    Args:
        lineage: Path -> owners it was computed from.
    """
    shared = [owners for path, owners in lineage.items() if not path.startswith("experts/")]
    return "exact" if all(len(set(owners)) <= 1 for owners in shared) else "recompose"


def reachable_without(lineage: Mapping[str, Collection[str]], owners: Collection[str]) -> frozenset[str]:
    """Return the paths that hold nothing of any of ``owners``."""
    return frozenset(path for path, who in lineage.items() if not set(who) & set(owners))
