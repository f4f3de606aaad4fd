"""What is refused, with the reason and the way out; nothing is left behind, whatever fails and whenever."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from composer.mergekit_moe.manifest import is_mergekit_moe, parse, read_manifest
from composer.mergekit_moe.planning import plan_moe
from experts.errors import (
    AdmissionError,
    AssetError,
    BuildError,
    CoterieError,
    DataError,
    ManifestError,
    PlanError,
    UnknownNameError,
)

BASE = {"base_model": "a", "gate_mode": "random", "experts": [{"source_model": "b"}, {"source_model": "c"}]}


def message(error: type[CoterieError], call: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        (
            {"gate_moed": "random"},
            [
                "gate_moed: unknown key; did you mean 'gate_mode'? Allowed: architecture, base_model, dtype, experts, "
                "experts_per_token, gate_mode, shared_experts"
            ],
        ),
        (
            {"experts": [{"source_model": "b", "positive_prompt": ["x"]}, {"source_model": "c"}]},
            [
                "experts.0.positive_prompt: unknown key; did you mean 'positive_prompts'? Allowed: negative_prompts, "
                "noise_scale, positive_prompts, residual_scale, source_model"
            ],
        ),
        (
            {"gate_mode": "hiden"},
            [
                "gate_mode: unknown gate mode 'hiden'. Did you mean 'hidden'? Known: hidden, hidden_avg, hidden_last, "
                "cheap_embed, random, uniform_random"
            ],
        ),
        ({"dtype": "int8"}, ["dtype: 'int8' is not one of float64, float32, bfloat16, float16"]),
        (
            {"base_model": "a@1@2"},
            ["base_model: 'a@1@2' has more than one '@'; write PATH or PATH@REVISION"],
        ),
        (
            {"base_model": "a+b+c"},
            ["base_model: 'a+b+c' has more than one '+'; write MODEL or MODEL+ADAPTER"],
        ),
        ({"experts_per_token": 3}, ["experts_per_token: 3, but there are 2 experts"]),
        (
            {"shared_experts": [{"source_model": "b"}, {"source_model": "c"}]},
            ["shared_experts: no class of transformers has more than one gated apart; merge them first"],
        ),
        (
            {"gate_mode": "hidden"},
            [
                "experts.0: gate_mode 'hidden' needs positive_prompts",
                "experts.1: gate_mode 'hidden' needs positive_prompts",
            ],
        ),
        (
            {
                "gate_mode": "hidden",
                "experts": [{"source_model": m, "positive_prompts": [m]} for m in "bc"],
                "shared_experts": [{"source_model": "b", "negative_prompts": ["x"]}],
            },
            ["shared_experts.0: negative_prompts are taken from positive_prompts, and there are none"],
        ),
        (
            {
                "experts": [
                    {"source_model": "b", "noise_scale": -1},
                    {"source_model": "c", "residual_scale": -1},
                ]
            },
            ["experts.0.noise_scale: input should be greater than or equal to 0, given -1"],
        ),
        (
            {
                "gate_mode": "cheap_embed",
                "experts": [{"source_model": m, "positive_prompts": ["x"]} for m in "bc"],
            },
            [
                "experts: all have the same prompts, so the router could not tell them apart; give each its own, or "
                "write `gate_mode: uniform_random` and train the router"
            ],
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_manifest(changes: dict[str, Any], problems: list[str]) -> None:
    with pytest.raises(ManifestError) as caught:
        parse({**BASE, **changes})
    assert list(caught.value.problems) == problems


def test_whole_schema() -> None:
    found = parse(
        {
            "base_model": {"model": {"path": "org/base", "revision": "v1"}},
            "gate_mode": "hidden_avg",
            "dtype": "torch.bfloat16",
            "experts_per_token": 1,
            "architecture": "qwen",
            "experts": [
                {
                    "source_model": "org/a@main+./lora@2",
                    "positive_prompts": ["x"],
                    "negative_prompts": None,
                    "noise_scale": 1,
                    "residual_scale": 0.5,
                }
            ],
            "shared_experts": [{"source_model": "org/base"}],
        }
    )
    source = found.experts[0].source_model
    assert (str(found.base_model), str(source), source.lora.revision) == (
        "org/base@v1",
        "org/a@main+./lora@2",
        "2",
    )
    assert (found.storage_dtype, found.experts[0].noise_scale) == ("BF16", 1.0)


def test_whose_manifest_it_is(tmp_path: Path) -> None:
    assert is_mergekit_moe(BASE)
    assert not is_mergekit_moe({"name": "x", "base": "b", "experts": ["acme/a"]})
    assert not is_mergekit_moe({"base_model": "b", "experts": ["acme/a"]})
    assert not is_mergekit_moe("text")
    (tmp_path / "own.yaml").write_text("name: x\nbase: b\nexperts: [acme/a]\n")
    assert read_manifest(tmp_path / "own.yaml") is None
    assert read_manifest(tmp_path / "none.yaml") is None
    (tmp_path / "theirs.yml").write_text(
        "base_model: b\nexperts:\n  - source_model: c\nexperts_per_token: 1\nx: 1\n"
    )
    assert message(ManifestError, read_manifest, tmp_path / "theirs.yml").startswith(
        "mergekit-moe manifest theirs.yml has 1 problem:"
    )


# ---------------------------------------------------------------- models


def problems_of(config: dict[str, Any], **options: Any) -> list[str]:
    with pytest.raises(PlanError) as caught:
        plan_moe(parse(config), **options)
    assert str(caught.value).startswith(f"This mixture of {config['base_model']} cannot be written:")
    return list(caught.value.problems)


def changed(folder: Path, out: Path, *, without: Sequence[str] = (), **tensors: Any) -> Path:
    """A copy of a model with tensors replaced, added, or taken away."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, out)
    held = {name: t for name, t in load_file(out / "model.safetensors").items() if name not in without}
    save_file(held | tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_biases_behind_attention(config_of: Any) -> None:
    config = config_of(model={"attention_bias": True}, gate_mode="random")
    layers = [0, 1, 2]
    assert problems_of(config) == [
        f"{config['base_model']}: model.layers.{layer}.self_attn.{role}_proj.bias has no place in Mixtral{cure}"
        for layer in layers
        for role, cure in {
            "k": "; `architecture: qwen` keeps biases of q, k and v",
            "o": ": no mixture class has a bias behind attention; `coterie build --composed` keeps it in a coterie "
            "model",
            "q": "; `architecture: qwen` keeps biases of q, k and v",
            "v": "; `architecture: qwen` keeps biases of q, k and v",
        }.items()
    ]


def test_biases_of_the_ffn(config_of: Any) -> None:
    config = config_of(model={"mlp_bias": True}, gate_mode="random")
    found = problems_of(config)
    assert len(found) == 18  # three layers of three linears, of two models; the base's FFNs are not read
    assert found[0] == (
        f"{config['experts'][0]['source_model']}: model.layers.0.mlp.gate_proj.bias is not zero, and the experts of no "
        "mixture class have biases; `coterie build --composed` keeps them in a coterie model"
    )


def test_biases_that_the_base_has_not(config_of: Any, make_model: Any) -> None:
    """A composed model would have no place for them either."""
    config = {**config_of(model={"mlp_bias": True}, gate_mode="random"), "base_model": str(make_model())}
    found = problems_of(config)
    assert found[0].endswith(
        "mixture class have biases; the base has none either, so fine-tune the base itself"
    )


def test_biases_of_zeros_are_dropped_and_listed(config_of: Any, make_model: Any, tmp_path: Path) -> None:
    import torch

    folder = make_model(mlp_bias=True)
    names = [f"model.layers.{n}.mlp.{r}_proj.bias" for n in range(3) for r in ("gate", "up", "down")]
    zeros = {name: torch.zeros(32 if "down" in name else 48) for name in names}
    zeroed = changed(folder, tmp_path / "zeroed", **zeros)
    config = {**BASE, "base_model": str(zeroed), "experts": [{"source_model": str(zeroed)}] * 2}
    (dropped,) = plan_moe(parse(config)).dropped
    assert (set(dropped.tensors), dropped.reason) == (
        set(names),
        "an FFN bias of zeros, for which no mixture class has a place",
    )


def test_every_tensor_is_accounted_for(config_of: Any, built: Any, adapter: Any) -> None:
    """Claimed by name in the output, or listed with a reason; together they are all there is."""
    config = config_of(gate_mode="random")
    first = config["experts"][0]["source_model"]
    config["experts"][1]["source_model"] = f"{config['base_model']}+{adapter(seed=1)}"
    plan = plan_moe(parse(config))
    dropped = {(d.source, name) for d in plan.dropped for name in d.tensors}
    written = built(config)
    for model in {id(m): m for m in [plan.base, *(e.model for e in plan.experts)]}.values():
        expert = model is not plan.base
        for name in model.tensors:
            used = ".mlp." in name if expert else name in written
            assert used != ((str(model.ref), name) in dropped), (str(model.ref), name)
    reasons = {d.source: d.reason for d in plan.dropped if d.source == first}
    assert reasons == {first: "not an FFN: attention, norms and embeddings are the base model's"}
    assert any("adapter's updates beside the FFNs" in d.reason for d in plan.dropped)


def test_gemma(config_of: Any) -> None:
    config = config_of("gemma3_text", gate_mode="random", model={"head_dim": 8})
    found = problems_of(config)
    assert found[0] == (
        "model_type 'gemma3_text': no mixture class of transformers has its blocks; `coterie build "
        "--composed` writes a coterie model instead"
    )
    assert found[1] == "Mixtral: takes models of type llama, mistral, phi3, not gemma3_text"


def test_another_architecture_was_asked_for(config_of: Any) -> None:
    config = config_of("qwen3", gate_mode="random", architecture="mixtral")
    assert problems_of(config) == ["Mixtral: takes models of type llama, mistral, phi3, not qwen3"]
    config = config_of(gate_mode="random", architecture="mixtrall")
    assert message(CoterieError, plan_moe, parse(config)) == (
        "Unknown architecture 'mixtrall'. Did you mean 'Mixtral'? Known: DeepSeek MoE, FlexOlmo, Mixtral, Qwen MoE, "
        "Qwen3 MoE."
    )


def test_shared_expert_where_there_is_no_place(config_of: Any) -> None:
    config = config_of(gate_mode="random", architecture="mixtral")
    config["shared_experts"] = [{"source_model": config["base_model"]}]
    assert problems_of(config) == [
        "Mixtral: has no shared expert; write `architecture: qwen`, or list it among the experts"
    ]


@pytest.mark.parametrize("prompts", ["positive_prompts", "negative_prompts"])
def test_prompts_of_a_shared_expert_that_is_not_gated(prompts: str, config_of: Any, oracle: Any) -> None:
    config = config_of(gate_mode="random", architecture="deepseek")
    config["shared_experts"] = [{"source_model": config["base_model"], prompts: ["any"]}]
    assert problems_of(config) == [
        "DeepSeek MoE: its shared expert is not gated; leave its prompts out, or write `architecture: qwen`"
    ]
    with pytest.raises(SystemExit):  # so does mergekit
        oracle(config)


def test_phi3_with_a_long_context(config_of: Any) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    }
    model = {"rope_parameters": rope, "original_max_position_embeddings": 64}
    config = config_of("phi3", gate_mode="random", architecture="mixtral", model=model)
    assert problems_of(config) == [
        "Mixtral: the rotary embedding is of type 'longrope', which only Phi-3's own class computes"
    ]


def test_widths(config_of: Any, make_model: Any) -> None:
    config = config_of(gate_mode="random")
    config["experts"][1]["source_model"] = str(make_model(intermediate_size=80))
    assert problems_of(config, pad=False) == ["the experts' FFNs are 48, 80 wide, and padding is turned off"]
    assert plan_moe(parse(config)).warnings == (
        "FFN widths 48, 80: narrower experts are padded with zeros (exact).",
    )


def test_experts_of_another_size(config_of: Any, make_model: Any) -> None:
    config = config_of(gate_mode="random")
    other = make_model(hidden_size=64, num_hidden_layers=2)
    config["experts"][1]["source_model"] = str(other)
    assert problems_of(config) == [
        f"{other}: hidden_size is 64, the base has 32; experts must be fine-tuned from one architecture",
        f"{other}: num_hidden_layers is 2, the base has 3; experts must be fine-tuned from one architecture",
    ]


ALIGN = (
    "To align them, fine-tune it with the base's tokenizer, or give the base this model's with mergekit-tokensurgeon; "
    "changing this model's embeddings alone does nothing here, as only its FFNs are read."
)


def retokenized(folder: Path, out: Path) -> Path:
    """A copy of a model with another tokenizer."""
    shutil.copytree(folder, out)
    held = json.loads((out / "tokenizer.json").read_text())
    (out / "tokenizer.json").write_text(json.dumps(held | {"version": "other"}))
    return out


def test_larger_vocabulary_warns(config_of: Any, make_model: Any, built: Any, tmp_path: Path) -> None:
    config = config_of(gate_mode="random")
    other = retokenized(make_model(vocab_size=99), tmp_path / "other")
    config["experts"][1]["source_model"] = str(other)
    assert plan_moe(parse(config)).warnings == (
        f"{other} has 99 tokens, the base 97: the mixture has the base's tokenizer and embeddings. {ALIGN}",
    )
    assert built(config)["model.embed_tokens.weight"].shape[0] == 97


def test_another_tokenizer_warns(config_of: Any, make_model: Any, tmp_path: Path) -> None:
    config = config_of(gate_mode="random")
    other = retokenized(make_model(seed=1), tmp_path / "other")
    config["experts"][0]["source_model"] = str(other)
    assert plan_moe(parse(config)).warnings == (
        f"{other} has another tokenizer than the base; the mixture has the base's. {ALIGN}",
    )


def test_embeddings_of_another_length_and_one_tokenizer_warn(config_of: Any, make_model: Any) -> None:
    config = config_of(gate_mode="random")
    other = str(make_model(vocab_size=99))
    config["experts"][1]["source_model"] = other
    assert plan_moe(parse(config)).warnings == (
        f"{other} has embeddings of 99 tokens, the base of 97, with one and the same tokenizer: the mixture has the "
        "base's. Nothing is to be aligned if the rest are rows of no token.",
    )


def test_copies_of_one_model_warn(make_model: Any) -> None:
    one = str(make_model())
    config = {**BASE, "base_model": one, "experts": [{"source_model": one}] * 2}
    assert plan_moe(parse(config)).warnings == (
        f"all experts are {one}: a sparse upcycling, which answers as the one model until trained.",
    )


def test_an_expert_that_is_the_base_warns(config_of: Any, tmp_path: Path) -> None:
    config = config_of(gate_mode="random")
    base, copy = config["base_model"], tmp_path / "copy"
    shutil.copytree(base, copy)
    config["experts"][0]["source_model"] = str(copy)
    assert plan_moe(parse(config)).warnings == (
        f"{copy}: every FFN is byte for byte the base's, so this expert changes nothing. Is it the folder that "
        "training wrote?",
    )
    config["experts"][0]["source_model"] = base  # the base itself as one more expert is meant so
    assert plan_moe(parse(config)).warnings == ()


def test_deepseek_warns(config_of: Any) -> None:
    config = config_of(gate_mode="random", architecture="deepseek")
    (warning,) = plan_moe(parse(config)).warnings
    assert warning.startswith("transformers has no class for DeepSeek-MoE of this form")


def test_a_shared_expert_that_counts_in_full_warns(config_of: Any) -> None:
    config = config_of()
    shared: dict[str, Any] = {"source_model": config["base_model"]}
    config["shared_experts"] = [shared]
    assert plan_moe(parse(config)).warnings == (
        f"the shared expert {config['base_model']} has no prompts, so nothing gates it: the row of its gate is of "
        "zeros and its down projections are doubled, which counts its answer in full. For a gate give it "
        "positive_prompts, or write `architecture: qwen` with a random gate_mode.",
    )
    shared["positive_prompts"] = ["any"]
    assert plan_moe(parse(config)).warnings == ()
    del shared["positive_prompts"]
    config |= {"architecture": "qwen", "gate_mode": "random"}
    assert plan_moe(parse(config)).warnings == ()


def test_missing_models(tmp_path: Path, config_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(gate_mode="random")
    config["experts"][0]["source_model"] = "./nowhere"
    assert message(ManifestError, plan_moe, parse(config)) == (
        "There is no folder './nowhere', and it is no name of a model on the hub."
    )
    config["experts"][0]["source_model"] = "some/model@v2"
    text = message(AssetError, plan_moe, parse(config))
    assert text.startswith("'some/model@v2' is no folder, and the hub did not give it: ")


def test_a_misspelt_path_that_reads_like_a_name_on_the_hub(config_of: Any, tmp_path: Path) -> None:
    config = config_of(gate_mode="random")
    shutil.copytree(config["experts"][0]["source_model"], tmp_path / "models" / "law")
    config["experts"][0]["source_model"] = "models/lwa"
    assert message(UnknownNameError, plan_moe, parse(config), near=tmp_path) == (
        "Unknown model folder 'models/lwa'. Did you mean 'models/law'? Known: models/law."
    )


def test_paths_are_also_looked_for_beside_the_manifest(config_of: Any, tmp_path: Path) -> None:
    config = config_of(gate_mode="random")
    shutil.copytree(config["experts"][0]["source_model"], tmp_path / "models" / "one")
    config["experts"][0]["source_model"] = "models/one"
    plan = plan_moe(parse(config), near=tmp_path)
    assert plan.experts[0].model.folder == tmp_path / "models" / "one"


def test_pickles_and_missing_shards(config_of: Any, make_model: Any, tmp_path: Path) -> None:
    config = config_of(gate_mode="random")
    folder = Path(shutil.copytree(make_model(), tmp_path / "pickled"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    config["experts"][0]["source_model"] = str(folder)
    text = message(AdmissionError, plan_moe, parse(config))
    assert text.startswith(
        f"'{folder}' holds no safetensors: pytorch_model.bin is a pickle, which is never read;"
    )
    assert f"M.from_pretrained('{folder}', dtype='auto')" in text
    index = {"weight_map": {"a": "model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    text = message(AdmissionError, plan_moe, parse(config))
    assert f"lists 1 shards, and 1 of them are not in '{folder}'" in text


def test_adapters_that_are_none(config_of: Any, make_model: Any, tmp_path: Path, adapter: Any) -> None:
    config = config_of(gate_mode="random")
    config["experts"][0]["source_model"] = f"{make_model()}+{tmp_path}"
    assert message(AdmissionError, plan_moe, parse(config)) == (
        f"{tmp_path} is no adapter: it needs adapter_config.json and adapter_model.safetensors."
    )
    path = adapter(seed=1, use_dora=True)
    config["experts"][0]["source_model"] = f"{make_model()}+{path}"
    text = message(AdmissionError, plan_moe, parse(config))
    assert "use_dora: True found; allowed is false" in text


# ---------------------------------------------------------------- incomplete models

AGAIN = "download the model again, or save it again whole"


@pytest.mark.parametrize(
    ("family", "settings", "name", "cure"),
    [
        ("llama", {}, "model.layers.2.self_attn.q_proj.weight", AGAIN),
        ("llama", {}, "model.layers.0.post_attention_layernorm.weight", AGAIN),
        ("llama", {}, "model.norm.weight", AGAIN),
        ("mistral", {"tie_word_embeddings": True}, "model.embed_tokens.weight", AGAIN),
        (
            "llama",
            {},
            "lm_head.weight",
            f"{AGAIN}, or set tie_word_embeddings in its config.json if its head is its embedding",
        ),
        ("qwen2", {}, "model.layers.1.self_attn.k_proj.bias", AGAIN),
        ("qwen3", {}, "model.layers.1.self_attn.k_norm.weight", AGAIN),
        ("qwen3", {"attention_bias": True}, "model.layers.1.self_attn.o_proj.bias", AGAIN),
        ("olmo2", {}, "model.layers.1.post_feedforward_layernorm.weight", AGAIN),
    ],
)
def test_a_base_that_lacks_a_tensor(
    family: str, settings: Any, name: str, cure: str, config_of: Any, make_model: Any, tmp_path: Path
) -> None:
    """mergekit fails half-way or writes it so; transformers fills the gap with random numbers."""
    config = config_of(family, model=settings, gate_mode="random", prompts=False)
    assert plan_moe(parse(config)).dropped  # control: as it is
    base = changed(make_model(family, **settings), tmp_path / "base", without=[name])
    (family_name,) = {
        "llama": ["Mixtral"],
        "mistral": ["Mixtral"],
        "qwen2": ["Qwen MoE"],
        "qwen3": ["Qwen3 MoE"],
        "olmo2": ["FlexOlmo"],
    }[family]
    assert problems_of({**config, "base_model": str(base)}) == [
        f"{base}: lacks {name}, which {family_name} needs; {cure}"
    ]


def test_tensors_of_other_shapes_than_the_configuration_says(
    config_of: Any, make_model: Any, tmp_path: Path
) -> None:
    import torch

    names = {
        "model.layers.1.self_attn.q_proj.weight": (64, 32),
        "model.embed_tokens.weight": (99, 32),
        "model.norm.weight": (1, 32),
    }
    tensors = {name: torch.ones(shape) for name, shape in names.items()}
    base = changed(make_model(), tmp_path / "base", **tensors)
    written = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(written | {"intermediate_size": 64}))
    config = {**config_of(gate_mode="random"), "base_model": str(base)}
    assert problems_of(config) == [
        f"{base}: its FFNs are 48 wide, its config.json says 64",
        f"{base}: model.embed_tokens.weight is of shape (99, 32), its config.json says (97, 32)",
        f"{base}: model.norm.weight is of shape (1, 32), its config.json says (32,)",
        f"{base}: model.layers.1.self_attn.q_proj.weight is of shape (64, 32), its config.json says (32, 32)",
    ]


def test_matrices_of_an_ffn_that_do_not_fit_together(config_of: Any, make_model: Any, tmp_path: Path) -> None:
    """A narrower gate projection would else have been padded as a narrower expert is."""
    import torch

    names = {"0.mlp.gate_proj": (40, 32), "1.mlp.up_proj": (48, 16), "2.mlp.down_proj": (30, 48)}
    tensors = {f"model.layers.{name}.weight": torch.ones(shape) for name, shape in names.items()}
    expert = changed(make_model(), tmp_path / "expert", **tensors)
    config = config_of(gate_mode="random")
    config["experts"][0]["source_model"] = str(expert)
    assert problems_of(config) == [
        f"{expert}: model.layers.0.mlp.gate_proj.weight is of shape (40, 32), not (48, 32)",
        f"{expert}: model.layers.1.mlp.up_proj.weight is of shape (48, 16), not (48, 32)",
        f"{expert}: model.layers.2.mlp.down_proj.weight is of shape (30, 48), not (32, 48)",
    ]


def test_phi3_of_another_number_of_heads(config_of: Any, make_model: Any, tmp_path: Path) -> None:
    import torch

    name = "model.layers.1.self_attn.qkv_proj.weight"
    base = changed(make_model("phi3"), tmp_path / "base", **{name: torch.ones(80, 32)})
    config = {**config_of("phi3", gate_mode="random"), "base_model": str(base)}
    assert message(AdmissionError, plan_moe, parse(config)) == (
        f"{base}: {name} has 80 rows, its config.json says 64."
    )


# ---------------------------------------------------------------- tokenizers and prompts


def test_a_base_without_a_tokenizer(config_of: Any, make_model: Any, built: Any) -> None:
    base = str(make_model(tokens=False))
    for mode in ("hidden", "cheap_embed"):
        config = {**config_of(gate_mode=mode), "base_model": base}
        assert problems_of(config) == [
            f"{base}: has no tokenizer to read the prompts with; save the tokenizer beside the model, or write a "
            "random gate_mode"
        ]
    assert built({**config, "gate_mode": "uniform_random"})  # which reads no prompts


def test_a_tokenizer_that_cannot_be_read(config_of: Any, make_model: Any, tmp_path: Path) -> None:
    from composer.mergekit_moe.writing import build_moe

    base = Path(shutil.copytree(make_model(), tmp_path / "base"))
    whole = (base / "tokenizer.json").read_bytes()
    config = {**config_of(gate_mode="cheap_embed"), "base_model": str(base)}
    (base / "tokenizer.json").write_bytes(whole[:1000])
    (problem,) = problems_of(config)
    assert problem.startswith(f"{base}: its tokenizer.json cannot be read (EOF while parsing ")
    assert problem.endswith("); save the tokenizer beside the model, or write a random gate_mode")
    (base / "tokenizer.json").write_bytes(whole)
    (base / "tokenizer_config.json").write_text('{"tokenizer_class":')
    text = message(AdmissionError, build_moe, plan_moe(parse(config)), tmp_path / "out")
    assert text.startswith(f"{base}: transformers cannot read its tokenizer (")
    assert text.endswith("); save the tokenizer beside the model, or write a random gate_mode.")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


@pytest.mark.parametrize("mode", ["hidden", "cheap_embed"])
def test_prompts_that_are_no_tokens_of_the_base(
    mode: str, config_of: Any, make_model: Any, tmp_path: Path
) -> None:
    from composer.mergekit_moe.writing import build_moe

    small = {"vocab_size": 60}
    config = config_of(gate_mode=mode, model=small)
    config["experts"][0]["positive_prompts"] = ["~~~"]
    text = message(DataError, build_moe, plan_moe(parse(config)), tmp_path / "out")
    assert text.startswith("The base's tokenizer makes token ")
    assert text.endswith(
        " of the prompts ['~~~'], and the base has embeddings of 60 tokens only. Take the tokenizer that belongs to "
        "the model."
    )
    config = config_of(gate_mode=mode)
    config["experts"][1]["negative_prompts"] = ["x", ""]  # the second would be read as nothing but padding
    assert message(DataError, build_moe, plan_moe(parse(config)), tmp_path / "out") == (
        "The base's tokenizer makes no token of the prompts ['']."
    )
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- nothing half-written


@pytest.mark.parametrize("when", ["gates", "tensors", "configuration"])
def test_a_failure_leaves_nothing(
    when: str, config_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import composer.mergekit_moe.gates
    import composer.mergekit_moe.writing as writing

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    plan = plan_moe(parse(config_of(gate_mode="random")))
    out = tmp_path / "place" / "out"
    out.parent.mkdir()
    if when == "gates":
        monkeypatch.setattr(composer.mergekit_moe.gates, "make_gates", fail)
    elif when == "tensors":
        monkeypatch.setattr(writing.Weight, "parts", lambda *_: (fail,))
    else:
        monkeypatch.setattr(writing, "_write_config", fail)
    with pytest.raises(BuildError, match="No space left while writing"):
        writing.build_moe(plan, out)
    assert list(out.parent.iterdir()) == []


def test_an_existing_folder_is_kept(config_of: Any, tmp_path: Path) -> None:
    from composer.mergekit_moe.writing import build_moe

    (tmp_path / "out").mkdir()
    plan = plan_moe(parse(config_of(gate_mode="random")))
    assert message(BuildError, build_moe, plan, tmp_path / "out") == (
        f"The output folder {tmp_path / 'out'} exists. Choose another name, or remove it first."
    )


def test_alike_rows_warn(config_of: Any, tmp_path: Path) -> None:
    from composer.mergekit_moe.writing import build_moe

    config = config_of(gate_mode="cheap_embed", experts=2)
    for entry, prompt in zip(config["experts"], ("aaaaaaaaaa", "aaaaaaaaaab"), strict=True):
        entry |= {"positive_prompts": [prompt], "negative_prompts": None}
    (warning,) = build_moe(plan_moe(parse(config)), tmp_path / "out")
    assert warning.startswith("layers 0, 1, 2: the experts' router rows are nearly alike (condition number ")
