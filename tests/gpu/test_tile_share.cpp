#include <faiss_saap/gpu/tile_share.h>

#include <algorithm>
#include <numeric>
#include <set>

#include "../common.h"

namespace faiss_saap::tests {
namespace {

using gpu::TileShare;

/// Every tile has one block, blocks named for a row are those that have tiles of it,
/// the places where their results go (row + block) differ, and no block has more than
/// it should.
void check(const std::vector<int>& tiles, int blocks, int least) {
    const int rows = static_cast<int>(tiles.size());
    const int total = std::accumulate(tiles.begin(), tiles.end(), 0);
    const TileShare share = TileShare::of(total, rows, blocks, least);
    std::vector<int> of_block(blocks), rows_of_block(blocks);
    std::set<int> places;
    int begin = 0;
    for (int r = 0; r < rows; r++) {
        const TileShare::Range named = share.blocks(begin, tiles[r]);
        int next = 0;
        for (int b = 0; b < blocks; b++) {
            const TileShare::Range mine = share.tiles(b, begin, tiles[r]);
            const bool has = mine.begin < mine.end;
            ASSERT_EQ(has, b >= named.begin && b < named.end) << r << " " << b;
            if (has) {
                ASSERT_EQ(mine.begin, next);
                next = mine.end;
                of_block[b] += mine.end - mine.begin;
                rows_of_block[b]++;
                ASSERT_TRUE(places.insert(r + b).second);
                // How a block finds its first row.
                ASSERT_LT(begin, share.first_unit(b + 1));
                ASSERT_GT(begin + share.units(tiles[r]), share.first_unit(b));
            }
        }
        ASSERT_EQ(next, tiles[r]);
        ASSERT_LE(named.end, blocks);
        begin += share.units(tiles[r]);
    }
    const int even = (total + blocks - 1) / blocks;
    const int most = *std::max_element(of_block.begin(), of_block.end());
    EXPECT_LE(most, std::max(least, even + TileShare::kRestart));
    if (share.whole) {
        EXPECT_LE(*std::max_element(rows_of_block.begin(), rows_of_block.end()), 1);
    }
}

TEST(TileShare, SharesOutEveryTileOnce) {
    Random random;
    for (int round = 0; round < 2000; round++) {
        const int blocks = 1 + static_cast<int>(random.below(140));
        const int rows = 1 + static_cast<int>(random.below(round % 4 ? 40 : 400));
        const int most = 1 + static_cast<int>(random.below(round % 3 ? 60 : 3000));
        std::vector<int> tiles;
        for (int r = 0; r < rows; r++) {
            tiles.push_back(static_cast<int>(random.below(most + 1)));
        }
        check(tiles, blocks, 1 + static_cast<int>(random.below(8)));
        if (HasFatalFailure()) {
            FAIL() << rows << " rows of up to " << most << " tiles, " << blocks
                   << " blocks";
        }
    }
    check({0, 0, 0}, 132, 4);
    check({5}, 1, 1);
}

/// What a decode step of one sequence looks like: no block has two rows.
TEST(TileShare, FewRowsHaveBlocksOfTheirOwn) {
    for (int tiles : {33, 50, 204, 410, 820, 1640}) {
        const TileShare share = TileShare::of(8 * tiles, 8, 132, 4);
        EXPECT_TRUE(share.whole) << tiles;
        EXPECT_LE(8 * share.units(tiles), 132);
    }
    // More rows than blocks, and rows so long that a second one costs little.
    EXPECT_FALSE(TileShare::of(256 * 50, 256, 132, 4).whole);
    EXPECT_FALSE(TileShare::of(8 * 16384, 8, 132, 4).whole);
}

} // namespace
} // namespace faiss_saap::tests
