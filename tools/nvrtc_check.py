#!/usr/bin/env python3
"""Compiles every kernel file by NVRTC, as the host program does on a machine without nvcc.

Sources and headers are passed in memory and nothing else is on the path: a kernel that includes a header of CUDA or of
the C library does not compile. Warnings are errors. Prints the CPU seconds of each. Needs no GPU.

usage: tools/nvrtc_check.py LIBRARY_FOLDER ARCHITECTURE...    say target/nvrtc/nvidia/cu13/lib 86 90a
"""

import ctypes
import pathlib
import sys
import time

CSRC = pathlib.Path(__file__).resolve().parent.parent / "csrc"


def load(folder):
    """NVRTC. It opens its builtins by name later, and finds them because they are loaded already."""
    ctypes.CDLL(str(next(folder.glob("libnvrtc-builtins.so.*"))), ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(next(folder.glob("libnvrtc.so.*"))))


def strings(texts):
    return (ctypes.c_char_p * len(texts))(*[text.encode() for text in texts])


def compile_file(nvrtc, source, headers, arch):
    """The log, which should be empty, and the bytes of machine code."""
    program = ctypes.c_void_p()
    texts, names = strings([h.read_text() for h in headers]), strings([h.name for h in headers])
    created = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source.read_bytes(), source.name.encode(), len(headers), texts, names
    )
    if created != 0:
        return f"nvrtcCreateProgram: {created}", 0
    result = nvrtc.nvrtcCompileProgram(program, 2, strings([f"--gpu-architecture=sm_{arch}", "--std=c++17"]))
    size, image = ctypes.c_size_t(), ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(image))
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    failed = f"nvrtcCompileProgram: {result}\n" if result != 0 else ""
    return failed + log.value.decode(), image.value


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    nvrtc = load(pathlib.Path(sys.argv[1]))
    headers = sorted(path for path in CSRC.iterdir() if path.suffix in (".h", ".cuh"))
    # Each kernel file has a launch plan; the other .cu files are programs.
    sources = [CSRC / f"{plan.stem}.cu" for plan in sorted(CSRC.glob("plan/*.c"))]
    bad = 0
    for arch in sys.argv[2:]:
        for source in sources:
            start = time.process_time()
            log, image = compile_file(nvrtc, source, headers, arch)
            seconds = time.process_time() - start
            word = "FAIL" if log else "ok"
            print(f"{word:<5} NVRTC {source.name:<16} sm_{arch:<4} {seconds:5.1f} s {image:>8} bytes", flush=True)
            if log:
                print(log)
                bad += 1
    sys.exit(bad != 0)


if __name__ == "__main__":
    main()
