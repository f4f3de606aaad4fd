"""One owner's training job, as written in a YAML file: what to train, on which local text, with what budget.

Knows the fields, their ranges and their defaults; knows nothing of how training is done, and its paths stay on
the owner's machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from experts.errors import CoterieError, ManifestError
from experts.names import check_expert_name
from experts.strict import load_yaml, validate
from pipelines.devices import DeviceName
from pipelines.train.job_card import card_settings
from pipelines.train.job_checks import problems_together
from pipelines.train.job_settings import (
    AsSwitch,
    BiasSettings,
    CoordinationSettings,
    Count,
    Flag,
    Integer,
    JobSettings,
    Number,
    StatisticsSettings,
    as_list,
    as_switch,
)
from pipelines.train.layer_choice import layer_numbers, parse_layers
from pipelines.train.retrieval_settings import RetrievalSettings, check_pair_sources, with_retriever_defaults

__all__ = ["DomainJob", "check_text_files"]

_TEXT_ENDINGS = (".jsonl", ".txt")


_PAPER: Mapping[str, Any] = {
    "kind": "ffn",
    "layers": "all",
    "public_fraction": 0.0,
    "weight_decay": 0.0,
    "coordination": {"enabled": True, "router_z_loss": 1e-3, "softmax_z_loss": 1e-5},
    "bias": {"enabled": True, "form": "clamp"},
    "row_negatives": 0.0,
}
"""FlexOlmo as published (arXiv 2507.07024, section 3). Its row_init is an embedder, which lies on the owner's disk; its
learning rate and number of steps are those of a 7B model, so they are left to the job."""


class DomainJob(JobSettings):
    """A training job. Relative paths are relative to the job file."""

    preset: Literal["paper"] | None = None
    """``paper``: trained as FlexOlmo was, full FFNs of all layers in a two-expert mixture with the anchor, negative
    biases, no public text. ``row_init`` must then be chosen. Other fields win over the preset."""
    name: str
    """``owner/expert``, the name under which the expert will be registered."""
    owner: str = ""
    """Taken from ``name``; if given, it must agree with it."""
    domain: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 _.+-]{0,63}$")
    """What the expert is about, in a word: builders filter by it."""
    license: str
    """SPDX expression for the expert's weights, for instance ``Apache-2.0`` (``LicenseRef-...`` for own terms)."""
    description: str = Field(default="", max_length=2000)
    """A sentence for the card."""
    data_statement: str = Field(default="", max_length=4000)
    """What the text is and how it was collected, for the card. Never a path."""

    base: str
    """The public anchor: a base's name in the registry, or the path of a checkpoint folder."""
    kind: str = "lora"
    """``lora``: low-rank matrices on the FFN linears; ``ffn``: the FFN matrices themselves; ``dense``: the whole model;
    ``retriever``: low-rank matrices on the query side of an embedding model, or a whole query encoder; or a plug-in's
    name."""
    layers: str | tuple[Annotated[int, Field(ge=0, strict=True)], ...] = "upper-half"
    """``all``, ``upper-half``, ranges such as ``15-29`` or ``3,7-9``, or a list. Everything below the first of
    them is run once and kept, so high layers train faster. Of a whole model all are trained."""
    rank: Integer = Field(default=16, ge=1, le=4096)
    """Rank of low-rank experts."""
    alpha: Number | None = Field(default=None, gt=0)
    """The low-rank term is scaled by alpha / rank; by default alpha = rank."""

    data: Annotated[tuple[Path, ...], BeforeValidator(as_list)]
    """The owner's text: ``.jsonl`` files with {"text": ...} a line, or ``.txt`` files, one document each. For
    retrievers ``.jsonl`` files with {"query": ..., "document": ...} or {"title": ..., "text": ...} a line, or folders
    with ``corpus.jsonl``, ``queries.jsonl`` and ``qrels.tsv``."""
    public: Annotated[tuple[Path, ...], BeforeValidator(as_list)] = ()
    """Public text, in the same formats."""
    public_fraction: Number = Field(default=0.0, ge=0, lt=1)
    """Share of training windows drawn from the public text: negatives for a row, a brake on forgetting."""
    held_out: Number | Path = 0.05
    """Share of the documents kept for measuring, or a file of other documents; 0 measures nothing."""
    held_out_windows: Count = 16
    """At most this many windows are measured, before and after."""

    sequence_length: Integer = Field(default=128, ge=8, le=1 << 17)
    """Tokens in a window."""
    batch_size: Count = 4
    """Windows in a step."""
    steps: Count = 200
    """Steps of the optimiser."""
    learning_rate: Number | None = Field(default=None, gt=0)
    """Peak rate; by default the trainer's own (2e-3 for ``lora``, 1e-4 for ``ffn``, 5e-5 for ``dense``, 1e-3 for
    ``retriever``, 5e-5 for one of ``form: full``)."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """After the warm-up: a cosine to a tenth of the peak, constant, or a straight line to nothing."""
    weight_decay: Number = Field(default=0.0, ge=0)
    """On the expert's own matrices. Rows, biases and everything frozen have none, whatever is written here."""
    warmup: Integer = Field(default=5, ge=0)
    """Steps of linear warm-up."""
    grad_clip: Number = Field(default=1.0, ge=0)
    """Largest norm of the gradient; 0 does not clip."""
    device: DeviceName = "auto"
    """Where it is computed: ``auto``, a GPU where torch has one, else the CPU; ``cpu``; ``cuda``; ``cuda:1``. What is
    written is the same kind of file wherever it was computed. Retrievers are trained on the CPU."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """What the frozen anchor computes in; by default the faster one on this device that represents it exactly.
    What is trained is float32 until the expert is written, in the anchor's own dtype."""
    seed: Integer = Field(default=0, ge=0, lt=1 << 32)
    """Decides the windows, their order and the starting matrices."""
    checkpoint_every: Count = 20
    """Steps between checkpoints."""
    cache_gigabytes: Number = Field(default=2.0, ge=0)
    """Memory for the states that enter the first trained layer; what does not fit is computed again."""

    statistics: Annotated[StatisticsSettings, AsSwitch] = StatisticsSettings()
    """Additive statistics for a router that is solved, not trained."""
    coordination: Annotated[CoordinationSettings, AsSwitch] = CoordinationSettings()
    """The paper's two-expert mixture."""
    bias: Annotated[BiasSettings, AsSwitch] = BiasSettings()
    """The owner's negative bias; needs ``coordination``."""
    row_init: str | Path = "anchor"
    """Where rows start: ``anchor`` (mean FFN input on the domain's text, per layer), ``random``, or the folder of
    a SentenceTransformer (mean embedding, projected to the hidden size)."""
    row_centre: Flag = False
    """Rescale what sets a starting row apart from the public one to the row's own length: ``public + |own| d / |d|``
    with d = own - public, between embeddings where rows start at one."""
    row_rotation: Annotated[int, Field(strict=True, ge=0)] | None = None
    """Seed of a random rotation of what sets starting rows apart from the public one: a control. Owners who share the
    seed keep the angles between their rows; what the rows said of the anchor's states is lost."""
    row_negatives: Number = Field(default=0.0, ge=0)
    """Weight of a binary cross-entropy that tells own from public tokens by the rows; needs ``public`` text."""

    retrieval: RetrievalSettings | None = None
    """How a retriever is trained; only for the kind ``retriever``."""

    workdir: Path = Path(".coterie")
    """The owner's private folder for checkpoints and logs; one sub-folder for each expert."""

    @model_validator(mode="before")
    @classmethod
    def _write_preset_out(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("kind") == "retriever":
            return with_retriever_defaults(data)
        if isinstance(data, Mapping) and data.get("kind") == "dense":
            data = {"layers": "all", **data}
        if not isinstance(data, Mapping) or data.get("preset") != "paper":
            return data
        named = dict(_PAPER)
        for key in ("coordination", "bias"):
            given = as_switch(data.get(key, {}))
            named[key] = {**named[key], **given} if isinstance(given, Mapping) else given
        return {**named, **data, **{key: named[key] for key in ("coordination", "bias")}}

    @model_validator(mode="before")
    @classmethod
    def _fill_owner(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and isinstance(data.get("name"), str) and not data.get("owner"):
            return {**data, "owner": data["name"].partition("/")[0]}
        return data

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        return _reworded(check_expert_name, value)

    @field_validator("license")
    @classmethod
    def _check_license(cls, value: str) -> str:
        from experts.license import check_license

        return _reworded(check_license, value)

    @field_validator("kind")
    @classmethod
    def _check_kind(cls, value: str) -> str:
        from pipelines.train.trainers import TRAINERS

        _reworded(TRAINERS.__getitem__, value)
        return value

    @field_validator("layers")
    @classmethod
    def _check_layers(cls, value: str | tuple[int, ...]) -> str | tuple[int, ...]:
        layer_numbers(value, num_layers=1 << 16)
        return value

    @field_validator("data", "public")
    @classmethod
    def _check_texts(cls, value: tuple[Path, ...], info: ValidationInfo) -> tuple[Path, ...]:
        if info.data.get("kind") == "retriever" and info.field_name == "data":
            check_pair_sources(value)
        else:
            check_text_files(value)
        return value

    @field_validator("data")
    @classmethod
    def _check_some(cls, value: tuple[Path, ...]) -> tuple[Path, ...]:
        if not value:
            raise ValueError("name at least one file of text")
        return value

    @field_validator("held_out")
    @classmethod
    def _check_held_out(cls, value: float | Path) -> float | Path:
        if isinstance(value, Path):
            check_text_files([value])
        elif not 0 <= value <= 0.5:
            raise ValueError(f"a share must lie between 0 and 0.5, given {value}")
        return value

    @field_validator("row_init")
    @classmethod
    def _check_row_init(cls, value: str | Path) -> str | Path:
        if str(value) not in ("anchor", "random") and not (Path(value) / "modules.json").is_file():
            raise ValueError(
                f"'{value}' is neither 'anchor' nor 'random' nor the folder of a SentenceTransformer "
                "(no modules.json in it)"
            )
        return value

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if problems := problems_together(self):
            raise ValueError("; ".join(problems))
        return self

    @classmethod
    def from_file(cls, path: Path | str) -> Self:
        """Read a job file; relative paths in it are taken relative to its folder.

        Raises:
            ManifestError: Every mistake at once, each with the field's path.
        """
        path = Path(path)
        data = load_yaml(path, what=f"job {path.name}")
        if not isinstance(data, dict):
            raise ManifestError(
                f"job {path.name}: a mapping of fields is expected, such as 'name: acme/contracts'."
            )
        return cls.from_dict(data, root=path.parent, what=f"job {path.name}")

    @classmethod
    def from_dict(cls, data: Mapping[str, object], *, root: Path | None = None, what: str = "job") -> Self:
        """Build a job from plain data; relative paths are taken relative to ``root`` (None: this folder).

        Raises:
            ManifestError: Every mistake at once, each with the field's path.
        """
        resolved = _resolve_paths(data, root=(root or Path.cwd()).resolve())
        return validate(cls, resolved, what=what)

    @property
    def directory(self) -> Path:
        """This job's own folder below ``workdir``."""
        return self.workdir / self.name.replace("/", "--")

    @property
    def log_path(self) -> Path:
        """Where a sealed run keeps its full log (mode 0600)."""
        return self.directory / "train.log"

    @property
    def agent_log_path(self) -> Path:
        """Where the owner's agent keeps its log, if this is the first of its jobs (mode 0600)."""
        return self.directory / "agent.log"

    @property
    def base_path(self) -> Path | None:
        """The checkpoint folder, if ``base`` is one; None if it is a name."""
        return Path(self.base) if _is_path(self.base) else None

    def layer_numbers(self, num_layers: int) -> tuple[int, ...]:
        """The layers to train, ascending, for an anchor with ``num_layers``.

        Raises:
            ManifestError: A layer does not exist.
        """
        return parse_layers(self.layers, num_layers=num_layers)

    def card_settings(self) -> dict[str, str | int | float | bool | None]:
        """What the card says about the training: every choice and number, no path."""
        return card_settings(self)

    def digest(self) -> str:
        """sha256 over every field that the trained expert depends on, apart from the text itself."""
        outside = {
            "data",
            "public",
            "workdir",
            "device",
            "checkpoint_every",
            "description",
            "data_statement",
            "license",
            "preset",  # the other fields hold what it stands for
        }
        body = self.model_dump(mode="json", exclude=outside)
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _reworded(check: Any, value: str) -> str:
    """Call a check that raises one of our errors; pydantic collects only `ValueError`."""
    try:
        result = check(value)
    except CoterieError as error:
        raise ValueError(str(error).replace("\n  - ", " ")) from None
    return str(result) if result is not None else value


def check_text_files(paths: Iterable[Path]) -> None:
    """Check that files of text are there and have an ending that says how they are read.

    Raises:
        ValueError: Some are not, or have not; all of them are named.
    """
    problems = [
        f"'{path.name}' does not end in .jsonl or .txt" for path in paths if path.suffix not in _TEXT_ENDINGS
    ]
    problems += [
        f"there is no file '{path}'" for path in paths if path.suffix in _TEXT_ENDINGS and not path.is_file()
    ]
    if problems:
        raise ValueError("; ".join(problems))


def _is_path(base: str) -> bool:
    return "/" in base or base.startswith(".")


def _resolve_paths(data: Mapping[str, object], *, root: Path) -> dict[str, object]:
    """Make the path fields absolute; whatever is not text is left for the validation to complain about."""

    def absolute(value: object) -> object:
        return str(root / Path(value).expanduser()) if isinstance(value, str) else value

    resolved = dict(data)
    for key in ("data", "public"):
        value = data.get(key)
        if value is not None:
            resolved[key] = [absolute(item) for item in value] if isinstance(value, list) else absolute(value)
    resolved["workdir"] = absolute(data.get("workdir", ".coterie"))
    if "held_out" in data:
        resolved["held_out"] = absolute(data["held_out"])
    if isinstance(base := data.get("base"), str) and (_is_path(base) or base.startswith("~")):
        resolved["base"] = absolute(base)
    if data.get("row_init") not in (None, "anchor", "random"):
        resolved["row_init"] = absolute(data["row_init"])
    return resolved
