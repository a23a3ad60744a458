"""Python's garbage collector at fixed steps: a pause of one rank is a pause of all that wait for it."""

import gc


class GarbageCollection:
    """Off between `start` and `close`, but for one collection after every `interval` steps; 0: as Python does it.

    All ranks count the same steps, so that they pause together. What is there at the start is never looked at again:
    modules and the model are most of what a collection goes through. A step leaves no tensor in a cycle.
    """

    def __init__(self, interval: int) -> None:
        self.interval = interval

    def start(self) -> None:
        if self.interval:
            gc.collect()
            gc.freeze()
            gc.disable()

    def after(self, step: int) -> None:
        if self.interval and step % self.interval == 0:
            gc.collect()

    def close(self) -> None:
        if self.interval:
            gc.unfreeze()
            gc.enable()
