/// What an iterable of Python holds.
#pragma once

#include <vector>

#include <nanobind/nanobind.h>

#include <faiss/impl/FaissAssert.h>

namespace faiss_saap::python {

namespace nb = nanobind;

/// Copies of its elements, in order: whose they are may change or vanish while the library
/// works on them without the interpreter's lock.
/// @param name  of the argument
/// @param type  of its elements, as Python calls them
/// @throws faiss::FaissException naming an element of another type
template <class T>
std::vector<T> copies_of(const nb::object& iterable, const char* name, const char* type) {
    std::vector<T> all;
    for (const nb::handle one : iterable) {
        T* element = nullptr;
        FAISS_THROW_IF_NOT_FMT(
                nb::try_cast(one, element) && element,
                "%s[%zd] is a %s, expected a %s",
                name,
                all.size(),
                nb::type_name(one.type()).c_str(),
                type);
        all.push_back(*element);
    }
    return all;
}

} // namespace faiss_saap::python
