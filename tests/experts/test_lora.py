"""The lora kind against PEFT itself: what it adapts, how it scales, what it writes."""

from __future__ import annotations

import json
import time
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.base import BaseDescription
from experts.errors import AdmissionError
from experts.kinds import get_kind
from experts.kinds.lora import lora_spec, lora_tensor_names
from experts.kinds.lora_config import LoraConfig, parse_lora_config
from experts.kinds.lora_match import TargetMatcher, pattern_values
from experts.safetensors_header import read_header

Base = Callable[..., BaseDescription]

GATED = ["gate_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama ffn": ("llama", {"target_modules": GATED}),
    "llama upper layers": ("llama", {"target_modules": GATED, "layers_to_transform": [1, 2]}),
    "llama one layer": ("llama", {"target_modules": GATED, "layers_to_transform": 2}),
    "llama pattern": (
        "llama",
        {"target_modules": ["up_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    ),
    "llama patterns": (
        "llama",
        {"target_modules": ["up_proj"], "layers_to_transform": [0], "layers_pattern": ["blocks", "layers"]},
    ),
    "llama all linear": ("llama", {"target_modules": "all-linear"}),
    "llama full names": (
        "llama",
        # a full name is adapted whatever layers_to_transform says
        {"target_modules": ["model.layers.0.mlp.up_proj", "self_attn.q_proj"], "layers_to_transform": [2]},
    ),
    "llama ranks": (
        "llama",
        {
            "target_modules": [*GATED, "q_proj"],
            "rank_pattern": {
                "model.layers.1.mlp.up_proj": 6,
                "down_proj": 2,
                r".*\.2\.mlp\.(up|gate)_proj": 3,
            },
            "alpha_pattern": {r"layers\.\d+\.mlp\.up_proj": 32, "q_proj": 3},
            "use_rslora": True,
        },
    ),
    "qwen3": ("qwen3", {"target_modules": [*GATED, "o_proj"]}),
    "olmo2": ("olmo2", {"target_modules": GATED, "init_lora_weights": "gaussian"}),
    "gemma3": ("gemma3_text", {"target_modules": GATED}),
    "gpt_neox": ("gpt_neox", {"target_modules": ["dense_h_to_4h", "dense_4h_to_h", "query_key_value"]}),
    "phi3": ("phi3", {"target_modules": ["gate_up_proj", "down_proj", "qkv_proj"]}),
    "phi bf16": ("phi", {"target_modules": ["fc1", "fc2"], "dtype": "bfloat16"}),
    "llama fp16": ("llama", {"target_modules": ["mlp.gate_proj"], "dtype": "float16"}),
}


@pytest.mark.parametrize(("family", "options"), CASES.values(), ids=CASES)
def test_schema_is_what_peft_writes(
    family: str, options: dict[str, Any], adapter: Callable[..., Path], base: Base
) -> None:
    kind = get_kind("lora")
    folder = adapter(family, **options)
    config = kind.read_config(folder / "adapter_config.json")
    stored = read_header(folder / "adapter_model.safetensors").tensors
    dtype = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[options.get("dtype", "float32")]
    expected = kind.expected_tensors(config, base(family), dtype=dtype)
    assert {name: (spec.dtype, spec.shape) for name, spec in expected.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()
    }


@pytest.mark.parametrize(("family", "options"), CASES.values(), ids=CASES)
def test_scaling_and_rank_are_pefts(
    family: str,
    options: dict[str, Any],
    adapter: Callable[..., Path],
    base: Base,
    make_model: Callable[..., Any],
) -> None:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    folder = adapter(family, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(make_model(family), folder)
    expected = {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    spec = lora_spec(get_kind("lora").read_config(folder / "adapter_config.json"), base(family))
    # the same arithmetic, hence equal to the last bit
    assert {name: tuple(module) for name, module in spec.modules.items()} == expected
    assert spec.rank == max(rank for rank, _ in expected.values())
    assert spec.layers == tuple(sorted({int(name.split("layers.")[1].split(".")[0]) for name in expected}))
    assert spec.ffn_only == all(".mlp." in name for name in expected)


def test_patterns_that_overlap(adapter: Callable[..., Path], base: Base) -> None:
    # PEFT sorts the patterns when it saves, so that it cannot load this adapter itself
    folder = adapter(target_modules=["up_proj"], rank_pattern={"up_proj": 2, r"1\.mlp\.up_proj": 3})
    config = get_kind("lora").read_config(folder / "adapter_config.json")
    spec = lora_spec(config, base())
    assert {module.rank for module in spec.modules.values()} == {2, 3}
    stored = read_header(folder / "adapter_model.safetensors").tensors
    assert {tensor.shape[0] for name, tensor in stored.items() if "lora_A" in name} == {2}


def test_tensor_names() -> None:
    assert lora_tensor_names("model.layers.3.mlp.up_proj") == (
        "base_model.model.model.layers.3.mlp.up_proj.lora_A.weight",
        "base_model.model.model.layers.3.mlp.up_proj.lora_B.weight",
    )


_MODULES = st.lists(
    st.sampled_from(["model", "layers", "blocks", "mlp", "up", "0", "1", "12"]), min_size=1, max_size=7
)
_NAME = _MODULES.map(".".join)


def config(**changes: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["up_proj"]} | changes


@settings(max_examples=300, deadline=None)
@given(
    module=_NAME,
    targets=st.lists(_NAME, min_size=1, max_size=3, unique=True),
    layers=st.none() | st.integers(0, 2) | st.lists(st.integers(0, 13), max_size=3),
    patterns=st.none()
    | st.sampled_from(["", "layers", "blocks", "mlp.layers"])
    | st.lists(st.sampled_from(["layers", "blocks", "model.layers"]), max_size=2),
)
def test_targets_match_as_in_peft(module: str, targets: list[str], layers: Any, patterns: Any) -> None:
    from types import SimpleNamespace

    from peft.tuners.tuners_utils import check_target_module_exists

    if patterns and layers is None:
        patterns = None  # refused by both
    parsed = parse_lora_config(
        config(target_modules=targets, layers_to_transform=layers, layers_pattern=patterns)
    )
    theirs = SimpleNamespace(
        target_modules=targets,
        layers_to_transform=layers,
        layers_pattern=patterns,
        exclude_modules=None,
        modules_to_save=None,
    )
    assert bool(TargetMatcher(parsed).matches(module)) == bool(check_target_module_exists(theirs, module))


@settings(max_examples=300, deadline=None)
@given(
    module=_NAME,
    patterns=st.dictionaries(
        _NAME
        | st.sampled_from(
            [r".*\.1\..*", r"^model\.layers", "up$", r"layers\.\d+\.mlp", "(mlp|up)", "[01].up", "u."]
        ),
        st.integers(1, 9),
        max_size=4,
    ),
)
def test_patterns_match_as_in_peft(module: str, patterns: dict[str, int]) -> None:
    from peft.utils.other import get_pattern_key

    parsed = parse_lora_config(config(rank_pattern=patterns))
    expected = patterns.get(get_pattern_key(patterns.keys(), module), 77)
    assert pattern_values(parsed.rank_pattern, [module], default=77) == [expected]


RANKS = "a whole number from 1 to 4096"
COUNTS = "whole numbers from 1 to 4096"
PATTERNS = "a mapping of module names, or simple patterns of them, to"
TARGETS = "a list of module names without repetition (not a regular expression)"
OFF = "off (null or false): not part of a lora expert"
INIT = (
    "true, false, 'gaussian' or 'orthogonal' (others alter the base; convert the adapter to plain LoRA first)"
)
REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "rank": ({"r": 10**9}, [f"r: 1000000000 found; allowed is {RANKS}"]),
    "zero rank": ({"r": 0}, [f"r: 0 found; allowed is {RANKS}"]),
    "text rank": ({"r": "8"}, [f"r: '8' found; allowed is {RANKS}"]),
    "true rank": ({"r": True}, [f"r: True found; allowed is {RANKS}"]),
    "alpha": ({"lora_alpha": -1}, ["lora_alpha: -1 found; allowed is a number above 0, at most 1e+06"]),
    "huge alpha": (
        {"lora_alpha": 1e30},
        ["lora_alpha: 1e+30 found; allowed is a number above 0, at most 1e+06"],
    ),
    "DoRA": ({"use_dora": True}, ["use_dora: True found; allowed is false"]),
    "bias": ({"bias": "all"}, ["bias: 'all' found; allowed is 'none': biases belong to the base"]),
    "lora bias": ({"lora_bias": True}, ["lora_bias: True found; allowed is false"]),
    "modules to save": (
        {"modules_to_save": ["lm_head"]},
        [f"modules_to_save: ['lm_head'] found; allowed is {OFF}"],
    ),
    "regex targets": (
        {"target_modules": ".*up_proj"},
        [f"target_modules: '.*up_proj' found; allowed is {TARGETS}"],
    ),
    "regex in list": (
        {"target_modules": ["up.*"]},
        [f"target_modules: ['up.*'] found; allowed is {TARGETS}"],
    ),
    "repeated": (
        {"target_modules": ["up_proj"] * 2},
        [f"target_modules: ['up_proj', 'up_proj'] found; allowed is {TARGETS}"],
    ),
    "no targets": ({"target_modules": []}, [f"target_modules: [] found; allowed is {TARGETS}"]),
    "auto mapping": (
        {"auto_mapping": {"parent_library": "x"}},
        [
            "auto_mapping: {'parent_library': 'x'} found; allowed is null: it names code; train with a "
            "task_type"
        ],
    ),
    "megatron": (
        {"megatron_config": {"a": 1}, "megatron_core": "evil.module"},
        [
            f"megatron_config: {{'a': 1}} found; allowed is {OFF}",
            "megatron_core: 'evil.module' found; allowed is PEFT's default 'megatron.core' or null",
        ],
    ),
    "pissa": ({"init_lora_weights": "pissa"}, [f"init_lora_weights: 'pissa' found; allowed is {INIT}"]),
    "task": (
        {"task_type": "SEQ_CLS"},
        ["task_type: 'SEQ_CLS' found; allowed is 'CAUSAL_LM' (other tasks add tensors) or null"],
    ),
    "another method": ({"peft_type": "IA3"}, ["peft_type: 'IA3' found; allowed is 'LORA'"]),
    "unknown keys": (
        {"lora_alfa": 1, "hook": "os:system"},
        ["lora_alfa: unknown key; did you mean 'lora_alpha'?", "hook: unknown key"],
    ),
    "replicated layers": (
        {"layer_replication": [[0, 2]]},
        [f"layer_replication: [[0, 2]] found; allowed is {OFF}"],
    ),
    "parameters": ({"target_parameters": ["x"]}, [f"target_parameters: ['x'] found; allowed is {OFF}"]),
    "tokens": ({"trainable_token_indices": [1]}, [f"trainable_token_indices: [1] found; allowed is {OFF}"]),
    "excluded": ({"exclude_modules": ["a"]}, [f"exclude_modules: ['a'] found; allowed is {OFF}"]),
    "slow pattern": (
        {"rank_pattern": {"(a+)+b": 3}},
        [f"rank_pattern: {{'(a+)+b': 3}} found; allowed is {PATTERNS} {COUNTS}"],
    ),
    "many repeats": (
        {"rank_pattern": {".*.*.*": 3}},
        [f"rank_pattern: {{'.*.*.*': 3}} found; allowed is {PATTERNS} {COUNTS}"],
    ),
    "look-ahead": (
        {"alpha_pattern": {"(?=a)": 3}},
        [f"alpha_pattern: {{'(?=a)': 3}} found; allowed is {PATTERNS} numbers above 0, at most 1e+06"],
    ),
    "broken pattern": (
        {"rank_pattern": {"(a": 3}},
        [f"rank_pattern: {{'(a': 3}} found; allowed is {PATTERNS} {COUNTS}"],
    ),
    "rank in pattern": (
        {"rank_pattern": {"a": 10**9}},
        [f"rank_pattern: {{'a': 1000000000}} found; allowed is {PATTERNS} {COUNTS}"],
    ),
    "layers pattern": (
        {"layers_pattern": "(a+)+", "layers_to_transform": [1]},
        ["layers_pattern: '(a+)+' found; allowed is null, a module name or a list of module names"],
    ),
    "layers pattern alone": (
        {"layers_pattern": "layers"},
        ["layers_pattern: needs layers_to_transform as well"],
    ),
    "layers": (
        {"layers_to_transform": "1"},
        ["layers_to_transform: '1' found; allowed is null, a layer number or a list of layer numbers"],
    ),
}


@pytest.mark.parametrize(("changes", "problems"), REFUSED.values(), ids=REFUSED)
def test_refused_keys(changes: dict[str, Any], problems: list[str]) -> None:
    with pytest.raises(AdmissionError) as caught:
        parse_lora_config(config(**changes))
    lines = "".join(f"\n  - {problem}" for problem in problems)
    assert str(caught.value) == f"adapter_config.json is not allowed for a lora expert:{lines}"


def test_missing_keys() -> None:
    with pytest.raises(AdmissionError) as caught:
        parse_lora_config({})
    assert str(caught.value) == (
        "adapter_config.json is not allowed for a lora expert:\n"
        "  - peft_type: missing; allowed is 'LORA'\n"
        f"  - r: missing; allowed is {RANKS}\n"
        "  - lora_alpha: missing; allowed is a number above 0, at most 1e+06\n"
        f"  - target_modules: missing; allowed is {TARGETS}"
    )


def test_targets_that_do_not_fit(base: Base) -> None:
    targets = ["gate_prj", "lm_head", "embed_tokens", "mlp", "input_layernorm", "up_proj"]
    with pytest.raises(AdmissionError) as caught:
        lora_spec(config(target_modules=targets, layers_to_transform=[1, 7]), base("qwen3"))
    known = "Known: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    assert str(caught.value) == (
        "adapter_config.json does not fit the base:\n"
        "  - target_modules: 'input_layernorm' matches 'model.layers.1.input_layernorm', which is not a linear of the "
        "base's layers\n"
        "  - target_modules: 'lm_head' matches 'lm_head', which is not a linear of the base's layers\n"
        f"  - target_modules: 'gate_prj' matches no linear of the base's layers; did you mean 'gate_proj'? {known}\n"
        f"  - target_modules: 'embed_tokens' matches no linear of the base's layers. {known}\n"
        f"  - target_modules: 'mlp' matches no linear of the base's layers. {known}\n"
        "  - layers_to_transform: the base has no layer 7; it has 0 to 2"
    )


def test_embeddings_cannot_be_targets(base: Base) -> None:
    with pytest.raises(AdmissionError) as caught:
        lora_spec(config(target_modules=["embed_tokens", "up_proj"]), base("llama"))
    assert str(caught.value) == (
        "adapter_config.json does not fit the base:\n"
        "  - target_modules: 'embed_tokens' matches 'model.embed_tokens', which is not a linear of the base's layers"
    )


def test_many_hostile_patterns_stay_fast(base: Base) -> None:
    patterns = {f"{'(a|' * 40}b{')' * 40}{n}": 1 for n in range(500)} | {f".*{n}.*x": 1 for n in range(8)}
    started = time.process_time()
    lora_spec(config(rank_pattern=patterns), base())
    assert time.process_time() - started < 5


def test_huge_rank_is_refused_at_once(tmp_path: Path, base: Base) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(config(r=10**9, rank_pattern={"up_proj": 10**9})))
    kind = get_kind("lora")
    tracemalloc.start()
    started = time.process_time()
    with pytest.raises(AdmissionError, match="r: 1000000000 found"):
        kind.expected_shapes(kind.read_config(path), base())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.process_time() - started < 1
    assert peak < 1 << 20


def test_options_that_default(base: Base) -> None:
    parsed = parse_lora_config(config())
    assert parsed == LoraConfig(
        r=4,
        lora_alpha=8.0,
        use_rslora=False,
        rank_pattern={},
        alpha_pattern={},
        target_modules=("up_proj",),
        layers_to_transform=None,
        layers_pattern=(),
    )
