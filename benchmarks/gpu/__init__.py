"""Proves and times everything on one GPU in at most 8 minutes: `make gpu`, or `python -m benchmarks.gpu`.

`parts.py` lists the parts. Each is a process of its own (`tests`, `rates`, `lookup`, `training`, `decoding`), made of
steps that write what they found as soon as they know it (`steps.py`). `runner.py` starts the parts, ends what hangs and
goes on behind what crashed; `report.py` turns what was found into the table and the device file.
"""
