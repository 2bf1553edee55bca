// Sequences of an AttentionAdapter in files.
#include <algorithm>
#include <cinttypes>

#include <faiss_saap/AttentionAdapter.h>
#include <faiss_saap/faiss_compat.h>

#include "MappedFile.h"
#include "adapter_state.h"
#include "check.h"
#include "checked_file.h"
#include "partition_io.h"

namespace faiss_saap {

namespace {

const FileKind kSequenceFile = {
        faiss::fourcc("SaSq"),
        2, // since 2: whether there are codes
        "a sequence of an AttentionAdapter"};

/// Of a partition's file form.
uint64_t partition_checksum(const Partition& p) {
    faiss::VectorIOWriter bytes;
    write_partition(p, bytes);
    return checksum(bytes.data.data(), bytes.data.size());
}

} // namespace

void AttentionAdapter::save(int64_t sequence, const std::string& path) const {
    const Sequence& s = at(sequence);
    write_checked_file(path, kSequenceFile, [&](faiss::IOWriter& writer) {
        write_value<int32_t>(writer, params_.heads_kv);
        write_value<int32_t>(writer, params_.d);
        write_value<int64_t>(writer, params_.sink);
        write_value<int64_t>(writer, params_.window);
        write_value<int64_t>(writer, params_.position_offset);
        write_value<int32_t>(writer, params_.key_codes);
        write_value<int64_t>(writer, s.length);
        for (int h = 0; h < params_.heads_kv; h++) {
            const size_t shared = partitions_.empty() ? 0 : partitions_[h].size();
            write_value<uint64_t>(writer, shared);
            for (size_t p = 0; p < shared; p++) {
                write_value(writer, partition_checksum(partitions_[h][p]));
            }
            write_value<uint64_t>(writer, s.heads[h].size() - shared);
            for (size_t p = shared; p < s.heads[h].size(); p++) {
                write_partition(s.heads[h][p].partition, writer);
            }
        }
        for (const KeyCodes& codes : s.codes) {
            const size_t size = KeyCodes::code_size(params_.d);
            std::vector<uint8_t> bytes(codes.size() * size);
            for (int64_t i = 0; i < codes.size(); i++) {
                std::copy_n(
                        codes.code(params_.sink + i), size, &bytes[i * size]);
            }
            write_array(writer, bytes.data(), bytes.size());
        }
        for (const auto& head : s.heads) {
            for (const auto& listed : head) {
                const CellLists& lists = listed.lists;
                std::vector<uint16_t> cells(lists.size());
                for (int64_t i = 0; i < lists.size(); i++) {
                    cells[i] = static_cast<uint16_t>(
                            lists.cell_of(params_.sink + i));
                }
                write_array(writer, cells.data(), cells.size());
                const float* means = lists.stats().mean_post_rope;
                write_array(
                        writer,
                        means,
                        means ? size_t(lists.ncell()) * params_.d : 0);
                // Only where they are kept: other files stay as they were.
                if (const float* newest = lists.stats().newest_post_rope) {
                    write_array(
                            writer, newest, size_t(lists.ncell()) * params_.d);
                }
            }
        }
    });
}

int64_t AttentionAdapter::load(const std::string& path) {
    const MappedFile file(path);
    MemoryReader reader =
            read_checked(path, file.data(), file.size(), kSequenceFile);
    const auto expect = [&](const char* what, int64_t own, int64_t stated) {
        FAISS_THROW_IF_NOT_FMT(
                own == stated,
                "%s: saved with %s = %" PRId64 ", this adapter has %" PRId64,
                path.c_str(),
                what,
                stated,
                own);
    };
    expect("heads_kv", params_.heads_kv, read_value<int32_t>(reader));
    expect("d", params_.d, read_value<int32_t>(reader));
    expect("sink", params_.sink, read_value<int64_t>(reader));
    expect("window", params_.window, read_value<int64_t>(reader));
    expect("position_offset",
           params_.position_offset,
           read_value<int64_t>(reader));
    expect("key_codes", params_.key_codes, read_value<int32_t>(reader));
    const auto length = read_value<int64_t>(reader);
    FAISS_THROW_IF_NOT_FMT(
            length >= 0 && length <= INT32_MAX,
            "%s: corrupt: a length of %" PRId64,
            path.c_str(),
            length);
    HeadPartitions own(params_.heads_kv);
    for (int h = 0; h < params_.heads_kv; h++) {
        const size_t shared = partitions_.empty() ? 0 : partitions_[h].size();
        expect("partitions of a head",
               static_cast<int64_t>(shared),
               static_cast<int64_t>(read_value<uint64_t>(reader)));
        for (size_t p = 0; p < shared; p++) {
            FAISS_THROW_IF_NOT_FMT(
                    read_value<uint64_t>(reader) ==
                            partition_checksum(partitions_[h][p]),
                    "%s: partition %zd of KV head %d is not the one that the "
                    "sequence was saved with",
                    path.c_str(),
                    p,
                    h);
        }
        const auto n = read_value<uint64_t>(reader);
        for (uint64_t p = 0; p < n; p++) { // ends with the file at the latest
            own[h].push_back(read_partition(reader));
        }
    }
    std::unique_ptr<Sequence> s = make_sequence(own);
    const int64_t listed_slots =
            std::max(params_.sink, length - params_.window) - params_.sink;
    for (KeyCodes& codes : s->codes) {
        const auto bytes = read_array<uint8_t>(reader);
        FAISS_THROW_IF_NOT_FMT(
                bytes.size() == listed_slots * KeyCodes::code_size(params_.d),
                "%s: corrupt: codes of %zd bytes for a sequence of %" PRId64
                " tokens",
                path.c_str(),
                bytes.size(),
                length);
        codes.restore(listed_slots, bytes.data());
    }
    for (auto& head : s->heads) {
        for (auto& listed : head) {
            const auto cells = read_array<uint16_t>(reader);
            const auto means = read_array<float>(reader);
            const bool with = listed.lists.with_means();
            const bool with_newest = listed.lists.with_newest_keys();
            const auto newest = with_newest ? read_array<float>(reader)
                                            : std::vector<float>();
            FAISS_THROW_IF_NOT_FMT(
                    static_cast<int64_t>(cells.size()) == listed_slots &&
                            means.size() ==
                                    (with ? size_t(listed.lists.ncell()) *
                                             params_.d
                                          : 0),
                    "%s: corrupt: %zd slots listed and %zd means for a "
                    "sequence of %" PRId64 " tokens",
                    path.c_str(),
                    cells.size(),
                    means.size(),
                    length);
            const std::string name = path + ": corrupt: means";
            check_finite(
                    means.data(),
                    static_cast<int64_t>(means.size()) / params_.d,
                    params_.d,
                    name.c_str());
            FAISS_THROW_IF_NOT_FMT(
                    !with_newest ||
                            newest.size() ==
                                    size_t(listed.lists.ncell()) * params_.d,
                    "%s: corrupt: newest keys of %zd floats for %d cells of "
                    "d = %d",
                    path.c_str(),
                    newest.size(),
                    listed.lists.ncell(),
                    params_.d);
            check_finite(
                    newest.data(),
                    static_cast<int64_t>(newest.size()) / params_.d,
                    params_.d,
                    (path + ": corrupt: newest keys").c_str());
            listed.lists.restore(
                    listed_slots,
                    cells.data(),
                    params_.sink + params_.position_offset,
                    with ? means.data() : nullptr,
                    with_newest ? newest.data() : nullptr);
        }
    }
    FAISS_THROW_IF_NOT_FMT(
            reader.left == 0,
            "%s: corrupt: %zd bytes are left over",
            path.c_str(),
            reader.left);
    s->length = length;
    return insert(std::move(s));
}

} // namespace faiss_saap
