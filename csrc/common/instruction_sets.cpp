#include "instruction_sets.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

namespace lynx {
namespace {

#define LYNX_NAME(name, unused) #name,
const char* const kNames[] = {LYNX_INSTRUCTION_SETS(LYNX_NAME, )};
#undef LYNX_NAME
constexpr int kCount = sizeof kNames / sizeof *kNames;

// Whether the CPU has what the flags for this name in setup.py let the compiler use.
bool is_available(const std::string& name) {
    if (name == "plain") return true;
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (name == "avx2") return avx2;
    if (name == "avx512") return avx512;
    if (name == "avx512bf16")
        return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
#endif
    return false;
}

int best() {
    for (int i = 0; i < kCount; i++)
        if (is_available(kNames[i])) return i;
    return kCount - 1;
}

std::atomic<int> current{best()};

}  // namespace

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names(kNames, kNames + kCount);
    names.erase(std::remove_if(names.begin(), names.end(), [](const auto& name) { return !is_available(name); }),
                names.end());
    return names;
}

int instruction_set() { return current.load(); }

std::string instruction_set_name() { return kNames[current.load()]; }

void force_instruction_set(const std::string& name) {
    if (name.empty()) {
        current = best();
        return;
    }
    for (int i = 0; i < kCount; i++)
        if (name == kNames[i] && is_available(name)) {
            current = i;
            return;
        }
    std::string available;
    for (const std::string& each : instruction_sets()) available += " " + each;
    throw std::invalid_argument("instruction set '" + name + "' is not available here; there are:" + available);
}

}  // namespace lynx
