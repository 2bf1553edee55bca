/// The shell around every program's main.
#pragma once

#include <cstdio>
#include <exception>

#include <faiss_saap/sentence_of.h>

namespace faiss_saap::benchs {

/// Runs a program's body; an exception becomes one sentence on stderr and exit
/// code 1.
template <class Body>
int run_program(const Body& body) {
    try {
        body();
        return 0;
    } catch (const std::exception& e) {
        std::fprintf(stderr, "error: %s\n", sentence_of(e).c_str());
        return 1;
    }
}

} // namespace faiss_saap::benchs
