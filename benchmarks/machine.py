"""What the kernel says of processes and of the machine: processor time, memory, names."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Final

from benchmarks.processes import BenchmarkError

__all__ = [
    "CORES",
    "anonymous_bytes",
    "busy_seconds",
    "describe",
    "precise_processor_seconds",
    "processor_seconds",
    "resident_bytes",
]

CORES: Final = len(os.sched_getaffinity(0))
_TICK: Final = 1 / os.sysconf("SC_CLK_TCK")
_PROC: Final = Path("/proc")


def _family(root: int) -> list[int]:
    """Return a process and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            fields = _stat(int(entry.name))
            if fields:
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    family = [root]
    for each in family:
        family += children.get(each, [])
    return family


def _stat(process: int) -> list[str]:
    """Return the fields of /proc/PID/stat after the name, which may hold anything; nothing if the process is gone."""
    try:
        return (_PROC / str(process) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def processor_seconds(root: int) -> float:
    """Return the processor time that a process and its descendants have used."""
    stats = [_stat(each) for each in _family(root)]
    return sum((int(fields[11]) + int(fields[12])) * _TICK for fields in stats if fields)


def precise_processor_seconds(process: int) -> float:
    """Return the processor time that the threads of one process have used, to the nanosecond.

    What a thread used that has ended is not in it.
    """
    threads = (_PROC / str(process) / "task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


def busy_seconds() -> float:
    """Return the processor time that all programs, and the hypervisor's other guests, have used on this machine."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, (_PROC / "stat").read_text().split(maxsplit=9)[1:9]
    )
    return (user + nice + system + irq + softirq + steal) * _TICK


def resident_bytes(root: int) -> int:
    """Return the resident memory of a process and its descendants."""
    pages = 0
    for each in _family(root):
        try:
            pages += int((_PROC / str(each) / "statm").read_text().split()[1])
        except OSError:
            continue
    return pages * os.sysconf("SC_PAGE_SIZE")


def anonymous_bytes(process: int) -> int:
    """Return the resident memory of one process that no file backs: its heap and stacks, but not its program."""
    status = (_PROC / str(process) / "status").read_text()
    found = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
    if found is None:
        raise BenchmarkError("this kernel does not say how much of a process's memory is anonymous")
    return int(found[1]) * 1024


def describe() -> dict[str, object]:
    """Return what the numbers depend on."""
    models = {
        line.partition(":")[2].strip()
        for line in (_PROC / "cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    }
    return {
        "processor": ", ".join(sorted(models)) or platform.machine(),
        "cores": CORES,
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average_at_start": os.getloadavg()[0],
    }
