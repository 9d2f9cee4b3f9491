"""What `pip install .` gives: moe_ep with layers and recipes inside, and the command moe-ep."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = {"moe_ep": "moe_ep", "moe_ep/layers": "layers", "moe_ep/recipes": "recipes"}
SOURCES = [
    *ROOMS.values(),
    "csrc",
    "docs",
    "requirements",
    "tests",
    "setup.py",
    "pyproject.toml",
    "Makefile",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
]
NOT_SOURCES = ("__pycache__", "*.so", "*.egg-info", ".*")


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the checkout, since a build writes into its tree, with a new subpackage."""
    pytest.importorskip("setuptools", minversion="77")
    tree = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns(*NOT_SOURCES))
        elif source.exists():
            shutil.copy(source, tree / name)
    (tree / "moe_ep" / "new_folder").mkdir()
    (tree / "moe_ep" / "new_folder" / "__init__.py").touch()
    return tree


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory) -> Path:
    wheels = tmp_path_factory.mktemp("wheels")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", wheels, tree],
        env={**os.environ, "MOE_EP_BUILD_CUDA": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (path,) = wheels.iterdir()
    return path


def test_has_no_cuda_module_without_nvcc(wheel):
    modules = {
        Path(name).name.split(".")[0] for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")
    }
    assert modules == {"_cpu"}


def test_holds_every_module_and_its_data_once(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for package, folder in ROOMS.items():
        for path in files_of(ROOT / folder):
            assert names.count(f"{package}/{path.relative_to(ROOT / folder).as_posix()}") == 1, path
    for module in ("moe_ep/megatron", "moe_ep/bench", "moe_ep/doctor"):
        assert f"{module}/__init__.py" in names
    assert "moe_ep/recipes/megatron_sizes/deepseek-v3.args" in names
    assert "moe_ep/new_folder/__init__.py" in names, "new subpackages are found without an edit of setup.py"
    top_level = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top_level == {"moe_ep"}


def test_source_distribution_is_all_that_a_build_and_the_tests_need(tree, tmp_path):
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path],
        env={**os.environ, "MOE_EP_BUILD_CUDA": "0"},
        cwd=tree,
        check=True,
    )
    (path,) = tmp_path.iterdir()
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for source in map(ROOT.joinpath, SOURCES):
        for path in files_of(source) if source.is_dir() else [source]:
            assert path.relative_to(ROOT).as_posix() in names
    assert {"csrc/nvlink/group.h", "csrc/nvlink/rings.cuh", "csrc/nvlink/plan.cu"} <= names


def files_of(folder: Path) -> list[Path]:
    """The files of a checkout's folder that are not made from others."""
    made = {name for pattern in NOT_SOURCES for name in folder.rglob(pattern)}
    return [path for path in folder.rglob("*") if path.is_file() and not made & {path, *path.parents}]


def test_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    info = {name.split("/", 1)[1]: name for name in archive.namelist() if ".dist-info/" in name}
    metadata = archive.read(info["METADATA"]).decode()
    assert "License-Expression: MIT" in metadata
    assert "Requires-Python: >=3.10" in metadata
    assert "the moe_ep authors" in archive.read(info["licenses/LICENSE"]).decode()
    assert "moe-ep = moe_ep.cli:main" in archive.read(info["entry_points.txt"]).decode()


def test_installed_layers_are_the_wheels_own(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import moe_ep.layers, moe_ep.recipes; print(moe_ep.layers.__file__); print(moe_ep.recipes.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        str(tmp_path / f"moe_ep/{name}/__init__.py") for name in ("layers", "recipes")
    ]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"MOE_EP_BUILD_CUDA": "yes"}, "MOE_EP_BUILD_CUDA is 'yes'; allowed are auto, 0 and 1"),
        ({"MOE_EP_BUILD_CUDA": "1", "PATH": "", "CUDA_HOME": ""}, "there is no nvcc"),
    ],
)
def test_bad_build_options_are_refused(variables, message):
    if "PATH" in variables and Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("nvcc is at its default place, where the build finds it whatever PATH is")
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        env={**os.environ, **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert message in done.stderr
