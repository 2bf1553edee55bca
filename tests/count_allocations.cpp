// A file of its own: inlined, the replacements look mismatched to g++.
#include "count_allocations.h"

#include <cstdlib>
#include <new>

namespace {

thread_local int64_t count = 0;

} // namespace

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

namespace faiss_saap::tests {

int64_t allocations() {
    return count;
}

} // namespace faiss_saap::tests
