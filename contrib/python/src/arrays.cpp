#include "arrays.h"

namespace faiss_saap::python {

namespace {

std::string text_of(const std::vector<int64_t>& shape) {
    std::string text = "(";
    for (size_t i = 0; i < shape.size(); i++) {
        text += i ? ", " : "";
        text += shape[i] < 0 ? "any" : std::to_string(shape[i]);
    }
    return text + (shape.size() == 1 ? ",)" : ")");
}

/// Appends the elements below dimension `axis`, whose first lies at `at`.
void gather(
        const AnyArray& x,
        DType type,
        size_t axis,
        int64_t at,
        float*& out) {
    if (axis == x.ndim()) {
        to_float(
                type,
                static_cast<const char*>(x.data()) +
                        at * static_cast<int64_t>(element_size(type)),
                1,
                out++);
        return;
    }
    for (size_t i = 0; i < x.shape(axis); i++) {
        gather(x, type, axis + 1, at + int64_t(i) * x.stride(axis), out);
    }
}

} // namespace

std::string shape_text(const AnyArray& x) {
    std::vector<int64_t> shape;
    for (size_t i = 0; i < x.ndim(); i++) {
        shape.push_back(static_cast<int64_t>(x.shape(i)));
    }
    return text_of(shape);
}

void check_shape(
        const AnyArray& x,
        const char* name,
        const std::vector<int64_t>& shape) {
    bool fits = x.ndim() == shape.size();
    for (size_t i = 0; fits && i < shape.size(); i++) {
        fits = shape[i] < 0 || static_cast<int64_t>(x.shape(i)) == shape[i];
    }
    FAISS_THROW_IF_NOT_FMT(
            fits,
            "%s has the shape %s, expected %s",
            name,
            shape_text(x).c_str(),
            text_of(shape).c_str());
}

int device_of(const AnyArray& x) {
    return x.device_type() == nb::device::cuda::value ? int(x.device_id())
                                                      : kMainMemory;
}

bool is_contiguous(const AnyArray& x) {
    int64_t expected = 1;
    for (size_t i = x.ndim(); i-- > 0;) {
        if (x.shape(i) != 1 && x.stride(i) != expected) {
            return false;
        }
        expected *= static_cast<int64_t>(x.shape(i));
    }
    return true;
}

namespace {

bool can_be_read(const AnyArray& x) {
    return x.device_type() == nb::device::cpu::value ||
            x.device_type() == nb::device::cuda::value;
}

} // namespace

AnyArray array_anywhere(nb::handle object, const char* name) {
    AnyArray array;
    if (nb::try_cast(object, array) && can_be_read(array)) {
        return array;
    }
    const nb::object type = nb::getattr(object, "dtype", nb::none());
    if (std::string(nb::str(type).c_str()) == "bfloat16" &&
        nb::hasattr(object, "view") &&
        nb::try_cast(object.attr("view")("uint16"), array) &&
        can_be_read(array)) {
        return array;
    }
    FAISS_THROW_FMT(
            "%s is a %s, expected an array that numpy or DLPack can pass, in main "
            "memory or on a CUDA device",
            name,
            nb::type_name(object.type()).c_str());
}

AnyArray array_of(nb::handle object, const char* name) {
    AnyArray array = array_anywhere(object, name);
    FAISS_THROW_IF_NOT_FMT(
            device_of(array) == kMainMemory,
            "%s lies on CUDA device %d, expected an array in main memory",
            name,
            device_of(array));
    return array;
}

namespace {

/// A list as an array of numpy; what is one already as it is.
nb::object as_array(const nb::object& object) {
    const bool sequence = nb::isinstance<nb::list>(object) || nb::isinstance<nb::tuple>(object);
    return sequence ? nb::module_::import_("numpy").attr("asarray")(object) : object;
}

} // namespace

Floats floats_of(const nb::object& object, const char* name) {
    Floats floats;
    if (nb::try_cast(object, floats)) {
        return floats;
    }
    const nb::object numpy = nb::module_::import_("numpy");
    const nb::object converted = numpy.attr("ascontiguousarray")(object, numpy.attr("float32"));
    FAISS_THROW_IF_NOT_FMT(
            nb::try_cast(converted, floats),
            "%s is a %s, expected an array of numbers in main memory",
            name,
            nb::type_name(object.type()).c_str());
    return floats;
}

Longs longs_of(const nb::object& object, const char* name) {
    const nb::object array = as_array(object);
    const AnyArray given = array_of(array, name);
    const auto code = static_cast<nb::dlpack::dtype_code>(given.dtype().code);
    FAISS_THROW_IF_NOT_FMT(
            code == nb::dlpack::dtype_code::Int || code == nb::dlpack::dtype_code::UInt ||
                    given.size() == 0,
            "%s has elements that are no integers",
            name);
    Longs integers;
    FAISS_THROW_IF_NOT_FMT(
            nb::try_cast(array, integers),
            "%s is a %s, whose integers must be contiguous and of 64 bits: numpy's may "
            "be others",
            name,
            nb::type_name(object.type()).c_str());
    return integers;
}

std::vector<int32_t> integers_of(const nb::object& object, const char* name, int64_t n) {
    const Longs integers = longs_of(object, name);
    check_shape(AnyArray(integers), name, {n});
    std::vector<int32_t> numbers(integers.size());
    for (size_t i = 0; i < numbers.size(); i++) {
        const int64_t x = integers.data()[i];
        FAISS_THROW_IF_NOT_FMT(
                x >= INT32_MIN && x <= INT32_MAX,
                "%s[%zd] = %lld is beyond 32 bits",
                name,
                i,
                static_cast<long long>(x));
        numbers[i] = static_cast<int32_t>(x);
    }
    return numbers;
}

DType stored_dtype(const char* argument, const std::string& text) {
    for (DType type : {DType::float32, DType::bfloat16}) {
        if (text == name(type)) {
            return type;
        }
    }
    FAISS_THROW_FMT(
            "%s = '%s', must be float32 or bfloat16", argument, text.c_str());
}

DType dtype_of(const AnyArray& x, const char* name) {
    const auto code = static_cast<nb::dlpack::dtype_code>(x.dtype().code);
    const int bits = x.dtype().bits;
    if (x.dtype().lanes == 1) {
        if (code == nb::dlpack::dtype_code::Float && bits == 32) {
            return DType::float32;
        }
        if (code == nb::dlpack::dtype_code::Float && bits == 16) {
            return DType::float16;
        }
        if ((code == nb::dlpack::dtype_code::Bfloat ||
             code == nb::dlpack::dtype_code::UInt) &&
            bits == 16) {
            return DType::bfloat16;
        }
    }
    const char* kinds[] = {// by DLPack's codes
                           "int", "uint", "float", "opaque", "bfloat", "complex", "bool"};
    const int kind = static_cast<int>(x.dtype().code);
    FAISS_THROW_FMT(
            "%s has elements of type %s%d, expected float32, float16, bfloat16, or "
            "uint16 that holds the bits of bfloat16",
            name,
            kind < 7 ? kinds[kind] : "other",
            bits);
}

FloatRows::FloatRows(const AnyArray& x, const char* name) : array_(x) {
    const DType type = dtype_of(x, name);
    const bool contiguous = is_contiguous(x);
    if (type == DType::float32 && contiguous) {
        data_ = static_cast<const float*>(x.data());
        return;
    }
    converted_.resize(x.size());
    if (contiguous) {
        to_float(type, x.data(), int64_t(x.size()), converted_.data());
    } else {
        float* out = converted_.data();
        gather(x, type, 0, 0, out);
    }
    data_ = converted_.data();
}

} // namespace faiss_saap::python
