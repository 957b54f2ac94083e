"""C++ kernels for CPUs with AVX512-BF16, compiled on this machine when they are first wanted; optional everywhere."""
