"""The YAML of an experiment: its anchor, domains, budgets, seeds and arms.

Knows fields, ranges and defaults; knows nothing of how an arm is made.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from pipelines.devices import DeviceName
from pipelines.experiments.kind import ExperimentSettings, Names
from pipelines.experiments.own_text import OwnText, gather, locate

__all__ = ["Budget", "Experiment", "ScratchAnchor", "Tuning"]

Count = Annotated[int, Field(strict=True, gt=0)]
Number = Annotated[float, Field(strict=True, gt=0)]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ScratchAnchor(_Settings):
    """A small decoder, trained here on the public mix."""

    family: Literal["olmo2", "llama"] = "olmo2"
    """OLMo-2 (norms behind the blocks, as in the paper) or Llama (norms before them)."""
    vocabulary: Count = 2048
    """Size of the byte-pair vocabulary, which is learned from the public mix too."""
    hidden_size: Count = 160
    """Width of the states."""
    intermediate_size: Count = 448
    """Width of the FFNs."""
    layers: Count = 4
    """Decoder layers."""
    heads: Count = 4
    """Attention heads."""
    steps: Count = 500
    """Steps of the optimiser."""
    batch_size: Count = 16
    """Windows in a step."""
    learning_rate: Number = 3e-3
    """Peak rate; a cosine after the warm-up."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of weights and order; the anchor is the same for every seed of the experiment."""


class Budget(_Settings):
    """What every owner spends on an expert."""

    steps: Count = 100
    """Steps of the optimiser."""
    batch_size: Count = 8
    """Windows in a step."""
    learning_rate: Number = 1e-3
    """Peak rate."""


class Tuning(_Settings):
    """Training of routers alone."""

    steps: Count = 40
    """Steps of the optimiser."""
    batch_size: Count = 8
    """Windows in a step."""
    learning_rate: Number = 1e-2
    """Constant rate."""


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


class Experiment(ExperimentSettings):
    """An experiment as written."""

    FREE: ClassVar[tuple[str, ...]] = ("runner", "device")

    kind: Literal["flexolmo"] = "flexolmo"
    """This kind."""
    anchor: ScratchAnchor | Literal["smollm2"] = ScratchAnchor()
    """``smollm2``, or the settings of a decoder to train from scratch."""
    own_texts: Annotated[tuple[OwnText, ...], BeforeValidator(_as_tuple)] = ()
    """Texts of one's own; a mapping that is written in one of the lists below is moved here and named there."""
    domains: Names
    """The owners' domains: names of texts that the project can fetch, or texts of one's own."""
    public: Names
    """Texts of the public mix."""
    public_share: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """Share of every domain's documents that is public as well; no owner trains on it."""
    unowned: Names = ()
    """Texts that are nobody's, to see what routing does to them."""
    layers: str = "all"
    """Layers that have experts, as in a job."""
    sequence_length: Count = 128
    """Tokens in a window."""
    held_out_windows: Count = 32
    """Held-out windows of each domain that are measured."""
    top_k: Count = 2
    """Experts a token, the anchor counted."""
    rank: Count = 16
    """Rank of the low-rank arm."""
    embedder: str = "minilm"
    """``minilm``, or the folder of a SentenceTransformer: where the rows of the arm ``paper_embedding`` start."""
    experts: Budget = Budget()
    """What every owner spends."""
    tuning: Tuning = Tuning()
    """What arms with trained routers spend."""
    runner: Literal["local", "ray"] = "local"
    """``ray``: every owner's training in a process and a Ray of its own; ``local``: here, one after the other."""
    device: DeviceName = "auto"
    """Where everything is trained and measured, as in a job. What is measured on a GPU differs in the last digits."""

    @field_validator("domains", "public", "unowned")
    @classmethod
    def _known_texts(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        from experts.names import unknown_name
        from pipelines.assets import TEXTS

        if "own_texts" not in info.data:  # they have mistakes, which are reported
            return value
        known = {*TEXTS, *(own.name for own in info.data["own_texts"])}
        for name in value:
            if name not in known:
                advice = "For a text of your own write {name: NAME, text: FILE}."
                raise ValueError(str(unknown_name("domain text", name, known, advice=advice)))
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = []
        if len(self.domains) < 2:
            problems.append("name at least two domains")
        if not self.public:
            problems.append("name at least one public text")
        shared = sorted(set(self.domains) & ({*self.public} | {*self.unowned}))
        if shared:
            problems.append(f"{', '.join(shared)}: a domain cannot be public or nobody's as well")
        problems += _own_problems(self.own_texts, self.domains, (*self.public, *self.unowned))
        problems += [
            f"{names}: named twice in '{key}'"
            for key in ("domains", "public", "unowned")
            if (names := ", ".join(_repeated(getattr(self, key))))
        ]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @classmethod
    def located(cls, data: object, folder: Path) -> object:
        """Look for texts of one's own beside the YAML."""
        return locate(data, folder) if isinstance(data, dict) else data

    @classmethod
    def from_dict(cls, data: object, *, what: str = "experiment") -> Self:
        """Check plain data, in which the lists of texts may hold mappings; see `from_file`."""
        return super().from_dict(gather(data, what=what) if isinstance(data, dict) else data, what=what)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that `from_dict` reads back; without ``own_texts`` where there are none."""
        data = super().to_dict()
        if not self.own_texts:
            del data["own_texts"]
        return data


def _repeated(names: tuple[str, ...]) -> list[str]:
    return sorted(name for name, count in Counter(names).items() if count > 1)


def _own_problems(own: tuple[OwnText, ...], domains: tuple[str, ...], others: tuple[str, ...]) -> list[str]:
    """What is wrong with texts of one's own; each belongs to one list, and only of domains something is held out."""
    names = tuple(text.name for text in own)
    problems = [f"{name}: two texts of your own have this name" for name in _repeated(names)]
    problems += [f"{name}: no list names this text" for name in names if name not in (*domains, *others)]
    problems += [
        f"{text.name}: a text of your own can be public or nobody's, not both"
        for text in own
        if others.count(text.name) > 1
    ]
    return problems + [
        f"{text.name}: 'held_out' is for domains; public text is trained on, and nobody's measured, as a whole"
        for text in own
        if text.held_out and text.name in others
    ]
