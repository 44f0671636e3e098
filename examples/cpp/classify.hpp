#pragma once

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "record.hpp"

/// One preprocessed image, of the artefact's shape, -> a logit for each class.
using Model = std::function<std::vector<float>(std::vector<float>& image)>;

/// What runs artefacts: the formats that it takes, each with the name of its file, and how one is opened.
struct Runtime {
  std::map<std::string, std::string> formats;
  std::function<Model(const Artefact& artefact, const std::string& file)> open;
};

/// A whole program: `PROGRAM EXPORTED [--labels CONFIG] IMAGE...` prints the five likeliest classes of each image.
///
/// Returns triptych's exit codes: 0; 1 for what should not happen; 2 for usage; 8 when an image or the artefact was refused.
int classify(int argc, char** argv, const Runtime& runtime);
