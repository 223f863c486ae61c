// First facts about a GPU and its link, one JSON line per measurement on stdout: what the kernels' and the gather's
// design rests on. A probe that fails reports "error" and the others go on. About two minutes.
//
//   usage: probe [--only NAME] [FOOTPRINT_GIB ...]      default footprints: 1 16
//
// Times are medians over repetitions after a warm-up, by device events unless a name says host.
#include <cstdlib>
#include <memory>

#include "probe/gpu.cuh"
#include "probe/link.cuh"

// Runs one probe; an exception becomes its line.
static bool attempt(const std::string& only, const char* name, const std::function<void()>& probe) {
    if (!only.empty() && only != name) return true;
    try {
        probe();
        return true;
    } catch (const std::exception& e) {
        Line(name).text("error", e.what());
        return false;
    }
}

static bool run_all(Bench& bench, const std::string& only) {
    bool ok = attempt(only, "device", [&] { probe_device(bench); });
    ok &= attempt(only, "mma_subnormals", [&] { probe_subnormals(bench); });
    ok &= attempt(only, "bandwidth", [&] { probe_bandwidth(bench); });
    ok &= attempt(only, "launch", [&] { probe_launch(bench); });
    ok &= attempt(only, "graph_node", [&] { probe_graph(bench); });
    ok &= attempt(only, "host_function", [&] { probe_host_function(bench); });
    ok &= attempt(only, "flag_round_trip", [&] { probe_flag(bench); });
    for (double gib : bench.footprints_gib) {
        const bool first = gib == bench.footprints_gib.front();
        // cudaHostAlloc is slow to allocate: only where it is small.
        if (gib <= 4) ok &= attempt(only, "link", [&] { link_of(bench, gib, false, first); });
        ok &= attempt(only, "link", [&] { link_of(bench, gib, true, first); });
    }
    return ok;
}

static int usage() {
    std::fprintf(stderr,
                 "usage: probe [--only NAME] [FOOTPRINT_GIB ...]\n"
                 "names: device mma_subnormals bandwidth launch graph_node host_function flag_round_trip link\n");
    return 2;
}

int main(int argc, char** argv) {
    std::setvbuf(stdout, nullptr, _IOLBF, 0);
    std::string only;
    std::vector<double> footprints;
    for (int i = 1; i < argc; i++) {
        char* end = nullptr;
        if (std::strcmp(argv[i], "--only") == 0 && i + 1 < argc) {
            only = argv[++i];
            continue;
        }
        footprints.push_back(std::strtod(argv[i], &end));
        if (*end != '\0' || !(footprints.back() > 0)) return usage();
    }
    std::unique_ptr<Bench> bench;
    if (!attempt("", "setup", [&] { bench = std::make_unique<Bench>(); })) return 1;
    bench->footprints_gib = footprints.empty() ? std::vector<double>{1, 16} : footprints;
    return run_all(*bench, only) ? 0 : 1;
}
