/// The memory that lists of slots grow in.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace faiss_saap {

/// Blocks of slots, counted by their users and chained backwards: a list knows
/// its newest block, each block the one before it. A list grows by a block at a
/// time, no list is ever moved, and a fork of a sequence shares all full
/// blocks with its origin.
///
/// Blocks come from slabs of 64 KiB; a slab is kept until the pool ends, its
/// blocks are used again.
///
/// Not synchronised: whoever changes lists of one pool needs exclusive access.
class SlotPool {
   public:
    static constexpr int kSlotsPerBlock = 30;
    static constexpr uint32_t kNone = UINT32_MAX; ///< no block

    struct alignas(64) Block {
        uint32_t previous; ///< the block before it, or kNone
        uint32_t users;    ///< lists and blocks that refer to it
        int32_t slots[kSlotsPerBlock];
    };
    static_assert(sizeof(Block) == 128, "two cache lines, as it begins on one");

    Block& operator[](uint32_t block) {
        return slabs_[block / kBlocksPerSlab][block % kBlocksPerSlab];
    }
    const Block& operator[](uint32_t block) const {
        return slabs_[block / kBlocksPerSlab][block % kBlocksPerSlab];
    }

    /// A block with one user; takes over the caller's use of `previous`.
    /// @throws std::bad_alloc, nothing changed
    uint32_t allocate(uint32_t previous);
    /// Ends one use of a block; unused blocks, and their uses of the blocks
    /// before them, are freed.
    void release(uint32_t block);

    /// Blocks that have a user.
    size_t blocks_used() const {
        return blocks_used_;
    }
    /// Bytes held, free blocks included.
    size_t bytes_used() const;

   private:
    static constexpr uint32_t kBlocksPerSlab = 512;

    std::vector<std::unique_ptr<Block[]>> slabs_;
    uint32_t free_ = kNone;  ///< given back, chained through `previous`
    uint32_t untouched_ = 0; ///< blocks from here on were never used
    size_t blocks_used_ = 0;
};

} // namespace faiss_saap
