/// What tests of GpuAttentionAdapter share: a case or a sequence on both sides.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <iterator>

#include <faiss_saap/gpu/GpuAttentionAdapter.h>

#include "../adapter_cases.h"
#include "device_test.h"

namespace faiss_saap::tests {

using gpu::GpuAttentionAdapter;
using gpu::GpuBatch;
using gpu::GpuProbedCells;

/// Caches on the device.
struct DeviceCache {
    CaseWorld::Cache host;
    OnDevice<char> k, v;
    OnDevice<int32_t> pages;

    explicit DeviceCache(CaseWorld::Cache from)
            : host(std::move(from)), k(host.k), v(host.v), pages(host.page_table) {}
    KvView view(int64_t length) const {
        return host.view(k.data(), v.data(), pages.data(), length);
    }
};

inline std::vector<char> as_type(DType type, const std::vector<float>& x) {
    std::vector<char> bytes(x.size() * 2);
    from_float(type, x.data(), static_cast<int64_t>(x.size()), bytes.data());
    return bytes;
}

/// Rows of cells as ProbedCells has them.
inline ProbedCells to_host(const GpuProbedCells& probed, int64_t rows) {
    std::vector<int32_t> cells(rows * probed.stride), count(rows);
    EXPECT_EQ(
            cudaMemcpy(
                    cells.data(), probed.cells, cells.size() * 4, cudaMemcpyDeviceToHost),
            cudaSuccess);
    EXPECT_EQ(
            cudaMemcpy(
                    count.data(), probed.count, count.size() * 4, cudaMemcpyDeviceToHost),
            cudaSuccess);
    ProbedCells host;
    host.share_group = probed.share_group;
    host.begin.push_back(0);
    for (int64_t r = 0; r < rows; r++) {
        const auto first = cells.begin() + r * probed.stride;
        host.cells.insert(host.cells.end(), first, first + count[r]);
        host.begin.push_back(static_cast<int64_t>(host.cells.size()));
    }
    return host;
}

/// What `attend_preassigned` gives for what `route` has chosen, what `attend` gives
/// in one call, and what `step` gives with the append of the last tokens: other kernels, as a
/// rule.
struct DeviceResult {
    CaseResult in_halves, at_once, by_steps;
};

/// The lists of all sequences of a batch.
inline decltype(CaseResult::slots) lists_of(
        const GpuAttentionAdapter& adapter,
        const std::vector<SequenceInput>& batch) {
    decltype(CaseResult::slots) slots;
    for (const SequenceInput& in : batch) {
        slots.emplace_back();
        for (int h = 0; h < adapter.params().heads_kv; h++) {
            slots.back().emplace_back();
            for (int p = 0; p < adapter.npartition(in.sequence, h); p++) {
                slots.back().back().push_back(adapter.lists(in.sequence, h, p).slots);
            }
        }
    }
    return slots;
}

/// New sequences of a case without their last tokens, and inputs of the queries' tokens.
/// @param steps  steps' tokens that are missing
inline std::vector<SequenceInput> append_but_for(
        int64_t steps,
        const AdapterCase& c,
        const std::vector<DeviceCache>& caches,
        GpuAttentionAdapter& adapter) {
    std::vector<SequenceInput> batch;
    for (size_t s = 0; s < c.lengths.size(); s++) {
        SequenceInput in;
        in.sequence = adapter.create({}, 64); // grows
        in.kv = caches[s].view(c.lengths[s]);
        const auto asks = std::min<int64_t>(c.q_len, c.lengths[s]);
        const int64_t length = c.lengths[s] - steps * asks;
        for (int64_t n = 0; n < length; n += in.q_len) {
            in.q_len = n < c.chunk ? std::min(c.chunk, length - n) : 1;
            adapter.append(*adapter.plan({in}));
        }
        EXPECT_EQ(adapter.length(in.sequence), length);
        in.q_len = asks;
        batch.push_back(in);
    }
    return batch;
}

inline DeviceResult run_on_device(const CaseWorld& world, Random& random) {
    const AdapterCase& c = world.c;
    GpuAttentionAdapter adapter(world.params, world.partitions);
    std::vector<DeviceCache> caches;
    for (size_t s = 0; s < c.lengths.size(); s++) {
        caches.emplace_back(world.cache(s, random));
    }
    const std::vector<SequenceInput> batch = append_but_for(0, c, caches, adapter);
    CaseResult result;
    result.slots = lists_of(adapter, batch);
    const OnDevice<char> queries(as_type(c.dtype, world.queries()));
    const size_t rows = queries.size() / 2 / c.d;
    OnDevice<float> output(rows * c.d), lse(rows);
    OnDevice<AttendStats> stats(rows);
    const auto plan = adapter.plan(batch);
    const int64_t choices = c.share_group ? c.heads_q / c.heads_kv : 1;
    const auto choice_rows = static_cast<int64_t>(rows) / choices;
    GpuProbedCells probed;
    probed.share_group = c.share_group;
    probed.stride = plan->cells() + 3;
    OnDevice<int32_t> cells(choice_rows * probed.stride), count(choice_rows);
    probed.cells = cells.data();
    probed.count = count.data();
    adapter.route(*plan, queries.data(), probed);
    AttendOutput out;
    out.output = output.data();
    out.lse = lse.data();
    out.stats = stats.data();
    adapter.attend_preassigned(*plan, queries.data(), probed, out);
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    adapter.check();
    result.probed = to_host(probed, choice_rows);
    result.output = output.host();
    result.lse = lse.host();
    result.stats = stats.host();

    CaseResult at_once = result;
    OnDevice<float> again(rows * c.d), lse_again(rows);
    OnDevice<AttendStats> stats_again(rows);
    out.output = again.data();
    out.lse = lse_again.data();
    out.stats = stats_again.data();
    adapter.attend(*plan, queries.data(), out);
    at_once.output = again.host();
    at_once.lse = lse_again.host();
    at_once.stats = stats_again.host();
    // Whoever wants neither gets the same.
    OnDevice<float> output_alone(rows * c.d);
    out = {};
    out.output = output_alone.data();
    adapter.attend(*plan, queries.data(), out);
    EXPECT_EQ(output_alone.host(), at_once.output);

    // Enough for cells of later keys to be found over several steps, and needed; fewer where a
    // tool makes each of them slow.
    const char* most = std::getenv("FAISS_SAAP_STEPS");
    int64_t steps = most ? std::atoi(most) : 20;
    for (int64_t n : c.lengths) {
        steps = std::min(steps, n / std::min<int64_t>(c.q_len, n));
    }
    const std::vector<SequenceInput> rest = append_but_for(steps, c, caches, adapter);
    const auto step = adapter.plan(rest);
    OnDevice<float> by_steps(rows * c.d), lse_by_steps(rows);
    OnDevice<AttendStats> stats_by_steps(rows);
    out.output = by_steps.data();
    out.lse = lse_by_steps.data();
    out.stats = stats_by_steps.data();
    for (int64_t i = 0; i < steps; i++) {
        adapter.step(*step, queries.data(), out);
    }
    CaseResult stepped;
    stepped.probed = result.probed; // of the same lists
    stepped.output = by_steps.host();
    stepped.lse = lse_by_steps.host();
    stepped.stats = stats_by_steps.host();
    adapter.check();
    stepped.slots = lists_of(adapter, rest);
    return {std::move(result), std::move(at_once), std::move(stepped)};
}

/// Keys as near to one cell as to another may lie in either.
/// @return whether all lie in the same ones
inline bool expect_nearly_the_same_lists(
        const decltype(CaseResult::slots)& expected,
        const decltype(CaseResult::slots)& got) {
    size_t same = 0, all = 0;
    for (size_t s = 0; s < expected.size(); s++) {
        for (size_t h = 0; h < expected[s].size(); h++) {
            for (size_t p = 0; p < expected[s][h].size(); p++) {
                for (size_t cell = 0; cell < expected[s][h][p].size(); cell++) {
                    const auto &x = expected[s][h][p][cell], &y = got[s][h][p][cell];
                    std::vector<int32_t> both;
                    std::set_intersection(
                            x.begin(),
                            x.end(),
                            y.begin(),
                            y.end(),
                            std::back_inserter(both));
                    same += both.size();
                    all += x.size();
                }
            }
        }
    }
    EXPECT_GE(same + 1 + all / 1000, all);
    return same == all;
}

/// A case on the device, compared with double precision and with the CPU.
inline void expect_equal_to_the_cpu(const CaseWorld& world, Random& random) {
    const AdapterCase& c = world.c;
    const DeviceResult on_device = run_on_device(world, random);
    const CaseResult& got = on_device.in_halves;
    const double tolerance = c.dtype == DType::float16 ? 2e-3 : 1e-2;
    const auto expect_case = [&](const char* name, const CaseResult& result) {
        SCOPED_TRACE(name);
        check_case(world, result, tolerance, 1e-3);
    };
    expect_case("attend_preassigned", got);
    expect_case("attend", on_device.at_once);
    if (expect_nearly_the_same_lists(got.slots, on_device.by_steps.slots)) {
        expect_case("step", on_device.by_steps);
    }
    const CaseResult cpu = run_on_cpu(world, random);
    if (!expect_nearly_the_same_lists(cpu.slots, got.slots)) {
        return; // other choices
    }
    const size_t rows_alike = check_choice(got.probed, cpu);
    // Scores that rounding may swap are rare among random ones.
    const size_t rows = cpu.probed.begin.size() - 1;
    EXPECT_GE(rows_alike, rows - rows / 20 - 1) << rows;
    if (rows_alike == rows) {
        for (size_t i = 0; i < cpu.lse.size(); i++) {
            if (cpu.lse[i] > -INFINITY) {
                EXPECT_NEAR(got.lse[i], cpu.lse[i], 1e-3);
            }
        }
        for (size_t i = 0; i < cpu.output.size(); i++) {
            EXPECT_NEAR(got.output[i], cpu.output[i], 4 * tolerance);
        }
    }
}

/// A world of one sequence, on the CPU and on the device.
struct Pair {
    AdapterCase c;
    Random random;
    CaseWorld world;
    CaseWorld::Cache host;
    DeviceCache cache;
    AttentionAdapter cpu;
    GpuAttentionAdapter device;
    int64_t on_cpu, on_device;
    int64_t n;
    bool identical = true; ///< all lists that were compared

    explicit Pair(AdapterCase of, int64_t reserve = 64)
            : c(of),
              world(c, random),
              host(world.cache(0, random)),
              cache(host),
              cpu(world.params, world.partitions),
              device(world.params, world.partitions),
              on_cpu(cpu.create()),
              on_device(device.create({}, reserve)),
              n(c.lengths[0]) {}

    SequenceInput input(int64_t q_len, int64_t capacity) const {
        SequenceInput in;
        in.sequence = on_device;
        in.kv = cache.view(capacity);
        in.q_len = q_len;
        return in;
    }
    void append(int64_t to) {
        cpu.append(on_cpu, host.view(to));
        const int64_t more = to - device.length(on_device);
        device.append(*device.plan({input(more, to)}));
    }
    /// The same lists and means, of these sequences, but for keys so near to two
    /// cells that rounding decides.
    void expect_same(int64_t a, int64_t b) {
        ASSERT_EQ(cpu.length(a), device.length(b));
        device.check();
        for (int h = 0; h < c.heads_kv; h++) {
            for (int p = 0; p < cpu.npartition(a, h); p++) {
                const CellLists& x = cpu.lists(a, h, p);
                const gpu::GpuListsCopy y = device.lists(b, h, p);
                int different = 0;
                std::vector<int32_t> all;
                const CellStats stats = x.stats();
                for (int cell = 0; cell < x.ncell(); cell++) {
                    all.insert(
                            all.end(), y.slots[cell].begin(), y.slots[cell].end());
                    if (x.slots(cell) != y.slots[cell]) {
                        different++;
                        continue;
                    }
                    // An empty cell's mean is nobody's.
                    for (int j = 0; stats.count[cell] && !y.means.empty() && j < c.d;
                         j++) {
                        const int i = cell * c.d + j;
                        ASSERT_NEAR(y.means[i], stats.mean_post_rope[i], 1e-5);
                    }
                }
                std::sort(all.begin(), all.end());
                ASSERT_EQ(static_cast<int64_t>(all.size()), x.size());
                for (size_t i = 0; i < all.size(); i++) {
                    ASSERT_EQ(all[i], c.sink + static_cast<int64_t>(i));
                }
                ASSERT_LE(different, 4);
                identical = identical && different == 0;
            }
        }
    }
};

} // namespace faiss_saap::tests
