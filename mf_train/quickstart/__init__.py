"""From text to model on two CPU cores in one command: train, convert, generate, report.

`shipped/` holds what it needs: in the repository links to `configs/` and `tokenizer/`, in an installed package files.
"""
