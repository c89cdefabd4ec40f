# make            builds what this machine can: train_mamba2, and train_mamba2cu where nvcc is
# make test       the tests: no GPU, no network, no Python, under two minutes
# make help       all targets

CC       ?= gcc
CXX      ?= g++
MARCH    ?= native
CFLAGS   ?= -O3
NVCC     ?= $(firstword $(wildcard $(or $(CUDA_HOME),/usr/local/cuda)/bin/nvcc) $(shell command -v nvcc))

# gcc and clang by default fuse a*b + c in gnu11 but not in c11: said here, so that all builds agree.
# No -ffast-math: it would make NaN invisible.
STRICT   := -Wall -Wextra -ffp-contract=fast -fno-math-errno -march=$(MARCH) $(if $(NO_OMP),,-fopenmp)
C11      := -std=gnu11 $(STRICT)
LIBS     := -lz -lm
SOURCES  := train_mamba2.c $(wildcard dev/lib/*.h)

all: train_mamba2 $(if $(NVCC),train_mamba2cu)

train_mamba2: $(SOURCES)
	$(CC) $(C11) $(CFLAGS) train_mamba2.c -o $@ $(LIBS)

train_mamba2_double: $(SOURCES)
	$(CC) $(C11) $(CFLAGS) -DREAL=double train_mamba2.c -o $@ $(LIBS)

help:
	@sed -n 's/^# \(make.*\)/\1/p' Makefile

clean:
	rm -rf train_mamba2 train_mamba2_double train_mamba2cu train_mamba2emu build

.PHONY: all help clean
