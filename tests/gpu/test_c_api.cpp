// The C interface; double precision is the oracle.
#include <faiss_saap/c_api.h>

#include <faiss_saap/dtype.h>

#include "device_test.h"

namespace faiss_saap::tests {
namespace {

void expect_failed(bool failed, const char* part) {
    EXPECT_TRUE(failed) << part;
    EXPECT_NE(std::string(saap_last_error()).find(part), std::string::npos)
            << "the sentence is: " << saap_last_error();
}

TEST(CApiErrors, SentencesWithoutADevice) {
    SaapAdapterParams params = {};
    const float centroid = 0;
    expect_failed(!saap_adapter_new(nullptr, &centroid), "params is null");
    expect_failed(!saap_adapter_new(&params, nullptr), "centroids is null");
    expect_failed(!saap_adapter_new(&params, &centroid), "ncell = 0");
    EXPECT_EQ(std::string(saap_last_error()).find("failed"), std::string::npos);
    params.ncell = 1 << 26, params.d = params.heads_kv = 1;
    expect_failed(!saap_adapter_new(&params, &centroid), "ncell = 67108864");
    const SaapSequenceInput input = {};
    expect_failed(saap_create(nullptr, 1, nullptr) == -1, "adapter is null");
    expect_failed(saap_fork(nullptr, 0, nullptr) == -1, "adapter is null");
    expect_failed(saap_free(nullptr, 0, nullptr), "adapter is null");
    expect_failed(saap_reset(nullptr, 0, nullptr), "adapter is null");
    expect_failed(saap_reserve(nullptr, 0, 1, nullptr), "adapter is null");
    expect_failed(saap_truncate(nullptr, 0, &input, nullptr), "adapter or input");
    expect_failed(saap_length(nullptr, 0, nullptr) == -1, "adapter is null");
    expect_failed(!saap_plan(nullptr, 0, nullptr, nullptr), "adapter is null");
    expect_failed(saap_append(nullptr, nullptr, nullptr), "adapter or batch");
    expect_failed(
            saap_attend(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr),
            "adapter or batch");
    expect_failed(saap_check(nullptr), "adapter is null");
    saap_adapter_free(nullptr);
    saap_batch_free(nullptr);
}

class CApi : public DeviceTest {};

TEST_F(CApi, AttendsDenselyWithAllCells) {
    Random random;
    constexpr int kHeadsQ = 4, kHeadsKv = 2, kD = 64, kCells = 8;
    constexpr int64_t kTokens = 500;
    SaapAdapterParams params = {};
    params.heads_q = kHeadsQ, params.heads_kv = kHeadsKv, params.d = kD;
    params.ncell = params.nprobe = kCells;
    params.share_group = 1;
    params.sink = 4, params.window = 32;
    params.max_selectivity = 1;
    params.rope_theta = 10000;
    const std::vector<float> centroids = random.normal(kHeadsKv * kCells * kD);
    SaapAdapter* adapter = saap_adapter_new(&params, centroids.data());
    ASSERT_TRUE(adapter) << saap_last_error();

    const auto half = [](std::vector<float>& x) {
        std::vector<uint16_t> bits(x.size());
        const auto n = static_cast<int64_t>(x.size());
        from_float(DType::float16, x.data(), n, bits.data());
        to_float(DType::float16, bits.data(), n, x.data());
        return bits;
    };
    std::vector<float> k = random.normal(kTokens * kHeadsKv * kD),
                       v = random.normal(k.size()),
                       q = random.normal(kHeadsQ * kD);
    const OnDevice<uint16_t> keys(half(k)), values(half(v)), queries(half(q));
    SaapSequenceInput in = {};
    in.k = keys.data(), in.v = values.data();
    in.length = kTokens;
    in.k_token_stride = in.v_token_stride = kHeadsKv * kD;
    in.k_head_stride = in.v_head_stride = kD;
    in.q_len = kTokens;
    in.sequence = saap_create(adapter, 64, nullptr);
    ASSERT_GE(in.sequence, 0) << saap_last_error();
    EXPECT_EQ(saap_reserve(adapter, in.sequence, kTokens, nullptr), 0);
    SaapBatch* prefill = saap_plan(adapter, 1, &in, nullptr);
    ASSERT_TRUE(prefill) << saap_last_error();
    EXPECT_EQ(saap_append(adapter, prefill, nullptr), 0) << saap_last_error();
    saap_batch_free(prefill);

    const auto expect_dense = [&](int64_t sequence, int64_t length) {
        ASSERT_EQ(saap_length(adapter, sequence, nullptr), length);
        SaapSequenceInput asks = in;
        asks.sequence = sequence;
        asks.q_len = 1;
        SaapBatch* batch = saap_plan(adapter, 1, &asks, nullptr);
        ASSERT_TRUE(batch) << saap_last_error();
        const OnDevice<float> output(kHeadsQ * kD), lse(kHeadsQ);
        ASSERT_EQ(
                saap_attend(
                        adapter, batch, queries.data(), output.data(), lse.data(), nullptr),
                0)
                << saap_last_error();
        const auto got = output.host(), got_lse = lse.host();
        EXPECT_EQ(saap_check(adapter), 0) << saap_last_error();
        saap_batch_free(batch);
        for (int h = 0; h < kHeadsQ; h++) {
            const int at = h / (kHeadsQ / kHeadsKv) * kD;
            double sum = 0;
            std::vector<double> o(kD);
            for (int64_t i = 0; i < length; i++) {
                double dot = 0;
                for (int j = 0; j < kD; j++) {
                    dot += double(q[h * kD + j]) * k[i * kHeadsKv * kD + at + j];
                }
                const double w = std::exp(dot / 8);
                sum += w;
                for (int j = 0; j < kD; j++) {
                    o[j] += w * v[i * kHeadsKv * kD + at + j];
                }
            }
            EXPECT_NEAR(got_lse[h], std::log(sum), 1e-3);
            double difference = 0, norm = 0;
            for (int j = 0; j < kD; j++) {
                const double e = got[h * kD + j] - o[j] / sum;
                difference += e * e;
                norm += o[j] / sum * (o[j] / sum);
            }
            EXPECT_LE(std::sqrt(difference / norm), 2e-3) << "head " << h;
        }
    };
    expect_dense(in.sequence, kTokens);
    const int64_t fork = saap_fork(adapter, in.sequence, nullptr);
    ASSERT_GE(fork, 0) << saap_last_error();
    EXPECT_EQ(saap_truncate(adapter, 300, &in, nullptr), 0) << saap_last_error();
    expect_dense(in.sequence, 300);
    expect_dense(fork, kTokens);
    expect_failed(saap_truncate(adapter, 301, &in, nullptr), "length = 301");
    EXPECT_EQ(saap_reset(adapter, in.sequence, nullptr), 0);
    EXPECT_EQ(saap_length(adapter, in.sequence, nullptr), 0);
    EXPECT_EQ(saap_free(adapter, in.sequence, nullptr), 0);
    expect_failed(saap_free(adapter, in.sequence, nullptr), "was freed");
    saap_adapter_free(adapter);
}

} // namespace
} // namespace faiss_saap::tests
