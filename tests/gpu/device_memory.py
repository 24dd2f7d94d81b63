"""Leaks of device memory, on a GPU that others may use meanwhile."""

from __future__ import annotations

from collections.abc import Callable


def lost_each_round(free: Callable[[], int], work: Callable[[], None], rounds: int) -> int:
    """Bytes of device memory that a round of `work` does not give back.

    `free` tells the free bytes of the whole device: other processes take and return memory too. A leak shows in every
    round, theirs do not: what counts is the round with the smallest change, up or down.
    """
    changes = []
    before = free()
    for _ in range(rounds):
        work()
        after = free()
        changes.append(before - after)
        before = after
    print(f"bytes of device memory gone in each round: {changes}")
    return min(changes, key=abs)
