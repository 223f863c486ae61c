#include "device.h"

#include <algorithm>
#include <thread>

#include "../fail.h"

namespace emu::driver {

using namespace std::chrono_literals;

// Nothing can run, and a call waits: what it waits for will not come.
constexpr auto kDeadlock = 20s;

Device& device() {
    static Device* the_device = new Device;   // its thread outlives static destructors
    return *the_device;
}

Device::Device() : random_(options().seed) {
    legacy_ = create_stream(false, 0);
    std::thread([this] { work(); }).detach();
}

// ---- streams --------------------------------------------------------------------------------------------------------

Stream* Device::create_stream(bool blocking, int priority) {
    auto stream = std::make_unique<Stream>();
    stream->index = uint32_t(all_.size());
    stream->blocking = blocking;
    stream->priority = priority;
    all_.push_back(stream.get());
    Stream* at = stream.get();
    streams[reinterpret_cast<CUstream>(at)] = std::move(stream);
    return at;
}

Stream* Device::hidden_stream() {
    hidden_.push_back(std::make_unique<Stream>());
    hidden_.back()->index = uint32_t(all_.size());
    all_.push_back(hidden_.back().get());
    return hidden_.back().get();
}

Stream* Device::stream_of(CUstream handle) {
    if (handle == nullptr || handle == CU_STREAM_LEGACY) return legacy_;
    const auto found = streams.find(handle);
    return found == streams.end() || found->second->destroyed ? nullptr : found->second.get();
}

OpPtr Device::submit(Stream* stream, Work work, std::vector<OpPtr> after) {
    auto op = std::make_shared<Op>();
    op->work = std::move(work);
    op->stream = stream;
    op->after = std::move(after);
    op->clock = host;   // what the host waited for, or saw, came before
    join(op->clock, seen);
    if (stream == legacy_)
        for (Stream* s : all_)
            if (s->blocking && s->tail) op->after.push_back(s->tail);
    if (stream->blocking && legacy_->tail) op->after.push_back(legacy_->tail);
    stream->queue.push_back(op);
    stream->tail = op;
    queued_++;
    return op;
}

// ---- waiting --------------------------------------------------------------------------------------------------------

CUresult Device::wait(const OpPtr& op, Lock& lock) {
    if (!op->done) {
        wanted_.push_back(op);
        wanted_changed_.notify_one();
        progress_.wait(lock, [&] { return op->done; });
        wanted_.erase(std::find(wanted_.begin(), wanted_.end(), op));
    }
    learn(*op);
    return broken;
}

CUresult Device::wait_all(Lock& lock) {
    std::vector<OpPtr> tails;
    for (Stream* s : all_)
        if (s->tail) tails.push_back(s->tail);
    for (const OpPtr& tail : tails) wait(tail, lock);
    return broken;
}

// How many operations run at the end of a call: none, some, or as many as calls are made.
void Device::end_of_call(Lock& lock) {
    const uint64_t drawn = random_() % 4;
    const uint64_t mode = options().seed % 3;
    if (queued_ != 0 && (mode == 2 || (mode == 1 && drawn == 0))) {
        credits_ = mode == 2 ? 2 : 1;
        wanted_changed_.notify_one();
        progress_.wait(lock, [&] { return credits_ == 0; });
    }
    last_call_ = std::chrono::steady_clock::now();
}

// ---- the GPU's thread -----------------------------------------------------------------------------------------------

// After this long without a call the GPU runs on by itself, as a real one does from the start.
static std::chrono::milliseconds silence() { return std::chrono::milliseconds(options().silence_ms); }

bool Device::silent() const { return std::chrono::steady_clock::now() - last_call_ > silence(); }

void Device::work() {
    Lock lock(mutex);
    for (;;) {
        if (wanted_.empty() && credits_ == 0 && (queued_ == 0 || !silent())) {
            wanted_changed_.wait_for(lock, silence());
            continue;
        }
        if (run_one(lock)) {
            blocked_since_ = {};
            if (credits_ > 0) credits_--;
        } else {
            credits_ = 0;
            blocked(lock);
        }
        progress_.notify_all();
    }
}

bool Device::run_one(Lock& lock) {
    const OpPtr op = pick();
    if (op) start(op, lock);
    return op != nullptr;
}

// Nothing can run: the host has to do something first.
void Device::blocked(Lock& lock) {
    const auto now = std::chrono::steady_clock::now();
    if (blocked_since_ == decltype(now)()) blocked_since_ = now;
    const bool runs =
        std::any_of(all_.begin(), all_.end(), [](Stream* s) { return !s->queue.empty() && s->queue.front()->started; });
    if (!wanted_.empty() && !runs && broken == CUDA_SUCCESS && now - blocked_since_ > kDeadlock) {
        report_error("deadlock: a call waits for %s (stream %u), and nothing can run", wanted_[0]->work.name.c_str(),
                     wanted_[0]->stream->index);
        broken = CUDA_ERROR_LAUNCH_TIMEOUT;
        return;
    }
    progress_.notify_all();
    wanted_changed_.wait_for(lock, 100us);
}

bool Device::is_runnable(const OpPtr& op) const {
    if (op->started) return false;
    for (const OpPtr& other : op->after)
        if (!other->done) return false;
    return broken != CUDA_SUCCESS || !op->work.ready || op->work.ready();
}

// The first operation that must run before the stream's next one can, or that one.
OpPtr Device::needed(Stream* stream) {
    const OpPtr& next = stream->queue.front();
    if (is_runnable(next)) return next;
    for (const OpPtr& other : next->after)
        if (!other->done) return needed(other->stream);
    return nullptr;
}

OpPtr Device::pick() {
    const bool late = options().seed % 3 == 0 || random_() % 2 == 0;
    if (!wanted_.empty() && !wanted_[0]->done && late)
        if (OpPtr op = needed(wanted_[0]->stream)) return op;
    std::vector<OpPtr> runnable;
    for (Stream* s : all_)
        if (!s->queue.empty() && is_runnable(s->queue.front())) runnable.push_back(s->queue.front());
    return runnable.empty() ? nullptr : runnable[random_() % runnable.size()];
}

void Device::start(const OpPtr& op, Lock&) {
    Stream& stream = *op->stream;
    op->started = true;
    join(op->clock, stream.clock);
    for (const OpPtr& other : op->after) join(op->clock, other->clock);
    op->after.clear();
    stream.count++;
    op->early_count = stream.settled;
    if (!op->work.programmatic) stream.settled = op->work.kernel ? stream.count - 1 : stream.count;
    if (op->work.host_function && broken == CUDA_SUCCESS) {
        credits_ = 0;   // it may need locks of the thread that waits here
        progress_.notify_all();
        std::thread([this, op] {
            op->work.run();
            Lock lock(mutex);
            finish(op);
            progress_.notify_all();
            wanted_changed_.notify_one();
        }).detach();
        return;
    }
    if (broken == CUDA_SUCCESS) execute(*op);
    finish(op);
}

void Device::execute(Op& op) {
    if (CUresult result; must_fail(op.work.name.c_str(), &result)) {
        broken = result;
        return;
    }
    const uint32_t stream = op.stream->index, count = op.stream->count;
    Actor actor{0, &op.clock, stream, op.early_count, op.work.programmatic};
    running_ = &op;
    if (op.work.run && !op.work.signals) {
        actor.id = memory.begin(op.work.name, stream, count);
        memory.set_actor(actor);
    }
    try {
        if (op.work.run) op.work.run();
    } catch (const Failure& failure) {
        report_error("%s (stream %u): %s", op.work.name.c_str(), stream, failure.text.c_str());
        broken = CUDA_ERROR_ILLEGAL_ADDRESS;
    }
    // The host may have seen it, and with it what came before; of the rest of the kernel it knows nothing.
    if (op.work.kernel && memory.wrote_host()) join(seen, op.clock);
    memory.set_actor(Actor{});
    running_ = nullptr;
}

void Device::finish(const OpPtr& op) {
    Stream& stream = *op->stream;
    Clock& clock = op->clock;
    if (clock.size() <= stream.index) clock.resize(stream.index + 1);
    clock[stream.index] = stream.count;
    stream.clock = clock;
    op->done = true;
    op->time = std::chrono::steady_clock::now();
    op->work.run = nullptr;   // and what it holds
    op->work.ready = nullptr;
    stream.queue.pop_front();
    queued_--;
}

}   // namespace emu::driver
