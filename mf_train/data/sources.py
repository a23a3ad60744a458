"""Opens what a configuration calls a source: text files, token shards or a dataset of the hub."""

from __future__ import annotations

from mf_train.config import DataConfig, SourceConfig
from mf_train.data.documents import Source, TextDocuments, TextSource
from mf_train.data.tokenizer import Tokenizer
from mf_train.errors import UserError


def open_source(source: SourceConfig, key: str, data: DataConfig, tokenizer: Tokenizer) -> Source:
    """Open a source; `key` (such as `data.train[0]`) is named in errors.

    Text of local and remote files is written to the cache (`data.cache`) by whoever opens it first, which checks
    every document. Raises UserError naming the file, line and remedy, or OSError for what a machine failed at.
    """
    from mf_train.data.files.input_files import find_files, is_token_shard

    if source.hub is None:
        files = find_files(source.path or "", key)
        if is_token_shard(files[0]):
            from mf_train.data.shards.fetch import local_files
            from mf_train.data.shards.token_files import open_token_files

            shards = open_token_files(
                local_files(files, data.cache),
                tokenizer.end_of_text_id,
                tokenizer.vocab_size,
                data.on_error,
                str(source.path),
                key,
                tokenizer.fingerprint,
            )
            shards.left_out = files.left_out
            return shards
    return TextSource(open_text(source, key, data), tokenizer)


def open_text(source: SourceConfig, key: str, data: DataConfig) -> TextDocuments:
    """Open a source of text, as `open_source` does. Raises UserError for token shards, too."""
    documents: TextDocuments
    if source.hub is not None:
        from mf_train.data.text.hub import open_hub

        documents = open_hub(source, data.on_error, key)
    else:
        from mf_train.data.files.input_files import find_files, is_token_shard
        from mf_train.data.text.store import open_documents

        files = find_files(source.path or "", key)
        if is_token_shard(files[0]):
            raise UserError(f"{key}: {source.path} holds token shards: name files of text")
        name = str(source.path)
        documents = open_documents(files, source.text_field, data.on_error, data.cache, name, key)
        documents.left_out = files.left_out
    if not len(documents):
        raise UserError(f"{key}: {documents.name} holds no text: remove the source or fill it")
    return documents
