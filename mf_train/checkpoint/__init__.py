"""Checkpoints: one format on disk for all parallel degrees and ZeRO stages."""
