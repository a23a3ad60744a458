"""The plain model as a `transformers` causal language model; a converted model carries a copy of this file."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast

from mf_train.model.attention.masks import causal_mask, unpadded_positions
from mf_train.model.block import Block
from mf_train.model.head import IGNORED, Vocabulary
from mf_train.model.initialise import initialise_parameter
from mf_train.model.model import MemoryFormer as PlainMemoryFormer
from mf_train.model.quantized import use_int8
from mf_train.standalone.exported.configuration_memoryformer import MemoryFormerConfig
from mf_train.standalone.exported.growing_layer import (
    GrowingLayer,
    check_cache,
    grow_in_place,
    room_of,
)
from mf_train.standalone.exported.installed import DECODING
from mf_train.standalone.exported.names import INT8
from mf_train.standalone.exported.paged import PagedCache, take_paged
from mf_train.standalone.exported.state_layer import WithStates


class MemoryFormerBlock(GradientCheckpointingLayer, Block):
    """The plain model's block, of which training keeps the input alone where gradients are checkpointed."""


class MemoryFormer(PlainMemoryFormer):
    """The plain model, which other libraries call by the names that transformers' models have, as TRL does.

    Then it gives the states [B, S, D] that the head gets, as `last_hidden_state`.
    """

    def forward(
        self,
        token_ids: Tensor | None = None,
        *arguments: Any,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool = False,
        **options: Any,
    ) -> Any:
        if input_ids is None and inputs_embeds is None:
            return super().forward(token_ids, *arguments, **options)
        if use_cache:
            raise ValueError("use_cache is true: the model without its head keeps no cache")
        states: list[Tensor] = []
        options |= {"embedded": inputs_embeds, "positions": position_ids, "states": states}
        super().forward(input_ids, logits_to_keep=1, **options)
        return BaseModelOutput(last_hidden_state=states[-1])


class MemoryFormerForCausalLM(PreTrainedModel, GenerationMixin):
    """A converted MemoryFormer or dense peer: token ids in, next-token logits, loss and key-value cache out."""

    config_class = MemoryFormerConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules = ["MemoryFormerBlock"]  # noqa: RUF012 - transformers' way
    # where the configuration says so
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _can_compile_fullgraph = True
    supports_gradient_checkpointing = True

    def __init__(self, config: MemoryFormerConfig) -> None:
        super().__init__(config)
        if config.tie_word_embeddings and config.table_dtype == INT8:
            raise ValueError(
                "tie_word_embeddings is true: the LM head of an int8 model is a weight of its own"
            )
        meta = torch.get_default_device().type == "meta"  # where nothing is drawn
        self.model = PlainMemoryFormer(config.to_model_config(), seed=0 if meta else _draw_seed())
        self.model.__class__ = MemoryFormer
        for block in self.model.blocks:
            block.__class__ = MemoryFormerBlock
        if config.table_dtype == INT8:
            use_int8(self.model)
            self._keep_in_fp32_modules_strict = {"scales"}  # of int8 rows, whatever dtype is asked for
        for parameter in self.parameters():  # drawn already, but on the meta device
            parameter._is_hf_initialized = not parameter.is_meta  # type: ignore[attr-defined]
        self._fast_path = None if DECODING is None else DECODING.FastPath()
        self.vocab_size = config.vocab_size
        self.gradient_checkpointing = False
        self.post_init()

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        """As transformers', but a weight that the files lack is an error instead of a warning and a random weight.

        With `output_loading_info` it is drawn as well, and the caller told. An int8 tensor, which cannot be drawn, must
        be there whatever the options, and of its size.
        """
        wants_report = options.pop("output_loading_info", False)
        model, report = super().from_pretrained(*arguments, output_loading_info=True, **options)
        missing = sorted(report["missing_keys"])
        if missing and (model.config.table_dtype or not wants_report):
            raise ValueError(f"{arguments[0]}: {len(missing)} weights are missing, such as {missing[0]}")
        if model.config.table_dtype and (unfit := sorted(map(str, report["mismatched_keys"]))):
            raise ValueError(
                f"{arguments[0]}: int8 weights of other sizes cannot be drawn anew, such as {unfit[0]}"
            )
        return (model, report) if wants_report else model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **others: Any,
    ) -> Any:
        """Logits [B, S, V] of token ids [B, S] or embeddings `inputs_embeds` [B, S, D].

        attention_mask [B, T] is 0 at padding, T counting cached positions too; one of [B or 1, H or 1, S, T], boolean
        (True: attend) or added to the scores, says all, T being what a static cache has room for. position_ids
        [B or 1, S] are those of the rotary embedding, by default counted from the first token that is not padding. With
        `labels` [B, S] the loss is the mean cross-entropy in nats of predicting labels[:, i + 1] at position i, -100
        being left out; with `shift_labels` of predicting shift_labels[:, i]; with `num_items_in_batch` the sum over
        that number. `logits_to_keep` above 0 gives the logits of so many last positions only, and a tensor [N] of
        indices of those. `output_hidden_states`: the input of each block and of the head, [B, S, D] each.
        `output_attentions`: the softmax of each block's attention, [B, H, S, T], with which attention takes more time
        and memory; other kinds of attention have none. A DynamicCache gets layers that grow in place, or hold a state,
        and there is one unless `use_cache`, by default the configuration's, is false, or gradients are checkpointed.

        Raises TypeError for an argument that it does not know, unless it is None or False, and ValueError for one of
        another shape or another kind of cache, for labels together with `logits_to_keep`, and for a cache where
        gradients are checkpointed.

        One more token of each sequence on a CPU, without gradients or padding, is one call of the C++ library where
        the package that made this model is installed.
        """
        # not in the signature, where Trainer would take it for a label that every batch must have
        shift_labels = others.pop("shift_labels", None)
        paged = take_paged(others)
        _refuse_unknown(others)
        if paged is not None:
            elsewhere = (inputs_embeds, past_key_values, labels, shift_labels)
            if any(each is not None for each in elsewhere) or output_hidden_states or output_attentions:
                raise ValueError("cache, of continuous batching, goes with input_ids alone")
            return self._forward_paged(input_ids, attention_mask, position_ids, logits_to_keep, paged)
        given = _only_one(input_ids, inputs_embeds)
        targets = _shifted(labels) if shift_labels is None else shift_labels
        _check_kept(logits_to_keep, targets)
        past_key_values = self._cache(past_key_values, use_cache)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        room = room_of(past_key_values)
        batch, length = given.shape[:2]
        self._check_mask(attention_mask, batch, length, past, room)
        _check_shape("labels", labels, (batch, length), "the shape of input_ids")
        _check_shape("shift_labels", shift_labels, (batch, length), "the shape of input_ids")
        if position_ids is not None and len(position_ids) != 1:
            _check_shape("position_ids", position_ids, (batch, length), "[B, S] or [1, S]")
        states, attentions = self._records(output_hidden_states, output_attentions)

        kinds = self.model.config.attention_kinds
        layers = grow_in_place(past_key_values, kinds)
        states_too = past_key_values is not None and set(kinds) != {"softmax"}
        logits = None
        one_more = length == 1 and targets is None and states is None and attentions is None
        # only on a CPU, since a look at positions or mask would wait for a GPU, and end a graph that is compiled
        if one_more and layers is not None and given.is_cpu and not torch.compiler.is_compiling():
            if input_ids is not None and (position_ids is None or bool((position_ids == past).all())):
                logits = self._decode(input_ids, attention_mask, layers)
        if logits is None:
            if room is not None and (attention_mask is None or attention_mask.dim() == 2):
                if position_ids is None:
                    position_ids = _positions(attention_mask, past, given)
                attention_mask = causal_mask(length, past, attention_mask, given.device, room)
            logits = self.model(
                input_ids,
                attention_mask=attention_mask,
                cache=WithStates(past_key_values) if states_too else past_key_values,
                logits_to_keep=logits_to_keep,
                embedded=inputs_embeds,
                positions=position_ids,
                states=states,
                attentions=attentions,
            )
        loss = None if targets is None else self._loss(logits, targets, num_items_in_batch)
        parts = {
            "loss": loss,
            "logits": logits,
            "past_key_values": past_key_values,
            "hidden_states": None if states is None else tuple(states),
            "attentions": None if attentions is None else tuple(attentions),
        }
        if return_dict if return_dict is not None else self.config.return_dict:
            return CausalLMOutputWithPast(**parts)
        return tuple(part for part in parts.values() if part is not None)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: Any) -> None:
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.model.head = new_embeddings

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """As transformers': another number of tokens, the first of them as they were; returns the embedding.

        A new token's row is the mean of all earlier rows, or with `mean_resizing` off drawn as the plain model's are.
        Raises ValueError for an int8 model.
        """
        before = self.model.config.vocab_size
        size = new_num_tokens or before
        if pad_to_multiple_of:
            if not isinstance(pad_to_multiple_of, int):  # which transformers refuses
                return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
            size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
        if size != before:
            if self.config.table_dtype is not None:
                raise ValueError("an int8 model keeps its tokens: resize the float model that it was made of")
            embedding: Any = self.get_input_embeddings()
            head: Any = self.get_output_embeddings()
            self._resize_rows("embedding.weight", embedding, size, mean_resizing)
            self._resize_rows("head.weight", head, size, mean_resizing)
            embedding.num_embeddings = head.out_features = head.vocab_size = size
            self.model.config = replace(self.model.config, vocab_size=size)
            self.config.vocab_size = self.vocab_size = size
            self.tie_weights()
        return self.model.embedding

    @torch.no_grad()
    def _resize_rows(self, name: str, module: nn.Module, size: int, by_mean: bool) -> None:
        old: Any = module.weight
        new = nn.Parameter(old.new_empty(size, old.shape[1]), requires_grad=old.requires_grad)
        initialise_parameter(name, new, self.model.config, _draw_seed())
        kept = min(size, len(old))
        if by_mean:
            new[kept:] = old.float().mean(0).to(old.dtype)
        new[:kept] = old[:kept]
        module.weight = new

    def _forward_paged(
        self,
        input_ids: Tensor | None,
        mask: Tensor | None,
        position_ids: Tensor | None,
        logits_to_keep: int | Tensor,
        arguments: Mapping[str, Any],
    ) -> CausalLMOutputWithPast:
        """As continuous batching asks: the texts' new tokens lie in one row, and its mask keeps them apart."""
        if others := sorted(set(self.model.config.attention_kinds) - {"softmax"}):
            raise ValueError(
                f"continuous batching pages keys and values and model.attention is {others[0]}, which keeps a state: "
                "call generate instead"
            )
        if input_ids is None or mask is None or position_ids is None or arguments["block_table"] is not None:
            raise ValueError(
                "continuous batching needs a mask: load the model with attn_implementation='sdpa'"
            )
        logits = self.model(
            input_ids,
            attention_mask=mask,
            cache=PagedCache(arguments),
            logits_to_keep=logits_to_keep,
            positions=position_ids,
        )
        return CausalLMOutputWithPast(logits=logits)

    def _decode(
        self, input_ids: Tensor, attention_mask: Tensor | None, layers: list[GrowingLayer]
    ) -> Tensor | None:
        """Logits [B, 1, V] of one more token by the fast path, or None."""
        padded = attention_mask is not None and (attention_mask.dim() == 4 or not bool(attention_mask.all()))
        if self._fast_path is None or padded:
            return None
        keys, values = (
            [getattr(layer, name) for layer in layers] for name in ("growing_keys", "growing_values")
        )
        logits = self._fast_path.logits(self.model, input_ids[:, 0], keys, values)
        if logits is None:
            return None
        for layer in layers:
            if not layer.is_initialized:
                layer.lazy_initialization(logits)
        return logits.unsqueeze(1)

    def _loss(self, logits: Tensor, targets: Tensor, items: int | Tensor | None) -> Tensor:
        targets = targets.to(logits.device)
        valid = targets != IGNORED
        if not torch.compiler.is_compiling():
            outside = valid & ((targets < 0) | (targets >= logits.shape[-1]))
            message = f"labels must be tokens, 0 to {logits.shape[-1] - 1}, or {IGNORED} for none"
            if not logits.is_cpu:  # where a look would wait for the device, as torch's own loss has it
                torch._assert_async(~outside.any(), message)
            elif outside.any():
                raise IndexError(f"{message}, got {int(targets[outside][0])}")
        losses = Vocabulary(logits.shape[-1]).token_losses(logits, targets)
        if isinstance(items, Tensor):
            items = items.to(losses.device)
        return losses.sum() / (valid.sum() if items is None else items)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draws what from_pretrained had to make anew, as the plain model draws all the rest itself."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for parameter in module.parameters(recurse=False):
            if not getattr(parameter, "_is_hf_initialized", False) and not parameter.is_meta:
                initialise_parameter(names[parameter], parameter, self.model.config, _draw_seed())

    def _cache(self, given: Any, use_cache: bool | None) -> Any:
        """The cache to use: that which was given, a new one, or none."""
        checkpointed = self.gradient_checkpointing and self.training
        if checkpointed and given is not None:
            raise ValueError(
                "past_key_values do not go with gradient checkpointing in training: leave them out"
            )
        wanted = self.config.use_cache if use_cache is None else use_cache
        if given is None:
            return DynamicCache() if wanted and not checkpointed else None
        check_cache(given, self.model.config.attention_kinds)
        return given

    def _check_mask(
        self, mask: Tensor | None, batch: int, length: int, past: int | Tensor, room: int | None
    ) -> None:
        if mask is None:
            return
        if mask.dim() != 4:
            # a static cache's length is a tensor, at which a compiler cannot look
            if not (isinstance(past, Tensor) and torch.compiler.is_compiling()):
                wanted = "[B, T], cached positions included, or the whole mask [B, H, S, T]"
                _check_shape("attention_mask", mask, (batch, int(past) + length), wanted)
            return
        heads = self.config.num_attention_heads
        rest = (length, int(past) + length if room is None else room)
        if mask.shape[0] not in (1, batch) or mask.shape[1] not in (1, heads) or mask.shape[2:] != rest:
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}, not ({batch} or 1, {heads} or 1, "
                f"{rest[0]}, {rest[1]}): give the whole mask [B, H, S, T], or [B, T]"
            )
        if mask.dtype not in (torch.bool, self.dtype):
            raise ValueError(
                f"attention_mask is {mask.dtype}: give booleans (True: attend), or {self.dtype} to add to the scores"
            )

    def _records(
        self, hidden_states: bool | None, attentions: bool | None
    ) -> tuple[list[Tensor] | None, list[Tensor] | None]:
        """Lists to be filled with what was asked for; None for what was not."""
        if hidden_states is None:
            hidden_states = self.config.output_hidden_states
        if attentions is None:
            attentions = self.config.output_attentions
        return [] if hidden_states else None, [] if attentions else None


# arguments of `generate` that it hands on to forward, with stop strings for one
_OF_GENERATE = ("tokenizer", "assistant_tokenizer")


def _refuse_unknown(arguments: Mapping[str, Any]) -> None:
    unknown = [
        name
        for name, value in arguments.items()
        if value is not None and value is not False and name not in _OF_GENERATE
    ]
    if unknown:
        raise TypeError(f"forward does not know {', '.join(sorted(unknown))}: leave it out")


def _only_one(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    given = inputs_embeds if input_ids is None else input_ids
    if given is None or (input_ids is not None and inputs_embeds is not None):
        raise ValueError("give either input_ids or inputs_embeds")
    if given.dim() != (3 if input_ids is None else 2):
        raise ValueError(f"input_ids [B, S] or inputs_embeds [B, S, D] has shape {tuple(given.shape)}")
    return given


def _check_kept(logits_to_keep: int | Tensor, targets: Tensor | None) -> None:
    if targets is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
        raise ValueError(f"logits_to_keep is {logits_to_keep}: labels need the logits of all positions")
    if isinstance(logits_to_keep, int) and logits_to_keep < 0:
        raise ValueError(f"logits_to_keep is {logits_to_keep}: give a number of positions, or 0 for all")


def _positions(padding: Tensor | None, past: int | Tensor, given: Tensor) -> Tensor:
    """[B or 1, S] for new positions after `past` ones."""
    if padding is not None:
        return unpadded_positions(padding, given.shape[1])
    return (torch.arange(given.shape[1], device=given.device) + past)[None]


def _draw_seed() -> int:
    """Of torch's generator, so that weights follow torch.manual_seed."""
    return int(torch.randint(2**62, (), device="cpu"))


def _shifted(labels: Tensor | None) -> Tensor | None:
    """What each position predicts: the next label, and none at the end."""
    return None if labels is None else nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def _check_shape(name: str, tensor: Tensor | None, shape: tuple[int, int], wanted: str) -> None:
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {shape}: give {wanted}")
