"""Whether two ``config.json`` of transformers mean the same function of the same weights, and what would align them.

Knows which keys decide nothing (token ids, dropout, where the model came from) and how different versions of
transformers write the same rotary embedding; knows nothing of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["DECIDES_NOTHING", "architecture_problems", "decisive"]

DECIDES_NOTHING = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_commit_hash",
        "_name_or_path",
        "attention_dropout",
        "attn_pdrop",
        "bos_token_id",
        "chunk_size_feed_forward",
        "classifier_dropout",
        "dtype",
        "embd_pdrop",
        "eos_token_id",
        "finetuning_task",
        "hidden_dropout",
        "id2label",
        "initializer_range",
        "label2id",
        "name_or_path",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "resid_pdrop",
        "return_dict",
        "return_dict_in_generate",
        "task_specific_params",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "use_bfloat16",
        "use_cache",
    }
)
"""Keys that training, saving and generation write and that change no logit."""

_ROPE = frozenset({"rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq"})
_OFF = frozenset({"attention_bias", "mlp_bias", "sliding_window", "layer_types", "use_sliding_window"})
"""Keys that older versions of transformers leave out where they mean: none."""
_BIASES = "the base has other biases; fine-tune the base as it is, or make a base of a model that has them"
_ADVICE = {
    "attention_bias": _BIASES,
    "mlp_bias": _BIASES,
    "vocab_size": "the vocabularies must be one: take added tokens away again (resize_token_embeddings), or give the "
    "model the base's tokenizer with mergekit-tokensurgeon",
    "model_type": "another architecture; fine-tune the base itself",
    "architectures": "save the whole language model, with its head",
    "tie_word_embeddings": "save the model with the base's setting",
    "max_position_embeddings": "set it to the base's if the rotary embedding is the base's",
    "rope": "the rotary embedding must be the base's; a model that was stretched to a longer context is another one",
}
_OTHERWISE = "fine-tune the base itself; if it is the same, save both with the same version of transformers"


def architecture_problems(
    found: Mapping[str, object], base: Mapping[str, object], *, who: str = "the expert"
) -> list[str]:
    """Return one line for each setting that differs, with what would align it.

    Args:
        found: The ``config.json`` in question.
        base: The base's.
        who: How to call the first.
    """
    own, wanted = decisive(found), decisive(base)
    differing = [key for key in sorted({*own, *wanted}) if own.get(key) != wanted.get(key)]
    if "model_type" in differing:  # all else follows from it
        differing = ["model_type"]
    return [
        f"{key}: {who} has {_shown(own.get(key))}, the base {_shown(wanted.get(key))}; "
        f"{_ADVICE.get(key.rpartition('.')[2], _OTHERWISE)}"
        for key in differing
    ]


def decisive(config: Mapping[str, object]) -> dict[str, object]:
    """Return the settings that decide the function, spelled the same whichever version wrote them."""
    kept: dict[str, object] = {}
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("_config"):
            kept.update({f"{key}.{inner}": held for inner, held in decisive(value).items()})
        elif key not in DECIDES_NOTHING and key not in _ROPE and value is not None:
            kept[key] = value
    kept.update(_rope(config))
    return {key: value for key, value in kept.items() if not _is_default(key, value, config)}


def _is_default(key: str, value: object, config: Mapping[str, object]) -> bool:
    """Say whether leaving the key out would mean the same."""
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    if key == "num_key_value_heads":
        return value == heads
    if key == "head_dim":
        return isinstance(heads, int) and isinstance(width, int) and value == width // max(heads, 1)
    if key == "layer_types":
        return isinstance(value, list) and set(value) == {"full_attention"}
    return key in _OFF and value is False


def _rope(config: Mapping[str, object]) -> dict[str, object]:
    """Spell the rotary embedding as transformers 5 does, whichever version wrote it."""
    if not _ROPE & config.keys():
        return {}
    written = config.get("rope_parameters")
    if isinstance(written, dict):
        return {"rope": _typed(written)}
    scaling = config.get("rope_scaling")
    plain = {"rope_theta": config.get("rope_theta", 10000.0), "rope_type": "default"}
    globally = {**plain, **_typed(scaling if isinstance(scaling, dict) else {})}
    local = config.get("rope_local_base_freq")
    if local is None:
        return {"rope": globally}
    own = {"rope_theta": local, "rope_type": "default"}
    return {"rope": {"full_attention": globally, "sliding_attention": own}}


def _typed(rope: Mapping[str, object]) -> dict[str, object]:
    """Give the type its newer name, and leave out what is not said."""
    renamed = {("rope_type" if key == "type" else key): value for key, value in rope.items()}
    return {
        key: _typed(value) if isinstance(value, dict) else value
        for key, value in renamed.items()
        if value is not None
    }


def _shown(value: object) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
