/// What IndexAsymmetricIVF must know about the kinds of faiss::IndexIVF.
#pragma once

#include <faiss/IndexIVF.h>

namespace faiss_saap {

/// Makes foreign lists ours: their quantizer is replaced by an empty one that
/// they own, and a direct map of sequential ids by one of any ids.
/// @throws faiss::FaissException when the storage encodes residuals or is of a
///         kind or metric that is not known to work with foreign assignments
void adopt_storage(faiss::IndexIVF& lists);

/// The smallest number of vectors that the codec can be trained with.
size_t min_training_vectors(const faiss::IndexIVF& lists);

/// Whether codes of one can be decoded by the other.
bool same_codec(const faiss::IndexIVF& a, const faiss::IndexIVF& b);

/// Whether the codec needs training and has had none.
bool codec_untrained(const faiss::IndexIVF& lists);

} // namespace faiss_saap
