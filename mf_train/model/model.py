"""The whole model on one device: embedding, blocks, final norm, head. Parallelism is applied from outside."""

import torch
from torch import Tensor, nn

from mf_train.config.model import ModelConfig
from mf_train.model.attention.base import Context, KeyValueCache
from mf_train.model.attention.masks import (
    Lengths,
    causal_mask,
    document_lengths,
    document_mask,
    document_positions,
    is_padded,
    unpadded_positions,
)
from mf_train.model.attention.rotary import rotary_table
from mf_train.model.block import Block
from mf_train.model.head import Head, soft_capped
from mf_train.model.initialise import initialise
from mf_train.model.norm import Norm


class Embedding(nn.Embedding):
    """Token embedding: integers [B, S] -> [B, S, D], drawn by `initialise`. Split by column it needs no traffic."""

    def __init__(self, vocab_size: int, features: int) -> None:
        super().__init__(vocab_size, features, _weight=torch.empty(vocab_size, features))


class MemoryFormer(nn.Module):
    """A causal language model of memory layers, its dense peer, or a hybrid, as `config` says.

    Weights are drawn from `seed` (see `initialise`); under `torch.device("meta")` they are left unset.
    """

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.final_norm = Norm(config.hidden_size, config.norm, config.norm_epsilon)
        self.head = Head(config.hidden_size, config.vocab_size, config.logit_softcap)
        if not self.head.weight.is_meta:
            initialise(self, seed)

    def forward(
        self,
        token_ids: Tensor | None,
        targets: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        logits_to_keep: int | Tensor = 0,
        documents_bs: Tensor | None = None,
        embedded: Tensor | None = None,
        positions: Tensor | None = None,
        states: list[Tensor] | None = None,
        attentions: list[Tensor] | None = None,
    ) -> Tensor:
        """Logits [B, S, V], or with `targets` [B, S] the cross-entropy of each token in nats [B, S].

        A target of -100 has no loss. `attention_mask` [B, T] is 0 at padding; positions count from the first token
        that is not padding. One of [B or 1, H or 1, S, T] is the whole mask, boolean (True: attend) or added to the
        scores. `cache` holds the keys and values of earlier positions, or a `StateCache` what attention of another kind
        keeps of them, and takes the new ones. With `logits_to_keep` above 0 the head computes the
        logits of so many last positions only, or of those that a tensor of indices names. `embedded` [B, S, D] stands
        for the embeddings of token ids, `positions` [B or 1, S] for the positions of the rotary embedding. `states`
        gets the input of each block and what the head gets, `attentions` the softmax of each block's attention.
        `documents_bs` [B, S] numbers the documents of packed rows, never decreasing along a row: every document gets
        what it would get alone. Raises ValueError for another shape, or together with a padding mask or a cache, and
        for a whole mask or `attentions` where not every layer's attention is softmax.
        """
        x = self.embedding(token_ids) if embedded is None else embedded
        if documents_bs is not None:
            _check_documents(documents_bs, x, attention_mask, cache)
        context = self._context(x, attention_mask, cache, documents_bs, positions, attentions)
        for block in self.blocks:
            if states is not None:
                states.append(x)
            x = block(x, context)
        if states is not None:
            states.append(self.final_norm(x))
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        products: Tensor = self.head(self.final_norm(x[:, kept]))
        if targets is None:
            return soft_capped(products, self.config.logit_softcap)
        return self.head.token_losses(products, targets, raw=True)

    def _context(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        cache: KeyValueCache | None,
        documents_bs: Tensor | None,
        positions: Tensor | None,
        attentions: list[Tensor] | None,
    ) -> Context:
        """What the blocks' attention needs, of `forward`'s arguments and what the blocks get, x [B, S, D]."""
        kinds: set[str] = set(self.config.attention_kinds)
        whole = attention_mask is not None and attention_mask.dim() == 4
        if kinds != {"softmax"}:
            _check_softmax_alone(kinds, whole, attentions)
        past = cache.get_seq_length() if cache is not None else 0
        length = x.shape[1]
        padding = attention_mask if not whole and is_padded(attention_mask) else None
        mask = attention_mask if whole else None
        if not whole and "softmax" in kinds:
            mask = causal_mask(length, past, padding, x.device)
        if positions is None:
            positions = torch.arange(past, past + length, device=x.device)
            if padding is not None:
                positions = unpadded_positions(padding, length)
        documents: Lengths | None = None
        if documents_bs is not None:
            positions = document_positions(documents_bs)
            compiling = torch.compiler.is_compiling()
            if compiling and "softmax" in kinds:
                mask = document_mask(documents_bs, x.dtype)
            if not compiling or kinds != {"softmax"}:
                documents = document_lengths(documents_bs)
        rotary = rotary_table(positions, self.config.rotary_size, self.config.rotary_base)
        own = None if padding is None else padding[:, -length:]
        return Context(rotary, mask, own, documents, cache, attentions)


def _check_softmax_alone(kinds: set[str], whole: bool, attentions: list[Tensor] | None) -> None:
    named = ", ".join(sorted(kinds - {"softmax"}))
    if whole:
        raise ValueError(
            f"attention_mask has 4 dimensions and model.attention is {named}: a whole mask is for softmax in every "
            "layer, give [B, T], 0 at padding"
        )
    if attentions is not None:
        raise ValueError(
            f"attentions are asked for and model.attention is {named}, which has no weights [B, H, S, T]: leave "
            "attentions (output_attentions) out"
        )


def _check_documents(
    documents_bs: Tensor, x: Tensor, attention_mask: Tensor | None, cache: KeyValueCache | None
) -> None:
    if documents_bs.shape != x.shape[:2]:
        raise ValueError(
            f"documents_bs has shape {tuple(documents_bs.shape)} and token_ids {tuple(x.shape[:2])}: "
            "give the number of every token's document"
        )
    if attention_mask is not None or cache is not None:
        raise ValueError("documents_bs goes with whole packed rows: leave out attention_mask and cache")
