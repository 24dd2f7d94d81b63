"""Processes that do one task after another; a task that ends its process or takes too long is one failure only."""

from __future__ import annotations

import multiprocessing
import queue
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

START_SECONDS = 180
"""What a process may take to start and to call `prepare`."""


class TaskError(Exception):
    """A task raised, ended its process or was stopped; the text says which."""


class Worker:
    """One process, started by the first task and again after a task that ended it.

    Args:
        work: what is called with each task; a function of a module, as the process imports it.
        prepare: called once in the process, before the first task.
    """

    def __init__(self, work: Callable[[Any], Any], prepare: Callable[[], None] | None = None) -> None:
        self._functions = (prepare, work)
        self._process: Any = None
        self._connection: Any = None

    def do(self, task: Any, seconds: float) -> Any:
        """The result of a task.

        Raises:
            TaskError: it raised, its process ended, or it took longer than `seconds`.
        """
        self.start()
        try:
            self._connection.send(task)
        except OSError:
            raise self._stopped("before the task") from None
        return self._answer(seconds)

    def start(self) -> None:
        """Start the process if there is none.

        Raises:
            TaskError: it ended, or `prepare` raised or took too long.
        """
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._connection, other = context.Pipe()
            self._process = context.Process(target=_serve, args=(other, *self._functions), daemon=True)
            self._process.start()
            other.close()
            try:
                self._answer(START_SECONDS)
            except TaskError:
                self.stop()
                raise

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None

    def _answer(self, seconds: float) -> Any:
        if not self._connection.poll(seconds):
            self.stop()
            raise TaskError(f"stopped after {seconds:.0f} s")
        try:
            good, value = self._connection.recv()
        except (EOFError, OSError):
            raise self._stopped("during the task") from None
        if not good:
            raise TaskError(value)
        return value

    def _stopped(self, when: str) -> TaskError:
        self._process.join(5)
        code = self._process.exitcode
        self.stop()
        return TaskError(f"the process ended {when} with exit code {code}")


def _serve(connection: Connection, prepare: Callable[[], None] | None, work: Callable[[Any], Any]) -> None:
    def answer(call: Callable[[], Any]) -> None:
        try:
            result = (True, call())
        except Exception as error:
            result = (False, f"{type(error).__name__}: {' '.join(str(error).split())[:1000]}")
        connection.send(result)

    answer(lambda: prepare() if prepare else None)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        answer(lambda task=task: work(task))  # type: ignore[misc]


class Crew:
    """Several workers that share a queue of tasks. Tasks may be added while others run.

    Args:
        work, prepare: see Worker.
        count: processes.
        seconds: what a task may take.
        until: time.monotonic() after which no task starts and running ones are stopped.
        done: called with (task, result or None, error text or None), from one of the crew's threads at a time.
    """

    def __init__(
        self,
        work: Callable[[Any], Any],
        count: int,
        seconds: float,
        until: float,
        done: Callable[[Any, Any, str | None], None],
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self._tasks: queue.Queue[Any] = queue.Queue()
        self._lock = threading.Lock()
        self._seconds, self._until, self._done = seconds, until, done
        self._threads = [
            threading.Thread(target=self._run, args=(Worker(work, prepare),), daemon=True) for _ in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def add(self, task: Any) -> None:
        """Put a task at the end of the queue."""
        self._tasks.put(task)

    def finish(self) -> None:
        """Wait for all tasks that were added, and end the processes."""
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self, worker: Worker) -> None:
        try:
            while time.monotonic() < self._until:
                try:
                    worker.start()  # while the first task is still being made
                    break
                except TaskError as error:
                    if (task := self._tasks.get()) is None:
                        return
                    self._tell(task, None, f"a process could not start: {error}")
            while (task := self._tasks.get()) is not None:
                left = self._until - time.monotonic()
                if left <= 0:
                    continue  # not done, and not told
                try:
                    result = worker.do(task, min(self._seconds, left))
                except TaskError as error:
                    if time.monotonic() < self._until:
                        self._tell(task, None, str(error))
                else:
                    self._tell(task, result, None)
        finally:
            worker.stop()

    def _tell(self, task: Any, result: Any, error: str | None) -> None:
        with self._lock:
            self._done(task, result, error)
