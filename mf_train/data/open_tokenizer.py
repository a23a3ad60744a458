"""Which tokenizer the configuration means, or a folder has."""

from __future__ import annotations

from pathlib import Path

from mf_train.config import TokenizerConfig
from mf_train.data.json_tokenizer import JsonTokenizer
from mf_train.data.sentencepiece_file import parse_sentencepiece
from mf_train.data.sentencepiece_json import is_own
from mf_train.data.tokenizer import (
    MORE_SPECIAL_TOKENS,
    SPECIAL_TOKENS,
    TokenIds,
    Tokenizer,
    content_of,
    find_model,
    load_processor,
    parse_object,
)
from mf_train.errors import UserError
from mf_train.run_folder import TOKENIZER, TOKENIZER_CONFIG, TOKENIZER_JSON


def load_tokenizer(settings: TokenizerConfig) -> Tokenizer:
    """The tokenizer at `settings.path`, of whichever kind. Raises UserError.

    Of a folder with both, `tokenizer.json` is read unless `tokenizer.model` is what `memoryformer tokenizer train`
    makes: it may have more tokens. Whatever cannot be in a converted model is refused here, before anything is trained.
    """
    tokenizer = _load(settings)
    _check_special_tokens(tokenizer)
    return tokenizer


def is_own_file(path: Path) -> bool:
    """Whether a sentencepiece model is of the kind of `memoryformer tokenizer train`. Raises UserError for no model."""
    content = path.read_bytes()
    load_processor(content, path)
    return is_own(parse_sentencepiece(content))


def _load(settings: TokenizerConfig) -> Tokenizer:
    path = find_model(settings.path)
    if path.suffix == ".json":
        return JsonTokenizer(path, settings.end_of_text_id)
    if is_own_file(path):
        tokenizer = Tokenizer(path)
        if settings.end_of_text_id not in (None, tokenizer.end_of_text_id):
            raise UserError(
                "tokenizer.end_of_text_id and tokenizer.path are both set: the model at the path says its end of text "
                f"itself, {tokenizer.end_of_text_id}; remove one of them"
            )
        return tokenizer
    made = path.with_name(TOKENIZER_JSON)
    folder = path.name == TOKENIZER and not settings.path.endswith(TOKENIZER)
    return JsonTokenizer(made if folder and made.is_file() else path, settings.end_of_text_id)


def _check_special_tokens(tokenizer: Tokenizer) -> None:
    """Raises UserError where tokenizer_config.json names a token that is not there: transformers would add it with an
    id that the model does not have.
    """
    path = tokenizer.path.with_name(TOKENIZER_CONFIG)
    tree = parse_object(tokenizer.files.get(TOKENIZER_CONFIG, b"{}"), path)
    named = [(name, tree.get(name)) for name in SPECIAL_TOKENS]
    for name in MORE_SPECIAL_TOKENS:
        several = tree.get(name) or ()
        named += [(name, token) for token in (several.values() if isinstance(several, dict) else several)]
    for name, token in named:
        text = content_of(token)
        if text and not tokenizer.has_token(text):
            raise UserError(
                f"tokenizer.path: {path}: {name} is {text!r}, which {tokenizer.path.name} does not have: remove it "
                "there, or add the token here"
            )


def tokenizer_in(folder: Path, end_of_text_id: int | None = None) -> Tokenizer:
    """The tokenizer in the folder of a converted model or a checkpoint. Raises UserError."""
    if not any((folder / name).is_file() for name in (TOKENIZER, TOKENIZER_JSON)):
        raise UserError(
            f"{folder}: has no tokenizer: copy {TOKENIZER_JSON} from the model that this one was made from, or from "
            "what made its token ids"
        )
    return load_tokenizer(TokenizerConfig(path=str(folder), end_of_text_id=end_of_text_id))


def open_tokenizer(settings: TokenizerConfig, model_vocab_size: int) -> Tokenizer:
    """The configuration's tokenizer, after `check_vocabulary`. Raises UserError."""
    if settings.end_of_text_id is not None and not settings.path:
        return TokenIds(model_vocab_size, settings.end_of_text_id)
    tokenizer = load_tokenizer(settings)
    check_vocabulary(tokenizer, model_vocab_size)
    return tokenizer


def check_vocabulary(tokenizer: Tokenizer, model_vocab_size: int) -> None:
    """Refuse a tokenizer with more ids than the model has embeddings. Raises UserError."""
    if tokenizer.vocab_size > model_vocab_size:
        raise UserError(
            f"model.vocab_size is {model_vocab_size}, but the tokenizer {tokenizer.path} has "
            f"{tokenizer.vocab_size} ids: set model.vocab_size to {tokenizer.vocab_size} or more"
        )
