// What all kernel tests share: a failing check names its place and ends the test.
#pragma once

#include <cstdio>
#include <cstdlib>

#define CHECK(condition, ...)                                                    \
    do {                                                                         \
        if (!(condition)) {                                                      \
            std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
            std::fprintf(stderr, __VA_ARGS__);                                   \
            std::fputc('\n', stderr);                                            \
            std::_Exit(1);                                                       \
        }                                                                        \
    } while (0)
