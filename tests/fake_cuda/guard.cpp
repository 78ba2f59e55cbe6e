// What autograd, copies and attention ask of CUDA, for a CPU build of torch: a device guard and hooks
// that do nothing, and the choice of the attention kernel. No kernel, no memory, no device: it is
// enough for fake tensors. To be loaded before torch is imported, which looks for the hooks but once.
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/SDPBackend.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace c10::impl {
struct FakeGuard : NoOpDeviceGuardImpl<DeviceType::CUDA> {
  static Stream stream() { return Stream(Stream::DEFAULT, Device(DeviceType::CUDA, 0)); }
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  Device exchangeDevice(Device) const override { return getDevice(); }
  Stream getStream(Device) const noexcept override { return stream(); }
  Stream getDefaultStream(Device) const override { return stream(); }
  Stream exchangeStream(Stream) const noexcept override { return stream(); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void recordDataPtrOnStream(const DataPtr&, const Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, FakeGuard)
}  // namespace c10::impl

namespace at {
struct CUDAHooks : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, CUDAHooks)
}  // namespace at

namespace at::native {
// As sdp_utils.cpp of torch's CUDA build chooses on an A100: flash takes no mask and no float32, the
// memory-efficient kernel no grouped queries; what neither takes goes to the math kernel.
int64_t choose(const Tensor& query, const Tensor& key, const Tensor&,
               const std::optional<Tensor>& mask, double, bool, std::optional<double>, bool) {
  bool is_half = query.scalar_type() == kHalf || query.scalar_type() == kBFloat16;
  bool is_grouped = query.size(1) != key.size(1);
  auto choice = is_half && !mask ? SDPBackend::flash_attention
                : is_grouped     ? SDPBackend::math
                                 : SDPBackend::efficient_attention;
  return static_cast<int64_t>(choice);
}
REGISTER_CUDA_DISPATCH(_fused_sdp_choice_stub, &choose)
}  // namespace at::native
