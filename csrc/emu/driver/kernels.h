// The kernels that the emulated GPU can run, by name.
#pragma once

#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <tuple>
#include <vector>

namespace emu::driver {

struct Kernel {
    const char* source;   // file of csrc that it comes from
    std::vector<size_t> parameter_bytes;
    // A launch with these parameters, copied: each thread calls it.
    std::function<std::function<void()>(void** parameters)> bind;
};

inline std::map<std::string, Kernel>& kernels() {
    static auto* all = new std::map<std::string, Kernel>;
    return *all;
}

template <class... P> struct Registered {
    Registered(const char* source, const char* name, void (*kernel)(P...)) {
        kernels()[name] = Kernel{source, {sizeof(P)...}, [kernel](void** from) -> std::function<void()> {
                                     return bind(kernel, from, std::index_sequence_for<P...>());
                                 }};
    }

private:
    template <size_t... I>
    static std::function<void()> bind(void (*kernel)(P...), void** from, std::index_sequence<I...>) {
        std::tuple<P...> parameters;
        (std::memcpy(static_cast<void*>(&std::get<I>(parameters)), from[I], sizeof(P)), ...);
        return [kernel, parameters] { std::apply(kernel, parameters); };
    }
};

}   // namespace emu::driver
