"""The standalone model: made from a checkpoint, loaded by `transformers` without this project, used and measured.

exported/: copied into every converted model, with what it imports of the plain model. conversion/: writes a model's
folder from a checkpoint and proves it, and the way back. use/: loads, generates, evaluates. What the last two both know
of the folder is in folder.py. decoding.py is where converted models look for it when this package is installed.
"""
