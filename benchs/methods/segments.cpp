/// RetroInfer (arXiv 2505.02922): keys are clustered in segments of 8,192
/// tokens, a cell for every 16 keys, by spherical k-means of the keys less the
/// segment's mean; queries take cells by the inner product with the cells'
/// means. What comes after the clustered prefix is clustered in segments of
/// 1,024 tokens, as the paper does while decoding, or of the window where that
/// is shorter: what leaves the window is in a cell. The paper's estimate of the
/// keys that were not read is not part of the selection and left out.
/// `retroinfer_whole` clusters the prefix as one segment, the paper's comparison.
#include <algorithm>

#include "CellMethod.h"
#include "MethodList.h"

namespace faiss_saap::benchs {

namespace {

constexpr int64_t kSegment = 8192, kUpdate = 1024, kKeysPerCell = 16;

/// Where segments end; the first one begins at `sink`.
/// @param segment  length of those of the clustered prefix
std::vector<int64_t> segment_ends(const Setup& s, int64_t segment) {
    std::vector<int64_t> ends;
    int64_t at = s.sink;
    while (at < s.data.tokens) {
        at = at < s.clustered
                ? std::min(at + segment, s.clustered)
                : std::min(
                          at +
                                  std::clamp<int64_t>(
                                          s.window, kKeysPerCell, kUpdate),
                          s.data.tokens);
        ends.push_back(at);
    }
    return ends;
}

int cells_between(int64_t begin, int64_t end) {
    return static_cast<int>(std::max<int64_t>(1, (end - begin) / kKeysPerCell));
}

int count_cells(const Setup& s, int64_t segment) {
    int n = 0;
    int64_t begin = s.sink;
    for (int64_t end : segment_ends(s, segment)) {
        n += cells_between(begin, end);
        begin = end;
    }
    return n;
}

struct Segments : CellMethod {
    std::vector<int64_t> ends;
    KMeansParams kmeans;
    size_t next_segment = 0;
    int next_cell = 0;
    std::vector<int32_t> cells;  ///< of the keys of all segments so far
    std::vector<float> means;    ///< size ncell * d
    int64_t first;

    Segments(const Setup& s, int64_t segment, bool share)
            : CellMethod(
                      CellLists(
                              count_cells(s, segment),
                              s.data.d,
                              s.sink,
                              false),
                      s.sink,
                      share),
              ends(segment_ends(s, segment)),
              means(int64_t(lists.ncell()) * s.data.d, 0.0f),
              first(s.sink) {
        kmeans.niter = s.niter;
        kmeans.seed = s.seed;
        kmeans.spherical = true;
    }

    void assign(const HeadData& data, int64_t begin, int64_t end, int32_t* out)
            override {
        while (first + static_cast<int64_t>(cells.size()) < end) {
            cluster_next_segment(data);
        }
        std::copy(
                cells.begin() + (begin - first),
                cells.begin() + (end - first),
                out);
    }

    void cluster_next_segment(const HeadData& data) {
        const int64_t begin = first + static_cast<int64_t>(cells.size());
        const int64_t n = ends[next_segment++] - begin;
        const int d = data.d, ncell = cells_between(begin, begin + n);
        const float* keys = data.keys_post.data() + begin * d;
        std::vector<double> centre(d, 0.0);
        for (int64_t i = 0; i < n * d; i++) {
            centre[i % d] += keys[i] / static_cast<double>(n);
        }
        std::vector<float> centred(keys, keys + n * d);
        for (int64_t i = 0; i < n * d; i++) {
            centred[i] -= static_cast<float>(centre[i % d]);
        }
        const Partition p = kmeans_partition(
                n, d, centred.data(), ncell, NEEDS_POST_ROPE, kmeans);
        RoutingInput input;
        input.n = n;
        input.d = d;
        input.post_rope = centred.data();
        std::vector<int32_t> of_segment(n);
        p.key->assign(input, nullptr, 1, of_segment.data(), nullptr);
        cell_means(
                n,
                d,
                keys,
                of_segment.data(),
                ncell,
                means.data() + int64_t(next_cell) * d);
        for (int32_t c : of_segment) {
            cells.push_back(next_cell + c);
        }
        next_cell += ncell;
    }

    void score(const Step& step, float* scores) const override {
        const int d = step.data.d;
        for (int h = 0; h < step.data.group; h++) {
            const float* q = step.data.query_post(step.token, h);
            for (int c = 0; c < lists.ncell(); c++) {
                float dot = 0;
#pragma omp simd reduction(+ : dot)
                for (int i = 0; i < d; i++) {
                    dot += q[i] * means[int64_t(c) * d + i];
                }
                *scores++ = dot;
            }
        }
    }

    double scoring_bytes(const HeadData& data) const override {
        return kNumberBytes * lists.ncell() * data.d;
    }
};

} // namespace

MethodEntries segments_methods() {
    MethodEntry segments, whole;
    segments.name = "retroinfer";
    segments.make = [](const Setup& s, bool share) {
        return std::make_unique<Segments>(s, kSegment, share);
    };
    whole.name = "retroinfer_whole";
    whole.make = [](const Setup& s, bool share) {
        return std::make_unique<Segments>(s, s.data.tokens, share);
    };
    return {segments, whole};
}

} // namespace faiss_saap::benchs
