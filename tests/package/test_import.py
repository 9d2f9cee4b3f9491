"""What `import moe_ep` costs and what it leaves alone."""

import json
import subprocess
import sys

import pytest
import torch

from moe_ep import doctor

IMPORT = """
import json, sys, time
import torch
before = set(sys.modules)
started = time.perf_counter()
import moe_ep
seconds = time.perf_counter() - started
added = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
print(json.dumps([seconds, added, "moe_ep._C" in sys.modules, torch.cuda.is_initialized()]))
"""


@pytest.fixture(scope="module")
def imports():
    outputs = [
        subprocess.run([sys.executable, "-c", IMPORT], check=True, capture_output=True, text=True)
        for _ in range(3)
    ]
    return [json.loads(output.stdout) for output in outputs]


def test_takes_under_half_a_second_beyond_torch(imports):
    # The fastest run is the one that other processes disturbed least.
    assert min(seconds for seconds, *_ in imports) < 0.5


def test_imports_no_optional_package(imports):
    optional = {name.partition(".")[0] for name in doctor.OPTIONAL_PACKAGES} | {
        "pytest",
        "hypothesis",
        "triton",
    }
    added = set(imports[0][1])
    assert "moe_ep" in added
    assert not added & optional


def test_leaves_extension_and_gpu_alone(imports):
    _, _, extension_loaded, cuda_initialised = imports[0]
    assert not extension_loaded
    assert not cuda_initialised


def test_torch_is_the_only_requirement():
    metadata = pytest.importorskip("importlib.metadata")
    try:
        requirements = metadata.requires("moe_ep")
    except metadata.PackageNotFoundError:
        pytest.skip("moe_ep is not installed here, only on the path")
    always = [each for each in requirements if "extra ==" not in each]
    assert len(always) == 1 and always[0].startswith("torch")
    assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)
