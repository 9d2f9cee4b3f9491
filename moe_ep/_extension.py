"""The compiled module ``moe_ep._C``, loaded when first asked for.

Loading takes no CUDA context and needs no GPU. Build options: docs/install.md.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from types import ModuleType

import torch

from . import env


def load() -> ModuleType | None:
    """The module with the CUDA kernels, or None; :func:`why_missing` says why."""
    return _load()[0]


def why_missing() -> str | None:
    """Why :func:`load` gives None and what to do about it, in words; None if the module is there."""
    return _load()[1]


def load_cpu() -> ModuleType | None:
    """The module ``moe_ep._cpu`` with the kernels for rows on a CPU, or None if no compiler was there to build it."""
    return _import_cpu() if env.extension() else None


@functools.cache
def _import_cpu() -> ModuleType | None:
    try:
        return importlib.import_module(f"{__package__}._cpu")
    except ImportError:
        return None


def load_for(device: torch.device) -> ModuleType | None:
    """The module if there is one and it was compiled for this CUDA device, else None."""
    module = load()
    if module is None or not _is_built_for(module.ARCHS, torch.cuda.get_device_capability(device)):
        return None
    return module


@functools.cache
def _is_built_for(archs: str, capability: tuple[int, int]) -> bool:
    """Whether code for one of ``archs``, such as "80;90a", runs on a GPU of this compute capability."""
    major, minor = capability
    for arch in archs.split(";"):
        exact = not arch.isdigit()  # 90a and 100f use what other GPUs may lack
        number = int(arch.rstrip("af"))
        if number // 10 == major and (number % 10 == minor if exact else number % 10 <= minor):
            return True
    return False


def _load() -> tuple[ModuleType | None, str | None]:
    if not env.extension():
        return None, f"it is switched off by {env.EXTENSION.name}={env.EXTENSION.current}"
    return _import()


@functools.cache
def _import() -> tuple[ModuleType | None, str | None]:
    name = f"{__package__}._C"
    try:
        return importlib.import_module(name), None
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
    except ImportError as error:
        return None, f"it was built, but can't be loaded: {error}"
    for_other_pythons = sorted(path.name for path in Path(__file__).parent.glob("_C.*.so"))
    if for_other_pythons:
        return None, f"it was built for another Python ({', '.join(for_other_pythons)}): install moe_ep again"
    return (
        None,
        "it was not built, as no nvcc was found: install CUDA's nvcc, then moe_ep again",
    )
