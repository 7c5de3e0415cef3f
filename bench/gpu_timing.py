"""A clock for a GPU: device time of a call, and the yardsticks it is held against."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from infinillm.kernels.reference import Table

REPEATS, SECONDS = 30, 1.5  # of one measurement, at most
CACHE_BYTES = 256 << 20  # more than any GPU's cache


def table_of(rows: Sequence[Sequence[int]], held: Sequence[int], size: int, device: torch.device) -> Table:
    """Sequences whose rows are at these positions, each over its first `held` blocks, shuffled over the pool."""
    blocks = torch.randperm(sum(held), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    firsts = torch.cat([torch.arange(n, dtype=torch.int32) * size for n in held])
    positions = torch.cat([torch.tensor(list(r), dtype=torch.int32) for r in rows])
    ends = [torch.tensor([0, *n], dtype=torch.int32).cumsum(0, dtype=torch.int32) for n in (list(map(len, rows)), held)]
    return Table(*(x.to(device) for x in (ends[0], positions, ends[1], blocks, firsts)))


class Clock:
    """Times calls on one device. `copy` in GB/s, read and written; `matmul` in TFLOP/s, bfloat16.

    On a CPU, where a rehearsal runs, times are of one call and yardsticks are 1.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.copy = self.matmul = 1.0
        self.processors = 4
        self.rehearsing = device.type != "cuda"
        if self.rehearsing:
            return
        self.processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._flush = torch.empty(CACHE_BYTES, dtype=torch.int8, device=device)
        self.copy, self.matmul = self._copy(), self._matmul()
        self.tidy()

    def _copy(self) -> float:
        pair = torch.zeros((2, 1 << 30), dtype=torch.int8, device=self.device)
        return pair.nbytes / self.time(lambda: pair[0].copy_(pair[1])) / 1e9

    def _matmul(self) -> float:
        pair = torch.randn((2, 8192, 8192), device=self.device).to(torch.bfloat16)
        return 2 * 8192**3 / self.time(lambda: pair[0] @ pair[1]) / 1e12

    def time(self, call: Callable[[], object], captured: bool = True) -> float:
        """Seconds of one call: of its kernels alone where `captured` in a graph, else as Python launches them."""
        if self.rehearsing:
            began = time.perf_counter()
            call()
            return time.perf_counter() - began
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles, and lets libraries settle
                call()
        torch.cuda.synchronize()
        run = call
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
            run = graph.replay
            run()
            torch.cuda.synchronize()
        times: list[float] = []
        until = time.monotonic() + SECONDS
        while len(times) < REPEATS and (len(times) < 5 or time.monotonic() < until):
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            if not captured:
                torch.cuda.synchronize()
            began.record()
            run()
            ended.record()
            ended.synchronize()
            times.append(began.elapsed_time(ended) / 1e3)
        return statistics.median(times)

    def room(self) -> float:
        """Bytes of memory free."""
        return torch.cuda.mem_get_info(self.device)[0] if not self.rehearsing else float("inf")

    def tidy(self) -> None:
        """Give back what nobody holds."""
        gc.collect()
        if not self.rehearsing:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
