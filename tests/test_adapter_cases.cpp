#include "adapter_cases.h"

namespace faiss_saap::tests {
namespace {

class AdapterCases : public ::testing::TestWithParam<AdapterCase> {};

TEST_P(AdapterCases, EqualDoublePrecisionOnTheCpu) {
    Random random;
    const CaseWorld world(GetParam(), random);
    check_case(world, run_on_cpu(world, random), 1e-4, 1e-4);
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
        const CaseWorld world(c, random);
        check_case(world, run_on_cpu(world, random), 1e-4, 1e-4);
    }
}

} // namespace
} // namespace faiss_saap::tests
