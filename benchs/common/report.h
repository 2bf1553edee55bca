/// What every program writes with --json, and what it shows while working.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

namespace faiss_saap::benchs {

/// Processor, cores, compiler, versions: what a figure depends on.
nlohmann::json environment();

/// Writes one object {config, environment, rows}; whole or not at all.
/// @param more  an object, its members beside these
void write_json(
        const std::string& path,
        const nlohmann::json& config,
        const nlohmann::json& rows,
        const nlohmann::json& more = nlohmann::json::object());

/// A table with aligned columns, the first one to the left.
void print_table(
        const std::vector<std::string>& header,
        const std::vector<std::vector<std::string>>& rows);

/// A line with percentage and time left on stderr, once work has lasted two
/// seconds, and only on a terminal.
class Progress {
   public:
    Progress(const std::string& what, int64_t total);
    ~Progress();
    /// May be called from several threads.
    void advance(int64_t steps = 1);

   private:
    std::string what_;
    int64_t total_, done_ = 0;
    double start_, shown_ = 0;
    bool terminal_, visible_ = false;
};

double seconds_now();

/// Seconds that this thread has computed: what others do on the machine at the
/// same time does not count.
double thread_seconds_now();

/// The value that a share p of x lies below; .5 is the median.
/// @param x  not empty
double percentile(std::vector<double> x, double p);

} // namespace faiss_saap::benchs

#include "run_program.h"
