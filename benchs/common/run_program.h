/// The shell around every program's main.
#pragma once

#include <cstdio>
#include <exception>
#include <new>
#include <stdexcept>

#include <faiss_saap/sentence_of.h>

#include "arguments.h"

namespace faiss_saap::benchs {

/// Runs a program's body, once its arguments are checked; an exception becomes one
/// sentence on stderr and exit code 1.
/// @param app  after it has read the arguments
template <class Body>
int run_program(const CLI::App& app, const Body& body) {
    try {
        check_arguments(app);
        body();
        if (std::fflush(stdout) != 0 || std::ferror(stdout)) {
            throw std::runtime_error("what was printed could not be written");
        }
        return 0;
    } catch (const std::bad_alloc&) {
        std::fprintf(stderr, "error: out of memory: the arguments ask for more than there is\n");
        return 1;
    } catch (const std::exception& e) {
        std::fprintf(stderr, "error: %s\n", sentence_of(e).c_str());
        return 1;
    }
}

} // namespace faiss_saap::benchs
