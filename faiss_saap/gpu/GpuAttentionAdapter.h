/// Sparse attention of a batch of sequences on the device. Compiles without
/// CUDA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include <faiss_saap/AttentionAdapter.h>
#include <faiss_saap/gpu/device.h>

namespace faiss_saap::gpu {

class GpuAttentionAdapter;

/// Sequences that are appended to and attended together, laid down on the
/// device once and used for any number of steps, also inside a CUDA graph. Made
/// by GpuAttentionAdapter::plan; must outlive graphs that were captured with it.
/// Its destructor waits for the device, unless it was released before.
class GpuBatch {
   public:
    ~GpuBatch();
    GpuBatch(const GpuBatch&) = delete;
    GpuBatch& operator=(const GpuBatch&) = delete;

    /// Tokens of all its sequences: the rows of queries and outputs, divided by
    /// heads_q.
    int64_t tokens() const;
    /// Cells that one row may probe: of all partitions of a KV head, at most.
    int64_t cells() const;
    /// Device memory of its work space.
    size_t bytes_used() const;

    /// Gives its memory back after the stream's work so far, without waiting: for
    /// batches of another composition at every step. Cannot be used again.
    void release(cudaStream_t stream);

   private:
    friend class GpuAttentionAdapter;
    struct State;
    explicit GpuBatch(std::unique_ptr<State> state);
    std::unique_ptr<State> state_;
};

/// Cells chosen for the rows of a batch (see ProbedCells). Device memory.
struct GpuProbedCells {
    bool share_group = true;
    int64_t stride = 0;       ///< room for the cells of a row
    int32_t* cells = nullptr; ///< size rows * stride
    int32_t* count = nullptr; ///< cells of each row, size rows
};

/// Lists of one KV head and partition, copied to the host.
struct GpuListsCopy {
    std::vector<std::vector<int32_t>> slots; ///< of each cell, ascending
    std::vector<float> means;                ///< size ncell * d, or empty
};

/// AttentionAdapter on the device: the same parameters, partitions, semantics
/// and results (to rounding), with device pointers and a stream. Owns lists of
/// slots, never keys or values.
///
/// `step`, or its parts `append` and `attend`, launch kernels and do nothing else:
/// no copy, no allocation, no synchronisation. They can be captured in a CUDA graph
/// and replayed while the sequences grow, within the tokens that were reserved for
/// them.
///
/// Here are built: head dimensions 64, 96, 128 and 256 (values likewise),
/// float16 and bfloat16 caches whose rows begin at multiples of 16 bytes and whose
/// keys and values each span at most 60 GiB, outputs that begin at such a multiple
/// too, groups up to 16 query heads, up to 8,192 cells, and partitions whose key
/// assigner is a QuantizerAssigner over faiss::IndexFlat and whose query assigner is
/// one of these, a CellMeanAssigner, a QueryClassifier or a BlendAssigner. All else
/// is refused.
///
/// Errors. What the host can see is thrown at once, nothing changed. What only
/// kernels can see (a key that is not finite, a hole in a page table, a sequence
/// beyond its reserve during a replay) makes the sequence's part of that call a
/// no-op, and is thrown by the next call or by `check`, with the stage's name.
/// Out of device memory is an exception that leaves all as it was. Other faults
/// of the device surface at a synchronisation and say that the context is lost.
///
/// Not synchronised: one thread at a time. Calls on one sequence belong on one
/// stream, or must be ordered by the caller.
class GpuAttentionAdapter {
   public:
    /// @param params      as of AttentionAdapter
    /// @param partitions  of every sequence; may be empty when each sequence
    ///                    brings its own
    /// @throws faiss::FaissException naming what does not fit
    explicit GpuAttentionAdapter(
            const AdapterParams& params,
            HeadPartitions partitions = {},
            int device = 0);
    GpuAttentionAdapter(
            const AdapterParams& params,
            const std::vector<Partition>& partitions,
            int device = 0);
    ~GpuAttentionAdapter();
    GpuAttentionAdapter(const GpuAttentionAdapter&) = delete;
    GpuAttentionAdapter& operator=(const GpuAttentionAdapter&) = delete;

    const AdapterParams& params() const {
        return params_;
    }
    int device() const {
        return device_;
    }

    /// An empty sequence.
    /// @param own      partitions of this sequence alone
    /// @param reserve  tokens to make room for; at most 2^22
    int64_t create(
            const HeadPartitions& own = {},
            int64_t reserve = 4096,
            cudaStream_t stream = nullptr);
    /// A sequence that begins as a copy: its lists are copied (about 2 % of the
    /// cache that they index).
    int64_t fork(int64_t sequence, cudaStream_t stream = nullptr);
    /// Ends a sequence; its memory is used again after the stream's work so far.
    void free(int64_t sequence, cudaStream_t stream = nullptr);
    /// Makes a sequence empty; it keeps its partitions and its reserve.
    void reset(int64_t sequence, cudaStream_t stream = nullptr);
    /// Makes room for `tokens` tokens in all. Without it, `append` makes room as
    /// needed, except inside a graph.
    void reserve(
            int64_t sequence,
            int64_t tokens,
            cudaStream_t stream = nullptr);

    /// Lays a batch down. The views' pointers, page tables included, are device
    /// memory and are read by later calls; kv.length is the number of slots that
    /// the buffers have room for, of which the first length() + q_len must be
    /// filled when `append` runs. Page tables may change between calls.
    ///
    /// In each step, q_len tokens of a sequence are appended, and the last q_len
    /// tokens attend.
    /// @param batch  `positions` must be null; d_v must be d; all of one type
    std::unique_ptr<GpuBatch> plan(
            const std::vector<SequenceInput>& batch,
            cudaStream_t stream = nullptr) const;

    /// Takes note of the next q_len tokens of each sequence (see
    /// AttentionAdapter::append).
    void append(const GpuBatch& batch, cudaStream_t stream = nullptr);
    /// Forgets the tokens from `length` on. Synchronises.
    void truncate(
            int64_t sequence,
            int64_t length,
            const KvView& kv,
            cudaStream_t stream = nullptr);

    /// Attention of the batch's queries.
    /// @param queries  post-RoPE, of the caches' type, size tokens * heads_q * d
    /// @param out      device memory; outputs are float32
    /// @param policy   null: the adapter's
    /// @throws faiss::FaissException also when a q_len exceeds 64
    void attend(
            const GpuBatch& batch,
            const void* queries,
            const AttendOutput& out,
            const ProbePolicy* policy = nullptr,
            cudaStream_t stream = nullptr) const;
    /// A decode step: append(batch), then attend(batch, ...). Keys of the window may be
    /// assigned ahead: what the cache holds of a token stays until it is truncated.
    ///
    /// It is one launch, and so is attend(batch, ...) alone, where
    /// - each sequence has one token and each KV head one partition,
    /// - the policy chooses for groups, of at most 8 query heads,
    /// - no assigner reads cell means,
    /// - the head dimension is 64, 96 or 128,
    /// - the device has compute capability 9.0 or later, and
    /// - rows do not read so much that a cluster for each leaves too many processors
    ///   idle, as with most keys of one or two KV heads, unless sink and window have room for
    ///   all of every cache (kv.length): then rows, KV heads of sequences, have as many blocks
    ///   as there is room for, if they are at most twice as many as processors.
    /// Otherwise it is the launches of append, route and attend_preassigned. The
    /// outputs of a sequence whose append is refused by the kernels are unspecified. Where
    /// only what is read meets a hole of the page table, the token is appended.
    void step(
            const GpuBatch& batch,
            const void* queries,
            const AttendOutput& out,
            const ProbePolicy* policy = nullptr,
            cudaStream_t stream = nullptr);
    /// The first half of `attend`. Cells are chosen as AttentionAdapter chooses
    /// them, except where scores differ by rounding (relative 1e-5).
    /// @param probed  where the cells go: the batch's rows, with a stride of at
    ///                least batch.cells()
    void route(
            const GpuBatch& batch,
            const void* queries,
            const GpuProbedCells& probed,
            const ProbePolicy* policy = nullptr,
            cudaStream_t stream = nullptr) const;
    /// The second half of `attend`. A cell named twice in a row counts once; one
    /// that is not there is left out and raises a fault.
    void attend_preassigned(
            const GpuBatch& batch,
            const void* queries,
            const GpuProbedCells& probed,
            const AttendOutput& out,
            cudaStream_t stream = nullptr) const;

    /// Tokens seen so far. Synchronises.
    int64_t length(int64_t sequence, cudaStream_t stream = nullptr) const;
    /// Number of partitions of a KV head.
    int npartition(int64_t sequence, int kv_head) const;
    /// A copy of some lists. Synchronises.
    GpuListsCopy lists(
            int64_t sequence,
            int kv_head,
            int partition = 0,
            cudaStream_t stream = nullptr) const;
    /// Device memory of the lists and their statistics, reserves included.
    /// What partitions and batches hold is not counted.
    size_t bytes_used() const;

    /// Throws what kernels have raised up to now; the caller synchronises first
    /// to hear of all.
    void check() const;

   private:
    struct Lowered;
    struct Sequence;
    struct Fault;

    Sequence& at(int64_t sequence) const;
    int64_t insert(std::unique_ptr<Sequence> sequence);
    std::unique_ptr<Sequence> make_sequence(
            std::vector<std::shared_ptr<const Lowered>> partitions,
            int64_t reserve,
            cudaStream_t stream) const;
    void check_view(const KvView& kv) const;
    void check_batch(const GpuBatch& batch, bool attends) const;
    void check_policy(const GpuBatch& batch, const ProbePolicy& policy) const;
    void prepare_append(const GpuBatch& batch, cudaStream_t stream);
    void start_route(
            const GpuBatch& batch,
            const void* queries,
            const GpuProbedCells& probed,
            const ProbePolicy& policy,
            bool plans, ///< for start_attend
            cudaStream_t stream) const;
    void start_decode(
            const GpuBatch& batch,
            const void* queries,
            const AttendOutput& out,
            const ProbePolicy& policy,
            bool appends,
            cudaStream_t stream) const;
    /// All that attend and step check.
    /// @return the policy, or the adapter's
    const ProbePolicy& check_attend(
            const GpuBatch& batch,
            const void* queries,
            const AttendOutput& out,
            const ProbePolicy* policy) const;
    void check_output(
            const GpuBatch& batch,
            const void* queries,
            const AttendOutput& out) const;
    void start_attend(
            const GpuBatch& batch,
            const void* queries,
            const GpuProbedCells& probed,
            bool planned, ///< by start_route
            const AttendOutput& out,
            cudaStream_t stream) const;

    AdapterParams params_;
    int group_ = 0, device_ = 0, processors_ = 0;
    int64_t number_ = 0; ///< of this adapter, among all of the process
    size_t route_room_ = 0; ///< shared memory of a block that routes
    int team_blocks_ = 1; ///< blocks that may score one row's cells together
    std::unique_ptr<Fault> fault_;
    std::vector<std::shared_ptr<const Lowered>> partitions_; ///< by KV head
    std::map<int64_t, std::unique_ptr<Sequence>> sequences_;
    int64_t next_sequence_ = 0;
};

} // namespace faiss_saap::gpu
