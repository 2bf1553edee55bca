/// What programs do with options alike.
#pragma once

#include <string>
#include <vector>

#include <CLI/CLI.hpp>

namespace faiss_saap::benchs {

constexpr char kInput[] = "INPUT", kOutput[] = "OUTPUT"; ///< files, as --help shows them

/// A file that is read, or several.
template <class T>
CLI::Option* add_input(CLI::App& app, const char* name, T& path, const char* help) {
    return app.add_option(name, path, help)->type_name(kInput);
}

/// A file that is written.
inline CLI::Option* add_output(
        CLI::App& app,
        const char* name,
        std::string& path,
        const char* help) {
    return app.add_option(name, path, help)->type_name(kOutput);
}

/// A number of at least one.
template <class T>
void add_number(
        CLI::App& app,
        const char* name,
        T& value,
        const char* help) {
    app.add_option(name, value, help)
            ->check(CLI::PositiveNumber)
            ->capture_default_str();
}

/// Before any work: a file that is written must not be another of those that were given, and it
/// must be possible to create it; numbers must be finite and within 64 bits, which CLI11 lets
/// pass; a list has nothing more than once.
/// @param app  after it has read the arguments
/// @throws std::runtime_error naming the option and its value
void check_arguments(const CLI::App& app);

} // namespace faiss_saap::benchs
