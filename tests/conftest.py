"""Every test runs offline, on one thread, and with the builders of tiny pipelines at hand."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parent))

import torch

torch.set_num_threads(1)
