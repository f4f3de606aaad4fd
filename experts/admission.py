"""Admitting an expert: the folder, then the configuration, the tensors and their values, on a given base.

Errors are collected within a step, and a step starts only when the one before passed. Knows the card, the base
and the kinds; needs no torch and loads no model.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from experts.base import BaseDescription
from experts.card import CARD_FILE, MAX_CARD_BYTES, BaseRef, ExpertCard
from experts.embedding import embedding_differences
from experts.errors import AdmissionError
from experts.files import capped, describe_mode, open_regular, path_problems, read_bounded, sha256_file
from experts.kinds import get_kind
from experts.kinds.kind import DTYPES, ExpertKind, ResolvedConfig
from experts.license import check_license
from experts.routing_artifacts import RoutingArtifacts
from experts.routing_origin import AnchorInfo, check_anchor
from experts.safetensors_header import Header, TensorSpec, read_header_from
from experts.schema import compare_schema
from experts.values import TensorValues, scan_tensor

__all__ = [
    "MAX_RMS",
    "MAX_VALUE",
    "ExpertSummary",
    "check_contents",
    "check_embedding",
    "check_expert",
    "check_files",
]

MAX_VALUE = 1e4
"""Largest magnitude of a weight. Outliers of published language models stay below 100."""
MAX_RMS = 100.0
"""Largest root mean square of a tensor's entries. Published language models stay near or below 1."""
_MAX_LISTED = 1000
"""Entries of a folder that are looked at; an expert has fewer than ten."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSummary:
    """What an admitted expert is."""

    kind: str
    layers: tuple[int, ...]
    rank: int | None
    parameters: int
    """Number of weights."""
    bytes: int
    """Size of all files but the card."""
    dtype: str
    """In safetensors' spelling."""
    ffn_only: bool
    """Whether only feed-forward linears are changed."""


def check_expert(folder: Path, card: ExpertCard, base: BaseDescription) -> ExpertSummary:
    """Check a packed expert completely: anchor, licence, files, configuration, tensors, values, routing.

    Args:
        folder: Holds ``card.json`` and exactly the files that the card lists.
        card: The card.
        base: The anchor that the expert is for.

    Raises:
        AdmissionError: Something is not allowed; lists every offender of the first step that fails.
        CardError: The licence is not an SPDX expression.
    """
    _check_base(card, base)
    check_license(card.license)
    check_files(folder, card)
    return check_contents({entry.path: folder / entry.path for entry in card.files}, card, base)


def _check_base(card: ExpertCard, base: BaseDescription) -> None:
    if card.base.fingerprint != base.fingerprint:
        raise AdmissionError(
            f"Expert '{card.name}' was trained on the base '{card.base.name}' with fingerprint "
            f"{card.base.fingerprint}; the base at hand has fingerprint {base.fingerprint}. Equal shapes are not "
            "enough: train the expert on this base, or use the one it was trained on."
        )
    check_embedding(card.name, card.base, base)


def check_embedding(name: str, ref: BaseRef, base: BaseDescription) -> None:
    """Refuse an expert whose base makes other vectors of the same tensors.

    Raises:
        AdmissionError: Lists every setting that differs, with both values.
    """
    if ref.embedding == base.embedding:
        return
    if ref.embedding is None or base.embedding is None:
        said = "says nothing of" if ref.embedding is None else "describes"
        raise AdmissionError(
            f"The card of expert '{name}' {said} embeddings, and the base at hand is "
            f"{'no' if base.embedding is None else 'an'} embedding model. Train the expert on this base, or use the "
            "one it was trained on."
        )
    raise AdmissionError(
        f"Expert '{name}' was trained on the base '{ref.name}' with other embedding settings than the base at hand "
        "has. Train it on this base, or use the one it was trained on:",
        problems=embedding_differences(ref.embedding, base.embedding, of=("the card", "the base at hand")),
    )


def check_files(folder: Path, card: ExpertCard) -> None:
    """Check that the folder holds the card, exactly the files it lists, and nothing else.

    Every file must be a regular file with one link (no symbolic link, FIFO, device or hard link), have a
    portable path within the folder, and the size and sha256 that the card declares.

    Raises:
        AdmissionError: Lists every offender.
    """
    kind = get_kind(card.kind).form({entry.path for entry in card.files})
    allowed = {*kind.files, *([card.routing.file] if card.routing else [])}
    declared = {entry.path: entry for entry in card.files}
    found = _walk(folder)
    problems = [f"{path}: not a file of a {kind.name} expert" for path in sorted(set(declared) - allowed)]
    problems += [f"{path}: missing from the card" for path in sorted(allowed - set(declared))]
    problems += [f"{path}: missing from the folder" for path in sorted({*declared, CARD_FILE} - set(found))]
    for path, info in sorted(found.items()):
        if path not in declared and path != CARD_FILE:
            problems.append(f"{path}: {describe_mode(info.st_mode)} that the card does not list; remove it")
        else:
            size = declared[path].size if path in declared else info.st_size
            problems += [f"{path}: {problem}" for problem in _entry_problems(info, size=size)]
    if not problems:
        problems = _digest_problems(folder, card)
    if problems:
        raise AdmissionError(
            f"The folder of expert '{card.name}' is not as packed:", problems=capped(problems)
        )


def _walk(folder: Path) -> dict[str, os.stat_result]:
    """Return every entry below the folder but sub-folders that lead to one; links are never followed."""
    if not folder.is_dir():
        raise AdmissionError(f"'{folder}' is not a folder.")
    found: dict[str, os.stat_result] = {}
    for parent, folders, files in os.walk(folder, followlinks=False):
        here = Path(parent)
        links = [name for name in folders if (here / name).is_symlink()]
        empty = [] if folders or files or here == folder else [""]
        for name in [*files, *links, *empty]:
            path = here / name if name else here
            found[path.relative_to(folder).as_posix()] = path.lstat()
        if len(found) > _MAX_LISTED:
            raise AdmissionError(
                f"'{folder}' holds more than {_MAX_LISTED} files; an expert has fewer than ten."
            )
    return found


def _entry_problems(info: os.stat_result, *, size: int) -> list[str]:
    if not stat.S_ISREG(info.st_mode):
        return [f"{describe_mode(info.st_mode)}; a regular file is needed"]
    problems = []
    if info.st_nlink != 1:
        problems.append(f"has {info.st_nlink} hard links; copy the file, so that nothing else can change it")
    if info.st_size != size:
        problems.append(f"{info.st_size:,} bytes, the card declares {size:,}")
    return problems


def _digest_problems(folder: Path, card: ExpertCard) -> list[str]:
    problems = path_problems(entry.path for entry in card.files)
    if read_bounded(folder / CARD_FILE, max_bytes=MAX_CARD_BYTES) != card.to_bytes():
        problems.append(f"{CARD_FILE}: not the card with sha256 {card.digest}")
    for entry in card.files:
        digest = sha256_file(folder / entry.path)
        if digest != entry.sha256:
            problems.append(f"{entry.path}: sha256 is {digest}, the card declares {entry.sha256}")
    return problems


def check_contents(
    files: Mapping[str, Path], card: ExpertCard, base: BaseDescription, *, values: bool = True
) -> ExpertSummary:
    """Check what an expert's files say, wherever they lie and whatever they are called there.

    Args:
        files: Path in the card to the file.
        card: The card.
        base: The anchor.
        values: Whether to read every value too (finite, bounded), and the routing artefacts.

    Raises:
        AdmissionError: Lists every offender of the first step that fails.
    """
    _check_base(card, base)
    kind = get_kind(card.kind).form(files)
    kind.check_base(base)
    config = kind.read_config(files[kind.config_file])
    resolved = kind.resolve(config, base)
    kind.check_more(files, base, card.base)
    with open_regular(files[kind.weights_file]) as stream:
        header = read_header_from(stream, what=f"'{kind.weights_file}'")
        dtype = _check_tensors(kind, resolved, header, card)
        if values:
            seen = {name: scan_tensor(stream.fileno(), tensor) for name, tensor in header.tensors.items()}
            _check_values(kind, config, base, card, seen)
    _check_claims(kind, resolved, card, base)
    if values and card.routing is not None:
        RoutingArtifacts.load(files[card.routing.file], card.routing, hidden_size=base.hidden_size)
        if card.routing.anchor is not None:
            check_anchor(
                card.routing.anchor,
                AnchorInfo.of(card.base),
                what=f"the base of {card.name}",
                advice="Make them on that base, or leave 'anchor' out of the card's routing.",
            )
    return ExpertSummary(
        kind=kind.name,
        layers=resolved.layers,
        rank=resolved.rank,
        parameters=sum(tensor.numel for tensor in header.tensors.values()),
        bytes=sum(entry.size for entry in card.files),
        dtype=dtype,
        ffn_only=resolved.ffn_only,
    )


def _check_tensors(kind: ExpertKind, resolved: ResolvedConfig, header: Header, card: ExpertCard) -> str:
    """Compare the header with the one set of tensors that is allowed; return the common dtype."""
    dtype = resolved.dtype or _common_dtype(header)
    expected = {name: TensorSpec(dtype=dtype, shape=shape) for name, shape in resolved.shapes.items()}
    problems = compare_schema(header.tensors, expected)
    if set(header.metadata) - {"format"}:
        problems.append(f"metadata: {sorted(header.metadata)} found, only 'format' is allowed; remove it")
    if problems:
        raise AdmissionError(
            f"{kind.weights_file} of expert '{card.name}' does not hold exactly the tensors that "
            f"{kind.config_file} gives on the base '{card.base.name}' (all of one dtype out of "
            f"{', '.join(DTYPES)}):",
            problems=capped(problems),
        )
    return dtype


def _common_dtype(header: Header) -> str:
    counts = Counter(tensor.dtype for tensor in header.tensors.values() if tensor.dtype in DTYPES)
    return counts.most_common(1)[0][0] if counts else DTYPES[0]


def _check_values(
    kind: ExpertKind,
    config: Mapping[str, object],
    base: BaseDescription,
    card: ExpertCard,
    seen: Mapping[str, TensorValues],
) -> None:
    problems = [
        f"tensor '{name}': {problem}" for name, value in seen.items() for problem in _value_problems(value)
    ]
    problems = problems or kind.value_problems(config, base, {name: v.norm for name, v in seen.items()})
    if problems:
        raise AdmissionError(
            f"{kind.weights_file} of expert '{card.name}' holds values that are not allowed:",
            problems=capped(problems),
        )


def _value_problems(value: TensorValues) -> list[str]:
    if value.not_finite:
        return [f"{value.not_finite:,} of {value.numel:,} values are NaN or infinite; all must be finite"]
    if value.largest > MAX_VALUE:
        return [f"largest magnitude {value.largest:.3g}; at most {MAX_VALUE:g} is allowed"]
    if value.rms > MAX_RMS:
        return [f"root mean square {value.rms:.3g}; at most {MAX_RMS:g} is allowed"]
    return []


def _check_claims(
    kind: ExpertKind, resolved: ResolvedConfig, card: ExpertCard, base: BaseDescription
) -> None:
    """Hold the card to what the files say."""
    problems = []
    if card.layers != resolved.layers:
        problems.append(f"layers: the card says {list(card.layers)}, the files say {list(resolved.layers)}")
    if card.rank != resolved.rank:
        problems.append(f"rank: the card says {card.rank}, the files say {resolved.rank}")
    if resolved.base_name not in (None, card.base.name):
        problems.append(
            f"base: the card says '{card.base.name}', {kind.config_file} says {resolved.base_name!r}"
        )
    problems += _retrieval_problems(card, base)
    for where, number in _routing_layers(card):
        if number >= base.num_layers:
            problems.append(f"{where}: the base has no layer {number}; it has 0 to {base.num_layers - 1}")
    if problems:
        raise AdmissionError(
            f"The card of expert '{card.name}' does not say what its files say:", problems=capped(problems)
        )


def _routing_layers(card: ExpertCard) -> list[tuple[str, int]]:
    routing = card.routing
    rows = routing.rows.layers if routing and routing.rows else ()
    statistics = [routing.statistics.layer] if routing and routing.statistics else []
    retrieval = routing.retrieval if routing else None
    states = [retrieval.state.layer] if retrieval and retrieval.state else []
    return [
        *(("routing.rows.layers", number) for number in rows),
        *(("routing.statistics.layer", number) for number in statistics),
        *(("routing.retrieval.state.layer", number) for number in states),
    ]


def _retrieval_problems(card: ExpertCard, base: BaseDescription) -> list[str]:
    retrieval = card.routing.retrieval if card.routing else None
    if retrieval is None:
        return []
    if base.embedding is None:
        return ["routing.retrieval: sums over embeddings, and the base is no embedding model"]
    expected = "l2" if base.embedding.normalize else "none"
    if retrieval.normalization != expected:
        return [
            f"routing.retrieval.normalization: '{retrieval.normalization}', and the base's embeddings have '{expected}'"
        ]
    return []
