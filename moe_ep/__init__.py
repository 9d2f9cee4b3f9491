"""moe_ep: expert parallelism for PyTorch, as differentiable operations."""

from pathlib import Path as _Path

from . import errors, fp8
from .communicator import Communicator
from .errors import BackendUnavailable, InvalidInput, MoeEpError, PeerTimeoutError, ReceiveOverflowError
from .fp8 import Fp8Tokens
from .functional import combine, combine_async, dispatch, dispatch_async
from .handle import DispatchHandle, DispatchOutput
from .streams import Event

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "Communicator",
    "DispatchHandle",
    "DispatchOutput",
    "Event",
    "Fp8Tokens",
    "InvalidInput",
    "MoeEpError",
    "PeerTimeoutError",
    "ReceiveOverflowError",
    "combine",
    "combine_async",
    "dispatch",
    "dispatch_async",
    "errors",
    "fp8",
]

# layers/ and recipes/ are installed inside this package; in a checkout they lie beside it.
_checkout = _Path(__file__).parents[1]
if (_checkout / "csrc").is_dir() and (_checkout / "layers" / "__init__.py").exists():
    __path__.append(str(_checkout))
