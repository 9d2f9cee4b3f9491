"""The software that decides what runs here: torch and its parts, the toolkit, our own modules, other packages."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist

from .. import __version__, _extension, env, fp8
from ..backends import nvlink_shape
from ..machine import command_output
from .gpus import unreachable_pairs
from .report import Fact

OPTIONAL_PACKAGES = {
    "rich": "the progress display of moe-ep train",
    "matplotlib": "the plots of moe-ep train and moe-ep bench",
    "tensorboard": "the TensorBoard files of moe-ep train",
    "numpy": "matplotlib and tensorboard",
    "transformer_engine": "FP8 experts on GPUs",
    "megatron.core": "Megatron-Core models",
}


DEEPSEEK = {"hidden": 7168, "max_tokens_per_rank": 4096, "num_experts": 256, "num_topk": 8}
"""The layer whose window memory is told, as arguments of a Communicator."""


def facts() -> Iterable[Fact]:
    section = "Software"
    yield Fact(section, "moe_ep", f"{__version__} in {Path(__file__).parents[1]}", ok=True)
    yield Fact(
        section, "Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}", ok=True
    )
    built_for = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPUs only"
    yield Fact(section, "torch", f"{torch.__version__}, {built_for}", ok=True)
    # macOS can't say how many of the cores are for this process.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Fact(section, "CPU", f"{cores} cores for this process")
    if _extension.load_cpu() is not None:
        yield Fact(section, "moe_ep._cpu", "built: rows on the CPU move by compiled kernels", ok=True)
    else:
        missing = "missing: plain torch moves rows on the CPU, more slowly"
        yield Fact(section, "moe_ep._cpu", missing, remedy="install moe_ep where there is a C++ compiler")


def kernel_facts() -> Iterable[Fact]:
    section = "CUDA kernels"
    nvcc = shutil.which("nvcc") or shutil.which(
        str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin/nvcc"))
    )
    if nvcc:
        release = re.search(r"release ([\d.]+)", command_output(nvcc, "--version"))
        yield Fact(
            section, "nvcc", f"{release.group(1) if release else 'unknown version'} at {nvcc}", ok=True
        )
    else:
        yield Fact(section, "nvcc", "not found", remedy="install the CUDA toolkit to build moe_ep's kernels")
    module = _extension.load()
    if module is None:
        ok = False if torch.cuda.is_available() else None
        yield Fact(
            section, "moe_ep._C", f"missing: {_extension.why_missing()}", ok, remedy="see docs/install.md"
        )
        return
    major, minor = module.CUDA_VERSION // 1000, module.CUDA_VERSION % 1000 // 10
    yield Fact(section, "moe_ep._C", f"built for sm_{module.ARCHS} with CUDA {major}.{minor}", ok=True)
    by_ranks = {r: nvlink_shape.window_bytes(nvlink_shape.Shape(**DEEPSEEK), r, module) for r in (2, 4, 8)}
    shape = "{max_tokens_per_rank} tokens x {hidden}, top-{num_topk} of {num_experts}".format(**DEEPSEEK)
    sizes = ", ".join(f"{num_bytes / 2**20:.0f} MiB with {r} ranks" for r, num_bytes in by_ranks.items())
    yield Fact(section, "window of a GPU", f"{sizes}, for DeepSeek-V3 ({shape} experts)")
    for index in range(torch.cuda.device_count()):
        yield _fp8_kernel_test(torch.device("cuda", index))


def _fp8_kernel_test(device: torch.device) -> Fact:
    """The FP8 kernels against their formulas in torch, bit for bit."""
    section, name = "CUDA kernels", f"FP8 on {device}"
    if _extension.load_for(device) is None:
        major, minor = torch.cuda.get_device_capability(device)
        remedy = f"install moe_ep again with MOE_EP_CUDA_ARCHS={major}{minor}"
        return Fact(section, name, f"moe_ep._C was not built for sm_{major}{minor}", ok=False, remedy=remedy)
    x = torch.randn(64, 512, device=device, dtype=torch.bfloat16)
    try:
        tokens = fp8.quantize(x)
    except RuntimeError as error:
        return Fact(section, name, f"does not run: {error}", ok=False)
    data, scale_inv = fp8.quantize_torch(x)
    same = torch.equal(tokens.data.view(torch.uint8), data.view(torch.uint8))
    same = same and torch.equal(tokens.scale_inv, scale_inv)
    return Fact(section, name, f"{'equal to' if same else 'DIFFERS FROM'} the formulas in torch", ok=same)


def communication_facts() -> Iterable[Fact]:
    section = "Communication"
    if not dist.is_available():
        yield Fact(
            section,
            "torch.distributed",
            "missing from this torch",
            ok=False,
            remedy="install another build of torch",
        )
        return
    gloo, nccl = dist.is_gloo_available(), dist.is_nccl_available()
    yield Fact(
        section,
        "gloo",
        "there: CPU processes can form a group" if gloo else "missing from this torch",
        ok=gloo,
    )
    if nccl:
        yield Fact(section, "NCCL", ".".join(map(str, torch.cuda.nccl.version())), ok=True)
    else:
        yield Fact(
            section,
            "NCCL",
            "missing from this torch",
            remedy="for several GPUs, install a CUDA build of torch",
        )
    symmetric, why = _symmetric_memory()
    yield Fact(section, "symmetric memory", why, ok=symmetric or None)


def _symmetric_memory() -> tuple[bool, str]:
    if importlib.util.find_spec("torch.distributed._symmetric_memory") is None:
        return False, "this torch does not have it"
    count = torch.cuda.device_count()
    if count == 0:
        return False, "torch has it, but there is no GPU for it"
    if unreachable_pairs():
        return False, "torch has it, but not all GPUs reach each other's memory"
    return True, f"torch has it, for {count} GPU{'s' * (count > 1)}"


def package_facts() -> Iterable[Fact]:
    for name, use in OPTIONAL_PACKAGES.items():
        version = _version_of(name)
        if version:
            yield Fact("Optional packages", name, f"{version} ({use})", ok=True)
        else:
            yield Fact("Optional packages", name, "not installed", remedy=f"install it for: {use}")


def _version_of(module: str) -> str | None:
    """The installed version of a module's distribution, found without importing it."""
    distribution = module.replace(".", "-").replace("_", "-")
    if distribution == "megatron-core" or importlib.util.find_spec(module):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            pass
    return None


def variable_facts() -> Iterable[Fact]:
    for variable in env.VARIABLES:
        is_set = " (set)" if variable.name in os.environ else ""
        yield Fact("Environment", f"{variable.name}={variable.current}{is_set}", variable.meaning)
