"""Imported by the server that warm processes are forked from (tests/warm.py): what takes long, and computes nothing."""

import contextlib
import io
import logging
import os
import threading
import warnings

import torch
import torch.distributed.run

import mf_train.standalone.conversion.convert
import mf_train.training.run  # noqa: F401
from mf_train.parallel.zero3 import import_deepspeed

environment = dict(os.environ)
with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    import megatron.core.parallel_state  # noqa: F401

    import_deepspeed(torch.device("cpu"), 0)
os.environ.clear()
os.environ.update(environment)
assert threading.active_count() == 1, "a thread would be missing in every fork"
