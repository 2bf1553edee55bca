#include <faiss_saap/CellLists.h>

#include <algorithm>
#include <memory>

#include "common.h"

namespace faiss_saap {
namespace {

TEST(CellLists, KeepsSlotsAndStatistics) {
    tests::Random random;
    const int ncell = 7, d = 3, n = 500, first = 16;
    CellLists lists(ncell, d, first, /*with_means=*/true);
    const auto keys = random.normal(n * d);
    std::vector<std::vector<int32_t>> expected(ncell);
    std::vector<std::vector<double>> sum(ncell, std::vector<double>(d));
    for (int i = 0; i < n; i++) {
        const auto cell = int32_t(random.below(ncell - 1)); // one stays empty
        lists.append(cell, keys.data() + i * d, 1000 + i);
        expected[cell].push_back(first + i);
        for (int j = 0; j < d; j++) {
            sum[cell][j] += keys[i * d + j];
        }
        EXPECT_EQ(lists.cell_of(first + i), cell);
    }
    EXPECT_EQ(lists.size(), n);
    const CellStats stats = lists.stats();
    for (int c = 0; c < ncell; c++) {
        EXPECT_EQ(lists.slots(c), expected[c]);
        ASSERT_EQ(stats.count[c], int(expected[c].size()));
        EXPECT_EQ(
                stats.newest[c],
                expected[c].empty() ? -1 : 1000 + expected[c].back() - first);
        for (int j = 0; stats.count[c] && j < d; j++) {
            EXPECT_NEAR(
                    stats.mean_post_rope[c * d + j],
                    sum[c][j] / stats.count[c],
                    1e-5);
        }
        for (int64_t end : {0, 16, 100, 300, 516, 600}) {
            EXPECT_EQ(
                    lists.count_before(c, end),
                    std::count_if(
                            expected[c].begin(),
                            expected[c].end(),
                            [end](int32_t s) { return s < end; }));
        }
    }
}

TEST(CellLists, MarksTheSlotsOfSomeCells) {
    tests::Random random;
    const int ncell = 9, n = 700, first = 16;
    CellLists lists(ncell, 1, first, /*with_means=*/false);
    for (int i = 0; i < n; i++) { // cell 4 stays empty
        const auto cell = int32_t(random.below(ncell - 1));
        lists.append(cell < 4 ? cell : cell + 1, nullptr, i);
    }
    for (const std::vector<int32_t>& cells :
         {std::vector<int32_t>{}, {4}, {7}, {8, 4, 0, 3}}) {
        for (int64_t end : {16, 17, 80, 300, 716}) {
            std::vector<uint64_t> bits((end - first + 63) / 64, 0);
            std::vector<uint64_t> expected(bits.size(), 0);
            int64_t count = 0;
            for (int32_t slot = first; slot < end; slot++) {
                if (std::count(cells.begin(), cells.end(), lists.cell_of(slot))) {
                    expected[(slot - first) / 64] |= uint64_t(1)
                            << ((slot - first) % 64);
                    count++;
                }
            }
            EXPECT_EQ(lists.mark_slots(cells, end, bits.data()), count);
            EXPECT_EQ(bits, expected);
        }
    }
}

/// Slots by cell, the way that anybody would keep them.
using Model = std::vector<std::vector<int32_t>>;

void expect_lists(const CellLists& lists, const Model& model) {
    int64_t n = 0;
    for (size_t c = 0; c < model.size(); c++) {
        EXPECT_EQ(lists.slots(int(c)), model[c]);
        EXPECT_EQ(lists.stats().count[c], int(model[c].size()));
        EXPECT_EQ(
                lists.stats().newest[c],
                model[c].empty() ? -1 : model[c].back() + 100);
        for (int32_t slot : model[c]) {
            EXPECT_EQ(lists.cell_of(slot), int(c));
        }
        n += int64_t(model[c].size());
    }
    EXPECT_EQ(lists.size(), n);
}

/// Random appends, truncations, forks and ends, against plain vectors.
TEST(CellLists, ForksShareAndNeverDisturbEachOther) {
    tests::Random random;
    const int ncell = 5;
    const int64_t first = 3;
    auto pool = std::make_shared<SlotPool>();
    std::vector<CellLists> all = {CellLists(ncell, 1, first, false, pool)};
    std::vector<Model> models = {Model(ncell)};
    for (int step = 0; step < 400; step++) {
        const auto i = size_t(random.below(int64_t(all.size())));
        const int64_t action = random.below(10);
        if (action < 6) {
            for (int64_t n = random.below(100); n > 0; n--) {
                const auto cell = int32_t(random.below(ncell));
                const auto slot = int32_t(first + all[i].size());
                all[i].append(cell, nullptr, slot + 100);
                models[i][cell].push_back(slot);
            }
        } else if (action < 8) {
            const int64_t size = random.below(all[i].size() + 1);
            all[i].truncate(size, {});
            for (auto& cell : models[i]) {
                while (!cell.empty() && cell.back() >= first + size) {
                    cell.pop_back();
                }
            }
        } else if (action == 8 && all.size() < 6) {
            all.push_back(all[i]);
            models.push_back(models[i]);
        } else if (all.size() > 1) {
            all.erase(all.begin() + int64_t(i));
            models.erase(models.begin() + int64_t(i));
        }
        if (step % 20 == 0) {
            for (size_t j = 0; j < all.size(); j++) {
                expect_lists(all[j], models[j]);
            }
        }
    }
    all.clear();
    EXPECT_EQ(pool->blocks_used(), 0u);
}

TEST(CellLists, AForkCostsNoMemoryForWhatItShares) {
    auto pool = std::make_shared<SlotPool>();
    CellLists lists(4, 1, 0, false, pool);
    for (int i = 0; i < 10000; i++) {
        lists.append(i % 4, nullptr, i);
    }
    const size_t used = pool->blocks_used();
    EXPECT_EQ(used, size_t(4 * ((2500 + 29) / 30)));
    const CellLists fork = lists;
    EXPECT_EQ(pool->blocks_used(), used);
    lists.append(0, nullptr, 10000);
    EXPECT_EQ(pool->blocks_used(), used + 1);
    EXPECT_EQ(fork.size(), 10000);
    EXPECT_EQ(fork.slots(0).size(), 2500u);
    // Chunks of the cell of each slot are shared but for the last.
    std::unordered_set<const void*> counted;
    const size_t first = lists.bytes_used(&counted);
    EXPECT_LT(fork.bytes_used(&counted), first);
    EXPECT_GE(first, 10001 * sizeof(uint16_t));
    EXPECT_EQ(pool->bytes_used() % 8, 0u);
    EXPECT_GE(pool->bytes_used(), (used + 1) * sizeof(SlotPool::Block));
}

TEST(CellLists, TruncatedMeansAreAsIfNeverAppended) {
    tests::Random random;
    const int ncell = 4, d = 3, n = 300, keep = 220;
    const auto keys = random.normal(n * d);
    CellLists once(ncell, d, 7, true), back(ncell, d, 7, true);
    for (int i = 0; i < n; i++) {
        const auto cell = int32_t(random.below(ncell));
        if (i < keep) {
            once.append(cell, keys.data() + i * d, i);
        }
        back.append(cell, keys.data() + i * d, i);
    }
    back.truncate(keep, [&](int64_t slot, float* key) {
        std::copy_n(keys.data() + (slot - 7) * d, d, key);
    });
    for (int i = 0; i < ncell * d; i++) {
        EXPECT_EQ(
                once.stats().mean_post_rope[i], back.stats().mean_post_rope[i]);
    }
    // A key that cannot be read changes nothing.
    EXPECT_THROW(
            back.truncate(
                    keep - 50,
                    [](int64_t, float*) { throw std::runtime_error("gone"); }),
            std::runtime_error);
    EXPECT_EQ(back.size(), keep);
    for (int i = 0; i < ncell * d; i++) {
        EXPECT_EQ(
                once.stats().mean_post_rope[i], back.stats().mean_post_rope[i]);
    }
    EXPECT_SENTENCE(back.truncate(-1, {}), "size = -1");
    EXPECT_SENTENCE(back.truncate(keep + 1, {}), "size = 221");
    EXPECT_SENTENCE(back.truncate(0, {}), "read_key is empty");
    EXPECT_EQ(back.size(), keep);
}

/// Random appends, truncations and forks against statistics made anew.
TEST(CellLists, NewestKeysAndMeansEqualThoseOfAFreshStart) {
    tests::Random random;
    const int ncell = 5, d = 3, n = 2000;
    const int64_t first = 7;
    auto pool = std::make_shared<SlotPool>();
    // What a slot holds and where it goes is the same for all forks.
    const auto keys = random.normal(n * d);
    const auto key_of = [&](int64_t slot) {
        return keys.data() + (slot - first) * d;
    };
    const auto cell_of = [&](int64_t slot) {
        return int32_t((slot * 7919 + slot / 3) % ncell);
    };
    for (bool with_means : {true, false}) {
        std::vector<CellLists> all;
        all.emplace_back(ncell, d, first, with_means, pool, true);
        for (int step = 0; step < 200; step++) {
            const auto i = size_t(random.below(int64_t(all.size())));
            CellLists& lists = all[i];
            const int64_t action = random.below(10);
            if (action < 5) {
                for (int64_t m = random.below(40); m > 0 && lists.size() < n; m--) {
                    const int64_t slot = first + lists.size();
                    lists.append(cell_of(slot), key_of(slot), slot + 100);
                }
            } else if (action < 8) {
                lists.truncate(
                        random.below(lists.size() + 1),
                        [&](int64_t slot, float* key) {
                            std::copy_n(key_of(slot), d, key);
                        });
            } else if (all.size() < 5) {
                all.push_back(CellLists(lists));
            }
            const CellLists& changed = all[i];
            CellLists fresh(ncell, d, first, with_means, nullptr, true);
            for (int64_t s = first; s < first + changed.size(); s++) {
                fresh.append(cell_of(s), key_of(s), s + 100);
            }
            const CellStats x = changed.stats(), y = fresh.stats();
            for (int c = 0; c < ncell; c++) {
                ASSERT_EQ(x.newest[c], y.newest[c]);
                for (int j = c * d; j < (c + 1) * d; j++) {
                    ASSERT_EQ(x.newest_post_rope[j], y.newest_post_rope[j]);
                    if (with_means) {
                        ASSERT_EQ(x.mean_post_rope[j], y.mean_post_rope[j]);
                    }
                }
            }
        }
    }
    CellLists lists(ncell, d, 0, false, nullptr, true);
    const CellLists plain(ncell, d, 0, false);
    EXPECT_EQ(
            lists.bytes_used(), plain.bytes_used() + ncell * d * sizeof(float));
    EXPECT_EQ(plain.stats().newest_post_rope, nullptr);
    EXPECT_SENTENCE(lists.append(0, nullptr, 0), "newest keys");
    lists.append(0, keys.data(), 0);
    EXPECT_SENTENCE(lists.truncate(0, {}), "read_key is empty");
    const uint16_t cell = 1;
    CellLists restored(ncell, d, 0, false, nullptr, true);
    EXPECT_SENTENCE(restored.restore(1, &cell, 0, nullptr), "newest keys must");
}

TEST(CellLists, WrongInput) {
    CellLists lists(4, 2, 0, true);
    const float key[2] = {1, 2};
    EXPECT_SENTENCE(lists.append(4, key, 0), "cell = 4");
    EXPECT_SENTENCE(lists.append(-1, key, 0), "cell = -1");
    EXPECT_SENTENCE(lists.append(0, nullptr, 0), "post_rope is null");
    EXPECT_EQ(lists.size(), 0);
    const uint16_t cells[2] = {1, 4};
    CellLists plain(4, 2, 0, false);
    EXPECT_SENTENCE(plain.restore(2, cells, 0, nullptr), "cells[1] = 4");
    EXPECT_SENTENCE(plain.restore(1, cells, 0, key), "means must be given");
    EXPECT_EQ(plain.size(), 0);
    plain.restore(1, cells, 0, nullptr);
    EXPECT_SENTENCE(plain.restore(1, cells, 0, nullptr), "not empty");
    EXPECT_SENTENCE(plain.append(0, nullptr, 9), "position = 9");
    CellLists last(4, 2, INT32_MAX, false);
    EXPECT_SENTENCE(last.restore(2, cells, 0, nullptr), "n = 2 slots from slot 2147483647");
    EXPECT_EQ(last.size(), 0);
    last.append(0, nullptr, 0);
    EXPECT_SENTENCE(last.append(0, nullptr, 1), "beyond 2^31 - 1");
    EXPECT_SENTENCE(CellLists(0, 2, 0, false), "ncell = 0");
    EXPECT_SENTENCE(CellLists(65537, 2, 0, false), "ncell = 65537");
    EXPECT_SENTENCE(CellLists(4, 2, -1, false), "first_slot = -1");
    EXPECT_SENTENCE(CellLists(4, 0, 0, false), "d = 0");
    EXPECT_SENTENCE(CellLists(4, -1, 0, true), "d = -1");
}

} // namespace
} // namespace faiss_saap
