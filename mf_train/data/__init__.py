"""Text to batches. Rooms, each of which imports only those named before it:

    files/       a path or URL of the configuration -> files that were found, and their bytes
    text/        files of text -> numbered documents, unpacked in the cache
    shards/      token shards (.bin and .idx) -> numbered documents of tokens, and back to disk
    stream/      sources of documents -> rows of every global batch, in a fixed order
    workers/     the stream -> a rank's batches, made ahead of time in other processes
    tokenize/    files of text -> token shards: `memoryformer data tokenize`

Beside them, `tokenizer` (text to ids; `json_tokenizer` has those of others, `open_tokenizer` chooses), `documents`
(what the stream reads of text and shards alike), `sources` (opens what the configuration names),
`tokenizer_training`, and `show` (`memoryformer data inspect`).
"""
