"""`memoryformer report`: a page about one run."""
