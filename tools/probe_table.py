#!/usr/bin/env python3
"""Prints the measurements of csrc/probe.cu and csrc/linear_bench.cu, one JSON object a line, as short text tables."""

import json
import sys

# Probes with many lines: the columns of their table. All others print on a line of their own.
TABLES = {
    "memcpy": ["how", "bytes", "h2d_GBps", "d2h_GBps", "h2d_us_each", "d2h_us_each"],
    "cpu_gather": ["how", "GiB", "threads", "rows", "GBps_gather", "GBps_with_copy", "us_with_copy"],
    "gpu_gather": ["variant", "how", "GiB", "ctas", "GBps", "GBps_beside_read", "read_slowdown"],
    "linear": ["kernel", "rows", "pdl", "launches", "us_each", "GBps"],
}
LEFT_OUT = {"read_variant"}  # the best one has a line; all stay in the file


def text(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_table(name, lines):
    columns = TABLES[name]
    rows = [columns] + [[text(line.get(column, "")) for column in columns] for line in lines]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    print(f"\n{name}")
    for row in rows:
        print(" ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))))


def main(path):
    with open(path) as file:
        lines = [json.loads(line) for line in file if line.strip()]
    for line in lines:
        if line["probe"] not in TABLES and line["probe"] not in LEFT_OUT:
            print(line["probe"], *(f"{key}={text(value)}" for key, value in line.items() if key != "probe"))
    for name in TABLES:
        of_name = [line for line in lines if line["probe"] == name]
        if of_name:
            print_table(name, of_name)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: probe_table.py FILE")
    main(sys.argv[1])
