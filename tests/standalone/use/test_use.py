"""`memoryformer generate` and `memoryformer evaluate` on converted models."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mf_train.cli import main
from mf_train.data.tokenizer import Tokenizer
from mf_train.errors import UserError
from mf_train.standalone.use.evaluate import evaluate
from mf_train.standalone.use.generate import before_any, generate, new_tokens
from mf_train.standalone.use.load import load_model
from mf_train.standalone.use.sampling import Sampling
from tests.standalone.conftest import VALIDATED_SEQUENCES, Trained
from tests.training.runs import read_metrics

PROMPT = "Message 3. the order"


@pytest.mark.parametrize(
    ("which", "tolerance"),
    [("float32_two", 1e-5), ("float32_one", 1e-5), ("bfloat16_two", 1e-3), ("documents_two", 1e-5)],
)
def test_evaluate_gives_the_trainers_validation_loss(
    which: str, tolerance: float, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: Trained = request.getfixturevalue(which)
    with pytest.raises(SystemExit) as ended:
        main(
            [
                *("evaluate", str(trained.model), "--data", str(trained.text)),
                *("--sequences", str(VALIDATED_SEQUENCES), "--batch-size", "3"),
            ]
        )
    assert ended.value.code == 0
    printed = dict(
        line.split(maxsplit=1)
        for line in capsys.readouterr().out.replace("bits per", "bits-per").splitlines()
    )
    loss = float(printed["loss"].split()[0])
    assert loss == pytest.approx(read_metrics(trained.run)[-1]["validation_loss"], abs=tolerance)
    assert float(printed["perplexity"]) == pytest.approx(math.exp(loss), rel=1e-4)
    assert printed["tokens"].startswith(f"{VALIDATED_SEQUENCES * 32} (")


def test_evaluate_all_the_text_by_hand(float32_two: Trained) -> None:
    """Loss of every token after the first of all documents, in blocks of 11 that overlap by one token."""
    lines = list(evaluate(float32_two.model, [str(float32_two.text)], 10, 0, 64))
    tokenizer, model = Tokenizer(float32_two.model), load_model(float32_two.model)
    documents = [json.loads(line)["text"] for line in float32_two.text.read_text().splitlines()]
    tokens = torch.tensor([i for text in documents for i in (*tokenizer.encode(text), 0)])
    total = 0.0
    for start in range(0, len(tokens) - 1, 10):
        block = tokens[start : start + 11]
        logits = model(block[None, :-1])[0].double()
        total += torch.nn.functional.cross_entropy(logits, block[1:], reduction="sum").item()
    count = len(tokens) - 1
    size = sum(len(text.encode()) for text in documents) - len(tokenizer.decode([int(tokens[0])]))
    assert float(lines[0].split()[1]) == pytest.approx(total / count, abs=2e-6)
    assert float(lines[2].split()[3]) == pytest.approx(total / size / math.log(2), abs=1e-4)
    assert lines[3] == f"tokens         {count:,} ({size:,} bytes of text) in blocks of 10"


def test_evaluate_does_not_know_bits_per_byte_of_no_bytes(float32_two: Trained, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a")  # predicted is the end of text alone
    lines = list(evaluate(float32_two.model, [str(tmp_path / "one.txt")]))
    assert lines[2:] == [
        "bits per byte  unknown",
        "tokens         1 (0 bytes of text) in blocks of 32",
    ]


def test_generate_streams_the_likeliest_text(float32_two: Trained) -> None:
    pieces = list(generate(float32_two.model, PROMPT, 10))
    assert pieces[0] == PROMPT and len(pieces) > 5
    model, tokenizer = load_model(float32_two.model), Tokenizer(float32_two.model)
    ids = tokenizer.encode(PROMPT)
    for _ in range(10):
        ids.append(int(model(torch.tensor([ids]))[0, -1, : tokenizer.vocab_size].argmax()))
    assert 0 not in ids  # else the text would end there
    assert "".join(pieces) == tokenizer.decode(ids)


def test_generate_draws_by_seed_and_temperature(float32_two: Trained) -> None:
    def text(temperature: float, seed: int) -> str:
        return "".join(generate(float32_two.model, "", 12, temperature, seed))

    assert text(1.0, 1) == text(1.0, 1) != text(1.0, 2)
    assert text(1e-4, 5) == text(0.0, 0)


def test_sampling_follows_the_softmax(float32_two: Trained) -> None:
    model = load_model(float32_two.model)
    drawn = [next(new_tokens(model, [0, 300], 1, 0.5, seed, 4096)) for seed in range(400)]
    probabilities = (model(torch.tensor([[0, 300]]))[0, -1, :4096] / 0.5).softmax(-1)
    likely = probabilities.topk(64).indices
    expected = 400 * probabilities[likely].sum().item()
    found = sum(token in likely.tolist() for token in drawn)
    assert abs(found - expected) < 5 * math.sqrt(expected) + 1


def test_top_k_top_p_and_the_penalty_are_those_of_transformers() -> None:
    from transformers.generation.logits_process import (
        RepetitionPenaltyLogitsProcessor,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    generator = torch.Generator().manual_seed(0)
    logits, seen = torch.randn(50, generator=generator) * 3, [4, 7, 7, 49]
    for sampling in (Sampling(0.7, 5), Sampling(1.5, 0, 0.8), Sampling(1.0, 20, 0.5, 1.7), Sampling(2.0, 90)):
        scores = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(
            torch.tensor([seen]), logits[None].clone()
        )
        scores = scores / sampling.temperature
        if sampling.top_k:
            scores = TopKLogitsWarper(sampling.top_k)(None, scores)
        expected = TopPLogitsWarper(sampling.top_p)(None, scores)[0].softmax(-1)
        drawn = torch.tensor([sampling.choose(logits, seen, generator) for _ in range(3000)])
        found = torch.bincount(drawn, minlength=50) / 3000
        assert not found[expected == 0].any()
        assert (found - expected).abs().max() < 5 * (0.25 / 3000) ** 0.5
    greedy = Sampling(repetition_penalty=1e6).choose(logits, [int(logits.argmax())], generator)
    assert greedy == int(logits.topk(2).indices[1])


@pytest.mark.parametrize("temperature", [1e-30, 1e-40, 5e-324])
def test_the_lowest_temperatures_take_the_likeliest(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for logits in (torch.randn(50, generator=generator), torch.randn(50, generator=generator) - 100):
        for more in ((), (5,), (0, 0.5)):
            token = Sampling(temperature, *more).choose(logits, [], generator)
            assert token == int(logits.argmax())
    drawn = {Sampling(temperature).choose(torch.tensor([1.0, 3, 3]), [], generator) for _ in range(50)}
    assert drawn == {1, 2}


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_logits_that_are_not_finite_are_said(temperature: float) -> None:
    generator, logits = torch.Generator(), torch.tensor([0.0, 2.0, -1.0])
    for penalty, seen in ((1e-39, [1]), (1e300, [0])):
        with pytest.raises(
            UserError, match=f"--repetition-penalty is {re.escape(str(penalty))}: .* nearer to 1"
        ):
            Sampling(temperature, repetition_penalty=penalty).choose(logits, seen, generator)
    for value in (math.nan, math.inf):
        logits[2] = value
        with pytest.raises(UserError, match="the model's logits are not finite"):
            Sampling(temperature, repetition_penalty=1.5).choose(logits, [1], generator)


def test_a_text_ends_before_what_stops_it() -> None:
    text = "one two\n\nthree two"
    for cut in range(1, 8):
        pieces = [text[i : i + cut] for i in range(0, len(text), cut)]
        assert "".join(before_any(pieces, ["\n\n", "three"])) == "one two"
        assert "".join(before_any(pieces, ["none", "two!"])) == text
        assert "".join(before_any(pieces, [" two", "ne"])) == "o"
        assert list(before_any(pieces, [])) == [*pieces, ""]


def test_a_prompt_comes_from_a_file_or_standard_input(float32_two: Trained, tmp_path: Path) -> None:
    model, prompt = str(float32_two.model), tmp_path / "prompt.txt"
    prompt.write_bytes(PROMPT.encode())
    expected = "".join(generate(float32_two.model, PROMPT, 8)) + "\n"

    def run(*arguments: str | bytes, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-m", "mf_train", "generate", model, "--max-new-tokens", "8", *arguments]
        return subprocess.run(command, input=given, capture_output=True, timeout=300)

    assert run(given=PROMPT.encode()).stdout.decode() == expected
    assert run("--file", str(prompt)).stdout.decode() == expected
    for wrong, words in (
        (run(b"caf\xe9"), "PROMPT: byte 4, 0xe9, is not UTF-8"),
        (run(given=b"caf\xe9"), "standard input: byte 4, 0xe9"),
    ):
        (line,) = wrong.stderr.decode().splitlines()
        assert wrong.returncode == 2 and words in line


def test_a_message_in_the_chat_template(float32_two: Trained, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no chat template: leave --chat out"):
        list(generate(float32_two.model, "Hello", 4, chat=True))
    for path in float32_two.model.iterdir():
        (tmp_path / path.name).symlink_to(path)
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}model:"
    (tmp_path / "chat_template.jinja").write_text(template)
    answer = "".join(generate(tmp_path, "Hello", 4, chat=True))
    tokenizer, model = Tokenizer(tmp_path), load_model(tmp_path)
    ids = [*tokenizer.encode("user: Hello"), 0, *tokenizer.encode("model:")]
    expected = list(new_tokens(model, ids, 4, 0.0, 0, tokenizer.vocab_size))
    assert 0 not in expected and answer == tokenizer.decode(expected)


def test_bytes_of_a_character_are_not_shown_one_by_one(
    float32_two: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the model chooses; here it is made to choose an emoji's four bytes, half an emoji, and the end."""
    tokenizer = Tokenizer(float32_two.model)
    emoji = tokenizer.encode("\U0001f680")
    assert len(emoji) == 4
    chosen = [*tokenizer.encode(" a"), *emoji, *emoji, *tokenizer.encode(" b"), *emoji[:2], 0, *emoji]
    monkeypatch.setattr("mf_train.standalone.use.generate.new_tokens", lambda *_: iter(chosen))
    pieces = list(generate(float32_two.model, "x", 8))
    assert pieces[:5] == ["x", " a", "\U0001f680", "\U0001f680", " b"]
    assert "".join(pieces[5:]) == tokenizer.decode(emoji[:2])


def test_mistakes_are_named(float32_two: Trained, tmp_path: Path) -> None:
    model, data = float32_two.model, [str(float32_two.text)]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "broken").mkdir()
    for path in model.iterdir():
        (tmp_path / "broken" / path.name).symlink_to(path)
    weights = tmp_path / "broken" / "model.safetensors"
    weights.unlink()
    weights.write_bytes((model / "model.safetensors").read_bytes()[:-10])
    cases = [
        (lambda: generate(tmp_path / "none", "x"), "none: no such folder; give a model"),
        (lambda: generate(tmp_path, "x"), "has no config.json; give a model that"),
        (lambda: generate(tmp_path / "other", "x"), "config.json: model_type is 'llama'; give"),
        (lambda: generate(tmp_path / "broken", "x"), "model.safetensors: missing or damaged"),
        (lambda: generate(model, "x", 0), "--max-new-tokens is 0"),
        (lambda: generate(model, "x", 2, -1.0), "--temperature is -1.0"),
        (lambda: generate(model, "x", 2, math.nan), "--temperature is nan"),
        (lambda: generate(model, "x", top_k=-1, temperature=1.0), "--top-k is -1"),
        (lambda: generate(model, "x", top_p=0.0, temperature=1.0), "--top-p is 0.0"),
        (lambda: generate(model, "x", top_k=5), "--top-k and --top-p choose among .*: give --temperature"),
        (lambda: generate(model, "x", repetition_penalty=0.0), "--repetition-penalty is 0.0"),
        (lambda: generate(model, "x", stop=[""]), "--stop is empty"),
        (lambda: generate(model, "x", seed=2**64), "--seed is 18446744073709551616: it must be from -9223"),
        (lambda: generate(model, "x", seed=-(2**63) - 1), "--seed is -9223372036854775809"),
        (lambda: generate(model, "x", 32), "1 tokens and --max-new-tokens 32 are more than the 32 pos"),
        (lambda: evaluate(tmp_path / "none", data), "none: no such folder"),
        (lambda: evaluate(model, [str(tmp_path / "*.txt")]), "--data.*: no file matches"),
        (lambda: evaluate(model, data, 0), "--sequence-length is 0"),
        (lambda: evaluate(model, data, None, -1), "--sequences is -1"),
        (lambda: evaluate(model, data, None, 0, 0), "--batch-size is 0"),
    ]
    for mistake, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            list(mistake())
        assert "\n" not in str(caught.value)


def test_a_model_that_transformers_saved(float32_two: Trained, tmp_path: Path) -> None:
    """It has tokenizer.json alone, which is enough."""
    model = Path(shutil.copytree(float32_two.model, tmp_path / "saved"))
    (model / "tokenizer.model").unlink()
    assert "".join(generate(model, PROMPT, 10)) == "".join(generate(float32_two.model, PROMPT, 10))
    (model / "tokenizer.json").unlink()
    remedy = "has no tokenizer: copy tokenizer.json from the model that this one was made from"
    with pytest.raises(UserError, match=remedy):
        list(generate(model, PROMPT, 10))
    with pytest.raises(UserError, match=remedy):
        list(evaluate(model, [str(float32_two.text)]))
