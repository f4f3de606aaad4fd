"""Where routing artefacts come from: the anchor whose states they are of, the public rows, the embedder.

Knows fingerprints and digests, and reads public artefacts no further than those hold; knows nothing of routing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field

from experts.errors import AdmissionError
from experts.fingerprint import (
    INDEX,
    WEIGHTS,
    checkpoint_files,
    fingerprint_tensors,
    tokenizer_files,
    tokenizer_fingerprint,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from experts.routing_artifacts import RoutingArtifacts, RoutingInfo

__all__ = ["AnchorInfo", "check_anchor", "check_public_rows", "embedder_digest", "load_public", "rows_digest"]

_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Anchor(Protocol):
    @property
    def fingerprint(self) -> str: ...

    @property
    def tokenizer_fingerprint(self) -> str: ...


class AnchorInfo(BaseModel):
    """The anchor that artefacts of public text were made on; an expert's card says it for the owner's."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    fingerprint: _Digest
    """Of the tensors, see `experts.fingerprint.fingerprint_tensors`."""
    tokenizer_fingerprint: _Digest

    @classmethod
    def of(cls, base: _Anchor) -> Self:
        """Take it from a base's record, or from what a card says of its base."""
        return cls(fingerprint=base.fingerprint, tokenizer_fingerprint=base.tokenizer_fingerprint)


def check_anchor(found: AnchorInfo | None, expected: AnchorInfo, *, what: str, advice: str) -> None:
    """Refuse artefacts of another anchor; its shapes may be the same, its states are not.

    Args:
        found: What the artefacts say.
        expected: The anchor that they are to stand beside.
        what: How to call that, for instance ``"the base 'pico'"``.
        advice: What to do.

    Raises:
        AdmissionError: Another anchor, or another tokenizer, or the artefacts say nothing.
    """
    if found is None:
        raise AdmissionError(
            f"The routing artefacts do not say which anchor they were made on ('anchor' in routing.json); {what} takes "
            f"only its own. {advice}"
        )
    pairs = {
        "tensors": (found.fingerprint, expected.fingerprint),
        "tokenizer": (found.tokenizer_fingerprint, expected.tokenizer_fingerprint),
    }
    problems = [
        f"{name}: sha256:{theirs} found, sha256:{ours} expected"
        for name, (theirs, ours) in pairs.items()
        if theirs != ours
    ]
    if problems:
        raise AdmissionError(
            f"The routing artefacts were made on another anchor than {what}. {advice}", problems=problems
        )


def rows_digest(rows: Mapping[int, NDArray[np.floating]]) -> str:
    """sha256 over layer numbers and float32 bytes, ascending by layer: which public rows were trained against.

    Taken over all rows of a public artefact, so that owners who train different layers agree on it.

    Args:
        rows: ``(d,)`` by layer, any float dtype.
    """
    import numpy as np

    digest = hashlib.sha256()
    for layer in sorted(rows):
        digest.update(f"{layer}:".encode())
        digest.update(np.ascontiguousarray(rows[layer], dtype="<f4").tobytes())
    return digest.hexdigest()


def load_public(path: Path, info: RoutingInfo, *, hidden_size: int) -> RoutingArtifacts:
    """Read the artefacts of public text, whose rows must be those that they declare.

    Args:
        path: See `RoutingArtifacts.load`.
        info: What the file is declared to hold.
        hidden_size: Width of the base's hidden states.

    Raises:
        AdmissionError: See `RoutingArtifacts.load` and `check_public_rows`.
    """
    from experts.routing_artifacts import RoutingArtifacts

    artifacts = RoutingArtifacts.load(path, info, hidden_size=hidden_size)
    check_public_rows(artifacts)
    return artifacts


def check_public_rows(artifacts: RoutingArtifacts) -> None:
    """Hold public rows against their declared digest, by which owners' rows say what they were trained beside.

    Raises:
        AdmissionError: The rows have another digest.
    """
    rows = artifacts.info.rows
    if rows is None:
        return
    found = rows_digest({layer: artifacts.row(layer)[0] for layer in rows.layers})
    if found != rows.public_digest:
        raise AdmissionError(
            f"The public rows in '{artifacts.info.file}' have the digest {found}, but rows.public_digest is "
            f"{rows.public_digest}. Owners' rows are matched to public rows by it: take the file that routing.json was "
            "written for, or make both anew with 'coterie base public-routing NAME --text FILE --rows'."
        )


def embedder_digest(folder: Path) -> str:
    """sha256 over the weights and the tokenizer of a SentenceTransformer's folder: one embedder under any name.

    The modules in its subfolders count; how their states are pooled does not.

    Raises:
        AdmissionError: The folder holds no well-formed safetensors checkpoint.
    """
    parts = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    weights = [part for part in parts if any((part / name).is_file() for name in (WEIGHTS, INDEX))]
    if not weights:
        checkpoint_files(folder)  # says what is missing
    entries = [
        *([part.relative_to(folder).as_posix(), "weights", fingerprint_tensors(part)] for part in weights),
        *(
            [part.relative_to(folder).as_posix(), "tokenizer", tokenizer_fingerprint(part)]
            for part in parts
            if tokenizer_files(part)
        ),
    ]
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()
