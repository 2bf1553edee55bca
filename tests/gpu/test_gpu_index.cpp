// GpuIndexAsymmetricIVF; the CPU index is the oracle.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <set>
#include <thread>

#include <faiss/IndexFlat.h>
#include <faiss/IndexHNSW.h>
#include <faiss/IndexIVFFlat.h>
#include <faiss/IndexScalarQuantizer.h>
#include <faiss/impl/AuxIndexStructures.h>
#include <faiss/impl/IDSelector.h>
#include <faiss/index_io.h>
#include <faiss_saap/CellMeanAssigner.h>
#include <faiss_saap/QuantizerAssigner.h>
#include <faiss_saap/QueryClassifier.h>
#include <faiss_saap/dtype.h>
#include <faiss_saap/gpu/GpuIndexAsymmetricIVF.h>

#include "device_test.h"

using namespace faiss_saap;
using namespace faiss_saap::tests;
using gpu::GpuIndexAsymmetricIVF;
using gpu::GpuIndexParams;
using idx_t = IndexAsymmetricIVF::idx_t;

namespace {

struct IndexCase {
    std::string name;
    int d = 64, ncell = 32;
    int64_t n = 3000;
    int nprobe = 8, k = 10;
    faiss::MetricType metric = faiss::METRIC_INNER_PRODUCT;
    bool float16 = false;
    int queries = 40;
    bool classifier = false; ///< assigns the queries
};

std::ostream& operator<<(std::ostream& os, const IndexCase& c) {
    return os << c.name << ": d " << c.d << ", " << c.ncell << " cells, n " << c.n
              << ", nprobe " << c.nprobe << ", k " << c.k
              << (c.metric == faiss::METRIC_L2 ? ", L2" : ", IP")
              << (c.float16 ? ", float16" : "") << ", " << c.queries << " queries"
              << (c.classifier ? " by a classifier" : "");
}

std::vector<IndexCase> index_cases() {
    std::vector<IndexCase> cases;
    const auto add = [&](const char* name, const auto& change) {
        IndexCase c;
        c.name = name;
        change(c);
        cases.push_back(c);
    };
    add("default", [](IndexCase&) {});
    add("L2", [](IndexCase& c) { c.metric = faiss::METRIC_L2; });
    add("float16", [](IndexCase& c) { c.float16 = true; });
    add("float16, L2, odd d", [](IndexCase& c) {
        c.float16 = true, c.metric = faiss::METRIC_L2, c.d = 37;
    });
    add("d 1", [](IndexCase& c) { c.d = 1, c.metric = faiss::METRIC_L2; });
    add("d 256", [](IndexCase& c) { c.d = 256; });
    add("all cells", [](IndexCase& c) { c.nprobe = 32; });
    add("one cell", [](IndexCase& c) { c.ncell = 1, c.nprobe = 1; });
    add("more cells than pages", [](IndexCase& c) { c.ncell = 700, c.n = 900; });
    add("k 2048", [](IndexCase& c) { c.k = 2048, c.queries = 5; });
    add("k larger than what is read", [](IndexCase& c) {
        c.k = 500, c.nprobe = 1;
    });
    add("one query", [](IndexCase& c) { c.queries = 1, c.n = 20000; });
    add("many queries", [](IndexCase& c) { c.queries = 3000; });
    add("classifier", [](IndexCase& c) { c.classifier = true; });
    add("classifier, d 38, many queries", [](IndexCase& c) {
        c.classifier = true, c.d = 38, c.ncell = 100, c.queries = 1000;
    });
    add("nprobe 2048", [](IndexCase& c) {
        c.nprobe = 2048, c.ncell = 4096, c.d = 16, c.n = 20000, c.queries = 20;
    });
    add("no vectors", [](IndexCase& c) { c.n = 0; });
    return cases;
}

std::unique_ptr<faiss::IndexIVF> storage(const IndexCase& c) {
    auto* quantizer = new faiss::IndexFlat(c.d, c.metric);
    std::unique_ptr<faiss::IndexIVF> lists;
    if (c.float16) {
        lists = std::make_unique<faiss::IndexIVFScalarQuantizer>(
                quantizer,
                c.d,
                c.ncell,
                faiss::ScalarQuantizer::QT_fp16,
                c.metric,
                false);
    } else {
        lists = std::make_unique<faiss::IndexIVFFlat>(
                quantizer, c.d, c.ncell, c.metric);
    }
    lists->own_fields = true;
    return lists;
}

/// The same vectors in an index on either side.
struct Pair {
    IndexCase c;
    Partition partition;
    std::vector<float> x, queries;
    std::unique_ptr<IndexAsymmetricIVF> cpu;
    std::unique_ptr<GpuIndexAsymmetricIVF> device;

    Pair(const IndexCase& c_in, Random& random, GpuIndexParams params = {}) : c(c_in) {
        params.float16 = c.float16;
        const auto centres = random.normal(size_t(2 * c.ncell + 100) * c.d);
        RopeParams rope; // nobody rotates here, but a classifier wants to know
        rope.d = c.d;
        partition = kmeans_partition(
                2 * c.ncell + 100,
                c.d,
                centres.data(),
                c.ncell,
                c.classifier ? NEEDS_PRE_ROPE : NEEDS_POST_ROPE,
                {},
                c.classifier ? rope : RopeParams());
        if (c.classifier) {
            ClassifierShape shape;
            shape.d = c.d, shape.ncell = c.ncell, shape.width = 48;
            shape.depth = c.queries >= 1000 ? 0 : 2;
            partition.query = std::make_shared<QueryClassifier>(
                    shape, random.normal(parameter_count(shape), 0.2f).data());
        }
        x = random.normal(c.n * c.d);
        queries = random.normal(size_t(c.queries) * c.d);
        cpu = std::make_unique<IndexAsymmetricIVF>(storage(c), partition);
        device = std::make_unique<GpuIndexAsymmetricIVF>(partition, c.metric, params);
        cpu->nprobe = device->nprobe = c.nprobe;
    }
    void add(int64_t begin, int64_t end) {
        cpu->add(end - begin, x.data() + begin * c.d);
        device->add(end - begin, x.data() + begin * c.d);
    }

    /// Queries whose choice of cells does not hang on rounding.
    std::vector<bool> clear_choices() const {
        const int k = std::min(c.nprobe + 1, c.ncell);
        std::vector<int32_t> cells(size_t(c.queries) * k);
        std::vector<float> scores(cells.size());
        RoutingInput in;
        in.n = c.queries;
        in.d = c.d;
        in.pre_rope = in.post_rope = queries.data();
        partition.query->assign(in, nullptr, k, cells.data(), scores.data());
        std::vector<bool> clear(c.queries, true);
        for (int q = 0; q < c.queries && k > c.nprobe; q++) {
            const float* s = &scores[size_t(q) * k + k - 2];
            clear[q] = s[0] - s[1] > 1e-4f * (1 + std::abs(s[0]));
        }
        return clear;
    }

    /// Vectors that lie in other cells than on the CPU, being as near to two.
    int64_t elsewhere() const {
        IndexAsymmetricIVF copy(storage(c), partition);
        device->copyTo(&copy);
        const auto &a = *cpu->lists->invlists, &b = *copy.lists->invlists;
        int64_t n = 0;
        for (int cell = 0; cell < c.ncell; cell++) {
            faiss::InvertedLists::ScopedIds ia(&a, cell), ib(&b, cell);
            const std::set<idx_t> here(ia.get(), ia.get() + a.list_size(cell));
            for (size_t i = 0; i < b.list_size(cell); i++) {
                n += here.count(ib[i]) == 0;
            }
        }
        return n;
    }

    void expect_equal_search() const {
        const size_t size = size_t(c.queries) * c.k;
        std::vector<float> expected(size), got(size);
        std::vector<idx_t> expected_ids(size), ids(size);
        SearchParametersAsymmetricIVF params;
        SearchStats stats, expected_stats;
        params.nprobe = c.nprobe;
        params.stats = &expected_stats;
        cpu->search(
                c.queries,
                queries.data(),
                c.k,
                expected.data(),
                expected_ids.data(),
                &params);
        params.stats = &stats;
        device->search(
                c.queries, queries.data(), c.k, got.data(), ids.data(), &params);
        EXPECT_EQ(stats.queries, c.queries);
        const auto clear = clear_choices();
        if (std::count(clear.begin(), clear.end(), false) == 0 && elsewhere() == 0) {
            EXPECT_EQ(stats.cells_probed, expected_stats.cells_probed);
            EXPECT_EQ(stats.vectors_read, expected_stats.vectors_read);
        }
        int compared = 0;
        for (int q = 0; q < c.queries; q++) {
            if (!clear[q]) {
                continue;
            }
            compared++;
            const size_t at = size_t(q) * c.k;
            std::set<idx_t> a, b;
            for (int i = 0; i < c.k; i++) {
                const float e = expected[at + i];
                const float tolerance = 2e-4f * (1 + std::abs(e));
                if (std::abs(e) < 1e30f) {
                    ASSERT_NEAR(got[at + i], e, tolerance) << "query " << q << " rank " << i;
                } else {
                    ASSERT_EQ(got[at + i], e) << "query " << q << " rank " << i;
                }
                // The last ones may change places with others as near.
                const float last = expected[at + c.k - 1];
                if (std::abs(e - last) > 2 * tolerance || expected_ids[at + i] < 0) {
                    a.insert(expected_ids[at + i]);
                }
                b.insert(ids[at + i]);
            }
            EXPECT_TRUE(std::includes(b.begin(), b.end(), a.begin(), a.end()))
                    << "query " << q;
        }
        EXPECT_GE(compared, c.queries / 2); // a single one may be unclear
    }
};

/// Says where the first difference is.
void expect_same_vectors(
        const std::vector<float>& got,
        const std::vector<float>& expected,
        int d) {
    ASSERT_EQ(got.size(), expected.size());
    for (size_t i = 0; i < got.size(); i++) {
        ASSERT_EQ(got[i], expected[i])
                << "component " << i % d << " of vector " << i / d << ": got "
                << std::hexfloat << got[i] << ", expected " << expected[i];
    }
}

class GpuIndexCases : public DeviceTest,
                      public ::testing::WithParamInterface<IndexCase> {};

class GpuIndex : public DeviceTest {};

} // namespace

INSTANTIATE_TEST_SUITE_P(Table, GpuIndexCases, ::testing::ValuesIn(index_cases()));

TEST_P(GpuIndexCases, SearchesAsTheCpu) {
    Random random;
    Pair p(GetParam(), random);
    // In parts, so that lists grow.
    p.add(0, p.c.n / 3);
    p.add(p.c.n / 3, p.c.n);
    EXPECT_EQ(p.device->ntotal, p.c.n);
    const auto sizes = p.device->list_sizes();
    EXPECT_EQ(std::accumulate(sizes.begin(), sizes.end(), int64_t(0)), p.c.n);
    // A key between two cells may lie in the other one: the same lists are asked.
    ASSERT_LE(p.elsewhere(), 1 + p.c.n / 500);
    p.device->copyTo(p.cpu.get());
    p.expect_equal_search();
}

TEST_F(GpuIndex, RandomShapesEqualTheCpu) {
    Random random;
    for (int round = 0; round < 20; round++) {
        IndexCase c;
        c.name = "random";
        c.d = static_cast<int>(4 + random.below(random.below(2) ? 300 : 40));
        c.ncell = static_cast<int>(1 + random.below(200));
        c.n = random.below(4000);
        c.nprobe = static_cast<int>(1 + random.below(c.ncell));
        c.k = static_cast<int>(1 + random.below(random.below(2) ? 2048 : 20));
        c.queries = static_cast<int>(1 + random.below(60));
        c.metric = random.below(2) ? faiss::METRIC_L2 : faiss::METRIC_INNER_PRODUCT;
        c.float16 = random.below(2) == 1;
        SCOPED_TRACE(c);
        GpuIndexParams params;
        params.slab_bytes = size_t(1) << (10 + random.below(12));
        params.temporary_bytes = size_t(1) << (12 + random.below(14));
        Pair p(c, random, params);
        for (int64_t i = 0; i < c.n;) {
            const int64_t to = std::min(c.n, i + 1 + random.below(2000));
            p.add(i, to);
            i = to;
        }
        ASSERT_LE(p.elsewhere(), 1 + c.n / 500);
        p.device->copyTo(p.cpu.get());
        p.expect_equal_search();
        ASSERT_FALSE(HasFailure());
    }
}

TEST_F(GpuIndex, ReconstructsWhatItHolds) {
    Random random;
    IndexCase c = index_cases()[0];
    c.d = 37;
    for (bool float16 : {false, true}) {
        SCOPED_TRACE(float16 ? "float16" : "float32");
        c.float16 = float16;
        GpuIndexParams params;
        params.slab_bytes = 1 << 16; // several slabs
        params.temporary_bytes = 1000 * 37 * 4; // several parts
        Pair p(c, random, params);
        p.add(0, c.n);
        std::vector<float> got(c.n * c.d), expected = p.x;
        if (float16) {
            std::vector<char> half(c.n * c.d * 2);
            from_float(DType::float16, p.x.data(), c.n * c.d, half.data());
            to_float(DType::float16, half.data(), c.n * c.d, expected.data());
        }
        p.device->reconstruct_n(0, c.n, got.data());
        expect_same_vectors(got, expected, c.d);
        const OnDevice<float> on_device(c.n * c.d);
        p.device->reconstruct_n(0, c.n, on_device.data());
        expect_same_vectors(on_device.host(), expected, c.d);

        const idx_t gone[] = {7, 2999};
        p.device->remove_ids(faiss::IDSelectorBatch(2, gone));
        EXPECT_SENTENCE(
                p.device->reconstruct(7, got.data()), "id 7 is not in the index");
        EXPECT_SENTENCE(
                p.device->reconstruct_n(0, 10, got.data()), "id 7 is not in the index");
        EXPECT_SENTENCE(p.device->reconstruct(-1, got.data()), "i0 = -1");
        EXPECT_SENTENCE(p.device->reconstruct_n(0, c.n, got.data()), "ni = 3000");
        EXPECT_SENTENCE(p.device->reconstruct_n(0, 5, nullptr), "recons is null");
        p.device->reconstruct_n(5, 0, nullptr); // nothing to do
        p.device->reconstruct(2998, got.data());
        for (int j = 0; j < c.d; j++) {
            EXPECT_EQ(got[j], expected[2998 * c.d + j]);
        }
        const int k = 5;
        std::vector<float> distances(k), found(k * c.d);
        std::vector<idx_t> ids(k);
        p.device->search_and_reconstruct(
                1, p.queries.data(), k, distances.data(), ids.data(), found.data());
        for (int i = 0; i < k; i++) {
            ASSERT_GE(ids[i], 0);
            for (int j = 0; j < c.d; j++) {
                EXPECT_EQ(found[i * c.d + j], expected[ids[i] * c.d + j]);
            }
        }
    }
}

TEST_F(GpuIndex, WorksOnTheCallersStream) {
    Random random;
    cudaStream_t stream;
    ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
    {
        GpuIndexParams params;
        params.stream = stream;
        Pair p(index_cases()[0], random, params);
        p.cpu->add(p.c.n, p.x.data());
        const OnDevice<float> x(p.x.size());
        ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
        // Filled on the stream, and nobody waits for it.
        ASSERT_EQ(
                cudaMemcpyAsync(
                        x.data(),
                        p.x.data(),
                        p.x.size() * sizeof(float),
                        cudaMemcpyHostToDevice,
                        stream),
                cudaSuccess);
        p.device->add(p.c.n, x.data());
        p.expect_equal_search();
    }
    cudaStreamDestroy(stream);
}

TEST_F(GpuIndex, TakesMemoryOfHostAndDevice) {
    Random random;
    Pair p(index_cases()[0], random);
    p.cpu->add(p.c.n, p.x.data());
    const OnDevice<float> x(p.x), queries(p.queries);
    std::vector<idx_t> ids(p.c.n);
    std::iota(ids.begin(), ids.end(), 0);
    const OnDevice<idx_t> d_ids(ids);
    p.device->add_with_ids(p.c.n, x.data(), d_ids.data());
    p.expect_equal_search();
    const size_t size = size_t(p.c.queries) * p.c.k;
    std::vector<float> expected(size);
    std::vector<idx_t> expected_ids(size);
    p.device->search(
            p.c.queries, p.queries.data(), p.c.k, expected.data(), expected_ids.data());
    const OnDevice<float> distances(size);
    const OnDevice<idx_t> labels(size);
    p.device->search(
            p.c.queries, queries.data(), p.c.k, distances.data(), labels.data());
    EXPECT_EQ(distances.host(), expected);
    EXPECT_EQ(labels.host(), expected_ids);
}

TEST_F(GpuIndex, RemovesAndReusesPages) {
    Random random;
    IndexCase c = index_cases()[0];
    c.n = 8000;
    GpuIndexParams params;
    params.slab_bytes = 1 << 16; // several slabs
    Pair p(c, random, params);
    p.add(0, 5000);
    for (int round = 0; round < 3; round++) {
        std::vector<idx_t> gone;
        for (idx_t i = 0; i < 8000; i++) {
            if (random.below(3) == 0) {
                gone.push_back(i);
            }
        }
        const faiss::IDSelectorBatch selector(gone.size(), gone.data());
        EXPECT_EQ(p.device->remove_ids(selector), p.cpu->remove_ids(selector));
        EXPECT_EQ(p.device->ntotal, p.cpu->ntotal);
        p.expect_equal_search();
        std::vector<idx_t> ids(1000);
        std::iota(ids.begin(), ids.end(), 5000 + 1000 * round);
        const float* x = p.x.data() + (5000 + 1000 * round) * c.d;
        p.cpu->add_with_ids(1000, x, ids.data());
        p.device->add_with_ids(1000, x, ids.data());
        p.expect_equal_search();
    }
    faiss::IDSelectorRange all(0, 1 << 20);
    p.device->remove_ids(all);
    EXPECT_EQ(p.device->ntotal, 0);
    const size_t held = p.device->memory();
    EXPECT_GE(p.device->reclaimMemory(), held - params.slab_bytes);
    p.cpu->reset();
    p.add(0, 2000);
    p.expect_equal_search();
    p.cpu->reset();
    p.device->reset();
    p.expect_equal_search();
}

TEST_F(GpuIndex, ReservedMemoryIsEnough) {
    Random random;
    IndexCase c = index_cases()[0];
    c.n = 20000;
    GpuIndexParams params;
    params.slab_bytes = 1 << 18;
    Pair p(c, random, params);
    p.device->reserveMemory(c.n);
    const size_t held = p.device->memory();
    for (int64_t i = 0; i < c.n; i += 777) {
        p.add(i, std::min(i + 777, c.n));
    }
    EXPECT_EQ(p.device->memory(), held);
    p.expect_equal_search();
}

TEST_F(GpuIndex, CopiesFromAndToTheCpu) {
    Random random;
    for (const IndexCase& c : index_cases()) {
        if (c.queries > 100) {
            continue;
        }
        SCOPED_TRACE(c.name);
        Pair p(c, random);
        p.cpu->add(c.n, p.x.data());
        p.device->copyFrom(*p.cpu);
        EXPECT_EQ(p.device->ntotal, c.n);
        p.expect_equal_search();
        IndexAsymmetricIVF back(storage(c), p.partition);
        p.device->copyTo(&back);
        EXPECT_EQ(back.ntotal, c.n);
        for (int cell = 0; cell < c.ncell; cell++) {
            const auto& a = *p.cpu->lists->invlists;
            const auto& b = *back.lists->invlists;
            ASSERT_EQ(a.list_size(cell), b.list_size(cell));
            faiss::InvertedLists::ScopedIds ia(&a, cell), ib(&b, cell);
            faiss::InvertedLists::ScopedCodes ca(&a, cell), cb(&b, cell);
            const size_t size = a.list_size(cell);
            EXPECT_TRUE(std::equal(ia.get(), ia.get() + size, ib.get()));
            EXPECT_TRUE(
                    std::equal(ca.get(), ca.get() + size * a.code_size, cb.get()));
        }
    }
}

TEST_F(GpuIndex, LearnsCells) {
    Random random;
    const int d = 32, ncell = 50, n = 5000, queries = 200;
    GpuIndexAsymmetricIVF index(d, ncell, faiss::METRIC_INNER_PRODUCT);
    EXPECT_FALSE(index.is_trained);
    const auto x = random.normal(n * d), q = random.normal(queries * d);
    index.train(n, x.data());
    ASSERT_TRUE(index.is_trained);
    index.add(n, x.data());
    EXPECT_LT(index.imbalance_factor(), 2);
    index.nprobe = ncell;
    std::vector<float> distances(queries * 10), expected(queries * 10);
    std::vector<idx_t> ids(queries * 10), expected_ids(queries * 10);
    index.search(queries, q.data(), 10, distances.data(), ids.data());
    faiss::IndexFlatIP flat(d);
    flat.add(n, x.data());
    flat.search(queries, q.data(), 10, expected.data(), expected_ids.data());
    for (int i = 0; i < queries * 10; i++) {
        EXPECT_NEAR(distances[i], expected[i], 1e-3);
    }
    // A fifth of the cells holds more than a fifth of the neighbours.
    index.nprobe = ncell / 5;
    index.search(queries, q.data(), 10, distances.data(), ids.data());
    int found = 0;
    for (int i = 0; i < queries * 10; i++) {
        const auto* row = &expected_ids[i / 10 * 10];
        found += std::count(row, row + 10, ids[i]);
    }
    EXPECT_GT(found, queries * 10 / 2);

    // By L2 far from the origin the nearest cell is seldom that of the largest
    // inner product.
    auto far = random.normal(ncell * d);
    for (float& f : far) {
        f = 30 + 3 * f;
    }
    std::vector<float> clustered(n * d);
    for (int i = 0; i < n * d; i++) {
        clustered[i] = far[i / d % ncell * d + i % d] + .1f * x[i];
    }
    GpuIndexAsymmetricIVF l2(d, ncell, faiss::METRIC_L2);
    l2.train(n, clustered.data());
    l2.add(n, clustered.data());
    l2.search(queries, clustered.data(), 1, distances.data(), ids.data());
    found = 0;
    for (int i = 0; i < queries; i++) {
        found += ids[i] == i;
    }
    EXPECT_GT(found, .9 * queries);
}

TEST_F(GpuIndex, SearchesFromManyThreads) {
    Random random;
    Pair p(index_cases()[0], random);
    p.add(0, p.c.n);
    const size_t size = size_t(p.c.queries) * p.c.k;
    std::vector<float> expected(size);
    std::vector<idx_t> expected_ids(size);
    p.device->search(
            p.c.queries, p.queries.data(), p.c.k, expected.data(), expected_ids.data());
    std::vector<std::thread> threads;
    std::vector<int> wrong(4);
    for (int t = 0; t < 4; t++) {
        threads.emplace_back([&, t] {
            for (int round = 0; round < 20; round++) {
                std::vector<float> distances(size);
                std::vector<idx_t> ids(size);
                p.device->search(
                        p.c.queries,
                        p.queries.data(),
                        p.c.k,
                        distances.data(),
                        ids.data());
                wrong[t] += ids != expected_ids || distances != expected;
            }
        });
    }
    for (auto& t : threads) {
        t.join();
    }
    EXPECT_EQ(wrong, std::vector<int>(4));
}

TEST_F(GpuIndex, RefusesWithASentenceAndIsAsBefore) {
    Random random;
    Pair p(index_cases()[0], random);
    p.add(0, p.c.n);
    GpuIndexAsymmetricIVF& index = *p.device;
    const int d = p.c.d;
    std::vector<float> distances(4096), bad(p.x.begin(), p.x.begin() + 10 * d);
    std::vector<idx_t> ids(4096);
    const auto search = [&](idx_t n, const float* x, idx_t k) {
        index.search(n, x, k, distances.data(), ids.data());
    };
    bad[3 * d + 5] = std::numeric_limits<float>::quiet_NaN();
    EXPECT_SENTENCE(index.add(10, bad.data()), "vector 3, component 5");
    EXPECT_SENTENCE(search(10, bad.data(), 1), "vector 3, component 5");
    EXPECT_SENTENCE(index.add(-1, bad.data()), "n = -1");
    EXPECT_SENTENCE(index.add(1, nullptr), "x is null");
    const idx_t negative[] = {4, -2};
    EXPECT_SENTENCE(
            index.add_with_ids(2, p.x.data(), negative), "xids[1] = -2");
    EXPECT_SENTENCE(search(1, p.x.data(), 0), "k = 0");
    EXPECT_SENTENCE(search(1, p.x.data(), 2049), "k = 2049");
    EXPECT_SENTENCE(search(1, nullptr, 1), "x is null");
    EXPECT_SENTENCE(
            index.search(1, p.x.data(), 1, nullptr, ids.data()), "distances is null");
    index.nprobe = 0;
    EXPECT_SENTENCE(search(1, p.x.data(), 1), "nprobe = 0");
    index.nprobe = p.c.nprobe;
    GpuIndexAsymmetricIVF large_one(d, 4096, faiss::METRIC_L2);
    large_one.nprobe = 2049;
    EXPECT_SENTENCE(
            large_one.search(1, p.x.data(), 1, distances.data(), ids.data()),
            "nprobe = 2049 must be at most 2048 or all ncell = 4096 cells");

    // Parameters of a search.
    const auto search_with = [&](const faiss::SearchParameters& params) {
        index.search(1, p.x.data(), 1, distances.data(), ids.data(), &params);
    };
    faiss::IDSelectorRange some(0, 10);
    faiss::SearchParametersIVF given;
    given.sel = &some;
    EXPECT_SENTENCE(search_with(given), "params->sel");
    given.sel = nullptr;
    given.max_codes = 5;
    EXPECT_SENTENCE(search_with(given), "params->max_codes = 5");
    given.max_codes = 0;
    faiss::SearchParameters none;
    given.quantizer_params = &none;
    EXPECT_SENTENCE(search_with(given), "params->quantizer_params");
    struct Others : faiss::SearchParameters {};
    EXPECT_SENTENCE(search_with(Others()), "params of type");

    // What faiss::Index has and this has not.
    faiss::RangeSearchResult result(1);
    EXPECT_SENTENCE(
            index.range_search(1, p.x.data(), 1, &result), "range_search is not built");
    EXPECT_THROW(index.merge_from(large_one), faiss::FaissException);
    const TemporaryFile file;
    EXPECT_THROW(faiss::write_index(&index, file.path.c_str()), faiss::FaissException);

    // Partitions and storages that have no kernel.
    auto graph = std::make_shared<faiss::IndexHNSWFlat>(d, 8);
    graph->add(20, p.x.data());
    const auto by_graph = std::make_shared<QuantizerAssigner>(graph, NEEDS_POST_ROPE);
    Partition strange = p.partition;
    strange.query = std::make_shared<CellMeanAssigner>(d, p.c.ncell);
    EXPECT_SENTENCE(
            GpuIndexAsymmetricIVF(strange, faiss::METRIC_L2),
            "reads statistics of a sequence's cells");
    EXPECT_SENTENCE(index.set_query_assigner(strange.query), "reads statistics");
    strange.key = strange.query = by_graph;
    EXPECT_SENTENCE(
            GpuIndexAsymmetricIVF(strange, faiss::METRIC_L2), "the key assigner");
    EXPECT_SENTENCE(index.set_query_assigner(by_graph), "20");
    auto* quantizer = new faiss::IndexFlat(d, p.c.metric);
    auto coded = std::make_unique<faiss::IndexIVFScalarQuantizer>(
            quantizer, d, p.c.ncell, faiss::ScalarQuantizer::QT_8bit, p.c.metric, false);
    coded->own_fields = true;
    IndexAsymmetricIVF bytes(std::move(coded), p.partition);
    EXPECT_SENTENCE(index.copyFrom(bytes), "not trained");
    bytes.train(p.c.n, p.x.data());
    EXPECT_SENTENCE(index.copyFrom(bytes), "on the GPU storage must be");
    EXPECT_SENTENCE(index.reserveMemory(size_t(1) << 40), "2^31");
    // 2^31 - 4096 vectors of d 64 are 512 GiB: more than any device has, and more
    // slabs than an index has.
    constexpr size_t kMany = (size_t(1) << 31) - 8192;
    EXPECT_SENTENCE(index.reserveMemory(kMany), "choose larger slab_bytes");
    GpuIndexParams large;
    large.slab_bytes = size_t(1) << 30;
    Pair full(index_cases()[0], random, large);
    full.add(0, 1000);
    const size_t held = full.device->memory();
    EXPECT_SENTENCE(full.device->reserveMemory(kMany), "not enough device memory");
    EXPECT_EQ(full.device->memory(), held);
    full.add(1000, full.c.n);
    full.expect_equal_search();
    EXPECT_SENTENCE(
            GpuIndexAsymmetricIVF(d, 0, faiss::METRIC_L2), "ncell = 0");
    EXPECT_SENTENCE(GpuIndexAsymmetricIVF(d, 4, faiss::METRIC_L1), "metric");
    GpuIndexParams elsewhere;
    elsewhere.device = 99;
    EXPECT_SENTENCE(
            GpuIndexAsymmetricIVF(d, 4, faiss::METRIC_L2, elsewhere), "99");
    GpuIndexParams halves;
    halves.float16 = true;
    GpuIndexAsymmetricIVF narrow(p.partition, faiss::METRIC_L2, halves);
    std::vector<float> large_numbers(2 * d, 1);
    large_numbers[d + 2] = -65505;
    EXPECT_SENTENCE(
            narrow.add(2, large_numbers.data()),
            "x[" + std::to_string(d + 2) + "] = -65505 is beyond the 65504");
    EXPECT_EQ(narrow.ntotal, 0);
    large_numbers[d + 2] = -65504;
    narrow.add(2, large_numbers.data());
    GpuIndexAsymmetricIVF untrained(d, 64, faiss::METRIC_L2);
    EXPECT_SENTENCE(untrained.add(1, p.x.data()), "not trained");
    EXPECT_SENTENCE(untrained.train(10, p.x.data()), "n = 10");
    EXPECT_SENTENCE(index.copyTo(nullptr), "index is null");
    EXPECT_EQ(index.ntotal, p.c.n);
    p.expect_equal_search();
}
