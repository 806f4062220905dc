// Kernels with a planted fault each, which a run on the CPU must show: `faults <fault>`.
#include <cstdio>
#include <string>

#include "on_host.h"

namespace {

// Sums 0 to 31: each thread writes its number, then one thread adds them.
template <int kFault>
struct Sum {
    static constexpr int kThreads = 32, kPhases = 2;
    struct Args {
        int* out;  // (1,)
    };
    struct Shared {
        int numbers[kThreads];
        bool is_ready;
    };
    struct Registers {
        int sum;
    };

    static int rounds(const Args&, int) { return 1; }

    template <int kPhase>
    static void phase(const Args& args, const lynx::Place& place, Shared& shared, Registers& registers) {
        const int i = place.thread;
        if constexpr (kPhase == 0) {
            if (kFault == 1 && i == kThreads - 1) return;  // one number is not written
            shared.numbers[kFault == 2 ? i + 1 : i] = i;   // behind the end, into the flag
            if (kFault == 3) add(args, shared, registers, i);  // does not wait for the other threads
        } else {
            if (kFault == 4 && shared.is_ready) return;  // no thread wrote it
            if (kFault == 5) args.out[i] = 0;            // behind the end
            if (kFault != 3) add(args, shared, registers, i);
        }
    }

    static void add(const Args& args, const Shared& shared, Registers& registers, int thread) {
        if (thread != kThreads - 1) return;
        for (int number : shared.numbers) registers.sum += number & 0xff;
        *args.out = registers.sum;
    }
};

template <int kFault>
int sum() {
    const auto out = std::make_unique<int>(-1);
    lynx::OnHost run(7);
    run(Sum<kFault>(), {out.get()}, 1);
    return *out;
}

}  // namespace

int main(int, char** words) {
    int (*const sums[])() = {sum<0>, sum<1>, sum<2>, sum<3>, sum<4>, sum<5>};
    printf("%d", sums[std::stoi(words[1])]());
}
