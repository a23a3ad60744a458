"""Attention inside the documents of a packed row: each document against the float64 model that sees it alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mf_train.config import ModelConfig
from mf_train.model import MemoryFormer
from mf_train.model.attention.base import Context
from mf_train.model.attention.masks import (
    document_lengths,
    document_mask,
    document_numbers,
    document_positions,
)
from mf_train.model.attention.rotary import rotary_table
from mf_train.model.attention.softmax import SoftmaxAttention
from tests.model.reference import logits_of, losses_of
from tests.model.test_attention import ListCache
from tests.model.test_model import TOLERANCE, assert_relative, random_tokens
from tests.models import random_model

END = 3
LENGTH = 13
# Places of the end of text in a row: in the middle, one after the other, first, last, everywhere, nowhere.
ENDS = {
    "two documents": [5],
    "three and the end": [3, 8, 12],
    "consecutive": [4, 5, 6],
    "first": [0, 7],
    "first and second": [0, 1],
    "last": [12],
    "every token": list(range(LENGTH)),
    "none": [],
}
MODELS = {
    "memoryformer": {},
    "memoryformer, all of a head rotated": {"score": "scaled_probability", "rotary_fraction": 1.0},
    "dense": {"kind": "dense"},
    "dense, all of a head rotated": {"kind": "dense", "rotary_fraction": 1.0, "rotary_base": 100.0},
}


def packed_tokens(config: ModelConfig, seed: int) -> tuple[Tensor, Tensor]:
    """A row for each of `ENDS`, otherwise without an end of text; targets of which some are ignored."""
    tokens, targets = random_tokens(config, seed, len(ENDS), LENGTH)
    tokens[tokens == END] = END + 1
    for row, places in zip(tokens, ENDS.values(), strict=True):
        row[places] = END
    return tokens, targets


def split(row: list[int]) -> list[slice]:
    """Where the documents of a row are: each up to and with its end of text."""
    places, start = [], 0
    for place, token in enumerate(row):
        if token == END or place == len(row) - 1:
            places.append(slice(start, place + 1))
            start = place + 1
    return places


def test_split_by_hand() -> None:
    pieces = [[row[s] for s in split(row)] for row in ([END, 7, END, END, 8, 9], [7, END], [7], [END])]
    assert pieces == [[[END], [7, END], [END], [8, 9]], [[7, END]], [[7]], [[END]]]


@pytest.mark.parametrize("case", MODELS)
def test_each_document_is_as_if_alone(case: str) -> None:
    """Logits, losses, and every gradient: the sum of those of the documents alone."""
    sizes = {"hidden_size": 24, "num_layers": 2, "num_heads": 2, "bits": 3, "vocab_size": 37}
    config = ModelConfig(**{**sizes, **MODELS[case]})
    seed = 200 + list(MODELS).index(case)
    model = random_model(config, seed)
    tokens, targets = packed_tokens(config, seed + 100)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}

    rows = [
        torch.cat([logits_of(weights, config, row[None, piece])[0] for piece in split(row.tolist())])
        for row in tokens
    ]
    expected_logits = torch.stack(rows)
    expected = losses_of(expected_logits, targets)
    documents = document_numbers(tokens, END)
    logits, losses = model(tokens, documents_bs=documents), model(tokens, targets, documents_bs=documents)
    for name, ours, theirs in zip(ENDS, logits, expected_logits, strict=True):
        assert_relative(ours, theirs, TOLERANCE, name)
    assert_relative(losses, expected, TOLERANCE)

    share = torch.rand(losses.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gradients = torch.autograd.grad((losses * share).sum(), list(model.parameters()))
    expected_gradients = torch.autograd.grad((expected * share).sum(), list(weights.values()))
    for name, ours, theirs in zip(weights, gradients, expected_gradients, strict=True):
        if name.endswith("key.bias"):  # adds the same to every score, but for the rotation
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        else:
            assert_relative(ours, theirs, TOLERANCE, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["memoryformer", "dense"])
def test_narrow_types_come_close(kind: str, dtype: torch.dtype) -> None:
    """To the same model on each document alone; in bfloat16 some codes flip, so tables are small."""
    config = ModelConfig(kind=kind, hidden_size=32, num_layers=2, num_heads=2, bits=4, vocab_size=50)
    model = random_model(config, 21, dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("blocks") and parameter.dim() > 1:
                parameter.mul_(0.1)
        tokens, _ = packed_tokens(config, 22)
        logits = model(tokens, documents_bs=document_numbers(tokens, END))
        alone = [torch.cat([model(row[None, p])[0] for p in split(row.tolist())]).double() for row in tokens]
    assert logits.dtype == dtype
    assert_relative(logits, torch.stack(alone), 1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("kind", ["memoryformer", "dense"])
def test_rotary_positions_begin_anew(kind: str) -> None:
    """Scores depend on distances alone, so a position that is off hardly shows: but here float32 cannot hold the
    angles, and only the same positions have the same ones.
    """
    config = ModelConfig(
        **{"kind": kind, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "bits": 4, "vocab_size": 50},
        rotary_fraction=1.0,
        rotary_base=1e-9,
    )
    model = random_model(config, 31)
    tokens, _ = packed_tokens(config, 32)
    logits = model(tokens, documents_bs=document_numbers(tokens, END))
    alone = [torch.cat([model(row[None, piece])[0] for piece in split(row.tolist())]) for row in tokens]
    torch.testing.assert_close(logits, torch.stack(alone), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["memoryformer", "dense"])
def test_a_row_of_one_document_is_an_ordinary_row(kind: str, dtype: torch.dtype) -> None:
    """Only attention's order of sums may differ. So is a row whose one end of text is its last token."""
    config = ModelConfig(kind=kind, hidden_size=32, num_layers=2, num_heads=2, bits=4, vocab_size=50)
    model = random_model(config, 23, dtype)
    tokens, _ = random_tokens(config, 24, 2, 40)
    tokens[tokens == END] = END + 1
    tokens[1, -1] = END
    with torch.no_grad():
        plain, masked = model(tokens), model(tokens, documents_bs=document_numbers(tokens, END))
    assert_relative(masked, plain.double(), {torch.bfloat16: 1e-2, torch.float32: 1e-6}.get(dtype, 1e-14))


@pytest.mark.parametrize("kind", ["memoryformer", "dense"])
def test_a_changed_token_changes_its_own_document_alone(kind: str) -> None:
    """To the bit, and an end of text is the last token that a document's tokens see nothing of."""
    config = ModelConfig(kind=kind, hidden_size=32, num_layers=2, num_heads=2, bits=4, vocab_size=50)
    model = random_model(config, 25)
    tokens, _ = packed_tokens(config, 26)
    row, documents = tokens[1:2], document_numbers(tokens[1:2], END)  # ends at 3, 8 and 12
    before = model(row, documents_bs=documents)
    for place, end in ((0, 3), (3, 3), (4, 8), (6, 8), (9, 12), (12, 12)):
        changed = row.clone()
        changed[0, place] = (changed[0, place] + 7) % 50
        moved = (model(changed, documents_bs=documents) != before).any(-1)[0].nonzero().flatten().tolist()
        assert moved == list(range(place, end + 1))


def test_numbers_positions_and_masks() -> None:
    tokens = torch.tensor([[5, END, 6, 7, END, END, 8], [END, 5, 6, 7, 8, 9, 9]])
    documents = document_numbers(tokens, END)
    assert documents.tolist() == [[0, 0, 1, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]]
    assert document_positions(documents).tolist() == [[0, 1, 0, 1, 2, 0, 0], [0, 0, 1, 2, 3, 4, 5]]
    assert document_lengths(documents) == (2, 3, 1, 1, 1, 6)
    assert document_lengths(documents[:, 1:]) == (1, 3, 1, 1, 6)
    assert document_positions(documents[:, 1:]).tolist() == [[0, 0, 1, 2, 0, 0], [0, 1, 2, 3, 4, 5]]
    mask = document_mask(documents, torch.bfloat16)
    assert mask.shape == (2, 1, 7, 7) and mask.dtype == torch.bfloat16
    assert set(mask.unique().tolist()) == {0.0, -torch.inf}
    assert (mask[0, 0] == 0).int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize("case", range(8))
def test_attention_in_documents_is_the_masked_one(case: int) -> None:
    """Results and gradients in float64: documents of random lengths, of one token each, and one alone in its row."""
    generator = torch.Generator().manual_seed(case)
    rows, length = 1 + case % 3, 1 if case == 0 else 57
    ends = torch.rand(rows, length, generator=generator) < torch.rand(rows, 1, generator=generator)
    ends[0] = case % 2
    documents = ends.long().cumsum(-1) - ends.long()
    lengths = document_lengths(documents)
    assert sum(lengths) == rows * length and (lengths[:length] == (1,) * length or lengths[0] == length)
    inputs = torch.randn(3, rows, length, 24, generator=generator, dtype=torch.float64).requires_grad_()
    gradient = torch.randn(rows, length, 24, generator=generator, dtype=torch.float64)
    rotary, found = rotary_table(document_positions(documents), 4, 100.0), []
    mask = document_mask(documents, torch.float64)
    for context in (Context(rotary, documents=lengths), Context(rotary, mask)):
        y = SoftmaxAttention(ModelConfig(hidden_size=24, num_heads=3))(*inputs, context)
        found.append((y, *torch.autograd.grad(y, inputs, gradient)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_nothing_of_a_row_s_square_is_kept() -> None:
    """For the backward pass, in any layer."""
    config = ModelConfig(kind="dense", hidden_size=8, num_layers=3, num_heads=1, vocab_size=16)
    model, tokens = MemoryFormer(config), torch.randint(16, (1, 96))
    largest = 0

    def pack(saved: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, saved.numel())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        model(tokens, tokens, documents_bs=document_numbers(tokens, END)).sum().backward()
    assert 0 < largest < 96 * 96


def test_misuse() -> None:
    config = ModelConfig(hidden_size=32, num_layers=1, num_heads=2, bits=4, vocab_size=50)
    model, (tokens, _) = random_model(config, 27), packed_tokens(config, 28)
    documents = document_numbers(tokens, END)
    with pytest.raises(ValueError, match=r"shape \(8, 12\) and token_ids \(8, 13\)"):
        model(tokens, documents_bs=documents[:, 1:])
    with pytest.raises(ValueError, match="leave out attention_mask and cache"):
        model(tokens, documents_bs=documents, attention_mask=torch.ones_like(tokens))
    with pytest.raises(ValueError, match="leave out attention_mask and cache"):
        model(tokens, documents_bs=documents, cache=ListCache())


@pytest.mark.parametrize("kind", ["memoryformer", pytest.param("dense", marks=pytest.mark.slow)])
def test_compiled_with_aot_autograd(kind: str) -> None:
    """`torch.compile` traces it whole and changes no number beyond rounding."""
    config = ModelConfig(kind=kind, hidden_size=32, num_layers=1, num_heads=2, bits=4, vocab_size=48)
    model = random_model(config, 29)
    tokens, targets = packed_tokens(config, 30)

    def losses_of_packed(tokens: Tensor) -> Tensor:
        losses: Tensor = model(tokens, targets, documents_bs=document_numbers(tokens, END))
        return losses

    torch._dynamo.reset()
    compiled = torch.compile(losses_of_packed, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens), losses_of_packed(tokens), rtol=1e-10, atol=1e-12)
