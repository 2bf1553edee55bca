#include <faiss_saap/IndexAsymmetricIVF.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <set>
#include <thread>

#include <faiss/IndexFlat.h>
#include <faiss/IndexIVFFlat.h>
#include <faiss/IndexIVFPQ.h>
#include <faiss/IndexPreTransform.h>
#include <faiss/IndexRefine.h>
#include <faiss/IndexScalarQuantizer.h>
#include <faiss/impl/AuxIndexStructures.h>

#include <faiss_saap/AsymmetricParameterSpace.h>
#include <faiss_saap/CellMeanAssigner.h>
#include <faiss_saap/QuantizerAssigner.h>
#include <faiss_saap/index_factory.h>
#include <faiss_saap/index_io.h>

#include "common.h"

namespace faiss_saap {
namespace {

constexpr int d = 16, ncell = 20, n = 1000, nq = 30, k = 7;

struct Inputs {
    std::string description;
    faiss::MetricType metric;
};

std::ostream& operator<<(std::ostream& os, const Inputs& in) {
    return os << in.description
              << (in.metric == faiss::METRIC_L2 ? " L2" : " IP");
}

class AsymmetricIVF : public ::testing::TestWithParam<Inputs> {
   protected:
    tests::Random random;
    std::vector<float> x = random.normal(n * d);
    std::vector<float> q = random.normal(nq * d);

    std::unique_ptr<IndexAsymmetricIVF> trained() {
        auto index =
                index_factory(d, GetParam().description, GetParam().metric);
        index->train(n, x.data());
        return index;
    }
    std::unique_ptr<IndexAsymmetricIVF> filled() {
        auto index = trained();
        index->add(n, x.data());
        return index;
    }
    struct Found {
        std::vector<float> distances;
        std::vector<idx_t> labels;
        bool operator==(const Found& o) const {
            return distances == o.distances && labels == o.labels;
        }
    };
    Found search(
            const faiss::Index& index,
            const faiss::SearchParameters* params = nullptr) {
        Found f{std::vector<float>(nq * k), std::vector<idx_t>(nq * k)};
        index.search(
                nq, q.data(), k, f.distances.data(), f.labels.data(), params);
        return f;
    }
};

/// Labels equal wherever the distances tell the neighbours apart.
void expect_same_neighbours(
        const std::vector<float>& distances,
        const std::vector<idx_t>& labels,
        const std::vector<float>& expected_distances,
        const std::vector<idx_t>& expected_labels) {
    for (int i = 0; i < nq * k; i++) {
        EXPECT_NEAR(distances[i], expected_distances[i], 1e-3);
        const auto differs = [&](int other) {
            return std::abs(expected_distances[i] - expected_distances[other]) >
                    1e-4 * std::abs(expected_distances[i]);
        };
        const bool lonely = (i % k == 0 || differs(i - 1)) &&
                i % k != k - 1 && differs(i + 1);
        if (lonely) {
            EXPECT_EQ(labels[i], expected_labels[i]) << i;
        }
    }
}

TEST_P(AsymmetricIVF, ProbingEveryCellIsExhaustive) {
    auto index = filled();
    index->nprobe = 10 * ncell; // clamped
    SearchStats stats;
    SearchParametersAsymmetricIVF params;
    params.nprobe = 10 * ncell;
    params.stats = &stats;
    const Found found = search(*index, &params);
    EXPECT_EQ(stats.queries, nq);
    EXPECT_EQ(stats.vectors_read, int64_t(nq) * n);
    EXPECT_LE(stats.cells_probed, int64_t(nq) * ncell);
    EXPECT_EQ(found, search(*index));

    // Against the inner index, exhaustively, and where vectors are exact
    // against brute force.
    std::vector<float> distances(nq * k);
    std::vector<idx_t> labels(nq * k);
    std::vector<idx_t> all(nq * ncell);
    for (int i = 0; i < nq * ncell; i++) {
        all[i] = i % ncell;
    }
    const std::vector<float> zeros(all.size());
    faiss::SearchParametersIVF ivf;
    ivf.nprobe = ncell;
    index->lists->search_preassigned(
            nq, q.data(), k, all.data(), zeros.data(), distances.data(),
            labels.data(), false, &ivf);
    expect_same_neighbours(found.distances, found.labels, distances, labels);
    if (GetParam().description.find("Flat") != std::string::npos) {
        faiss::IndexFlat flat(d, GetParam().metric);
        flat.add(n, x.data());
        flat.search(nq, q.data(), k, distances.data(), labels.data());
        expect_same_neighbours(
                found.distances, found.labels, distances, labels);
    }
}

TEST_P(AsymmetricIVF, SearchIsAssignmentAndPreassignedSearch) {
    auto index = filled();
    index->nprobe = 4;
    std::vector<idx_t> cells(nq * 4);
    index->assign_queries(nq, q.data(), 4, cells.data());
    Found f{std::vector<float>(nq * k), std::vector<idx_t>(nq * k)};
    index->search_preassigned(
            nq, q.data(), k, 4, cells.data(), f.distances.data(),
            f.labels.data());
    EXPECT_EQ(f, search(*index));
    // The cells are those of the query assigner.
    RoutingInput input;
    input.n = nq;
    input.d = d;
    input.post_rope = q.data();
    std::vector<int32_t> expected(nq * 4);
    index->partition.query->assign(input, nullptr, 4, expected.data(), nullptr);
    EXPECT_TRUE(std::equal(cells.begin(), cells.end(), expected.begin()));
}

TEST_P(AsymmetricIVF, OneByOneEqualsBulk) {
    auto bulk = filled();
    auto single = trained();
    single->partition = bulk->partition;
    for (int i = 0; i < n; i++) {
        single->add(1, x.data() + i * d);
    }
    EXPECT_EQ(single->ntotal, n);
    bulk->nprobe = single->nprobe = 3;
    EXPECT_EQ(search(*bulk), search(*single));
}

TEST_P(AsymmetricIVF, RangeSearchFindsWhatSearchFinds) {
    auto index = filled();
    index->nprobe = ncell;
    const Found found = search(*index);
    const bool l2 = GetParam().metric == faiss::METRIC_L2;
    // A radius that cuts somewhere among the neighbours.
    const float radius = found.distances[3];
    faiss::RangeSearchResult result(nq);
    SearchStats stats;
    SearchParametersAsymmetricIVF params;
    params.nprobe = ncell;
    params.stats = &stats;
    index->range_search(nq, q.data(), radius, &result, &params);
    EXPECT_EQ(stats.vectors_read, int64_t(nq) * n);
    for (int i = 0; i < nq; i++) {
        std::set<idx_t> inside(
                result.labels + result.lims[i], result.labels + result.lims[i + 1]);
        for (int j = 0; j < k; j++) {
            const float distance = found.distances[i * k + j];
            if (std::abs(distance - radius) > 1e-4f) {
                EXPECT_EQ(
                        inside.count(found.labels[i * k + j]),
                        l2 ? distance < radius : distance > radius);
            }
        }
    }
}

TEST_P(AsymmetricIVF, SelectorsRestrictTheSearch) {
    auto index = filled();
    faiss::IDSelectorRange range(100, 200);
    SearchParametersAsymmetricIVF params;
    params.nprobe = ncell;
    params.sel = &range;
    for (idx_t id : search(*index, &params).labels) {
        EXPECT_TRUE(id >= 100 && id < 200);
    }
    // A selector alone takes the index's own nprobe.
    index->nprobe = ncell;
    faiss::SearchParameters plain;
    plain.sel = &range;
    EXPECT_EQ(search(*index, &plain), search(*index, &params));
}

TEST_P(AsymmetricIVF, MaxCodesStopsEarly) {
    auto index = filled();
    SearchStats all, some;
    SearchParametersAsymmetricIVF params;
    params.nprobe = ncell;
    params.stats = &all;
    search(*index, &params);
    params.stats = &some;
    params.max_codes = 100;
    search(*index, &params);
    EXPECT_LT(some.vectors_read, all.vectors_read);
    EXPECT_GE(some.vectors_read, 100 * nq);
}

TEST_P(AsymmetricIVF, RemoveReconstructMerge) {
    // All of it together, against a plain map, with and without direct map.
    for (bool mapped : {false, true}) {
        SCOPED_TRACE(mapped);
        auto index = trained();
        auto other = trained();
        other->partition = index->partition;
        index->set_direct_map(mapped);
        other->set_direct_map(mapped);
        std::map<idx_t, const float*> expected;
        std::vector<idx_t> ids;
        for (int i = 0; i < 600; i++) {
            ids.push_back(1'000'000'007LL * i);
            expected[ids.back()] = x.data() + i * d;
        }
        index->add_with_ids(600, x.data(), ids.data());
        ids.clear();
        for (int i = 600; i < n; i++) {
            ids.push_back(i);
            expected[i + 5] = x.data() + i * d;
        }
        other->add_with_ids(n - 600, x.data() + 600 * d, ids.data());

        struct EveryThird : faiss::IDSelector {
            bool is_member(idx_t id) const override {
                return id % 3 == 0;
            }
        } third;
        size_t removed = 0;
        for (auto it = expected.begin(); it != expected.end();) {
            const bool remove = it->first > 2000 && it->first % 3 == 0;
            it = remove ? expected.erase(it) : std::next(it);
            removed += remove;
        }
        expected.erase(0); // the only small id of `index`
        EXPECT_EQ(index->remove_ids(third), removed + 1);
        index->merge_from(*other, 5);
        EXPECT_EQ(other->ntotal, 0);
        EXPECT_EQ(index->ntotal, idx_t(expected.size()));

        // Again after the merge: the map must have survived it.
        const idx_t gone = 700 + 5;
        faiss::IDSelectorRange one(gone, gone + 1);
        EXPECT_EQ(index->remove_ids(one), 1u);
        EXPECT_EQ(index->remove_ids(one), 0u);
        expected.erase(gone);
        EXPECT_EQ(index->ntotal, idx_t(expected.size()));

        std::vector<float> code_error(d);
        index->set_direct_map(true);
        const bool exact = GetParam().description.find("Flat") != std::string::npos;
        for (const auto& [id, vector] : expected) {
            index->reconstruct(id, code_error.data());
            for (int j = 0; exact && j < d; j++) {
                ASSERT_EQ(code_error[j], vector[j]);
            }
        }
        std::vector<float> block(10 * d), single(d);
        index->reconstruct_n(610, 10, block.data());
        index->reconstruct(614, single.data());
        EXPECT_TRUE(std::equal(single.begin(), single.end(), block.begin() + 4 * d));
        EXPECT_SENTENCE(index->reconstruct(gone, single.data()), "key = 705");
        EXPECT_SENTENCE(index->reconstruct_n(700, 10, block.data()), "id 705");

        // And what search returns is what is there.
        index->nprobe = ncell;
        for (idx_t label : search(*index).labels) {
            EXPECT_EQ(expected.count(label), 1u);
        }
        index->reset();
        EXPECT_EQ(index->ntotal, 0);
        for (idx_t label : search(*index).labels) {
            EXPECT_EQ(label, -1);
        }
        index->add(5, x.data());
        index->reconstruct(4, single.data());
    }
}

TEST_P(AsymmetricIVF, WrongInputChangesNothing) {
    auto index = filled();
    index->nprobe = 3;
    const Found before = search(*index);
    std::vector<float> bad(x.begin(), x.begin() + 3 * d);
    std::vector<float> distances(nq * k);
    std::vector<idx_t> labels(nq * k);
    const auto search_with = [&](idx_t nn, const float* queries, idx_t kk,
                                 const faiss::SearchParameters* p = nullptr) {
        index->search(nn, queries, kk, distances.data(), labels.data(), p);
    };
    EXPECT_SENTENCE(search_with(-1, q.data(), k), "n = -1");
    EXPECT_SENTENCE(search_with(nq, nullptr, k), "x is null");
    EXPECT_SENTENCE(search_with(nq, q.data(), 0), "k = 0");
    EXPECT_SENTENCE(search_with(nq, q.data(), -4), "k = -4");
    EXPECT_SENTENCE(
            index->search(1, q.data(), 1, nullptr, labels.data()), "distances");
    EXPECT_SENTENCE(
            index->search(1, q.data(), 1, distances.data(), nullptr), "labels");
    EXPECT_SENTENCE(index->add(-2, x.data()), "n = -2");
    EXPECT_SENTENCE(index->add(1, nullptr), "x is null");
    for (float evil : {NAN, INFINITY, -INFINITY}) {
        bad[2 * d + 5] = evil;
        EXPECT_SENTENCE(search_with(3, bad.data(), k), "(vector 2, component 5)");
        EXPECT_SENTENCE(index->add(3, bad.data()), "(vector 2, component 5)");
        faiss::RangeSearchResult result(3);
        EXPECT_SENTENCE(
                index->range_search(3, bad.data(), 1, &result), "vector 2");
    }
    const std::vector<idx_t> negative = {5, -1, 6};
    EXPECT_SENTENCE(
            index->add_with_ids(3, x.data(), negative.data()), "xids[1] = -1");
    SearchParametersAsymmetricIVF params;
    params.nprobe = 0;
    EXPECT_SENTENCE(search_with(1, q.data(), 1, &params), "nprobe = 0");
    faiss::SearchParameters quantizer_params;
    params.nprobe = 1;
    params.quantizer_params = &quantizer_params;
    EXPECT_SENTENCE(search_with(1, q.data(), 1, &params), "quantizer_params");
    struct Foreign : faiss::SearchParameters {
    } foreign;
    EXPECT_SENTENCE(search_with(1, q.data(), 1, &foreign), "not for this index");
    index->nprobe = 0;
    EXPECT_SENTENCE(search_with(1, q.data(), 1), "nprobe = 0");
    index->nprobe = size_t(-5);
    EXPECT_SENTENCE(search_with(1, q.data(), 1), "nprobe = -5");
    index->nprobe = 3;
    const Partition good = index->partition;
    index->partition =
            kmeans_partition(n, d, x.data(), 2 * ncell, NEEDS_POST_ROPE);
    EXPECT_SENTENCE(search_with(1, q.data(), 1), "partition has 40 cells");
    index->partition = Partition();
    EXPECT_SENTENCE(search_with(1, q.data(), 1), "no key assigner");
    index->partition = good;
    std::vector<float> huge(d, 1.5e19f);
    EXPECT_SENTENCE(search_with(1, huge.data(), 1), "norm of vector 0");
    EXPECT_SENTENCE(index->add(1, huge.data()), "norm of vector 0");
    const std::vector<idx_t> cells = {0, ncell};
    EXPECT_SENTENCE(
            index->search_preassigned(
                    1, q.data(), 1, 2, cells.data(), distances.data(),
                    labels.data()),
            "cells[1] = 20");
    EXPECT_SENTENCE(
            index->assign_queries(1, q.data(), ncell + 1, labels.data()),
            "nprobe = 21");
    faiss::RangeSearchResult wrong_size(2);
    EXPECT_SENTENCE(
            index->range_search(3, x.data(), 1, &wrong_size), "result->nq = 2");
    EXPECT_SENTENCE(index->reconstruct(1, distances.data()), "set_direct_map");
    EXPECT_SENTENCE(index->train(n, x.data()), "reset()");
    EXPECT_SENTENCE(index->merge_from(*index), "itself");
    std::vector<float> block(d);
    EXPECT_SENTENCE(index->reconstruct_n(INT64_MIN, 2, block.data()), "i0 = -9");
    EXPECT_SENTENCE(index->reconstruct_n(INT64_MAX, 2, block.data()), "i0 = 9");
    EXPECT_SENTENCE(index->reconstruct_n(0, INT64_MAX / 2, block.data()), "ni = ");
    EXPECT_SENTENCE(index->reconstruct_n(0, -1, block.data()), "ni = -1");
    faiss::IndexFlatL2 flat(d);
    EXPECT_SENTENCE(index->merge_from(flat), "not an IndexAsymmetricIVF");
    auto foreign_cells = index_factory(d, GetParam().description, GetParam().metric);
    foreign_cells->train(n - 1, x.data() + d);
    // A trained codec may or may not come out the same on other vectors.
    const bool trains = GetParam().description.find("PQ") != std::string::npos ||
            GetParam().description.find("SQ8") != std::string::npos;
    EXPECT_SENTENCE(
            index->merge_from(*foreign_cells),
            trains ? "failed: other " : "other has other cells");

    index->set_direct_map(true);
    EXPECT_SENTENCE(index->merge_from(*index), "itself");
    const std::vector<idx_t> there = {5000, 17}, twice = {5000, 5000};
    EXPECT_SENTENCE(
            index->add_with_ids(2, x.data(), there.data()), "id 17 is in");
    EXPECT_SENTENCE(
            index->add_with_ids(2, x.data(), twice.data()), "id 5000 is in");
    index->set_direct_map(false);
    // Side by side, as in Faiss, and then no map can be made.
    index->add_with_ids(2, x.data(), twice.data());
    EXPECT_SENTENCE(index->set_direct_map(true), "id 5000 occurs twice");
    faiss::IDSelectorRange both(5000, 5001);
    EXPECT_EQ(index->remove_ids(both), 2u);

    EXPECT_EQ(index->ntotal, n);
    EXPECT_EQ(search(*index), before);
}

TEST_P(AsymmetricIVF, Untrained) {
    auto index = index_factory(d, GetParam().description, GetParam().metric);
    EXPECT_FALSE(index->is_trained);
    EXPECT_SENTENCE(index->add(1, x.data()), "not trained");
    EXPECT_SENTENCE(search(*index), "not trained");
    EXPECT_SENTENCE(index->train(ncell - 1, x.data()), "n = 19");
    EXPECT_SENTENCE(index->train(-1, x.data()), "n = -1");
    auto bad = x;
    bad[7] = NAN;
    EXPECT_SENTENCE(index->train(n, bad.data()), "x[7]");
    EXPECT_FALSE(index->is_trained);
    index->train(n, x.data());
    index->train(n / 2, x.data()); // again, as nothing was added
    EXPECT_TRUE(index->is_trained);
}

TEST_P(AsymmetricIVF, ConcurrentSearchesAgree) {
    auto index = filled();
    index->nprobe = 5;
    const Found expected = search(*index);
    std::vector<Found> found(4);
    std::vector<std::thread> threads;
    for (Found& f : found) {
        threads.emplace_back([&] { f = search(*index); });
    }
    for (auto& t : threads) {
        t.join();
    }
    for (const Found& f : found) {
        EXPECT_EQ(f, expected);
    }
}

INSTANTIATE_TEST_SUITE_P(
        Storages,
        AsymmetricIVF,
        ::testing::Values(
                Inputs{"AIVF20,Flat", faiss::METRIC_L2},
                Inputs{"AIVF20,Flat", faiss::METRIC_INNER_PRODUCT},
                Inputs{"SphAIVF20,Flat", faiss::METRIC_INNER_PRODUCT},
                Inputs{"SymAIVF20,SQfp16", faiss::METRIC_L2},
                Inputs{"AIVF20,SQ8", faiss::METRIC_INNER_PRODUCT},
                Inputs{"AIVF20,PQ8x4", faiss::METRIC_L2},
                Inputs{"AIVF20,PQ4x6", faiss::METRIC_INNER_PRODUCT}));

TEST(AsymmetricIVFCells, GivenCellsAreKept) {
    tests::Random random;
    const auto x = random.normal(n * d);
    const Partition p = kmeans_partition(n, d, x.data(), ncell, NEEDS_PRE_ROPE);
    faiss::IndexFlatL2 quantizer(d);
    IndexAsymmetricIVF flat(
            std::make_unique<faiss::IndexIVFFlat>(&quantizer, d, ncell), p);
    EXPECT_TRUE(flat.is_trained); // nothing left to learn
    flat.add(n, x.data());
    EXPECT_EQ(flat.ntotal, n);

    auto pq = std::make_unique<faiss::IndexIVFPQ>(&quantizer, d, ncell, 8, 4);
    pq->by_residual = false;
    IndexAsymmetricIVF compressed(std::move(pq), p);
    EXPECT_FALSE(compressed.is_trained);
    EXPECT_SENTENCE(compressed.add(n, x.data()), "not trained");
    EXPECT_SENTENCE(compressed.train(15, x.data()), "codec needs 16");
    compressed.train(n, x.data());
    EXPECT_EQ(compressed.partition.key, p.key);
    compressed.add(n, x.data());
}

TEST(AsymmetricIVFCells, AnExistingIndexGetsAnotherQueryAssigner) {
    tests::Random random;
    const auto x = random.normal(n * d);
    auto quantizer = std::make_shared<faiss::IndexFlatL2>(d);
    auto ivf = std::make_unique<faiss::IndexIVFFlat>(quantizer.get(), d, ncell);
    ivf->train(n, x.data());
    ivf->add(n, x.data());
    Partition p;
    p.key = std::make_shared<QuantizerAssigner>(quantizer, NEEDS_POST_ROPE);
    auto by_product = std::make_shared<faiss::IndexFlatIP>(d);
    by_product->add(ncell, quantizer->get_xb());
    p.query = std::make_shared<QuantizerAssigner>(by_product, NEEDS_POST_ROPE);
    IndexAsymmetricIVF index(std::move(ivf), p);
    EXPECT_EQ(index.ntotal, n);
    index.nprobe = ncell;
    idx_t label;
    float distance;
    index.search(1, x.data() + 33 * d, 1, &distance, &label);
    EXPECT_EQ(label, 33);

    auto hashed = std::make_unique<faiss::IndexIVFFlat>(quantizer.get(), d, ncell);
    hashed->is_trained = true;
    const idx_t negative = -12;
    hashed->add_with_ids(1, x.data(), &negative); // which Faiss allows
    EXPECT_SENTENCE(IndexAsymmetricIVF(std::move(hashed), p), "id -12");
}

TEST(AsymmetricIVFCells, ForeignListsBecomeOurs) {
    tests::Random random;
    const auto x = random.normal(n * d);
    const Partition p = kmeans_partition(n, d, x.data(), ncell, NEEDS_POST_ROPE);
    std::unique_ptr<IndexAsymmetricIVF> index;
    {
        faiss::IndexFlatL2 gone(d); // the index outlives it
        auto lists = std::make_unique<faiss::IndexIVFFlat>(&gone, d, ncell);
        lists->make_direct_map(); // of sequential ids
        index = std::make_unique<IndexAsymmetricIVF>(std::move(lists), p);
    }
    index->add(n, x.data());
    const std::vector<idx_t> ids = {9000000, 17000000};
    index->add_with_ids(2, x.data(), ids.data());
    std::vector<float> back(d);
    index->reconstruct(17000000, back.data());
    EXPECT_EQ(back[3], x[d + 3]);
    faiss::IDSelectorRange range(5, 10);
    EXPECT_EQ(index->remove_ids(range), 5u);
    EXPECT_EQ(read_index_from_memory(
                      write_index_to_memory(*index).data(),
                      write_index_to_memory(*index).size())
                      ->ntotal,
              n - 3);
}

TEST(AsymmetricIVFCells, RefusesWhatDoesNotFit) {
    tests::Random random;
    const auto x = random.normal(n * d);
    const Partition p = kmeans_partition(n, d, x.data(), ncell, NEEDS_POST_ROPE);
    faiss::IndexFlatL2 quantizer(d), wide(d + 1);
    const auto flat = [&](faiss::Index* q, int cells) {
        return std::make_unique<faiss::IndexIVFFlat>(q, q->d, cells);
    };
    EXPECT_SENTENCE(IndexAsymmetricIVF(nullptr), "lists is null");
    EXPECT_SENTENCE(IndexAsymmetricIVF(nullptr, p), "lists is null");
    EXPECT_SENTENCE(IndexAsymmetricIVF(flat(&wide, ncell), p), "d = 16");
    EXPECT_SENTENCE(IndexAsymmetricIVF(flat(&quantizer, 21), p), "nlist = 21");
    EXPECT_SENTENCE(
            IndexAsymmetricIVF(
                    std::make_unique<faiss::IndexIVFPQ>(
                            &quantizer, d, ncell, 4, 4),
                    p),
            "by_residual is true");
    EXPECT_SENTENCE(
            IndexAsymmetricIVF(std::make_unique<faiss::IndexIVFFlatDedup>(
                    &quantizer, d, ncell)),
            "storage must be");
    EXPECT_SENTENCE(
            IndexAsymmetricIVF(std::make_unique<faiss::IndexIVFFlat>(
                    &quantizer, d, ncell, faiss::METRIC_L1)),
            "metric_type = 2");
    Partition with_stats = p;
    with_stats.query = std::make_shared<CellMeanAssigner>(d, ncell);
    EXPECT_SENTENCE(
            IndexAsymmetricIVF(flat(&quantizer, ncell), with_stats),
            "statistics");
    Partition mixed = p;
    mixed.query = kmeans_partition(n, d, x.data(), ncell, NEEDS_PRE_ROPE).query;
    EXPECT_SENTENCE(
            IndexAsymmetricIVF(flat(&quantizer, ncell), mixed), "one kind");
}

TEST(TrainWithQueries, ChoosesWhatTheQueriesPrefer) {
    // Keys on two shells, queries point at the far one: by L2 the near shell's
    // cells look closer, by inner product the far ones hold the neighbours.
    tests::Random random;
    std::vector<float> x = random.normal(n * d), q = random.normal(nq * d);
    for (int i = 0; i < n; i++) {
        const float radius = i % 2 ? 10.0f : 1.0f;
        float norm = 0;
        for (int j = 0; j < d; j++) {
            norm += x[i * d + j] * x[i * d + j];
        }
        for (int j = 0; j < d; j++) {
            x[i * d + j] *= radius / std::sqrt(norm);
        }
    }
    auto index = index_factory(d, "AIVF40,Flat", faiss::METRIC_INNER_PRODUCT);
    index->train_with_queries(n, x.data(), nq, q.data());
    EXPECT_NE(index->partition.key, index->partition.query);

    // Unit vectors, half of them in tight clusters, which have the longer means; queries
    // are of the other half: by inner product they look into tight clusters.
    const std::vector<float> directions = random.normal(10 * d);
    for (int i = 0; i < n; i++) {
        float norm = 0;
        for (int j = 0; j < d; j++) {
            float& y = x[i * d + j];
            y = i % 2 ? y : directions[i / 2 % 10 * d + j] + .001f * y;
            norm += y * y;
        }
        for (int j = 0; j < d; j++) {
            x[i * d + j] /= std::sqrt(norm);
        }
    }
    q.clear();
    for (int i = 1; i < 2 * nq; i += 2) {
        q.insert(q.end(), x.begin() + i * d, x.begin() + (i + 1) * d);
    }
    index->train_with_queries(n, x.data(), nq, q.data());
    EXPECT_EQ(index->partition.key, index->partition.query);

    EXPECT_SENTENCE(
            index->train_with_queries(n, x.data(), 0, q.data()), "n_train_q = 0");
    EXPECT_SENTENCE(
            index->train_with_queries(n, x.data(), 1, nullptr), "xq_train is null");
    q[3] = NAN;
    EXPECT_SENTENCE(
            index->train_with_queries(n, x.data(), nq, q.data()), "xq_train[3]");
}

TEST(AsymmetricIVFCells, QueriesLookForWhatTheMetricIsFor) {
    // Clusters far from the origin: the one with the largest inner product is
    // seldom the nearest.
    tests::Random random;
    std::vector<float> x = random.normal(n * d);
    const std::vector<float> centres = random.normal(ncell * d);
    for (int i = 0; i < n; i++) {
        for (int j = 0; j < d; j++) {
            x[i * d + j] = 30 + 3 * centres[i % ncell * d + j] + .1f * x[i * d + j];
        }
    }
    auto index = index_factory(d, "AIVF20,Flat", faiss::METRIC_L2);
    index->train(n, x.data());
    index->add(n, x.data());
    std::vector<float> distances(n);
    std::vector<idx_t> labels(n);
    index->search(n, x.data(), 1, distances.data(), labels.data());
    int found = 0;
    for (int i = 0; i < n; i++) {
        found += labels[i] == i;
    }
    EXPECT_GT(found, .95 * n);
}

TEST(AsymmetricIVFCells, PublicFieldsAndSelectorsThatDoNotFit) {
    tests::Random random;
    const auto x = random.normal(n * d);
    const auto make = [&](const char* description) {
        auto index = index_factory(d, description);
        index->train(n, x.data());
        index->add(n, x.data());
        return index;
    };
    auto index = make("AIVF20,Flat"), other = make("AIVF5,Flat");
    std::vector<float> distances(k);
    std::vector<idx_t> labels(k);
    const auto search = [&] {
        index->search(1, x.data(), k, distances.data(), labels.data());
    };
    index->lists.swap(other->lists);
    EXPECT_SENTENCE(search(), "nlist = 5");
    EXPECT_SENTENCE(index->add(1, x.data()), "nlist = 5");
    EXPECT_SENTENCE(index->reset(), "nlist = 5");
    index->lists.swap(other->lists);
    search();

    struct Throws : faiss::IDSelector {
        bool is_member(idx_t) const override {
            throw std::runtime_error("asked");
        }
    };
    for (bool mapped : {false, true}) {
        index->set_direct_map(mapped);
        EXPECT_THROW(index->remove_ids(Throws()), std::runtime_error);
        EXPECT_EQ(index->ntotal, n);
    }

    faiss::RangeSearchResult result(1);
    index->range_search(1, x.data(), 1, &result);
    EXPECT_SENTENCE(index->range_search(1, x.data(), 1, &result), "another search");

    index->nprobe = ncell;
    search();
    const std::vector<idx_t> all = labels;
    for (size_t none : {size_t(0), SIZE_MAX, static_cast<size_t>(-5)}) {
        index->max_codes = none;
        search();
        EXPECT_EQ(labels, all);
    }

    auto halves = make("AIVF20,SQfp16");
    std::vector<float> large(d, 1);
    large[2] = -65505;
    EXPECT_SENTENCE(halves->add(1, large.data()), "x[2] = -65505 is beyond");
    large[2] = -65504;
    halves->add(1, large.data());
    EXPECT_EQ(halves->ntotal, n + 1);

    IndexAsymmetricIVF now = std::move(*index);
    EXPECT_SENTENCE(index->reset(), "lists is null");
    EXPECT_SENTENCE(index->train(n, x.data()), "lists is null");
    EXPECT_SENTENCE(index->set_direct_map(false), "lists is null");
    EXPECT_SENTENCE(index->reconstruct_n(0, 1, large.data()), "lists is null");
    EXPECT_SENTENCE(search(), "lists is null");
    EXPECT_EQ(now.ntotal, n);
}

TEST(IndexFactory, RefusesWhatItDoesNotUnderstand) {
    for (const char* wrong :
         {"", "AIVF", "AIVF20", "AIVF20,", "IVF20,Flat", "AIVF0,Flat",
          "AIVF65537,Flat", "AIVF99999999999999,Flat", "AIVF20,PQ", "AIVF20,PQ5",
          "AIVF20,PQ4x0", "AIVF20,PQ4x9", "AIVF20,PQ4x17", "AIVF20,PQ0",
          "AIVF20,Flat,", "AIVF20,SQ4", "xAIVF20,Flat", "AIVF-1,Flat",
          "AIVF20,PQ99999999999999"}) {
        EXPECT_SENTENCE(index_factory(d, wrong), "description");
    }
    EXPECT_SENTENCE(index_factory(d, std::string(100000, '9')), "description");
    EXPECT_SENTENCE(index_factory(0, "AIVF20,Flat"), "d = 0");
    EXPECT_SENTENCE(
            index_factory(d, "AIVF20,Flat", faiss::METRIC_L1), "metric = 2");
}

TEST(AsymmetricParameterSpace, SetsParametersByName) {
    auto index = index_factory(d, "AIVF20,Flat");
    const AsymmetricParameterSpace space;
    space.set_index_parameters(index.get(), "nprobe=7,max_codes=4096");
    EXPECT_EQ(index->nprobe, 7u);
    EXPECT_EQ(index->max_codes, 4096u);
    EXPECT_SENTENCE(
            space.set_index_parameters(index.get(), "nprobe=0"), "nprobe = 0");
    EXPECT_SENTENCE(
            space.set_index_parameters(index.get(), "nprobe=1.5"), "nprobe = 1.5");
    EXPECT_SENTENCE(
            space.set_index_parameters(index.get(), "speed=9"), "'speed'");
    EXPECT_EQ(index->nprobe, 7u);
    AsymmetricParameterSpace ranges;
    ranges.initialize(index.get());
    ASSERT_EQ(ranges.parameter_ranges.size(), 1u);
    EXPECT_EQ(ranges.parameter_ranges[0].values.back(), 20);
    EXPECT_EQ(ranges.n_combinations(), 6u);
    faiss::IndexPreTransform turned(index.get());
    AsymmetricParameterSpace of_turned;
    of_turned.initialize(&turned);
    EXPECT_EQ(of_turned.n_combinations(), 6u);
    faiss::IndexRefineFlat refined(index.get());
    AsymmetricParameterSpace of_refined; // k_factor_rf, too
    of_refined.initialize(&refined);
    EXPECT_EQ(of_refined.parameter_ranges.size(), 2u);
    space.set_index_parameters(&turned, "nprobe=5");
    EXPECT_EQ(index->nprobe, 5u);
    space.set_index_parameters(&turned, "nprobe=7");
    // Stock indexes still work through it.
    faiss::IndexFlatL2 quantizer(d);
    faiss::IndexIVFFlat plain(&quantizer, d, ncell);
    space.set_index_parameters(&plain, "nprobe=3");
    EXPECT_EQ(plain.nprobe, 3u);
}

} // namespace
} // namespace faiss_saap
