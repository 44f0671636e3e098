// A 3x3 convolution of stride 1 and padding 1 by Winograd's F(2x2, 3x3), with its bias and, where wanted, the addition of a shortcut and the
// ReLU that follow: `core/winograd.py` has the algorithm. Fewer products alone make no faster convolution than oneDNN's direct one; three
// things do:
//
// - 16 products of a few tiles by a panel of output channels stay in the first cache, and are transformed back there.
// - Transformed kernels are 16/9 of the plain ones and seldom in a cache when their layer's turn comes: they are fetched ahead.
// - A thread shares nothing that is written. Tiles are shared out; where the kernels outweigh the image, panels of output channels before.
//
// Vectors are GCC's and Clang's extension, so any processor will do. Of PyTorch's headers only the stable ones are needed.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
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
  const float *x, *kernels, *bias, *shortcut;  // (N, H, W, C), (K / PANEL, 16, C, PANEL), (K), none or (N, H, W, K)
  float* y;                                    // (N, H, W, K)
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

  /// Aᵀ m A of a tile's products, 16 places of `step` floats: LANES output channels from `k` on of up to 4 pixels.
  void transform_output(Place at, const float* products, long step, long k) const {
    Vector sums[2][4];
    for (long j = 0; j < 4; ++j) {
      const Vector first = load(products + j * step), second = load(products + (4 + j) * step);
      const Vector third = load(products + (8 + j) * step), fourth = load(products + (12 + j) * step);
      sums[0][j] = first + second + third, sums[1][j] = second - third - fourth;
    }
    for (long i = 0; i < 2 && at.row + i < H; ++i) {
      const long pixel = (at.image * H + at.row + i) * W + at.column;
      put(pixel, k, sums[i][0] + sums[i][1] + sums[i][2]);
      if (at.column + 1 < W) put(pixel + 1, k, sums[i][1] - sums[i][2] - sums[i][3]);
    }
  }

  /// Writes LANES output channels from `k` on of a pixel, and what follows the convolution with them.
  void put(long pixel, long k, Vector sum) const {
    const long at = pixel * K + k;
    sum += load(bias + k);
    if (shortcut) sum += load(shortcut + at);
    const Vector zero = {};
    store(y + at, relu ? (sum < zero ? zero : sum) : sum);  // NaN stays NaN
  }

  /// The output channels from `k` up to `last_k` of the tiles from `first` up to `last`.
  void run(long first, long last, long k, long last_k) const {
    if (first >= last || k >= last_k) return;
    // A tile apart by powers of 2 would fall into the same few sets of the first cache as the next one.
    const long most = std::min(TILES, last - first), stride = C + LANES;
    thread_local std::vector<Vector> memory;
    memory.resize(std::max<std::size_t>(memory.size(), (16 * most + 1) * stride / LANES));
    float *zeros = reinterpret_cast<float*>(memory.data()), *inputs = zeros + stride;
    std::fill(zeros, inputs, 0.0f);
    for (; first < last; first += most) {
      const long count = std::min(most, last - first);
      for (long tile = 0; tile < count; ++tile) transform_input(place(first + tile), zeros, inputs + tile * stride, most * stride);
      const long blocks = (count + ROWS - 1) / ROWS, size = (count + blocks - 1) / blocks;  // of nearly the same number of rows
      for (long panel = k; panel < last_k; panel += PANEL)
        for (long tile = 0; tile < count; tile += size)
          multiply_block(first + tile, std::min(size, count - tile), inputs + tile * stride, stride, most * stride, panel);
    }
  }

  /// A panel of output channels of up to ROWS tiles.
  void multiply_block(long first, long count, const float* inputs, long stride, long step, long k) const {
    alignas(64) float products[16][ROWS][PANEL];
    for (long place = 0; place < 16; ++place)
      multiply(count, inputs + place * step, stride, kernels + (16 * k + place * PANEL) * C, C, products[place][0]);
    for (long tile = 0; tile < count; ++tile)
      for (long lane = 0; lane < PANEL; lane += LANES)
        transform_output(place(first + tile), &products[0][tile][lane], ROWS * PANEL, k + lane);
  }
};

using torch::stable::Tensor;

bool same_shape(const Tensor& tensor, std::initializer_list<long> shape) {
  const auto sizes = tensor.sizes();
  return std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end());
}

/// x (N, C, H, W), transformed kernels in panels, bias (K) and, where there is one, a shortcut (N, K, H, W) -> (N, K, H, W), channels last.
Tensor winograd(const Tensor& given, const Tensor& kernels, const Tensor& bias, const std::optional<Tensor>& shortcut, bool relu) {
  constexpr auto layout = torch::headeronly::MemoryFormat::ChannelsLast;
  STD_TORCH_CHECK(given.dim() == 4 && bias.dim() == 1, "winograd takes images (N, C, H, W) and a bias (K)");
  const Tensor x = torch::stable::contiguous(given, layout);
  const std::optional<Tensor> added = shortcut ? std::optional(torch::stable::contiguous(*shortcut, layout)) : std::nullopt;
  const long N = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3), K = bias.size(0);
  STD_TORCH_CHECK(C % PANEL == 0 && K % PANEL == 0 && kernels.numel() == 16 * C * K, "winograd's kernels do not fit the images or the bias");
  STD_TORCH_CHECK(!added || same_shape(*added, {N, K, H, W}), "winograd's shortcut does not have the shape of the output");
  Tensor y = torch::stable::empty({N, K, H, W}, x.scalar_type(), {}, {}, {}, layout);
  const auto data = [](const Tensor& tensor) { return tensor.const_data_ptr<float>(); };
  const Convolution convolution{data(x), data(kernels), data(bias), added ? data(*added) : nullptr, y.mutable_data_ptr<float>(),
                                N, H, W, C, K, relu};
  const long tiles = convolution.tiles(), panels = K / PANEL, threads = torch::stable::get_num_threads();
  const bool heavy = 16 * K > N * H * W;  // the kernels outweigh the image
  const long by_panel = heavy ? std::min(panels, threads) : 1, by_tile = threads / by_panel;
  torch::stable::parallel_for(0, by_panel * by_tile, 1, [&](long begin, long end) {
    for (long i = begin; i < end; ++i) {
      const long panel = i % by_panel, tile = i / by_panel;
      convolution.run(tiles * tile / by_tile, tiles * (tile + 1) / by_tile, panels * panel / by_panel * PANEL,
                      panels * (panel + 1) / by_panel * PANEL);
    }
  });
  return y;
}

}  // namespace

/// Output channels of a panel: K is a multiple of it, and so is C.
extern "C" long panel() { return PANEL; }

// In the namespace OPERATORS: a compiler's option, so that a process can have this twice, compiled in two ways.
STABLE_TORCH_LIBRARY_IMPL(OPERATORS, CPU, library) { library.impl("winograd", TORCH_BOX(&winograd)); }
