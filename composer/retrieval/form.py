"""The manifest and the lock of a composed retriever: those of any composition, with a router of another kind.

Knows keys; imports no torch.
"""

from __future__ import annotations

import hashlib

from composer.building import TOKENIZER_FILES
from composer.lock import Lock
from composer.manifest import Manifest
from composer.retrieval.options import RetrievalRouter

__all__ = [
    "MODULES_NAME",
    "QUERY_KWARGS",
    "SETTINGS_FILES",
    "TOP_FILES",
    "RetrieverLock",
    "RetrieverManifest",
]

MODULES_NAME = "modules.json"
QUERY_KWARGS = ("task", "opt_out")
"""What sentence-transformers must hand on to the encoder."""
TOP_FILES = (
    "1_Pooling/config.json",
    "2_Normalize/config.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
)
"""Files of the base that also stand at the top, beside its tokenizer's."""
SETTINGS_FILES = (*TOP_FILES, *TOKENIZER_FILES, MODULES_NAME, "config.json")
"""Files of the base that decide, beside its tensors, how texts become vectors."""


class RetrieverManifest(Manifest):
    """A composed retriever as its builder wants it."""

    recipe: str = "router_retriever"
    """How the experts become one model."""
    router: RetrievalRouter = RetrievalRouter()  # type: ignore[assignment]
    """How queries find their experts."""


class RetrieverLock(Lock):
    """The whole of a composed retriever."""

    router: RetrievalRouter  # type: ignore[assignment]

    @property
    def membership_digest(self) -> str:
        """SHA-256 over what decides embeddings of texts: beside the experts and the router, how texts become vectors.

        Experts' cards name that too, but there may be no expert: everybody may be left out.
        """
        settings = sorted((e.path, e.sha256) for e in self.base.files if e.path in SETTINGS_FILES)
        parts = [super().membership_digest, *map(":".join, settings)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
