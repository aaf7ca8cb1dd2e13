// A CUDA runtime whose device memory is host memory, loaded before torch's own (LD_PRELOAD): see __init__.py.
//
// Memory, streams and events are torch's to use unchanged; a kernel that torch itself would launch is refused and
// counted, because device.py runs each operation on the CPU. Environment, besides that of streams.h:
//   SIMULATED_CUDA_MIB           device memory (4096)
//   SIMULATED_CUDA_LOCKED_MIB    page-locked host memory at most (no limit)
//   SIMULATED_CUDA_DEVICES       how many devices there are (1); they share memory and streams
//   SIMULATED_CUDA_FAIL_MALLOC   the number of the cudaMalloc, from 1, that fails for want of memory
#include "streams.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <string>

using simulated::Event;
using simulated::Locked;
using simulated::Queue;
using simulated::Task;
using simulated::device_lock;

namespace {

struct Block {
  size_t size;
  int device;
};

std::map<char*, Block>& device_blocks = *new std::map<char*, Block>;
std::map<char*, Block>& locked_blocks = *new std::map<char*, Block>;
size_t device_bytes = 0;
size_t locked_bytes = 0;
size_t failing_mallocs = 0;
thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;

struct Counters {
  size_t device_peak = 0;
  size_t locked_peak = 0;
  size_t kernels = 0;
  size_t mallocs = 0;
  size_t frees = 0;
  size_t syncs = 0;  // the host waited for an event, a stream or the device
};
Counters counters;

size_t device_limit() {
  static const size_t bytes = simulated::number_from("SIMULATED_CUDA_MIB", 4096) << 20;
  return bytes;
}

size_t locked_limit() {
  static const size_t bytes = simulated::number_from("SIMULATED_CUDA_LOCKED_MIB", size_t(1) << 40) << 20;
  return bytes;
}

int device_count() {
  static const int count = int(simulated::number_from("SIMULATED_CUDA_DEVICES", 1));
  return count;
}

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

const Block* find_block(const std::map<char*, Block>& blocks, const void* pointer) {
  char* place = const_cast<char*>(static_cast<const char*>(pointer));
  auto after = blocks.upper_bound(place);
  if (after == blocks.begin()) return nullptr;
  --after;
  return place < after->first + after->second.size ? &after->second : nullptr;
}

bool is_pageable(const void* pointer) {
  return find_block(device_blocks, pointer) == nullptr && find_block(locked_blocks, pointer) == nullptr;
}

void* new_pages(size_t size) {
  void* pages = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return pages == MAP_FAILED ? nullptr : pages;
}

size_t whole_pages(size_t size) {
  return (std::max<size_t>(size, 1) + 4095) / 4096 * 4096;
}

void wait_for_all() {
  counters.syncs++;
  simulated::finish_all();
}

void lock_pages(void* memory, size_t size) {
  locked_blocks[static_cast<char*>(memory)] = {size, current_device};
  locked_bytes += size;
  counters.locked_peak = std::max(counters.locked_peak, locked_bytes);
}

bool unlock_pages(void* memory) {
  auto found = locked_blocks.find(static_cast<char*>(memory));
  if (found == locked_blocks.end()) return false;
  locked_bytes -= found->second.size;
  locked_blocks.erase(found);
  return true;
}

cudaError_t copy(void* to, const void* from, size_t size, cudaStream_t stream) {
  Locked locked(device_lock);
  Queue& queue = simulated::queue_of(stream);
  if (is_pageable(to) || is_pageable(from)) {  // the driver returns once such memory was read or written
    simulated::finish(queue);
    std::memmove(to, from, size);
    return cudaSuccess;
  }
  Task task(Task::Kind::copy);
  task.to = static_cast<char*>(to);
  task.from = static_cast<const char*>(from);
  task.size = size;
  simulated::issue(queue, std::move(task));
  return cudaSuccess;
}

cudaError_t copy_now(void* to, const void* from, size_t size) {
  Locked locked(device_lock);
  counters.syncs++;
  simulated::finish(simulated::computing);
  std::memmove(to, from, size);
  return cudaSuccess;
}

cudaError_t fill(void* memory, int value, size_t size, cudaStream_t stream) {
  Locked locked(device_lock);
  Task task(Task::Kind::fill);
  task.to = static_cast<char*>(memory);
  task.value = value;
  task.size = size;
  simulated::issue(simulated::queue_of(stream), std::move(task));
  return cudaSuccess;
}

cudaError_t new_stream(cudaStream_t* stream) {
  Locked locked(device_lock);
  auto* queue = new Queue;
  simulated::side_streams.insert(queue);
  *stream = reinterpret_cast<cudaStream_t>(queue);
  return cudaSuccess;
}

Event& event_of(cudaEvent_t event) {
  return *reinterpret_cast<Event*>(event);
}

cudaError_t new_event(cudaEvent_t* event) {
  *event = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}

cudaError_t refused_kernel() {
  Locked locked(device_lock);
  counters.kernels++;
  return result(cudaErrorNotSupported);
}

size_t bytes_to_copy() {
  size_t bytes = 0;
  auto add = [&bytes](const Queue& queue) {
    for (const Task& task : queue.tasks) bytes += task.kind == Task::Kind::copy ? task.size : 0;
  };
  add(simulated::computing);
  for (const Queue* queue : simulated::side_streams) add(*queue);
  return bytes;
}

}  // namespace

extern "C" {

// ------------------------------------------------------------------------------------------------- for device.py

void simulated_begin_kernel(cudaStream_t stream) {
  Locked locked(device_lock);
  simulated::begin_kernel(simulated::queue_of(stream));
}

void* simulated_operand(cudaStream_t stream, void* memory, size_t size) {
  Locked locked(device_lock);
  return simulated::is_computing(stream) ? simulated::operand(static_cast<char*>(memory), size) : memory;
}

void simulated_write(cudaStream_t stream, void* to, const void* from, size_t size) {
  Locked locked(device_lock);
  simulated::write_result(simulated::queue_of(stream), static_cast<char*>(to), static_cast<const char*>(from), size);
}

// The next `count` calls of cudaMalloc fail for want of memory; torch tries thrice before it says so.
void simulated_fail_mallocs(size_t count) {
  Locked locked(device_lock);
  failing_mallocs = count;
}

size_t simulated_counter(const char* name) {
  Locked locked(device_lock);
  const std::map<std::string, size_t> values = {
      {"device_bytes", device_bytes},
      {"device_peak", counters.device_peak},
      {"locked_bytes", locked_bytes},
      {"locked_peak", counters.locked_peak},
      {"pending_bytes", bytes_to_copy()},
      {"kernels", counters.kernels},
      {"mallocs", counters.mallocs},
      {"frees", counters.frees},
      {"syncs", counters.syncs},
  };
  auto found = values.find(name);
  return found == values.end() ? size_t(-1) : found->second;
}

void simulated_reset_counters() {
  Locked locked(device_lock);
  counters = Counters{device_bytes, locked_bytes};
}

// ------------------------------------------------------------------------------------------------------- devices

cudaError_t cudaGetDeviceCount(int* count) {
  *count = device_count();
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= device_count()) return result(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* found, int) {
  std::memset(found, 0, sizeof *found);
  std::strcpy(found->name, "Simulated CUDA device");
  found->totalGlobalMem = device_limit();
  found->major = 9;
  found->minor = 0;
  found->multiProcessorCount = 16;
  found->warpSize = 32;
  found->maxThreadsPerBlock = 1024;
  found->maxThreadsPerMultiProcessor = 2048;
  found->sharedMemPerBlock = 49152;
  found->regsPerBlock = 65536;
  found->l2CacheSize = 1 << 22;
  found->unifiedAddressing = 1;
  for (int axis = 0; axis < 3; axis++) {
    found->maxThreadsDim[axis] = 1024;
    found->maxGridSize[axis] = axis == 0 ? 2147483647 : 65535;
  }
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = 16;
      break;
    default:
      *value = 1024;
  }
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least != nullptr) *least = 0;
  if (greatest != nullptr) *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) {
  return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char* name, int size, int device) {
  std::snprintf(name, size, "0000:%02x:00.0", device);
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
  Locked locked(device_lock);
  wait_for_all();
  return cudaSuccess;
}

// -------------------------------------------------------------------------------------------------------- errors

cudaError_t cudaGetLastError() {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError() {
  return last_error;
}

const char* cudaGetErrorName(cudaError_t error) {
  if (error == cudaSuccess) return "cudaSuccess";
  return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaError of the simulated device";
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorNotReady:
      return "device not ready";
    case cudaErrorNotSupported:
      return "a kernel was launched on the simulated device";
    default:
      return "an error of the simulated device";
  }
}

// -------------------------------------------------------------------------------------------------------- memory

cudaError_t cudaMalloc(void** pointer, size_t size) {
  static const size_t failing = simulated::number_from("SIMULATED_CUDA_FAIL_MALLOC", 0);
  static size_t calls = 0;
  Locked locked(device_lock);
  if (++calls == failing) failing_mallocs = 1;
  if (failing_mallocs > 0) {
    failing_mallocs--;
    return result(cudaErrorMemoryAllocation);
  }
  if (device_bytes + size > device_limit()) return result(cudaErrorMemoryAllocation);
  const size_t rounded = whole_pages(size);
  void* memory = new_pages(rounded);
  if (memory == nullptr) return result(cudaErrorMemoryAllocation);
  std::memset(memory, 0xFF, rounded);  // NaN, in every floating-point format
  device_blocks[static_cast<char*>(memory)] = {rounded, current_device};
  device_bytes += rounded;
  counters.mallocs++;
  counters.device_peak = std::max(counters.device_peak, device_bytes);
  *pointer = memory;
  return cudaSuccess;
}

cudaError_t cudaFree(void* memory) {
  Locked locked(device_lock);
  if (memory == nullptr) return cudaSuccess;
  auto found = device_blocks.find(static_cast<char*>(memory));
  if (found == device_blocks.end()) return result(cudaErrorInvalidValue);
  wait_for_all();
  device_bytes -= found->second.size;
  counters.frees++;
  munmap(memory, found->second.size);
  device_blocks.erase(found);
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
  Locked locked(device_lock);
  *total_bytes = device_limit();
  *free_bytes = device_limit() - std::min(device_limit(), device_bytes);
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** pointer, size_t size, unsigned) {
  Locked locked(device_lock);
  if (locked_bytes + size > locked_limit()) return result(cudaErrorMemoryAllocation);
  void* memory = new_pages(whole_pages(size));
  if (memory == nullptr) return result(cudaErrorMemoryAllocation);
  lock_pages(memory, size);
  *pointer = memory;
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void* memory) {
  Locked locked(device_lock);
  const Block* block = find_block(locked_blocks, memory);
  if (block == nullptr) return result(cudaErrorInvalidValue);
  const size_t size = whole_pages(block->size);
  wait_for_all();
  unlock_pages(memory);
  munmap(memory, size);
  return cudaSuccess;
}

cudaError_t cudaHostRegister(void* memory, size_t size, unsigned) {
  Locked locked(device_lock);
  if (find_block(locked_blocks, memory) != nullptr) return result(cudaErrorHostMemoryAlreadyRegistered);
  if (locked_bytes + size > locked_limit()) return result(cudaErrorMemoryAllocation);
  lock_pages(memory, size);
  return cudaSuccess;
}

cudaError_t cudaHostUnregister(void* memory) {
  Locked locked(device_lock);
  wait_for_all();
  return unlock_pages(memory) ? cudaSuccess : result(cudaErrorHostMemoryNotRegistered);
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* pointer) {
  Locked locked(device_lock);
  std::memset(found, 0, sizeof *found);
  const Block* on_device = find_block(device_blocks, pointer);
  const Block* page_locked = find_block(locked_blocks, pointer);
  found->type = cudaMemoryTypeUnregistered;
  if (on_device != nullptr) found->type = cudaMemoryTypeDevice;
  if (page_locked != nullptr) found->type = cudaMemoryTypeHost;
  if (on_device != nullptr) found->device = on_device->device;
  found->devicePointer = found->hostPointer = const_cast<void*>(pointer);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t stream) {
  return copy(to, from, size, stream);
}

cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t size, cudaStream_t stream) {
  return copy(to, from, size, stream);
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
  return copy_now(to, from, size);
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t size, cudaStream_t stream) {
  return fill(memory, value, size, stream);
}

cudaError_t cudaMemset(void* memory, int value, size_t size) {
  return fill(memory, value, size, nullptr);
}

// ----------------------------------------------------------------------------------------------- streams, events

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return new_stream(stream);
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return new_stream(stream);
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  return new_stream(stream);
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  Locked locked(device_lock);
  if (simulated::is_computing(stream)) return cudaSuccess;
  Queue* queue = &simulated::queue_of(stream);
  simulated::finish(*queue);
  simulated::side_streams.erase(queue);
  delete queue;
  return cudaSuccess;
}

cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
  *priority = 0;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  Locked locked(device_lock);
  counters.syncs++;
  simulated::finish(simulated::queue_of(stream));
  return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
  Locked locked(device_lock);
  return simulated::queue_of(stream).tasks.empty() ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  Locked locked(device_lock);
  Task task(Task::Kind::wait);
  task.event = event_of(event);
  simulated::issue(simulated::queue_of(stream), std::move(task));
  return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* argument) {
  Locked locked(device_lock);
  Task task(Task::Kind::call);
  task.function = function;
  task.argument = argument;
  simulated::issue(simulated::queue_of(stream), std::move(task));
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** dependencies,
                                     const cudaGraphEdgeData** edges, size_t* count) {
  *status = cudaStreamCaptureStatusNone;
  if (id != nullptr) *id = 0;
  if (graph != nullptr) *graph = nullptr;
  if (dependencies != nullptr) *dependencies = nullptr;
  if (edges != nullptr) *edges = nullptr;
  if (count != nullptr) *count = 0;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) {
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* event) {
  return new_event(event);
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return new_event(event);
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete &event_of(event);
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  Locked locked(device_lock);
  Queue& queue = simulated::queue_of(stream);
  event_of(event) = {&queue, simulated::issue(queue, Task(Task::Kind::mark))};
  return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  constexpr size_t patience = 10000;  // queries, after which somebody is taken to wait in a loop
  Locked locked(device_lock);
  if (++event_of(event).queries > patience) simulated::finish(event_of(event));
  return simulated::is_done(event_of(event)) ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  Locked locked(device_lock);
  counters.syncs++;
  simulated::finish(event_of(event));
  return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  *milliseconds = 1;
  return cudaSuccess;
}

// ------------------------------------------------------------------------------------------------------- kernels

cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) {
  return refused_kernel();
}

cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
  return refused_kernel();
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**) {
  return refused_kernel();
}

unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) {
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) {
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
  std::memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024;
  found->binaryVersion = 90;
  found->ptxVersion = 90;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  *blocks = 8;
  return cudaSuccess;
}

// ------------------------------------------------- the driver's functions that torch's libcaffe2_nvrtc.so is linked to

int cuInit(unsigned) {
  return 0;
}

int cuDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return 0;
}

int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return 0;
}

int cuDeviceGetAttribute(int* value, int, int) {
  *value = 1;
  return 0;
}

int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return 0;
}

int cuDevicePrimaryCtxRetain(void** context, int) {
  *context = reinterpret_cast<void*>(1);
  return 0;
}

int cuCtxGetCurrent(void** context) {
  *context = reinterpret_cast<void*>(1);
  return 0;
}

int cuCtxSetCurrent(void*) {
  return 0;
}

int cuPointerGetAttribute(void* data, int, unsigned long) {
  *static_cast<int*>(data) = 0;
  return 0;
}

int cuGetErrorString(int, const char** text) {
  *text = "an error of the simulated driver";
  return 0;
}

#define SIMULATED_REFUSE(name)                                    \
  int name() {                                                    \
    std::fprintf(stderr, "simulated driver: " #name " called\n"); \
    return 801; /* CUDA_ERROR_NOT_SUPPORTED */                    \
  }
SIMULATED_REFUSE(cuFuncGetAttribute)
SIMULATED_REFUSE(cuFuncSetAttribute)
SIMULATED_REFUSE(cuFuncSetCacheConfig)
SIMULATED_REFUSE(cuLaunchCooperativeKernel)
SIMULATED_REFUSE(cuLaunchKernel)
SIMULATED_REFUSE(cuLinkAddData_v2)
SIMULATED_REFUSE(cuLinkComplete)
SIMULATED_REFUSE(cuLinkCreate_v2)
SIMULATED_REFUSE(cuModuleGetFunction)
SIMULATED_REFUSE(cuModuleLoad)
SIMULATED_REFUSE(cuModuleLoadData)
SIMULATED_REFUSE(cuModuleLoadDataEx)
SIMULATED_REFUSE(cuModuleUnload)
SIMULATED_REFUSE(cuOccupancyMaxActiveBlocksPerMultiprocessor)
SIMULATED_REFUSE(cuTensorMapEncodeTiled)

}  // extern "C"
