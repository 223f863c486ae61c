#!/usr/bin/env bash
# Builds what is released: the program and the libraries with kernels for every GPU inside, and packs them with the header.
# Needs nothing but Rust, gcc and python3: nvcc comes from PyPI (tools/cuda-toolkit.sh). Takes some minutes a core.
# usage: tools/release.sh [FOLDER]     default target/dist; leaves FOLDER/specache-engine-VERSION-ARCH.tar.gz
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
  sed -n '2,4s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit 0
fi
folder=${1:-target/dist}
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
name=specache-engine-$version-$(uname -m)

SPECACHE_NVCC=$(tools/cuda-toolkit.sh)
export SPECACHE_NVCC
cargo build --release --locked
rm -rf "${folder:?}/$name"
mkdir -p "$folder/$name"
tools/install.sh "$folder/$name" >/dev/null
cp README.md CHANGELOG.md LICENSE-* "$folder/$name/"
tar -C "$folder" -czf "$folder/$name.tar.gz" "$name"
ls -l "$folder/$name.tar.gz"
