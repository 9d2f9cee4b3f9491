"""docs/examples/decode_two_batches.py runs, and two batches side by side give what they give in turn."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_two_batches_side_by_side():
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "examples" / "decode_two_batches.py"), "--nproc", "2"],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2 ranks, 2 batches of 4 sequences, 6 tokens: side by side as in turn\n"
