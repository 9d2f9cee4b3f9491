"""Makes ``cases``, ``exercise`` and ``processes``, beside this file, importable from every test, and sets what has to
be set before the first CUDA call of a process."""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

# The kernels of virtual ranks wait for each other, so each must be able to start while others run. A kernel's first
# launch waits for running ones unless all are loaded beforehand; streams that share one of the 8 hardware queues
# that are the default run in turns.
os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

# Virtual ranks are threads, gloo ranks are processes: a thread pool in each would only fight over the cores.
torch.set_num_threads(1)
