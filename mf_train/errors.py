"""The exceptions that the command line turns into an exit status."""


class UserError(Exception):
    """A mistake in what the user gave: configuration, files, sizes.

    The message is one line that names the key, file or value and the remedy. The command line prints it
    without a traceback and exits with status 2.
    """


class TrainingError(Exception):
    """A run that cannot go on, though nobody made a mistake in what was given: a NaN loss, a full disk.

    Printed as one line; exit status 1.
    """


class PeerError(Exception):
    """Another rank failed and reports it: this one ends silently with the same exit status."""

    def __init__(self, status: int) -> None:
        super().__init__(f"another rank failed with status {status}")
        self.status = status
