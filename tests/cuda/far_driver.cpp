// The CUDA kernels of pack_embeddings on tensors of more than 2^31 numbers: only their last rows exist, and only the
// blocks of these run. A wrong result ends the program with a message.
#include <sys/mman.h>

#include "driver.h"
#include "on_host.h"
#include "pack_embeddings/cuda/launches.h"

namespace {

using namespace lynx::embeddings;
using lynx::BFloat16;

constexpr int64_t kWidth = 8;
constexpr int64_t kRows = (1LL << 28) + 5;    // times the width they are more than 2^31
constexpr int64_t kVision = (1LL << 30) + 3;  // twice as many are more than an int holds
constexpr int kBlocks = 3;

// Zeros, of which only the pages that are touched take memory.
template <class Item>
Item* far_memory(int64_t count) {
    void* found = mmap(nullptr, count * sizeof(Item), PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED) fail("there are no addresses for so large a tensor");
    return static_cast<Item*>(found);
}

BFloat16* far_rows(int64_t count) { return far_memory<BFloat16>(count * kWidth); }

void fill(BFloat16* rows, int64_t row, float value) {
    for (int64_t i = 0; i < kWidth; i++) lynx::narrow(value, rows[row * kWidth + i]);
}

void expect(const BFloat16* rows, int64_t row, float value, const char* what) {
    for (int64_t i = 0; i < kWidth; i++)
        if (lynx::widen(rows[row * kWidth + i]) != value) fail(what);
}

Rows rows_of(BFloat16* data, int64_t count) { return {data, lynx::Dtype::kBFloat16, count, kWidth}; }

void pack() {
    BFloat16 *embedding = far_rows(kRows), *vision = far_rows(kVision), *out = far_rows(kRows);
    auto* token_ids = far_memory<int64_t>(kRows);
    auto* vision_index = far_memory<int32_t>(kRows);
    fill(embedding, kRows - 1, 2), fill(vision, kVision - 1, 3);
    token_ids[kRows - 2] = kRows - 1, vision_index[kRows - 2] = -1, vision_index[kRows - 1] = kVision - 1;
    pack_rows(token_ids, vision_index, rows_of(embedding, kRows), rows_of(vision, kVision), rows_of(out, kRows), kWidth,
              lynx::OnHost(0, kBlocks));
    expect(out, kRows - 2, 2, "a far row of the table is not copied");
    expect(out, kRows - 1, 3, "a far vision row is not copied");
}

void sum() {
    BFloat16 *grad = far_rows(kRows), *out = far_rows(kVision);
    auto* vision_index = far_memory<int32_t>(kRows);
    auto* uses = far_memory<int32_t>(2 * kVision);
    vision_index[kRows - 1] = vision_index[kRows - 3] = kVision - 1, vision_index[kRows - 2] = kVision - 2;
    fill(grad, kRows - 1, 2), fill(grad, kRows - 2, 3), fill(grad, kRows - 3, 5);
    sum_rows(rows_of(grad, kRows), vision_index, uses, rows_of(out, kVision), kWidth, lynx::OnHost(0, kBlocks));
    expect(out, kVision - 1, 7, "the gradient of a far vision row is not the sum of its uses");
    expect(out, kVision - 2, 3, "the gradient of a far vision row is not that of its use");
}

}  // namespace

int main() {
    pack();
    sum();
    return 0;
}
