#include "classify.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <iostream>
#include <numeric>

#include "image.hpp"
#include "preprocess.hpp"

namespace {

constexpr int TOP = 5, REFUSED = 8;

std::vector<double> softmax(const std::vector<float>& logits) {
  const double largest = *std::max_element(logits.begin(), logits.end());
  std::vector<double> shares;
  for (double logit : logits) shares.push_back(std::exp(logit - largest));
  const double sum = std::accumulate(shares.begin(), shares.end(), 0.0);
  for (double& share : shares) share /= sum;
  return shares;
}

void print_top(const std::vector<float>& logits, const std::vector<std::string>& labels) {
  std::vector<int> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return logits[a] > logits[b]; });
  order.resize(std::min<std::size_t>(order.size(), TOP));
  const auto shares = softmax(logits);
  for (int i : order) std::printf("  %.7f  %d%s\n", shares[i], i, labels.empty() ? "" : ("  " + labels[i]).c_str());
}

std::string file_of(const Artefact& artefact, const Runtime& runtime) {
  const auto found = runtime.formats.find(artefact.format);
  if (found != runtime.formats.end()) return (artefact.directory / found->second).string();
  std::string known;
  for (const auto& [format, file] : runtime.formats) known += (known.empty() ? "" : ", ") + format;
  throw Refused(artefact.directory.string() + " holds " + artefact.format + "; this program runs " + known);
}

/// Of a runtime's own exceptions the last line says what is wrong; OpenVINO and TorchScript put their stack before it, libtorch after.
template <class Action>
auto plainly(const std::string& file, Action action) try {
  return action();
} catch (const std::exception& error) {
  std::string message = error.what();
  message.resize(std::min(message.size(), message.find("\nException raised from")));
  message.resize(message.find_last_not_of("\n ") + 1);
  throw Refused(file + ": " + message.substr(message.rfind('\n') + 1));
}

/// Prints the top of each image, and the reason for each that is refused. Returns the exit code.
int run(const Artefact& artefact, const Runtime& runtime, const std::vector<std::string>& labels, const std::vector<std::string>& images) {
  const std::string file = file_of(artefact, runtime);
  const Model model = plainly(file, [&] { return runtime.open(artefact, file); });
  int code = 0;
  for (const auto& each : images) try {
      auto image = preprocess(read_jpeg(each, artefact.preprocessing.channels()), artefact.preprocessing, artefact.channels_first);
      const auto logits = plainly(file, [&] { return model(image); });
      if (logits.size() != static_cast<std::size_t>(artefact.classes))
        throw Refused(file + ": " + std::to_string(logits.size()) + " logits; export.json tells " + std::to_string(artefact.classes));
      std::printf("%s\n", each.c_str());
      print_top(logits, labels);
    } catch (const Refused& error) {
      std::cerr << error.what() << '\n';
      code = REFUSED;
    }
  return code;
}

}  // namespace

int classify(int argc, char** argv, const Runtime& runtime) try {
  std::vector<std::string> given(argv + 1, argv + argc);
  const bool labelled = given.size() > 2 && given[1] == "--labels";
  if (given.size() < (labelled ? 4 : 2)) {
    std::cerr << "usage: " << argv[0] << " EXPORTED [--labels CONFIG] IMAGE...\n";
    return 2;
  }
  const Artefact artefact = read_artefact(given[0]);
  const auto labels = labelled ? read_labels(given[2], artefact.classes) : std::vector<std::string>{};
  return run(artefact, runtime, labels, {given.begin() + (labelled ? 3 : 1), given.end()});
} catch (const Refused& error) {
  std::cerr << error.what() << '\n';
  return REFUSED;
} catch (const std::exception& error) {
  std::cerr << "internal error: " << error.what() << '\n';
  return 1;
}
