#include <faiss_saap/AsymmetricParameterSpace.h>

#include <cmath>

#include <faiss/IndexIDMap.h>
#include <faiss/IndexPreTransform.h>
#include <faiss/IndexRefine.h>

#include <faiss_saap/IndexAsymmetricIVF.h>

#include "check.h"

namespace faiss_saap {

namespace {

/// What faiss::ParameterSpace looks for its parameters in.
const faiss::Index* unwrapped(const faiss::Index* index) {
    if (const auto* i = dynamic_cast<const faiss::IndexPreTransform*>(index)) {
        return unwrapped(i->index);
    }
    if (const auto* i = dynamic_cast<const faiss::IndexIDMap*>(index)) {
        return unwrapped(i->index);
    }
    if (const auto* i = dynamic_cast<const faiss::IndexRefine*>(index)) {
        return unwrapped(i->base_index);
    }
    return index;
}

} // namespace

void AsymmetricParameterSpace::initialize(const faiss::Index* index) {
    faiss::ParameterSpace::initialize(index); // those of what is around ours
    const auto* ivf = dynamic_cast<const IndexAsymmetricIVF*>(unwrapped(index));
    if (!ivf) {
        return;
    }
    faiss::ParameterRange& range = add_range("nprobe");
    range.values.clear();
    for (int nprobe = 1; nprobe < ivf->ncell; nprobe *= 2) {
        range.values.push_back(nprobe);
    }
    range.values.push_back(ivf->ncell);
}

void AsymmetricParameterSpace::set_index_parameter(
        faiss::Index* index,
        const std::string& name,
        double value) const {
    auto* ivf = dynamic_cast<IndexAsymmetricIVF*>(index);
    if (!ivf) {
        faiss::ParameterSpace::set_index_parameter(index, name, value);
        return;
    }
    const bool nprobe = name == "nprobe";
    FAISS_THROW_IF_NOT_FMT(
            nprobe || name == "max_codes",
            "parameter '%s' is unknown: there are nprobe and max_codes",
            name.c_str());
    FAISS_THROW_IF_NOT_FMT(
            value >= (nprobe ? 1 : 0) && value <= 9e15 &&
                    value == std::floor(value),
            "parameter %s = %g must be a whole number, at least %d",
            name.c_str(),
            value,
            nprobe ? 1 : 0);
    (nprobe ? ivf->nprobe : ivf->max_codes) = static_cast<size_t>(value);
}

} // namespace faiss_saap
