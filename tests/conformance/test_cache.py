"""Decoding with a cache gives what one pass over the whole text gives."""

from __future__ import annotations

from typing import Any

import torch

TOLERANCE = 1e-5
NEW = 5


def _generate(model: Any, ids: torch.Tensor, **settings: Any) -> Any:
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **settings,
    )


def test_u9_greedy_decoding(pico: Any, model: Any, ids: torch.Tensor) -> None:
    opt_out = [set(), {"acme"}, {"bob", "zoe"}, set(pico.owners)]
    cached = _generate(model, ids, opt_out=opt_out)
    plain = _generate(model, ids, opt_out=opt_out, use_cache=False)
    assert cached.sequences.shape == (len(ids), ids.shape[1] + NEW)
    assert torch.equal(cached.sequences, plain.sequences)
    cached_logits, plain_logits = torch.stack(cached.logits), torch.stack(plain.logits)
    torch.testing.assert_close(cached_logits, plain_logits, rtol=0, atol=TOLERANCE)
    with torch.inference_mode():
        sequences = cached.sequences[:, :-1]
        whole = model(sequences, opt_out=opt_out, prompt_length=ids.shape[1]).logits[:, -NEW:]
    torch.testing.assert_close(cached_logits, whole.transpose(0, 1), rtol=0, atol=TOLERANCE)


def test_u9_beam_search_reorders_the_state(model: Any, ids: torch.Tensor) -> None:
    settings = {"num_beams": 3, "num_return_sequences": 2, "opt_out": [{"bob"}, set()]}
    cached = _generate(model, ids[:2], **settings)
    plain = _generate(model, ids[:2], use_cache=False, **settings)
    assert cached.sequences.shape == (4, ids.shape[1] + NEW)
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(cached.sequences_scores, plain.sequences_scores, rtol=0, atol=TOLERANCE)
