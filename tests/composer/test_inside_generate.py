"""What `transformers` runs inside of ``generate`` obeys its opt-out: guidance, other processors, assistants."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, UnbatchedClassifierFreeGuidanceLogitsProcessor

from composer.blocks.low_rank import LowRankExpert
from composer.editing import add_experts, remove_experts
from composer.loading import load
from composer.running import current_request
from experts.errors import BuildError, OptOutError

PAIR = ("bob/low", "zoe/low")
ROUTER: dict[str, Any] = {"top_k": 2, "context": "token"}
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


def _generate(model: Any, ids: torch.Tensor, **settings: Any) -> Any:
    options = {**GREEDY, "attention_mask": torch.ones_like(ids), **settings}
    return model.generate(ids, output_scores=True, return_dict_in_generate=True, **options)


def _same(one: Any, other: Any) -> bool:
    """Equal texts, and scores that differ by rounding at most."""
    scores = zip(one.scores, other.scores, strict=True)
    close = all(torch.allclose(a, b, rtol=0, atol=1e-5) for a, b in scores)
    return close and torch.equal(one.sequences, other.sequences)


def _refused(call: Callable[[], Any]) -> str:
    with pytest.raises(OptOutError) as caught:
        call()
    return str(caught.value)


@contextmanager
def _products(rank: int) -> Iterator[list[int]]:
    """Count how often an expert of a rank is multiplied with anything; owners have different ranks."""
    seen: list[int] = []
    original = LowRankExpert.delta

    def spy(self: Any, *args: Any) -> Any:
        if len(next(iter(self.lora_A.values()))) == rank:
            seen.append(rank)
        return original(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LowRankExpert, "delta", spy)
        yield seen


@pytest.fixture
def model(pico: Any) -> Any:
    return pico.loaded(**ROUTER)


@pytest.fixture
def never(pico: Any) -> Any:
    """The model that acme never joined."""
    return pico.loaded(experts=PAIR, **ROUTER)


@pytest.fixture(params=["last token", "negative prompt"])
def guidance(pico: Any, request: pytest.FixtureRequest) -> dict[str, Any]:
    prompt = {"negative_prompt_ids": pico.domain_tokens(1, rows=3, length=6)}
    return {"guidance_scale": 2.0, **(prompt if request.param == "negative prompt" else {})}


def test_guidance_leaves_out_whom_the_request_does(
    pico: Any, model: Any, never: Any, guidance: dict[str, Any]
) -> None:
    ids = pico.domain_tokens(1, rows=3, length=8)
    with _products(rank=2) as acme:
        asked = _generate(model, ids, opt_out={"acme"}, **guidance)
        by_mask = _generate(model, ids, allowed=torch.tensor([[True, False, True, True]] * 3), **guidance)
        assert acme == []
        whole = _generate(model, ids, **guidance)
        assert acme, "the control: where acme may answer, acme does"
    expected = _generate(never, ids, **guidance)
    assert _same(asked, expected)
    assert _same(by_mask, expected)
    assert not _same(whole, expected)


@pytest.mark.parametrize(
    "copies", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}], ids=str
)
def test_guided_rows_keep_their_own_sets(pico: Any, model: Any, copies: dict[str, Any]) -> None:
    ids, everybody = pico.prompts(rows=3, length=8), set(pico.owners)
    sets: list[set[str]] = [{"acme"}, set(), everybody]
    dense: list[Any] = []
    torch.manual_seed(0)
    together = _generate(model, ids, opt_out=sets, guidance_scale=2.0, **copies)
    for leaving in (everybody, [everybody] * 3):
        torch.manual_seed(0)
        dense.append(_generate(model, ids, opt_out=leaving, guidance_scale=2.0, **copies))
    torch.manual_seed(0)
    base = _generate(pico.dense(), ids, guidance_scale=2.0, **copies)
    for alone in dense:
        assert torch.equal(alone.sequences, base.sequences), "with nobody left the base guides itself"
    rows = len(together.sequences) // 3
    assert torch.equal(together.sequences[2 * rows :], base.sequences[2 * rows :])
    if "num_beams" in copies:
        for row, owners in enumerate(sets):
            alone = _generate(model, ids[row : row + 1], opt_out=owners, guidance_scale=2.0, **copies)
            assert torch.equal(together.sequences[row : row + 1], alone.sequences)


def test_threads_are_guided_by_their_own_sets(pico: Any, model: Any) -> None:
    ids = pico.prompts(rows=3, length=8)
    sets: list[set[str]] = [{"acme"}, {"bob", "zoe"}]
    expected = [_generate(model, ids, opt_out=owners, guidance_scale=2.0) for owners in sets]
    start, got = threading.Barrier(2), {}

    def serve(number: int) -> None:
        start.wait()
        got[number] = [_generate(model, ids, opt_out=sets[number], guidance_scale=2.0) for _ in range(2)]

    threads = [threading.Thread(target=serve, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(_same(result, expected[number]) for number in (0, 1) for result in got[number])


def test_a_call_that_says_whom_it_leaves_out_is_taken_at_its_word(pico: Any, model: Any, never: Any) -> None:
    """A processor of the user's own, which calls the model, another composition, and ``generate`` itself."""
    ids, seen = pico.prompts(rows=2, length=8), []
    other = pico.loaded(experts=("acme/low", "zoe/low"), **ROUTER)

    def watch(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not seen:
            texts = _generate(model, tokens)
            seen.extend(
                [model(tokens).logits, model(tokens, opt_out={"bob"}).logits, other(tokens).logits, texts]
            )
        return scores

    _generate(model, ids, opt_out={"acme"}, logits_processor=LogitsProcessorList([watch]))
    with torch.no_grad():
        torch.testing.assert_close(seen[0], never(ids).logits, rtol=0, atol=1e-5)
        assert torch.equal(seen[1], model(ids, opt_out={"bob"}).logits)
        assert torch.equal(seen[2], other(ids, opt_out={"acme"}).logits), (
            "owners are told by name, not by number"
        )
        assert _same(seen[3], _generate(never, ids))
        assert torch.equal(model(ids).logits, model(ids, opt_out=()).logits)
    assert current_request() is None


def test_rows_that_nothing_tells_apart_are_refused(pico: Any, model: Any) -> None:
    ids = pico.prompts(rows=3, length=8)
    guidance = {"guidance_scale": 2.0, "negative_prompt_ids": ids[:1, :4]}
    assert _refused(lambda: _generate(model, ids, opt_out=[{"acme"}, set(), {"bob"}], **guidance)) == (
        "Inside of a generate() of 3 rows that leave different owners out, the model was called with a batch of 1 and "
        "without opt_out, so nothing tells whom each of these rows leaves out. Give that call opt_out, or generate "
        "these rows one by one."
    )
    assert current_request() is None


def test_a_composed_assistant_leaves_the_same_owners_out(pico: Any) -> None:
    """Bob is the second expert of the one and the first of the other: a mask by ids would mean somebody else."""
    main, assistant = (pico.loaded(experts=two, **ROUTER) for two in (("acme/low", "bob/low"), PAIR))
    alone = [pico.loaded(experts=(name,), **ROUTER) for name in ("acme/low", "zoe/low")]
    ids = pico.domain_tokens(2, rows=1, length=8)
    sampled = {"do_sample": True, "temperature": 3.0, "top_k": 0}
    texts = set()
    with _products(rank=3) as bob:
        for seed in range(3):
            torch.manual_seed(seed)
            asked = _generate(main, ids, opt_out={"bob"}, assistant_model=assistant, **sampled)
            torch.manual_seed(seed)
            expected = _generate(alone[0], ids, assistant_model=alone[1], **sampled)
            assert torch.equal(asked.sequences, expected.sequences)
            texts.add(tuple(asked.sequences[0].tolist()))
        by_mask = torch.tensor([[True, True, False]])
        _generate(main, ids, allowed=by_mask, assistant_model=assistant)
        assert bob == []
        _generate(main, ids, assistant_model=assistant)
        assert bob, "the control: where bob may answer, bob does"
    assert len(texts) > 1


def test_an_assistant_may_have_other_experts_or_be_the_model_itself(
    pico: Any, model: Any, never: Any
) -> None:
    """Greedy decoding gives the main model's text, whoever drafts."""
    ids = pico.domain_tokens(1, rows=1, length=8)
    for assistant in (never, model):
        drafted = _generate(model, ids, opt_out={"acme"}, assistant_model=assistant)
        assert torch.equal(drafted.sequences, _generate(never, ids).sequences)
        free = _generate(model, ids, assistant_model=assistant)
        assert torch.equal(free.sequences, _generate(model, ids).sequences)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.generate_batch([[1, 2, 3]], opt_out={"acme"}),
        lambda model: model.init_continuous_batching(),
        lambda model: model.continuous_batching_context_manager(),
        lambda model: model.generate(torch.ones(1, 3, dtype=torch.int64), cache_implementation="paged"),
    ],
    ids=["generate_batch", "manager", "context manager", "paged"],
)
def test_continuous_batching_is_refused(model: Any, call: Callable[[Any], Any]) -> None:
    assert _refused(lambda: call(model)) == (
        "A composed model does not support continuous batching (generate_batch, cache_implementation='paged'): it "
        "packs requests into one row, where nothing tells whom each of them leaves out. Call generate with one set of "
        "owners per row."
    )


# Tuned models, whose requests are answered by the weights from before the tuning


@pytest.fixture(scope="module")
def tuned(pico: Any) -> Path:
    """A folder whose routers were tuned, on text of somebody without an expert too; shared."""
    from composer.tuned import write_tuned

    model = load(pico.composed(scorer="learned", **ROUTER))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    return write_tuned(
        model,
        pico.scratch("tuned"),
        trained="routers",
        text_owners=["word"],
        settings={},
        dtype=torch.float32,
    )


@pytest.mark.parametrize("owner", ["acme", "word"])
def test_a_tuned_model_is_guided_and_assisted_by_the_untuned_one(pico: Any, tuned: Path, owner: str) -> None:
    model, ids = load(tuned), pico.prompts(rows=1, length=8)
    experts = PAIR if owner == "acme" else ("acme/low", *PAIR)
    never = pico.loaded(experts=experts, scorer="learned", **ROUTER)
    guided = _generate(never, ids, guidance_scale=2.0)
    assert _same(_generate(model, ids, opt_out={owner}, guidance_scale=2.0), guided)
    assert not _same(_generate(model, ids, guidance_scale=2.0), guided)
    # the tuned model itself in the hands of the user's own processor, and as the assistant
    own, theirs = (
        LogitsProcessorList([UnbatchedClassifierFreeGuidanceLogitsProcessor(2.0, who)])
        for who in (model, never)
    )
    by_hand = _generate(model, ids, opt_out={owner}, logits_processor=own)
    assert _same(by_hand, _generate(never, ids, logits_processor=theirs))
    sampled = {"do_sample": True, "temperature": 3.0, "top_k": 0}
    for seed in range(3):
        torch.manual_seed(seed)
        asked = _generate(model, ids, opt_out={owner}, assistant_model=model, **sampled)
        torch.manual_seed(seed)
        assert torch.equal(asked.sequences, _generate(never, ids, assistant_model=never, **sampled).sequences)


@pytest.mark.parametrize("change", ["another expert joins", "the tuning is dropped", "the folder is gone"])
def test_a_folder_that_was_edited_since_answers_no_request(pico: Any, tuned: Path, change: str) -> None:
    """The weights from before the tuning are read at the first request: by then they may be others', or tuned ones."""
    folder = Path(shutil.copytree(tuned, pico.scratch("edited")))
    served, other, ids = load(folder), load(folder), pico.prompts(rows=2, length=8)
    with torch.inference_mode():
        before = other(ids, opt_out={"bob"}).logits
    if change == "the folder is gone":
        shutil.rmtree(folder)
    else:
        remove_experts(folder, ["acme"])
        joins = "acme/low" if change == "the tuning is dropped" else "acme/full"
        add_experts(folder, [joins], registry=pico.library())
    with pytest.raises(BuildError) as caught:
        served(ids, opt_out={"bob"})
    assert str(caught.value) == (
        f"{folder} was changed since this model was loaded. Requests that leave somebody out of a tuned model need the "
        "weights from before the tuning, which are read from it at the first such request. Load it again."
    )
    with torch.inference_mode():
        assert served(ids).logits.shape == before.shape, "whoever leaves nobody out is still answered"
        assert torch.equal(other(ids, opt_out={"bob"}).logits, before), "and who has read them already"
