/// Parsing JSON that comes from files.
#pragma once

#include <string>

#include <nlohmann/json.hpp>

namespace faiss_saap {

/// The parsed text, or null where it is no JSON or nests deeper than any file
/// of ours (nlohmann's own functions recurse once per level).
inline nlohmann::json parse_shallow_json(const char* begin, const char* end) {
    bool too_deep = false;
    const auto callback = [&too_deep](int depth, auto, auto&) {
        too_deep |= depth > 4;
        return !too_deep;
    };
    auto j = nlohmann::json::parse(begin, end, callback, false);
    return too_deep || j.is_discarded() ? nlohmann::json() : j;
}

} // namespace faiss_saap
