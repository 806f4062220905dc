// The CUDA kernels of pack_embeddings and pack_frames on the CPU: `pack_driver <kernel> <numbers>`.
#include "driver.h"
#include "pack_embeddings/cuda/launches.h"
#include "pack_frames/cuda/launches.h"
#include "on_host.h"

namespace {

// Rows of a tensor, as `<name>_rows`, `_stride`, `_dtype` and `_offset` (in elements) describe them.
struct Matrix {
    Matrix(const Numbers& numbers, const std::string& name, int64_t width)
        : dtype(static_cast<lynx::Dtype>(numbers[name + "_dtype"])),
          count(numbers[name + "_rows"]),
          stride(numbers[name + "_stride"]),
          size(kSizes[static_cast<int>(dtype)]),
          buffer(count == 0 || width == 0 ? 0 : ((count - 1) * stride + width) * size,
                 numbers[name + "_offset"] * size) {}

    lynx::embeddings::Rows rows() const { return {buffer.data(), dtype, count, stride}; }

    lynx::Dtype dtype;
    int64_t count, stride;
    size_t size;
    Buffer buffer;
};

void pack_rows(const Numbers& numbers, lynx::OnHost run) {
    const int64_t width = numbers["width"];
    const Matrix embedding(numbers, "embedding", width), vision(numbers, "vision", width), out(numbers, "out", width);
    const Buffer token_ids(out.count * sizeof(int64_t)), vision_index(out.count * sizeof(int32_t));
    token_ids.read(), vision_index.read(), embedding.buffer.read(), vision.buffer.read();
    lynx::embeddings::pack_rows(static_cast<const int64_t*>(token_ids.data()),
                                static_cast<const int32_t*>(vision_index.data()), embedding.rows(), vision.rows(),
                                out.rows(), width, run);
    out.buffer.write();
}

void sum_rows(const Numbers& numbers, lynx::OnHost run) {
    const int64_t width = numbers["width"];
    const Matrix grad(numbers, "grad", width), out(numbers, "out", width);
    const Buffer vision_index(grad.count * sizeof(int32_t)), uses(2 * out.count * sizeof(int32_t));
    vision_index.read(), grad.buffer.read();
    memset(uses.data(), 0, 2 * out.count * sizeof(int32_t));
    lynx::embeddings::sum_rows(grad.rows(), static_cast<const int32_t*>(vision_index.data()),
                               static_cast<int32_t*>(uses.data()), out.rows(), width, run);
    out.buffer.write();
}

// Each frame comes as its strides, height, width and whether it is mirrored, the place of its first pixel in its
// memory, the size of that memory, what resizing_of takes, and the memory itself: exactly what the box cuts out.
void pack_frames(const Numbers& numbers, lynx::OnHost run) {
    const int64_t element_size = numbers["element_size"];
    const Buffer sizes(4 * sizeof(int64_t));
    const int64_t* grid = static_cast<const int64_t*>(sizes.read().data());
    const Buffer levels(3 * 256 * element_size);
    levels.read();
    std::vector<std::unique_ptr<Buffer>> memory;
    lynx::frames::Call call = {{}, {}, {grid[0], grid[1], grid[2], grid[3]}, element_size, levels.data(), nullptr};
    for (int64_t i = 0; i < numbers["frames"]; i++) {
        const Buffer head(13 * sizeof(int64_t));
        const int64_t* said = static_cast<const int64_t*>(head.read().data());
        memory.push_back(std::make_unique<Buffer>(said[7]));
        const uint8_t* data = static_cast<const uint8_t*>(memory.back()->read().data()) + said[6];
        call.frames.push_back({data, said[0], said[1], said[2], said[3], said[4], said[5] != 0});
        call.resizings.push_back(lynx::frames::resizing_of(call.frames.back(), said + 8, call.grid,
                                                           static_cast<lynx::frames::Resample>(numbers["resample"])));
    }
    const Buffer out(numbers["frames"] * 3 * grid[0] * grid[1] * element_size, numbers["out_offset"] * element_size);
    call.out = out.data();
    std::vector<int32_t> filters;
    lynx::frames::pack_frames(call, run, [&](int64_t count) {
        filters.assign(count, -1);
        return filters.data();
    });
    out.write();
}

}  // namespace

int main(int count, char** words) {
    if (count < 2) fail("name a kernel");
    const std::string kernel = words[1];
    const Numbers numbers(count - 2, words + 2);
    const lynx::OnHost run(static_cast<unsigned>(numbers["seed"]));
    if (kernel == "pack_rows")
        pack_rows(numbers, run);
    else if (kernel == "sum_rows")
        sum_rows(numbers, run);
    else if (kernel == "pack_frames")
        pack_frames(numbers, run);
    else
        fail("there is no such kernel");
    return 0;
}
