"""Where a job is computed: how the device is chosen and refused, that every tensor is on it, and GPU against CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from experts.errors import CoterieError, ManifestError, TrainingError
from pipelines.devices import deterministic, find_device
from pipelines.train.anchor import compute_dtype
from pipelines.train.planning import plan_jobs
from pipelines.train.worker import check_device, train_job

COORDINATED: dict[str, Any] = {
    "kind": "ffn",
    "coordination": True,
    "public_fraction": 0.3,
    "row_negatives": 0.1,
}


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that makes torch say that it has so many GPUs."""

    def pretend(count: int, *, built: bool = True, bfloat16: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bfloat16)
        monkeypatch.setattr(torch.version, "cuda", "12.8" if built else None)
        monkeypatch.setattr(torch, "__version__", "2.13.0")

    return pretend


def test_auto_is_a_gpu_where_there_is_one(gpus):
    gpus(0)
    assert find_device("auto") == torch.device("cpu")
    gpus(2)
    assert [str(find_device(name)) for name in ("auto", "cpu", "cuda", "cuda:1")] == [
        "cuda",
        "cpu",
        "cuda",
        "cuda:1",
    ]


ADVICE = " Write device: cpu, or auto, which takes what there is."


@pytest.mark.parametrize(
    ("given", "there", "built", "message"),
    [
        ("cuda", 0, False, "cuda needs a torch with CUDA; the installed one, 2.13.0, has none." + ADVICE),
        (
            "cuda:1",
            0,
            True,
            "cuda:1 is not there: torch finds no GPU on this machine (nvidia-smi lists what the driver sees, "
            "CUDA_VISIBLE_DEVICES what processes may use)." + ADVICE,
        ),
        ("cuda:2", 2, True, "cuda:2 is not there; this machine has cuda:0, cuda:1." + ADVICE),
        ("gpu", 2, True, "'gpu' found; write auto, cpu, cuda, or a GPU's number as in cuda:1."),
    ],
)
def test_a_device_that_is_not_there(gpus, given, there, built, message):
    gpus(there, built=built)
    with pytest.raises(ManifestError) as caught:
        find_device(given)
    assert str(caught.value) == f"device: {message}"
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("given", ["gpu", "mps", "cuda:", "cuda:01", "CUDA", "cuda:-1"])
def test_a_jobs_device_is_spelt_in_one_of_four_ways(make_job, given):
    with pytest.raises(CoterieError) as caught:
        make_job(device=given)
    assert f"device: '{given}' found; write auto, cpu, cuda, or a GPU's number as in cuda:1" in str(
        caught.value
    )


def test_it_is_checked_before_anything_else(make_job, tmp_path, gpus):
    gpus(1)
    job = make_job(device="cuda:3", base=str(tmp_path / "nothing"))
    for run in (
        lambda: train_job(job, out=tmp_path / "out"),
        lambda: plan_jobs([job], out_dir=tmp_path / "out"),
    ):
        with pytest.raises(ManifestError, match=r"^device: cuda:3 is not there; this machine has cuda:0\."):
            run()
    assert not job.workdir.exists()


def test_a_gpu_without_bfloat16(make_job, gpus):
    gpus(1, bfloat16=False)
    with pytest.raises(
        ManifestError, match=r"^dtype: cuda has no bfloat16; leave dtype out or write float32"
    ):
        check_device(make_job(dtype="bfloat16"))
    assert check_device(make_job(dtype="bfloat16", device="cpu")) == torch.device("cpu")


def test_an_anchor_in_bfloat16_is_computed_in_it_on_a_gpu(gpus):
    from types import SimpleNamespace

    small = {"w": SimpleNamespace(shape=(8, 8))}
    stored = {name: SimpleNamespace(dtype=name, tensors=small) for name in ("BF16", "F32", "F16")}
    gpu = torch.device("cuda")
    gpus(1)
    assert {name: compute_dtype(base, gpu) for name, base in stored.items()} == {  # type: ignore[arg-type]
        "BF16": "bfloat16",
        "F32": "float32",
        "F16": "float32",
    }
    gpus(1, bfloat16=False)
    assert compute_dtype(stored["BF16"], gpu) == "float32"  # type: ignore[arg-type]


def test_it_is_no_part_of_what_an_expert_is(make_job):
    """The job's digest decides what is trained again; the card says nothing of the machine."""
    cpu, gpu = make_job(device="cpu"), make_job(device="cuda")
    assert cpu.digest() == gpu.digest() == make_job().digest()
    assert cpu.card_settings() == gpu.card_settings()


def test_the_owners_processes_are_told_the_device_that_was_found(make_job, gpus, tmp_path):
    from contextlib import ExitStack

    from pipelines.train.planning import prepare

    gpus(1)
    jobs = [
        make_job(name="acme/a"),
        make_job(name="acme/b", device="cpu"),
        make_job(name="bell/c", device="cuda:0"),
    ]
    with ExitStack() as stack:
        tasks = prepare(jobs, out_dir=tmp_path, registry=None, stack=stack)
    assert [task.device for task in tasks] == ["cuda", "cpu", "cuda:0"]


def test_the_owners_ray_counts_on_the_gpu_and_leaves_its_number_alone(monkeypatch, tmp_path):
    import os
    import sys
    from types import SimpleNamespace

    from pipelines.train.ray_runner import OwnerRay

    seen: dict[str, Any] = {}
    stand_in = SimpleNamespace(
        init=lambda **settings: seen.update(init=settings["num_gpus"]),
        remote=lambda **options: seen.update(task=options["num_gpus"]) or (lambda function: function),
    )
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setitem(sys.modules, "ray", stand_in)
    OwnerRay(tmp_path, cpus=1, gpus=1)
    assert seen == {"init": 1, "task": 1}
    assert os.environ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] == "1"


def test_a_gpu_whose_memory_is_too_small(make_job, tmp_path, monkeypatch):
    import pipelines.train.loop

    def full(**_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(pipelines.train.loop, "train", full)
    with pytest.raises(TrainingError) as caught:
        train_job(make_job(), out=tmp_path / "out", threads=1)
    assert str(caught.value) == (
        "The memory of cpu is too small. Lower batch_size, sequence_length or cache_gigabytes, train fewer owners at "
        "once, or write device: cpu."
    )


def test_on_a_cpu_nothing_is_asked_of_the_kernels():
    with deterministic(torch.device("cpu")):
        assert not torch.are_deterministic_algorithms_enabled()
    with deterministic(torch.device("cuda")):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("fields", [{}, COORDINATED], ids=["lora", "coordinated"])
def test_no_step_mixes_the_models_device_with_the_cpu(make_job, texts, monkeypatch, fields):
    """On torch's device without numbers, which refuses a product with a tensor on the CPU as a GPU does."""
    import transformers.masking_utils

    from pipelines.train.anchor import load_anchor, resolve_base
    from pipelines.train.corpus import read_corpus
    from pipelines.train.expert_run import ExpertRun
    from pipelines.train.states import SplitDecoder

    with pytest.raises(RuntimeError, match="device"):  # the control
        torch.zeros(3, device="meta") + torch.zeros(3)
    # both look at numbers
    monkeypatch.setattr(transformers.masking_utils, "find_packed_sequence_indices", lambda _: None)
    monkeypatch.setattr(SplitDecoder, "agrees", lambda *_: True)
    job = make_job(
        **fields, public=str(texts["public"]), row_init="random" if fields else "anchor", statistics=False
    )
    with resolve_base(job.base) as base:
        model, tokenizer = load_anchor(base, dtype="float32", device="meta")
        run = ExpertRun(job, base=base, model=model, corpus=read_corpus(job, tokenizer))
    assert [done for done in run.prepare_states()][-1] == len(run.corpus.ids)
    run.attach()
    loss = run.loss(torch.tensor([0, len(run.corpus.own)]))
    loss.backward()
    trained = [*run.parameters, *run.gate_parameters]
    assert {tensor.device.type for p in trained for tensor in (loss, p, p.grad)} == {"meta"}
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    torch.optim.AdamW(trained).step()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "fields", [{}, COORDINATED, {"kind": "dense", "rank": 16}], ids=["lora", "ffn", "dense"]
)
def test_a_gpu_trains_what_a_cpu_trains(make_job, texts, tmp_path: Path, fields):
    """Float32 on both; sums run in another order, so tensors agree within 1e-3 and losses within 1e-4 after 8 steps."""
    given = {**fields, "public": str(texts["public"])} if "public_fraction" in fields else fields
    made, metrics = {}, {}
    for device in ("cpu", "cuda"):
        job = make_job(**given, device=device, held_out=0.2, workdir=str(tmp_path / f"work-{device}"))
        out = train_job(job, out=tmp_path / device, threads=1)
        files = sorted(path.name for path in out.glob("*.safetensors"))
        made[device] = {file: load_file(out / file) for file in files}
        metrics[device] = json.loads((out / "card.json").read_text())["metrics"]
    assert made["cpu"].keys() == made["cuda"].keys()
    for file, tensors in made["cpu"].items():
        assert tensors.keys() == made["cuda"][file].keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(made["cuda"][file][name], tensor, atol=1e-3, rtol=1e-3)
    assert metrics["cuda"] == pytest.approx(metrics["cpu"], abs=1e-4)


@pytest.mark.gpu
def test_a_job_that_is_cut_short_on_a_gpu_ends_with_the_same_bytes(make_job, texts, tmp_path: Path):
    whole = make_job(
        **COORDINATED, public=str(texts["public"]), device="cuda", workdir=str(tmp_path / "whole")
    )
    expected = train_job(whole, out=tmp_path / "expected", threads=1)

    def stop(report: Any) -> None:
        if report.stage == "training" and report.scalars.get("step") == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_job(whole, out=tmp_path / "out", workdir=tmp_path / "cut", progress=stop, threads=1)
    resumed = train_job(whole, out=tmp_path / "out", workdir=tmp_path / "cut", threads=1)
    for path in expected.iterdir():
        assert (resumed / path.name).read_bytes() == path.read_bytes(), path.name
