/// What IndexAsymmetricIVF must know about the kinds of faiss::IndexIVF.
#pragma once

#include <faiss/IndexIVF.h>

namespace faiss_saap {

/// @throws faiss::FaissException when the storage encodes residuals or is of a
///         kind that is not known to work with foreign assignments
void check_storage(const faiss::IndexIVF& lists);

/// The smallest number of vectors that the codec can be trained with.
size_t min_training_vectors(const faiss::IndexIVF& lists);

/// Whether codes of one can be decoded by the other.
bool same_codec(const faiss::IndexIVF& a, const faiss::IndexIVF& b);

/// Whether the codec needs training and has had none.
bool codec_untrained(const faiss::IndexIVF& lists);

} // namespace faiss_saap
