"""`memoryformer generate`: continues a text with a standalone model, a piece at a time."""

from collections.abc import Iterator
from pathlib import Path

import torch

from mf_train.data.tokenizer import Tokenizer
from mf_train.errors import UserError
from mf_train.model.model import MemoryFormer
from mf_train.standalone.decoding import FastPath
from mf_train.standalone.exported.cache import Cache
from mf_train.standalone.use.load import load_model

_INCOMPLETE = "\ufffd"  # what bytes that are not yet a whole character decode to


def generate(
    model: Path, prompt: str, max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0
) -> Iterator[str]:
    """Yield the prompt and then its continuation in pieces of text, up to the end of text or `max_new_tokens`.

    Temperature 0 takes the likeliest token each time; else tokens are drawn from softmax(logits / temperature), the
    same ones for the same seed. An empty prompt stands for the beginning of a document. Raises UserError.
    """
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {max_new_tokens}: it must be at least 1")
    if not temperature >= 0:
        raise UserError(f"--temperature is {temperature}: it must be 0 or more")
    plain = load_model(model)
    tokenizer = Tokenizer(model)
    ids = tokenizer.encode(prompt) or [tokenizer.end_of_text_id]
    longest = plain.config.sequence_length
    if len(ids) + max_new_tokens > longest:
        raise UserError(
            f"the prompt's {len(ids)} tokens and --max-new-tokens {max_new_tokens} are more than the {longest} "
            "positions that the model was trained on: shorten one"
        )
    yield prompt
    held: list[int] = []
    for token in new_tokens(plain, ids, max_new_tokens, temperature, seed, tokenizer.vocab_size):
        if token == tokenizer.end_of_text_id:
            break
        held.append(token)
        text = tokenizer.decode(held)
        # at most the last three bytes of a character that is not yet complete are held back
        if not text.endswith(_INCOMPLETE) or len(held) > 3:
            yield text
            held.clear()
    yield tokenizer.decode(held)


@torch.no_grad()
def new_tokens(
    model: MemoryFormer, ids: list[int], count: int, temperature: float, seed: int, vocab_size: int
) -> Iterator[int]:
    """`count` tokens after `ids`, each below `vocab_size`: a model may have rows that no text of its tokenizer uses."""
    generator = torch.Generator().manual_seed(seed)
    cache = Cache(model.config.num_layers)
    fast = FastPath()
    step = torch.tensor(ids)
    for _ in range(count):
        logits = fast.logits(model, step, cache.keys, cache.values) if len(step) == 1 else None
        if logits is None:
            logits = model(step.unsqueeze(0), cache=cache)[:, -1]
        logits = logits[0, :vocab_size].float()
        if temperature > 0:
            probabilities = (logits / temperature).softmax(-1)
            token = int(torch.multinomial(probabilities, 1, generator=generator))
        else:
            token = int(logits.argmax())
        yield token
        step = torch.tensor([token])
