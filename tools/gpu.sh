#!/usr/bin/env bash
# Everything that is to be known from a machine with an NVIDIA GPU, the most valuable first. That machine needs a driver, and
# python3 for the tables; PyTorch for the rivals. It needs no Rust and no nvcc: --build makes what runs there.
#
# usage: tools/gpu.sh --build [ARCH]     where Rust and gcc are: target/gpu, below 64 MiB, for ARCH (default 90a)
#        tools/gpu.sh [PHASE ...]        there: tests tokens linear bench profile rivals sanitizer trace probe; default all, in this
#                                        order
#        tools/gpu.sh --dry-run          all phases on the emulated driver with tiny shapes; needs what check_kernels.sh built
#
# SPECACHE_GPU_SECONDS (default 570): what has not begun by then is left out. Results: $OUT (default target/gpu/results) gets
# summary.txt and results.tar.gz, after each phase anew.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
bin=target/gpu
phases=(tests tokens linear bench profile rivals sanitizer trace probe)
tests=(layout_test pack_test attn_decode_test attn_prefill_test select_test fetch_test decode_chain_test embed_test
  linear_test dense_test sample_test draw_test read_test step_test)

# ---- where it is built ----------------------------------------------------------------------------------------------

source_of() {
  case "$1" in
    probe | linear_bench) echo "csrc/$1.cu" ;;
    *) echo "csrc/tests/$1.cpp" ;;
  esac
}

build() { # architecture
  local program source objects=() limit=$((60 << 20)) bytes
  nvcc=$(realpath "${SPECACHE_NVCC:-$(tools/cuda-toolkit.sh)}")
  rm -rf "$bin"
  mkdir -p "$bin/plan"
  # The kernels travel inside of the program.
  SPECACHE_NVCC=$nvcc SPECACHE_CUDA_ARCHS=$1 cargo build --release --locked --bin specache-engine
  strip -o "$bin/specache-engine" target/release/specache-engine
  for source in csrc/plan/*.c; do
    objects+=("$bin/plan/$(basename "$source" .c).o")
    gcc -std=c99 -O2 -c "$source" -o "${objects[-1]}"
  done
  ar rcs "$bin/plan/libspecache_plan.a" "${objects[@]}"
  export nvcc bin arch=$1
  # The libraries of this machine may be newer than those of the machine that runs: link them in.
  compile() { # program, source
    "$nvcc" -std=c++17 -O3 -lineinfo -Xcompiler "-Wno-unknown-pragmas,-static-libstdc++,-static-libgcc" \
      -gencode "arch=compute_$arch,code=sm_$arch" -x cu "$2" -L"$bin/plan" -lspecache_plan -o "$bin/$1"
  }
  export -f compile
  for program in "${tests[@]}" probe linear_bench; do echo "$program $(source_of "$program")"; done |
    xargs -P $(($(nproc) < 8 ? $(nproc) : 8)) -L 1 bash -euc 'compile "$@"' _
  rm -rf "$bin/plan"
  bytes=$(du -sb "$bin" | cut -f 1)
  echo "$bin: $((bytes >> 20)) MiB for sm_$1"
  [ "$bytes" -le "$limit" ] || { echo "gpu: more than $((limit >> 20)) MiB" >&2; return 1; }
}

dry=
case "${1:-}" in
  -h | --help)
    sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
    ;;
  --build)
    build "${2:-90a}"
    exit 0
    ;;
  --dry-run)
    dry=1
    shift
    ;;
  -*)
    echo "gpu: unknown option $1 (see --help)" >&2
    exit 2
    ;;
esac
wanted=("$@")
[ $# -gt 0 ] || wanted=("${phases[@]}")
for phase in "${wanted[@]}"; do
  [[ " ${phases[*]} " == *" $phase "* ]] || { echo "gpu: no phase $phase; there are ${phases[*]}" >&2; exit 2; }
done

# ---- where it runs --------------------------------------------------------------------------------------------------

# A call to a lent GPU machine may take ten minutes. An emulated GPU is as slow as the machine is busy.
deadline=$((SECONDS + ${SPECACHE_GPU_SECONDS:-$([ -n "$dry" ] && echo 3600 || echo 570)}))
out=${OUT:-$bin/results}
engine=$bin/specache-engine
tiny=()
if [ -n "$dry" ]; then
  # The emulated driver, and the kernel tests as check_kernels.sh built them.
  out=${OUT:-target/gpu-dry-run}
  engine=target/release/specache-engine
  tiny=(--tiny)
  export LD_LIBRARY_PATH=$root/target/emulated${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} XDG_CACHE_HOME=$root/target/gpu-dry-run/cache
  # Too little memory to measure how fast it is read, which takes long here.
  export SPECACHE_EMU_VRAM=${SPECACHE_EMU_VRAM:-1073741824}
elif ! command -v nvidia-smi >/dev/null; then
  echo "gpu: no nvidia-smi here: no GPU, or no driver" >&2
  exit 1
elif [ -z "${VIRTUAL_ENV:-}" ]; then
  # PyTorch's environment has cuBLASLt too.
  VIRTUAL_ENV=$(python3 -c 'import sys; print(sys.prefix)') && export VIRTUAL_ENV
fi
[ -x "$engine" ] || { echo "gpu: no $engine: run tools/gpu.sh --build first, where Rust is" >&2; exit 1; }
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
summary=$work/summary.txt
status=0

say() { echo "$*" | tee -a "$summary"; }

# The command's own words go to a log of the phase. Without time left it is not begun.
step() { # limit in seconds, name, command...
  local limit=$1 name=$2 left=$((deadline - SECONDS)) log=$work/$phase.txt code=0 begin=$SECONDS
  shift 2
  if [ "$left" -lt 10 ]; then
    say "-     $name: no time left"
    return
  fi
  [ -z "$dry" ] || limit=$((limit * 5))
  [ "$limit" -lt "$left" ] || limit=$left
  echo "## $name: $*" >>"$log"
  timeout -k 5 "$limit" "$@" >>"$log" 2>&1 || code=$?
  case $code in
    0) say "ok    $name ($((SECONDS - begin)) s)" ;;
    124 | 137) say "FAIL  $name: not done after $limit s"; status=1 ;;
    *) say "FAIL  $name: exit $code: $(tail -n 1 "$log")"; status=1 ;;
  esac
}

skip() { say "-     $1: $2"; }

# A step that prints its own lines, which belong into the summary.
lines_of() { # limit, name, command...
  step "$@"
  grep -E '^(ok|FAIL) |^      ' "$work/$phase.txt" | tee -a "$summary" || true
}

machine() {
  date -u +%Y-%m-%dT%H:%MZ
  [ -n "$dry" ] && echo "dry run on the emulated driver: no figure below is one"
  if command -v nvidia-smi >/dev/null; then
    nvidia-smi --query-gpu=name,driver_version,memory.total,pcie.link.gen.current,pcie.link.width.current,clocks.max.sm \
      --format=csv
  fi
  uname -srm
  lscpu | grep -E 'Model name|^CPU\(s\)|NUMA|Thread' || true
  grep -E 'MemTotal|MemAvailable|HugePages_Total' /proc/meminfo
  "$engine" --version
  "$engine" devices
}

phase_tests() {
  local test program
  for test in "${tests[@]}"; do
    program=$bin/$test
    [ -z "$dry" ] || program=target/kernels/${test%_test}.plain
    if [ -x "$program" ]; then step 60 "$test" "$program"; else skip "$test" "not built"; fi
  done
}

phase_tokens() {
  local short=()
  [ -z "$dry" ] || short=(--short)
  lines_of 200 "tokens and logits of the recall model" python3 tools/gpu_tokens.py "$engine" "${short[@]}"
}

# Accesses out of bounds and races, as the hardware sees them. Not every machine can run it.
phase_sanitizer() {
  local sanitizer tool test
  if [ -n "$dry" ] || ! sanitizer=$(command -v compute-sanitizer); then
    skip "compute-sanitizer" "not here"
    return
  fi
  for tool in memcheck racecheck; do
    for test in pack_test select_test fetch_test linear_test; do
      step 45 "$tool $test" "$sanitizer" --tool "$tool" --error-exitcode 9 "$bin/$test"
    done
  done
  step 60 "memcheck of a generation" "$sanitizer" --tool memcheck --error-exitcode 9 "$engine" generate \
    -m synthetic:tiny --tokens tests/fixtures/golden/ids.json -n 4 --temp 0 --ignore-eos --device cuda
}

# The fused linear kernels alone, and with each other in a step's order.
phase_linear() {
  if [ -n "$dry" ]; then
    skip "linear_bench" "it needs a GPU"
    return
  fi
  step 60 "linear_bench" bash -c "$bin/linear_bench > $work/linear.jsonl"
}

# Every kernel of some steps, one by one: how far from the memory's speed it is.
phase_profile() {
  local ncu mode depth batch
  if [ -n "$dry" ] || ! ncu=$(command -v ncu); then
    skip "ncu" "not here"
    return
  fi
  for mode in "specache 32768 1" "full 32768 1" "specache 8192 8"; do
    read -r mode depth batch <<<"$mode"
    # The first launches fill the caches and warm up; 300 are more than a step has.
    step 60 "ncu, $mode, $depth, batch $batch" bash -c "$ncu --csv --page raw --metrics $(tools/gpu_profile.py --metrics) \
      --clock-control none --cache-control none --launch-skip 700 --launch-count 300 $engine bench -m synthetic:llama-3.1-8b \
      -d $depth -b $batch --kv $mode -n 4 -r 1 --device cuda --no-graph > $work/ncu-$mode-b$batch.csv"
  done
}

phase_bench() {
  local seconds=$((deadline - SECONDS - 60))
  [ "$seconds" -lt 330 ] || seconds=330
  if [ "$seconds" -lt 20 ]; then
    skip "bench grid" "no time left"
    return
  fi
  step $((seconds + 20)) "bench grid" python3 tools/gpu_bench.py "$engine" "$work/bench.jsonl" --seconds "$seconds" "${tiny[@]}"
}

# What people run today, and the paper's way in PyTorch with the engine's weights and options.
phase_rivals() {
  local mode model=synthetic:llama-3.1-8b depth=32768 device=cuda hf
  if ! python3 -c 'import torch' 2>/dev/null; then
    skip "rivals" "no PyTorch here"
    return
  fi
  [ -z "$dry" ] || { model=synthetic:tiny; depth=200; device=cpu; }
  if python3 -c 'import transformers' 2>/dev/null; then
    hf="python3 benches/rivals/hf_cache.py -m ${model#synthetic:} --device $device -d $depth"
    step 60 "transformers, full" bash -c "$hf --mode full -n 16 >> $work/rivals.json"
    [ -n "$dry" ] || step 60 "transformers, offload" bash -c "$hf --mode offload -n 4 >> $work/rivals.json"
    step 60 "transformers, prefill" bash -c "$hf --mode full --prefill -n 2 -r 1 >> $work/rivals.json"
  else
    skip "transformers" "not here"
  fi
  [ -n "$dry" ] || step 40 "sdpa's rate" bash -c "python3 benches/rivals/sdpa_rate.py >> $work/rivals.json"
  for mode in specache full offload; do
    step 100 "PyTorch, $mode" bash -c "python3 benches/rivals/torch_specache.py -m $model --device $device --mode $mode \
      -d $depth -b 1 -n 16 -r 2 --fill random --any-ties >> $work/rivals.json"
  done
}

# What one step does on the GPU: our own trace and picture, and Nsight Systems' where it is.
phase_trace() {
  local model=synthetic:llama-3.1-8b depth=32768 nsys
  [ -z "$dry" ] || { model=synthetic:tiny; depth=200; }
  step 120 "overlap" "$engine" bench --overlap -m $model -d $depth -n 4 -r 1 --device cuda --trace "$work/trace.json" \
    --plot "$work/overlap.svg"
  if nsys=$(command -v nsys); then
    step 120 "nsys" "$nsys" profile --trace=cuda,nvtx --force-overwrite=true -o "$work/nsys" "$engine" bench --overlap \
      -m $model -d $depth -n 2 -r 1 --device cuda --no-graph
  else
    skip "nsys" "not here"
  fi
}

phase_probe() {
  if [ -n "$dry" ]; then
    skip "probe" "it needs a GPU"
    return
  fi
  step 120 "probe" bash -c "$bin/probe 1 16 > $work/probe.jsonl"
}

# What exists so far, in two files.
deliver() {
  cp "$summary" "$out/summary.txt"
  tar -C "$work" -czf "$out/results.tar.gz" .
}

machine >"$work/machine.txt" 2>&1 || { cat "$work/machine.txt"; exit 1; }
tee -a "$summary" <"$work/machine.txt"
for phase in "${wanted[@]}"; do
  say "== $phase"
  "phase_$phase"
  deliver
done

# The tables come last, where the end of a log shows them.
phase=tables
{
  echo
  if [ -s "$work/bench.jsonl" ]; then python3 tools/gpu_bench.py --table "$work/bench.jsonl"; fi
  if [ -s "$work/rivals.json" ]; then python3 tools/gpu_bench.py --rivals "$work/rivals.json"; fi
  for file in probe linear; do
    if [ -s "$work/$file.jsonl" ]; then python3 tools/probe_table.py "$work/$file.jsonl"; fi
  done
  for file in "$work"/ncu-*.csv; do
    if [ -s "$file" ]; then echo; basename "$file"; python3 tools/gpu_profile.py "$file" || true; fi
  done
  echo
  echo "$(grep -c '^ok ' "$summary") ok, $(grep -c '^FAIL ' "$summary" || true) failed, $(grep -c '^- ' "$summary" || true) left out; $out"
} | tee -a "$summary"
deliver
exit "$status"
