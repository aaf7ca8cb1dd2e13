// The streams of the simulated device: what waits in them, and when it happens.
//
// A device does a stream's work at any time between its issue and the moment at which somebody waits for it. Code is
// right only if its results are the same whenever that is, so here work happens as late as it may:
//   SIMULATED_CUDA_LATE_COPIES=1   what is issued to a stream beside the computing (default) one waits there until an
//                                  event, the stream or the device is waited for;
//   SIMULATED_CUDA_LATE_WRITES=n   the results of the computing stream's last n kernels wait in its queue, not in
//                                  device memory: only its own later kernels see them.
// With either the computing stream's own copies wait until a kernel touches their memory; without them everything
// happens at its issue.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <unordered_set>
#include <vector>

namespace simulated {

// No destructors: torch frees memory and events until the process has ended.
inline std::recursive_mutex& device_lock = *new std::recursive_mutex;
using Locked = std::lock_guard<std::recursive_mutex>;

inline size_t number_from(const char* variable, size_t otherwise) {
  const char* text = std::getenv(variable);
  return text != nullptr && *text != '\0' ? std::strtoull(text, nullptr, 10) : otherwise;
}

inline bool overlaps(const char* one, size_t one_size, const char* other, size_t other_size) {
  return one < other + other_size && other < one + one_size;
}

struct Queue;

// A place in a stream. What is done up to there is done once for all: a copy of the struct stays true.
struct Event {
  Queue* queue = nullptr;  // null until it is recorded
  size_t position = 0;
  size_t queries = 0;
};

struct Task {
  enum class Kind { copy, fill, write, wait, mark, call };
  Kind kind;
  char* to = nullptr;
  const char* from = nullptr;
  size_t size = 0;
  int value = 0;                   // of a fill
  std::unique_ptr<char[]> result;  // of a write
  Event event;                     // of a wait
  cudaHostFn_t function = nullptr;
  void* argument = nullptr;

  explicit Task(Kind of) : kind(of) {}

  bool touches(const char* memory, size_t bytes) const {
    if (to != nullptr && overlaps(to, size, memory, bytes)) return true;
    return kind == Kind::copy && overlaps(from, size, memory, bytes);
  }
};

// One stream. Task i of `tasks` has the position done + 1 + i.
struct Queue {
  std::deque<Task> tasks;
  size_t issued = 0;
  size_t done = 0;
  size_t writes = 0;           // of `tasks`
  std::vector<Event> to_wait;  // for, before the next kernel
};

inline Queue& computing = *new Queue;
inline std::unordered_set<Queue*>& side_streams = *new std::unordered_set<Queue*>;

inline bool is_computing(cudaStream_t stream) {
  return reinterpret_cast<size_t>(stream) < 16;  // 0, and the names of the legacy and the per-thread default stream
}

inline Queue& queue_of(cudaStream_t stream) {
  return is_computing(stream) ? computing : *reinterpret_cast<Queue*>(stream);
}

inline bool late_copies() {
  static const bool late = number_from("SIMULATED_CUDA_LATE_COPIES", 0) != 0;
  return late;
}

inline size_t late_writes() {
  static const size_t most = number_from("SIMULATED_CUDA_LATE_WRITES", 0);
  return most;
}

void finish(const Event& event);

inline void carry_out(Task& task) {
  switch (task.kind) {
    case Task::Kind::copy:
      std::memmove(task.to, task.from, task.size);
      break;
    case Task::Kind::fill:
      std::memset(task.to, task.value, task.size);
      break;
    case Task::Kind::write:
      std::memcpy(task.to, task.result.get(), task.size);
      break;
    case Task::Kind::wait:
      finish(task.event);
      break;
    case Task::Kind::call:
      task.function(task.argument);
      break;
    case Task::Kind::mark:
      break;
  }
}

inline void finish_front(Queue& queue) {
  Task task = std::move(queue.tasks.front());
  queue.tasks.pop_front();
  if (task.kind == Task::Kind::write) queue.writes--;
  carry_out(task);
  queue.done++;
}

inline void finish_until(Queue& queue, size_t position) {
  while (queue.done < position && !queue.tasks.empty()) finish_front(queue);
}

inline void finish(Queue& queue) {
  finish_until(queue, queue.issued);
  queue.to_wait.clear();
}

inline void finish(const Event& event) {
  if (event.queue == &computing || side_streams.count(event.queue) != 0) finish_until(*event.queue, event.position);
}

inline bool is_done(const Event& event) {
  if (event.queue != &computing && side_streams.count(event.queue) == 0) return true;
  return event.queue->done >= event.position;
}

inline void finish_all() {
  finish(computing);
  for (Queue* queue : side_streams) finish(*queue);
}

// What waits for nothing is done.
inline void forget_idle_tasks(Queue& queue) {
  auto is_idle = [](const Task& task) {
    return task.kind == Task::Kind::mark || (task.kind == Task::Kind::wait && is_done(task.event));
  };
  while (!queue.tasks.empty() && is_idle(queue.tasks.front())) finish_front(queue);
}

// Returns the task's position in its stream.
inline size_t issue(Queue& queue, Task task) {
  const bool is_wait = task.kind == Task::Kind::wait;
  const bool is_write = task.kind == Task::Kind::write;
  if (&queue == &computing && is_wait) queue.to_wait.push_back(task.event);
  queue.tasks.push_back(std::move(task));
  queue.issued++;
  if (is_write) queue.writes++;
  const bool at_once = &queue == &computing ? !late_copies() && late_writes() == 0 : !late_copies();
  if (at_once) finish(queue);
  while (queue.writes > late_writes()) finish_front(queue);
  forget_idle_tasks(queue);
  return queue.issued;
}

// ------------------------------------------------------------------------------------- kernels, run by device.py

// Everything that a kernel issued now may rely on has happened: in a side stream all of it, in the computing stream the
// events of other streams, while its own writes may stay late (`operand` finds them).
inline void begin_kernel(Queue& queue) {
  if (&queue != &computing) {
    finish(queue);
    return;
  }
  std::vector<Event> events;
  events.swap(queue.to_wait);
  for (const Event& event : events) finish(event);
  forget_idle_tasks(queue);
}

// Where a kernel of the computing stream finds a storage: in the queue, if it was written last by a late kernel.
inline char* operand(char* memory, size_t size) {
  for (size_t index = computing.tasks.size(); index-- > 0;) {
    Task& task = computing.tasks[index];
    if (!task.touches(memory, size)) continue;
    if (task.kind == Task::Kind::write && task.to == memory && task.size == size) return task.result.get();
    finish_until(computing, computing.done + 1 + index);
    break;
  }
  return memory;
}

inline void write_result(Queue& queue, char* to, const char* from, size_t size) {
  if (&queue == &computing && late_writes() > 0) {
    Task task(Task::Kind::write);
    task.to = to;
    task.size = size;
    task.result.reset(new char[size]);
    std::memcpy(task.result.get(), from, size);
    issue(queue, std::move(task));
    return;
  }
  if (&queue == &computing) operand(to, size);  // what was issued before comes first
  std::memcpy(to, from, size);
}

}  // namespace simulated
