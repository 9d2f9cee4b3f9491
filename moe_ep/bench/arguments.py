"""The arguments of moe-ep bench and moe-ep tune, and what they default to on GPUs and on a CPU."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from ..errors import InvalidInput
from .plan import Sweep
from .workload import DTYPES, FP8, Workload

LAYOUTS = ("expert", "rank")
OPS = ("dispatch", "combine")
SMS = (8, 16, 24, 32, 64, 132)
AUTO = "auto"
_ON_GPUS = {"hidden": 7168, "num_topk": 8, "num_experts": 256, "expert_alignment": 16}
_ON_CPU = {"hidden": 1024, "num_topk": 2, "num_experts": 16}

Value = TypeVar("Value")


def add_sizes(parser: argparse.ArgumentParser, sms: Sequence[int] = SMS) -> None:
    """What both commands ask: the job. ``sms``: the default of --num-sms."""
    parser.add_argument("--nproc", type=int, default=2, help="ranks to start here (not under torchrun)")
    parser.add_argument("--num-tokens", type=_list(_positive), help="tokens per rank, a list (4096)")
    parser.add_argument("--hidden", type=_positive, help="width of a token (7168; collective: 1024)")
    parser.add_argument("--num-topk", type=_positive, help="experts of a token (8; collective: 2)")
    parser.add_argument("--num-experts", type=_positive, help="of all ranks (256; collective: 16)")
    parser.add_argument("--expert-alignment", type=_positive, help="expert layout (16; collective: 1)")
    parser.add_argument(
        "--dtype",
        type=_list(_one_of(FP8, *sorted(DTYPES))),
        metavar="DTYPES",
        help=f"a list of {FP8}, {', '.join(sorted(DTYPES))} ({FP8},bfloat16; collective: float32). "
        "Combine carries bfloat16 where dispatch carries fp8",
    )
    parser.add_argument(
        "--layout",
        choices=[*LAYOUTS, "both"],
        help="of received rows (both; collective and --overlap: expert)",
    )
    parser.add_argument(
        "--num-sms",
        type=_list(lambda text: text if text == AUTO else _positive(text)),
        metavar="SMS",
        help=f"a list of numbers of SMs, and of {AUTO} = the library's choice ({','.join(map(str, sms))}, "
        "as far as the GPU has them)",
    )
    parser.add_argument(
        "--unbalanced-ratio", type=float, default=1.0, metavar="X", help="load of rank 0 over the mean load"
    )
    parser.add_argument("--iterations", type=_positive, default=30)


def sweep(args: argparse.Namespace, available_sms: int, sms: Sequence[int] = SMS) -> Sweep:
    """What to measure with communication kernels, on GPUs with so many SMs."""
    num_sms = args.num_sms or [n for n in sms if n <= available_sms]
    return Sweep(
        ops=OPS if getattr(args, "op", None) in (None, "all") else (args.op,),
        layouts=LAYOUTS if args.layout in (None, "both") else (args.layout,),
        dtypes=tuple(args.dtype or (FP8, "bfloat16")),
        num_tokens=tuple(args.num_tokens or (4096,)),
        num_sms=tuple(None if n == AUTO else n for n in num_sms),
        unbalanced_ratio=args.unbalanced_ratio,
        iterations=args.iterations,
        weights=getattr(args, "weights", False),
        **{name: getattr(args, name) or default for name, default in _ON_GPUS.items()},
    )


def sms_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def workload(args: argparse.Namespace) -> Workload:
    """What to measure with the collective backend: one case. Raises InvalidInput for more."""
    for name in ("num_sms", "op", "weights", "expert_alignment"):
        if getattr(args, name) not in (None, False, "all"):
            raise InvalidInput(
                f"--{name.replace('_', '-')} is for --backend nvlink; --backend collective has no such choice"
            )
    if args.layout == "both":
        raise InvalidInput("--layout both is for --backend nvlink; --backend collective measures one")
    dtype = _single("dtype", args.dtype, "float32")
    if dtype == FP8:
        raise InvalidInput(f"--dtype {FP8} is for --backend nvlink; allowed are {', '.join(sorted(DTYPES))}")
    return Workload(
        num_tokens=_single("num-tokens", args.num_tokens, 4096),
        dtype=dtype,
        layout=args.layout or "expert",
        unbalanced_ratio=args.unbalanced_ratio,
        **{name: getattr(args, name) or default for name, default in _ON_CPU.items()},
    )


def _single(name: str, values: list[Value] | None, default: Value) -> Value:
    if values is None:
        return default
    if len(values) > 1:
        given = ",".join(map(str, values))
        raise InvalidInput(f"--{name} {given}: lists are for --backend nvlink; give one")
    return values[0]


def _list(parse: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Values separated by commas, each once."""

    def values(text: str) -> list[Any]:
        return list(dict.fromkeys(parse(each.strip()) for each in text.split(",")))

    return values


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _one_of(*names: str) -> Callable[[str], str]:
    def value(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(names)}")
        return text

    return value
