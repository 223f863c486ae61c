"""PyTorch's index_select and gather on the rows of `benches/gather.rs`: random rows out of 4 GiB into a block.

    python3 benches/rivals/index_select.py [--source-gib 4]

Prints GB/s (10^9 bytes copied per second), the best and the median of several rounds, in the format of the bench.
"""

import argparse
import mmap
import time

import torch

ROUND = 2 << 20
ROUNDS = 150


def memory(n_bytes):
    """As many bytes as bfloat16, which is what the pairs are; in huge pages, as the bench has them: PyTorch's own
    allocator does not ask for them."""
    pages = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.bfloat16).fill_(1)


def speed(run, staging_bytes, n_rows, indices):
    """GB/s of the best and of the median round; every call takes the next random rows, and the first is not timed."""
    calls = max(1, ROUND // staging_bytes)
    rounds = ROUNDS // 10 if staging_bytes > ROUND else ROUNDS
    first, seconds = 0, []
    for _ in range(rounds):
        parts = []
        for _ in range(calls + 1):
            if first + n_rows > len(indices):
                first = 0
            parts.append(indices[first : first + n_rows])
            first += n_rows
        run(parts[0])
        start = time.perf_counter()
        for part in parts[1:]:
            run(part)
        seconds.append(time.perf_counter() - start)
    seconds.sort()
    gbps = [calls * staging_bytes / s / 1e9 for s in (seconds[0], seconds[rounds // 2])]
    return f"{gbps[0]:6.2f} {gbps[1]:6.2f} GB/s"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source-gib", type=int, default=4)
    args = parser.parse_args()
    source = memory(args.source_gib << 30)
    generator = torch.Generator().manual_seed(1)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for staging_bytes in (256 << 10, 2 << 20, 32 << 20):
            for row_bytes in (256, 512, 1024):
                rows = source.view(-1, row_bytes // 2)
                n_rows = staging_bytes // row_bytes
                indices = torch.randint(len(rows), (1 << 22,), generator=generator)
                out = memory(staging_bytes).view(n_rows, -1)

                def index_select(part):
                    torch.index_select(rows, 0, part, out=out)

                def gather(part):
                    torch.gather(rows, 0, part[:, None].expand(-1, row_bytes // 2), out=out)

                size = f"{staging_bytes >> 20} MiB" if staging_bytes >= 1 << 20 else f"{staging_bytes >> 10} KiB"
                title = f"rows {row_bytes} B, to {size}, {threads} threads"
                print(f"{title:<42} {'index_select':<28} {speed(index_select, staging_bytes, n_rows, indices)}")
                if row_bytes == 512 and staging_bytes <= ROUND:
                    print(f"{title:<42} {'torch.gather':<28} {speed(gather, staging_bytes, n_rows, indices)}")


if __name__ == "__main__":
    main()
