"""The work of other processes on this machine, which makes times of ours mean less."""

import os
from collections.abc import Collection
from pathlib import Path

PROC = Path("/proc")
TICKS = os.sysconf("SC_CLK_TCK")  # a second
IDLE = 3, 4  # of a line "cpu" of /proc/stat, its fields idle and iowait


def busy_seconds(proc: Path = PROC) -> float:
    """Returns the seconds that all cores together have worked; 0 where there is no /proc."""
    file = proc / "stat"
    if not file.exists():
        return 0.0
    ticks = [int(word) for word in file.read_text().splitlines()[0].split()[1:8]]
    return (sum(ticks) - sum(ticks[i] for i in IDLE)) / TICKS


def session_seconds(sessions: Collection[int], proc: Path = PROC) -> float:
    """Returns the seconds that the living processes of these sessions have worked."""
    ticks = 0
    for file in proc.glob("[0-9]*/stat"):
        try:
            words = file.read_text().rpartition(")")[2].split()  # what a process is called may hold blanks
        except OSError:  # it has ended meanwhile
            continue
        ticks += (int(words[11]) + int(words[12])) * (int(words[3]) in sessions)
    return ticks / TICKS


class OtherLoad:
    """The seconds that processes outside of some sessions have worked since this was made."""

    def __init__(self, sessions: Collection[int]):
        self.sessions = sessions
        self.start = self._now()

    def _now(self) -> float:
        return busy_seconds() - session_seconds(self.sessions)

    def seconds(self) -> float:
        """Returns these seconds; sessions of which a process ended meanwhile count a little more than they are."""
        return max(0.0, self._now() - self.start)
