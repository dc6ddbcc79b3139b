"""What the benchmarks hold against each other: as many bare calls as the algorithm makes, of the same weights."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

import pytest

import tiny
from tiller import Policy


@pytest.fixture
def overhead(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "bench"))
    return importlib.import_module("overhead")


@pytest.mark.parametrize(
    ("name", "graph", "copies", "reference"),
    [
        ("ddpo", 5, 0, 0),
        ("mix_grpo", 2, 0, 0),  # its window
        ("sft", 5, 0, 0),
        ("nft", 5, 5, 5),  # the old weights, and the reference
    ],
)
def test_an_update_makes_these_denoiser_calls_and_the_bare_side_makes_them_too(
    overhead: Any, monkeypatch: pytest.MonkeyPatch, name: str, graph: int, copies: int, reference: int
) -> None:
    policy = Policy(tiny.tiny_sd(), lora_rank=2)
    work = overhead.Workload(policy, name, argparse.Namespace(batch=4, steps=5))
    assert work.calls == overhead.Calls(graph, copies, reference)
    made, forward = [], policy.pipe.unet.forward
    monkeypatch.setattr(policy.pipe.unet, "forward", lambda *args, **kwargs: made.append(1) or forward(*args, **kwargs))
    work.bare_training()
    assert len(made) == graph + copies + reference
    made.clear()
    work.bare_forward()
    assert len(made) == 5
