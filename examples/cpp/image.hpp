#pragma once

#include <cstdint>
#include <filesystem>
#include <vector>

/// Pixels (H, W, C), C being 1 (grey) or 3 (RGB).
struct Image {
  int height, width, channels;
  std::vector<std::uint8_t> pixels;
};

/// The pixels that `triptych` sees in a JPEG file: libjpeg's accurate transform, EXIF orientation applied, RGB to grey by ITU-R 601.
///
/// Throws Refused, naming the file, for what is no whole RGB or grey JPEG, is above 64 MiB or 64 megapixels (read off the header before
/// anything is decoded), or a hundred times longer than wide.
Image read_jpeg(const std::filesystem::path& file, int channels);
