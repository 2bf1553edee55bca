#include <faiss_saap/BlendAssigner.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <memory>

#include <faiss_saap/CellLists.h>

#include "adapter_world.h"
#include "common.h"

namespace faiss_saap {
namespace {

constexpr int d = 6, ncell = 9, group = 2;

std::shared_ptr<const QueryClassifier> make_classifier(
        tests::Random& random,
        float size = .3f,
        int cells = ncell,
        int dim = d) {
    ClassifierShape s;
    s.d = dim;
    s.group = group;
    s.ncell = cells;
    s.width = 8;
    return std::make_shared<QueryClassifier>(
            s,
            random.normal(parameter_count(s), size).data(),
            DType::float32);
}

BlendWeights make_weights(float a, float b, float c, float e, float f) {
    BlendWeights w;
    w.classifier = a, w.mean = b, w.newest = c, w.age = e, w.count = f;
    return w;
}

RoutingInput make_input(
        const std::vector<float>& pre,
        const std::vector<float>& post,
        const std::vector<int64_t>& position,
        const std::vector<int32_t>& head) {
    RoutingInput in;
    in.n = int64_t(position.size());
    in.d = d;
    in.pre_rope = pre.data();
    in.post_rope = post.data();
    in.position = position.data();
    in.head = head.data();
    return in;
}

/// Appends n keys to all cells but the last; the keys by cell come back.
std::vector<std::vector<std::vector<float>>> fill(
        tests::Random& random,
        CellLists& lists,
        int n) {
    std::vector<std::vector<std::vector<float>>> keys(ncell);
    for (int i = 0; i < n; i++) {
        const auto cell = int32_t(random.below(ncell - 1));
        keys[cell].push_back(random.normal(d));
        lists.append(cell, keys[cell].back().data(), 100 + i);
    }
    return keys;
}

TEST(BlendAssigner, IsTheWeightedSumOfItsDefinition) {
    tests::Random random;
    const auto classifier = make_classifier(random);
    const std::vector<BlendWeights> weights = {
            make_weights(.5f, .2f, .7f, .3f, -.1f),
            make_weights(-.5f, 1, .1f, .2f, .4f)};
    const float scale = .4f;
    const BlendAssigner blend(classifier, weights, scale);
    EXPECT_EQ(
            blend.needs,
            unsigned(
                    NEEDS_PRE_ROPE | NEEDS_POST_ROPE | NEEDS_POSITION |
                    NEEDS_STATS | NEEDS_HEAD | NEEDS_NEWEST_KEYS));
    for (int n : {0, 3, 12, 300}) { // cells of no, one and many keys
        CellLists lists(ncell, d, 16, true, nullptr, true);
        const auto keys = fill(random, lists, n);
        const CellStats stats = lists.stats();
        const int nq = 5;
        // Large enough for sums of exponentials to need care.
        const auto pre = random.normal(nq * d, 30);
        const auto post = random.normal(nq * d, 30);
        const std::vector<int64_t> position = {500, 501, 100, 400, 1000000};
        const std::vector<int32_t> head = {0, 1, 1, 0, 1};
        const auto in = make_input(pre, post, position, head);
        std::vector<float> scores(nq * ncell), of_classifier(nq * ncell);
        blend.scores(in, &stats, scores.data());
        classifier->scores(in, nullptr, of_classifier.data());
        for (int i = 0; i < nq; i++) {
            for (int c = 0; c < ncell; c++) {
                const auto& k = keys[c];
                const float score = scores[i * ncell + c];
                if (k.empty()) {
                    EXPECT_EQ(score, -INFINITY);
                    continue;
                }
                const double count = double(k.size());
                double mean = 0, others = 0, newest = 0;
                for (size_t j = 0; j < k.size(); j++) {
                    double dot = 0;
                    for (int x = 0; x < d; x++) {
                        dot += double(post[i * d + x]) * k[j][x];
                    }
                    mean += dot / count;
                    if (j + 1 == k.size()) {
                        newest = dot;
                    } else {
                        others += dot / (count - 1);
                    }
                }
                double split = newest;
                if (k.size() > 1) {
                    const double most = std::max(newest, others);
                    split = most +
                            std::log((std::exp(scale * (newest - most)) +
                                      (count - 1) *
                                              std::exp(scale * (others - most))) /
                                     count) /
                                    scale;
                }
                const double age = double(
                        std::max<int64_t>(0, position[i] - stats.newest[c]));
                const BlendWeights& w = weights[head[i]];
                const double expected =
                        w.classifier * double(of_classifier[i * ncell + c]) +
                        w.mean * mean + w.newest * split -
                        w.age * std::log1p(age) + w.count * std::log(count);
                EXPECT_NEAR(score, expected, 1e-3 + 1e-5 * std::fabs(expected));
            }
        }
    }
}

/// One query head, whose classifier sends x to the cell of its largest
/// component, where one is positive, and knows no more.
std::shared_ptr<const QueryClassifier> identity_classifier() {
    ClassifierShape s;
    s.d = d;
    s.ncell = d;
    s.width = d;
    s.depth = 0;
    std::vector<float> parameters(parameter_count(s), 0.0f);
    for (const ClassifierLayer& layer : classifier_layers(s)) {
        for (int i = 0; i < d; i++) {
            parameters[layer.weight + i * d + i] = 1;
        }
    }
    return std::make_shared<QueryClassifier>(
            s, parameters.data(), DType::float32);
}

TEST(BlendAssigner, LearnsWhatOnlyOneOfTheTwoSidesKnows) {
    tests::Random random;
    const auto classifier = identity_classifier();
    const BlendAssigner untrained(classifier, {BlendWeights()}, 1);
    CellLists lists(d, d, 0, true, nullptr, true);
    for (int i = 0; i < 20 * d; i++) { // cell c has keys along axis c
        auto key = random.normal(d, .01f);
        key[i % d] += 1;
        lists.append(i % d, key.data(), i);
    }
    const CellStats stats = lists.stats();
    const int64_t position = 500;
    const auto query = [&](bool statistics, int cell, auto&& use) {
        // The side that does not know sees hardly anything.
        auto pre = random.normal(d, .01f), post = random.normal(d, .01f);
        (statistics ? post : pre)[cell] += 5;
        RoutingInput in;
        in.n = 1;
        in.d = d;
        in.pre_rope = pre.data();
        in.post_rope = post.data();
        in.position = &position;
        use(in);
    };
    std::vector<BlendExample> examples;
    for (int i = 0; i < 200; i++) {
        const auto cell = int(random.below(d));
        query(i % 2, cell, [&](const RoutingInput& in) {
            BlendExample e;
            e.features.resize(kBlendFeatures * d);
            untrained.features(in, &stats, e.features.data());
            e.mass.assign(d, .01f);
            e.mass[cell] = 1;
            e.count.assign(d, 20);
            examples.push_back(e);
        });
    }
    const BlendAssigner blend(classifier, {fit_blend(examples, 1)}, 1);
    for (int i = 0; i < 50; i++) {
        const auto cell = int(random.below(d));
        query(i % 2, cell, [&](const RoutingInput& in) {
            int32_t best;
            blend.assign(in, &stats, 1, &best, nullptr);
            EXPECT_EQ(best, cell) << (i % 2 ? "statistics" : "classifier");
        });
    }
}

TEST(BlendAssigner, FitFindsTheWeightsThatMadeTheTargets) {
    tests::Random random;
    const float scale = .25f;
    const float truth[kBlendFeatures] = {.3f, .5f, .8f, 2, -.4f};
    std::vector<BlendExample> examples;
    for (int i = 0; i < 100; i++) {
        const int cells = 5 + int(random.below(30));
        BlendExample e;
        e.features = random.normal(kBlendFeatures * cells, 4);
        e.weight = float(1 + random.below(3));
        for (int c = 0; c < cells; c++) {
            e.count.push_back(float(1 + random.below(20)));
            double score = 0;
            for (int f = 0; f < kBlendFeatures; f++) {
                score += truth[f] * e.features[f * cells + c];
            }
            e.mass.push_back(
                    float(1e-4 * e.count[c] * std::exp(scale * score)));
        }
        examples.push_back(e);
    }
    const BlendWeights w = fit_blend(examples, scale);
    EXPECT_NEAR(w.classifier, truth[0], 1e-3);
    EXPECT_NEAR(w.mean, truth[1], 1e-3);
    EXPECT_NEAR(w.newest, truth[2], 1e-3);
    EXPECT_NEAR(w.age, truth[3], 1e-3);
    EXPECT_NEAR(w.count, truth[4], 1e-3);

    // Nothing to learn from, and features that never vary.
    EXPECT_TRUE(fit_blend({}, 1) == BlendWeights());
    BlendExample flat;
    flat.features.assign(kBlendFeatures * 2, 1);
    flat.mass = {.9f, .1f};
    flat.count = {1, 1};
    const BlendWeights same = fit_blend({flat}, 1);
    EXPECT_TRUE(std::isfinite(same.classifier) && std::isfinite(same.count));
    flat.weight = 0;
    EXPECT_TRUE(fit_blend({flat}, 1) == BlendWeights());

    flat.weight = NAN;
    EXPECT_SENTENCE(fit_blend({flat}, 1), "example 0");
    flat.weight = 1;
    flat.features[3] = INFINITY;
    EXPECT_SENTENCE(fit_blend({flat}, 1), "not finite");
    flat.features.pop_back();
    EXPECT_SENTENCE(fit_blend({flat}, 1), "9 features");
    EXPECT_SENTENCE(fit_blend({}, 0), "scale = 0");
}

TEST(BlendAssigner, WrongInput) {
    tests::Random random;
    const auto classifier = make_classifier(random);
    const std::vector<BlendWeights> good(group);
    EXPECT_SENTENCE(BlendAssigner(nullptr, good, 1), "classifier is null");
    EXPECT_SENTENCE(BlendAssigner(classifier, {good[0]}, 1), "1 query heads");
    EXPECT_SENTENCE(BlendAssigner(classifier, good, NAN), "scale = nan");
    EXPECT_SENTENCE(BlendAssigner(classifier, good, -1), "scale = -1");
    auto bad = good;
    bad[1].newest = NAN;
    EXPECT_SENTENCE(
            BlendAssigner(classifier, bad, 1),
            "weight 'newest' of query head 1 is nan");

    const BlendAssigner blend(classifier, good, 1);
    CellLists lists(ncell, d, 0, true, nullptr, true);
    fill(random, lists, 50);
    const CellStats stats = lists.stats();
    const auto pre = random.normal(d), post = random.normal(d);
    const std::vector<int64_t> position = {500};
    const std::vector<int32_t> head = {0}, wrong = {group};
    const RoutingInput in = make_input(pre, post, position, head);
    std::vector<float> scores(ncell);
    const auto with_stats = [&](auto change) {
        CellStats s = stats;
        change(s);
        blend.scores(in, &s, scores.data());
    };
    const auto with = [&](auto change) {
        RoutingInput x = in;
        change(x);
        blend.scores(x, &stats, scores.data());
    };
    with([](auto&) {});
    EXPECT_SENTENCE(blend.scores(in, nullptr, scores.data()), "stats is null");
    EXPECT_SENTENCE(
            with_stats([](auto& s) { s.mean_post_rope = nullptr; }),
            "mean_post_rope is null");
    EXPECT_SENTENCE(
            with_stats([](auto& s) { s.newest_post_rope = nullptr; }),
            "newest_post_rope is null");
    EXPECT_SENTENCE(
            with_stats([](auto& s) { s.newest = nullptr; }), "is null");
    EXPECT_SENTENCE(with([](auto& x) { x.pre_rope = nullptr; }), "pre_rope");
    EXPECT_SENTENCE(with([](auto& x) { x.post_rope = nullptr; }), "post_rope");
    EXPECT_SENTENCE(with([](auto& x) { x.position = nullptr; }), "position");
    EXPECT_SENTENCE(with([](auto& x) { x.head = nullptr; }), "head is null");
    EXPECT_SENTENCE(
            with([&](auto& x) { x.head = wrong.data(); }), "head[0] = 2");
    EXPECT_SENTENCE(with([](auto& x) { x.d = 3; }), "input.d = 3");
}

/// An adapter whose partitions have blends for queries.
TEST(BlendAssigner, SequencesKeepItsStatisticsThroughForkTruncateAndFile) {
    tests::Random random;
    tests::World world(random, 4, 2, 8, 400, 12, NEEDS_PRE_ROPE);
    for (Partition& p : world.partitions) {
        p.query = std::make_shared<BlendAssigner>(
                make_classifier(random, .3f, 12, 8),
                std::vector<BlendWeights>(
                        2, make_weights(.5f, .2f, .7f, .3f, -.1f)),
                .3f);
    }
    auto params = world.params(4, 16);
    params.policy.max_selectivity = .2;
    AttentionAdapter adapter(params, world.partitions);
    const int64_t a = adapter.create();
    for (int64_t n = 0; n < 300; n += 1 + random.below(40)) {
        adapter.append(a, world.view(n));
    }
    adapter.append(a, world.view(300));
    const auto fresh = [&](int64_t n) {
        const int64_t s = adapter.create();
        adapter.append(s, world.view(n));
        return s;
    };
    tests::expect_same_state(adapter, a, fresh(300));
    const int64_t fork = adapter.fork(a);
    adapter.append(fork, world.view(400));
    tests::expect_same_state(adapter, a, fresh(300));
    adapter.truncate(fork, 180, world.view(400));
    tests::expect_same_state(adapter, fork, fresh(180));
    adapter.append(fork, world.view(350));
    tests::expect_same_state(adapter, fork, fresh(350));
    adapter.truncate(fork, 0, world.view(400));
    tests::expect_same_state(adapter, fork, adapter.create());

    const tests::TemporaryFile file;
    adapter.save(a, file.path);
    tests::expect_same_state(adapter, a, adapter.load(file.path));
    // Attention goes through the scores of the loaded statistics.
    const int64_t loaded = adapter.load(file.path);
    const auto probed = [&](int64_t s) {
        return adapter.route({{s, world.view(300)}}, world.queries(299)).cells;
    };
    EXPECT_EQ(probed(a), probed(loaded));
    EXPECT_FALSE(probed(a).empty());
    // Partitions of the sequence travel with it, blends included.
    AttentionAdapter none(params, HeadPartitions());
    const int64_t own =
            none.create({{world.partitions[0]}, {world.partitions[1]}});
    none.append(own, world.view(300));
    none.save(own, file.path);
    tests::expect_same_state(none, own, none.load(file.path));

    adapter.reset(a);
    EXPECT_TRUE(adapter.lists(a, 0, 0).with_newest_keys());

    // Every cut is told from a whole file.
    std::ifstream stream(file.path, std::ios::binary);
    const std::string whole(std::istreambuf_iterator<char>(stream), {});
    for (size_t cut = 0; cut < whole.size(); cut += 501) {
        std::ofstream(file.path, std::ios::binary) << whole.substr(0, cut);
        EXPECT_THROW(none.load(file.path), faiss::FaissException) << cut;
    }
}

} // namespace
} // namespace faiss_saap
