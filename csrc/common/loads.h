// Loads and stores of several neighbouring numbers at once, up to 16 bytes, and of numbers whose dtype is known only
// when the kernel runs.
#pragma once

#include <type_traits>

#include "numbers.h"
#include "portable.h"

namespace lynx {

template <class Element, int kItems>
struct alignas(kItems * sizeof(Element) < 16 ? kItems * sizeof(Element) : 16) AlignedVector {
    Element items[kItems];
};

template <class Element, int kItems>
LYNX_PORTABLE AlignedVector<Element, kItems> load(const Element* from) {
    return *reinterpret_cast<const AlignedVector<Element, kItems>*>(from);
}

template <class Element, int kItems>
LYNX_PORTABLE void store(Element* to, const AlignedVector<Element, kItems>& vector) {
    *reinterpret_cast<AlignedVector<Element, kItems>*>(to) = vector;
}

// 16 bytes of numbers, not yet converted, in four registers. The compiler would give every 16-bit number a register.
struct alignas(16) Bytes16 {
    uint32_t words[4];
};

// As widen, but fp16 by the GPU's own instruction, which replaces seven. NaN stays NaN, with other bits.
template <class Element>
LYNX_PORTABLE float widen_number(Element value) {
#if defined(__CUDA_ARCH__)
    if constexpr (std::is_same_v<Element, Half>) {
        float result;
        asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
        return result;
    }
#endif
    return widen(value);
}

template <class Element>
LYNX_PORTABLE float item_of(const Bytes16& bytes, int item) {
    if constexpr (sizeof(Element) == 4)
        return float_of(bytes.words[item]);
    else
        return widen_number(Element{static_cast<uint16_t>(bytes.words[item / 2] >> (16 * (item % 2)))});
}

// `from` is a multiple of 16 bytes.
template <class Element>
LYNX_PORTABLE Bytes16 load16(const Element* from) {
    return *reinterpret_cast<const Bytes16*>(from);
}

// The first `count` numbers, loaded one by one. The rest are zeros.
template <class Element>
LYNX_PORTABLE Bytes16 load16_partial(const Element* from, int count) {
    Bytes16 bytes = {};
    LYNX_UNROLL
    for (int i = 0; i < 16 / static_cast<int>(sizeof(Element)); i++) {
        if (i >= count) continue;
        if constexpr (sizeof(Element) == 4)
            bytes.words[i] = bits_of(from[i]);
        else
            bytes.words[i / 2] |= static_cast<uint32_t>(from[i].bits) << (16 * (i % 2));
    }
    return bytes;
}

// A streaming load: of numbers that no thread writes meanwhile and that this block reads once, so that they do not
// displace others from the L1 cache. Zeros if `is_valid` is false. The compiler does not move the load. If it stands in
// front of a barrier, it is issued there, and waited for where its result is used.
template <class Element>
LYNX_PORTABLE Bytes16 load16_streaming(const Element* from, bool is_valid) {
    Bytes16 bytes = {};
#if defined(__CUDA_ARCH__)
    asm volatile(
        "{\n"
        ".reg .pred is_valid;\n"
        "setp.ne.u32 is_valid, %5, 0;\n"
        "mov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
        "@is_valid ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
        "}"
        : "=&r"(bytes.words[0]), "=&r"(bytes.words[1]), "=&r"(bytes.words[2]), "=&r"(bytes.words[3])
        : "l"(from), "r"(static_cast<unsigned>(is_valid)));
#else
    if (is_valid) bytes = load16(from);
#endif
    return bytes;
}

// Contiguous numbers, or rows of them. `data` is null if the argument is absent.
struct Values {
    const void* data;
    Dtype dtype;
    bool is_aligned;  // whether every row starts at a multiple of 16 bytes
};

// `stride` is that of rows, in elements.
inline Values values_of(const void* data, Dtype dtype, int64_t stride = 0) {
    const int64_t bytes = dtype == Dtype::kFloat ? 4 : 2;
    return {data, dtype, reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * bytes % 16 == 0};
}

// Some of them, not yet converted. Loading and converting are separate, so that several loads can be in flight.
template <int kItems>
struct alignas(16) Raw {
    uint32_t words[kItems];  // 16-bit numbers fill the first half
};

// kItems values from `first` on, of which `count` exist. The rest are zeros. `first` is a multiple of kItems in its
// row.
template <int kItems>
LYNX_PORTABLE Raw<kItems> fetch(const Values& values, int64_t first, int count) {
    Raw<kItems> raw = {};
    if (values.dtype == Dtype::kFloat) {
        const uint32_t* from = static_cast<const uint32_t*>(values.data) + first;
        if (values.is_aligned && count >= kItems) {
            const auto vector = load<uint32_t, kItems>(from);
            memcpy(raw.words, vector.items, sizeof vector);
        } else {
            LYNX_UNROLL
            for (int i = 0; i < kItems; i++)
                if (i < count) raw.words[i] = from[i];
        }
    } else {
        const uint16_t* from = static_cast<const uint16_t*>(values.data) + first;
        if (values.is_aligned && count >= kItems) {
            const auto vector = load<uint16_t, kItems>(from);
            memcpy(raw.words, vector.items, sizeof vector);
        } else {
            LYNX_UNROLL
            for (int i = 0; i < kItems; i++)
                if (i < count) raw.words[i / 2] |= static_cast<uint32_t>(from[i]) << (16 * (i % 2));
        }
    }
    return raw;
}

template <class Element, int kItems>
LYNX_PORTABLE void widen_as(const Raw<kItems>& raw, float (&to)[kItems]) {
    LYNX_UNROLL
    for (int i = 0; i < kItems; i++) {
        if constexpr (sizeof(Element) == 4)
            to[i] = float_of(raw.words[i]);
        else
            to[i] = widen_number(Element{static_cast<uint16_t>(raw.words[i / 2] >> (16 * (i % 2)))});
    }
}

template <int kItems>
LYNX_PORTABLE void widen(const Raw<kItems>& raw, Dtype dtype, float (&to)[kItems]) {
    switch (dtype) {
        case Dtype::kFloat: return widen_as<float>(raw, to);
        case Dtype::kHalf: return widen_as<Half>(raw, to);
        case Dtype::kBFloat16: return widen_as<BFloat16>(raw, to);
        case Dtype::kDouble: return;  // rejected before any launch
    }
}

// One number, or 0 if the argument is absent.
struct RawNumber {
    uint32_t bits;
};

LYNX_PORTABLE RawNumber fetch_one(const Values& values, int64_t index) {
    if (values.data == nullptr) return {};
    if (values.dtype == Dtype::kFloat) return {static_cast<const uint32_t*>(values.data)[index]};
    return {static_cast<const uint16_t*>(values.data)[index]};
}

LYNX_PORTABLE float widen(RawNumber number, Dtype dtype) {
    const uint16_t half = static_cast<uint16_t>(number.bits);
    return dtype == Dtype::kFloat  ? float_of(number.bits)
           : dtype == Dtype::kHalf ? widen(Half{half})
                                   : widen(BFloat16{half});
}

LYNX_PORTABLE void store_one(void* to, Dtype dtype, int64_t index, float value) {
    switch (dtype) {
        case Dtype::kFloat: narrow(value, static_cast<float*>(to)[index]); return;
        case Dtype::kHalf: narrow(value, static_cast<Half*>(to)[index]); return;
        case Dtype::kBFloat16: narrow(value, static_cast<BFloat16*>(to)[index]); return;
        case Dtype::kDouble: return;  // rejected before any launch
    }
}

}  // namespace lynx
