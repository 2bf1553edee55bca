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

} // namespace
} // namespace faiss_saap::tests
