"""Files of text, unpacked: training reads no JSON, but this room's cache.

In: files of JSON Lines, plain text or Parquet, compressed or not. `readers` checks every line and hands on documents
as UTF-8; `store` writes them to the cache, once for all processes, as one .text and the .ends of the documents.
Out: `store.open_documents` gives `StoredDocuments`: any part of document i, by one pread. `hub` gives the same of a
dataset of the Hugging Face hub, in place.
"""
