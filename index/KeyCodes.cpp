#include <faiss_saap/KeyCodes.h>

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <numeric>

#include <faiss_saap/dtype.h>

#include "check.h"
#include "vector_kernels.h"

namespace faiss_saap {

namespace {

constexpr int kBlock = kCodeBlock;
constexpr int kBytes = kCodeBlockBytes;

int blocks_of(int d) {
    return (d + kBlock - 1) / kBlock;
}

float rounded(float x, uint8_t* bits) {
    from_float(DType::bfloat16, &x, 1, bits);
    to_float(DType::bfloat16, bits, 1, &x);
    return x;
}

/// Base and step, then the low halves of 16 bytes and their high halves.
void encode_block(int n, const float* x, uint8_t* code) {
    const auto [low, high] = std::minmax_element(x, x + n);
    const float base = rounded(*low, code);
    // Where base has been rounded up beyond all of them, there is one level.
    const float step =
            rounded(std::max(0.0f, (*high - base) / 15), code + 2);
    uint8_t level[kBlock] = {};
    for (int i = 0; i < n && step > 0; i++) {
        level[i] = static_cast<uint8_t>(
                std::clamp(std::round((x[i] - base) / step), 0.0f, 15.0f));
    }
    for (int i = 0; i < kBlock / 2; i++) {
        code[4 + i] =
                static_cast<uint8_t>(level[i] | level[i + kBlock / 2] << 4);
    }
}

} // namespace

KeyCodes::KeyCodes(int d, int64_t first_slot)
        : d_(d), first_slot_(first_slot), code_size_(code_size(d)) {
    FAISS_THROW_IF_NOT_FMT(
            first_slot >= 0 && first_slot <= INT32_MAX,
            "first_slot = %" PRId64 " must be between 0 and 2^31 - 1",
            first_slot);
}

size_t KeyCodes::code_size(int d) {
    FAISS_THROW_IF_NOT_FMT(d >= 1, "d = %d must be at least 1", d);
    return static_cast<size_t>(blocks_of(d)) * kBytes;
}

KeyCodes::Chunk& KeyCodes::chunk_for_next() {
    const auto i = static_cast<size_t>(size_ / kChunk);
    if (i == chunks_.size()) {
        chunks_.push_back(std::make_shared<Chunk>(kChunk * code_size_));
    } else if (chunks_[i].use_count() > 1) { // shared with a copy
        chunks_[i] = std::make_shared<Chunk>(*chunks_[i]);
    }
    return *chunks_[i];
}

void KeyCodes::append(const float* key) {
    uint8_t* code = chunk_for_next().data() + size_ % kChunk * code_size_;
    for (int c = 0; c < d_; c += kBlock) {
        encode_block(std::min(kBlock, d_ - c), key + c, code);
        code += kBytes;
    }
    size_++;
}

void KeyCodes::truncate(int64_t size) {
    FAISS_THROW_IF_NOT_FMT(
            size >= 0 && size <= size_,
            "size = %" PRId64 " must be between 0 and the %" PRId64
            " slots coded",
            size,
            size_);
    size_ = size;
    chunks_.resize((size + kChunk - 1) / kChunk);
}

void KeyCodes::restore(int64_t n, const uint8_t* codes) {
    FAISS_THROW_IF_NOT_FMT(
            size_ == 0, "restore: there are %" PRId64 " codes already", size_);
    FAISS_THROW_IF_NOT_FMT(n >= 0, "n = %" PRId64 " must not be negative", n);
    for (int64_t i = 0; i < n * blocks_of(d_); i++) {
        float base_step[2];
        to_float(DType::bfloat16, codes + i * kBytes, 2, base_step);
        FAISS_THROW_IF_NOT_FMT(
                std::isfinite(base_step[0]) && std::isfinite(base_step[1]),
                "the code of key %" PRId64 " has a base of %f and a step of %f",
                i / blocks_of(d_),
                double(base_step[0]),
                double(base_step[1]));
    }
    for (; size_ < n; size_ = std::min(n, size_ + kChunk)) {
        std::copy_n(
                codes + size_ * code_size_,
                std::min(kChunk, n - size_) * code_size_,
                chunk_for_next().data());
    }
}

void KeyCodes::decode(int64_t slot, float* key) const {
    const uint8_t* code = this->code(slot);
    for (int c = 0; c < d_; c++) {
        const uint8_t* block = code + c / kBlock * kBytes;
        float base, step;
        to_float(DType::bfloat16, block, 1, &base);
        to_float(DType::bfloat16, block + 2, 1, &step);
        const int i = c % kBlock, half = kBlock / 2;
        const int level =
                i < half ? block[4 + i] & 15 : block[4 + i - half] >> 4;
        key[c] = base + step * static_cast<float>(level);
    }
}

std::vector<int32_t> KeyCodes::best(
        int nq,
        const float* queries,
        float scale,
        const std::vector<int32_t>& slots,
        int64_t limit) const {
    FAISS_THROW_IF_NOT_FMT(nq >= 1, "nq = %d must be at least 1", nq);
    FAISS_THROW_IF_NOT_FMT(
            std::isfinite(scale) && scale > 0,
            "scale = %f must be positive and finite",
            double(scale));
    FAISS_THROW_IF_NOT_FMT(
            limit >= 0, "limit = %" PRId64 " must not be negative", limit);
    const auto n = static_cast<int64_t>(slots.size());
    std::vector<const uint8_t*> codes(n);
    for (int64_t i = 0; i < n; i++) {
        FAISS_THROW_IF_NOT_FMT(
                slots[i] >= first_slot_ && slots[i] - first_slot_ < size_,
                "slot %d has no code: those of %" PRId64 " .. %" PRId64 " have",
                slots[i],
                first_slot_,
                first_slot_ + size_ - 1);
        codes[i] = code(slots[i]);
    }
    std::vector<int32_t> order(n);
    std::iota(order.begin(), order.end(), 0);
    if (limit < n) {
        std::vector<float> scores(nq * n);
        code_products(nq, d_, queries, n, codes.data(), scores.data());
        for (float s : scores) {
            FAISS_THROW_IF_NOT_FMT(
                    std::isfinite(s * scale),
                    "a query and a coded key have a product of %f",
                    double(s));
        }
        if (nq > 1) {
            const std::vector<float> one(n, 1.0f);
            std::vector<float> shared(n);
            share_scores_kernel(
                    nq,
                    static_cast<int>(n),
                    scores.data(),
                    one.data(),
                    scale,
                    shared.data());
            scores = std::move(shared);
        }
        const auto better = [&](int32_t a, int32_t b) {
            return scores[a] != scores[b] ? scores[a] > scores[b]
                                          : slots[a] < slots[b];
        };
        std::nth_element(
                order.begin(), order.begin() + limit, order.end(), better);
        order.resize(limit);
    }
    std::vector<int32_t> chosen;
    chosen.reserve(order.size());
    for (int32_t i : order) {
        chosen.push_back(slots[i]);
    }
    std::sort(chosen.begin(), chosen.end());
    return chosen;
}

size_t KeyCodes::bytes_used(std::unordered_set<const void*>* counted) const {
    size_t bytes = sizeof(*this) + chunks_.capacity() * sizeof(chunks_[0]);
    for (const auto& chunk : chunks_) {
        if (!counted || counted->insert(chunk.get()).second) {
            bytes += sizeof(Chunk) + chunk->capacity();
        }
    }
    return bytes;
}

} // namespace faiss_saap
