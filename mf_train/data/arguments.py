"""The arguments of `memoryformer tokenizer` and `memoryformer data`, and what they call."""

import argparse
from pathlib import Path
from typing import Any

from mf_train.commands import add_command, add_config, add_verbs, print_lines
from mf_train.processors import usable_processors

TEXT_FILES = "files of text (docs/data.md); may be repeated"


def add_tokenizer(commands: Any) -> None:
    """Add the command to the command line's parser."""
    verbs = add_verbs(commands, "tokenizer", "train a tokenizer")
    example = "tokenizer train --input 'corpus/*.jsonl.gz' --vocab-size 32000 --output tokenizer-32k"
    verb = add_command(verbs, "train", "train a sentencepiece model", example, _train)
    verb.add_argument("--input", required=True, action="append", metavar="GLOB", help=TEXT_FILES)
    verb.add_argument(
        "--vocab-size", required=True, type=int, metavar="N", help="tokens, bytes and end of text included"
    )
    verb.add_argument("--output", required=True, type=Path, metavar="DIR", help="a folder for the model")


def add_data(commands: Any) -> None:
    """Add the command to the command line's parser."""
    verbs = add_verbs(commands, "data", "look at training data")
    summary, example = (
        "show sources, counts and a step's batch with its digest",
        "data inspect configs/quickstart.yaml --step 3",
    )
    verb = add_command(verbs, "inspect", summary, example, _inspect)
    add_config(verb)
    step = "the step whose batch is shown, from 1 as in metrics.jsonl (default: 1)"
    verb.add_argument("--step", type=int, default=1, help=step)
    page = "write an HTML page instead: lengths of documents, duplicates, tokens a byte"
    verb.add_argument("--page", type=Path, metavar="FILE", help=page)
    documents = "with --page: how many of a source are read, evenly spread (default: 100,000)"
    verb.add_argument("--documents", type=int, default=100_000, metavar="N", help=documents)

    summary, example = (
        "write text sources as token shards (Megatron's .bin/.idx)",
        "data tokenize configs/quickstart.yaml --output tokens",
    )
    verb = add_command(verbs, "tokenize", summary, example, _tokenize)
    add_config(verb)
    folder = "a new folder, or an unfinished one to continue"
    verb.add_argument("--output", required=True, type=Path, metavar="DIR", help=folder)
    verb.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")


def _train(given: argparse.Namespace) -> int:
    from mf_train.data.tokenizer_training import train_tokenizer

    train_tokenizer(given.input, given.vocab_size, given.output)
    return 0


def _inspect(given: argparse.Namespace) -> int:
    from mf_train.checkpoint.read import stream_state_before
    from mf_train.config.loading import load_config
    from mf_train.data.show import inspect_data

    config = load_config(given.config, given.overrides)
    if given.page is not None:
        from mf_train.data.survey import write_survey

        return print_lines(write_survey(config, given.page, given.documents))
    saved = stream_state_before(Path(config.training.output_dir), given.step)
    return print_lines(inspect_data(config, given.step, saved))


def _tokenize(given: argparse.Namespace) -> int:
    from mf_train.config.loading import load_config
    from mf_train.data.tokenize.command import tokenize

    config = load_config(given.config, given.overrides)
    workers = usable_processors() if given.workers is None else given.workers
    return print_lines(tokenize(config, given.output, workers))
