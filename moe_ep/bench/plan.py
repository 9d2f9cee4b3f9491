"""What a sweep measures."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import InvalidInput
from .results import Case
from .workload import FP8, Workload


@dataclass(frozen=True)
class Sweep:
    """What to measure: every operation in every layout, dtype and size, with every number of SMs.

    ``num_sms``: None in it = the library's choice. ``weights``: a dispatch with a cached handle takes topk_weights
    along, as the first one always does.
    """

    ops: tuple[str, ...]
    layouts: tuple[str, ...]
    dtypes: tuple[str, ...]
    num_tokens: tuple[int, ...]
    num_sms: tuple[int | None, ...]
    hidden: int
    num_topk: int
    num_experts: int
    expert_alignment: int
    unbalanced_ratio: float
    iterations: int
    weights: bool = False

    def cases(self) -> list[Case]:
        """Combine carries bfloat16 where dispatch carries FP8."""
        found: dict[Case, None] = {}
        for num_tokens in self.num_tokens:
            for layout in self.layouts:
                for dtype in self.dtypes:
                    if "dispatch" in self.ops:
                        found[Case("dispatch", layout, dtype, num_tokens)] = None
                        if dtype == FP8:
                            found[Case("dispatch", layout, dtype, num_tokens, quantize=True)] = None
                    if "combine" in self.ops:
                        carried = "bfloat16" if dtype == FP8 else dtype
                        found[Case("combine", layout, carried, num_tokens)] = None
        return sorted(found, key=lambda case: (case.num_tokens, case.layout, case.op == "combine"))

    def workload(self, num_tokens: int, layout: str, dtype: str) -> Workload:
        return Workload(
            num_tokens, self.hidden, self.num_topk, self.num_experts, dtype, layout, self.unbalanced_ratio
        )

    def check(self, num_ranks: int) -> None:
        for num_tokens in self.num_tokens:
            self.workload(num_tokens, self.layouts[0], self.dtypes[0]).check(num_ranks)

    def sms_on(self, device: torch.device) -> tuple[int | None, ...]:
        """``num_sms``, checked against what the device has."""
        if device.type != "cuda":
            return self.num_sms
        available = torch.cuda.get_device_properties(device).multi_processor_count
        for num_sms in self.num_sms:
            if num_sms is not None and num_sms > available:
                raise InvalidInput(f"--num-sms {num_sms} is more than this GPU's {available} SMs")
        return self.num_sms
