"""What an owner publishes beside the weights so that others can route to the expert.

An embedding of the domain, router rows, and additive statistics of hidden states, each optional, all in one
safetensors file. Knows their names, shapes and bounds; knows nothing of how a router uses them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator

from experts.errors import AdmissionError
from experts.files import open_regular, path_problems, write_atomic
from experts.retrieval_artifacts import RetrievalArtifacts
from experts.retrieval_info import RetrievalInfo
from experts.routing_checks import check_schema, check_values
from experts.routing_origin import AnchorInfo
from experts.safetensors_header import Header, StoredTensor, TensorSpec, read_header_from

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "ROUTING_FILE",
    "EmbeddingInfo",
    "InputsInfo",
    "NoiseInfo",
    "RoutingArtifacts",
    "RoutingInfo",
    "RowsInfo",
    "Statistics",
    "StatisticsInfo",
]

ROUTING_FILE = "routing.safetensors"

_FROZEN = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Text = Annotated[str, Field(min_length=1, max_length=200)]


class NoiseInfo(BaseModel):
    """The differential-privacy guarantee of noisy statistics. It covers the statistics alone, not the weights.

    ``(epsilon, delta)`` for two sets of documents that differ by one document being another, their number being
    public; by the analytic Gaussian mechanism (Balle, Wang, arXiv 1805.06530, theorem 8).
    """

    model_config = _FROZEN

    mechanism: Literal["analytic-gaussian"]
    unit: Literal["document"]
    epsilon: Annotated[float, Field(gt=0)]
    delta: Annotated[float, Field(gt=0, lt=1)]
    release: Literal["mean", "moments"]
    """``mean``: of the owner's text only the mean state is published, with the public covariance about it."""
    clip_norm: Annotated[float, Field(gt=0)]
    """Longest difference of a document's mean state to the public mean."""
    second_clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest Frobenius norm of a document's second moments about the public mean."""
    noise_std: Annotated[float, Field(gt=0)]
    """Standard deviation of the noise on each coordinate of the mean."""


class StatisticsInfo(BaseModel):
    """Where the statistics were taken."""

    model_config = _FROZEN

    layer: Annotated[int, Field(ge=0)]
    """The hidden states entering this decoder layer."""
    normalization: Literal["none", "rms"]
    """``rms``: each state was divided by its root mean square first."""
    tokens: Annotated[int, Field(ge=1)]
    """States summed; with noise every document counts as one."""
    documents: Annotated[int, Field(ge=1)]
    noise: NoiseInfo | None = None
    """None: exact sums."""


class RowsInfo(BaseModel):
    """Which layers have a router row of this expert's own."""

    model_config = _FROZEN

    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    has_bias: bool
    public_digest: _Digest
    """Of the frozen public rows that these were trained beside; of public rows, their own. See `rows_digest`."""
    init: _Text
    """How the rows were initialised, for instance ``domain_embedding``."""

    @field_validator("public_digest", mode="before")
    @classmethod
    def _given(cls, digest: object) -> object:
        if digest is None:
            raise ValueError("rows need the digest of the public rows beside them; make them anew")
        return digest

    @field_validator("layers")
    @classmethod
    def _ascending(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if list(layers) != sorted(set(layers)):
            raise ValueError("layers must ascend without repetition")
        return layers


class EmbeddingInfo(BaseModel):
    """What the domain embedding was made with."""

    model_config = _FROZEN

    model: _Text
    """The folder's name, for messages."""
    digest: _Digest
    """See `experts.routing_origin.embedder_digest`; whoever has the same has the same embedder."""
    dim: Annotated[int, Field(ge=1, le=65536)]


class InputsInfo(BaseModel):
    """Where statistics of the very states that routers read were taken: on the base's trunk, routed to this expert."""

    model_config = _FROZEN

    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    branches: Annotated[tuple[Literal["ffn", "attention"], ...], Field(min_length=1)] = ("ffn",)
    """Whose input: the FFN's, the attention's, or both."""
    tokens: Annotated[int, Field(ge=1)]
    documents: Annotated[int, Field(ge=1)]

    @field_validator("layers", "branches")
    @classmethod
    def _once(cls, value: tuple[object, ...]) -> tuple[object, ...]:
        if len(set(value)) != len(value):
            raise ValueError(f"{list(value)} must not repeat")
        return value


class RoutingInfo(BaseModel):
    """Which routing artefacts a file holds; in an expert's card, or beside a base for public text."""

    model_config = _FROZEN

    file: str = ROUTING_FILE
    statistics: StatisticsInfo | None = None
    rows: RowsInfo | None = None
    embedding: EmbeddingInfo | None = None
    retrieval: RetrievalInfo | None = None
    inputs: InputsInfo | None = None
    anchor: AnchorInfo | None = None
    """Of public text: what it was made on. An owner's artefacts belong to the base of the card."""

    @field_validator("file")
    @classmethod
    def _portable(cls, file: str) -> str:
        problems = path_problems([file])
        if problems or not file.endswith(".safetensors") or "/" in file:
            raise ValueError(f"'{file}' is not the name of a .safetensors file in the folder")
        return file


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """Additive statistics of hidden states: n, Σx and Σxxᵀ (not centred), in float64.

    Sums of statistics are the statistics of the pooled states, so a router solved from them can be solved
    again from any subset of owners.
    """

    count: float
    """Number of states."""
    sum: NDArray[np.float64]
    """Shape ``(d,)``."""
    scatter: NDArray[np.float64]
    """Shape ``(d, d)``."""

    @classmethod
    def from_states(cls, x: NDArray[np.floating]) -> Self:
        """Sum up states ``x`` of shape ``(n, d)``, any float dtype."""
        import numpy as np

        states = np.asarray(x, dtype=np.float64)
        return cls(count=float(len(states)), sum=states.sum(axis=0), scatter=states.T @ states)

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(
            count=self.count + other.count, sum=self.sum + other.sum, scatter=self.scatter + other.scatter
        )

    @property
    def mean(self) -> NDArray[np.float64]:
        """Σx / n, shape ``(d,)``."""
        return self.sum / self.count

    @property
    def covariance(self) -> NDArray[np.float64]:
        """Σxxᵀ / n − mean meanᵀ (the maximum-likelihood estimate), shape ``(d, d)``."""
        mean = self.mean
        return self.scatter / self.count - mean[:, None] * mean[None, :]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingArtifacts:
    """The routing artefacts of one expert, or of public text, in memory.

    Tensors, exactly those that ``info`` declares: ``embedding`` F32 ``(dim,)``; ``row.{layer}.weight`` F32
    ``(d,)`` and ``row.{layer}.bias`` F32 ``(1,)``; ``statistics.count`` F64 ``(1,)``, ``statistics.sum`` F64
    ``(d,)``, ``statistics.scatter`` F64 ``(d, d)``; those of `experts.retrieval_checks.retrieval_tensors`.
    """

    info: RoutingInfo
    tensors: Mapping[str, NDArray[np.floating]]

    @property
    def statistics(self) -> Statistics | None:
        """The additive statistics, if the file has them."""
        if self.info.statistics is None:
            return None
        return Statistics(
            count=float(self.tensors["statistics.count"][0]),
            sum=self.tensors["statistics.sum"].astype("float64", copy=False),
            scatter=self.tensors["statistics.scatter"].astype("float64", copy=False),
        )

    @property
    def retrieval(self) -> RetrievalArtifacts | None:
        """What routes queries to a retriever, if the file has it."""
        if self.info.retrieval is None:
            return None
        return RetrievalArtifacts.from_tensors(self.info.retrieval, self.tensors)

    def inputs(self, layer: int, branch: str) -> Statistics | None:
        """Return the statistics of what a layer's router reads, if the file has them."""
        name = f"inputs.{branch}.{layer}"
        if f"{name}.count" not in self.tensors:
            return None
        return Statistics(
            count=float(self.tensors[f"{name}.count"][0]),
            sum=self.tensors[f"{name}.sum"].astype("float64", copy=False),
            scatter=self.tensors[f"{name}.scatter"].astype("float64", copy=False),
        )

    @property
    def embedding(self) -> NDArray[np.floating] | None:
        """The domain embedding, shape ``(dim,)``, if the file has one."""
        return self.tensors.get("embedding")

    def row(self, layer: int) -> tuple[NDArray[np.floating], NDArray[np.floating] | None]:
        """Return the router row of a layer, shape ``(d,)``, and its bias, shape ``(1,)``, or None.

        Raises:
            AdmissionError: The artefact has no row for ``layer``.
        """
        layers = self.info.rows.layers if self.info.rows else ()
        if layer not in layers:
            raise AdmissionError(
                f"No router row for layer {layer}; the artefact has rows for {list(layers)}."
            )
        return self.tensors[f"row.{layer}.weight"], self.tensors.get(f"row.{layer}.bias")

    def save(self, folder: Path) -> Path:
        """Check the tensors and write them to ``folder`` under the name that ``info`` gives; return the path.

        Raises:
            AdmissionError: The tensors are not exactly those that ``info`` declares, or break a bound.
        """
        import numpy as np
        from safetensors.numpy import save

        names = {"float32": "F32", "float64": "F64"}
        specs = {
            name: TensorSpec(dtype=names.get(array.dtype.name, array.dtype.name), shape=array.shape)
            for name, array in self.tensors.items()
        }
        check_schema(specs, self.info, what=f"'{self.info.file}'", hidden_size=None)
        check_values(self.tensors, self.info, what=f"'{self.info.file}'")
        path = folder / self.info.file
        write_atomic(path, save({name: np.ascontiguousarray(a) for name, a in self.tensors.items()}))
        return path

    @classmethod
    def load(cls, path: Path, info: RoutingInfo, *, hidden_size: int | None = None) -> Self:
        """Read and check the artefacts.

        Args:
            path: The file, under any name, or the folder that holds it under the name that ``info`` gives.
            info: What the file is declared to hold.
            hidden_size: Width of the base's hidden states, if known.

        Raises:
            AdmissionError: Tensors that ``info`` does not declare, missing ones, other shapes or dtypes,
                values that are not finite or break a bound; every offender is listed.
        """
        file = path / info.file if path.is_dir() else path
        what = f"'{info.file}'"
        with open_regular(file) as stream:
            header = read_header_from(stream, what=what)
            check_schema(header.tensors, info, what=what, hidden_size=hidden_size)
            tensors = {name: _array(stream.fileno(), tensor) for name, tensor in header.tensors.items()}
        _check_metadata(header, what=what)
        check_values(tensors, info, what=what)
        return cls(info=info, tensors=tensors)


def _array(descriptor: int, tensor: StoredTensor) -> NDArray[np.floating]:
    import os

    import numpy as np

    data = os.pread(descriptor, tensor.nbytes, tensor.start)
    dtype = {"F32": "<f4", "F64": "<f8"}[tensor.dtype]
    return np.frombuffer(data, dtype=dtype).reshape(tensor.shape)


def _check_metadata(header: Header, *, what: str) -> None:
    if set(header.metadata) - {"format"}:
        raise AdmissionError(
            f"{what} carries metadata {sorted(header.metadata)}; only 'format' is allowed. Remove it."
        )
