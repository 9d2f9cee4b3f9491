"""Lets Megatron find moe_ep's deep_ep."""

from __future__ import annotations

from typing import Any

from megatron_on_cpu import CudaIsCpu, call, call_with_megatron

from moe_ep.compat import deep_ep


def call_with_deep_ep(path: str, args: tuple) -> Any:
    """Call "module.function" of a module that imports Megatron, which runs on a CPU."""
    deep_ep.register()
    with CudaIsCpu():
        return call_with_megatron(path, args)


def call_with_deep_ep_on_gpu(path: str, args: tuple) -> Any:
    """The same where Megatron needs no help."""
    deep_ep.register()
    return call(path, args)
