"""What a kind of experiment brings (settings, arms, the world of a seed, its files), and the table of kinds.

Knows what the runner and the command line need of any of them; knows no arm. Light to import.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from experts.errors import CoterieError, ManifestError
from experts.plugins import PluginTable
from experts.strict import load_yaml, validate

if TYPE_CHECKING:
    from pipelines.experiments.results import Row
    from pipelines.experiments.world import Tell

__all__ = ["EXPERIMENT_KINDS", "ExperimentKind", "ExperimentSettings", "Names", "kind_of", "read_experiment"]

EXPERIMENT_KINDS = PluginTable(
    "experiment kind",
    {
        "flexolmo": "pipelines.experiments.flexolmo:FlexOlmoComparison",
        "router_retriever": "pipelines.experiments.retrieval.comparison:RetrieverComparison",
        "upcycling": "pipelines.experiments.upcycling.comparison:UpcyclingComparison",
    },
)
"""Every kind of experiment by the name that its file gives as ``kind:``."""

_DEFAULT_KIND = "flexolmo"


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
Seeds = Annotated[tuple[Annotated[int, Field(ge=0, strict=True)], ...], BeforeValidator(_as_tuple)]


class ExperimentSettings(BaseModel):
    """What the settings of every kind have."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    FREE: ClassVar[tuple[str, ...]] = ()
    """Fields that may change between two runs in one work folder, beside seeds and arms."""

    format_version: Literal[1] = 1
    """Version of this format."""
    kind: str
    """The kind of experiment; each kind narrows this to its own name."""
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_]{0,63}$")
    """Results are written as NAME.json, NAME.md and NAME.png."""
    seeds: Seeds = (0, 1, 2)
    """Everything that is drawn at random is done once for each."""
    arms: Names = ()
    """Arms to run; none named: all."""

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or len(set(value)) != len(value):
            raise ValueError("seeds must be given, each once")
        return value

    @field_validator("arms")
    @classmethod
    def _known_arms(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        known = EXPERIMENT_KINDS.load(cls.model_fields["kind"].default).arms
        for name in value:
            try:
                known[name]
            except CoterieError as error:
                raise ValueError(str(error)) from None
        return value

    @classmethod
    def from_file(cls, path: Path | str) -> Self:
        """Read an experiment of this kind.

        Raises:
            ManifestError: The file is missing, is not plain YAML, or has mistakes; all of them are listed.
        """
        data, what = _plain(path)
        return cls.from_dict(cls.located(data, Path(path).parent), what=what)

    @classmethod
    def located(cls, data: object, folder: Path) -> object:
        """Return plain data with the relative paths in them looked for in a folder; most kinds have none."""
        return data

    @classmethod
    def from_dict(cls, data: object, *, what: str = "experiment") -> Self:
        """Check plain data; see `from_file`."""
        if not isinstance(data, dict):
            raise ManifestError(f"{what}: not a mapping; write 'name:' and what the experiment consists of.")
        return validate(cls, data, what=what)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that `from_dict` reads back."""
        return self.model_dump(mode="json")


class ExperimentKind(ABC):
    """One kind: how its settings become worlds, rows and files. Made anew for each call; keeps nothing."""

    settings: ClassVar[type[ExperimentSettings]]
    arms: ClassVar[PluginTable]
    """Every arm, in the order of the tables."""
    metric: ClassVar[str]
    """What is shown of the rows."""

    @abstractmethod
    def texts(self, experiment: Any, *, tell: Tell | None) -> Any:
        """Fetch what all seeds share."""

    def prepare(self, experiment: Any, texts: Any, *, folder: Path, tell: Tell | None) -> bool:
        """Make what the seeds share, before they run side by side.

        Returns:
            Whether they may: they write to no folder that they share, and three of them fit a small machine.
        """
        return False

    @abstractmethod
    def world(self, experiment: Any, texts: Any, *, folder: Path, seed: int, tell: Tell | None) -> Any:
        """Make what the arms of one seed share; its ``seed`` says which."""

    @abstractmethod
    def run(self, world: Any, arm: str) -> Iterable[Row]:
        """Measure one arm."""

    @abstractmethod
    def owned(self, experiment: Any) -> Sequence[str]:
        """Domains that the mean is over, in the order of the table."""

    @abstractmethod
    def write(self, experiment: Any, rows: Sequence[Row], *, out: Path) -> list[Path]:
        """Write the results into a folder, made if it is not there; return their paths."""


def kind_of(experiment: ExperimentSettings) -> ExperimentKind:
    """Return the kind of an experiment."""
    kind: ExperimentKind = EXPERIMENT_KINDS.load(experiment.kind)()
    return kind


def read_experiment(path: Path | str) -> ExperimentSettings:
    """Read an experiment of the kind that it names; without ``kind:`` it is a FlexOlmo comparison.

    Raises:
        ManifestError: The file is missing, is not plain YAML, or has mistakes; all of them are listed.
        UnknownNameError: There is no such kind.
    """
    data, what = _plain(path)
    name = data.get("kind", _DEFAULT_KIND) if isinstance(data, dict) else _DEFAULT_KIND
    if not isinstance(name, str):
        raise ManifestError(f"{what}: kind must be a name.")
    settings: type[ExperimentSettings] = EXPERIMENT_KINDS.load(name).settings
    return settings.from_dict(settings.located(data, Path(path).parent), what=what)


def _plain(path: Path | str) -> tuple[object, str]:
    path = Path(path)
    what = f"experiment {path.name}"
    if not path.exists():
        raise ManifestError(f"There is no experiment at {path}.")
    return load_yaml(path, what=what), what
