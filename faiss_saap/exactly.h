/// Objects of one class and of none that derives from it.
#pragma once

#include <typeinfo>

namespace faiss_saap {

/// The object as a T, null where it is of another class, derived ones too: these may do
/// something else or hold more, which would be lost where a T is written or moved in their
/// place.
template <class T, class Base>
const T* exactly(const Base& object) {
    return typeid(object) == typeid(T) ? static_cast<const T*>(&object) : nullptr;
}

} // namespace faiss_saap
