#include <faiss_saap/SafetensorsFile.h>

#include <cinttypes>
#include <faiss_saap/dtype.h>

#include "MappedFile.h"
#include "check.h"
#include "shallow_json.h"
#include "write_file.h"

namespace faiss_saap {

namespace {

/// Bytes per element of the types of the safetensors format; 0: unknown.
size_t bytes_of(const std::string& dtype) {
    static const std::map<std::string, size_t> sizes = {
            {"F64", 8},     {"I64", 8},     {"U64", 8},  {"F32", 4},
            {"I32", 4},     {"U32", 4},     {"F16", 2},  {"BF16", 2},
            {"I16", 2},     {"U16", 2},     {"I8", 1},   {"U8", 1},
            {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"BOOL", 1},
    };
    const auto it = sizes.find(dtype);
    return it == sizes.end() ? 0 : it->second;
}

/// Bytes of a tensor; throws when the product does not fit.
size_t bytes_of(
        const std::string& dtype,
        const std::vector<int64_t>& shape,
        const std::string& where) {
    size_t bytes = bytes_of(dtype);
    FAISS_THROW_IF_NOT_FMT(
            bytes > 0,
            "%s: dtype '%s' is unknown",
            where.c_str(),
            dtype.c_str());
    for (int64_t n : shape) {
        FAISS_THROW_IF_NOT_FMT(
                n >= 0 &&
                        !__builtin_mul_overflow(
                                bytes, static_cast<size_t>(n), &bytes),
                "%s: the shape's entry %" PRId64 " makes no sense",
                where.c_str(),
                n);
    }
    return bytes;
}

/// The header may not be larger than this, as in the reference implementation.
constexpr uint64_t kMaxHeader = 100'000'000;

} // namespace

int64_t TensorView::elements() const {
    int64_t n = 1;
    for (int64_t s : shape) {
        n *= s;
    }
    return n;
}

std::vector<float> TensorView::to_float() const {
    FAISS_THROW_IF_NOT_FMT(
            dtype == "F32" || dtype == "F16" || dtype == "BF16",
            "dtype '%s' is not a floating-point type that can be read as float",
            dtype.c_str());
    const DType type = dtype == "F32" ? DType::float32
            : dtype == "F16"          ? DType::float16
                                      : DType::bfloat16;
    std::vector<float> x(elements());
    faiss_saap::to_float(type, data, elements(), x.data());
    return x;
}

SafetensorsFile::SafetensorsFile(const std::string& path)
        : path_(path), file_(std::make_shared<const MappedFile>(path)) {
    const uint8_t* bytes = file_->data();
    const size_t size = file_->size();
    FAISS_THROW_IF_NOT_FMT(
            size >= 8,
            "%s: %zd bytes are too few for a safetensors file",
            path.c_str(),
            size);
    uint64_t header = 0;
    for (int i = 0; i < 8; i++) { // little-endian on every machine
        header |= static_cast<uint64_t>(bytes[i]) << (8 * i);
    }
    FAISS_THROW_IF_NOT_FMT(
            header <= kMaxHeader && header <= size - 8,
            "%s: the header says it has %" PRIu64
            " bytes, the file has %zd in all",
            path_.c_str(),
            header,
            size);
    const char* text = reinterpret_cast<const char*>(bytes + 8);
    const auto json = parse_shallow_json(text, text + header);
    FAISS_THROW_IF_NOT_FMT(
            json.is_object(),
            "%s: the header is not a JSON object",
            path_.c_str());
    const size_t data_size = size - 8 - header;
    for (const auto& [name, value] : json.items()) {
        const std::string where = path_ + ": tensor '" + name + "'";
        FAISS_THROW_IF_NOT_FMT(
                value.is_object(), "%s is not an object", where.c_str());
        if (name == "__metadata__") {
            for (const auto& [k, v] : value.items()) {
                FAISS_THROW_IF_NOT_FMT(
                        v.is_string(),
                        "%s: metadata '%s' is not a string",
                        path_.c_str(),
                        k.c_str());
                metadata_[k] = v.get<std::string>();
            }
            continue;
        }
        TensorView t;
        uint64_t begin = 0, end = 0;
        try {
            t.dtype = value.at("dtype").get<std::string>();
            for (const auto& s : value.at("shape")) {
                FAISS_THROW_IF_NOT(s.is_number_unsigned());
                t.shape.push_back(s.get<int64_t>());
            }
            const auto& offsets = value.at("data_offsets");
            FAISS_THROW_IF_NOT(
                    offsets.size() == 2 && offsets[0].is_number_unsigned() &&
                    offsets[1].is_number_unsigned());
            begin = offsets[0].get<uint64_t>();
            end = offsets[1].get<uint64_t>();
        } catch (const std::exception&) {
            FAISS_THROW_FMT(
                    "%s: dtype, shape or data_offsets are missing or of the "
                    "wrong kind",
                    where.c_str());
        }
        t.bytes = bytes_of(t.dtype, t.shape, where);
        FAISS_THROW_IF_NOT_FMT(
                begin <= end && end <= data_size,
                "%s: data_offsets %" PRIu64 " .. %" PRIu64
                " are outside the file, which holds %zd bytes of data",
                where.c_str(),
                begin,
                end,
                data_size);
        FAISS_THROW_IF_NOT_FMT(
                end - begin == t.bytes,
                "%s: data_offsets span %" PRIu64 " bytes, its shape needs %zd",
                where.c_str(),
                end - begin,
                t.bytes);
        t.data = bytes + 8 + header + begin;
        tensors_[name] = t;
    }
}

const TensorView& SafetensorsFile::tensor(const std::string& name) const {
    const auto it = tensors_.find(name);
    FAISS_THROW_IF_NOT_FMT(
            it != tensors_.end(),
            "%s: there is no tensor '%s'",
            path_.c_str(),
            name.c_str());
    return it->second;
}

std::string SafetensorsFile::meta(
        const std::string& key,
        const std::string& otherwise) const {
    const auto it = metadata_.find(key);
    return it == metadata_.end() ? otherwise : it->second;
}

void write_safetensors(
        const std::string& path,
        const std::map<std::string, TensorView>& tensors,
        const std::map<std::string, std::string>& metadata) {
    nlohmann::json header = nlohmann::json::object();
    if (!metadata.empty()) {
        header["__metadata__"] = metadata;
    }
    uint64_t at = 0;
    for (const auto& [name, t] : tensors) {
        const std::string where = path + ": tensor '" + name + "'";
        FAISS_THROW_IF_NOT_FMT(
                name != "__metadata__",
                "%s: the format keeps this name for the metadata",
                where.c_str());
        const size_t bytes = bytes_of(t.dtype, t.shape, where);
        FAISS_THROW_IF_NOT_FMT(
                bytes == t.bytes && (t.data || bytes == 0),
                "%s has %zd bytes, its shape needs %zd",
                where.c_str(),
                t.bytes,
                bytes);
        header[name] = {
                {"dtype", t.dtype},
                {"shape", t.shape},
                {"data_offsets", {at, at + bytes}}};
        at += bytes;
    }
    std::string text;
    try {
        text = header.dump();
    } catch (const nlohmann::json::exception&) {
        FAISS_THROW_FMT(
                "%s: a name or metadata is not valid UTF-8", path.c_str());
    }
    text.resize((text.size() + 7) / 8 * 8, ' '); // data begins aligned
    write_file(path, [&](FileSink& sink) {
        uint8_t length[8];
        for (int i = 0; i < 8; i++) {
            length[i] = static_cast<uint8_t>(text.size() >> (8 * i));
        }
        sink.write(length, 8);
        sink.write(text.data(), text.size());
        for (const auto& [name, t] : tensors) {
            sink.write(t.data, t.bytes);
        }
    });
}

} // namespace faiss_saap
