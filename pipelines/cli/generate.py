"""``coterie generate``: a composed folder continues a prompt.

Knows prompts, seeds and how to print a continuation; the model is the composer's business.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.cli.loading import (
    DeviceOption,
    DtypeOption,
    OptionError,
    dtype_name,
    note_if_alone,
    open_folder,
)
from pipelines.cli.options import JsonOption, OptOutOption, OutFolder, RegistryOption, examples, open_registry
from pipelines.cli.output import print_json, print_line, printable
from pipelines.cli.progress import spinner

if TYPE_CHECKING:
    from composer.model import ComposedForCausalLM

__all__ = ["generate"]

EXAMPLES = examples(
    "coterie generate composed --prompt 'The licensee shall'",
    "coterie generate composed --prompt 'The licensee shall' --opt-out acme --seed 7",
    "echo 'def main():' | coterie generate composed --prompt - --json",
)


def generate(
    context: typer.Context,
    out: OutFolder,
    prompt: Annotated[
        str,
        typer.Option("--prompt", metavar="TEXT", help="What to continue; - reads stdin.", show_default=False),
    ],
    opt_out: OptOutOption = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, metavar="N", help="Stop after N tokens.")
    ] = 64,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            min=0,
            metavar="N",
            help="Draw the tokens with this seed; by default the likeliest is taken.",
            show_default=False,
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature", min=0.01, help="Of the draws; needs --seed. [default: 1.0]", show_default=False
        ),
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt with a composed model.

    Left out are the owners you name, and whoever has opted out in the registry since the build.
    """
    from time import perf_counter

    if temperature is not None and seed is None:
        raise OptionError(
            "--temperature has no effect without --seed: without one the likeliest token is taken."
        )
    text = sys.stdin.read() if prompt == "-" else prompt
    store = open_registry(context, registry)
    with (
        spinner("Loading") as report,
        open_folder(out, opt_out=opt_out or (), registry=store, device=device, dtype=dtype) as (
            model,
            tokenizer,
        ),
    ):
        note_if_alone(model)
        report("Generating")
        started = perf_counter()
        completion, count = _continue(
            model, tokenizer, text, max_new_tokens=max_new_tokens, seed=seed, temperature=temperature or 1.0
        )
    if as_json:
        seconds = perf_counter() - started
        print_json(
            {
                "prompt": text,
                "completion": completion,
                "tokens": count,
                "seconds": round(seconds, 3),
                "seed": seed,
                "owners": list(dict.fromkeys(model.owners)),
                "dtype": dtype_name(model),
            }
        )
        return
    print_line(printable(text + completion, keep="\n\t"))


def _continue(
    model: ComposedForCausalLM,
    tokenizer: Any,
    text: str,
    *,
    max_new_tokens: int,
    seed: int | None,
    temperature: float,
) -> tuple[str, int]:
    """Return the continuation and how many tokens it has."""
    import torch

    inputs = tokenizer(text, return_tensors="pt")
    if inputs.input_ids.shape[1] == 0:
        raise OptionError("The prompt is empty. Give at least one character.")
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if seed is not None:
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.inference_mode():
        ids = model.generate(
            inputs.input_ids.to(model.device),
            attention_mask=inputs.attention_mask.to(model.device),
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            **sampling,
        )[0]
    new = ids[inputs.input_ids.shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True), len(new)
