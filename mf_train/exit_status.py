"""The statuses with which a command ends; launchers and job scripts decide by them what comes next."""

DONE = 0
FAILED = 1  # of a training that cannot go on, a full disk, a crash
MISTAKE = 2  # the user's, which another start would meet again
STOPPED = 75  # stopped on request after saving: start again to continue
INTERRUPTED = 130  # Ctrl-C
