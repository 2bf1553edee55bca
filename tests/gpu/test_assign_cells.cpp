#include <faiss_saap/gpu/assign_cells.h>

#include <limits>

#include "device_test.h"

namespace faiss_saap {
namespace {

struct Inputs {
    int nhead, n, d, ncell;
    bool l2;
    bool token_major = false; ///< x is (n, nhead, d)
};

std::ostream& operator<<(std::ostream& os, const Inputs& in) {
    return os << in.nhead << " heads, " << in.n << " vectors, d " << in.d << ", "
              << in.ncell << " cells, " << (in.l2 ? "L2" : "IP")
              << (in.token_major ? ", token major" : "");
}

class GpuAssignCells : public tests::DeviceTest,
                       public ::testing::WithParamInterface<Inputs> {};

TEST_P(GpuAssignCells, EqualsTheHost) {
    const Inputs in = GetParam();
    tests::Random random;
    const size_t vectors = size_t(in.nhead) * in.n, cells = size_t(in.nhead) * in.ncell;
    std::vector<float> x = random.normal(vectors * in.d);
    std::vector<float> c = random.normal(cells * in.d);
    // Equal cells: the first of them is taken.
    for (int h = 0; h < in.nhead && in.ncell > 1; h++) {
        float* of_head = c.data() + size_t(h) * in.ncell * in.d;
        std::copy_n(of_head, in.d, of_head + size_t(in.ncell - 1) * in.d);
    }
    tests::OnDevice<float> xd(x), cd(c), bias(cells), best(vectors),
            all(vectors * in.ncell);
    tests::OnDevice<int32_t> got(vectors);

    gpu::AssignCellsParams p;
    p.nhead = in.nhead, p.n = in.n, p.d = in.d, p.ncell = in.ncell;
    p.x = xd.data();
    p.x_row_stride = in.token_major ? int64_t(in.nhead) * in.d : in.d;
    p.x_head_stride = in.token_major ? in.d : int64_t(in.n) * in.d;
    p.centroids = cd.data();
    p.centroids_head_stride = int64_t(in.ncell) * in.d;
    if (in.l2) {
        gpu::half_norms({int64_t(cells), in.d, cd.data(), bias.data()}, nullptr);
        p.bias = bias.data();
        p.bias_head_stride = in.ncell;
    }
    p.cells = got.data();
    p.cells_head_stride = in.n;
    p.scores = best.data();
    gpu::assign_cells(p, nullptr);
    gpu::ScoreCellsParams s;
    s.nhead = in.nhead, s.n = in.n, s.d = in.d, s.ncell = in.ncell;
    s.x = p.x, s.x_head_stride = p.x_head_stride, s.x_row_stride = p.x_row_stride;
    s.centroids = p.centroids, s.centroids_head_stride = p.centroids_head_stride;
    s.bias = p.bias, s.bias_head_stride = p.bias_head_stride;
    s.scores = all.data();
    s.scores_head_stride = int64_t(in.n) * in.ncell;
    s.scores_row_stride = in.ncell;
    gpu::score_cells(s, nullptr);

    const auto cell = got.host();
    const auto score = best.host(), scores = all.host();
    for (int h = 0; h < in.nhead; h++) {
        for (int i = 0; i < in.n; i++) {
            const size_t at = size_t(h) * in.n + i;
            const float* v = x.data() + h * p.x_head_stride + i * p.x_row_stride;
            int32_t first = -1;
            float largest = -INFINITY;
            for (int j = 0; j < in.ncell; j++) {
                const float* y = c.data() + (size_t(h) * in.ncell + j) * in.d;
                double exact = 0, half = 0, size = 0;
                for (int t = 0; t < in.d; t++) {
                    exact += double(v[t]) * y[t];
                    half += 0.5 * y[t] * y[t];
                    size += std::abs(double(v[t]) * y[t]);
                }
                const float s_ij = scores[at * in.ncell + j];
                ASSERT_NEAR(
                        s_ij,
                        in.l2 ? exact - half : exact,
                        1e-6 * (size + half + 1) * std::sqrt(in.d))
                        << "head " << h << ", vector " << i << ", cell " << j;
                if (s_ij > largest) {
                    largest = s_ij;
                    first = j;
                }
            }
            ASSERT_EQ(cell[at], first) << "head " << h << ", vector " << i;
            ASSERT_EQ(score[at], largest);
        }
    }
}

INSTANTIATE_TEST_SUITE_P(
        Shapes,
        GpuAssignCells,
        ::testing::Values(
                Inputs{1, 1, 1, 1, false},
                Inputs{8, 1, 128, 1024, true},
                Inputs{3, 17, 64, 100, false},
                Inputs{3, 64, 100, 129, true, true},
                Inputs{2, 65, 96, 256, true},
                Inputs{2, 300, 128, 300, false, true},
                Inputs{2, 129, 33, 131, true},
                Inputs{1, 200, 7, 1000, false, true},
                Inputs{2, 128, 256, 128, true}));

class GpuAssign : public tests::DeviceTest {};

TEST_F(GpuAssign, OneVectorGetsTheBitsOfMany) {
    tests::Random random;
    const int n = 500, d = 128, ncell = 400;
    tests::OnDevice<float> x(random.normal(n * d)), c(random.normal(ncell * d));
    tests::OnDevice<float> together(n), alone(n);
    tests::OnDevice<int32_t> cells(n), cell(n);
    gpu::AssignCellsParams p;
    p.n = n, p.d = d, p.ncell = ncell;
    p.x = x.data(), p.x_row_stride = d;
    p.centroids = c.data();
    p.cells = cells.data(), p.scores = together.data();
    gpu::assign_cells(p, nullptr);
    for (int i = 0; i < n; i++) {
        p.n = 1;
        p.x = x.data() + int64_t(i) * d;
        p.cells = cell.data() + i, p.scores = alone.data() + i;
        gpu::assign_cells(p, nullptr);
    }
    EXPECT_EQ(cells.host(), cell.host());
    EXPECT_EQ(together.host(), alone.host());
}

TEST_F(GpuAssign, NoCellForNaNNorInClosedCells) {
    const int n = 3, d = 4, ncell = 5;
    std::vector<float> vectors(n * d, 1.0f), closed(ncell, -INFINITY);
    vectors[d + 2] = NAN;
    closed[3] = 0;
    tests::OnDevice<float> x(vectors), c(std::vector<float>(ncell * d, 1.0f)),
            bias(closed), all_closed(std::vector<float>(ncell, -INFINITY));
    tests::OnDevice<int32_t> cells(n);
    gpu::AssignCellsParams p;
    p.n = n, p.d = d, p.ncell = ncell;
    p.x = x.data(), p.x_row_stride = d;
    p.centroids = c.data();
    p.bias = bias.data();
    p.cells = cells.data();
    gpu::assign_cells(p, nullptr);
    EXPECT_EQ(cells.host(), (std::vector<int32_t>{3, -1, 3}));
    p.bias = all_closed.data();
    gpu::assign_cells(p, nullptr);
    EXPECT_EQ(cells.host(), (std::vector<int32_t>{-1, -1, -1}));
}

TEST(GpuAssignErrors, SentencesWithoutADevice) {
    gpu::AssignCellsParams p;
    float x = 0;
    p.n = 1, p.d = 1, p.ncell = 1;
    EXPECT_SENTENCE(gpu::assign_cells(p, nullptr), "x is null");
    p.x = &x;
    EXPECT_SENTENCE(gpu::assign_cells(p, nullptr), "centroids is null");
    p.centroids = &x;
    EXPECT_SENTENCE(gpu::assign_cells(p, nullptr), "cells is null");
    p.ncell = 65537;
    EXPECT_SENTENCE(gpu::assign_cells(p, nullptr), "ncell = 65537");
    p.ncell = 1, p.d = 0;
    EXPECT_SENTENCE(gpu::assign_cells(p, nullptr), "d = 0");
    p.d = 1, p.n = std::numeric_limits<int64_t>::max();
    EXPECT_SENTENCE(gpu::assign_cells(p, nullptr), "n = 9223372036854775807");
    p.n = -1;
    EXPECT_SENTENCE(gpu::assign_cells(p, nullptr), "n = -1");
    p.n = 0, p.nhead = 65536;
    EXPECT_SENTENCE(gpu::assign_cells(p, nullptr), "nhead = 65536");
    gpu::ScoreCellsParams s;
    s.n = 1, s.d = 1, s.ncell = 1;
    s.x = s.centroids = &x;
    EXPECT_SENTENCE(gpu::score_cells(s, nullptr), "scores is null");
    gpu::HalfNormsParams h;
    h.n = 1, h.d = 1;
    EXPECT_SENTENCE(gpu::half_norms(h, nullptr), "vectors is null");
    h.n = -2;
    EXPECT_SENTENCE(gpu::half_norms(h, nullptr), "n = -2");
}

} // namespace
} // namespace faiss_saap
