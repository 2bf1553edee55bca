#include "DeviceTexts.h"

#include <algorithm>
#include <numeric>

#include "check.h"
#include "split_products.h"

namespace faiss_saap::gpu {

namespace {

template <class T>
void copy(T* to, const T* from, size_t n, cudaStream_t stream) {
    if (n) {
        FAISS_SAAP_CUDA_CHECK(cudaMemcpyAsync(
                to, from, n * sizeof(T), cudaMemcpyDefault, stream));
    }
}

/// Order of a text's keys by cell, and what goes with it.
struct SortedCells {
    std::vector<int32_t> order, cell;
    std::vector<int2> share;

    SortedCells(const std::vector<int32_t>& cells, int ncell, int nsplit)
            : order(cells.size()), cell(cells.size()) {
        std::vector<int32_t> begin(ncell + 1);
        for (int32_t c : cells) {
            begin[c + 1]++;
        }
        std::partial_sum(begin.begin(), begin.end(), begin.begin());
        std::vector<int32_t> next(begin.begin(), begin.end() - 1);
        for (size_t i = 0; i < cells.size(); i++) {
            const int32_t at = next[cells[i]]++;
            order[at] = static_cast<int32_t>(i);
            cell[at] = cells[i];
        }
        // A share ends with the cell that reaches its part of the keys.
        for (int s = 0; s < nsplit; s++) {
            const auto wanted = static_cast<int32_t>(
                    static_cast<int64_t>(cells.size()) * s / nsplit);
            const auto at = std::lower_bound(begin.begin(), begin.end(), wanted);
            share.push_back({static_cast<int>(at - begin.begin()), *at});
        }
        share.push_back({ncell, begin.back()});
    }
};

/// Gives out room on the device as long as there is some, then on the host.
class TwoLayouts {
   public:
    TwoLayouts(size_t most, char* device, char* host)
            : most_(most), device_(device), host_(host) {}

    template <class T>
    T* take(size_t n) {
        Layout alone;
        alone.take<T>(static_cast<int64_t>(n));
        Layout& to =
                device_.size() + alone.size() <= most_ ? device_ : host_;
        return to.take<T>(static_cast<int64_t>(n));
    }
    size_t on_device() const {
        return device_.size();
    }
    size_t on_host() const {
        return host_.size();
    }

   private:
    size_t most_;
    Layout device_, host_;
};

/// A DeviceText that can be written.
struct Room {
    __nv_bfloat16* keys = nullptr;
    int32_t *position = nullptr, *cell = nullptr;
    int2* share = nullptr;
    float* queries = nullptr;
};

} // namespace

PinnedBuffer::PinnedBuffer(size_t bytes) {
    if (bytes) {
        FAISS_SAAP_CUDA_CHECK(
                cudaHostAlloc(&data_, bytes, cudaHostAllocMapped));
    }
}

PinnedBuffer::~PinnedBuffer() {
    // Kernels may still read it.
    if (data_ && (cudaDeviceSynchronize() != cudaSuccess ||
                  cudaFreeHost(data_) != cudaSuccess)) {
        cudaGetLastError();
    }
}

DeviceTexts::DeviceTexts(
        const std::vector<std::unique_ptr<HeadTraining>>& heads,
        int nsplit,
        size_t most,
        cudaStream_t stream) {
    const int ntext = heads.front()->training_texts;
    const int d = heads.front()->shape.d, group = heads.front()->shape.group;
    const int ncell = heads.front()->shape.ncell;
    std::vector<Room> rooms(heads.size() * ntext);
    const auto lay = [&](char* device, char* host) {
        TwoLayouts layouts(most, device, host);
        const auto for_each = [&](const auto& take) {
            for (size_t i = 0; i < rooms.size(); i++) {
                take(rooms[i], heads[i / ntext]->texts[i % ntext].tokens);
            }
        };
        for_each([&](Room& r, int64_t n) {
            r.keys = layouts.take<__nv_bfloat16>(n * 2 * split_cols(d));
            r.position = layouts.take<int32_t>(n);
            r.cell = layouts.take<int32_t>(n);
            r.share = layouts.take<int2>(nsplit + 1);
        });
        for_each([&](Room& r, int64_t n) {
            r.queries = layouts.take<float>(n * group * d);
        });
        return std::pair{layouts.on_device(), layouts.on_host()};
    };
    const auto [on_device, on_host] = lay(nullptr, nullptr);
    device_ = DeviceBuffer(on_device, stream);
    host_ = std::make_unique<PinnedBuffer>(on_host);
    lay(device_.data(), host_->data());

    std::vector<DeviceText> table;
    for (size_t h = 0; h < heads.size(); h++) {
        for (int t = 0; t < ntext; t++) {
            const TrainingText& text = heads[h]->texts[t];
            const Room& room = rooms[h * ntext + t];
            const SortedCells sorted(text.cells, ncell, nsplit);
            copy(room.position, sorted.order.data(), sorted.order.size(), stream);
            copy(room.cell, sorted.cell.data(), sorted.cell.size(), stream);
            copy(room.share, sorted.share.data(), sorted.share.size(), stream);
            copy(room.queries, text.queries.data(), text.queries.size(), stream);
            const DeviceBuffer keys(
                    text.keys_post.size() * sizeof(float), stream);
            SortKeysParams p;
            p.n = static_cast<int>(text.tokens);
            p.d = d;
            p.keys = reinterpret_cast<float*>(keys.data());
            p.order = room.position;
            p.to = room.keys;
            copy(reinterpret_cast<float*>(keys.data()),
                 text.keys_post.data(),
                 text.keys_post.size(),
                 stream);
            FAISS_SAAP_CUDA_CHECK(sort_keys(p, stream));
            DeviceText of;
            of.tokens = static_cast<int>(text.tokens);
            of.keys = room.keys;
            of.position = room.position;
            of.cell = room.cell;
            of.share = room.share;
            of.queries = room.queries;
            table.push_back(of);
        }
    }
    table_ = DeviceBuffer(table.size() * sizeof(DeviceText), stream);
    copy(reinterpret_cast<DeviceText*>(table_.data()),
         table.data(),
         table.size(),
         stream);
    FAISS_SAAP_CUDA_CHECK(cudaStreamSynchronize(stream));
}

} // namespace faiss_saap::gpu
