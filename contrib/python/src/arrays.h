/// Arrays between Python and the library: read without a copy where the memory
/// allows it, handed out as numpy arrays that own their memory.
#pragma once

#include <cstdint>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <faiss/impl/FaissAssert.h>

#include <faiss_saap/dtype.h>

namespace faiss_saap::python {

namespace nb = nanobind;

/// Contiguous float32 or int64 of any shape; numpy arrays of other types are
/// converted, as Faiss's Python package does.
using Floats = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using Longs = nb::ndarray<const int64_t, nb::c_contig, nb::device::cpu>;
/// Any array, read-only, with its own type and strides; where it lies is asked
/// when it is made.
using AnyArray = nb::ndarray<nb::ro>;

/// "(3, 4)".
std::string shape_text(const AnyArray& x);

/// Throws a sentence unless x has this shape; -1 stands for any extent.
void check_shape(
        const AnyArray& x,
        const char* name,
        const std::vector<int64_t>& shape);

/// Where `device_of` says that an array lies in main memory.
constexpr int kMainMemory = -1;

/// The number of the CUDA device that an array lies on, or kMainMemory.
int device_of(const AnyArray& x);

bool is_contiguous(const AnyArray& x);

/// An array of any framework in main memory or on a CUDA device, without a copy.
/// bfloat16 of ml_dtypes, which numpy passes through no protocol, is taken
/// through its bits.
/// @throws faiss::FaissException naming the argument
AnyArray array_anywhere(nb::handle object, const char* name);

/// The same, in main memory alone.
AnyArray array_of(nb::handle object, const char* name);

/// Contiguous float32, from an array or a sequence of numbers of any type; in place where they
/// are that already.
/// @throws faiss::FaissException naming the argument
Floats floats_of(const nb::object& object, const char* name);

/// Numbers of 64 bits, from integers of any size in an array or a list. (Conversion by numpy
/// would cut fractions off.)
/// @throws faiss::FaissException naming the argument
Longs longs_of(const nb::object& object, const char* name);

/// Numbers of 32 bits, from integers of any size in one dimension. (Conversion by numpy would
/// cut off what is beyond.)
/// @param n  how many are expected; -1: any number
/// @throws faiss::FaissException naming the argument
std::vector<int32_t> integers_of(const nb::object& object, const char* name, int64_t n = -1);

/// Of what partitions store: float32 or bfloat16, by its name.
/// @throws faiss::FaissException naming the argument
DType stored_dtype(const char* argument, const std::string& text);

/// float32, float16 and bfloat16, and uint16 as the bits of bfloat16.
/// @throws faiss::FaissException for other types
DType dtype_of(const AnyArray& x, const char* name);

/// The elements of an array as contiguous floats: in place where they are,
/// else converted.
class FloatRows {
   public:
    FloatRows(const AnyArray& x, const char* name);
    const float* data() const {
        return data_;
    }

   private:
    AnyArray array_;
    std::vector<float> converted_;
    const float* data_ = nullptr;
};

/// A new numpy array that owns its memory, uninitialised.
template <class T>
struct NewArray {
    explicit NewArray(std::vector<size_t> extents) : shape(std::move(extents)) {
        size_t n = 1;
        for (size_t s : shape) {
            if (__builtin_mul_overflow(n, s, &n)) {
                throw std::bad_alloc(); // MemoryError
            }
        }
        memory.reset(new T[n]);
    }

    T* data() {
        return memory.get();
    }
    /// Gives the memory away.
    nb::object object() {
        T* p = memory.release();
        nb::capsule owner(
                p, [](void* x) noexcept { delete[] static_cast<T*>(x); });
        return nb::cast(nb::ndarray<nb::numpy, T>(
                p, shape.size(), shape.data(), owner));
    }

    std::vector<size_t> shape;
    std::unique_ptr<T[]> memory;
};

template <class T>
nb::object copy_to_numpy(const T* x, std::vector<size_t> shape) {
    NewArray<T> array(std::move(shape));
    size_t n = 1;
    for (size_t s : array.shape) {
        n *= s;
    }
    std::copy(x, x + n, array.data());
    return array.object();
}

} // namespace faiss_saap::python
