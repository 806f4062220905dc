// Moves bytes from the rows of a frame to planes, one for each channel, and from the planes of a strip to patches.
#pragma once

#include "common/vector.h"
#include "problem.h"

namespace {

constexpr int kChunk = 16;  // bytes moved at a time, whatever the instruction set
typedef uint8_t Chunk __attribute__((vector_size(kChunk)));

// Every third one of 48 bytes, from number kFirst on.
template <int kFirst, int... kLanes>
LYNX_INLINE Chunk every_third(Chunk a, Chunk b, Chunk c, Lanes<kLanes...>) {
    const Chunk from_two = __builtin_shufflevector(a, b, (3 * kLanes + kFirst < 32 ? 3 * kLanes + kFirst : 0)...);
    return __builtin_shufflevector(from_two, c, (3 * kLanes + kFirst < 32 ? kLanes : 3 * kLanes + kFirst - 16)...);
}

// The next row is prefetched, because behind the last column of a crop the CPU does not expect it where it is.
LYNX_INLINE void split_channels(const uint8_t* from, int64_t count, int64_t row_stride,
                                uint8_t* const (&planes)[3]) {
    typedef MakeLanes<kChunk>::Type All;
    uint8_t *const red = planes[0], *const green = planes[1], *const blue = planes[2];
    int64_t i = 0;
    for (; i + kChunk <= count; i += kChunk) {
        __builtin_prefetch(from + 3 * i + row_stride);
        const Chunk a = load_vector<Chunk>(from + 3 * i), b = load_vector<Chunk>(from + 3 * i + kChunk);
        const Chunk c = load_vector<Chunk>(from + 3 * i + 2 * kChunk);
        store_vector(red + i, every_third<0>(a, b, c, All()));
        store_vector(green + i, every_third<1>(a, b, c, All()));
        store_vector(blue + i, every_third<2>(a, b, c, All()));
    }
    for (; i < count; i++)
        for (int channel = 0; channel < 3; channel++) planes[channel][i] = from[3 * i + channel];
}

// Every fourth one of 64 bytes, from number kFirst on.
template <int kFirst, int... kLanes>
LYNX_INLINE Chunk every_fourth(Chunk a, Chunk b, Chunk c, Chunk d, Lanes<kLanes...>) {
    const Chunk low = __builtin_shufflevector(a, b, (kLanes < 8 ? 4 * kLanes + kFirst : 0)...);
    const Chunk high = __builtin_shufflevector(c, d, (kLanes < 8 ? 4 * kLanes + kFirst : 0)...);
    return __builtin_shufflevector(low, high, (kLanes < 8 ? kLanes : kLanes + 8)...);
}

// Pixels of four bytes, of which the last is left out: Pillow's RGB. The byte behind the last pixel's blue may not be
// readable, so the loop reads the last chunk.
void split_wide_channels(const uint8_t* from, int64_t count, int64_t row_stride, uint8_t* const (&planes)[3]) {
    typedef MakeLanes<kChunk>::Type All;
    uint8_t *const red = planes[0], *const green = planes[1], *const blue = planes[2];
    int64_t i = 0;
    for (; i + kChunk < count; i += kChunk) {
        __builtin_prefetch(from + 4 * i + row_stride);
        const Chunk a = load_vector<Chunk>(from + 4 * i), b = load_vector<Chunk>(from + 4 * i + kChunk);
        const Chunk c = load_vector<Chunk>(from + 4 * i + 2 * kChunk);
        const Chunk d = load_vector<Chunk>(from + 4 * i + 3 * kChunk);
        store_vector(red + i, every_fourth<0>(a, b, c, d, All()));
        store_vector(green + i, every_fourth<1>(a, b, c, d, All()));
        store_vector(blue + i, every_fourth<2>(a, b, c, d, All()));
    }
    for (; i < count; i++)
        for (int channel = 0; channel < 3; channel++) planes[channel][i] = from[4 * i + channel];
}

// Reads `count` pixels of a row, from `column` on, and nothing else.
void read_row(const lynx::frames::Frame& frame, int64_t row, int64_t column, int64_t count,
              uint8_t* const (&planes)[3]) {
    const uint8_t* from = frame.data + row * frame.row_stride + column * frame.column_stride;
    if (frame.column_stride == 3 && frame.channel_stride == 1)
        return split_channels(from, count, frame.row_stride, planes);
    if (frame.column_stride == 4 && frame.channel_stride == 1)
        return split_wide_channels(from, count, frame.row_stride, planes);
    for (int channel = 0; channel < 3; channel++) {
        const uint8_t* pixels = from + channel * frame.channel_stride;
        if (frame.column_stride == 1)
            memcpy(planes[channel], pixels, count);
        else
            for (int64_t i = 0; i < count; i++) planes[channel][i] = pixels[i * frame.column_stride];
    }
}

template <int... kLanes>
LYNX_INLINE Chunk reversed(Chunk chunk, Lanes<kLanes...>) {
    return __builtin_shufflevector(chunk, chunk, (kChunk - 1 - kLanes)...);
}

// `to` is `from` right to left.
void mirror(const uint8_t* from, int64_t count, uint8_t* to) {
    int64_t i = 0;
    for (; i + kChunk <= count; i += kChunk)
        store_vector(to + count - kChunk - i, reversed(load_vector<Chunk>(from + i), MakeLanes<kChunk>::Type()));
    for (; i < count; i++) to[count - 1 - i] = from[i];
}

// Cuts the rows of a strip, (rows, 3, stride), into patches, (patches, 3, rows, patch_width). Whole chunks are moved.
// What a chunk writes behind its patch's row, the next one overwrites. So both need kChunk more bytes at the end.
void cut_patches(const uint8_t* strip, int64_t rows, int64_t stride, int64_t width, int64_t patch_width, uint8_t* to) {
    for (int64_t column = 0; column < width; column += patch_width)
        for (int channel = 0; channel < 3; channel++)
            for (int64_t row = 0; row < rows; row++, to += patch_width) {
                const uint8_t* from = strip + (row * 3 + channel) * stride + column;
                for (int64_t i = 0; i < patch_width; i += kChunk) store_vector(to + i, load_vector<Chunk>(from + i));
            }
}

}  // namespace
