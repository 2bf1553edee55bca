#include "arguments.h"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <stdexcept>
#include <system_error>
#include <vector>

#include <unistd.h>

#include <index/write_file.h>

namespace faiss_saap::benchs {

namespace {

namespace fs = std::filesystem;

constexpr char kInt[] = "INT", kUint[] = "UINT", kFloat[] = "FLOAT"; ///< as CLI11 calls them

struct Named {
    std::string option, path;
    bool written;
};

/// @param kind  kInput, kOutput, or what CLI11 calls numbers; behind it stand an option's checks
bool is_of(const CLI::Option* option, const std::string& kind) {
    const std::string type = option->get_type_name();
    return type.substr(0, type.find(':')) == kind;
}

bool same_file(const std::string& a, const std::string& b) {
    std::error_code error; // of one that is not there yet
    if (fs::equivalent(a, b, error)) {
        return true;
    }
    const auto where = [](const std::string& path) {
        std::error_code failed;
        const auto at = fs::weakly_canonical(fs::absolute(behind_links(path)), failed);
        return failed ? fs::path(path) : at;
    };
    return where(a) == where(b);
}

std::vector<Named> files_of(const CLI::App& app) {
    std::vector<Named> files;
    for (const CLI::Option* option : app.get_options()) {
        const bool written = is_of(option, kOutput);
        if (!written && !is_of(option, kInput)) {
            continue;
        }
        for (const std::string& path : option->results()) {
            files.push_back({option->get_name(), path, written});
        }
    }
    return files;
}

void check_files(const std::vector<Named>& files) {
    for (const Named& file : files) {
        if (file.path.empty()) {
            throw std::runtime_error(file.option + ": '' is not the name of a file");
        }
    }
    for (const Named& out : files) {
        if (!out.written || is_written_in_place(out.path)) {
            continue;
        }
        const fs::path target = behind_links(out.path);
        const fs::path directory =
                target.has_parent_path() ? target.parent_path() : fs::path(".");
        std::error_code error;
        if (fs::is_directory(target, error) ||
            !fs::is_directory(directory, error) || access(directory.c_str(), W_OK) != 0) {
            throw std::runtime_error(out.option + ": '" + out.path + "' cannot be created");
        }
        for (const Named& other : files) {
            if (&other != &out && same_file(other.path, out.path)) {
                throw std::runtime_error(
                        out.option + ": " + out.path + " is the file of " + other.option +
                        ", too, and would take its place");
            }
        }
    }
}

/// As they are read: hexadecimal ones, too.
double value_of(const std::string& number) {
    return std::strtod(number.c_str(), nullptr);
}

/// CLI11 would take the nearest number that there is.
bool beyond_64_bits(const CLI::Option& option, const std::string& number) {
    errno = 0;
    if (is_of(&option, kInt)) {
        std::strtoll(number.c_str(), nullptr, 0);
    } else if (is_of(&option, kUint)) {
        std::strtoull(number.c_str(), nullptr, 0);
    }
    return errno == ERANGE;
}

void check_numbers(const CLI::Option& option) {
    for (const std::string& number : option.results()) {
        if (is_of(&option, kFloat) && !std::isfinite(value_of(number))) {
            throw std::runtime_error(
                    option.get_name() + ": " + number + " must be a finite number");
        }
        if (beyond_64_bits(option, number)) {
            throw std::runtime_error(
                    option.get_name() + ": " + number + " is beyond 64 bits");
        }
    }
}

void check_list(const CLI::Option& option) {
    const bool numbers = is_of(&option, kInt) || is_of(&option, kFloat);
    const std::vector<std::string>& all = option.results();
    for (auto i = all.begin(); i != all.end(); ++i) {
        const bool twice = std::any_of(all.begin(), i, [&](const std::string& before) {
            return numbers ? value_of(before) == value_of(*i) : before == *i;
        });
        if (twice) {
            throw std::runtime_error(option.get_name() + " has " + *i + " more than once");
        }
    }
}

} // namespace

void check_arguments(const CLI::App& app) {
    check_files(files_of(app));
    for (const CLI::Option* option : app.get_options()) {
        check_numbers(*option);
        check_list(*option);
    }
}

} // namespace faiss_saap::benchs
