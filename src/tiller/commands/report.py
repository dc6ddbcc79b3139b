"""`tiller report RUN` and `tiller diagnose RUN`: a run folder as a page, and what is wrong with the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from tiller.report import html, live
from tiller.report.diagnosis import diagnose, lines
from tiller.report.record import read


def run(folder: Path, serve: bool = False, port: int = 0) -> int:
    """Write the page into the folder, or serve it while the run goes on; returns the exit code.

    Raises:
        RunError: the folder holds no run, or cannot be written; the port is taken.
    """
    console = Console(highlight=False, soft_wrap=True, markup=False)
    if serve:
        live.serve(folder, port, console.print)
        return 0
    path = html.write(folder)
    for finding in lines(diagnose(read(folder))):
        console.print(finding)
    console.print(f"report: {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


def summed_up(folder: Path, say: Callable[[str], None]) -> None:
    """What a run says last: the gravest findings, three lines at most, and where the page is.

    Raises:
        RunError: the page cannot be written.
    """
    for finding in lines(diagnose(read(folder))):
        say(escape(finding))
    say(escape(f"report: {html.write(folder)}"))


def findings(folder: Path) -> int:
    """Print everything that the rules found, and what could not be read.

    Raises:
        RunError: the folder holds no run.
    """
    record = read(folder)
    console = Console(highlight=False, soft_wrap=True, markup=False)
    for gap in record.gaps:
        console.print(f"not there: {gap}")
    found = diagnose(record)
    for finding in found:
        console.print(f"{finding.level}: {finding.sentence}\n  {finding.cure}\n  {finding.page}")
    if not found:
        console.print(f"none of the rules found anything wrong in {len(record.metrics)} epochs")
    return 0
