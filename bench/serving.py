"""What a reward server costs: pictures per second through it, against the same reward called directly.

    python bench/serving.py
    python bench/serving.py --sizes 64 512 --pictures 128 --picture png webp jpeg

The reward is trivial (one pixel), so the difference is the wire: encoding, base64, HTTP over the loopback, decoding.
The server is a process of its own (`tiller serve`). Pictures are smooth with some noise, as photographs are: noise
alone does not compress. Beside the time on the clock stands the CPU time of both processes, which hardly depends on
who else is busy.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from tiller.rewards import resolve
from tiller.rewards.serving.client import Remote
from tiller.rewards.serving.protocol import encode_picture

REWARD = """
def corner(images, prompts, metadata):
    return [float(image.getpixel((0, 0))[0]) for image in images]
"""
ROUNDS = 7


def pictures(size: int, count: int) -> list[Image.Image]:
    """Smooth colours, and noise of two grey levels on them."""
    chance = np.random.default_rng(0)
    small = chance.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    smooth = [np.asarray(Image.fromarray(one).resize((size, size), Image.Resampling.BICUBIC)) for one in small]
    noise = chance.normal(0, 2, (count, size, size, 3))
    return [
        Image.fromarray(np.clip(one + more, 0, 255).astype(np.uint8)) for one, more in zip(smooth, noise, strict=True)
    ]


def seconds(call: Callable[[], Any], other: int) -> tuple[float, float, float]:
    """The medians of some rounds, after one that does not count: on the clock, of our CPU, of the other process's."""
    call()
    rounds = []
    for _ in range(ROUNDS):
        began, mine, theirs = time.perf_counter(), time.process_time(), cpu(other)
        call()
        rounds.append((time.perf_counter() - began, time.process_time() - mine, cpu(other) - theirs))
    clock, mine, theirs = (median(column) for column in zip(*rounds, strict=True))
    return clock, mine, theirs


def cpu(process: int) -> float:
    """Seconds of CPU that a process has had (Linux)."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--picture", nargs="+", default=["png", "webp", "jpeg"])
    parser.add_argument("--batch-size", type=int, default=16)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "rewards.py"
        source.write_text(REWARD)
        spec = f"{source}:corner"
        words = [sys.executable, "-m", "tiller", "serve", spec, "--port", "0"]
        server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        try:
            url = server.stdout.readline().split()[2]
            compare(resolve(spec), url, server.pid, chosen)
        finally:
            server.terminate()


def compare(near: Any, url: str, server: int, chosen: argparse.Namespace) -> None:
    """One line per size and format; times in milliseconds per picture."""
    print("| size | format | KiB | direct | through the server | CPU of client | CPU of server | pictures per second |")
    print("|---|---|---|---|---|---|---|---|")
    for size in chosen.sizes:
        images = pictures(size, chosen.pictures)
        arguments = images, ["a cat"] * len(images), [{}] * len(images)
        each = 1000 / len(images)
        direct = each * seconds(lambda: near(*arguments), server)[0]  # noqa: B023
        for kind in chosen.picture:
            far = Remote(url, picture=kind, batch_size=chosen.batch_size)
            clock, mine, theirs = (each * time for time in seconds(lambda: far(*arguments), server))  # noqa: B023
            length = sum(len(encode_picture(image, kind)) for image in images) / len(images) / 1024
            print(
                f"| {size} | {kind} | {length:.0f} | {direct:.3f} | {clock:.2f} | {mine:.2f} | {theirs:.2f} | "
                f"{1000 / clock:.0f} |"
            )


if __name__ == "__main__":
    main()
