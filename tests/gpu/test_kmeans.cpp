#include <faiss_saap/gpu/kmeans.h>

#include <algorithm>
#include <set>

#include <faiss_saap/Partition.h>
#include <faiss_saap/gpu/cell_means.h>
#include <faiss_saap/gpu/fixed_point.h>
#include <faiss_saap/gpu/random_permutation.h>

#include "device_test.h"

namespace faiss_saap {
namespace {

TEST(RandomPermutation, EachOnce) {
    for (uint64_t n : {1, 2, 3, 4, 5, 16, 17, 1000, 65537}) {
        for (uint64_t key : {uint64_t(0), uint64_t(7), ~uint64_t(0)}) {
            std::vector<bool> seen(n);
            for (uint64_t i = 0; i < n; i++) {
                const uint64_t to = gpu::random_permutation(i, n, key);
                ASSERT_LT(to, n);
                ASSERT_FALSE(seen[to]) << n << ": " << to << " comes twice";
                seen[to] = true;
            }
        }
    }
    // Far apart in the largest domain, and other keys choose others.
    std::set<uint64_t> large;
    for (uint64_t i = 0; i < 1000; i++) {
        large.insert(gpu::random_permutation(i, uint64_t(1) << 32, 5));
    }
    EXPECT_EQ(large.size(), 1000u);
    int equal = 0;
    for (uint64_t i = 0; i < 1000; i++) {
        equal += gpu::random_permutation(i, 1000, 1) ==
                gpu::random_permutation(i, 1000, 2);
    }
    EXPECT_LT(equal, 20);
}

TEST(FixedPoint, SumsFitAndKeepPrecision) {
    for (float largest : {1e-45f, 1e-38f, 0.75f, 1.0f, 1.5f, 1e30f, 3.4e38f}) {
        for (int64_t n : {int64_t(1), int64_t(1000), int64_t(1) << 31}) {
            const int e = gpu::fixed_point_exponent(largest, n);
            const double sum = n * std::rint(std::ldexp(double(largest), e));
            EXPECT_LT(sum, std::ldexp(1.0, 63)) << largest << " " << n;
            EXPECT_GE(sum, std::ldexp(1.0, 60)) << largest << " " << n;
        }
    }
    EXPECT_EQ(gpu::fixed_point_exponent(0, 5), 0);
}

class GpuCellMeans : public tests::DeviceTest {};

TEST_F(GpuCellMeans, EqualTheHostWhateverTheOrder) {
    tests::Random random;
    for (int d : {1, 33, 128, 300}) {
        const int nhead = 3, n = 5000, ncell = 1500;
        std::vector<float> x = random.normal(size_t(nhead) * n * d);
        x[0] = 1e-4f; // beside 1e3: exact sums lose nothing of it
        x[d] = 1e3f;
        std::vector<int32_t> cells(nhead * n);
        for (auto& c : cells) { // crowded, empty and no cells
            c = random.below(3) ? int32_t(random.below(4)) : int32_t(random.below(ncell - 10));
            c = random.below(50) ? c : random.below(2) ? -1 : ncell;
        }
        std::vector<float> expected(size_t(nhead) * ncell * d, 7.0f);
        tests::OnDevice<float> xd(x), means(expected), again(expected);
        tests::OnDevice<int32_t> cd(cells), counts(nhead * ncell);
        gpu::CellMeansParams p;
        p.nhead = nhead, p.n = n, p.d = d, p.ncell = ncell;
        p.x = xd.data(), p.x_head_stride = int64_t(n) * d, p.x_row_stride = d;
        p.cells = cd.data(), p.cells_head_stride = n;
        p.means = means.data(), p.counts = counts.data();
        tests::OnDevice<char> workspace(gpu::cell_means_workspace(p));
        gpu::cell_means(p, workspace.data(), nullptr);
        p.means = again.data();
        gpu::cell_means(p, workspace.data(), nullptr);
        const auto got = means.host();
        EXPECT_EQ(got, again.host());
        const auto count = counts.host();
        std::vector<int32_t> host_count(count.size());
        for (int h = 0; h < nhead; h++) {
            std::vector<int32_t> of_head(cells.begin() + h * n, cells.begin() + (h + 1) * n);
            for (auto& c : of_head) {
                c = c == ncell ? -1 : c; // the host refuses it
                if (c >= 0) {
                    host_count[h * ncell + c]++;
                }
            }
            cell_means(n, d, x.data() + size_t(h) * n * d, of_head.data(), ncell,
                       expected.data() + size_t(h) * ncell * d);
        }
        EXPECT_EQ(count, host_count);
        for (size_t i = 0; i < got.size(); i++) {
            ASSERT_NEAR(got[i], expected[i], 1e-6 * std::abs(expected[i]) + 1e-9) << i;
        }
    }
}

class GpuKMeans : public tests::DeviceTest {
   protected:
    struct Result {
        std::vector<float> centroids;
        std::vector<int32_t> cells;
    };
    static Result run(gpu::BatchedKMeansParams p, const std::vector<float>& x) {
        tests::OnDevice<float> xd(x), centroids(size_t(p.nhead) * p.ncell * p.d);
        tests::OnDevice<int32_t> cells(p.nhead * p.n);
        p.x = xd.data(), p.x_head_stride = p.n * p.d, p.x_row_stride = p.d;
        p.centroids = centroids.data();
        p.cells = cells.data(), p.cells_head_stride = p.n;
        tests::OnDevice<char> workspace(gpu::kmeans_workspace(p));
        gpu::kmeans(p, workspace.data(), nullptr);
        return {centroids.host(), cells.host()};
    }
    /// Mean squared distance to the own centroid, one head.
    static double error(const Result& r, const std::vector<float>& x, int64_t n, int d, int ncell, int head) {
        double sum = 0;
        for (int64_t i = 0; i < n; i++) {
            const int32_t c = r.cells[head * n + i];
            EXPECT_TRUE(c >= 0 && c < ncell) << c;
            for (int j = 0; j < d; j++) {
                const double diff = x[(head * n + i) * d + j] -
                        double(r.centroids[(size_t(head) * ncell + c) * d + j]);
                sum += diff * diff;
            }
        }
        return sum / n;
    }
};

TEST_F(GpuKMeans, AsGoodAsFaissAndRepeatable) {
    tests::Random random;
    gpu::BatchedKMeansParams p;
    p.nhead = 3, p.n = 4000, p.d = 24, p.ncell = 80;
    std::vector<float> x = random.normal(p.nhead * p.n * p.d);
    for (int64_t i = 0; i < p.nhead * p.n; i++) { // 20 clumps
        for (int j = 0; j < p.d; j++) {
            x[i * p.d + j] = 0.3f * x[i * p.d + j] + float((i % 20) * (j + 1) % 7);
        }
    }
    for (bool spherical : {false, true}) {
        p.spherical = spherical;
        const Result r = run(p, x), again = run(p, x);
        EXPECT_EQ(r.centroids, again.centroids);
        EXPECT_EQ(r.cells, again.cells);
        for (int h = 0; h < p.nhead; h++) {
            std::vector<int> size(p.ncell);
            for (int64_t i = 0; i < p.n; i++) {
                size[r.cells[h * p.n + i]]++;
            }
            EXPECT_EQ(std::count(size.begin(), size.end(), 0), 0) << "head " << h;
        }
        for (int h = 0; spherical && h < p.nhead * p.ncell; h++) {
            double norm = 0;
            for (int j = 0; j < p.d; j++) {
                norm += double(r.centroids[h * p.d + j]) * r.centroids[h * p.d + j];
            }
            EXPECT_NEAR(norm, 1, 1e-5);
        }
        if (spherical) {
            continue;
        }
        for (int h = 0; h < p.nhead; h++) {
            const float* of_head = x.data() + h * p.n * p.d;
            const Partition faiss = kmeans_partition(p.n, p.d, of_head, p.ncell, NEEDS_POST_ROPE);
            Result cpu;
            cpu.cells.resize(p.n);
            RoutingInput input;
            input.n = p.n, input.d = p.d, input.post_rope = of_head;
            faiss.key->assign(input, nullptr, 1, cpu.cells.data(), nullptr);
            cpu.centroids.resize(p.ncell * p.d);
            cell_means(p.n, p.d, of_head, cpu.cells.data(), p.ncell, cpu.centroids.data());
            const std::vector<float> head_x(of_head, of_head + p.n * p.d);
            EXPECT_LT(error(r, x, p.n, p.d, p.ncell, h),
                      1.1 * error(cpu, head_x, p.n, p.d, p.ncell, 0));
        }
    }
    p.spherical = false;
    p.seed = 99;
    EXPECT_NE(run(p, x).centroids, run({p.nhead, p.n, p.d, p.ncell, 10, false, 1}, x).centroids);
}

TEST_F(GpuKMeans, Bfloat16VectorsAreClusteredAlike) {
    tests::Random random;
    gpu::BatchedKMeansParams p;
    p.nhead = 2, p.n = 6000, p.d = 64, p.ncell = 100;
    std::vector<float> x = random.normal(p.nhead * p.n * p.d);
    for (int64_t i = 0; i < p.nhead * p.n; i++) {
        for (int j = 0; j < p.d; j++) {
            x[i * p.d + j] += float((i % 37) * (j + 1) % 7);
        }
    }
    const auto size = static_cast<int64_t>(x.size());
    std::vector<uint16_t> rounded(size);
    from_float(DType::bfloat16, x.data(), size, rounded.data());
    to_float(DType::bfloat16, rounded.data(), size, x.data());
    for (const bool spherical : {false, true}) {
        p.spherical = spherical;
        const Result wide = run(p, x);
        Result narrow[2];
        for (Result& r : narrow) {
            const tests::OnDevice<uint16_t> xd(rounded);
            const tests::OnDevice<float> centroids(size_t(p.nhead) * p.ncell * p.d);
            const tests::OnDevice<int32_t> cells(p.nhead * p.n);
            gpu::BatchedKMeansParams q = p;
            q.type = DType::bfloat16;
            q.x = xd.data(), q.x_head_stride = p.n * p.d, q.x_row_stride = p.d;
            q.centroids = centroids.data();
            q.cells = cells.data(), q.cells_head_stride = p.n;
            const tests::OnDevice<char> workspace(gpu::kmeans_workspace(q));
            gpu::kmeans(q, workspace.data(), nullptr);
            r = {centroids.host(), cells.host()};
        }
        EXPECT_EQ(narrow[0].centroids, narrow[1].centroids);
        EXPECT_EQ(narrow[0].cells, narrow[1].cells);
        for (int h = 0; h < p.nhead; h++) {
            const double error_wide = error(wide, x, p.n, p.d, p.ncell, h);
            EXPECT_NEAR(
                    error(narrow[0], x, p.n, p.d, p.ncell, h),
                    error_wide,
                    .02 * error_wide);
        }
    }
    p.type = DType::float16;
    EXPECT_SENTENCE(gpu::kmeans_workspace(p), "type = float16");
}

TEST_F(GpuKMeans, AsManyCellsAsVectors) {
    tests::Random random;
    gpu::BatchedKMeansParams p;
    p.nhead = 2, p.n = 777, p.d = 5, p.ncell = 777;
    const std::vector<float> x = random.normal(p.nhead * p.n * p.d);
    const Result r = run(p, x);
    for (int h = 0; h < p.nhead; h++) {
        EXPECT_LT(error(r, x, p.n, p.d, p.ncell, h), 1e-10);
        const std::set<int32_t> all(r.cells.begin() + h * p.n, r.cells.begin() + (h + 1) * p.n);
        EXPECT_EQ(all.size(), size_t(p.n));
    }
}

TEST_F(GpuKMeans, EqualVectorsShareTheLowestCell) {
    gpu::BatchedKMeansParams p;
    p.n = 300, p.d = 8, p.ncell = 20;
    const Result r = run(p, std::vector<float>(p.n * p.d, 2.5f));
    EXPECT_EQ(std::set<int32_t>(r.cells.begin(), r.cells.end()).size(), 1u);
    for (float c : r.centroids) {
        EXPECT_EQ(c, 2.5f);
    }
}

TEST_F(GpuKMeans, EmptyCellsAreSplitOff) {
    // Half of the vectors are equal, the others lie in ten far places: of the
    // first ten draws about five are equal, and all but one of their cells run
    // empty.
    gpu::BatchedKMeansParams p;
    p.n = 3000, p.d = 4, p.ncell = 10, p.niter = 30;
    std::vector<float> x(p.n * p.d, 1.0f);
    for (int i = 0; i < 1500; i++) {
        x[i * p.d] = 100.0f * (1 + i % 10);
    }
    const Result r = run(p, x);
    std::set<int32_t> used(r.cells.begin(), r.cells.end());
    EXPECT_GE(used.size(), 8u);
}

TEST(GpuKMeansErrors, SentencesWithoutADevice) {
    gpu::BatchedKMeansParams p;
    p.n = 10, p.d = 2, p.ncell = 11;
    EXPECT_SENTENCE(gpu::kmeans_workspace(p), "n = 10 vectors are fewer");
    p.ncell = 4, p.niter = 0;
    EXPECT_SENTENCE(gpu::kmeans_workspace(p), "niter = 0");
    p.niter = 1;
    const size_t small = gpu::kmeans_workspace(p);
    EXPECT_GE(small, (10 + 4 * 2 * 2 + 4 * 4) * sizeof(float));
    p.n = 1000000;
    EXPECT_GE(gpu::kmeans_workspace(p), 1000000 * sizeof(int));
    EXPECT_SENTENCE(gpu::kmeans(p, nullptr, nullptr), "x is null");
    p.nhead = 0;
    EXPECT_SENTENCE(gpu::kmeans(p, nullptr, nullptr), "nhead = 0");
    gpu::CellMeansParams m;
    m.n = 1, m.d = 1, m.ncell = 1;
    EXPECT_SENTENCE(gpu::cell_means(m, nullptr, nullptr), "x is null");
    m.n = 0;
    EXPECT_SENTENCE(gpu::cell_means(m, nullptr, nullptr), "means is null");
    m.d = 0;
    EXPECT_SENTENCE(gpu::cell_means_workspace(m), "d = 0");
}

} // namespace
} // namespace faiss_saap
