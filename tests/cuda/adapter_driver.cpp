// The CUDA kernels of the adapter on the CPU: `adapter_driver <numbers>`, or `adapter_driver shape <numbers>` for how
// they would be launched.
#include "adapter/cuda/launches.h"
#include "driver.h"
#include "on_host.h"

namespace {

// A tensor as `<name>_dtype` (-1 if it is absent), `<name>_offset` (bytes behind a multiple of 16) and, if it has rows,
// `<name>_stride` describe it.
struct Argument {
    Argument(const Numbers& numbers, const std::string& name, int64_t rows, int64_t columns, bool has_stride = false)
        : dtype(numbers[name + "_dtype"]),
          stride(has_stride ? numbers[name + "_stride"] : columns),
          buffer(dtype < 0 || rows == 0 ? 0 : ((rows - 1) * stride + columns) * kSizes[dtype],
                 numbers[name + "_offset"]) {
        if (dtype >= 0) buffer.read();
    }

    lynx::Dtype type() const { return static_cast<lynx::Dtype>(dtype); }

    lynx::Values values(int64_t distance = 0) const {
        if (dtype < 0) return {nullptr, lynx::Dtype::kFloat, false};
        return lynx::values_of(buffer.data(), type(), distance);
    }

    lynx::adapter::Matrix matrix(int64_t rows, int64_t columns) const {
        return {buffer.data(), type(), rows, columns, stride};
    }

    int64_t dtype, stride;
    Buffer buffer;
};

void run(const Numbers& numbers) {
    const int64_t tokens = numbers["tokens"], width = numbers["width"], bottleneck = numbers["bottleneck"];
    const Buffer eps(sizeof(float));
    eps.read();
    const Argument x(numbers, "x", tokens, width, true), norm_weight(numbers, "norm_weight", 1, width);
    const Argument norm_bias(numbers, "norm_bias", 1, width), down(numbers, "down", bottleneck, width, true);
    const Argument down_bias(numbers, "down_bias", 1, bottleneck), up(numbers, "up", width, bottleneck, true);
    const Argument up_bias(numbers, "up_bias", 1, width), scale(numbers, "scale", 1, 1);
    const int64_t statistics = norm_weight.dtype < 0 ? 0 : tokens;
    const int64_t bottleneck_bytes = tokens * bottleneck * kSizes[down.dtype];
    const Buffer out(tokens * width * kSizes[x.dtype]);
    const Buffer mean(statistics * sizeof(float)), rstd(statistics * sizeof(float));
    const Buffer preactivation(bottleneck_bytes), activated(bottleneck_bytes);
    lynx::adapter::forward({tokens, width, bottleneck, *static_cast<float*>(eps.data()),
                      static_cast<lynx::adapter::Activation>(numbers["activation"]), x.values(x.stride), x.stride,
                      norm_weight.values(), norm_bias.values(), down.matrix(bottleneck, width), down_bias.values(),
                      up.matrix(width, bottleneck), up_bias.values(), scale.values(), static_cast<float*>(mean.data()),
                      static_cast<float*>(rstd.data()), preactivation.data(), activated.data(), out.data(),
                      static_cast<int>(numbers["multiprocessors"])},
                     lynx::OnHost(static_cast<unsigned>(numbers["seed"])));
    out.write(), mean.write(), rstd.write(), preactivation.write();
}

// Prints the numbers of each launch: its blocks, its Product and the sizes of its tiles.
struct Show {
    template <class Kernel>
    void operator()(Kernel, const typename Kernel::Args& args, int blocks) {
        const lynx::adapter::Product& product = args.product;
        printf("%d %d %d %d %d %d %d %d\n", blocks, product.grid_n, product.grid_m, product.n_tiles,
               product.tile_n, product.k_tiles, Kernel::Matmul::kBlockM, Kernel::Matmul::kBlockK);
    }
};

void show(const Numbers& numbers) {
    lynx::adapter::Call call = {};
    call.tokens = numbers["tokens"], call.width = numbers["width"], call.bottleneck = numbers["bottleneck"];
    call.multiprocessors = static_cast<int>(numbers["multiprocessors"]);
    const auto dtype = static_cast<lynx::Dtype>(numbers["down_dtype"]);
    call.down = {nullptr, dtype, call.bottleneck, call.width, call.width};
    call.up = {nullptr, dtype, call.width, call.bottleneck, call.bottleneck};
    lynx::adapter::forward(call, Show());
}

}  // namespace

int main(int count, char** words) { return run_or_show(count, words, run, show); }
