#include "CacheOptions.h"

namespace faiss_saap::benchs {

void CacheOptions::add_to(
        CLI::App& app,
        const std::vector<std::string>& devices) {
    app.add_option("--device", device, "where to run")
            ->check(CLI::IsMember(devices))
            ->capture_default_str();
    add_number(app, "--tokens", tokens, "tokens of a sequence");
    add_number(app, "--heads-kv", heads_kv, "KV heads");
    add_number(app, "--head-dim", d, "head dimension");
    app.add_option("--ncell", ncell, "cells per KV head")
            ->check(CLI::Range(1, 65536))
            ->capture_default_str();
    app.add_option("--dtype", dtype, "bf16, fp16 or fp32")
            ->check(CLI::IsMember({"bf16", "fp16", "fp32"}))
            ->capture_default_str();
    app.add_option("--sink", sink, "first tokens, not in cells")
            ->check(CLI::NonNegativeNumber)
            ->capture_default_str();
    app.add_option("--window", window, "most recent tokens, not in cells")
            ->check(CLI::NonNegativeNumber)
            ->capture_default_str();
    app.add_option(
               "--skew",
               skew,
               "standard deviation of the logarithm of the cells' sizes")
            ->check(CLI::NonNegativeNumber)
            ->capture_default_str();
    app.add_flag("--huge-pages", huge_pages, "caches in pages of 2 MiB");
}

CacheShape CacheOptions::shape(int64_t length) const {
    CacheShape s;
    s.tokens = length;
    s.heads = heads_kv;
    s.d = d;
    s.dtype = dtype == "bf16" ? DType::bfloat16
            : dtype == "fp16" ? DType::float16
                              : DType::float32;
    s.ncell = ncell;
    s.skew = skew;
    s.huge_pages = huge_pages;
    return s;
}

nlohmann::json CacheOptions::config() const {
    return {{"device", device},
            {"tokens", tokens},
            {"heads_kv", heads_kv},
            {"head_dim", d},
            {"dtype", dtype},
            {"ncell", ncell},
            {"skew", skew},
            {"sink", sink},
            {"window", window},
            {"huge_pages", huge_pages}};
}

} // namespace faiss_saap::benchs
