"""Builds moe_ep; pyproject.toml has the metadata, docs/install.md the build options. Never imports torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, OptionError

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
CPU_EXTENSION = "moe_ep._cpu"
ROOMS = {"moe_ep": "moe_ep", "moe_ep.layers": "layers", "moe_ep.recipes": "recipes"}
"""Package name -> folder. layers/ and recipes/ lie beside moe_ep/ but install inside it."""


def packages() -> list[str]:
    found = []
    for name, folder in ROOMS.items():
        if (ROOT / folder / "__init__.py").is_file():
            found += [name, *(f"{name}.{sub}" for sub in find_packages(str(ROOT / folder)))]
    return found


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    candidates = [*([f"{home}/bin/nvcc"] if home else []), "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((path for path in map(shutil.which, candidates) if path), None)


def wanted_nvcc() -> str | None:
    """The compiler for moe_ep._C, or None for the pure-Python package: MOE_EP_BUILD_CUDA decides."""
    mode = os.environ.get("MOE_EP_BUILD_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise OptionError(f"MOE_EP_BUILD_CUDA is {mode!r}; allowed are auto, 0 and 1")
    nvcc = None if mode == "0" else find_nvcc()
    if mode == "1" and nvcc is None:
        raise OptionError("MOE_EP_BUILD_CUDA=1, but there is no nvcc: put it on PATH or set CUDA_HOME")
    return nvcc


class BuildPython(build_py):
    """Says once, in the build itself and not in each step around it, that there will be no CUDA kernels."""

    def run(self) -> None:
        if wanted_nvcc() is None and os.environ.get("MOE_EP_BUILD_CUDA") != "0":
            print("moe_ep: no nvcc found, so the package is built without CUDA kernels", file=sys.stderr)
        super().run()


class BuildExtensions(build_ext):
    """moe_ep._cpu with the platform's C++ compiler, as setuptools does; moe_ep._C with nvcc."""

    def build_extension(self, ext: Extension) -> None:
        if ext.name == CPU_EXTENSION:
            import pybind11

            ext.include_dirs = [str(CSRC), pybind11.get_include()]
            super().build_extension(ext)
        else:
            self._build_with_nvcc(ext)

    def _build_with_nvcc(self, ext: Extension) -> None:
        """Compile each file on its own, and only when it or a header of it has changed."""
        nvcc = wanted_nvcc()
        archs = os.environ.get("MOE_EP_CUDA_ARCHS", "90a").replace(",", ";").split(";")
        archs = [arch.strip() for arch in archs if arch.strip()]
        command = [nvcc, *self._compile_flags(archs)]
        objects_dir = ROOT / "build" / "csrc"
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(
                pool.map(lambda source: _compile(command, ROOT / source, objects_dir), ext.sources)
            )
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # -cudart static: nothing of CUDA has to be found when the module is imported.
        link = [nvcc, "-shared", "-cudart", "static", *_gencode(archs), "-o", str(target)]
        _run([*link, *map(str, objects), "-ldl"])

    def _compile_flags(self, archs: list[str]) -> list[str]:
        import pybind11

        version = self.distribution.get_version()
        includes = [str(CSRC), pybind11.get_include(), sysconfig.get_paths()["include"]]
        return [
            "-O3",
            "-std=c++17",
            "-lineinfo",
            "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall",
            "-cudart=static",
            *_gencode(archs),
            *(f"-I{path}" for path in includes),
            f'-DMOE_EP_VERSION="{version}"',
            f'-DMOE_EP_CUDA_ARCHS="{";".join(archs)}"',
        ]


def _gencode(archs: list[str]) -> list[str]:
    return [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]


def _compile(command: list[str], source: Path, objects_dir: Path) -> Path:
    target = objects_dir / source.relative_to(CSRC).with_suffix(source.suffix + ".o")
    target.parent.mkdir(parents=True, exist_ok=True)
    made_with, depends = target.with_suffix(".command"), target.with_suffix(".d")
    compile_it = [*command, "-MMD", "-MF", str(depends), "-c", str(source), "-o", str(target)]
    if not _is_current(target, made_with, depends, compile_it):
        made_with.unlink(missing_ok=True)
        _run(compile_it)
        made_with.write_text("\n".join(compile_it))
    return target


def _is_current(target: Path, made_with: Path, depends: Path, command: list[str]) -> bool:
    if not (target.exists() and depends.exists() and made_with.exists()):
        return False
    if made_with.read_text() != "\n".join(command):
        return False
    inputs = depends.read_text().split(":", 1)[1].replace("\\\n", " ").split()
    built = target.stat().st_mtime
    return all(Path(path).exists() and Path(path).stat().st_mtime < built for path in inputs)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise CompileError(f"{' '.join(command)}\nfailed with {done.returncode}:\n{done.stdout}{done.stderr}")
    if done.stdout or done.stderr:
        print(done.stdout + done.stderr, file=sys.stderr)


def extensions() -> list[Extension]:
    files = sorted(path for pattern in ("*.cu", "*.cpp") for path in CSRC.rglob(pattern))
    for_cpu = [path.relative_to(ROOT).as_posix() for path in files if CSRC / "cpu" in path.parents]
    others = [path.relative_to(ROOT).as_posix() for path in files if CSRC / "cpu" not in path.parents]
    flags = (
        ["-O3", "-std=c++17", "-fvisibility=hidden", "-Wall"] if os.name == "posix" else ["/O2", "/std:c++17"]
    )
    # optional: without a C++ compiler plain torch does the same, more slowly.
    found = [
        Extension(CPU_EXTENSION, for_cpu, language="c++", extra_compile_args=flags, optional=True),
    ]
    if wanted_nvcc() is not None:
        found.append(Extension("moe_ep._C", others))
    return found


setup(
    packages=packages(),
    package_dir={name: folder for name, folder in ROOMS.items() if (ROOT / folder).is_dir()},
    package_data={"": ["py.typed"], "moe_ep.recipes": ["megatron_sizes/*.args"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtensions, "build_py": BuildPython},
    zip_safe=False,
)
