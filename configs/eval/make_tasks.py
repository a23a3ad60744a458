#!/usr/bin/env python3
"""Remake the data of the project's own tasks: python make_tasks.py [OUT_DIR]

Reads the held-out messages of ../quickstart-text/validation and writes OUT_DIR/mf_last_word.jsonl and
OUT_DIR/mf_shuffled_sentence.jsonl (default: tasks/ beside this file). The same text gives the same bytes: where
something is drawn, it is drawn from a SHA-256 of the text that it is drawn for.
"""

import gzip
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
TEXT = HERE.parent / "quickstart-text" / "validation" / "sotu-00000.jsonl.gz"
ITEMS = 200  # of each task, at most
SENTENCE = re.compile(r"\S.*?[.?!](?=\s+[A-Z]|$)")  # to a full stop before a capital letter, or to the end
LAST_WORD = re.compile(r"(.*\S) ([a-z]{4,})[.?!]")  # of a text: what is before the last word, and that word

Item = dict[str, object]


def main(out: Path) -> None:
    for name, items in (("mf_last_word", last_words()), ("mf_shuffled_sentence", shuffled_sentences())):
        chosen = spread(list(items), ITEMS)
        lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in chosen)
        (out / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{out / name}.jsonl: {len(chosen)} items, {len(lines.encode()):,} bytes")


def paragraphs() -> Iterator[tuple[str, list[str]]]:
    """Of every paragraph: the message that it is in, and its sentences."""
    with gzip.open(TEXT, "rt", encoding="utf-8") as file:
        for line in file:
            message = json.loads(line)
            for paragraph in message["text"].split("\n"):
                yield message["id"], SENTENCE.findall(" ".join(paragraph.split()))


def last_words() -> Iterator[Item]:
    """Whole sentences from a paragraph's start, 40 to 100 words, that end in a word of four small letters or more."""
    for source, sentences in paragraphs():
        for count in range(len(sentences), 0, -1):
            text = " ".join(sentences[:count])
            match = LAST_WORD.fullmatch(text)
            if 40 <= len(text.split()) <= 100 and match:
                yield {"source": source, "context": match[1], "word": match[2]}
                break


def shuffled_sentences() -> Iterator[Item]:
    """A sentence and the one after it, whose words between the first and the last are cut into three spans.

    The choices are the six orders of the spans, so all of them have the same words, and a guess is right once in six.
    """
    for source, sentences in paragraphs():
        for before, sentence in itertools.pairwise(sentences):
            words = sentence.split()
            if not (8 <= len(before.split()) <= 40 and 14 <= len(words) <= 28):
                continue
            draws = [
                int(digit, 16) for digit in re.findall(".{8}", hashlib.sha256(sentence.encode()).hexdigest())
            ]
            first, *inner, last = words
            left = 2 + draws[0] % (len(inner) - 5)  # every span has two words or more
            right = left + 2 + draws[1] % (len(inner) - 3 - left)
            spans = [" ".join(words) for words in (inner[:left], inner[left:right], inner[right:])]
            orders = [" ".join([first, *order, last]) for order in itertools.permutations(spans)]
            if len(set(orders)) < len(orders):
                continue
            answer = draws[2] % len(orders)
            choices = orders[1:]
            choices.insert(answer, orders[0])
            yield {"source": source, "context": before, "choices": choices, "answer": answer}
            break  # one of a paragraph


def spread(items: list[Item], count: int) -> list[Item]:
    """`count` of the items at equal distances, or all."""
    return [items[i * len(items) // count] for i in range(count)] if len(items) > count else items


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "tasks")
