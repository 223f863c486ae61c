#!/usr/bin/env bash
# What to run first when a machine with an NVIDIA GPU is at hand; needs no Rust. Builds the kernel tests and the probe
# with the nvcc that is there (or takes binaries that --build made elsewhere), runs them, keeps the results and prints
# a table.
#
# usage: tools/gpu.sh [FOOTPRINT_GIB ...]   tests, then measurements (about six minutes); default footprints 1 16
#        tools/gpu.sh --build [ARCH]        builds only, for ARCH (default 90a), into target/gpu; needs no GPU
#
# Results: $OUT (default target/gpu/results): machine.txt, tests.txt, sanitizer.txt, probe.jsonl, linear.jsonl
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
bin=target/gpu
out=${OUT:-$bin/results}
tests=(layout_test pack_test attn_decode_test attn_prefill_test select_test fetch_test decode_chain_test embed_test
  linear_test dense_test sample_test draw_test step_test)
programs=("${tests[@]}" probe linear_bench)

find_nvcc() {
  local candidate
  for candidate in "${SPECACHE_NVCC:-}" "$(command -v nvcc || true)" "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" \
    target/cuda/nvidia/cu13/bin/nvcc; do
    if [ -n "$candidate" ] && [ -x "$candidate" ]; then
      echo "$candidate"
      return
    fi
  done
  return 1
}

# The architecture of the first GPU: 90a for compute capability 9.0, whose own instructions need the a.
gpu_arch() {
  local capability
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d ' .')
  if [ "$capability" = 90 ]; then echo 90a; else echo "$capability"; fi
}

source_of() {
  case "$1" in
    probe | linear_bench) echo "csrc/$1.cu" ;;
    *) echo "csrc/tests/$1.cpp" ;;
  esac
}

build() { # nvcc, architecture, linker flags
  local program source plans=() pids=() pid
  mkdir -p "$bin"
  for source in csrc/plan/*.c; do
    plans+=("$bin/$(basename "$source" .c).plan.o")
    "$1" -O2 -c "$source" -o "${plans[-1]}" || return 1
  done
  rm -f "$bin/libspecache_plan.a"
  ar rcs "$bin/libspecache_plan.a" "${plans[@]}"
  for program in "${programs[@]}"; do
    "$1" -std=c++17 -O3 -lineinfo -Xcompiler "-Wno-unknown-pragmas$3" \
      -gencode "arch=compute_$2,code=sm_$2" -x cu "$(source_of "$program")" -L"$bin" -lspecache_plan \
      -o "$bin/$program" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || return 1; done
  echo "built for sm_$2: ${programs[*]}"
}

if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
  sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit 0
fi

if [ "${1:-}" = --build ]; then
  nvcc=$(find_nvcc) || nvcc=$(tools/cuda-toolkit.sh)
  # The libraries of this machine may be newer than those of the machine that runs: link them in.
  build "$nvcc" "${2:-90a}" ,-static-libstdc++,-static-libgcc
  exit 0
fi

command -v nvidia-smi >/dev/null || { echo "gpu: no nvidia-smi here: no GPU, or no driver" >&2; exit 1; }
mkdir -p "$out"
{
  date -u +%Y-%m-%dT%H:%MZ
  nvidia-smi --query-gpu=name,driver_version,memory.total,pcie.link.gen.current,pcie.link.width.current,clocks.max.sm --format=csv
  uname -srm
  lscpu | grep -E 'Model name|^CPU\(s\)|NUMA|Thread' || true
  grep -E 'MemTotal|MemAvailable|HugePages_Total' /proc/meminfo
} >"$out/machine.txt" 2>&1 || true
cat "$out/machine.txt"

if nvcc=$(find_nvcc); then
  build "$nvcc" "$(gpu_arch)" "" || echo "gpu: $nvcc could not build, using $bin as it is"
else
  echo "gpu: no nvcc here, using $bin as it is (made by tools/gpu.sh --build)"
fi

status=0
: >"$out/tests.txt"
for test in "${tests[@]}"; do
  if timeout 60 "$bin/$test" >>"$out/tests.txt" 2>&1; then
    echo "ok    $test"
  else
    echo "FAIL  $test: $(tail -n 1 "$out/tests.txt")"
    status=1
  fi
done

# Out-of-bounds accesses and races, as the hardware sees them. It does not run everywhere: its absence is no failure.
if sanitizer=$(command -v compute-sanitizer); then
  for tool in memcheck racecheck; do
    for test in pack_test linear_test; do
      if timeout 45 "$sanitizer" --tool "$tool" --error-exitcode 9 "$bin/$test" >>"$out/sanitizer.txt" 2>&1; then
        echo "ok    compute-sanitizer $tool $test"
      else
        echo "?     compute-sanitizer $tool $test: $(tail -n 1 "$out/sanitizer.txt")"
      fi
    done
  done
fi

timeout 240 "$bin/probe" "$@" >"$out/probe.jsonl" || { echo "FAIL  probe: a measurement failed (below)"; status=1; }

timeout 120 "$bin/linear_bench" >"$out/linear.jsonl" || { echo "FAIL  linear_bench: see above"; status=1; }

# The table comes last, where the end of a log shows it. Without python3, the lines themselves.
if command -v python3 >/dev/null; then
  python3 tools/probe_table.py "$out/probe.jsonl"
  python3 tools/probe_table.py "$out/linear.jsonl"
else
  cat "$out/probe.jsonl" "$out/linear.jsonl"
fi
exit "$status"
