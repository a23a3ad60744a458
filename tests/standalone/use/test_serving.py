"""A converted model behind `transformers serve`, an OpenAI-compatible server, asked by the openai package."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mf_train.config import ModelConfig
from mf_train.standalone.conversion.convert import convert
from tests.standalone.checkpoints import random_weights, write_checkpoint
from tests.training.runs import environment

pytestmark = pytest.mark.slow
openai = pytest.importorskip("openai", reason="serving needs pip install 'transformers[serving]'")
pytest.importorskip("uvicorn", reason="serving needs pip install 'transformers[serving]'")
pytest.importorskip("fastapi", reason="serving needs pip install 'transformers[serving]'")

CLIENTS = 20
CONFIG = ModelConfig(
    hidden_size=64, num_layers=2, num_heads=4, bits=4, vocab_size=4096, sequence_length=128, expand_bits=1
)
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
# The command as it is, in a process that counts the tokens that the C++ library decoded and prints them at its end.
SERVE = """
import sys
from mf_train.standalone.decoding import FastPath
from transformers.cli.transformers import main

plain, decoded = FastPath.logits, 0

def logits(*arguments):
    global decoded
    found = plain(*arguments)
    decoded += found is not None
    return found

FastPath.logits = logits
try:
    main()
finally:
    print("decoded", decoded, flush=True)
"""


@dataclass
class Server:
    """A running server."""

    process: subprocess.Popen[str]
    model: Path
    port: int

    def client(self) -> Any:
        return openai.OpenAI(
            base_url=f"http://localhost:{self.port}/v1", api_key="none", max_retries=0, timeout=120
        )

    def decoded(self) -> int:
        """Stop it, as Ctrl-C does; returns the tokens that the C++ library decoded."""
        self.process.send_signal(signal.SIGINT)
        assert self.process.stdout is not None
        # not its end: threads of continuous batching keep it up
        line = next(line for line in self.process.stdout if line.startswith("decoded "))
        return int(line.split()[1])


@pytest.fixture
def server(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    """With more options of the command as its parameter."""
    weights = random_weights(CONFIG, seed=5)
    checkpoint = write_checkpoint(tmp_path / "step-000000007", CONFIG, weights, tensor=1)
    model = tmp_path / "model"
    list(convert(checkpoint, model, "float32"))
    (model / "chat_template.jinja").write_text(TEMPLATE)
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    options = ["--trust-remote-code", "--device", "cpu", "--dtype", "float32"]
    options += ["--port", str(port), *request.param]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE, "serve", str(model), *options],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment() | {"HF_HUB_OFFLINE": "1"},
        )
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            try:
                with urllib.request.urlopen(f"http://localhost:{port}/health") as answer:
                    assert json.load(answer) == {"status": "ok"}
                    break
            except OSError:
                time.sleep(0.2)
        yield Server(process, model, port)
    finally:
        process.kill()
        process.communicate()


@dataclass(frozen=True)
class Answer:
    """What a client got."""

    text: str
    tokens: int
    reason: str


def ask(server: Server, number: int) -> Answer:
    """A question of each kind in turn: a chat or a text, whole or streamed."""
    client, count = server.client(), 8 + number
    asked: dict[str, Any] = {"model": str(server.model), "temperature": 0, "max_tokens": count}
    chat, stream = number % 2 == 0, number % 4 < 2
    if chat:
        messages = [{"role": "user", "content": question(number)}]
        found = client.chat.completions.create(messages=messages, stream=stream, **asked)
    else:
        found = client.completions.create(prompt=question(number), stream=stream, **asked)
    if not stream:
        (choice,) = found.choices
        text = choice.message.content if chat else choice.text
        return Answer(text, found.usage.completion_tokens, choice.finish_reason)
    chunks = list(found)
    pieces = [chunk.choices[0].delta.content if chat else chunk.choices[0].text for chunk in chunks]
    last = chunks[-1]
    return Answer("".join(filter(None, pieces)), last.usage.completion_tokens, last.choices[0].finish_reason)


def question(number: int) -> str:
    return f"Question {number}: what is {number * 37} of the Union?"


# A row of at most so many tokens, and pages for what 20 clients hold at once: by default they take 60 % of the memory.
PAGED = ["--continuous-batching", "--cb-num-blocks", "64", "--cb-max-batch-tokens", "256"]


@pytest.mark.parametrize("server", [[], PAGED], ids=["one by one", "batched"], indirect=True)
def test_twenty_clients_at_once(server: Server, request: pytest.FixtureRequest) -> None:
    """Each answer is complete and what `generate` gives. One by one, all tokens but the first come from the C++
    library.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(lambda number: ask(server, number), range(CLIENTS)))
    assert len({answer.text for answer in answers}) == CLIENTS

    model = AutoModelForCausalLM.from_pretrained(server.model, trust_remote_code=True, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(server.model, trust_remote_code=True)
    total = 0
    for number, answer in enumerate(answers):
        text = question(number)
        if number % 2 == 0:
            text = f"user: {text}\nassistant:"
        inputs = tokenizer(text, return_tensors="pt")
        given = inputs["input_ids"].shape[1]
        tokens = model.generate(**inputs, max_new_tokens=8 + number, do_sample=False)[0, given:]
        ended = tokens[-1] == tokenizer.eos_token_id
        assert answer == Answer(
            tokenizer.decode(tokens, skip_special_tokens=True), len(tokens), "stop" if ended else "length"
        )
        total += len(tokens) - 1
    assert server.decoded() == (0 if "batched" in request.node.name else total)
