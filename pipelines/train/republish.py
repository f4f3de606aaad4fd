"""A retriever that is published already, with other routing artefacts: the same weights under a new card.

Knows cards and files; knows nothing of how artefacts are computed. Nothing is trained.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from experts.card import CARD_FILE
from experts.package import pack
from experts.routing_artifacts import RoutingArtifacts, RoutingInfo

if TYPE_CHECKING:
    from experts.card import ExpertCard
    from experts.retrieval_artifacts import RetrievalArtifacts
    from pipelines.train.anchor import ResolvedBase

__all__ = ["republish"]


def republish(
    files: Mapping[str, Path],
    card: ExpertCard,
    artifacts: RetrievalArtifacts,
    out: Path,
    *,
    base: ResolvedBase,
    version: int,
    name: str | None = None,
) -> Path:
    """Pack an expert's files with new artefacts.

    Args:
        files: Of the expert, by the names that its card gives.
        card: Its card.
        artifacts: What is to be published in the place of the card's.
        out: The folder to create.
        base: The card's base.
        version: Of the new card.
        name: ``owner/expert`` of the new card; None: the old one's.

    Returns:
        ``out``, to be registered.

    Raises:
        AdmissionError: The artefacts break a bound, or ``out`` is in use.
    """
    routing = RoutingInfo(retrieval=artifacts.info)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        raw = Path(scratch)
        left = {CARD_FILE, card.routing.file if card.routing else CARD_FILE}
        for path, source in files.items():
            if path not in left:
                shutil.copyfile(source, raw / path)
        RoutingArtifacts(info=routing, tensors=artifacts.tensors()).save(raw)
        pack(
            raw,
            out,
            name=name or card.name,
            version=version,
            domain=card.domain,
            license=card.license,
            base=base.description,
            base_ref=card.base,
            training=card.training,
            routing=routing,
            metrics=card.metrics,
            description=card.description,
            terms=card.terms,
            derived_from=card.derived_from,
            optout_class=card.optout_class,
            kind=card.kind,
        )
    return out
