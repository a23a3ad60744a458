"""Files on disks and behind URLs.

In: what a source's `path` says. Out: `input_files.find_files` gives the sorted `InputFile`s, whose `open()` reads
their bytes; transient errors are retried (`access`), what the user can fix is a UserError. `cache` keeps what is made
of them: each entry is written once, by one process, and is complete or absent.
"""
