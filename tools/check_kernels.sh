#!/usr/bin/env bash
# Checks the CUDA kernels without a GPU; needs g++ and python3 with pip (for the compiler, see cuda-toolkit.sh).
#   1. nvcc builds every kernel with warnings as errors; no spills; registers within the limit written beside it.
#      NVRTC builds them from the sources alone, as the host program does where there is no nvcc
#   2. the same sources run on the CPU emulation (csrc/emu), plainly and under sanitizers, against plain twins
#   3. builds with an injected bug must fail their test
#   4. the emulated driver (csrc/emu/driver) builds, and sees every mistake that it promises to see
# usage: tools/check_kernels.sh [--all]     --all: every architecture that is shipped, not only sm_86 and sm_90a
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

architectures=(86 90a)
case "${1:-}" in
  '') ;;
  --all) architectures=(80 86 89 90a 100 120) ;;
  *) sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; [ "$1" = -h ] || [ "$1" = --help ]; exit ;;
esac

nvcc=$(tools/cuda-toolkit.sh)
include=$(dirname "$nvcc")/../include
out=target/kernels
rm -rf "$out"
mkdir -p "$out"

# Checks run beside each other, so what fails is a line of a file.
fail() {
  echo "FAIL  $*" | tee -a "$out/failures"
}

# Each compiler takes up to a gigabyte.
jobs=$(($(nproc) < 8 ? $(nproc) : 8))

# Runs a command in the background, so many at once; `wait` is for all of them.
beside() {
  while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n || true; done
  { "$@" || fail "$*: ended with an error"; } &
}

# ---- 1. nvcc ------------------------------------------------------------------------------------------------------

# source, architecture: one cubin, ptxas' report beside it.
compile() {
  local source=$1 arch=$2 name
  name=$out/$(basename "$source" .cu).sm_$arch
  if ! "$nvcc" -std=c++17 -O3 -Werror all-warnings -Xptxas -v,-warn-spills \
    -gencode "arch=compute_$arch,code=sm_$arch" -cubin -o "$name.cubin" "$source" >"$name.log" 2>&1; then
    grep -v '^ptxas info\|^$\|bytes stack frame' "$name.log" || cat "$name.log"
    fail "$source does not compile for sm_$arch"
  fi
}

# PTX of the oldest architecture: what a newer GPU compiles for itself.
compile_ptx() {
  local name
  name=$out/$(basename "$1" .cu).compute_80
  "$nvcc" -std=c++17 -O3 -Werror all-warnings -arch=compute_80 -ptx -o "$name.ptx" "$1" >"$name.log" 2>&1 || {
    cat "$name.log"
    fail "$1 does not compile to PTX"
  }
}

# The table kernel x architecture from the logs. A limit is a comment in the source: "registers: <= N pattern".
# A kernel without a limit, with spills or above its limit is a failure (exit code 1).
report() {
  python3 - "$out" "$@" <<'PYTHON'
import fnmatch, pathlib, re, sys

out, sources = pathlib.Path(sys.argv[1]), sys.argv[2:]
rows, bad = [], []
for source in sources:
    # A program's kernels may lie in headers of a folder of its own.
    parts = [pathlib.Path(source), *sorted(pathlib.Path(source).with_suffix("").glob("*.cuh"))]
    text = "".join(part.read_text() for part in parts)
    limits = [(glob, int(n)) for n, glob in re.findall(r"registers: <= (\d+) (\S+)", text)]
    for log in sorted(out.glob(pathlib.Path(source).stem + ".sm_*.log")):
        arch = log.stem.split(".")[-1]
        for part in log.read_text().split("Compiling entry function '")[1:]:
            kernel = part.split("'")[0]
            registers = int(re.search(r"Used (\d+) registers", part)[1])
            shared = int((re.search(r"(\d+) bytes smem", part) or [0, 0])[1])
            spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", part))
            limit = next((n for glob, n in limits if fnmatch.fnmatchcase(kernel, glob)), None)
            if limit is None:
                bad.append(f"{kernel} ({arch}): no limit in {source}")
            elif registers > limit:
                bad.append(f"{kernel} ({arch}): {registers} registers, limit {limit}")
            if spills:
                bad.append(f"{kernel} ({arch}): {spills} bytes of spills")
            rows.append((kernel, arch, registers, limit, shared, spills))
print(f"{'kernel':<40} {'arch':<7} {'registers':>9} {'limit':>6} {'shared B':>9} {'spills B':>9}")
for kernel, arch, registers, limit, shared, spills in sorted(rows):
    print(f"{kernel:<40} {arch:<7} {registers:>9} {limit or '-':>6} {shared:>9} {spills:>9}")
for line in bad:
    print("FAIL ", line)
sys.exit(1 if bad or not rows else 0)
PYTHON
}

for arch in "${architectures[@]}"; do beside compile csrc/pack.cu "$arch"; done
if [ "${1:-}" = --all ]; then
  beside compile_ptx csrc/pack.cu
  beside compile csrc/probe.cu 80
fi
beside compile csrc/probe.cu 90a
wait
report csrc/pack.cu csrc/probe.cu || fail "registers or spills"

# Attention, selection and the gather.
attention=(csrc/attn_decode.cu csrc/attn_combine.cu csrc/attn_prefill.cu csrc/select.cu csrc/fetch.cu csrc/post.cu)
for source in "${attention[@]}"; do
  for arch in "${architectures[@]}"; do beside compile "$source" "$arch"; done
  if [ "${1:-}" = --all ]; then beside compile_ptx "$source"; fi
done
wait
report "${attention[@]}" || fail "registers or spills"

# The dense half of a step.
dense=(csrc/embed.cu csrc/linear.cu csrc/dense.cu csrc/sample.cu csrc/draw.cu csrc/read.cu)
for source in "${dense[@]}"; do
  for arch in "${architectures[@]}"; do beside compile "$source" "$arch"; done
  if [ "${1:-}" = --all ]; then beside compile_ptx "$source"; fi
done
wait
report "${dense[@]}" || fail "registers or spills"
# What tools/gpu.sh runs.
if [ "${1:-}" = --all ]; then
  "$nvcc" -std=c++17 -Werror all-warnings -gencode arch=compute_90a,code=sm_90a -c csrc/linear_bench.cu \
    -o "$out/linear_bench.o" || fail "linear_bench does not build"
  for test in attn_prefill fetch embed linear dense sample draw read step; do
    "$nvcc" -std=c++17 -Werror all-warnings -Xcompiler -Wno-unknown-pragmas -gencode arch=compute_90a,code=sm_90a \
      -x cu -c "csrc/tests/${test}_test.cpp" -o "$out/$test.gpu.o" || fail "${test}_test does not build for a GPU"
  done
fi

# The tests must also build for a GPU, where tools/gpu.sh runs them: the small one shows it.
"$nvcc" -std=c++17 -Werror all-warnings -Xcompiler -Wno-unknown-pragmas -gencode arch=compute_90a,code=sm_90a \
  -x cu -c csrc/tests/layout_test.cpp -o "$out/layout_test.gpu.o" || fail "layout_test does not build for a GPU"

# NVRTC has no header but those that it is given.
nvrtc=target/nvrtc
if [ ! -f "$nvrtc/.complete" ]; then
  rm -rf "$nvrtc"
  PIP_ROOT_USER_ACTION=ignore tools/retry.sh python3 -m pip install --quiet --disable-pip-version-check --no-deps \
    --only-binary=:all: --upgrade --target "$nvrtc" 'nvidia-cuda-nvrtc==13.0.*'
  touch "$nvrtc/.complete"
fi
tools/nvrtc_check.py "$nvrtc/nvidia/cu13/lib" "${architectures[@]}" || fail "a kernel file does not compile by NVRTC"

# The launch plans are C99: the host program's build needs nothing but a C compiler.
plans=()
for source in csrc/plan/*.c; do
  plans+=("$out/$(basename "$source" .c).plan.o")
  gcc -std=c99 -O1 -g -Wall -Wextra -Werror -pedantic -c "$source" -o "${plans[-1]}" || fail "$source is not clean C99"
done

# ---- 2. and 3. the emulation --------------------------------------------------------------------------------------

# No contraction: the emulated intrinsics promise one rounding each. The kernels view shared memory through several
# types, which CUDA C++ allows.
emulated=(g++ -std=c++17 -O1 -g -Wall -Wextra -Werror -Wno-unknown-pragmas -ffp-contract=off -fno-strict-aliasing
  -DSPECACHE_EMU -isystem "$include")
sanitizers=("-fsanitize=address,undefined" -fno-sanitize-recover=all)

build() { # test, suffix, flags...
  local test=$1 suffix=$2
  shift 2
  "${emulated[@]}" "$@" "csrc/tests/${test}_test.cpp" "${plans[@]}" -o "$out/$test$suffix"
}

check() { # test, plain or sanitized
  local test=$1 kind=$2 flags=()
  [ "$kind" = plain ] || flags=("${sanitizers[@]}")
  if ! build "$test" ".$kind" "${flags[@]}"; then
    fail "$test does not build ($kind)"
  elif ! "$out/$test.$kind" >"$out/$test.$kind.log" 2>&1; then
    cat "$out/$test.$kind.log"
    fail "$test ($kind)"
  else
    echo "ok    $(cat "$out/$test.$kind.log") ($kind)"
  fi
}

for test in emu layout pack attn_decode attn_prefill select fetch decode_chain embed linear dense sample draw read step; do
  for kind in plain sanitized; do beside check "$test" "$kind"; done
done

expect_bug() { # test, bug, flags...
  local test=$1 bug=$2
  shift 2
  if ! build "$test" ".bug$bug" -DSPECACHE_INJECTED_BUG="$bug" "$@"; then
    fail "injected bug $bug of $test does not build"
  elif "$out/$test.bug$bug" >"$out/$test.bug$bug.log" 2>&1; then
    fail "injected bug $bug of $test went unseen"
  else
    echo "ok    injected bug $bug of $test is seen: $(head -n 1 "$out/$test.bug$bug.log")"
  fi
}

# 1: a missing __syncthreads. 2: an octet out of order in the fragments.
for bug in 1 2; do beside expect_bug pack "$bug"; done

# 1, 5: a missing __syncwarp, __syncthreads. 2: a wrong fragment. 3: a page too many. 4: a position that counts twice.
# 6: copies that nobody waits for.
# One kernel of the twelve builds in a third of the time.
for bug in 1 2 3 4 5 6; do beside expect_bug attn_decode "$bug" "-DSPECACHE_ATTN_KERNELS(X)=X(64, 2, bf16, Bf16)"; done

# 1: a missing __syncthreads. 2: a wrong fragment. 3: a row that looks ahead.
for bug in 1 2 3; do beside expect_bug attn_prefill "$bug"; done

# 1: a missing __syncthreads. 2: a position behind the window. 3: a position that nobody replaces any more.
# 4: hits among positions that were no candidates.
for bug in 1 2 3 4; do beside expect_bug select "$bug"; done

# 1: a missing __syncthreads. 2: pairs of another sequence. 3: a list that begins anew behind so many heads.
for bug in 1 2 3; do beside expect_bug fetch "$bug"; done

# 1: a missing __syncthreads. 2: pairs of k out of order. 3: one row too many. 4: a page border in the wrong place.
# 5: ties that go to the wrong token. 6: copies that nobody waits for.
for bug in 1 2 3 6; do beside expect_bug linear "$bug"; done
for bug in 1 2; do beside expect_bug dense "$bug"; done   # 2: V that is rotated
beside expect_bug embed 4
beside expect_bug sample 5
for bug in 1 2; do beside expect_bug draw "$bug"; done   # 2: tokens in another order
wait

# ---- 4. the emulated driver ---------------------------------------------------------------------------------------

if ! library=$(tools/emulated_driver.sh); then
  fail "the emulated driver does not build"
elif ! "${emulated[@]}" -DSPECACHE_EMU_DRIVER csrc/tests/driver_test.cpp target/emulated/objects/*.o -pthread \
  -o "$out/driver"; then
  fail "driver does not build"
elif ! "$out/driver" >"$out/driver.log" 2>&1; then
  tail -n 5 "$out/driver.log"
  fail "driver"
else
  echo "ok    $(tail -n 1 "$out/driver.log")"   # before it, the errors that it provokes
fi
# As the host program opens it.
python3 -c 'import ctypes, sys; sys.exit(ctypes.CDLL(sys.argv[1]).cuInit(0))' "$PWD/$library" ||
  fail "the emulated driver cannot be opened"

if [ -s "$out/failures" ]; then
  echo "$(wc -l <"$out/failures") checks failed:"
  cat "$out/failures"
  exit 1
fi
echo "all kernel checks pass"
