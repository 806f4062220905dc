// fp32, fp16 and bf16 in memory, fp32 in registers. A CPU and a GPU compute the same bits.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "dtype.h"
#include "portable.h"

namespace lynx {

struct Half {
    uint16_t bits;
};

struct BFloat16 {
    uint16_t bits;
};

// Calls use(value), where `value` is of the C++ type that stands for the dtype.
// Throws std::invalid_argument for fp64, which fp32 registers would round.
template <class Use>
void with_type(Dtype dtype, Use use) {
    switch (dtype) {
        case Dtype::kFloat: return use(float());
        case Dtype::kHalf: return use(Half());
        case Dtype::kBFloat16: return use(BFloat16());
        case Dtype::kDouble: break;
    }
    throw std::invalid_argument("these kernels compute in fp32: convert fp64 tensors first");
}

LYNX_PORTABLE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

LYNX_PORTABLE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

LYNX_PORTABLE float widen(float value) { return value; }

LYNX_PORTABLE float widen(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

LYNX_PORTABLE float widen(Half value) {
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16, rest = (value.bits & 0x7fffu) << 13;
    // Exponent and mantissa stand where fp32 has them. An exact product moves the exponent from bias 15 to 127, and
    // turns subnormal numbers into normal ones.
    const float finite = float_of(rest) * 0x1p112f;
    return float_of((rest >= 0x0f800000 ? rest | 0x7f800000 : bits_of(finite)) | sign);  // else infinity or NaN
}

// Rounds to what memory holds: to nearest, ties to even. NaN stays NaN.
LYNX_PORTABLE void narrow(float value, float& result) { result = value; }

LYNX_PORTABLE void narrow(float value, BFloat16& result) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    result.bits = static_cast<uint16_t>(value == value ? rounded : bits >> 16 | 0x40);
}

LYNX_PORTABLE void narrow(float value, Half& result) {
    const uint32_t sign = (bits_of(value) >> 16) & 0x8000, rest = bits_of(value) & 0x7fffffff;
    // Below 2^-14, fp16 has steps of 2^-24. These are the steps of fp32 at 0.5, so adding 0.5 rounds.
    const uint32_t subnormal = bits_of(float_of(rest) + 0.5f) - bits_of(0.5f);
    const uint32_t normal = (rest - (112u << 23) + 0xfff + ((rest >> 13) & 1)) >> 13;
    const uint32_t finite = rest < 0x38800000 ? subnormal : normal;
    const uint32_t bounded = rest >= 0x477ff000 ? 0x7c00 : finite;  // from 65520 on it rounds to infinity
    result.bits = static_cast<uint16_t>((rest > 0x7f800000 ? 0x7e00 : bounded) | sign);
}

}  // namespace lynx
