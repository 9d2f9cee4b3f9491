"""Processes in which Megatron runs on a CPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from megatron_on_cpu import call_with_megatron
from processes import run_gloo


@pytest.fixture(scope="session")
def on_cpu_ranks() -> Iterator[Callable[..., list[Any]]]:
    """``on_cpu_ranks(n, "module.function", *args)``: what the function returned on each of ``n`` ranks.

    The module is imported in the ranks alone: it may import Megatron, which changes the process that it runs in.
    """
    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
        pytest.skip("needs megatron-core: pip install 'moe_ep[megatron]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield lambda world_size, path, *args: run_gloo(world_size, call_with_megatron, path, args)
