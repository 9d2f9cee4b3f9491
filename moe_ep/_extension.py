"""The compiled module ``moe_ep._C``, loaded when first asked for.

Loading takes no CUDA context and needs no GPU. Build options: docs/install.md.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from types import ModuleType

from . import env


def load() -> ModuleType | None:
    """The module with the CUDA kernels, or None; :func:`why_missing` says why."""
    return _load()[0]


def why_missing() -> str | None:
    """Why :func:`load` gives None and what to do about it, in words; None if the module is there."""
    return _load()[1]


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
