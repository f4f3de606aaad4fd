"""A small public anchor from nothing: a byte-pair tokenizer and a decoder, both learned from public text.

Knows tokenizers and transformers' own classes; knows nothing of experts.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experts.files import fsync_folder

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

    from pipelines.experiments.settings import ScratchAnchor

__all__ = ["train_anchor"]

_END = "<|end|>"


def train_anchor(
    settings: ScratchAnchor,
    texts: Sequence[str],
    *,
    out: Path,
    sequence_length: int,
    device: str = "cpu",
    progress: Callable[[int, int, float], None] | None = None,
) -> Path:
    """Train an anchor and write its checkpoint folder; what is there already is kept.

    Args:
        settings: Its sizes and budget.
        texts: Documents of the public mix.
        out: The folder; it appears when it is complete.
        sequence_length: Tokens in a window.
        device: Where it is trained. It starts at the same weights on every device.
        progress: Called with steps done, steps in all, and the loss.
    """
    if out.is_dir():
        return out
    import torch
    from transformers import AutoModelForCausalLM

    from pipelines.experiments.optimize import optimize
    from pipelines.train.windows import make_windows

    tokenizer = _tokenizer(texts, size=settings.vocabulary)
    needed = settings.steps * settings.batch_size
    windows = make_windows(
        texts,
        tokenizer,
        sequence_length=sequence_length,
        limit=needed,
        seed=settings.seed,
        what="the public mix",
    )
    torch.manual_seed(settings.seed)
    model = AutoModelForCausalLM.from_config(_config(settings, sequence_length), dtype=torch.float32)
    optimize(
        model.to(device),
        torch.from_numpy(windows.ids).long(),
        parameters=list(model.parameters()),
        steps=settings.steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
        warmup=max(1, settings.steps // 20),
        progress=progress,
    )
    return _publish(model.cpu(), tokenizer, out)


def _publish(model: Any, tokenizer: Any, out: Path) -> Path:
    beside = out.with_name(out.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    fsync_folder(beside)
    beside.rename(out)
    return out


def _tokenizer(texts: Sequence[str], *, size: int) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[_END], initial_alphabet=alphabet, show_progress=False
    )
    pieces.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token=_END, pad_token=_END)


def _config(settings: ScratchAnchor, sequence_length: int) -> PretrainedConfig:
    from transformers import LlamaConfig, Olmo2Config

    sizes: dict[str, Any] = {
        "vocab_size": settings.vocabulary,
        "hidden_size": settings.hidden_size,
        "intermediate_size": settings.intermediate_size,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.heads,
        "max_position_embeddings": max(512, sequence_length),
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
    }
    return Olmo2Config(**sizes) if settings.family == "olmo2" else LlamaConfig(**sizes)
