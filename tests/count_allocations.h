/// Counts calls of operator new in the test program.
#pragma once

#include <cstdint>

namespace faiss_saap::tests {

/// Allocations of this thread so far.
int64_t allocations();

/// Not with clang's thread sanitizer.
bool counts_allocations();

} // namespace faiss_saap::tests
