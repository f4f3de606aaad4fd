"""A query encoder made of one frozen base and any number of owners' experts, as transformers sees it.

Documents are the base's own, bit for bit; queries are routed. Knows tasks, owners and layers; how texts become ids
and states become vectors is the business of sentence-transformers.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Collection
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel

from composer.membership import Membership
from composer.optout import OptOut, allowed_experts, owner_names
from composer.retrieval.config import RetrieverConfig
from composer.retrieval.engine import Engine, LayerGate
from composer.retrieval.router import Decision
from composer.routing.recent import Recent
from experts.errors import OptOutError

__all__ = ["RECORDER", "RetrieverEncoder"]

_LOG = logging.getLogger("coterie.retrieval")

RECORDER: ContextVar[Callable[[Decision], None] | None] = ContextVar("composer_route_recorder", default=None)
"""Who watches the decisions of this thread or task."""

Task = Literal["query", "document"]


class RetrieverEncoder(PreTrainedModel):  # type: ignore[misc]
    """The encoder of a composed retriever.

    Args:
        config: Holds the base's configuration.
        base: The base; None: one is made from the configuration, with random weights.
        membership: Who is in the model.
    """

    config_class = RetrieverConfig
    base_model_prefix = "base"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = False  # packed rows are not rows, and a slot belongs to a row
    _supports_flex_attn = False

    def __init__(
        self,
        config: RetrieverConfig,
        *,
        base: nn.Module | None = None,
        membership: Membership | None = None,
    ) -> None:
        super().__init__(config)
        self.base = base if base is not None else AutoModel.from_config(config.base_config)
        self.membership = membership or Membership()
        self.whole = nn.ModuleDict()
        """Whole query encoders by slot, each its owner's own."""
        self.engine: Engine | None = None
        self.default_task: Task | None = None
        self._accepted = _parameters(self.base)
        self._told = False
        self._sets: Recent[torch.Tensor] = Recent()
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any
    ) -> RetrieverEncoder:
        """Load a composed folder; see `composer.retrieval.loading.load_encoder` for the arguments."""
        from composer.retrieval.loading import load_encoder

        return load_encoder(pretrained_model_name_or_path, *model_args, **_without_hub(kwargs))

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Refuse: the encoder is one part of a composed folder.

        Raises:
            BuildError: Always; the message says what to save instead.
        """
        from experts.errors import BuildError

        raise BuildError(
            "The encoder of a composed retriever is not saved alone, since its weights are its owners' published "
            "files. Save the model that composer.load returns, or copy the folder it was loaded from."
        )

    def _init_weights(self, module: nn.Module) -> None:
        """Leave weights as they are: the base initialises its own and experts are read from files."""

    def get_input_embeddings(self) -> nn.Module:
        """Return the base's input embeddings."""
        return self.base.get_input_embeddings()  # type: ignore[no-any-return,operator]

    def install_gates(self, layers: nn.ModuleList) -> None:
        """Let the running pass see the input of every layer of the base."""
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(LayerGate(number), with_kwargs=True)

    # ---------------------------------------------------------------- running it

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        task: str | None = None,
        opt_out: OptOut | None = None,
        allowed: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Encode a batch of texts.

        Args:
            input_ids: int64 ``(rows, positions)``.
            attention_mask: ``(rows, positions)``, 0 on padding; None: nothing is padded.
            task: ``query`` is routed, ``document`` is the base's; None: the manifest's ``default_task``.
            opt_out: Owners to leave out of every row. Sets for single rows travel as ``allowed``.
            allowed: bool ``(rows, experts + 1)``, who may answer each row; the first column is the base.
            kwargs: Passed to the base.

        Returns:
            The base's output; ``last_hidden_state`` is ``(rows, positions, d)``.

        Raises:
            OptOutError: ``opt_out`` holds a set for every row: batches are sorted by length before they get here. Or
                it is no collection of names.
            UnknownNameError: ``opt_out`` names an owner who is not in this composition.
            ValueError: ``task`` is another word.
        """
        assert input_ids is not None, "forward needs input_ids"
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        inputs = {name: value for name, value in inputs.items() if value is not None}
        who = self._allowed(opt_out, allowed, rows=len(input_ids))
        if self._task(task) != "query" or self.engine is None:
            return self._run(inputs)
        batch = {name: value for name, value in inputs.items() if _is_batch(value, len(input_ids))}
        recorder = RECORDER.get()
        output, decision = self.engine.encode(batch, mask, who[:, 1:].numpy(), trace=recorder is not None)
        if recorder is not None:
            recorder(decision)
        return output

    def run_base(self, inputs: dict[str, torch.Tensor]) -> Any:
        """Call the base with whatever of ``inputs`` it takes."""
        return self._run(inputs)

    def run_whole(self, slot: int, inputs: dict[str, torch.Tensor]) -> Any:
        """Call the whole query encoder of a slot with whatever of ``inputs`` it takes."""
        return self._run(inputs, self.whole[str(slot)])

    def _run(self, inputs: dict[str, Any], encoder: nn.Module | None = None) -> Any:
        taken = inputs if self._accepted is None else {k: v for k, v in inputs.items() if k in self._accepted}
        return (self.base if encoder is None else encoder)(**{**taken, "return_dict": True})

    def _task(self, task: str | None) -> Task:
        if task in ("query", "document"):
            return task  # type: ignore[return-value]
        if task is not None:
            raise ValueError(
                f"task is '{task}'. Allowed: 'query' (encode_query), 'document' (encode_document)."
            )
        if self.default_task is not None:
            return self.default_task
        if not self._told:
            self._told = True
            _LOG.warning(
                "encode() was called without a task, so the texts were encoded as documents, by the base alone. Call "
                "encode_query for queries, or compose with `router: {default_task: query}`."
            )
        return "document"

    def _flags(self, opt_out: OptOut) -> torch.Tensor:
        members = self.membership
        return allowed_experts(opt_out, batch=1, owners=members.whose, known=members.known_owners)

    def _allowed(self, opt_out: OptOut | None, allowed: torch.Tensor | None, *, rows: int) -> torch.Tensor:
        members = self.membership
        if _has_sets(opt_out):
            raise OptOutError(
                "opt_out has one set of owners per row, and texts are sorted by length on their way to the model. "
                "Load the folder with composer.load, whose encode_query takes such a list, or call encode_query "
                "once for each set."
            )
        if allowed is None:
            if isinstance(opt_out, str):
                return self._flags(opt_out)  # says what is wrong with it
            names = owner_names(() if opt_out is None else opt_out)  # type: ignore[arg-type]
            return self._sets.get(names, lambda: self._flags(names))
        if opt_out is not None:
            raise OptOutError("Give either opt_out or allowed, not both.")
        if allowed.shape != (rows, len(members.experts) + 1):
            raise OptOutError(
                f"allowed has shape {tuple(allowed.shape)}; it must be (rows, experts + 1) = "
                f"({rows}, {len(members.experts) + 1}), the base first."
            )
        return allowed.to("cpu", torch.bool)


def _has_sets(opt_out: Any) -> bool:
    if isinstance(opt_out, str) or not isinstance(opt_out, Collection):
        return False
    return any(isinstance(entry, Collection) and not isinstance(entry, str) for entry in opt_out)


def _parameters(module: nn.Module) -> frozenset[str] | None:
    """Name what a module's forward takes; None: anything."""
    parameters = inspect.signature(module.forward).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters)


def _is_batch(value: Any, rows: int) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 1 and len(value) == rows


def _without_hub(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Drop what the Auto classes pass on their own account; nothing is ever fetched, and no code of a folder is run."""
    auto = ("config", "_from_auto", "_commit_hash", "adapter_kwargs", "local_files_only", "revision", "token")
    dropped = (
        *auto,
        "cache_dir",
        "trust_remote_code",
        "force_download",
        "proxies",
        "subfolder",
        "code_revision",
    )
    return {name: value for name, value in kwargs.items() if name not in dropped}
