/// When blocks beside the rows of a decode step look for the cells of keys that leave the window
/// in later steps (seek_ahead.cuh): the rows that can wait for the fewest steps first, and as
/// many as it takes for all to be done evenly in time. So a step has hardly more to do than
/// others, however far the sequences of the batch have come.
#pragma once

#include "sequence_state.h"

namespace faiss_saap::gpu {

/// Of the cells. In the step that has to find cells because there are none ahead, the next
/// ones cannot be sought yet.
constexpr int kSeekParts = kMostAhead - 1;
/// Steps that visits are ahead of when they must be done: some KV heads may take a sequence for
/// visited and others not, where the rows of a step end before all have looked.
constexpr int kSeekSlack = 1;
/// Steps that are left when keys are sought first, that one included.
constexpr int kMostLeft = kMostAhead + kSeekSlack;

FAISS_SAAP_HOST_DEVICE constexpr int seek_share(int n, int of) {
    return (n + of - 1) / of;
}

/// Parts that a visit does, of kSeekParts.
/// @param visits  DecodeGrid::visits
FAISS_SAAP_HOST_DEVICE constexpr int parts_of_visit(int visits) {
    return seek_share(kSeekParts, visits);
}

/// Visits that it takes from the first part on.
FAISS_SAAP_HOST_DEVICE constexpr int visits_of_parts(int visits, int parts_done) {
    return seek_share(kSeekParts - parts_done, parts_of_visit(visits));
}

/// Groups share rows out so that all KV heads of a sequence are visited in the same step: the
/// groups that have them have the same sequences, and so the same to choose from. But where rows
/// of the step end before all groups have looked at their lengths, heads may choose differently,
/// and a visit that not all have made is made again.
/// @param groups  heads_kv at least
FAISS_SAAP_HOST_DEVICE constexpr int group_of_row(
        int item,
        int kv_head,
        int heads_kv,
        int groups) {
    return item % (groups / heads_kv) * heads_kv + kv_head;
}

/// Of the sequences of the batch, at most.
FAISS_SAAP_HOST_DEVICE constexpr int rows_of_group(int sequences, int heads_kv, int groups) {
    return seek_share(sequences, groups / heads_kv);
}

/// Visits that a group makes in a step where its rows' steps differ.
constexpr int planned_visits(int visits, int rows) {
    return seek_share(rows * visits_of_parts(visits, 0), kMostAhead);
}

/// A row that can be visited.
struct SeekRow {
    int steps_left = 0;  ///< until the keys must be known, this one included
    int visits_left = 0; ///< of which a step makes one

    /// Steps that may pass without a visit, so that kSeekSlack are still left over.
    FAISS_SAAP_HOST_DEVICE int can_wait() const {
        return steps_left - visits_left - kSeekSlack;
    }
};

/// Visits that a group makes in a step: of the rows that can wait for the fewest steps, of all
/// that can wait for none.
struct SeekPace {
    int visits = 0; ///< in this step
    int rows = 0, due = 0; ///< seen, and visits to be made until these have none left

    /// Rows in the order of the steps that they can wait for.
    FAISS_SAAP_HOST_DEVICE void add(const SeekRow& row) {
        rows++;
        due += row.visits_left;
        const int each =
                row.can_wait() > 0 ? seek_share(due, row.steps_left - kSeekSlack) : rows;
        visits = each > visits ? each : visits;
    }
};

} // namespace faiss_saap::gpu
