"""Which backends run here, in words, from what was found."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from .. import _extension
from .gpus import unreachable_pairs
from .report import Fact, Verdict


def judge(self_tests: Sequence[Fact], process_tests: Sequence[Fact]) -> dict[str, Verdict]:
    """By backend. ``self_tests`` are those of virtual ranks, ``process_tests`` those of processes with GPUs."""
    return {
        "collective": _collective(),
        "virtual": _virtual(self_tests),
        "nvlink": _nvlink(process_tests),
    }


def _collective() -> Verdict:
    if not (dist.is_available() and dist.is_gloo_available()):
        return Verdict(False, "can't run: this torch has neither gloo nor a way around it.")
    text = "runs on CPUs, over gloo, with any number of processes and machines."
    count = torch.cuda.device_count()
    if count and dist.is_nccl_available():
        text += f" Runs on the {_gpus(count)} here, over NCCL, one process for each."
    elif count:
        text += " Does not run on the GPUs here: this torch has no NCCL."
    else:
        text += " For GPUs it needs GPUs and a CUDA build of torch with NCCL."
    return Verdict(True, text)


def _virtual(self_tests: Sequence[Fact]) -> Verdict:
    cpu, *gpu = self_tests
    if not cpu.ok:
        return Verdict(False, "does not work: the self-test failed.")
    text = "runs on the CPU: any number of ranks as threads of one process, for tests and debugging."
    for fact in gpu:
        if fact.ok:
            text += " Runs on one GPU, too, with the kernels of the nvlink backend."
        elif fact.ok is None:
            text += f" On a GPU: {fact.text}."
        else:
            text += " Does NOT work on a GPU: the self-test failed there."
    return Verdict(all(fact.ok is not False for fact in gpu), text)


def _nvlink(process_tests: Sequence[Fact]) -> Verdict:
    count = torch.cuda.device_count()
    if count == 0:
        return Verdict(
            False, "can't run: it needs GPUs that reach each other's memory; there are none. Use collective."
        )
    missing = []
    if _extension.load_for(torch.device("cuda", 0)) is None:
        missing.append("moe_ep._C with kernels for these GPUs (docs/install.md)")
    apart = unreachable_pairs()
    if apart:
        missing.append(
            "peer access between all GPUs: " + ", ".join(f"{i} does not reach {j}" for i, j in apart)
        )
    if missing:
        return Verdict(False, f"can't run: missing are {'; '.join(missing)}. Use collective.")
    failed = [fact for fact in process_tests if fact.ok is False]
    if failed or not process_tests:
        reason = failed[0].text if failed else "its self-test was not run"
        return Verdict(False, f"does not work here: {reason}")
    if count == 1:
        return Verdict(True, "runs on the GPU here, alone; its use is between several.")
    return Verdict(True, f"runs on the {_gpus(count)} here: the default for CUDA tensors.")


def _gpus(count: int) -> str:
    return f"{count} GPU{'s' * (count > 1)}"
