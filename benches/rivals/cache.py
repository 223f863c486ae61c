"""The KV cache of a batch of equally long sequences, in five modes (docs/method.md).

Tokens [0, nq) are read low-bit (or, `offload`, from the host), [nq, n) from the 16-bit tail on the device; tokens
[0, no) are complete on the host. N = B * Hkv heads; a pair is K and V side by side, [2 D].
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llama import Config
from lowbit import PAGE, Format, Pages
from streams import HostFetch, Lanes, Stalls, pinned

MODES = ("full", "kivi", "offload", "fetch", "specache")


@dataclass(frozen=True)
class Options:
    mode: str = "specache"
    bits: int = 2
    group: int = 64
    residual: int = 64
    top_k: int = 64
    gather: str = "thread"
    exact_ties: bool = True
    chunk_elements: int = 1 << 20
    compile: bool = False

    @property
    def low_bit(self) -> bool:
        return self.mode in ("kivi", "fetch", "specache")

    @property
    def on_host(self) -> bool:
        return self.mode in ("offload", "fetch", "specache")

    @property
    def rows(self) -> int:
        return 2 if self.mode == "specache" else 1

    def with_(self, **changes: object) -> Options:
        return replace(self, **changes)


class Cache:
    def __init__(self, config: Config, options: Options, batch: int, capacity: int, lanes: Lanes):
        c, o = config, options
        if o.low_bit and c.head_dim % o.group:
            raise SystemExit(f"--group {o.group} does not divide head_dim {c.head_dim}")
        self.config, self.options, self.lanes = config, options, lanes
        self.n_heads, self.n_layers = batch * c.kv_heads, c.layers
        self.n = self.no = self.nq = 0
        capacity = -(-capacity // PAGE) * PAGE
        # [nq, n) and both new rows are at most `tail` tokens; twice that, so that a move to the front never overlaps.
        tail = o.residual + 2 * PAGE + 2
        room = capacity + 2 if o.mode == "full" else 2 * tail + 8 * PAGE
        self.tail = self.device_empty(c.layers, self.n_heads, room, 2 * c.head_dim)
        self.tail_base = 0  # the position in slot 0 of the tail
        self.pages: Pages | None = None
        if o.low_bit:
            fmt = Format(o.bits, o.group)
            self.pages = Pages(c.layers * self.n_heads, capacity, c.head_dim, fmt, lanes.device)
        self.host: list[Tensor] = []
        self.fetch: HostFetch | None = None
        self.loads: LayerLoads | None = None
        if o.on_host:
            # Token-major, so that a prefix of tokens and a page are each one contiguous copy.
            shape = (capacity, self.n_heads, 2 * c.head_dim)
            self.host = [pinned(shape, c.kv_dtype, lanes) for _ in range(c.layers)]
            self.page = self.device_empty(c.layers, PAGE, *shape[1:])
            self.page_copied = None
        if o.mode in ("fetch", "specache") and o.top_k > 0:
            # `fetch` needs its pairs at once: a worker could only add a hand-over.
            self.fetch = HostFetch(self.host, o.top_k, lanes, "inline" if o.mode == "fetch" else o.gather)
        if o.mode == "offload":
            self.loads = LayerLoads(self, capacity)

    def device_empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.config.kv_dtype, device=self.lanes.device)

    def device_bytes(self) -> int:
        held = [self.tail] + (self.pages.tensors() if self.pages else [])
        held += self.fetch.pairs if self.fetch else []
        held += self.loads.buffers if self.loads else []
        held += [self.page] if self.host else []
        return sum(tensor.nbytes for tensor in held)

    def host_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.host)

    def layer_pages(self, layer: int) -> Pages:
        assert self.pages
        return self.pages.of_heads(slice(layer * self.n_heads, (layer + 1) * self.n_heads))

    # Prefill

    def begin_prefill(self, n: int) -> None:
        """An empty cache is about to get `n` tokens."""
        o = self.options
        self.n = n
        self.no = self.nq = 0 if o.mode == "full" else max(0, n - o.residual) // PAGE * PAGE
        self.tail_base = self.nq
        if self.fetch:
            self.fetch.reset()

    def store(self, layer: int, heads: slice, k: Tensor, v: Tensor) -> None:
        """All tokens of some heads of a layer: k, v [heads, n, D] in the cache's type."""
        no = self.no
        pairs = torch.cat([k, v], -1)
        self.tail[layer, heads, : self.n - no] = pairs[:, no:]
        if self.pages and no:
            self.layer_pages(layer).pack(heads, 0, k[:, :no], v[:, :no])
        if self.host and no:
            # Straight to pinned memory if it is all heads; through a CPU tensor otherwise.
            old = pairs[:, :no].transpose(0, 1).contiguous()
            whole = old.shape[1] == self.n_heads
            self.host[layer][:no, heads].copy_(old if whole else old.cpu())

    def end_prefill(self) -> None:
        if self.loads:
            self.loads.restart()

    # Decode

    def slot(self, position: int) -> int:
        return position - self.tail_base

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """k, v [B, rows, Hkv, D] at positions n ...; the next call overwrites row 1 (and what a pre-decode wrote)."""
        start, rows, d = self.slot(self.n), k.shape[1], k.shape[3]
        at = self.tail[layer, :, start : start + rows].unflatten(0, (-1, k.shape[2]))  # [B, Hkv, rows, 2 D]
        at[..., :d].copy_(k.transpose(1, 2))
        at[..., d:].copy_(v.transpose(1, 2))

    def tail_of(self, layer: int, rows: int, first: int | None = None) -> Tensor:
        """Pairs of [first, n + rows), from nq on unless told: a view [N, tokens, 2 D]."""
        first = self.nq if first is None else first
        return self.tail[layer, :, self.slot(first) : self.slot(self.n + rows)]

    def advance(self) -> None:
        """The end of a decode step."""
        self.nq = self.no
        self.n += 1
        if self.options.mode == "full":
            return
        if self.n - self.no >= self.options.residual + PAGE:
            self.offload_page()
            self.no += PAGE
        if self.slot(self.n) + 2 > self.tail.shape[2]:
            kept = self.n - self.nq
            self.tail[:, :, :kept] = self.tail[:, :, self.slot(self.nq) : self.slot(self.n)]
            self.tail_base = self.nq

    def offload_page(self) -> None:
        """Pack tokens [no, no + 64) of all layers, and send them to the host beside the next step."""
        start, d = self.slot(self.no), self.config.head_dim
        pairs = self.tail[:, :, start : start + PAGE]  # [L, N, 64, 2 D]
        if self.pages:
            k, v = pairs.flatten(0, 1).split(d, -1)
            self.pages.pack(slice(None), self.no, k, v)
        if self.host:
            self.lanes.wait(self.page_copied)  # the page before this one has left the buffer
            self.page.copy_(pairs.transpose(1, 2))
            self.lanes.wait(self.lanes.record(), self.lanes.down)
            with self.lanes.on(self.lanes.down):
                for layer, host in enumerate(self.host):
                    host[self.no : self.no + PAGE].copy_(self.page[layer], non_blocking=True)
            self.page_copied = self.lanes.record(self.lanes.down)


class LayerLoads:
    """`offload`: whole layers come back, two buffers, always one layer ahead, also across steps."""

    def __init__(self, cache: Cache, capacity: int):
        if cache.n_layers < 2:
            raise SystemExit("offload needs two layers")
        self.cache, self.lanes, self.stalls = cache, cache.lanes, Stalls(cache.lanes)
        shape = (capacity + 2, cache.n_heads, 2 * cache.config.head_dim)
        self.buffers = [cache.device_empty(*shape) for _ in range(2)]
        self.loaded = [None, None]
        self.bytes = 0
        self.turn = 0  # counts layers over all steps; parity names the buffer

    def restart(self) -> None:
        """The first two layers of the first step."""
        self.turn = 0
        for layer in range(2):
            self.begin(layer, layer, self.cache.nq)

    def begin(self, turn: int, layer: int, tokens: int) -> None:
        cache, lanes = self.cache, self.lanes
        lanes.wait(lanes.record(), lanes.up)  # the attention that read this buffer
        lanes.wait(cache.page_copied, lanes.up)  # what this reads on the host is there
        target, source = self.buffers[turn % 2][:tokens], cache.host[layer][:tokens]
        with lanes.on(lanes.up):
            target.copy_(source, non_blocking=True)
        self.loaded[turn % 2] = lanes.record(lanes.up)
        self.bytes += source.nbytes

    def arrive(self, layer: int) -> Tensor:
        """All pairs of the layer, [N, n + 1, 2 D]."""
        cache, buffer = self.cache, self.buffers[self.turn % 2]
        with self.stalls:
            self.lanes.wait(self.loaded[self.turn % 2])
        buffer[cache.nq : cache.n + 1].copy_(cache.tail_of(layer, 1).transpose(0, 1))
        return buffer[: cache.n + 1].transpose(0, 1)

    def done(self, layer: int) -> None:
        """The layer's attention has been queued: its buffer is for the layer after the next."""
        following = layer + 2
        # The next step reads from the host what is offloaded now; what this step's end offloads is still in the tail.
        tokens = self.cache.nq if following < self.cache.n_layers else self.cache.no
        self.begin(self.turn, following % self.cache.n_layers, tokens)
        self.turn += 1
