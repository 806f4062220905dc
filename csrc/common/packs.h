// Neighbouring numbers that are moved at once, in accesses of up to 16 bytes, and numbers whose type is known only when
// the kernel runs.
#pragma once

#include <type_traits>

#include "numbers.h"
#include "portable.h"

namespace lynx {

template <class Element, int kItems>
struct alignas(kItems * sizeof(Element) < 16 ? kItems * sizeof(Element) : 16) Pack {
    Element items[kItems];
};

template <class Element, int kItems>
LYNX_PORTABLE Pack<Element, kItems> load(const Element* from) {
    return *reinterpret_cast<const Pack<Element, kItems>*>(from);
}

template <class Element, int kItems>
LYNX_PORTABLE void store(Element* to, const Pack<Element, kItems>& pack) {
    *reinterpret_cast<Pack<Element, kItems>*>(to) = pack;
}

// 16 bytes of numbers as they came, in four registers: as numbers of 16 bits the compiler gives each a register.
struct alignas(16) Words {
    uint32_t words[4];
};

// As widen, by the GPU's own instruction where it has one: one for the seven that the bits of Half take. What is not a number
// stays none, with other bits.
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
LYNX_PORTABLE float item_of(const Words& words, int item) {
    if constexpr (sizeof(Element) == 4)
        return float_of(words.words[item]);
    else
        return widen_number(Element{static_cast<uint16_t>(words.words[item / 2] >> (16 * (item % 2)))});
}

// From a multiple of 16 bytes.
template <class Element>
LYNX_PORTABLE Words load_words(const Element* from) {
    return *reinterpret_cast<const Words*>(from);
}

// One by one, the first `count` of them; zeros behind.
template <class Element>
LYNX_PORTABLE Words gather_words(const Element* from, int count) {
    Words words = {};
    LYNX_UNROLL
    for (int i = 0; i < 16 / static_cast<int>(sizeof(Element)); i++) {
        if (i >= count) continue;
        if constexpr (sizeof(Element) == 4)
            words.words[i] = bits_of(from[i]);
        else
            words.words[i / 2] |= static_cast<uint32_t>(from[i].bits) << (16 * (i % 2));
    }
    return words;
}

// Those that nobody writes meanwhile and this block reads once, so that they leave the first cache to others; zeros where
// `is_there` is false. The load stays where it stands, in front of a barrier if it does; what it brings is waited for
// where it is used.
template <class Element>
LYNX_PORTABLE Words load_words_once(const Element* from, bool is_there) {
    Words words = {};
#if defined(__CUDA_ARCH__)
    asm volatile(
        "{\n"
        ".reg .pred is_there;\n"
        "setp.ne.u32 is_there, %5, 0;\n"
        "mov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
        "@is_there ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
        "}"
        : "=&r"(words.words[0]), "=&r"(words.words[1]), "=&r"(words.words[2]), "=&r"(words.words[3])
        : "l"(from), "r"(static_cast<unsigned>(is_there)));
#else
    if (is_there) words = load_words(from);
#endif
    return words;
}

// Numbers side by side, or rows of them; no data where an argument is absent.
struct Values {
    const void* data;
    Dtype dtype;
    bool takes_packs;  // whether rows start at multiples of 16 bytes
};

// Of one dtype, side by side in rows that follow each other `stride` elements apart.
inline Values values_of(const void* data, Dtype dtype, int64_t stride = 0) {
    const int64_t bytes = dtype == Dtype::kFloat ? 4 : 2;
    return {data, dtype, reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * bytes % 16 == 0};
}

// Some of them as memory holds them. Apart from widening, so that several loads are on their way before one is used.
template <int kItems>
struct alignas(16) Raw {
    uint32_t words[kItems];  // 16-bit ones fill the first half
};

// Those from `first` on of which there are `count`; behind them zeros. `first` is a multiple of kItems in its row.
template <int kItems>
LYNX_PORTABLE Raw<kItems> fetch(const Values& values, int64_t first, int count) {
    Raw<kItems> raw = {};
    if (values.dtype == Dtype::kFloat) {
        const uint32_t* from = static_cast<const uint32_t*>(values.data) + first;
        if (values.takes_packs && count >= kItems) {
            const auto pack = load<uint32_t, kItems>(from);
            memcpy(raw.words, pack.items, sizeof pack);
        } else {
            LYNX_UNROLL
            for (int i = 0; i < kItems; i++)
                if (i < count) raw.words[i] = from[i];
        }
    } else {
        const uint16_t* from = static_cast<const uint16_t*>(values.data) + first;
        if (values.takes_packs && count >= kItems) {
            const auto pack = load<uint16_t, kItems>(from);
            memcpy(raw.words, pack.items, sizeof pack);
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
        case Dtype::kDouble: return;  // refused before any launch
    }
}

// One number, or 0 where the argument is absent.
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

LYNX_PORTABLE void put(void* to, Dtype dtype, int64_t index, float value) {
    switch (dtype) {
        case Dtype::kFloat: narrow(value, static_cast<float*>(to)[index]); return;
        case Dtype::kHalf: narrow(value, static_cast<Half*>(to)[index]); return;
        case Dtype::kBFloat16: narrow(value, static_cast<BFloat16*>(to)[index]); return;
        case Dtype::kDouble: return;  // refused before any launch
    }
}

}  // namespace lynx
