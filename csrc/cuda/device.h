// The CUDA runtime as the module sees it. A cudaError_t is an int here, 0 is success.
#pragma once
#include <string>

namespace vf {

int cuda_devices(int* count);
std::string cuda_message(int error);  // a sentence that says what to do

}  // namespace vf
