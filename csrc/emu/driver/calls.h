// What every call of the driver does before and after its own part.
#pragma once

// The prototypes are cuda.h's: a definition with another signature does not compile.
#pragma GCC visibility push(default)
#include <cuda.h>
#pragma GCC visibility pop

#include "device.h"

namespace emu::driver {

enum Need { kNothing, kInit, kContext };

extern bool initialised;
extern thread_local CUcontext current_context;

// Runs the body of a call under the lock if the state allows it. A device that an operation has broken answers nothing
// else any more, as after a fault on a GPU.
template <class Body> CUresult call(const char* function, Need need, Body body) {
    Device& d = device();
    Device::Lock lock(d.mutex);
    CUresult result;
    if (must_fail(function, &result)) return result;
    if (need != kNothing && !initialised) return CUDA_ERROR_NOT_INITIALIZED;
    if (need == kContext && current_context == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
    if (need == kContext && d.broken != CUDA_SUCCESS) return d.broken;
    result = body(d, lock);
    d.end_of_call(lock);
    return result;
}

// Puts work into a stream, or into the graph that it is captured into.
CUresult enqueue(Device& d, Stream* stream, Work work);
// Whether a stream records: then nothing may wait for it.
// Whether the calling thread is in the middle of a capture, which a wait or a question of the host's breaks: seen on an
// H200 with driver 580, with events that have nothing to do with the capture.
bool breaks_capture();

inline bool is_capturing(const Stream* stream) { return stream->capture != nullptr; }

// Waits for everything, and forgets the work that failed.
CUresult drain(Device& d, Device::Lock& lock);

}   // namespace emu::driver
