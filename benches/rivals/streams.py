"""Streams and events that do nothing on the CPU, and the fetch of chosen 16-bit pairs from host memory."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


class Lanes:
    """The compute stream (torch's current one) and beside it `down` (device to host) and `up` (host to device).

    Two copy streams instead of the paper's one: on a single one, the copy up of layer l would queue behind the copy of
    layer l + 1's indices down, which waits for layer l + 1's attention.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.cuda = device.type == "cuda"
        self.down = torch.cuda.Stream(device) if self.cuda else None
        self.up = torch.cuda.Stream(device) if self.cuda else None

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream) if self.cuda else nullcontext()

    def record(self, stream: Any = None) -> Any:
        """An event at the end of what `stream` (None: the current one) has been given so far."""
        if not self.cuda:
            return None
        event = torch.cuda.Event()
        event.record(stream or torch.cuda.current_stream(self.device))
        return event

    def wait(self, event: Any, stream: Any = None) -> None:
        """All later work of `stream` (None: the current one) waits for `event`."""
        if event is not None:
            (stream or torch.cuda.current_stream(self.device)).wait_event(event)


def pinned(shape: tuple[int, ...], dtype: torch.dtype, lanes: Lanes) -> Tensor:
    """Page-locked host memory, zeroed.

    Registered rather than allocated: torch's pinned allocator rounds every block up to a power of two. Stays registered
    until the process ends.
    """
    tensor = torch.zeros(shape, dtype=dtype)
    if lanes.cuda and tensor.nbytes:
        error = int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0))
        if error:
            raise MemoryError(f"cudaHostRegister of {tensor.nbytes} bytes: CUDA error {error}")
    return tensor


class Stalls:
    """Time that the compute stream waits for copies: between two events around each wait (CUDA), or wall time (CPU)."""

    def __init__(self, lanes: Lanes):
        self.lanes = lanes
        self.reset()

    def reset(self) -> None:
        self.pairs: list[tuple[Any, Any]] = []
        self.seconds = 0.0

    def __enter__(self) -> None:
        self.begun = self.mark()

    def __exit__(self, *_: object) -> None:
        end = self.mark()
        if self.lanes.cuda:
            self.pairs.append((self.begun, end))
        else:
            self.seconds += end - self.begun

    def mark(self) -> Any:
        if not self.lanes.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def total_ms(self) -> float:
        """Call it after a synchronisation."""
        return sum(a.elapsed_time(b) for a, b in self.pairs) + 1e3 * self.seconds


class HostFetch:
    """Chosen rows of the host copy, gathered by `index_select` and copied up, one layer at a time.

    The host needs the indices before it can gather: `begin` sends them down, and somebody must wait for their event.
    `inline`: the main thread waits, so the GPU runs out of queued work once per layer. `thread`: a worker waits and
    gathers, and the main thread goes on queueing; it meets the worker in `arrive`, a step later. (Both waits are part of
    what stock torch costs: it has no kernel that reads rows of pinned memory from the GPU.)
    """

    def __init__(self, host: list[Tensor], top_k: int, lanes: Lanes, policy: str):
        """`host[l]` is [tokens, N, 2 D]."""
        _, self.n, width = host[0].shape
        dtype, rows = host[0].dtype, self.n * top_k
        self.lanes, self.stalls = lanes, Stalls(lanes)
        # Rows as 8-byte words: index_select copies these faster than 16-bit numbers (1.2 times on the CPU).
        self.host = [h.view(-1, width).view(torch.int64) for h in host]
        self.rows_down = [pinned((rows,), torch.int64, lanes) for _ in host]
        self.rows = [torch.empty(rows, dtype=torch.int64, device=lanes.device) for _ in host]
        self.staging = [pinned((rows, width), dtype, lanes) for _ in host]
        self.pairs = [torch.empty(rows, width, dtype=dtype, device=lanes.device) for _ in host]
        self.head = torch.arange(self.n, device=lanes.device).unsqueeze(1)  # [N, 1]
        self.pool = ThreadPoolExecutor(1) if policy == "thread" else None
        self.reset()

    def reset(self) -> None:
        self.chosen: list[Tensor | None] = [None] * len(self.host)
        self.pending: list[Future[Any] | Any] = [None] * len(self.host)
        self.bytes = 0

    def begin(self, layer: int, positions: Tensor) -> None:
        """`positions` [N, k] on the device; what `arrive` gave before for this layer must not be read any more."""
        count = positions.numel()
        self.chosen[layer] = positions
        self.bytes += count * self.staging[layer].shape[1] * self.staging[layer].element_size()
        rows = self.rows[layer][:count]
        torch.add(self.head, positions, alpha=self.n, out=rows.view(positions.shape))
        self.lanes.wait(self.lanes.record(), self.lanes.down)
        with self.lanes.on(self.lanes.down):
            self.rows_down[layer][:count].copy_(rows, non_blocking=True)
            down = self.lanes.record(self.lanes.down)
        job = (layer, count, down)
        self.pending[layer] = self.pool.submit(self.gather, *job) if self.pool else self.gather(*job)

    def gather(self, layer: int, count: int, down: Any) -> Any:
        """Wait for the indices, gather, start the copy up; gives its event. Runs on the worker."""
        if down is not None:
            down.synchronize()
        staging = self.staging[layer][:count]
        torch.index_select(self.host[layer], 0, self.rows_down[layer][:count], out=staging.view(torch.int64))
        with self.lanes.on(self.lanes.up):
            self.pairs[layer][:count].copy_(staging, non_blocking=True)
            return self.lanes.record(self.lanes.up)

    def arrive(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """The positions [N, k] of the last `begin` and their pairs [N, k, 2 D]; the compute stream waits for them."""
        positions = self.chosen[layer]
        if positions is None:
            return None
        with self.stalls:
            pending = self.pending[layer]
            self.lanes.wait(pending.result() if isinstance(pending, Future) else pending)
        return positions, self.pairs[layer][: positions.numel()].view(*positions.shape, -1)
