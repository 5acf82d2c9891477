// Virtual memory of a device: ranges of addresses that stay, and physical memory under them that comes and goes, so that
// what holds an address (a captured graph) outlives what lay there. The driver's own functions, asked for at run time:
// this library loads where there is no driver.
#include <cuda.h>
#include <cudaTypedefs.h>

#include "errors.h"
#include "medley.h"

namespace {

constexpr unsigned kSince = 10020;  // the CUDA version whose signatures are meant

struct Driver {
  PFN_cuGetErrorString_v6000 error_string = nullptr;
  PFN_cuDeviceGetAttribute_v2000 attribute = nullptr;
  PFN_cuMemGetAllocationGranularity_v10020 granularity = nullptr;
  PFN_cuMemAddressReserve_v10020 reserve = nullptr;
  PFN_cuMemAddressFree_v10020 free = nullptr;
  PFN_cuMemCreate_v10020 create = nullptr;
  PFN_cuMemRelease_v10020 release = nullptr;
  PFN_cuMemMap_v10020 map = nullptr;
  PFN_cuMemUnmap_v10020 unmap = nullptr;
  PFN_cuMemSetAccess_v10020 set_access = nullptr;
  bool is_whole = false;
};

template <typename Function>
bool look_up(const char* name, unsigned since, Function* function) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult status = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t code =
      cudaGetDriverEntryPointByVersion(name, &found, since, cudaEnableDefault, &status);
  if (code != cudaSuccess) cudaGetLastError();  // not to be found by the next launch's check
  *function = reinterpret_cast<Function>(found);
  return code == cudaSuccess && status == cudaDriverEntryPointSuccess && found;
}

Driver look_up_all() {
  Driver all;
  all.is_whole = look_up("cuGetErrorString", 6000, &all.error_string) &&
                 look_up("cuDeviceGetAttribute", 2000, &all.attribute) &&
                 look_up("cuMemGetAllocationGranularity", kSince, &all.granularity) &&
                 look_up("cuMemAddressReserve", kSince, &all.reserve) &&
                 look_up("cuMemAddressFree", kSince, &all.free) && look_up("cuMemCreate", kSince, &all.create) &&
                 look_up("cuMemRelease", kSince, &all.release) && look_up("cuMemMap", kSince, &all.map) &&
                 look_up("cuMemUnmap", kSince, &all.unmap) && look_up("cuMemSetAccess", kSince, &all.set_access);
  return all;
}

const Driver& driver() {
  static const Driver found = look_up_all();
  return found;
}

int refuse_absent(char* error, int64_t bytes) {
  return medley::refuse(error, bytes, "the CUDA driver has no virtual memory functions; wanted CUDA 11 or later");
}

int check(CUresult code, const char* what, int64_t wanted, char* error, int64_t bytes) {
  if (code == CUDA_SUCCESS) return 0;
  const char* text = nullptr;
  if (driver().error_string(code, &text) != CUDA_SUCCESS || !text) text = "an unknown error";
  snprintf(error, bytes, "%s of %lld bytes: %s", what, static_cast<long long>(wanted), text);
  return static_cast<int>(code);
}

CUmemAllocationProp on_device(int device) {
  CUmemAllocationProp prop = {};
  prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  prop.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  prop.location.id = device;
  return prop;
}

}  // namespace

extern "C" {

int medley_memory_granularity(int32_t device, int64_t* granularity, char* error, int64_t bytes) {
  *granularity = 0;
  const Driver& cu = driver();
  if (!cu.is_whole) return 0;
  int is_supported = 0;
  if (const int code = check(
          cu.attribute(&is_supported, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, device),
          "a question about the virtual memory", 0, error, bytes))
    return code;
  if (!is_supported) return 0;
  const CUmemAllocationProp prop = on_device(device);
  size_t found = 0;
  if (const int code = check(cu.granularity(&found, &prop, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
                             "the granularity", 0, error, bytes))
    return code;
  *granularity = static_cast<int64_t>(found);
  return 0;
}

int medley_memory_reserve(int64_t size, uint64_t* address, char* error, int64_t bytes) {
  const Driver& cu = driver();
  if (!cu.is_whole) return refuse_absent(error, bytes);
  CUdeviceptr found = 0;
  const int code = check(cu.reserve(&found, static_cast<size_t>(size), 0, 0, 0), "addresses", size, error, bytes);
  *address = code ? 0 : static_cast<uint64_t>(found);
  return code;
}

int medley_memory_release(uint64_t address, int64_t size, char* error, int64_t bytes) {
  const Driver& cu = driver();
  if (!cu.is_whole) return refuse_absent(error, bytes);
  return check(cu.free(static_cast<CUdeviceptr>(address), static_cast<size_t>(size)), "the end of addresses", size,
               error, bytes);
}

int medley_memory_map(int32_t device, uint64_t address, int64_t size, uint64_t* handle, char* error, int64_t bytes) {
  const Driver& cu = driver();
  if (!cu.is_whole) return refuse_absent(error, bytes);
  const CUmemAllocationProp prop = on_device(device);
  const CUdeviceptr at = static_cast<CUdeviceptr>(address);
  const size_t length = static_cast<size_t>(size);
  CUmemGenericAllocationHandle made = 0;
  *handle = 0;
  if (const int code = check(cu.create(&made, length, &prop, 0), "memory", size, error, bytes)) return code;
  if (const int code = check(cu.map(at, length, 0, made, 0), "a mapping", size, error, bytes)) {
    cu.release(made);
    return code;
  }
  CUmemAccessDesc access = {};
  access.location = prop.location;
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  if (const int code = check(cu.set_access(at, length, &access, 1), "access", size, error, bytes)) {
    cu.unmap(at, length);
    cu.release(made);
    return code;
  }
  *handle = static_cast<uint64_t>(made);
  return 0;
}

int medley_memory_unmap(uint64_t address, int64_t size, uint64_t handle, char* error, int64_t bytes) {
  const Driver& cu = driver();
  if (!cu.is_whole) return refuse_absent(error, bytes);
  if (const int code = check(cu.unmap(static_cast<CUdeviceptr>(address), static_cast<size_t>(size)),
                             "the end of a mapping", size, error, bytes))
    return code;
  return check(cu.release(static_cast<CUmemGenericAllocationHandle>(handle)), "the end of memory", size, error,
               bytes);
}

}  // extern "C"
