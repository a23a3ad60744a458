"""Models whose tables and LM head are int8: what conversion writes, says and refuses, and how they load."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mf_train.checkpoint.layout import PROBE
from mf_train.cli import main
from mf_train.config import ModelConfig
from mf_train.data.tokenizer import Tokenizer
from mf_train.errors import TrainingError, UserError
from mf_train.model.quantized import Int8Head, Int8Lookup, quantize_rows, scales_name
from mf_train.standalone.conversion.convert import convert
from mf_train.standalone.exported.names import PARAMETER_PREFIX
from mf_train.standalone.folder import CERTIFICATE, SINGLE
from mf_train.standalone.use.evaluate import evaluate
from mf_train.standalone.use.generate import generate
from mf_train.standalone.use.load import load_model
from tests.model.reference import logits_of
from tests.processes import run_python
from tests.standalone.checkpoints import certificate_of, random_weights, write_checkpoint
from tests.standalone.conftest import Trained

CONFIG = ModelConfig(
    hidden_size=64, num_layers=2, num_heads=4, bits=4, vocab_size=4096, sequence_length=24, temperature=1.5
)
ODD = ModelConfig(hidden_size=6, num_layers=1, num_heads=1, bits=2, vocab_size=4096, sequence_length=24)
HYBRID = ModelConfig(
    output="dense", hidden_size=32, bits=4, num_layers=1, num_heads=2, vocab_size=4096, sequence_length=24
)
DENSE = ModelConfig(
    kind="dense", hidden_size=32, num_layers=1, num_heads=2, vocab_size=4096, sequence_length=24
)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return random_weights(CONFIG, seed=5)


@pytest.fixture(scope="module")
def checkpoint(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("int8") / "step-000000007", CONFIG, weights, tensor=2)


@pytest.fixture(scope="module")
def said(checkpoint: Path) -> list[str]:
    return list(convert(checkpoint, checkpoint.parent / "model", "int8"))


@pytest.fixture(scope="module")
def folder(checkpoint: Path, said: list[str]) -> Path:
    return checkpoint.parent / "model"


def copy_with(folder: Path, copy: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """The folder with other tensors."""
    copy.mkdir()
    for path in folder.iterdir():
        if path.name != SINGLE:
            (copy / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, copy / SINGLE, {"format": "pt"})
    return copy


def cross_entropy(logits: Tensor, tokens: list[int]) -> float:
    """Mean over the predicted tokens, one after the other."""
    losses = []
    for row, target in zip(logits.double().tolist(), tokens[1:], strict=False):
        largest = max(row)
        losses.append(largest + math.log(math.fsum(math.exp(value - largest) for value in row)) - row[target])
    assert len(losses) == len(tokens) - 1
    return math.fsum(losses) / len(losses)


def dequantized(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Float64 weights by their names in the plain model, from the names and values in the file."""
    values = {name.removeprefix(PARAMETER_PREFIX): value.double() for name, value in tensors.items()}
    scales = {name: scales_name(name) for name in values}
    return {
        name: value * values[scales[name]].unsqueeze(-1) if scales[name] else value
        for name, value in values.items()
        if not name.endswith(".scales")
    }


def test_what_is_stored(folder: Path, weights: dict[str, Tensor]) -> None:
    tensors = load_file(folder / SINGLE)
    expected = {}
    for name, value in weights.items():
        if scales := scales_name(name):
            expected[name], expected[scales] = quantize_rows(value)
        else:
            expected[name] = value.bfloat16()
    assert tensors.keys() == {PARAMETER_PREFIX + name for name in expected}
    for name, value in expected.items():
        stored = tensors[PARAMETER_PREFIX + name]
        assert stored.dtype == value.dtype and torch.equal(stored, value), name
    assert {name for name, value in expected.items() if value.dtype == torch.int8} == {
        name for name in weights if name.endswith("tables") or name == "head.weight"
    }
    settings = json.loads((folder / "config.json").read_text())
    assert settings["dtype"] == "bfloat16" and settings["table_dtype"] == "int8"
    assert "quantization_config" not in settings
    # a byte a value of tables and head, four a row of them, two for every other value
    rows = sum(value.numel() // value.shape[-1] for name, value in weights.items() if scales_name(name))
    bytes_ = sum(value.numel() * (1 if scales_name(name) else 2) for name, value in weights.items())
    data = (folder / SINGLE).read_bytes()
    assert len(data) == 8 + int.from_bytes(data[:8], "little") + bytes_ + 4 * rows


def test_a_large_models_file_is_about_half(tmp_path: Path) -> None:
    config = replace(CONFIG, bits=8, hidden_size=128, num_heads=1, num_layers=1)
    checkpoint = write_checkpoint(tmp_path / "c", config, random_weights(config, 1), tensor=1)
    sizes = {}
    for dtype in ("bfloat16", "int8"):
        list(convert(checkpoint, tmp_path / dtype, dtype))
        sizes[dtype] = (tmp_path / dtype / SINGLE).stat().st_size
    assert 0.5 < sizes["int8"] / sizes["bfloat16"] < 0.6


def test_the_rows_stand_for_the_models_weights(folder: Path) -> None:
    """With float32 activations the model computes what a float64 reference does on the dequantised weights."""
    tokens = torch.randint(4096, (2, 11), generator=torch.Generator().manual_seed(0))
    model = load_model(folder)
    assert isinstance(model.blocks[1].down, Int8Lookup) and isinstance(model.head, Int8Head)
    with torch.no_grad():
        logits = model.float()(tokens)
    expected = logits_of(dequantized(load_file(folder / SINGLE)), CONFIG, tokens)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-4)


def test_the_certificate_gives_the_loss(folder: Path, checkpoint: Path, said: list[str]) -> None:
    certificate = certificate_of(folder)
    assert certificate["dtype"] == "int8"
    tensors = load_file(folder / SINGLE)
    assert certificate["tensors"] == {
        name: hashlib.sha256(value.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, value in tensors.items()
    }
    probe, recorded = certificate["probe"], load_file(checkpoint / PROBE)
    tokens = recorded["tokens"].tolist()
    with torch.no_grad():
        logits = load_model(folder)(recorded["tokens"][None])[0]
    before, after = cross_entropy(recorded["logits"], tokens), cross_entropy(logits, tokens)
    assert probe["predicted_tokens"] == len(tokens) - 1 == 23
    assert probe["recorded_loss"] == pytest.approx(before, rel=1e-9)
    assert probe["loss"] == pytest.approx(after, rel=1e-9)
    assert probe["loss_difference"] == pytest.approx(after - before, abs=1e-9) and after != before
    likely = recorded["logits"].double().softmax(-1)
    divergence = (likely * (likely.log() - logits.double().softmax(-1).log())).sum(-1).mean().item()
    assert probe["divergence"] == pytest.approx(divergence, rel=1e-6) and divergence > 0
    assert probe["largest_logit_difference"] > 0 and len(probe["changed_codes"]) == 6
    assert "36 tensors in int8 (tables and LM head) and bfloat16" in said[1]
    assert said[3].startswith(
        f"loss on 23 of these random tokens: {after:.4f} nats, {after - before:+.4f} against"
    )
    assert said[4] == f"loss on text: memoryformer evaluate {folder} --data GLOB" and len(said) == 6


def test_a_trained_model_keeps_its_loss(float32_one: Trained, tmp_path: Path) -> None:
    list(convert(float32_one.run, tmp_path / "model", "int8"))
    probe = certificate_of(tmp_path / "model")["probe"]
    assert abs(probe["loss_difference"]) < 0.01 and 0 < probe["divergence"] < 1e-3
    losses = [
        float(next(evaluate(folder, [str(float32_one.text)], sequences=4)).split()[1])
        for folder in (float32_one.model, tmp_path / "model")
    ]
    assert losses[0] != losses[1] == pytest.approx(losses[0], abs=0.01)


@pytest.mark.parametrize("config", [CONFIG, ODD, HYBRID, DENSE], ids=["even", "odd", "hybrid", "dense"])
def test_every_degree_converts_to_the_same_bytes(config: ModelConfig, tmp_path: Path) -> None:
    values = random_weights(config, seed=0)
    files = []
    for tensor in (1,) if config is ODD else (1, 2):
        checkpoint = write_checkpoint(tmp_path / f"{tensor}", config, values, tensor)
        list(convert(checkpoint, tmp_path / f"model-{tensor}", "int8"))
        files.append({path.name: path.read_bytes() for path in (tmp_path / f"model-{tensor}").iterdir()})
    assert all({name for name in file if file[name] != files[0][name]} <= {CERTIFICATE} for file in files)
    data = files[0][SINGLE]
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    assert (8 + size) % 64 == 0
    starts = []
    for name, tensor in load_model(tmp_path / "model-1").state_dict().items():
        start, end = header[PARAMETER_PREFIX + name]["data_offsets"]
        starts.append(start)
        assert start % math.gcd(end - start, 64) == start % tensor.element_size() == 0, name
        assert (tensor.data_ptr() - start) % 64 == 0  # mapped, and aligned in memory as in the file
    assert any(start % 64 for start in starts) == (config in (ODD, HYBRID))


MAPPED = """
import json, sys
from pathlib import Path
import torch
from mf_train.standalone.use.load import load_model
folder = Path(sys.argv[1])
def memory():
    kinds, name = {}, ""
    for line in open("/proc/self/smaps"):
        first, *rest = line.split()
        if first.endswith(":"):
            if name == str(folder / "model.safetensors") and rest[-1] == "kB":
                kinds[first] = kinds.get(first, 0) + int(rest[0])
        else:
            name = rest[-1]
    return kinds
model = load_model(folder)
loaded = memory()
for tensor in model.state_dict().values():
    tensor.view(torch.uint8).max()
with torch.no_grad():
    model(torch.tensor([[1, 2, 3]]))
print(json.dumps([loaded, memory()]))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="needs Linux's /proc/self/smaps")
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_files_are_mapped_and_shared(dtype: str, checkpoint: Path, tmp_path: Path) -> None:
    list(convert(checkpoint, tmp_path / "model", dtype))
    held = load_model(tmp_path / "model")  # in this process, while another one loads it too
    total = sum(
        int(tensor.view(torch.uint8).max() >= 0) * tensor.nbytes for tensor in held.state_dict().values()
    )
    loaded, used = json.loads(run_python(MAPPED, tmp_path / "model"))
    assert loaded["Rss:"] * 1024 < total < used["Rss:"] * 1024  # nothing is read before it is used
    assert used["Anonymous:"] == 0  # no page was copied
    assert used["Shared_Clean:"] + used["Shared_Dirty:"] >= 0.9 * used["Rss:"]


def test_it_generates(folder: Path) -> None:
    model, tokenizer = load_model(folder), Tokenizer(folder)
    ids = tokenizer.encode("The union")
    before = len(ids)
    text = "".join(generate(folder, "The union", 6))
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert 0 not in ids[before:]  # else the text would end there
    assert text == tokenizer.decode(ids)


def test_transformers_loads_it(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokens = torch.randint(4096, (2, 9), generator=torch.Generator().manual_seed(5))
    state = load_file(folder / SINGLE)
    for dtype in ("auto", "float32"):
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, dtype=dtype, output_loading_info=True
        )
        assert not report["missing_keys"] and not report["unexpected_keys"]
        kinds = {str(value.dtype) for value in model.parameters()}
        assert kinds == {"torch.bfloat16" if dtype == "auto" else "torch.float32"}
        for name, value in model.named_buffers():
            assert value.dtype == state[name].dtype and torch.equal(value, state[name]), name
        assert {name for name, _ in model.named_buffers()} == {
            name for name in state if state[name].dtype != torch.bfloat16
        }
        with torch.no_grad():
            logits = model(tokens).logits
            if dtype == "float32":  # in bfloat16 another order of sums may change a code
                torch.testing.assert_close(logits, load_model(folder).float()(tokens), rtol=1e-4, atol=1e-4)
        model.save_pretrained(tmp_path / dtype)
        again = load_model(tmp_path / dtype).state_dict()
        assert all(
            torch.equal(value, again[name.removeprefix(PARAMETER_PREFIX)])
            for name, value in model.state_dict().items()
        )


def test_an_unknown_dtype_is_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(checkpoint), str(tmp_path / "out"), "--dtype", "int4"])
    assert ended.value.code == 2
    expected = "memoryformer: --dtype is 'int4': it must be float32, bfloat16 or int8\n"
    assert capsys.readouterr().err == expected and not any(tmp_path.iterdir())


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    """In a row that no probe reads, too."""
    values = random_weights(CONFIG, seed=1)
    values["blocks.1.up.tables"][3, 5, 7] = value
    checkpoint = write_checkpoint(tmp_path / "step-000000007", CONFIG, values, tensor=1)
    with pytest.raises(TrainingError, match=r"7: blocks.1.up.tables holds values that are not finite"):
        list(convert(checkpoint, tmp_path / "out", "int8"))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000007"]


HEAD, SCALES = "model.head.weight", "model.blocks.0.up.scales"
TABLES = "model.blocks.0.up.tables"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(SCALES), f"tensor {SCALES} is missing, and config.json asks for float32 (16, 16)"),
        (lambda t: t.update({SCALES: t[SCALES].bfloat16()}), f"tensor {SCALES} is bfloat16 (16, 16), and"),
        (lambda t: t.update({SCALES: t[SCALES][:9].clone()}), f"tensor {SCALES} is float32 (9, 16), and"),
        (lambda t: t.update({HEAD: t[HEAD].bfloat16()}), f"tensor {HEAD} is bfloat16 (4096, 64), and"),
        (
            lambda t: t.update({TABLES: t[TABLES].view(torch.uint8)}),
            f"tensor {TABLES} is uint8 (16, 16, 96), and",
        ),
        (
            lambda t: t.update({"model.x": torch.ones(2)}),
            "tensor model.x is float32 (2,), and config.json asks for",
        ),
    ],
)
def test_other_tensors_are_named(
    change: Callable[[dict[str, Tensor]], None], message: str, folder: Path, tmp_path: Path
) -> None:
    copy = copy_with(folder, tmp_path / "copy", change)
    with pytest.raises(UserError) as caught:
        load_model(copy)
    file = copy if "missing" in message else copy / SINGLE
    assert str(caught.value).startswith(f"{file}: {message}") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table_dtype": None}, f"{SINGLE}: tensor model.blocks.0.down.scales is float32 .*asks for none"),
        ({"table_dtype": "int4"}, "config.json: table_dtype is 'int4', and this version knows only 'int8'"),
        ({"dtype": "int8"}, "config.json: dtype is 'int8'; convert"),
        ({"dtype": "float32"}, "is bfloat16 .*, and config.json asks for float32"),
    ],
)
def test_another_config_is_named(change: dict[str, Any], message: str, folder: Path, tmp_path: Path) -> None:
    copy = copy_with(folder, tmp_path / "copy", lambda tensors: None)
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(settings | change))
    with pytest.raises(UserError, match=message):
        load_model(copy)


def test_a_truncated_file_is_named(folder: Path, tmp_path: Path) -> None:
    copy = copy_with(folder, tmp_path / "copy", lambda tensors: None)
    os.truncate(copy / SINGLE, (copy / SINGLE).stat().st_size - 64)
    with pytest.raises(UserError, match=r"copy/model.safetensors: missing or damaged \(.*\); convert"):
        load_model(copy)
