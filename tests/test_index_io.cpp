#include <faiss_saap/QuantizerAssigner.h>
#include <faiss_saap/index_io.h>

#include <cstring>
#include <filesystem>
#include <fstream>

#include <faiss/IndexFlat.h>
#include <faiss/IndexIVFFlat.h>
#include <faiss/IndexIVFPQ.h>
#include <faiss/clone_index.h>
#include <faiss/index_io.h>

#include <faiss_saap/index_factory.h>

#include "common.h"

namespace faiss_saap {
namespace {

constexpr int d = 8, n = 300;

std::unique_ptr<IndexAsymmetricIVF> make_index(
        const std::string& description,
        const std::vector<float>& x) {
    auto index = index_factory(d, description, faiss::METRIC_INNER_PRODUCT);
    index->train(n, x.data());
    index->add(n, x.data());
    index->nprobe = 3;
    index->max_codes = 1000;
    return index;
}

std::vector<idx_t> search(const faiss::Index& index, const std::vector<float>& q) {
    const idx_t nq = idx_t(q.size()) / d;
    std::vector<float> distances(nq * 5);
    std::vector<idx_t> labels(nq * 5);
    index.search(nq, q.data(), 5, distances.data(), labels.data());
    return labels;
}

class IndexIO : public ::testing::TestWithParam<std::string> {};

TEST_P(IndexIO, RoundTripsThroughFileAndMemory) {
    tests::Random random;
    const auto x = random.normal(n * d), q = random.normal(20 * d);
    auto index = make_index(GetParam(), x);
    index->set_direct_map(true);
    const tests::TemporaryFile file;
    write_index(*index, file.path);
    faiss::FileIOReader stream(file.path.c_str());
    EXPECT_EQ(read_index(stream)->ntotal, n);
    const auto bytes = write_index_to_memory(*index);
    auto from_file = read_index(file.path);
    auto from_memory = read_index_from_memory(bytes.data(), bytes.size());
    for (const auto* copy : {from_file.get(), from_memory.get()}) {
        EXPECT_EQ(copy->ntotal, n);
        EXPECT_EQ(copy->nprobe, 3u);
        EXPECT_EQ(copy->max_codes, 1000u);
        EXPECT_EQ(copy->metric_type, faiss::METRIC_INNER_PRODUCT);
        EXPECT_EQ(search(*copy, q), search(*index, q));
        std::vector<float> a(d), b(d);
        index->reconstruct(77, a.data());
        copy->reconstruct(77, b.data()); // the direct map came along
        EXPECT_EQ(a, b);
    }
    // What was read keeps working: more insertion, and merging with the
    // original, whose cells are equal but not the same objects.
    from_file->set_direct_map(false);
    index->set_direct_map(false); // stock Faiss writes its map in any order
    EXPECT_EQ(
            write_index_to_memory(*from_file), write_index_to_memory(*index));
    from_file->add(n, x.data());
    from_file->merge_from(*from_memory, 10000);
    EXPECT_EQ(from_file->ntotal, 3 * n);
    // A symmetric partition stays one.
    EXPECT_EQ(
            from_file->partition.key == from_file->partition.query,
            GetParam().substr(0, 3) == "Sym");
}

TEST_P(IndexIO, DamageIsNoticed) {
    tests::Random random;
    const auto x = random.normal(n * d);
    const auto bytes = write_index_to_memory(*make_index(GetParam(), x));
    const auto read = [](const std::vector<uint8_t>& b) {
        read_index_from_memory(b.data(), b.size());
    };
    for (size_t size = 0; size < bytes.size(); size += 1 + bytes.size() / 97) {
        // A copy of exactly this size, so that reading beyond it is noticed.
        const std::vector<uint8_t> part(bytes.begin(), bytes.begin() + size);
        if (size > 0) {
            EXPECT_SENTENCE(read(part), "index in memory");
        }
    }
    auto longer = bytes;
    longer.insert(longer.end(), 1000, 0);
    EXPECT_SENTENCE(read(longer), "corrupt");
    for (int round = 0; round < 200; round++) {
        auto flipped = bytes;
        flipped[random.below(flipped.size())] ^= 1 << random.below(8);
        EXPECT_SENTENCE(read(flipped), "index in memory");
    }
}

TEST_P(IndexIO, ForgedLengthsAllocateNothing) {
    // Damage with a checksum that fits again: what a hostile file would be.
    tests::Random random;
    const auto x = random.normal(n * d);
    const auto bytes = write_index_to_memory(*make_index(GetParam(), x));
    int refused = 0;
    for (int round = 0; round < 3000; round++) {
        auto forged = bytes;
        const size_t size = forged.size() - 24;
        if (round % 2) { // a huge length somewhere
            const uint64_t huge = uint64_t(1) << (20 + random.below(40));
            std::memcpy(
                    forged.data() + 8 + random.below(size - 8), &huge, 8);
        } else { // most structure is at the front
            forged[8 + random.below(std::min<size_t>(size, 200))] ^=
                    1 << random.below(8);
        }
        tests::seal(forged);
        try {
            auto index =
                    read_index_from_memory(forged.data(), forged.size());
            search(*index, x);
        } catch (const faiss::FaissException&) {
            refused++;
        }
    }
    EXPECT_GT(refused, 100);
}

INSTANTIATE_TEST_SUITE_P(
        Storages,
        IndexIO,
        ::testing::Values(
                "AIVF12,Flat",
                "SymAIVF12,Flat",
                "SphAIVF12,SQfp16",
                "AIVF12,SQ8",
                "AIVF12,PQ4x4"));

TEST(IndexIOErrors, FilesThatAreNoIndex) {
    const tests::TemporaryFile file;
    EXPECT_SENTENCE(read_index(file.path), "No such file");
    EXPECT_SENTENCE(read_index("/"), "not a regular file");
    std::ofstream(file.path) << "";
    EXPECT_SENTENCE(read_index(file.path), "0 bytes are too few");
    faiss::IndexFlatL2 flat(d);
    faiss::write_index(&flat, file.path.c_str());
    EXPECT_SENTENCE(read_index(file.path), "faiss::read_index");
    EXPECT_SENTENCE(read_index_from_memory(nullptr, 100), "data is null");

    tests::Random random;
    const auto x = random.normal(n * d);
    auto bytes = write_index_to_memory(*make_index("AIVF12,Flat", x));
    bytes[4] = 9;
    EXPECT_SENTENCE(
            read_index_from_memory(bytes.data(), bytes.size()), "version 9");
}

TEST(IndexIOErrors, NothingHalfWritten) {
    tests::Random random;
    const auto x = random.normal(n * d);
    const auto index = make_index("AIVF12,Flat", x);
    EXPECT_SENTENCE(
            write_index(*index, "/no/such/folder/index"), "cannot be created");
    const auto untrained = index_factory(d, "AIVF12,Flat");
    index->nprobe = 0;
    EXPECT_SENTENCE(write_index_to_memory(*index), "nprobe = 0");
    const tests::TemporaryFile file;
    EXPECT_SENTENCE(write_index(*untrained, file.path), "not trained");
    EXPECT_FALSE(std::ifstream(file.path).good());
}

/// Does something else than what is known of its base.
struct Derived : QuantizerAssigner {
    using QuantizerAssigner::QuantizerAssigner;
};

TEST(IndexIOErrors, APartitionThatDoesNotFitOrHasNoFileForm) {
    tests::Random random;
    const auto x = random.normal(n * d);
    const auto index = make_index("AIVF12,Flat", x);
    const auto other = make_index("AIVF12,Flat", x);
    const tests::TemporaryFile file;
    const Partition own = index->partition;
    const auto expect = [&](const char* sentence, bool by_merge_too) {
        EXPECT_SENTENCE(write_index(*index, file.path), sentence);
        EXPECT_SENTENCE(write_index_to_memory(*index), sentence);
        if (by_merge_too) {
            EXPECT_SENTENCE(other->merge_from(*index), sentence);
            EXPECT_SENTENCE(index->merge_from(*other), sentence);
        }
        EXPECT_FALSE(std::ifstream(file.path).good());
        index->partition = own;
    };
    index->partition.query = nullptr;
    expect("no query assigner", true);
    index->partition.key = nullptr;
    expect("no key assigner", true);
    index->partition = make_index("AIVF8,Flat", x)->partition;
    expect("partition has 8 cells, lists have nlist = 12", true);
    const auto& query = dynamic_cast<const QuantizerAssigner&>(*own.query);
    index->partition.query = std::make_shared<Derived>(
            query.quantizer, static_cast<RoutingNeeds>(query.needs));
    expect("no file form", false);
    const auto& key = dynamic_cast<const QuantizerAssigner&>(*own.key);
    index->partition.key = std::make_shared<Derived>(
            key.quantizer, static_cast<RoutingNeeds>(key.needs));
    EXPECT_SENTENCE(other->merge_from(*index), "other has other cells");
    index->partition = symmetric(own); // who sends queries to cells does not matter
    other->merge_from(*index);
    EXPECT_EQ(other->ntotal, 2 * n);
}

TEST(IndexIOErrors, WhatCouldNotBeReadIsNotWritten) {
    tests::Random random;
    const auto x = random.normal(n * d);
    const auto index = make_index("AIVF12,PQ4x4", x);
    auto& pq = dynamic_cast<faiss::IndexIVFPQ&>(*index->lists);
    pq.polysemous_ht = 12;
    EXPECT_SENTENCE(write_index_to_memory(*index), "polysemous_ht = 12");
    pq.polysemous_ht = 0;
    index->partition.rope.d = d;
    index->partition.rope.theta = .5;
    EXPECT_SENTENCE(write_index_to_memory(*index), "theta = 0.5");
    index->partition.rope = {};
    write_index_to_memory(*index);
    const auto other = make_index("AIVF8,PQ4x4", x);
    index->lists.swap(other->lists);
    EXPECT_SENTENCE(write_index_to_memory(*index), "nlist = 8");
    index->lists.swap(other->lists);
    for (const std::string& path : {std::string(), std::string("a\0b", 3)}) {
        EXPECT_SENTENCE(write_index(*other, path), "is empty or holds a NUL");
        EXPECT_SENTENCE(read_index(path), "is empty or holds a NUL");
    }
    index->lists.reset();
    EXPECT_SENTENCE(write_index_to_memory(*index), "lists is null");
}

TEST(IndexIOErrors, AFileKeepsItsPermissions) {
    tests::Random random;
    const auto index = make_index("AIVF12,Flat", random.normal(n * d));
    const tests::TemporaryFile file;
    namespace fs = std::filesystem;
    write_index(*index, file.path);
    fs::permissions(file.path, fs::perms::owner_read | fs::perms::owner_write);
    write_index(*index, file.path);
    EXPECT_EQ(
            fs::status(file.path).permissions(),
            fs::perms::owner_read | fs::perms::owner_write);
}

TEST(IndexIOErrors, StockFaissRefusesToLoseTheQueryAssigner) {
    tests::Random random;
    const auto x = random.normal(n * d);
    const auto index = make_index("AIVF12,Flat", x);
    const tests::TemporaryFile file;
    EXPECT_THROW(
            faiss::write_index(index.get(), file.path.c_str()),
            faiss::FaissException);
    EXPECT_THROW(faiss::clone_index(index.get()), faiss::FaissException);
}

} // namespace
} // namespace faiss_saap
