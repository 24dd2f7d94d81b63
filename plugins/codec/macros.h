// Compiler differences of the codec headers: host and device functions, and one namespace per
// instruction set.
#pragma once

#ifdef __CUDACC__
#define HQMQ_HD __host__ __device__ __forceinline__
#else
#define HQMQ_HD inline __attribute__((always_inline))
#endif

// Kernels are compiled for several instruction sets and chosen at run time. Each set gets a
// namespace of its own: with one name for all, the linker could keep the AVX2 copy of an inline
// function for a machine without AVX2.
// HQMQ_FORCE_BASELINE: the plain copy of a kernel, whatever the compiler's flags.
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && !defined(HQMQ_FORCE_BASELINE)
#define HQMQ_X86_V3 1
#define HQMQ_ISA x86_v3
#define HQMQ_ISA_NAME(name) name##X86V3
#else
#define HQMQ_ISA baseline
#define HQMQ_ISA_NAME(name) name##Baseline
#endif
