#pragma once

#include <vector>

#include "image.hpp"
#include "record.hpp"

/// The canonical preprocessing, `triptych.core.preprocess`: short side resized, centred crop, (x / 255 - mean) / std.
///
/// Bilinear with antialiasing and never rounded to integers (rows 20 to 22 of docs/numerics.md), in float32 as PyTorch computes it.
/// Returns (C, crop, crop) where `channels_first`, else (crop, crop, C).
std::vector<float> preprocess(const Image& image, const Preprocessing& given, bool channels_first);
