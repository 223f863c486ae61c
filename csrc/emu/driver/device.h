// The emulated GPU: streams of operations, when they run, and what is known to be complete.
//
// Nothing runs when it is submitted. A thread that stands for the GPU runs operations one after the other: those that a
// waiting call needs, more at random (the seed says how many), and all of them once the host has been silent for a
// while. Within what streams and events order, everything may come late: a copy that nobody waits for has not happened.
#pragma once

#include <cuda.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "memory.h"
#include "options.h"

namespace emu::driver {

struct Stream;
struct Graph;
struct Op;
using OpPtr = std::shared_ptr<Op>;

// What an operation does, apart from when: it may run once, or as often as a graph is launched.
struct Work {
    std::string name;
    std::function<void()> run;     // none: a marker
    std::function<bool()> ready;   // none: always
    bool kernel = false;
    bool programmatic = false;    // a kernel that may start before the kernel before it ends
    bool host_function = false;   // runs on a thread of its own, and the driver goes on meanwhile
    bool signals = false;         // waits for, or writes, a value that orders it with others
};

struct Op {
    Work work;
    Stream* stream;
    std::vector<OpPtr> after;   // beside what comes earlier in its stream
    Clock clock;                // what is known to be complete before it; with itself once it is done
    uint32_t early_count = 0;
    bool started = false, done = false;
    std::chrono::steady_clock::time_point time;   // of its end
};

struct Stream {
    uint32_t index;
    bool blocking = false;    // orders itself with the legacy stream
    bool destroyed = false;   // what is queued still runs
    int priority = 0;
    std::deque<OpPtr> queue;
    OpPtr tail;   // the last that was submitted
    Clock clock;
    uint32_t count = 0;         // operations begun
    uint32_t settled = 0;       // of them, complete before a programmatic kernel that comes next may start
    Graph* capture = nullptr;   // records instead of queueing
    int last_node = -1;         // of this stream in the capture
};

struct Event {
    uint32_t number;
    bool timed;
    OpPtr recorded;             // none: never recorded, complete
    Graph* capture = nullptr;   // recorded while capturing
    int node = -1;
};

class Device {
public:
    Device();

    std::mutex mutex;   // held by every call, and while an operation runs
    using Lock = std::unique_lock<std::mutex>;

    Memory memory;
    Clock host;                       // what the host has waited for
    Clock seen;                       // what it may know beside, from what kernels and streams wrote to its memory
    CUresult broken = CUDA_SUCCESS;   // an operation failed: every call answers this from now on
    std::map<CUstream, std::unique_ptr<Stream>> streams;
    std::map<CUevent, std::unique_ptr<Event>> events;

    Stream* create_stream(bool blocking, int priority);
    // Null for a handle that is none.
    Stream* stream_of(CUstream handle);
    Stream* legacy() { return legacy_; }
    Stream* hidden_stream();   // of a graph's branch

    OpPtr submit(Stream* stream, Work work, std::vector<OpPtr> after = {});
    // Until it is done; the host then knows all it knew.
    CUresult wait(const OpPtr& op, Lock& lock);
    CUresult wait_all(Lock& lock);
    // The host found out that it is done.
    void learn(const Op& op) { join(host, op.clock); }
    bool idle(const Stream* stream) const { return stream->queue.empty(); }
    // What an operation that runs may tell the host's clock, or learn from it.
    const Clock& running_clock() const { return running_->clock; }
    void learn_running(const Clock& clock) { join(running_->clock, clock); }
    uint64_t draw() { return random_(); }
    void seed(uint64_t seed) { random_.seed(seed); }

    // At the end of every call: perhaps operations run before it returns.
    void end_of_call(Lock& lock);

private:
    void work();   // of the GPU's thread
    bool run_one(Lock& lock);
    OpPtr pick();
    OpPtr needed(Stream* stream);
    bool is_runnable(const OpPtr& op) const;
    void start(const OpPtr& op, Lock& lock);
    void execute(Op& op);
    void finish(const OpPtr& op);
    void blocked(Lock& lock);
    bool silent() const;

    std::vector<std::unique_ptr<Stream>> hidden_;
    std::vector<Stream*> all_;   // by index
    Stream* legacy_;
    std::condition_variable wanted_changed_, progress_;
    std::vector<OpPtr> wanted_;   // by waiting calls
    int credits_ = 0;             // operations that may run though nobody waits for them
    size_t queued_ = 0;
    Op* running_ = nullptr;
    std::mt19937_64 random_;
    std::chrono::steady_clock::time_point last_call_{}, blocked_since_{};
};

Device& device();

// ---- what a test can see (report.cpp) ----

void report_error(const char* format, ...) __attribute__((format(printf, 1, 2)));
void report_note(const char* format, ...) __attribute__((format(printf, 1, 2)));

// One line of the log: {"call":"...", fields}. `fields` is JSON without the braces.
void log_call(const char* call, const char* format, ...) __attribute__((format(printf, 2, 3)));
bool is_logging();

// Whether this call, or operation, is the one that is to fail.
bool must_fail(const char* function, CUresult* result);

}   // namespace emu::driver
