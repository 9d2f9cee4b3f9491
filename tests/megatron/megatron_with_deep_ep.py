"""Lets Megatron find moe_ep's deep_ep, in a process where it runs on a CPU."""

from __future__ import annotations

from typing import Any

from megatron_on_cpu import CudaIsCpu, call_with_megatron

from moe_ep.compat import deep_ep


def call_with_deep_ep(path: str, args: tuple) -> Any:
    """Call "module.function" of a module that imports Megatron."""
    deep_ep.register()
    with CudaIsCpu():
        return call_with_megatron(path, args)
