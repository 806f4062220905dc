// What lets one source be compiled both for a CPU and, by nvcc, for a GPU.
#pragma once

#if defined(__CUDACC__)
#define LYNX_PORTABLE __host__ __device__ __forceinline__
#define LYNX_PRAGMA(text) _Pragma(#text)
#define LYNX_UNROLL LYNX_PRAGMA(unroll)
#define LYNX_UNROLL_BY(times) LYNX_PRAGMA(unroll times)
#else
#define LYNX_PORTABLE inline
#define LYNX_UNROLL
#define LYNX_UNROLL_BY(times)
#endif
