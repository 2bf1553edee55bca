#include "index/far_keys.h"

#include <algorithm>
#include <vector>

#include "common.h"

namespace faiss_saap {
namespace {

/// A row with some of `slots` slots, as likely as one in `one_of`.
FarKeys random_keys(
        tests::Random& random,
        int64_t first_slot,
        int64_t slots,
        int64_t one_of,
        std::vector<int32_t>* expected) {
    FarKeys far(first_slot, slots);
    for (int64_t i = 0; i < slots; i++) {
        if (random.below(one_of) == 0) {
            far.words[i / 64] |= uint64_t(1) << i % 64;
            expected->push_back(static_cast<int32_t>(first_slot + i));
        }
    }
    far.count();
    return far;
}

TEST(FarKeys, SlotsAreThoseThatWereMarked) {
    tests::Random random;
    for (int64_t slots : {0, 1, 63, 64, 65, 511, 512, 513, 5000}) {
        for (int64_t one_of : {1, 2, 20, 1000}) {
            std::vector<int32_t> expected;
            FarKeys far = random_keys(random, 16, slots, one_of, &expected);
            EXPECT_EQ(far.n, static_cast<int64_t>(expected.size()));
            EXPECT_EQ(far.slots(), expected);
            // Each third one alone.
            std::vector<int32_t> kept;
            for (size_t i = 0; i < expected.size(); i += 3) {
                kept.push_back(expected[i]);
            }
            far.assign(kept);
            EXPECT_EQ(far.n, static_cast<int64_t>(kept.size()));
            EXPECT_EQ(far.slots(), kept);
        }
    }
}

TEST(FarKeys, PiecesHaveAllKeysOnce) {
    tests::Random random;
    for (int round = 0; round < 200; round++) {
        const int64_t first = random.below(100), slots = random.below(8000);
        const int64_t rows = 1 + random.below(9), length = 1 + random.below(3000);
        const int64_t one_of = 1 + random.below(300);
        std::vector<std::vector<int32_t>> expected(rows), got(rows);
        std::vector<FarKeys> far;
        for (int64_t r = 0; r < rows; r++) {
            far.push_back(random_keys(random, first, slots, one_of, &expected[r]));
        }
        int64_t end = 0;
        const std::vector<FarPiece> pieces = cut_far(far.data(), rows, length);
        for (const FarPiece& piece : pieces) {
            EXPECT_EQ(piece.begin, end);
            EXPECT_GT(piece.keys, 0);
            // No longer than by the word that made it long enough.
            EXPECT_LT(piece.keys, length + 64 * rows);
            EXPECT_TRUE(piece.keys >= length || &piece == &pieces.back());
            end = piece.end;
            int64_t keys = 0;
            for (int64_t r = 0; r < rows; r++) {
                std::vector<int32_t> some(piece.keys + 1, -7);
                int32_t* after = far[r].copy_slots(piece.begin, piece.end, some.data());
                got[r].insert(got[r].end(), some.data(), after);
                keys += after - some.data();
            }
            EXPECT_EQ(keys, piece.keys);
        }
        EXPECT_EQ(got, expected) << "round " << round;
    }
}

} // namespace
} // namespace faiss_saap
