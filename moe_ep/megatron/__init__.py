"""moe_ep as the token dispatcher of Megatron-Core's Mixture-of-Experts layers.

>>> from moe_ep.megatron import install
>>> model = install(model)  # any built model: GPTModel, HybridModel, with MTP, one chunk or a list of them

Parameters, checkpoints and results stay as they are; tokens travel through moe_ep. See docs/megatron.md.
"""

from __future__ import annotations

try:
    import megatron.core
except ImportError as error:
    raise ImportError(
        f"moe_ep.megatron needs megatron-core, which can't be imported ({error}); "
        "install it with: pip install 'moe_ep[megatron]'"
    ) from error

from .dispatcher import MoeEpTokenDispatcher
from .install import MoeEpLayer, install, use_in_spec
from .options import DispatcherOptions

__all__ = ["DispatcherOptions", "MoeEpLayer", "MoeEpTokenDispatcher", "install", "use_in_spec"]

_OLDEST = (0, 19)


def _check_version() -> None:
    version = megatron.core.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
        raise ImportError(
            f"moe_ep.megatron needs megatron-core {'.'.join(map(str, _OLDEST))} or newer; this is {version}"
        )


_check_version()
