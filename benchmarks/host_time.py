"""What the host does for a decode step, apart from waiting for the GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Host:
    """What the host did for one step, in seconds: from the call to the return of the launch, and from the end of the
    wait to the return of the call. The wait for the GPU between them is not counted. Wall clock, and the CPU time of
    the thread, which leaves out what the machine did with its core meanwhile. `launch_cpu`: CPU time inside the
    driver's launch of the graph, part of submit_cpu, which grows with the kernels of the engine."""

    submit: float
    submit_cpu: float
    finish: float
    finish_cpu: float
    launch_cpu: float = 0.0


class HostClock:
    """Times the host's part of steps of a TrtSession by stamps around its wait for the GPU; of another session, not."""

    def __init__(self, session: Any) -> None:
        self._gpu = getattr(session, "_gpu", None)
        self._wait: Callable[[], None] | None = getattr(self._gpu, "_wait", None)
        self._stamps: list[tuple[float, float]] = []
        self._launch_cpu = 0.0
        self._launched: list[Any] = []

    def __enter__(self) -> HostClock:
        if self._gpu is not None:
            self._gpu._wait = self._stamped
        return self

    def __exit__(self, *_: object) -> None:
        if self._gpu is not None:
            del self._gpu._wait  # the class's own again
        for graph in self._launched:
            del graph.launch
        self._launched.clear()

    def _watch_launches(self) -> None:
        """Time the launches of graphs that were captured since the last step."""
        for graph in getattr(self._gpu, "_graphs", {}).values():
            if all(graph is not other for other in self._launched):
                graph.launch = self._timed_launch(graph.launch)
                self._launched.append(graph)

    def _timed_launch(self, launch: Callable[[], None]) -> Callable[[], None]:
        def timed_launch() -> None:
            start = time.thread_time()
            launch()
            self._launch_cpu = time.thread_time() - start

        return timed_launch

    def _stamp(self) -> None:
        self._stamps.append((time.perf_counter(), time.thread_time()))

    def _stamped(self) -> None:
        assert self._wait is not None
        self._stamp()
        self._wait()
        self._stamp()

    def of(self, step: Callable[[], Any]) -> Host | None:
        """Run a step; None if it did not wait exactly once: on a CPU, or to capture a graph."""
        self._watch_launches()
        self._launch_cpu = 0.0
        self._stamps.clear()
        self._stamp()
        step()
        self._stamp()
        if len(self._stamps) != 4:
            return None
        (a, ac), (b, bc), (c, cc), (d, dc) = self._stamps
        return Host(b - a, bc - ac, d - c, dc - cc, self._launch_cpu)


@dataclass(frozen=True)
class Timing:
    """Median of `repeats` steps in seconds, and what the host did for each of those of which that is known."""

    seconds: float
    repeats: int
    host: tuple[Host, ...] = ()

    def host_us(self) -> dict[str, float]:
        """``host_us``: CPU time of a step, median; ``host_least_us``: of the quickest; ``launch_us``: the driver's part
        of it; ``host_wall_us``: the median by the wall clock, of which ``submit_wall_us`` up to the return of the
        launch."""
        if not self.host:
            return {}
        cpu = [host.submit_cpu + host.finish_cpu for host in self.host]
        return {
            "host_us": 1e6 * statistics.median(cpu),
            "host_least_us": 1e6 * min(cpu),
            "launch_us": 1e6 * statistics.median(host.launch_cpu for host in self.host),
            "host_wall_us": 1e6 * statistics.median(host.submit + host.finish for host in self.host),
            "submit_wall_us": 1e6 * statistics.median(host.submit for host in self.host),
        }


def timed(step: Callable[[], Host | None], seconds: float, least: int = 3, most: int = 100) -> Timing:
    """Time `step` (which may tell what the host did) for about `seconds`, after one step to warm up."""
    step()
    total: list[float] = []
    host: list[Host] = []
    started = time.perf_counter()
    while len(total) < least or (len(total) < most and time.perf_counter() - started < seconds):
        begin = time.perf_counter()
        worked = step()
        total.append(time.perf_counter() - begin)
        if worked is not None:
            host.append(worked)
    return Timing(statistics.median(total), len(total), tuple(host))
