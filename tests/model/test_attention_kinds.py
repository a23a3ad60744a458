"""Every kind of attention: its definition, causality, pieces and caches, padding, documents, recomputation.

A kind of the table `KINDS` takes part by a reference in `REFERENCES`, a few lines in float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from mf_train.config import ModelConfig
from mf_train.config.model import HASH_SAMPLE, AttentionKind
from mf_train.model.attention import ecoformer as ecoformer_module
from mf_train.model.attention import linear
from mf_train.model.attention.base import Attention, Context
from mf_train.model.attention.kinds import KINDS, build_attention
from mf_train.model.attention.masks import document_numbers
from mf_train.model.attention.performer import random_features
from mf_train.model.attention.rotary import rotary_table
from mf_train.parallel.recompute import recompute_blocks
from mf_train.standalone.exported.cache import Cache
from tests.model.test_model import random_tokens
from tests.models import random_model

CONFIG = ModelConfig(
    hidden_size=32,
    num_layers=3,
    num_heads=2,
    bits=4,
    expand_bits=1,
    vocab_size=50,
    sequence_length=40,
    qk_norm=True,
    attention_window=5,
    attention_features=24,
    attention_seed=7,
    attention_segment=6,
    attention_rank=2,
    attention_slots=3,
    attention_filter=3,
    attention_bits=6,
    attention_anchors=5,
)
LENGTH = 40
KINDS_WITH_STATE = [kind for kind in KINDS if kind != "softmax"]


def config_of(kind: str, **keys: Any) -> ModelConfig:
    return replace(CONFIG, **{"attention": kind} | keys)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that these short rows are several chunks."""
    monkeypatch.setattr(linear, "CHUNK", 7)


# Definitions: of one head and its number, q, k and v [S, head] -> [S, head]


def softmax(attention: Any, q: Tensor, k: Tensor, v: Tensor, head: int) -> Tensor:
    scores = q @ k.T / math.sqrt(q.shape[1])
    return scores.masked_fill(~torch.ones_like(scores).tril().bool(), -torch.inf).softmax(-1) @ v


def window(attention: Any, q: Tensor, k: Tensor, v: Tensor, head: int) -> Tensor:
    i = torch.arange(len(q))
    distance = i[:, None] - i
    inside = (distance >= 0) & (distance < CONFIG.attention_window)
    scores = q @ k.T / math.sqrt(q.shape[1])
    return scores.masked_fill(~inside, -torch.inf).softmax(-1) @ v


def performer(attention: Any, q: Tensor, k: Tensor, v: Tensor, head: int) -> Tensor:
    w = random_features(7, attention.layer, 24, q.shape[1], q.device, q.dtype).T
    q, k = (x / q.shape[1] ** 0.25 for x in (q, k))
    phi_q = torch.exp(q @ w.T - (q @ w.T).amax(-1, keepdim=True).detach()) + 1e-6
    phi_k = torch.exp(k @ w.T - k.square().sum(-1, keepdim=True) / 2)
    weights = (phi_q @ phi_k.T).tril()
    return weights / weights.sum(-1, keepdim=True) @ v


def cosformer(attention: Any, q: Tensor, k: Tensor, v: Tensor, head: int) -> Tensor:
    i = torch.arange(len(q)).clamp(max=CONFIG.sequence_length - 1)
    distance = (i[:, None] - i).to(q.dtype)
    weights = (q.relu() @ k.relu().T * torch.cos(math.pi / 2 * distance / CONFIG.sequence_length)).tril()
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-6) @ v


def flow(attention: Any, q: Tensor, k: Tensor, v: Tensor, head: int) -> Tensor:
    q, k = q.sigmoid(), k.sigmoid()
    n = torch.arange(1, len(q) + 1).to(q.dtype)
    weights = (q @ k.T).tril()  # of sink i and source j
    back = (k @ q.T).tril()  # of source i and sink j
    taken, given = weights.sum(-1) / n, back.sum(-1) / n
    allotted = ((weights / given).sum(-1) / n).sigmoid()
    strength = ((back / taken).sum(-1) / n).clamp(-1, 1).exp()
    share = n * strength / strength.cumsum(0)
    return allotted[:, None] * (weights @ (share[:, None] * v)) / (n * taken)[:, None]


def linformer(attention: Any, q: Tensor, k: Tensor, v: Tensor, head: int) -> Tensor:
    c, rows = CONFIG.attention_segment, []
    of_keys, of_values = attention.key_summary[head], attention.value_summary[head]
    for i in range(len(q)):
        own = i // c * c
        earlier = [slice(begin, begin + c) for begin in range(0, own, c)]
        keys = torch.cat([*(of_keys @ k[part] for part in earlier), k[own : i + 1]])
        values = torch.cat([*(of_values @ v[part] for part in earlier), v[own : i + 1]])
        rows.append((keys @ q[i] / math.sqrt(q.shape[1])).softmax(0) @ values)
    return torch.stack(rows) + 0 * (of_keys.sum() + of_values.sum())


def luna(
    attention: Any, q: Tensor, k: Tensor, v: Tensor, head: int, pack: float = 1.0, unpack: float = 1.0
) -> Tensor:
    rows, root = [], math.sqrt(q.shape[1])
    scores = k @ attention.slots[head].T / root / pack
    packs = torch.where(scores > 0, scores + 1, scores.exp())
    for i in range(1, len(q) + 1):
        keys, values = packs[:i].T @ k[:i] / i, packs[:i].T @ v[:i] / i
        rows.append((keys @ q[i - 1] / root / unpack).softmax(0) @ values)
    return torch.stack(rows)


def luna_filtered(attention: Any, q: Tensor, k: Tensor, v: Tensor, head: int) -> Tensor:
    def filtered(x: Tensor) -> Tensor:
        taps = [
            attention.filter[head, i] * torch.cat((x.new_zeros(i, x.shape[1]), x))[: len(x)] for i in range(3)
        ]
        return taps[0] + taps[1] + taps[2]

    pack, unpack = (attention.pack_log_temperature[head].exp(), attention.unpack_log_temperature[head].exp())
    return luna(attention, q, filtered(k), filtered(v), head, pack, unpack)


def before_sign(attention: Any, x: Tensor, head: int) -> Tensor:
    anchors, weight = attention.anchors[head], attention.hash_weight[head]
    x, anchors = (y / y.square().sum(-1, keepdim=True).sqrt() for y in (x, anchors))
    distance = (x[:, None] - anchors).square().sum(-1)
    return (torch.exp(-distance / 4) - math.exp(-0.5)) @ weight.T - attention.hash_threshold[head]


def ecoformer(attention: Any, q: Tensor, k: Tensor, v: Tensor, head: int) -> Tensor:
    """Without gradients of the hash, which has a loss of its own."""

    def code(x: Tensor) -> Tensor:
        z = before_sign(attention, x, head)
        straight = z.clamp(-1, 1)
        return torch.where(z >= 0, 1.0, -1.0) + straight - straight.detach()

    weights = (code(q) @ code(k).T + CONFIG.attention_bits + 1).tril()
    return weights / weights.sum(-1, keepdim=True) @ v


REFERENCES: dict[str, Callable[[Any, Tensor, Tensor, Tensor, int], Tensor]] = {
    "softmax": softmax,
    "window": window,
    "performer": performer,
    "cosformer": cosformer,
    "flow": flow,
    "linformer": linformer,
    "luna": luna,
    "luna_filtered": luna_filtered,
    "ecoformer": ecoformer,
}


def test_every_kind_can_be_chosen() -> None:
    assert set(get_args(AttentionKind)) == KINDS.keys() == REFERENCES.keys()


def attention_of(kind: str, dtype: torch.dtype = torch.float64) -> Attention:
    """That of a block of random weights."""
    return random_model(config_of(kind), 1, dtype).blocks[1].attention


def heads(seed: int, length: int, dtype: torch.dtype = torch.float64, size: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = 3, 2, CONFIG.num_heads, length, CONFIG.head_size
    return list((size * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype))


def attend(attention: Attention, inputs: list[Tensor]) -> Tensor:
    """[B, H, S, head] three times -> the same, as the block computes it, without norm and rotation."""
    rows = attention.attend_within(*inputs, Context(rotary_table(torch.arange(1), 0, 1.0)))
    return rows.unflatten(-1, (CONFIG.num_heads, -1)).transpose(1, 2)


@pytest.mark.parametrize("length", [1, 5, 40, 61])
@pytest.mark.parametrize("kind", KINDS)
def test_the_definition(kind: str, length: int) -> None:
    """Results and gradients, also of more positions than the model's."""
    attention, inputs = attention_of(kind), [x.requires_grad_() for x in heads(length, length)]
    y = attend(attention, inputs)
    expected = torch.stack(
        [
            torch.stack([REFERENCES[kind](attention, *(x[b, h] for x in inputs), h) for h in range(2)])
            for b in range(2)
        ]
    )
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    wanted = inputs if kind == "ecoformer" else [*inputs, *attention.parameters()]
    ours, theirs = (
        torch.autograd.grad(result, wanted, gradient, allow_unused=True, retain_graph=True)
        for result in (y, expected)
    )
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1.0, 12.0])
@pytest.mark.parametrize("kind", KINDS)
def test_lower_precision(kind: str, size: float, dtype: torch.dtype) -> None:
    """Of large queries and keys too: no overflow, and the error that the inputs' rounding makes."""
    inputs = [x.requires_grad_() for x in heads(3, LENGTH, dtype, size)]
    y = attend(attention_of(kind, dtype), inputs)
    exact = attend(attention_of(kind, dtype).double(), [x.detach().double() for x in inputs])
    assert y.dtype == dtype
    error = (y.double() - exact).abs().max() / exact.abs().max()
    assert error < (2e-2 if dtype == torch.bfloat16 else 2e-4)
    y.float().square().sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in inputs)


@pytest.mark.parametrize("kind", KINDS_WITH_STATE)
def test_pieces_are_the_whole(kind: str) -> None:
    attention, inputs = attention_of(kind), heads(4, LENGTH)
    whole, end = attention.attend(*inputs, None, None)
    for seed in range(4):
        state, parts = None, []
        for piece in zip(*(x.split(random_pieces(seed), dim=2) for x in inputs), strict=True):
            y, state = attention.attend(*piece, None, state)
            assert all(tensor.shape[0] == 2 for tensor in state)
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-9, atol=1e-9)
        assert state is not None
        for ours, theirs in zip(state, end, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def random_pieces(seed: int) -> list[int]:
    """Lengths that add up to LENGTH; one at a time for seed 0."""
    if seed == 0:
        return [1] * LENGTH
    cuts = torch.randperm(LENGTH - 1, generator=torch.Generator().manual_seed(seed))[:5].add(1).sort().values
    places = [0, *cuts.tolist(), LENGTH]
    return [end - begin for begin, end in pairwise(places)]


# Models


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_no_earlier_logit_changes(kind: str, dtype: torch.dtype) -> None:
    """To the last bit, and no loss either; the changed token's own logits do change."""
    config = config_of(kind)
    model = random_model(config, 5, dtype, std=0.2)
    tokens, targets = random_tokens(config, 6, 2, LENGTH)
    with torch.no_grad():
        logits, losses = model(tokens), model(tokens, targets)
        for place in torch.randperm(LENGTH, generator=torch.Generator().manual_seed(7))[:6].tolist():
            changed = tokens.clone()
            changed[:, place] = (changed[:, place] + 1) % config.vocab_size
            assert torch.equal(model(changed)[:, :place], logits[:, :place])
            assert torch.equal(model(changed, targets)[:, :place], losses[:, :place])
            assert not torch.equal(model(changed)[:, place], logits[:, place])


MIXED = [(), (1,), (0, 2)]


@pytest.mark.parametrize(
    ("kind", "full"),
    [
        pytest.param(kind, full, marks=[] if i % len(MIXED) == j else [pytest.mark.slow])
        for i, kind in enumerate(KINDS_WITH_STATE)
        for j, full in enumerate(MIXED)
    ],
    ids=str,
)
def test_cached_decoding_is_the_whole_pass(kind: str, full: tuple[int, ...]) -> None:
    """Also of rows that are padded on the left, whose logits are those of the rows alone."""
    config = config_of(kind, full_attention_layers=full)
    model = random_model(config, 8)
    tokens, _ = random_tokens(config, 9, 2, LENGTH)
    padding = torch.ones(2, LENGTH, dtype=torch.long)
    padding[1, :11] = 0
    with torch.no_grad():
        whole, alone = model(tokens), model(tokens[1:, 11:])
        padded = model(tokens, attention_mask=padding)
        torch.testing.assert_close(padded[0], whole[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(padded[1, 11:], alone[0], rtol=1e-9, atol=1e-9)
        for seed in (0, 1):
            plain, with_padding, end = Cache(3), Cache(3), 0
            for piece in random_pieces(seed):
                part = slice(end, end + piece)
                y = model(tokens[:, part], cache=plain)
                torch.testing.assert_close(y, whole[:, part], rtol=1e-8, atol=1e-8)
                end += piece
                y = model(tokens[:, part], attention_mask=padding[:, :end], cache=with_padding)
                real = padding[:, part].bool()
                torch.testing.assert_close(y[real], padded[:, part][real], rtol=1e-8, atol=1e-8)
            assert plain.get_seq_length() == with_padding.get_seq_length() == LENGTH


@pytest.mark.parametrize("full", [(), (1,)], ids=str)
@pytest.mark.parametrize("kind", KINDS_WITH_STATE)
def test_each_document_is_alone(kind: str, full: tuple[int, ...]) -> None:
    config = config_of(kind, full_attention_layers=full)
    model = random_model(config, 10)
    tokens, _ = random_tokens(config, 11, 2, LENGTH)
    tokens[:, [8, 9, 30]] = 3
    logits = model(tokens, documents_bs=document_numbers(tokens, 3))
    for row in range(2):
        ends = [place + 1 for place in (tokens[row] == 3).nonzero().flatten().tolist()]
        for begin, end in zip([0, *ends], [*ends, LENGTH], strict=True):
            alone = model(tokens[row : row + 1, begin:end])
            torch.testing.assert_close(logits[row : row + 1, begin:end], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("documents", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("kind", KINDS_WITH_STATE)
def test_recomputed_gradients_are_equal(kind: str, documents: bool) -> None:
    config = config_of(kind, full_attention_layers=(2,))
    tokens, targets = random_tokens(config, 12, 2, LENGTH)
    numbers = document_numbers(tokens, 3) if documents else None
    gradients = []
    for recompute in (False, True):
        model = random_model(config, 13, torch.float32, std=0.2)
        if recompute:
            recompute_blocks(model, None)
        model(tokens, targets, documents_bs=numbers).mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None and torch.equal(gradient, gradients[1][name]), name


# linformer has r summaries of each of S / c segments for each of them, which is a square, if a small one
@pytest.mark.parametrize("kind", [kind for kind in KINDS_WITH_STATE if kind != "linformer"])
def test_nothing_of_a_row_s_square_is_kept(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the backward pass: twice the positions, at most twice the largest tensor."""
    monkeypatch.setattr(linear, "CHUNK", 16)
    attention, largest = attention_of(kind, torch.float32), {}
    for length in (128, 256):
        found = [0]

        def pack(saved: Tensor, found: list[int] = found) -> Tensor:
            found[0] = max(found[0], saved.numel())
            return saved

        inputs = [x.requires_grad_() for x in heads(14, length, torch.float32)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            attend(attention, inputs).sum().backward()
        largest[length] = found[0]
    assert 0 < largest[256] <= 2 * largest[128]


@pytest.mark.parametrize("kind", KINDS_WITH_STATE)
def test_what_goes_with_softmax_alone_is_refused(kind: str) -> None:
    config = config_of(kind, full_attention_layers=(0,))
    model = random_model(config, 15)
    tokens, _ = random_tokens(config, 16, 1, 6)
    with pytest.raises(ValueError, match=f"4 dimensions and model.attention is {kind}"):
        model(tokens, attention_mask=torch.ones(1, 1, 6, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match=f"model.attention is {kind}, which has no weights"):
        model(tokens, attentions=[])


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"attention": "hard"}, "model.attention is 'hard': choose one of softmax, window"),
        ({"attention": "flow", "full_attention_layers": [3]}, r"full_attention_layers is \[3\]: .* 0 to 2"),
        ({"attention": "flow", "full_attention_layers": [1, 1]}, "each once"),
        ({"attention": "flow", "full_attention_layers": [1.0]}, "name blocks"),
        ({"full_attention_layers": [1]}, "model.attention is softmax"),
        ({"attention_window": 0}, "attention_window is 0: it must be at least 1"),
        ({"attention_features": -1}, "attention_features is -1: it must be 0 or more"),
        ({"attention_segment": 0}, "attention_segment is 0: it must be at least 1"),
        ({"attention": "linformer", "attention_rank": 7}, "attention_rank 7 .*attention_segment 6"),
        ({"attention": "linformer", "attention_segment": 40}, "attention_segment 40 .*sequence_length 40"),
        ({"attention_slots": 0}, "attention_slots is 0: it must be at least 1"),
        ({"attention_filter": 0}, "attention_filter is 0: it must be at least 1"),
        ({"attention_bits": 0}, "attention_bits is 0: it must be at least 1"),
        ({"attention_anchors": 0}, "attention_anchors is 0: it must be at least 1"),
        ({"attention_seed": -1}, "attention_seed is -1: it must be 0 or more"),
    ],
)
def test_bad_keys(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(CONFIG, **keys)


def test_layers_with_full_attention() -> None:
    config = config_of("window", full_attention_layers=[1])  # as JSON has it
    assert config.attention_kinds == ("window", "softmax", "window")
    assert [type(build_attention(config, layer)).__name__ for layer in range(3)] == [
        "WindowAttention",
        "SoftmaxAttention",
        "WindowAttention",
    ]
    assert config == config_of("window", full_attention_layers=(1,)) and hash(config)


@pytest.mark.parametrize("length", [2, 40, 100])
def test_the_hash_learns_from_pairs(length: int) -> None:
    """Its gradient is that of its loss, whatever the model's is; and training lowers that loss."""
    attention: Any = attention_of("ecoformer")
    q, k, _ = inputs = [x.requires_grad_() for x in heads(19, length)]
    weights = [attention.anchors, attention.hash_weight, attention.hash_threshold]
    found = torch.autograd.grad(attend(attention, inputs).mul(1e3).sum(), weights)

    step = -(-length // HASH_SAMPLE)
    total = torch.zeros((), dtype=torch.float64)
    for b, h in itertools.product(range(2), range(CONFIG.num_heads)):
        q_h, k_h = q[b, h, ::step].detach(), k[b, h, ::step].detach()
        codes = [2 * before_sign(attention, x, h).sigmoid() - 1 for x in (q_h, k_h)]
        alike = torch.nn.functional.cosine_similarity(q_h[:, None], k_h, dim=-1)
        order, count = alike.argsort(-1), -(-len(q_h) // ecoformer_module.SHARE)
        wanted = torch.zeros_like(alike)
        for row, places in zip(wanted, order, strict=True):
            row[places[-count:]], row[places[:count]] = 1.0, -1.0
        total = total + (codes[0] @ codes[1].T / CONFIG.attention_bits - wanted).square().mean()
    expected = torch.autograd.grad(total * ecoformer_module.LOSS_WEIGHT, weights)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-14)

    optimizer, losses = torch.optim.AdamW(weights, 0.1), []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(attention._loss(q.detach(), k.detach()).item())
        attend(attention, inputs).sum().backward()
        optimizer.step()
    assert losses[-1] < 0.95 * losses[0]


def test_random_features() -> None:
    """Orthogonal in a block, of the lengths of normal vectors, others in each layer and for each seed."""
    cpu = torch.device("cpu")
    w = random_features(3, 0, 40, 16, cpu, torch.float64)
    assert w.shape == (16, 40)
    for block in w.split(16, dim=1):
        products = block.T @ block
        torch.testing.assert_close(products, products.diagonal().diag(), rtol=0, atol=1e-12)
    many = random_features(3, 0, 4000, 16, cpu, torch.float64)
    assert abs(many.square().sum(0).mean() - 16) < 0.5 and many.square().sum(0).std() > 3
    for other in ((4, 0), (3, 1)):
        assert not torch.equal(random_features(*other, 40, 16, cpu, torch.float64), w)


def test_many_random_features_are_softmax() -> None:
    """Lemma 1 of the paper: the weights' mean is exp(q . k / sqrt(head))."""
    inputs = heads(17, 12, size=0.7)
    exact = attend(attention_of("softmax"), inputs)
    many = build_attention(config_of("performer", attention_features=40_000), 0)
    few = build_attention(config_of("performer", attention_features=16), 0)
    errors = [(attend(each, inputs) - exact).abs().mean().item() for each in (many, few)]
    assert errors[0] < 0.02 and errors[1] > 4 * errors[0]


def test_cosformer_beyond_its_length() -> None:
    """Positions beyond M count as M - 1: every weight is 0 or more, and the mean one of the values."""
    q, k, v = heads(18, 90)
    y = attend(attention_of("cosformer"), [q, k, v])
    low, high = (v.cummin(2).values, v.cummax(2).values)
    assert (y - y.clamp(low, high)).abs().max() < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_under_torch_compile(kind: str) -> None:
    torch._dynamo.reset()
    attention, inputs, rotary = attention_of(kind), heads(19, LENGTH), rotary_table(torch.arange(1), 0, 1.0)
    padding = torch.ones(2, LENGTH, dtype=torch.long)
    padding[0, :3] = 0

    def function(*inputs: Tensor) -> Tensor:
        return attention.attend_within(*inputs, Context(rotary, padding=padding))

    compiled = torch.compile(function, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), function(*inputs), rtol=1e-12, atol=1e-12)
