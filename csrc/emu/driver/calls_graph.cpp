// Captures of streams, and graphs. Launched, a graph is its operations again, ordered as they were captured, and as a
// whole at its place in the stream.
#include <map>
#include <memory>
#include <set>

#include "calls.h"
#include "graph.h"

namespace emu::driver {

int Graph::add(Stream* stream, Work work, std::vector<int> after) {
    int branch = 0;
    while (branches[size_t(branch)] != stream) branch++;
    nodes.push_back(Node{std::move(work), branch, std::move(after), stream->last_node});
    return stream->last_node = int(nodes.size()) - 1;
}

void Graph::join(Stream* stream) {
    if (stream->capture == this) return;
    stream->capture = this;
    stream->last_node = -1;
    branches.push_back(stream);
}

bool Graph::is_joined() const {
    std::set<int> seen;
    std::vector<int> open{origin->last_node};
    while (!open.empty()) {
        const int at = open.back();
        open.pop_back();
        if (at < 0 || !seen.insert(at).second) continue;
        open.push_back(nodes[size_t(at)].before);
        for (int other : nodes[size_t(at)].after) open.push_back(other);
    }
    return seen.size() == nodes.size();
}

void Graph::release() {
    for (Stream* stream : branches) {
        stream->capture = nullptr;
        stream->last_node = -1;
    }
}

static std::map<CUgraph, std::unique_ptr<Graph>>& graphs() {
    static auto* all = new std::map<CUgraph, std::unique_ptr<Graph>>;
    return *all;
}

static std::map<CUgraphExec, std::unique_ptr<GraphExec>>& execs() {
    static auto* all = new std::map<CUgraphExec, std::unique_ptr<GraphExec>>;
    return *all;
}

bool breaks_capture() {
    bool broken = false;
    for (const auto& g : graphs()) {
        Graph& graph = *g.second;
        const bool open = graph.origin->capture == &graph;
        if (open && !graph.relaxed && graph.owner == std::this_thread::get_id()) broken = graph.invalid = true;
    }
    return broken;
}

CUresult enqueue(Device& d, Stream* stream, Work work) {
    if (stream->capture) {
        stream->capture->add(stream, std::move(work));
        return CUDA_SUCCESS;
    }
    if (stream == d.legacy())
        for (const auto& s : d.streams)
            if (s.second->blocking && is_capturing(s.second.get())) return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
    d.submit(stream, std::move(work));
    return CUDA_SUCCESS;
}

static CUresult end_capture(Stream* stream, CUgraph* out) {
    Graph* graph = stream->capture;
    if (!graph) return CUDA_ERROR_INVALID_VALUE;
    if (graph->origin != stream) return CUDA_ERROR_STREAM_CAPTURE_UNMATCHED;
    const CUgraph handle = reinterpret_cast<CUgraph>(graph);
    const CUresult result = graph->invalid        ? CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
                            : !graph->is_joined() ? CUDA_ERROR_STREAM_CAPTURE_UNJOINED
                                                  : CUDA_SUCCESS;
    graph->release();
    *out = result == CUDA_SUCCESS ? handle : nullptr;
    if (result != CUDA_SUCCESS) graphs().erase(handle);
    return result;
}

static void launch(Device& d, const GraphExec& exec, Stream* stream) {
    Work marker;
    marker.name = "begin of a graph";
    const OpPtr begin = d.submit(stream, marker);
    std::vector<OpPtr> ops, last(exec.streams.size());
    for (const Graph::Node& node : exec.nodes) {
        std::vector<OpPtr> after;
        if (node.before < 0) after.push_back(begin);
        for (int other : node.after) after.push_back(ops[size_t(other)]);
        ops.push_back(d.submit(exec.streams[size_t(node.branch)], node.work, after));
        last[size_t(node.branch)] = ops.back();
    }
    std::vector<OpPtr> ends;
    for (const OpPtr& op : last)
        if (op) ends.push_back(op);
    marker.name = "end of a graph";
    d.submit(stream, marker, ends);
}

}   // namespace emu::driver

using namespace emu::driver;

CUresult CUDAAPI cuStreamBeginCapture(CUstream handle, CUstreamCaptureMode mode) {
    return call(__func__, kContext, [&](Device& d, Device::Lock&) {
        Stream* stream = d.stream_of(handle);
        if (!stream) return CUDA_ERROR_INVALID_HANDLE;
        if (stream == d.legacy()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
        if (stream->capture) return CUDA_ERROR_INVALID_VALUE;
        auto graph = std::make_unique<Graph>();
        graph->origin = stream;
        graph->owner = std::this_thread::get_id();
        graph->relaxed = mode == CU_STREAM_CAPTURE_MODE_RELAXED;
        graph->join(stream);
        log_call("begin_capture", "\"stream\":%u", stream->index);
        graphs()[reinterpret_cast<CUgraph>(graph.get())] = std::move(graph);
        return CUDA_SUCCESS;
    });
}

CUresult CUDAAPI cuStreamEndCapture(CUstream handle, CUgraph* out) {
    return call(__func__, kContext, [&](Device& d, Device::Lock&) {
        Stream* stream = d.stream_of(handle);
        if (!stream) return CUDA_ERROR_INVALID_HANDLE;
        if (!out) return CUDA_ERROR_INVALID_VALUE;
        log_call("end_capture", "\"stream\":%u", stream->index);
        return end_capture(stream, out);
    });
}

CUresult CUDAAPI cuGraphInstantiateWithFlags(CUgraphExec* out, CUgraph handle, unsigned long long) {
    return call(__func__, kContext, [&](Device& d, Device::Lock&) {
        const auto found = graphs().find(handle);
        if (!out || found == graphs().end() || found->second->origin->capture == found->second.get())
            return CUDA_ERROR_INVALID_VALUE;
        auto exec = std::make_unique<GraphExec>();
        exec->nodes = found->second->nodes;
        for (size_t i = 0; i < found->second->branches.size(); i++) exec->streams.push_back(d.hidden_stream());
        *out = reinterpret_cast<CUgraphExec>(exec.get());
        execs()[*out] = std::move(exec);
        return CUDA_SUCCESS;
    });
}

CUresult CUDAAPI cuGraphLaunch(CUgraphExec handle, CUstream stream_handle) {
    return call(__func__, kContext, [&](Device& d, Device::Lock&) {
        Stream* stream = d.stream_of(stream_handle);
        const auto found = execs().find(handle);
        if (!stream) return CUDA_ERROR_INVALID_HANDLE;
        if (found == execs().end()) return CUDA_ERROR_INVALID_VALUE;
        if (is_capturing(stream)) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
        log_call("graph_launch", "\"nodes\":%zu,\"stream\":%u", found->second->nodes.size(), stream->index);
        launch(d, *found->second, stream);
        return CUDA_SUCCESS;
    });
}

CUresult CUDAAPI cuGraphExecDestroy(CUgraphExec handle) {
    return call(__func__, kContext, [&](Device&, Device::Lock&) {
        return execs().erase(handle) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
    });
}

CUresult CUDAAPI cuGraphDestroy(CUgraph handle) {
    return call(__func__, kContext, [&](Device&, Device::Lock&) {
        return graphs().erase(handle) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
    });
}
