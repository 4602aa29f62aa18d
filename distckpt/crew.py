"""The threads of a rank that read blocks: the caller's, and helpers where cores are free."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import cached_property
from queue import Empty, SimpleQueue

import numpy as np

from distckpt.cores import cores_for_each
from distckpt.reader import BlockReader
from distckpt.schedule import Read

_MOST_THREADS = 4


def threads_for(neighbours: int) -> int:
    """Say how many threads may work, where so many ranks, this one included, share the machine."""
    return min(_MOST_THREADS, cores_for_each(neighbours))


class Worker:
    """What one thread needs to read blocks.

    Attributes:
        blocks: Reads them.
    """

    def __init__(self, blocks: BlockReader) -> None:
        self.blocks = blocks

    @cached_property
    def gaps(self) -> np.ndarray:
        """Memory for what lies between the rows of a block, at its place there."""
        return np.empty(self.blocks.block_bytes, np.uint8)


class Crew:
    """Reads blocks by one or several threads.

    Args:
        blocks: The caller's reader.
        threads: How many threads, the caller's included.
    """

    def __init__(self, blocks: BlockReader, threads: int) -> None:
        self._worker = Worker(blocks)
        self._helpers = threads - 1
        self._executor: ThreadPoolExecutor | None = None
        self._idle: SimpleQueue[Worker] = SimpleQueue()
        for _ in range(self._helpers):
            self._idle.put(Worker(blocks.another()))

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Have the helpers ready while this lasts."""
        if not self._helpers:
            yield
            return
        with ThreadPoolExecutor(self._helpers, "distckpt-load") as self._executor:
            yield
        self._executor = None

    def read(
        self,
        reads: Sequence[Read],
        read_one: Callable[[Read, Worker], None],
        is_for_any: Callable[[Read], bool],
    ) -> None:
        """Read blocks; returns when all have been read, or raises the first failure.

        Args:
            reads: The blocks.
            read_one: Reads one; called in any of the threads.
            is_for_any: Whether a thread other than the caller's may read a block.
        """
        if self._executor is None:
            for read in reads:
                read_one(read, self._worker)
            return
        # What a thread of its own may not do is left to this one, which then helps the others.
        queue = SimpleQueue[Read]()
        mine: list[Read] = []
        for read in reads:
            (queue.put if is_for_any(read) else mine.append)(read)
        helping: list[Future[int]] = []
        try:
            with suppress(RuntimeError):  # the program is ending, or has too many threads already
                helping.extend(
                    self._executor.submit(self._help, queue, read_one) for _ in range(self._helpers)
                )
            for read in mine:
                read_one(read, self._worker)
            _read_all(queue, self._worker, read_one)
        finally:
            # Others' memory is written until they have ended.
            wait(helping)
        for helper in helping:
            self._worker.blocks.add(helper.result())

    def _help(self, queue: SimpleQueue[Read], read_one: Callable[[Read, Worker], None]) -> int:
        """In a helper's thread: read blocks; returns how many bytes."""
        worker = self._idle.get()
        before = worker.blocks.bytes_read
        try:
            _read_all(queue, worker, read_one)
        finally:
            self._idle.put(worker)
        return worker.blocks.bytes_read - before


def _read_all(
    queue: SimpleQueue[Read], worker: Worker, read_one: Callable[[Read, Worker], None]
) -> None:
    """Read blocks until none is left; after a failure none is."""
    while True:
        try:
            read = queue.get_nowait()
        except Empty:
            return
        try:
            read_one(read, worker)
        except BaseException:
            with suppress(Empty):
                while True:
                    queue.get_nowait()
            raise
