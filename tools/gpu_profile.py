#!/usr/bin/env python3
"""Where the time of a decode step goes, kernel by kernel, as Nsight Compute measures it: one table.

usage: tools/gpu_profile.py NCU.csv      what `ncu --csv --page raw --metrics METRICS` printed; METRICS is below
       tools/gpu_profile.py --metrics    the metrics to ask for

Kernels run one by one under the profiler, with caches as they were left (--cache-control none): times do not add up to a
step's, as nothing overlaps, but show which kernel is how far from the memory's speed.
"""

import csv
import sys

# Few enough for one pass: a second one would have to restore what the kernel wrote.
TIME, READ, ISSUE, WARPS = METRICS = [
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
]
TO_US = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3, "s": 1e6, "second": 1e6}
TO_MB = {"byte": 1e-6, "Kbyte": 1e-3, "Mbyte": 1.0, "Gbyte": 1e3}


def launches(path):
    """A dict of numbers for each launch. Lines before the header are the program's own."""
    with open(path, newline="") as file:
        lines = file.read().splitlines()
    header = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if header is None:
        raise SystemExit(f"{path}: no table of ncu; its last line: {lines[-1] if lines else '(empty)'}")
    rows = list(csv.reader(lines[header:]))
    names, units = rows[0], rows[1]
    for row in rows[2:]:
        if len(row) != len(names):
            continue  # the program's own words
        cell = dict(zip(names, row))
        unit = dict(zip(names, units))
        number = lambda metric: float(cell[metric].replace(",", "") or 0)
        yield {
            "kernel": cell["Kernel Name"].split("(")[0],
            "us": number(TIME) * TO_US[unit[TIME]],
            "mb": number(READ) * TO_MB[unit[READ]],
            "issue": number(ISSUE),
            "warps": number(WARPS),
        }


def table(path):
    kernels = {}
    for launch in launches(path):
        kernels.setdefault(launch["kernel"], []).append(launch)
    print(f"{'kernel':<36} {'launches':>8} {'us each':>8} {'MB read':>8} {'GB/s':>6} {'issue %':>7} {'warps %':>7}")
    total = lambda all_: sum(launch["us"] for launch in all_)
    for name, all_ in sorted(kernels.items(), key=lambda item: -total(item[1])):
        mean = lambda key: sum(launch[key] for launch in all_) / len(all_)
        rate = 1e3 * mean("mb") / mean("us") if mean("us") else 0
        print(
            f"{name:<36} {len(all_):>8} {mean('us'):>8.2f} {mean('mb'):>8.2f} {rate:>6.0f} "
            f"{mean('issue'):>7.0f} {mean('warps'):>7.0f}"
        )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    if sys.argv[1] == "--metrics":
        print(",".join(METRICS))
    else:
        table(sys.argv[1])
