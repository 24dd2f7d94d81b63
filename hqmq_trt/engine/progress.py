"""TensorRT's progress while it builds: nested phases, each of some steps."""

from __future__ import annotations

from typing import Any, Protocol

from rich.progress import Progress, TaskID


class BuildProgress(Protocol):
    """What a builder tells. TensorRT may call from several threads."""

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """A phase of so many steps begins, within another or on its own."""

    def step(self, phase: str, step: int) -> None:
        """Step number `step` (from 0) of a phase is done."""

    def finish(self, phase: str) -> None:
        """A phase ends; some of its steps may have been left out."""


class RichBuildProgress:
    """Build phases as bars of a rich.progress.Progress, inner phases indented below the outer ones."""

    def __init__(self, shown: Progress) -> None:
        self._shown = shown
        self._tasks: dict[str, tuple[TaskID, int]] = {}

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """See BuildProgress."""
        depth = self._tasks[parent][1] + 1 if parent in self._tasks else 0
        self._tasks[phase] = self._shown.add_task("  " * depth + phase, total=steps), depth

    def step(self, phase: str, step: int) -> None:
        """See BuildProgress."""
        if phase in self._tasks:
            self._shown.update(self._tasks[phase][0], completed=step + 1)

    def finish(self, phase: str) -> None:
        """See BuildProgress."""
        if phase in self._tasks:
            self._shown.remove_task(self._tasks.pop(phase)[0])


def monitor(trt: Any, progress: BuildProgress | None) -> Any:
    """A tensorrt.IProgressMonitor. Its attribute `interrupted` is True after Ctrl-C, which ends the build early."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interrupted = False

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._tell("start", phase_name, parent_phase or None, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            self._tell("finish", phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._tell("step", phase_name, step)
            return not self.interrupted

        def _tell(self, event: str, *arguments: Any) -> None:
            try:
                if progress is not None:
                    getattr(progress, event)(*arguments)
            except KeyboardInterrupt:  # must not pass through TensorRT
                self.interrupted = True

    return Monitor()
