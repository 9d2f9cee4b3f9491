"""Runs every kernel on small inputs, for compute-sanitizer; prints the number of launches or cases.

    compute-sanitizer --kernel-name kernel_substring=moe_ep python3 tests/gpu/sanitizer_driver.py [PART ...]

Without arguments: all. Every tensor gets its own allocation when PYTORCH_NO_CUDA_MEMORY_CACHING=1 is set, so that the
sanitizer sees accesses past its end.

Communication runs on one virtual rank, which sends to itself. SANITIZER_RANKS sets another number; more than one needs
a sanitizer that lets kernels of different streams run at the same time, otherwise they wait for each other in vain.
"""

import os
import sys
from dataclasses import replace
from unittest import mock

import torch
from cases import Case
from exercise import assert_case, run_case

from gpu.test_fp8_kernels import DTYPES, dequantize, mixed_rows, quantize
from moe_ep import _extension, fp8
from moe_ep.compat.deep_ep.layout import dispatch_layout
from moe_ep.compat.deep_ep.numbers import Ids, pack, unpack
from moe_ep.layers import ModelConfig, fp8_quantize, router_kernels, swiglu
from moe_ep.layers.rank_layout import expand_rows, order_by_expert, reduce_rows
from moe_ep.layers.router import Router
from moe_ep.layers.row_groups import RowGroups
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


def expert_kernels() -> int:
    """What is around the matrix products of FP8 experts, and of a shared expert."""
    cases = [([3 * 16, 0, 9 * 16], 256), ([16], 128), ([16] * 40, 640)]
    for splits, width in cases:
        rows = mixed_rows(sum(splits), width, torch.bfloat16).cuda()
        groups = RowGroups(torch.tensor(splits, device="cuda"), splits, len(rows))
        tokens = fp8.quantize(rows)
        fp8_quantize.requantize_columns(tokens, groups)
        fp8_quantize.requantize_tiles(tokens, groups)
        fp8_quantize.transpose_scales(tokens.scale_inv, groups)
        fp8_quantize.quantize_weight(torch.randn(3, 256, width, device="cuda").bfloat16(), transposed=True)
        weights = torch.rand(len(rows), device="cuda")
        for needed in (weights, None):
            grad = rows[:, : width // 2].contiguous()
            if width % 256 == 0:
                fp8_quantize.quantize_swiglu(rows, needed)
                fp8_quantize.quantize_swiglu_gradient(rows, needed, grad)
            gate_up = rows.clone().requires_grad_()
            swiglu.weighted_swiglu(gate_up, needed).backward(grad)
    torch.cuda.synchronize()
    return len(cases)


def product_on_cpu(left_MK: torch.Tensor, right_KN: torch.Tensor) -> torch.Tensor:
    """For `sliced_product`: at cuBLAS's kernels for Hopper racecheck fails by itself, whatever it is to check."""
    return (left_MK.cpu().float() @ right_KN.cpu().float()).cuda().unsqueeze(0)


def routers() -> int:
    cases = [(8, 1, 1, 2), (32, 8, 4, 8), (40, 5, 2, 8), (1024, 8, 3, 32)]
    for num_experts, num_groups, topk_groups, num_topk in cases:
        config = ModelConfig(
            hidden=64,
            num_experts=num_experts,
            num_groups=num_groups,
            topk_groups=topk_groups,
            num_topk=num_topk,
            seq_aux_loss_coeff=0.1,
        )
        router = Router(config, device="cuda")
        x = torch.randn(3, 11, 64, device="cuda", dtype=torch.bfloat16)
        with mock.patch.object(router_kernels, "sliced_product", product_on_cpu):
            out = router(x)
            (out.topk_weights.sum() + out.aux_loss).backward()
    torch.cuda.synchronize()
    return len(cases)


def rank_layout() -> int:
    cases = [(1, 1, 1, 1, 8), (37, 3, 5, 16, 24), (300, 8, 40, 16, 1032), (5, 32, 1024, 4, 144)]
    for num_rows, num_topk, num_experts, alignment, hidden in cases:
        ids = torch.rand(num_rows, max(num_experts, num_topk), device="cuda").argsort(1)[:, :num_topk] - 1
        weights = torch.rand(ids.shape, device="cuda", requires_grad=True)
        for max_rows in (None, num_rows):
            order = order_by_expert(ids, num_experts, alignment=alignment, max_rows=max_rows)
            for dtype in DTYPES:
                x = torch.randn(num_rows, hidden, device="cuda", dtype=dtype, requires_grad=True)
                for tokens in (x, fp8.quantize(x)):
                    expanded, row_weights = expand_rows(tokens, weights, order)
                    rows = expanded if isinstance(expanded, torch.Tensor) else expanded.dequantize(dtype)
                    y = reduce_rows(rows, order)
                    (y.float().sum() + row_weights.sum()).backward()
    torch.cuda.synchronize()
    return len(cases)


def numbers_of_deep_ep() -> int:
    """What V1 and V2 calls do beside moving rows."""
    scales, weights = torch.rand(33, 7, device="cuda"), torch.rand(33, 4, device="cuda")
    ids = torch.randint(-1, 16, (33, 4), device="cuda")
    words = pack([scales.t().contiguous().t(), Ids(ids), weights])
    unpack(words, [scales, ids.int(), weights])
    for num_ranks in (1, 2, 16):
        dispatch_layout(ids, 16, num_ranks)
    torch.cuda.synchronize()
    return 5


PARTS = {
    "fp8": quantisation,
    "experts": expert_kernels,
    "router": routers,
    "rank_layout": rank_layout,
    "deep_ep": numbers_of_deep_ep,
    "nvlink": communication,
}


def main(names: list[str]) -> None:
    for name in names or PARTS:
        print(f"{name}: {PARTS[name]()}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
