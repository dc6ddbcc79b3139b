"""The machine a run would be made on: its device, memory and threads. Imports no torch."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """Where a run would be made."""

    name: str  # of the processor or the card
    kind: str  # cpu or cuda
    memory: float  # bytes
    threads: int
    processes: int  # of the launcher

    @property
    def key(self) -> str:
        """What calibrations are kept under."""
        return f"{self.name}, {self.threads} threads" if self.kind == "cpu" else self.name


def this_machine(device: str = "auto") -> Machine:
    """The device that a recipe would get here."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    wanted = device.partition(":")
    card = _card(int(wanted[2] or 0)) if wanted[0] in ("auto", "cuda") else None
    if card is not None:
        return Machine(card[0], "cuda", card[1], threads(), processes)
    return Machine(_processor(), "cpu", _memory(), threads(), processes)


def threads() -> int:
    """How many torch will use."""
    named = os.environ.get("OMP_NUM_THREADS", "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(named) if named.isdecimal() and int(named) else cores


def _card(number: int) -> tuple[str, float] | None:
    """(name, bytes) of an NVIDIA card; None without one."""
    if shutil.which("nvidia-smi") is None or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    query = ["nvidia-smi", f"--id={number}", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
        name, _, mebibytes = found.rpartition(",")
        return name.strip(), float(mebibytes) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _memory() -> float:
    """Physical memory, or what the control group allows, in bytes."""
    try:
        total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError, AttributeError):
        return 8e9
    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text().strip() if limit.exists() else "max"
    return min(total, float(allowed)) if allowed.isdecimal() else total
