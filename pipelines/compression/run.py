"""From a reference or a folder to a compressed expert's folder: finds everything, checks it, and puts it together.

Knows registries, folders and consent; the arithmetic is in ``expert``. Imports torch when it runs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from experts.admission import check_expert
from experts.card import CARD_FILE, ExpertCard
from experts.errors import ConsentError
from experts.names import check_expert_name
from experts.package import read_package
from pipelines.compression import CompressionError
from pipelines.compression.ranks import parse_rank
from pipelines.train.anchor import ResolvedBase, resolve_base

if TYPE_CHECKING:
    from pipelines.compression.report import CompressionReport
    from registry import Registry

__all__ = ["Compressed", "base_of", "check_out", "compress_expert", "find_expert", "target_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compressed:
    """What came of it.

    Attributes:
        source: Card of the full expert.
        name: Of the compressed expert.
        version: Of the compressed expert.
        card: Its card; None where nothing was written.
        report: Ranks, bytes, errors, likelihoods.
    """

    source: ExpertCard
    name: str
    version: int
    card: ExpertCard | None
    report: CompressionReport


def compress_expert(
    source: str | Path,
    *,
    rank: str,
    registry: Registry,
    out: Path | None = None,
    name: str | None = None,
    data: Mapping[str, Sequence[str]] | None = None,
    sequence_length: int = 128,
    max_tokens: int | None = 4096,
    progress: Callable[[int, int], None] | None = None,
) -> Compressed:
    """Make a low-rank expert out of a full one.

    Args:
        source: A reference (``owner/expert``), or a folder with a card, such as ``coterie train`` writes.
        rank: See `pipelines.compression.ranks.parse_rank`.
        registry: Holds the anchor, and the expert where a reference is given.
        out: The folder to make, ready to be registered; it must not exist, or be empty. None: only measure.
        name: ``owner/expert`` of the result; None: the full expert's name, in the next version.
        data: Documents by domain, on which the likelihoods are compared.
        sequence_length: Tokens in a window of them.
        max_tokens: At most about this many tokens of a domain; None: all.
        progress: Told of every linear.

    Raises:
        CompressionError: A rank of another form, an expert that is not full or changes biases, a name of another
            owner, an anchor that the registry does not have, or an ``out`` in use.
        ConsentError: The owner has opted out.
        UnknownNameError: There is no such expert.
        AdmissionError: The folder is not what its card says.
        DataError: A domain does not fill a window.
    """
    rule = parse_rank(rank)
    card, files = find_expert(source, registry)
    target = target_of(card, name, registry)
    check_out(out)

    from pipelines.compression.expert import FullExpert, check_kind, check_owner, compress, write_card

    check_kind(card)
    check_owner(card, target[0])
    with base_of(card, registry) as base, tempfile.TemporaryDirectory(prefix="coterie-compress-") as scratch:
        if isinstance(files, Path):
            check_expert(files, card, base.description)
            files = {entry.path: files / entry.path for entry in card.files}
        expert = FullExpert(card=card, files=files, base=base)
        adapter = Path(scratch)
        report = compress(expert, rule, adapter, progress=progress)
        if data:
            from pipelines.compression.likelihood import measure_cost

            costs = measure_cost(
                expert, adapter, data, sequence_length=sequence_length, max_tokens=max_tokens
            )
            report = replace(report, domains=costs)
        written = None
        if out is not None:
            written = write_card(expert, adapter, out, name=target[0], version=target[1], report=report)
    return Compressed(source=card, name=target[0], version=target[1], card=written, report=report)


def find_expert(source: str | Path, registry: Registry) -> tuple[ExpertCard, Mapping[str, Path] | Path]:
    """Return the card, and the files or, still to be checked, the folder."""
    folder = Path(source)
    found: Mapping[str, Path] | Path = folder
    if (folder / CARD_FILE).is_file():
        card = read_package(folder)
    elif isinstance(source, Path) or source.count("/") != 1 or source.startswith("."):
        raise CompressionError(
            f"'{source}' is neither a folder with a card ({CARD_FILE}), such as `coterie train` writes, nor a "
            "reference to an expert of the registry (owner/expert)."
        )
    else:
        record = registry.expert(source)
        card, found = registry.card(record), registry.files(record)
    whose = (card.owner, *registry.parent_owners(card))
    for entry in registry.opt_outs():
        if entry.owner in whose:
            raise ConsentError(
                f"{card.name} cannot be converted: {entry.owner} opted out on {entry.when} (recorded by {entry.who}): "
                f"{entry.reason}"
            )
    return card, found


def target_of(card: ExpertCard, name: str | None, registry: Registry) -> tuple[str, int]:
    """Return name and version of what is made from an expert."""
    if name is None or name == card.name:
        return card.name, max(card.version + 1, registry.next_version(card.name))
    return check_expert_name(name), registry.next_version(name)


def check_out(out: Path | None) -> None:
    """Refuse before the work what could not be written after it."""
    if out is not None and (out.exists() or out.is_symlink()) and (not out.is_dir() or any(out.iterdir())):
        raise CompressionError(f"'{out}' exists and is not an empty folder; name another one with --out.")


@contextmanager
def base_of(card: ExpertCard, registry: Registry) -> Iterator[ResolvedBase]:
    """Find the anchor of an expert in the registry, whatever it is called there."""
    names = [base.name for base in registry.bases() if base.fingerprint == card.base.fingerprint]
    if not names:
        raise CompressionError(
            f"{card.name} belongs to the base '{card.base.name}' with fingerprint {card.base.fingerprint[:12]}, which "
            f"the registry '{registry.path}' does not have. Add it with: coterie base add PATH --name {card.base.name}"
        )
    with resolve_base(card.base.name if card.base.name in names else names[0], registry=registry) as base:
        yield base
