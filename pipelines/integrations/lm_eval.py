r"""Lets lm-evaluation-harness evaluate a composed folder, with owners left out, as the model ``coterie``.

    python -m pipelines.integrations.lm_eval run --model coterie --tasks hellaswag \
        --model_args pretrained=composed,opt_out=acme+bob

Importing this module registers the name; running it registers the name and then is the harness's own command line.
Needs the extra ``lm-eval``. Knows the harness's model arguments; knows nothing of tasks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from composer.optout import owner_names
from experts.errors import BuildError, CoterieError
from experts.names import unknown_name

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError(
        "lm-evaluation-harness is not installed. Install the extra: pip install 'coterie[lm-eval]'."
    ) from error

__all__ = ["CoterieLM", "main", "owners_of"]

_PASSED_ON = (
    "add_bos_token",
    "batch_size",
    "chat_template_args",
    "enable_thinking",
    "logits_cache",
    "max_batch_size",
    "prefix_token_id",
    "softmax_dtype",
    "think_end_token",
    "truncation",
)
"""Arguments of the harness's own class that mean something for a model that is loaded already."""

_OWN = ("pretrained", "opt_out", "registry", "device", "dtype", "max_length")


@register_model("coterie")
class CoterieLM(HFLM):  # type: ignore[misc]
    """A composed folder as a model of lm-evaluation-harness.

    Args:
        pretrained: A folder that ``coterie build`` wrote.
        opt_out: Owners whose files are not opened: names joined by ``+``, or a collection of names.
        registry: Path of a registry whose opt-outs are followed as well; None: none.
        device: Where the model runs; None: a GPU if there is one. The harness says ``cuda:0`` where its user says
            nothing, so that means the CPU where there is no GPU, as in the harness's own class.
        dtype: Of the weights; None: the composition's own.
        max_length: Longest sequence in tokens; None: the base model's.
        further: As in the harness's class for transformers models; arguments without effect here are refused.

    Raises:
        BuildError: ``pretrained`` is no composed folder.
        UnknownNameError: An owner is not in the composition, or an argument is unknown.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        opt_out: object = "",
        registry: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        max_length: int | None = None,
        **further: Any,
    ) -> None:
        for name in further:
            if name not in _PASSED_ON:
                raise unknown_name("model argument", name, [*_OWN, *_PASSED_ON])
        if not isinstance(pretrained, str):
            raise BuildError("pretrained is not a path. Give the folder that `coterie build` wrote.")

        from transformers import AutoTokenizer

        import composer
        from composer.loading import left_out
        from composer.lock import Lock

        model = composer.load(
            pretrained,
            opt_out=owners_of(opt_out),
            registry=registry,
            device=_device(device),
            dtype=None if dtype == "auto" else dtype,
        )
        lock = Lock.read(Path(pretrained))
        self.opt_out = tuple(sorted(left_out(lock, owners_of(opt_out), registry)))
        """Who is not in the model: by ``opt_out``, or by the registry."""
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=AutoTokenizer.from_pretrained(pretrained, local_files_only=True),
            max_length=max_length or model.config.get_text_config().max_position_embeddings,
            **further,
        )

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness writes beside the results: which composition it was, and without whom."""
        return {
            "composition": self._model.membership.digest,
            "owners": list(self._model.owners),
            "opt_out": list(self.opt_out),
        }


def _device(given: str | None) -> str:
    import torch

    if given is None or (given.startswith("cuda") and not torch.cuda.is_available()):
        return "auto"
    return given


def owners_of(given: object) -> frozenset[str]:
    """Return the owners of ``acme+bob``, or of a collection of names; the harness reads ``42`` as a number.

    Raises:
        OptOutError: An iterator.
    """
    if isinstance(given, Collection) and not isinstance(given, str):
        return frozenset(map(str, given))
    if isinstance(given, Iterable) and not isinstance(given, str):
        return owner_names(given)  # type: ignore[arg-type]  # refuses it
    return frozenset(name for name in str(given or "").split("+") if name)


def main() -> None:
    """Run the harness's command line, in which ``coterie`` is now a model."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except CoterieError as error:
        raise SystemExit(f"Error: {error}") from None


if __name__ == "__main__":
    main()
