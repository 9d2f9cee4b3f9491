"""Runs every kernel once on small inputs, for compute-sanitizer; prints the number of launches.

Inputs come from the CPU, so that no kernel but moe_ep's runs. Every tensor gets its own allocation when
PYTORCH_NO_CUDA_MEMORY_CACHING=1 is set, so that the sanitizer sees accesses past its end.
"""

import torch
from test_fp8_kernels import DTYPES, dequantize, mixed_rows, quantize

from moe_ep import _extension


def main() -> int:
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


if __name__ == "__main__":
    print(f"{main()} launches")
