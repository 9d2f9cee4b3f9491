"""Runs every kernel on small inputs, for compute-sanitizer; prints the number of launches or cases.

    compute-sanitizer --kernel-name kernel_substring=moe_ep python3 tests/gpu/sanitizer_driver.py [fp8] [nvlink]

Without arguments: all. Every tensor gets its own allocation when PYTORCH_NO_CUDA_MEMORY_CACHING=1 is set, so that the
sanitizer sees accesses past its end.

Communication runs on one virtual rank, which sends to itself. SANITIZER_RANKS sets another number; more than one needs
a sanitizer that lets kernels of different streams run at the same time, otherwise they wait for each other in vain.
"""

import os
import sys
from dataclasses import replace

import torch
from cases import Case
from exercise import assert_case, run_case

from gpu.test_fp8_kernels import DTYPES, dequantize, mixed_rows, quantize
from moe_ep import _extension
from moe_ep.testing import run_ranks

RANKS = int(os.environ.get("SANITIZER_RANKS", "1"))
TIMEOUT_S = 300.0  # the sanitizer slows kernels down a hundredfold


def quantisation() -> int:
    kernels = _extension.load()
    if kernels is None:
        raise SystemExit(_extension.why_missing())
    launches = 0
    for dtype in DTYPES:
        for rows, cols in [(1, 16), (3, 130), (17, 144), (33, 1024), (9, 7168)]:
            data, scale_inv = quantize(kernels, mixed_rows(rows, cols, dtype).cuda())
            dequantize(kernels, data, scale_inv, dtype)
            launches += 2
    torch.cuda.synchronize()
    return launches


def communication() -> int:
    cases = communication_cases()
    for case in cases:
        results = run_ranks(
            case.world_size,
            lambda comm: run_case(case, comm, "cuda"),
            device="cuda",
            timeout_s=TIMEOUT_S,
            num_sms=4,  # several blocks, and few to wait for
            **case.communicator_arguments,
        )
        assert_case(case, results)
    torch.cuda.synchronize()
    return len(cases)


def communication_cases() -> list[Case]:
    """Both layouts, every dtype, FP8, weights or none, biases, alignment, static sizes, no tokens; all tiny."""
    tokens_by_rank = tuple(5 + rank for rank in range(RANKS))
    plain = Case(
        "tiny", tokens_by_rank, hidden=48, num_experts=4 * RANKS, num_topk=3, routing="masked", num_biases=1
    )
    options = [
        {},
        {"dtype": torch.bfloat16, "expert_alignment": 4, "num_biases": 2},
        {"dtype": torch.float16, "has_weights": False, "num_biases": 0},
        {"dtype": torch.bfloat16, "hidden": 1032, "idx_dtype": torch.int32},
        {"dtype": torch.bfloat16, "max_recv_rows": 40},
        {"dtype": torch.bfloat16, "max_recv_rows": 4, "payload": "special"},
        {"tokens_by_rank": (0,) * RANKS},
        {"hidden": 144, "fp8": "tokens", "dtype": torch.bfloat16},
        {"hidden": 144, "fp8": "blockwise", "fp8_backward": "blockwise", "max_recv_rows": 24},
        {"num_experts": 160 * RANKS, "tokens_by_rank": (140,) * RANKS, "hidden": 8, "num_topk": 9},
    ]
    cases = []
    for i, each in enumerate(options):
        case = replace(plain, name=f"tiny_{i}", **each)
        cases += [case, replace(case, layout="rank", expert_alignment=1)]
    return cases


PARTS = {"fp8": quantisation, "nvlink": communication}


def main(names: list[str]) -> None:
    for name in names or PARTS:
        print(f"{name}: {PARTS[name]()}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
