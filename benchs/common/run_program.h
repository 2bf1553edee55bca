/// The shell around every program's main.
#pragma once

#include <cstdio>
#include <exception>

#include <faiss/impl/FaissException.h>

namespace faiss_saap::benchs {

/// The sentence of an exception, without the place in the source that Faiss
/// puts before it.
inline std::string sentence_of(const std::exception& e) {
    std::string text = e.what();
    const size_t failed = text.find("' failed: ");
    const size_t place = text.find(": ", text.find(" at "));
    if (failed != std::string::npos) {
        return text.substr(failed + 10);
    }
    if (text.rfind("Error in ", 0) == 0 && place != std::string::npos) {
        return text.substr(place + 2);
    }
    return text;
}

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
