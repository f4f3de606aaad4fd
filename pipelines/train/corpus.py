"""Everything a job reads: own, public and held-out text as windows of token ids.

Knows the job's data fields and the tokenizer; knows nothing of models.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.train.job import DomainJob
from pipelines.train.windows import Windows, document_windows, make_windows, read_documents, split_held_out

__all__ = ["Corpus", "read_corpus"]

_PUBLIC_ROW_WINDOWS = 64

_SINGLE_WINDOWS = 8
"""At most this many windows of one document make its contribution to noisy statistics."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """The windows of a job; own ones are numbered from 0, public ones follow.

    Attributes:
        documents: The owner's training documents, for embedding them.
        public_documents: The public documents.
        own: Windows of the owner's text.
        public: Windows of public text, if any is given.
        held_out: Windows of held-out documents, if any are kept.
        single: Token ids of single documents, each ``(windows, length)`` int64 and from that document alone; only
            where statistics get noise.
    """

    documents: Sequence[str]
    public_documents: Sequence[str]
    own: Windows
    public: Windows | None
    held_out: Windows | None
    single: Sequence[Tensor] = ()

    @property
    def ids(self) -> Tensor:
        """Own, then public windows: ``(windows, sequence)`` int64."""
        parts = [self.own.ids] if self.public is None else [self.own.ids, self.public.ids]
        return torch.from_numpy(np.concatenate(parts)).long()

    def digest(self) -> str:
        """Recognises the same text when a job resumes."""
        return self.own.digest() + (self.public.digest() if self.public else "")


def read_corpus(job: DomainJob, tokenizer: Any) -> Corpus:
    """Read and tokenise as much text as the job needs.

    Raises:
        DataError: Text is missing, malformed or too short.
    """
    documents = read_documents(job.data)
    if isinstance(job.held_out, Path):
        training, held_out = documents, read_documents([job.held_out])
    else:
        training, held_out = split_held_out(documents, fraction=job.held_out)
    public = read_documents(job.public) if job.public else []
    draws = job.steps * job.batch_size

    def windows(texts: Sequence[str], limit: int, what: str) -> Windows:
        return make_windows(
            texts, tokenizer, sequence_length=job.sequence_length, limit=limit, seed=job.seed, what=what
        )

    needed = max(math.ceil(2 * job.public_fraction * draws), _PUBLIC_ROW_WINDOWS)
    return Corpus(
        documents=training,
        public_documents=public,
        own=windows(training, draws, "the training text"),
        public=windows(public, needed, "the public text") if public else None,
        held_out=windows(held_out, job.held_out_windows, "the held-out text") if held_out else None,
        single=() if job.statistics.noise is None else _single(training, tokenizer, job=job, windows=draws),
    )


def _single(documents: Sequence[str], tokenizer: Any, *, job: DomainJob, windows: int) -> list[Tensor]:
    """Tokens of documents apart, about ``windows`` windows in all; which ones depends on numbers alone, not on text."""
    chosen = list(range(len(documents)))
    random.Random(job.seed).shuffle(chosen)
    chosen = chosen[:windows]
    each = min(_SINGLE_WINDOWS, max(1, windows // len(chosen)))
    return [
        document_windows(documents[index], tokenizer, sequence_length=job.sequence_length, limit=each)
        for index in chosen
    ]
