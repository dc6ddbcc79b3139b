"""`tiller compare`: an equal budget of reward calls for every variant and seed, in one table; or runs side by side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from tiller.comparison import Comparison, Variant, variants
from tiller.report.comparison import Row, plot, summarise, table
from tiller.types import RunError


def run(comparison: Comparison, file: Path) -> int:
    """Make every run that is not there yet, then write `comparison.json`, `.md` and `.png`; returns the exit code.

    A run that failed is a row that says so; the others go on.
    """
    wanted = list(variants(comparison, file))
    folder = wanted[0].folder.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {error.strerror}; give another output_dir.") from error
    codes = _all(wanted, comparison.jobs)
    rows = [_row(variant) for variant in wanted]
    summary = summarise(rows, comparison.split)
    (folder / "comparison.json").write_text(json.dumps(summary, indent=1))
    (folder / "comparison.md").write_text(table(summary))
    plot(rows, folder / "comparison.png")
    print(table(summary))
    print(f"table: {folder / 'comparison.md'}, plot: {folder / 'comparison.png'}")
    return 1 if any(codes) else 0


def runs(folders: Sequence[Path], output: Path) -> int:
    """Lay runs that were made side by side, as a table on the terminal and a page in `output`; returns the exit code.

    Raises:
        RunError: one of the folders holds no run, or the page cannot be written.
    """
    from rich.table import Table

    from tiller.report import html, side_by_side

    html.put(output, side_by_side.render(folders))
    records = side_by_side.named(folders)
    head, rows = side_by_side.summary(records)
    table = Table(title=side_by_side.headline(records), title_justify="left", title_style="bold")
    for number, title in enumerate(head):
        table.add_column(escape(title), justify="right" if number else "left")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 40 + 34 * len(folders))
    console.print(table)
    console.print(f"page: {output}", markup=False, soft_wrap=True)
    return 0


def _all(wanted: Sequence[Variant], jobs: int) -> list[int]:
    """Every variant's exit code. Whoever stops this stops the runs under way, which save; the same command goes on."""
    if jobs == 1:
        return [_make(variant) for variant in wanted]
    with ThreadPoolExecutor(jobs) as workers:
        try:
            return list(workers.map(_make, wanted))
        except BaseException:
            workers.shutdown(wait=False, cancel_futures=True)
            for process in list(RUNNING):
                process.terminate()
            raise


def _make(variant: Variant) -> int:
    """Run one variant in a process of its own, unless it is finished; what it prints goes to a log beside it."""
    if (variant.folder / "finished.json").exists():
        return 0
    log = variant.folder.with_suffix(".log")
    command = [sys.executable, "-m", "tiller", "train", str(variant.recipe), *variant.overrides]
    code = execute(command, log)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{variant.name}, seed {variant.seed}: {'done' if code == 0 else f'failed, see {log}'}")
    return code


RUNNING: set[subprocess.Popen] = set()


def execute(command: Sequence[str], log: Path) -> int:
    """The exit code of a command that writes into a log; it is asked to end, and waited for, if this is stopped."""
    with (
        log.open("a") as output,
        subprocess.Popen(command, stdout=output, stderr=output, env=_environment()) as process,
    ):
        RUNNING.add(process)
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        finally:
            RUNNING.discard(process)


def _environment() -> dict[str, str]:
    """One thread per run unless the user says otherwise: runs side by side would slow each other down."""
    return {"OMP_NUM_THREADS": "1", **os.environ}


def _row(variant: Variant) -> Row:
    """What one run left behind."""
    metrics, timings = (_lines(variant.folder / name) for name in ("metrics.jsonl", "timings.jsonl"))
    compared, drift = (
        _data(variant.folder / "evaluation" / name, empty)
        for name, empty in (("comparison.json", []), ("drift.json", {}))
    )
    return Row(variant.name, variant.seed, metrics, timings, compared, drift)


def _lines(file: Path) -> Sequence[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _data(file: Path, empty: Any) -> Any:
    return json.loads(file.read_text()) if file.exists() else empty
