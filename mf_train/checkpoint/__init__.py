"""Checkpoints: one format on disk, whatever the parallel degrees or ZeRO stage of who writes or reads it."""
