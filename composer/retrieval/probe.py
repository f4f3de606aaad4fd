"""What composed retrievers are compared by: embeddings of random and of given queries, and of documents."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from composer.probes import Probe

if TYPE_CHECKING:
    import torch

__all__ = ["EmbeddingProbe"]

TEXTS = 16
"""So many that most routers choose every owner for some of them."""
WORDS = 12


class EmbeddingProbe(Probe):
    """Embeddings of queries.

    Args:
        prompts: Queries beside the random ones.
        seed: Of the random ones.
    """

    def __init__(self, prompts: Sequence[str], *, seed: int) -> None:
        self.prompts = list(prompts)
        self.seed = seed

    def batches(self, model: Any) -> list[Any]:
        """Make texts of random tokens."""
        words = sorted(model.tokenizer.get_vocab())
        chosen = random.Random(self.seed)
        texts = [" ".join(chosen.choices(words, k=WORDS)) for _ in range(TEXTS)]
        return [texts, *([self.prompts] if self.prompts else [])]

    def outputs(self, model: Any, batch: Any) -> list[torch.Tensor]:
        """Return the texts' embeddings as queries and as documents."""
        return [_encoded(model.encode_query, batch), _encoded(model.encode_document, batch)]

    def requests(self, whole: Any, never: Any, batch: Any, owner: str) -> tuple[list[torch.Tensor], ...]:
        """Leave the owner out of the whole batch."""
        asked = _encoded(whole.encode_query, batch, opt_out={owner})
        return [asked, _encoded(whole.encode_document, batch)], self.outputs(never, batch)


def _encoded(encode: Any, texts: Sequence[str], **options: Any) -> torch.Tensor:
    # one batch, so that both models multiply matrices of one shape
    found: torch.Tensor = encode(list(texts), batch_size=len(texts), convert_to_tensor=True, **options)
    return found
