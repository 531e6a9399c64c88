// wgmma: products of a warpgroup, in the background.  PTX ISA, "Asynchronous Warpgroup Level Matrix
// Multiply-Accumulate".
//
// From its issue until a wait that covers it, a product has the accumulators on loan: a NaN stands in their registers,
// which no one may write.  Nor may anyone write its A registers, or its matrices in shared memory until they are read:
// at the commit, at the wait or at random, according to the machine's timing.  Each warp's quarter goes its own way.
#include <algorithm>

#include "machine.h"

namespace emulator {

namespace {

constexpr unsigned ON_LOAN = 0x7fc0dead;  // a NaN

// A matrix of 16-bit elements in shared memory, 16 deep, in the 128-byte swizzle: PTX ISA, "Matrix descriptor".
struct Matrix {
  unsigned start, leading, stride;
  bool along;  // contiguous along the result, not along the depth

  Matrix(uint64_t descriptor, bool transposed)
      : start((descriptor & 0x3fff) << 4),
        leading((descriptor >> 16 & 0x3fff) << 4),
        stride((descriptor >> 32 & 0x3fff) << 4),
        along(transposed) {
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7))
      fatal("wgmma: descriptor %llx is not of the 128-byte swizzle with base offset 0",
            static_cast<unsigned long long>(descriptor));
  }

  // Its chunks of 8 elements, those of [first, first + count) along the result: f(address, along, depth), whose
  // elements follow one another in one of the two.
  template <class Function>
  void each_chunk(int first, int count, Function f) const {
    if (!along) {
      for (int i = 0; i < count; ++i)
        for (int k = 0; k < 16; k += 8) {
          const int mn = first + i;
          f(swizzle(start + mn / 8 * stride + mn % 8 * 128 + k * 2, 3), i, k);
        }
    } else {
      for (int k = 0; k < 16; ++k)
        for (int i = 0; i < count; i += 8) {
          const int mn = first + i;
          f(swizzle(start + mn / 64 * leading + k / 8 * stride + k % 8 * 128 + mn % 64 * 2, 3), i, k);
        }
    }
  }
};

int first_row(const Warp& warp) { return (&warp - warp.threads[0]->block->warps.data()) % 4 * 16; }

template <class Function>
void each_operand_chunk(const Warp& warp, const LaneProduct& p, Function f) {
  if (!p.a)
    Matrix(p.a_matrix, p.transpose_a).each_chunk(first_row(warp), 16, [&](unsigned address, int, int) { f(address); });
  Matrix(p.b_matrix, p.transpose_b).each_chunk(0, p.columns, [&](unsigned address, int, int) { f(address); });
}

bool alike(const LaneProduct& x, const LaneProduct& y) {
  return x.a_matrix == y.a_matrix && x.b_matrix == y.b_matrix && x.columns == y.columns && !x.a == !y.a &&
         x.accumulate == y.accumulate && x.transpose_a == y.transpose_a && x.transpose_b == y.transpose_b;
}

// Row and column, within a warp's 16 rows, of accumulator i of a lane.
int row_of(int lane, int i) { return lane / 4 + i / 2 % 2 * 8; }
int column_of(int lane, int i) { return i / 4 * 8 + lane % 4 * 2 + i % 2; }

Accumulators* lend(Warp& warp, const LaneProduct (&of)[LANES]) {
  for (const auto& lent : warp.accumulators)
    if (lent->registers[0] == of[0].d) {
      if (lent->columns != of[0].columns) fatal("wgmma: accumulators in flight, in two sizes");
      ++lent->products;
      return lent.get();
    }
  auto lent = std::make_unique<Accumulators>();
  lent->columns = of[0].columns, lent->products = 1;
  for (int l = 0; l < LANES; ++l) {
    lent->registers[l] = of[l].d;
    for (int i = 0; i < lent->columns / 2; ++i) {
      lent->values[row_of(l, i)][column_of(l, i)] = of[l].d[i];
      memcpy(of[l].d + i, &ON_LOAN, 4);
    }
  }
  warp.accumulators.push_back(std::move(lent));
  return warp.accumulators.back().get();
}

void give_back(Warp& warp, Accumulators* d) {
  if (--d->products > 0) return;
  bool told = false;
  for (int l = 0; l < LANES; ++l)
    for (int i = 0; i < d->columns / 2; ++i) {
      unsigned word;
      memcpy(&word, d->registers[l] + i, 4);
      if (word != ON_LOAN && !told) error("accumulators of a wgmma written before it was waited for"), told = true;
      d->registers[l][i] = d->values[row_of(l, i)][column_of(l, i)];
    }
  const auto is_d = [=](const auto& lent) { return lent.get() == d; };
  warp.accumulators.erase(std::find_if(warp.accumulators.begin(), warp.accumulators.end(), is_d));
}

void compute(Warp& warp, Product& product) {
  const LaneProduct& p = product.of[0];
  Block& block = *warp.threads[0]->block;
  const int n = p.columns;
  const auto widen = [&](unsigned word) {
    return p.bfloat16 ? ptx::float_of_bfloat16(word) : ptx::float_of_half(word);
  };
  static float a[16][16], b[16][256];  // b[depth][column]
  const auto read = [&](const Matrix& matrix, int first, int count, auto at) {
    matrix.each_chunk(first, count, [&](unsigned address, int i, int k) {
      uint16_t x[8];
      memcpy(x, block.shared + (address - SHARED_BASE), 16);
      for (int e = 0; e < 8; ++e) at(matrix.along ? i + e : i, matrix.along ? k : k + e) = widen(x[e]);
    });
  };
  if (p.a) {
    for (int l = 0; l < LANES; ++l)
      for (int i = 0; i < 8; ++i)  // word i / 2: row g or g + 8, then columns 8 further
        a[l / 4 + i / 2 % 2 * 8][l % 4 * 2 + i / 4 * 8 + i % 2] =
            widen(product.words[l][i / 2] >> 16 * (i % 2) & 0xffff);
  } else {
    read(Matrix(p.a_matrix, p.transpose_a), first_row(warp), 16, [](int i, int k) -> float& { return a[i][k]; });
  }
  read(Matrix(p.b_matrix, p.transpose_b), 0, n, [](int i, int k) -> float& { return b[k][i]; });
  for (int row = 0; row < 16; ++row) {
    float* const d = product.d->values[row];
    if (!p.accumulate) std::fill(d, d + n, 0.f);
    for (int k = 0; k < 16; k += 4)
      for (int i = 0; i < n; ++i)
        d[i] += a[row][k] * b[k][i] + a[row][k + 1] * b[k + 1][i] + a[row][k + 2] * b[k + 2][i] +
                a[row][k + 3] * b[k + 3][i];
  }
  each_operand_chunk(warp, p, [&](unsigned address) { end_read(block, address, 16); });
  product.done = true;
}

}  // namespace

void wgmma_fence() { current->registers_fenced = true; }

void wgmma_issue(const LaneProduct& product) {
  if (!current->registers_fenced) error("a wgmma without a wgmma.fence since the last commit");
  current->products.push_back(product);
}

void wgmma_commit() {
  int none = 0;
  collective("wgmma.commit_group", none, [](auto&) {
    Warp& warp = *current->warp;
    const size_t count = warp.threads[0]->products.size();
    for (Thread* thread : warp.threads)
      if (thread->products.size() != count) fatal("wgmma: the lanes of a warp issued different products");
    for (size_t i = 0; i < count; ++i) {
      auto product = std::make_unique<Product>();
      for (int l = 0; l < LANES; ++l) {
        product->of[l] = warp.threads[l]->products[i];
        if (!alike(product->of[l], product->of[0])) fatal("wgmma: the lanes of a warp issued different products");
        if (product->of[l].a) memcpy(product->words[l], product->of[l].a, 16);
      }
      product->d = lend(warp, product->of);
      product->group = warp.committed;
      each_operand_chunk(warp, product->of[0],
                         [&](unsigned address) { begin_read(*current->block, address, 16, "wgmma"); });
      warp.products.push_back(std::move(product));
    }
    for (Thread* thread : warp.threads) thread->products.clear(), thread->registers_fenced = false;
    ++warp.committed;
    if (machine.early())
      for (const auto& product : warp.products)
        if (!product->done) compute(warp, *product);
  });
}

void wgmma_wait(int pending) {
  // The tensor cores begin when all four warps are there.
  Warp& warp = *current->warp;
  const unsigned number = &warp - current->block->warps.data();
  const int wanted = static_cast<int>(warp.committed) - pending;
  for (unsigned w = number / 4 * 4; w < number / 4 * 4 + 4; ++w) {
    const unsigned& committed = current->block->warps[w].committed;
    while (static_cast<int>(committed) < wanted)
      wait_while(committed, committed, "wgmma, for the other warps of its warpgroup");
  }
  collective("wgmma.wait_group", pending, [](int* const(&lanes)[LANES]) {
    Warp& mine = *current->warp;
    while (!mine.products.empty() && mine.products.front()->group < static_cast<int>(mine.committed) - *lanes[0]) {
      Product& product = *mine.products.front();
      if (!product.done) compute(mine, product);
      bool changed = false;
      for (int l = 0; l < LANES && product.of[0].a; ++l) changed |= memcmp(product.of[l].a, product.words[l], 16) != 0;
      if (changed) error("the A registers of a wgmma written before it was waited for");
      give_back(mine, product.d);
      mine.products.pop_front();
    }
  });
}

}  // namespace emulator
