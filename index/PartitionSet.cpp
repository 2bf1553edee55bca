#include <faiss_saap/PartitionSet.h>

#include <cmath>
#include <cstring>
#include <set>

#include <faiss/IndexFlat.h>

#include <faiss_saap/QuantizerAssigner.h>
#include <faiss_saap/SafetensorsFile.h>
#include <faiss_saap/exactly.h>
#include <faiss_saap/version.h>

#include "check.h"
#include "shallow_json.h"

namespace faiss_saap {

namespace {

using nlohmann::json;

constexpr const char* kFormat = "faiss_saap.partitions";
/// 5: heads may share their input matrix; 4: with plans; 3: centroids may be bfloat16;
/// 2: with weights of blends; 1: without
constexpr int kVersion = 5;

std::string prefix_of(int layer, int kv_head) {
    return "layer." + std::to_string(layer) + ".kv." + std::to_string(kv_head);
}

TensorView view(
        const char* dtype,
        std::vector<int64_t> shape,
        const void* data,
        size_t element) {
    TensorView t;
    t.dtype = dtype;
    t.shape = std::move(shape);
    t.data = data;
    t.bytes = static_cast<size_t>(t.elements()) * element;
    return t;
}

const char* dtype_name(DType type) {
    return type == DType::float32 ? "F32" : "BF16";
}

std::string shape_text(const std::vector<int64_t>& shape) {
    std::string text = "(";
    for (size_t i = 0; i < shape.size(); i++) {
        text += (i ? ", " : "") + std::to_string(shape[i]);
    }
    return text + ")";
}

/// The key assigner, over a faiss::IndexFlat.
const QuantizerAssigner& quantizer_of(const TrainedPartition& p) {
    const auto* key =
            exactly<QuantizerAssigner>(not_null(p.partition.key, "partition.key"));
    FAISS_THROW_IF_NOT_FMT(
            key && dynamic_cast<const faiss::IndexFlat*>(key->quantizer.get()) &&
                    key->needs == NEEDS_PRE_ROPE,
            "%s: the key assigner is no flat quantizer of de-rotated keys",
            prefix_of(p.layer, p.kv_head).c_str());
    return *key;
}

const QueryClassifier& classifier_of(const TrainedPartition& p) {
    const auto* classifier =
            exactly<QueryClassifier>(not_null(p.partition.query, "partition.query"));
    FAISS_THROW_IF_NOT_FMT(
            classifier,
            "%s: the query assigner is no QueryClassifier",
            prefix_of(p.layer, p.kv_head).c_str());
    return *classifier;
}

/// What the metadata says of one partition.
json describe(const TrainedPartition& p) {
    const ClassifierShape& s = classifier_of(p).shape;
    json heads = json::array();
    for (const HeldOut& h : p.heads) {
        heads.push_back({h.recall, h.ceiling, h.far_mass});
    }
    return {{"d", s.d},
            {"group", s.group},
            {"ncell", s.ncell},
            {"width", s.width},
            {"depth", s.depth},
            {"share_input", s.share_input},
            {"share_trunk", s.share_trunk},
            {"spherical",
             quantizer_of(p).quantizer->metric_type == faiss::METRIC_INNER_PRODUCT},
            {"keys", p.balance.keys},
            {"largest_cell", p.balance.largest},
            {"empty_cells", p.balance.empty},
            {"imbalance", p.balance.imbalance},
            {"steps", p.steps},
            // recall, ceiling, far mass
            {"held_out", heads},
            {"blend", !p.blend.empty()},
            {"scale", p.blend.empty() ? 0 : p.scale}};
}

json describe(const ProbePlan& p) {
    return {{"layer", p.layer},
            {"kv_head", p.kv_head},
            {"trained", name(p.trained)},
            {"trained_share", p.trained_share},
            {"segment", p.segment},
            {"keys_per_cell", p.keys_per_cell},
            {"own_share", p.own_share},
            {"tokens", p.tokens},
            {"byte_budget", p.byte_budget},
            {"recall", p.recall},
            {"output_error", p.output_error}};
}

/// As text, which reading gives back.
/// @param where  of the file, for errors
std::string text_of(const json& j, const std::string& where) {
    const json flat = j.flatten();
    for (const auto& [name, value] : flat.items()) {
        FAISS_THROW_IF_NOT_FMT(
                !value.is_number_float() || std::isfinite(value.get<double>()),
                "%s%s is %f: numbers must be finite",
                where.c_str(),
                name.c_str(),
                value.get<double>());
    }
    try {
        return j.dump();
    } catch (const json::exception&) {
        FAISS_THROW_FMT("%s: a text is not valid UTF-8", where.c_str());
    }
}

/// Tensors of one file, each of which must be asked for with its shape.
class Reader {
   public:
    explicit Reader(const std::string& path) : file_(path) {}

    const SafetensorsFile& file() const {
        return file_;
    }

    std::string required(const std::string& key) const {
        const auto it = file_.metadata().find(key);
        FAISS_THROW_IF_NOT_FMT(
                it != file_.metadata().end(),
                "%s: the metadata has no '%s'",
                file_.path().c_str(),
                key.c_str());
        return it->second;
    }

    json parsed(const std::string& key) const {
        const std::string text = required(key);
        const json j =
                parse_shallow_json(text.data(), text.data() + text.size());
        FAISS_THROW_IF_NOT_FMT(
                !j.is_null(),
                "%s: metadata '%s' is no JSON",
                file_.path().c_str(),
                key.c_str());
        return j;
    }

    /// The tensor, whose shape must be this one.
    const TensorView& tensor(
            const std::string& name,
            const std::string& dtype,
            const std::vector<int64_t>& shape) const {
        const TensorView& t = file_.tensor(name);
        FAISS_THROW_IF_NOT_FMT(
                t.dtype == dtype && t.shape == shape,
                "%s: tensor '%s' is %s %s, expected %s %s",
                file_.path().c_str(),
                name.c_str(),
                t.dtype.c_str(),
                shape_text(t.shape).c_str(),
                dtype.c_str(),
                shape_text(shape).c_str());
        return t;
    }

   private:
    SafetensorsFile file_;
};

/// A value of a JSON object, of the right type, or a sentence.
template <class T>
T value_of(const json& object, const char* key, const std::string& where) {
    try {
        return object.at(key).get<T>();
    } catch (const json::exception&) {
        FAISS_THROW_FMT(
                "%s: '%s' is missing or of the wrong kind", where.c_str(), key);
    }
}

QueryClassifier read_classifier(
        const Reader& reader,
        const std::string& prefix,
        const ClassifierShape& shape) {
    std::vector<float> parameters;
    std::string dtype;
    for (const ClassifierLayer& layer : classifier_layers(shape)) {
        const std::string name = prefix + "." + layer.name;
        if (dtype.empty()) {
            dtype = reader.file().tensor(name + ".weight").dtype;
            FAISS_THROW_IF_NOT_FMT(
                    dtype == "F32" || dtype == "BF16",
                    "%s: tensor '%s.weight' is %s, weights are F32 or BF16",
                    reader.file().path().c_str(),
                    name.c_str(),
                    dtype.c_str());
        }
        const int64_t padded = (layer.cols + 7) / 8 * 8;
        const auto w =
                reader.tensor(
                              name + ".weight",
                              dtype,
                              {layer.networks, layer.rows, padded})
                        .to_float();
        const auto b =
                reader.tensor(
                              name + ".bias",
                              "F32",
                              {layer.bias_networks, layer.rows})
                        .to_float();
        const size_t rows = size_t(layer.networks) * layer.rows;
        for (size_t row = 0; row < rows; row++) {
            const auto from = w.begin() + row * padded;
            parameters.insert(parameters.end(), from, from + layer.cols);
        }
        parameters.insert(parameters.end(), b.begin(), b.end());
    }
    try {
        return QueryClassifier(
                shape,
                parameters.data(),
                dtype == "F32" ? DType::float32 : DType::bfloat16);
    } catch (const faiss::FaissException& e) {
        FAISS_THROW_FMT(
                "%s: %s: %s",
                reader.file().path().c_str(),
                prefix.c_str(),
                e.what());
    }
}

TrainedPartition read_partition(
        const Reader& reader,
        const PartitionSet& set,
        int layer,
        int kv_head) {
    const std::string prefix = prefix_of(layer, kv_head);
    const std::string where = reader.file().path() + ": " + prefix;
    const json about = reader.parsed(prefix);
    TrainedPartition p;
    p.layer = layer;
    p.kv_head = kv_head;
    ClassifierShape s;
    s.d = value_of<int>(about, "d", where);
    s.group = value_of<int>(about, "group", where);
    s.ncell = value_of<int>(about, "ncell", where);
    s.width = value_of<int>(about, "width", where);
    s.depth = value_of<int>(about, "depth", where);
    // Files before version 5 say nothing of it, and mean something else by no depth.
    const bool old = !about.contains("share_input");
    s.share_input = !old && value_of<bool>(about, "share_input", where);
    FAISS_THROW_IF_NOT_FMT(
            !old || s.depth != 0,
            "%s: depth = 0 is a linear classifier of an earlier version, which "
            "this one has not",
            where.c_str());
    s.share_trunk = value_of<bool>(about, "share_trunk", where);
    try {
        s.check();
    } catch (const faiss::FaissException& e) {
        FAISS_THROW_FMT("%s: %s", where.c_str(), e.what());
    }
    FAISS_THROW_IF_NOT_FMT(
            s.d == set.rope.d,
            "%s: d = %d, the RoPE parameters are for d = %d",
            where.c_str(),
            s.d,
            set.rope.d);
    p.balance.keys = value_of<int64_t>(about, "keys", where);
    p.balance.largest = value_of<int64_t>(about, "largest_cell", where);
    p.balance.empty = value_of<int>(about, "empty_cells", where);
    p.balance.imbalance = value_of<double>(about, "imbalance", where);
    p.steps = value_of<int64_t>(about, "steps", where);
    const auto held_out = value_of<std::vector<std::vector<double>>>(
            about, "held_out", where);
    FAISS_THROW_IF_NOT_FMT(
            held_out.size() == static_cast<size_t>(s.group),
            "%s: held_out has %zd entries, there are %d query heads",
            where.c_str(),
            held_out.size(),
            s.group);
    for (const auto& h : held_out) {
        FAISS_THROW_IF_NOT_FMT(
                h.size() == 3,
                "%s: an entry of held_out has %zd numbers, not 3",
                where.c_str(),
                h.size());
        HeldOut head;
        head.recall = h[0];
        head.ceiling = h[1];
        head.far_mass = h[2];
        p.heads.push_back(head);
    }

    const std::string stored =
            reader.file().tensor(prefix + ".centroids").dtype;
    const auto centroids = reader.tensor(
                                         prefix + ".centroids",
                                         stored == "BF16" ? "BF16" : "F32",
                                         {s.ncell, s.d})
                                   .to_float();
    check_finite(
            centroids.data(), s.ncell, s.d, (where + ".centroids").c_str());
    auto flat = std::make_shared<faiss::IndexFlat>(
            s.d,
            value_of<bool>(about, "spherical", where)
                    ? faiss::METRIC_INNER_PRODUCT
                    : faiss::METRIC_L2);
    flat->add(s.ncell, centroids.data());
    p.partition.key = std::make_shared<QuantizerAssigner>(flat, NEEDS_PRE_ROPE);
    p.partition.query = std::make_shared<QueryClassifier>(
            read_classifier(reader, prefix, s));
    p.partition.rope = set.rope;
    p.partition.check();
    if (about.contains("blend") && value_of<bool>(about, "blend", where)) {
        p.scale = value_of<float>(about, "scale", where);
        const auto weights =
                reader.tensor(
                              prefix + ".blend",
                              "F32",
                              {s.group, kBlendFeatures})
                        .to_float();
        static_assert(
                sizeof(BlendWeights) == kBlendFeatures * sizeof(float),
                "weights are written as they are");
        p.blend.resize(s.group);
        std::memcpy(
                static_cast<void*>(p.blend.data()),
                weights.data(),
                weights.size() * sizeof(float));
        try {
            p.blended();
        } catch (const faiss::FaissException& e) {
            FAISS_THROW_FMT("%s: %s", where.c_str(), e.what());
        }
    }
    return p;
}

/// A plan of this set, that can be followed and is the only one of its head.
void check_plan(const ProbePlan& plan, const PartitionSet& set) {
    plan.check();
    const TrainedPartition& trained = set.find(plan.layer, plan.kv_head);
    FAISS_THROW_IF_NOT_FMT(
            plan.trained != TrainedQuery::blend || !trained.blend.empty(),
            "the plan of layer %d, KV head %d is a blend, which was not "
            "trained",
            plan.layer,
            plan.kv_head);
    for (const ProbePlan& other : set.plans) {
        FAISS_THROW_IF_NOT_FMT(
                &other == &plan || other.layer != plan.layer ||
                        other.kv_head != plan.kv_head,
                "two plans of layer %d, KV head %d",
                plan.layer,
                plan.kv_head);
    }
}

ProbePlan read_plan(
        const json& about,
        const PartitionSet& set,
        const std::string& where) {
    ProbePlan p;
    p.layer = value_of<int>(about, "layer", where);
    p.kv_head = value_of<int>(about, "kv_head", where);
    p.trained_share = value_of<double>(about, "trained_share", where);
    p.segment = value_of<int64_t>(about, "segment", where);
    p.keys_per_cell = value_of<int>(about, "keys_per_cell", where);
    p.own_share = value_of<double>(about, "own_share", where);
    p.tokens = value_of<int64_t>(about, "tokens", where);
    p.byte_budget = value_of<double>(about, "byte_budget", where);
    p.recall = value_of<double>(about, "recall", where);
    p.output_error = value_of<double>(about, "output_error", where);
    const auto trained = value_of<std::string>(about, "trained", where);
    try {
        p.trained = trained_query(trained);
        check_plan(p, set);
    } catch (const faiss::FaissException& e) {
        FAISS_THROW_FMT("%s: %s", where.c_str(), e.what());
    }
    return p;
}

} // namespace

const TrainedPartition& PartitionSet::find(int layer, int kv_head) const {
    for (const TrainedPartition& p : partitions) {
        if (p.layer == layer && p.kv_head == kv_head) {
            return p;
        }
    }
    FAISS_THROW_FMT(
            "there is no partition of layer %d, KV head %d; there are %zd of "
            "other heads",
            layer,
            kv_head,
            partitions.size());
}

const ProbePlan& PartitionSet::find_plan(int layer, int kv_head) const {
    for (const ProbePlan& p : plans) {
        if (p.layer == layer && p.kv_head == kv_head) {
            return p;
        }
    }
    FAISS_THROW_FMT(
            "there is no plan of layer %d, KV head %d; there are %zd of other "
            "heads",
            layer,
            kv_head,
            plans.size());
}

void PartitionSet::check_rope(const RopeParams& other) const {
    FAISS_THROW_IF_NOT_FMT(
            rope.d == other.d,
            "the partitions were trained for head dimension %d, not %d",
            rope.d,
            other.d);
    FAISS_THROW_IF_NOT_FMT(
            rope == other,
            "the partitions were trained for other RoPE parameters: theta %g, "
            "layout %s, scaling '%s'; asked for are theta %g, layout %s, "
            "scaling '%s'",
            rope.theta,
            rope.layout == RopeLayout::half ? "half" : "interleaved",
            rope.scaling_text().c_str(),
            other.theta,
            other.layout == RopeLayout::half ? "half" : "interleaved",
            other.scaling_text().c_str());
}

void write_partitions(const PartitionSet& set, const std::string& path) {
    if (set.rope.d != 0) {
        set.rope.check();
    }
    std::map<std::string, TensorView> tensors;
    json heads = json::array();
    std::map<std::string, std::string> metadata = {
            {"format", kFormat},
            {"format_version", std::to_string(kVersion)},
            {"library_version", FAISS_SAAP_VERSION},
            {"model", set.model},
            {"texts", text_of(set.texts, path + ": texts")},
            {"rope",
             text_of(
                     {{"d", set.rope.d},
                      {"theta", set.rope.theta},
                      {"layout",
                       set.rope.layout == RopeLayout::half ? "half"
                                                           : "interleaved"},
                      {"scaling", set.rope.scaling_text()}},
                     path + ": rope")},
            {"training",
             json({{"sink", set.sink},
                   {"window", set.window},
                   {"seed", set.seed}})
                     .dump()}};
    for (const TrainedPartition& p : set.partitions) {
        const std::string prefix = prefix_of(p.layer, p.kv_head);
        FAISS_THROW_IF_NOT_FMT(
                !metadata.count(prefix),
                "%s: two partitions of layer %d, KV head %d",
                path.c_str(),
                p.layer,
                p.kv_head);
        p.partition.check();
        FAISS_THROW_IF_NOT_FMT(
                p.partition.rope == set.rope,
                "%s: the partition of layer %d, KV head %d has other RoPE "
                "parameters than the set",
                path.c_str(),
                p.layer,
                p.kv_head);
        FAISS_THROW_IF_NOT_FMT(
                p.layer >= 0 && p.kv_head >= 0,
                "%s: a partition of layer %d, KV head %d: neither can be negative",
                path.c_str(),
                p.layer,
                p.kv_head);
        const QueryClassifier& classifier = classifier_of(p);
        FAISS_THROW_IF_NOT_FMT(
                classifier.shape.d == set.rope.d,
                "%s: the partition of layer %d, KV head %d has d = %d, the RoPE "
                "parameters are for d = %d",
                path.c_str(),
                p.layer,
                p.kv_head,
                classifier.shape.d,
                set.rope.d);
        FAISS_THROW_IF_NOT_FMT(
                p.heads.size() == static_cast<size_t>(classifier.shape.group),
                "%s: the partition of layer %d, KV head %d has held-out results of "
                "%zd query heads, its classifier has %d",
                path.c_str(),
                p.layer,
                p.kv_head,
                p.heads.size(),
                classifier.shape.group);
        const QuantizerAssigner& key = quantizer_of(p);
        const auto& flat = static_cast<const faiss::IndexFlat&>(*key.quantizer);
        heads.push_back({p.layer, p.kv_head});
        metadata[prefix] = text_of(describe(p), path + ": " + prefix);
        const std::vector<uint16_t>& halves = key.bfloat16_vectors;
        tensors[prefix + ".centroids"] = halves.empty()
                ? view("F32", {flat.ntotal, flat.d}, flat.get_xb(), 4)
                : view("BF16", {flat.ntotal, flat.d}, halves.data(), 2);
        if (!p.blend.empty()) {
            p.blended(); // checks the weights
            tensors[prefix + ".blend"] =
                    view("F32",
                         {classifier.shape.group, kBlendFeatures},
                         p.blend.data(),
                         4);
        }
        for (const auto& stored : classifier.layers()) {
            const ClassifierLayer& layer = stored.layer;
            const std::string name = prefix + "." + layer.name;
            tensors[name + ".weight"] =
                    view(dtype_name(classifier.dtype),
                         {layer.networks, layer.rows, stored.padded_cols},
                         classifier.weights() + stored.weight,
                         element_size(classifier.dtype));
            tensors[name + ".bias"] =
                    view("F32",
                         {layer.bias_networks, layer.rows},
                         classifier.biases() + stored.bias,
                         4);
        }
    }
    metadata["heads"] = heads.dump();
    json plans = json::array();
    for (const ProbePlan& p : set.plans) {
        check_plan(p, set);
        plans.push_back(describe(p));
    }
    metadata["plans"] = text_of(plans, path + ": plans");
    metadata["plan_texts"] = text_of(set.plan_texts, path + ": plan_texts");
    write_safetensors(path, tensors, metadata);
}

PartitionSet read_partitions(const std::string& path) {
    const Reader reader(path);
    const char* file = path.c_str();
    FAISS_THROW_IF_NOT_FMT(
            reader.file().meta("format") == kFormat,
            "%s: this is no file of partitions: its format is '%s'",
            file,
            reader.file().meta("format").c_str());
    const std::string version = reader.required("format_version");
    FAISS_THROW_IF_NOT_FMT(
            version == "1" || version == "2" || version == "3" || version == "4" ||
                    version == std::to_string(kVersion),
            "%s: version '%s' of the format is not known to this library, "
            "which reads versions up to %d",
            file,
            version.c_str(),
            kVersion);
    PartitionSet set;
    set.version = reader.required("library_version");
    set.model = reader.required("model");
    const json rope = reader.parsed("rope");
    const std::string where = path + ": rope";
    set.rope.d = value_of<int>(rope, "d", where);
    set.rope.theta = value_of<double>(rope, "theta", where);
    const auto layout = value_of<std::string>(rope, "layout", where);
    FAISS_THROW_IF_NOT_FMT(
            layout == "half" || layout == "interleaved",
            "%s: layout '%s' must be half or interleaved",
            where.c_str(),
            layout.c_str());
    set.rope.layout =
            layout == "half" ? RopeLayout::half : RopeLayout::interleaved;
    const auto scaling = value_of<std::string>(rope, "scaling", where);
    try {
        set.rope.set_scaling(scaling);
    } catch (const faiss::FaissException& e) {
        FAISS_THROW_FMT("%s: %s", where.c_str(), e.what());
    }
    const json training = reader.parsed("training");
    set.sink = value_of<int64_t>(training, "sink", path + ": training");
    set.window = value_of<int64_t>(training, "window", path + ": training");
    set.seed = value_of<int>(training, "seed", path + ": training");
    std::vector<std::vector<int>> heads;
    try {
        set.texts = reader.parsed("texts").get<std::vector<std::string>>();
        heads = reader.parsed("heads").get<std::vector<std::vector<int>>>();
    } catch (const json::exception&) {
        FAISS_THROW_FMT("%s: texts or heads are no lists", file);
    }
    std::set<std::vector<int>> seen;
    for (const auto& h : heads) {
        FAISS_THROW_IF_NOT_FMT(
                h.size() == 2 && h[0] >= 0 && h[1] >= 0 &&
                        seen.insert(h).second,
                "%s: heads must name each layer and KV head once",
                file);
        set.partitions.push_back(read_partition(reader, set, h[0], h[1]));
    }
    if (reader.file().metadata().count("plans")) {
        const json plans = reader.parsed("plans");
        FAISS_THROW_IF_NOT_FMT(plans.is_array(), "%s: plans is no list", file);
        for (const json& about : plans) {
            set.plans.push_back(read_plan(about, set, path + ": plans"));
        }
        set.plan_texts = value_of<std::vector<std::string>>(
                json{{"plan_texts", reader.parsed("plan_texts")}},
                "plan_texts",
                path);
    }
    return set;
}

} // namespace faiss_saap
