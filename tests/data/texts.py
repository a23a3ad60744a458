"""Documents for the tests, and files of them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from hypothesis import strategies as st

WORDS = (
    "the Congress of these United States\n\n shall  be 1848 naïve 🎉 \t and — provided for, by law. ".split(
        " "
    )
)
NASTY = "".join(map(chr, range(0, 300))) + "\u2581\u2585\u2047\u2028\ufeff\u200d🎉👩‍🚀é\r\n\t   ａ１"
_PIECES = ["<|endoftext|>", "<unk>", "<0x0A>", "  ", "\n\n", "\u2581", " the", "2024", "\r\n"]


def any_text() -> st.SearchStrategy[str]:
    """Texts of what tokenizers trip over, and of anything else."""
    return st.lists(
        st.one_of(
            st.sampled_from(_PIECES),
            st.sampled_from(NASTY),
            st.text(st.characters(exclude_categories=["Cs"])),
        )
    ).map("".join)


def random_documents(count: int, seed: int, longest: int = 120) -> list[str]:
    """Documents of 0 to `longest` words, each beginning with its number; about one in eight is empty."""
    random_state = random.Random(seed)
    documents = []
    for number in range(count):
        words = random_state.choices(WORDS, k=random_state.randint(0, longest))
        documents.append("" if random_state.random() < 1 / 8 else " ".join([f"[{number}]", *words]))
    return documents


def json_lines(documents: Sequence[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()


def write_json_lines(path: Path, documents: Sequence[str]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(json_lines(documents))
    return str(path)
