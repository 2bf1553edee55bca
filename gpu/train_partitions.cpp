#include <faiss_saap/gpu/train_partitions.h>

#include <algorithm>
#include <cinttypes>
#include <future>
#include <tuple>

#include <faiss_saap/HeadTraining.h>
#include <faiss_saap/gpu/assign_cells.h>
#include <faiss_saap/gpu/device.h>
#include <faiss_saap/gpu/kmeans.h>

#include "DeviceTexts.h"
#include "adamw_step.h"
#include "attention_targets.h"
#include "check.h"
#include "classifier_step.h"

namespace faiss_saap::gpu {

namespace {

template <class T>
void copy(T* to, const T* from, size_t n, cudaStream_t stream) {
    if (n) {
        FAISS_SAAP_CUDA_CHECK(cudaMemcpyAsync(
                to, from, n * sizeof(T), cudaMemcpyDefault, stream));
    }
}

/// Calls fn(i) for i in 0 .. n - 1, each on a thread of its own.
template <class Fn>
void at_once(size_t n, const Fn& fn) {
    std::vector<std::future<void>> all;
    for (size_t i = 0; i < n; i++) {
        all.push_back(std::async(std::launch::async, [&fn, i] { fn(i); }));
    }
    for (auto& one : all) {
        one.wait();
    }
    for (auto& one : all) {
        one.get(); // throws what it threw
    }
}

class Stream {
   public:
    Stream() {
        FAISS_SAAP_CUDA_CHECK(cudaStreamCreate(&stream_));
    }
    ~Stream() {
        cudaStreamDestroy(stream_);
    }
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;
    operator cudaStream_t() const {
        return stream_;
    }

   private:
    cudaStream_t stream_ = nullptr;
};

using Heads = std::vector<std::unique_ptr<HeadTraining>>;

/// Centroids of those that have none.
void cluster(const Heads& all, cudaStream_t stream) {
    std::vector<HeadTraining*> heads;
    for (const auto& head : all) {
        if (head->state.centroids.empty()) {
            heads.push_back(head.get());
        }
    }
    if (heads.empty()) {
        return;
    }
    std::vector<std::vector<float>> keys(heads.size());
    at_once(heads.size(), [&](size_t h) { keys[h] = heads[h]->keys_to_cluster(); });
    const TrainingParams& params = heads.front()->params;
    const int d = heads.front()->shape.d;
    const auto nhead = static_cast<int>(heads.size());
    BatchedKMeansParams p;
    p.nhead = nhead;
    p.n = static_cast<int64_t>(keys.front().size()) / d;
    p.d = d;
    p.ncell = params.ncell;
    p.niter = params.kmeans.niter;
    p.spherical = params.kmeans.spherical;
    p.seed = static_cast<unsigned>(params.seed);
    p.x_head_stride = p.n * d;
    p.x_row_stride = d;
    p.cells_head_stride = p.n;
    const size_t workspace = kmeans_workspace(p);
    const size_t centroids = size_t(nhead) * p.ncell * d;
    DeviceBuffer memory;
    char* scratch = nullptr;
    float* x = nullptr;
    const auto lay = [&](char* base) {
        Layout layout(base);
        x = layout.take<float>(nhead * p.n * d);
        p.centroids = layout.take<float>(static_cast<int64_t>(centroids));
        p.cells = layout.take<int32_t>(nhead * p.n);
        scratch = layout.take<char>(static_cast<int64_t>(workspace));
        return layout.size();
    };
    memory = DeviceBuffer(lay(nullptr), stream);
    lay(memory.data());
    p.x = x;
    for (int h = 0; h < nhead; h++) {
        copy(x + h * p.n * d, keys[h].data(), keys[h].size(), stream);
    }
    kmeans(p, scratch, stream);
    std::vector<float> result(centroids);
    copy(result.data(), p.centroids, centroids, stream);
    FAISS_SAAP_CUDA_CHECK(cudaStreamSynchronize(stream));
    for (int h = 0; h < nhead; h++) {
        const auto first = result.begin() + int64_t(h) * p.ncell * d;
        heads[h]->set_centroids(
                std::vector<float>(first, first + int64_t(p.ncell) * d));
    }
}

/// The cells of all keys of a head's texts, by its centroids.
void assign_keys(HeadTraining& head, cudaStream_t stream) {
    const int d = head.shape.d, ncell = head.shape.ncell;
    if (head.state.centroids.size() != size_t(ncell) * d) {
        return; // begin() refuses them
    }
    int64_t most = 0;
    for (const TrainingText& text : head.texts) {
        most = std::max(most, text.tokens);
    }
    Layout sizes;
    const auto lay = [&](Layout& layout) {
        return std::tuple{
                layout.take<float>(int64_t(ncell) * d),
                layout.take<float>(ncell),
                layout.take<float>(most * d),
                layout.take<int32_t>(most)};
    };
    lay(sizes);
    const DeviceBuffer memory(sizes.size(), stream);
    Layout layout(memory.data());
    const auto [centroids, bias, keys, cells] = lay(layout);
    copy(centroids, head.state.centroids.data(), size_t(ncell) * d, stream);
    half_norms({ncell, d, centroids, bias}, stream);
    for (TrainingText& text : head.texts) {
        copy(keys, text.keys_pre.data(), text.keys_pre.size(), stream);
        AssignCellsParams p;
        p.n = text.tokens, p.d = d, p.ncell = ncell;
        p.x = keys, p.x_row_stride = d;
        p.centroids = centroids;
        p.bias = head.params.kmeans.spherical ? nullptr : bias;
        p.cells = cells;
        assign_cells(p, stream);
        text.cells.resize(text.tokens);
        copy(text.cells.data(), cells, text.cells.size(), stream);
    }
    FAISS_SAAP_CUDA_CHECK(cudaStreamSynchronize(stream));
}

/// The mini-batches of some KV heads.
class DeviceSteps {
   public:
    DeviceSteps(
            const Heads& heads,
            const TrainingDevice& device,
            cudaStream_t stream)
            : heads_(heads),
              first_(*heads.front()),
              nhead_(static_cast<int>(heads.size())),
              count_(parameter_count(first_.shape)),
              stream_(stream),
              classifier_(
                      first_.shape,
                      nhead_,
                      first_.params.batch,
                      device.tf32,
                      stream) {
        lay_out();
        upload();
        size_t text_bytes = device.text_bytes;
        if (text_bytes == 0) {
            size_t all = 0;
            FAISS_SAAP_CUDA_CHECK(cudaStreamSynchronize(stream));
            FAISS_SAAP_CUDA_CHECK(cudaMemGetInfo(&text_bytes, &all));
            text_bytes = text_bytes / 4 * 3;
        }
        texts_ = std::make_unique<DeviceTexts>(
                heads, targets_.nsplit, text_bytes, stream);
        targets_.texts = texts_->texts();
    }

    /// Mini-batches `step` .. `end` - 1 of the heads that are not finished, whose
    /// states then are those of the device.
    void run(int64_t step, int64_t end) {
        const auto steps = static_cast<size_t>(end - step);
        draw(step, steps);
        for (size_t i = 0; i < steps; i++) {
            targets_.text = text_ + i * nhead_ * kTrainingParts;
            targets_.token = token_ + i * nhead_ * first_.params.batch;
            FAISS_SAAP_CUDA_CHECK(attention_targets(targets_, stream_));
            classifier_.gradient(
                    batch_, adamw_.parameters, gradient_, loss_ + i * nhead_);
            adamw_.adamw = first_.adamw(step + static_cast<int64_t>(i));
            FAISS_SAAP_CUDA_CHECK(adamw_step(adamw_, stream_));
        }
        std::vector<double> loss(steps * nhead_);
        copy(loss.data(), loss_, loss.size(), stream_);
        for (int h = 0; h < nhead_; h++) {
            TrainingState& s = heads_[h]->state;
            if (!heads_[h]->finished()) {
                copy(s.parameters.data(), adamw_.parameters + h * count_, count_, stream_);
                copy(s.first.data(), adamw_.first + h * count_, count_, stream_);
                copy(s.second.data(), adamw_.second + h * count_, count_, stream_);
            }
        }
        FAISS_SAAP_CUDA_CHECK(cudaStreamSynchronize(stream_));
        for (int h = 0; h < nhead_; h++) {
            TrainingState& s = heads_[h]->state;
            if (heads_[h]->finished()) {
                continue;
            }
            for (size_t i = 0; i < steps; i++) {
                const double l = loss[i * nhead_ + h];
                s.loss = s.step == 0 ? l : .98 * s.loss + .02 * l;
                s.step++;
            }
        }
    }

    /// After heads may have finished.
    void update_active() {
        std::vector<int> active;
        for (const auto& head : heads_) {
            active.push_back(!head->finished());
        }
        copy(active_, active.data(), active.size(), stream_);
        FAISS_SAAP_CUDA_CHECK(cudaStreamSynchronize(stream_));
    }

   private:
    void lay_out() {
        const ClassifierShape& shape = first_.shape;
        const TrainingParams& params = first_.params;
        const int64_t tokens = int64_t(nhead_) * params.batch;
        const int64_t rows = tokens * shape.group;
        const int64_t steps = params.evaluate_every;
        int device = 0, processors = 0;
        FAISS_SAAP_CUDA_CHECK(cudaGetDevice(&device));
        FAISS_SAAP_CUDA_CHECK(cudaDeviceGetAttribute(
                &processors, cudaDevAttrMultiProcessorCount, device));
        // As many blocks as run at once.
        targets_.nsplit = std::max(1, 2 * processors / (nhead_ * kTrainingParts));
        const auto lay = [&](char* base) {
            Layout layout(base);
            targets_.x = layout.take<float>(rows * shape.d);
            targets_.mass = layout.take<float>(rows * shape.ncell);
            targets_.log_count = layout.take<float>(tokens * shape.ncell);
            targets_.part = layout.take<float2>(rows * targets_.nsplit);
            adamw_.parameters = layout.take<float>(nhead_ * count_);
            adamw_.first = layout.take<float>(nhead_ * count_);
            adamw_.second = layout.take<float>(nhead_ * count_);
            gradient_ = layout.take<float>(nhead_ * count_);
            active_ = layout.take<int>(nhead_);
            text_ = layout.take<int32_t>(steps * nhead_ * kTrainingParts);
            token_ = layout.take<int32_t>(steps * tokens);
            loss_ = layout.take<double>(steps * nhead_);
            first_token_ = layout.take<int>(kTrainingParts + 1);
            mean_ = layout.take<float>(nhead_ * shape.group * shape.d);
            factor_ = layout.take<float>(nhead_ * shape.group * shape.d);
            far_mass_ = layout.take<float>(nhead_ * shape.group);
            frequency_ = layout.take<double>(shape.d / 2);
            return layout.size();
        };
        memory_ = DeviceBuffer(lay(nullptr), stream_);
        lay(memory_.data());
    }

    void upload() {
        const ClassifierShape& shape = first_.shape;
        const TrainingParams& params = first_.params;
        const int64_t width = int64_t(shape.group) * shape.d;
        std::vector<float> far_mass;
        for (int h = 0; h < nhead_; h++) {
            const HeadTraining& head = *heads_[h];
            const TrainingState& s = head.state;
            copy(adamw_.parameters + h * count_, s.parameters.data(), count_, stream_);
            copy(adamw_.first + h * count_, s.first.data(), count_, stream_);
            copy(adamw_.second + h * count_, s.second.data(), count_, stream_);
            copy(mean_ + h * width, head.mean.data(), width, stream_);
            copy(factor_ + h * width, head.factor.data(), width, stream_);
            far_mass.insert(
                    far_mass.end(), head.far_mass.begin(), head.far_mass.end());
        }
        copy(far_mass_, far_mass.data(), far_mass.size(), stream_);
        std::vector<int> first(1, 0);
        for (int part = 0; part < kTrainingParts; part++) {
            const auto n = static_cast<int>(first_.draw(0, part).at.size());
            first.push_back(first.back() + n);
            targets_.most = std::max(targets_.most, n);
        }
        copy(first_token_, first.data(), first.size(), stream_);
        const auto& frequency = first_.rotary.inverse_frequency;
        copy(frequency_, frequency.data(), frequency.size(), stream_);

        targets_.nhead = nhead_;
        targets_.group = shape.group;
        targets_.d = shape.d;
        targets_.ncell = shape.ncell;
        targets_.batch = params.batch;
        targets_.nmember = kTrainingParts;
        targets_.first = first_token_;
        targets_.ntext = first_.training_texts;
        targets_.rotary.inverse_frequency =
                frequency.empty() ? nullptr : frequency_;
        targets_.rotary.interleaved =
                first_.rotary.params.layout == RopeLayout::interleaved;
        targets_.magnitude = static_cast<float>(first_.rotary.magnitude);
        targets_.scale = first_.scale;
        targets_.sink = params.sink;
        targets_.window = params.window;
        targets_.mean = mean_;
        targets_.factor = factor_;
        batch_.x = targets_.x;
        batch_.mass = targets_.mass;
        batch_.log_count = targets_.log_count;
        batch_.far_mass = far_mass_;
        batch_.mass_power = params.mass_power;
        adamw_.nhead = nhead_;
        adamw_.count = count_;
        adamw_.active = active_;
        adamw_.gradient = gradient_;
        update_active(); // waits for the copies
    }

    /// Texts and tokens of some mini-batches.
    void draw(int64_t step, size_t steps) {
        const int batch = first_.params.batch;
        std::vector<int32_t> text(steps * nhead_ * kTrainingParts);
        std::vector<int32_t> token(steps * nhead_ * batch);
        at_once(nhead_, [&](size_t h) {
            for (size_t i = 0; i < steps; i++) {
                const size_t at = i * nhead_ + h;
                auto to = token.begin() + static_cast<int64_t>(at) * batch;
                for (int part = 0; part < kTrainingParts; part++) {
                    const TokensOfText drawn = heads_[h]->draw(
                            step + static_cast<int64_t>(i), part);
                    text[at * kTrainingParts + part] = drawn.text;
                    to = std::copy(drawn.at.begin(), drawn.at.end(), to);
                }
            }
        });
        copy(text_, text.data(), text.size(), stream_);
        copy(token_, token.data(), token.size(), stream_);
        FAISS_SAAP_CUDA_CHECK(cudaStreamSynchronize(stream_));
    }

    const Heads& heads_;
    const HeadTraining& first_;
    int nhead_;
    int64_t count_; ///< parameters of a KV head
    cudaStream_t stream_;
    ClassifierStep classifier_;
    std::unique_ptr<DeviceTexts> texts_;
    DeviceBuffer memory_;
    TargetParams targets_;
    DeviceClassifierBatch batch_;
    DeviceAdamW adamw_;
    // in memory_
    float *gradient_ = nullptr, *mean_ = nullptr, *factor_ = nullptr,
          *far_mass_ = nullptr;
    int *active_ = nullptr, *first_token_ = nullptr;
    int32_t *text_ = nullptr, *token_ = nullptr;
    double *loss_ = nullptr, *frequency_ = nullptr;
};

/// The step of those that are not finished; -1: none.
int64_t common_step(const Heads& heads) {
    int64_t step = -1;
    for (const auto& head : heads) {
        if (head->finished()) {
            continue;
        }
        FAISS_THROW_IF_NOT_FMT(
                step < 0 || head->state.step == step,
                "states of steps %" PRId64 " and %" PRId64
                " cannot go on together",
                step,
                head->state.step);
        step = head->state.step;
    }
    return step;
}

} // namespace

std::vector<TrainedPartition> train_partitions(
        const std::vector<Trace>& texts,
        int layer,
        const std::vector<int>& kv_heads,
        const TrainingParams& params,
        std::vector<TrainingState>* states,
        const LayerCallback& callback,
        const TrainingDevice& device) {
    require_device(device.device);
    DeviceScope scope(device.device);
    std::vector<TrainingState> own;
    std::vector<TrainingState>& all = states ? *states : own;
    FAISS_THROW_IF_NOT_FMT(
            all.empty() || all.size() == kv_heads.size(),
            "%zd states are not one for each of %zd KV heads",
            all.size(),
            kv_heads.size());
    all.resize(kv_heads.size());
    if (kv_heads.empty()) {
        return {};
    }
    Heads heads;
    for (size_t h = 0; h < kv_heads.size(); h++) {
        heads.push_back(std::make_unique<HeadTraining>(
                texts, layer, kv_heads[h], params, all[h]));
    }
    const Stream stream;
    cluster(heads, stream);
    for (auto& head : heads) {
        assign_keys(*head, stream);
    }
    at_once(heads.size(), [&](size_t h) { heads[h]->begin(); });
    int64_t step = common_step(heads);
    if (step >= 0) {
        DeviceSteps steps(heads, device, stream);
        while (step >= 0) {
            const int64_t due =
                    (step / params.evaluate_every + 1) * params.evaluate_every;
            steps.run(step, std::min<int64_t>(due, params.steps));
            for (auto& head : heads) {
                if (head->state.step > step && head->evaluation_is_due()) {
                    head->keep_the_best();
                }
            }
            if (callback) {
                callback(all);
            }
            steps.update_active();
            step = common_step(heads);
        }
    }
    std::vector<TrainedPartition> result(heads.size());
    at_once(heads.size(), [&](size_t h) { result[h] = heads[h]->result(); });
    return result;
}

} // namespace faiss_saap::gpu
