"""The stacked layer: PEFT's numbers, slot 0 the base's own bits, rows independent of each other, threads too."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from composer.retrieval.request import EncodingPass, Slots, encoding_pass
from composer.retrieval.stacked import Factors, StackedLoRA

ROWS, POSITIONS, WIDTH, OUT = 6, 5, 16, 24


@pytest.fixture(scope="module")
def layer() -> StackedLoRA:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    torch.manual_seed(0)
    factors = {1: Factors(draw(2, WIDTH), draw(OUT, 2), 2.0), 3: Factors(draw(4, WIDTH), draw(OUT, 4), 0.5)}
    return StackedLoRA(nn.Linear(WIDTH, OUT), factors, num_slots=3).requires_grad_(False)


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn((ROWS, POSITIONS, WIDTH), generator=torch.Generator().manual_seed(1))


def run(layer: StackedLoRA, x: torch.Tensor, *slots: int) -> torch.Tensor:
    with encoding_pass(EncodingPass(slots=Slots.of(slots, x.device))):
        return layer(x)


def test_r13_slot_0_is_the_base_bit_for_bit(layer: StackedLoRA, x: torch.Tensor) -> None:
    base = layer.base(x)
    assert torch.equal(layer(x), base)
    assert torch.equal(run(layer, x, *[0] * ROWS), base)
    mixed = run(layer, x, 0, 1, 0, 3, 0, 2)
    assert torch.equal(mixed[[0, 2, 4]], base[[0, 2, 4]])
    assert torch.equal(mixed[5], base[5])  # slot 2 has no update here
    assert not torch.equal(mixed[[1, 3]], base[[1, 3]])


def test_r13_a_mixed_batch_is_the_separate_ones_bit_for_bit(layer: StackedLoRA, x: torch.Tensor) -> None:
    slots = [1, 3, 0, 3, 1, 2]
    separate = {slot: run(layer, x, *[slot] * ROWS) for slot in set(slots)}
    mixed = run(layer, x, *slots)
    for row, slot in enumerate(slots):
        assert torch.equal(mixed[row], separate[slot][row]), row


def test_the_update_is_scaling_times_up_times_down(layer: StackedLoRA, x: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn((2, WIDTH), generator=generator), torch.randn((OUT, 2), generator=generator)
    expected = layer.base(x).double() + 2.0 * x.double() @ down.double().T @ up.double().T
    assert (run(layer, x, *[1] * ROWS) - expected).abs().max() < 1e-4


def test_factors_of_absent_slots_are_never_read(layer: StackedLoRA, x: torch.Tensor) -> None:
    expected = run(layer, x, 0, 1, 1, 0, 1, 1)
    kept = layer.down.data.clone(), layer.up.data.clone()
    try:
        layer.down.data[3], layer.up.data[3] = float("nan"), float("nan")
        assert torch.equal(run(layer, x, 0, 1, 1, 0, 1, 1), expected)
        assert run(layer, x, 3, 1, 1, 0, 1, 1)[0].isnan().any()  # the control: the poison is there
    finally:
        layer.down.data, layer.up.data = kept


def test_experts_are_what_peft_makes_of_their_folders(pico: Any, retrievers: Any, texts: list[str]) -> None:
    from composer.lock import Lock

    folder = retrievers.folder(selector="top1")
    model = retrievers.model(selector="top1")
    features = model[0].preprocess(texts)
    inputs = {name: features[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    for slot, expert in enumerate(Lock.read(folder).experts, start=1):
        peft = _peft(pico, folder / expert.folder)
        running = EncodingPass(slots=Slots.of([slot] * len(texts), torch.device("cpu")))
        with torch.no_grad(), encoding_pass(running):
            ours = model[0].model.run_base(inputs).last_hidden_state
        with torch.no_grad():
            theirs = peft(**inputs).last_hidden_state
        kept = inputs["attention_mask"].bool()
        assert (ours - theirs)[kept].abs().max() < 1e-5


def _peft(pico: Any, folder: Path, **options: Any) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks transformers for a name that is going
        return PeftModel.from_pretrained(pico.encoder(), folder, **options).eval()


CALLS = 200


def _wrong_rows(call: Callable[[str], torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, int]:
    """Call from two threads at once, each for its own expert; count calls with another result than alone."""

    def work(name: str) -> int:
        torch.set_num_threads(1)
        return sum(not torch.equal(call(name), expected[name]) for _ in range(CALLS))

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(expected, pool.map(work, expected), strict=True))


@contextmanager
def meeting(layer: nn.Module) -> Iterator[None]:
    """Let two threads wait for each other in the middle of every pass, so that both are inside at once."""
    barrier = threading.Barrier(2, timeout=60)

    def wait(*_: object) -> None:
        barrier.wait()

    handle = layer.register_forward_pre_hook(wait)
    try:
        yield
    finally:
        handle.remove()


def test_r14_threads_do_not_see_each_others_experts(retrievers: Any, texts: list[str]) -> None:
    model = retrievers.model(selector="top1")
    inputs = _inputs(model, texts[:2])
    slots = {"acme/search": 1, "bob/search": 2}

    def call(name: str) -> torch.Tensor:
        running = EncodingPass(slots=Slots.of([slots[name]] * 2, torch.device("cpu")))
        with torch.no_grad(), encoding_pass(running):
            return model[0].model.run_base(inputs).last_hidden_state

    expected = {name: call(name) for name in slots}
    with meeting(model[0].model.base.encoder.layer[1]):
        assert _wrong_rows(call, expected) == {"acme/search": 0, "bob/search": 0}


def test_r14_the_control_peft_mixes_threads_up(pico: Any, retrievers: Any, texts: list[str]) -> None:
    from composer.lock import Lock

    folder = retrievers.folder(selector="top1")
    one, other, _ = Lock.read(folder).experts
    peft = _peft(pico, folder / one.folder, adapter_name="one")
    peft.load_adapter(folder / other.folder, adapter_name="other")
    peft.eval()
    inputs = _inputs(retrievers.model(selector="top1"), texts[:2])

    def call(name: str) -> torch.Tensor:
        with torch.no_grad():
            return peft(**inputs, adapter_names=[name] * 2).last_hidden_state

    expected = {name: call(name) for name in ("one", "other")}
    with meeting(peft.get_base_model().encoder.layer[1]):
        wrong = _wrong_rows(call, expected)
    assert sum(wrong.values()) >= CALLS / 2, wrong


def _inputs(model: Any, texts: list[str]) -> dict[str, torch.Tensor]:
    features = model[0].preprocess(texts)
    return {name: features[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
