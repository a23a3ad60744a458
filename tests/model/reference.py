"""The models again, written from the equations with loops in float64: slow, and sharing no code with mf_train."""

from __future__ import annotations

import cmath
import math

import torch
from torch import Tensor

from mf_train.config import ModelConfig

Weights = dict[str, Tensor]


def logits_of(weights: Weights, config: ModelConfig, token_ids: Tensor) -> Tensor:
    """[B, S] -> [B, S, V]; weights by their names in the model, float64."""
    rows = []
    for sequence in token_ids.tolist():
        x = torch.stack([weights["embedding.weight"][token] for token in sequence])
        for layer in range(config.num_layers):
            prefix = f"blocks.{layer}."
            block = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
            x = run_block(x, block, config)
        x = norm(x, weights, "final_norm", config.norm, config.norm_epsilon)
        logits = torch.einsum("sd,vd->sv", x, weights["head.weight"])
        cap = config.logit_softcap
        rows.append(cap * torch.tanh(logits / cap) if cap else logits)
    return torch.stack(rows)


def losses_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each token; 0 where the target is -100."""
    losses = []
    for row, target in zip(logits.flatten(0, 1), targets.flatten().tolist(), strict=True):
        shifted = row - row.max().detach()
        losses.append(row.sum() * 0 if target == -100 else shifted.exp().sum().log() - shifted[target])
    return torch.stack(losses).view(targets.shape)


def run_block(x: Tensor, w: Weights, config: ModelConfig) -> Tensor:
    """Eq. 13, or Pythia's block with sequential residuals, or what is between them. x [S, D]."""
    memory = config.kind == "memoryformer"
    qkv, ffn = (kind or ("memory" if memory else "dense") for kind in (config.qkv, config.ffn))
    output = config.output or ("none" if memory else "dense")

    def layer(x: Tensor, name: str, kind: str, bits: int) -> Tensor:
        if kind == "memory":
            y = memory_layer(x, w, name, bits, config)
            if not config.residual_rank:
                return y
            between = torch.einsum("si,ri->sr", x, w[f"{name}_path.reduce.weight"])
            return y + torch.einsum("sr,or->so", between, w[f"{name}_path.expand.weight"])
        if kind == "low_rank":
            x = torch.einsum("si,ri->sr", x, w[f"{name}.reduce.weight"])
            name += ".expand"
        return torch.einsum("si,oi->so", x, w[f"{name}.weight"]) + w[f"{name}.bias"]

    h = norm(x, w, "norm_attention", config.norm, config.norm_epsilon)
    q, k, v = (layer(h, name, qkv, config.bits) for name in ("query", "key", "value"))
    q, k = (head_norm(y, w, name, config) for y, name in ((q, "query"), (k, "key")))
    y = attention(q, k, v, config)
    if output == "memory":
        y = norm(y, w, "norm_output", config.norm, config.norm_epsilon)
    z = x + (y if output == "none" else layer(y, "output", output, config.bits))
    if ffn == "product_key":
        return z + product_key(norm(z, w, "norm_ffn", config.norm, config.norm_epsilon), w, config)
    h = layer(norm(z, w, "norm_ffn", config.norm, config.norm_epsilon), "up", ffn, config.bits)
    if ffn != "memory":
        return z + layer(gelu(h), "down", ffn, 0)
    if config.ffn_activation == "gelu":
        h = gelu(h)
    elif config.ffn_activation == "relu":
        h = torch.where(h > 0, h, 0)
    inner = norm(h, w, "norm_inner", config.ffn_inner_norm, config.norm_epsilon)
    return z + layer(inner, "down", "memory", config.bits + config.expand_bits)


def memory_layer(x: Tensor, w: Weights, name: str, bits: int, config: ModelConfig) -> Tensor:
    """Eq. 2-11 for every token of x [S, K * bits], one table after the other."""
    tables, bias = w[f"{name}.tables"], w[f"{name}.bias"]
    if config.rotation:
        place = {"up": "ffn", "down": "inner", "output": "output"}.get(name, "attention")
        parts = []
        for z, a in zip(x.split(bits, 1), w[f"rotate_{place}.skew"], strict=True):
            s, one = a - a.T, torch.eye(bits, dtype=a.dtype)
            parts.append(z @ (one - s) @ torch.linalg.inv(one + s))
        x = torch.cat(parts, 1)
    outputs = []
    for token in x:
        y = bias
        for table, z in zip(tables, token.view(-1, bits), strict=True):
            code, weight, total = 0, torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
            for i in range(bits):
                positive = z[i].item() >= 0
                code += positive * 2**i
                size = z[i] if positive else -z[i]
                weight = weight / (1 + torch.exp(-2 * size / config.temperature))
                total = total + size
            if config.score == "scaled_probability":
                weight = weight * total
            y = y + weight * table[code]
        outputs.append(y)
    return torch.stack(outputs)


def product_key(x: Tensor, w: Weights, config: ModelConfig) -> Tensor:
    """Of every token of x [S, D]: the best of all n^2 values for each head, by all sums of two half keys' scores."""
    n, d, k = config.product_keys, config.product_query, config.product_reads
    queries, keys = w["product_key.select.queries.weight"], w["product_key.select.keys"]
    outputs = []
    for token in x:
        y = w["product_key.values.bias"]
        for head in range(config.product_heads):
            q = queries[head * d : (head + 1) * d] @ token
            q = q - q.sum() / d
            q = q / ((q * q).sum() / d + 1e-5).sqrt()
            first, second = keys[head, 0] @ q[: d // 2], keys[head, 1] @ q[d // 2 :]
            scores = torch.stack([one + other for one in first for other in second])
            best = sorted(range(n * n), key=lambda i: -scores[i].item())[:k]
            shares = (scores[best] - scores[best].max().detach()).exp()
            for i, share in zip(best, shares / shares.sum(), strict=True):
                y = y + share * w["product_key.values.tables"][0, i]
        outputs.append(y)
    return torch.stack(outputs)


def attention(q: Tensor, k: Tensor, v: Tensor, config: ModelConfig) -> Tensor:
    """Causal attention over the heads of q, k, v [S, D], token by token."""
    size = config.hidden_size // config.num_heads
    rotated = int(size * config.rotary_fraction) // 2 * 2
    heads = []
    for start in range(0, config.hidden_size, size):
        part = slice(start, start + size)
        queries = [rotate(x, p, rotated, config.rotary_base) for p, x in enumerate(q[:, part])]
        keys = [rotate(x, p, rotated, config.rotary_base) for p, x in enumerate(k[:, part])]
        outputs = []
        for position, query in enumerate(queries):
            scores = torch.stack([(query * key).sum() for key in keys[: position + 1]]) / math.sqrt(size)
            shares = (scores - scores.max().detach()).exp()
            shares = shares / shares.sum()
            outputs.append((shares.unsqueeze(-1) * v[: position + 1, part]).sum(0))
        heads.append(torch.stack(outputs))
    return torch.cat(heads, dim=-1)


def rotate(x: Tensor, position: int, rotated: int, base: float) -> Tensor:
    """Multiply the complex numbers x[i] + j x[i + rotated / 2] by exp(j position base^(-2 i / rotated))."""
    half = rotated // 2
    turned = list(x)
    for i in range(half):
        turn = cmath.exp(1j * position * base ** (-2 * i / rotated))
        turned[i] = x[i] * turn.real - x[i + half] * turn.imag
        turned[i + half] = x[i] * turn.imag + x[i + half] * turn.real
    return torch.stack(turned)


def norm(x: Tensor, w: Weights, name: str, kind: str, epsilon: float) -> Tensor:
    outputs = []
    for token in x:
        if kind == "layernorm":
            token = token - token.sum() / len(token)
        scale = ((token * token).sum() / len(token) + epsilon) ** -0.5
        outputs.append(
            token * scale * w[f"{name}.weight"] + (w[f"{name}.bias"] if kind == "layernorm" else 0)
        )
    return torch.stack(outputs)


def head_norm(x: Tensor, w: Weights, name: str, config: ModelConfig) -> Tensor:
    """With `qk_norm` every head of every token of x [S, D] over its root mean square, times its gains."""
    if not config.qk_norm:
        return x
    size = config.hidden_size // config.num_heads
    gain = w[f"attention.{name}_norm.weight"]
    tokens = []
    for token in x:
        heads = token.split(size)
        scaled = [head / ((head * head).sum() / size + config.norm_epsilon).sqrt() for head in heads]
        tokens.append(torch.cat(scaled) * gain)
    return torch.stack(tokens)


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
