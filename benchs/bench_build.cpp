/// What it costs to make the index of a sequence, and to keep it while the
/// sequence grows.
#include <algorithm>

#include <faiss/impl/FaissAssert.h>

#include <faiss_saap/AttentionAdapter.h>

#include "common/build.h"
#include "common/report.h"

using namespace faiss_saap;
using namespace faiss_saap::benchs;

namespace {

void run(const BuildOptions& o) {
    CacheShape shape = o.shape(o.tokens + o.inserts);
    shape.values = false;
    std::mt19937 random(1);
    const SyntheticCache cache(shape, random);
    KvView prefill = cache.kv;
    prefill.length = o.tokens;

    AdapterParams params;
    params.heads_q = params.heads_kv = o.heads_kv;
    params.d = o.d;
    params.sink = o.sink;
    params.window = o.window;
    const int64_t end = o.tokens - o.window;
    FAISS_THROW_IF_NOT_FMT(
            end - o.sink >= o.ncell,
            "tokens = %lld leave fewer keys between sink = %lld and window = %lld than "
            "ncell = %d",
            static_cast<long long>(o.tokens),
            static_cast<long long>(o.sink),
            static_cast<long long>(o.window),
            o.ncell);

    BuildReport report;
    const auto timed = [&](int repeat, const auto& body) {
        std::vector<double> seconds;
        for (int r = 0; r < repeat; r++) {
            const double start = seconds_now();
            body();
            seconds.push_back(seconds_now() - start);
        }
        return seconds;
    };

    Progress progress("building", 2 * o.repeat + 1 + o.inserts);
    HeadPartitions partitions;
    auto seconds = timed(1, [&] {
        KMeansParams kmeans;
        kmeans.niter = o.niter;
        partitions =
                sequence_partitions(prefill, o.sink, end, o.ncell, kmeans);
    });
    progress.advance();
    report.add("cluster", double(o.tokens), seconds);

    std::vector<std::vector<int32_t>> cells(o.heads_kv);
    for (int h = 0; h < o.heads_kv; h++) {
        cells[h].resize(cache.kv.length);
    }
    std::vector<float> keys(o.tokens * o.d);
    std::vector<double> assign(o.repeat, 0.0);
    for (int r = 0; r < o.repeat; r++) {
        for (int h = 0; h < o.heads_kv; h++) {
            const double start = seconds_now();
            for (int64_t i = o.sink; i < end; i++) {
                to_float(
                        shape.dtype,
                        cache.kv.key(h, i),
                        o.d,
                        keys.data() + i * o.d);
            }
            RoutingInput input;
            input.n = end - o.sink;
            input.d = o.d;
            input.post_rope = keys.data() + o.sink * o.d;
            partitions[h][0].key->assign(
                    input, nullptr, 1, cells[h].data() + o.sink, nullptr);
            assign[r] += seconds_now() - start;
        }
        progress.advance();
    }
    report.add("assign", double(o.tokens), assign);

    std::vector<double> lists(o.repeat);
    for (double& s : lists) {
        s = 0;
        for (int h = 0; h < o.heads_kv; h++) {
            CellLists list(o.ncell, o.d, o.sink, false);
            const double start = seconds_now();
            for (int64_t i = o.sink; i < end; i++) {
                list.append(cells[h][i], nullptr, i);
            }
            s += seconds_now() - start;
        }
        progress.advance();
    }
    report.add("lists", double(o.tokens), lists);

    AttentionAdapter adapter(params, partitions);
    const int64_t id = adapter.create();
    adapter.append(id, prefill);
    std::vector<double> insert;
    for (int64_t n = o.tokens + 1; n <= o.tokens + o.inserts; n++) {
        KvView grown = cache.kv;
        grown.length = n;
        const double start = seconds_now();
        adapter.append(id, grown);
        insert.push_back(seconds_now() - start);
        progress.advance();
    }
    report.add("insert", 1, insert);

    report.finish(o, adapter.bytes_used());
}

} // namespace

int main(int argc, char** argv) {
    BuildOptions o;
    CLI::App app{
            "Times the making of a sequence's index: k-means over its keys, "
            "assigning them, listing them, and inserting tokens one by one. "
            "Times are of all KV heads of a layer."};
    o.add_to(app, {"cpu", "cuda"});
    add_number(
            app,
            "--inserts",
            o.inserts,
            "tokens that come after the others, one by one");
    add_number(app, "--niter", o.niter, "k-means iterations");
    add_number(app, "--repeat", o.repeat, "runs of assigning and listing");
    add_output(app, "--json", o.json, "file for the results");
    CLI11_PARSE(app, argc, argv);
    return run_program(app, [&] {
        if (o.device == "cpu") {
            run(o);
            return;
        }
#ifdef FAISS_SAAP_WITH_CUDA
        build_on_device(o);
#else
        FAISS_THROW_MSG("device = cuda: this is a build without CUDA");
#endif
    });
}
