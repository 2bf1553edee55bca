#include <faiss_saap/Trace.h>

#include <algorithm>
#include <cinttypes>

#include "check.h"
#include "parse_number.h"

namespace faiss_saap {

namespace {

/// Numbers of layers or heads, each of them once.
std::vector<int> parse_numbers(
        const std::string& text,
        const std::string& where) {
    std::vector<int> numbers;
    for (size_t begin = 0; begin <= text.size();) {
        const size_t end = std::min(text.find(',', begin), text.size());
        const auto number = parse_number<int>(text.substr(begin, end - begin));
        FAISS_THROW_IF_NOT_FMT(
                number && *number >= 0,
                "%s = '%s' is not a list of numbers",
                where.c_str(),
                text.c_str());
        FAISS_THROW_IF_NOT_FMT(
                std::find(numbers.begin(), numbers.end(), *number) == numbers.end(),
                "%s = '%s' names %d twice",
                where.c_str(),
                text.c_str(),
                *number);
        numbers.push_back(*number);
        begin = end + 1;
    }
    return numbers;
}

/// The trace's tensors are (heads, tokens, d).
const TensorView& tensor3(
        const SafetensorsFile& file,
        const std::string& name) {
    const TensorView& t = file.tensor(name);
    FAISS_THROW_IF_NOT_FMT(
            t.shape.size() == 3,
            "%s: tensor '%s' has %zd dimensions, a trace's has 3",
            file.path().c_str(),
            name.c_str(),
            t.shape.size());
    FAISS_THROW_IF_NOT_FMT(
            t.dtype == "F16" || t.dtype == "BF16" || t.dtype == "F32",
            "%s: tensor '%s' has dtype %s, a trace's is F16, BF16 or F32",
            file.path().c_str(),
            name.c_str(),
            t.dtype.c_str());
    for (int64_t n : t.shape) {
        FAISS_THROW_IF_NOT_FMT(
                n >= 1 && n <= INT32_MAX,
                "%s: tensor '%s' has a dimension of %" PRId64,
                file.path().c_str(),
                name.c_str(),
                n);
    }
    return t;
}

std::string tensor_name(int layer, const char* what) {
    return "layer." + std::to_string(layer) + "." + what;
}

} // namespace

Trace::Trace(const std::string& path)
        : file_(path) {
    const char* file_name = path.c_str();
    const auto required = [&](const char* key) {
        const std::string value = file_.meta(key);
        FAISS_THROW_IF_NOT_FMT(
                !value.empty(),
                "%s: the metadata has no '%s', so this is no trace",
                file_name,
                key);
        return value;
    };
    layers = parse_numbers(required("layers"), path + ": layers");
    for (int layer : layers) {
        const TensorView& q = tensor3(file_, tensor_name(layer, "q"));
        const TensorView& k = tensor3(file_, tensor_name(layer, "k"));
        const TensorView& v = tensor3(file_, tensor_name(layer, "v"));
        if (layer == layers.front()) {
            heads_q = static_cast<int>(q.shape[0]);
            heads_kv = static_cast<int>(k.shape[0]);
            tokens = k.shape[1];
            d = static_cast<int>(k.shape[2]);
        }
        const auto expect = [&](const TensorView& t, int heads, const char* w) {
            FAISS_THROW_IF_NOT_FMT(
                    t.shape[0] == heads && t.shape[1] == tokens &&
                            t.shape[2] == d,
                    "%s: tensor 'layer.%d.%s' is (%" PRId64 ", %" PRId64
                    ", %" PRId64 "), expected (%d, %" PRId64 ", %d)",
                    file_name,
                    layer,
                    w,
                    t.shape[0],
                    t.shape[1],
                    t.shape[2],
                    heads,
                    tokens,
                    d);
        };
        expect(q, heads_q, "q");
        expect(k, heads_kv, "k");
        expect(v, heads_kv, "v");
    }
    FAISS_THROW_IF_NOT_FMT(
            heads_q % heads_kv == 0,
            "%s: %d query heads are no multiple of %d KV heads",
            file_name,
            heads_q,
            heads_kv);

    const std::string heads = file_.meta("kv_heads");
    if (heads.empty()) {
        for (int h = 0; h < heads_kv; h++) {
            kv_heads.push_back(h);
        }
    } else {
        kv_heads = parse_numbers(heads, path + ": kv_heads");
    }
    FAISS_THROW_IF_NOT_FMT(
            kv_heads.size() == static_cast<size_t>(heads_kv),
            "%s: kv_heads names %zd heads, the tensors have %d",
            file_name,
            kv_heads.size(),
            heads_kv);

    FAISS_THROW_IF_NOT_FMT(
            file_.meta("rope_applied", "no") == "no",
            "%s: rope_applied = '%s', a trace holds pre-RoPE vectors",
            file_name,
            file_.meta("rope_applied").c_str());
    const std::string layout = required("rope_layout");
    FAISS_THROW_IF_NOT_FMT(
            layout == "half" || layout == "interleaved",
            "%s: rope_layout = '%s' must be half or interleaved",
            file_name,
            layout.c_str());
    rope.layout =
            layout == "half" ? RopeLayout::half : RopeLayout::interleaved;
    rope.d = d;
    const std::string theta = required("rope_theta");
    const auto theta_number = parse_number<double>(theta);
    FAISS_THROW_IF_NOT_FMT(
            theta_number,
            "%s: rope_theta = '%s' is not a number",
            file_name,
            theta.c_str());
    rope.theta = *theta_number;
    try {
        rope.set_scaling(file_.meta("rope_scaling"));
    } catch (const faiss::FaissException& e) {
        FAISS_THROW_FMT("%s: %s", file_name, e.what());
    }
    model = file_.meta("model");
    text = file_.meta("text");
}

int Trace::kv_index(int head) const {
    const auto it = std::find(kv_heads.begin(), kv_heads.end(), head);
    FAISS_THROW_IF_NOT_FMT(
            it != kv_heads.end(),
            "%s: KV head %d is not in the trace, which holds %zd of them "
            "beginning with %d",
            file_.path().c_str(),
            head,
            kv_heads.size(),
            kv_heads.front());
    return static_cast<int>(it - kv_heads.begin());
}

std::vector<float> Trace::head(int layer, const char* what, int heads, int head)
        const {
    // Other layers the file may have were not checked.
    FAISS_THROW_IF_NOT_FMT(
            std::find(layers.begin(), layers.end(), layer) != layers.end(),
            "%s: layer %d is not among those that the trace holds",
            file_.path().c_str(),
            layer);
    const std::string name = tensor_name(layer, what);
    FAISS_THROW_IF_NOT_FMT(
            head >= 0 && head < heads,
            "%s: tensor '%s' has no head %d, it has %d",
            file_.path().c_str(),
            name.c_str(),
            head,
            heads);
    const TensorView& all = file_.tensor(name);
    TensorView one = all;
    one.shape[0] = 1;
    one.bytes = all.bytes / heads;
    one.data = static_cast<const char*>(all.data) + head * one.bytes;
    std::vector<float> x = one.to_float();
    check_finite(x.data(), tokens, d, (file_.path() + ": " + name).c_str());
    return x;
}

std::vector<float> Trace::queries(int layer, int h) const {
    return head(layer, "q", heads_q, h);
}

std::vector<float> Trace::keys(int layer, int h) const {
    return head(layer, "k", heads_kv, h);
}

std::vector<float> Trace::values(int layer, int h) const {
    return head(layer, "v", heads_kv, h);
}

} // namespace faiss_saap
