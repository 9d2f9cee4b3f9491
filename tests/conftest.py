"""Makes ``cases``, ``exercise`` and ``processes``, beside this file, importable from every test."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

# Virtual ranks are threads, gloo ranks are processes: a thread pool in each would only fight over the cores.
torch.set_num_threads(1)
