#!/usr/bin/env python3
"""SpeCache in stock PyTorch, as the paper built it and as well as it goes: the rival that the engine is compared with.

    torch_specache.py -m synthetic:llama-3-8b --device cuda --mode specache --bits 2 -d 32768 -b 8 -n 64
    torch_specache.py -m DIR --check tests/fixtures/golden

The first times decode steps and prints one JSON object; the second compares teacher-forced logits and selections with
the golden case, exit status 1 if they differ. benches/rivals/README.md says what is measured, and why it is fair.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cache import MODES, Options
from check import check
from decoder import Decoder
from llama import Model

WARM_UP = 4
# With --compile: past a page, so that no shape of a step is new later on.
WARM_UP_COMPILED = 72


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, number = parser.add_argument, dict(type=int, metavar="N")
    add("-m", "--model", default="synthetic:tiny", metavar="DIR|synthetic:NAME", help="default: %(default)s")
    add("--mode", choices=MODES, default="specache")
    add("--bits", type=int, choices=(1, 2, 4), default=2)
    add("--group", type=int, choices=(32, 64), default=64)
    add("--residual", **number, default=64, help="default: %(default)s")
    add("--top-k", **number, default=64, help="default: %(default)s")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("-n", "--steps", **number, default=32, help="decode steps that are timed; default: %(default)s")
    add("-d", "--depth", **number, default=1024, help="tokens in the cache before them; default: %(default)s")
    add("-b", "--batch", **number, default=1, help="sequences; default: %(default)s")
    add("-r", "--repetitions", **number, default=3, help="of the timed steps, on one cache; default: %(default)s")
    add("-t", "--threads", **number, help="CPU threads; default: torch's")
    add("-s", "--seed", **number, default=1, help="of the prompts; default: %(default)s")
    add("--fill", choices=("prefill", "random"), default="prefill",
        help="where the tokens of the depth come from: a real prefill, or normal random K and V (much faster)")  # fmt: skip
    add("--gather", choices=("thread", "inline"), default="thread",
        help="who waits for the indices and gathers: a worker thread, or the thread that queues kernels")  # fmt: skip
    add("--any-ties", action="store_true", help="plain torch.topk: faster, but equal probabilities fall either way")
    add("--chunk-mib", **number, help="scratch of unpacked codes; default: 4 on the CPU, 512 on CUDA")
    add("--compile", action="store_true", help="torch.compile for the dense segments and the unpacking")
    add("--forbid-syncs", action="store_true", help="CUDA: fail where a step waits implicitly")
    add("--profile", action="store_true", help="print torch.profiler's table of one repetition to stderr")
    add("--check", type=Path, metavar="DIR", help="compare with the golden case in DIR instead")
    return parser.parse_args()


def options_of(args: argparse.Namespace) -> Options:
    cuda = args.device == "cuda"
    chunk_bytes = (args.chunk_mib or (512 if cuda else 8)) << 20
    return Options(
        args.mode, args.bits, args.group, args.residual, args.top_k, args.gather, not args.any_ties,
        chunk_bytes // (2 if cuda else 4), args.compile,
    )  # fmt: skip


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fill_randomly(decoder: Decoder, depth: int, generator: torch.Generator) -> Tensor:
    """A cache of `depth` tokens without a prefill, and the tokens of the first step [B, rows]."""
    c, cache = decoder.model.config, decoder.cache
    shape = (cache.n_heads, depth, c.head_dim)
    cache.begin_prefill(depth)
    for layer in range(c.layers):
        k, v = (torch.randn(shape, device=cache.tail.device, dtype=c.kv_dtype, generator=generator) for _ in "kv")
        cache.store(layer, slice(None), k, v)
    cache.end_prefill()
    logits = torch.rand(decoder.batch, c.vocab, device=cache.tail.device, generator=generator)
    return decoder.first(logits)


def timed_steps(
    decoder: Decoder, tokens: Tensor, steps: int, forbid_syncs: bool = False
) -> tuple[Tensor, list[float]]:
    """Greedy steps; the next tokens and the milliseconds of each step. Nothing in the loop waits for the GPU: its marks
    are events."""
    cuda = decoder.lanes.cuda

    def mark() -> Any:
        if not cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    if cuda and forbid_syncs:
        torch.cuda.set_sync_debug_mode("error")
    marks = [mark()]
    for _ in range(steps):
        tokens = decoder.step(tokens).argmax(-1)
        marks.append(mark())
    if cuda:
        torch.cuda.set_sync_debug_mode("default")
    synchronise(decoder.model.device)
    pairs = zip(marks, marks[1:])
    return tokens, [a.elapsed_time(b) if cuda else 1e3 * (b - a) for a, b in pairs]


def measure(args: argparse.Namespace, model: Model, options: Options) -> dict[str, Any]:
    device = model.device
    warm_up = WARM_UP_COMPILED if options.compile else WARM_UP
    capacity = args.depth + warm_up + (args.repetitions + args.profile) * args.steps
    decoder = Decoder(model, options, args.batch, capacity)
    generator = torch.Generator(device).manual_seed(args.seed)
    begin = time.perf_counter()
    if args.fill == "random":
        tokens = fill_randomly(decoder, args.depth, generator)
    else:
        ids = torch.randint(model.config.vocab, (args.batch, args.depth), device=device, generator=generator)
        tokens = decoder.first(decoder.prefill(ids))
    synchronise(device)
    fill_s = time.perf_counter() - begin
    tokens, _ = timed_steps(decoder, tokens, warm_up, args.forbid_syncs)

    repetitions = []
    for _ in range(args.repetitions):
        if stalls := decoder.stalls():
            stalls.reset()
        bytes_before, wall = decoder.fetched_bytes(), time.perf_counter()
        tokens, ms = timed_steps(decoder, tokens, args.steps)
        wall = time.perf_counter() - wall
        repetitions.append(dict(
            tok_s=args.batch * args.steps / wall,
            ms_per_step=1e3 * wall / args.steps,
            ms_of_steps=[round(x, 4) for x in ms],
            fetched_bytes_per_step=(decoder.fetched_bytes() - bytes_before) / args.steps,
            exposed_ms_per_step=stalls.total_ms() / args.steps if stalls else 0.0,
        ))  # fmt: skip
    if args.profile:
        profile(decoder, tokens, args.steps)
    return summary(decoder, repetitions) | dict(fill_s=fill_s, repetitions=repetitions)


def profile(decoder: Decoder, tokens: Tensor, steps: int) -> None:
    with torch.profiler.profile() as result:
        timed_steps(decoder, tokens, steps)
    by = "self_cuda_time_total" if decoder.lanes.cuda else "self_cpu_time_total"
    print(result.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=40), file=sys.stderr)


def summary(decoder: Decoder, repetitions: list[dict[str, Any]]) -> dict[str, Any]:
    rates = [r["tok_s"] for r in repetitions]
    steps = [x for r in repetitions for x in r["ms_of_steps"]]
    cuda = decoder.lanes.cuda
    return dict(
        tok_s_mean=statistics.mean(rates),
        tok_s_sd=statistics.stdev(rates) if len(rates) > 1 else 0.0,
        ms_per_step=statistics.mean(r["ms_per_step"] for r in repetitions),
        ms_per_step_median=statistics.median(steps),
        fetched_bytes_per_step=statistics.mean(r["fetched_bytes_per_step"] for r in repetitions),
        exposed_ms_per_step=statistics.mean(r["exposed_ms_per_step"] for r in repetitions),
        device_kv_bytes=decoder.cache.device_bytes(),
        device_scratch_bytes=decoder.scratch.bytes(),
        host_kv_bytes=decoder.cache.host_bytes(),
        device_peak_bytes=torch.cuda.max_memory_allocated() if cuda else None,
    )


def environment(device: torch.device) -> dict[str, Any]:
    cuda = device.type == "cuda"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return dict(
        torch=torch.__version__,
        cuda=torch.version.cuda if cuda else None,
        python=platform.python_version(),
        gpu=torch.cuda.get_device_name(device) if cuda else None,
        cpu=names[0] if names else platform.processor(),
        cpus=os.cpu_count(),
        threads=torch.get_num_threads(),
    )


def main() -> int:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    model = Model.load(args.model, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    options = options_of(args)
    if args.check:
        figures = check(model, options, args.check)
        print(json.dumps(dict(model=args.model, check=figures, environment=environment(device)), indent=1))
        return 0 if all(case["ok"] for case in figures.values()) else 1
    figures = measure(args, model, options)
    asked = {k: v for k, v in vars(args).items() if k not in ("check", "profile")}
    print(json.dumps(dict(options=asked) | figures | dict(environment=environment(device)), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
