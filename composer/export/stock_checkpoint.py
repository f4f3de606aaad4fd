"""A FlexOlmo checkpoint as it lies on the disk, checked more strictly than transformers checks it.

transformers loads a checkpoint with a gap in the experts' numbering under wrong numbers and ignores a gate's bias;
here both are refused. Understands the per-expert and the fused layout; reads headers only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from composer.export.flex_olmo import FlexOlmoTarget
from composer.export.tensors import FLOATS, Slice
from experts.errors import AdmissionError
from experts.files import capped
from experts.fingerprint import checkpoint_files
from experts.strict import load_json

__all__ = ["ROLES", "StockCheckpoint"]

ROLES = ("gate", "up", "down")
_KEY = re.compile(
    r"model\.layers\.(?P<layer>\d+)\.mlp\."
    r"(?:(?P<gate>gate\.(?:weight|bias))|experts\.(?:(?P<expert>\d+)\.(?P<role>gate|up|down)_proj\.weight"
    r"|(?P<fused>gate_up_proj|down_proj)))"
)
_Layers = dict[int, dict[int, dict[str, Slice]]]
"""Layer -> expert -> role -> matrix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StockCheckpoint:
    """A FlexOlmo checkpoint.

    Attributes:
        folder: Where it is.
        trunk: Every tensor beside gates and experts.
        gates: Layer -> router weight ``(num_experts, d)``.
        ffns: Layer -> expert -> role -> matrix, ``(I, d)`` for gate and up, ``(d, I)`` for down.
        num_experts: Expert 0, the anchor, counted.
        top_k: Experts per token.
        normalize: Whether the chosen weights sum to 1.
    """

    folder: Path
    trunk: Mapping[str, Slice]
    gates: Mapping[int, Slice]
    ffns: Mapping[int, Mapping[int, Mapping[str, Slice]]]
    num_experts: int
    top_k: int
    normalize: bool

    @classmethod
    def read(cls, folder: Path) -> StockCheckpoint:
        """Read and check the headers.

        Raises:
            AdmissionError: Not a FlexOlmo checkpoint, or not a whole one; every reason is listed.
        """
        config = _config(folder)
        num_experts = _number(config, "num_experts", "num_local_experts", default=7)
        top_k = _number(config, "num_experts_per_tok", default=5)
        parts = _Parts(folder)
        problems = [*parts.problems(num_experts, config.get("num_hidden_layers"))]
        if top_k > num_experts:
            problems.append(
                f"config.json: num_experts_per_tok is {top_k}, but there are {num_experts} experts"
            )
        if problems:
            raise AdmissionError(f"'{folder}' is not a whole FlexOlmo checkpoint:", problems=capped(problems))
        return cls(
            folder=folder,
            trunk=parts.trunk,
            gates=parts.gates,
            ffns=parts.ffns,
            num_experts=num_experts,
            top_k=top_k,
            normalize=config.get("norm_topk_prob") is True,
        )


def _config(folder: Path) -> Mapping[str, object]:
    path = folder / "config.json"
    if not path.is_file():
        raise AdmissionError(f"'{folder}' is not a checkpoint folder: it has no config.json.")
    config = load_json(path, what="config.json", max_bytes=1 << 20, error=AdmissionError)
    family = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(config, dict) or family != "flex_olmo":
        raise AdmissionError(
            f"'{folder}' holds a model of type {family!r}; only FlexOlmo checkpoints ('flex_olmo') can be imported."
        )
    return config


def _number(config: Mapping[str, object], *names: str, default: int) -> int:
    value = next((config[name] for name in names if name in config), default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise AdmissionError(f"config.json: {names[0]} is {value!r:.40}; a whole number from 1 is needed.")
    return value


class _Parts:
    """The tensors of a checkpoint, sorted by what they are."""

    def __init__(self, folder: Path) -> None:
        self.trunk: dict[str, Slice] = {}
        self.gates: dict[int, Slice] = {}
        self.biases: list[str] = []
        self.ffns: _Layers = {}
        self.fused_sizes: dict[int, set[int]] = {}
        self.malformed: list[str] = []
        for path, tensors in checkpoint_files(folder).items():
            for name, tensor in tensors.items():
                self._sort(name, Slice.of(path, tensor))

    def _sort(self, name: str, found: Slice) -> None:
        match = _KEY.fullmatch(name)
        if match is None:
            self.trunk[name] = found
            return
        layer = int(match["layer"])
        if match["gate"] == "gate.bias":
            self.biases.append(name)
        elif match["gate"]:
            self.gates[layer] = found
        elif match["fused"]:
            self._split(name, layer, match["fused"], found)
        else:
            self._matrices(layer, int(match["expert"]))[match["role"]] = found

    def _matrices(self, layer: int, expert: int) -> dict[str, Slice]:
        return self.ffns.setdefault(layer, {}).setdefault(expert, {})

    def _split(self, name: str, layer: int, kind: str, found: Slice) -> None:
        """Cut a fused tensor: the first dimension counts experts, gate rows come before up rows."""
        if len(found.shape) != 3 or (kind == "gate_up_proj" and found.shape[1] % 2):
            self.malformed.append(f"{name} has shape {found.shape}; (experts, rows, columns) is needed")
            return
        for expert in range(found.shape[0]):
            matrix, own = found.item(expert), self._matrices(layer, expert)
            if kind == "down_proj":
                own["down"] = matrix
            else:
                half = matrix.shape[0] // 2
                own["gate"], own["up"] = matrix.rows(0, half), matrix.rows(half, 2 * half)

    def problems(self, num_experts: int, num_layers: object) -> list[str]:
        """Say everything that is wrong."""
        found = list(self.malformed)
        misfits = FlexOlmoTarget().misfits(self.trunk)
        found += [f"tensor '{name}' is not one of FlexOlmo's" for name in misfits]
        layers = range(num_layers if isinstance(num_layers, int) else len(self.ffns))
        strange = sorted({*self.ffns, *self.gates} ^ set(layers) | (set(self.ffns) ^ set(self.gates)))
        if strange:
            found.append(
                f"layers {_listed(strange)} lack experts or a gate, or are not among the {len(layers)} of config.json"
            )
        if self.biases:
            found.append(
                f"{self.biases[0]}{_more(self.biases)}: transformers ignores a gate's bias, and the model was trained "
                "with it; import the rows by hand, with the bias in the owners' routing artefacts"
            )
        return found + self._count_problems(num_experts) + self._matrix_problems()

    def _count_problems(self, num_experts: int) -> list[str]:
        """Compare the experts' numbers with 0, 1, ... and with the configuration, layer by layer."""
        found: dict[str, list[int]] = {}
        for layer, experts in sorted(self.ffns.items()):
            missing = sorted(set(range(max(experts) + 1)) - set(experts))
            if missing:
                text = (
                    f"expert {_listed(missing)} is missing between 0 and {max(experts)}, and transformers would load "
                    "the ones after it under wrong numbers; renumber them, or take the whole checkpoint"
                )
                found.setdefault(text, []).append(layer)
            elif len(experts) != num_experts:
                text = f"{len(experts)} experts, but config.json says {num_experts}"
                found.setdefault(text, []).append(layer)
            gate = self.gates.get(layer)
            if gate is not None and (len(gate.shape) != 2 or gate.shape[0] != len(experts)):
                text = f"the gate has shape {gate.shape} for {len(experts)} experts"
                found.setdefault(text, []).append(layer)
        return [f"layers {_listed(layers)}: {text}" for text, layers in found.items()]

    def _matrix_problems(self) -> list[str]:
        found = []
        for layer, experts in sorted(self.ffns.items()):
            shapes = {}
            for expert, matrices in sorted(experts.items()):
                lacking = [role for role in ROLES if role not in matrices]
                if lacking:
                    found.append(f"layer {layer}, expert {expert}: no {' and '.join(lacking)} matrix")
                shapes[expert] = tuple((m.dtype, m.shape) for _, m in sorted(matrices.items()))
            odd = [expert for expert in shapes if shapes[expert] != shapes.get(0)]
            if odd and not found:
                found.append(
                    f"layer {layer}: experts {_listed(odd)} have other shapes or dtypes than expert 0"
                )
        floating = [
            *self.gates.values(),
            *(m for e in self.ffns.values() for x in e.values() for m in x.values()),
        ]
        dtypes = sorted({matrix.dtype for matrix in floating} - set(FLOATS))
        return found + [f"gates or experts of dtype {dtype}; only floating ones are read" for dtype in dtypes]


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
