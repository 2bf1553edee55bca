/// Recorded queries, keys and values of a model on a text.
#pragma once

#include <string>
#include <vector>

#include <faiss_saap/SafetensorsFile.h>
#include <faiss_saap/rope.h>

namespace faiss_saap {

/// A trace file: safetensors with, for each recorded layer l, the tensors
/// layer.l.q (heads_q, tokens, d), layer.l.k and layer.l.v
/// (heads_kv, tokens, d), pre-RoPE. Tensors stay in the mapped file until one
/// head of them is read. Immutable; safe to share between threads.
class Trace {
   public:
    /// @throws faiss::FaissException when the file is no trace: the sentence
    ///         names the file, the tensor and what is wrong with it
    explicit Trace(const std::string& path);

    int64_t tokens = 0;
    int heads_q = 0;  ///< in the file
    int heads_kv = 0; ///< in the file
    int d = 0;        ///< head dimension
    std::vector<int> layers;
    std::vector<int> kv_heads; ///< the model's numbers of the file's KV heads
    std::string model, text;
    RopeParams rope;

    int group() const {
        return heads_q / heads_kv;
    }
    /// Place in the file of the model's KV head `head`.
    /// @throws faiss::FaissException when the file does not hold it
    int kv_index(int head) const;

    /// One head as float, pre-RoPE, size tokens * d. Heads count within the
    /// file.
    /// @throws faiss::FaissException for a layer that is not in `layers`, a head
    ///         that is not there, or values that are not finite
    std::vector<float> queries(int layer, int head) const;
    std::vector<float> keys(int layer, int kv_head) const;
    std::vector<float> values(int layer, int kv_head) const;

   private:
    std::vector<float> head(
            int layer,
            const char* what,
            int heads,
            int head) const;
    SafetensorsFile file_;
};

} // namespace faiss_saap
