"""A composed model: the base model's own class with experts where its FFNs were.

Nothing of the base model's code is copied: any decoder of `transformers` is held as it is and its FFN modules are
replaced. This module knows ids, owners and tensors; recipes decide what is put where, `composer.loading` reads
files.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import wraps
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from composer.configuration import ComposedConfig
from composer.forward import FORCED, Branch, ForwardPass, current_forward, forward_pass
from composer.layers.attention_cache import widened
from composer.membership import Membership
from composer.optout import OptOut
from composer.routing.recent import Recent
from composer.routing.router import Router
from composer.routing.state import RouterState, attach_state, held_state
from composer.routing.types import ANCHOR, AllowedGroup, Groups, group_rows
from composer.running import Asked, RunningRequest, current_request, running_request
from composer.tuned import Untuned
from experts.errors import OptOutError

__all__ = ["ComposedForCausalLM", "Gate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """A model-wide router and the decoder layer whose input it scores."""

    router: Router
    layer: int


class ComposedForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A causal language model made of one public base and any number of owners' experts.

    Args:
        config: Holds the base model's configuration.
        base: The base model; None: one is made from the configuration, with random weights.
        membership: Who is in the model.
    """

    config_class = ComposedConfig
    base_model_prefix = "base"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(
        self,
        config: ComposedConfig,
        *,
        base: nn.Module | None = None,
        membership: Membership | None = None,
    ) -> None:
        super().__init__(config)
        self.base = base if base is not None else AutoModelForCausalLM.from_config(config.base_config)
        self.membership = membership or Membership()
        self.gate: Router | None = None
        self.attention_gate: Router | None = None
        self.caches_per_layer = 1  # more where attention experts have keys and values of their own
        self.untuned: Untuned | None = None
        self._requests: Recent[tuple[torch.Tensor, Groups]] = Recent()
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any
    ) -> ComposedForCausalLM:
        """Load a composed folder; see `composer.loading.load` for the arguments."""
        from composer.loading import load

        # what the Auto classes pass on their own account; nothing is ever fetched, and no code of a folder is run
        auto = ("config", "_from_auto", "_commit_hash", "adapter_kwargs", "local_files_only", "revision")
        for ignored in (*auto, "trust_remote_code"):
            kwargs.pop(ignored, None)
        return load(pretrained_model_name_or_path, *model_args, **kwargs)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Write the composed folder of this model, without the owners that were left out at load.

        Raises:
            BuildError: The model was not loaded from a composed folder, its weights were changed since, or the
                target exists.
        """
        from composer.saving import save

        save(self, save_directory)

    # ---------------------------------------------------------------- who is in the model

    @property
    def expert_names(self) -> tuple[str, ...]:
        """Names of the loaded experts; the id of the first one is 1."""
        return self.membership.experts

    @property
    def owners_of_experts(self) -> tuple[str, ...]:
        """Owner of each loaded expert, in the order of `expert_names`."""
        return self.membership.owners

    @property
    def owners(self) -> tuple[str, ...]:
        """Owners with at least one loaded expert, sorted."""
        return tuple(sorted(set(self.membership.owners)))

    def install_gate(self, gate: Gate, decoder_layer: nn.Module, *, branch: Branch = "ffn") -> None:
        """Let a model-wide router decide on the hidden state that enters ``decoder_layer``."""
        if branch == "ffn":
            self.gate = gate.router
        else:
            self.attention_gate = gate.router

        def run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden_states = args[0] if args else kwargs["hidden_states"]
            current_forward().decide(gate.router, hidden_states, layer=gate.layer, branch=branch)

        decoder_layer.register_forward_pre_hook(run, with_kwargs=True)

    # ---------------------------------------------------------------- the embeddings are the base's

    def get_input_embeddings(self) -> nn.Module:
        """Return the base model's input embeddings."""
        return self.base.get_input_embeddings()  # type: ignore[no-any-return,operator]

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the base model's output embeddings."""
        return self.base.get_output_embeddings()  # type: ignore[no-any-return,operator]

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Full experts run through any registered kernel; the library tells by reading the class's source."""
        return True

    def _init_weights(self, module: nn.Module) -> None:
        """Leave weights as they are: the base initialises its own and experts are read from files."""

    # ---------------------------------------------------------------- running it

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        opt_out: OptOut | None = None,
        allowed: torch.Tensor | None = None,
        token_mask: torch.Tensor | None = None,
        prompt_length: int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the model.

        Args:
            input_ids: int64 ``(batch, positions)``.
            attention_mask: ``(batch, past + positions)``, 0 on padding.
            position_ids: As the base model takes them.
            past_key_values: A cache that this model filled under the same allowed sets, or an empty one.
            inputs_embeds: ``(batch, positions, d)`` instead of ids.
            labels: int64 ``(batch, positions)``, -100 where no loss is wanted.
            use_cache: Whether to return a cache.
            logits_to_keep: As the base model takes it.
            opt_out: Owners to leave out: a set for the whole batch or one set per row. Inside of ``generate``, as in a
                logits processor, a call that gives neither this nor ``allowed`` leaves out whom that request does.
            allowed: bool ``(batch, num_experts + 1)``, the same as a mask of expert ids (what ``generate`` passes).
            token_mask: ``(batch, past + positions)``, 0 on padding, where ``attention_mask`` has another form.
            prompt_length: How many leading positions, padding counted, are the prompt (what ``generate`` passes);
                None: all. Only a ``prompt_mean`` context asks.
            kwargs: Passed to the base model.

        Returns:
            The base model's output.

        Raises:
            OptOutError: The cache was filled under other allowed sets, or ``opt_out`` does not fit the batch.
            UnknownNameError: ``opt_out`` names an owner who is not in this composition.
            ValueError: The cache holds positions that were routed by another prompt.
        """
        tokens = input_ids if input_ids is not None else inputs_embeds
        assert tokens is not None, "forward needs input_ids or inputs_embeds"
        if opt_out is None and allowed is None:
            opt_out, allowed = self._asked_around(batch=tokens.shape[0])
        before = self._before_tuning(opt_out, allowed, batch=tokens.shape[0])
        if before is not None:
            untuned, allowed = before
            return untuned(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                labels=labels,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                allowed=allowed,
                token_mask=token_mask,
                prompt_length=prompt_length,
                **kwargs,
            )
        mask, groups = self._request(opt_out, allowed, tokens)
        forced = FORCED.get()
        if forced is not None:
            groups = Groups((AllowedGroup(experts=(ANCHOR, forced.expert) if forced.expert else (ANCHOR,)),))
        if self.caches_per_layer > 1:
            text_config = self.config.get_text_config()
            wanted = text_config.use_cache if use_cache is None else use_cache
            past_key_values = widened(past_key_values, text_config, self.caches_per_layer, wanted=wanted)
        state = self._state(past_key_values, mask)
        if prompt_length is not None:
            state.end_prompt_at(prompt_length)
        routing = ForwardPass(
            groups=groups,
            token_mask=_token_mask(attention_mask, token_mask, length=tokens.shape[1]),
            state=state,
        )
        with forward_pass(routing):
            output: CausalLMOutputWithPast = self.base(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                labels=labels,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )
        if isinstance(output.past_key_values, Cache):
            attach_state(output.past_key_values, state)
        return output

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *args: Any,
        opt_out: OptOut | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate text as any `transformers` model does, leaving owners out per row.

        They are left out of everything that runs inside: guidance by a second prompt, and an ``assistant_model`` that
        is a composed model too, which leaves out those of the owners whom it has.

        Args:
            inputs: int64 ``(batch, positions)``; also accepted as ``input_ids`` or ``inputs_embeds``.
            args: Passed to `transformers.GenerationMixin.generate`.
            opt_out: Owners to leave out: a set for the whole batch or one set per row.
            kwargs: Passed to `transformers.GenerationMixin.generate`.

        Raises:
            OptOutError: ``past_key_values`` was filled under other allowed sets, ``opt_out`` does not fit the batch, or
                continuous batching is asked for.
            UnknownNameError: ``opt_out`` names an owner who is not in this composition.
        """
        given = inputs if inputs is not None else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        batch, members = 1 if given is None else given.shape[0], self.membership
        allowed = kwargs.pop("allowed", None)
        # an assistant is handed the mask of the model that it assists, by the ids of that model
        assists = getattr(kwargs.get("generation_config"), "is_assistant", False)
        if (opt_out is None and allowed is None) or (assists and current_request() is not None):
            opt_out, allowed = self._asked_around(batch=batch)
        before = self._before_tuning(opt_out, allowed, batch=batch)
        # a tensor, so that beams and return sequences expand it together with the rows
        model, mask = before or (self, members.allowed(opt_out, allowed, batch=batch))
        kwargs.setdefault(
            "disable_compile", True
        )  # who is allowed, and the router's state, are no tensors of a graph
        if given is not None:
            kwargs.setdefault("prompt_length", given.shape[1])
        request = RunningRequest.of(
            (opt_out, allowed),
            batch=batch,
            experts=members.experts,
            owners=members.owners,
            known=members.known_owners,
        )
        with running_request(request):
            return super(ComposedForCausalLM, model).generate(inputs, *args, allowed=mask, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: continuous batching packs the rows of all requests into one.

        Raises:
            OptOutError: Always; the message says what to call instead.
        """
        raise OptOutError(
            "A composed model does not support continuous batching (generate_batch, cache_implementation='paged'): it "
            "packs requests into one row, where nothing tells whom each of them leaves out. Call generate with one set "
            "of owners per row."
        )

    init_continuous_batching = generate_batch
    continuous_batching_context_manager = generate_batch

    # generate() reads the signature to learn that embeddings can be given instead of ids
    @wraps(GenerationMixin.prepare_inputs_for_generation, assigned=())
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Keep the plain padding mask beside whatever form the base model's attention wants."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)
        mask, request, allowed = kwargs.get("attention_mask"), current_request(), kwargs.get("allowed")
        if request is not None and allowed is not None:
            request.copies = max(1, len(allowed) // len(request.left_out))
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            inputs["token_mask"] = mask
        elif mask is None and inputs.get("attention_mask") is not None:  # made for a cache of fixed length
            tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
            inputs["token_mask"] = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return inputs

    def _asked_around(self, *, batch: int) -> Asked:
        """Return what the ``generate`` asks for that a call which says nothing runs in; nothing outside of one."""
        request, members = current_request(), self.membership
        if request is None:
            return None, None
        return request.asks(batch=batch, experts=members.experts, known=members.known_owners)

    def _before_tuning(
        self, opt_out: OptOut | None, allowed: torch.Tensor | None, *, batch: int
    ) -> tuple[ComposedForCausalLM, torch.Tensor] | None:
        """Return the untuned model and who is allowed where a request leaves somebody out of a tuned one."""
        if self.untuned is None or (opt_out is None and allowed is None):
            return None
        mask = self.membership.allowed(opt_out, allowed, batch=batch)
        if not self.untuned.is_asked(opt_out, mask):
            return None
        return self.untuned.model(self), mask

    def _request(
        self, opt_out: OptOut | None, allowed: torch.Tensor | None, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, Groups]:
        """Return who is allowed and the rows by allowed set; a decoding loop asks for the same at every step."""
        batch, device = tokens.shape[0], tokens.device

        def make() -> tuple[torch.Tensor, Groups]:
            mask = self.membership.allowed(opt_out, allowed, batch=batch)
            return mask, group_rows(mask, device=device)

        if opt_out is None and allowed is None:
            return self._requests.get((batch, device), make)
        mask = self.membership.allowed(opt_out, allowed, batch=batch)
        return self._requests.get((batch, device, mask.numpy().tobytes()), make)

    def _state(self, cache: Cache | None, mask: torch.Tensor) -> RouterState:
        """Return the state to continue from, or a fresh one for an empty or absent cache."""
        held = None if cache is None else held_state(cache)
        if cache is None or int(cache.get_seq_length()) == 0:
            if held is None:
                return RouterState(composition=self.membership.digest, allowed=mask)
            # reset by its user: the layer stays, the set may change
            held.composition, held.allowed = self.membership.digest, mask
            held.clear()
            return held
        if held is None:
            raise OptOutError(
                "This cache was not filled by a composed model, so nothing tells which experts wrote it. Start "
                "with an empty cache."
            )
        held.check(composition=self.membership.digest, allowed=mask)
        return held


def _token_mask(attention_mask: Any, token_mask: torch.Tensor | None, *, length: int) -> torch.Tensor | None:
    """Return True on real tokens for the last ``length`` positions; None if nothing is padded."""
    mask = attention_mask if token_mask is None else token_mask
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        raise ValueError(
            "attention_mask is not (batch, positions), so it does not tell which tokens are padding. Give such a "
            "mask as token_mask beside it."
        )
    return mask[:, -length:].to(torch.bool)


def replace_ffn(base: nn.Module, name: str, layer: nn.Module) -> None:
    """Put an expert layer where the module ``name`` of the base model is."""
    parent, _, attribute = name.rpartition(".")
    setattr(base.get_submodule(parent), attribute, layer)


def decoder_layer(base: nn.Module, prefix: str, index: int) -> nn.Module:
    """Return the decoder layer ``prefix.index`` of a base model."""
    return base.get_submodule(f"{prefix}.{index}")
