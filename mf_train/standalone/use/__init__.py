"""Using a standalone model: loading, generation, loss on text, lm-evaluation-harness."""
