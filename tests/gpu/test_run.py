"""The real command on the device: train, resume, convert, with telemetry and attention inside documents.

Two runs, float32 under ZeRO 3 and bfloat16 under ZeRO 2, on token shards; so no tokenizer is needed. Runs start at
once, since a start takes longer than a run. `MF_GPU_TESTS=cpu` trains on the CPU.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from tests.gpu.device import device_or_skip, is_installed, skip_without

DEVICE = device_or_skip()
skip_without("deepspeed", "megatron.core", *(["triton"] if DEVICE == "cuda" else []))

from safetensors.torch import load_file  # noqa: E402

from mf_train.checkpoint.layout import step_name  # noqa: E402
from mf_train.checkpoint.probe import CODES, read_codes  # noqa: E402
from mf_train.checkpoint.read import CheckpointReader  # noqa: E402
from mf_train.data.shards.shard import TokenShardWriter  # noqa: E402
from tests.checkpoint.elastic import whole_tensors  # noqa: E402
from tests.parallel.test_engine import largest_error, largest_relative  # noqa: E402
from tests.training.runs import REPOSITORY, command_line, environment, read_metrics  # noqa: E402

PRECISIONS = {"float32": 3, "bfloat16": 2}  # and the ZeRO stage
STEPS, RESUMED_FROM = 5, 3
BATCH, LENGTH, VOCABULARY = 8, 64, 512
TIME_LIMIT = 150  # seconds, of a command
# Of losses and norms of steps that repeat steps, where torch's attention may sum in another order (test_repeats.py).
ALLOWED = {"float32": (1e-3, 1e-2), "bfloat16": (6e-3, 1.5e-1)}
Measured = Callable[[str, object], None]


@dataclass
class Done:
    """A command that ended, and the folder that it wrote."""

    folder: Path
    status: int
    said: str
    complained: str

    def succeeded(self) -> Path:
        assert self.status == 0, f"status {self.status}\n{self.said[-4000:]}\n{self.complained[-4000:]}"
        return self.folder


def run_at_once(commands: dict[Path, list[str]]) -> list[Done]:
    """`memoryformer ARGUMENTS` of each folder, all at the same time."""
    running = {}
    for folder, arguments in commands.items():
        with (
            open(f"{folder}.stdout", "w") as stdout,  # files, so that none waits for a reader
            open(f"{folder}.stderr", "w") as stderr,
        ):
            running[folder] = subprocess.Popen(
                command_line(arguments), stdout=stdout, stderr=stderr, env=environment(), cwd=REPOSITORY
            )
    try:
        for process in running.values():
            process.wait(TIME_LIMIT)
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    return [
        Done(folder, process.returncode, *(Path(f"{folder}.{s}").read_text() for s in ("stdout", "stderr")))
        for folder, process in running.items()
    ]


def write_tokens(prefix: Path) -> str:
    """Documents of 5 to 100 ids; some ids are far more frequent than others, so that there is much to learn."""
    generator = torch.Generator().manual_seed(8)
    with TokenShardWriter(prefix, "uint16") as writer:
        for _ in range(200):
            length = int(torch.randint(5, 100, (), generator=generator))
            ids = 1 + ((VOCABULARY - 1) * torch.rand(length, generator=generator).pow(3)).long()
            writer.add(ids.numpy())
        writer.finish()
    return str(prefix)


def write_config(folder: Path, shard: str, precision: str) -> Path:
    tree = {
        "model": {
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "bits": 4,
            "expand_bits": 2,
            "vocab_size": VOCABULARY,
            "sequence_length": LENGTH,
        },
        "data": {
            "train": [{"path": shard}],
            "validation": [{"path": shard}],
            "logical_streams": 8,
            "document_attention": True,
        },
        "tokenizer": {"end_of_text_id": 0},
        "optimizer": {"learning_rate": 3e-3},
        "schedule": {"kind": "constant", "warmup_steps": 1},
        "parallel": {"zero_stage": PRECISIONS[precision]},
        "training": {
            "steps": STEPS,
            "global_batch_size": BATCH,
            "micro_batch_size": 2,
            "precision": precision,
            "device": DEVICE,
            "output_dir": str(folder),
            "validation_interval": STEPS,
            "validation_sequences": 5,
        },
        "checkpoint": {"interval": 1, "keep": 0},
        "logging": {"tensorboard": False, "interval": 1, "telemetry_interval": 2},
    }
    path = Path(f"{folder}.yaml")
    path.write_text(yaml.safe_dump(tree))
    return path


Runs = dict[str, Done]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """By precision: 5 steps without a stop, a checkpoint after each."""
    base = tmp_path_factory.mktemp("runs")
    shard = write_tokens(base / "shard")
    folders = {precision: base / precision for precision in PRECISIONS}
    commands = {
        folder: ["train", str(write_config(folder, shard, precision))]
        for precision, folder in folders.items()
    }
    return dict(zip(PRECISIONS, run_at_once(commands), strict=True))


@pytest.fixture(scope="module")
def resumed(runs: Runs) -> Runs:
    """Copies of the runs without the checkpoints after step 3, started again."""
    commands = {}
    for precision, run in runs.items():
        folder = run.folder.with_name(f"{precision}-resumed")
        if run.folder.is_dir():
            shutil.copytree(run.folder, folder)
        for step in range(RESUMED_FROM + 1, STEPS + 1):
            shutil.rmtree(folder / "checkpoints" / step_name(step), ignore_errors=True)
        commands[folder] = ["train", f"{run.folder}.yaml", f"training.output_dir={folder}"]
    return dict(zip(PRECISIONS, run_at_once(commands), strict=True))


@pytest.fixture(scope="module")
def converted(runs: Runs) -> Runs:
    commands = {}
    for precision, run in runs.items():
        folder = run.folder.with_name(f"{precision}-model")
        commands[folder] = ["convert", str(run.folder), str(folder)]
    return dict(zip(PRECISIONS, run_at_once(commands), strict=True))


each = pytest.mark.parametrize("precision", PRECISIONS)


@each
def test_training(precision: str, runs: Runs, measured: Measured) -> None:
    folder = runs[precision].succeeded()
    metrics = read_metrics(folder)
    losses = [entry["loss"] for entry in metrics]
    measured("losses", [round(loss, 4) for loss in losses])
    assert [entry["step"] for entry in metrics] == list(range(1, STEPS + 1))
    # a model that knows nothing has the logarithm of the vocabulary
    assert abs(losses[0] - math.log(VOCABULARY)) < 0.1 and losses[0] - losses[-1] > 0.05, losses
    assert abs(metrics[-1]["validation_loss"] - losses[-1]) < 0.3, (metrics[-1]["validation_loss"], losses)
    assert all(entry["peak_memory_bytes"] > 0 for entry in metrics)
    state = CheckpointReader(folder / "checkpoints" / step_name(STEPS)).state()
    assert (state["device"], state["tokens"]) == (DEVICE, STEPS * BATCH * LENGTH)
    if DEVICE == "cuda":
        assert "Triton kernels" in runs[precision].said, runs[precision].said


@each
def test_resuming(precision: str, runs: Runs, resumed: Runs, measured: Measured) -> None:
    """The same batches; what was restored, by the first step after; then losses, to what may differ between two runs.

    The forward pass repeats to the bit, so the first loss shows the masters. The moments after that step are nine
    tenths those restored: lost ones would be a whole norm off, and a gradient summed in another order is 1e-2 at most.
    """
    whole, again = runs[precision].succeeded(), resumed[precision].succeeded()
    expected, actual = read_metrics(whole), read_metrics(again)
    assert [entry["step"] for entry in actual] == list(range(1, STEPS + 1))
    assert [entry["batch_digest"] for entry in actual] == [entry["batch_digest"] for entry in expected]
    assert [entry["tokens"] for entry in actual] == [entry["tokens"] for entry in expected]
    assert f"{step_name(RESUMED_FROM)}" in resumed[precision].said, resumed[precision].said

    after = slice(RESUMED_FROM, STEPS)
    curves = [
        [[entry[key] for entry in each[after]] for each in (actual, expected)]
        for key in ("loss", "grad_norm")
    ]
    losses, norms = (largest_relative(*curve) for curve in curves)
    bits = "equal to the bit" if all(ours == theirs for ours, theirs in curves) else "differ"
    measured("steps after a resume", f"{bits}: losses {losses:.1e}, norms {norms:.1e}")
    first = largest_relative(curves[0][0][:1], curves[0][1][:1])
    assert first <= 1e-6, f"the first loss after the resume differs by {first:.1e}: {curves[0]}"
    allowed = ALLOWED[precision]
    assert losses <= allowed[0] and norms <= allowed[1], f"losses {losses:.1e}, norms {norms:.1e}: {curves}"

    name = step_name(RESUMED_FROM + 1)
    held, theirs = (whole_tensors(folder / "checkpoints" / name, 1) for folder in (again, whole))
    for kind in held:
        # Adam moves a weight whose gradient is rounding alone as far as any other
        names = [n for n in held[kind] if not n.endswith("key.bias")]
        error, worst = largest_error({n: held[kind][n] for n in names}, {n: theirs[kind][n] for n in names})
        assert error <= (1e-3 if precision == "float32" else 5e-2), f"{kind} of {worst}: {error:.1e}"


@each
def test_telemetry(precision: str, runs: Runs) -> None:
    """Every 2 steps, of all tokens; the codes that changed, against the codes that the checkpoints hold."""
    folder = runs[precision].succeeded()
    reports = {entry["step"]: entry for entry in read_metrics(folder) if "tables" in entry}
    assert list(reports) == [2, 4]
    assert [entry["tables_tokens"] for entry in reports.values()] == [2 * BATCH * LENGTH] * 2
    before, after = (
        read_codes(CheckpointReader(folder / "checkpoints" / step_name(step))) for step in (3, 4)
    )
    assert reports[4]["codes_changed_since"] == 3 and len(reports[4]["tables"]) == 6
    for name, table in reports[4]["tables"].items():
        changed = (before[CODES + name] != after[CODES + name]).double().mean().item()
        assert table["codes_changed"] == changed, name
        assert 0 < table["rows_read"] <= 1 and 0 < table["entropy"] <= 1, (name, table)
        assert 0 < table["largest_share"] <= 1 and 0 <= table["bit_imbalance_worst"] <= 0.5, (name, table)


@each
def test_conversion(precision: str, runs: Runs, converted: Runs, measured: Measured) -> None:
    """The files hold the checkpoint's weights; the certificate says how far a CPU is from the trainer.

    Its replay takes the trainer's codes, so that only roundings are left: float32 on a CPU is exact by the
    certificate's own rule; from a GPU 1e-4 of the logits' spread, a hundred times float32's rounding, and one code in a
    hundred. bfloat16: what the certificate measured that rounding does to this model.
    """
    run, folder = runs[precision].succeeded(), converted[precision].succeeded()
    certificate = json.loads((folder / "certificate.json").read_text())
    replay, probe = certificate["replay"], certificate["probe"]
    changed = max(replay["changed_codes"].values())
    measured(
        "the converted model on the CPU, from the trainer",
        f"largest logit difference {probe['largest_logit_difference']:.2e}, most changed codes of a hash "
        f"{max(probe['changed_codes'].values()):.2%}; with the trainer's codes "
        f"{replay['largest_logit_difference']:.2e}, {replay['relative_logit_error']:.1e} of their spread, "
        f"{changed:.2%}",
    )
    assert certificate["source"]["device"] == DEVICE and probe["text"] == "validation"
    assert replay["exact"] == (DEVICE == "cpu" and precision == "float32")
    if precision == "float32":
        assert replay["relative_logit_error"] <= 1e-4 and changed <= 0.01, replay
    elif replay["largest_logit_difference"] or changed:
        assert replay["relative_logit_error"] <= replay["allowed_logit_error"], replay
        assert changed <= replay["allowed_changed_codes"], replay
    assert "largest logit difference from the trainer" in converted[precision].said, converted[precision].said

    masters = whole_tensors(run / "checkpoints" / step_name(STEPS), 1)["master"]
    written = {
        name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()
    }
    assert len(written) == len(masters)
    by_size = sorted(value.double().sum().item() for value in written.values())
    dtype = getattr(torch, precision)
    assert by_size == sorted(value.to(dtype).double().sum().item() for value in masters.values())


@pytest.mark.skipif(not is_installed("transformers"), reason="transformers is not installed")
@each
def test_the_converted_model_on_the_device(
    precision: str, runs: Runs, converted: Runs, measured: Measured
) -> None:
    """By transformers, against the logits that the trainer recorded: root mean square, as a share of their spread.

    On the trainer's own device codes hardly change; one that does moves the logits of its token by some hundredths.
    Rounding to bfloat16 moves each. Other weights would be off by 1 and more.
    """
    from transformers import AutoModelForCausalLM

    run, folder = runs[precision].succeeded(), converted[precision].succeeded()
    recorded = load_file(run / "checkpoints" / step_name(STEPS) / "probe.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).to(DEVICE)
    with torch.no_grad():
        logits = model(recorded["tokens"][None].to(DEVICE)).logits[0].double().cpu()
    expected = recorded["logits"].double()
    spread = (expected - expected.mean(-1, keepdim=True)).square().mean().sqrt()
    error = ((logits - expected).square().mean().sqrt() / spread).item()
    measured("transformers on the device, from the trainer", f"{error:.1e}")
    assert next(model.parameters()).dtype == getattr(torch, precision)
    assert error <= (2e-2 if precision == "float32" else 2e-1), error
