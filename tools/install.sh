#!/bin/sh
# Installs the C library: header, libspecache.so and .a, the file for pkg-config, and the command line with its manual pages
# and the completions of bash, zsh and fish.
#
#   tools/install.sh PREFIX            builds in release, then installs below PREFIX (such as /usr/local)
#   tools/install.sh PREFIX --from DIR installs what was built into DIR: a target folder, or one with the libraries
#
# DESTDIR is put before PREFIX, for packagers. LIBDIR (default PREFIX/lib) is where the libraries go.
set -eu
usage="usage: tools/install.sh PREFIX [--from DIR]"
case ${1:-} in
    -h | --help) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 0 ;;
esac
prefix=${1:?$usage}
case $prefix in
    /*) ;;
    -*) echo "$usage" >&2; exit 2 ;;
    *) prefix=$PWD/$prefix ;;
esac
case ${2:-} in
    --from) from=$(cd "${3:?$usage}" && pwd) ;;
    '') from= ;;
    *) echo "$usage" >&2; exit 2 ;;
esac
cd "$(dirname "$0")/.."
if [ -z "$from" ]; then
    cargo build --release --locked
    from=${CARGO_TARGET_DIR:-target}/release
fi

version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
abi=$(sed -n 's/^#define SPECACHE_ABI_MAJOR \([0-9]*\)u$/\1/p' include/specache.h)
libdir=${LIBDIR:-$prefix/lib}
lib=${DESTDIR:-}$libdir
root=${DESTDIR:-}$prefix
mkdir -p "$lib/pkgconfig" "$root/include" "$root/bin"

# Without line tables where binutils are there, as they are most of the bytes.
place() {
    if strip -g -o "$3.new" "$from/$2" 2>/dev/null; then
        chmod "$1" "$3.new" && mv -f "$3.new" "$3"
    else
        rm -f "$3.new" && install -m "$1" "$from/$2" "$3"
    fi
}
install -m 644 include/specache.h "$root/include/specache.h"
# Programs remember libspecache.so.<abi>, linkers look for libspecache.so.
place 755 libspecache.so "$lib/libspecache.so.$abi.$version"
ln -sf "libspecache.so.$abi.$version" "$lib/libspecache.so.$abi"
ln -sf "libspecache.so.$abi" "$lib/libspecache.so"
place 644 libspecache.a "$lib/libspecache.a"
if [ -x "$from/specache-engine" ]; then
    install -m 755 "$from/specache-engine" "$root/bin/specache-engine"
    # Written by the program itself, in the places where shells and man look for them.
    share=$root/share
    mkdir -p "$share/man/man1" "$share/bash-completion/completions" "$share/zsh/site-functions" "$share/fish/vendor_completions.d"
    "$from/specache-engine" man -o "$share/man/man1"
    "$from/specache-engine" completions bash > "$share/bash-completion/completions/specache-engine"
    "$from/specache-engine" completions zsh > "$share/zsh/site-functions/_specache-engine"
    "$from/specache-engine" completions fish > "$share/fish/vendor_completions.d/specache-engine.fish"
fi
cat > "$lib/pkgconfig/specache.pc" <<PC
prefix=$prefix
includedir=\${prefix}/include
libdir=$libdir

Name: specache
Description: LLM inference whose 16-bit KV cache stays in host memory (SpeCache)
Version: $version
Cflags: -I\${includedir}
Libs: -L\${libdir} -lspecache
Libs.private: -lgcc_s -lutil -lrt -lpthread -lm -ldl -lc
PC
echo "installed specache $version below $root"
