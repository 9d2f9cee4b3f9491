"""`import deep_ep` without a package of that name."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from ...errors import InvalidInput

_PACKAGE = __package__
_MODULES = (
    "_C",
    "buffer",
    "elastic",
    "hybrid",
    "utils",
    "utils.comm",
    "utils.envs",
    "utils.event",
    "utils.gate",
    "utils.math",
    "utils.refs",
    "utils.semantic",
    "utils.testing",
)
# Other names that deep_ep's releases have had for them.
_ALIASES = {
    "buffers": "",
    "buffers.legacy": "buffer",
    "buffers.elastic": "elastic",
    "hybrid_ep_buffer": "hybrid",
}


def register(*, replace: bool = False) -> ModuleType:
    """Make ``import deep_ep`` and ``from deep_ep.utils import ...`` give this package; returns it.

    For this process, and before anything else imports deep_ep. Calling it again changes nothing. Raises InvalidInput if
    another deep_ep has been imported, unless ``replace`` is set: what holds objects of the other keeps them.
    """
    package = importlib.import_module(_PACKAGE)
    present = sys.modules.get("deep_ep")
    if present not in (None, package) and not replace:
        raise InvalidInput(
            f"deep_ep is imported already, from {getattr(present, '__file__', 'elsewhere')}; call register() before "
            "the first import of it, or with replace=True"
        )
    if present is not package:
        for name in [name for name in sys.modules if name.startswith("deep_ep.")]:
            del sys.modules[name]
    sys.modules["deep_ep"] = package
    for name in _MODULES:
        sys.modules[f"deep_ep.{name}"] = importlib.import_module(f"{_PACKAGE}.{name}")
    sys.modules["deep_ep_cpp"] = sys.modules["deep_ep._C"]  # its name in V1
    for alias, name in _ALIASES.items():
        sys.modules[f"deep_ep.{alias}"] = importlib.import_module(f"{_PACKAGE}.{name}" if name else _PACKAGE)
    return package
