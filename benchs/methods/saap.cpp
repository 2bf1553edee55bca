/// Saap (arXiv 2502.08246): cells of de-rotated keys and a query classifier,
/// both trained on other texts; with statistics of the sequence (BlendAssigner).
#include "CellMethod.h"
#include "MethodList.h"

namespace faiss_saap::benchs {

MethodEntries saap_methods() {
    MethodEntry saap, blend;
    saap.name = "saap";
    saap.make = [](const Setup& s, bool share) {
        return std::make_unique<PartitionMethod>(
                s.trained->find(s.data.layer, s.data.kv_head).partition,
                s.sink,
                share);
    };
    saap.ours = saap.needs_trained = true;
    blend = saap;
    blend.name = "saap_blend";
    blend.make = [](const Setup& s, bool share) {
        return std::make_unique<PartitionMethod>(
                s.trained->find(s.data.layer, s.data.kv_head).blended(),
                s.sink,
                share);
    };
    blend.needs_newest = true;
    return {saap, blend};
}

} // namespace faiss_saap::benchs
