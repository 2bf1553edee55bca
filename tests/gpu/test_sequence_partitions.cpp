#include <faiss_saap/gpu/sequence_partitions.h>

#include <faiss/IndexFlat.h>
#include <faiss_saap/QuantizerAssigner.h>

#include "device_adapter.h"

namespace faiss_saap::tests {
namespace {

class GpuSequencePartitions : public DeviceTest {};

/// Mean squared distance of keys to the centroids of their cells.
double error_of(const CellAssigner& key, const std::vector<float>& x) {
    const auto n = static_cast<int64_t>(x.size()) / key.d;
    std::vector<int32_t> cells(n);
    RoutingInput in;
    in.n = n;
    in.d = key.d;
    in.post_rope = x.data();
    key.assign(in, nullptr, 1, cells.data(), nullptr);
    const auto& flat = dynamic_cast<const faiss::IndexFlat&>(
            *dynamic_cast<const QuantizerAssigner&>(key).quantizer);
    double sum = 0;
    for (int64_t i = 0; i < n; i++) {
        for (int j = 0; j < key.d; j++) {
            const double diff = double(x[i * key.d + j]) -
                    flat.get_xb()[int64_t(cells[i]) * key.d + j];
            sum += diff * diff / static_cast<double>(n);
        }
    }
    return sum;
}

/// Cells of a sequence's own keys are as good as the CPU's, and an adapter that
/// has no others attends with them as the CPU's does.
TEST_F(GpuSequencePartitions, AreAsGoodAsTheCpus) {
    for (CacheLayout layout : {CacheLayout::paged, CacheLayout::strided}) {
        AdapterCase c;
        c.name = "";
        c.layout = layout;
        c.lengths = {1500};
        Pair p(c);
        const KvView on_host = p.host.view(p.n), view = p.cache.view(p.n);
        constexpr int64_t kBegin = 5, kEnd = 1460;
        const HeadPartitions learnt =
                gpu::sequence_partitions(view, kBegin, kEnd, c.ncell);
        const HeadPartitions again =
                gpu::sequence_partitions(view, kBegin, kEnd, c.ncell);
        const HeadPartitions cpu =
                sequence_partitions(on_host, kBegin, kEnd, c.ncell);
        ASSERT_EQ(learnt.size(), cpu.size());
        for (int h = 0; h < c.heads_kv; h++) {
            std::vector<float> x((kEnd - kBegin) * c.d);
            for (int64_t i = kBegin; i < kEnd; i++) {
                to_float(
                        c.dtype,
                        on_host.key(h, i),
                        c.d,
                        x.data() + (i - kBegin) * c.d);
            }
            ASSERT_EQ(learnt[h].size(), 1u);
            const double error = error_of(*learnt[h][0].key, x);
            EXPECT_LT(error, 1.1 * error_of(*cpu[h][0].key, x)) << "head " << h;
            EXPECT_EQ(error, error_of(*again[h][0].key, x));
        }

        GpuAttentionAdapter device(p.world.params);
        AttentionAdapter host(p.world.params);
        SequenceInput in = p.input(p.n, p.n);
        in.sequence = device.create(learnt, p.n);
        device.append(*device.plan({in}));
        const int64_t on_cpu = host.create(learnt);
        host.append(on_cpu, on_host);
        for (int h = 0; h < c.heads_kv; h++) {
            const auto slots = device.lists(in.sequence, h).slots;
            int elsewhere = 0;
            for (int cell = 0; cell < c.ncell; cell++) {
                for (int32_t slot : slots[cell]) {
                    elsewhere += host.lists(on_cpu, h).cell_of(slot) != cell;
                }
            }
            EXPECT_LE(elsewhere, 2);
        }
    }
}

TEST_F(GpuSequencePartitions, RefuseWithASentence) {
    AdapterCase c;
    c.name = "";
    c.layout = CacheLayout::paged;
    c.lengths = {200};
    Pair p(c);
    KvView view = p.cache.view(200);
    const auto learn = [&](int64_t begin, int64_t end, int ncell) {
        gpu::sequence_partitions(view, begin, end, ncell);
    };
    EXPECT_SENTENCE(learn(0, 201, 4), "slots 0 .. 201");
    EXPECT_SENTENCE(learn(-1, 100, 4), "slots -1 .. 100");
    EXPECT_SENTENCE(learn(0, 10, 11), "ncell = 11");
    EXPECT_SENTENCE(learn(0, 10, 0), "ncell = 0");
    view.dtype = DType::float32;
    EXPECT_SENTENCE(learn(0, 10, 2), "kv.dtype = float32");
    view.dtype = c.dtype;
    const int32_t hole = -1;
    ASSERT_EQ(
            cudaMemcpy(p.cache.pages.data() + 1, &hole, 4, cudaMemcpyHostToDevice),
            cudaSuccess);
    EXPECT_SENTENCE(learn(0, 100, 4), "kv.page_table[1] = -1");
    learn(0, 16, 4); // ends before it
    const std::vector<char> nan = as_type(c.dtype, std::vector<float>(c.d, NAN));
    const auto offset = static_cast<size_t>(
            static_cast<const char*>(p.host.view(200).key(1, 3)) - p.host.k.data());
    ASSERT_EQ(
            cudaMemcpy(
                    p.cache.k.data() + offset, nan.data(), 4, cudaMemcpyHostToDevice),
            cudaSuccess);
    EXPECT_SENTENCE(learn(0, 16, 4), "values must be finite");
}

} // namespace
} // namespace faiss_saap::tests
