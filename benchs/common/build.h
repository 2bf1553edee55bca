/// What bench_build measures, wherever it runs.
#pragma once

#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "CacheOptions.h"

namespace faiss_saap::benchs {

struct BuildOptions : CacheOptions {
    int64_t inserts = 2000;
    int niter = 10, repeat = 3;
    std::string json;
};

/// The stages of a build, printed and written at the end.
class BuildReport {
   public:
    /// @param tokens   that a run of the stage handles
    /// @param seconds  of the runs
    void add(
            const std::string& stage,
            double tokens,
            std::vector<double> seconds);
    /// @param index_bytes  of the sequence's index in the end
    void finish(const BuildOptions& options, size_t index_bytes) const;

   private:
    nlohmann::json rows_ = nlohmann::json::array();
    std::vector<std::vector<std::string>> table_;
};

/// bench_build --device cuda, in builds with CUDA.
void build_on_device(const BuildOptions& options);

} // namespace faiss_saap::benchs
