#include <faiss_saap/gpu/assign_bfloat16.h>

#include <cmath>

#include <faiss_saap/dtype.h>

#include "device_test.h"

namespace faiss_saap {
namespace {

std::vector<uint16_t> rounded(const std::vector<float>& x) {
    std::vector<uint16_t> y(x.size());
    from_float(DType::bfloat16, x.data(), static_cast<int64_t>(x.size()), y.data());
    return y;
}

std::vector<float> widened(const std::vector<uint16_t>& x) {
    std::vector<float> y(x.size());
    to_float(DType::bfloat16, x.data(), static_cast<int64_t>(x.size()), y.data());
    return y;
}

class GpuAssignBfloat16 : public tests::DeviceTest {};

/// Against all scores in double precision, vectors of heads interleaved as in a
/// cache.
TEST_F(GpuAssignBfloat16, BestCellsButForNearTies) {
    tests::Random random;
    for (const int d : {8, 64, 96, 128, 256}) {
        for (const int n : {1, 40, 3000}) {
            const int nhead = 3, ncell = d == 64 ? 1030 : 75;
            const auto x = rounded(random.normal(size_t(n) * nhead * d));
            const auto wide = widened(x);
            const auto centroids = random.normal(size_t(nhead) * ncell * d);
            auto bias = random.normal(nhead * ncell);
            bias[5] = -INFINITY;
            const tests::OnDevice<uint16_t> xd(x);
            const tests::OnDevice<float> cd(centroids), bd(bias);
            const tests::OnDevice<int32_t> cells(size_t(nhead) * n);
            gpu::AssignBfloat16Params p;
            p.nhead = nhead, p.n = n, p.d = d, p.ncell = ncell;
            p.x = xd.data(), p.x_head_stride = d, p.x_row_stride = nhead * d;
            p.centroids = cd.data(), p.centroids_head_stride = int64_t(ncell) * d;
            p.bias = bd.data(), p.bias_head_stride = ncell;
            p.cells = cells.data(), p.cells_head_stride = n;
            const tests::OnDevice<char> room(gpu::assign_bfloat16_workspace(p));
            for (const bool rounds : {false, true}) {
                p.rounds_centroids = rounds;
                gpu::assign_bfloat16(p, room.data(), nullptr);
                const auto got = cells.host();
                const auto used = rounds ? widened(rounded(centroids)) : centroids;
                for (int64_t i = 0; i < int64_t(nhead) * n; i++) {
                    const int64_t head = i / n;
                    const float* v = wide.data() + (i % n * nhead + head) * d;
                    double best = -INFINITY, mine = -INFINITY, norms = 0;
                    for (int c = 0; c < ncell; c++) {
                        const float* row = used.data() + (head * ncell + c) * d;
                        double s = bias[head * ncell + c], v2 = 0, c2 = 0;
                        for (int j = 0; j < d; j++) {
                            s += double(v[j]) * row[j];
                            v2 += double(v[j]) * v[j];
                            c2 += double(row[j]) * row[j];
                        }
                        best = std::max(best, s);
                        mine = c == got[i] ? s : mine;
                        norms = std::max(norms, std::sqrt(v2 * c2));
                    }
                    ASSERT_GE(mine, best - 2.0 / 65536 * norms)
                            << "d " << d << " n " << n << " vector " << i;
                }
            }
        }
    }
}

TEST_F(GpuAssignBfloat16, RefusesWithASentence) {
    alignas(16) char x[64];
    float f = 0;
    int32_t cell = 0;
    const auto with = [&](auto change) {
        gpu::AssignBfloat16Params p;
        p.n = 1, p.d = 8, p.ncell = 1, p.x = x, p.x_row_stride = 8;
        p.centroids = &f, p.cells = &cell;
        change(p);
        gpu::assign_bfloat16(p, x, nullptr);
    };
    EXPECT_SENTENCE(with([](auto& p) { p.d = 12; }), "d = 12");
    EXPECT_SENTENCE(with([](auto& p) { p.d = 264; }), "d = 264");
    EXPECT_SENTENCE(with([](auto& p) { p.ncell = 0; }), "ncell = 0");
    EXPECT_SENTENCE(with([](auto& p) { p.nhead = 0; }), "nhead = 0");
    EXPECT_SENTENCE(with([](auto& p) { p.n = -1; }), "n = -1");
    EXPECT_SENTENCE(with([](auto& p) { p.x = nullptr; }), "x is null");
    EXPECT_SENTENCE(with([](auto& p) { p.x_row_stride = 9; }), "multiples of 16");
}

} // namespace
} // namespace faiss_saap
