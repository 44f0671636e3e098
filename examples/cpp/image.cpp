#include "image.hpp"

#include <csetjmp>
#include <cstdio>  // which jpeglib.h needs before it
#include <cstring>
#include <string>
#include <utility>

#include <jpeglib.h>

#include <jerror.h>

#include "record.hpp"

namespace {

constexpr std::size_t LARGEST_FILE = 64 << 20;
constexpr std::int64_t MOST_PIXELS = 64'000'000;
constexpr int LONGEST = 100;
constexpr int MOST_SCANS = 500;  // of a progressive file, each of which is a pass over the whole image

/// libjpeg reports by this, and ends its own calls by a jump; Decoder::guarded turns that into an exception outside of its frames.
struct Errors : jpeg_error_mgr {
  std::jmp_buf jump;
  char message[JMSG_LENGTH_MAX];
};

[[noreturn]] void leave(j_common_ptr info) {
  auto* errors = static_cast<Errors*>(info->err);
  errors->format_message(info, errors->message);
  std::longjmp(errors->jump, 1);
}

/// What libjpeg only warns about (a level below 0) is damage, but for stray bytes between segments, which cameras write.
void heed(j_common_ptr info, int level) {
  if (level < 0 && info->err->msg_code != JWRN_EXTRANEOUS_DATA) leave(info);
}

void count_scans(j_common_ptr info) {
  if (reinterpret_cast<j_decompress_ptr>(info)->input_scan_number <= MOST_SCANS) return;
  auto* errors = static_cast<Errors*>(info->err);
  std::snprintf(errors->message, sizeof errors->message, "more than %d scans", MOST_SCANS);
  std::longjmp(errors->jump, 1);
}

struct Decompressor : jpeg_decompress_struct {
  Decompressor() : jpeg_decompress_struct{} {}
  Decompressor(const Decompressor&) = delete;
  ~Decompressor() { jpeg_destroy_decompress(this); }
};

class Decoder {
  Errors errors_{};
  jpeg_progress_mgr progress_{};

 public:
  Decompressor info;

  explicit Decoder(const std::string& bytes) {
    info.err = jpeg_std_error(&errors_);
    errors_.error_exit = leave;
    errors_.emit_message = heed;
    progress_.progress_monitor = count_scans;
    guarded([&] {
      jpeg_create_decompress(&info);
      info.progress = &progress_;
      jpeg_save_markers(&info, JPEG_APP0 + 1, 0xFFFF);  // EXIF
      jpeg_mem_src(&info, reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size());
      jpeg_read_header(&info, TRUE);
    });
  }

  Image pixels() {
    const bool grey = info.jpeg_color_space == JCS_GRAYSCALE;
    Image image{static_cast<int>(info.image_height), static_cast<int>(info.image_width), grey ? 1 : 3, {}};
    const std::size_t row = static_cast<std::size_t>(image.width) * image.channels;
    image.pixels.resize(row * image.height);
    guarded([&] {
      info.out_color_space = grey ? JCS_GRAYSCALE : JCS_RGB;
      info.dct_method = JDCT_ISLOW;
      jpeg_start_decompress(&info);
      while (info.output_scanline < info.output_height) {
        JSAMPROW line = image.pixels.data() + row * info.output_scanline;
        jpeg_read_scanlines(&info, &line, 1);
      }
      jpeg_finish_decompress(&info);
    });
    return image;
  }

 private:
  /// `calls` holds nothing that has a destructor: what libjpeg refuses jumps over it.
  template <class Calls>
  void guarded(Calls calls) {
    if (setjmp(errors_.jump)) throw Refused(errors_.message);
    calls();
  }
};

void check(const jpeg_decompress_struct& info) {
  const std::int64_t width = info.image_width, height = info.image_height;
  const std::string size = std::to_string(width) + " x " + std::to_string(height);
  if (width * height > MOST_PIXELS) throw Refused(size + " pixels are more than 64 million; scale it down first");
  if (std::max(width, height) > LONGEST * std::min(width, height))
    throw Refused(size + " is more than " + std::to_string(LONGEST) + " times longer than wide; crop it first");
  if (info.jpeg_color_space != JCS_GRAYSCALE && info.jpeg_color_space != JCS_RGB && info.jpeg_color_space != JCS_YCbCr)
    throw Refused("neither RGB nor grey; convert it first");
}

/// Unsigned integers of an EXIF block, which knows its own byte order.
class Exif {
 public:
  Exif(const unsigned char* data, std::size_t size) : data_(data), size_(size), little_(size > 0 && data[0] == 'I') {}

  /// 0 beyond the end.
  std::size_t integer(std::size_t at, int bytes) const {
    std::size_t value = 0;
    for (int i = 0; i < bytes && at + bytes <= size_; ++i) value = value << 8 | data_[at + (little_ ? bytes - 1 - i : i)];
    return value;
  }

  /// The tag 0x0112 of the first directory, if that is one unsigned short, which has the type 3.
  int orientation() const {
    const std::size_t directory = integer(4, 4), entries = integer(2, 2) == 42 ? integer(directory, 2) : 0;
    for (std::size_t entry = directory + 2; entry < directory + 2 + 12 * entries; entry += 12)
      if (integer(entry, 2) == 0x0112 && integer(entry + 2, 2) == 3 && integer(entry + 4, 4) == 1)
        return static_cast<int>(integer(entry + 8, 2));
    return 1;
  }

 private:
  const unsigned char* data_;
  std::size_t size_;
  bool little_;
};

/// How the camera was held: 1 (upright) to 8.
int orientation(const jpeg_decompress_struct& info) {
  for (auto* marker = info.marker_list; marker; marker = marker->next)
    if (marker->data_length > 6 && std::memcmp(marker->data, "Exif\0", 6) == 0)
      return Exif(marker->data + 6, marker->data_length - 6).orientation();
  return 1;
}

Image turned(Image image, int orientation) {
  const bool swapped = orientation >= 5 && orientation <= 8;
  const bool rows_reversed = orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
  const bool columns_reversed = orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8;
  if (!swapped && !rows_reversed && !columns_reversed) return image;
  Image upright{swapped ? image.width : image.height, swapped ? image.height : image.width, image.channels, {}};
  upright.pixels.reserve(image.pixels.size());
  for (int y = 0; y < upright.height; ++y)
    for (int x = 0; x < upright.width; ++x) {
      const int row = swapped ? x : y, column = swapped ? y : x;
      const std::size_t from = static_cast<std::size_t>(rows_reversed ? image.height - 1 - row : row) * image.width +
                               (columns_reversed ? image.width - 1 - column : column);
      const auto* pixel = image.pixels.data() + from * image.channels;
      upright.pixels.insert(upright.pixels.end(), pixel, pixel + image.channels);
    }
  return upright;
}

Image with_channels(Image image, int channels) {
  if (image.channels == channels) return image;
  Image made{image.height, image.width, channels, {}};
  const std::size_t count = static_cast<std::size_t>(image.height) * image.width;
  made.pixels.reserve(count * channels);
  for (std::size_t i = 0; i < count; ++i) {
    const auto* pixel = image.pixels.data() + i * image.channels;
    if (channels == 3)
      made.pixels.insert(made.pixels.end(), 3, pixel[0]);
    else  // ITU-R 601 in 16 bits of fraction, as Pillow has it
      made.pixels.push_back((pixel[0] * 19595 + pixel[1] * 38470 + pixel[2] * 7471 + 0x8000) >> 16);
  }
  return made;
}

}  // namespace

Image read_jpeg(const std::filesystem::path& file, int channels) {
  const std::string bytes = read_file(file, LARGEST_FILE);
  if (bytes.compare(0, 3, "\xff\xd8\xff") != 0) throw Refused(file.string() + ": not a JPEG by its content; convert it first");
  try {
    Decoder decoder(bytes);
    check(decoder.info);
    const int held = orientation(decoder.info);
    return with_channels(turned(decoder.pixels(), held), channels);
  } catch (const Refused& error) {
    throw Refused(file.string() + ": " + error.what());
  }
}
