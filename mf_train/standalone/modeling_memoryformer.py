"""The plain model as a `transformers` causal language model; a converted model carries a copy of this file."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from mf_train.model.head import IGNORED
from mf_train.model.model import MemoryFormer
from mf_train.standalone.configuration_memoryformer import MemoryFormerConfig


class MemoryFormerForCausalLM(PreTrainedModel, GenerationMixin):
    """A converted MemoryFormer or dense peer: token ids in, next-token logits, loss and key-value cache out."""

    config_class = MemoryFormerConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules = ["MemoryFormerBlock", "DenseBlock"]  # noqa: RUF012 - transformers' way
    _supports_sdpa = True

    def __init__(self, config: MemoryFormerConfig) -> None:
        super().__init__(config)
        self.model = MemoryFormer(config.to_model_config())
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
    ) -> Any:
        """Logits [B, S, V] of token ids [B, S].

        attention_mask [B, T] is 0 at padding, T counting cached positions too. With `labels` [B, S] the loss is the
        mean cross-entropy in nats of predicting labels[:, i + 1] at position i, -100 being left out. Raises ValueError
        for a mask of another shape, such as static caches need.
        """
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(
                f"attention_mask has {attention_mask.dim()} dimensions: give [B, T], and use the default cache"
            )
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        logits = self.model(input_ids, attention_mask=attention_mask, cache=past_key_values)
        loss = None if labels is None else self._mean_loss(logits, labels)
        if return_dict if return_dict is not None else self.config.return_dict:
            return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
        return tuple(part for part in (loss, logits, past_key_values) if part is not None)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def _mean_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED).to(logits.device)
        losses: Tensor = self.model.head.token_losses(logits, targets)
        return losses.sum() / (targets != IGNORED).sum()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the plain model draws its weights itself, and from_pretrained leaves none to draw."""
