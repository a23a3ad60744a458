"""Batches made ahead of time, so that training does not wait for tokenising.

In: a rank's opened `TokenStream`. Out: `batches.BatchReader` gives its next batches, and the place after those given
out, which a checkpoint keeps. `child` is a process and the pipes to it; `tokenize/` uses it, too.
"""
