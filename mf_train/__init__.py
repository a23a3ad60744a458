"""Pretraining of MemoryFormer language models: hashed lookup tables instead of fully-connected layers."""

__version__ = "0.2.0"
