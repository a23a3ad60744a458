"""Token shards: Megatron's pairs of a .bin (tokens) and an .idx (where documents begin).

In: .bin files, which `fetch` copies to the cache where they are behind a URL. Out: `token_files.open_token_files`
gives all of them as one `Source` of documents. `shard` is the format of one pair, read and written.
"""
