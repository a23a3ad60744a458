"""The command line: thin verbs, each importing what it needs when it runs."""

import argparse
import errno
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mf_train.commands import add_command
from mf_train.errors import PeerError, TrainingError, UserError
from mf_train.inspection.arguments import add_inspect
from mf_train.launch.arguments import add_launch, join_verb
from mf_train.planning.arguments import add_plan
from mf_train.study.arguments import add_study

FAILURE, MISTAKE = 1, 2
_PEER_WAIT_SECONDS = 5.0
_FILES = "text, JSONL or Parquet files; may be repeated"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 failure, 2 the user's mistake, 75 stopped on request after saving."""
    options = _parse(_build_parser(), join_verb(sys.argv[1:] if arguments is None else arguments))
    try:
        status = options.run(options)
    except UserError as error:
        _speak(str(error))
        status = MISTAKE
    except (TrainingError, OSError) as error:
        if not (isinstance(error, BrokenPipeError) and _nobody_listens()):
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            _speak(f"{error}; make room and run again" if full else str(error))
        status = FAILURE
    except PeerError as error:
        status = error.status
    except KeyboardInterrupt:
        status = 130
    sys.stdout.flush()
    sys.exit(status)


def _nobody_listens() -> bool:
    """Whether the reader of standard output, such as head, has seen enough; then what is left is dropped."""
    output = select.poll()
    output.register(1, 0)  # nothing but that the other end is closed
    if not output.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return True


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may stand anywhere after CONFIG, also behind options, where argparse alone does not take them."""
    options, rest = parser.parse_known_args(arguments)
    if rest and (not hasattr(options, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _speak(message: str) -> None:
    """One line to standard error, by one rank.

    A mistake that every rank sees is rank 0's to tell: the others wait until their launcher has ended them, and
    speak only if they are still there, because then the mistake was theirs alone.
    """
    from mf_train.parallel.processes import find_process

    try:
        rank = find_process().rank
    except UserError:
        rank = 0
    if rank != 0:
        # a launcher's request to end is not one to save any more
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_PEER_WAIT_SECONDS)
    print(f"memoryformer: {message}", file=sys.stderr, flush=True)


def _train(options: argparse.Namespace) -> int:
    from mf_train.config.loading import load_config
    from mf_train.parallel.processes import find_process
    from mf_train.training.environment import set_allocator

    config = load_config(options.config, options.overrides)
    process = find_process()
    if config.training.device != "cpu":
        set_allocator(os.environ)  # torch reads it when it is imported, which comes next

    from mf_train.training.run import train

    return train(config, process)


def _tokenizer_train(options: argparse.Namespace) -> int:
    from mf_train.data.tokenizer_training import train_tokenizer

    train_tokenizer(options.input, options.vocab_size, options.output)
    return 0


def _data_inspect(options: argparse.Namespace) -> int:
    from mf_train.config.loading import load_config
    from mf_train.data.show import inspect_data
    from mf_train.training.folder import stream_state_before

    config = load_config(options.config, options.overrides)
    for line in inspect_data(config, options.step, stream_state_before(config, options.step)):
        print(line, flush=True)
    return 0


def _data_tokenize(options: argparse.Namespace) -> int:
    from mf_train.config.loading import load_config
    from mf_train.data.tokenize.command import tokenize

    config = load_config(options.config, options.overrides)
    workers = len(os.sched_getaffinity(0)) if options.workers is None else options.workers
    for line in tokenize(config, options.output, workers):
        print(line, flush=True)
    return 0


def _checkpoint_verify(options: argparse.Namespace) -> int:
    from mf_train.checkpoint.verify import verify

    for line in verify(options.path):
        print(line, flush=True)
    return 0


def _checkpoint_list(options: argparse.Namespace) -> int:
    from mf_train.checkpoint.verify import list_lines

    for line in list_lines(options.run_folder):
        print(line, flush=True)
    return 0


def _convert(options: argparse.Namespace) -> int:
    from mf_train.standalone.conversion.check import check_conversion
    from mf_train.standalone.conversion.convert import convert
    from mf_train.standalone.conversion.to_checkpoint import to_checkpoint

    if options.check:
        _refuse_with(options, "--check", dtype=None, to_checkpoint=False, tensor=None)
        lines = check_conversion(options.source, options.output)
    elif options.to_checkpoint:
        _refuse_with(options, "--to-checkpoint", dtype=None)
        lines = to_checkpoint(options.source, options.output, options.tensor or 1)
    else:
        _refuse_with(options, "a conversion to a standalone model", tensor=None)
        lines = convert(options.source, options.output, options.dtype)
    for line in lines:
        print(line, flush=True)
    return 0


def _refuse_with(options: argparse.Namespace, what: str, **defaults: object) -> None:
    """Raises UserError where an option that `what` does not use was given."""
    for name, default in defaults.items():
        if getattr(options, name) != default:
            raise UserError(f"--{name.replace('_', '-')} does not go with {what}: leave it out")


def _generate(options: argparse.Namespace) -> int:
    from mf_train.standalone.use.generate import generate

    for piece in generate(
        options.model, options.prompt, options.max_new_tokens, options.temperature, options.seed
    ):
        print(piece, end="", flush=True)
    print()
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from mf_train.standalone.use.evaluate import evaluate
    from mf_train.standalone.use.harness import evaluate_tasks

    if options.tasks:
        _refuse_with(options, "--tasks", sequence_length=None, sequences=0)
        lines = evaluate_tasks(
            options.model,
            options.tasks.split(","),
            options.include_path,
            options.batch_size,
            options.limit,
            options.output,
        )
    else:
        _refuse_with(options, "--data", include_path=None, limit=None, output=None)
        lines = evaluate(
            options.model, options.data, options.sequence_length, options.sequences, options.batch_size
        )
    for line in lines:
        print(line)
    return 0


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="memoryformer",
        description="Pretrain MemoryFormer language models, and use what comes out.",
        epilog="Each command's --help shows an example.",
    )
    commands = parser.add_subparsers(metavar="command", required=True)

    train = add_command(
        commands,
        "train",
        "pretrain a model",
        "memoryformer train configs/quickstart.yaml parallel.tensor=1 training.steps=100",
        _train,
    )
    _add_config(train)

    tokenizer = commands.add_parser("tokenizer", help="train a tokenizer").add_subparsers(
        metavar="verb", required=True
    )
    example = (
        "memoryformer tokenizer train --input 'corpus/*.jsonl.gz' --vocab-size 32000 --output tokenizer-32k"
    )
    verb = add_command(tokenizer, "train", "train a sentencepiece model", example, _tokenizer_train)
    verb.add_argument(
        "--input",
        required=True,
        action="append",
        metavar="GLOB",
        help="text, JSONL or Parquet files; may be repeated",
    )
    verb.add_argument("--vocab-size", required=True, type=int, metavar="N")
    verb.add_argument("--output", required=True, type=Path, metavar="DIR")

    data = commands.add_parser("data", help="look at training data").add_subparsers(
        metavar="verb", required=True
    )
    example = "memoryformer data inspect configs/quickstart.yaml --step 3"
    verb = add_command(
        data, "inspect", "show sources, counts and a step's batch with its digest", example, _data_inspect
    )
    _add_config(verb)
    verb.add_argument(
        "--step",
        type=int,
        default=1,
        help="the step whose batch is shown, from 1 as in metrics.jsonl (default: 1)",
    )

    example = "memoryformer data tokenize configs/quickstart.yaml --output tokens"
    verb = add_command(
        data, "tokenize", "write text sources as token shards (Megatron's .bin/.idx)", example, _data_tokenize
    )
    _add_config(verb)
    verb.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="a new folder, or one to go on with"
    )
    verb.add_argument(
        "--workers", type=int, default=None, metavar="N", help="processes (default: one a core)"
    )

    checkpoint = commands.add_parser("checkpoint", help="look at a run's checkpoints").add_subparsers(
        metavar="verb", required=True
    )
    example = "memoryformer checkpoint verify runs/quickstart"
    verb = add_command(
        checkpoint, "verify", "read checkpoints and compare every checksum", example, _checkpoint_verify
    )
    verb.add_argument(
        "path", type=Path, metavar="PATH", help="a checkpoint, or a run's folder for all of its"
    )
    example = "memoryformer checkpoint list runs/quickstart"
    verb = add_command(
        checkpoint, "list", "show a run's checkpoints: step, size, date", example, _checkpoint_list
    )
    verb.add_argument("run_folder", type=Path, metavar="RUN")

    example = "memoryformer convert runs/quickstart/checkpoints/latest quickstart-model --dtype bfloat16"
    summary = "turn a checkpoint into a standalone model, prove it again, or turn a model into a checkpoint"
    verb = add_command(commands, "convert", summary, example, _convert)
    verb.add_argument(
        "source",
        type=Path,
        metavar="CHECKPOINT",
        help="a checkpoint, its 'latest' file, or a run's folder; with --to-checkpoint a standalone model",
    )
    verb.add_argument(
        "output", type=Path, metavar="OUT", help="a folder that does not exist yet; with --check the model"
    )
    ways = verb.add_mutually_exclusive_group()
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
    verb.add_argument(
        "--tensor",
        type=int,
        default=None,
        metavar="P",
        help="ranks that a checkpoint is split for (default: 1)",
    )
    verb.add_argument(
        "--dtype",
        default=None,
        help="of the weights: float32, bfloat16 or, for tables and LM head, int8 (default: the run's precision)",
    )

    example = "memoryformer generate quickstart-model 'The state of the Union'"
    verb = add_command(commands, "generate", "continue a text with a standalone model", example, _generate)
    verb.add_argument("model", type=Path)
    verb.add_argument("prompt")
    verb.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    verb.add_argument(
        "--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token each time"
    )
    verb.add_argument("--seed", type=int, default=0)

    example = "memoryformer evaluate quickstart-model --data 'configs/quickstart-text/validation/*'"
    summary = "loss, perplexity and bits per byte of a standalone model, or its scores in lm-eval's tasks"
    verb = add_command(commands, "evaluate", summary, example, _evaluate)
    verb.add_argument("model", type=Path)
    what = verb.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", action="append", metavar="GLOB", help=_FILES)
    what.add_argument(
        "--tasks",
        metavar="NAME,...",
        help="tasks of lm-evaluation-harness, such as mf_last_word (docs/evaluation.md)",
    )
    verb.add_argument("--sequence-length", type=int, default=None, metavar="S", help="default: the model's")
    verb.add_argument("--sequences", type=int, default=0, metavar="N", help="only the first N (default: all)")
    verb.add_argument("--batch-size", type=int, default=8, metavar="B")
    verb.add_argument(
        "--include-path", type=Path, metavar="DIR", help="of --tasks: task files, such as configs/eval"
    )
    verb.add_argument("--limit", type=int, metavar="N", help="of --tasks: only the first N items of each")
    verb.add_argument(
        "--output", type=Path, metavar="FILE", help="of --tasks: JSON with scores, versions and hashes"
    )

    add_inspect(commands)
    add_launch(commands)
    add_plan(commands)
    add_study(commands)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, such as configs/quickstart.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's"
    )
