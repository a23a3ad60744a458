"""What a query may attend to: earlier positions, no padding, its own document."""

import torch
import torch.nn.functional as F
from torch import Tensor

# of documents that lie one behind another, row by row; none reaches over a row's end
Lengths = tuple[int, ...]


def is_padded(padding: Tensor | None) -> bool:
    """Whether there is padding (0) in [B, T]: a look, which would end a graph that is compiled, and there is yes."""
    return padding is not None and (torch.compiler.is_compiling() or not bool(padding.all()))


def causal_mask(
    length: int,
    past: int | Tensor,
    padding: Tensor | None,
    device: torch.device,
    total: int | None = None,
) -> Tensor | None:
    """Boolean mask [B or 1, 1, S, T] (True: attend) for S new positions after `past` ones, or None where plain
    causal attention or attention to everything says the same. padding [B, past + S]: 0 where a position is padding.

    With `total` there always is a mask, and its T is that: of keys that are not all there yet.
    """
    padded = is_padded(padding)
    if total is None:
        if not padded and (past == 0 or length == 1):
            return None
        total = int(past) + length
    query = (torch.arange(length, device=device) + past).unsqueeze(-1)
    key = torch.arange(total, device=device)
    mask = (key <= query)[None, None]
    if padding is None or not padded:
        return mask
    padding = F.pad(padding, (0, total - padding.shape[1]))
    attends = mask & padding[:, None, None, :].bool()
    # a query with nothing before it attends to itself, so that its softmax is not empty
    return attends | (~attends.any(-1, keepdim=True) & (key == query))


def unpadded_positions(padding: Tensor, length: int) -> Tensor:
    """Of the last `length` positions, counted from the first that is not padding: [B, T], 0 at padding -> [B, S]."""
    return (padding.long().cumsum(-1) - 1).clamp_(min=0)[:, -length:]


def document_numbers(token_ids: Tensor, end_of_text: int) -> Tensor:
    """The document of every position of packed rows, counted from 0 in each row: [B, S] -> int64 [B, S].

    An end of text belongs to the document that it ends.
    """
    ends = (token_ids == end_of_text).long()
    return ends.cumsum(-1) - ends


def document_positions(documents_bs: Tensor) -> Tensor:
    """Positions that begin at 0 in each document: numbers that never decrease along a row -> int64 [B, S]."""
    documents_bs = documents_bs.contiguous()
    starts = torch.searchsorted(documents_bs, documents_bs)  # the first place of an equal number
    return torch.arange(documents_bs.shape[-1], device=documents_bs.device) - starts


def document_lengths(documents_bs: Tensor) -> Lengths:
    """Lengths of all documents, row by row: numbers [B, S] that never decrease along a row -> integers, in all B S.

    Waits for the device.
    """
    starts = (document_positions(documents_bs).flatten() == 0).nonzero().flatten().tolist()
    return tuple(end - start for start, end in zip(starts, [*starts[1:], documents_bs.numel()], strict=True))


def document_mask(documents_bs: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores so that a token attends to itself and what is before it in its own document.

    [B, S] -> [B, 1, S, S] of 0 and minus infinity: what `document_lengths` says, where a compiler traces shapes that
    must not depend on the tokens.
    """
    length = documents_bs.shape[-1]
    attends = documents_bs[:, None, :, None] == documents_bs[:, None, None, :]
    attends &= torch.ones(length, length, dtype=torch.bool, device=documents_bs.device).tril()
    return torch.zeros(attends.shape, dtype=dtype, device=attends.device).masked_fill_(~attends, -torch.inf)
