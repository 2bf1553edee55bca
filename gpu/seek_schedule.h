/// When blocks beside the rows of a decode step look for the cells of keys that leave the window
/// in later steps (seek_ahead.cuh): the rows with the fewest steps left first, and as many
/// as it takes for all to be done evenly in time. So a step has no more to do than others,
/// however far the sequences of the batch have come.
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

/// Whether a group's rows are visited in time, whenever they began: one that needs many visits,
/// of which it gets one a step, must not wait long for others that have fewer steps left. By
/// running the schedule (test_seek_schedule.cpp).
/// @param rows  of the group
constexpr bool is_in_time(int visits, int rows) {
    return visits == 1 || rows <= (visits == 2 ? 8 : visits == 4 ? 3 : 2);
}

/// Visits that a group makes in a step where its rows' steps differ.
constexpr int planned_visits(int visits, int rows) {
    return seek_share(rows * visits_of_parts(visits, 0), kMostAhead);
}

/// Visits that a group makes in a step.
struct SeekPace {
    int due = 0;    ///< visits to be made until the rows seen have none left
    int visits = 0; ///< in this step

    /// Rows in the order of the steps that they have left.
    FAISS_SAAP_HOST_DEVICE void add(int steps_left, int visits_left) {
        due += visits_left;
        const int steps = steps_left > kSeekSlack ? steps_left - kSeekSlack : 1;
        const int each = seek_share(due, steps);
        visits = each > visits ? each : visits;
    }
};

} // namespace faiss_saap::gpu
