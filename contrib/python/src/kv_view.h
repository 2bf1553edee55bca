/// A KvView together with the arrays that it reads.
#pragma once

#include <faiss_saap/KvView.h>

#include "arrays.h"

namespace faiss_saap::python {

/// What Python calls KvView. Holds the arrays, so that they live as long.
struct ArrayView {
    KvView kv;
    AnyArray k, v, page_table;
    int64_t capacity = 0; ///< tokens that the arrays (or the table) hold
};

} // namespace faiss_saap::python
