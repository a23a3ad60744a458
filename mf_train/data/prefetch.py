"""Batches made ahead of time by a thread, each with the state that belongs to it."""

from __future__ import annotations

import queue
import threading

from mf_train.data.stream import State, Tokens, TokenStream


class Prefetcher:
    """Makes a stream's next batches in a background thread, at most `depth` ahead.

    `next_batch()` gives a batch and the stream's state after exactly that batch, so that a checkpoint holds
    what was trained on and not what was read ahead. What the thread raises is raised in the consumer, at the
    batch it belongs to and at every call after it. The stream must not be used elsewhere until `close()`.
    """

    def __init__(self, stream: TokenStream, depth: int = 2) -> None:
        self._stream = stream
        self._ready: queue.Queue[tuple[Tokens, State] | BaseException] = queue.Queue(depth)
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._produce, name="token-prefetch", daemon=True)
        self._thread.start()

    def next_batch(self) -> tuple[Tokens, State]:
        """This rank's rows, int32 [G / R, S + 1], and `stream.state_dict()` as it was after them."""
        assert not self._stop.is_set(), "the prefetcher is closed"
        if self._failure is None:
            item = self._ready.get()
            if not isinstance(item, BaseException):
                return item
            self._failure = item
        raise self._failure

    def close(self) -> None:
        """Stop and join the thread; batches made ahead are dropped."""
        self._stop.set()
        self._thread.join()

    def _produce(self) -> None:
        try:
            identity = self._stream.identity()
            while not self._stop.is_set():
                batch = self._stream.next_batch()
                positions = self._stream.positions()
                self._put((batch, {"step": self._stream.step, "identity": identity, "streams": positions}))
        except BaseException as error:  # handed to the consumer, whatever it is
            self._put(error)

    def _put(self, item: tuple[Tokens, State] | BaseException) -> None:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue
