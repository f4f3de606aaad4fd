"""Several processes, as Accelerate launches them, take the same step as one."""

from __future__ import annotations

import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

import composer
from pipelines.tune.devices import OneDevice, compute_dtype, find_devices
from pipelines.tune.job import LoadBalancing
from pipelines.tune.objective import Objective


def _step(model: Any, ids: torch.Tensor, *, micro_batch: int, devices: OneDevice) -> dict[str, torch.Tensor]:
    """Loss and gradients of one step."""
    objective = Objective(
        model,
        ids,
        parameters=[p for p in model.parameters() if p.requires_grad],
        load_balancing=LoadBalancing(weight=0.5, over="global_batch"),
        router_z_loss=0.25,
        micro_batch=micro_batch,
        devices=devices,
    )
    loss = objective.accumulate(torch.arange(len(ids)))
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": torch.tensor(loss), **found}


def _process(rank: int, port: int, model: Any, ids: torch.Tensor, out: Path) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    AcceleratorState._reset_state(
        reset_partial_state=True
    )  # what the parent may have found out before the fork
    devices = find_devices("auto", batch_size=len(ids))
    assert (devices.count, devices.is_main, devices.device.type) == (2, rank == 0, "cpu")
    found = _step(model, ids, micro_batch=1, devices=devices)
    save_file(found, out / f"{rank}.safetensors")
    devices.wait()
    os._exit(0)  # without the cleaning up that belongs to the parent


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_two_processes_take_the_step_of_one(pico: Any, tmp_path: Path) -> None:
    """With a window each at a time, they balance over the windows that one process sees as pairs."""
    model = composer.load(pico.composed("stacked", scorer="learned", context="token", top_k=2))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("rows" in name)
    ids = pico.prompts(rows=4, length=8)
    forked = multiprocessing.get_context("fork")  # torch is imported already, and importing it takes seconds
    port = _free_port()
    both = [forked.Process(target=_process, args=(rank, port, model, ids, tmp_path)) for rank in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join(timeout=100)
    assert [process.exitcode for process in both] == [0, 0]
    expected = _step(model, ids, micro_batch=2, devices=OneDevice("cpu"))
    assert len(expected) > 2
    for rank in (0, 1):
        found = load_file(tmp_path / f"{rank}.safetensors")
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-4, check_dtype=False)


def test_products_are_in_bfloat16_where_the_device_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert compute_dtype(None, gpu) == torch.bfloat16
    assert compute_dtype("float32", gpu) == torch.float32
    assert compute_dtype(None, cpu) == torch.float32
    assert compute_dtype("bfloat16", cpu) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert compute_dtype(None, gpu) == torch.float32
    with pytest.raises(
        Exception, match=r"^dtype: cuda has no bfloat16; leave dtype out or write float32\.$"
    ) as caught:
        compute_dtype("bfloat16", gpu)
    assert caught.value.exit_code == 2  # type: ignore[attr-defined]
