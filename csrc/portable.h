// What one source needs to be compiled for the host and by nvcc for a GPU.
#pragma once

#if defined(__CUDACC__)
#define LYNX_PORTABLE __host__ __device__ __forceinline__
#define LYNX_UNROLL _Pragma("unroll")
#else
#define LYNX_PORTABLE inline
#define LYNX_UNROLL
#endif
