// Tensor-core products of one warp: D (16x8) += A (16xK) B (Kx8).  PTX ISA, "Warp Level Matrix Multiply-Accumulate".
//
// Lane = 4 g + t.  Every element type is brought to one fragment layout, counted in words (a word is two
// 16-bit elements, one float or one double; a step is 8 words deep):
//   A  w[0] = (row g, word t)  w[1] = (row g + 8, word t)  w[2] = (row g, word t + 4)  w[3] = (row g + 8, word t + 4)
//   B  b[0] = (word t, column g)  b[1] = (word t + 4, column g)
//   D  d[0], d[1] = (row g, columns 2t, 2t + 1)  d[2], d[3] = the same of row g + 8
#pragma once

__device__ __forceinline__ void mma_m16n8(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, float16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_m16n8(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// TensorFloat-32: the low 13 bits of each operand are ignored.
__device__ __forceinline__ void mma_m16n8(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, float) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// By shallow products, whose registers are soon free for the next loads.
__device__ __forceinline__ void mma_m16n8(double (&d)[4], const double (&a)[4], double b0, double b1, double) {
#if __CUDA_ARCH__ == 900
#pragma unroll
  for (int i = 0; i < 2; ++i)
    asm("mma.sync.aligned.m16n8k4.row.col.f64.f64.f64.f64 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+d"(d[0]), "+d"(d[1]), "+d"(d[2]), "+d"(d[3])
        : "d"(a[2 * i]), "d"(a[2 * i + 1]), "d"(i == 0 ? b0 : b1));
#else  // m8n8k4 is the only shape
#pragma unroll
  for (int i = 0; i < 4; ++i)
    asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};"
        : "+d"(d[2 * (i % 2)]), "+d"(d[2 * (i % 2) + 1])
        : "d"(a[i]), "d"(i < 2 ? b0 : b1));
#endif
}

// By one product, two steps deep where there is one: the fastest, while nothing waits for its registers.
__device__ __forceinline__ void mma_m16n8(double (&d)[4], const double (&a)[4], const double (&next)[4],
                                          const double (&b)[4]) {
#if __CUDA_ARCH__ == 900
  asm("mma.sync.aligned.m16n8k16.row.col.f64.f64.f64.f64 {%0,%1,%2,%3}, {%4,%5,%6,%7,%8,%9,%10,%11}, "
      "{%12,%13,%14,%15}, {%0,%1,%2,%3};"
      : "+d"(d[0]), "+d"(d[1]), "+d"(d[2]), "+d"(d[3])
      : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(next[0]), "d"(next[1]), "d"(next[2]), "d"(next[3]), "d"(b[0]),
        "d"(b[1]), "d"(b[2]), "d"(b[3]));
#else
  mma_m16n8(d, a, b[0], b[1], double{});
  mma_m16n8(d, next, b[2], b[3], double{});
#endif
}
