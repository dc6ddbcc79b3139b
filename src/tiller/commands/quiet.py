"""The commands' own lines and nothing else: diffusers and transformers keep their bars and notes to themselves.

Only the commands ask for this; whoever imports tiller keeps the settings of his own program.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import MutableMapping

LIBRARIES = ("diffusers", "transformers", "huggingface_hub", "peft", "accelerate", "torch")


def settle(environment: MutableMapping[str, str] = os.environ) -> None:
    """Errors only, before the libraries are imported: some of their notes come with the import. Imports none of them.

    Downloads keep their bars on a terminal. DIFFUSERS_VERBOSITY, TRANSFORMERS_VERBOSITY and HF_HUB_VERBOSITY bring
    the notes back where they are set.
    """
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        environment.setdefault(name, "error")
    if not sys.stderr.isatty():
        environment.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not sys.warnoptions:  # what will change in their next versions is for programmers
        own = "|".join((*LIBRARIES, "tiller"))
        warnings.filterwarnings("ignore", category=FutureWarning, module=rf"({own})(\.|$)")


def hide_bars() -> None:
    """No bars while weights are read and written."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
