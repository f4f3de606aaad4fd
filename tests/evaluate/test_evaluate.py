import json
import math

import pytest
import torch

from experts.errors import DataError, OptOutError, UnknownNameError
from pipelines.evaluate import evaluate, leave_one_out, measure, prepare, read_domains

SETTINGS = {"sequence_length": 16, "max_tokens": 96}


@pytest.fixture(scope="module")
def data(words):
    return {"low": words("!#$%&'()"), "high": words("STUVWXYZ", seed=1)}


def test_uniform_model_has_the_loss_of_the_vocabulary(uniform, tokenizer, data):
    model = uniform(97)
    result = evaluate(model, tokenizer, data, batch_size=4, **SETTINGS)
    assert result.opt_out == ()
    for score in result.domains.values():
        assert score.nll == pytest.approx(math.log(97), rel=1e-6)
        assert score.tokens == 6 * 15
        assert score.routing == score.sent == score.load == {}
        assert score.router_entropy is None
        assert score.tokens_per_second == pytest.approx(score.tokens / score.seconds)
        # this tokenizer writes a byte a token
        assert score.bits_per_byte == pytest.approx(math.log2(97), rel=1e-6)
    assert result.mean_nll == pytest.approx(math.log(97), rel=1e-6)
    assert model.batches == [(4, 16), (2, 16)] * 2


def test_loss_is_that_of_transformers(pico, tokenizer, data):
    model = pico.dense("llama")
    windows = prepare(data, tokenizer, **SETTINGS)
    result = measure(model, windows, batch_size=5)
    for name, domain in windows.items():
        with torch.no_grad():
            expected = model(domain.ids, labels=domain.ids).loss
        assert result.domains[name].nll == pytest.approx(float(expected), rel=1e-5)


def test_batch_size_and_order_of_domains_do_not_matter(pico, tokenizer, data):
    model = pico.dense("llama")
    one = evaluate(model, tokenizer, data, batch_size=1, **SETTINGS)
    all_at_once = evaluate(model, tokenizer, dict(reversed(data.items())), batch_size=64, **SETTINGS)
    for name in data:
        assert one.domains[name].nll == pytest.approx(all_at_once.domains[name].nll, rel=1e-5)


def test_bytes_are_those_of_the_predicted_text(tokenizer):
    text = "abcdefgh" * 4
    windows = prepare({"d": [text]}, tokenizer, sequence_length=8, max_tokens=None)["d"]
    # 32 letters fill four windows and the end mark stays over; the first letter of each window is given
    assert windows.ids.shape == (4, 8)
    assert windows.tokens == windows.text_bytes == 28


def test_max_tokens_limits_every_domain(tokenizer, data):
    windows = prepare(data, tokenizer, sequence_length=16, max_tokens=40)
    assert {name: len(domain.ids) for name, domain in windows.items()} == {"low": 2, "high": 2}


def test_progress_counts_tokens(uniform, tokenizer, data):
    seen = []
    evaluate(uniform(97), tokenizer, data, batch_size=4, progress=lambda *done: seen.append(done), **SETTINGS)
    assert seen == [(60, 180), (90, 180), (150, 180), (180, 180)]


def test_opt_out_is_the_model_that_was_loaded_without(pico, tokenizer, data):
    from composer.loading import load

    model = pico.loaded()
    asked = evaluate(model, tokenizer, data, opt_out={"bob"}, **SETTINGS)
    loaded = evaluate(load(pico.composed(), opt_out={"bob"}), tokenizer, data, **SETTINGS)
    whole = evaluate(model, tokenizer, data, **SETTINGS)
    assert asked.opt_out == ("bob",)
    for name in data:
        assert asked.domains[name].nll == pytest.approx(loaded.domains[name].nll, rel=1e-5)
        assert asked.domains[name].routing["bob"] == 0
        assert "bob" not in loaded.domains[name].routing
        assert sum(whole.domains[name].routing.values()) == pytest.approx(1)
    assert any(asked.domains[name].nll != pytest.approx(whole.domains[name].nll, rel=1e-3) for name in data)


def test_routing_is_that_of_a_trace(pico, tokenizer, data):
    from composer.trace import RoutingTrace

    model = pico.loaded()
    result = evaluate(model, tokenizer, data, batch_size=4, **SETTINGS)
    for name, domain in prepare(data, tokenizer, **SETTINGS).items():
        with RoutingTrace(model) as trace, torch.inference_mode():
            model(domain.ids)
        score = result.domains[name]
        assert score.routing == pytest.approx(trace.mass(), abs=1e-6)
        assert score.sent == pytest.approx(trace.sent(), abs=1e-6)
        assert score.load == pytest.approx(trace.load(), abs=1e-6)
        assert score.router_entropy == pytest.approx(trace.entropy(), abs=1e-5)


def test_unknown_owner_is_named(pico, tokenizer, data):
    with pytest.raises(UnknownNameError) as caught:
        evaluate(pico.loaded(), tokenizer, data, opt_out={"bop"}, **SETTINGS)
    known = ", ".join(sorted(pico.owners))
    assert str(caught.value) == f"Unknown owner 'bop'. Did you mean 'bob'? Known: {known}."


@pytest.mark.parametrize(
    "given", ["acme", map(str.strip, ["acme"]), [{"acme"}]], ids=["string", "map", "by row"]
)
def test_owners_are_named_in_one_collection(pico, tokenizer, data, given):
    """An iterator would be empty at the second batch."""
    with pytest.raises(OptOutError, match=r"^opt_out (is the string|is or holds a 'map'|holds \{'acme'\})"):
        evaluate(pico.loaded(), tokenizer, data, opt_out=given, **SETTINGS)


def test_leave_one_out_has_an_arm_for_every_owner(pico, tokenizer, data):
    seen = []
    results = leave_one_out(
        pico.loaded(), tokenizer, data, progress=lambda *done: seen.append(done), **SETTINGS
    )
    assert {arm: result.opt_out for arm, result in results.items()} == {
        "composed": (),
        **{f"composed-without:{owner}": (owner,) for owner in pico.owners},
    }
    single = evaluate(pico.loaded(), tokenizer, data, opt_out={pico.owners[-1]}, **SETTINGS)
    for name in data:
        without = results[f"composed-without:{pico.owners[-1]}"]
        assert without.domains[name].nll == pytest.approx(single.domains[name].nll)
    assert seen[-1] == (720, 720)
    assert seen == sorted(seen)


def test_leave_one_out_needs_owners(pico, tokenizer, data):
    with pytest.raises(DataError) as caught:
        leave_one_out(pico.dense("llama"), tokenizer, data, **SETTINGS)
    assert str(caught.value) == "Leaving one out needs a composed model with owners; this one has none."


def test_result_is_plain_data(pico, tokenizer, data):
    result = evaluate(pico.loaded(), tokenizer, data, opt_out={pico.owners[-1]}, **SETTINGS).to_dict()
    assert json.loads(json.dumps(result)) == result
    assert result["opt_out"] == [pico.owners[-1]]
    assert set(result["domains"]["low"]) == {
        "nll",
        "bits_per_byte",
        "tokens",
        "seconds",
        "routing",
        "sent",
        "load",
        "router_entropy",
        "tokens_per_second",
    }


def test_no_domain_is_an_error(uniform, tokenizer):
    with pytest.raises(DataError) as caught:
        evaluate(uniform(97), tokenizer, {})
    assert str(caught.value) == "There is no domain to evaluate on. Give at least one, such as law=law.jsonl."


def test_too_little_text_is_an_error(uniform, tokenizer):
    with pytest.raises(DataError) as caught:
        evaluate(uniform(97), tokenizer, {"law": ["short"]}, sequence_length=64)
    assert str(caught.value) == (
        "the text of 'law' does not fill one window of 64 tokens. Give more text or a smaller sequence_length."
    )


def test_reads_both_forms(tmp_path):
    (tmp_path / "law.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "id": 3}\n')
    (tmp_path / "code.txt").write_text("three")
    domains = read_domains(
        {"law": tmp_path / "law.jsonl", "both": [tmp_path / "code.txt", tmp_path / "law.jsonl"]}
    )
    assert domains == {"law": ["one", "two"], "both": ["three", "one", "two"]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("law.jsonl", b'{"text": "one"}\n{"txt": 1}\n', 'law.jsonl, line 2: no string under "text". Write '
         '{"text": "..."} on every line.'),
        ("law.jsonl", b"one\n", "law.jsonl, line 1: not JSON. Write one object a line."),
        ("law.txt", b"\xff\xfe", "law.txt is not UTF-8 (byte 0). Convert it first."),
        ("law.txt", b" \n", "No text in law.txt."),
        ("law.txt", None, "law.txt cannot be read: No such file or directory."),
    ],
    ids=["no-text", "no-json", "no-utf8", "empty", "missing"],
)  # fmt: skip
def test_says_which_file_and_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_domains({"law": tmp_path / name})
    assert str(caught.value) == message


def test_other_endings_are_refused(tmp_path):
    path = tmp_path / "law.csv"
    path.write_text("text")
    with pytest.raises(DataError) as caught:
        read_domains({"law": path})
    assert str(caught.value) == (
        f"'{path}' is neither .jsonl nor .txt. Give a .jsonl file with {{\"text\": ...}} on every line, or a .txt "
        "file that is one document."
    )
