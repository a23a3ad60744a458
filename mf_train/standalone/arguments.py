"""The arguments of `memoryformer convert`, `generate` and `evaluate`, and what they call."""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mf_train.commands import add_command, print_lines, refuse_with
from mf_train.data.arguments import TEXT_FILES
from mf_train.errors import UserError


def add_convert(commands: Any) -> None:
    """Add the command to the command line's parser."""
    parser = add_command(
        commands,
        "convert",
        "turn a checkpoint into a standalone model, prove it again, or turn a model into a checkpoint",
        "convert runs/quickstart/checkpoints/latest quickstart-model --dtype bfloat16",
        _convert,
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="CHECKPOINT",
        help="a checkpoint, its 'latest' file, or a run's folder; with --to-checkpoint, or with --upload and without "
        "OUT, a standalone model",
    )
    parser.add_argument(
        "out", nargs="?", metavar="OUT", help="a folder that does not exist yet; with --check the model"
    )
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument(
        "--check",
        action="store_true",
        help="write nothing: compare the model at OUT with its certificate and with CHECKPOINT",
    )
    ways.add_argument(
        "--to-checkpoint",
        action="store_true",
        help="the way back: a checkpoint of a standalone model's weights, to train on from with checkpoint.resume",
    )
    parser.add_argument(
        "--tensor", type=int, metavar="P", help="with --to-checkpoint: tensor-parallel ranks (default: 1)"
    )
    parser.add_argument(
        "--dtype",
        help="data type of the weights: float32, bfloat16 or, for tables and head, int8 (default: the run's precision)",
    )
    parser.add_argument(
        "--average",
        action="store_true",
        help="the average of the weights that the run kept (training.average_decay) in place of the weights",
    )
    parser.add_argument(
        "--license",
        metavar="NAME",
        help="of the weights, for the model card: the hub's identifier, such as apache-2.0 (default: none is named)",
    )
    hub = parser.add_argument_group("to the Hugging Face hub")
    hub.add_argument(
        "--upload",
        metavar="OWNER/NAME",
        help="send the standalone model, once it is proved, to this repository",
    )
    hub.add_argument("--private", action="store_true", help="make a repository that only its owner sees")
    hub.add_argument("--dry-run", action="store_true", help="say what would be sent, and send nothing")


def add_average(verbs: Any) -> None:
    """Add `checkpoint average` to the verbs of `checkpoint`."""
    summary = "a checkpoint of the mean of a run's weights at several steps"
    example = "checkpoint average runs/base 140000 141000 142000 143000 base-mean"
    verb = add_command(verbs, "average", summary, example, _average)
    verb.add_argument("run_folder", type=Path, metavar="RUN", help="a run's folder")
    verb.add_argument(
        "steps", type=int, nargs="+", metavar="STEP", help="steps of checkpoints that the run has kept"
    )
    verb.add_argument("output", type=Path, metavar="OUT", help="a folder that does not exist yet")


def add_generate(commands: Any) -> None:
    """Add the command to the command line's parser."""
    example = "generate quickstart-model 'The state of the Union'"
    parser = add_command(commands, "generate", "continue a text with a standalone model", example, _generate)
    parser.add_argument("model", type=Path, help="a folder that convert wrote")
    parser.add_argument("prompt", nargs="?", help="the text to continue; without it, standard input")
    parser.add_argument("--file", type=Path, metavar="FILE", help="the text to continue, in UTF-8")
    parser.add_argument(
        "--chat", action="store_true", help="the text is a message, in the tokenizer's chat template"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="most tokens to add (default: 64)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token each time"
    )
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="draw of the K likeliest tokens (default: of all)"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw of the fewest likeliest tokens whose probabilities add up to P (default: 1, of all)",
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1: tokens that are in the text already become less likely (default: 1)",
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; may be given several times",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (default: 0)")


def add_evaluate(commands: Any) -> None:
    """Add the command to the command line's parser."""
    parser = add_command(
        commands,
        "evaluate",
        "loss, perplexity and bits per byte of a standalone model, or its scores in lm-eval's tasks",
        "evaluate quickstart-model --data 'configs/quickstart-text/validation/*'",
        _evaluate,
    )
    parser.add_argument("model", type=Path, help="a folder that convert wrote")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", action="append", metavar="GLOB", help=TEXT_FILES)
    what.add_argument(
        "--tasks",
        metavar="NAME,...",
        help="tasks of lm-evaluation-harness, such as mf_last_word (docs/evaluation.md)",
    )
    parser.add_argument(
        "--sequence-length", type=int, metavar="S", help="tokens of a sequence (default: the model's)"
    )
    parser.add_argument(
        "--sequences",
        type=int,
        default=0,
        metavar="N",
        help="evaluate only the first N sequences (default: all)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=8, metavar="B", help="sequences at once (default: 8)"
    )
    parser.add_argument(
        "--include-path",
        type=Path,
        metavar="DIR",
        help="with --tasks: a folder of task files, such as configs/eval",
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="with --tasks: evaluate only the first N items of each task"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="with --tasks: write scores, versions and hashes as JSON"
    )


def _average(given: argparse.Namespace) -> int:
    from mf_train.standalone.conversion.average import average

    return print_lines(average(given.run_folder, given.steps, given.output))


def _convert(given: argparse.Namespace) -> int:
    from mf_train.standalone.conversion.check import check_conversion
    from mf_train.standalone.conversion.convert import convert
    from mf_train.standalone.conversion.to_checkpoint import to_checkpoint
    from mf_train.standalone.conversion.upload import check_upload

    if given.upload is None:
        refuse_with(given, "a conversion without --upload", private=False, dry_run=False)
    else:
        refuse_with(given, "--upload", check=False, to_checkpoint=False, tensor=None)
    if given.out is None:
        return _upload_folder(given)
    output = Path(given.out)
    if given.check:
        refuse_with(given, "--check", dtype=None, tensor=None, average=False, license=None)
        return print_lines(check_conversion(given.source, output))
    if given.to_checkpoint:
        refuse_with(given, "--to-checkpoint", dtype=None, average=False, license=None)
        return print_lines(to_checkpoint(given.source, output, given.tensor or 1))
    refuse_with(given, "a conversion to a standalone model", tensor=None)
    if given.upload is not None:
        check_upload(given.upload, given.dry_run)
    print_lines(convert(given.source, output, given.dtype, average=given.average, license_name=given.license))
    return 0 if given.upload is None else print_lines(_upload(output, given))


def _upload_folder(given: argparse.Namespace) -> int:
    """`convert MODEL --upload OWNER/NAME`: of a model that was converted before."""
    from mf_train.standalone.conversion.upload import check_upload

    if given.upload is None:
        raise UserError(
            "OUT is missing: name the folder to write, or with --upload a model that was converted before"
        )
    refuse_with(given, "--upload of a converted model", dtype=None, average=False, license=None)
    check_upload(given.upload, given.dry_run)
    return print_lines(_upload(given.source, given))


def _upload(model: Path, given: argparse.Namespace) -> Iterator[str]:
    from mf_train.standalone.conversion.upload import upload

    return upload(model, given.upload, private=given.private, dry_run=given.dry_run)


def _generate(given: argparse.Namespace) -> int:
    from mf_train.standalone.use.generate import generate

    pieces = generate(
        given.model,
        _prompt(given.prompt, given.file),
        given.max_new_tokens,
        given.temperature,
        given.seed,
        top_k=given.top_k,
        top_p=given.top_p,
        repetition_penalty=given.repetition_penalty,
        stop=given.stop,
        chat=given.chat,
    )
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0


def _prompt(text: str | None, file: Path | None) -> str:
    """The text of the command line, of a file, or of standard input up to its end. Raises UserError, OSError."""
    if text is not None and file is not None:
        raise UserError(f"PROMPT and --file {file} are two texts: leave one out")
    if text is not None:
        name, data = "PROMPT", os.fsencode(text)
    elif file is not None:
        name, data = f"--file {file}", file.read_bytes()
    else:
        name, data = "standard input", sys.stdin.buffer.read()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name}: byte {error.start + 1}, 0x{data[error.start]:02x}, is not UTF-8: convert the text with iconv"
        ) from None


def _evaluate(given: argparse.Namespace) -> int:
    from mf_train.standalone.use.evaluate import evaluate
    from mf_train.standalone.use.harness import evaluate_tasks

    if given.tasks:
        refuse_with(given, "--tasks", sequence_length=None, sequences=0)
        return print_lines(
            evaluate_tasks(
                given.model,
                given.tasks.split(","),
                given.include_path,
                given.batch_size,
                given.limit,
                given.output,
            )
        )
    refuse_with(given, "--data", include_path=None, limit=None, output=None)
    return print_lines(
        evaluate(given.model, given.data, given.sequence_length, given.sequences, given.batch_size)
    )
