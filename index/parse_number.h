/// Numbers in files.
#pragma once

#include <charconv>
#include <optional>
#include <string>

namespace faiss_saap {

/// The number that a text is, with a decimal point whatever the process's locale says; none
/// where it is something else, has anything before or behind it, or is out of range.
template <class T>
std::optional<T> parse_number(const std::string& text) {
    T number{};
    const char* end = text.data() + text.size();
    const auto result = std::from_chars(text.data(), end, number);
    if (result.ec != std::errc() || result.ptr != end) {
        return std::nullopt;
    }
    return number;
}

} // namespace faiss_saap
