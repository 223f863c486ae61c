"""The low-bit copy of K and V (KIVI with the paper's 1-bit levels), packed, and attention over it with stock torch ops.

A code is never shifted down to 0 .. 2^b - 1. Byte i of a group of g values holds the values i, i + nb, i + 2 nb, ...
(nb = g * b / 8 bytes), one in each *plane* of b bits, so one AND with the plane's mask leaves `code * 2^(e*b)`, which a
16-bit float holds exactly, and the values come out in their order. Scales never touch the unpacked codes:

    score of token t  =  sum_c (q_c * scale_c) * code_tc  +  sum_c q_c * zero_c      K: scale, zero per channel and group
    output channel c  =  sum_t (p_t * scale_t) * code_tc  +  sum_t p_t * zero_t      V: scale, zero per token and group

so the scales go to q and p, which are 16 times smaller than K and V, and `2^-(e*b)` to scores and outputs. One kernel
reads the codes and writes 16-bit numbers, one batched matmul reads them: what is left is what stock torch cannot fuse.
"""

from __future__ import annotations

from copy import copy
from typing import Iterator, NamedTuple

import torch
from torch import Tensor

PAGE = 64
# Tokens of one matmul of the V side: a batch of one sequence would otherwise give a GPU too few blocks to fill it.
SPLIT = 512
# Matrices of one batched matmul: more do not fit a dimension of a CUDA grid.
MAX_BATCH = 65535


class Format(NamedTuple):
    """b bits, groups of g values."""

    bits: int
    group: int

    @property
    def planes(self) -> int:
        return 8 // self.bits

    @property
    def bytes(self) -> int:
        """Of the codes of one group."""
        return self.group * self.bits // 8

    def masks(self) -> list[int]:
        return [(2**self.bits - 1) << (plane * self.bits) for plane in range(self.planes)]


def quantise(x: Tensor, fmt: Format) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., g] float32 to packed codes [..., nb] uint8, zero [...] and scale [...] fp16."""
    low, high = x.aminmax(dim=-1)
    top = 2**fmt.bits - 1
    if fmt.bits == 1:
        zero, scale = (3 * low + high) / 4, (high - low) / 2
    else:
        zero, scale = low, (high - low) / top
    zero, scale = zero.half(), scale.half()
    step = scale.float().unsqueeze(-1)
    codes = ((x - zero.float().unsqueeze(-1)) / step).round_().clamp_(0, top)
    codes = torch.where(step == 0, 0, codes).to(torch.uint8).unflatten(-1, (fmt.planes, fmt.bytes))
    packed = codes[..., 0, :].clone()
    for plane in range(1, fmt.planes):
        packed |= codes[..., plane, :] << (plane * fmt.bits)
    return packed, zero, scale


def dequantise(packed: Tensor, zero: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    """The definition, for tests: [..., g] float32."""
    codes = [(packed & mask) >> (plane * fmt.bits) for plane, mask in enumerate(fmt.masks())]
    return torch.cat(codes, -1).float() * scale.float().unsqueeze(-1) + zero.float().unsqueeze(-1)


class Pages:
    """The low-bit tokens of N heads (all layers of a cache, or a view of one); room for `capacity` tokens.

    T = capacity, Tg = T/g groups of tokens, Dg = D/g groups of channels.
    """

    def __init__(self, n: int, capacity: int, head_dim: int, fmt: Format, device: torch.device):
        def zeros(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        tg, dg = capacity // fmt.group, head_dim // fmt.group
        self.fmt = fmt
        self.k_codes = zeros(n, tg, head_dim, fmt.bytes, dtype=torch.uint8)  # codes run along tokens
        self.k_zero, self.k_scale = zeros(n, tg, head_dim), zeros(n, tg, head_dim)
        self.v_codes = zeros(n, dg, capacity, fmt.bytes, dtype=torch.uint8)  # codes run along channels
        self.v_zero, self.v_scale = zeros(n, dg, capacity), zeros(n, dg, capacity)

    def tensors(self) -> list[Tensor]:
        return [self.k_codes, self.k_zero, self.k_scale, self.v_codes, self.v_zero, self.v_scale]

    def of_heads(self, heads: slice) -> Pages:
        """A view of some heads."""
        view = copy(self)
        for name in ("k_codes", "k_zero", "k_scale", "v_codes", "v_zero", "v_scale"):
            setattr(view, name, getattr(self, name)[heads])
        return view

    def pack(self, heads: slice, start: int, k: Tensor, v: Tensor) -> None:
        """Quantise k, v [heads, tokens, D] and keep them from token `start` on (whole pages)."""
        g = self.fmt.group
        tokens, groups = slice(start, start + k.shape[1]), slice(start // g, (start + k.shape[1]) // g)
        codes, zero, scale = quantise(k.float().unflatten(1, (-1, g)).transpose(-1, -2), self.fmt)
        self.k_codes[heads, groups], self.k_zero[heads, groups], self.k_scale[heads, groups] = codes, zero, scale
        codes, zero, scale = quantise(v.float().unflatten(2, (-1, g)).transpose(1, 2), self.fmt)
        self.v_codes[heads, :, tokens], self.v_zero[heads, :, tokens] = codes, zero
        self.v_scale[heads, :, tokens] = scale


def matmul32(a: Tensor, b: Tensor) -> Tensor:
    """Batched a @ b with float32 sums that stay float32, also for 16-bit factors."""
    return torch.bmm(a, b) if a.dtype == torch.float32 else torch.bmm(a, b, out_dtype=torch.float32)


class Scratch:
    """Buffers that all layers and steps share; grown to the largest request, so that no step allocates."""

    def __init__(self, device: torch.device):
        self.device = device
        self.buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A dense tensor of this shape with undefined contents, valid until the name is taken again."""
        size = 1
        for extent in shape:
            size *= extent
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.dtype != dtype:
            buffer = self.buffers[name] = torch.empty(size, dtype=dtype, device=self.device)
        return buffer[:size].view(shape)

    def bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers.values())


class LowBitAttention:
    """Scores and weighted sums over `Pages`, in chunks of tokens whose unpacked codes fit `chunk_elements` numbers."""

    def __init__(self, fmt: Format, dtype: torch.dtype, scratch: Scratch, chunk_elements: int, compiled: bool = False):
        device = scratch.device
        self.fmt, self.dtype, self.scratch, self.chunk_elements = fmt, dtype, scratch, chunk_elements
        self.masks = torch.tensor(fmt.masks(), dtype=torch.uint8, device=device).unsqueeze(1)  # [planes, 1]
        planes = torch.arange(fmt.planes, device=device).repeat_interleave(fmt.bytes)
        self.unplane = torch.exp2(-fmt.bits * planes.float())  # [g]
        # All planes at once where launches cost; a constant mask vectorises better on the CPU (1.7 times). CUDA has no
        # bitwise_and whose result is of another type, so that takes two kernels there, or one if compiled.
        self.and_planes = self.and_copy if device.type == "cuda" else self.and_each
        if compiled:
            self.and_planes = torch.compile(self.and_copy, dynamic=True)

    def and_each(self, codes: Tensor, out: Tensor) -> None:
        for plane, mask in enumerate(self.fmt.masks()):
            torch.bitwise_and(codes, mask, out=out[..., plane, :])

    def and_copy(self, codes: Tensor, out: Tensor) -> None:
        out.copy_(codes.unsqueeze(-2) & self.masks)

    def unpack(self, codes: Tensor) -> Tensor:
        """codes [..., nb] to code * 2^(e*b) [..., g], dense."""
        out = self.scratch.take("unpacked", (*codes.shape[:-1], self.fmt.planes, self.fmt.bytes), self.dtype)
        self.and_planes(codes, out)
        return out.flatten(-2)

    def chunks(self, tokens: int, n_heads: int, head_dim: int) -> Iterator[slice]:
        """[0, tokens) as whole blocks of SPLIT tokens, as many at once as the scratch allows, then the rest."""
        step = max(SPLIT, self.chunk_elements // (n_heads * head_dim) // SPLIT * SPLIT)
        step = max(SPLIT, min(step, MAX_BATCH * self.fmt.group // n_heads // SPLIT * SPLIT))
        blocks = tokens // SPLIT * SPLIT
        for start in range(0, blocks, step):
            yield slice(start, min(start + step, blocks))
        if blocks < tokens:
            yield slice(blocks, tokens)

    def scores(self, q: Tensor, pages: Pages, tokens: int, out: Tensor) -> None:
        """q [N, M, D] (already over sqrt(D)) against tokens [0, tokens): out [N, M, >= tokens] float32."""
        n, m, d = q.shape
        g = self.fmt.group
        q32 = q.float()
        for chunk in self.chunks(tokens, n, d):
            groups = slice(chunk.start // g, chunk.stop // g)
            count = groups.stop - groups.start
            codes = self.unpack(pages.k_codes[:, groups])  # [N, count, D, g]
            scaled = self.scratch.take("scaled", (n, count, m, d), self.dtype)
            torch.mul(q.unsqueeze(1), pages.k_scale[:, groups].unsqueeze(2), out=scaled)
            raw = matmul32(scaled.view(n * count, m, d), codes.view(n * count, d, g)).view(n, count, m, g)
            zero = torch.bmm(q32, pages.k_zero[:, groups].float().transpose(1, 2))  # [N, M, count]
            part = out[:, :, chunk].unflatten(2, (count, g))
            torch.addcmul(zero.unsqueeze(-1), raw.transpose(1, 2), self.unplane, out=part)

    def weighted_sum(self, p: Tensor, pages: Pages, tokens: int, head_dim: int) -> Tensor:
        """p [N, M, >= tokens] float32 times V of [0, tokens): [N, M, D] float32."""
        n, m, _ = p.shape
        dg, g = head_dim // self.fmt.group, self.fmt.group
        codes_sum = p.new_zeros(n, dg, m, g)
        zero_sum = p.new_zeros(n, m, dg)
        for chunk in self.chunks(tokens, n, head_dim):
            width = min(SPLIT, chunk.stop - chunk.start)
            splits = (chunk.stop - chunk.start) // width
            codes = self.unpack(pages.v_codes[:, :, chunk])  # [N, Dg, splits * width, g]
            part = self.scratch.take("p", (n, splits, m, width), torch.float32)
            part.copy_(p[:, :, chunk].unflatten(2, (splits, width)).transpose(1, 2))
            scaled = self.scratch.take("scaled", (n, dg, splits, m, width), self.dtype)
            scale = pages.v_scale[:, :, chunk].unflatten(2, (splits, 1, width))
            torch.mul(part.unsqueeze(1), scale, out=scaled)
            sums = matmul32(scaled.view(-1, m, width), codes.view(-1, width, g))
            codes_sum += sums.view(n, dg, splits, m, g).sum(2)
            zero = self.scratch.take("zero", (n, splits, width, dg), torch.float32)
            zero.copy_(pages.v_zero[:, :, chunk].unflatten(2, (splits, width)).permute(0, 2, 3, 1))
            sums = torch.bmm(part.view(-1, m, width), zero.view(-1, width, dg))
            zero_sum += sums.view(n, splits, m, dg).sum(1)
        out = codes_sum.transpose(1, 2) * self.unplane + zero_sum.unsqueeze(-1)  # [N, M, Dg, g]
        return out.flatten(2)
