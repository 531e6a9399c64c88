// The PTX instructions of the kernels, each a function of its name with "_" for "." and "::".  Operands come in the
// order of the text, without brackets; {...} is a list of pointers to them.
#pragma once

namespace ptx {
using namespace emulator;

template <class T, int N>
struct List {
  T* at[N];
  T& operator[](int i) const { return *at[i]; }
  // Whether the operands lie in memory one after another: what is to be changed later has to.
  T* contiguous() const {
    if (at[N - 1] - at[0] != N - 1) fatal("the registers of an operand are not one array");
    return at[0];
  }
};
template <class T, class... U>
inline List<T, 1 + sizeof...(U)> registers(T& first, U&... rest) {
  return {{&first, &rest...}};
}
template <class T, class... U>
inline List<const T, 1 + sizeof...(U)> list(const T& first, const U&... rest) {
  return {{&first, &rest...}};
}

// --- predicates, moves

inline void setp_ne_b32(bool& p, int a, int b) { p = a != b; }
inline void setp_ne_s32(bool& p, int a, int b) { p = a != b; }
inline void setp_eq_s32(bool& p, int a, int b) { p = a == b; }
inline void setp_eq_b32(bool& p, int a, int b) { p = a == b; }
inline void setp_eq_f32(bool& p, float a, float b) { p = a == b; }
inline void selp_s32(int& d, int a, int b, bool p) { d = p ? a : b; }
inline void selp_b32(unsigned& d, unsigned a, unsigned b, bool p) { d = p ? a : b; }
inline void mov_b64(unsigned long long& d, const List<const unsigned, 2>& words) {
  d = static_cast<uint64_t>(words[1]) << 32 | words[0];
}
inline void exit() { exit_thread(); }

// --- arithmetic

inline float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }  // ".ftz"
inline void ex2_approx_ftz_f32(float& d, float x) { d = flush(exp2f(flush(x))); }
inline void lg2_approx_ftz_f32(float& d, float x) { d = log2f(flush(x)); }
inline void rcp_approx_ftz_f32(float& d, float x) { d = flush(1 / flush(x)); }

inline float float_of_half(unsigned x) { return bits<_Float16>(static_cast<uint16_t>(x)); }
inline unsigned half(float x) { return x != x ? 0x7fff : bits<uint16_t>(static_cast<_Float16>(x)); }
inline float float_of_bfloat16(unsigned x) { return bits<float>(x << 16); }
inline unsigned bfloat16_bits(float x) {  // to nearest, ties to even
  const unsigned word = bits<unsigned>(x);
  return x != x ? 0x7fff : (word + 0x7fff + (word >> 16 & 1)) >> 16;
}
inline void cvt_rn_f16x2_f32(unsigned& d, float high, float low) { d = half(high) << 16 | half(low); }
inline void cvt_rn_bf16x2_f32(unsigned& d, float high, float low) {
  d = bfloat16_bits(high) << 16 | bfloat16_bits(low);
}
inline void fma_rn_f16x2(unsigned& d, unsigned a, unsigned b, unsigned c) {
  const auto f = [](unsigned x, unsigned y, unsigned z) {
    return half(float_of_half(x & 0xffff) * float_of_half(y & 0xffff) + float_of_half(z & 0xffff));
  };
  d = f(a >> 16, b >> 16, c >> 16) << 16 | f(a, b, c);
}
inline void fma_rn_bf16x2(unsigned& d, unsigned a, unsigned b, unsigned c) {
  const auto f = [](unsigned x, unsigned y, unsigned z) {
    return bfloat16_bits(
        fmaf(float_of_bfloat16(x & 0xffff), float_of_bfloat16(y & 0xffff), float_of_bfloat16(z & 0xffff)));
  };
  d = f(a >> 16, b >> 16, c >> 16) << 16 | f(a, b, c);
}
inline void cvt_f32_f16(float& d, unsigned short x) { d = float_of_half(x); }

// --- shared memory

template <class T>
inline T load(unsigned address, const char* what) {
  T x;
  memcpy(&x, read_shared(address, sizeof(T), what), sizeof(T));
  return x;
}
template <class T, int N>
inline void load(const List<T, N>& d, unsigned address, const char* what) {
  const T* const from = static_cast<const T*>(read_shared(address, N * sizeof(T), what));
  for (int i = 0; i < N; ++i) memcpy(&d[i], from + i, sizeof(T));
}
template <class T, int N>
inline void store(unsigned address, const List<const T, N>& x, const char* what) {
  T content[N];
  for (int i = 0; i < N; ++i) content[i] = x[i];
  write_shared(address, content, sizeof(content), what);
}
inline void ld_shared_b16(unsigned short& d, unsigned address) { d = load<unsigned short>(address, "ld.shared"); }
inline void ld_shared_b32(unsigned& d, unsigned address) { d = load<unsigned>(address, "ld.shared"); }
inline void ld_shared_s32(int& d, unsigned address) { d = load<int>(address, "ld.shared"); }
inline void ld_shared_f32(float& d, unsigned address) { d = load<float>(address, "ld.shared"); }
inline void ld_shared_f64(double& d, unsigned address) { d = load<double>(address, "ld.shared"); }
inline void ld_shared_v2_b32(const List<unsigned, 2>& d, unsigned address) { load(d, address, "ld.shared"); }
inline void ld_shared_v2_f32(const List<float, 2>& d, unsigned address) { load(d, address, "ld.shared"); }
inline void ld_shared_v2_f64(const List<double, 2>& d, unsigned address) { load(d, address, "ld.shared"); }
inline void ld_shared_v4_b32(const List<unsigned, 4>& d, unsigned address) { load(d, address, "ld.shared"); }
inline void ld_shared_v4_s32(const List<int, 4>& d, unsigned address) { load(d, address, "ld.shared"); }
inline void ld_shared_v4_f32(const List<float, 4>& d, unsigned address) { load(d, address, "ld.shared"); }
inline void st_shared_b16(unsigned address, unsigned short x) { write_shared(address, &x, 2, "st.shared"); }
inline void st_shared_b32(unsigned address, unsigned x) { write_shared(address, &x, 4, "st.shared"); }
inline void st_shared_s32(unsigned address, int x) { write_shared(address, &x, 4, "st.shared"); }
inline void st_shared_f32(unsigned address, float x) { write_shared(address, &x, 4, "st.shared"); }
inline void st_shared_v2_f32(unsigned address, const List<const float, 2>& x) { store(address, x, "st.shared"); }
inline void st_shared_v2_f64(unsigned address, const List<const double, 2>& x) { store(address, x, "st.shared"); }
inline void st_shared_v4_f32(unsigned address, const List<const float, 4>& x) { store(address, x, "st.shared"); }
inline void st_shared_v4_s32(unsigned address, const List<const int, 4>& x) { store(address, x, "st.shared"); }
inline void st_shared_v4_b32(unsigned address, const List<const unsigned, 4>& x) { store(address, x, "st.shared"); }

// Four 8x8 matrices; row r of matrix i is at lane 8 i + r's address.  In a fragment lane 4 g + t has row g, columns 2 t
// and 2 t + 1; transposed, column g.
struct Matrices {
  unsigned address;
  unsigned words[4];
};
inline void read_matrices(const char* name, const List<unsigned, 4>& d, unsigned address, bool transposed) {
  Matrices mine{address, {}};
  collective(name, mine, [=](Matrices* const(&lanes)[LANES]) {
    for (int i = 0; i < 4; ++i) {
      uint16_t x[8][8];
      for (int r = 0; r < 8; ++r) memcpy(x[r], read_shared(lanes[8 * i + r]->address, 16, name), 16);
      for (int l = 0; l < LANES; ++l) {
        const int g = l / 4, t = l % 4 * 2;
        const unsigned low = transposed ? x[t][g] : x[g][t], high = transposed ? x[t + 1][g] : x[g][t + 1];
        lanes[l]->words[i] = high << 16 | low;
      }
    }
  });
  for (int i = 0; i < 4; ++i) d[i] = mine.words[i];
}
inline void write_matrices(const char* name, unsigned address, const List<const unsigned, 4>& w, bool transposed) {
  Matrices mine{address, {w[0], w[1], w[2], w[3]}};
  collective(name, mine, [=](Matrices* const(&lanes)[LANES]) {
    for (int l = 0; l < LANES; ++l) {
      const int i = l / 8, r = l % 8;
      uint16_t row[8];
      for (int c = 0; c < 8; ++c) {
        const int g = transposed ? c : r, t = transposed ? r : c;
        row[c] = lanes[4 * g + t / 2]->words[i] >> 16 * (t % 2);
      }
      write_shared(lanes[l]->address, row, 16, name, l);
    }
  });
}
inline void ldmatrix_sync_aligned_m8n8_x4_shared_b16(const List<unsigned, 4>& d, unsigned address) {
  read_matrices("ldmatrix", d, address, false);
}
inline void ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16(const List<unsigned, 4>& d, unsigned address) {
  read_matrices("ldmatrix.trans", d, address, true);
}
inline void stmatrix_sync_aligned_m8n8_x4_shared_b16(unsigned address, const List<const unsigned, 4>& w) {
  write_matrices("stmatrix", address, w, false);
}
inline void stmatrix_sync_aligned_m8n8_x4_trans_shared_b16(unsigned address, const List<const unsigned, 4>& w) {
  write_matrices("stmatrix.trans", address, w, true);
}

inline void cp_async_cg_shared_global(unsigned d, const void* source, int bytes, bool ignored) {
  copy_async(d, source, bytes, ignored ? 0 : bytes);
}
inline void cp_async_ca_shared_global(unsigned d, const void* source, int bytes, bool ignored) {
  copy_async(d, source, bytes, ignored ? 0 : bytes);
}
inline void cp_async_cg_shared_global(unsigned d, const void* source, int bytes, int valid) {
  copy_async(d, source, bytes, valid);
}
inline void cp_async_ca_shared_global(unsigned d, const void* source, int bytes, int valid) {
  copy_async(d, source, bytes, valid);
}
inline void cp_async_commit_group() { copy_async_commit(); }
inline void cp_async_wait_group(int pending) { copy_async_wait(pending); }

// --- global memory

// What is read here another thread may be about to write: who asks again and again has to let it.
template <class T>
inline T look(const T* pointer, const char* what) {
  check_global(pointer, sizeof(T), sizeof(T), what);
  spin(what);
  return *static_cast<const volatile T*>(pointer);
}
template <class T>
inline T add(T* pointer, T x, const char* what) {
  check_global(pointer, sizeof(T), sizeof(T), what);
  const T before = *pointer;
  *pointer += x;
  return before;
}
inline void ld_acquire_gpu_global_s32(int& d, const int* pointer) { d = look(pointer, "ld.acquire"); }
inline void ld_relaxed_gpu_global_s32(int& d, const int* pointer) { d = look(pointer, "ld.relaxed"); }
inline void ld_volatile_global_s32(int& d, const int* pointer) { d = look(pointer, "ld.volatile"); }
inline void st_release_gpu_global_s32(int* pointer, int x) { *pointer = x; }
inline void st_relaxed_gpu_global_s32(int* pointer, int x) { *pointer = x; }
inline void red_release_gpu_global_add_s32(int* pointer, int x) { add(pointer, x, "red"); }
inline void red_relaxed_gpu_global_add_s32(int* pointer, int x) { add(pointer, x, "red"); }
inline void red_global_add_s32(int* pointer, int x) { add(pointer, x, "red"); }
inline void red_global_add_f32(float* pointer, float x) { add(pointer, x, "red"); }
inline void red_global_add_f64(double* pointer, double x) { add(pointer, x, "red"); }
inline void red_global_add_v2_f32(float* pointer, const List<const float, 2>& x) {
  check_global(pointer, 8, 8, "red.v2");
  for (int i = 0; i < 2; ++i) pointer[i] += x[i];
}
inline void red_global_add_v4_f32(float* pointer, const List<const float, 4>& x) {
  check_global(pointer, 16, 16, "red.v4");
  for (int i = 0; i < 4; ++i) pointer[i] += x[i];
}
inline void atom_relaxed_gpu_global_add_s32(int& d, int* pointer, int x) { d = add(pointer, x, "atom"); }
inline void atom_acquire_gpu_global_add_s32(int& d, int* pointer, int x) { d = add(pointer, x, "atom"); }
inline void atom_acq_rel_gpu_global_add_s32(int& d, int* pointer, int x) { d = add(pointer, x, "atom"); }
inline void atom_global_add_s32(int& d, int* pointer, int x) { d = add(pointer, x, "atom"); }

template <class T, int N, class P>
inline void load_global(const List<T, N>& d, const P* pointer) {
  check_global(pointer, N * sizeof(T), N * sizeof(T), "ld.global");
  for (int i = 0; i < N; ++i) memcpy(&d[i], reinterpret_cast<const T*>(pointer) + i, sizeof(T));
}
template <class P>
inline void ld_global_cg_v4_f32(const List<float, 4>& d, const P* pointer) {
  load_global(d, pointer);
}
template <class P>
inline void ld_global_nc_v4_f32(const List<float, 4>& d, const P* pointer) {
  load_global(d, pointer);
}
template <class P>
inline void ld_global_nc_v4_b32(const List<unsigned, 4>& d, const P* pointer) {
  load_global(d, pointer);
}
inline void ld_global_cg_f32(float& d, const float* pointer) { d = *pointer; }

inline void prefetch_global_L2(const void*) {}
inline void prefetch_tensormap(const void*) {}
inline void cp_async_bulk_prefetch_L2_global(const void*, int) {}

// --- the tensor memory accelerator

inline void cp_async_bulk_tensor_4d_shared_cluster_global_mbarrier_complete_tx_bytes(unsigned d, const void* map,
                                                                                     const List<const int, 4>& at,
                                                                                     unsigned barrier) {
  load_box(d, map, barrier, at[0], at[1], at[2], at[3]);
}
inline void cp_async_bulk_shared_cluster_global_mbarrier_complete_tx_bytes(unsigned d, const void* source, int bytes,
                                                                           unsigned barrier) {
  load_run(d, source, bytes, barrier);
}
inline void cp_async_bulk_global_shared_cta_bulk_group(void* d, unsigned source, int bytes) {
  store_run(d, source, bytes, false);
}
inline void cp_reduce_async_bulk_global_shared_cta_bulk_group_add_f32(void* d, unsigned source, int bytes) {
  store_run(d, source, bytes, true);
}
inline void cp_async_bulk_commit_group() { store_commit(); }
inline void cp_async_bulk_wait_group(int pending) { store_wait(pending, false); }
inline void cp_async_bulk_wait_group_read(int pending) { store_wait(pending, true); }

// --- barriers, fences, register budgets

inline void mbarrier_init_shared_cta_b64(unsigned address, int count) { mbarrier_init(address, count); }
inline void mbarrier_arrive_shared_cta_b64(unsigned address, int count = 1) { mbarrier_arrive(address, count, 0); }
inline void mbarrier_arrive_expect_tx_shared_cta_b64(unsigned address, int bytes) {
  mbarrier_arrive(address, 1, bytes);
}
inline void mbarrier_expect_tx_relaxed_cta_shared_cta_b64(unsigned address, int bytes) {
  mbarrier_arrive(address, 0, bytes);
}
inline void mbarrier_try_wait_parity_shared_cta_b64(bool& done, unsigned address, unsigned parity, unsigned = 0) {
  mbarrier_wait(address, parity);
  done = true;
}
inline void bar_sync(int id, int threads) { barrier(id, threads, true, false, "bar.sync"); }
inline void bar_arrive(int id, int threads) { barrier(id, threads, false, false, "bar.arrive"); }
inline void bar_red_or_pred(bool& any, int id, int threads, bool predicate) {
  any = barrier(id, threads, true, predicate, "bar.red.or");
}
inline void fence_mbarrier_init_release_cluster() {}
inline void fence_proxy_async_shared_cta() { fence_proxy(); }
inline void fence_proxy_async() { fence_proxy(); }
inline void fence_proxy_async_global() {}
inline void fence_acq_rel_gpu() {}
inline void setmaxnreg_dec_sync_aligned_u32(int) {}
inline void setmaxnreg_inc_sync_aligned_u32(int) {}
inline void griddepcontrol_wait() {}
inline void griddepcontrol_launch_dependents() {}

// --- tensor cores, one warp: D (16x8) += A (16xK) B (Kx8)

// In words (two 16-bit elements, a float or a double; K is DEPTH of them): lane 4 g + t has
//   A  (row g, word t) (row g + 8, word t) (row g, word t + 4) (row g + 8, word t + 4);  B  (word t, column g) (word t
//   + 4, ..) D  (row g, columns 2 t, 2 t + 1) (row g + 8, ..)
template <int DEPTH, class Accum, class Word>
struct Mma {
  Accum d[4];
  Word a[DEPTH / 2], b[DEPTH / 4];
};
template <int PER_WORD, int DEPTH = 8, class Accum, class Word, class Widen>
inline void multiply(const char* name, const List<Accum, 4>& d, const List<const Word, DEPTH / 2>& a,
                     const List<const Word, DEPTH / 4>& b, Widen widen) {
  Mma<DEPTH, Accum, Word> mine{{d[0], d[1], d[2], d[3]}, {}, {}};
  for (int i = 0; i < DEPTH / 2; ++i) mine.a[i] = a[i];
  for (int i = 0; i < DEPTH / 4; ++i) mine.b[i] = b[i];
  collective(name, mine, [=](Mma<DEPTH, Accum, Word>* const(&lanes)[LANES]) {
    constexpr int K = DEPTH * PER_WORD;
    Accum x[16][K], y[K][8];
    for (int l = 0; l < LANES; ++l)
      for (int e = 0; e < PER_WORD; ++e) {
        const int g = l / 4, t = l % 4;
        for (int i = 0; i < DEPTH / 2; ++i) x[g + i % 2 * 8][(t + i / 2 * 4) * PER_WORD + e] = widen(lanes[l]->a[i], e);
        for (int i = 0; i < DEPTH / 4; ++i) y[(t + i * 4) * PER_WORD + e][g] = widen(lanes[l]->b[i], e);
      }
    for (int row = 0; row < 16; ++row) {
      Accum sum[8];
      for (int c = 0; c < 8; ++c) sum[c] = lanes[row % 8 * 4 + c / 2]->d[row / 8 * 2 + c % 2];
      for (int k = 0; k < K; ++k)
        for (int c = 0; c < 8; ++c) sum[c] += x[row][k] * y[k][c];
      for (int c = 0; c < 8; ++c) lanes[row % 8 * 4 + c / 2]->d[row / 8 * 2 + c % 2] = sum[c];
    }
  });
  for (int i = 0; i < 4; ++i) d[i] = mine.d[i];
}
template <class A, class B, class C>
inline void mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32(const List<float, 4>& d, const A& a, const B& b,
                                                              const C&) {
  multiply<2>("mma", d, a, b, [](unsigned word, int i) { return float_of_half(word >> 16 * i & 0xffff); });
}
template <class A, class B, class C>
inline void mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32(const List<float, 4>& d, const A& a, const B& b,
                                                                const C&) {
  multiply<2>("mma", d, a, b, [](unsigned word, int i) { return float_of_bfloat16(word >> 16 * i & 0xffff); });
}
template <class A, class B, class C>
inline void mma_sync_aligned_m16n8k8_row_col_f32_tf32_tf32_f32(const List<float, 4>& d, const A& a, const B& b,
                                                               const C&) {
  multiply<1>("mma", d, a, b, [](unsigned word, int) { return __uint_as_float(word & 0xffffe000u); });
}
template <class A, class B, class C>
inline void mma_sync_aligned_m16n8k16_row_col_f64_f64_f64_f64(const List<double, 4>& d, const A& a, const B& b,
                                                              const C&) {
  multiply<1, 16>("mma", d, a, b, [](double word, int) { return word; });
}
template <class A, class B, class C>
inline void mma_sync_aligned_m16n8k4_row_col_f64_f64_f64_f64(const List<double, 4>& d, const A& a, const B& b,
                                                             const C&) {
  multiply<1, 4>("mma", d, a, b, [](double word, int) { return word; });
}
// m8n8k4: half of it.
struct MmaHalf {
  double d[2], a, b;
};
template <class C>
inline void mma_sync_aligned_m8n8k4_row_col_f64_f64_f64_f64(const List<double, 2>& d, const List<const double, 1>& a,
                                                            const List<const double, 1>& b, const C&) {
  MmaHalf mine{{d[0], d[1]}, a[0], b[0]};
  collective("mma", mine, [](MmaHalf* const(&lanes)[LANES]) {
    for (int row = 0; row < 8; ++row)
      for (int column = 0; column < 8; ++column)
        for (int k = 0; k < 4; ++k)
          lanes[row * 4 + column / 2]->d[column % 2] += lanes[row * 4 + k]->a * lanes[column * 4 + k]->b;
  });
  d[0] = mine.d[0], d[1] = mine.d[1];
}

// --- tensor cores, one warpgroup: D (64xN) += A (64x16) B (16xN), in the background

inline void wgmma_fence_sync_aligned() { wgmma_fence(); }
inline void wgmma_commit_group_sync_aligned() { wgmma_commit(); }
inline void wgmma_wait_group_sync_aligned(int pending) { wgmma_wait(pending); }

template <int N>
inline void issue(bool bfloat16, const List<float, N / 2>& d, const List<const unsigned, 4>& a, uint64_t b,
                  bool accumulate, int scale_a, int scale_b, int transpose_b) {
  if (scale_a != 1 || scale_b != 1) fatal("wgmma: a scale other than 1");
  wgmma_issue({d.contiguous(), a.contiguous(), 0, b, N, accumulate, false, transpose_b != 0, bfloat16});
}
template <int N>
inline void issue(bool bfloat16, const List<float, N / 2>& d, uint64_t a, uint64_t b, bool accumulate, int scale_a,
                  int scale_b, int transpose_a, int transpose_b) {
  if (scale_a != 1 || scale_b != 1) fatal("wgmma: a scale other than 1");
  wgmma_issue({d.contiguous(), nullptr, a, b, N, accumulate, transpose_a != 0, transpose_b != 0, bfloat16});
}
template <int N, class... Rest>
inline void wgmma_mma_async_sync_aligned_m64k16_f32_f16_f16(const List<float, N / 2>& d, const Rest&... rest) {
  issue<N>(false, d, rest...);
}
template <int N, class... Rest>
inline void wgmma_mma_async_sync_aligned_m64k16_f32_bf16_bf16(const List<float, N / 2>& d, const Rest&... rest) {
  issue<N>(true, d, rest...);
}

}  // namespace ptx
