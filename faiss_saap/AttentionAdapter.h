/// Sparse attention of one sequence through its index.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include <faiss_saap/CellLists.h>
#include <faiss_saap/KvView.h>
#include <faiss_saap/Partition.h>
#include <faiss_saap/ProbePolicy.h>

namespace faiss_saap {

struct AdapterParams {
    int heads_q = 0;  ///< query heads; a multiple of heads_kv
    int heads_kv = 0; ///< KV heads
    int d = 0;        ///< head dimension
    int64_t sink = 16;     ///< first tokens, always attended
    int64_t window = 1024; ///< most recent tokens, the query's own included,
                           ///< always attended
    /// false: the caller attends to sink and window with a kernel of its own
    /// and merges; output and LSE are of the probed far keys alone
    bool attend_dense = true;
    float scale = 0;       ///< multiplies q.k, positive; 0: 1 / sqrt(d)
    int64_t position_offset = 0; ///< position of slot 0, at most 2^40
    /// with this many far keys or fewer, all of them are read
    int64_t dense_below = 64;
    ProbePolicy policy; ///< default of `route` and `attend`
};

/// Cells chosen for some tokens: for row r the cells
/// cells[begin[r]] .. cells[begin[r + 1] - 1]. A row is a token and a KV head
/// (where the group shares its choice) or a token and a query head, heads
/// varying fastest.
struct ProbedCells {
    bool share_group = true;
    std::vector<int64_t> begin; ///< size rows + 1
    std::vector<int32_t> cells;
};

/// What one attended token and query head cost.
struct AttendStats {
    int64_t cells = 0;      ///< cells probed
    int64_t keys_read = 0;  ///< far keys read
    int64_t far_keys = 0;   ///< far keys there are
    float dense_mass = 0;   ///< share of sink and window in the attention mass
                            ///< that was read
    /// head selectivity; 0 where there are no far keys
    double selectivity() const {
        return far_keys ? static_cast<double>(keys_read) / far_keys : 0.0;
    }
};

/// Attention over sink, window and the far keys of the probed cells, for one
/// layer of one sequence. Owns lists of slots, never keys or values: those are
/// read through the caller's view at each call.
///
/// A query at slot i attends to the sink j < sink, the window
/// i - window < j <= i and, of the far keys between them, those in the cells
/// it probes. Output and LSE are of exactly the keys read, each counted once;
/// with every cell probed the answer is dense attention to rounding.
///
/// `append` needs exclusive access; the const methods may run concurrently.
/// They are parallel inside (OpenMP, over tokens, KV heads and pieces of long
/// lists).
class AttentionAdapter {
   public:
    /// @param partitions  one for each KV head
    /// @throws faiss::FaissException naming the parameter that does not fit
    AttentionAdapter(
            const AdapterParams& params,
            std::vector<Partition> partitions);

    const AdapterParams& params() const {
        return params_;
    }
    /// Tokens seen so far.
    int64_t length() const {
        return length_;
    }
    /// Lists of one KV head: the tokens that have left the window.
    const CellLists& lists(int kv_head) const {
        return lists_[kv_head];
    }
    const Partition& partition(int kv_head) const {
        return partitions_[kv_head];
    }
    /// Bytes of all lists.
    size_t bytes_used() const;

    /// Takes note of the tokens length() .. kv.length - 1, whose keys
    /// (post-RoPE) and values are in the view: each enters the window, and the
    /// token that leaves it joins its cell. Bulk and token by token give the
    /// same state.
    /// @throws faiss::FaissException when the view is shorter than length(), of
    ///         another shape, or a new key is not finite; state unchanged
    void append(const KvView& kv);

    /// Attention of the queries of q_len tokens.
    /// @param queries    post-RoPE, size q_len * heads_q * d
    /// @param positions  of the tokens, size q_len; null: the last q_len ones,
    ///                   and every token of the view must have been appended
    /// @param output     size q_len * heads_q * kv.d_v
    /// @param lse        size q_len * heads_q; may be null
    /// @param stats      size q_len * heads_q; may be null
    /// @param policy     null: the adapter's
    /// @throws faiss::FaissException on wrong input; outputs untouched
    void attend(
            const KvView& kv,
            int64_t q_len,
            const float* queries,
            const int64_t* positions,
            float* output,
            float* lse,
            AttendStats* stats = nullptr,
            const ProbePolicy* policy = nullptr) const;

    /// The first half of `attend`: which cells to probe.
    ProbedCells route(
            int64_t q_len,
            const float* queries,
            const int64_t* positions,
            const ProbePolicy* policy = nullptr) const;

    /// The second half of `attend`, with cells from `route` or from elsewhere.
    /// A cell named twice in a row counts once.
    void attend_preassigned(
            const KvView& kv,
            int64_t q_len,
            const float* queries,
            const int64_t* positions,
            const ProbedCells& probed,
            float* output,
            float* lse,
            AttendStats* stats = nullptr) const;

   private:
    struct Zones;
    struct Row;
    /// Slots of the far keys in some cells, ascending, each once.
    std::vector<int32_t> far_slots(
            int kv_head,
            const Zones& zones,
            const int32_t* cells,
            const int32_t* cells_end,
            int64_t* distinct) const;
    Zones zones(int64_t q_len, const int64_t* positions, int64_t token) const;
    void check_queries(
            int64_t q_len,
            const float* queries,
            const int64_t* positions) const;
    void check_view(const KvView& kv) const;
    /// Cells of the keys in slots begin .. end - 1 of one head.
    std::vector<int32_t> assign_keys(
            const KvView& kv,
            int kv_head,
            int64_t begin,
            int64_t end) const;

    AdapterParams params_;
    int group_;
    std::vector<Partition> partitions_;
    /// per KV head; null where vectors need not be rotated back
    std::vector<std::shared_ptr<const RotaryEmbedding>> rotary_;
    std::vector<CellLists> lists_;
    int64_t length_ = 0;
};

} // namespace faiss_saap
