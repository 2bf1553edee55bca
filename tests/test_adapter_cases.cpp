#include "adapter_cases.h"

namespace faiss_saap::tests {
namespace {

/// The scores that other adapters' choices are compared by are those that this one
/// chose by: in each partition, cells were taken best first.
void expect_best_first(const CaseWorld& world, const CaseResult& result) {
    const AdapterCase& c = world.c;
    const int group = c.heads_q / c.heads_kv;
    const ProbedCells& probed = result.probed;
    ASSERT_EQ(result.scores.size() + 1, probed.begin.size());
    for (size_t r = 0; r < result.scores.size(); r++) {
        const size_t head = c.share_group ? r * group : r; // of all tokens' heads
        if (result.stats[head].far_keys <= c.dense_below) {
            continue; // all were taken
        }
        const RowScores& scores = result.scores[r];
        for (int64_t i = probed.begin[r] + 1; i < probed.begin[r + 1]; i++) {
            const int32_t before = probed.cells[i - 1], cell = probed.cells[i];
            if (before / c.ncell == cell / c.ncell) {
                ASSERT_GE(scores.score[before] + scores.rounding, scores.score[cell])
                        << "row " << r << " takes " << before << ", then " << cell;
            }
        }
    }
}

void expect_equal_to_double_precision(const CaseWorld& world, Random& random) {
    const CaseResult result = run_on_cpu(world, random);
    check_case(world, result, 1e-4, 1e-4);
    expect_best_first(world, result);
}

class AdapterCases : public ::testing::TestWithParam<AdapterCase> {};

TEST_P(AdapterCases, EqualDoublePrecisionOnTheCpu) {
    Random random;
    expect_equal_to_double_precision(CaseWorld(GetParam(), random), random);
}

INSTANTIATE_TEST_SUITE_P(
        Table,
        AdapterCases,
        ::testing::ValuesIn(adapter_cases()),
        [](const auto& info) { return std::to_string(info.index); });

TEST(RandomAdapterCases, EqualDoublePrecisionOnTheCpu) {
    Random random;
    for (int round = 0; round < 4; round++) {
        const AdapterCase c = random_case(random);
        SCOPED_TRACE(c);
        expect_equal_to_double_precision(CaseWorld(c, random), random);
    }
}

} // namespace
} // namespace faiss_saap::tests
