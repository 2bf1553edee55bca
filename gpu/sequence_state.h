/// What the kernels know of a sequence. Plain structs, shared by host and
/// device; pointers are device memory unless said otherwise.
#pragma once

#include <cstddef>
#include <cstdint>

#include <faiss_saap/gpu/extents.h>
#include <faiss_saap/host_device.h>

namespace faiss_saap::gpu {

// --- Assigners -------------------------------------------------------------

/// The inverse rotation; no frequencies: none.
struct DeviceRotary {
    const double* inverse_frequency = nullptr; ///< size d / 2
    int interleaved = 0;
    float shrink = 1; ///< 1 / magnitude
};

/// Which vectors the rows of an assigner are multiplied with.
enum class RowInput : int { none, pre_rope, post_rope, hidden };

constexpr int kMaxLayers = 2 + 2 * 16;

/// A CellAssigner as kernels see it: for query head g
///     linear = rows[network(g)] x + bias,
/// x being the vector or what a network makes of it, and the score is linear
/// alone or a blend of it with the statistics of the sequence's cells
/// (BlendAssigner.h).
struct DeviceAssigner {
    int d = 0, ncell = 0;
    RowInput input = RowInput::none;
    int bf16 = 0;                ///< rows are bfloat16, else float
    const void* rows = nullptr;  ///< networks * ncell * padded_cols
    /// Bytes of a row's element, and of a layer's.
    FAISS_SAAP_HOST_DEVICE int element() const {
        return bf16 ? 2 : 4;
    }
    const float* bias = nullptr; ///< networks * ncell; may be null
    int padded_cols = 0;
    int networks = 1; ///< 1 or one for each query head of the group
    int inputs = 1;   ///< likewise, matrices of the first hidden layer

    // Hidden layers, where input is hidden: in, block0.up, block0.down, ... (QueryClassifier.h)
    int width = 0, depth = 0, padded_width = 0, padded_d = 0;
    const void* layer[kMaxLayers] = {};
    const float* layer_bias[kMaxLayers] = {};

    /// weights of classifier, mean, newest, age and count for each query head,
    /// size group * 5; null: the linear part alone
    const float* blend = nullptr;
    float scale = 1;      ///< in the feature `newest`
    int reads_means = 0;  ///< the blend needs the cells' means
    int reads_newest = 0; ///< and their newest keys, age and count
};

// --- A sequence ------------------------------------------------------------

/// Keys whose cells are found together, at most: those that leave the window next. So the
/// key assigner's weights are read once for so many.
constexpr int kMostAhead = 8;

/// How far the lists of one KV head and one partition have come.
struct ListProgress {
    uint32_t used = 0; ///< entries of the arena given out
    /// The best cell so far of each of the keys from SequenceState::assigned on.
    unsigned long long sought[kMostAhead] = {};
};

/// Where lists lie: elsewhere, once there is room for more tokens.
struct ListArrays {
    uint16_t* cells = nullptr;   ///< cell of each slot that has one, size capacity
    int32_t* count = nullptr;    ///< size ncell
    int32_t* newest = nullptr;   ///< newest slot, size ncell; -1: none
    uint32_t* extents = nullptr; ///< where each begins, size ncell * kExtents
    int32_t* slots = nullptr;    ///< size arena_size(capacity, ncell)
    ListProgress* progress = nullptr;
    float* means = nullptr;      ///< size ncell * d; null: not kept
};

/// Lists of one KV head and one partition.
struct ListState : ListArrays {
    int ncell = 0;
    int kv_head = 0;
    int partition = 0;  ///< among those of its head
    int first_cell = 0; ///< number of its first cell among those of its head
    DeviceRotary rotary;
    DeviceAssigner key, query;
};

/// The fixed part of a sequence; its address never changes.
struct SequenceState {
    int64_t length = 0;
    /// The cells of far slots and of some that are still in the window, those before
    /// this one, are known: ListState::cells has them. May lag behind.
    /// And kMostAhead keys from there on have been compared with so many parts of the cells
    /// (seek_ahead.cuh). Read and written together.
    int32_t assigned = 0, sought_parts = 0;
    int64_t capacity = 0; ///< tokens that the lists have room for
    ListState* lists = nullptr; ///< by KV head, then partition
};

// --- The caller's cache ----------------------------------------------------

/// A KvView with strides in bytes.
struct DeviceView {
    const char* k = nullptr;
    const char* v = nullptr;
    int64_t k_token = 0, k_head = 0, k_page = 0;
    int64_t v_token = 0, v_head = 0, v_page = 0;
    const int32_t* page_table = nullptr;
    int page_size = 1;
    int64_t npages = 0;
    int64_t length = 0; ///< slots that can be read
    int bf16 = 0;       ///< else float16
};

// --- A batch ---------------------------------------------------------------

/// Rows that a launch can number, along its grid's y.
constexpr int64_t kMostRows = 65535;

struct BatchItem {
    SequenceState* sequence = nullptr;
    DeviceView kv;
    int q_len = 1;
    int first_token = 0; ///< of the batch's tokens
    int first_list = 0, nlist = 0; ///< of the batch's lists
    int done = 0;        ///< blocks of the append in progress, rows of the step
    int sought = 0;      ///< rows that cells have been sought for in the step (seek_ahead.cuh)
    int bad = 0;         ///< it was refused
    int64_t begin = 0, end = 0; ///< slots that leave the window in it
};

/// One KV head and partition of one item. What a kernel needs first is here, not
/// behind the item: reads that wait for each other are what a step costs.
struct BatchList {
    const SequenceState* sequence = nullptr;
    const ListState* list = nullptr;
    int item = 0;
    /// where its scores begin: tokens of the item, then query heads of the
    /// group, then cells
    int64_t scores = 0;
};

/// One KV head of one token.
struct BatchRow {
    SequenceState* sequence = nullptr;
    const ListState* lists = nullptr; ///< of the KV head
    int item = 0, token = 0; ///< token within the item
    int q_len = 0;           ///< of the item
    int query = 0;           ///< token within the batch
    int kv_head = 0;
    int first_list = 0, nlist = 0; ///< in the batch's lists
    int64_t view_length = 0;       ///< of the item's cache
};

/// A row with all that a decode step needs of it before it knows anything else, for the
/// same reason.
struct DecodeRow {
    BatchRow row;
    DeviceView kv;  ///< of the item
    ListState list; ///< the KV head's only one, with arrays as they were
};

/// Rows of one KV head whose partitions are the same: their weights are read once.
struct RowTeam {
    int first = 0, n = 0; ///< in the batch's team_rows
};

// --- Conditions that kernels detect ----------------------------------------

enum class Fault : int {
    none,
    append_capacity,
    append_view,
    append_key,
    append_page,
    route_query,
    attend_view,
    attend_cell,
    attend_page
};

/// Where kernels say what they have met, in host memory: a fault and the index of
/// the item, token or row that its sentence names. The latest one stays. Written
/// as one word, without an atomic operation, which not every bus offers on host
/// memory; 0: none.
using FaultFlag = unsigned long long;

} // namespace faiss_saap::gpu
