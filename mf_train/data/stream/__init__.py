"""The token stream: batches that are a function of the data section and the step alone.

In: the sources of `data.train`, opened. `order` says which source a row comes from and which document follows which.
Out: `stream.TokenStream` gives a rank's rows of every global batch, and its place as a few numbers; `digest` proves
that two batches are equal; `validation` cuts held-out text in fixed blocks.
"""
