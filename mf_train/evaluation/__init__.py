"""Tasks of lm-evaluation-harness: run on a converted model, or asked of the model in training."""
