"""Whole models that cannot be composed: one message that says what differs and what helps, exit code 2, nothing left.

Each mistake is made twice: at ``register``, where a whole model becomes an expert, and at ``build`` of a mergekit-moe
manifest that names it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

OTHERWISE = "fine-tune the base itself; if it is the same, save both with the same version of transformers"
BIASES = "the base has other biases; fine-tune the base as it is, or make a base of a model that has them"


def _settings(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _tensors(folder: Path, **changes: Any) -> None:
    path = folder / "model.safetensors"
    save_file({**load_file(path), **changes}, path, metadata={"format": "pt"})


def _more_tokens(folder: Path) -> None:
    _settings(folder, vocab_size=258)
    rows = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    _tensors(folder, **{"model.embed_tokens.weight": np.concatenate([rows, rows[:1]])})


def _bias(folder: Path) -> None:
    """As fine-tuning with a configuration that adds biases saves a model."""
    _settings(folder, attention_bias=True, mlp_bias=True)
    biases = {f"model.layers.{layer}.mlp.up_proj.bias": np.ones(48, np.float32) for layer in range(4)}
    _tensors(folder, **biases)


def _without_a_shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    halves = [f"model-{number:05}-of-00002.safetensors" for number in (1, 2)]
    where = {name: halves[number % 2] for number, name in enumerate(sorted(tensors))}
    save_file({n: t for n, t in tensors.items() if where[n] == halves[0]}, folder / halves[0])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _other_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    tokens = json.loads(path.read_text())
    tokens["model"]["vocab"] = {token: 256 - number for token, number in tokens["model"]["vocab"].items()}
    path.write_text(json.dumps(tokens))


SHARD = "model-00002-of-00002.safetensors"
MISTAKES: dict[str, tuple[Callable[[Path], None], str, str | None]] = {
    "another architecture": (
        lambda folder: _settings(folder, model_type="qwen3", architectures=["Qwen3ForCausalLM"]),
        "config.json in '{folder}' is not that of the base 'pico':\n"
        "  - model_type: the expert has 'qwen3', the base 'llama'; another architecture; fine-tune the base itself",
        "This mixture of {base} cannot be written:\n"
        "  - {folder}: model_type is 'qwen3', the base has 'llama'; experts must be fine-tuned from one architecture",
    ),
    "another function": (
        lambda folder: _settings(folder, rms_norm_eps=1e-5, hidden_act="gelu"),
        "config.json in '{folder}' is not that of the base 'pico':\n"
        f"  - hidden_act: the expert has 'gelu', the base 'silu'; {OTHERWISE}\n"
        f"  - rms_norm_eps: the expert has 1e-05, the base 1e-06; {OTHERWISE}",
        "This mixture of {base} cannot be written:\n"
        "  - {folder}: hidden_act is 'gelu', the base has 'silu'; experts must be fine-tuned from one architecture",
    ),
    "more tokens": (
        _more_tokens,
        "config.json in '{folder}' is not that of the base 'pico':\n"
        "  - vocab_size: the expert has 258, the base 257; the vocabularies must be one: take added tokens away again "
        "(resize_token_embeddings), or give the model the base's tokenizer with mergekit-tokensurgeon",
        None,
    ),
    "biases": (
        _bias,
        "config.json in '{folder}' is not that of the base 'pico':\n"
        f"  - attention_bias: the expert has True, the base nothing; {BIASES}"
        f"\n  - mlp_bias: the expert has True, the base nothing; {BIASES}",
        "This mixture of {base} cannot be written:\n"
        + "\n".join(
            f"  - {{folder}}: model.layers.{layer}.mlp.up_proj.bias is not zero, and the experts of no mixture class "
            "have biases; the base has none either, so fine-tune the base itself"
            for layer in range(4)
        ),
    ),
    "a missing shard": (
        _without_a_shard,
        f"model.safetensors.index.json lists 2 shards, and 1 of them are not in '{{folder}}'; download or copy them "
        f"there:\n  - {SHARD}: 19 tensors",
        f"{{folder}}: model.safetensors.index.json lists 2 shards, and 1 of them are not in '{{folder}}'; download or "
        f"copy them there:\n  - {SHARD}: 19 tensors",
    ),
}


@pytest.fixture
def model(base_folder: Path, tmp_path: Path) -> Path:
    """A fine-tuned copy of the base, fresh."""
    folder = Path(shutil.copytree(base_folder, tmp_path / "tuned"))
    random = np.random.default_rng(0)
    tensors = load_file(folder / "model.safetensors")
    _tensors(folder, **{n: t + random.normal(0, 0.01, t.shape).astype(t.dtype) for n, t in tensors.items()})
    return folder


@pytest.fixture
def register(run: Any, model: Path, registry: Path) -> Callable[[], Any]:
    def call() -> Any:
        options = ("--name", "acme/whole", "--base", "pico", "--domain", "law", "--license", "MIT")
        return run("register", model, *options, registry=registry)

    return call


@pytest.fixture
def build(run: Any, model: Path, base_folder: Path, tmp_path: Path) -> Callable[[], Any]:
    """Build a manifest of mergekit-moe that names the model."""

    def call() -> Any:
        sources = [{"source_model": str(model)}, {"source_model": str(base_folder)}]
        wish = {"base_model": str(base_folder), "gate_mode": "uniform_random", "experts": sources}
        (tmp_path / "moe.yml").write_text(yaml.safe_dump(wish))
        return run("build", tmp_path / "moe.yml", tmp_path / "mixture")

    return call


def _files(folder: Path) -> dict[str, int]:
    """What is published; the index of a registry may be opened, and so touched, in passing."""
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in {".json", ".safetensors", ".jsonl"}
    }


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_model_that_does_not_fit(
    mistake: str, model: Path, base_folder: Path, register: Any, build: Any, registry: Path, tmp_path: Path
) -> None:
    make, registering, building = MISTAKES[mistake]
    make(model)
    before = _files(registry)
    outcome = register()
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == f"Error: {registering.format(folder=model, base=base_folder)}\n"
    assert _files(registry) == before
    if building is None:
        return
    outcome = build()
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == f"Error: {building.format(folder=model, base=base_folder)}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moe.yml", "registry", "tuned"]


def test_pickles(model: Path, register: Any, build: Any, registry: Path, run: Any, tmp_path: Path) -> None:
    _pickled(model)
    before = _files(registry)
    text = (
        'pytorch_model.bin is a pickle, which is never read; convert it where you trust it: python -c "from '
        f"transformers import AutoModelForCausalLM as M; M.from_pretrained('{model}', dtype='auto')"
        ".save_pretrained('NEW_FOLDER')\""
    )
    outcome = register()
    assert outcome.code == 2
    assert outcome.err.startswith(f"Error: '{model}' is not an expert folder: {text}. Looked for:\n")
    for outcome in (build(), run("base", "add", model, "--name", "other", registry=registry)):
        assert (outcome.code, outcome.err) == (2, f"Error: '{model}' holds no safetensors: {text}\n")
    assert _files(registry) == before
    assert not (tmp_path / "mixture").exists()


def test_another_tokenizer(model: Path, register: Any, build: Any, registry: Path) -> None:
    """Refused among owners; a mixture of mergekit's kind has the base's, and says so, as for more tokens."""
    _other_tokenizer(model)
    before = _files(registry)
    outcome = register()
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(f"Error: The tokenizer in '{model}' (tokenizer.json, sha256:")
    assert outcome.err.endswith(
        "If only settings were saved differently (padding, truncation, template), put the base's own file there; "
        "if the tokens differ, give the model the base's tokenizer with mergekit-tokensurgeon and train it again.\n"
    )
    assert _files(registry) == before
    outcome = build()
    assert (outcome.code, outcome.err) == (
        0,
        f"Warning: {model} has another tokenizer than the base; the mixture has the base's. To align them, fine-tune "
        "it with the base's tokenizer, or give the base this model's with mergekit-tokensurgeon; changing this model's "
        "embeddings alone does nothing here, as only its FFNs are read.\n",
    )


def test_more_tokens_in_a_mixture(model: Path, build: Any) -> None:
    _more_tokens(model)
    outcome = build()
    assert (outcome.code, outcome.err) == (
        0,
        f"Warning: {model} has embeddings of 258 tokens, the base of 257, with one and the same tokenizer: the mixture "
        "has the base's. Nothing is to be aligned if the rest are rows of no token.\n",
    )


def test_the_base_again(model: Path, base_folder: Path, register: Any, build: Any) -> None:
    shutil.copy(base_folder / "model.safetensors", model)
    outcome = register()
    assert outcome.code == 0
    assert outcome.err.startswith(
        f"Warning: acme/whole: every tensor in '{model}' is byte for byte the base's: this expert changes nothing. Is "
        "it the folder that training wrote?\n"
    )
    outcome = build()
    assert (outcome.code, outcome.err) == (
        0,
        f"Warning: {model}: every FFN is byte for byte the base's, so this expert changes nothing. Is it the folder "
        "that training wrote?\n",
    )


@pytest.mark.parametrize(
    ("trunk", "problem"),
    [
        (
            {"method": "ties", "parameters": {"densty": 0.5}},
            "upcycle.trunk: parameters: method 'ties' has no 'densty'; did you mean 'density'?",
        ),
        (
            {"method": "ties", "parameters": {"density": "half"}},
            "upcycle.trunk: parameters: 'density' is 'half'; a number is needed",
        ),
        (
            {"method": "ties", "parameters": {"density": [0.5, 0.2]}},
            "upcycle.trunk.parameters: 'density' is a list; write one value for all layers, or values by owner/expert",
        ),
        (
            {"method": "ties", "paramters": {}},
            "upcycle.trunk.paramters: unknown key; did you mean 'parameters'? Allowed: method, parameters, weights",
        ),
        (
            "ties",
            "upcycle.trunk: 'ties' is neither 'frozen' nor 'average'; other ways to merge are mappings, for instance "
            "{method: ties, parameters: {density: 0.5}}",
        ),
    ],
    ids=["unknown", "no number", "a list", "misspelt", "no mapping"],
)
def test_settings_of_a_merge(trunk: Any, problem: str, run: Any, filled: Path, tmp_path: Path) -> None:
    wish = {"name": "x", "recipe": "merge", "base": "pico", "experts": ["acme/contracts", "hosp/icd"]}
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump({**wish, "upcycle": {"trunk": trunk}}))
    outcome = run("build", tmp_path / "merge.yaml", tmp_path / "merged", registry=filled)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.splitlines()[1:] == [f"  - {problem}"]
    assert [path.name for path in tmp_path.iterdir()] == ["merge.yaml"]


def test_biases_of_a_base_that_no_class_holds(run: Any, model: Path, tmp_path: Path) -> None:
    _settings(model, attention_bias=True)
    rows = {"q": 32, "k": 16, "v": 16, "o": 32}
    _tensors(
        model,
        **{
            f"model.layers.{layer}.self_attn.{role}_proj.bias": np.ones(count, np.float32)
            for layer in range(4)
            for role, count in rows.items()
        },
    )
    sources = [{"source_model": str(model)} for _ in range(2)]
    wish = {"base_model": str(model), "gate_mode": "random", "experts": sources}
    (tmp_path / "moe.yml").write_text(yaml.safe_dump(wish))
    outcome = run("build", tmp_path / "moe.yml", tmp_path / "mixture")
    kept = "`architecture: qwen` keeps biases of q, k and v"
    cure = {
        "k": f"; {kept}",
        "o": ": no mixture class has a bias behind attention; `coterie build --composed` keeps it in a coterie model",
        "q": f"; {kept}",
        "v": f"; {kept}",
    }
    assert (outcome.code, outcome.err) == (
        2,
        f"Error: This mixture of {model} cannot be written:\n"
        + "".join(
            f"  - {model}: model.layers.{layer}.self_attn.{role}_proj.bias has no place in Mixtral{what}\n"
            for layer in range(4)
            for role, what in cure.items()
        ),
    )
    assert not (tmp_path / "mixture").exists()


def test_statistics_of_another_architecture(
    model: Path, run: Any, registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused by the folder's own name, before the text is read."""
    _settings(model, model_type="qwen3", architectures=["Qwen3ForCausalLM"])
    (tmp_path / "own.txt").write_text("a text")
    monkeypatch.setattr("pipelines.train.public_routing", lambda *_, **__: pytest.fail("the text was read"))
    options = ("--name", "acme/whole", "--domain", "law", "--license", "MIT", "--text", tmp_path / "own.txt")
    outcome = run("register", model, *options, registry=registry)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(f"Error: config.json in '{model}' is not that of the base 'pico':\n")


def test_what_is_merged_routes_nothing(run: Any, filled: Path, tmp_path: Path) -> None:
    wish = {"name": "x", "recipe": "soup", "base": "pico", "experts": ["acme/contracts", "hosp/icd"]}
    (tmp_path / "soup.yaml").write_text(yaml.safe_dump(wish))
    outcome = run("plan", tmp_path / "soup.yaml", registry=filled)
    assert re.search(r"^router: +-$", outcome.out, re.MULTILINE), outcome.out
    assert run("build", tmp_path / "soup.yaml", tmp_path / "soup", registry=filled).code == 0
    assert "Recipe `soup`. Base\n" in (tmp_path / "soup" / "README.md").read_text()
    outcome = run("verify-optout", tmp_path / "soup", "--owner", "acme", registry=filled)
    assert (outcome.code, outcome.err) == (
        0,
        "Note: a request cannot leave anybody out of this composition, so that door has no row.\n",
    )
