#include "PagedLists.h"

#include <algorithm>
#include <climits>
#include <numeric>

#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>
#include <cuda_fp16.h>

namespace faiss_saap::gpu {

namespace {

constexpr int kThreads = 128;
/// The table of slabs has a fixed size, so that kernels in flight never see it
/// move.
constexpr size_t kMaxSlabs = 16384;
/// Locations are below kNowhere.
constexpr int64_t kMaxPages = (int64_t(1) << 32) / kPage - 1;

unsigned blocks(int64_t items, int per_block = kThreads) {
    return static_cast<unsigned>((items + per_block - 1) / per_block);
}

__device__ int64_t this_thread() {
    return int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
}

/// The first of size ascending values that is at least `value`.
template <class T>
__device__ int lower_bound(const T* values, int size, T value) {
    int low = 0;
    while (size > 0) {
        const int half = size / 2;
        if (values[low + half] < value) {
            low += half + 1;
            size -= half + 1;
        } else {
            size = half;
        }
    }
    return low;
}

__global__ void iota_kernel(int n, int first, int* out) {
    const int64_t i = this_thread();
    if (i < n) {
        out[i] = first + static_cast<int>(i);
    }
}

/// One batch of vectors on its way into the lists.
struct Batch {
    int n, ncell;
    const int* cell;    ///< sorted cells, size n
    const int* order;   ///< the vectors that they belong to
    int* begin;         ///< where each cell begins among them, size ncell + 1
    int* new_pages;     ///< of each cell, size ncell + 1
    int* page_begin;    ///< sums of new_pages, size ncell + 1
    const int* free;    ///< behind the last free page: new page i is free[-1 - i]
    uint32_t* location; ///< output
};

__global__ void count_kernel(ListsView v, Batch b) {
    const auto c = static_cast<int>(this_thread());
    if (c > b.ncell) {
        return;
    }
    const int begin = lower_bound(b.cell, b.n, c);
    b.begin[c] = begin;
    b.new_pages[c] = 0;
    if (c < b.ncell) {
        const int added = lower_bound(b.cell, b.n, c + 1) - begin;
        b.new_pages[c] = pages_of(v.count[c] + added) - pages_of(v.count[c]);
    }
}

/// Chains new pages to their cells; a thread per page.
__global__ void link_kernel(ListsView v, Batch b, int pages) {
    const auto i = static_cast<int>(this_thread());
    if (i >= pages) {
        return;
    }
    // The last cell that begins at or before page i.
    const int c = lower_bound(b.page_begin, b.ncell + 1, i + 1) - 1;
    const int page = b.free[-1 - i];
    v.next(page) = i + 1 < b.page_begin[c + 1] ? b.free[-2 - i] : -1;
    if (i == b.page_begin[c]) {
        if (v.count[c] > 0) {
            v.next(v.tail[c]) = page;
        } else {
            v.head[c] = page;
        }
    }
}

/// A thread per vector.
__global__ void locate_kernel(ListsView v, Batch b) {
    const int64_t i = this_thread();
    if (i >= b.n) {
        return;
    }
    const int c = b.cell[i];
    const int place = v.count[c] + (static_cast<int>(i) - b.begin[c]);
    const int new_page = place / kPage - pages_of(v.count[c]);
    const uint32_t page =
            new_page < 0 ? v.tail[c] : b.free[-1 - (b.page_begin[c] + new_page)];
    b.location[b.order[i]] = page * kPage + place % kPage;
}

/// A thread per cell, after all locations are known.
__global__ void finish_kernel(ListsView v, Batch b) {
    const auto c = static_cast<int>(this_thread());
    if (c >= b.ncell) {
        return;
    }
    v.count[c] += b.begin[c + 1] - b.begin[c];
    if (b.new_pages[c] > 0) {
        v.tail[c] = b.free[-1 - (b.page_begin[c + 1] - 1)];
    }
}

__device__ void store(float* to, float x) {
    *to = x;
}
__device__ void store(__half* to, float x) {
    *to = __float2half_rn(x);
}

/// A warp per vector.
template <class T>
__global__ void write_kernel(
        ListsView v,
        int64_t n,
        const float* x,
        const int64_t* ids,
        int64_t first_id,
        const uint32_t* locations) {
    const int64_t i = this_thread() / 32;
    if (i >= n) {
        return;
    }
    T* to = v.vector<T>(locations[i]);
    for (int j = threadIdx.x % 32; j < v.row; j += 32) {
        store(to + j, j < v.d ? x[i * v.d + j] : 0.0f);
    }
    if (threadIdx.x % 32 == 0) {
        v.id(locations[i]) = ids ? ids[i] : first_id + i;
    }
}

/// A block per cell moves the vectors that stay to the front. A thread moves the
/// same components of every vector, and vectors only move forward, so each
/// component is read before it is overwritten without waiting for anyone.
/// @param gone   per location: 1 if the vector goes
/// @param kept   output, size ncell
/// @param freed  output, size ncell + 1: pages that empty
template <class T>
__global__ void compact_kernel(
        ListsView v,
        int ncell,
        const uint8_t* gone,
        int* kept,
        int* freed) {
    const int c = blockIdx.x;
    if (c == ncell) { // one block more than cells: the end of the sums
        if (threadIdx.x == 0) {
            freed[ncell] = 0;
        }
        return;
    }
    const int count = v.count[c];
    int stay = 0;
    int from = v.head[c], to = from;
    for (int done = 0; done < count; done += kPage) {
        const uint32_t first = uint32_t(from) * kPage;
        const int size = min(kPage, count - done);
        const int lane = threadIdx.x % 32;
        const unsigned stays =
                __ballot_sync(~0u, lane < size && !gone[first + lane]);
        for (int i = 0; i < size; i++) {
            if (!(stays >> i & 1)) {
                continue;
            }
            if (stay > 0 && stay % kPage == 0) {
                to = v.next(to);
            }
            const uint32_t target = uint32_t(to) * kPage + stay % kPage;
            if (target != first + i) {
                const T* source = v.vector<T>(first + i);
                T* moved = v.vector<T>(target);
                for (int j = threadIdx.x; j < v.row; j += blockDim.x) {
                    moved[j] = source[j];
                }
                if (threadIdx.x == 0) {
                    v.id(target) = v.id(first + i);
                }
            }
            stay++;
        }
        from = v.next(from);
    }
    if (threadIdx.x == 0) {
        for (int i = stay; i < count; i++) {
            if (i > 0 && i % kPage == 0) {
                to = v.next(to);
            }
            v.id(uint32_t(to) * kPage + i % kPage) = -1;
        }
        kept[c] = stay;
        freed[c] = pages_of(count) - pages_of(stay);
    }
}

/// Returns empty pages to the stack; a thread per cell.
/// @param free  behind the last free page
__global__ void release_kernel(
        ListsView v,
        int ncell,
        const int* kept,
        const int* freed_begin,
        int* free) {
    const auto c = static_cast<int>(this_thread());
    if (c >= ncell) {
        return;
    }
    const int freed = freed_begin[c + 1] - freed_begin[c];
    v.count[c] = kept[c];
    if (freed == 0) {
        return;
    }
    int page = v.head[c];
    int last = -1;
    for (int i = 0; i < pages_of(kept[c]); i++) {
        last = page;
        page = v.next(page);
    }
    if (last < 0) {
        v.head[c] = -1;
    } else {
        v.next(last) = -1;
    }
    v.tail[c] = last;
    for (int i = 0; i < freed; i++) {
        free[freed_begin[c] + i] = page;
        page = v.next(page);
    }
}

/// A block per cell.
template <class T>
__global__ void read_kernel(
        ListsView v,
        int first_cell,
        const int64_t* begin,
        T* codes,
        int64_t* ids) {
    const int c = first_cell + blockIdx.x;
    const int count = v.count[c];
    int page = v.head[c];
    for (int done = 0; done < count; done += kPage) {
        const int size = min(kPage, count - done);
        const int64_t at = begin[blockIdx.x] + done;
        const uint32_t first = uint32_t(page) * kPage;
        for (int i = threadIdx.x / 32; i < size; i += blockDim.x / 32) {
            const T* from = v.vector<T>(first + i);
            for (int j = threadIdx.x % 32; j < v.d; j += 32) {
                codes[(at + i) * v.d + j] = from[j];
            }
        }
        if (threadIdx.x < size) {
            ids[at + threadIdx.x] = v.id(first + threadIdx.x);
        }
        page = v.next(page);
    }
}

/// A thread per place of a slab.
__global__ void find_kernel(
        const int64_t* ids,
        int places,
        uint32_t first_location,
        int64_t first,
        int64_t n,
        uint32_t* locations) {
    const int64_t i = this_thread();
    if (i < places && ids[i] >= first && ids[i] - first < n) {
        atomicMin(
                &locations[ids[i] - first],
                first_location + static_cast<uint32_t>(i));
    }
}

/// A warp per vector.
template <class T>
__global__ void gather_kernel(
        ListsView v,
        int64_t n,
        const uint32_t* locations,
        float* x) {
    const int64_t i = this_thread() / 32;
    if (i >= n) {
        return;
    }
    const T* from = v.vector<T>(locations[i]);
    for (int j = threadIdx.x % 32; j < v.d; j += 32) {
        x[i * v.d + j] = static_cast<float>(from[j]);
    }
}

/// Sums before each of size ints.
void exclusive_sum(const int* in, int* out, int size, const StreamMemory& memory) {
    size_t bytes = 0;
    FAISS_SAAP_CUDA_CHECK(cub::DeviceScan::ExclusiveSum(
            nullptr, bytes, in, out, size, memory.stream));
    const StreamBuffer<char> temporary(memory, bytes);
    FAISS_SAAP_CUDA_CHECK(cub::DeviceScan::ExclusiveSum(
            temporary.get(), bytes, in, out, size, memory.stream));
}

/// Slabs that are not yet anybody's.
struct NewSlabs {
    std::vector<char*> slabs;
    ~NewSlabs() {
        for (char* slab : slabs) {
            cudaFree(slab);
        }
    }
};

size_t aligned(size_t bytes) {
    return (bytes + 255) / 256 * 256;
}

} // namespace

PagedLists::PagedLists(
        int d,
        int ncell,
        bool float16,
        size_t slab_bytes,
        const StreamMemory& memory)
        : memory_(memory),
          ncell_(ncell),
          slab_table_(memory, kMaxSlabs),
          head_(memory, ncell),
          tail_(memory, ncell),
          count_(memory, ncell) {
    view_.d = d;
    view_.row = (d + 3) / 4 * 4;
    view_.float16 = float16;
    const size_t page_bytes =
            kPage * (size_t(view_.row) * element_bytes() + sizeof(int64_t)) +
            sizeof(int);
    while (view_.slab_log2 < 20 &&
           (size_t(2) << view_.slab_log2) * page_bytes <= slab_bytes) {
        view_.slab_log2++;
    }
    const size_t pages = size_t(1) << view_.slab_log2;
    view_.ids_offset = aligned(pages * kPage * view_.row * element_bytes());
    view_.next_offset =
            view_.ids_offset + aligned(pages * kPage * sizeof(int64_t));
    slab_bytes_ = view_.next_offset + aligned(pages * sizeof(int));
    view_.slabs = slab_table_.get();
    view_.head = head_.get();
    view_.tail = tail_.get();
    view_.count = count_.get();
    reset();
}

PagedLists::~PagedLists() {
    // What was asked of the slabs has to be over.
    cudaStreamSynchronize(memory_.stream);
    for (char* slab : slabs_) {
        cudaFree(slab);
    }
}

size_t PagedLists::holes() const {
    return std::count(slabs_.begin(), slabs_.end(), nullptr);
}

void PagedLists::reset() {
    const size_t bytes = ncell_ * sizeof(int);
    const cudaStream_t stream = memory_.stream;
    FAISS_SAAP_CUDA_CHECK(cudaMemsetAsync(view_.head, 0xff, bytes, stream));
    FAISS_SAAP_CUDA_CHECK(cudaMemsetAsync(view_.tail, 0xff, bytes, stream));
    FAISS_SAAP_CUDA_CHECK(cudaMemsetAsync(view_.count, 0, bytes, stream));
    free_count_ = 0;
    const int per_slab = 1 << view_.slab_log2;
    for (size_t s = 0; s < slabs_.size(); s++) {
        if (slabs_[s]) {
            FAISS_SAAP_CUDA_CHECK(cudaMemsetAsync(
                    slabs_[s] + view_.ids_offset,
                    0xff,
                    size_t(per_slab) * kPage * sizeof(int64_t),
                    stream));
            iota_kernel<<<blocks(per_slab), kThreads, 0, stream>>>(
                    per_slab,
                    static_cast<int>(s) << view_.slab_log2,
                    free_.get() + free_count_);
            FAISS_SAAP_CUDA_CHECK(cudaGetLastError());
            free_count_ += per_slab;
        }
    }
}

void PagedLists::reserve(int64_t wanted) {
    if (wanted <= free_count_) {
        return;
    }
    const int64_t per_slab = int64_t(1) << view_.slab_log2;
    const int64_t more = (wanted - free_count_ + per_slab - 1) / per_slab;
    const int64_t fresh =
            std::max<int64_t>(more - static_cast<int64_t>(holes()), 0);
    FAISS_THROW_IF_NOT_FMT(
            more <= static_cast<int64_t>(kMaxSlabs) &&
                    slabs_.size() + fresh <= kMaxSlabs &&
                    pages() + fresh * per_slab <= kMaxPages,
            "%lld more slabs of %zd bytes are too many: an index has at most "
            "%zd, choose larger slab_bytes",
            static_cast<long long>(more),
            slab_bytes_,
            kMaxSlabs);
    const int64_t capacity = pages() + fresh * per_slab;
    size_t unused = 0, total = 0;
    FAISS_SAAP_CUDA_CHECK(cudaMemGetInfo(&unused, &total));
    FAISS_THROW_IF_NOT_FMT(
            static_cast<size_t>(more) <= total / slab_bytes_,
            "not enough device memory: %lld slabs of %zd bytes, the device has "
            "%zd bytes",
            static_cast<long long>(more),
            slab_bytes_,
            total);
    // Everything that may fail comes first.
    NewSlabs taken;
    std::vector<char*> slabs = slabs_;
    taken.slabs.reserve(more);
    slabs.reserve(slabs_.size() + fresh);
    for (int64_t i = 0; i < more; i++) {
        char* slab = nullptr;
        check_allocation(
                cudaMalloc(reinterpret_cast<void**>(&slab), slab_bytes_),
                slab_bytes_);
        taken.slabs.push_back(slab);
        FAISS_SAAP_CUDA_CHECK(cudaMemsetAsync(
                slab + view_.ids_offset,
                0xff,
                per_slab * kPage * sizeof(int64_t),
                memory_.stream));
    }
    StreamBuffer<int> free_pages;
    if (capacity > free_capacity_) {
        free_pages = StreamBuffer<int>(memory_, capacity);
        copy_async(free_pages.get(), free_.get(), free_count_, memory_.stream);
    }
    int* const stack = free_pages.get() ? free_pages.get() : free_.get();
    int64_t count = free_count_;
    size_t hole = 0;
    for (char* slab : taken.slabs) {
        while (hole < slabs.size() && slabs[hole]) {
            hole++;
        }
        if (hole == slabs.size()) {
            slabs.push_back(nullptr);
        }
        slabs[hole] = slab;
        iota_kernel<<<blocks(per_slab), kThreads, 0, memory_.stream>>>(
                static_cast<int>(per_slab),
                static_cast<int>(hole) << view_.slab_log2,
                stack + count);
        FAISS_SAAP_CUDA_CHECK(cudaGetLastError());
        count += per_slab;
    }
    copy_async(slab_table_.get(), slabs.data(), slabs.size(), memory_.stream);
    FAISS_SAAP_CUDA_CHECK(cudaStreamSynchronize(memory_.stream));
    taken.slabs.clear();
    slabs_.swap(slabs);
    free_count_ = count;
    if (free_pages.get()) {
        std::swap(free_, free_pages);
        free_capacity_ = capacity;
    }
}

size_t PagedLists::reclaim() {
    const int64_t per_slab = int64_t(1) << view_.slab_log2;
    std::vector<int> stack(free_count_);
    copy_async(stack.data(), free_.get(), stack.size(), memory_.stream);
    FAISS_SAAP_CUDA_CHECK(cudaStreamSynchronize(memory_.stream));
    std::vector<int64_t> free_of(slabs_.size());
    for (int page : stack) {
        free_of[page >> view_.slab_log2]++;
    }
    const auto stays = [&](int page) {
        return free_of[page >> view_.slab_log2] < per_slab;
    };
    const auto end = std::stable_partition(stack.begin(), stack.end(), stays);
    stack.erase(end, stack.end());
    copy_async(free_.get(), stack.data(), stack.size(), memory_.stream);
    FAISS_SAAP_CUDA_CHECK(cudaStreamSynchronize(memory_.stream));
    free_count_ = static_cast<int64_t>(stack.size());
    size_t bytes = 0;
    for (size_t s = 0; s < slabs_.size(); s++) {
        if (slabs_[s] && free_of[s] == per_slab) {
            char* const slab = std::exchange(slabs_[s], nullptr);
            bytes += slab_bytes_;
            FAISS_SAAP_CUDA_CHECK(cudaFree(slab));
        }
    }
    return bytes;
}

void PagedLists::place(int64_t n, const int32_t* cells, uint32_t* locations) {
    if (n == 0) {
        return;
    }
    const cudaStream_t stream = memory_.stream;
    const auto size = static_cast<int>(n);
    const StreamBuffer<int> numbers(memory_, n), cell(memory_, n), order(memory_, n);
    const StreamBuffer<int> begin(memory_, ncell_ + 1),
            new_pages(memory_, ncell_ + 1), page_begin(memory_, ncell_ + 1);
    iota_kernel<<<blocks(n), kThreads, 0, stream>>>(size, 0, numbers.get());
    FAISS_SAAP_CUDA_CHECK(cudaGetLastError());
    // A radix sort is stable: vectors of a cell keep their order.
    int bits = 1;
    while (bits < 16 && 1 << bits < ncell_) {
        bits++;
    }
    size_t bytes = 0;
    const auto sort = [&](void* temporary) {
        FAISS_SAAP_CUDA_CHECK(cub::DeviceRadixSort::SortPairs(
                temporary,
                bytes,
                cells,
                cell.get(),
                numbers.get(),
                order.get(),
                size,
                0,
                bits,
                stream));
    };
    sort(nullptr);
    const StreamBuffer<char> temporary(memory_, bytes);
    sort(temporary.get());

    Batch b;
    b.n = size, b.ncell = ncell_;
    b.cell = cell.get(), b.order = order.get();
    b.begin = begin.get();
    b.new_pages = new_pages.get(), b.page_begin = page_begin.get();
    b.location = locations;
    count_kernel<<<blocks(ncell_ + 1), kThreads, 0, stream>>>(view_, b);
    FAISS_SAAP_CUDA_CHECK(cudaGetLastError());
    exclusive_sum(new_pages.get(), page_begin.get(), ncell_ + 1, memory_);
    int pages = 0;
    copy_async(&pages, page_begin.get() + ncell_, 1, stream);
    FAISS_SAAP_CUDA_CHECK(cudaStreamSynchronize(stream));
    reserve(pages);

    b.free = free_.get() + free_count_;
    if (pages > 0) {
        link_kernel<<<blocks(pages), kThreads, 0, stream>>>(view_, b, pages);
        FAISS_SAAP_CUDA_CHECK(cudaGetLastError());
    }
    locate_kernel<<<blocks(n), kThreads, 0, stream>>>(view_, b);
    FAISS_SAAP_CUDA_CHECK(cudaGetLastError());
    finish_kernel<<<blocks(ncell_), kThreads, 0, stream>>>(view_, b);
    FAISS_SAAP_CUDA_CHECK(cudaGetLastError());
    free_count_ -= pages;
}

void PagedLists::write(
        int64_t n,
        const float* x,
        const int64_t* ids,
        int64_t first_id,
        const uint32_t* locations) {
    if (n == 0) {
        return;
    }
    const auto kernel = view_.float16 ? write_kernel<__half> : write_kernel<float>;
    kernel<<<blocks(n * 32), kThreads, 0, memory_.stream>>>(
            view_, n, x, ids, first_id, locations);
    FAISS_SAAP_CUDA_CHECK(cudaGetLastError());
}

int64_t PagedLists::remove(const faiss::IDSelector& selector) {
    const cudaStream_t stream = memory_.stream;
    const size_t per_slab = size_t(kPage) << view_.slab_log2;
    std::vector<uint8_t> gone(pages() * kPage);
    std::vector<int64_t> ids(per_slab);
    int64_t removed = 0;
    for (size_t s = 0; s < slabs_.size(); s++) {
        if (!slabs_[s]) {
            continue;
        }
        const auto* from =
                reinterpret_cast<const int64_t*>(slabs_[s] + view_.ids_offset);
        copy_async(ids.data(), from, per_slab, stream);
        FAISS_SAAP_CUDA_CHECK(cudaStreamSynchronize(stream));
        for (size_t i = 0; i < per_slab; i++) {
            if (ids[i] >= 0 && selector.is_member(ids[i])) {
                gone[s * per_slab + i] = 1;
                removed++;
            }
        }
    }
    if (removed == 0) {
        return 0;
    }
    const StreamBuffer<uint8_t> mask(memory_, gone.size());
    const StreamBuffer<int> kept(memory_, ncell_), freed(memory_, ncell_ + 1),
            freed_begin(memory_, ncell_ + 1);
    size_t unused = 0;
    FAISS_SAAP_CUDA_CHECK(cub::DeviceScan::ExclusiveSum(
            nullptr, unused, freed.get(), freed_begin.get(), ncell_ + 1, stream));
    const StreamBuffer<char> temporary(memory_, unused);
    copy_async(mask.get(), gone.data(), gone.size(), stream);
    // Nothing below asks for memory.
    const auto compact =
            view_.float16 ? compact_kernel<__half> : compact_kernel<float>;
    compact<<<ncell_ + 1, kThreads, 0, stream>>>(
            view_, ncell_, mask.get(), kept.get(), freed.get());
    FAISS_SAAP_CUDA_CHECK(cudaGetLastError());
    FAISS_SAAP_CUDA_CHECK(cub::DeviceScan::ExclusiveSum(
            temporary.get(),
            unused,
            freed.get(),
            freed_begin.get(),
            ncell_ + 1,
            stream));
    release_kernel<<<blocks(ncell_), kThreads, 0, stream>>>(
            view_,
            ncell_,
            kept.get(),
            freed_begin.get(),
            free_.get() + free_count_);
    FAISS_SAAP_CUDA_CHECK(cudaGetLastError());
    int pages = 0;
    copy_async(&pages, freed_begin.get() + ncell_, 1, stream);
    FAISS_SAAP_CUDA_CHECK(cudaStreamSynchronize(stream));
    free_count_ += pages;
    return removed;
}

void PagedLists::read(
        int first,
        int last,
        const std::vector<int64_t>& begin,
        int64_t size,
        void* codes,
        int64_t* ids) const {
    if (size == 0) {
        return;
    }
    const cudaStream_t stream = memory_.stream;
    const size_t bytes = size_t(size) * view_.d * element_bytes();
    const StreamBuffer<char> code_buffer(memory_, bytes);
    const StreamBuffer<int64_t> id_buffer(memory_, size),
            begin_buffer(memory_, begin.size());
    copy_async(begin_buffer.get(), begin.data(), begin.size(), stream);
    if (view_.float16) {
        read_kernel<<<last - first, kThreads, 0, stream>>>(
                view_,
                first,
                begin_buffer.get(),
                reinterpret_cast<__half*>(code_buffer.get()),
                id_buffer.get());
    } else {
        read_kernel<<<last - first, kThreads, 0, stream>>>(
                view_,
                first,
                begin_buffer.get(),
                reinterpret_cast<float*>(code_buffer.get()),
                id_buffer.get());
    }
    FAISS_SAAP_CUDA_CHECK(cudaGetLastError());
    copy_async(static_cast<char*>(codes), code_buffer.get(), bytes, stream);
    copy_async(ids, id_buffer.get(), size, stream);
    FAISS_SAAP_CUDA_CHECK(cudaStreamSynchronize(stream));
}

void PagedLists::find(int64_t first, int64_t n, uint32_t* locations) const {
    FAISS_SAAP_CUDA_CHECK(cudaMemsetAsync(
            locations, 0xff, n * sizeof(*locations), memory_.stream));
    const int places = kPage << view_.slab_log2;
    for (size_t s = 0; s < slabs_.size(); s++) {
        if (slabs_[s]) {
            find_kernel<<<blocks(places), kThreads, 0, memory_.stream>>>(
                    reinterpret_cast<const int64_t*>(slabs_[s] + view_.ids_offset),
                    places,
                    static_cast<uint32_t>(s * places),
                    first,
                    n,
                    locations);
            FAISS_SAAP_CUDA_CHECK(cudaGetLastError());
        }
    }
}

void PagedLists::gather(int64_t n, const uint32_t* locations, float* x) const {
    if (n == 0) {
        return;
    }
    const auto kernel =
            view_.float16 ? gather_kernel<__half> : gather_kernel<float>;
    kernel<<<blocks(n * 32), kThreads, 0, memory_.stream>>>(
            view_, n, locations, x);
    FAISS_SAAP_CUDA_CHECK(cudaGetLastError());
}

std::vector<int32_t> PagedLists::sizes() const {
    std::vector<int32_t> sizes(ncell_);
    copy_async(sizes.data(), view_.count, sizes.size(), memory_.stream);
    FAISS_SAAP_CUDA_CHECK(cudaStreamSynchronize(memory_.stream));
    return sizes;
}

} // namespace faiss_saap::gpu
