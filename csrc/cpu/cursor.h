// Reads and writes strided operands of any dtype in tiles. For *_kernel.cpp alone: compiled once per instruction set.
#pragma once

#include "operand.h"
#include "storage.h"

namespace fastflow::FASTFLOW_ISA {
namespace {

template <int count, class From, class To>
FASTFLOW_HD void copy_block(const From* from, To* to) {
  if constexpr (__is_same(From, To)) {
    __builtin_memcpy(to, from, count * sizeof(To));
  } else {
#pragma omp simd
    for (int j = 0; j < count; ++j) to[j] = convert(from[j], static_cast<To*>(nullptr));
  }
}

// n >= count contiguous elements in blocks of `count`, the last of which may overlap the one before.
template <int count, class From, class To>
FASTFLOW_HD void copy_blocks(const From* from, To* to, int64_t n) {
  int64_t i = 0;
  for (; i + count < n; i += count) copy_block<count>(from + i, to + i);
  copy_block<count>(from + n - count, to + n - count);
}

// n elements, conversions included; strides count elements.
template <class From, class To>
FASTFLOW_HD void copy_run(const From* from, int64_t from_stride, To* to, int64_t to_stride, int64_t n) {
  if (from_stride == 1 && to_stride == 1 && n >= 16) {
    copy_blocks<16>(from, to, n);
  } else if (from_stride == 0 && to_stride == 1) {
    const To value = convert(*from, static_cast<To*>(nullptr));
    for (int64_t i = 0; i < n; ++i) to[i] = value;
  } else if (from_stride == 2 && to_stride == 1) {
    // The last element apart: reading in pairs must not pass the end of the storage.
#pragma omp simd
    for (int64_t i = 0; i < n - 1; ++i) to[i] = convert(from[2 * i], static_cast<To*>(nullptr));
    to[n - 1] = convert(from[2 * (n - 1)], static_cast<To*>(nullptr));
  } else {
    for (int64_t i = 0; i < n; ++i) to[i * to_stride] = convert(from[i * from_stride], static_cast<To*>(nullptr));
  }
}

// Runs one after the other, `from_row` and `to_row` apart. Short ones are common (the channels of a channels_last
// tensor), so those take two blocks each.
template <class From, class To>
FASTFLOW_HD void copy_rows(const From* from, int64_t from_stride, int64_t from_row, To* to, int64_t to_stride,
                           int64_t to_row, int64_t length, int64_t rows) {
  const bool contiguous = from_stride == 1 && to_stride == 1;
  if (contiguous && length >= 8 && length < 16) {
    for (int64_t i = 0; i < rows; ++i, from += from_row, to += to_row) copy_blocks<8>(from, to, length);
  } else if (contiguous && length >= 4 && length < 8) {
    for (int64_t i = 0; i < rows; ++i, from += from_row, to += to_row) copy_blocks<4>(from, to, length);
  } else {
    for (int64_t i = 0; i < rows; ++i, from += from_row, to += to_row)
      copy_run(from, from_stride, to, to_stride, length);
  }
}

// A position in an operand, moving forward in the order of traversal. T is the compute type.
template <class T>
struct Cursor {
  const Operand* operand;
  int64_t offset;    // of the current innermost run, in elements
  int64_t position;  // within that run
  int64_t index[Operand::max_rank];

  bool present() const { return operand->data != nullptr; }

  void seek(const Operand& o, int64_t element) {
    operand = &o;
    offset = position = 0;
    if (!present() || o.rank == 0) return;
    const int last = o.rank - 1;
    int64_t rest = element / o.size[last];
    position = element - rest * o.size[last];
    for (int d = last - 1; d >= 0; --d) {
      const int64_t quotient = rest / o.size[d];
      index[d] = rest - quotient * o.size[d];
      offset += index[d] * o.stride[d];
      rest = quotient;
    }
  }

  // The next n elements: in place if they lie there as contiguous T, else copied to buffer.
  const T* read(int64_t n, T* buffer) {
    if (T* direct = in_place(n)) return direct;
    return with_element(operand->element, [&](auto* type) { return read_as(type, n, buffer); });
  }

  // Where the next n elements may be written directly, moving past them; else null, without moving.
  T* in_place(int64_t n) {
    const Operand& o = *operand;
    if (o.element != (sizeof(T) == 8 ? Element::float64 : Element::float32)) return nullptr;
    const int last = o.rank - 1;
    if (last >= 0 && (o.stride[last] != 1 || position + n > o.size[last])) return nullptr;
    T* result = static_cast<T*>(o.data) + offset + position;
    skip(n);
    return result;
  }

  // Writes the next n elements from values.
  void write(int64_t n, const T* values) {
    with_element(operand->element, [&](auto* type) { write_as(type, n, values); });
  }

  // Past n elements within the current run, going to the next at its end.
  void skip(int64_t n) {
    const Operand& o = *operand;
    position += n;
    if (o.rank == 0 || position < o.size[o.rank - 1]) return;
    position = 0;
    next_runs(1);
  }

 private:
  // To the start of a later run, all before it within the same index of the third last dimension.
  void next_runs(int64_t count) {
    const Operand& o = *operand;
    for (int d = o.rank - 2; d >= 0; --d, count = 1) {
      offset += count * o.stride[d];
      index[d] += count;
      if (index[d] < o.size[d]) return;
      offset -= o.stride[d] * o.size[d];
      index[d] = 0;
    }
  }

  // f(first element, stride, distance of runs, elements done before, elements of each, runs) for the next n.
  template <class F>
  void each_run(int64_t n, const F& f) {
    const Operand& o = *operand;
    const int last = o.rank - 1;
    const int64_t length = last >= 0 ? o.size[last] : 1, stride = last >= 0 ? o.stride[last] : 1;
    for (int64_t done = 0; done < n;) {
      const int64_t left = n - done;
      if (last > 0 && position == 0 && left >= length) {
        const int64_t whole = left / length, room = o.size[last - 1] - index[last - 1];
        const int64_t runs = whole < room ? whole : room;
        f(offset, stride, o.stride[last - 1], done, length, runs);
        done += runs * length;
        next_runs(runs);
      } else {
        const int64_t room = length - position, count = left < room ? left : room;
        f(offset + position * stride, stride, int64_t(0), done, count, int64_t(1));
        done += count;
        skip(count);
      }
    }
  }

  template <class From>
  const T* read_as(From*, int64_t n, T* buffer) {
    const From* data = static_cast<const From*>(operand->data);
    each_run(n, [&](int64_t at, int64_t stride, int64_t row, int64_t done, int64_t length, int64_t runs) {
      copy_rows(data + at, stride, row, buffer + done, 1, length, length, runs);
    });
    return buffer;
  }

  template <class To>
  void write_as(To*, int64_t n, const T* values) {
    To* data = static_cast<To*>(operand->data);
    each_run(n, [&](int64_t at, int64_t stride, int64_t row, int64_t done, int64_t length, int64_t runs) {
      copy_rows(values + done, 1, length, data + at, stride, row, length, runs);
    });
  }
};

// Element i of a vector operand.
template <class T>
T element(const Operand& o, int64_t i) {
  const int64_t at = o.rank > 0 ? i * o.stride[0] : 0;
  return with_element(o.element, [&](auto* type) {
    return convert(static_cast<decltype(type)>(o.data)[at], static_cast<T*>(nullptr));
  });
}

}  // namespace
}  // namespace fastflow::FASTFLOW_ISA
