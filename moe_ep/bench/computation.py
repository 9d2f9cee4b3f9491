"""The time of communication and computation side by side."""

from __future__ import annotations

import torch

from .measure import Operation, Stopwatch

_SHAPE = (4096, 2048, 4096)  # about 0.1 ms on an H200, in several waves of tiles


class Computation:
    """A loop of bfloat16 matmuls on a stream of its own, as the other half of a batch would run them."""

    def __init__(self, device: torch.device) -> None:
        rows, inner, columns = _SHAPE if device.type == "cuda" else (64, 64, 64)
        self._a = torch.randn(rows, inner, device=device).bfloat16()
        self._b = torch.randn(inner, columns, device=device).bfloat16()
        self._out = torch.empty(rows, columns, device=device, dtype=torch.bfloat16)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def run(self, count: int) -> None:
        """On the current stream."""
        for _ in range(count):
            torch.mm(self._a, self._b, out=self._out)

    def beside(
        self, operation: Operation, calls: int, matmuls: int, side_stream: torch.cuda.Stream | None
    ) -> Operation:
        """An operation that ends when ``calls`` of the given one and ``matmuls`` have, begun together.

        Communication has a stream of high priority (`Communicator.stream`), so its blocks get the SMs that come
        free first. On a CPU, one after the other.
        """

        def both(i: int) -> None:
            if self._stream is None or side_stream is None:
                for call in range(calls):
                    operation(i * calls + call)
                self.run(matmuls)
                return
            current = torch.cuda.current_stream()
            for stream in (side_stream, self._stream):
                stream.wait_stream(current)
            with torch.cuda.stream(side_stream):
                for call in range(calls):
                    operation(i * calls + call)
            with torch.cuda.stream(self._stream):
                self.run(matmuls)
            for stream in (side_stream, self._stream):
                current.wait_stream(stream)

        return both

    def matmul_us(self, watch: Stopwatch) -> float:
        """Time of one matmul alone, on this rank."""
        many = 20
        times = [watch.device_us(lambda _: self.run(many), i) / many for i in range(5)]
        return min(times)
