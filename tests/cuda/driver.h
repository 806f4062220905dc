// What the programs share that run CUDA kernels on the CPU for tests in Python. Numbers are words of the command line,
// tensors come as bytes on the standard input, results go to the standard output. Every tensor has memory of its own,
// so that the sanitizers see every access beside it. A call that makes no sense exits with 1 and a message.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

[[noreturn]] inline void fail(const char* message) {
    fprintf(stderr, "driver: %s\n", message);
    exit(1);
}

inline constexpr size_t kSizes[] = {4, 2, 2};  // bytes of an element, by lynx::Dtype

// `bytes` bytes behind `offset` others, so that rows need not start at multiples of 16 bytes.
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

// The numbers of the command line, by name, such as "width=5".
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

// The main program of a driver. After the word "shape", show(numbers) prints how kernels would be launched.
inline int run_or_show(int count, char** words, void (*run)(const Numbers&), void (*show)(const Numbers&)) {
    const bool shows = count > 1 && std::string(words[1]) == "shape";
    const int first = shows ? 2 : 1;
    (shows ? show : run)(Numbers(count - first, words + first));
    return 0;
}
