#include "device.h"

#include <cuda_runtime_api.h>

namespace vf {

int cuda_devices(int* count) { return cudaGetDeviceCount(count); }

std::string cuda_message(int error) {
  const auto code = static_cast<cudaError_t>(error);
  std::string text = std::string("CUDA: ") + cudaGetErrorString(code) + ". ";
  switch (code) {
    case cudaErrorInsufficientDriver:
      return text +
             "There is no NVIDIA driver, or one older than this build needs: install or update it, or use another backend.";
    case cudaErrorNoDevice: return text + "No GPU is visible: check nvidia-smi and CUDA_VISIBLE_DEVICES.";
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion:
      return text +
             "This build has no code for this GPU: rebuild with VILT_FAST_CUDA_ARCHS set to its compute capability, e.g. \"90\".";
    default: return text + "Set CUDA_LAUNCH_BLOCKING=1 to find the call.";
  }
}

}  // namespace vf
