# make                  builds what this machine can: train_mamba2, and train_mamba2cu if nvcc is here
# make test             the tests: no GPU, no network, no Python, under two minutes
# make bench            speed: matrix products, SSD, a training step, beside the machine's peak
# make test-reference   against PyTorch and Hugging Face (Python; installs them under build/)
# make test-compilers   gcc, clang, C++20, no OpenMP, plain x86-64, float64, emulated bf16
# make test-sanitize    AddressSanitizer and UndefinedBehaviorSanitizer
# make test-emulate     every CUDA kernel on the CPU
# make mirror           the ops that one program has and the other lacks: nothing
# make train_mamba2_double  the CPU program in float64;  train_mamba2emu: the GPU's, on the CPU
# make test_mamba2cu    the tests of the CUDA program, for a GPU
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
# Where there are vectors of 512 bits they are used in full (x86; other compilers refuse the flag).
WIDE     := -mprefer-vector-width=512
FLOAT    := -ffp-contract=fast -fno-math-errno -march=$(MARCH) $(if $(NO_OMP),-fopenmp-simd,-fopenmp) \
            $(shell $(CC) $(WIDE) -E -x c /dev/null >/dev/null 2>&1 && echo $(WIDE))
C11       = $(CC) -std=gnu11 $(OPT) $(FLOAT) -Wall -Wextra -Wno-pass-failed $(CFLAGS)
LIBS     := -lz -lm -lpthread
SOURCES  := train_mamba2.c $(wildcard dev/lib/*.h)

all: train_mamba2 $(if $(NVCC),train_mamba2cu)

train_mamba2: $(SOURCES)
	$(C11) train_mamba2.c -o $@ $(LIBS)
train_mamba2_double: $(SOURCES)
	$(C11) -DREAL=double train_mamba2.c -o $@ $(LIBS)

# ---- tests -----------------------------------------------------------------------------------------
build/test_float: test_mamba2.c $(wildcard dev/test/*.h) $(SOURCES)
	@mkdir -p build
	$(C11) test_mamba2.c -o $@ $(LIBS)
build/test_double: test_mamba2.c $(wildcard dev/test/*.h) $(SOURCES)
	@mkdir -p build
	$(C11) -DREAL=double test_mamba2.c -o $@ $(LIBS)

test: train_mamba2 train_mamba2_double build/test_float build/test_double
	@OMP_WAIT_POLICY=passive dev/test/run.sh build/test_double build/test_float \
	    "dev/test/cli.sh ./train_mamba2 ./train_mamba2_double"

test-compilers: $(SOURCES)
	dev/test/compilers.sh
test-sanitize: $(SOURCES) test_mamba2.c
	dev/test/sanitize.sh

# PyTorch and transformers are installed under build/, in the versions of requirements.txt.
build/venv: dev/reference/requirements.txt
	python3 -m venv $@
	$@/bin/pip install --quiet -r $<
	touch $@
test-reference: train_mamba2 train_mamba2_double build/venv
	build/venv/bin/python dev/reference/test_reference.py ./train_mamba2 ./train_mamba2_double

build/bench: dev/bench/bench.c $(SOURCES)
	@mkdir -p build
	$(C11) -Wno-unused-function -I. dev/bench/bench.c -o $@ $(LIBS)
bench: build/bench
	build/bench

# ---- CUDA ------------------------------------------------------------------------------------------
# The architecture is that of the first GPU here; without one it is Hopper's.
GPU_ARCH := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1)
ARCH     ?= $(or $(subst .,,$(GPU_ARCH)),90)
NVFLAGS   = -std=c++20 -O3 -gencode arch=compute_$(ARCH),code=sm_$(ARCH) \
            -Xcompiler "-O3 $(FLOAT)" -DBUILT_FOR=$(ARCH)

CUDA_H   := train_mamba2.cu $(wildcard dev/cuda/* dev/test/*.h) $(SOURCES)

train_mamba2cu: train_mamba2.cu $(CUDA_H)
	$(NVCC) $(NVFLAGS) $< -o $@ -lcublasLt -lcublas $(LIBS)
test_mamba2cu: test_mamba2.c $(CUDA_H)
	$(NVCC) $(NVFLAGS) -x cu $< -o $@ -lcublasLt -lcublas $(LIBS)

# ---- CUDA on a CPU: a CUDA source, through dev/emulate, becomes a program of the host -------------
# EMU: optimisation and debugging;  SAN: sanitizers (OpenMP not under thread, which cannot see it)
EMU      ?= -O1 -g1
SAN      ?=
EMULATE  := dev/emulate
EMU_TESTS := build/emu
EMU_H    := $(wildcard $(EMULATE)/*.h $(EMULATE)/include/*.h dev/cuda/ptx.cuh) $(EMULATE)/launch.pl
EMUCXX    = $(CXX) -std=c++20 -x c++ -iquote . -I $(EMULATE) -I $(EMULATE)/include \
            -include $(EMULATE)/runtime.h -Wall -Wextra -Wno-unknown-pragmas \
            -Wno-unused-function $(EMU) $(SAN) -march=$(MARCH) -ffp-contract=fast \
            $(if $(findstring thread,$(SAN)),,-fopenmp)
define emulated
@mkdir -p $(@D)
perl $(EMULATE)/launch.pl $< | $(EMUCXX) - -o $@ $(LIBS)
endef
builds    = $(addprefix $(EMU_TESTS)/,$1 $1-asan $1-tsan)

$(EMU_TESTS)/%-asan: SAN = -fsanitize=address,undefined -fno-sanitize=null,object-size
$(EMU_TESTS)/%-tsan: SAN = -fsanitize=thread

train_mamba2emu: train_mamba2.cu $(CUDA_H) $(EMU_H)
	$(emulated)
$(call builds,test_mamba2): test_mamba2.c $(CUDA_H) $(EMU_H)
	$(emulated)
selftestemu $(call builds,selftest): $(EMULATE)/selftest.cu $(EMU_H)
	$(emulated)
$(call builds,faults): $(EMULATE)/faults.cu $(EMU_H)
	$(emulated)

test-emulate: train_mamba2 train_mamba2emu $(call builds,test_mamba2)
	@dev/test/run.sh "make test-emulate-thread" "make test-emulate-address" \
	    "make test-emulate-program" "make test-emulate-shim"
test-emulate-thread: $(EMU_TESTS)/test_mamba2-tsan
	@$<
test-emulate-address: $(EMU_TESTS)/test_mamba2-asan
	@ASAN_OPTIONS=detect_leaks=0 $<
test-emulate-program: train_mamba2 train_mamba2emu $(EMU_TESTS)/test_mamba2
	@dev/test/emulate.sh

# the shim's own tests
EMU_QUIET  := 2> $(EMU_TESTS)/said || { cat $(EMU_TESTS)/said; exit 1; }
test-emulate-shim: $(call builds,selftest) $(call builds,faults)
	@for order in forward reverse 1 2 3; do \
	    echo "selftest, $$order:"; EMU_ORDER=$$order $(EMU_TESTS)/selftest $(EMU_QUIET); \
	done
	@for sm in 80 86; do \
	    echo "selftest, sm_$$sm:"; EMU_SM=$$sm $(EMU_TESTS)/selftest $(EMU_QUIET); \
	done
	@echo "selftest, late streams:"; EMU_STREAMS=late $(EMU_TESTS)/selftest $(EMU_QUIET)
	@echo "selftest, address and undefined:"; ASAN_OPTIONS=detect_leaks=0 $(EMU_TESTS)/selftest-asan $(EMU_QUIET)
	@echo "selftest, thread:"; $(EMU_TESTS)/selftest-tsan $(EMU_QUIET)
	@echo "planted faults:"; timeout 120 sh $(EMULATE)/faults.sh $(call builds,faults)

mirror:
	@dev/test/mirror.sh

# ---- the rest --------------------------------------------------------------------------------------
help:
	@sed -n '/^# make/s/^# //p; /^# CC/s/^# //p' Makefile

clean:
	rm -rf train_mamba2 train_mamba2_double train_mamba2cu train_mamba2emu test_mamba2cu selftestemu build

# what the suites run; make -j2 programs builds two at a time
programs: $(foreach name,test_mamba2 selftest faults,$(call builds,$(name))) train_mamba2emu \
          build/test_double build/test_float train_mamba2_double train_mamba2

.PHONY: all programs test test-compilers test-sanitize test-reference bench help clean mirror test-emulate test-emulate-thread \
        test-emulate-address test-emulate-program test-emulate-shim
