/// What to show a person of an exception.
#pragma once

#include <exception>
#include <string>

namespace faiss_saap {

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

} // namespace faiss_saap
