"""Tiller beside TRL's DDPOTrainer: the same pipeline folder, prompts, steps, batch and updates, on the same core.

    python -m venv PEER && PEER/bin/pip install -r bench/peer_requirements.txt
    python bench/peer.py --peer-python PEER/bin/python
    python bench/peer.py --peer-python PEER/bin/python --model embedded --batch 16

Each trains in processes of its own, turn by turn; what counts is the processor time of an epoch (sample, score, update)
after the first, which warms up. TRL has two precisions, and so has tiller; every ratio is TRL's time over tiller's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from models import pipeline

HERE = Path(__file__).parent
WORKERS = {"tiller": "peer_tiller.py", "trl": "peer_trl.py"}


def write_folder(folder: Path, chosen: argparse.Namespace) -> None:
    """The pipeline as plain diffusers files, the tokenizer also in the older layout that TRL's transformers reads."""
    pipeline(chosen.model, chosen.latents).save_pretrained(folder)
    file = folder / "tokenizer" / "tokenizer.json"
    pairs = json.loads(file.read_text())["model"]
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(pairs["vocab"]))
    merges = "".join(" ".join(pair) + "\n" for pair in pairs["merges"])
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n" + merges)
    file.unlink()


def epochs(who: str, python: str, folder: Path, precision: str, chosen: argparse.Namespace) -> list[float]:
    """Processor seconds of each counted epoch of one process."""
    settings = {
        "folder": str(folder),
        "precision": precision,
        "steps": chosen.steps,
        "batch": chosen.batch,
        "epochs": chosen.epochs + 1,
        "full": chosen.full,
    }
    done = subprocess.run(
        [python, str(HERE / WORKERS[who]), json.dumps(settings)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        raise SystemExit(f"{who} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, help="python of an environment with TRL in it")
    parser.add_argument("--model", choices=["small", "embedded"], default="small", help="12 M or 7 M weights")
    parser.add_argument("--latents", type=int, help="side of the latents, where the model leaves a choice")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=2, help="counted epochs per process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precisions", nargs="+", default=["no", "bf16"], choices=["no", "bf16"])
    parser.add_argument("--full", action="store_true", help="train all weights in place of a LoRA of rank 4")
    chosen = parser.parse_args()
    pythons = {"tiller": sys.executable, "trl": chosen.peer_python}
    runs = [(who, precision) for precision in chosen.precisions for who in WORKERS]
    took: dict[tuple[str, str], list[float]] = {run: [] for run in runs}
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), chosen)
        for _ in range(chosen.rounds):
            for who, precision in runs:
                seconds = epochs(who, pythons[who], Path(folder), precision, chosen)
                took[who, precision].append(statistics.median(seconds))
                print(f"{who:>6} {precision:>4}: {took[who, precision][-1]:.2f} s per epoch", flush=True)
    for theirs in chosen.precisions:
        for ours in chosen.precisions:
            ratios = [a / b for a, b in zip(took["trl", theirs], took["tiller", ours], strict=True)]
            line = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            print(f"TRL {theirs:>4} / tiller {ours:>4}: {line}")


if __name__ == "__main__":
    main()
