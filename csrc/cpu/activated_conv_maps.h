// Maps of activated_conv inside buffers: read from images with padding around them, activated, written to images.
// Compiled once per instruction set.
#pragma once

#include <cstddef>

#include "activated_conv_kernel.h"
#include "silu.h"

namespace fastflow::FASTFLOW_ISA {
namespace {

// A map of one sample inside a buffer, channels innermost.
template <class T>
struct Map {
  T* first;  // pixel (0, 0)
  int64_t height, width, channels, row;  // row: from one row to the next

  int64_t line() const { return width * channels; }
};

bool lies_like(const Image& image, int64_t height, int64_t width, int64_t channels) {
  return (channels == 1 || image.channel == 1) && (width == 1 || image.column == channels) &&
         (height == 1 || image.row == width * channels);
}

template <class T>
void read(const Image& image, int64_t b, const Map<T>& to) {
  const T* const from = static_cast<const T*>(image.data) + b * image.sample;
  for (int64_t y = 0; y < to.height; ++y) {
    const T* const row = from + y * image.row;
    T* const line = to.first + y * to.row;
    if (image.channel == 1 && image.column == to.channels)
      __builtin_memcpy(line, row, static_cast<size_t>(to.line()) * sizeof(T));
    else if (image.channel == 1)
      for (int64_t x = 0; x < to.width; ++x)
        for (int64_t c = 0; c < to.channels; ++c) line[x * to.channels + c] = row[x * image.column + c];
    else
      for (int64_t c = 0; c < to.channels; ++c)
        for (int64_t x = 0; x < to.width; ++x)
          line[x * to.channels + c] = row[x * image.column + c * image.channel];
  }
}

template <class T>
void write(const Map<T>& from, const Image& image, int64_t b) {
  T* const to = static_cast<T*>(image.data) + b * image.sample;
  for (int64_t y = 0; y < from.height; ++y) {
    T* const row = to + y * image.row;
    const T* const line = from.first + y * from.row;
    for (int64_t c = 0; c < from.channels; ++c)
      for (int64_t x = 0; x < from.width; ++x) row[x * image.column + c * image.channel] = line[x * from.channels + c];
  }
}

// Activates a map in place, and leaves the slopes, if wanted, as adjacent lines.
template <class T>
void activate(ConvActivation activation, const Map<T>& map, T* slopes) {
  if (activation == ConvActivation::none) return;
  const int64_t count = map.line();
  for (int64_t y = 0; y < map.height; ++y) {
    T* const __restrict values = map.first + y * map.row;
    if (activation == ConvActivation::relu) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) values[i] = values[i] <= T(0) ? T(0) : values[i];
    } else {
      silu(count, values, values, slopes == nullptr ? slopes : slopes + y * count);
    }
  }
}

// grad, adjacent lines, times the activation's slope: a rectifier's is known from the activated map.
template <class T>
void chain(ConvActivation activation, const Map<T>& activated, const T* slopes, T* grad) {
  if (activation == ConvActivation::none) return;
  const int64_t count = activated.line();
  for (int64_t y = 0; y < activated.height; ++y, grad += count) {
    if (activation == ConvActivation::relu) {
      const T* const values = activated.first + y * activated.row;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) grad[i] = values[i] <= T(0) ? T(0) : grad[i];
    } else {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) grad[i] *= slopes[y * count + i];
    }
  }
}

// The same of rows of `width` pixels, of which the map may hold fewer: the others, that no tap meets, have a gradient
// of zero, whatever the slope.
template <class T>
void chain_rows(ConvActivation activation, const Map<T>& x, const T* slopes, int64_t width, T* grad) {
  if (x.width == width) return chain(activation, x, slopes, grad);
  for (int64_t y = 0; y < x.height; ++y)
    chain(activation, Map<T>{x.first + y * x.row, 1, x.width, x.channels, x.row}, slopes + y * x.line(),
          grad + y * width * x.channels);
}

// The fine map inside a padded one; rows and columns that no tap meets are left out, all of them where the padding's
// are the only ones met.
template <class T>
Map<T> fine_map(const ActivatedConv& shape, T* padded) {
  const auto met = [&](int64_t reached, int64_t size) {
    const int64_t inside = reached - shape.padding;
    return inside < 0 ? 0 : inside < size ? inside : size;
  };
  const int64_t step = shape.fine_columns() * shape.fine;
  return {padded + shape.padding * (step + shape.fine), met(shape.fine_rows(), shape.fine_height),
          met(shape.fine_columns(), shape.fine_width), shape.fine, step};
}

template <class T>
Map<T> coarse_map(const ActivatedConv& shape, T* padded) {
  const int64_t step = shape.coarse_columns() * shape.coarse;
  return {padded + shape.margin_rows() * step + shape.margin_columns() * shape.coarse, shape.coarse_height,
          shape.coarse_width, shape.coarse, step};
}

template <class T>
void clear(T* values, int64_t count) {
  __builtin_memset(values, 0, static_cast<size_t>(count) * sizeof(T));
}

}  // namespace
}  // namespace fastflow::FASTFLOW_ISA
