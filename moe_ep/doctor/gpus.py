"""The GPUs of this machine: what they are, which reach which, by what, and how fast."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

from ..machine import command_output, driver_version
from .report import Fact

SECTION = "GPUs"
_COPY_BYTES = 256 << 20
_COPIES = 6

Pair = tuple[int, int]


def facts() -> Iterable[Fact]:
    count = torch.cuda.device_count()
    if count == 0:
        reason = (
            "torch is built for CPUs only" if torch.version.cuda is None else "torch finds no GPU it can use"
        )
        yield Fact(SECTION, "devices", f"none: {reason}", remedy="for GPUs, install a CUDA build of torch")
        return
    yield Fact(SECTION, "driver", driver_version())
    for index in range(count):
        device = torch.cuda.get_device_properties(index)
        yield Fact(
            SECTION,
            f"cuda:{index}",
            f"{device.name}, compute capability {device.major}.{device.minor}, "
            f"{device.total_memory / 2**30:.0f} GiB, {device.multi_processor_count} multiprocessors",
            ok=True,
        )
    if count == 1:
        return
    apart = unreachable_pairs()
    text = "every GPU reaches every other's memory"
    if apart:
        text = "not between " + ", ".join(f"{i} and {j}" for i, j in apart)
    yield Fact(SECTION, "peer access", text, ok=not apart)
    yield Fact(SECTION, "connections", describe_links(_links(count)))
    yield _rates(count, apart)


def unreachable_pairs() -> list[Pair]:
    """(i, j) where GPU i can't use GPU j's memory."""
    count = torch.cuda.device_count()
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
    return [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]


def _links(count: int) -> dict[Pair, str]:
    """What connects the GPUs, as `nvidia-smi topo` abbreviates it, by pairs of torch's indices."""
    topology = parse_topology(command_output("nvidia-smi", "topo", "-m", separator="\n"))
    listed = command_output("nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader", separator="\n")
    numbers = parse_uuids(listed)
    # CUDA_VISIBLE_DEVICES renumbers torch's GPUs, but not nvidia-smi's.
    names = [numbers.get(str(torch.cuda.get_device_properties(i).uuid)) for i in range(count)]
    return {
        (i, j): topology.get((names[i], names[j]), "unknown")
        for i in range(count)
        for j in range(i + 1, count)
    }


def parse_topology(text: str) -> dict[Pair, str]:
    """The matrix of ``nvidia-smi topo -m``: what connects GPU i and GPU j."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).split() for line in text.splitlines()]
    header = next((line for line in lines if line[:1] == ["GPU0"] and line[1:2] != ["X"]), [])
    columns = [int(name[3:]) for name in header if re.fullmatch(r"GPU\d+", name)]
    found = {}
    for line in lines:
        if line is header or not line or not re.fullmatch(r"GPU\d+", line[0]):
            continue
        for column, link in zip(columns, line[1:], strict=False):
            found[int(line[0][3:]), column] = link
    return found


def parse_uuids(text: str) -> dict[str, int]:
    """``index, GPU-uuid`` lines: the index by uuid."""
    pairs = (re.fullmatch(r"\s*(\d+),\s*GPU-(\S+)\s*", line) for line in text.splitlines())
    return {match[2]: int(match[1]) for match in pairs if match}


def describe_links(links: dict[Pair, str]) -> str:
    """Each kind of connection in words, with its pairs where there are several kinds."""
    kinds: dict[str, list[Pair]] = {}
    for pair, link in links.items():
        kinds.setdefault(_in_words(link), []).append(pair)
    if len(kinds) == 1:
        return f"{next(iter(kinds))} between all pairs"
    return "; ".join(f"{kind}: {', '.join(f'{i}-{j}' for i, j in pairs)}" for kind, pairs in kinds.items())


def _in_words(link: str) -> str:
    nvlink = re.fullmatch(r"NV(\d+)", link)
    if nvlink:
        return f"NVLink ({nvlink[1]} links)"
    pcie = {
        "PIX": "PCIe (one switch)",
        "PXB": "PCIe (several switches)",
        "PHB": "PCIe (through a CPU)",
        "NODE": "PCIe (across a NUMA node)",
        "SYS": "PCIe (across NUMA nodes)",
    }
    return pcie.get(link, f"{link} connection")


def _rates(count: int, apart: list[Pair]) -> Fact:
    neighbours = [(0, 1)] if count == 2 else [(i, (i + 1) % count) for i in range(count)]
    pairs = [pair for pair in neighbours if pair not in apart and pair[::-1] not in apart]
    name = "peer-to-peer copies"
    try:
        rates = {pair: copy_rate(*pair) for pair in pairs}
    except RuntimeError as error:  # of memory, or of the driver
        return Fact(SECTION, name, f"can't be measured: {str(error).splitlines()[0]}", ok=False)
    if not rates:
        return Fact(SECTION, name, "no neighbouring GPUs reach each other")
    texts = [f"{i}-{j} {rate:.0f}" for (i, j), rate in rates.items()]
    return Fact(SECTION, name, f"GB/s each way, both ways busy: {', '.join(texts)}", ok=True)


def copy_rate(i: int, j: int) -> float:
    """GB/s of copies from GPU i to j and from j to i at once; the slower way's."""
    runs = []
    for source, target in ((i, j), (j, i)):
        stream = torch.cuda.Stream(source)
        buffers = [torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=device) for device in (source, target)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        runs.append((stream, buffers, events))
    for index in (i, j):
        torch.cuda.synchronize(index)
    for is_warm in (False, True):
        for stream, (source, target), (begin, end) in runs:
            with torch.cuda.stream(stream):  # copies between GPUs run on the source's stream
                torch.cuda._sleep(1_000_000)
                begin.record(stream)
                for _ in range(_COPIES if is_warm else 1):
                    target.copy_(source, non_blocking=True)
                end.record(stream)
        for index in (i, j):
            torch.cuda.synchronize(index)
    slowest_ms = max(begin.elapsed_time(end) for _, _, (begin, end) in runs)
    return _COPIES * _COPY_BYTES / slowest_ms / 1e6
