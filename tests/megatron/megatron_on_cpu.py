"""Lets megatron-core 0.19 run in a process without a GPU, Triton and Transformer Engine, and on Python before 3.12.

Megatron calls some torch.cuda functions unconditionally; they get a meaning on a CPU. Of Megatron itself only the
attention of its layers without Transformer Engine is replaced, since that knows no MLA. A process that was prepared so
is good for nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import sys
import types
import typing
from typing import Any

import torch
import torch.distributed as dist


def call_with_megatron(path: str, args: tuple) -> Any:
    """Call "module.function" of a module that imports Megatron."""
    allow_cpu()
    from megatron.core.models.backends import LocalSpecProvider

    LocalSpecProvider.core_attention = lambda self: CausalAttention
    return call(path, args)


def call(path: str, args: tuple) -> Any:
    """Call "module.function", whose module only the called process imports."""
    module, function = path.rsplit(".", 1)
    return getattr(importlib.import_module(module), function)(*args)


class _Stream:
    """A stream on which everything has happened already."""

    cuda_stream = 0

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def wait_stream(self, _stream: Any) -> None:
        pass

    def wait_event(self, _event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def synchronize(self) -> None:
        pass

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0


class _Event:
    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def record(self, _stream: Any = None) -> None:
        pass

    def wait(self, _stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


def allow_cpu() -> None:
    """To be called before anything of Megatron is imported."""
    assert not torch.cuda.is_available(), "start the process with CUDA_VISIBLE_DEVICES="
    os.environ["TORCHDYNAMO_DISABLE"] = (
        "1"  # Megatron compiles small functions, which takes long and needs a compiler
    )
    if importlib.util.find_spec("triton") is None:
        # The one file on the way that imports it; its kernels move activations between GPU and host.
        name = "megatron.core.transformer.moe.ops.paged_stash"
        module = types.ModuleType(name)
        module.GLOBAL_BLOCK_SIZE, module.paged_stash_copy_kernel, module.paged_stash_pop_kernel = (
            1,
            None,
            None,
        )
        sys.modules[name] = module

    stream = _Stream()
    cuda = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream = cuda.default_stream = lambda device=None: stream
    cuda.stream = lambda _stream: contextlib.nullcontext()
    cuda.synchronize = lambda device=None: None
    cuda.random.get_rng_state = lambda device="cuda": torch.empty(0, dtype=torch.uint8)
    torch.Tensor.record_stream = lambda self, _stream: None
    _take_tensors_as_split_sizes()
    if sys.version_info < (3, 12):  # for megatron.training
        typing.override = lambda method: method


def allow_training() -> None:
    """What Megatron's own training loop needs in addition. Use `CudaIsCpu` with it."""
    cuda = torch.cuda
    cuda.device_count = lambda: 1
    cuda.set_device = lambda _device: None
    cuda.empty_cache = lambda: None
    cuda.get_rng_state = lambda device="cuda": torch.empty(0, dtype=torch.uint8)
    cuda.get_device_capability = lambda device=None: (9, 0)
    cuda.get_device_properties = lambda device=None: types.SimpleNamespace(major=9, minor=0)
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *_args, **_kwargs: self

    from megatron.training import training
    from megatron.training.initialize import initialize_megatron

    training.initialize_megatron = functools.partial(initialize_megatron, allow_no_cuda=True)


def _take_tensors_as_split_sizes() -> None:
    """Megatron makes lists of them only where they lie on a GPU."""
    original = dist.all_to_all_single

    def numbers(sizes: Any) -> Any:
        return sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes

    def all_to_all_single(
        output, input, output_split_sizes=None, input_split_sizes=None, group=None, async_op=False
    ):
        return original(
            output, input, numbers(output_split_sizes), numbers(input_split_sizes), group, async_op
        )

    dist.all_to_all_single = all_to_all_single


class CudaIsCpu(torch.overrides.TorchFunctionMode):
    """Tensors that are made with ``device="cuda"`` lie on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


class CausalAttention(torch.nn.Module):
    """Attention with keys and values of different widths."""

    def __init__(self, *_args: Any, softmax_scale: float | None = None, **_kwargs: Any) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(self, query, key, value, attention_mask, **_kwargs: Any) -> torch.Tensor:
        """``[S, B, heads, width]`` each -> ``[S, B, heads * value width]``."""
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.softmax_scale
        )
        return out.permute(2, 0, 1, 3).flatten(2)
