// The C file as C++20, in two namespaces, as train_mamba2.cu includes it.
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <ftw.h>
#include <glob.h>
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>
#include <zlib.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#define NO_INCLUDES
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
