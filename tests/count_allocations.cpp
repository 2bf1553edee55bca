// A file of its own: inlined, the replacements look mismatched to g++.
#include "count_allocations.h"

#include <cstdlib>
#include <new>

#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define FAISS_SAAP_OPERATORS_TAKEN // clang's runtime has replaced them itself
#endif
#endif

namespace {

thread_local int64_t count = 0;

} // namespace

#ifndef FAISS_SAAP_OPERATORS_TAKEN

void* operator new(size_t size) {
    count++;
    if (void* p = std::malloc(size)) {
        return p;
    }
    throw std::bad_alloc();
}

void operator delete(void* p) noexcept {
    std::free(p);
}

void operator delete(void* p, size_t) noexcept {
    std::free(p);
}

#endif

namespace faiss_saap::tests {

bool counts_allocations() {
#ifdef FAISS_SAAP_OPERATORS_TAKEN
    return false;
#else
    return true;
#endif
}

int64_t allocations() {
    return count;
}

} // namespace faiss_saap::tests
