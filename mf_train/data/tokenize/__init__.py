"""`memoryformer data tokenize`: text to token shards that give the same batches.

In: the sources of a configuration. Out: a folder of shards a source with its manifest, the same bytes whoever makes
them. `command` finds, resumes and records; `shards` cuts one source's text in ranges and writes them in order;
`worker` is the process that prepares text and tokenises a range.
"""
