#include <faiss_saap/SlotPool.h>

#include <new>

namespace faiss_saap {

uint32_t SlotPool::allocate(uint32_t previous) {
    uint32_t block = free_;
    if (block != kNone) {
        free_ = (*this)[block].previous;
    } else {
        if (untouched_ == slabs_.size() * kBlocksPerSlab) {
            if (untouched_ > kNone - kBlocksPerSlab) {
                throw std::bad_alloc();
            }
            // Left as it is: filling a slab would make one insertion slow.
            slabs_.push_back(
                    std::unique_ptr<Block[]>(new Block[kBlocksPerSlab]));
        }
        block = untouched_++;
    }
    (*this)[block].previous = previous;
    (*this)[block].users = 1;
    blocks_used_++;
    return block;
}

void SlotPool::release(uint32_t block) {
    while (block != kNone && --(*this)[block].users == 0) {
        const uint32_t previous = (*this)[block].previous;
        (*this)[block].previous = free_;
        free_ = block;
        blocks_used_--;
        block = previous;
    }
}

size_t SlotPool::bytes_used() const {
    return sizeof(*this) + slabs_.capacity() * sizeof(slabs_[0]) +
            slabs_.size() * kBlocksPerSlab * sizeof(Block);
}

} // namespace faiss_saap
