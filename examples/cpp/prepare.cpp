// prepare EXPORTED IMAGE: what goes into the model, raw float32 in its layout, to standard output. Needs no runtime.
#include <cstdio>
#include <iostream>

#include "image.hpp"
#include "preprocess.hpp"
#include "record.hpp"

int main(int argc, char** argv) try {
  if (argc != 3) {
    std::cerr << "usage: " << argv[0] << " EXPORTED IMAGE\n";
    return 2;
  }
  const Artefact artefact = read_artefact(argv[1]);
  const auto image = preprocess(read_jpeg(argv[2], artefact.preprocessing.channels()), artefact.preprocessing, artefact.channels_first);
  return std::fwrite(image.data(), sizeof(float), image.size(), stdout) == image.size() && std::fflush(stdout) == 0 ? 0 : 10;
} catch (const Refused& error) {
  std::cerr << error.what() << '\n';
  return 8;
}
