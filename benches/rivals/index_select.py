"""PyTorch's index_select and gather on the rows of `benches/gather.rs`: random rows out of 4 GiB into a block.

    python3 benches/rivals/index_select.py [--source-gib 4]

Prints GB/s (10^9 bytes copied per second), the best of several rounds, in the format of the bench.
"""

import argparse
import time

import torch

ROUND = 2 << 20
ROUNDS = 150


def best(run, staging_bytes, n_rows, indices):
    """GB/s of the best round; every call takes the next random rows."""
    calls = max(1, ROUND // staging_bytes)
    rounds = ROUNDS // 10 if staging_bytes > ROUND else ROUNDS
    first, fastest = 0, float("inf")
    for _ in range(rounds):
        parts = []
        for _ in range(calls):
            if first + n_rows > len(indices):
                first = 0
            parts.append(indices[first : first + n_rows])
            first += n_rows
        start = time.perf_counter()
        for part in parts:
            run(part)
        fastest = min(fastest, time.perf_counter() - start)
    return calls * staging_bytes / fastest / 1e9


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source-gib", type=int, default=4)
    args = parser.parse_args()
    source_bytes = args.source_gib << 30
    # As bfloat16, which is what the pairs are; huge pages as far as the system gives them to everybody.
    source = torch.ones(source_bytes // 2, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for staging_bytes in (256 << 10, 2 << 20, 32 << 20):
            for row_bytes in (256, 512, 1024):
                rows = source.view(-1, row_bytes // 2)
                n_rows = staging_bytes // row_bytes
                indices = torch.randint(len(rows), (1 << 22,), generator=generator)
                out = torch.ones(n_rows, row_bytes // 2, dtype=torch.bfloat16)

                def index_select(part):
                    torch.index_select(rows, 0, part, out=out)

                def gather(part):
                    torch.gather(rows, 0, part[:, None].expand(-1, row_bytes // 2), out=out)

                size = f"{staging_bytes >> 20} MiB" if staging_bytes >= 1 << 20 else f"{staging_bytes >> 10} KiB"
                title = f"rows {row_bytes} B, to {size}, {threads} threads"
                print(f"{title:<42} {'index_select':<28} {best(index_select, staging_bytes, n_rows, indices):6.2f} GB/s")
                if row_bytes == 512 and staging_bytes <= ROUND:
                    print(f"{title:<42} {'torch.gather':<28} {best(gather, staging_bytes, n_rows, indices):6.2f} GB/s")


if __name__ == "__main__":
    main()
