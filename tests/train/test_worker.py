"""A whole job on pico anchors: what is written, that others can load it, and that it can be cut short."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from experts.admission import check_expert, check_files
from experts.base import BaseDescription
from experts.errors import CardError, CoterieError, ManifestError, TrainingError
from experts.package import read_package
from experts.routing_artifacts import RoutingArtifacts
from pipelines.train.worker import train_job

FAMILIES = ("llama", "qwen3", "olmo2", "gemma3", "gpt_neox")

# PEFT 0.21 asks transformers 5.23 for a property that was renamed
asks_for_a_renamed_property = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)


def _bytes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _model(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))


@asks_for_a_renamed_property
@pytest.mark.parametrize("family", FAMILIES)
def test_a_low_rank_expert_is_what_peft_loads(make_job, anchor, tmp_path, family, ids):
    from peft import PeftModel

    out = train_job(make_job(family, alpha=8), out=tmp_path / "out", threads=1)
    files = sorted(path.name for path in out.iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors", "card.json", "routing.safetensors"]
    tensors = load_file(out / "adapter_model.safetensors")
    assert any(bool(value.any()) for name, value in tensors.items() if "lora_B" in name)
    # the oracle: W + (alpha / rank) B A written into the anchor by hand
    expected = _model(anchor(family))
    state = expected.state_dict()
    prefix = "base_model.model."
    for name in [n for n in tensors if n.endswith("lora_A.weight")]:
        b = tensors[name.replace("lora_A", "lora_B")]
        state[name.removeprefix(prefix).replace("lora_A.weight", "weight")] += 8 / 4 * (b @ tensors[name])
    loaded = PeftModel.from_pretrained(_model(anchor(family)), out).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(input_ids=ids).logits, expected(input_ids=ids).logits, atol=1e-5, rtol=1e-5
        )
        assert not torch.allclose(
            loaded(input_ids=ids).logits, _model(anchor(family))(input_ids=ids).logits, atol=1e-4
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_expert_has_the_anchors_own_names(make_job, anchor, tmp_path, family):
    out = train_job(
        make_job(family, kind="ffn", layers=[1, 3], learning_rate=1e-2), out=tmp_path / "out", threads=1
    )
    base = BaseDescription.from_folder(anchor(family))
    wanted = {spec.name for layer in (1, 3) for spec in base.ffn_linears(layer).values()}
    tensors = load_file(out / "ffn.safetensors")
    state = _model(anchor(family)).state_dict()
    assert {name.rpartition(".")[0] for name in tensors} == wanted
    assert all(not torch.equal(value, state[name]) for name, value in tensors.items())
    assert all(value.shape == state[name].shape for name, value in tensors.items())


@asks_for_a_renamed_property
def test_the_expert_is_the_model_that_was_trained(make_job, anchor, tmp_path, monkeypatch, ids):
    """What is measured on held-out text at the end is what PEFT gives for the written folder."""
    from peft import PeftModel

    from pipelines.train.corpus import read_corpus

    job = make_job(steps=20, held_out=0.2)
    seen = []
    out = train_job(job, out=tmp_path / "out", progress=seen.append, threads=1)
    from transformers import AutoTokenizer

    corpus = read_corpus(job, AutoTokenizer.from_pretrained(anchor()))
    held_out = torch.from_numpy(corpus.held_out.ids).long()

    def nll(model):
        with torch.no_grad():
            logits = model(input_ids=held_out).logits[:, :-1]
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), held_out[:, 1:].flatten()))

    metrics = json.loads((out / "card.json").read_text())["metrics"]
    assert metrics["anchor_held_out_nll"] == pytest.approx(nll(_model(anchor())), abs=1e-4)
    assert metrics["held_out_nll"] == pytest.approx(
        nll(PeftModel.from_pretrained(_model(anchor()), out)), abs=1e-4
    )
    assert seen[-1].scalars["held_out_nll"] == metrics["held_out_nll"]


def test_training_learns_something(make_job, tmp_path):
    losses = []
    train_job(
        make_job(kind="ffn", layers="all", steps=60, learning_rate=3e-3, held_out=0.2),
        out=tmp_path / "out",
        progress=lambda p: losses.append(p.scalars),
        threads=1,
    )
    final = losses[-1]
    assert final["held_out_nll"] < final["anchor_held_out_nll"] - 0.2


def test_what_the_card_says(make_job, anchor, tmp_path):
    job = make_job(description="Contracts.", data_statement="Forty made-up documents.", steps=3)
    out = train_job(job, out=tmp_path / "out", version=4, threads=1)
    card = read_package(out)
    base = BaseDescription.from_folder(anchor())
    assert (card.name, card.version, card.owner, card.domain) == ("acme/contracts", 4, "acme", "law")
    assert card.base.fingerprint == base.fingerprint
    assert card.layers == (2, 3)
    assert card.rank == 4
    assert (card.training.method, card.training.steps, card.training.tokens) == ("lora", 3, 3 * 2 * 32)
    assert card.training.settings["learning_rate"] == 2e-3
    assert card.training.data_statement == "Forty made-up documents."
    text = (out / "card.json").read_text() + (out / "adapter_config.json").read_text()
    assert str(tmp_path) not in text
    assert "law.jsonl" not in text
    check_files(out, card)
    check_expert(out, card, base)


@pytest.mark.parametrize("normalization", ["rms", "none"])
@pytest.mark.parametrize("skip_first", [False, True])
def test_the_statistics_are_sums_over_the_training_windows(
    make_job, anchor, tmp_path, normalization, skip_first
):
    from transformers import AutoTokenizer

    from pipelines.train.corpus import read_corpus

    job = make_job(statistics={"normalization": normalization, "skip_first": skip_first}, steps=3)
    out = train_job(job, out=tmp_path / "out", threads=1)
    info = read_package(out).routing
    statistics = RoutingArtifacts.load(out, info).statistics
    ids = torch.from_numpy(read_corpus(job, AutoTokenizer.from_pretrained(anchor())).own.ids).long()
    with torch.no_grad():
        states = _model(anchor())(input_ids=ids, output_hidden_states=True).hidden_states[2]
    x = states[:, int(skip_first) :].flatten(0, 1).double().numpy()
    if normalization == "rms":
        x = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-6)
    assert (info.statistics.layer, info.statistics.normalization) == (2, normalization)
    assert statistics.count == len(x) == info.statistics.tokens
    np.testing.assert_allclose(statistics.sum, x.sum(axis=0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(statistics.scatter, x.T @ x, rtol=1e-5, atol=1e-5)


def test_without_statistics_there_is_no_routing_artefact(make_job, tmp_path):
    out = train_job(make_job(statistics=False, steps=2), out=tmp_path / "out", threads=1)
    assert read_package(out).routing is None
    assert not (out / "routing.safetensors").exists()


def test_coordinated_training_freezes_the_public_row_and_ships_its_own(make_job, texts, tmp_path):
    """F7 on a whole job: only the owner's halves move."""
    from experts.routing_artifacts import RoutingInfo
    from pipelines.train.routing import public_routing
    from pipelines.train.rows import rows_digest

    job = make_job(
        "olmo2",
        coordination=True,
        public=str(texts["public"]),
        public_fraction=0.5,
        row_negatives=1.0,
        weight_decay=0.1,
        learning_rate=1e-2,
        steps=12,
    )
    out = train_job(job, out=tmp_path / "out", threads=1)
    info = read_package(out).routing
    artifacts = RoutingArtifacts.load(out, info)
    assert (info.rows.layers, info.rows.has_bias, info.rows.init) == ((2, 3), True, "anchor")
    for layer in (2, 3):
        weight, bias = artifacts.row(layer)
        assert weight.shape == (32,)
        assert -1 < bias[0] < 0
    # against the same rows, published with the base by anybody from the same public windows
    from pipelines.train.anchor import resolve_base
    from pipelines.train.windows import read_documents

    with resolve_base(job.base) as base:
        folder = public_routing(
            base,
            read_documents([texts["public"]]),
            out=tmp_path / "public",
            layer=2,
            rows_layers=(2, 3),
            sequence_length=32,
            windows=64,
        )
    public = RoutingInfo.model_validate_json((folder / "routing.json").read_bytes())
    rows = {n: torch.from_numpy(np.array(RoutingArtifacts.load(folder, public).row(n)[0])) for n in (2, 3)}
    assert info.rows.public_digest == rows_digest(rows)


def test_rows_of_the_base_are_preferred_and_owners_of_other_layers_agree_on_them(make_job, texts, tmp_path):
    from dataclasses import replace

    from experts.routing_artifacts import RoutingInfo
    from pipelines.train.anchor import resolve_base
    from pipelines.train.routing import public_routing
    from pipelines.train.windows import read_documents

    digests = []
    for number, layers in enumerate(([2, 3], [1, 3])):
        job = make_job(coordination=True, layers=layers, steps=2, row_init="random")
        with resolve_base(job.base) as base:
            folder = tmp_path / f"public{number}"
            public_routing(
                base, read_documents([texts["public"]]), out=folder, layer=1, rows_layers=(1, 2, 3), windows=9
            )
            info = RoutingInfo.model_validate_json((folder / "routing.json").read_bytes())
            base = replace(base, routing_file=folder / info.file, routing_info=info)
            out = train_job(job, out=tmp_path / f"out{number}", base=base, threads=1)
        digests.append(read_package(out).routing.rows.public_digest)
    assert digests[0] == digests[1]


def test_coordination_without_any_public_row(make_job, tmp_path):
    with pytest.raises(ManifestError) as caught:
        train_job(make_job(coordination=True), out=tmp_path / "out", threads=1)
    assert str(caught.value) == (
        "coordination needs a public row: the base has no public routing artefact with rows for layers 2-3. Give "
        "public text, or attach such an artefact to the base."
    )


def test_a_family_that_cannot_be_cut_is_trained_whole(make_job, tmp_path, monkeypatch):
    from pipelines.train.states import SplitDecoder

    expected = train_job(make_job(statistics=False), out=tmp_path / "cut", threads=1)
    monkeypatch.setattr(SplitDecoder, "agrees", lambda self, ids: False)
    reports = []
    out = train_job(make_job(statistics=False), out=tmp_path / "out", progress=reports.append, threads=1)
    assert reports[-1].scalars["cached"] == 0
    for name, value in load_file(out / "adapter_model.safetensors").items():
        torch.testing.assert_close(
            value, load_file(expected / "adapter_model.safetensors")[name], atol=1e-5, rtol=1e-4
        )


def test_an_interrupted_job_ends_with_the_same_bytes(make_job, tmp_path):
    settings = {"coordination": True, "row_init": "random", "steps": 10}
    whole = train_job(make_job(**settings), out=tmp_path / "whole", threads=1)

    def interrupt(progress):
        if progress.scalars.get("step", 0) >= 1 and progress.stage == "training":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_job(make_job(**settings), out=tmp_path / "out", progress=interrupt, threads=1)
    assert not (tmp_path / "out").exists()
    reports = []
    again = train_job(make_job(**settings), out=tmp_path / "out", progress=reports.append, threads=1)
    assert reports[-1].scalars["resumed_from"] >= 1
    assert _bytes(again) == _bytes(whole)
    assert list((tmp_path / "private" / "acme--contracts").glob("checkpoint*")) == []


def test_a_checkpoint_of_another_text_is_not_resumed(make_job, texts, tmp_path):
    def interrupt(progress):
        if progress.scalars.get("step", 0) >= 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_job(make_job(), out=tmp_path / "out", progress=interrupt, threads=1)
    reports = []
    train_job(make_job(data=str(texts["code"])), out=tmp_path / "out", progress=reports.append, threads=1)
    assert reports[-1].scalars["resumed_from"] == 0


_KILLED = """
import os
import signal
import sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from pipelines.train import worker
from pipelines.train.job import DomainJob

worker._Reporter._INTERVAL = 0.0  # of every step
job = DomainJob.model_validate_json(Path(sys.argv[1]).read_text())

def end(report):
    if report.stage == "training" and list(job.directory.glob("checkpoint-*.safetensors")):
        os.kill(os.getpid(), signal.SIGKILL)

worker.train_job(job, out=Path(sys.argv[2]), threads=1, progress=end)
"""


def test_a_killed_job_resumes_to_the_same_bytes(make_job, tmp_path):
    job = make_job(steps=30, checkpoint_every=10)
    (tmp_path / "job.json").write_text(job.model_dump_json())
    process = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path / "job.json"), str(tmp_path / "out")],
        timeout=200,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    reports = []
    resumed = train_job(job, out=tmp_path / "out", progress=reports.append, threads=1)
    assert reports[-1].scalars["resumed_from"] == 10
    whole = train_job(
        job.model_copy(update={"workdir": tmp_path / "other"}), out=tmp_path / "whole", threads=1
    )
    assert _bytes(resumed) == _bytes(whole)


def test_an_output_folder_that_exists(make_job, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(CoterieError) as caught:
        train_job(make_job(), out=tmp_path / "out", threads=1)
    assert str(caught.value) == (
        f"'{tmp_path / 'out'}' exists already. Choose another folder for acme/contracts, or remove it."
    )
    assert caught.value.exit_code == 2


def test_a_field_that_the_card_refuses_is_known_before_training(make_job, tmp_path):
    with pytest.raises(CardError) as caught:
        train_job(make_job(data_statement="See /home/ann/files"), out=tmp_path / "out", threads=1)
    assert "training.data_statement contains the absolute path" in str(caught.value)


def test_a_job_that_is_running_already(make_job, tmp_path):
    from filelock import FileLock

    job = make_job()
    job.directory.mkdir(parents=True)
    with FileLock(job.directory / "lock"), pytest.raises(TrainingError) as caught:
        train_job(job, out=tmp_path / "out", threads=1)
    assert str(caught.value) == "acme/contracts is being trained already. Wait for it, or stop it."


def test_the_owners_folder_is_closed_to_others(make_job, tmp_path):
    job = make_job(steps=2)
    train_job(job, out=tmp_path / "out", threads=1)
    assert job.directory.stat().st_mode & 0o777 == 0o700


def test_a_base_that_is_no_checkpoint(make_job, tmp_path):
    job = make_job().model_copy(update={"base": str(tmp_path)})
    with pytest.raises(ManifestError) as caught:
        train_job(job, out=tmp_path / "out", threads=1)
    assert str(caught.value) == (
        f"base '{tmp_path}' is not a checkpoint folder: there is no config.json in it."
    )


def test_a_base_name_without_a_registry(make_job, tmp_path):
    with pytest.raises(ManifestError) as caught:
        train_job(make_job().model_copy(update={"base": "smollm2"}), out=tmp_path / "out", threads=1)
    assert str(caught.value) == (
        "base 'smollm2' is a name and no registry is given. Name a registry, or the path of a checkpoint folder."
    )
