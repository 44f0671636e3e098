#pragma once

#include <filesystem>
#include <stdexcept>
#include <string>
#include <vector>

/// What the user gave cannot be taken: the message says what and why. Ends a program with exit code 8, as `triptych` does.
class Refused : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// The bytes of a regular file of at most `limit` bytes. Throws Refused.
std::string read_file(const std::filesystem::path& file, std::size_t limit);

/// What happens to a decoded image: short side to `resize_short_side`, antialiased; a centred crop; (x / 255 - mean) / std a channel.
struct Preprocessing {
  int resize_short_side, crop;
  std::vector<float> mean, std;

  int channels() const { return static_cast<int>(mean.size()); }
};

/// What a directory written by `triptych export` holds, as its export.json tells.
struct Artefact {
  std::filesystem::path directory;
  std::string format;   // torchscript, onnx, ...
  bool channels_first;  // (N, C, H, W) from PyTorch, (N, H, W, C) from TensorFlow and JAX
  int classes;
  Preprocessing preprocessing;

  /// The shape of one image as the model takes it.
  std::vector<std::size_t> shape() const;
};

/// Throws Refused when export.json is missing, damaged, or of a model that does not take images.
Artefact read_artefact(const std::filesystem::path& directory);

/// The labels in a checkpoint's config.json. Throws Refused when there are none, or not one a class.
std::vector<std::string> read_labels(const std::filesystem::path& config, int classes);
