#include "report.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <ctime>
#include <fstream>
#include <thread>

#include <faiss/Index.h>
#include <fmt/core.h>
#include <omp.h>
#include <unistd.h>

#include <faiss_saap/version.h>
#include <index/write_file.h>

namespace faiss_saap::benchs {

namespace {

std::string processor() {
    std::ifstream info("/proc/cpuinfo");
    for (std::string line; std::getline(info, line);) {
        if (line.rfind("model name", 0) == 0) {
            return line.substr(line.find(':') + 2);
        }
    }
    return "unknown";
}

} // namespace

nlohmann::json environment() {
    return {{"processor", processor()},
            {"cores", std::thread::hardware_concurrency()},
            {"threads", omp_get_max_threads()},
            {"compiler", __VERSION__},
            {"faiss",
             fmt::format(
                     "{}.{}.{}",
                     FAISS_VERSION_MAJOR,
                     FAISS_VERSION_MINOR,
                     FAISS_VERSION_PATCH)},
            {"faiss_saap", FAISS_SAAP_VERSION}};
}

void write_json(
        const std::string& path,
        const nlohmann::json& config,
        const nlohmann::json& rows,
        const nlohmann::json& more) {
    nlohmann::json report = {
            {"config", config},
            {"environment", environment()},
            {"rows", rows}};
    report.update(more);
    const std::string text = report.dump(1) + "\n";
    write_file(path, [&](FileSink& file) { file.write(text.data(), text.size()); });
}

void print_table(
        const std::vector<std::string>& header,
        const std::vector<std::vector<std::string>>& rows) {
    std::vector<size_t> width;
    for (size_t c = 0; c < header.size(); c++) {
        width.push_back(header[c].size());
        for (const auto& row : rows) {
            width[c] = std::max(width[c], row[c].size());
        }
    }
    const auto line = [&](const std::vector<std::string>& cells) {
        for (size_t c = 0; c < cells.size(); c++) {
            fmt::print(
                    c == 0 ? "{:<{}}" : "  {:>{}}", cells[c], width[c]);
        }
        fmt::print("\n");
    };
    line(header);
    for (const auto& row : rows) {
        line(row);
    }
    std::fflush(stdout);
}

double seconds_now() {
    return std::chrono::duration<double>(
                   std::chrono::steady_clock::now().time_since_epoch())
            .count();
}

double thread_seconds_now() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

double percentile(std::vector<double> x, double p) {
    std::sort(x.begin(), x.end());
    return x[std::min(x.size() - 1, static_cast<size_t>(p * x.size()))];
}

Progress::Progress(const std::string& what, int64_t total)
        : what_(what),
          total_(total),
          start_(seconds_now()),
          terminal_(isatty(STDERR_FILENO)) {}

Progress::~Progress() {
    if (visible_) {
        std::fprintf(stderr, "\r\033[K");
    }
}

void Progress::advance(int64_t steps) {
    if (!terminal_) {
        return;
    }
#pragma omp critical(faiss_saap_progress)
    {
        done_ += steps;
        const double now = seconds_now(), spent = now - start_;
        if (spent > 2 && now - shown_ > 0.2) {
            shown_ = now;
            visible_ = true;
            std::fprintf(
                    stderr,
                    "\r\033[K%s: %3.0f %%, %.0f s left",
                    what_.c_str(),
                    100.0 * done_ / total_,
                    spent / done_ * (total_ - done_));
        }
    }
}

} // namespace faiss_saap::benchs
