"""Every module here is copied into every converted model, where it works without this package.

What the modules import of the plain model is copied too (`conversion/source_files.py`).
"""
