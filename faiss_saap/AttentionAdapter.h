/// Sparse attention of a batch of sequences through their indexes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <faiss_saap/CellLists.h>
#include <faiss_saap/KeyCodes.h>
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
    /// false: the caller attends to sink and window with a kernel of its own;
    /// what is computed here is of the probed far keys alone
    bool attend_dense = true;
    float scale = 0;       ///< multiplies q.k, positive; 0: 1 / sqrt(d)
    int64_t position_offset = 0; ///< position of slot 0, at most 2^40
    /// with this many far keys or fewer, all of them are read
    int64_t dense_below = 64;
    /// keep a 4-bit code of each far key (`KeyCodes`), which policies with
    /// refine > 1 rank keys by
    bool key_codes = false;
    ProbePolicy policy; ///< default of `route` and `attend`
};

/// Partitions of each KV head: partitions[h] are probed together, each with its
/// share of the budget, and a key that two of them reach is read once. Heads
/// may have different ones; the adapter's and the sequence's together must be
/// at least one for each head.
using HeadPartitions = std::vector<std::vector<Partition>>;

/// One sequence of a batch, and its tokens that ask.
struct SequenceInput {
    int64_t sequence = 0; ///< from `create`, `fork` or `load`
    KvView kv;
    int64_t q_len = 1; ///< tokens that ask
    /// of those tokens, size q_len; null: the last q_len ones, and every token
    /// of the view must have been appended
    const int64_t* positions = nullptr;
};

/// Cells chosen for some tokens: for row r the cells
/// cells[begin[r]] .. cells[begin[r + 1] - 1]. A row is a token and a KV head
/// (where the group shares its choice) or a token and a query head, heads
/// varying fastest, tokens in the order of the batch. The cells of a head's
/// second partition are numbered on from those of its first, and so on.
struct ProbedCells {
    bool share_group = true;
    std::vector<int64_t> begin; ///< size rows + 1
    std::vector<int32_t> cells;
};

/// What one attended token and query head cost.
struct AttendStats {
    int64_t cells = 0;      ///< distinct cells probed, of all partitions
    int64_t keys_read = 0;  ///< distinct far keys read
    int64_t far_keys = 0;   ///< far keys there are
    float dense_mass = 0;   ///< share of sink and window in the attention mass
                            ///< of the output
    int32_t keys_ranked = 0; ///< distinct far keys compared by their codes
    /// head selectivity; 0 where there are no far keys
    double selectivity() const {
        return far_keys ? static_cast<double>(keys_read) / far_keys : 0.0;
    }
};

/// Where the results go. A row is a token of the batch and a query head, heads
/// varying fastest.
struct AttendOutput {
    float* output = nullptr;      ///< size rows * d_v
    float* lse = nullptr;         ///< size rows; may be null without merge
    AttendStats* stats = nullptr; ///< size rows; may be null
    /// true: output and lse already hold results over other keys (from a kernel
    /// of the caller's, say) and become those of the union
    bool merge = false;
};

/// Attention over sink, window and the far keys of the probed cells, for one
/// layer and any number of sequences. Owns lists of slots, never keys or
/// values: those are read through the caller's view at each call.
///
/// A query at slot i attends to the sink j < sink, the window
/// i - window < j <= i and, of the far keys between them, those in the cells
/// it probes. Output and LSE are of exactly the keys read, each counted once;
/// with every cell probed the answer is dense attention to rounding.
///
/// The const methods may run concurrently; all others need exclusive access.
/// All are parallel inside (OpenMP), over sequences, tokens, KV heads and
/// pieces of long lists.
///
/// Every method that takes a sequence throws when it was freed or never made.
class AttentionAdapter {
   public:
    /// @param partitions  of every sequence, learnt offline; may be empty when
    ///                    each sequence brings its own
    /// @throws faiss::FaissException naming the parameter that does not fit
    explicit AttentionAdapter(
            const AdapterParams& params,
            HeadPartitions partitions = {});
    /// The same with one partition for each KV head.
    AttentionAdapter(
            const AdapterParams& params,
            const std::vector<Partition>& partitions);
    ~AttentionAdapter();
    AttentionAdapter(AttentionAdapter&&) noexcept;
    AttentionAdapter& operator=(AttentionAdapter&&) noexcept;

    const AdapterParams& params() const {
        return params_;
    }

    /// An empty sequence.
    /// @param own  partitions of this sequence alone, such as those that
    ///             `sequence_partitions` learns from its prefill; they come
    ///             after the adapter's
    /// @return its number; numbers are never used again
    int64_t create(const HeadPartitions& own = {});
    /// A sequence that begins as a copy: lists are shared until one of both
    /// changes them. Takes time by the number of cells, whose statistics are copied
    /// (and a pointer for every 4,096 tokens, with key_codes for every 128).
    int64_t fork(int64_t sequence);
    /// Ends a sequence; its memory is used for others.
    void free(int64_t sequence);
    /// Makes a sequence empty; it keeps its partitions.
    void reset(int64_t sequence);

    /// Takes note of the tokens length() .. kv.length - 1, whose keys
    /// (post-RoPE) and values are in the view: each enters the window, and the
    /// token that leaves it joins its cells. Bulk and token by token give the
    /// same state, to the bit where key assigners are flat quantizers. O(1) per
    /// token.
    /// @throws faiss::FaissException when the view is shorter than length(), of
    ///         another shape, or a new key is not finite or has a squared norm
    ///         that is not; state unchanged
    void append(int64_t sequence, const KvView& kv);
    /// Forgets the tokens from `length` on, as after rejected speculation. The
    /// state is as if they had never been appended. Where statistics are kept,
    /// the keys of the cells that lose one are read again.
    /// @param kv  read where statistics are kept; must hold the tokens that
    ///            stay
    void truncate(int64_t sequence, int64_t length, const KvView& kv);

    /// Tokens seen so far.
    int64_t length(int64_t sequence) const;
    /// Number of partitions of a KV head.
    int npartition(int64_t sequence, int kv_head) const;
    const Partition& partition(
            int64_t sequence,
            int kv_head,
            int partition = 0) const;
    /// Lists of one KV head and partition: the tokens that have left the
    /// window.
    const CellLists& lists(
            int64_t sequence,
            int kv_head,
            int partition = 0) const;
    /// Codes of a KV head's far keys: the tokens that have left the window.
    /// @throws faiss::FaissException where none are kept
    const KeyCodes& codes(int64_t sequence, int kv_head) const;
    /// Bytes of all lists, their statistics and codes, exactly as they were asked
    /// for: what sequences share is counted once, and blocks that wait to be used
    /// again are counted. What partitions hold (centroids, networks) is not, nor the
    /// allocator's own and the counters of shared blocks, some 24 for each.
    size_t bytes_used() const;

    /// Writes the state of a sequence, its own partitions included. The
    /// adapter's partitions are not written; the file remembers a checksum of
    /// them.
    /// @throws faiss::FaissException when the file cannot be written or a
    ///         partition has no file form; no file is left
    void save(int64_t sequence, const std::string& path) const;
    /// A sequence as it was saved; the caller's cache must hold the same keys.
    /// @throws faiss::FaissException when the file is damaged, or was saved by
    ///         an adapter with other partitions, d, heads_kv, sink, window,
    ///         position_offset or key_codes: what the state depends on
    int64_t load(const std::string& path);

    /// Attention of the queries of a batch.
    /// @param queries  post-RoPE, size rows * d
    /// @param policy   null: the adapter's
    /// @throws faiss::FaissException on wrong input; outputs untouched
    void attend(
            const std::vector<SequenceInput>& batch,
            const float* queries,
            const AttendOutput& out,
            const ProbePolicy* policy = nullptr) const;

    /// The first half of `attend`: which cells to probe (with policy.refine,
    /// those whose keys are to be ranked). The views are not read.
    ProbedCells route(
            const std::vector<SequenceInput>& batch,
            const float* queries,
            const ProbePolicy* policy = nullptr) const;

    /// The second half of `attend`, with cells from `route` or from elsewhere.
    /// A cell named twice in a row counts once.
    /// @param policy  where it refines, only those keys of the cells are read
    ///                that it allows, ranked by their codes; null: all keys of
    ///                the cells, also where the adapter's own policy refines
    void attend_preassigned(
            const std::vector<SequenceInput>& batch,
            const float* queries,
            const ProbedCells& probed,
            const AttendOutput& out,
            const ProbePolicy* policy = nullptr) const;

   private:
    struct Sequence;
    struct Call;
    Sequence& at(int64_t sequence);
    const Sequence& at(int64_t sequence) const;
    int64_t insert(std::unique_ptr<Sequence> sequence);
    std::unique_ptr<Sequence> make_sequence(const HeadPartitions& own) const;
    void check_view(const KvView& kv, int64_t length) const;
    void truncate_lists(
            Sequence& sequence,
            int kv_head,
            int64_t size,
            const KvView& kv) const;

    /// Throws where a policy is invalid, or refines and there are no codes.
    void check_policy(const ProbePolicy& policy) const;

    AdapterParams params_;
    int group_ = 0;
    HeadPartitions partitions_; ///< of every sequence
    /// Lists of a KV head grow in one pool, so that heads are independent.
    std::vector<std::shared_ptr<SlotPool>> pools_;
    std::map<int64_t, std::unique_ptr<Sequence>> sequences_;
    int64_t next_sequence_ = 0;
};

/// Partitions for one sequence, learnt from its keys as the cache holds them
/// (post-RoPE k-means, queries by inner product), in the order that `create`
/// takes: one for each KV head.
/// @param kv     its prefill; slots begin .. end - 1 are read
/// @param ncell  cells; N/16 to N/64 of N keys is the useful range
/// @throws faiss::FaissException when there are fewer keys than cells, or keys
///         that are not finite
HeadPartitions sequence_partitions(
        const KvView& kv,
        int64_t begin,
        int64_t end,
        int ncell,
        const KMeansParams& params = {});
/// The same with a number of cells for each KV head; none where it is 0.
/// @param ncell  size kv.heads
HeadPartitions sequence_partitions(
        const KvView& kv,
        int64_t begin,
        int64_t end,
        const std::vector<int>& ncell,
        const KMeansParams& params = {});

} // namespace faiss_saap
