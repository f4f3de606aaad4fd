"""Measures every arm of the comparison on the same held-out windows.

All arms share the anchor's layers below the first expert layer, so these run once; each arm runs the rest. Knows
models and windows; knows nothing of how experts were trained or what is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from experts.kinds.lora import lora_spec, lora_tensor_names
from experts.strict import load_json
from pipelines.evaluate import DomainWindows, Evaluation, measure
from pipelines.train.states import SplitDecoder

if TYPE_CHECKING:
    from composer.model import ComposedForCausalLM
    from experts.base import BaseDescription
    from registry import Registry

__all__ = ["Trunk", "expert_deltas", "measure_composed", "measure_dense", "merged"]

_BATCH = 4
_MAX_CONFIG_BYTES = 1 << 20

Deltas = Mapping[str, Tensor]
"""Name of a weight of the anchor -> what an expert adds to it, float32."""

Report = Callable[[str, int, int], None]
"""Called with the arm, the tokens done and the tokens in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trunk:
    """States of all windows where they enter the first expert layer.

    Attributes:
        windows: What is measured, by domain.
        states: ``(windows, length, hidden)`` by domain; empty where a family's forward cannot be cut, and then
            every arm runs whole.
        layers_prefix: Dotted name of the anchor's layer list.
        first: The first expert layer.
    """

    windows: Mapping[str, DomainWindows]
    states: Mapping[str, Tensor]
    layers_prefix: str
    first: int

    @classmethod
    def from_anchor(
        cls, anchor: nn.Module, windows: Mapping[str, DomainWindows], *, layers_prefix: str, first: int
    ) -> Trunk:
        """Run the anchor's lower layers over all windows."""
        split = SplitDecoder(anchor, layers_prefix=layers_prefix, first=first)
        states: dict[str, Tensor] = {}
        if first and split.agrees(next(iter(windows.values())).ids[:2]):
            for name, domain in windows.items():
                batches = torch.split(domain.ids, _BATCH)
                states[name] = torch.cat([split.lower(batch) for batch in batches])
        return cls(windows=windows, states=states, layers_prefix=layers_prefix, first=first)

    def measure(
        self,
        model: nn.Module,
        *,
        prefix: str = "",
        domains: tuple[str, ...] = (),
        opt_out: tuple[str, ...] = (),
        progress: Callable[[int, int], None] | None = None,
    ) -> Evaluation:
        """Measure a model whose layers below ``first`` are the anchor's.

        Args:
            model: The model.
            prefix: Where the anchor is inside it, with a dot at the end.
            domains: Which; none: all.
            opt_out: Owners left out by request.
            progress: Told how many tokens are done.
        """
        windows = {name: self.windows[name] for name in domains or self.windows}
        run: Callable[[str, slice, Tensor], Tensor] | None = None
        if self.states:
            asked = _Asked(model, {"opt_out": set(opt_out)} if opt_out else {})
            split = SplitDecoder(asked, layers_prefix=f"model.{prefix}{self.layers_prefix}", first=self.first)

            def run(name: str, part: slice, ids: Tensor) -> Tensor:
                return split.logits(ids, states=self.states[name][part])

        return measure(model, windows, batch_size=_BATCH, opt_out=opt_out, run=run, progress=progress)


class _Asked(nn.Module):
    """A model that is always called with the same further arguments."""

    def __init__(self, model: nn.Module, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.arguments = dict(arguments)

    def forward(self, **kwargs: Any) -> Any:
        return self.model(**kwargs, **self.arguments)


def expert_deltas(registry: Registry, name: str, base: BaseDescription) -> dict[str, Tensor]:
    """What a low-rank expert adds to the anchor's weights, ``scaling * B A`` for each linear, in float32."""
    files = registry.files(registry.expert(name))
    config = load_json(
        files["adapter_config.json"], what=f"{name}: adapter_config.json", max_bytes=_MAX_CONFIG_BYTES
    )
    assert isinstance(config, dict)
    tensors = load_file(files["adapter_model.safetensors"])
    deltas = {}
    for module, (_, scaling) in lora_spec(config, base).modules.items():
        a, b = (tensors[key].float() for key in lora_tensor_names(module))
        deltas[f"{module}.weight"] = scaling * (b @ a)
    return deltas


@contextmanager
def merged(
    model: nn.Module, shares: Mapping[str, float], deltas: Mapping[str, Deltas]
) -> Iterator[nn.Module]:
    """Add ``share * delta`` of each expert to the anchor's weights inside the block, and take it back after it.

    A share of 1 is that expert alone; 1/n for each of n experts is their uniform average, which equals the average
    of n merged checkpoints because they share the anchor. Done in memory and in the model's own precision instead of
    through mergekit, which needs the n merged checkpoints on disk and rounds them to the anchor's dtype first.
    """
    parameters = dict(model.named_parameters())
    touched = sorted({name for expert in shares for name in deltas[expert]})
    before = {name: parameters[name].detach().clone() for name in touched}
    try:
        with torch.no_grad():
            for expert, share in shares.items():
                for name, delta in deltas[expert].items():
                    parameters[name].add_(delta.to(parameters[name].dtype), alpha=share)
        yield model
    finally:
        with torch.no_grad():
            for name, weight in before.items():
                parameters[name].copy_(weight)


def measure_dense(
    trunk: Trunk,
    anchor: nn.Module,
    deltas: Mapping[str, Deltas],
    *,
    unseen: tuple[str, ...],
    report: Report,
) -> dict[str, Evaluation]:
    """Measure the arms without a router: ``anchor``, ``expert:<name>`` each, ``weight_average``.

    Unseen domains are measured on the anchor alone.
    """
    own = tuple(name for name in trunk.windows if name not in unseen)
    arms: dict[str, dict[str, float]] = {"anchor": {}}
    arms |= {f"expert:{name}": {name: 1.0} for name in deltas}
    arms["weight_average"] = {name: 1.0 / len(deltas) for name in deltas}
    results = {}
    for arm, shares in arms.items():
        with merged(anchor, shares, deltas) as model:
            domains = tuple(trunk.windows) if arm == "anchor" else own
            results[arm] = trunk.measure(model, domains=domains, progress=_for_arm(report, arm))
    return results


def measure_composed(
    trunk: Trunk,
    folder: Path,
    *,
    unseen: tuple[str, ...],
    dtype: torch.dtype,
    report: Report,
) -> dict[str, Evaluation]:
    """Measure ``composed``, ``composed-without:<owner>`` by request, and ``never-joined:<owner>`` built anew.

    Unseen domains are measured on the whole composition alone.
    """
    import composer
    from composer.verify import never_joined

    own = tuple(name for name in trunk.windows if name not in unseen)

    def score(model: ComposedForCausalLM, arm: str, **settings: Any) -> Evaluation:
        return trunk.measure(model, prefix="base.", progress=_for_arm(report, arm), **settings)

    model = composer.load(folder, dtype=dtype)
    owners = model.owners
    results = {"composed": score(model, "composed")}
    for owner in owners:
        arm = f"composed-without:{owner}"
        results[arm] = score(model, arm, domains=own, opt_out=(owner,))
    del model
    for owner in owners:
        arm = f"never-joined:{owner}"
        with never_joined(folder, {owner}) as without:
            results[arm] = score(composer.load(without, dtype=dtype), arm, domains=own)
    return results


def _for_arm(report: Report, arm: str) -> Callable[[int, int], None]:
    return lambda done, total: report(arm, done, total)
