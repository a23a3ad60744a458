"""The standalone model: made from a checkpoint, loaded by `transformers` without this project, used and measured."""
