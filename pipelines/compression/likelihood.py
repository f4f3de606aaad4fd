"""What an expert loses in likelihood by being compressed: anchor, full expert and low-rank expert, each alone.

Knows how to put weights into the anchor's model; the measuring is that of ``pipelines.evaluate``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from experts.kinds import get_kind
from experts.kinds.lora import lora_spec, lora_tensor_names
from pipelines.compression.report import DomainCost
from pipelines.evaluate import Evaluation, measure, prepare
from pipelines.train.anchor import load_anchor

if TYPE_CHECKING:
    from pipelines.compression.expert import FullExpert

__all__ = ["measure_cost"]


def measure_cost(
    expert: FullExpert,
    adapter: Path,
    data: Mapping[str, Sequence[str]],
    *,
    sequence_length: int = 128,
    max_tokens: int | None = 4096,
    batch_size: int = 4,
    progress: Callable[[str], None] | None = None,
) -> dict[str, DomainCost]:
    """Measure the anchor, the full expert and the low-rank one on the same windows, every token through the expert.

    Args:
        expert: The full expert.
        adapter: The folder of the low-rank one.
        data: Documents by domain.
        sequence_length: Tokens in a window.
        max_tokens: At most about this many tokens of a domain; None: all.
        batch_size: Windows run at once.
        progress: Told what is being measured.

    Raises:
        DataError: A domain does not fill a window.
    """
    model, tokenizer = load_anchor(expert.base, dtype=None)
    windows = prepare(data, tokenizer, sequence_length=sequence_length, max_tokens=max_tokens)
    tell = progress or (lambda _: None)

    def run(what: str) -> Evaluation:
        tell(what)
        return measure(model, windows, batch_size=batch_size)

    anchor = run("the anchor")
    _add(model, expert, adapter)
    low_rank = run("the low-rank expert")
    _replace(model, expert)
    full = run("the full expert")
    return {
        name: DomainCost(
            anchor=anchor.domains[name].nll,
            full=full.domains[name].nll,
            low_rank=low_rank.domains[name].nll,
            tokens=domain.tokens,
        )
        for name, domain in windows.items()
    }


@torch.no_grad()
def _add(model: nn.Module, expert: FullExpert, adapter: Path) -> None:
    """Add ``scaling * B A`` to the anchor's weights, in float32."""
    kind = get_kind("lora")
    config = kind.read_config(adapter / kind.config_file)
    tensors: dict[str, Tensor] = load_file(adapter / kind.weights_file)
    for name, (_, scaling) in lora_spec(config, expert.base.description).modules.items():
        a, b = (tensors[key].float() for key in lora_tensor_names(name))
        weight: Any = model.get_submodule(name).weight
        weight.copy_(weight.float() + scaling * (b @ a))


@torch.no_grad()
def _replace(model: nn.Module, expert: FullExpert) -> None:
    """Put the full expert's weights in the place of the anchor's."""
    with safe_open(expert.files[get_kind("ffn").weights_file], framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            model.get_parameter(name).copy_(file.get_tensor(name))
