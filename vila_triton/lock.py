"""One thread at a time, without a finalizer ever waiting; settings of the whole process that many change at once."""

import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack


class DeferringLock:
    """`with lock:` as of `threading.Lock`, and `soon` for what must not wait.

    The garbage collector runs finalizers in whatever thread it likes, in the middle of whatever that does. One that
    waited for a lock of its own thread would wait for ever, so it leaves its job to whoever has the lock.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: deque[Callable[[], None]] = deque()

    def __enter__(self) -> None:
        self._lock.acquire()
        try:
            self._run_jobs()
        except BaseException:
            self._lock.release()
            raise

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        self._run_jobs_if_free()

    def run_soon(self, job: Callable[[], None]) -> None:
        """Do it under the lock: now if that is free, else when it is, and before anybody else has it."""
        self._jobs.append(job)
        self._run_jobs_if_free()

    def _run_jobs_if_free(self) -> None:
        while self._jobs and self._lock.acquire(blocking=False):
            try:
                self._run_jobs()
            finally:
                self._lock.release()

    def _run_jobs(self) -> None:
        while self._jobs:
            self._jobs.popleft()()

    def __reduce__(self) -> tuple[type["DeferringLock"], tuple[()]]:
        return DeferringLock, ()  # a copy of what is locked has a lock of its own


class SharedContext:
    """A setting of the whole process as one context, for many threads: the first to enter changes it, the last to leave
    puts it back.
    """

    def __init__(self, make_context: Callable[[], AbstractContextManager[None]]):
        self._make_context = make_context
        self._lock = threading.Lock()
        self._num_inside = 0
        self._stack = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._num_inside:
                self._stack.enter_context(self._make_context())
            self._num_inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._num_inside -= 1
            if not self._num_inside:
                self._stack.close()
