/// The one place that knows which Faiss is underneath. Faiss 1.7.3 (Debian 12)
/// is the baseline; later versions are told apart by what they declare and not
/// by FAISS_VERSION_*, which some releases carry wrongly.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

#include <faiss/Index.h>
#include <faiss/IndexIVF.h>
#include <faiss/impl/FaissAssert.h>

namespace faiss_saap {

/// Vector ids: `faiss::Index::idx_t` up to 1.7.3, `faiss::idx_t` since.
using idx_t = decltype(faiss::Index::ntotal);

namespace compat {

template <class Ivf, class = void>
struct has_train_encoder : std::false_type {};
template <class Ivf>
struct has_train_encoder<
        Ivf,
        std::void_t<decltype(std::declval<Ivf&>().train_encoder(
                idx_t(0), nullptr, nullptr))>> : std::true_type {};

/// Trains the codec of the inverted lists on plain vectors: `train_residual`
/// up to Faiss 1.7.3, `train_encoder` (which wants assignments it does not
/// read without residuals) since.
/// @param x  size n * ivf.d
template <class Ivf>
void train_codec(Ivf& ivf, idx_t n, const float* x) {
    if constexpr (has_train_encoder<Ivf>::value) {
        std::vector<idx_t> assign(n, 0);
        ivf.train_encoder(n, x, assign.data());
    } else {
        ivf.train_residual(n, x);
    }
}

} // namespace compat
} // namespace faiss_saap
