/// Counts calls of operator new in the test program.
#pragma once

#include <cstdint>

namespace faiss_saap::tests {

/// Allocations of this thread so far.
int64_t allocations();

} // namespace faiss_saap::tests
