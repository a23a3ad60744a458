"""From a checkpoint to a standalone model's folder, the proof that it is the same model, and the way back."""
