// The CUDA kernels on the CPU, for tests in Python: `driver <kernel> <seed> <numbers>`, tensors as they come on the
// standard input, the result on the standard output. Every tensor lies by itself, so that the sanitizers see every byte
// beside it. Exits with 1 and a message if the call makes no sense.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

#include "embeddings/cuda_launches.h"
#include "frames/cuda_launches.h"
#include "on_host.h"

namespace {

[[noreturn]] void fail(const char* message) {
    fprintf(stderr, "driver: %s\n", message);
    exit(1);
}

constexpr size_t kSizes[] = {4, 2, 2};  // bytes of an element, by lynx::Dtype

// `bytes` of memory, after `offset` more: rows that start at no multiple of 16 bytes.
class Buffer {
   public:
    explicit Buffer(size_t bytes, size_t offset = 0) : bytes_(bytes), offset_(offset), memory_(malloc(bytes + offset)) {
        memset(memory_, 0xff, bytes + offset);
    }
    Buffer(const Buffer&) = delete;
    ~Buffer() { free(memory_); }

    void* data() const { return static_cast<char*>(memory_) + offset_; }

    const Buffer& read() const {
        if (fread(data(), 1, bytes_, stdin) != bytes_) fail("the input ends too early");
        return *this;
    }

    void write() const {
        if (fwrite(data(), 1, bytes_, stdout) != bytes_) fail("the output cannot be written");
    }

   private:
    size_t bytes_, offset_;
    void* memory_;
};

// The numbers of the command line, by name: "width=5".
class Numbers {
   public:
    Numbers(int count, char** words) {
        for (int i = 0; i < count; i++) {
            const std::string word = words[i];
            const size_t equals = word.find('=');
            values_[word.substr(0, equals)] = atoll(word.substr(equals + 1).c_str());
        }
    }

    int64_t operator[](const std::string& name) const {
        const auto found = values_.find(name);
        if (found == values_.end()) fail(("no number " + name).c_str());
        return found->second;
    }

   private:
    std::map<std::string, int64_t> values_;
};

// Rows of a tensor, as `<name>_rows`, `_stride`, `_dtype` and `_offset` (in elements) describe them.
struct Matrix {
    Matrix(const Numbers& numbers, const std::string& name, int64_t width)
        : dtype(static_cast<lynx::Dtype>(numbers[name + "_dtype"])),
          count(numbers[name + "_rows"]),
          stride(numbers[name + "_stride"]),
          size(kSizes[static_cast<int>(dtype)]),
          buffer(count == 0 || width == 0 ? 0 : ((count - 1) * stride + width) * size, numbers[name + "_offset"] * size) {}

    lynx::Rows rows() const { return {buffer.data(), dtype, count, stride}; }

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
    lynx::pack_rows(static_cast<const int64_t*>(token_ids.data()), static_cast<const int32_t*>(vision_index.data()),
                    embedding.rows(), vision.rows(), out.rows(), width, run);
    out.buffer.write();
}

void sum_rows(const Numbers& numbers, lynx::OnHost run) {
    const int64_t width = numbers["width"];
    const Matrix grad(numbers, "grad", width), out(numbers, "out", width);
    const Buffer vision_index(grad.count * sizeof(int32_t)), uses(2 * out.count * sizeof(int32_t));
    vision_index.read(), grad.buffer.read();
    memset(uses.data(), 0, 2 * out.count * sizeof(int32_t));
    lynx::sum_rows(grad.rows(), static_cast<const int32_t*>(vision_index.data()), static_cast<int32_t*>(uses.data()),
                   out.rows(), width, run);
    out.buffer.write();
}

// Each frame comes as its strides, height, width and whether it is mirrored, where its first pixel stands in its memory,
// how much that is, and that memory: what the box cuts out, to the byte.
void pack_frames(const Numbers& numbers, lynx::OnHost run) {
    const int64_t size = numbers["size"], element_size = numbers["element_size"];
    const Buffer levels(3 * 256 * element_size);
    levels.read();
    std::vector<std::unique_ptr<Buffer>> memory;
    lynx::frames::Call call = {
        {}, size, numbers["patch_size"], numbers["is_exact"] != 0, numbers["rounds_down"] != 0, element_size,
        levels.data(), nullptr};
    for (int64_t i = 0; i < numbers["frames"]; i++) {
        const Buffer head(8 * sizeof(int64_t));
        const int64_t* said = static_cast<const int64_t*>(head.read().data());
        memory.push_back(std::make_unique<Buffer>(said[7]));
        const uint8_t* data = static_cast<const uint8_t*>(memory.back()->read().data()) + said[6];
        call.frames.push_back({data, said[0], said[1], said[2], said[3], said[4], said[5] != 0});
    }
    const Buffer out(numbers["frames"] * 3 * size * size * element_size, numbers["out_offset"] * element_size);
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
