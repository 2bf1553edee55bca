#include "partition_io.h"

#include <faiss/index_io.h>

#include <faiss_saap/QuantizerAssigner.h>

#include "check.h"

namespace faiss_saap {

namespace {

constexpr uint32_t kMaxText = 1 << 16;

void write_assigner(const CellAssigner& assigner, faiss::IOWriter& writer) {
    const auto* q = dynamic_cast<const QuantizerAssigner*>(&assigner);
    FAISS_THROW_IF_NOT_FMT(
            q,
            "an assigner of type %s has no file form",
            typeid(assigner).name());
    write_value(writer, faiss::fourcc("SaQz"));
    write_value<uint32_t>(writer, q->needs);
    faiss::write_index(q->quantizer.get(), &writer);
}

std::shared_ptr<const CellAssigner> read_assigner(faiss::IOReader& reader) {
    const auto kind = read_value<uint32_t>(reader);
    FAISS_THROW_IF_NOT_FMT(
            kind == faiss::fourcc("SaQz"),
            "an assigner of kind %08x is not known to this version",
            kind);
    const auto space = static_cast<RoutingNeeds>(read_value<uint32_t>(reader));
    const std::shared_ptr<const faiss::Index> quantizer(
            faiss::read_index(&reader));
    return std::make_shared<QuantizerAssigner>(quantizer, space);
}

} // namespace

void write_bytes(faiss::IOWriter& writer, const void* data, size_t bytes) {
    const size_t written = writer(data, 1, bytes);
    FAISS_THROW_IF_NOT_FMT(
            written == bytes,
            "%s: %zd of %zd bytes could be written",
            writer.name.c_str(),
            written,
            bytes);
}

void read_bytes(faiss::IOReader& reader, void* data, size_t bytes) {
    const size_t got = reader(data, 1, bytes);
    FAISS_THROW_IF_NOT_FMT(
            got == bytes,
            "%s: ends %zd bytes too early",
            reader.name.c_str(),
            bytes - got);
}

void write_partition(const Partition& p, faiss::IOWriter& writer) {
    write_value<int32_t>(writer, p.rope.d);
    write_value(writer, p.rope.theta);
    write_value<uint32_t>(writer, static_cast<uint32_t>(p.rope.layout));
    const std::string scaling = p.rope.scaling_text();
    write_value<uint32_t>(writer, static_cast<uint32_t>(scaling.size()));
    write_bytes(writer, scaling.data(), scaling.size());
    // A symmetric partition is one assigner, on disk as in memory.
    const uint8_t symmetric = p.key == p.query;
    write_value(writer, symmetric);
    write_assigner(*p.key, writer);
    if (!symmetric) {
        write_assigner(*p.query, writer);
    }
}

Partition read_partition(faiss::IOReader& reader) {
    Partition p;
    p.rope.d = read_value<int32_t>(reader);
    p.rope.theta = read_value<double>(reader);
    const auto layout = read_value<uint32_t>(reader);
    FAISS_THROW_IF_NOT_FMT(
            layout <= 1, "a RoPE layout of %u is not known", layout);
    p.rope.layout = static_cast<RopeLayout>(layout);
    const auto length = read_value<uint32_t>(reader);
    FAISS_THROW_IF_NOT_FMT(
            length <= kMaxText, "a RoPE scaling of %u bytes", length);
    std::string scaling(length, '\0');
    read_bytes(reader, scaling.data(), length);
    p.rope.set_scaling(scaling);
    const bool symmetric = read_value<uint8_t>(reader) != 0;
    p.key = read_assigner(reader);
    p.query = symmetric ? p.key : read_assigner(reader);
    p.check();
    return p;
}

bool same_cells(const Partition& a, const Partition& b) {
    if (a.key == b.key && a.query == b.query) {
        return true;
    }
    try {
        faiss::VectorIOWriter bytes_a, bytes_b;
        write_partition(a, bytes_a);
        write_partition(b, bytes_b);
        return bytes_a.data == bytes_b.data;
    } catch (const faiss::FaissException&) {
        return false; // no file form: equal only when identical
    }
}

} // namespace faiss_saap
