"""The server inside another virtual environment: `python -I child.py`, with its order on the first line of stdin.

It says its port, or what went wrong, in one JSON line on stdout, and ends when stdin does: when its parent ends,
however that happens. What the reward prints goes to stderr.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import sys
import threading
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGE = "tiller_serving"  # this folder's name here, where there may be no tiller, or another one


def main() -> int:
    """Serve the reward that the order names until stdin ends."""
    order = json.loads(sys.stdin.buffer.readline())
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _load_file(PACKAGE, Path(__file__).with_name("__init__.py"), [str(Path(__file__).parent)])
        server = importlib.import_module(f"{PACKAGE}.server")
        protocol = importlib.import_module(f"{PACKAGE}.protocol")
        service = server.Service(
            reward=_reward(order["reward"], order["settings"]),
            name=order["reward"],
            token=order["token"],
            timeout=order["timeout"],
            limits=protocol.Limits(**order["limits"]),
            tell=lambda text: print(text, file=sys.stderr, flush=True),
        )
        served = server.RewardServer(service)
    except BaseException as error:
        traceback.print_exc()
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=reply, flush=True)
        return 1
    print(json.dumps({"port": served.server_port}), file=reply, flush=True)
    served.serve_forever()
    return 0


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def _reward(spec: str, settings: dict[str, Any]) -> Any:
    """The function `package.module:name` or `path/file.py:name`; a class is called with the settings."""
    place, _, name = spec.rpartition(":")
    if place.endswith(".py"):
        module = _load_file(f"tiller_reward_{Path(place).stem}", Path(place))
    else:
        module = importlib.import_module(place)
    found = getattr(module, name)
    if inspect.isclass(found):
        return found(**settings)
    if settings:
        raise TypeError(f"{spec} is no class, so it takes no settings")
    return found


def _load_file(name: str, path: Path, package: list[str] | None = None) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=package)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    sys.exit(main())
