"""What models are compared by when an opt-out is proved: inputs, outputs, and the two sides of a request.

Knows how to run a model; which folders are compared, and what may differ, is the business of `composer.verify`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from composer.model import ComposedForCausalLM

__all__ = ["RANDOM_PROMPTS", "LogitProbe", "Probe"]

RANDOM_PROMPTS = 4
PROMPT_LENGTH = 24
DECODED = 4


class Probe(ABC):
    """What models of a recipe are compared by."""

    @abstractmethod
    def batches(self, model: Any) -> list[Any]:
        """Return the inputs to compare on; the length of each is its number of rows."""

    @abstractmethod
    def outputs(self, model: Any, batch: Any) -> list[torch.Tensor]:
        """Run a batch; every tensor has a row for each of the batch's."""

    @abstractmethod
    def requests(self, whole: Any, never: Any, batch: Any, owner: str) -> tuple[list[torch.Tensor], ...]:
        """Run a batch on the whole model, told to leave the owner out, and beside it on the never-joined one.

        Both in batches of one size: the last bits of a float32 product depend on its number of rows, experts or not.
        """


class LogitProbe(Probe):
    """Token sequences, ``(n, length)`` each and without padding, and the logits of language models on them.

    Args:
        folder: The composed folder, for its tokenizer.
        prompts: Real text beside the random token sequences.
        seed: Of the random prompts.
    """

    def __init__(self, folder: Path, prompts: Sequence[str], *, seed: int) -> None:
        self.folder = folder
        self.texts = prompts
        self.seed = seed

    def batches(self, model: Any) -> list[Any]:
        """Make random sequences and tokenize the prompts."""
        import torch

        generator = torch.Generator().manual_seed(self.seed)
        shape = (RANDOM_PROMPTS, PROMPT_LENGTH)
        batches = [torch.randint(0, model.get_input_embeddings().num_embeddings, shape, generator=generator)]
        if self.texts:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
            for text in self.texts:
                ids = tokenizer(text, return_tensors="pt").input_ids[:, :256]
                if ids.shape[1] > DECODED:
                    batches.append(ids)
        return batches

    def outputs(self, model: Any, batch: Any) -> list[torch.Tensor]:
        """Return the logits of one pass and of a pass whose last tokens go through the cache."""
        return _logits(model, batch)

    def requests(self, whole: Any, never: Any, batch: Any, owner: str) -> tuple[list[torch.Tensor], ...]:
        """Leave the owner out of the first half of a doubled batch."""
        # beside rows that leave nobody out; those would need other weights where these were tuned
        other: set[str] = set() if whole.untuned is None else {owner}
        asked = _first_half(whole, batch, [{owner}] * len(batch) + [other] * len(batch))
        return asked, _first_half(never, batch, None)


def _logits(model: ComposedForCausalLM, ids: torch.Tensor, **kwargs: Any) -> list[torch.Tensor]:
    import torch

    with torch.inference_mode():
        full = model(ids, use_cache=False, **kwargs).logits
        split = ids.shape[1] - DECODED
        out = model(ids[:, :split], use_cache=True, **kwargs)
        steps = [out.logits[:, -1:]]
        for position in range(split, ids.shape[1]):
            out = model(
                ids[:, position : position + 1],
                past_key_values=out.past_key_values,
                use_cache=True,
                **kwargs,
            )
            steps.append(out.logits)
    return [full, torch.cat(steps, dim=1)]


def _first_half(
    model: ComposedForCausalLM, ids: torch.Tensor, opt_out: list[set[str]] | None
) -> list[torch.Tensor]:
    """Run the prompts beside copies of themselves, and return the logits of the first half of the batch."""
    import torch

    doubled = torch.cat([ids, ids])
    return [logits[: len(ids)] for logits in _logits(model, doubled, opt_out=opt_out)]
