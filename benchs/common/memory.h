/// What programs that fill the memory check first.
#pragma once

#include <string>

#include <unistd.h>

#include <faiss/impl/FaissAssert.h>

namespace faiss_saap::benchs {

/// @param what  the options and what they make
/// @throws faiss::FaissException where so many bytes are more than the machine has
inline void check_fits_memory(double bytes, const std::string& what) {
    const double memory = double(sysconf(_SC_PHYS_PAGES)) * double(sysconf(_SC_PAGESIZE));
    FAISS_THROW_IF_NOT_FMT(
            bytes <= memory,
            "%s of %g GiB do not fit into a memory of %.0f GiB",
            what.c_str(),
            bytes / (1u << 30),
            memory / (1u << 30));
}

} // namespace faiss_saap::benchs
