#!/usr/bin/env bash
# Installs a CUDA 13.0 compiler (nvcc, headers, ptxas) from Python wheels into target/cuda and prints nvcc's path.
# Needs python3 with pip and a C++ compiler for nvcc to call; no GPU, no driver, no root. A second call does nothing.
set -euo pipefail

if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
  echo "usage: tools/cuda-toolkit.sh    (installs nvcc 13.0 into target/cuda, prints its path)"
  exit 0
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
target=$root/target/cuda
nvcc=$target/nvidia/cu13/bin/nvcc
# About 400 MB; one version for all five, or nvcc and its headers disagree.
packages=(nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt nvidia-cuda-runtime nvidia-cuda-cccl)
version='13.0.*'

fail() {
  echo "cuda-toolkit: $*" >&2
  exit 1
}

works() { [ -f "$target/.complete" ] && [ -x "$nvcc" ] && "$nvcc" --version >/dev/null 2>&1; }

# Into a folder of its own, moved at the end: an interrupted install leaves nothing that looks finished.
install() {
  local fresh=$1 requirements=()
  local package
  for package in "${packages[@]}"; do requirements+=("$package==$version"); done
  rm -rf "$fresh"
  PIP_ROOT_USER_ACTION=ignore python3 -m pip install --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --target "$fresh" "${requirements[@]}" >&2
}

if ! works; then
  command -v python3 >/dev/null || fail "python3 is missing: install Python 3.9 or newer"
  python3 -m pip --version >/dev/null 2>&1 ||
    fail "pip is missing: install it (python3 -m ensurepip, or the package python3-pip)"
  fresh=$target.partial.$$
  trap 'rm -rf "$fresh"' EXIT
  mkdir -p "$root/target"
  if ! install "$fresh"; then
    echo "cuda-toolkit: the install failed, trying once more" >&2
    sleep 5
    install "$fresh" || fail "could not install ${packages[*]} ==$version: see pip's message above"
  fi
  # Wheels do not keep the executable bit everywhere.
  chmod +x "$fresh"/nvidia/cu13/bin/* "$fresh"/nvidia/cu13/nvvm/bin/* 2>/dev/null || true
  # nvcc links from lib64, the wheels have lib.
  [ -e "$fresh/nvidia/cu13/lib64" ] || ln -s lib "$fresh/nvidia/cu13/lib64"
  touch "$fresh/.complete"
  rm -rf "$target"
  mv "$fresh" "$target"
  works || fail "$nvcc is there but does not run: $("$nvcc" --version 2>&1 | head -n 1)"
fi
echo "$nvcc"
