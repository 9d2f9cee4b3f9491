"""moe-ep bench --deep-ep: what deep_ep's normal calls cost beside our own API doing the same work."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from .. import Communicator, Fp8Tokens, combine, dispatch, fp8, machine
from ..compat.deep_ep import Buffer, Config, ElasticBuffer
from ..errors import InvalidInput
from ..functional import dispatch_backward
from ..launch import inside_launch
from .measure import Operation, Stopwatch, gather, median, time_operations
from .ranks import process_group, run_on_ranks
from .results import write
from .table import print_table
from .workload import Workload

SIZES = {"num_tokens": 4096, "hidden": 7168, "num_topk": 8, "num_experts": 256, "expert_alignment": 16}
NUM_SMS = 24

_ITERATIONS = 20
_ENQUEUED = 10
_NUM_INPUTS = 3
_HEAD_START = 4_000_000  # clock cycles: 2 ms, more than any call takes the host
_PROFILED = 7
_HEADER = (
    "interface",
    "call",
    "dtype",
    "ours",
    "GPU us",
    "more",
    "ours: kernels",
    "kernels",
    "more",
    "ours: host",
    "host",
)
_NUM_TEXTS = 3

LEGEND = """\
GPU us: events around the call, the slowest rank. kernels: its kernels alone, added up. They differ by the time in which
the GPU waits for the host, as it does in a first call of exact sizes, for which the host waits in between. ours:
moe_ep's own call for the same work: layout, dtype, sizes, SMs, and weights where both have them. first: exchanges its
routing, with exact or static sizes; cached: by a handle. host: us of a call among many, its waits included."""


@dataclass(frozen=True)
class Comparison:
    """Microseconds of the slowest rank; ``ours`` None where moe_ep has no such call, kernels' on a CPU."""

    interface: str
    call: str
    dtype: str
    ours_us: float | None
    us: float
    ours_kernels_us: float | None
    kernels_us: float | None
    ours_host_us: float | None
    host_us: float


@dataclass(frozen=True)
class Pair:
    """A call of deep_ep, and ours."""

    interface: str
    call: str
    dtype: str
    ours: Operation | None
    theirs: Operation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--deep-ep",
        action="store_true",
        help="time deep_ep's normal calls instead, beside our own for the same work; takes the sizes, one "
        f"--num-tokens, one --num-sms ({NUM_SMS}) and --iterations",
    )


def run(args: argparse.Namespace) -> int:
    if args.png is not None:
        raise InvalidInput("--png is not for --deep-ep, which draws nothing; its table has --json")
    for name in ("num_tokens", "num_sms"):
        values = getattr(args, name)
        if values is not None and (len(values) > 1 or not isinstance(values[0], int)):
            given = ",".join(map(str, values))
            raise InvalidInput(f"--{name.replace('_', '-')} is {given}; --deep-ep takes one number")
    if args.device != "cpu" and not inside_launch() and torch.cuda.device_count() < args.nproc:
        raise InvalidInput(
            f"--deep-ep needs a GPU for each of --nproc {args.nproc} ranks; there are {torch.cuda.device_count()}. "
            "--device cpu times the calls on CPUs"
        )
    text = run_on_ranks(args.nproc, run_rank, args)
    if text is not None:
        report(json.loads(text))
        if args.json is not None:
            write(text, args.json)
    return 0


def run_rank(args: argparse.Namespace, command: str | None) -> str | None:
    """Measure on this rank, one of those that were launched. Rank 0 returns the results as JSON, the others None."""
    with process_group(args.device or "cuda") as (rank, size):
        on_gpu = args.device != "cpu"
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        sizes = {name: getattr(args, name) or default for name, default in SIZES.items()}
        if args.num_tokens:
            sizes["num_tokens"] = args.num_tokens[0]
        num_sms = args.num_sms[0] if args.num_sms else NUM_SMS
        iterations = min(args.iterations, _ITERATIONS)
        with torch.no_grad(), Calls(sizes, num_sms, size, device) as calls:
            rows = [_compare(pair, iterations, device) for pair in calls.pairs()]
        results = {
            "machine": machine.facts(device, command),
            "ranks": size,
            "sizes": sizes,
            "num_sms": num_sms,
            "calls": [asdict(row) for row in rows],
        }
        return json.dumps(results, indent=2) + "\n" if rank == 0 else None


def report(results: dict[str, Any]) -> None:
    m, sizes = results["machine"], results["sizes"]
    print(f"{results['ranks']} ranks, {m['device']}, torch {m['torch']}, CUDA {m['cuda']}, {m['date']}")
    print(
        f"{sizes['num_tokens']} tokens of width {sizes['hidden']}, top-{sizes['num_topk']} of {sizes['num_experts']} "
        f"experts, expanded rows aligned to {sizes['expert_alignment']}, {results['num_sms']} SMs"
    )
    print(f"$ {m['command']}")
    rows = [Comparison(**row) for row in results["calls"]]
    interfaces = dict.fromkeys(row.interface for row in rows)
    groups = [[_line(row) for row in rows if row.interface == each] for each in interfaces]
    print_table(_HEADER, groups, _NUM_TEXTS)
    print(LEGEND)


def _line(row: Comparison) -> tuple[str, ...]:
    numbers = (
        *_with_difference(row.ours_us, row.us),
        *_with_difference(row.ours_kernels_us, row.kernels_us),
        row.ours_host_us,
        row.host_us,
    )
    return row.interface, row.call, row.dtype, *("-" if n is None else f"{n:.1f}" for n in numbers)


def _with_difference(ours: float | None, theirs: float | None) -> tuple[float | None, ...]:
    return ours, theirs, None if ours is None or theirs is None else theirs - ours


def _compare(pair: Pair, iterations: int, device: torch.device) -> Comparison:
    # In turns, so that neither finds its input in a cache by the other.
    operations = {"theirs": lambda i: pair.theirs(2 * i)}
    if pair.ours is not None:
        operations["ours"] = lambda i: pair.ours(2 * i + 1)
    us = time_operations(operations, iterations, device, head_start=_HEAD_START)
    kernels_us = {name: _kernels_us(operation, device) for name, operation in operations.items()}
    host_us = {name: _host_us(operation, device) for name, operation in operations.items()}
    return Comparison(
        pair.interface,
        pair.call,
        pair.dtype,
        us["ours"].max_us if pair.ours is not None else None,
        us["theirs"].max_us,
        kernels_us.get("ours"),
        kernels_us["theirs"],
        host_us.get("ours"),
        host_us["theirs"],
    )


def _kernels_us(operation: Operation, device: torch.device) -> float | None:
    us = gather(Stopwatch(device, _HEAD_START).kernels_us(operation, _PROFILED))
    return None if None in us else max(us)


def _host_us(operation: Operation, device: torch.device) -> float:
    watch = Stopwatch(device)
    return max(gather(median([watch.enqueue_us(operation, _ENQUEUED) for _ in range(3)])))


class Calls:
    """The calls, on inputs that take turns so that none is found in a cache."""

    def __init__(self, sizes: dict[str, int], num_sms: int, num_ranks: int, device: torch.device) -> None:
        self._sizes, self._num_sms = sizes, num_sms
        group = dist.group.WORLD
        tokens, hidden, topk = sizes["num_tokens"], sizes["hidden"], sizes["num_topk"]
        self._experts = sizes["num_experts"]
        self._static_rows = num_ranks * tokens
        self._comm = Communicator(
            group, hidden=hidden, max_tokens_per_rank=tokens, num_experts=self._experts, num_topk=topk
        )
        self._buffer = Buffer(group, explicitly_destroy=True)
        self._elastic = ElasticBuffer(
            group, num_max_tokens_per_rank=tokens, hidden=hidden, num_topk=topk, explicitly_destroy=True
        )
        workload = Workload(tokens, hidden, topk, self._experts, "bfloat16", "rank", 1.0)
        rank = self._comm.rank
        self._inputs: dict[str, list[torch.Tensor | Fp8Tokens]] = {
            "bfloat16": workload.inputs(rank, device, _NUM_INPUTS)
        }
        self._inputs["fp8"] = [fp8.quantize(x) for x in self._inputs["bfloat16"]]
        self._topk_idx = workload.topk_idx(rank, num_ranks).to(device)
        self._weights = torch.rand(self._topk_idx.shape, device=device)
        self._config = Config(num_sms=num_sms)

    def __enter__(self) -> Calls:
        return self

    def __exit__(self, *_exc) -> None:
        self._buffer.destroy()
        self._elastic.destroy()
        self._comm.close()

    def pairs(self) -> Iterator[Pair]:
        yield from self._v1()
        yield from self._v2("V2, plain", expands=False)
        yield from self._v2("V2, expanded", expands=True)

    def _v1(self) -> Iterator[Pair]:
        ids, weights = self._topk_idx, self._weights

        def get_layout(_i: int = 0) -> tuple:
            return self._buffer.get_dispatch_layout(ids, self._experts)

        per_rank, per_node, per_expert, in_rank, _ = get_layout()
        layout = {
            "num_tokens_per_rank": per_rank,
            "num_tokens_per_rdma_rank": per_node,
            "num_tokens_per_expert": per_expert,
            "is_token_in_rank": in_rank,
        }

        def first(x: object, num_worst_tokens: int = 0) -> tuple:
            return self._buffer.dispatch(
                x,
                **layout,
                topk_idx=ids,
                topk_weights=weights,
                num_worst_tokens=num_worst_tokens,
                config=self._config,
            )

        yield Pair("V1", "get_dispatch_layout", "-", None, get_layout)
        own = {"layout": "rank"}
        static = self._static_rows
        for dtype in self._inputs:
            handle = first(self._theirs(dtype)(0))[4]
            yield self._first("V1", "dispatch, first", dtype, first, own)
            yield self._first(
                "V1",
                "dispatch, first, static",
                dtype,
                lambda x: first(x, static),
                own | {"max_recv_rows": static},
            )
            yield self._cached(
                "V1",
                dtype,
                lambda x, handle=handle: self._buffer.dispatch(x, handle=handle, config=self._config),
                own,
                None,  # V1 sends no weights by a handle
            )
        options = {"config": self._config}
        yield from self._combines("V1", handle, self._buffer.combine, own, options)

    def _v2(self, name: str, expands: bool) -> Iterator[Pair]:
        alignment = self._sizes["expert_alignment"] if expands else 1
        own = {"layout": "expert", "expert_alignment": alignment} if expands else {"layout": "rank"}
        theirs = {"topk_weights": self._weights, "do_expand": expands, "num_sms": self._num_sms}

        def first(x: object, **options: Any) -> tuple:
            return self._elastic.dispatch(
                x,
                self._topk_idx,
                num_experts=self._experts,
                expert_alignment=alignment,
                **theirs,
                **options,
            )

        for dtype in self._inputs:
            handle = first(self._theirs(dtype)(0))[3]
            yield self._first(name, "dispatch, first", dtype, first, own)
            if not expands:
                yield self._first(
                    name,
                    "dispatch, first, static",
                    dtype,
                    lambda x: first(x, do_cpu_sync=False),
                    own | {"max_recv_rows": self._static_rows},
                )
            yield self._cached(
                name,
                dtype,
                lambda x, handle=handle: self._elastic.dispatch(x, handle=handle, **theirs),
                own,
                self._weights,
            )
        yield from self._combines(name, handle, self._elastic.combine, own, {"num_sms": self._num_sms})

    def _first(
        self, interface: str, call: str, dtype: str, theirs: Callable[[Any], object], own: dict[str, Any]
    ) -> Pair:
        x, inputs = self._theirs(dtype), self._inputs[dtype]

        def ours(i: int) -> object:
            return dispatch(
                inputs[i % len(inputs)],
                self._topk_idx,
                self._weights,
                self._comm,
                num_sms=self._num_sms,
                **own,
            )

        return Pair(interface, call, dtype, ours, lambda i: theirs(x(i)))

    def _cached(
        self,
        interface: str,
        dtype: str,
        theirs: Callable[[Any], object],
        own: dict[str, Any],
        weights: torch.Tensor | None,
    ) -> Pair:
        x, inputs = self._theirs(dtype), self._inputs[dtype]
        handle = self._own_handle(own)

        def ours(i: int) -> object:
            return dispatch(
                inputs[i % len(inputs)], None, weights, self._comm, handle=handle, num_sms=self._num_sms
            )

        return Pair(interface, "dispatch, cached", dtype, ours, lambda i: theirs(x(i)))

    def _combines(
        self,
        interface: str,
        handle: object,
        theirs: Callable[..., object],
        own: dict[str, Any],
        options: dict[str, Any],
    ) -> Iterator[Pair]:
        own_handle = self._own_handle(own)
        like = self._inputs["bfloat16"][0]
        shape = (own_handle.num_rows, like.shape[1])
        count = 1 if own["layout"] == "expert" else _NUM_INPUTS
        rows = [torch.randn(shape, dtype=like.dtype, device=like.device) for _ in range(count)]
        of_row = () if own["layout"] == "expert" else (self._topk_idx.shape[1],)
        weights = torch.rand((own_handle.num_rows, *of_row), device=like.device)
        sms = {"num_sms": self._num_sms}
        yield Pair(
            interface,
            "combine",
            "bfloat16",
            lambda i: combine(rows[i % count], own_handle, **sms),
            lambda i: theirs(rows[i % count], handle, **options),
        )
        yield Pair(
            interface,
            "combine, weights",
            "bfloat16",
            lambda i: dispatch_backward(rows[i % count], weights, own_handle, **sms),
            lambda i: theirs(rows[i % count], handle, topk_weights=weights, **options),
        )

    def _own_handle(self, own: dict[str, Any]) -> Any:
        return dispatch(self._inputs["bfloat16"][0], self._topk_idx, self._weights, self._comm, **own).handle

    def _theirs(self, dtype: str) -> Callable[[int], object]:
        """Input i as deep_ep has it."""
        inputs = self._inputs[dtype]

        def x(i: int) -> object:
            tokens = inputs[i % len(inputs)]
            return (tokens.data, tokens.scale_inv) if isinstance(tokens, Fp8Tokens) else tokens

        return x
