/// What IndexAsymmetricIVF must know about the kinds of faiss::IndexIVF.
#pragma once

#include <faiss/IndexIVF.h>

namespace faiss_saap {

/// Beyond it the size of a list in a file could not be told from damage.
constexpr int kMostDimensions = 1 << 20;

/// Makes foreign lists ours: their quantizer is replaced by an empty one that
/// they own, and a direct map of sequential ids by one of any ids.
/// @throws faiss::FaissException when the storage encodes residuals, is of a
///         kind or metric that is not known to work with foreign assignments, or
///         holds negative ids
void adopt_storage(faiss::IndexIVF& lists);

/// The smallest number of vectors that the codec can be trained with.
size_t min_training_vectors(const faiss::IndexIVF& lists);

/// Whether codes of one can be decoded by the other.
bool same_codec(const faiss::IndexIVF& a, const faiss::IndexIVF& b);

/// Whether the codec needs training and has had none.
bool codec_untrained(const faiss::IndexIVF& lists);

/// @throws faiss::FaissException when the codec would make an infinity of a component
/// @param x  size n * lists.d, finite
void check_encodable(const faiss::IndexIVF& lists, int64_t n, const float* x);

/// fn(id, cell, offset in its list) of every vector.
template <class Fn>
void for_each_id(const faiss::IndexIVF& lists, const Fn& fn) {
    for (size_t c = 0; c < lists.nlist; c++) {
        const faiss::InvertedLists::ScopedIds ids(lists.invlists, c);
        const size_t size = lists.invlists->list_size(c);
        for (size_t i = 0; i < size; i++) {
            fn(ids[i], c, i);
        }
    }
}

} // namespace faiss_saap
