"""Models that carry something from one step to another (a cache of keys and values): they must run at every step."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

SETTINGS = (str, int, float, bool, bytes, type(None), torch.dtype, torch.device)
PLAIN = (Tensor, *SETTINGS)


class Carried:
    """Watches forwards, and names the modules that are not a function of what one step hands them.

    That shows in four ways: a tensor of an earlier step's output comes back as an argument, an argument is written
    into, an argument or output is an object of the pipeline's own, or the module itself keeps something.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()
        self._outputs: dict[int, tuple[weakref.ref[Tensor], int, str]] = {}  # by id: the tensor, its step, its module

    @contextmanager
    def watched(
        self, name: str, step: int, inputs: Any, module: nn.Module | None = None
    ) -> Iterator[Callable[[Any], None]]:
        """Around one forward of module `name`; what it returns is to be told to the function that this yields."""
        leaves = pytree.tree_leaves(inputs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_inference()]
        versions = [tensor._version for tensor in tensors]
        if any(not isinstance(leaf, PLAIN) for leaf in leaves) or any(self._returns(t, name, step) for t in tensors):
            self.names.add(name)

        def leave(output: Any) -> None:
            for leaf in pytree.tree_leaves(output):
                if isinstance(leaf, Tensor):
                    self._outputs[id(leaf)] = (weakref.ref(leaf), step, name)
                elif not isinstance(leaf, PLAIN):
                    self.names.add(name)

        yield leave
        if any(tensor._version != version for tensor, version in zip(tensors, versions, strict=True)):
            self.names.add(name)
        if module is not None and name not in self.names and remembers(module):
            self.names.add(name)

    def _returns(self, tensor: Tensor, name: str, step: int) -> bool:
        known, earlier, module = self._outputs.get(id(tensor), (None, step, name))
        return known is not None and known() is tensor and module == name and earlier < step


def remembers(module: nn.Module) -> bool:
    """Whether attention processors or hooks in the module keep what passes through it.

    Pipelines put in such processors to read attention maps (self-attention guidance), and diffusers' feature caches
    are such hooks.
    """
    for layer in module.modules():
        processor = vars(layer).get("processor")
        if processor is not None and any(
            not isinstance(v, SETTINGS) for v in getattr(processor, "__dict__", {}).values()
        ):
            return True
        registry = vars(layer).get("_diffusers_hook")
        if registry is not None and any(hook._is_stateful for hook in registry.hooks.values()):
            return True
    return False


def module_of(forward: Callable[..., Any]) -> nn.Module | None:
    """Whose forward it is, behind the wrappers of offloading hooks."""
    owner = inspect.unwrap(forward, stop=lambda f: isinstance(getattr(f, "__self__", None), nn.Module))
    module = getattr(owner, "__self__", None)
    return module if isinstance(module, nn.Module) else None


@contextmanager
def frozen(module: nn.Module | None) -> Iterator[None]:
    """No gradient to the module's weights: a pipeline that differentiates its model for guidance asks for none."""
    weights = [] if module is None else [weight for weight in module.parameters() if weight.requires_grad]
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


def moment() -> int:
    """A number that orders nodes of the autograd graph: those made later have a greater one."""
    with torch.enable_grad():
        node: Any = torch.zeros((), requires_grad=True).clone().grad_fn
    return int(node._sequence_nr())


def since(tensor: Tensor, start: int) -> Tensor:
    """The tensor with its graph, or detached where that began before the moment `start`.

    What a pipeline works out of trained weights before its loop (Kandinsky's embedding statistics) serves every step,
    but the graph of a step must end with it.
    """
    waiting: list[Any] = [tensor.grad_fn]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen or type(node).__name__ == "AccumulateGrad":
            continue
        if node._sequence_nr() < start:
            return tensor.detach()
        seen.add(node)
        waiting += [earlier for earlier, _ in node.next_functions]
    return tensor


def cut(value: Any) -> None:
    """Detach, in place, every tensor that is held by dicts, lists and objects: an earlier step's graph ends there."""
    waiting, seen = [value], set()
    while waiting:
        holder = waiting.pop()
        if id(holder) in seen or isinstance(holder, (type, Tensor, nn.Module, *SETTINGS)):
            continue
        seen.add(id(holder))
        if isinstance(holder, (dict, list)):
            for key, item in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
                if isinstance(item, Tensor) and item.requires_grad and not item.is_leaf:
                    holder[key] = item.detach()
                else:
                    waiting.append(item)
        elif isinstance(holder, tuple):
            waiting += holder
        elif hasattr(holder, "__dict__") and not callable(holder):
            waiting.append(vars(holder))
