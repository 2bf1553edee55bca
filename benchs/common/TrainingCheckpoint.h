/// What train_partitions keeps beside its output until that is finished.
#pragma once

#include <string>
#include <vector>

#include <faiss_saap/PartitionSet.h>
#include <faiss_saap/train_partition.h>

namespace faiss_saap::benchs {

/// Two files beside the output: NAME.part, the partitions that are finished,
/// and NAME.state, the training of the next ones.
class TrainingCheckpoint {
   public:
    /// @param config  decides the result; a checkpoint with another one is not
    ///                gone on with
    TrainingCheckpoint(std::string out, std::string config);

    void write(
            const PartitionSet& done,
            const std::vector<TrainingState>& states) const;

    /// Without a checkpoint both are left as they are.
    /// @throws faiss::FaissException when the checkpoint is of another training
    void read(PartitionSet& done, std::vector<TrainingState>& states) const;

    void remove() const;

   private:
    std::string partitions_, state_, config_;
};

} // namespace faiss_saap::benchs
