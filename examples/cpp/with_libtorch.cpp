// What PyTorch exports, on the CPU, without Python: TorchScript, and AOTInductor's packages. Both are programs: run your own alone.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/script.h>

#include <memory>

#include "classify.hpp"

namespace {

using Call = std::function<at::Tensor(const at::Tensor&)>;

Call loaded(const std::string& format, const std::string& file) {
  if (format == "aotinductor") {
    auto package = std::make_shared<torch::inductor::AOTIModelPackageLoader>(file);
    return [package](const at::Tensor& images) { return package->run({images}).at(0); };
  }
  auto module = std::make_shared<torch::jit::Module>(torch::jit::load(file, at::kCPU));
  return [module](const at::Tensor& images) { return module->forward({images}).toTensor(); };
}

Model open(const Artefact& artefact, const std::string& file) {
  const auto shape = artefact.shape();
  const std::vector<std::int64_t> sizes(shape.begin(), shape.end());
  return [sizes, call = loaded(artefact.format, file)](std::vector<float>& image) {
    const c10::InferenceMode guard;
    const at::Tensor logits = call(at::from_blob(image.data(), sizes)).to(at::kFloat).contiguous();
    return std::vector<float>(logits.const_data_ptr<float>(), logits.const_data_ptr<float>() + logits.numel());
  };
}

}  // namespace

int main(int argc, char** argv) {
  return classify(argc, argv, {{{"torchscript", "model.pt"}, {"torchscript_script", "model.pt"}, {"aotinductor", "model.pt2"}}, open});
}
