// A simulated accelerator, for where there is none: torch's own device "sim", through the interface that backends have.
//
// What it is true to: the CPU cannot touch its memory (a fault ends the process); copies run in streams, later and in
// order, and are read and written with no regard for who has given the memory back meanwhile; memory goes back to the
// allocator at once, unless a stream was recorded on it; a copy to or from pageable memory of the host waits, one of
// pinned memory does not. What it is not: every other operation waits for its stream and is done on the CPU.

#include <ATen/ATen.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/EmptyTensor.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <thread>

namespace {

constexpr int kDevices = 2;
constexpr size_t kArena = size_t(16) << 30;  // of addresses; memory is taken as it is touched
constexpr auto kSim = c10::DeviceType::PrivateUse1;

// ------------------------------------------------------------------------------------------------ streams

class Queue {
 public:
  Queue() : thread_([this] { run(); }) { thread_.detach(); }

  void tell(std::function<void()> work) {
    std::lock_guard<std::mutex> lock(mutex_);
    work_.push_back(std::move(work));
    changed_.notify_all();
  }
  bool idle() {
    std::lock_guard<std::mutex> lock(mutex_);
    return work_.empty() && !busy_;
  }
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return work_.empty() && !busy_; });
  }

 private:
  void run() {
    for (;;) {
      std::function<void()> work;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [this] { return !work_.empty(); });
        work = std::move(work_.front());
        work_.pop_front();
        busy_ = true;
      }
      work();
      std::lock_guard<std::mutex> lock(mutex_);
      busy_ = false;
      changed_.notify_all();
    }
  }
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> work_;
  bool busy_ = false;
  std::thread thread_;
};

std::mutex queues_mutex;
std::vector<Queue*> queues[kDevices];  // by the stream's id; 0 is the default one
thread_local int current_device = 0;
thread_local c10::StreamId current_stream[kDevices] = {};

Queue& queue_of(int device, c10::StreamId id) {
  std::lock_guard<std::mutex> lock(queues_mutex);
  auto& all = queues[device];
  while (static_cast<c10::StreamId>(all.size()) <= id) all.push_back(new Queue());
  return *all[id];
}
Queue& queue_of(const c10::Stream& stream) { return queue_of(stream.device_index(), stream.id()); }
Queue& current_queue(int device) { return queue_of(device, current_stream[device]); }

void synchronize(int device) {
  std::vector<Queue*> all;
  {
    std::lock_guard<std::mutex> lock(queues_mutex);
    all = queues[device];
  }
  for (auto* queue : all) queue->wait();
}

struct Event {
  std::mutex mutex;
  std::condition_variable changed;
  int recorded = 0, reached = 0;
};

// ------------------------------------------------------------------------------------------------- memory

struct Arena {
  char* device = nullptr;  // what is given out: nothing may touch it
  char* host = nullptr;    // the same memory, for the device's own work
  std::mutex mutex;
  std::map<size_t, size_t> free;                            // offset, bytes
  std::map<size_t, size_t> taken;                           // offset, bytes
  std::map<size_t, std::set<c10::StreamId>> recorded;       // streams that still use it
  size_t allocated = 0, peak = 0;

  void open() {
    if (device) return;
    int file = memfd_create("sim", 0);
    TORCH_CHECK(file >= 0 && ftruncate(file, kArena) == 0, "no memory for the simulated device");
    device = static_cast<char*>(mmap(nullptr, kArena, PROT_NONE, MAP_SHARED | MAP_NORESERVE, file, 0));
    host = static_cast<char*>(mmap(nullptr, kArena, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file, 0));
    close(file);
    TORCH_CHECK(device != MAP_FAILED && host != MAP_FAILED, "no addresses for the simulated device");
    free[0] = kArena;
  }
  void* take(size_t nbytes) {
    std::lock_guard<std::mutex> lock(mutex);
    open();
    nbytes = std::max<size_t>((nbytes + 511) / 512 * 512, 512);
    for (auto it = free.begin(); it != free.end(); ++it) {
      if (it->second < nbytes) continue;
      size_t offset = it->first, left = it->second - nbytes;
      free.erase(it);
      if (left) free[offset + nbytes] = left;
      taken[offset] = nbytes;
      allocated += nbytes;
      peak = std::max(peak, allocated);
      return device + offset;
    }
    TORCH_CHECK_WITH(OutOfMemoryError, false, "sim out of memory: ", nbytes, " bytes");
  }
  void give_back(size_t offset) {
    std::lock_guard<std::mutex> lock(mutex);
    auto it = taken.find(offset);
    free[offset] = it->second;
    allocated -= it->second;
    taken.erase(it);
  }
  bool holds(const void* pointer) const {
    return device && pointer >= device && pointer < device + kArena;
  }
};
Arena arenas[kDevices];

int device_of(const void* pointer) {
  for (int i = 0; i < kDevices; i++)
    if (arenas[i].holds(pointer)) return i;
  return -1;
}
// Where work on the device finds what is at a pointer.
void* reach(const void* pointer) {
  int i = device_of(pointer);
  return i < 0 ? const_cast<void*>(pointer)
               : arenas[i].host + (static_cast<const char*>(pointer) - arenas[i].device);
}

void release(void* pointer) {
  int i = device_of(pointer);
  if (i < 0) return;
  auto& arena = arenas[i];
  size_t offset = static_cast<char*>(pointer) - arena.device;
  std::set<c10::StreamId> streams;
  {
    std::lock_guard<std::mutex> lock(arena.mutex);
    auto it = arena.recorded.find(offset);
    if (it != arena.recorded.end()) {
      streams = it->second;
      arena.recorded.erase(it);
    }
  }
  if (streams.empty()) return arena.give_back(offset);
  auto left = std::make_shared<std::atomic<int>>(static_cast<int>(streams.size()));
  for (auto id : streams)
    queue_of(i, id).tell([&arena, offset, left] {
      if (--*left == 0) arena.give_back(offset);
    });
}

struct SimAllocator : c10::Allocator {
  c10::DataPtr allocate(size_t nbytes) override {
    c10::Device device(kSim, current_device);
    void* pointer = nbytes ? arenas[current_device].take(nbytes) : nullptr;
    return {pointer, pointer, &release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* target, const void* source, size_t nbytes) const override {
    memcpy(reach(target), reach(source), nbytes);
  }
} allocator;
REGISTER_ALLOCATOR(kSim, &allocator);

// Memory of the host that copies reach without waiting. It is not given back before those are over, as torch's own
// allocators see to.
struct Pinned {
  size_t nbytes;
  int copies = 0;
  bool released = false;
};
std::mutex pinned_mutex;
std::map<char*, Pinned> pinned;

std::map<char*, Pinned>::iterator find_pinned(const void* pointer) {
  auto it = pinned.upper_bound(static_cast<char*>(const_cast<void*>(pointer)));
  if (it == pinned.begin()) return pinned.end();
  --it;
  return static_cast<const char*>(pointer) < it->first + it->second.nbytes ? it : pinned.end();
}
bool is_pinned(const void* pointer) {
  std::lock_guard<std::mutex> lock(pinned_mutex);
  return find_pinned(pointer) != pinned.end();
}
void use_pinned(const void* pointer, int copies) {
  std::lock_guard<std::mutex> lock(pinned_mutex);
  auto it = find_pinned(pointer);
  if (it == pinned.end()) return;
  it->second.copies += copies;
  if (it->second.released && !it->second.copies) {
    free(it->first);
    pinned.erase(it);
  }
}
void release_pinned(void* pointer) {
  {
    std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned.find(static_cast<char*>(pointer))->second.released = true;
  }
  use_pinned(pointer, 0);
}
struct PinnedAllocator : c10::Allocator {
  c10::DataPtr allocate(size_t nbytes) override {
    nbytes = std::max<size_t>(nbytes, 1);
    void* pointer = malloc(nbytes);
    std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned[static_cast<char*>(pointer)] = {nbytes};
    return {pointer, pointer, &release_pinned, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release_pinned; }
  void copy_data(void* target, const void* source, size_t nbytes) const override {
    default_copy_data(target, source, nbytes);
  }
} pinned_allocator;

// ------------------------------------------------------------------------------------------ torch's interfaces

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kSim; }
  c10::Device exchangeDevice(c10::Device device) const override {
    auto before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override { return {kSim, static_cast<c10::DeviceIndex>(current_device)}; }
  void setDevice(c10::Device device) const override { if (device.has_index()) current_device = device.index(); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { setDevice(device); }
  c10::Stream getStream(c10::Device device) const override {
    int i = device.has_index() ? device.index() : current_device;
    return c10::Stream(c10::Stream::UNSAFE, {kSim, static_cast<c10::DeviceIndex>(i)}, current_stream[i]);
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device.has_index() ? device : getDevice());
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    int i = device.has_index() ? device.index() : current_device;
    queue_of(i, 0);
    std::lock_guard<std::mutex> lock(queues_mutex);
    queues[i].push_back(new Queue());
    return c10::Stream(c10::Stream::UNSAFE, {kSim, static_cast<c10::DeviceIndex>(i)},
                       static_cast<c10::StreamId>(queues[i].size() - 1));
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    auto before = getStream(stream.device());
    current_stream[stream.device_index()] = stream.id();
    return before;
  }
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}  // a few bytes of a test
  void record(void** event, const c10::Stream& stream, c10::DeviceIndex, c10::EventFlag) const override {
    if (!*event) *event = new Event();
    auto* own = static_cast<Event*>(*event);
    int turn;
    {
      std::lock_guard<std::mutex> lock(own->mutex);
      turn = ++own->recorded;
    }
    queue_of(stream).tell([own, turn] {
      std::lock_guard<std::mutex> lock(own->mutex);
      own->reached = turn;
      own->changed.notify_all();
    });
  }
  void block(void* event, const c10::Stream& stream) const override {
    auto* own = static_cast<Event*>(event);
    int turn = own->recorded;
    queue_of(stream).tell([own, turn] {
      std::unique_lock<std::mutex> lock(own->mutex);
      own->changed.wait(lock, [&] { return own->reached >= turn; });
    });
  }
  bool queryEvent(void* event) const override {
    auto* own = static_cast<Event*>(event);
    if (!own) return true;
    std::lock_guard<std::mutex> lock(own->mutex);
    return own->reached == own->recorded;
  }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  bool queryStream(const c10::Stream& stream) const override { return queue_of(stream).idle(); }
  void synchronizeStream(const c10::Stream& stream) const override { queue_of(stream).wait(); }
  void synchronizeEvent(void* event) const override {
    auto* own = static_cast<Event*>(event);
    std::unique_lock<std::mutex> lock(own->mutex);
    own->changed.wait(lock, [&] { return own->reached == own->recorded; });
  }
  void synchronizeDevice(c10::DeviceIndex device) const override { synchronize(device); }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override {
    int i = device_of(data.get());
    if (i < 0) return;
    std::lock_guard<std::mutex> lock(arenas[i].mutex);
    arenas[i].recorded[static_cast<char*>(data.get()) - arenas[i].device].insert(stream.id());
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex index) const override { return arenas[index].device != nullptr; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  void setCurrentDevice(c10::DeviceIndex index) const override { current_device = index; }
  c10::DeviceIndex getCurrentDevice() const override { return static_cast<c10::DeviceIndex>(current_device); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    auto before = getCurrentDevice();
    current_device = index;
    return before;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override { return exchangeDevice(index); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  bool isPinnedPtr(const void* pointer) const override { return is_pinned(pointer); }
  at::Device getDeviceFromPtr(void* pointer) const override {
    return {kSim, static_cast<c10::DeviceIndex>(device_of(pointer))};
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t nbytes) const override {
    c10::OptionalDeviceGuard guard(storage.device());
    auto data = allocator.allocate(nbytes);
    if (storage.nbytes() && nbytes) {
      synchronize(storage.device().index());
      allocator.copy_data(data.get(), storage.data(), std::min(nbytes, storage.nbytes()));
    }
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(data));
    storage.unsafeGetStorageImpl()->set_nbytes(nbytes);
  }
} hooks;

// -------------------------------------------------------------------------------------------------- operations

at::Tensor on_host(const at::Tensor& tensor) {
  if (tensor.is_cpu()) return tensor.detach();
  return at::from_blob(reach(tensor.const_data_ptr()), tensor.sizes(), tensor.strides(),
                       tensor.options().device(c10::kCPU));
}

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}
at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(size, stride, &allocator,
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& dst, bool non_blocking) {
  if (!self.numel()) return dst;
  int device = dst.is_cpu() ? self.device().index() : dst.device().index();
  bool pageable = (self.is_cpu() && !is_pinned(self.const_data_ptr())) ||
                  (dst.is_cpu() && !is_pinned(dst.const_data_ptr()));
  auto& queue = current_queue(device);
  if (!self.is_cpu() && !dst.is_cpu() && self.device() != dst.device()) {
    void* event = nullptr;
    Guard().record(&event, Guard().getStream(self.device()), self.device().index(), c10::EventFlag::PYTORCH_DEFAULT);
    Guard().block(event, Guard().getStream(dst.device()));
  }
  const void* near = self.is_cpu() ? self.const_data_ptr() : dst.is_cpu() ? dst.const_data_ptr() : nullptr;
  use_pinned(near, 1);
  bool plain = self.scalar_type() == dst.scalar_type() && self.is_contiguous() && dst.is_contiguous();
  if (plain) {
    // By address, whoever owns it by then: a real copy holds nothing either.
    void *target = reach(dst.mutable_data_ptr()), *source = reach(self.const_data_ptr());
    size_t nbytes = self.nbytes();
    queue.tell([=] { memcpy(target, source, nbytes); });
  } else {
    at::Tensor target = on_host(dst), source = on_host(self.expand_as(dst));
    queue.tell([=] {
      c10::InferenceMode guard;
      const_cast<at::Tensor&>(target).copy_(source);
    });
  }
  queue.tell([=] { use_pinned(near, -1); });
  // Between two tensors of devices nothing waits, as on a real one.
  if (near && (!non_blocking || pageable)) queue.wait();
  return dst;
}
at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& dst) {
  const_cast<at::Tensor&>(dst).resize_(self.sizes());
  return copy_from(self, dst, false);
}
const at::Tensor& resize(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  self.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  size_t needed = (self.storage_offset() + self.numel()) * self.element_size();
  if (needed > self.storage().nbytes()) hooks.resizePrivateUse1Bytes(self.storage(), needed);
  return self;
}
at::Tensor& set_source(at::Tensor& self, at::Storage source) {
  int64_t size = static_cast<int64_t>(source.nbytes() / self.element_size());
  return at::native::set_storage_cpu_(self, std::move(source), 0, {size}, {});
}
at::Scalar local_scalar(const at::Tensor& self) { return self.cpu().item(); }
void record_stream(at::Tensor& self, at::Stream stream) {
  Guard().recordDataPtrOnStream(self.storage().data_ptr(), stream);
}
void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  for (int i = 0; i < kDevices; i++) current_queue(i).wait();
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("resize_", &resize);
  m.impl("set_.source_Storage", &set_source);
  m.impl("set_.source_Storage_storage_offset", &at::native::set_storage_cpu_);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar);
  m.impl("record_stream", &record_stream);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  at::RegisterPrivateUse1HooksInterface(&hooks);
  m.def("busy", [](int device, double seconds) {
    current_queue(device).tell([=] { std::this_thread::sleep_for(std::chrono::duration<double>(seconds)); });
  }, "Let a device's current stream do nothing else for so long.");
  m.def("fill", [](const at::Tensor& tensor, double value, double seconds) {
    auto there = on_host(tensor);
    current_queue(tensor.device().index()).tell([=] {
      std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
      c10::InferenceMode guard;
      const_cast<at::Tensor&>(there).fill_(value);
    });
  }, "A kernel that takes so long, and then fills a tensor.");
  m.def("opened", [] { return arenas[0].device || arenas[1].device; });
  m.def("allocated", [](int device) { return arenas[device].allocated; });
  m.def("peak", [](int device) { return arenas[device].peak; });
  m.def("reset_peak", [](int device) { arenas[device].peak = arenas[device].allocated; });
}
