// Launch of the 4-bit GEMV: one instance per dtype, padded M, and with or without offsets.
#include "quant_linear.cuh"

namespace tilewright::cuda {
namespace {

template <typename T, int M>
void launch(const Int4Gemv& a, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>((a.N + ROWS<M> - 1) / ROWS<M>);
  if (a.offset != nullptr)
    int4_gemv_kernel<T, M, true><<<blocks, WARPS * 32, 0, stream>>>(a);
  else
    int4_gemv_kernel<T, M, false><<<blocks, WARPS * 32, 0, stream>>>(a);
}

template <typename T>
void launch_rows(const Int4Gemv& a, cudaStream_t stream) {
  if (a.M == 1)
    launch<T, 1>(a, stream);
  else if (a.M <= 4)
    launch<T, 4>(a, stream);
  else
    launch<T, 8>(a, stream);
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace
}  // namespace tilewright::cuda

extern "C" cudaError_t tilewright_int4_gemv(const tilewright::cuda::Int4Gemv& a, cudaStream_t stream) {
  using namespace tilewright::cuda;
  const int64_t per16 = a.kind == Float::F32 ? 4 : 8;
  if (a.M < 1 || a.M > INT4_GEMV_ROWS || a.N < 1 || a.K % 32 || a.group < 1 || a.group % 32 ||
      a.K != a.group * a.G || a.stride_xm % per16 || !aligned(a.x) || !aligned(a.qweight))
    return cudaErrorInvalidValue;
  switch (a.kind) {
    case Float::F32: launch_rows<float>(a, stream); break;
    case Float::BF16: launch_rows<__nv_bfloat16>(a, stream); break;
    case Float::F16: launch_rows<__half>(a, stream); break;
    default: return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}
