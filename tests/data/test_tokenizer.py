"""The tokenizer loses nothing, and its mistakes are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given

from mf_train.data.open_tokenizer import check_vocabulary
from mf_train.data.tokenizer import Tokenizer
from mf_train.errors import UserError
from tests.data.texts import any_text
from tests.examples import examples

SHIPPED = Tokenizer(Path(__file__).resolve().parents[2] / "tokenizer")


@examples(300)
@given(any_text())
def test_decode_inverts_encode(text: str) -> None:
    ids = SHIPPED.encode(text)
    assert SHIPPED.decode(ids) == text
    assert all(1 < token < SHIPPED.vocab_size for token in ids)  # neither end of text nor unknown
    assert int(SHIPPED.token_bytes[np.array(ids, int)].sum()) == len(text.encode())
    assert SHIPPED.encode_array(text).tolist() == ids


def test_mistakes_are_named(tmp_path: Path) -> None:
    (tmp_path / "none.model").write_bytes(b"")
    (tmp_path / "junk.model").write_bytes(b"garbage" * 100)
    cases = [
        (lambda: Tokenizer(""), "tokenizer.path is not set"),
        (lambda: Tokenizer(tmp_path / "absent.model"), "tokenizer.path: .*absent.model does not exist"),
        (lambda: Tokenizer(tmp_path), "tokenizer.path: .*tokenizer.model does not exist"),
        (lambda: Tokenizer(tmp_path / "none.model"), "none.model is not a sentencepiece model"),
        (lambda: Tokenizer(tmp_path / "junk.model"), "junk.model is not a sentencepiece model"),
        (lambda: check_vocabulary(SHIPPED, 4095), "model.vocab_size is 4095, but .* 4096 ids"),
    ]
    for mistake, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            mistake()
        assert "\n" not in str(caught.value)
    check_vocabulary(SHIPPED, 4096)
    with pytest.raises(ValueError, match="ids 4096 to 4096"):
        SHIPPED.decode([4096])
