"""The arguments of `memoryformer tokenizer` and `memoryformer data`, and what they call."""

import argparse
from pathlib import Path
from typing import Any

from mf_train.commands import add_command, add_config, add_verbs, print_lines, refuse_with
from mf_train.processors import usable_processors

TEXT_FILES = "files of text (docs/data.md); may be repeated"
_DOCUMENTS = 100_000  # of a source, that a page is about


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
    verb.add_argument("--step", type=int, metavar="N", help=step)
    page = "write an HTML page on the sources instead: document lengths, duplicates, tokens per byte"
    verb.add_argument("--page", type=Path, metavar="FILE", help=page)
    documents = (
        f"with --page: documents of each source that are read, evenly spread (default: {_DOCUMENTS:,})"
    )
    verb.add_argument("--documents", type=int, metavar="N", help=documents)

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

    if given.page is not None:
        refuse_with(given, "--page", step=None)
    else:
        refuse_with(given, "a step's batch, without --page", documents=None)
    config = load_config(given.config, given.overrides)
    if given.page is not None:
        from mf_train.data.survey import write_survey

        documents = _DOCUMENTS if given.documents is None else given.documents
        return print_lines(write_survey(config, given.page, documents))
    step = 1 if given.step is None else given.step
    saved = stream_state_before(Path(config.training.output_dir), step)
    return print_lines(inspect_data(config, step, saved))


def _tokenize(given: argparse.Namespace) -> int:
    from mf_train.config.loading import load_config
    from mf_train.data.tokenize.command import tokenize

    config = load_config(given.config, given.overrides)
    workers = usable_processors() if given.workers is None else given.workers
    return print_lines(tokenize(config, given.output, workers))
