#include <faiss_saap/IndexAsymmetricIVF.h>

#include <algorithm>
#include <cinttypes>
#include <typeinfo>
#include <unordered_set>
#include <vector>

#include <faiss/IndexFlat.h>
#include <faiss/impl/AuxIndexStructures.h>
#include <faiss/impl/IDSelector.h>
#include <omp.h>

#include "check.h"
#include "lists_codec.h"
#include "parallel_for.h"
#include "partition_io.h"

namespace faiss_saap {

namespace {

using faiss::DirectMap;
using faiss::InvertedLists;

/// Fewer vectors than this are added without the parallel region of
/// IndexIVF::add_core, which costs more than a token's insertion.
constexpr idx_t kSequentialAdd = 32;

/// The space that an assigner's vectors are in.
unsigned space_of(const CellAssigner& assigner) {
    return assigner.needs & (NEEDS_PRE_ROPE | NEEDS_POST_ROPE);
}

void check_partition_for_index(const Partition& p, int d, int ncell) {
    p.check();
    FAISS_THROW_IF_NOT_FMT(
            p.d() == d, "partition has d = %d, lists have d = %d", p.d(), d);
    FAISS_THROW_IF_NOT_FMT(
            p.ncell() == ncell,
            "partition has %d cells, lists have nlist = %d",
            p.ncell(),
            ncell);
    for (const CellAssigner* a : {p.key.get(), p.query.get()}) {
        FAISS_THROW_IF_NOT_MSG(
                !(a->needs & (NEEDS_STATS | NEEDS_POSITION | NEEDS_HEAD)),
                "partition has an assigner that needs positions, query heads "
                "or cell statistics, which an index does not have: use "
                "AttentionAdapter");
    }
    const unsigned space = space_of(*p.key);
    FAISS_THROW_IF_NOT_MSG(
            space == space_of(*p.query) &&
                    space != (NEEDS_PRE_ROPE | NEEDS_POST_ROPE),
            "partition's assigners read pre- and post-RoPE vectors, an index "
            "holds one kind");
}

RoutingInput input_of(const CellAssigner& assigner, idx_t n, const float* x) {
    RoutingInput input;
    input.n = n;
    input.d = assigner.d;
    (space_of(assigner) == NEEDS_PRE_ROPE ? input.pre_rope : input.post_rope) =
            x;
    return input;
}

std::vector<idx_t> cells_of(
        const CellAssigner& assigner,
        idx_t n,
        const float* x,
        size_t k) {
    std::vector<int32_t> cells(n * k);
    assigner.assign(
            input_of(assigner, n, x),
            nullptr,
            static_cast<int>(k),
            cells.data(),
            nullptr);
    // Assigners may be the user's own: Faiss would abort on a wrong cell.
    for (int32_t c : cells) {
        FAISS_THROW_IF_NOT_FMT(
                c >= -1 && c < assigner.ncell,
                "an assigner returned cell %d, there are %d cells",
                c,
                assigner.ncell);
    }
    return std::vector<idx_t>(cells.begin(), cells.end());
}

void check_nprobe(size_t nprobe) {
    // A negative number that was put into a size_t is meant as one.
    FAISS_THROW_IF_NOT_FMT(
            static_cast<int64_t>(nprobe) >= 1,
            "nprobe = %" PRId64 " must be at least 1",
            static_cast<int64_t>(nprobe));
}

/// Parameters of one call, from the index and from what the caller gave.
struct CallParams {
    faiss::SearchParametersIVF ivf;
    SearchStats* stats = nullptr;

    CallParams(
            const IndexAsymmetricIVF& index,
            const faiss::SearchParameters* given) {
        ivf.nprobe = index.nprobe;
        ivf.max_codes = index.max_codes;
        if (given) {
            ivf.sel = given->sel;
            const auto* g =
                    dynamic_cast<const faiss::SearchParametersIVF*>(given);
            FAISS_THROW_IF_NOT_FMT(
                    g || typeid(*given) == typeid(faiss::SearchParameters),
                    "params of type %s are not for this index: use "
                    "SearchParametersAsymmetricIVF",
                    typeid(*given).name());
            if (g) {
                FAISS_THROW_IF_NOT_MSG(
                        !g->quantizer_params,
                        "params->quantizer_params is set, but assigners take "
                        "no parameters");
                ivf.nprobe = g->nprobe;
                ivf.max_codes = g->max_codes;
            }
            if (const auto* a =
                        dynamic_cast<const SearchParametersAsymmetricIVF*>(
                                given)) {
                stats = a->stats;
            }
        }
        check_nprobe(ivf.nprobe);
        if (ivf.max_codes > static_cast<size_t>(INT64_MAX)) {
            ivf.max_codes = 0; // Faiss would stop at once
        }
        ivf.nprobe = std::min(ivf.nprobe, static_cast<size_t>(index.ncell));
    }

    void report(const faiss::IndexIVFStats& s) const {
        if (stats) {
            stats->queries = static_cast<int64_t>(s.nq);
            stats->cells_probed = static_cast<int64_t>(s.nlist);
            stats->vectors_read = static_cast<int64_t>(s.ndis);
        }
    }
};

/// Runs fn(begin, end, stats) over slices of n queries, one per thread, as
/// faiss::IndexIVF::search does.
template <class Fn>
faiss::IndexIVFStats for_slices(idx_t n, const Fn& fn) {
    const idx_t slices = std::min<idx_t>(omp_get_max_threads(), n);
    std::vector<faiss::IndexIVFStats> stats(slices);
    parallel_for(slices, [&](int64_t s) {
        fn(n * s / slices, n * (s + 1) / slices, &stats[s]);
    });
    faiss::IndexIVFStats total;
    for (const auto& s : stats) {
        total.add(s);
    }
    return total;
}

void check_sizes(idx_t n, const void* x, const char* name) {
    FAISS_THROW_IF_NOT_FMT(n >= 0, "n = %" PRId64 " must not be negative", n);
    FAISS_THROW_IF_NOT_FMT(n == 0 || x, "%s is null but n = %" PRId64, name, n);
}

void check_results(
        idx_t n,
        idx_t k,
        const float* distances,
        const idx_t* labels) {
    FAISS_THROW_IF_NOT_FMT(k >= 1, "k = %" PRId64 " must be at least 1", k);
    FAISS_THROW_IF_NOT_MSG(n == 0 || distances, "distances is null");
    FAISS_THROW_IF_NOT_MSG(n == 0 || labels, "labels is null");
}

} // namespace

IndexAsymmetricIVF::IndexAsymmetricIVF(std::unique_ptr<faiss::IndexIVF> l)
        : Index(not_null(l, "lists").d, not_null(l, "lists").metric_type),
          lists(std::move(l)),
          ncell(static_cast<int>(lists->nlist)) {
    adopt_storage(*lists);
    FAISS_THROW_IF_NOT_FMT(
            lists->nlist >= 1 && lists->nlist <= 65536,
            "lists->nlist = %zd must be between 1 and 65536",
            lists->nlist);
    FAISS_THROW_IF_NOT_FMT(
            lists->ntotal == 0,
            "lists hold %" PRId64
            " vectors: give the partition that put them there",
            lists->ntotal);
    is_trained = false;
}

IndexAsymmetricIVF::IndexAsymmetricIVF(
        std::unique_ptr<faiss::IndexIVF> l,
        Partition p)
        : Index(not_null(l, "lists").d, not_null(l, "lists").metric_type),
          lists(std::move(l)),
          partition(std::move(p)),
          ncell(static_cast<int>(lists->nlist)),
          cells_given(true) {
    adopt_storage(*lists);
    check_partition_for_index(partition, d, ncell);
    ntotal = lists->ntotal;
    is_trained = !codec_untrained(*lists);
    lists->is_trained = is_trained;
}

void IndexAsymmetricIVF::check_partition() const {
    check_lists();
    check_partition_for_index(partition, d, ncell);
}

void IndexAsymmetricIVF::check_lists() const {
    not_null(lists, "lists");
    FAISS_THROW_IF_NOT_FMT(
            lists->d == d && lists->nlist == static_cast<size_t>(ncell),
            "lists have d = %d and nlist = %zd, the index has d = %d and "
            "ncell = %d",
            lists->d,
            lists->nlist,
            d,
            ncell);
}

void IndexAsymmetricIVF::check_call(idx_t n, const float* x, const char* name)
        const {
    FAISS_THROW_IF_NOT_MSG(is_trained, "the index is not trained");
    check_partition(); // what does not fit must not reach Faiss
    check_sizes(n, x, name);
    check_finite(x, n, d, name);
}

Partition IndexAsymmetricIVF::train_cells(idx_t n, const float* x) const {
    check_lists();
    check_sizes(n, x, "x");
    check_finite(x, n, d, "x");
    FAISS_THROW_IF_NOT_FMT(
            ntotal == 0,
            "the index holds %" PRId64
            " vectors: call reset() before training it again",
            ntotal);
    const size_t needed = min_training_vectors(*lists);
    FAISS_THROW_IF_NOT_FMT(
            static_cast<size_t>(n) >= needed,
            "n = %" PRId64 " vectors are too few: the codec needs %zd",
            n,
            needed);
    if (cells_given) {
        return partition;
    }
    KMeansParams kmeans = training.kmeans;
    kmeans.verbose = verbose;
    return kmeans_partition(
            n, d, x, ncell, NEEDS_POST_ROPE, kmeans, {}, metric_type);
}

void IndexAsymmetricIVF::train_codec(idx_t n, const float* x) {
    lists->verbose = verbose;
    compat::train_codec(*lists, n, x);
    lists->is_trained = true;
    is_trained = true;
}

void IndexAsymmetricIVF::train(idx_t n, const float* x) {
    Partition p = train_cells(n, x);
    train_codec(n, x);
    partition = cells_given || training.asymmetric ? p : symmetric(p);
}

void IndexAsymmetricIVF::train_with_queries(
        idx_t n,
        const float* x,
        idx_t n_train_q,
        const float* xq_train) {
    FAISS_THROW_IF_NOT_FMT(
            n_train_q > 0, "n_train_q = %" PRId64 " must be positive", n_train_q);
    FAISS_THROW_IF_NOT_MSG(xq_train, "xq_train is null");
    check_finite(xq_train, n_train_q, d, "xq_train");
    Partition p = train_cells(n, x);
    if (!cells_given) {
        // What do the training queries look for, and who finds more of it?
        constexpr idx_t kNearest = 10;
        constexpr double kBudget = 0.05;
        const idx_t k = std::min(kNearest, n);
        faiss::IndexFlat exact(d, metric_type);
        exact.add(n, x);
        std::vector<float> distances(n_train_q * k);
        std::vector<idx_t> wanted(n_train_q * k);
        exact.search(n_train_q, xq_train, k, distances.data(), wanted.data());

        const std::vector<idx_t> cell = cells_of(*p.key, n, x, 1);
        std::vector<idx_t> size(ncell, 0);
        for (idx_t c : cell) {
            size[c]++;
        }
        const auto recall = [&](const CellAssigner& queries) {
            int64_t found = 0;
            for (idx_t q = 0; q < n_train_q; q++) {
                const auto order = cells_of(queries, 1, xq_train + q * d, ncell);
                std::unordered_set<idx_t> probed;
                double left = std::max(kBudget * n, 1.0);
                for (idx_t c : order) {
                    if (left <= 0 || c < 0) {
                        break;
                    }
                    probed.insert(c);
                    left -= size[c];
                }
                for (idx_t j = 0; j < k; j++) {
                    const idx_t id = wanted[q * k + j];
                    found += id >= 0 && probed.count(cell[id]);
                }
            }
            return static_cast<double>(found) / (n_train_q * k);
        };
        const double r_asymmetric = recall(*p.query);
        const double r_symmetric = recall(*p.key);
        if (verbose) {
            printf("training queries' 10-recall at 5 %%: %.3f compared with the "
                   "cells' means, %.3f assigned as keys\n",
                   r_asymmetric,
                   r_symmetric);
        }
        p = r_asymmetric >= r_symmetric ? p : symmetric(p);
    }
    train_codec(n, x);
    partition = std::move(p);
}

void IndexAsymmetricIVF::add(idx_t n, const float* x) {
    add_with_ids(n, x, nullptr);
}

void IndexAsymmetricIVF::add_with_ids(
        idx_t n,
        const float* x,
        const idx_t* xids) {
    check_call(n, x, "x");
    for (idx_t i = 0; xids && i < n; i++) {
        FAISS_THROW_IF_NOT_FMT(
                xids[i] >= 0,
                "xids[%" PRId64 "] = %" PRId64 " must not be negative",
                i,
                xids[i]);
    }
    check_encodable(*lists, n, x);
    const auto id_of = [&](idx_t i) { return xids ? xids[i] : ntotal + i; };
    // Faiss 1.7.3 leaves a field of its hash map uninitialised without ids.
    std::vector<idx_t> ids;
    if (!lists->direct_map.no()) {
        std::unordered_set<idx_t> seen;
        for (idx_t i = 0; i < n; i++) {
            const idx_t id = id_of(i);
            FAISS_THROW_IF_NOT_FMT(
                    !lists->direct_map.hashtable.count(id) &&
                            seen.insert(id).second,
                    "id %" PRId64
                    " is in the index already: with the direct map on, ids "
                    "must be unique",
                    id);
            ids.push_back(id);
        }
        xids = ids.data();
    }
    const std::vector<idx_t> cells = cells_of(*partition.key, n, x, 1);
    for (idx_t i = 0; i < n; i++) {
        FAISS_THROW_IF_NOT_FMT(
                cells[i] >= 0,
                "the key assigner finds no cell for x[%" PRId64 "]",
                i);
    }
    if (n <= kSequentialAdd) {
        std::vector<uint8_t> codes(n * lists->code_size);
        lists->encode_vectors(n, x, cells.data(), codes.data());
        for (idx_t i = 0; i < n; i++) {
            const idx_t id = id_of(i);
            const size_t offset = lists->invlists->add_entry(
                    cells[i], id, codes.data() + i * lists->code_size);
            lists->direct_map.add_single_id(id, cells[i], offset);
        }
        lists->ntotal += n;
    } else {
        lists->add_core(n, x, xids, cells.data());
    }
    ntotal = lists->ntotal;
}

void IndexAsymmetricIVF::search(
        idx_t n,
        const float* x,
        idx_t k,
        float* distances,
        idx_t* labels,
        const faiss::SearchParameters* params) const {
    const CallParams call(*this, params);
    check_call(n, x, "x");
    check_results(n, k, distances, labels);
    const auto nprobe = call.ivf.nprobe;
    call.report(for_slices(
            n, [&](idx_t begin, idx_t end, faiss::IndexIVFStats* stats) {
                const idx_t m = end - begin;
                const auto cells =
                        cells_of(*partition.query, m, x + begin * d, nprobe);
                const std::vector<float> unused(m * nprobe, 0.0f);
                lists->search_preassigned(
                        m,
                        x + begin * d,
                        k,
                        cells.data(),
                        unused.data(),
                        distances + begin * k,
                        labels + begin * k,
                        false,
                        &call.ivf,
                        stats);
            }));
}

void IndexAsymmetricIVF::range_search(
        idx_t n,
        const float* x,
        float radius,
        faiss::RangeSearchResult* result,
        const faiss::SearchParameters* params) const {
    const CallParams call(*this, params);
    check_call(n, x, "x");
    FAISS_THROW_IF_NOT_MSG(result, "result is null");
    FAISS_THROW_IF_NOT_FMT(
            result->nq == static_cast<size_t>(n),
            "result->nq = %zd, there are n = %" PRId64 " queries",
            result->nq,
            n);
    FAISS_THROW_IF_NOT_MSG(
            !result->labels && !result->distances,
            "result holds the results of another search");
    FAISS_THROW_IF_NOT_MSG(!std::isnan(radius), "radius is NaN");
    const auto cells = cells_of(*partition.query, n, x, call.ivf.nprobe);
    const std::vector<float> unused(cells.size(), 0.0f);
    faiss::IndexIVFStats stats;
    lists->range_search_preassigned(
            n,
            x,
            radius,
            cells.data(),
            unused.data(),
            result,
            false,
            &call.ivf,
            &stats);
    call.report(stats);
}

void IndexAsymmetricIVF::assign_queries(
        idx_t n,
        const float* x,
        size_t nprobe,
        idx_t* cells) const {
    check_call(n, x, "x");
    FAISS_THROW_IF_NOT_FMT(
            nprobe >= 1 && nprobe <= static_cast<size_t>(ncell),
            "nprobe = %zd must be between 1 and ncell = %d",
            nprobe,
            ncell);
    FAISS_THROW_IF_NOT_MSG(n == 0 || cells, "cells is null");
    const auto assigned = cells_of(*partition.query, n, x, nprobe);
    std::copy(assigned.begin(), assigned.end(), cells);
}

void IndexAsymmetricIVF::search_preassigned(
        idx_t n,
        const float* x,
        idx_t k,
        size_t nprobe,
        const idx_t* cells,
        float* distances,
        idx_t* labels,
        const faiss::SearchParameters* params) const {
    CallParams call(*this, params);
    check_call(n, x, "x");
    FAISS_THROW_IF_NOT_FMT(
            nprobe >= 1 && nprobe <= static_cast<size_t>(ncell),
            "nprobe = %zd must be between 1 and ncell = %d",
            nprobe,
            ncell);
    FAISS_THROW_IF_NOT_MSG(n == 0 || cells, "cells is null");
    check_results(n, k, distances, labels);
    for (size_t i = 0; i < n * nprobe; i++) {
        FAISS_THROW_IF_NOT_FMT(
                cells[i] >= -1 && cells[i] < ncell,
                "cells[%zd] = %" PRId64 ", there are %d cells",
                i,
                cells[i],
                ncell);
    }
    call.ivf.nprobe = nprobe;
    const std::vector<float> unused(n * nprobe, 0.0f);
    call.report(for_slices(
            n, [&](idx_t begin, idx_t end, faiss::IndexIVFStats* stats) {
                lists->search_preassigned(
                        end - begin,
                        x + begin * d,
                        k,
                        cells + begin * nprobe,
                        unused.data(),
                        distances + begin * k,
                        labels + begin * k,
                        false,
                        &call.ivf,
                        stats);
            }));
}

size_t IndexAsymmetricIVF::remove_ids(const faiss::IDSelector& sel) {
    check_lists();
    // Asked here, as Faiss would ask in a parallel region, which a selector that throws
    // ends the process from, and with a hash map removes only listed ids.
    std::vector<idx_t> ids;
    for_each_id(*lists, [&](idx_t id, size_t, size_t) {
        if (sel.is_member(id)) {
            ids.push_back(id);
        }
    });
    const size_t removed = lists->direct_map.no()
            ? lists->remove_ids(faiss::IDSelectorBatch(ids.size(), ids.data()))
            : lists->remove_ids(faiss::IDSelectorArray(ids.size(), ids.data()));
    ntotal = lists->ntotal;
    return removed;
}

void IndexAsymmetricIVF::set_direct_map(bool on) {
    check_lists();
    if (on) {
        std::unordered_set<idx_t> seen;
        for_each_id(*lists, [&](idx_t id, size_t, size_t) {
            FAISS_THROW_IF_NOT_FMT(
                    seen.insert(id).second,
                    "id %" PRId64
                    " occurs twice in the index: a direct map needs unique ids",
                    id);
        });
    }
    lists->set_direct_map_type(on ? DirectMap::Hashtable : DirectMap::NoMap);
}

void IndexAsymmetricIVF::reconstruct(idx_t key, float* recons) const {
    check_lists();
    FAISS_THROW_IF_NOT_MSG(
            !lists->direct_map.no(),
            "reconstruct needs the direct map: call set_direct_map(true)");
    FAISS_THROW_IF_NOT_FMT(
            lists->direct_map.hashtable.count(key),
            "key = %" PRId64 " is not in the index",
            key);
    FAISS_THROW_IF_NOT_MSG(recons, "recons is null");
    lists->reconstruct(key, recons);
}

void IndexAsymmetricIVF::reconstruct_n(idx_t i0, idx_t ni, float* recons)
        const {
    check_lists();
    FAISS_THROW_IF_NOT_FMT(
            ni >= 0 && ni <= ntotal,
            "ni = %" PRId64 " must be between 0 and ntotal = %" PRId64,
            ni,
            ntotal);
    FAISS_THROW_IF_NOT_FMT(
            i0 >= 0 && i0 <= INT64_MAX - ni,
            "i0 = %" PRId64 " is outside the range of ids",
            i0);
    FAISS_THROW_IF_NOT_MSG(ni == 0 || recons, "recons is null");
    std::vector<uint64_t> place(ni, UINT64_MAX);
    for_each_id(*lists, [&](idx_t id, size_t cell, size_t offset) {
        if (id >= i0 && id - i0 < ni) {
            place[id - i0] = faiss::lo_build(cell, offset);
        }
    });
    for (idx_t i = 0; i < ni; i++) {
        FAISS_THROW_IF_NOT_FMT(
                place[i] != UINT64_MAX,
                "id %" PRId64 " is not in the index",
                i0 + i);
    }
    for (idx_t i = 0; i < ni; i++) {
        lists->reconstruct_from_offset(
                faiss::lo_listno(place[i]),
                faiss::lo_offset(place[i]),
                recons + i * d);
    }
}

void IndexAsymmetricIVF::reset() {
    check_lists();
    lists->reset();
    ntotal = 0;
}

void IndexAsymmetricIVF::check_compatible_for_merge(
        const faiss::Index& other_index) const {
    const auto* other = dynamic_cast<const IndexAsymmetricIVF*>(&other_index);
    FAISS_THROW_IF_NOT_FMT(
            other,
            "other is a %s, not an IndexAsymmetricIVF",
            typeid(other_index).name());
    FAISS_THROW_IF_NOT_MSG(other != this, "other is this index itself");
    FAISS_THROW_IF_NOT_MSG(
            is_trained && other->is_trained, "both indexes must be trained");
    check_partition();
    other->check_partition();
    FAISS_THROW_IF_NOT_FMT(
            other->d == d, "other has d = %d, this has d = %d", other->d, d);
    FAISS_THROW_IF_NOT_MSG(
            same_codec(*lists, *other->lists),
            "other stores vectors with another codec");
    FAISS_THROW_IF_NOT_MSG(
            same_cells(partition, other->partition),
            "other has other cells");
}

void IndexAsymmetricIVF::merge_from(faiss::Index& other_index, idx_t add_id) {
    check_compatible_for_merge(other_index);
    auto& other = dynamic_cast<IndexAsymmetricIVF&>(other_index);
    const bool mapped = !lists->direct_map.no();
    const bool other_mapped = !other.lists->direct_map.no();
    std::unordered_set<idx_t> moved;
    for_each_id(*other.lists, [&](idx_t id, size_t, size_t) {
        idx_t new_id;
        FAISS_THROW_IF_NOT_FMT(
                !__builtin_add_overflow(id, add_id, &new_id) && new_id >= 0,
                "add_id = %" PRId64 " moves id %" PRId64
                " outside the range of ids",
                add_id,
                id);
        if (mapped) {
            FAISS_THROW_IF_NOT_FMT(
                    !lists->direct_map.hashtable.count(new_id) &&
                            moved.insert(new_id).second,
                    "id %" PRId64
                    " would be in the index twice: with the direct map on, ids "
                    "must be unique",
                    new_id);
        }
    });
    // Not IndexIVF::merge_from, which refuses direct maps and compares the
    // quantizers that we do not use.
    lists->set_direct_map_type(DirectMap::NoMap);
    other.lists->set_direct_map_type(DirectMap::NoMap);
    lists->invlists->merge_from(other.lists->invlists, add_id);
    lists->ntotal += other.lists->ntotal;
    other.lists->ntotal = 0;
    ntotal = lists->ntotal;
    other.ntotal = 0;
    if (mapped) {
        lists->set_direct_map_type(DirectMap::Hashtable);
    }
    if (other_mapped) {
        other.lists->set_direct_map_type(DirectMap::Hashtable);
    }
}

} // namespace faiss_saap
