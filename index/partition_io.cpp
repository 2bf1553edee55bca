#include "partition_io.h"

#include <new>
#include <stdexcept>

#include <faiss/IndexFlat.h>
#include <faiss/index_io.h>

#include <faiss_saap/BlendAssigner.h>
#include <faiss_saap/CellMeanAssigner.h>
#include <faiss_saap/QuantizerAssigner.h>
#include <faiss_saap/QueryClassifier.h>
#include <faiss_saap/SegmentedAssigner.h>
#include <faiss_saap/exactly.h>
#include <faiss_saap/faiss_compat.h>

#include "check.h"

namespace faiss_saap {

namespace {

const uint32_t kFlat = faiss::fourcc("SaFl"), kOther = faiss::fourcc("SaQz");
const uint32_t kClassifier = faiss::fourcc("SaC2");
const uint32_t kBlend = faiss::fourcc("SaB2");
// As they were written before classifiers could share their input layer.
const uint32_t kOldClassifier = faiss::fourcc("SaCl");
const uint32_t kOldBlend = faiss::fourcc("SaBl");
const uint32_t kMeans = faiss::fourcc("SaMn");
const uint32_t kSegments = faiss::fourcc("SaSg");

void write_classifier(const QueryClassifier& q, faiss::IOWriter& writer) {
    const ClassifierShape& s = q.shape;
    for (int32_t x : {s.d, s.group, s.ncell, s.width, s.depth}) {
        write_value(writer, x);
    }
    write_value<uint8_t>(writer, s.share_input);
    write_value<uint8_t>(writer, s.share_trunk);
    write_value<uint8_t>(writer, q.dtype == DType::bfloat16);
    const auto parameters = q.parameters();
    write_array(writer, parameters.data(), parameters.size());
}

std::shared_ptr<const QueryClassifier> read_classifier(MemoryReader& reader, bool old) {
    ClassifierShape s;
    for (int* x : {&s.d, &s.group, &s.ncell, &s.width, &s.depth}) {
        *x = read_value<int32_t>(reader);
    }
    s.share_input = !old && read_value<uint8_t>(reader) != 0;
    s.share_trunk = read_value<uint8_t>(reader) != 0;
    const bool narrow = read_value<uint8_t>(reader) != 0;
    const auto parameters = read_array<float>(reader);
    const int64_t expected = parameter_count(s); // checks the shape
    FAISS_THROW_IF_NOT_FMT(
            !old || s.depth > 0,
            "%s: a classifier without residual blocks that an earlier version "
            "wrote is linear, which this one has not",
            reader.name.c_str());
    FAISS_THROW_IF_NOT_FMT(
            static_cast<int64_t>(parameters.size()) == expected,
            "%s: corrupt: a classifier of %lld parameters has %zd",
            reader.name.c_str(),
            static_cast<long long>(expected),
            parameters.size());
    return std::make_shared<QueryClassifier>(
            s,
            parameters.data(),
            narrow ? DType::bfloat16 : DType::float32);
}

std::shared_ptr<const CellAssigner> read_blend(MemoryReader& reader, bool old) {
    auto classifier = read_classifier(reader, old);
    const auto scale = read_value<float>(reader);
    auto weights = read_array<BlendWeights>(reader);
    try {
        return std::make_shared<BlendAssigner>(
                std::move(classifier), std::move(weights), scale);
    } catch (const faiss::FaissException& e) {
        FAISS_THROW_FMT("%s: corrupt: %s", reader.name.c_str(), e.what());
    }
}

void write_assigner(const CellAssigner& assigner, faiss::IOWriter& writer) {
    if (const auto* m = exactly<CellMeanAssigner>(assigner)) {
        write_value(writer, kMeans);
        write_value<int32_t>(writer, m->d);
        write_value<int32_t>(writer, m->ncell);
        return;
    }
    if (const auto* s = exactly<SegmentedAssigner>(assigner)) {
        write_value(writer, kSegments);
        write_value(writer, s->length);
        write_value<int32_t>(writer, s->nsegment);
        write_assigner(*s->inner, writer);
        return;
    }
    if (const auto* b = exactly<BlendAssigner>(assigner)) {
        write_value(writer, kBlend);
        write_classifier(*b->classifier, writer);
        write_value(writer, b->scale);
        write_array(writer, b->weights.data(), b->weights.size());
        return;
    }
    if (const auto* c = exactly<QueryClassifier>(assigner)) {
        write_value(writer, kClassifier);
        write_classifier(*c, writer);
        return;
    }
    const auto* q = exactly<QuantizerAssigner>(assigner);
    FAISS_THROW_IF_NOT_FMT(
            q,
            "an assigner of type %s has no file form",
            typeid(assigner).name());
    const faiss::Index& quantizer = *q->quantizer;
    if (const auto* flat = dynamic_cast<const faiss::IndexFlat*>(&quantizer)) {
        write_value(writer, kFlat);
        write_value<uint32_t>(writer, q->needs);
        write_value<int32_t>(writer, flat->d);
        write_value<int32_t>(writer, flat->metric_type);
        write_array(writer, flat->get_xb(), size_t(flat->ntotal) * flat->d);
    } else {
        write_value(writer, kOther);
        write_value<uint32_t>(writer, q->needs);
        faiss::write_index(&quantizer, &writer);
    }
}

/// @param nested  within a segmented assigner, which holds no other of its kind
std::shared_ptr<const CellAssigner> read_assigner(
        MemoryReader& reader,
        bool nested = false) {
    const auto kind = read_value<uint32_t>(reader);
    FAISS_THROW_IF_NOT_FMT(
            kind == kMeans || kind == kFlat || kind == kOther || kind == kClassifier ||
                    kind == kOldClassifier || kind == kBlend || kind == kOldBlend ||
                    (kind == kSegments && !nested),
            "%s: an assigner of kind %08x is not known to this version",
            reader.name.c_str(),
            kind);
    if (kind == kMeans) {
        const auto d = read_value<int32_t>(reader);
        const auto ncell = read_value<int32_t>(reader);
        return std::make_shared<CellMeanAssigner>(d, ncell);
    }
    if (kind == kClassifier || kind == kOldClassifier) {
        return read_classifier(reader, kind == kOldClassifier);
    }
    if (kind == kBlend || kind == kOldBlend) {
        return read_blend(reader, kind == kOldBlend);
    }
    if (kind == kSegments) {
        const auto length = read_value<int64_t>(reader);
        const auto nsegment = read_value<int32_t>(reader);
        return std::make_shared<SegmentedAssigner>(
                read_assigner(reader, /*nested=*/true), length, nsegment);
    }
    const auto space = static_cast<RoutingNeeds>(read_value<uint32_t>(reader));
    std::shared_ptr<const faiss::Index> quantizer;
    if (kind == kFlat) {
        const auto d = read_value<int32_t>(reader);
        const faiss::MetricType metric = read_metric(reader);
        const auto rows = read_array<float>(reader);
        FAISS_THROW_IF_NOT_FMT(
                d >= 1 && rows.size() % d == 0,
                "%s: corrupt: %zd floats make no vectors of d = %d",
                reader.name.c_str(),
                rows.size(),
                d);
        auto flat = std::make_shared<faiss::IndexFlat>(d, metric);
        flat->add(static_cast<idx_t>(rows.size()) / d, rows.data());
        quantizer = flat;
    } else {
        // Stock Faiss allocates what a length says.
        try {
            quantizer.reset(faiss::read_index(&reader));
        } catch (const std::bad_alloc&) {
            FAISS_THROW_FMT(
                    "%s: corrupt: the quantizer has an impossible size",
                    reader.name.c_str());
        } catch (const std::length_error&) {
            FAISS_THROW_FMT(
                    "%s: corrupt: the quantizer has an impossible size",
                    reader.name.c_str());
        }
    }
    return std::make_shared<QuantizerAssigner>(quantizer, space);
}

} // namespace

void write_partition(const Partition& p, faiss::IOWriter& writer) {
    write_value<int32_t>(writer, p.rope.d);
    write_value(writer, p.rope.theta);
    write_value<uint32_t>(writer, static_cast<uint32_t>(p.rope.layout));
    const std::string scaling = p.rope.scaling_text();
    write_array(writer, scaling.data(), scaling.size());
    // A symmetric partition is one assigner, on disk as in memory.
    const uint8_t symmetric = p.key == p.query;
    write_value(writer, symmetric);
    write_assigner(*p.key, writer);
    if (!symmetric) {
        write_assigner(*p.query, writer);
    }
}

Partition read_partition(MemoryReader& reader) {
    Partition p;
    p.rope.d = read_value<int32_t>(reader);
    p.rope.theta = read_value<double>(reader);
    const auto layout = read_value<uint32_t>(reader);
    FAISS_THROW_IF_NOT_FMT(
            layout <= 1, "a RoPE layout of %u is not known", layout);
    p.rope.layout = static_cast<RopeLayout>(layout);
    const auto scaling = read_array<char>(reader);
    p.rope.set_scaling(std::string(scaling.begin(), scaling.end()));
    const bool symmetric = read_value<uint8_t>(reader) != 0;
    p.key = read_assigner(reader);
    p.query = symmetric ? p.key : read_assigner(reader);
    p.check();
    return p;
}

bool same_cells(const Partition& a, const Partition& b) {
    if (a.key == b.key) {
        return true;
    }
    try {
        faiss::VectorIOWriter bytes_a, bytes_b;
        write_assigner(*a.key, bytes_a);
        write_assigner(*b.key, bytes_b);
        return bytes_a.data == bytes_b.data;
    } catch (const faiss::FaissException&) {
        return false; // no file form: equal only when identical
    }
}

} // namespace faiss_saap
