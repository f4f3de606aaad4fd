"""A tuning job, as written in a YAML file: what of a composition to train, on whose text, with what budget.

Knows the fields, their ranges and their defaults; knows nothing of how it is done.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from composer.lock import TrainedParts
from experts.errors import CoterieError, ManifestError
from experts.names import check_owner_name
from experts.strict import load_yaml, validate
from pipelines.train.job import check_text_files
from pipelines.train.job_settings import Count, Flag, Integer, Number, as_list

__all__ = ["LoadBalancing", "TextSource", "TuneJob"]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class TextSource(_Settings):
    """Text of one owner, or public text, and its share of the mix."""

    text: Annotated[tuple[Path, ...], BeforeValidator(as_list)]
    """``.jsonl`` files with {"text": ...} a line, or ``.txt`` files, one document each."""
    owner: str | None = None
    """Whose text it is. The trained weights are theirs as well from then on; leaving them out leaves these out."""
    public: Flag = False
    """Nobody's text. Either this or an owner must be said."""
    weight: Number = Field(default=1.0, gt=0)
    """Share of the windows, relative to the other sources."""

    @field_validator("text")
    @classmethod
    def _check_text(cls, value: tuple[Path, ...]) -> tuple[Path, ...]:
        if not value:
            raise ValueError("name at least one file of text")
        check_text_files(value)
        return value

    @field_validator("owner")
    @classmethod
    def _check_owner(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                check_owner_name(value)
            except CoterieError as error:
                raise ValueError(str(error)) from None
        return value

    @model_validator(mode="after")
    def _check_whose(self) -> Self:
        if self.public == (self.owner is not None):
            raise ValueError("say whose text it is: either 'owner: NAME' or 'public: true'")
        return self


class LoadBalancing(_Settings):
    """The load-balancing loss ``N sum_i f_i P_i`` of every layer's router."""

    weight: Number = Field(default=0.01, ge=0)
    """Of the sum over layers, beside the cross-entropy; 0 leaves it out."""
    over: Literal["global_batch", "micro_batch"] = "global_batch"
    """What ``f`` is counted on. ``global_batch``: all windows of the step so far, on all devices, so that a
    micro-batch of one domain may keep to its expert; ``micro_batch``: the windows that go through the model at once."""


class TuneJob(_Settings):
    """A tuning job. Relative paths are relative to the job file."""

    format_version: Literal[1] = 1
    """Version of this format."""
    train: TrainedParts = "routers"
    """``routers``; ``trunk``: the routers and everything that is no expert; ``all``: the experts as well."""
    data: Annotated[tuple[TextSource, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]
    """The mix."""

    sequence_length: Integer = Field(default=128, ge=8, le=1 << 17)
    """Tokens in a window."""
    batch_size: Count = 8
    """Windows in a step, on all devices together."""
    micro_batch: Count | None = None
    """Windows that go through the model at once on a device; by default its whole share of the step."""
    steps: Count = 200
    """Steps of the optimiser."""
    learning_rate: Number = Field(default=1e-4, gt=0)
    """Peak rate."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """After the warm-up: a cosine to a tenth of the peak, or constant."""
    warmup: Integer = Field(default=10, ge=0)
    """Steps of linear warm-up."""
    weight_decay: Number = Field(default=0.1, ge=0)
    """On the matrices of trunk and experts. Routers, norms and biases have none."""
    grad_clip: Number = Field(default=1.0, ge=0)
    """Largest norm of the gradient; 0 does not clip."""
    load_balancing: LoadBalancing = LoadBalancing()
    """Keeps every expert in use."""
    router_z_loss: Number = Field(default=1e-3, ge=0)
    """Weight of the mean squared log-partition of every layer's router; 0 leaves it out."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """What products are computed in; by default bfloat16 where the device has it, float32 on a CPU. What is trained is
    float32 until it is written, in the composition's own dtype."""
    seed: Integer = Field(default=0, ge=0, lt=1 << 32)
    """Decides the windows and their order."""
    checkpoint_every: Count = 50
    """Steps between checkpoints."""
    workdir: Path = Path(".coterie")
    """Where checkpoints are kept until the job is done; one sub-folder for each job."""

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if not self.data:
            raise ValueError("name at least one source under data")
        if self.micro_batch is not None and self.batch_size % self.micro_batch:
            raise ValueError(
                f"micro_batch {self.micro_batch} does not divide batch_size {self.batch_size} into equal parts"
            )
        return self

    @classmethod
    def from_file(cls, path: Path | str) -> Self:
        """Read a job file; relative paths in it are taken relative to its folder.

        Raises:
            ManifestError: The file is missing, is not plain YAML, or has mistakes; all of them are listed.
        """
        path = Path(path)
        what = f"tuning job {path.name}"
        if not path.exists():
            raise ManifestError(f"There is no tuning job at {path}.")
        data = load_yaml(path, what=what)
        if not isinstance(data, dict):
            raise ManifestError(f"{what}: not a mapping; write 'train:' and 'data:'.")
        return cls.from_dict(data, root=path.parent, what=what)

    @classmethod
    def from_dict(
        cls, data: Mapping[str, object], *, root: Path | None = None, what: str = "tuning job"
    ) -> Self:
        """Build a job from plain data; relative paths are taken relative to ``root`` (None: this folder).

        Raises:
            ManifestError: Every mistake at once, each with the field's path.
        """
        return validate(cls, _resolve_paths(data, root=(root or Path.cwd()).resolve()), what=what)

    @property
    def text_owners(self) -> tuple[str, ...]:
        """Whose text is trained on, sorted."""
        return tuple(sorted({source.owner for source in self.data if source.owner is not None}))

    @property
    def tokens(self) -> int:
        """Tokens that the job trains on."""
        return self.steps * self.batch_size * self.sequence_length

    def settings(self) -> dict[str, str | int | float | bool | None]:
        """What the lock says of the job: every choice and number, no path."""
        outside = {
            "format_version",
            "data",
            "workdir",
            "checkpoint_every",
            "micro_batch",
            "train",
            "load_balancing",
        }
        body: dict[str, str | int | float | bool | None] = self.model_dump(mode="json", exclude=outside)
        body["load_balancing"] = self.load_balancing.weight
        body["load_balancing_over"] = self.load_balancing.over
        shares = sum(source.weight for source in self.data)
        for source in self.data:
            name = f"share of {source.owner or 'public text'}"
            before = body.get(name)
            body[name] = (before if isinstance(before, float) else 0.0) + source.weight / shares
        return body

    def digest(self) -> str:
        """sha256 over every field that the trained weights depend on, apart from the text itself."""
        body = self.model_dump(mode="json", exclude={"workdir", "checkpoint_every"})
        for source in body["data"]:
            del source["text"]
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _resolve_paths(data: Mapping[str, object], *, root: Path) -> dict[str, object]:
    """Make the path fields absolute; whatever is not text is left for the validation to complain about."""

    def absolute(value: Any) -> Any:
        if isinstance(value, list):
            return [absolute(item) for item in value]
        return str(root / Path(value).expanduser()) if isinstance(value, str | Path) else value

    resolved = {**data, "workdir": absolute(data.get("workdir", ".coterie"))}
    sources = data.get("data")
    if isinstance(sources, list | tuple):
        resolved["data"] = [
            {**source, "text": absolute(source["text"])}
            if isinstance(source, dict) and "text" in source
            else source
            for source in sources
        ]
    return resolved
