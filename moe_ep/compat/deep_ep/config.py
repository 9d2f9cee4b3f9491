"""deep_ep's configurations and sizes.

moe_ep needs neither chunk sizes nor buffers of a size agreed beforehand: of a `Config` it takes the number of
multiprocessors. The rest is here since programs compute with it.
"""

from __future__ import annotations

import torch

from ...errors import InvalidInput
from .utils.math import align, ceil_div

topk_idx_t = torch.int64
"""The dtype of expert ids."""

NVL_PEERS = 8
"""Ranks of a node, in deep_ep's formulas."""
_MOST_TOPK = 128
_SOURCE_META_BYTES = 8
_CHUNK_ALIGNMENT = 128
_LOW_LATENCY_HEADER_BYTES = 16


class Config:
    """Multiprocessors of a call, and deep_ep's chunk and ring sizes in tokens."""

    def __init__(
        self,
        num_sms: int = 20,
        num_max_nvl_chunked_send_tokens: int = 6,
        num_max_nvl_chunked_recv_tokens: int = 256,
        num_max_rdma_chunked_send_tokens: int = 6,
        num_max_rdma_chunked_recv_tokens: int = 256,
    ) -> None:
        nvl_send, nvl_recv = num_max_nvl_chunked_send_tokens, num_max_nvl_chunked_recv_tokens
        rdma_send, rdma_recv = num_max_rdma_chunked_send_tokens, num_max_rdma_chunked_recv_tokens
        if num_sms < 0:
            raise InvalidInput(f"num_sms is {num_sms}; it must be at least 0")
        if not 0 < nvl_send < nvl_recv:
            raise InvalidInput(
                f"num_max_nvl_chunked_send_tokens is {nvl_send} and num_max_nvl_chunked_recv_tokens {nvl_recv}; "
                "both must be greater than 0 and the first less than the second"
            )
        if not 0 < rdma_send < rdma_recv:
            raise InvalidInput(
                f"num_max_rdma_chunked_send_tokens is {rdma_send} and num_max_rdma_chunked_recv_tokens {rdma_recv}; "
                "both must be greater than 0 and the first less than the second"
            )
        rdma_recv = align(rdma_recv, rdma_send)
        if rdma_send > rdma_recv // 2:
            raise InvalidInput(
                f"num_max_rdma_chunked_send_tokens is {rdma_send}; it must be at most half of "
                f"num_max_rdma_chunked_recv_tokens, rounded up to a multiple of it: {rdma_recv}"
            )
        self.num_sms = num_sms
        self.num_max_nvl_chunked_send_tokens, self.num_max_nvl_chunked_recv_tokens = nvl_send, nvl_recv
        self.num_max_rdma_chunked_send_tokens, self.num_max_rdma_chunked_recv_tokens = rdma_send, rdma_recv

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes of deep_ep's rings between GPUs of a node."""
        channels, nodes = self.num_sms // 2, _nodes(num_ranks)
        token_bytes = hidden_bytes + _SOURCE_META_BYTES + _MOST_TOPK * (topk_idx_t.itemsize + 4 + 4)
        per_ring = 4 * (2 * nodes + 3) + self.num_max_nvl_chunked_recv_tokens * token_bytes
        return align(channels * min(num_ranks, NVL_PEERS) * per_ring, _CHUNK_ALIGNMENT)

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes of deep_ep's rings between nodes; 0 for a single node."""
        if num_ranks <= NVL_PEERS:
            return 0
        channels, nodes = self.num_sms // 2, _nodes(num_ranks)
        token_bytes = hidden_bytes + _SOURCE_META_BYTES + _MOST_TOPK * (topk_idx_t.itemsize + 4 + 4) + 16
        per_ring = 144 + 2 * self.num_max_rdma_chunked_recv_tokens * token_bytes
        return align(channels * nodes * per_ring, _CHUNK_ALIGNMENT)

    def __repr__(self) -> str:
        return f"Config({', '.join(f'{name}={value}' for name, value in vars(self).items())})"


# Ranks: (NVLink send, NVLink receive, RDMA send, RDMA receive) in tokens, of deep_ep 1.2 and 2.1.
_DISPATCH = {
    2: (24, 256, 6, 128),
    4: (6, 256, 6, 128),
    8: (6, 256, 6, 128),
    16: (36, 288, 20, 128),
    24: (32, 288, 8, 128),
    32: (32, 288, 8, 128),
    48: (32, 288, 8, 128),
    64: (32, 288, 8, 128),
    96: (20, 480, 12, 128),
    128: (20, 560, 12, 128),
    144: (32, 720, 12, 128),
    160: (28, 720, 12, 128),
}
_COMBINE = {
    2: (10, 256, 6, 128),
    4: (9, 256, 6, 128),
    8: (4, 256, 6, 128),
    16: (4, 288, 12, 128),
    24: (1, 288, 8, 128),
    32: (1, 288, 8, 128),
    48: (1, 288, 8, 128),
    64: (1, 288, 8, 128),
    96: (1, 480, 8, 128),
    128: (1, 560, 8, 128),
    144: (2, 720, 8, 128),
    160: (2, 720, 8, 128),
}


def dispatch_config(num_ranks: int, num_sms: int) -> Config:
    return _config(_DISPATCH, num_ranks, num_sms)


def combine_config(num_ranks: int, num_sms: int) -> Config:
    return _config(_COMBINE, num_ranks, num_sms)


def low_latency_rdma_size_hint(
    num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
) -> int:
    """Bytes of deep_ep's low-latency buffers, both of them."""
    messages = num_experts * num_max_dispatch_tokens_per_rank
    minima_bytes = hidden // 32  # of deep_ep's compressed combine
    dispatch_bytes = _LOW_LATENCY_HEADER_BYTES + max(2 * hidden, hidden + minima_bytes)
    combine_bytes = 2 * hidden + minima_bytes
    send = max(num_max_dispatch_tokens_per_rank * dispatch_bytes, messages * combine_bytes)
    receive = messages * max(dispatch_bytes, combine_bytes)
    signals = align(4 * num_experts, _CHUNK_ALIGNMENT)
    return align(2 * (send + receive + signals), _CHUNK_ALIGNMENT)


def _config(table: dict[int, tuple[int, int, int, int]], num_ranks: int, num_sms: int) -> Config:
    if num_ranks not in table:
        raise InvalidInput(
            f"there is no recommended Config for {num_ranks} ranks, only for {', '.join(map(str, table))}; "
            "calls need none"
        )
    return Config(num_sms, *table[num_ranks])


def _nodes(num_ranks: int) -> int:
    return max(1, ceil_div(num_ranks, NVL_PEERS))
