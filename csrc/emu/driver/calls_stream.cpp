// Calls about streams, events, host functions and values that streams wait for.
#include "calls.h"
#include "graph.h"

namespace emu::driver {

static uint32_t events_made = 0;

static Event* event_of(Device& d, CUevent handle) {
    const auto found = d.events.find(handle);
    return found == d.events.end() ? nullptr : found->second.get();
}

static Work marker(const char* name) {
    Work work;
    work.name = name;
    return work;
}

static CUresult create_stream(Device& d, CUstream* out, unsigned flags, int priority) {
    if (!out || flags > CU_STREAM_NON_BLOCKING) return CUDA_ERROR_INVALID_VALUE;
    Stream* stream = d.create_stream((flags & CU_STREAM_NON_BLOCKING) == 0, priority);
    *out = reinterpret_cast<CUstream>(stream);
    log_call("stream", "\"stream\":%u,\"priority\":%d,\"blocking\":%s", stream->index, priority,
             stream->blocking ? "true" : "false");
    return CUDA_SUCCESS;
}

static CUresult record(Device& d, CUevent handle, Stream* stream) {
    Event* event = event_of(d, handle);
    if (!event || !stream) return CUDA_ERROR_INVALID_HANDLE;
    log_call("record", "\"event\":%u,\"stream\":%u", event->number, stream->index);
    event->capture = stream->capture;
    if (stream->capture) event->node = stream->capture->add(stream, marker("record"));
    else {
        const CUresult result = enqueue(d, stream, marker("record"));
        if (result != CUDA_SUCCESS) return result;
        event->recorded = stream->tail;
    }
    return CUDA_SUCCESS;
}

static CUresult wait_event(Device& d, Stream* stream, CUevent handle) {
    Event* event = event_of(d, handle);
    if (!event || !stream) return CUDA_ERROR_INVALID_HANDLE;
    log_call("wait", "\"event\":%u,\"stream\":%u", event->number, stream->index);
    if (event->capture) {
        if (stream->capture && stream->capture != event->capture) return CUDA_ERROR_STREAM_CAPTURE_MERGE;
        if (stream == d.legacy()) return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
        event->capture->join(stream);
        event->capture->add(stream, marker("wait"), {event->node});
        return CUDA_SUCCESS;
    }
    if (stream->capture) {   // a graph cannot wait for what is outside of it
        stream->capture->invalid = true;
        return CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
    }
    if (!event->recorded)
        report_note("stream %u waits for event %u, which was never recorded", stream->index, event->number);
    else d.submit(stream, marker("wait"), {event->recorded});
    return CUDA_SUCCESS;
}

static CUresult elapsed(Device& d, float* out, CUevent from, CUevent to) {
    Event *a = event_of(d, from), *b = event_of(d, to);
    if (!out) return CUDA_ERROR_INVALID_VALUE;
    if (!a || !b || !a->timed || !b->timed || !a->recorded || !b->recorded) return CUDA_ERROR_INVALID_HANDLE;
    if (!a->recorded->done || !b->recorded->done) return CUDA_ERROR_NOT_READY;
    *out = std::chrono::duration<float, std::milli>(b->recorded->time - a->recorded->time).count();
    return CUDA_SUCCESS;
}

// ---- values ---------------------------------------------------------------------------------------------------------

// What was known to be complete when a stream wrote the value: whoever waits for it knows it too.
struct Released {
    uint32_t value;
    Clock clock;
};

static std::map<CUdeviceptr, Released>& released() {
    static auto* all = new std::map<CUdeviceptr, Released>;
    return *all;
}

static bool holds(uint32_t value, uint32_t wanted, unsigned condition) {
    switch (condition) {
        case CU_STREAM_WAIT_VALUE_GEQ:
            return int32_t(value - wanted) >= 0;
        case CU_STREAM_WAIT_VALUE_EQ:
            return value == wanted;
        case CU_STREAM_WAIT_VALUE_AND:
            return (value & wanted) != 0;
        default:
            return ~(value | wanted) != 0;
    }
}

static CUresult value_work(Device& d, Stream* stream, CUdeviceptr at, const char* name, Work work) {
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    if (at % 4 != 0 || d.memory.kind(at, 4) == nullptr) return CUDA_ERROR_INVALID_VALUE;
    log_call(name, "\"address\":\"%#zx\",\"stream\":%u", size_t(at), stream->index);
    work.name = name;
    work.signals = true;
    return enqueue(d, stream, std::move(work));
}

static Work wait_for(CUdeviceptr at, uint32_t value, unsigned flags) {
    Work work;
    work.ready = [=] {
        if (!device().memory.kind(at, 4)) return true;   // freed: running it says so
        return holds(__atomic_load_n(reinterpret_cast<uint32_t*>(at), __ATOMIC_ACQUIRE), value, flags & 3);
    };
    work.run = [=] {
        Device& d = device();
        d.memory.access(at, 4, false);
        const auto by_stream = released().find(at);
        if (by_stream != released().end() && holds(by_stream->second.value, value, flags & 3))
            return d.learn_running(by_stream->second.clock);
        d.learn_running(d.host);
        d.learn_running(d.seen);
    };
    return work;
}

static Work write_of(CUdeviceptr at, uint32_t value) {
    Work work;
    work.run = [=] {
        Device& d = device();
        d.memory.access(at, 4, true);
        released()[at] = Released{value, d.running_clock()};
        if (*d.memory.kind(at, 4) == Memory::kHost) join(d.seen, d.running_clock());
        __atomic_store_n(reinterpret_cast<uint32_t*>(at), value, __ATOMIC_RELEASE);
    };
    return work;
}

}   // namespace emu::driver

using namespace emu::driver;

// ---- streams ----

CUresult CUDAAPI cuStreamCreate(CUstream* out, unsigned int flags) {
    return call(__func__, kContext, [&](Device& d, Device::Lock&) { return create_stream(d, out, flags, 0); });
}

CUresult CUDAAPI cuStreamCreateWithPriority(CUstream* out, unsigned int flags, int priority) {
    return call(__func__, kContext, [&](Device& d, Device::Lock&) { return create_stream(d, out, flags, priority); });
}

CUresult CUDAAPI cuStreamDestroy(CUstream handle) {
    return call(__func__, kContext, [&](Device& d, Device::Lock&) {
        Stream* stream = d.stream_of(handle);
        if (!stream || stream == d.legacy()) return CUDA_ERROR_INVALID_HANDLE;
        stream->destroyed = true;
        return CUDA_SUCCESS;
    });
}

CUresult CUDAAPI cuStreamSynchronize(CUstream handle) {
    return call(__func__, kContext, [&](Device& d, Device::Lock& lock) {
        Stream* stream = d.stream_of(handle);
        if (!stream) return CUDA_ERROR_INVALID_HANDLE;
        if (is_capturing(stream)) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
        log_call("synchronize", "\"what\":\"stream\",\"stream\":%u", stream->index);
        return stream->tail ? d.wait(stream->tail, lock) : CUDA_SUCCESS;
    });
}

CUresult CUDAAPI cuStreamQuery(CUstream handle) {
    return call(__func__, kContext, [&](Device& d, Device::Lock&) {
        Stream* stream = d.stream_of(handle);
        if (!stream) return CUDA_ERROR_INVALID_HANDLE;
        if (is_capturing(stream)) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
        if (!stream->queue.empty()) return CUDA_ERROR_NOT_READY;
        if (stream->tail) d.learn(*stream->tail);
        return CUDA_SUCCESS;
    });
}

CUresult CUDAAPI cuStreamWaitEvent(CUstream stream, CUevent event, unsigned int) {
    return call(__func__, kContext,
                [&](Device& d, Device::Lock&) { return wait_event(d, d.stream_of(stream), event); });
}

CUresult CUDAAPI cuLaunchHostFunc(CUstream handle, CUhostFn function, void* argument) {
    return call(__func__, kContext, [&](Device& d, Device::Lock&) {
        Stream* stream = d.stream_of(handle);
        if (!stream) return CUDA_ERROR_INVALID_HANDLE;
        if (!function) return CUDA_ERROR_INVALID_VALUE;
        log_call("host_function", "\"stream\":%u", stream->index);
        Work work = marker("host function");
        work.host_function = true;
        work.run = [=] { function(argument); };
        return enqueue(d, stream, std::move(work));
    });
}

CUresult CUDAAPI cuStreamWaitValue32(CUstream stream, CUdeviceptr at, cuuint32_t value, unsigned int flags) {
    return call(__func__, kContext, [&](Device& d, Device::Lock&) {
        return value_work(d, d.stream_of(stream), at, "wait_value", wait_for(at, value, flags));
    });
}

CUresult CUDAAPI cuStreamWriteValue32(CUstream stream, CUdeviceptr at, cuuint32_t value, unsigned int) {
    return call(__func__, kContext, [&](Device& d, Device::Lock&) {
        return value_work(d, d.stream_of(stream), at, "write_value", write_of(at, value));
    });
}

// ---- events ----

CUresult CUDAAPI cuEventCreate(CUevent* out, unsigned int flags) {
    return call(__func__, kContext, [&](Device& d, Device::Lock&) {
        if (!out) return CUDA_ERROR_INVALID_VALUE;
        auto event = std::make_unique<Event>();
        event->number = ++events_made;
        event->timed = (flags & CU_EVENT_DISABLE_TIMING) == 0;
        *out = reinterpret_cast<CUevent>(event.get());
        d.events[*out] = std::move(event);
        return CUDA_SUCCESS;
    });
}

CUresult CUDAAPI cuEventDestroy(CUevent handle) {
    return call(__func__, kContext, [&](Device& d, Device::Lock&) {
        return d.events.erase(handle) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
    });
}

CUresult CUDAAPI cuEventRecord(CUevent event, CUstream stream) {
    return call(__func__, kContext, [&](Device& d, Device::Lock&) { return record(d, event, d.stream_of(stream)); });
}

CUresult CUDAAPI cuEventQuery(CUevent handle) {
    return call(__func__, kContext, [&](Device& d, Device::Lock&) {
        Event* event = event_of(d, handle);
        if (!event) return CUDA_ERROR_INVALID_HANDLE;
        if (event->capture) return CUDA_ERROR_CAPTURED_EVENT;
        if (breaks_capture()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
        if (!event->recorded) return CUDA_SUCCESS;
        if (!event->recorded->done) return CUDA_ERROR_NOT_READY;
        d.learn(*event->recorded);
        return CUDA_SUCCESS;
    });
}

CUresult CUDAAPI cuEventSynchronize(CUevent handle) {
    return call(__func__, kContext, [&](Device& d, Device::Lock& lock) {
        Event* event = event_of(d, handle);
        if (!event) return CUDA_ERROR_INVALID_HANDLE;
        if (event->capture) return CUDA_ERROR_CAPTURED_EVENT;
        if (breaks_capture()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
        log_call("synchronize", "\"what\":\"event\",\"event\":%u", event->number);
        return event->recorded ? d.wait(event->recorded, lock) : CUDA_SUCCESS;
    });
}

CUresult CUDAAPI cuEventElapsedTime(float* milliseconds, CUevent from, CUevent to) {
    return call(__func__, kContext, [&](Device& d, Device::Lock&) { return elapsed(d, milliseconds, from, to); });
}

// The name before version 13.
#undef cuEventElapsedTime
extern "C" __attribute__((visibility("default"))) CUresult CUDAAPI cuEventElapsedTime(float* milliseconds, CUevent from,
                                                                                      CUevent to) {
    return call(__func__, kContext, [&](Device& d, Device::Lock&) { return elapsed(d, milliseconds, from, to); });
}
