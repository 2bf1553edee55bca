/// The vectors of an index on the device: one pool of pages, a chain of them for
/// each cell.
#pragma once

#include <cstdint>
#include <vector>

#include <faiss/impl/IDSelector.h>

#include "StreamBuffer.h"

namespace faiss_saap::gpu {

/// Vectors of a page.
constexpr int kPage = 32;

/// No location.
constexpr uint32_t kNowhere = UINT32_MAX;

/// Pages that so many vectors fill.
inline __host__ __device__ int pages_of(int vectors) {
    return (vectors + kPage - 1) / kPage;
}

/// What kernels see. A location is page * kPage + place in the page. A slab
/// holds rows of vectors, then their ids (-1 in unused places), then the number
/// of the page that follows each page (-1: none).
struct ListsView {
    int d = 0;
    int row = 0;             ///< elements from one vector to the next, a
                             ///< multiple of 4; zeros behind d
    bool float16 = false;    ///< elements are __half, else float
    int slab_log2 = 0;       ///< pages of a slab
    size_t ids_offset = 0;   ///< bytes from a slab's begin
    size_t next_offset = 0;
    char* const* slabs = nullptr;
    int* head = nullptr;  ///< first page of each cell, size ncell; -1: none
    int* tail = nullptr;  ///< last page of each cell
    int* count = nullptr; ///< vectors of each cell

#ifdef __CUDACC__
    __device__ char* slab(uint32_t page) const {
        return slabs[page >> slab_log2];
    }
    __device__ uint32_t in_slab(uint32_t page) const {
        return page & ((1u << slab_log2) - 1);
    }
    template <class T>
    __device__ T* vector(uint32_t location) const {
        const uint32_t page = location / kPage;
        return reinterpret_cast<T*>(slab(page)) +
                (size_t(in_slab(page)) * kPage + location % kPage) * row;
    }
    __device__ int64_t& id(uint32_t location) const {
        const uint32_t page = location / kPage;
        return reinterpret_cast<int64_t*>(slab(page) + ids_offset)
                [size_t(in_slab(page)) * kPage + location % kPage];
    }
    __device__ int& next(uint32_t page) const {
        return reinterpret_cast<int*>(slab(page) + next_offset)[in_slab(page)];
    }
#endif
};

class PagedLists {
   public:
    PagedLists(
            int d,
            int ncell,
            bool float16,
            size_t slab_bytes,
            const StreamMemory& memory);
    PagedLists(const PagedLists&) = delete;
    PagedLists& operator=(const PagedLists&) = delete;
    ~PagedLists();

    /// Appends places for n vectors to their cells, in the order of the vectors.
    /// On an exception nothing has changed.
    /// @param cells      device memory, size n, each 0 .. ncell - 1
    /// @param locations  output, device memory, size n
    void place(int64_t n, const int32_t* cells, uint32_t* locations);
    /// Writes vectors into their places.
    /// @param x    device memory, size n * d
    /// @param ids  device memory, size n; null: first_id, first_id + 1, ...
    void write(
            int64_t n,
            const float* x,
            const int64_t* ids,
            int64_t first_id,
            const uint32_t* locations);

    /// @return  how many
    int64_t remove(const faiss::IDSelector& selector);
    void reset();

    /// Takes memory until so many pages are free.
    void reserve(int64_t pages);
    /// Gives back slabs whose pages are all free.
    /// @return  bytes
    size_t reclaim();

    /// Vectors of the cells from first to last - 1, cell after cell.
    /// @param begin  size last - first: where a cell's vectors go
    /// @param codes  output, host memory, d elements a vector
    /// @param ids    output, host memory
    void read(
            int first,
            int last,
            const std::vector<int64_t>& begin,
            int64_t size,
            void* codes,
            int64_t* ids) const;

    /// Where the vectors with ids first .. first + n - 1 lie; of those with one
    /// id, one of them.
    /// @param first      not negative
    /// @param locations  output, device memory, size n; kNowhere: there is none
    void find(int64_t first, int64_t n, uint32_t* locations) const;
    /// Copies of vectors.
    /// @param locations  device memory, size n
    /// @param x          output, device memory, size n * d
    void gather(int64_t n, const uint32_t* locations, float* x) const;

    std::vector<int32_t> sizes() const;
    size_t memory() const {
        return slab_bytes_ * (slabs_.size() - holes());
    }
    const ListsView& view() const {
        return view_;
    }
    int element_bytes() const {
        return view_.float16 ? 2 : 4;
    }

   private:
    size_t holes() const;
    int64_t pages() const { ///< those of holes included
        return int64_t(slabs_.size()) << view_.slab_log2;
    }

    StreamMemory memory_;
    int ncell_;
    ListsView view_;
    size_t slab_bytes_ = 0;
    std::vector<char*> slabs_;      ///< null: a hole, filled again when growing
    StreamBuffer<char*> slab_table_; ///< kMaxSlabs
    StreamBuffer<int> head_, tail_, count_;
    StreamBuffer<int> free_; ///< stack of free pages
    int64_t free_count_ = 0, free_capacity_ = 0;
};

} // namespace faiss_saap::gpu
