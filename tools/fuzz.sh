#!/usr/bin/env bash
# Fuzzes what reads a stranger's files, with libFuzzer: coverage-guided, debug assertions and overflow checks on. Needs a C++
# compiler and the stable toolchain (`cargo +nightly fuzz run TARGET` works as well, where cargo-fuzz is).
#
#   tools/fuzz.sh TARGET [SECONDS]    config, weights, index, tokenizer, ids, chat_template or longbench; 600 s
#
# Starts from tests/fixtures/fuzz/TARGET, keeps what it finds in target/fuzz/corpus/TARGET; an input that breaks something
# is left in target/fuzz/found-TARGET-*: make it smaller with -minimize_crash=1, mend the fault, and put the input into
# tests/fixtures/fuzz/TARGET, which tests/fuzz.rs replays.
set -euo pipefail
target=${1:?usage: tools/fuzz.sh TARGET [SECONDS]}
seconds=${2:-600}
cd "$(dirname "$0")/.."
triple=$(rustc -vV | sed -n 's/^host: //p')
export CARGO_TARGET_DIR=$PWD/target/fuzz
# What cargo-fuzz passes, but for AddressSanitizer, which needs a nightly compiler.
export RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1"
cargo build --release --locked --manifest-path fuzz/Cargo.toml --target "$triple" --bin "$target"
mkdir -p "target/fuzz/corpus/$target" "tests/fixtures/fuzz/$target"
# The folders of the models that are tried.
TMPDIR=$(mktemp -d -p "$([ -w /dev/shm ] && echo /dev/shm || echo "${TMPDIR:-/tmp}")")
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT
"target/fuzz/$triple/release/$target" -max_total_time="$seconds" -timeout=30 -rss_limit_mb=4096 -print_final_stats=1 \
    -dict=tests/fixtures/fuzz/words.dict -artifact_prefix="target/fuzz/found-$target-" \
    "target/fuzz/corpus/$target" "tests/fixtures/fuzz/$target"
