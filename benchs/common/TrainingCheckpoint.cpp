#include "TrainingCheckpoint.h"

#include <filesystem>
#include <map>

#include <faiss/impl/FaissAssert.h>
#include <unistd.h>

#include <faiss_saap/SafetensorsFile.h>

namespace faiss_saap::benchs {

namespace {

/// The numbers of a state that are no floats, as text that keeps every bit.
std::map<std::string, std::string> numbers_of(const TrainingState& s) {
    const auto exact = [](double x) {
        char text[40];
        std::snprintf(text, sizeof(text), "%.17g", x);
        return std::string(text);
    };
    return {{"step", std::to_string(s.step)},
            {"best_step", std::to_string(s.best_step)},
            {"best_recall", exact(s.best_recall)},
            {"loss", exact(s.loss)},
            {"finished", s.finished ? "1" : "0"}};
}

/// Calls fn(name, array) for each array of the i-th state.
template <class State, class Fn>
void for_each_array(State& s, size_t i, const Fn& fn) {
    const std::string number = std::to_string(i) + ".";
    fn(number + "centroids", s.centroids);
    fn(number + "parameters", s.parameters);
    fn(number + "first", s.first);
    fn(number + "second", s.second);
    fn(number + "best", s.best);
}

} // namespace

TrainingCheckpoint::TrainingCheckpoint(std::string out, std::string config)
        : partitions_(out + ".part"),
          state_(out + ".state"),
          config_(std::move(config)) {}

void TrainingCheckpoint::write(
        const PartitionSet& done,
        const std::vector<TrainingState>& states) const {
    write_partitions(done, partitions_);
    std::map<std::string, TensorView> tensors;
    std::map<std::string, std::string> metadata;
    for (size_t i = 0; i < states.size(); i++) {
        for_each_array(
                states[i],
                i,
                [&](const std::string& name, const std::vector<float>& x) {
                    TensorView& t = tensors[name];
                    t.dtype = "F32";
                    t.shape = {static_cast<int64_t>(x.size())};
                    t.data = x.data();
                    t.bytes = x.size() * sizeof(float);
                });
        for (const auto& [name, number] : numbers_of(states[i])) {
            metadata[std::to_string(i) + "." + name] = number;
        }
    }
    metadata["states"] = std::to_string(states.size());
    metadata["config"] = config_;
    // The two files are not replaced at once: which partition this is.
    metadata["partition"] = std::to_string(done.partitions.size());
    write_safetensors(state_, tensors, metadata);
}

void TrainingCheckpoint::read(
        PartitionSet& done,
        std::vector<TrainingState>& states) const {
    if (!std::filesystem::exists(state_)) {
        return;
    }
    const SafetensorsFile file(state_);
    FAISS_THROW_IF_NOT_FMT(
            file.meta("config") == config_,
            "%s: this checkpoint is of a training with other texts or options: "
            "%s",
            state_.c_str(),
            file.meta("config").c_str());
    PartitionSet finished = read_partitions(partitions_);
    done.partitions = std::move(finished.partitions);
    if (file.meta("partition") != std::to_string(done.partitions.size())) {
        return; // interrupted between the two files: this partition starts anew
    }
    try {
        states.resize(std::stoull(file.meta("states")));
        for (size_t i = 0; i < states.size(); i++) {
            TrainingState& s = states[i];
            for_each_array(
                    s, i, [&](const std::string& name, std::vector<float>& x) {
                        x = file.tensor(name).to_float();
                    });
            const auto number = [&](const char* name) {
                return file.meta(std::to_string(i) + "." + name);
            };
            s.step = std::stoll(number("step"));
            s.best_step = std::stoll(number("best_step"));
            s.best_recall = std::stod(number("best_recall"));
            s.loss = std::stod(number("loss"));
            s.finished = number("finished") == "1";
        }
    } catch (const std::logic_error&) {
        FAISS_THROW_FMT(
                "%s: corrupt: step, recall or loss is no number",
                state_.c_str());
    }
}

void TrainingCheckpoint::remove() const {
    unlink(partitions_.c_str());
    unlink(state_.c_str());
}

} // namespace faiss_saap::benchs
