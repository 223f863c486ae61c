"""Prefill, pre-decode and decode step of the five modes (docs/method.md, "The three algorithms")."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import llama
from cache import Cache, Options
from llama import Model
from lowbit import Format, LowBitAttention, Scratch, matmul32
from streams import Lanes

# Rows of a prefill that pass through the MLP together: bounds its memory at long contexts.
PREFILL_ROWS = 8192


class Decoder:
    """A batch of B equally long sequences. M = rows * G: both tokens' query heads of one KV head, row by row."""

    def __init__(self, model: Model, options: Options, batch: int, capacity: int):
        c = model.config
        self.model, self.options, self.batch = model, options, batch
        self.lanes = Lanes(model.device)
        self.cache = Cache(c, options, batch, capacity, self.lanes)
        self.n_heads = batch * c.kv_heads
        # Attention computes in float32 on the CPU and in the cache's type on CUDA, with float32 scores and sums.
        self.dtype = c.kv_dtype if self.lanes.cuda else torch.float32
        self.scratch = Scratch(model.device)
        fmt = Format(options.bits, options.group)
        self.low = LowBitAttention(fmt, self.dtype, self.scratch, options.chunk_elements, options.compile)
        angles = torch.arange(capacity + 2, dtype=torch.float32).unsqueeze(1) * c.inv_freq
        # [positions, 1, D/2]; the middle dimension is heads.
        self.cos, self.sin = (f(angles).unsqueeze(1).to(model.device) for f in (torch.cos, torch.sin))
        self.positions = torch.arange(capacity + 2, device=model.device)
        self.trace: list[list[list[list[int]]]] | None = None  # [pass][layer][KV head] of sequence 0
        compiled = torch.compile if options.compile else lambda f: f
        self.norm_qkv_rope, self.out_mlp = compiled(llama.norm_qkv_rope), compiled(llama.out_mlp)

    # Passes

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> Tensor:
        """ids [B, n] into an empty cache; logits of the last position [B, vocab]."""
        self.cache.begin_prefill(ids.shape[1])
        last = torch.cat([self.prefill_one(b, ids[b : b + 1]) for b in range(self.batch)])
        self.cache.end_prefill()
        return llama.logits(self.model, last)

    def prefill_one(self, b: int, ids: Tensor) -> Tensor:
        """ids [1, n]; the last hidden state [1, hidden]."""
        c, n = self.model.config, ids.shape[1]
        heads = slice(b * c.kv_heads, (b + 1) * c.kv_heads)
        x = F.embedding(ids, self.model.embed)
        for i, layer in enumerate(self.model.layers):
            cos, sin = self.cos[:n], self.sin[:n]
            q, k, v = llama.norm_qkv_rope(x, layer.norm, layer.qkv, cos, sin, c.heads, c.kv_heads, c.eps)
            k, v = (t.to(c.kv_dtype).transpose(1, 2) for t in (k, v))  # [1, Hkv, n, D]
            self.cache.store(i, heads, k[0], v[0])
            q, k, v = q.to(self.dtype).transpose(1, 2), k.to(self.dtype), v.to(self.dtype)
            attention = self.causal(q, k, v).transpose(1, 2).flatten(2).to(self.model.dtype)
            for start in range(0, n, PREFILL_ROWS):
                rows = slice(start, start + PREFILL_ROWS)
                weights = layer.out, layer.mlp_norm, layer.gate_up, layer.down
                x[:, rows] = llama.out_mlp(x[:, rows], attention[:, rows], *weights, c.eps)
        return x[:, -1]

    def causal(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Exact attention of a prompt, [1, heads, n, D]."""
        n, window = q.shape[2], self.model.config.window
        if window is None or n <= window:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        at = self.positions[:n]
        sees = (at <= at.unsqueeze(1)) & (at > at.unsqueeze(1) - window)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=sees, enable_gqa=True)

    @torch.no_grad()
    def pre_decode(self, tokens: Tensor) -> Tensor:
        """T_1 [B] alone: chooses the prefetch of the first step; logits [B, vocab], whose argmax is T'_2."""
        return self.forward(tokens.unsqueeze(1), pre=True)[:, 0]

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """T_t and, in `specache`, T'_{t+1}: tokens [B, rows]; logits [B, rows, vocab]. Queues everything, waits for
        nothing (but see HostFetch and `fetch`)."""
        logits = self.forward(tokens)
        self.cache.advance()
        return logits

    def first(self, logits: Tensor) -> Tensor:
        """From the prefill's logits [B, vocab] to the tokens of the first step [B, rows]."""
        tokens = logits.argmax(-1)
        if self.options.mode != "specache":
            return tokens.unsqueeze(1)
        return torch.stack([tokens, self.pre_decode(tokens).argmax(-1)], 1)

    def forward(self, tokens: Tensor, pre: bool = False) -> Tensor:
        """All layers. `pre`: one row that reads no prefetched pairs."""
        c, cache, rows = self.model.config, self.cache, tokens.shape[1]
        cos, sin = self.cos[cache.n : cache.n + rows], self.sin[cache.n : cache.n + rows]
        if self.trace is not None:
            self.trace.append([])
        x = F.embedding(tokens, self.model.embed)  # [B, rows, hidden]
        for i, layer in enumerate(self.model.layers):
            q, k, v = self.norm_qkv_rope(x, layer.norm, layer.qkv, cos, sin, c.heads, c.kv_heads, c.eps)
            cache.append(i, k, v)
            q = q.unflatten(2, (c.kv_heads, c.group_heads)).transpose(1, 2) * c.head_dim**-0.5
            q = q.to(self.dtype).reshape(self.n_heads, -1, c.head_dim)  # [N, M, D]
            attend = self.mixed if self.options.low_bit else self.exact
            attention = attend(i, q, rows, pre).view(self.batch, c.kv_heads, rows, -1).transpose(1, 2)
            attention = attention.reshape(self.batch, rows, -1).to(self.model.dtype)
            x = self.out_mlp(x, attention, layer.out, layer.mlp_norm, layer.gate_up, layer.down, c.eps)
        return llama.logits(self.model, x)

    # Attention of a step

    def first_visible(self, row: int) -> int:
        """The first position that a row sees."""
        window = self.model.config.window
        return 0 if window is None else max(0, self.cache.n + row - window + 1)

    def exact(self, layer: int, q: Tensor, rows: int, pre: bool) -> Tensor:
        """`full` and `offload`: 16-bit pairs, one row; q [N, M, D] to [N, M, D]."""
        cache, d = self.cache, q.shape[2]
        pairs = cache.loads.arrive(layer) if cache.loads else cache.tail_of(layer, 1)
        k, v = pairs[:, self.first_visible(0) :].split(d, -1)
        # The query heads of a KV head stand in the place of queries, so that K and V are read once.
        shape = (self.batch, -1)
        q, k, v = (t.unflatten(0, shape) for t in (q, self.widened("k", k), self.widened("v", v)))
        out = F.scaled_dot_product_attention(q, k, v, scale=1.0).flatten(0, 1)
        if cache.loads:
            cache.loads.done(layer)
        return out

    def widened(self, name: str, x: Tensor) -> Tensor:
        """x in the type that attention computes in: itself on CUDA, float32 in a reused buffer on the CPU (a fresh one
        of many megabytes costs more in page faults than the copy does)."""
        if x.dtype == self.dtype:
            return x
        return self.scratch.take(name, tuple(x.shape), self.dtype).copy_(x)

    def mixed(self, layer: int, q: Tensor, rows: int, pre: bool) -> Tensor:
        """`kivi`, `fetch`, `specache`: q [N, M, D] to [N, M, D] float32; chooses and fetches."""
        cache, options, d = self.cache, self.options, q.shape[2]
        nq = cache.nq
        pages = cache.layer_pages(layer)
        tail_k, tail_v = self.widened("tail", cache.tail_of(layer, rows)).split(d, -1)  # [N, tail, D]
        scores = self.scratch.take("scores", (*q.shape[:2], nq + tail_k.shape[1]), torch.float32)
        self.low.scores(q, pages, nq, scores)
        scores[:, :, nq:] = matmul32(q, tail_k.transpose(1, 2))
        if rows == 2:
            scores[:, : self.model.config.group_heads, -1] = float("-inf")  # row 0 does not see row 1
        self.hide_behind_window(scores, rows)
        fetched = cache.fetch.arrive(layer) if cache.fetch and options.mode == "specache" and not pre else None
        if options.mode == "fetch" and cache.fetch and nq:
            self.choose(layer, self.softmax(scores), rows, nq)
            fetched = cache.fetch.arrive(layer)
        if fetched is None:
            p = self.softmax(scores)
            self.choose_ahead(layer, p, rows)
            out = self.low.weighted_sum(p, pages, nq, d)
        else:
            positions, pairs = fetched
            at = positions.unsqueeze(1).expand(-1, q.shape[1], -1)  # [N, M, k]
            k, v = self.widened("pairs", pairs).split(d, -1)
            scores.scatter_(2, at, matmul32(q, k.transpose(1, 2)))
            self.hide_behind_window(scores, rows)
            p = self.softmax(scores)
            p_fetched = p.gather(2, at)
            out = matmul32(p_fetched.to(self.dtype), v)
            self.choose_ahead(layer, p, rows)
            p.scatter_(2, at, 0.0)
            out += self.low.weighted_sum(p, pages, nq, d)
        return out + matmul32(p[:, :, nq:].to(self.dtype), tail_v)

    def softmax(self, scores: Tensor) -> Tensor:
        return torch.softmax(scores, -1, out=self.scratch.take("probabilities", scores.shape, torch.float32))

    def hide_behind_window(self, scores: Tensor, rows: int) -> None:
        c = self.model.config
        for row in range(rows if c.window is not None else 0):
            of_row = slice(row * c.group_heads, (row + 1) * c.group_heads)
            scores[:, of_row, : self.first_visible(row)] = float("-inf")

    # Selection

    def choose_ahead(self, layer: int, p: Tensor, rows: int) -> None:
        """`specache`: the last row chooses for the next step."""
        if self.options.mode == "specache":
            self.choose(layer, p, rows, self.cache.no)

    def choose(self, layer: int, p: Tensor, rows: int, end: int) -> None:
        """The k positions below `end` with the most attention of the last row, p [N, M, T], and their fetch."""
        fetch, first = self.cache.fetch, self.first_visible(rows - 1)
        count = min(self.options.top_k, end - first)
        if fetch is None or count <= 0:
            if fetch:
                fetch.chosen[layer] = None
            self.note(layer, None)
            return
        mean = p[:, -self.model.config.group_heads :, first:end].mean(1)  # [N, candidates]
        positions = first + self.top_k(mean, count)
        fetch.begin(layer, positions)
        self.note(layer, positions)

    def top_k(self, mean: Tensor, count: int) -> Tensor:
        """Indices [N, count], in no order. torch.topk leaves open which of equal values it takes; a key of the number's
        bits (probabilities are not negative, so they sort like integers) above the negated index does not."""
        if self.options.exact_ties:
            index = self.positions[: mean.shape[1]]
            mean = (mean.view(torch.int32).to(torch.int64) << 32) - index
        return mean.topk(count, sorted=False).indices

    def note(self, layer: int, positions: Tensor | None) -> None:
        if self.trace is not None:
            heads = range(self.model.config.kv_heads)
            self.trace[-1].append([[] if positions is None else sorted(positions[h].tolist()) for h in heads])

    # Bookkeeping

    def stalls(self) -> Any:
        source = self.cache.fetch or self.cache.loads
        return source.stalls if source else None

    def fetched_bytes(self) -> int:
        source = self.cache.fetch or self.cache.loads
        return source.bytes if source else 0
