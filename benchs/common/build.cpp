#include "build.h"

#include <fmt/core.h>

#include "report.h"

namespace faiss_saap::benchs {

void BuildReport::add(
        const std::string& stage,
        double tokens,
        std::vector<double> seconds) {
    const double p50 = 1e6 * percentile(seconds, 0.5);
    const double p99 = 1e6 * percentile(seconds, 0.99);
    const double max = 1e6 * percentile(seconds, 1);
    rows_.push_back({{"stage", stage},
                     {"us", p50},
                     {"p50_us", p50},
                     {"p99_us", p99},
                     {"max_us", max}});
    table_.push_back({stage,
                      fmt::format("{:.1f}", p50),
                      fmt::format("{:.1f}", p99),
                      fmt::format("{:.1f}", max),
                      fmt::format("{:.3f}", p50 / tokens)});
}

void BuildReport::finish(const BuildOptions& o, size_t index_bytes) const {
    fmt::print(
            "{} tokens, {} KV heads, d {}, {}, {} cells; then {} tokens one by "
            "one; index {:.1f} MiB, {:.2f} bytes per token and head\n",
            o.tokens,
            o.heads_kv,
            o.d,
            o.dtype,
            o.ncell,
            o.inserts,
            double(index_bytes) / double(1 << 20),
            double(index_bytes) / (double(o.tokens + o.inserts) * o.heads_kv));
    print_table({"stage", "us", "p99 us", "max us", "us/token"}, table_);
    if (!o.json.empty()) {
        nlohmann::json config = o.config();
        config["inserts"] = o.inserts;
        config["niter"] = o.niter;
        config["index_bytes"] = index_bytes;
        write_json(o.json, config, rows_);
    }
}

} // namespace faiss_saap::benchs
