"""`memoryformer generate`: continues a text with a standalone model, a piece at a time."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from mf_train.data.open_tokenizer import tokenizer_in
from mf_train.data.tokenizer import Tokenizer
from mf_train.errors import UserError
from mf_train.model.model import MemoryFormer
from mf_train.standalone.decoding import FastPath
from mf_train.standalone.exported.cache import Cache
from mf_train.standalone.use.chat import ChatTokenizer
from mf_train.standalone.use.load import load_model
from mf_train.standalone.use.sampling import Sampling

_CONTEXT_TOKENS = 8
_SEEDS = -(2**63), 2**64 - 1  # that torch's generators take
_INCOMPLETE = "\ufffd"  # what bytes that are not yet a whole character decode to


def generate(
    model: Path,
    prompt: str,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
    chat: bool = False,
) -> Iterator[str]:
    """Yield the prompt and then its continuation in pieces of text, up to the end of text or `max_new_tokens`.

    The next four are `Sampling`'s; the same `seed` draws the same tokens. The continuation ends before the first text
    of `stop`. An empty prompt stands for the beginning of a document. With `chat` the prompt is a user's message in the
    tokenizer's template, and the answer alone is given. Raises UserError.
    """
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {max_new_tokens}: it must be at least 1")
    if not _SEEDS[0] <= seed <= _SEEDS[1]:
        raise UserError(f"--seed is {seed}: it must be from {_SEEDS[0]} to {_SEEDS[1]}")
    if "" in stop:
        raise UserError("--stop is empty: give the text to stop before, or leave it out")
    plain = load_model(model)
    tokenizer = ChatTokenizer(model) if chat else tokenizer_in(model)
    ids = tokenizer.encode(prompt) or [tokenizer.end_of_text_id]
    longest = plain.config.sequence_length
    if len(ids) + max_new_tokens > longest:
        raise UserError(
            f"the prompt's {len(ids)} tokens and --max-new-tokens {max_new_tokens} are more than the {longest} "
            "positions that the model was trained on: shorten one"
        )
    vocab_size = min(tokenizer.vocab_size, plain.config.vocab_size)
    tokens = new_tokens(plain, ids, max_new_tokens, temperature, seed, vocab_size, sampling)
    if not chat:
        yield prompt
    yield from before_any(_texts(tokens, tokenizer, ids[-_CONTEXT_TOKENS:]), stop)


def _texts(
    tokens: Iterator[int], tokenizer: Tokenizer | ChatTokenizer, before: Sequence[int] = ()
) -> Iterator[str]:
    """Of tokens up to the end of text, whole characters each time.

    They are decoded with those `before` them: some tokenizers drop the space that a text begins with.
    """
    held: list[int] = []
    context = list(before)
    for token in tokens:
        if token == tokenizer.end_of_text_id:
            break
        held.append(token)
        text = _decode_after(context, held, tokenizer)
        # at most the last three bytes of a character that is not yet complete are held back
        if not text.endswith(_INCOMPLETE) or len(held) > 3:
            yield text
            context, held = [*context, *held][-_CONTEXT_TOKENS:], []
    yield _decode_after(context, held, tokenizer)


def _decode_after(context: list[int], ids: list[int], tokenizer: Tokenizer | ChatTokenizer) -> str:
    return tokenizer.decode([*context, *ids])[len(tokenizer.decode(context)) :]


def before_any(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """The pieces up to the first place where one of `stops` begins. What may yet become one is held back."""
    held = ""
    for piece in pieces:
        held += piece
        places = [place for place in map(held.find, stops) if place >= 0]
        if places:
            yield held[: min(places)]
            return
        kept = max((_overlap(held, stop) for stop in stops), default=0)
        yield held[: len(held) - kept]
        held = held[len(held) - kept :]
    yield held


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text with which `stop` begins."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)


@torch.no_grad()
def new_tokens(
    model: MemoryFormer,
    ids: list[int],
    count: int,
    temperature: float,
    seed: int,
    vocab_size: int,
    sampling: Sampling | None = None,
) -> Iterator[int]:
    """`count` tokens after `ids`, each below `vocab_size`: a model may have rows that no text of its tokenizer uses.

    They are chosen by `sampling`, by default that of the temperature alone.
    """
    sampling = sampling or Sampling(temperature)
    generator = torch.Generator().manual_seed(seed)
    cache = Cache(model.config.num_layers)
    fast = FastPath()
    step = torch.tensor(ids)
    seen = list(ids)
    for _ in range(count):
        logits = fast.logits(model, step, cache.keys, cache.values) if len(step) == 1 else None
        if logits is None:
            logits = model(step.unsqueeze(0), cache=cache)[:, -1]
        token = sampling.choose(logits[0, :vocab_size].float(), seen, generator)
        yield token
        seen.append(token)
        step = torch.tensor([token])
