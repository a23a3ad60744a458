"""`memoryformer data inspect --page`: lengths, duplicates and tokens a byte of the sources, as one HTML file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mf_train.config import Config, DataConfig, SourceConfig
from mf_train.data.documents import Source, TextSource
from mf_train.data.open_tokenizer import open_tokenizer
from mf_train.data.sources import open_source
from mf_train.data.tokenizer import Tokenizer
from mf_train.drawing import make_figure, make_png, render_page
from mf_train.errors import UserError
from mf_train.files import write_whole

_TOKENISED = 1000  # of these that are tokenised
_TOKENISED_BYTES = 65536  # at the beginning of each
_TEMPLATE = Path(__file__).with_name("survey.html.jinja")


@dataclass(frozen=True)
class Survey:
    """What was found in a source's documents, evenly spread, that were read."""

    label: str
    name: str
    documents: int  # of the source
    unit: str  # of a length: bytes of UTF-8, or tokens where a shard holds no more
    lengths: npt.NDArray[np.int64]  # of each document that was read
    digests: npt.NDArray[np.uint64]  # of its text or tokens; of equal ones the same
    tokens_a_byte: npt.NDArray[np.float64]  # of some
    left_out: Sequence[str]

    @property
    def repeated(self) -> int:
        """Documents that were read and equal an earlier one of the same source."""
        return len(self.digests) - len(np.unique(self.digests))


def write_survey(config: Config, output: Path, documents: int) -> Iterator[str]:
    """Write the page on the sources of training and validation; yields a line on it.

    Of each source at most so many documents are read, evenly spread. Raises UserError and OSError.
    """
    if documents < 1:
        raise UserError(f"--documents {documents}: at least 1")
    if not output.parent.is_dir() or output.is_dir():
        raise UserError(f"--page {output}: name a file in a folder that is there")
    tokenizer = open_tokenizer(config.tokenizer, config.model.vocab_size)
    surveys = [
        survey(label, open_source(settings, f"data.{label}", config.data, tokenizer), tokenizer, documents)
        for label, settings in _labelled(config.data)
    ]
    pictures = {"lengths of documents": draw_lengths(surveys)}
    if any(len(each.tokens_a_byte) for each in surveys):
        pictures["tokens per byte"] = draw_ratios(surveys)
    page = render_page(
        _TEMPLATE,
        pictures,
        surveys=surveys,
        shared=shared_documents(surveys),
        median=np.median,
        total=np.sum,
        tokenised=_TOKENISED_BYTES,
    )
    write_whole(output, page.encode())
    yield f"{output}: {sum(len(each.lengths) for each in surveys):,} documents of {len(surveys)} sources"


def _labelled(data: DataConfig) -> Iterator[tuple[str, SourceConfig]]:
    for kind, sources in (("train", data.train), ("validation", data.validation)):
        yield from ((f"{kind}[{index}]", each) for index, each in enumerate(sources))


def survey(label: str, source: Source, tokenizer: Tokenizer, documents: int) -> Survey:
    """Read a source's documents, evenly spread, at most so many."""
    count = min(documents, source.num_documents)
    chosen = [number * source.num_documents // count for number in range(count)]
    lengths, digests, ratios = np.zeros(count, np.int64), np.zeros(count, np.uint64), []
    for place, document in enumerate(chosen):
        content = _content(source, document)
        lengths[place] = len(content)
        digests[place] = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
        if isinstance(source, TextSource) and place % -(-count // _TOKENISED) == 0:
            text = content[:_TOKENISED_BYTES].decode(errors="ignore")
            ratios.append(len(tokenizer.encode_array(text)) / len(text.encode()))
    unit = "bytes" if isinstance(source, TextSource) else "tokens"
    if unit == "tokens":
        lengths //= np.dtype(np.int32).itemsize
    return Survey(
        label, source.name, source.num_documents, unit, lengths, digests, np.array(ratios), source.left_out
    )


def _content(source: Source, document: int) -> bytes:
    """A document's text, or its tokens as int32 without the end of text."""
    if isinstance(source, TextSource):
        return source.documents.text(document)
    parts, start = [], 0
    while True:
        chunk = source.read([document], start, 1 << 20)
        parts.append(chunk.tokens)
        passed, start = chunk.end
        if passed:
            return np.concatenate(parts)[:-1].astype(np.int32).tobytes()


def shared_documents(surveys: Sequence[Survey]) -> list[tuple[str, str, int]]:
    """Pairs of sources, and how many documents of the first that were read are also among those of the second."""
    pairs = (
        (one.label, other.label, int(np.isin(one.digests, other.digests).sum()))
        for index, one in enumerate(surveys)
        for other in surveys[:index]
        if one.unit == other.unit
    )
    return [pair for pair in pairs if pair[2]]


def draw_lengths(surveys: Sequence[Survey]) -> bytes:
    """Shares of the documents over their length."""
    units = list(dict.fromkeys(each.unit for each in surveys))
    figure, axes = make_figure(len(units))
    for unit, axis in zip(units, axes, strict=True):
        mine = [each for each in surveys if each.unit == unit]
        lengths = np.concatenate([each.lengths for each in mine])
        bins = np.geomspace(max(1, lengths.min()), lengths.max() * 1.01 + 1, 61)
        for each in mine:
            weights = np.full(len(each.lengths), 100 / max(1, len(each.lengths)))
            axis.hist(each.lengths, bins, weights=weights, histtype="step", label=each.label)
        axis.set(xscale="log", xlabel=f"document length ({unit})", ylabel="documents (%)")
        axis.legend()
    return make_png(figure)


def draw_ratios(surveys: Sequence[Survey]) -> bytes:
    """Shares of the documents over tokens a byte of UTF-8."""
    figure, (axis,) = make_figure()
    mine = [each for each in surveys if len(each.tokens_a_byte)]
    bins = np.linspace(0, max(float(each.tokens_a_byte.max()) for each in mine) * 1.01, 61)
    for each in mine:
        weights = np.full(len(each.tokens_a_byte), 100 / len(each.tokens_a_byte))
        axis.hist(each.tokens_a_byte, bins, weights=weights, histtype="step", label=each.label)
    axis.set(xlabel="tokens per byte of UTF-8", ylabel="documents (%)")
    axis.legend()
    return make_png(figure)
