#include <faiss_saap/QueryClassifier.h>

#include <algorithm>
#include <memory>

#include <faiss/IndexFlat.h>
#include <faiss/IndexIVFFlat.h>

#include <faiss_saap/QuantizerAssigner.h>
#include <faiss_saap/classifier_loss.h>
#include <faiss_saap/index_io.h>

#include "common.h"
#include "count_allocations.h"

namespace faiss_saap {
namespace {

ClassifierShape make_shape(
        int d,
        int group,
        int ncell,
        int width,
        int depth,
        bool share_trunk,
        bool share_input = false) {
    ClassifierShape s;
    s.d = d;
    s.group = group;
    s.ncell = ncell;
    s.width = width;
    s.depth = depth;
    s.share_trunk = share_trunk;
    s.share_input = share_input;
    return s;
}

std::vector<float> random_parameters(
        tests::Random& random,
        const ClassifierShape& shape) {
    return random.normal(
            parameter_count(shape), 1 / std::sqrt(float(shape.width)));
}

/// The network in double precision, from its definition.
/// @param kink  null, or lowered to the distance of what any rectifier is
///              given from zero, where the network has no derivative
std::vector<double> reference(
        const ClassifierShape& s,
        const std::vector<double>& parameters,
        const float* x,
        int head,
        double* kink = nullptr) {
    const auto layers = classifier_layers(s);
    const auto apply = [&](size_t l, const std::vector<double>& from) {
        const ClassifierLayer& layer = layers[l];
        const bool shares = l == 0 ? s.share_input : s.share_trunk;
        std::vector<double> to(layer.rows);
        for (int r = 0; r < layer.rows; r++) {
            const int64_t row = int64_t(shares ? 0 : head) * layer.rows + r;
            // Biases of the input are each head's.
            const int of_bias = l == 0 || !shares ? head : 0;
            to[r] = parameters[layer.bias + int64_t(of_bias) * layer.rows + r];
            for (int c = 0; c < layer.cols; c++) {
                to[r] += parameters[layer.weight + row * layer.cols + c] *
                        from[c];
            }
        }
        return to;
    };
    const auto rectify = [&](std::vector<double>& y) {
        for (double& v : y) {
            if (kink) {
                *kink = std::min(*kink, std::abs(v));
            }
            v = std::max(v, 0.0);
        }
    };
    auto h = apply(0, std::vector<double>(x, x + s.d));
    if (s.depth == 0) {
        rectify(h);
    }
    for (int b = 0; b < s.depth; b++) {
        auto u = apply(1 + 2 * b, h);
        rectify(u);
        const auto change = apply(2 + 2 * b, u);
        for (int i = 0; i < s.width; i++) {
            h[i] += change[i];
        }
    }
    return apply(layers.size() - 1, h);
}

std::vector<double> widen(const std::vector<float>& x) {
    return std::vector<double>(x.begin(), x.end());
}

struct Inputs {
    ClassifierShape shape;
    DType dtype;
};

void PrintTo(const Inputs& in, std::ostream* out) {
    const ClassifierShape& s = in.shape;
    *out << "d " << s.d << ", group " << s.group << ", ncell " << s.ncell
         << ", width " << s.width << ", depth " << s.depth
         << (s.share_input ? ", one input" : "")
         << (s.share_trunk ? ", shared, " : ", separate, ") << name(in.dtype);
}

class Network : public ::testing::TestWithParam<Inputs> {};

TEST_P(Network, ScoresAreThoseOfTheDefinition) {
    tests::Random random;
    const ClassifierShape& s = GetParam().shape;
    const auto parameters = random_parameters(random, s);
    const QueryClassifier classifier(s, parameters.data(), GetParam().dtype);
    const auto used = widen(classifier.parameters());
    const int n = 90; // above and below what goes through BLAS
    const auto x = random.normal(n * s.d);
    std::vector<int32_t> head(n);
    for (int i = 0; i < n; i++) { // one head has few
        head[i] = i < 5 ? 0 : static_cast<int32_t>(random.below(s.group));
        if (s.group > 1 && i >= 5 && head[i] == 0) {
            head[i] = 1;
        }
    }
    RoutingInput input;
    input.n = n;
    input.d = s.d;
    input.pre_rope = x.data();
    input.head = head.data();
    std::vector<float> many(n * s.ncell), one(s.ncell);
    classifier.scores(input, nullptr, many.data());
    for (int i = 0; i < n; i++) {
        const auto expected = reference(s, used, x.data() + i * s.d, head[i]);
        RoutingInput single = input;
        single.n = 1;
        single.pre_rope = x.data() + i * s.d;
        single.head = head.data() + i;
        classifier.scores(single, nullptr, one.data());
        for (int c = 0; c < s.ncell; c++) {
            ASSERT_NEAR(one[c], expected[c], 2e-4) << "vector " << i;
            ASSERT_NEAR(many[i * s.ncell + c], expected[c], 2e-4)
                    << "vector " << i;
        }
    }
}

TEST_P(Network, AssignIsTheTopOfTheScoresAndAllocatesNothing) {
    tests::Random random;
    const ClassifierShape& s = GetParam().shape;
    const auto parameters = random_parameters(random, s);
    const QueryClassifier classifier(s, parameters.data(), GetParam().dtype);
    const auto x = random.normal(s.d);
    const int32_t head = s.group - 1;
    RoutingInput input;
    input.n = 1;
    input.d = s.d;
    input.pre_rope = x.data();
    input.head = &head;
    const int k = std::min(5, s.ncell);
    std::vector<float> scores(s.ncell), best(k);
    std::vector<int32_t> cells(k), generic(k);
    classifier.scores(input, nullptr, scores.data());
    classifier.CellAssigner::assign(input, nullptr, k, generic.data(), nullptr);
    classifier.assign(input, nullptr, k, cells.data(), best.data());
    const int64_t before = tests::allocations();
    classifier.scores(input, nullptr, scores.data());
    classifier.assign(input, nullptr, k, cells.data(), best.data());
    if (tests::counts_allocations()) {
        EXPECT_EQ(tests::allocations(), before);
    }
    EXPECT_EQ(cells, generic);
    for (int j = 0; j < k; j++) {
        EXPECT_EQ(best[j], scores[cells[j]]);
    }
}

TEST_P(Network, WeightsAreStoredForWideLoads) {
    tests::Random random;
    const ClassifierShape& s = GetParam().shape;
    const DType dtype = GetParam().dtype;
    const auto parameters = random_parameters(random, s);
    const QueryClassifier classifier(s, parameters.data(), dtype);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(classifier.weights()) % 64, 0u);
    const auto rounded = classifier.parameters();
    const float tolerance = dtype == DType::float32 ? 0 : 1.f / 256;
    size_t bytes = 0;
    for (const auto& stored : classifier.layers()) {
        const ClassifierLayer& layer = stored.layer;
        EXPECT_EQ(stored.padded_cols % 8, 0);
        EXPECT_EQ(stored.weight % 16, 0u);
        EXPECT_EQ(stored.weight, bytes);
        const int64_t rows = int64_t(layer.networks) * layer.rows;
        const size_t row_bytes = stored.padded_cols * element_size(dtype);
        std::vector<float> row(stored.padded_cols);
        for (int64_t r = 0; r < rows; r++) {
            to_float(
                    dtype,
                    classifier.weights() + stored.weight + r * row_bytes,
                    stored.padded_cols,
                    row.data());
            for (int c = 0; c < stored.padded_cols; c++) {
                const int64_t at = layer.weight + r * layer.cols + c;
                const float w = c < layer.cols ? parameters[at] : 0.0f;
                ASSERT_NEAR(row[c], w, tolerance * std::abs(w));
                ASSERT_EQ(row[c], c < layer.cols ? rounded[at] : 0.0f);
            }
        }
        for (int64_t i = 0; i < layer.biases(); i++) {
            ASSERT_EQ(
                    classifier.biases()[stored.bias + i],
                    parameters[layer.bias + i]);
        }
        bytes += rows * row_bytes;
    }
    EXPECT_GE(classifier.bytes_read(), bytes);
}

INSTANTIATE_TEST_SUITE_P(
        Shapes,
        Network,
        ::testing::Values(
                Inputs{make_shape(64, 3, 100, 40, 1, true), DType::bfloat16},
                Inputs{make_shape(64, 3, 100, 40, 1, false), DType::bfloat16},
                Inputs{make_shape(33, 2, 17, 21, 2, true), DType::bfloat16},
                Inputs{make_shape(7, 1, 5, 3, 3, true), DType::float32},
                Inputs{make_shape(12, 4, 1, 8, 0, false), DType::float32},
                Inputs{make_shape(64, 3, 100, 40, 0, true, true), DType::bfloat16},
                Inputs{make_shape(30, 2, 17, 21, 0, true, false), DType::bfloat16},
                Inputs{make_shape(30, 2, 17, 21, 0, false, true), DType::float32},
                Inputs{make_shape(30, 2, 17, 21, 2, true, true), DType::bfloat16},
                Inputs{make_shape(128, 4, 64, 72, 1, true), DType::float32}));

TEST(QueryClassifier, TheDefaultFitsTheBudget) {
    // 8 KV heads of 4 query heads, d = 128, 1,024 cells: 6 MB in all.
    ClassifierShape s;
    s.d = 128;
    s.group = 4;
    s.ncell = 1024;
    const std::vector<float> zeros(parameter_count(s));
    EXPECT_LE(QueryClassifier(s, zeros.data()).bytes_read(), 750'000u);
}

TEST(QueryClassifier, NeedsHeadsOnlyWhereThereAreSeveral) {
    auto s = make_shape(4, 1, 3, 8, 1, true);
    const std::vector<float> zeros(1000);
    EXPECT_EQ(
            QueryClassifier(s, zeros.data()).needs,
            unsigned(NEEDS_PRE_ROPE));
    s.group = 2;
    EXPECT_EQ(
            QueryClassifier(s, zeros.data()).needs,
            unsigned(NEEDS_PRE_ROPE | NEEDS_HEAD));
    s.share_input = true; // biases remain each head's
    EXPECT_EQ(
            QueryClassifier(s, zeros.data()).needs,
            unsigned(NEEDS_PRE_ROPE | NEEDS_HEAD));
}

TEST(QueryClassifier, NaNStaysNaN) {
    tests::Random random;
    for (const auto& [n, depth] : {std::pair(1, 1), {40, 1}, {1, 0}, {40, 0}}) {
        const auto s = make_shape(10, 1, 30, 8, depth, true);
        const auto parameters = random_parameters(random, s);
        const QueryClassifier classifier(s, parameters.data());
        std::vector<float> x(n * s.d, 0.5f), scores(n * s.ncell);
        x[3] = NAN;
        RoutingInput input;
        input.n = n;
        input.d = s.d;
        input.pre_rope = x.data();
        classifier.scores(input, nullptr, scores.data());
        EXPECT_TRUE(std::all_of(
                scores.begin(), scores.begin() + s.ncell, [](float f) {
                    return std::isnan(f);
                }));
    }
}

TEST(QueryClassifier, WrongInput) {
    const auto s = make_shape(4, 3, 5, 8, 1, true);
    std::vector<float> parameters(parameter_count(s));
    const QueryClassifier classifier(s, parameters.data());
    std::vector<float> x(4), scores(5);
    std::vector<int32_t> cells(5);
    RoutingInput input;
    input.n = 1;
    input.d = 4;
    input.pre_rope = x.data();
    EXPECT_SENTENCE(
            classifier.scores(input, nullptr, scores.data()), "head is null");
    for (int32_t head : {-1, 3}) {
        input.head = &head;
        EXPECT_SENTENCE(
                classifier.scores(input, nullptr, scores.data()),
                "input.head[0] = " + std::to_string(head));
    }
    const int32_t head = 0;
    input.head = &head;
    EXPECT_SENTENCE(
            classifier.assign(input, nullptr, 6, cells.data(), nullptr),
            "k = 6");
    input.pre_rope = nullptr;
    EXPECT_SENTENCE(
            classifier.scores(input, nullptr, scores.data()), "pre_rope");

    EXPECT_SENTENCE(QueryClassifier(s, nullptr), "parameters is null");
    EXPECT_SENTENCE(
            QueryClassifier(s, parameters.data(), DType::float16), "float16");
    parameters[2] = NAN;
    EXPECT_SENTENCE(
            QueryClassifier(s, parameters.data()), "layer 'in'[2]");
    const auto wrong = [&](ClassifierShape w) { parameter_count(w); };
    EXPECT_SENTENCE(wrong(make_shape(0, 1, 1, 8, 1, true)), "d = 0");
    EXPECT_SENTENCE(wrong(make_shape(4, 0, 1, 8, 1, true)), "group = 0");
    EXPECT_SENTENCE(wrong(make_shape(4, 1, 70000, 8, 1, true)), "ncell = 70000");
    EXPECT_SENTENCE(wrong(make_shape(4, 1, 1, 1025, 1, true)), "width = 1025");
    EXPECT_SENTENCE(wrong(make_shape(4, 1, 1, 8, -1, true)), "depth = -1");
}

TEST(QueryClassifier, IndexFilesCarryIt) {
    tests::Random random;
    const auto s = make_shape(8, 1, 12, 16, 1, true);
    const auto parameters = random_parameters(random, s);
    auto centroids = std::make_shared<faiss::IndexFlatL2>(s.d);
    centroids->add(s.ncell, random.normal(s.ncell * s.d).data());
    Partition partition;
    partition.key =
            std::make_shared<QuantizerAssigner>(centroids, NEEDS_PRE_ROPE);
    partition.query = std::make_shared<QueryClassifier>(s, parameters.data());
    auto quantizer = std::make_unique<faiss::IndexFlatL2>(s.d);
    auto lists = std::make_unique<faiss::IndexIVFFlat>(
            quantizer.get(), s.d, s.ncell);
    lists->own_fields = true;
    quantizer.release();
    IndexAsymmetricIVF index(std::move(lists), partition);
    index.nprobe = 2;
    const auto x = random.normal(100 * s.d), q = random.normal(9 * s.d);
    index.add(100, x.data());
    const auto search = [&](const IndexAsymmetricIVF& i) {
        std::vector<float> distances(9 * 3);
        std::vector<idx_t> labels(9 * 3);
        i.search(9, q.data(), 3, distances.data(), labels.data());
        return labels;
    };
    auto bytes = write_index_to_memory(index);
    const auto copy = read_index_from_memory(bytes.data(), bytes.size());
    EXPECT_EQ(search(*copy), search(index));
    EXPECT_EQ(write_index_to_memory(*copy), bytes);
    EXPECT_EQ(
            dynamic_cast<const QueryClassifier&>(*copy->partition.query)
                    .parameters(),
            dynamic_cast<const QueryClassifier&>(*partition.query)
                    .parameters());
    for (size_t cut = 0; cut < bytes.size(); cut += 97) {
        EXPECT_THROW(
                read_index_from_memory(bytes.data(), cut),
                faiss::FaissException);
    }

    // As files were before input layers could be shared: no byte says so.
    const std::string kind = "SaC2";
    const auto at = std::search(bytes.begin(), bytes.end(), kind.begin(), kind.end());
    ASSERT_NE(at, bytes.end());
    at[3] = 'l'; // SaCl
    const auto depth = at + 4 + 4 * 4;
    const size_t of_depth = depth - bytes.begin();
    bytes.erase(depth + 4);
    tests::seal(bytes);
    const auto old = read_index_from_memory(bytes.data(), bytes.size());
    EXPECT_EQ(search(*old), search(index));
    bytes[of_depth] = 0;
    tests::seal(bytes);
    EXPECT_SENTENCE(
            read_index_from_memory(bytes.data(), bytes.size()), "is linear");
}

/// The loss in double precision, from its definition.
double reference_loss(
        const ClassifierShape& s,
        const std::vector<double>& parameters,
        const ClassifierBatch& b) {
    double loss = 0;
    for (int g = 0; g < s.group; g++) {
        for (int64_t i = 0; i < b.n; i++) {
            const int64_t row = g * b.n + i;
            if (b.weight[row] == 0) {
                continue;
            }
            const auto z = reference(s, parameters, b.x + row * s.d, g);
            double sum = 0;
            for (int c = 0; c < s.ncell; c++) {
                sum += std::exp(z[c] + b.log_count[i * s.ncell + c]);
            }
            for (int c = 0; c < s.ncell; c++) {
                const double p = b.mass[row * s.ncell + c] / b.total[row];
                if (p > 0) {
                    loss -= b.weight[row] * p *
                            (z[c] + b.log_count[i * s.ncell + c] -
                             std::log(sum));
                }
            }
        }
    }
    return loss;
}

/// Of make_shape().
struct Shared {
    int depth;
    bool trunk, input;
};

void PrintTo(const Shared& s, std::ostream* out) {
    *out << "depth " << s.depth << (s.input ? ", one input" : "")
         << (s.trunk ? ", shared" : ", separate");
}

class Loss : public ::testing::TestWithParam<Shared> {};

TEST_P(Loss, GradientAgreesWithFiniteDifferences) {
    tests::Random random;
    const Shared& shared = GetParam();
    const auto s = make_shape(6, 2, 19, 9, shared.depth, shared.trunk, shared.input);
    const auto parameters = random_parameters(random, s);
    auto wide = widen(parameters);
    const int64_t n = 7, rows = s.group * n;
    std::vector<float> x;
    // Beyond what single precision and the differences' steps move: on the
    // other side of a rectifier's kink the slope is another.
    for (double kink = 0; kink < 1e-4;) {
        x = random.normal(rows * s.d);
        kink = INFINITY;
        for (int64_t r = 0; r < rows; r++) {
            reference(s, wide, x.data() + r * s.d, r / n, &kink);
        }
    }
    std::vector<float> mass(rows * s.ncell), total(rows), weight(rows, .3f);
    std::vector<float> log_count(n * s.ncell);
    for (int64_t i = 0; i < n * s.ncell; i++) { // some cells are empty
        const auto count = random.below(4);
        log_count[i] = count ? std::log(float(count)) : -INFINITY;
    }
    for (int64_t r = 0; r < rows; r++) {
        for (int c = 0; c < s.ncell; c++) {
            const bool there = log_count[r % n * s.ncell + c] > -INFINITY;
            mass[r * s.ncell + c] = there ? .01f * random.below(100) : 0.0f;
            total[r] += mass[r * s.ncell + c];
        }
    }
    weight[3] = 0;
    ClassifierBatch batch;
    batch.n = n;
    batch.x = x.data();
    batch.mass = mass.data();
    batch.total = total.data();
    batch.log_count = log_count.data();
    batch.weight = weight.data();
    std::vector<float> gradient(parameters.size(), 1.0f); // it is added to
    ClassifierWorkspace workspace;
    const double loss = classifier_loss(
            s, parameters.data(), batch, gradient.data(), workspace);
    EXPECT_NEAR(loss, reference_loss(s, wide, batch), 1e-4 * std::abs(loss));
    double largest = 0;
    for (size_t i = 0; i < wide.size(); i++) {
        const double at = wide[i], step = 1e-6;
        wide[i] = at + step;
        const double above = reference_loss(s, wide, batch);
        wide[i] = at - step;
        const double below = reference_loss(s, wide, batch);
        wide[i] = at;
        const double expected = (above - below) / (2 * step);
        ASSERT_NEAR(gradient[i] - 1, expected, 2e-4) << "parameter " << i;
        largest = std::max(largest, std::abs(expected));
    }
    EXPECT_GT(largest, .05);
}

INSTANTIATE_TEST_SUITE_P(
        Trunks,
        Loss,
        ::testing::Values(
                Shared{2, false, false},
                Shared{2, true, false},
                Shared{1, true, true},
                Shared{0, true, true},
                Shared{0, false, false}));

} // namespace
} // namespace faiss_saap
