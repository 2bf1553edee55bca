#include <faiss_saap/gpu/extents.h>

#include <algorithm>

#include <gtest/gtest.h>

namespace faiss_saap::gpu {
namespace {

/// Extents follow each other without a gap, and each entry lies in its own.
TEST(Extents, ExtentsTileTheEntries) {
    uint32_t next = 0;
    for (int e = 0; e < kExtents; e++) {
        EXPECT_EQ(extent_begin(e), next);
        EXPECT_EQ(extent_of(next), e);
        next += extent_size(e);
        EXPECT_EQ(extent_of(next - 1), e);
    }
    EXPECT_EQ(next, kMaxTokens);
    for (uint32_t i : {0u, 31u, 32u, 63u, 64u, 100u, 127u, 128u, 99999u}) {
        EXPECT_GE(i, extent_begin(extent_of(i)));
        EXPECT_LT(i - extent_begin(extent_of(i)), extent_size(extent_of(i)));
    }
}

/// However the tokens fall into cells, their extents fit the arena.
TEST(Extents, TheArenaHoldsEveryDistribution) {
    for (int64_t tokens : {1, 33, 1000, 5000}) {
        for (int ncell : {1, 3, 64, 2000}) {
            for (int64_t per_cell : {int64_t(1), int64_t(33), int64_t(65), tokens}) {
                int64_t left = tokens, used = 0;
                for (int c = 0; c < ncell && left > 0; c++) {
                    const int64_t n =
                            c + 1 == ncell ? left : std::min(left, per_cell);
                    left -= n;
                    for (int e = 0; e <= extent_of(static_cast<uint32_t>(n - 1)); e++) {
                        used += extent_size(e);
                    }
                }
                EXPECT_LE(used, arena_size(tokens, ncell) - arena_slack(tokens));
            }
        }
    }
}

} // namespace
} // namespace faiss_saap::gpu
