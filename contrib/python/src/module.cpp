/// The extension module behind the Python package.
#include <string>

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <faiss/impl/FaissException.h>

#include <faiss_saap/sentence_of.h>
#include <faiss_saap/version.h>

#include "bind.h"

namespace nb = nanobind;
using namespace faiss_saap;

NB_MODULE(_core, m) {
    m.doc() = "Sparse attention with an asymmetric IVF partition: what the "
              "C++ library of the same name does, over numpy arrays and DLPack "
              "tensors. Errors are faiss_saap.Error with the library's "
              "sentence. The interpreter's lock is released while it works; "
              "what changes an object needs exclusive access to it, as in C++.";
    m.attr("__version__") = FAISS_SAAP_VERSION;
#ifdef FAISS_SAAP_WITH_CUDA
    m.attr("has_cuda") = true;
#else
    m.attr("has_cuda") = false;
#endif

    static PyObject* error = nullptr;
    const std::string module_name = nb::cast<std::string>(m.attr("__name__"));
    error = PyErr_NewExceptionWithDoc(
            (module_name + ".Error").c_str(),
            "Whatever the library refuses or cannot do; says what and why.",
            PyExc_RuntimeError,
            nullptr);
    m.attr("Error") = nb::borrow(error);
    nb::register_exception_translator(
            [](const std::exception_ptr& p, void*) {
                try {
                    std::rethrow_exception(p);
                } catch (const faiss::FaissException& e) {
                    PyErr_SetString(error, sentence_of(e).c_str());
                }
            });

    python::bind_assigners(m);
    python::bind_training(m);
    python::bind_index(m);
    python::bind_attention(m);
    python::bind_adapter(m);
#ifdef FAISS_SAAP_WITH_CUDA
    python::bind_gpu(m);
#endif
}
