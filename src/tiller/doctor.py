"""What this machine has of what tiller needs."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from tiller.types import TillerError


class Check(NamedTuple):
    """One line of the report."""

    name: str
    found: str
    problem: str = ""  # what to do, if something needed is missing


def examine() -> list[Check]:
    """Every check, the cheap ones first; none of them touches the network."""
    return [*_system(), *_packages(), *_accelerator(), _font(), *_models()]


def report(checks: list[Check]) -> str:
    """The checks as aligned lines, and at the end what to do."""
    width = max(len(check.name) for check in checks)
    lines = [f"{check.name:<{width}}  {check.found}" for check in checks]
    problems = [f"! {check.name}: {check.problem}" for check in checks if check.problem]
    return "\n".join([*lines, *(problems or ["all that is needed is here"])])


def _system() -> list[Check]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    full = "less than 1 GB is free here; checkpoints need room." if free < 1 else ""
    return [
        Check("tiller", metadata.version("tiller")),
        Check("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        Check("processor", f"{cores} cores may be used, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}"),
        Check("memory", _memory()),
        Check("disk", f"{free:.1f} GB free in the working directory", full),
    ]


def _memory() -> str:
    """Total memory, and on Linux what is available of it."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (ValueError, OSError, AttributeError):
        return "unknown"
    meminfo = Path("/proc/meminfo")
    entries = dict(line.split(":", 1) for line in meminfo.read_text().splitlines()) if meminfo.exists() else {}
    available = entries.get("MemAvailable", "").split()
    rest = f", {int(available[0]) * 1024 / 1e9:.1f} GB available" if available else ""
    return f"{total:.1f} GB{rest}"


def _packages() -> list[Check]:
    """Each requirement of the package, extras left out, against what is installed."""
    from packaging.requirements import Requirement

    checks = []
    for text in metadata.requires("tiller") or ():
        needed = Requirement(text)
        if needed.marker and not needed.marker.evaluate({"extra": ""}):
            continue
        found = next((metadata.version(needed.name) for _ in metadata.distributions(name=needed.name)), None)
        wrong = found is None or not needed.specifier.contains(found, prereleases=True)
        cure = f"pip install '{needed.name}{needed.specifier}'" if wrong else ""
        checks.append(Check(needed.name, found or "missing", cure))
    return checks


def _accelerator() -> list[Check]:
    try:
        import torch
    except ImportError as error:
        return [Check("device", "unknown", f"torch cannot be imported: {error}")]
    threads = Check("threads", f"{torch.get_num_threads()} of torch")
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return [Check("device", ", ".join(f"{gpu.name} ({gpu.total_memory / 1e9:.0f} GB)" for gpu in gpus)), threads]
    return [Check("device", "mps" if torch.backends.mps.is_available() else "cpu"), threads]


def _font() -> Check:
    from tiller.emoji.scenes import FONT

    if FONT.is_file():
        return Check("emoji font", str(FONT))
    return Check("emoji font", "missing (needed only to draw scenes; Debian package fonts-noto-color-emoji)")


def _models() -> list[Check]:
    from tiller import emoji

    checks = []
    for name in emoji.MODELS:
        try:
            folder = Path(emoji.path(name))
        except TillerError as error:
            checks.append(Check(f"{name} model", "missing", str(error)))
            continue
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        checks.append(Check(f"{name} model", f"{size / 1e6:.1f} MB in {folder}"))
    return checks
