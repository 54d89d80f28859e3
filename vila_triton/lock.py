"""A lock that finalizers can use without waiting, and a context that is shared by threads."""

import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack


class DeferringLock:
    """A lock for `with`, and `run_soon` for work that must not wait for it.

    The garbage collector runs finalizers in any thread, at any point. A finalizer that waits for a lock which its own
    thread holds would wait for ever, so it leaves its work to the holder of the lock.
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
        """Run a job under the lock: now if the lock is free, else as soon as it is released."""
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
        return DeferringLock, ()  # a copy or pickle of the owner gets a lock of its own


class SharedContext:
    """One context for many threads, for settings of the whole process: the first to enter sets it up, the last to leave
    undoes it.
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
