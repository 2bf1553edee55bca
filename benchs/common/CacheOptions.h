/// The options that describe a synthetic cache, for every program that makes
/// one.
#pragma once

#include <string>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "SyntheticCache.h"
#include "arguments.h"

namespace faiss_saap::benchs {

struct CacheOptions {
    std::string device = "cpu", dtype = "bf16";
    int64_t tokens = 131072, sink = 16, window = 1024;
    int heads_kv = 8, d = 128, ncell = 1024;
    double skew = 0.5;
    bool huge_pages = false;

    /// @param devices  where the program can run
    void add_to(CLI::App& app, const std::vector<std::string>& devices = {"cpu"});
    /// The shape of a cache of that many tokens.
    CacheShape shape(int64_t length) const;
    /// For the results.
    nlohmann::json config() const;
};

} // namespace faiss_saap::benchs
