"""The plain model as a `transformers` causal language model; a converted model carries a copy of this file."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from mf_train.model.head import IGNORED
from mf_train.model.model import MemoryFormer
from mf_train.model.quantized import use_int8
from mf_train.standalone.exported.configuration_memoryformer import MemoryFormerConfig
from mf_train.standalone.exported.growing_layer import GrowingLayer, grow_in_place
from mf_train.standalone.exported.installed import decoding
from mf_train.standalone.exported.names import INT8


class MemoryFormerForCausalLM(PreTrainedModel, GenerationMixin):
    """A converted MemoryFormer or dense peer: token ids in, next-token logits, loss and key-value cache out."""

    config_class = MemoryFormerConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules = ["MemoryFormerBlock", "DenseBlock"]  # noqa: RUF012 - transformers' way
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ["scales"]  # noqa: RUF012 - of int8 rows, whatever dtype is asked for

    def __init__(self, config: MemoryFormerConfig) -> None:
        super().__init__(config)
        self.model = MemoryFormer(config.to_model_config())
        if config.table_dtype == INT8:
            use_int8(self.model)
        self._fast_path = decoding().FastPath() if decoding() else None
        self.post_init()

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        """As transformers', but a weight that the files lack is an error instead of a warning and a random weight."""
        wants_report = options.pop("output_loading_info", False)
        model, report = super().from_pretrained(*arguments, output_loading_info=True, **options)
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"{arguments[0]}: {len(missing)} weights are missing, such as {missing[0]}")
        return (model, report) if wants_report else model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
    ) -> Any:
        """Logits [B, S, V] of token ids [B, S].

        attention_mask [B, T] is 0 at padding, T counting cached positions too. With `labels` [B, S] the loss is the
        mean cross-entropy in nats of predicting labels[:, i + 1] at position i, -100 being left out.
        `logits_to_keep` above 0 gives the logits of so many last positions only. A DynamicCache gets layers that
        grow in place. Raises ValueError for a mask of another shape, such as static caches need, and for labels
        together with `logits_to_keep`.

        One more token of each sequence on a CPU, without gradients or padding, is one call of the C++ library where
        the package that made this model is installed.
        """
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(
                f"attention_mask has {attention_mask.dim()} dimensions: give [B, T], and use the default cache"
            )
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        if labels is not None and logits_to_keep:
            raise ValueError(f"logits_to_keep is {logits_to_keep}: labels need the logits of all positions")
        layers = grow_in_place(past_key_values, self.config.num_hidden_layers)
        logits = None
        if layers is not None and labels is None and input_ids.shape[1:] == (1,):
            logits = self._decode(input_ids, attention_mask, layers)
        if logits is None:
            logits = self.model(
                input_ids,
                attention_mask=attention_mask,
                cache=past_key_values,
                logits_to_keep=logits_to_keep,
            )
        loss = None if labels is None else self._mean_loss(logits, labels)
        if return_dict if return_dict is not None else self.config.return_dict:
            return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
        return tuple(part for part in (loss, logits, past_key_values) if part is not None)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def _decode(
        self, input_ids: Tensor, attention_mask: Tensor | None, layers: list[GrowingLayer]
    ) -> Tensor | None:
        """Logits [B, 1, V] of one more token by the fast path, or None."""
        if self._fast_path is None or (attention_mask is not None and not bool(attention_mask.all())):
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

    def _mean_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED).to(logits.device)
        losses: Tensor = self.model.head.token_losses(logits, targets)
        return losses.sum() / (targets != IGNORED).sum()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the plain model draws its weights itself, and from_pretrained leaves none to draw."""
