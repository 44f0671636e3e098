#include "preprocess.hpp"

#include <algorithm>
#include <cmath>

namespace {

/// One pixel of the result: `weights` of the source's pixels from `first` on.
struct Taps {
  int first;
  std::vector<float> weights;
};

/// The pixels [start, start + crop) of `size` pixels resized to `resized`: a triangle as wide as two pixels of the coarser grid, cut off at
/// the edges and summing up to one. The types are those of ATen's `upsample_bilinear2d_aa`, so that the weights are, too.
std::vector<Taps> triangles(int size, int resized, int start, int crop) {
  const float scale = static_cast<float>(size) / static_cast<float>(resized);
  const float support = std::max(scale, 1.0F), inverse = 1.0F / support;
  std::vector<Taps> taps;
  for (int i = start; i < start + crop; ++i) {
    const auto centre = static_cast<float>(scale * (i + 0.5));
    const int first = std::max(static_cast<int>(centre - support + 0.5), 0);
    const int last = std::min(static_cast<int>(centre + support + 0.5), size);
    std::vector<float> weights;
    float sum = 0.0F;
    for (int j = first; j < last; ++j) {
      const auto distance = static_cast<float>((j - centre + 0.5) * inverse);
      weights.push_back(std::max(1.0F - std::abs(distance), 0.0F));
      sum += weights.back();
    }
    for (float& weight : weights) weight /= sum;
    taps.push_back({first, std::move(weights)});
  }
  return taps;
}

/// Where the crop begins. Python's `round`: a half goes to the even neighbour, as does `nearbyint`.
int corner(int resized, int crop) { return static_cast<int>(std::nearbyint((resized - crop) / 2.0)); }

/// The long side, truncated.
int long_side(int short_side, int longer, int shorter) {
  return static_cast<int>(static_cast<double>(short_side) * longer / shorter);
}

}  // namespace

std::vector<float> preprocess(const Image& image, const Preprocessing& given, bool channels_first) {
  const int crop = given.crop, channels = image.channels, target = given.resize_short_side;
  const bool wide = image.height <= image.width;
  const int height = wide ? target : long_side(target, image.height, image.width);
  const int width = wide ? long_side(target, image.width, image.height) : target;
  const auto columns = triangles(image.width, width, corner(width, crop), crop);
  const auto rows = triangles(image.height, height, corner(height, crop), crop);

  // Along each row first, and only the rows that the crop needs: (bottom - top, crop, C).
  const int top = rows.front().first, bottom = rows.back().first + static_cast<int>(rows.back().weights.size());
  const std::size_t line = static_cast<std::size_t>(crop) * channels;
  std::vector<float> narrow(line * (bottom - top));
  for (int y = top; y < bottom; ++y)
    for (int x = 0; x < crop; ++x)
      for (int c = 0; c < channels; ++c) {
        const auto* from = image.pixels.data() + (static_cast<std::size_t>(y) * image.width + columns[x].first) * channels + c;
        float sum = 0.0F;
        for (float weight : columns[x].weights) sum += weight * *from, from += channels;
        narrow[(y - top) * line + x * channels + c] = sum;
      }

  std::vector<float> prepared(line * crop);
  for (int y = 0; y < crop; ++y)
    for (int x = 0; x < crop; ++x)
      for (int c = 0; c < channels; ++c) {
        const auto* from = narrow.data() + (rows[y].first - top) * line + x * channels + c;
        float sum = 0.0F;
        for (float weight : rows[y].weights) sum += weight * *from, from += line;
        const std::size_t at = channels_first ? (c * crop + y) * crop + x : y * line + x * channels + c;
        prepared[at] = (sum / 255.0F - given.mean[c]) / given.std[c];
      }
  return prepared;
}
