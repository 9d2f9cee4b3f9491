"""DeepEP's Python interface on moe_ep: code written for `deep_ep` runs on it by changing one import.

    from moe_ep.compat import deep_ep

or, where the importing code is not to be touched, `register` before it is imported.
"""

from ... import __version__
from .buffer import Buffer
from .config import Config, topk_idx_t
from .elastic import ElasticBuffer, EPHandle
from .hybrid import HybridEPBuffer
from .register import register
from .utils.envs import get_logical_domain_size, get_physical_domain_size
from .utils.event import EventHandle, EventOverlap

__all__ = [
    "Buffer",
    "Config",
    "EPHandle",
    "ElasticBuffer",
    "EventHandle",
    "EventOverlap",
    "HybridEPBuffer",
    "__version__",
    "get_logical_domain_size",
    "get_physical_domain_size",
    "register",
    "topk_idx_t",
]
