// Exact sums of bytes times 22-bit weights, in every 32-bit lane of a vector, four bytes at a time.
//
// The instructions that multiply and add within a lane take 8-bit or 16-bit numbers. So weights are cut into signed,
// balanced digits, and each digit has a sum of its own. All sums are modulo 2^32, and the total fits into 32 bits.
#pragma once

#include "common/vector.h"
#include "pack_frames/filter.h"

namespace {

#if defined(__AVX512VNNI__)

// Three digits of 8 bits. One instruction multiplies four bytes by four digits and adds the products.
constexpr int kWeightWords = 3, kSums = 3;

void pack_weights(const int32_t* four, uint32_t* words) {
    for (int digit = 0; digit < kWeightWords; digit++) words[digit] = 0;
    for (int i = 0; i < 4; i++) {
        int32_t rest = four[i];
        for (int digit = 0; digit < kWeightWords; digit++) {
            const int8_t value = (int8_t)rest;
            words[digit] |= (uint32_t)(uint8_t)value << 8 * i;
            rest = (rest - value) / 256;
        }
    }
}

LYNX_INLINE void add_products(Words (&sums)[kSums], Words bytes, const Words (&weights)[kWeightWords]) {
    for (int digit = 0; digit < kSums; digit++)
        sums[digit] = (Words)_mm512_dpbusd_epi32((__m512i)sums[digit], (__m512i)bytes, (__m512i)weights[digit]);
}

LYNX_INLINE Words total(const Words (&sums)[kSums]) { return sums[0] + (sums[1] << 8) + (sums[2] << 16); }

#elif defined(__AVX2__)

// Two digits of 12 bits. One instruction multiplies two 16-bit numbers by two digits and adds the products. The bytes 0
// and 2 of a lane are one pair of such numbers, the bytes 1 and 3 the other.
constexpr int kWeightWords = 4, kSums = 2;

void pack_weights(const int32_t* four, uint32_t* words) {
    for (int pair = 0; pair < 2; pair++) {
        const int32_t a = four[pair], b = four[pair + 2];
        const int32_t low_a = ((a + 2048) & 4095) - 2048, low_b = ((b + 2048) & 4095) - 2048;
        const int32_t high_a = (a - low_a) / 4096, high_b = (b - low_b) / 4096;
        words[pair] = (uint32_t)(uint16_t)low_a | (uint32_t)(uint16_t)low_b << 16;
        words[2 + pair] = (uint32_t)(uint16_t)high_a | (uint32_t)(uint16_t)high_b << 16;
    }
}

LYNX_INLINE Words multiply_pairs(Words a, Words b) {
#if defined(__AVX512BW__)
    return (Words)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#else
    return (Words)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#endif
}

LYNX_INLINE void add_products(Words (&sums)[kSums], Words bytes, const Words (&weights)[kWeightWords]) {
    const Words even = bytes & 0x00ff00ff, odd = bytes >> 8 & 0x00ff00ff;
    for (int digit = 0; digit < kSums; digit++) {
        sums[digit] += multiply_pairs(even, weights[2 * digit]);
        sums[digit] += multiply_pairs(odd, weights[2 * digit + 1]);
    }
}

LYNX_INLINE Words total(const Words (&sums)[kSums]) { return sums[0] + (sums[1] << 12); }

#else

constexpr int kWeightWords = 4, kSums = 1;

void pack_weights(const int32_t* four, uint32_t* words) {
    for (int i = 0; i < 4; i++) words[i] = (uint32_t)four[i];
}

LYNX_INLINE void add_products(Words (&sums)[kSums], Words bytes, const Words (&weights)[kWeightWords]) {
    for (int i = 0; i < 4; i++) sums[0] += (bytes >> 8 * i & 255) * weights[i];
}

LYNX_INLINE Words total(const Words (&sums)[kSums]) { return sums[0]; }

#endif

LYNX_INLINE void start_sums(Words (&sums)[kSums]) {
    for (Words& sum : sums) sum = Words{};
}

LYNX_INLINE void broadcast_weights(Words (&weights)[kWeightWords], const uint32_t* from) {
    for (int i = 0; i < kWeightWords; i++) weights[i] = broadcast_word(from[i]);
}

// byte_of, in every lane.
LYNX_INLINE Bytes bytes_of(const Words (&sums)[kSums]) {
    using lynx::frames::kWeightBits;
    return to_bytes((Ints)(total(sums) + (1u << (kWeightBits - 1))) >> kWeightBits);
}

}  // namespace
