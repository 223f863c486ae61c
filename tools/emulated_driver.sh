#!/usr/bin/env bash
# Builds the emulated CUDA driver (csrc/emu/driver): a library with the driver API, and what is used of NVRTC and
# cuBLASLt, that runs the kernels of csrc on the CPU. Needs g++, and CUDA's headers (tools/cuda-toolkit.sh).
# usage: tools/emulated_driver.sh [OUT]     OUT: default target/emulated/libspecache_emu.so
#        LD_LIBRARY_PATH=target/emulated specache-engine ... --device cuda
# Beside OUT it leaves links with the names that programs look for: libcuda.so.1, libnvrtc.so, libcublasLt.so.
set -euo pipefail

if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
  sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit 0
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
out=${1:-target/emulated/libspecache_emu.so}
objects=target/emulated/objects
include=$(dirname "$(tools/cuda-toolkit.sh)")/../include
command -v g++ >/dev/null || { echo "emulated_driver: g++ is missing: install it" >&2; exit 1; }
mkdir -p "$objects" "$(dirname "$out")"

# Programs of their own.
not_kernels=(csrc/probe.cu csrc/linear_bench.cu)
sources=(csrc/emu/driver/*.cpp)
for source in csrc/*.cu; do
  [[ " ${not_kernels[*]} " == *" $source "* ]] || sources+=("$source")
done

# Beside the object: the headers it was made from. It is up to date if it is younger than all of them.
is_current() { # object
  local file
  [ -f "$1" ] && [ -f "$1.d" ] && [ "$1" -nt "$script" ] || return 1
  while read -r file; do [ "$1" -nt "$file" ] || return 1; done \
    < <(sed 's/^[^:]*: *//; s/\\$//' "$1.d" | tr -s ' ' '\n' | sed '/^$/d')
}

# -O3 unrolls late: it takes what the first turn of a loop sets for uninitialised.
compile() { # source
  local object
  object=$objects/$(basename "$1").o
  is_current "$object" && return
  rm -f "$object"
  g++ -x c++ -std=c++17 -O3 -march=native -g1 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-unknown-pragmas -Wno-uninitialized \
    -ffp-contract=off -fno-strict-aliasing -DSPECACHE_EMU -DSPECACHE_EMU_DRIVER -isystem "$include" -MMD -MF "$object.d" \
    -c "$1" -o "$object"
}
export -f compile is_current
export objects include script=tools/emulated_driver.sh
printf '%s\n' "${sources[@]}" | xargs -P $(($(nproc) < 8 ? $(nproc) : 8)) -I{} bash -euc 'compile {}'

linked=()
for source in "${sources[@]}"; do linked+=("$objects/$(basename "$source").o"); done
g++ -shared -Wl,--no-undefined -o "$out" "${linked[@]}" -pthread
for name in libcuda.so.1 libnvrtc.so libcublasLt.so; do ln -sf "$(basename "$out")" "$(dirname "$out")/$name"; done
echo "$out"
