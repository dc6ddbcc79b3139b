"""What a pipeline changes in itself while it is called is put back, also when it is left in the middle of its loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from tiller.policy import seam


@contextmanager
def kept(pipe: DiffusionPipeline) -> Iterator[None]:
    """Schedulers, attention processors and cached features of the pipeline are afterwards as they were before.

    Text2Video-Zero goes on with a copy of its scheduler; perturbed-attention guidance and Attend-and-Excite exchange
    attention processors; feature caches are cleared by the last line of a call.
    """
    schedulers = [
        (pipeline, name, value)
        for pipeline in seam.pipelines(pipe)
        for name, value in vars(pipeline).items()
        if seam.is_scheduler(value)
    ]
    processors = [(layer, layer.processor) for layer in _attention(pipe)]
    try:
        yield
    finally:
        for pipeline, name, scheduler in schedulers:
            setattr(pipeline, name, scheduler)
        for layer, processor in processors:
            if layer.processor is not processor:
                layer.set_processor(processor)
        for module in seam.parts(pipe, nn.Module).values():
            if hasattr(module, "_reset_stateful_cache"):
                module._reset_stateful_cache()


def _attention(pipe: DiffusionPipeline) -> list[Any]:
    modules = seam.parts(pipe, nn.Module).values()
    return [layer for module in modules for layer in module.modules() if hasattr(layer, "set_processor")]
