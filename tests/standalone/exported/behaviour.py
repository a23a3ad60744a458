"""Run as a script, with this project or without: what a converted model does as every transformers model does.

    python -P behaviour.py MODEL INT8_MODEL OUTPUT [import this module first]

Each function `check_...` is one check. Writes OUTPUT, a JSON object of each one's name and null, or how it failed.
"""

import importlib
import importlib.util
import json
import sys
import tempfile
import traceback
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import cache, partial

FOLDER, INT8_FOLDER, OUTPUT, *PRELOADED = sys.argv[1:] if __name__ == "__main__" else ("", "", "")
for module in PRELOADED:
    importlib.import_module(module)

import torch  # noqa: E402 - after the modules that were asked for
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    StaticCache,
)
from transformers.cache_utils import StaticSlidingWindowLayer  # noqa: E402
from transformers.generation.streamers import BaseStreamer  # noqa: E402


@cache
def load(dtype="float32"):
    int8 = dtype == "int8"
    folder, dtype = (INT8_FOLDER, "bfloat16") if int8 else (FOLDER, dtype)
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype).eval()


@cache
def peer():
    """A model of transformers' own."""
    torch.manual_seed(1)
    config = GPTNeoXConfig(
        vocab_size=4096,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=48,
        initializer_range=0.3,
    )
    return GPTNeoXForCausalLM(config).eval()


def both():
    return load(), peer()


def tokens(batch, length, seed=0):
    return torch.randint(1, 4096, (batch, length), generator=torch.Generator("cpu").manual_seed(seed))


def generate(model, ids, **options):
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0} | options
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)


def same(found, expected, tolerance=1e-5):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max(), (found - expected).abs().max()


def raises(kind, words, function, *arguments, **options):
    try:
        function(*arguments, **options)
    except kind as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"{words}: no error")


def check_threads():
    """Eight threads on one model, batches of several sizes, prompts of several lengths."""
    for dtype in ("float32", "bfloat16", "int8"):
        model = load(dtype)
        prompts = [tokens(1 + seed * 5 % 16, 1 + seed % 7, seed) for seed in range(16)]
        expected = [generate(model, ids, max_new_tokens=8, min_new_tokens=8) for ids in prompts]
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(partial(generate, model, max_new_tokens=8, min_new_tokens=8), prompts))
        assert all(map(torch.equal, found, expected)), dtype


def check_default_dtype():
    ids = tokens(2, 6)
    expected = [(model(ids).logits, generate(model, ids)) for model in both()]
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            for model, (logits, made) in zip(map(deepcopy, both()), expected, strict=True):
                same(model(ids).logits, logits)
                assert torch.equal(generate(model, ids), made), dtype
        finally:
            torch.set_default_dtype(torch.float32)


def check_default_device():
    """The model, the ids and all that a loop makes of them are on the CPU."""
    ids = tokens(2, 6)
    for model in both():
        expected = model(ids).logits
        model = deepcopy(model)
        torch.set_default_device("meta")
        try:
            with torch.no_grad():
                held = model(ids[:, :4])
                parts = [held.logits]
                for i in (4, 5):
                    held = model(ids[:, i : i + 1], past_key_values=held.past_key_values)
                    parts.append(held.logits)
                found = torch.cat(parts, 1)
            model(ids, labels=ids).loss.backward()
        finally:
            torch.set_default_device(None)
        assert found.device.type == "cpu"
        same(found, expected, 1e-4)


def check_int8_gradients():
    """Against a float64 model of the same numbers."""
    model = deepcopy(load("int8")).float()
    config = deepcopy(model.config)
    config.table_dtype = None
    exact = type(model)(config).double()
    state = model.state_dict()
    for name in [name for name in state if name.endswith(".scales")]:
        scales = state.pop(name).double().unsqueeze(-1)
        rows = name.removesuffix("scales") + ("weight" if ".head." in name else "tables")
        state[rows] = state[rows].double() * scales
    exact.load_state_dict(state)
    ids = tokens(2, 9)
    for each in (model, exact):
        each(ids, labels=ids).loss.backward()
    expected = dict(exact.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        same(parameter.grad.double(), expected[name].grad, 1e-3)


def check_a_loop_by_hand():
    ids = tokens(2, 7)
    for model in both():
        assert model.config.use_cache is True
        whole = model(ids).logits
        out = model(ids[:, :4])
        for i in (4, 5, 6):
            out = model(ids[:, i : i + 1], past_key_values=out.past_key_values)
            same(out.logits[:, 0], whole[:, i], 1e-4)
        assert out.past_key_values.get_seq_length() == 7
        assert model(ids, use_cache=False).past_key_values is None
        logits, held = model(ids, return_dict=False)
        assert torch.equal(logits, whole) and held.get_seq_length() == 7
        own = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :6], past_key_values=own)
            same(model(ids[:, 6:], past_key_values=own, use_cache=False).logits[:, 0], whole[:, 6], 1e-4)
        model = deepcopy(model)
        model.config.use_cache = False
        assert model(ids).past_key_values is None and model(ids, use_cache=True).past_key_values is not None
    quiet = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True, use_cache=False)
    assert quiet.generation_config.use_cache is False or quiet.config.use_cache is False


def check_caches_that_it_does_not_know():
    model = load()
    ids = tokens(2, 4)
    sliding = StaticCache(config=model.config, max_cache_len=64)
    sliding.layers = [StaticSlidingWindowLayer(64, sliding_window=8) for _ in range(2)]
    raises(ValueError, "StaticCache: give a DynamicCache", model, ids, past_key_values=sliding)
    pairs = [(torch.zeros(2, 4, 3, 12),) * 2] * 2
    raises(ValueError, "list: give a DynamicCache", model, ids, past_key_values=pairs)
    raises(ValueError, "has 3 layers", model, ids, past_key_values=DynamicCache([*pairs, pairs[0]]))
    uneven = [pairs[0], (torch.zeros(2, 4, 5, 12),) * 2]
    raises(ValueError, "positions", model, ids[:, :1], past_key_values=DynamicCache(uneven))


def check_nothing_unknown_gives_numbers():
    model = load()
    ids = tokens(2, 4)
    ones = torch.ones_like(ids)
    held = model(ids).past_key_values
    for error, words, options in (
        (TypeError, "does not know hidden", {"hidden": 1}),
        (ValueError, "attention_mask has shape (2, 3), not (2, 4)", {"attention_mask": ones[:, :3]}),
        (ValueError, "attention_mask has shape (1, 4)", {"attention_mask": ones[:1]}),
        (ValueError, "not (2 or 1, 4 or 1, 4, 4)", {"attention_mask": torch.ones(2, 1, 4, 5)}),
        (ValueError, "not (2 or 1, 4 or 1, 4, 4)", {"attention_mask": torch.ones(2, 3, 4, 4)}),
        (
            ValueError,
            "attention_mask is torch.int64",
            {"attention_mask": ones[None, None, :1].expand(2, 1, 4, 4)},
        ),
        (ValueError, "not (2, 8)", {"attention_mask": ones, "past_key_values": held}),
        (ValueError, "labels has shape (2, 1)", {"labels": ids[:, :1]}),
        (ValueError, "position_ids has shape (2, 3)", {"position_ids": ids[:, :3]}),
        (ValueError, "either input_ids or inputs_embeds", {"inputs_embeds": torch.zeros(2, 4, 48)}),
        (ValueError, "logits_to_keep is -2", {"logits_to_keep": -2}),
    ):
        raises(error, words, model, ids, **options)
    raises(ValueError, "either input_ids or inputs_embeds", model)
    for label in (4096, -1):
        labels = ids.clone()
        labels[1, 2] = label
        for each in both():
            raises(IndexError, str(label), each, ids, labels=labels)
    assert model(ids, output_attentions=None, cache_position=None).logits.shape == (2, 4, 4096)


def check_no_weight_is_left_unset():
    """What the files do not have for a new size is drawn; memory that nobody sets is NaN here."""
    torch.use_deterministic_algorithms(True)
    try:
        options = {"trust_remote_code": True, "ignore_mismatched_sizes": True, "vocab_size": 4160}
        model = AutoModelForCausalLM.from_pretrained(FOLDER, **options)
        weights = (model.model.embedding.weight, model.model.head.weight)
        for weight in weights:
            assert weight.shape == (4160, 48) and 0.019 < weight.std() < 0.021 and weight.abs().max() < 0.12
        loaded = dict(load().named_parameters())
        for name, parameter in model.named_parameters():
            assert parameter.isfinite().all(), name
            assert parameter.shape == (4160, 48) or torch.equal(parameter, loaded[name]), name
        raises(ValueError, "int8", AutoModelForCausalLM.from_pretrained, INT8_FOLDER, **options)
        fresh = type(model)(model.config)
        assert all(parameter.isfinite().all() for parameter in fresh.parameters())
    finally:
        torch.use_deterministic_algorithms(False)


def check_a_new_models_weights_do_not_depend_on_defaults():
    torch.manual_seed(5)
    model = type(load())(load().config)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(5)
    try:
        other = type(load())(load().config)
    finally:
        torch.set_default_dtype(torch.float32)
    for one, wide in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, wide.float()), one.shape


def check_resize_token_embeddings():
    for model in map(deepcopy, both()):
        before = [
            each.weight.detach().clone()
            for each in (model.get_input_embeddings(), model.get_output_embeddings())
        ]
        ids = tokens(2, 5)
        logits, made = model(ids).logits.detach(), generate(model, ids)
        model.resize_token_embeddings(4096)
        assert torch.equal(model(ids).logits, logits)
        module = model.resize_token_embeddings(4100, pad_to_multiple_of=16)
        assert module is model.get_input_embeddings() and model.config.vocab_size == 4112
        for new, old in zip(
            (model.get_input_embeddings().weight, model.get_output_embeddings().weight), before, strict=True
        ):
            assert new.shape == (4112, 48) and torch.equal(new[:4096], old) and new[4096:].isfinite().all()
        same(model(ids).logits[..., :4096], logits)
        loss = model(ids, labels=torch.full_like(ids, 4105)).loss
        loss.backward()
        assert loss.isfinite() and model.get_output_embeddings().weight.grad[4105].abs().max() > 0
        generate(model, torch.full_like(ids, 4105))
        model.resize_token_embeddings(4096)
        assert torch.equal(generate(model, ids), made)
    raises(ValueError, "int8", load("int8").resize_token_embeddings, 4100)


def check_get_and_set_embeddings():
    """They are the layers that other libraries look for, and any other such layer does in their place."""
    ids = tokens(2, 5)
    for model in map(deepcopy, (*both(), load("int8"))):
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        assert isinstance(embedding, torch.nn.Embedding) and isinstance(head, torch.nn.Linear)
        assert (embedding.num_embeddings, embedding.embedding_dim) == (4096, 48)
        assert (head.in_features, head.out_features, head.bias) == (48, 4096, None)
        expected, made = model(ids, labels=ids), generate(model, ids)
        other = torch.nn.Embedding(4096, 48, dtype=model.dtype)
        model.set_input_embeddings(other)
        assert model.get_input_embeddings() is other
        other.weight = embedding.weight
        scales = getattr(head, "scales", torch.ones(4096))
        rows = (head.weight.float() * scales[:, None]).to(model.dtype)
        replaced = torch.nn.Linear(48, 4096, bias=False, dtype=model.dtype)
        model.set_output_embeddings(replaced)
        assert model.get_output_embeddings() is replaced
        replaced.weight = torch.nn.Parameter(rows)
        found, tolerance = model(ids, labels=ids), 1e-5 if model.dtype == torch.float32 else 0.02
        same(found.logits, expected.logits, tolerance)
        same(found.loss, expected.loss, tolerance)
        found.loss.backward()
        assert replaced.weight.grad.abs().max() > 0 and other.weight.grad.abs().max() > 0
        assert model.dtype != torch.float32 or torch.equal(generate(model, ids), made)
        replaced.weight.data.neg_()  # the new layers are the ones that are read
        assert not torch.equal(generate(model, ids), made)


def check_inputs_embeds():
    ids = tokens(2, 6)
    for model in both():
        given = model.get_input_embeddings()(ids)
        same(model(inputs_embeds=given).logits, model(ids).logits)
        made = model.generate(
            inputs_embeds=given,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=9,
            min_new_tokens=9,
            do_sample=False,
            pad_token_id=0,
        )
        assert torch.equal(made, generate(model, ids, max_new_tokens=9, min_new_tokens=9)[:, 6:])


def check_position_ids():
    ids = tokens(2, 6)
    for model in both():
        logits = model(ids).logits
        same(
            model(ids, position_ids=torch.arange(6)[None] + 30).logits, logits, 1e-4
        )  # distances alone count
        spread = torch.tensor([[0, 1, 2, 7, 8, 9], [0, 1, 2, 3, 4, 5]])
        found = model(ids, position_ids=spread).logits
        same(found[1], logits[1], 1e-4)
        same(found[0, :3], logits[0, :3], 1e-4)
        assert (found[0, 3:] - logits[0, 3:]).abs().max() > 1e-3 * logits.abs().max()
        with torch.no_grad():
            held = model(ids[:, :5], position_ids=spread[:, :5]).past_key_values
            last = model(ids[:, 5:], position_ids=spread[:, 5:], past_key_values=held).logits
        same(last[:, 0], found[:, 5], 1e-4)


def check_hidden_states():
    ids = tokens(2, 6)
    for model in both():
        out = model(ids, output_hidden_states=True)
        states = out.hidden_states
        assert [state.shape for state in states] == [(2, 6, 48)] * 3
        assert torch.equal(states[0], model.get_input_embeddings()(ids))
        products, cap = (
            states[-1] @ model.get_output_embeddings().weight.T,
            getattr(model.config, "logit_softcap", 0),
        )
        same(cap * (products / cap).tanh() if cap else products, out.logits)
        assert model(ids).hidden_states is None


def check_training_arguments():
    ids = tokens(3, 8)
    labels = ids.clone()
    labels[0, :4] = -100
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    for model in both():
        logits = model(ids).logits.double()
        parts = [torch.nn.functional.cross_entropy(a, b, reduction="sum") for a, b in zip(logits, shifted)]  # noqa: B905
        total = sum(parts)
        same(model(ids, labels=labels).loss.double(), total / (shifted != -100).sum())
        for items in (7, torch.tensor(7)):
            same(model(ids, labels=labels, num_items_in_batch=items).loss.double(), total / 7)
        same(
            model(ids, labels=labels, shift_labels=shifted.roll(1, 0)).loss.double(),
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), shifted.roll(1, 0).flatten()),
        )
        kept = torch.tensor([1, 4])
        same(model(ids, logits_to_keep=kept).logits.double(), logits[:, kept])


def check_attentions():
    """Against softmax(q k^T / sqrt(head)) v: the weights of each layer give what the model without them computes."""
    ids = tokens(2, 7)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for model in map(deepcopy, (*both(), load())):
        expected = model(ids, attention_mask=mask).logits
        if type(model) is GPTNeoXForCausalLM:
            model.set_attn_implementation("eager")
        out = model(ids, attention_mask=mask, output_attentions=True)
        same(out.logits[mask.bool()], expected[mask.bool()], 1e-4)
        assert [each.shape for each in out.attentions] == [(2, 4, 7, 7)] * 2
        for each in out.attentions:
            same(each.sum(-1), torch.ones(2, 4, 7))
            assert not each[0, :, 3:, :3].any() and not each[1].triu(1).any()
            assert (each[1, :, 6] > 0).all()
        made = generate(model, ids, output_attentions=True, return_dict_in_generate=True)
        assert [each[1].shape[-1] for each in made.attentions] == list(range(7, 23))
        assert model(ids).attentions is None
    quiet = AutoModelForCausalLM.from_pretrained(
        FOLDER, trust_remote_code=True, attn_implementation="eager", output_attentions=True
    )
    assert len(quiet(ids, return_dict=False)[-1]) == 2


def check_gradient_checkpointing():
    ids = tokens(2, 7)
    for model in map(deepcopy, both()):
        model.train()
        model(ids, labels=ids).loss.backward()
        expected = [parameter.grad.clone() for parameter in model.parameters()]
        for reentrant in (False, True):
            model.zero_grad()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            out = model(ids, labels=ids)
            out.loss.backward()
            for parameter, gradient in zip(model.parameters(), expected, strict=True):
                assert torch.equal(parameter.grad, gradient), reentrant
            assert out.past_key_values is None
        held = model.eval()(ids[:, :4]).past_key_values
        same(model(ids[:, 4:], past_key_values=held).logits, model(ids).logits[:, 4:], 1e-4)
    model = deepcopy(load()).train()
    model.activation_checkpointing_enable(every_n_layers=2)
    runs = []
    for block in model.model.blocks:
        layer = block.layer
        block.norm_ffn.register_forward_pre_hook(lambda *_, layer=layer: runs.append(layer))
    model(ids, labels=ids).loss.backward()
    assert sorted(runs) == [0, 0, 1]
    raises(ValueError, "gradient checkpointing", model, ids, past_key_values=DynamicCache())
    model.gradient_checkpointing_disable()
    assert model(ids).past_key_values.get_seq_length() == 7


def check_static_caches():
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    ends_in_padding = torch.ones_like(ids)
    ends_in_padding[1, 6:] = 0
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    for model in both():
        for given in (mask, ends_in_padding):
            options["attention_mask"] = given
            expected = model.generate(ids, **options)
            assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)
    model = load()
    for padding in (None, mask):
        whole = model(ids, attention_mask=padding).logits
        held = StaticCache(config=model.config, max_cache_len=32)
        parts = []
        with torch.no_grad():
            for start, end in ((0, 4), (4, 5), (5, 9)):
                given = None if padding is None else padding[:, :end]
                out = model(ids[:, start:end], attention_mask=given, past_key_values=held)
                parts.append(out.logits)
        same(torch.cat(parts, 1)[:, 3:], whole[:, 3:], 1e-4)
        raises(ValueError, "not (2, 10)", model, ids[:, :1], attention_mask=mask, past_key_values=held)


def check_whole_masks():
    """[B, H, S, T]: causal ones change nothing, and blocks of one row are what they are alone."""
    ids = tokens(2, 8)
    causal = torch.ones(8, 8, dtype=torch.bool).tril()[None, None]
    blocks = causal.clone()
    blocks[..., 5:, :5] = False
    for model in both():
        logits = model(ids).logits
        for mask in (causal, causal.expand(2, 4, 8, 8), torch.zeros(1, 1, 8, 8).masked_fill(~causal, -1e30)):
            same(model(ids, attention_mask=mask).logits, logits, 1e-4)
        found = model(ids, attention_mask=blocks).logits
        same(found[:, :5], logits[:, :5], 1e-4)
        same(found[:, 5:], model(ids[:, 5:]).logits, 1e-4)  # distances alone count
        with torch.no_grad():
            held = model(ids[:, :5]).past_key_values
            rest = model(ids[:, 5:], attention_mask=blocks[..., 5:, :], past_key_values=held).logits
        same(rest, found[:, 5:], 1e-4)


def check_batches():
    """A text's tokens do not depend on what it is batched with, in which order, and on which side it is padded."""
    model = load()
    texts = [tokens(1, length, length)[0] for length in (3, 9, 5)]
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    for more in ({}, {"num_beams": 3}):
        alone = [generate(model, text[None], **options | more)[0, len(text) :] for text in texts]
        for order in ([0, 1, 2], [2, 0, 1]):
            ids = torch.zeros(3, 9, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, which in enumerate(order):
                ids[row, 9 - len(texts[which]) :] = texts[which]
                mask[row, 9 - len(texts[which]) :] = 1
            made = model.generate(ids, attention_mask=mask, **options | more)
            for row, which in enumerate(order):
                assert torch.equal(made[row, 9:], alone[which]), (more, order, which)
    right, mask = torch.zeros(3, 9, dtype=torch.int64), torch.zeros(3, 9, dtype=torch.int64)
    for row, text in enumerate(texts):
        right[row, : len(text)], mask[row, : len(text)] = text, 1
    logits = model(right, attention_mask=mask).logits
    for row, text in enumerate(texts):
        same(logits[row, : len(text)], model(text[None]).logits[0], 1e-4)


class Kept(BaseStreamer):
    def __init__(self):
        self.ids = []

    def put(self, value):
        self.ids += value.flatten().tolist()

    def end(self):
        self.ids.append(None)


def check_continuous_batching():
    """Texts of several lengths, more than are taken in at once: each gets the tokens that it gets alone."""
    prompts = [tokens(1, 1 + 5 * i % 13, i) for i in range(9)]
    settings = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=-1)
    few = ContinuousBatchingConfig(page_size=4, num_blocks=24, max_batch_tokens=16)
    model = load()
    expected = [
        generate(model, ids, max_new_tokens=8, min_new_tokens=8)[0, ids.shape[1] :] for ids in prompts
    ]
    answers = model.generate_batch(
        [ids[0].tolist() for ids in prompts], settings, continuous_batching_config=few, progress_bar=False
    )
    found = {tuple(each.prompt_ids): each.generated_tokens for each in answers.values()}
    for ids, wanted in zip(prompts, expected, strict=True):
        assert found[tuple(ids[0].tolist())] == wanted.tolist()
    raises(ValueError, "load the model with attn_implementation='sdpa'", load(), tokens(1, 2), cache=object())
    raises(ValueError, "goes with input_ids alone", load(), tokens(1, 2), cache=object(), labels=tokens(1, 2))


def check_ways_of_generating():
    model = load()
    ids = tokens(1, 6)
    plain = generate(model, ids)
    streamer = Kept()
    generate(model, ids, streamer=streamer)
    assert streamer.ids == [*plain[0].tolist(), None]
    repeated = torch.cat((ids, ids), 1)
    assert torch.equal(generate(model, repeated, prompt_lookup_num_tokens=3), generate(model, repeated))
    for assistant in (model, load("bfloat16")):
        assert torch.equal(generate(model, ids, assistant_model=assistant), plain)
    drawn = []
    for seed, cached in ((1, True), (1, False), (2, True)):
        torch.manual_seed(seed)
        drawn.append(generate(model, ids, do_sample=True, temperature=2.0, use_cache=cached))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
    whole = tokenizer.decode(plain[0, 6:])
    stop = whole[len(whole) // 2 :][:4]
    made = generate(model, ids, stop_strings=[stop], tokenizer=tokenizer, min_new_tokens=None)
    text = tokenizer.decode(made[0, 6:])
    assert whole.startswith(text) and stop in text and len(made[0]) < len(plain[0])


def check_tied_weights():
    """One weight where the configuration of a new model asks for it, with another size and after saving.

    Where files hold two weights, transformers leaves it at two.
    """
    options = {"trust_remote_code": True, "tie_word_embeddings": True}
    ids = tokens(2, 9)
    for model in both():
        model = type(model)(type(model.config)(**model.config.to_diff_dict() | {"tie_word_embeddings": True}))
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        assert head.weight is embedding.weight
        model.resize_token_embeddings(4100)
        assert head.weight.shape == (4100, 48)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        model(ids, labels=ids).loss.backward()
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            again = type(model).from_pretrained(folder)
        assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
        assert torch.equal(again(ids).logits, model(ids).logits)
    raises(ValueError, "tie_word_embeddings", AutoModelForCausalLM.from_pretrained, INT8_FOLDER, **options)


def check_new_weights_follow_the_seed():
    for model in both():
        made = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            made.append([type(model)(model.config).get_output_embeddings().weight for _ in range(2)])
        first, again, other = made
        assert all(map(torch.equal, first, again))
        assert not torch.equal(*first) and not torch.equal(first[0], other[0])
    state = torch.random.get_rng_state()
    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    assert torch.equal(torch.random.get_rng_state(), state)


def check_offloaded_weights():
    """accelerate brings a module's weights before its forward, and takes them away after it."""
    if importlib.util.find_spec("accelerate") is None:
        return
    import accelerate

    ids = tokens(2, 6)
    for model in map(deepcopy, (*both(), load("int8"))):
        logits, made = model(ids).logits.detach(), generate(model, ids)
        accelerate.cpu_offload(model, torch.device("cpu"))
        assert next(model.parameters()).is_meta
        same(model(ids).logits, logits, 0 if model.dtype == torch.float32 else 0.02)
        assert model.dtype != torch.float32 or torch.equal(generate(model, ids), made)


def check_one_graph():
    """A compiled forward pass is one graph, with padding or without, and with either kind of cache."""
    ids = tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    model = load()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for padding in (None, mask):
        expected = model(ids, attention_mask=padding, use_cache=False).logits
        same(compiled(ids, attention_mask=padding, use_cache=False).logits, expected, 1e-4)
    whole = model(ids).logits
    for held in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=16)):
        with torch.no_grad():
            model(ids[:, :4], past_key_values=held)
            for i in (4, 5):
                step = compiled(ids[:, i : i + 1], past_key_values=held)
                same(step.logits[:, 0], whole[:, i], 1e-4)


def main():
    report = {}
    for name, function in list(globals().items()):
        if name.startswith("check_"):
            try:
                function()
                report[name] = None
            except Exception:
                report[name] = traceback.format_exc()
    with open(OUTPUT, "w") as file:
        json.dump(report, file)


if __name__ == "__main__":
    main()
