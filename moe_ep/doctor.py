"""``moe-ep doctor``: what this machine can run, and what is missing for more, in words."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from . import __version__, _extension, env, fp8, functional, reference, testing

HELP = """Say in words what this machine can run, and what is missing for more.

Ends with a test of dispatch and combine on virtual ranks of this process, and with one verdict for each
backend. The exit code is 0 if at least the CPU backends work."""

OPTIONAL_PACKAGES = {
    "rich": "the progress display of moe-ep train",
    "matplotlib": "the plots of moe-ep train and moe-ep bench",
    "tensorboard": "the TensorBoard files of moe-ep train",
    "numpy": "matplotlib and tensorboard",
    "transformer_engine": "FP8 experts on GPUs",
    "megatron.core": "Megatron-Core models",
}
SELF_TEST_RANKS = 4


@dataclass(frozen=True)
class Fact:
    """One line of the report.

    ``ok`` is None for what is neither good nor bad; ``remedy`` says what to do, and what for.
    """

    section: str
    name: str
    text: str
    ok: bool | None = None
    remedy: str | None = None


@dataclass(frozen=True)
class Verdict:
    runs: bool
    text: str


@dataclass(frozen=True)
class Report:
    facts: list[Fact]
    verdicts: dict[str, Verdict]  # by backend
    healthy: bool  # at least the CPU backends work


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")


def run(args: argparse.Namespace) -> int:
    report = examine()
    if args.json:
        print(json.dumps(asdict(report), indent=2))
    elif importlib.util.find_spec("rich"):
        _print_rich(report)
    else:
        _print_plain(report)
    return 0 if report.healthy else 1


def examine() -> Report:
    """Look at the machine and run the self-test (a second or two)."""
    self_test = _self_test()
    facts = [*_software(), *_gpus(), *_kernels(), *_communication(), *_packages(), *_variables(), self_test]
    verdicts = {"collective": _collective_verdict(), "virtual": _virtual_verdict(self_test)}
    return Report(
        facts, verdicts, healthy=bool(self_test.ok) and dist.is_available() and dist.is_gloo_available()
    )


def _software() -> Iterable[Fact]:
    section = "Software"
    yield Fact(section, "moe_ep", f"{__version__} in {Path(__file__).parent}", ok=True)
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


def _gpus() -> Iterable[Fact]:
    section = "GPUs"
    count = torch.cuda.device_count()
    if count == 0:
        reason = (
            "torch is built for CPUs only" if torch.version.cuda is None else "torch finds no GPU it can use"
        )
        yield Fact(section, "devices", f"none: {reason}", remedy="for GPUs, install a CUDA build of torch")
        return
    yield Fact(
        section,
        "driver",
        _command_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    )
    for index in range(count):
        device = torch.cuda.get_device_properties(index)
        yield Fact(
            section,
            f"cuda:{index}",
            f"{device.name}, compute capability {device.major}.{device.minor}, "
            f"{device.total_memory / 2**30:.0f} GiB, {device.multi_processor_count} multiprocessors",
            ok=True,
        )
    if count > 1:
        apart = [pair for pair in _pairs(count) if not torch.cuda.can_device_access_peer(*pair)]
        text = "every GPU reaches every other's memory"
        if apart:
            text = "not between " + ", ".join(f"{i} and {j}" for i, j in apart)
        yield Fact(section, "peer access", text, ok=not apart)


def _kernels() -> Iterable[Fact]:
    section = "CUDA kernels"
    nvcc = shutil.which("nvcc") or shutil.which(
        str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin/nvcc"))
    )
    if nvcc:
        release = re.search(r"release ([\d.]+)", _command_output(nvcc, "--version"))
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


def _communication() -> Iterable[Fact]:
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
    if not all(torch.cuda.can_device_access_peer(*pair) for pair in _pairs(count)):
        return False, "torch has it, but not all GPUs reach each other's memory"
    return True, f"torch has it, for {count} GPU{'s' * (count > 1)}"


def _packages() -> Iterable[Fact]:
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


def _variables() -> Iterable[Fact]:
    for variable in env.VARIABLES:
        is_set = " (set)" if variable.name in os.environ else ""
        yield Fact("Environment", f"{variable.name}={variable.current}{is_set}", variable.meaning)


def _self_test() -> Fact:
    """Dispatch and combine of random tokens on virtual ranks, against moe_ep.reference, bit for bit."""
    started = time.perf_counter()
    try:
        failures = [
            f"{layout} layout: {what}" for layout in reference.LAYOUTS for what in _differences(layout)
        ]
    except Exception as error:  # whatever it is, it belongs in the report
        failures = [f"{type(error).__name__}: {error}"]
    seconds = time.perf_counter() - started
    ranks = f"dispatch and combine on {SELF_TEST_RANKS} virtual ranks"
    if failures:
        return Fact("Self-test", ranks, "FAILED: " + "; ".join(failures), ok=False)
    return Fact(
        "Self-test", ranks, f"equal to the reference, bit for bit, in both layouts ({seconds:.1f} s)", ok=True
    )


def _differences(layout: str) -> list[str]:
    num_experts, num_topk, hidden = 16, 4, 64
    generator = torch.Generator().manual_seed(0)
    x, topk_idx, topk_weights = [], [], []
    for rank in range(SELF_TEST_RANKS):
        num_tokens = 16 * rank  # rank 0 has none
        x.append(torch.randn(num_tokens, hidden, generator=generator))
        choices = torch.rand(num_tokens, num_experts, generator=generator).topk(num_topk).indices
        is_masked = torch.rand(num_tokens, num_topk, generator=generator) < 0.1
        topk_idx.append(choices.masked_fill(is_masked, -1))
        topk_weights.append(torch.rand(num_tokens, num_topk, generator=generator))

    def dispatch_and_combine(comm):
        mine = (each[comm.rank] for each in (x, topk_idx, topk_weights))
        out = functional.dispatch(*mine, comm, layout=layout)
        return out.tokens, out.weights, functional.combine(out.tokens * 2, out.handle)

    results = testing.run_ranks(
        SELF_TEST_RANKS,
        dispatch_and_combine,
        hidden=hidden,
        max_tokens_per_rank=16 * SELF_TEST_RANKS,
        num_experts=num_experts,
        num_topk=num_topk,
    )
    expected = reference.dispatch(x, topk_idx, topk_weights, num_experts=num_experts, layout=layout)
    expected_sums = reference.combine([each.tokens * 2 for each in expected], expected)
    differences = []
    for rank, (tokens, weights, sums) in enumerate(results):
        pairs = {
            "tokens": (tokens, expected[rank].tokens),
            "weights": (weights, expected[rank].weights),
            "sums": (sums, expected_sums[rank]),
        }
        differences += [
            f"{name} of rank {rank} differ" for name, pair in pairs.items() if not torch.equal(*pair)
        ]
    return differences


def _collective_verdict() -> Verdict:
    if not (dist.is_available() and dist.is_gloo_available()):
        return Verdict(False, "can't run: this torch has neither gloo nor a way around it.")
    text = "runs on CPUs, over gloo, with any number of processes and machines."
    count = torch.cuda.device_count()
    if count and dist.is_nccl_available():
        text += f" Runs on the {count} GPU{'s' * (count > 1)} here, over NCCL, one process for each."
    elif count:
        text += " Does not run on the GPUs here: this torch has no NCCL."
    else:
        text += " For GPUs it needs GPUs and a CUDA build of torch with NCCL."
    return Verdict(True, text)


def _virtual_verdict(self_test: Fact) -> Verdict:
    if not self_test.ok:
        return Verdict(False, "does not work: the self-test failed.")
    return Verdict(
        True, "runs on the CPU: any number of ranks as threads of one process, for tests and debugging."
    )


def _pairs(count: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(count) for j in range(count) if i != j]


def _command_output(*command: str) -> str:
    """What a command prints, on one line, or why it printed nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]} can't be run: {error}"
    return ", ".join(dict.fromkeys((done.stdout or done.stderr).strip().splitlines()))


_MARKS = {True: "+", False: "!", None: " "}
_STYLES = {True: "green", False: "bold red", None: ""}


def _line(fact: Fact) -> str:
    return fact.text if fact.remedy is None else f"{fact.text}; {fact.remedy}"


def _sections(report: Report) -> dict[str, list[Fact]]:
    sections: dict[str, list[Fact]] = {}
    for fact in report.facts:
        sections.setdefault(fact.section, []).append(fact)
    sections["Verdict"] = [
        Fact("Verdict", name, each.text, ok=each.runs) for name, each in report.verdicts.items()
    ]
    return sections


def _print_plain(report: Report) -> None:
    for section, facts in _sections(report).items():
        print(section)
        width = max(len(fact.name) for fact in facts)
        for fact in facts:
            print(f"  {_MARKS[fact.ok]} {fact.name:<{width}}  {_line(fact)}")


def _print_rich(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for section, facts in _sections(report).items():
        table = Table.grid(padding=(0, 1))
        for fact in facts:
            style = _STYLES[fact.ok]
            table.add_row(Text(f"  {_MARKS[fact.ok]}", style), Text(fact.name, style), Text(_line(fact)))
        console.print(Text(section, "bold"))
        console.print(table)
