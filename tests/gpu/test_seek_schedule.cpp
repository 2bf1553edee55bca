#include "gpu/seek_schedule.h"

#include <algorithm>
#include <vector>

#include "../common.h"

namespace faiss_saap::gpu {
namespace {

struct Batch {
    int sequences, heads_kv, groups, visits;
    bool together; ///< all begin in the same step
};

void PrintTo(const Batch& b, std::ostream* out) {
    *out << b.sequences << "sequences" << b.heads_kv << "heads" << b.groups << "groups"
         << b.visits << "visits" << (b.together ? "together" : "");
}

/// Steps of sequences that begin in any of the first 64: cells are known in time, and steps
/// alike.
void run(const Batch& b, tests::Random& random) {
    struct Sequence {
        int begins = 0, assigned = 0, parts = 0, visited_by = 0;
    };
    std::vector<Sequence> all(b.sequences);
    for (Sequence& s : all) {
        s.begins = b.together ? 0 : static_cast<int>(random.below(64));
    }
    const int rows_of_each = rows_of_group(b.sequences, b.heads_kv, b.groups);
    const int each = planned_visits(b.visits, rows_of_each);
    // Of rows with more than one visit some may come at once to where they cannot wait: of those
    // with four, as many again as are planned, of others an eighth of the rows.
    const int at_once = b.visits == 4 ? rows_of_each / 2 : rows_of_each / 8;
    const int most = b.visits == 1 || rows_of_each <= 2 ? each : each + at_once;
    // The first time a row has fewer steps: not the one that finds cells, none to spare.
    const int of_all = seek_share(
            rows_of_each * visits_of_parts(b.visits, 0), kMostAhead - 1 - kSeekSlack);
    const int first = std::max(most + 1, b.together ? of_all : 0);
    for (int step = 0; step < 400; step++) {
        std::vector<int> left(b.sequences, 0); // 0: nothing to seek
        for (int i = 0; i < b.sequences; i++) {
            Sequence& s = all[i];
            if (step == s.begins) { // rows find the first cells when they need them
                s.assigned = step + kMostAhead;
            } else if (step > s.begins && s.assigned - step <= kMostLeft) {
                left[i] = s.assigned - step;
                // The first time there are only as many steps as visits.
                ASSERT_GT(left[i], step < s.begins + 2 * kMostAhead ? 0 : kSeekSlack)
                        << "sequence " << i << ", step " << step;
            }
        }
        for (int group = 0; group < b.groups; group++) {
            std::vector<std::pair<int, int>> rows; // steps that it can wait for, item
            const auto row_of = [&](int i) {
                return SeekRow{left[i], visits_of_parts(b.visits, all[i].parts)};
            };
            for (int i = 0; i < b.sequences; i++) {
                for (int h = 0; h < b.heads_kv; h++) {
                    if (left[i] && group_of_row(i, h, b.heads_kv, b.groups) == group) {
                        rows.emplace_back(row_of(i).can_wait(), i);
                    }
                }
            }
            ASSERT_LE(rows.size(), rows_of_each);
            std::sort(rows.begin(), rows.end());
            SeekPace pace;
            for (const auto& [wait, i] : rows) {
                pace.add(row_of(i));
            }
            const int visits = std::min<int>(pace.visits, rows.size());
            ASSERT_LE(visits, step < 64 + 2 * kMostAhead ? first : most) << "step " << step;
            for (int r = 0; r < visits; r++) {
                all[rows[r].second].visited_by++;
            }
        }
        for (Sequence& s : all) {
            ASSERT_TRUE(s.visited_by == 0 || s.visited_by == b.heads_kv);
            s.parts += s.visited_by ? parts_of_visit(b.visits) : 0;
            s.visited_by = 0;
            if (s.parts >= kSeekParts) {
                s.parts = 0;
                s.assigned += kMostAhead;
            }
        }
    }
}

class SeekSchedules : public ::testing::TestWithParam<Batch> {};

TEST_P(SeekSchedules, CellsAreKnownInTimeAndStepsAreAlike) {
    tests::Random random;
    run(GetParam(), random);
}

/// Of one group.
TEST(SeekSchedule, AnyNumbersOfRowsAndVisits) {
    tests::Random random;
    for (int visits : {1, 2, 4, 8}) {
        for (int rows = 1; rows <= 64; rows++) {
            for (bool together : {false, true}) {
                const Batch b = {rows, 1, 1, visits, together};
                SCOPED_TRACE(::testing::PrintToString(b));
                ASSERT_NO_FATAL_FAILURE(run(b, random));
            }
        }
    }
}

INSTANTIATE_TEST_SUITE_P(
        Batches,
        SeekSchedules,
        ::testing::Values(
                Batch{1, 8, 32, 8, false},
                Batch{8, 8, 64, 8, false},
                Batch{9, 4, 32, 4, false},
                Batch{16, 8, 100, 2, false},
                Batch{31, 8, 64, 2, false},
                Batch{32, 8, 32, 1, false},
                Batch{33, 3, 7, 1, false},
                Batch{8, 8, 64, 8, true},
                Batch{16, 8, 100, 2, true},
                Batch{32, 8, 32, 1, true}),
        ::testing::PrintToStringParamName());

} // namespace
} // namespace faiss_saap::gpu
