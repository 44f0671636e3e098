// A 3x3 convolution of stride 1 and padding 1 by Winograd's F(2x2, 3x3), with its bias and, where wanted, its ReLU: `core/winograd.py` has
// the algorithm. Fewer products alone make no faster convolution than oneDNN's direct one; three things do:
//
// - 16 products of a few tiles by a panel of output channels stay in the first cache, and are transformed back there.
// - Transformed kernels are 16/9 of the plain ones and seldom in a cache when their layer's turn comes: they are fetched ahead.
// - A thread shares nothing that is written. Tiles are shared out; where the kernels outweigh the image, panels of output channels before.
//
// Vectors are GCC's and Clang's extension, so any processor will do. Plain C in and out: compiling needs none of PyTorch's headers.
#include <algorithm>
#include <vector>

namespace {

#ifdef __AVX512F__
constexpr long LANES = 16, ROWS = 14;  // 28 sums, 2 vectors of the kernel and a broadcast in 32 registers
#else
constexpr long LANES = 8, ROWS = 6;  // 12, 2 and 1 in 16
#endif
constexpr long PANEL = 2 * LANES;     // output channels at a time
constexpr long TILES = 4 * ROWS;      // whose transformed input stays in the second cache
constexpr long AHEAD = 32 * PANEL;    // floats of the kernels from the one in use to the one fetched

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

Vector load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
void store(float* to, Vector value) { *reinterpret_cast<Unaligned*>(to) = value; }

/// (rows, C) by (C, PANEL) -> (rows, PANEL): the sums stay in registers.
template <long rows>
void multiply(const float* __restrict a, long stride, const float* __restrict b, long C, float* __restrict out) {
  Vector sums[rows][2] = {};
  for (long c = 0; c < C; ++c, b += PANEL) {
    for (long line = 0; line < PANEL; line += 16) __builtin_prefetch(b + AHEAD + line);
    const Vector left = load(b), right = load(b + LANES);
#pragma GCC unroll 16
    for (long row = 0; row < rows; ++row) {
      const float value = a[row * stride + c];
      sums[row][0] += value * left;
      sums[row][1] += value * right;
    }
  }
#pragma GCC unroll 16
  for (long row = 0; row < rows; ++row) {
    store(out + row * PANEL, sums[row][0]);
    store(out + row * PANEL + LANES, sums[row][1]);
  }
}

template <long rows = ROWS>
void multiply(long count, const float* a, long stride, const float* b, long C, float* out) {
  if (count == rows) return multiply<rows>(a, stride, b, C, out);
  if constexpr (rows > 1) multiply<rows - 1>(count, a, stride, b, C, out);
}

struct Convolution {
  const float *x, *kernels, *bias;  // (N, H, W, C), (K / PANEL, 16, C, PANEL), (K)
  float* y;                         // (N, H, W, K)
  long N, H, W, C, K;
  bool relu;

  long rows() const { return (H + 1) / 2; }
  long columns() const { return (W + 1) / 2; }
  long tiles() const { return N * rows() * columns(); }

  /// Where the 2x2 pixels of a tile begin that are written.
  struct Place { long image, row, column; };
  Place place(long index) const { return {index / (rows() * columns()), 2 * (index / columns() % rows()), 2 * (index % columns())}; }

  /// Bᵀ d B of a tile: 16 places, `step` floats apart. What lies outside the image is read from `zeros`.
  void transform_input(Place at, const float* zeros, float* out, long step) const {
    const float* pixel[4][4];
    for (long i = 0; i < 4; ++i)
      for (long j = 0; j < 4; ++j) {
        const long h = at.row + i - 1, w = at.column + j - 1;
        pixel[i][j] = h < 0 || h >= H || w < 0 || w >= W ? zeros : x + ((at.image * H + h) * W + w) * C;
      }
    for (long c = 0; c < C; c += LANES) {
      Vector d[4][4];
      for (long j = 0; j < 4; ++j) {
        const Vector first = load(pixel[0][j] + c), second = load(pixel[1][j] + c);
        const Vector third = load(pixel[2][j] + c), fourth = load(pixel[3][j] + c);
        d[0][j] = first - third, d[1][j] = second + third, d[2][j] = third - second, d[3][j] = second - fourth;
      }
      for (long i = 0; i < 4; ++i) {
        store(out + (4 * i + 0) * step + c, d[i][0] - d[i][2]);
        store(out + (4 * i + 1) * step + c, d[i][1] + d[i][2]);
        store(out + (4 * i + 2) * step + c, d[i][2] - d[i][1]);
        store(out + (4 * i + 3) * step + c, d[i][1] - d[i][3]);
      }
    }
  }

  /// Aᵀ m A of a tile's products, 16 places of `step` floats, and what follows them: LANES output channels from `k` on of up to 4 pixels.
  void transform_output(Place at, const float* products, long step, long k) const {
    Vector sums[2][4];
    for (long j = 0; j < 4; ++j) {
      const Vector first = load(products + j * step), second = load(products + (4 + j) * step);
      const Vector third = load(products + (8 + j) * step), fourth = load(products + (12 + j) * step);
      sums[0][j] = first + second + third, sums[1][j] = second - third - fourth;
    }
    for (long i = 0; i < 2 && at.row + i < H; ++i) {
      float* out = y + ((at.image * H + at.row + i) * W + at.column) * K + k;
      store(out, finished(sums[i][0] + sums[i][1] + sums[i][2], k));
      if (at.column + 1 < W) store(out + K, finished(sums[i][1] - sums[i][2] - sums[i][3], k));
    }
  }

  Vector finished(Vector sum, long k) const {
    const Vector zero = {}, value = sum + load(bias + k);
    return relu ? (value < zero ? zero : value) : value;  // NaN stays NaN
  }

  /// The output channels from `k` up to `last_k` of the tiles from `first` up to `last`.
  void run(long first, long last, long k, long last_k) const {
    if (first >= last || k >= last_k) return;
    const long most = std::min(TILES, last - first);
    thread_local std::vector<Vector> memory;
    memory.resize(std::max<std::size_t>(memory.size(), (16 * most + 1) * C / LANES));
    float *zeros = reinterpret_cast<float*>(memory.data()), *inputs = zeros + C;
    std::fill(zeros, inputs, 0.0f);
    for (; first < last; first += most) {
      const long count = std::min(most, last - first);
      for (long tile = 0; tile < count; ++tile) transform_input(place(first + tile), zeros, inputs + tile * C, most * C);
      const long blocks = (count + ROWS - 1) / ROWS, size = (count + blocks - 1) / blocks;  // of nearly the same number of rows
      for (long panel = k; panel < last_k; panel += PANEL)
        for (long tile = 0; tile < count; tile += size)
          multiply_block(first + tile, std::min(size, count - tile), inputs + tile * C, most * C, panel);
    }
  }

  /// A panel of output channels of up to ROWS tiles.
  void multiply_block(long first, long count, const float* inputs, long step, long k) const {
    alignas(64) float products[16][ROWS][PANEL];
    for (long place = 0; place < 16; ++place)
      multiply(count, inputs + place * step, C, kernels + (16 * k + place * PANEL) * C, C, products[place][0]);
    for (long tile = 0; tile < count; ++tile)
      for (long lane = 0; lane < PANEL; lane += LANES)
        transform_output(place(first + tile), &products[0][tile][lane], ROWS * PANEL, k + lane);
  }
};

}  // namespace

/// Output channels of a panel: K is a multiple of it, and so is C.
extern "C" long panel() { return PANEL; }

/// x (N, H, W, C), kernels (K / panel, 16, C, panel) and bias (K) -> y (N, H, W, K).
extern "C" void winograd(const float* x, const float* kernels, const float* bias, float* y, long N, long H, long W, long C, long K,
                         bool relu, long threads) {
  const Convolution convolution{x, kernels, bias, y, N, H, W, C, K, relu};
  const long tiles = convolution.tiles(), panels = K / PANEL;
  const bool heavy = 16 * K > N * H * W;  // the kernels outweigh the image
  const long by_panel = heavy ? std::min(panels, threads) : 1, by_tile = threads / by_panel;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (long i = 0; i < by_panel * by_tile; ++i) {
    const long panel = i % by_panel, tile = i / by_panel;
    convolution.run(tiles * tile / by_tile, tiles * (tile + 1) / by_tile, panels * panel / by_panel * PANEL,
                    panels * (panel + 1) / by_panel * PANEL);
  }
}
