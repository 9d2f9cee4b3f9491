"""What programs import from deep_ep's extension, by its name there."""

from .buffer import Buffer as _Buffer
from .config import Config, low_latency_rdma_size_hint, topk_idx_t
from .elastic_sizes import ALIGNMENT as _ALIGNMENT
from .utils.event import EventHandle

__all__ = [
    "Config",
    "EventHandle",
    "get_elastic_buffer_alignment",
    "get_low_latency_rdma_size_hint",
    "is_sm90_compiled",
    "topk_idx_t",
]

get_low_latency_rdma_size_hint = low_latency_rdma_size_hint
is_sm90_compiled = _Buffer.is_sm90_compiled


def get_elastic_buffer_alignment() -> int:
    """Bytes."""
    return _ALIGNMENT
