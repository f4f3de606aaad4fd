"""What a job says when it trains a retriever: where pairs come from, what a query is compared with, what is published.

Knows the fields, their defaults and the paper's values; knows nothing of how training is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "LANGUAGE_FIELDS",
    "PAPER_RETRIEVER",
    "RETRIEVER",
    "RetrievalSettings",
    "check_pair_sources",
    "with_retriever_defaults",
]

Number = Annotated[float, Field(strict=True)]
Count = Annotated[int, Field(strict=True, gt=0)]
Flag = Annotated[bool, Field(strict=True)]
_Module = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$", max_length=100)]


class RetrievalSettings(BaseModel):
    """The part of a job that only retrievers have."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    form: Literal["adapter", "full"] = "adapter"
    """What is trained and published: low-rank matrices beside the chosen linears, or every weight of the chosen layers,
    as a whole query encoder of the base's size. Documents stay the base's either way."""
    pairs: Literal["auto", "title", "first-sentence"] = "auto"
    """What asks for a document where the owner has no queries: its ``title``, or its first sentence, which is taken out
    of it. ``auto``: the title where there is one."""
    label: Number = Field(default=0.1, ge=0, le=0.5)
    """Share of the queries that is neither trained on nor measured with, kept for comparing experts."""
    negatives: Literal["domain", "batch"] = "domain"
    """What a query's document is told apart from: all the domain's training documents, whose vectors are computed once,
    or those of the batch alone (the paper's)."""
    hard_negatives: Annotated[int, Field(strict=True, ge=0, le=64)] = 0
    """With ``batch``: for each query this many more, those that the base itself ranks highest."""
    temperature: Number = Field(default=0.05, gt=0)
    """Similarities are divided by it before the softmax."""
    targets: tuple[_Module, ...] | None = None
    """Ends of the names of the linears to adapt; by default query, value and the FFN's first."""
    dropout: Number = Field(default=0.0, ge=0, lt=1)
    """On the input of the low-rank term, in training."""
    encode_batch: Count = 32
    """Texts that the frozen base encodes at once."""
    second_moment: Literal["auto", "always", "never"] = "auto"
    """Whether to publish the sum of x xT. ``auto``: where there are twice as many queries as dimensions; fewer would
    show which directions the queries span."""
    state_statistics: Flag = True
    """Also publish sums over the states entering the first trained layer, so that routing needs no pass of its own."""
    static_statistics: Flag = False
    """Also publish sums over the queries' mean token embeddings, so that routing can be done before any layer runs.
    They say more about which words the queries use than sums over embeddings do."""
    pilot: Flag = True
    """Publish the mean embedding of the queries that the sums are over."""
    min_group: Count = 10
    """Publish nothing that stands for fewer queries."""


RETRIEVER: Mapping[str, Any] = {
    "rank": 8,
    "alpha": 32.0,
    "steps": 60,
    "batch_size": 32,
    "held_out": 0.2,
    "retrieval": {},
}
"""A retriever's own defaults."""

FULL_RATE = 5e-5
"""Peak rate of whole query encoders where the job names none."""

PAPER_RETRIEVER: Mapping[str, Any] = {
    **RETRIEVER,
    "layers": "all",
    "batch_size": 256,
    "learning_rate": 1e-4,
    "schedule": "linear",
    "weight_decay": 0.01,
    "grad_clip": 0.0,
    "seed": 10,
    "retrieval": {"targets": ["query", "value"], "dropout": 0.1, "negatives": "batch", "temperature": 0.05},
}
"""RouterRetriever as published (arXiv 2409.02685): LoRA of rank 8 on query and value of all layers, in-batch negatives,
AdamW, a linear one-cycle schedule. Its number of steps is that of its data sets, so it is left to the job."""

LANGUAGE_FIELDS = (
    "public",
    "public_fraction",
    "held_out_windows",
    "sequence_length",
    "coordination",
    "bias",
    "row_init",
    "row_centre",
    "row_rotation",
    "row_negatives",
    "dtype",
)
"""Fields of a job that say nothing about a retriever."""


def with_retriever_defaults(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a retriever's job with its defaults, or the paper's values, written out; given fields win."""
    paper = data.get("preset") == "paper"
    named = dict(PAPER_RETRIEVER if paper else RETRIEVER)
    given = data.get("retrieval", {})
    if isinstance(given, Mapping):
        named["retrieval"] = {**named["retrieval"], **given}
    steps = data.get("steps", named["steps"])
    if paper and type(steps) is int:
        named["warmup"] = max(1, steps // 10)
    if isinstance(given, Mapping) and given.get("form") == "full":
        named["learning_rate"] = FULL_RATE
    return {**named, **data, "retrieval": named["retrieval"] if isinstance(given, Mapping) else given}


def check_pair_sources(paths: tuple[Path, ...]) -> None:
    """Check that each path is a ``.jsonl`` file or the folder of a test collection.

    Raises:
        ValueError: Lists every path that is neither.
    """
    problems = []
    for path in paths:
        if path.suffix != ".jsonl" and not (path / "corpus.jsonl").is_file():
            problems.append(f"'{path.name}' is neither a .jsonl file nor a folder with corpus.jsonl")
        elif path.suffix == ".jsonl" and not path.is_file():
            problems.append(f"there is no file '{path}'")
    if problems:
        raise ValueError("; ".join(problems))
