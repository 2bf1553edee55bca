#include <faiss_saap/ProbePlan.h>

#include <faiss/impl/FaissAssert.h>

namespace faiss_saap {

const char* name(TrainedQuery query) {
    switch (query) {
        case TrainedQuery::none:
            return "none";
        case TrainedQuery::classifier:
            return "classifier";
        case TrainedQuery::mean:
            return "mean";
        case TrainedQuery::blend:
            return "blend";
    }
    FAISS_THROW_FMT("there is no TrainedQuery %d", static_cast<int>(query));
}

TrainedQuery trained_query(const std::string& text) {
    for (TrainedQuery query :
         {TrainedQuery::none,
          TrainedQuery::classifier,
          TrainedQuery::mean,
          TrainedQuery::blend}) {
        if (text == name(query)) {
            return query;
        }
    }
    FAISS_THROW_FMT("there is no query assigner '%s'", text.c_str());
}

void ProbePlan::check() const {
    const auto fits = [&](double x, const char* field) {
        FAISS_THROW_IF_NOT_FMT(
                x >= 0 && x <= 1,
                "the plan of layer %d, KV head %d: %s = %g must be between 0 "
                "and 1",
                layer,
                kv_head,
                field,
                x);
    };
    fits(trained_share, "trained_share");
    fits(own_share, "own_share");
    FAISS_THROW_IF_NOT_FMT(
            trained_share + own_share <= 1 + 1e-9,
            "the plan of layer %d, KV head %d: trained_share and own_share sum "
            "up to %g, more than 1",
            layer,
            kv_head,
            trained_share + own_share);
    FAISS_THROW_IF_NOT_FMT(
            keys_per_cell >= 0,
            "the plan of layer %d, KV head %d: keys_per_cell = %d must not be "
            "negative",
            layer,
            kv_head,
            keys_per_cell);
    FAISS_THROW_IF_NOT_FMT(
            segment == 0 || (segment > 0 && trained == TrainedQuery::mean),
            "the plan of layer %d, KV head %d: segment = %lld must not be "
            "negative, and segments need means",
            layer,
            kv_head,
            static_cast<long long>(segment));
    FAISS_THROW_IF_NOT_FMT(
            trained != TrainedQuery::none || keys_per_cell > 0,
            "the plan of layer %d, KV head %d probes nothing",
            layer,
            kv_head);
}

} // namespace faiss_saap
