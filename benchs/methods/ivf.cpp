/// An inverted file over the keys, as it comes to mind: k-means of this
/// sequence's keys as they are cached or de-rotated, queries by L2, by inner
/// product or both spherical; cells of other texts (offline).
#include <faiss/IndexFlat.h>

#include <faiss_saap/CellMeanAssigner.h>
#include <faiss_saap/QuantizerAssigner.h>
#include <faiss_saap/SegmentedAssigner.h>

#include "CellMethod.h"
#include "MethodList.h"

namespace faiss_saap::benchs {

namespace {

Partition by_means(Partition p) {
    p.query = std::make_shared<CellMeanAssigner>(p.key->d, p.key->ncell);
    return p;
}

const Partition& trained(const Setup& s) {
    return s.trained->find(s.data.layer, s.data.kv_head).partition;
}

/// The cells of a trained partition, queries by inner product with the
/// centroids: what it would be without its classifier.
Partition without_classifier(Partition p) {
    const auto& key = dynamic_cast<const QuantizerAssigner&>(*p.key);
    const auto& cells = dynamic_cast<const faiss::IndexFlat&>(*key.quantizer);
    auto centroids = std::make_shared<faiss::IndexFlatIP>(cells.d);
    centroids->add(cells.ntotal, cells.get_xb());
    p.query = std::make_shared<QuantizerAssigner>(centroids, NEEDS_PRE_ROPE);
    return p;
}

MethodEntry entry(
        const std::string& name,
        const std::function<Partition(const Setup&)>& partition) {
    return {name, [=](const Setup& s, bool share) {
                return std::make_unique<PartitionMethod>(
                        partition(s), s.sink, share);
            }};
}

MethodEntry offline(
        const std::string& name,
        const std::function<Partition(const Setup&)>& partition) {
    MethodEntry e = entry(name, partition);
    e.needs_trained = true;
    return e;
}

} // namespace

MethodEntries ivf_methods() {
    return {entry("ivf_rope_l2",
                  [](const Setup& s) {
                      return symmetric(s.cells(NEEDS_POST_ROPE));
                  }),
            entry("ivf_rope_ip",
                  [](const Setup& s) { return s.cells(NEEDS_POST_ROPE); }),
            entry("ivf_rope_spherical",
                  [](const Setup& s) {
                      return symmetric(s.cells(NEEDS_POST_ROPE, true));
                  }),
            entry("ivf_norope_l2",
                  [](const Setup& s) {
                      return symmetric(s.cells(NEEDS_PRE_ROPE));
                  }),
            entry("ivf_norope_ip",
                  [](const Setup& s) { return s.cells(NEEDS_PRE_ROPE); }),
            entry("ivf_norope_spherical",
                  [](const Setup& s) {
                      return symmetric(s.cells(NEEDS_PRE_ROPE, true));
                  }),
            entry("ivf_norope_mean",
                  [](const Setup& s) {
                      return by_means(s.cells(NEEDS_PRE_ROPE));
                  }),
            offline("offline_l2",
                    [](const Setup& s) { return symmetric(trained(s)); }),
            offline("offline_ip",
                    [](const Setup& s) {
                        return without_classifier(trained(s));
                    }),
            offline("offline_mean",
                    [](const Setup& s) { return by_means(trained(s)); }),
            offline("offline_segments", [](const Setup& s) {
                Partition p = trained(s);
                p.key = std::make_shared<SegmentedAssigner>(
                        p.key, (s.data.tokens + 7) / 8, 8);
                return by_means(p);
            })};
}

} // namespace faiss_saap::benchs
