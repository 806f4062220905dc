// Vectors of 32-bit lanes, as wide as the instruction set that the including file is compiled for.
//
// A file that includes this one is compiled once per instruction set. The linker merges functions of the same name, and
// a CPU without AVX-512 could then get the copy that was compiled for AVX-512. So everything here is in an unnamed
// namespace, and those files use no templates or inline functions of the standard library that the compiler could emit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "integers.h"

#define LYNX_INLINE inline __attribute__((always_inline))

namespace {

using lynx::divide_up;
using lynx::min;
using lynx::round_up;

// A register tile has kTileRows x kTileVectors sums. With them, a row of the right operand and one broadcast value of
// the left one fit the 32 registers of AVX-512 (6 * 4 + 4 + 1) and the 16 of AVX2 and SSE (6 * 2 + 2 + 1).
constexpr int kTileRows = 6;
#if defined(__AVX512F__)
constexpr int kWidth = 16, kTileVectors = 4;
#elif defined(__AVX2__)
constexpr int kWidth = 8, kTileVectors = 2;
#else
constexpr int kWidth = 4, kTileVectors = 2;
#endif

typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Words __attribute__((vector_size(4 * kWidth)));
typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));
typedef uint8_t Bytes __attribute__((vector_size(kWidth)));

struct BFloat16 {
    uint16_t bits;
};

template <class Vector>
LYNX_INLINE Vector load_vector(const void* from) {
    Vector vector;
    memcpy(&vector, from, sizeof vector);
    return vector;
}

template <class Vector>
LYNX_INLINE void store_vector(void* to, Vector vector) {
    memcpy(to, &vector, sizeof vector);
}

LYNX_INLINE Floats broadcast(float value) { return value - Floats{}; }

LYNX_INLINE Words broadcast_word(uint32_t value) { return value + Words{}; }

LYNX_INLINE Ints lane_numbers() {
    Ints lanes;
    for (int lane = 0; lane < kWidth; lane++) lanes[lane] = lane;
    return lanes;
}

// ---- fp32 and bf16 in memory, fp32 in registers

LYNX_INLINE Floats widen(Halves bits) { return (Floats)(__builtin_convertvector(bits, Words) << 16); }

// To bf16, rounded to nearest, ties to even.
LYNX_INLINE Halves narrow(Floats x) {
#if defined(__AVX512BF16__)
    return (Halves)_mm512_cvtneps_pbh((__m512)x);
#else
    Words bits = (Words)x;
    Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector(x == x ? rounded : (bits >> 16 | 0x40), Halves);  // a NaN stays one
#endif
}

// Likewise, the result in the low half of every lane.
LYNX_INLINE Words to_bfloat16(Floats x) { return __builtin_convertvector(narrow(x), Words); }

LYNX_INLINE Floats load(const float* from) { return load_vector<Floats>(from); }
LYNX_INLINE Floats load(const BFloat16* from) { return widen(load_vector<Halves>(from)); }
LYNX_INLINE void store(float* to, Floats x) { store_vector(to, x); }
LYNX_INLINE void store(BFloat16* to, Floats x) { store_vector(to, narrow(x)); }

// The first `count` elements, at most a vector of them. The other lanes are zeros, and nothing is read for them.
template <class Element>
LYNX_INLINE Floats load_first(const Element* from, int64_t count) {
    if (count >= kWidth) return load(from);
    Element staged[kWidth] = {};
    memcpy(staged, from, count * sizeof(Element));
    return load(staged);
}

template <class Element>
LYNX_INLINE void store_first(Element* to, Floats x, int64_t count) {
    if (count >= kWidth) return store(to, x);
    Element staged[kWidth];
    store(staged, x);
    memcpy(to, staged, count * sizeof(Element));
}

// ---- bytes in memory, 32 bits in registers. GCC 12 would convert them lane by lane. The masked intrinsics are used
// because GCC warns, wrongly, of an uninitialised register in the others.

LYNX_INLINE Ints widen(Bytes bytes) {
#if defined(__AVX512F__)
    return (Ints)_mm512_maskz_cvtepu8_epi32(0xffff, (__m128i)bytes);
#elif defined(__AVX2__)
    return (Ints)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)bytes));
#else
    return __builtin_convertvector(bytes, Ints);
#endif
}

// Clamps to 0 ... 255.
LYNX_INLINE Bytes to_bytes(Ints x) {
#if defined(__AVX512F__)
    return (Bytes)_mm512_maskz_cvtusepi32_epi8(0xffff, (__m512i)(x < 0 ? Ints{} : x));
#elif defined(__AVX2__)
    const __m128i low = _mm256_castsi256_si128((__m256i)x), high = _mm256_extracti128_si256((__m256i)x, 1);
    const __m128i halves = _mm_packs_epi32(low, high);
    return (Bytes)_mm_cvtsi128_si64(_mm_packus_epi16(halves, halves));
#else
    x = x < 0 ? Ints{} : x;
    x = x > 255 ? Ints{} + 255 : x;
    return __builtin_convertvector(x, Bytes);
#endif
}

// ---- across lanes

// NaN in x stays NaN, whatever the bound is.
LYNX_INLINE Floats maximum(Floats bound, Floats x) { return bound > x ? bound : x; }

LYNX_INLINE bool any_greater(Floats a, Floats b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_ps((__m256)(a > b)) != 0;
#else
    Ints greater = a > b;
    int32_t any = 0;
    for (int lane = 0; lane < kWidth; lane++) any |= greater[lane];
    return any != 0;
#endif
}

template <int... kLanes>
struct Lanes {};
template <int kCount, int... kLanes>
struct MakeLanes : MakeLanes<kCount - 1, kCount - 1, kLanes...> {};
template <int... kLanes>
struct MakeLanes<0, kLanes...> {
    typedef Lanes<kLanes...> Type;
};

template <int kBlock, int... kLanes>
LYNX_INLINE Floats exchange_blocks(Floats x, Lanes<kLanes...>) {
    return __builtin_shufflevector(x, x, (kLanes ^ kBlock)...);
}

// The reduction of all lanes by `combine`, in every lane.
template <int kBlock = kWidth / 2, class Combine>
LYNX_INLINE Floats reduce_lanes(Floats x, Combine combine) {
    x = combine(x, exchange_blocks<kBlock>(x, typename MakeLanes<kWidth>::Type()));
    if constexpr (kBlock > 1) return reduce_lanes<kBlock / 2>(x, combine);
    return x;
}

LYNX_INLINE float max_of_lanes(Floats x) { return reduce_lanes(x, maximum)[0]; }

LYNX_INLINE float sum_of_lanes(Floats x) {
    return reduce_lanes(x, [](Floats a, Floats b) __attribute__((always_inline)) { return a + b; })[0];
}

// Takes two rows that are kBlock apart, and swaps the blocks of kBlock lanes that a transpose swaps.
template <int kBlock, int... kLanes>
LYNX_INLINE void swap_blocks(Words& upper, Words& lower, Lanes<kLanes...>) {
    Words first = upper, second = lower;
    upper = __builtin_shufflevector(first, second, (kLanes & kBlock ? kWidth + kLanes - kBlock : kLanes)...);
    lower = __builtin_shufflevector(first, second, (kLanes & kBlock ? kWidth + kLanes : kLanes + kBlock)...);
}

template <int kBlock>
LYNX_INLINE void transpose_blocks(Words (&rows)[kWidth]) {
    for (int row = 0; row < kWidth; row++)
        if (!(row & kBlock)) swap_blocks<kBlock>(rows[row], rows[row + kBlock], typename MakeLanes<kWidth>::Type());
    if constexpr (kBlock > 1) transpose_blocks<kBlock / 2>(rows);
}

// Rows become columns.
LYNX_INLINE void transpose(Words (&rows)[kWidth]) { transpose_blocks<kWidth / 2>(rows); }

// Adds to each lane the one kBlock further: of `first` in even blocks of kBlock lanes, of `second` in odd ones.
template <int kBlock, int... kLanes>
LYNX_INLINE Floats fold(Floats first, Floats second, Lanes<kLanes...>) {
    return __builtin_shufflevector(first, second, (kLanes & kBlock ? kWidth + kLanes : kLanes)...) +
           __builtin_shufflevector(first, second, (kLanes & kBlock ? kWidth + kLanes - kBlock : kLanes + kBlock)...);
}

template <int kBlock = kWidth / 2>
LYNX_INLINE Floats fold_rows(Floats (&rows)[kWidth]) {
    for (int row = 0; row < kBlock; row++)
        rows[row] = fold<kBlock>(rows[row], rows[row + kBlock], typename MakeLanes<kWidth>::Type());
    if constexpr (kBlock > 1) return fold_rows<kBlock / 2>(rows);
    return rows[0];
}

// The sums of the lanes of kWidth rows, one row a lane. With AVX-512 it is six times as fast as sum_of_lanes of each
// row.
LYNX_INLINE Floats sums_of_rows(const float* from) {
    Floats rows[kWidth];
    for (int row = 0; row < kWidth; row++) rows[row] = load(from + row * kWidth);
    return fold_rows(rows);
}

// ---- functions

// e^x for x <= 80, to 0.6 ulp. Everything below -86 gives about 2^-124.
// x = n log 2 + r with |r| <= log(2) / 2. log 2 comes in two parts, the first of 12 bits, so that n times it is exact.
// e^r = 1 + r + r^2 p(r), with the polynomial p of degree 4 of the smallest maximal relative error (Remez): 3.1e-9.
LYNX_INLINE Floats exp(Floats x) {
    x = maximum(broadcast(-86.0f), x);
    const float shifter = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
    const Floats shifted = x * 1.44269504f + shifter;
    const Floats n = shifted - shifter;
    const Floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    Floats power = r * 0.001381461326f + 0.008368709824f;
    power = power * r + 0.04166838736f;
    power = power * r + 0.1666652069f;
    power = power * r + 0.4999999345f;
    power = power * (r * r) + r + 1.0f;
    return (Floats)((Words)power + ((Words)shifted << 23));
}

// The series up to x^11 where it falls off fast, elsewhere 1 - 2 / (e^2|x| + 1).
LYNX_INLINE Floats tanh(Floats x) {
    const Floats square = x * x;
    Floats series = square * -5.70498872745e-3f + 2.06390887954e-2f;
    series = series * square - 5.37397155531e-2f;
    series = series * square + 1.33314422036e-1f;
    series = series * square - 3.33332819422e-1f;
    const Floats near = x + x * square * series;
    const Floats size = x < 0.0f ? -x : x;
    const Floats twice = size + size;
    const Floats limit = broadcast(60.0f);  // e^60 is finite, and tanh is 1 long before
    const Floats far = 1.0f - 2.0f / (exp(twice > limit ? limit : twice) + 1.0f);
    return size < 0.625f ? near : x < 0.0f ? -far : x != x ? x : far;
}

// The natural logarithm of a normal positive x. With x = 2^n m and s = (m - 1) / (m + 1), log m = 2 artanh s. The
// series of artanh is cut where its terms fall below 2e-9 of the result, for m between sqrt(1/2) and sqrt(2).
LYNX_INLINE Floats log(Floats x) {
    const uint32_t sqrt_half = 0x3f3504f3;
    Words offset = (Words)x - sqrt_half;
    Ints n = (Ints)offset >> 23;
    Floats m = (Floats)((offset & 0x7fffff) + sqrt_half);
    Floats s = (m - 1.0f) / (m + 1.0f);
    Floats square = s * s;
    Floats series = square * (1.0f / 9) + (1.0f / 7);
    series = series * square + (1.0f / 5);
    series = series * square + (1.0f / 3);
    Floats log_m = 2.0f * s + 2.0f * s * square * series;
    return __builtin_convertvector(n, Floats) * 0.693147182f + log_m;
}

}  // namespace
