# make                  builds what this machine can: train_mamba2, and train_mamba2cu if nvcc is here
# make test             the tests: no GPU, no network, no Python, under two minutes
# make bench            speed: matrix products, SSD, a training step, beside the machine's peak
# make test-reference   against PyTorch and Hugging Face (Python; installs them under build/)
# make test-compilers   gcc, clang, C++20, no OpenMP, plain x86-64, float64, emulated bf16
# make test-sanitize    AddressSanitizer and UndefinedBehaviorSanitizer
# make test-emulate     every CUDA kernel on the CPU
# make train_mamba2_double  the CPU program in float64;  train_mamba2emu: the GPU's, on the CPU
# make clean
#
# CC=clang, MARCH=x86-64-v3 (default native), NO_OMP=1 (no OpenMP), ARCH=80 (GPU architecture)

CC       ?= gcc
CXX      ?= g++
MARCH    ?= native
OPT      ?= -O3
NVCC     ?= $(firstword $(wildcard $(or $(CUDA_HOME),/usr/local/cuda)/bin/nvcc) \
                        $(shell command -v nvcc))
# No -ffast-math: it would hide NaN. Fused multiply-add is named, so that all builds have it.
FLOAT    := -ffp-contract=fast -fno-math-errno -march=$(MARCH) $(if $(NO_OMP),,-fopenmp)
C11       = $(CC) -std=gnu11 $(OPT) $(FLOAT) -Wall -Wextra $(CFLAGS)
LIBS     := -lz -lm
SOURCES  := train_mamba2.c $(wildcard dev/lib/*.h)

all: train_mamba2 $(if $(NVCC),train_mamba2cu)

train_mamba2: $(SOURCES)
	$(C11) train_mamba2.c -o $@ $(LIBS)
train_mamba2_double: $(SOURCES)
	$(C11) -DREAL=double train_mamba2.c -o $@ $(LIBS)

# ---- tests -----------------------------------------------------------------------------------------
build/test_float: test_mamba2.c $(SOURCES)
	@mkdir -p build
	$(C11) test_mamba2.c -o $@ $(LIBS)
build/test_double: test_mamba2.c $(SOURCES)
	@mkdir -p build
	$(C11) -DREAL=double test_mamba2.c -o $@ $(LIBS)

test: train_mamba2 train_mamba2_double build/test_float build/test_double
	dev/test/run.sh build/test_double build/test_float \
	    "dev/test/cli.sh ./train_mamba2 ./train_mamba2_double"

help:
	@sed -n '/^# make/s/^# //p; /^# CC/s/^# //p' Makefile

clean:
	rm -rf train_mamba2 train_mamba2_double train_mamba2cu train_mamba2emu build

.PHONY: all test help clean
