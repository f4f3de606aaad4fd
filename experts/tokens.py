"""Which tokens a ``tokenizer.json`` makes of a text, as a digest, and what may stand in its ``tokenizer_config.json``.

Padding and cutting off are left out: libraries set them anew at every call, and save whatever was set last. Knows the
two files; runs no tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

from experts.errors import AdmissionError
from experts.files import read_bounded
from experts.strict import load_json

__all__ = ["TOKENIZER_CONFIG", "TOKENIZER_FILE", "clean_settings", "settings_problems", "tokens_digest"]

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"

_MAX_TOKENIZER = 64 << 20
_SET_AT_EVERY_CALL = ("padding", "truncation")
_NAMES_A_PLACE = frozenset(
    {
        "cache_dir",
        "is_local",
        "local_files_only",
        "name_or_path",
        "processor_class",
        "special_tokens_map_file",
        "tokenizer_file",
        "vocab_file",
    }
)
"""Keys that saving writes and that say where the tokenizer came from."""
_FLAGS = frozenset(
    {
        "add_bos_token",
        "add_eos_token",
        "add_prefix_space",
        "clean_up_tokenization_spaces",
        "do_basic_tokenize",
        "do_lower_case",
        "split_special_tokens",
        "strip_accents",
        "tokenize_chinese_chars",
        "trim_offsets",
    }
)
_NUMBERS = frozenset({"max_length", "model_max_length", "pad_to_multiple_of", "pad_token_type_id", "stride"})
_WORDS = frozenset(
    {"backend", "errors", "padding_side", "tokenizer_class", "truncation_side", "truncation_strategy"}
)
_TOKENS = frozenset(f"{role}_token" for role in ("bos", "cls", "eos", "mask", "pad", "sep", "unk"))
_STRUCTURES = frozenset(
    {
        "added_tokens_decoder",
        "additional_special_tokens",
        "extra_special_tokens",
        "model_input_names",
        "model_specific_special_tokens",
        "never_split",
    }
)
_TOKEN_KEYS = frozenset({"__type", "content", "lstrip", "normalized", "rstrip", "single_word", "special"})
_ALLOWED = _FLAGS | _NUMBERS | _WORDS | _TOKENS | _STRUCTURES
_CODE = frozenset({"auto_map", "trust_remote_code"})
_WORD = re.compile(r"[A-Za-z0-9_]{1,80}")
_MAX_DEPTH = 16


def tokens_digest(path: Path, *, follow_symlinks: bool = False) -> str:
    """Return the sha256, in hexadecimal, of a ``tokenizer.json`` without padding and truncation, keys sorted.

    Equal digests make equal tokens of every text.

    Raises:
        AdmissionError: Not a regular file, larger than 64 MB, or not a JSON object without duplicate keys.
    """
    data = read_bounded(path, max_bytes=_MAX_TOKENIZER, follow_symlinks=follow_symlinks)
    found = load_json(data, what=path.name, max_bytes=_MAX_TOKENIZER, error=AdmissionError)
    if not isinstance(found, dict):
        raise AdmissionError(f"{path.name} is not a JSON object.")
    kept = {key: value for key, value in found.items() if key not in _SET_AT_EVERY_CALL}
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def clean_settings(found: Mapping[str, object]) -> dict[str, object]:
    """Leave out what only says where a tokenizer came from; nothing else is dropped silently."""
    return {key: value for key, value in found.items() if key not in _NAMES_A_PLACE}


def settings_problems(found: Mapping[str, object], *, longest: int) -> list[str]:
    """Say what is wrong with a packed ``tokenizer_config.json``; it may hold plain settings and special tokens.

    Args:
        found: The file.
        longest: Tokens after which the base cuts a text off.
    """
    problems = [problem for key, value in found.items() if (problem := _problem(key, value))]
    own = found.get("model_max_length")
    if isinstance(own, int | float) and own < longest:
        problems.append(
            f"model_max_length is {own!r}; the base reads {longest} tokens, and fewer would cut queries off earlier"
        )
    return problems


def _problem(key: str, value: object) -> str | None:
    if key in _CODE:
        return f"{key}: names code, which is never run; remove it"
    if key in _NAMES_A_PLACE:
        return f"{key}: says where the tokenizer came from; pack the expert again"
    if key not in _ALLOWED:
        return f"{key}: not allowed; known are {', '.join(sorted(_ALLOWED))}"
    if not _fits(key, value):
        return f"{key}: {value!r:.80} is not what it may be"
    return None


def _fits(key: str, value: object) -> bool:
    if value is None:
        return True
    if key in _FLAGS:
        return isinstance(value, bool)
    if key in _NUMBERS:
        return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
    if key in _WORDS:
        return isinstance(value, str) and _WORD.fullmatch(value) is not None
    return _plain_tokens(value, depth=0)


def _plain_tokens(value: object, *, depth: int) -> bool:
    """Whether it is made of texts, lists of them, and descriptions of added tokens."""
    if isinstance(value, dict) and depth < _MAX_DEPTH:
        if not value.keys() & {"content"}:  # by id, or by role
            return all(_WORD.fullmatch(key) and _plain_tokens(v, depth=depth + 1) for key, v in value.items())
        texts = isinstance(value["content"], str) and value.get("__type", "AddedToken") == "AddedToken"
        flags = (v for key, v in value.items() if key not in ("__type", "content"))
        return texts and value.keys() <= _TOKEN_KEYS and all(isinstance(flag, bool) for flag in flags)
    if isinstance(value, list) and depth < _MAX_DEPTH:
        return all(_plain_tokens(item, depth=depth + 1) for item in value)
    return isinstance(value, str) and len(value) <= 1000
