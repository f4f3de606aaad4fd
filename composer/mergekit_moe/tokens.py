"""Token ids of prompts, as mergekit-moe makes them with the base's tokenizer, and what can be wrong with that.

Knows tokenizer files; knows nothing of what becomes of the ids. Imports torch and transformers when prompts are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experts.errors import AdmissionError, DataError

if TYPE_CHECKING:
    from torch import Tensor

    from composer.mergekit_moe.sources import SourceModel

__all__ = ["Batch", "read_prompts", "read_tokenizer", "tokenizer_problems"]

Batch = Mapping[str, "Tensor"]
"""``input_ids`` and ``attention_mask``, int64 ``(prompts, length)``."""

_CURE = "save the tokenizer beside the model, or write a random gate_mode"


def tokenizer_problems(base: SourceModel) -> list[str]:
    """Say why prompts cannot be read with a base's tokenizer, as far as its files show without transformers."""
    if base.tokenizer is None:
        return [f"{base.ref}: has no tokenizer to read the prompts with; {_CURE}"]
    path = base.folder / "tokenizer.json"
    if not path.exists():
        return []
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no other class
        return [f"{base.ref}: its tokenizer.json cannot be read ({_first_line(error)}); {_CURE}"]
    return []


def read_tokenizer(base: SourceModel) -> Any:
    """Return the base's tokenizer, padding on the left with the beginning or the end of a text.

    Raises:
        AdmissionError: transformers cannot make one of the base's files.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(base.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of many classes, by what the files are
        raise AdmissionError(
            f"{base.ref}: transformers cannot read its tokenizer ({_first_line(error)}); {_CURE}."
        ) from error
    tokenizer.padding_side = "left"
    tokenizer.pad_token_id = tokenizer.bos_token_id
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_prompts(tokenizer: Any, prompts: Sequence[str], *, vocabulary: int | None) -> Batch:
    """Return the token ids of prompts, each behind the beginning of a text where the tokenizer has one.

    Args:
        tokenizer: What `read_tokenizer` returned.
        prompts: At least one.
        vocabulary: Rows of the base's input embedding; None if it is not known.

    Raises:
        DataError: A prompt has no tokens, or one that the base has no embedding of, or nothing pads the shorter ones.
    """
    texts = [(tokenizer.bos_token or "") + prompt for prompt in prompts]
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False).input_ids]
    empty = [prompt for prompt, length in zip(prompts, lengths, strict=True) if not length]
    if empty:
        raise DataError(f"The base's tokenizer makes no token of the prompts {empty}.")
    if tokenizer.pad_token is None and len(set(lengths)) > 1:
        raise DataError(
            "The base's tokenizer has neither a beginning nor an end of a text to pad prompts with."
        )
    batch: Batch = tokenizer(
        texts, return_tensors="pt", padding=tokenizer.pad_token is not None, add_special_tokens=False
    )
    largest = int(batch["input_ids"].max())
    if vocabulary is not None and largest >= vocabulary:
        raise DataError(
            f"The base's tokenizer makes token {largest} of the prompts {list(prompts)}, and the base has embeddings "
            f"of {vocabulary} tokens only. Take the tokenizer that belongs to the model."
        )
    return dict(batch)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
