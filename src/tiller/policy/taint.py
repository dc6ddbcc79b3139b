"""Which of a model's outputs a tensor comes from, followed through the pipeline's own arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils import _pytree as pytree

MARK = "_tiller_step"


class Taint(TorchFunctionMode):
    """While it is on, whatever is computed from a marked tensor bears the mark of the earliest step in it.

    Guidance with momentum (Safe and Semantic Stable Diffusion, adaptive projected guidance) shows in a prediction that
    hangs on an earlier step's output.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        steps = list(_marks((args, kwargs)))
        if steps:
            mark(result, min(steps))
            name = getattr(func, "__name__", "")
            if name == "__setitem__" or (name.endswith("_") and not name.startswith("__")) or name.startswith("__i"):
                mark(args[0], min(steps))
        return result

    @contextmanager
    def off(self) -> Iterator[None]:
        """What runs here is not followed, and costs nothing more than usual."""
        if _get_current_function_mode() is not self:
            yield
            return
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()


def mark(value: Any, step: int | None) -> None:
    """Note on all tensors in `value` the step they come from; None takes the mark off."""
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            vars(leaf)[MARK] = step


def marked(tensor: Tensor) -> int | None:
    """The earliest step that a tensor comes from; None for no model's output."""
    return vars(tensor).get(MARK)


def _marks(value: Any, depth: int = 3) -> Iterator[int]:
    if isinstance(value, Tensor):
        step = marked(value)
        if step is not None:
            yield step
    elif depth and isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _marks(item, depth - 1)
