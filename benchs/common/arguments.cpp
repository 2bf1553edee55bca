#include "arguments.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <stdexcept>
#include <system_error>
#include <vector>

#include <unistd.h>

namespace faiss_saap::benchs {

namespace {

namespace fs = std::filesystem;

struct Named {
    std::string option, path;
    bool written;
};

bool same_file(const std::string& a, const std::string& b) {
    std::error_code error; // what cannot be looked at is compared by its name
    const bool equivalent = fs::equivalent(a, b, error);
    return equivalent || fs::weakly_canonical(a, error) == fs::weakly_canonical(b, error);
}

/// What is written to such a file takes no other's place: /dev/stdout, say.
bool is_device(const std::string& path) {
    std::error_code error;
    return fs::exists(path, error) && fs::is_other(path, error);
}

std::vector<Named> files_of(const CLI::App& app) {
    std::vector<Named> files;
    for (const CLI::Option* option : app.get_options()) {
        const bool written = option->get_type_name() == kOutput;
        if (!written && option->get_type_name() != kInput) {
            continue;
        }
        for (const std::string& path : option->results()) {
            if (!path.empty()) {
                files.push_back({option->get_name(), path, written});
            }
        }
    }
    return files;
}

void check_files(const std::vector<Named>& files) {
    for (const Named& out : files) {
        if (!out.written || is_device(out.path)) {
            continue;
        }
        for (const Named& other : files) {
            if (&other != &out && same_file(other.path, out.path)) {
                throw std::runtime_error(
                        out.option + ": " + out.path + " is the file of " + other.option +
                        ", too, and would take its place");
            }
        }
        const fs::path directory = fs::absolute(out.path).parent_path();
        std::error_code error;
        if (fs::is_directory(out.path, error) || !fs::is_directory(directory, error) ||
            access(directory.c_str(), W_OK) != 0) {
            throw std::runtime_error(out.option + ": " + out.path + ": cannot be created");
        }
    }
}

void check_numbers(const CLI::App& app) {
    for (const CLI::Option* option : app.get_options()) {
        if (option->get_type_name().rfind("FLOAT", 0) != 0) {
            continue;
        }
        for (const std::string& number : option->results()) {
            if (!std::isfinite(std::strtod(number.c_str(), nullptr))) {
                throw std::runtime_error(
                        option->get_name() + ": " + number + " must be a finite number");
            }
        }
    }
}

} // namespace

void check_once(std::vector<int> numbers, const std::string& option) {
    std::sort(numbers.begin(), numbers.end());
    const auto twice = std::adjacent_find(numbers.begin(), numbers.end());
    if (twice != numbers.end()) {
        throw std::runtime_error(
                "--" + option + " has " + std::to_string(*twice) + " more than once");
    }
}

void check_arguments(const CLI::App& app) {
    check_files(files_of(app));
    check_numbers(app);
}

} // namespace faiss_saap::benchs
