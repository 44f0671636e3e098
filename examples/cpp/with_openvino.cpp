// OpenVINO's IR, and ONNX files from any framework, on the CPU.
#include <openvino/openvino.hpp>

#include "classify.hpp"

namespace {

Model open(const Artefact& artefact, const std::string& file) {
  // Without the hint OpenVINO computes in bfloat16 where the processor can.
  auto compiled = ov::Core().compile_model(file, "CPU", ov::hint::inference_precision(ov::element::f32));
  return [request = compiled.create_infer_request(), shape = artefact.shape()](std::vector<float>& image) mutable {
    request.set_input_tensor(ov::Tensor(ov::element::f32, shape, image.data()));
    request.infer();
    const ov::Tensor logits = request.get_output_tensor();
    return std::vector<float>(logits.data<float>(), logits.data<float>() + logits.get_size());
  };
}

}  // namespace

int main(int argc, char** argv) {
  return classify(argc, argv, {{{"openvino", "model.xml"}, {"onnx", "model.onnx"}, {"onnx_opset11", "model.onnx"}}, open});
}
