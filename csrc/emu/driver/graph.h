// A captured graph: the work of its streams, and what of it waits for what.
#pragma once

#include <thread>
#include <vector>

#include "device.h"

namespace emu::driver {

struct Graph {
    struct Node {
        Work work;
        int branch;               // the captured stream it came from
        std::vector<int> after;   // nodes, beside what comes earlier in its branch
        int before = -1;          // in its branch
    };
    Stream* origin = nullptr;
    std::thread::id owner;           // the thread that captures
    bool relaxed = false;            // CU_STREAM_CAPTURE_MODE_RELAXED
    std::vector<Stream*> branches;   // that are captured; [0] is the origin
    std::vector<Node> nodes;
    bool invalid = false;   // something happened that no graph can hold

    // Adds work to a captured stream; the answer is the node.
    int add(Stream* stream, Work work, std::vector<int> after = {});
    // A stream that waits for an event of the capture joins it.
    void join(Stream* stream);
    bool is_joined() const;   // whether the origin waits, in the end, for everything
    void release();           // the streams go back to running
};

// What a graph becomes when it is instantiated: each branch has a stream of its own.
struct GraphExec {
    std::vector<Graph::Node> nodes;
    std::vector<Stream*> streams;
};

}   // namespace emu::driver
