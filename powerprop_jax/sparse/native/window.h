// How the kernel of a convolution moves over an image.

#ifndef POWERPROP_JAX_SPARSE_NATIVE_WINDOW_H_
#define POWERPROP_JAX_SPARSE_NATIVE_WINDOW_H_

#include <cstdint>

#include "xla/ffi/api/ffi.h"

namespace powerprop {

// The rows above an image and the columns to its left are padding; the kernel
// stops at out_height times out_width places.
struct Window {
  int64_t kernel_height, kernel_width, stride, top, left;
  int64_t out_height, out_width;
};

}  // namespace powerprop

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    powerprop::Window, xla::ffi::StructMember<int64_t>("kernel_height"),
    xla::ffi::StructMember<int64_t>("kernel_width"),
    xla::ffi::StructMember<int64_t>("stride"),
    xla::ffi::StructMember<int64_t>("top"),
    xla::ffi::StructMember<int64_t>("left"),
    xla::ffi::StructMember<int64_t>("out_height"),
    xla::ffi::StructMember<int64_t>("out_width"));

#endif  // POWERPROP_JAX_SPARSE_NATIVE_WINDOW_H_
