"""Text to batches: the tokenizer, sources of documents, the token stream, validation blocks."""
