// What the emulated NVRTC makes of a source and the emulated driver loads: text that names the source, the architecture
// and the options.
#pragma once

#include <string>

namespace emu::driver {

constexpr const char* kImageMagic = "specache emulated image\n";

inline std::string image_field(const std::string& text, const std::string& name) {
    const size_t at = text.find("\n" + name + " ");
    if (at == std::string::npos) return "";
    const size_t start = at + name.size() + 2;
    return text.substr(start, text.find('\n', start) - start);
}

}   // namespace emu::driver
