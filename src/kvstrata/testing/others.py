"""How much of the machine others take while something here is timed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

BUSY_SHARE = 0.1
"""From here on a machine is too busy for one time to say much."""


class OtherWork:
    """Processor time that went to processes other than ours, or to other guests of the host.

    Args:
        proc: where the kernel tells; another folder in tests.
    """

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._others = 0
        self._total = 0

    @contextlib.contextmanager
    def counted(self, *own: int) -> Iterator[None]:
        """Count meanwhile.

        Args:
            own: processes that are ours with all their descendants, and live until the end.
        """
        total, busy = self._machine()
        ours = self._ours(own)
        yield
        total_after, busy_after = self._machine()
        self._total += total_after - total
        self._others += max(0, (busy_after - busy) - (self._ours(own) - ours))

    @property
    def share(self) -> float:
        """Of all processors' time in all that was counted, 0 to 1; 0 if the kernel told nothing."""
        return self._others / self._total if self._total else 0.0

    def _machine(self) -> tuple[int, int]:
        """Ticks of all processors: all, and those that were not idle."""
        line = (self._proc / "stat").read_text().partition("\n")[0]
        # user, nice, system, idle, waiting for input, interrupts (2), stolen; guests are in user
        ticks = [int(word) for word in line.split()[1:9]]
        return sum(ticks), sum(ticks) - sum(ticks[3:5])

    def _ours(self, own: tuple[int, ...]) -> int:
        """Ticks of these processes and their descendants, the ended ones among them included."""
        spent: dict[int, int] = {}
        children: dict[int, list[int]] = {}
        for folder in self._proc.iterdir():
            if folder.name.isdecimal():
                with contextlib.suppress(OSError):  # it has just ended
                    # The name before it may hold spaces and brackets.
                    words = (folder / "stat").read_text().rpartition(")")[2].split()
                    spent[int(folder.name)] = sum(map(int, words[11:15]))
                    children.setdefault(int(words[1]), []).append(int(folder.name))
        tree: set[int] = set()
        found = list(own)
        while found:
            pid = found.pop()
            if pid not in tree:
                tree.add(pid)
                found += children.get(pid, [])
        return sum(spent.get(pid, 0) for pid in tree)
