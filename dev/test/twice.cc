// The C file as C++20, in two namespaces, as train_mamba2.cu includes it.
#include "dev/lib/system.h"
#define NO_MAIN
namespace cpu {
#include "train_mamba2.c"
}
#undef REAL
#define REAL double
namespace cpu64 {
#include "train_mamba2.c"
}

int main(int argc, char **argv) {
    if (argc > 1 && argv[1][0] == '6') return cpu64::run_main(argc, argv, &cpu64::cpu_backend);
    return cpu::run_main(argc, argv, &cpu::cpu_backend);
}
