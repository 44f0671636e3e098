#include "record.hpp"

#include <yaml.h>

#include <charconv>
#include <fstream>
#include <map>
#include <memory>

namespace fs = std::filesystem;

namespace {

constexpr std::size_t LARGEST_RECORD = 16 << 20;
constexpr int DEEPEST = 64;
constexpr int LARGEST_SIDE = 8192;

/// JSON, flat: {"a": {"b": [5]}} has one field, "a.b.0", of text "5". Null is no field. JSON is a subset of YAML, which libyaml parses.
class Fields {
 public:
  explicit Fields(const fs::path& file) : file_(file) {
    const std::string text = read_file(file, LARGEST_RECORD);
    yaml_parser_initialize(&parser_);
    yaml_parser_set_input_string(&parser_, reinterpret_cast<const unsigned char*>(text.data()), text.size());
    const std::unique_ptr<yaml_parser_t, decltype(&yaml_parser_delete)> owned(&parser_, yaml_parser_delete);
    expect(YAML_STREAM_START_EVENT);
    expect(YAML_DOCUMENT_START_EVENT);
    flatten(*next(), "", 0);
  }

  const std::string* find(const std::string& name) const {
    const auto found = fields_.find(name);
    return found == fields_.end() ? nullptr : &found->second;
  }

  const std::string& text(const std::string& name) const {
    if (const auto* found = find(name)) return *found;
    throw Refused(file_.string() + ": it has no " + name + "; is it the record of an exported image classifier?");
  }

  template <class Number>
  Number number(const std::string& name, Number least, Number most) const {
    const std::string& given = text(name);
    Number value{};
    const auto [end, error] = std::from_chars(given.data(), given.data() + given.size(), value);
    if (error != std::errc() || end != given.data() + given.size() || !(least <= value && value <= most))
      throw Refused(file_.string() + ": " + name + " is " + given + ", which is not possible");
    return value;
  }

  std::vector<float> floats(const std::string& name, double least, double most) const {
    std::vector<float> values;
    for (std::string item = name + ".0"; find(item); item = name + "." + std::to_string(values.size()))
      values.push_back(static_cast<float>(number(item, least, most)));
    return values;
  }

 private:
  using Event = std::unique_ptr<yaml_event_t, void (*)(yaml_event_t*)>;

  Event next() {
    Event event(new yaml_event_t{}, [](yaml_event_t* each) { yaml_event_delete(each), delete each; });
    if (!yaml_parser_parse(&parser_, event.get()))
      throw Refused(file_.string() + ": damaged in line " + std::to_string(parser_.problem_mark.line + 1));
    return event;
  }

  void expect(yaml_event_type_t type) {
    if (next()->type != type) throw Refused(file_.string() + ": empty");
  }

  static std::string scalar(const yaml_event_t& event) {
    return {reinterpret_cast<const char*>(event.data.scalar.value), event.data.scalar.length};
  }

  void flatten(const yaml_event_t& event, const std::string& name, int depth) {
    const std::string prefix = name.empty() ? "" : name + ".";
    if (event.type == YAML_SCALAR_EVENT) {
      const bool null = event.data.scalar.plain_implicit && scalar(event) == "null";
      if (!null) fields_[name] = scalar(event);
    } else if (event.type == YAML_SEQUENCE_START_EVENT && depth < DEEPEST) {
      Event item = next();
      for (int i = 0; item->type != YAML_SEQUENCE_END_EVENT; ++i, item = next()) flatten(*item, prefix + std::to_string(i), depth + 1);
    } else if (event.type == YAML_MAPPING_START_EVENT && depth < DEEPEST) {
      for (Event key = next(); key->type == YAML_SCALAR_EVENT; key = next()) flatten(*next(), prefix + scalar(*key), depth + 1);
    } else {
      throw Refused(file_.string() + ": not JSON");
    }
  }

  fs::path file_;
  yaml_parser_t parser_;
  std::map<std::string, std::string> fields_;
};

}  // namespace

std::string read_file(const fs::path& file, std::size_t limit) {
  std::error_code error;
  const std::size_t size = fs::file_size(file, error);
  if (error) throw Refused(file.string() + ": " + error.message());
  if (size > limit) throw Refused(file.string() + ": larger than " + std::to_string(limit >> 20) + " MiB");
  std::string bytes(size, '\0');
  if (!std::ifstream(file, std::ios::binary).read(bytes.data(), static_cast<std::streamsize>(size)))
    throw Refused(file.string() + ": cannot be read");
  return bytes;
}

std::vector<std::size_t> Artefact::shape() const {
  const std::size_t side = preprocessing.crop, channels = preprocessing.channels();
  return channels_first ? std::vector{std::size_t{1}, channels, side, side} : std::vector{std::size_t{1}, side, side, channels};
}

Artefact read_artefact(const fs::path& directory) {
  const fs::path file = directory / "export.json";
  const Fields fields(file);
  if (fields.text("schema") != "1") throw Refused(file.string() + ": schema " + fields.text("schema") + "; this program reads schema 1");
  const std::string given = "spec.preprocessing.";
  const int crop = fields.number(given + "crop", 1, LARGEST_SIDE);
  const bool resized = fields.find(given + "resize_short_side");
  const Preprocessing preprocessing{
      resized ? fields.number(given + "resize_short_side", crop, LARGEST_SIDE) : crop, crop,
      fields.floats(given + "mean", -1e3, 1e3), fields.floats(given + "std", 1e-6, 1e3)};
  if (preprocessing.mean.size() != preprocessing.std.size() || (preprocessing.channels() != 1 && preprocessing.channels() != 3))
    throw Refused(file.string() + ": its mean and std are not those of 1 (grey) or 3 (RGB) channels");
  const int classes = fields.number("spec.num_classes", 1, 1 << 24);
  return {directory, fields.text("format"), fields.text("source") == "pytorch", classes, preprocessing};
}

std::vector<std::string> read_labels(const fs::path& config, int classes) {
  const Fields fields(config);
  std::vector<std::string> labels;
  for (int i = 0; i < classes; ++i) labels.push_back(fields.text("labels." + std::to_string(i)));
  return labels;
}
