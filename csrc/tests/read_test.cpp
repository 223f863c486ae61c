// read.cu: the parity of memory that is read once, of every length up to some turns of the grid.
#include "../read.cu"
#include "numbers.h"

static uint64_t seed = 0;

static void test(Random& random, uint32_t n, uint32_t n_ctas) {
    std::vector<uint32_t> words(size_t(n) * 4);
    uint32_t want = 0, got = 0;
    for (uint32_t& word : words) word = uint32_t(random()), want ^= word;
    const Array<uint32_t> from("from", words);
    Array<uint32_t> parities("parities", n_ctas);
    const specache_read_params p{from.address(), parities.address(), uint64_t(n) * 16, n_ctas, 0};
    specache_launch launch;
    CHECK(specache_read_plan(&p, &launch) == SPECACHE_OK, "%s", launch.message);
    CHECK(launch.grid == n_ctas, "%u CTAs", launch.grid);
    device::launch(specache_read, launch.grid, launch.block, launch.shared_bytes, seed++, p);
    parities.download();
    for (uint32_t cta = 0; cta < n_ctas; cta++) got ^= parities[cta];
    CHECK(got == want, "parity %x, not %x: %u vectors, %u CTAs", got, want, n, n_ctas);
}

static void plans() {
    constexpr uint64_t a = 1 << 20;
    const auto expect = [](specache_read_params p, specache_status want, const char* part) {
        specache_launch launch;
        const specache_status got = specache_read_plan(&p, &launch);
        CHECK(got == want, "status %d, not %d: %s", got, want, launch.message);
        CHECK(std::strstr(launch.message, part), "'%s' does not name '%s'", launch.message, part);
    };
    expect({a, a, 64, 2, 0}, SPECACHE_OK, "");
    expect({0, 0, 0, 2, 0}, SPECACHE_OK, "");
    expect({a, a, 24, 2, 0}, SPECACHE_BAD_STRIDE, "24");
    expect({a + 8, a, 64, 2, 0}, SPECACHE_BAD_ADDRESS, "from");
    expect({a, a + 2, 64, 2, 0}, SPECACHE_BAD_ADDRESS, "parities");
}

int main() {
    plans();
    Random random(4);
    int cases = 0;
    for (uint32_t n_ctas : {1u, 3u})
        for (uint32_t n : {1u, 31u, 256u, 1024u, 1025u, 3072u, 5000u}) test(random, n, n_ctas), cases++;
    std::printf("read_test: %d lengths have the right parity (%s)\n", cases, device::kName);
}
