/// What the adapters on CPU and GPU take from Python and give it alike.
#pragma once

#include <vector>

#include <faiss_saap/AttentionAdapter.h>

#include "kv_view.h"

namespace faiss_saap::python {

/// One sequence of a batch with its view kept alive.
struct Asking {
    int64_t sequence = 0;
    nb::object view; ///< an ArrayView
    int64_t q_len = 1;
    std::vector<int64_t> positions; ///< empty: the last q_len tokens

    const ArrayView& array_view() const {
        return nb::cast<const ArrayView&>(view);
    }
    /// @param kv  that of array_view(), asked for the place it must lie in
    SequenceInput input(const KvView& kv) const {
        SequenceInput s;
        s.sequence = sequence;
        s.kv = kv;
        s.q_len = q_len;
        s.positions = positions.empty() ? nullptr : positions.data();
        return s;
    }
};

inline AdapterParams adapter_params(
        int heads_q,
        int heads_kv,
        int d,
        int64_t sink,
        int64_t window,
        bool attend_dense,
        float scale,
        int64_t position_offset,
        int64_t dense_below,
        bool key_codes,
        const ProbePolicy& policy) {
    AdapterParams p;
    p.heads_q = heads_q;
    p.heads_kv = heads_kv;
    p.d = d;
    p.sink = sink;
    p.window = window;
    p.attend_dense = attend_dense;
    p.scale = scale;
    p.position_offset = position_offset;
    p.dense_below = dense_below;
    p.key_codes = key_codes;
    p.policy = policy;
    return p;
}

/// One list of partitions for each KV head, from that or from one partition
/// for each.
inline HeadPartitions head_partitions(const nb::object& given) {
    HeadPartitions all;
    if (given.is_none()) {
        return all;
    }
    const auto partition = [](const nb::handle x) -> const Partition& {
        FAISS_THROW_IF_NOT_FMT(
                nb::isinstance<Partition>(x),
                "partitions hold a %s, expected a Partition, or a list of them, for each KV "
                "head",
                nb::type_name(x.type()).c_str());
        return nb::cast<const Partition&>(x);
    };
    for (const nb::handle head : given) {
        std::vector<Partition> of_head;
        if (nb::isinstance<nb::sequence>(head)) {
            for (const nb::handle p : head) {
                of_head.push_back(partition(p));
            }
        } else {
            of_head.push_back(partition(head));
        }
        all.push_back(std::move(of_head));
    }
    return all;
}

inline nb::list to_python(const HeadPartitions& all) {
    nb::list result;
    for (const auto& of_head : all) {
        nb::list head;
        for (const Partition& p : of_head) {
            head.append(nb::cast(p));
        }
        result.append(head);
    }
    return result;
}

} // namespace faiss_saap::python
