#!/usr/bin/env bash
# Makes the Rust twins of C declarations: the driver calls that the engine uses (cuda.h) and the kernels' parameters
# (csrc/abi.h). The results are committed, so that building needs neither clang nor CUDA.
#
#   tools/bindings.sh            writes src/device/cuda/bindings/*.rs
#   tools/bindings.sh --check    fails where what is committed differs from what the headers say
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in
"" | --check) ;;
*)
  echo "usage: tools/bindings.sh [--check]"
  exit 2
  ;;
esac

bindgen_version=0.73.2
libclang_version=18.1.1
to=src/device/cuda/bindings

tool=target/bindgen/bin/bindgen
"$tool" --version 2>/dev/null | grep -qF "$bindgen_version" ||
  tools/retry.sh cargo install --quiet --locked bindgen-cli --version "$bindgen_version" --root target/bindgen
[ -f target/libclang/.complete ] || {
  PIP_ROOT_USER_ACTION=ignore tools/retry.sh python3 -m pip install --quiet --disable-pip-version-check --no-deps \
    --upgrade --target target/libclang "libclang==$libclang_version"
  touch target/libclang/.complete
}
export LIBCLANG_PATH=$PWD/target/libclang/clang/native
# The wheel has no headers of its own: gcc's serve for stdint.h and stddef.h.
system=(-isystem "$(gcc -print-file-name=include)")
nvcc=$(tools/cuda-toolkit.sh)
cuda=$(dirname "$(dirname "$nvcc")")/include

driver=(
  cuInit cuDriverGetVersion cuGetErrorName cuGetErrorString
  cuDeviceGet cuDeviceGetName cuDeviceGetAttribute cuDeviceGetPCIBusId cuDeviceTotalMem_v2
  cuDevicePrimaryCtxRetain cuDevicePrimaryCtxRelease_v2 cuCtxSetCurrent cuCtxSynchronize
  cuMemGetInfo_v2 cuMemAlloc_v2 cuMemFree_v2 cuMemHostAlloc cuMemFreeHost
  cuMemHostRegister_v2 cuMemHostUnregister cuMemHostGetDevicePointer_v2
  cuMemcpyHtoDAsync_v2 cuMemcpyDtoHAsync_v2 cuMemcpyDtoDAsync_v2 cuMemsetD8Async cuMemsetD32Async
  cuStreamCreateWithPriority cuStreamDestroy_v2 cuStreamSynchronize cuStreamQuery cuStreamWaitEvent
  cuStreamWaitValue32_v2 cuStreamWriteValue32_v2
  cuEventCreate cuEventDestroy_v2 cuEventRecord cuEventQuery cuEventSynchronize cuEventElapsedTime
  cuModuleLoadData cuModuleUnload cuModuleGetFunction cuFuncSetAttribute cuFuncGetAttribute cuLaunchKernelEx
  cuStreamBeginCapture_v2 cuStreamEndCapture cuGraphInstantiateWithFlags cuGraphLaunch cuGraphExecDestroy cuGraphDestroy
)

common=(--wrap-unsafe-ops --no-layout-tests --no-doc-comments --merge-extern-blocks --formatter rustfmt --rust-target 1.85 --rust-edition 2024)

# A struct of loaded symbols: one that a driver lacks is an error and no panic. Codes are newtypes, since a driver newer
# than the header may answer with others. CUDA 12.8 gave cuEventElapsedTime a second name: the first one serves all.
driver_bindings() {
  local header=$1 out=$2 functions
  functions=$(
    IFS='|'
    echo "${driver[*]}"
  )
  printf '#include <cuda.h>\n#undef cuEventElapsedTime\nCUresult CUDAAPI cuEventElapsedTime(float *ms, CUevent start, CUevent end);\n' >"$header"
  "$tool" "$header" --dynamic-loading Cuda --dynamic-link-require-all \
    --allowlist-function "$functions" --allowlist-item 'CU_MEMHOST.*' \
    --newtype-enum 'cudaError_enum|CU.*_enum' "${common[@]}" --output "$out" -- "-I$cuda" "${system[@]}"
}

abi_bindings() {
  "$tool" csrc/abi.h --allowlist-item '(SPECACHE|specache)_.*' --with-derive-default "${common[@]}" --output "$1" -- "${system[@]}"
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
driver_bindings "$work/cuda.h.h" "$work/driver.rs"
abi_bindings "$work/abi.rs"
for name in driver abi; do
  note="// Made by tools/bindings.sh: change the header and run it again."
  { echo "$note"; cat "$work/$name.rs"; } >"$work/$name.noted.rs"
  if [ "${1:-}" = --check ]; then
    diff -u "$to/$name.rs" "$work/$name.noted.rs" || {
      echo "bindings: $to/$name.rs is not what the header says: run tools/bindings.sh" >&2
      exit 1
    }
  else
    mkdir -p "$to"
    cp "$work/$name.noted.rs" "$to/$name.rs"
    echo "$to/$name.rs"
  fi
done
