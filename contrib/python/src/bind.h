/// The parts of the module, one function for each source file.
#pragma once

#include <nanobind/nanobind.h>

namespace faiss_saap::python {

void bind_adapter(nanobind::module_& m);
void bind_assigners(nanobind::module_& m);
void bind_attention(nanobind::module_& m);
void bind_gpu(nanobind::module_& m); ///< in builds with CUDA
void bind_index(nanobind::module_& m);
void bind_training(nanobind::module_& m);

} // namespace faiss_saap::python
