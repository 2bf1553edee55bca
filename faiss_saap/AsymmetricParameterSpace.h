/// Parameters by name, for tuning tools.
#pragma once

#include <string>

#include <faiss/AutoTune.h>

namespace faiss_saap {

/// faiss::ParameterSpace that also knows IndexAsymmetricIVF, by itself or in a
/// faiss::IndexPreTransform, IndexIDMap or IndexRefine: "nprobe" and "max_codes".
/// `set_index_parameters(index, "nprobe=32,max_codes=4096")` and
/// `explore` work as in Faiss.
struct AsymmetricParameterSpace : faiss::ParameterSpace {
    void initialize(const faiss::Index* index) override;
    /// @throws faiss::FaissException for an unknown name or a value that is
    ///         not a whole number in range
    void set_index_parameter(
            faiss::Index* index,
            const std::string& name,
            double value) const override;
};

} // namespace faiss_saap
