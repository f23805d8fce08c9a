/* Calls functions of a compiled library in turn, without TVM's runtime.

   runner THREADS LIBRARY TENSOR... -- CALL...

   What is parallel is cut into a part for each thread, as TVM's runtime does, but the parts run one after the other,
   and the first one, which is never the smaller one, is the one that is counted: as if all ran at the same time.
   A tensor is TYPE:SHAPE, e.g. int8:4x32. Bytes of int8 and uint8 tensors count up, so that codes are not all alike;
   other tensors are filled with ones. One with "~" before it is left empty. A call is NAME:ARGUMENTS, e.g. add:0,1,i7,2 for a function of tensors 0, 1 and
   2 and the integer 7; what "@" stands before is counted by the plugin. "=2" prints the bytes of tensor 2.
   The first line that is printed is the address of the library, by which its blocks are found among those counted. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <link.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <tvm/ffi/c_api.h>
#include <unistd.h>

#include "mark.h"

enum { MOST_TENSORS = 64, MOST_ARGUMENTS = 64, MOST_DIMENSIONS = 8, ALIGNMENT = 64, WORKSPACE = 1 << 28 };

static const struct {
  const char *name;
  DLDataType type;
  uint32_t one;
} types[] = {
    {"int8", {kDLInt, 8, 1}, 0},
    {"uint8", {kDLUInt, 8, 1}, 0},
    {"int32", {kDLInt, 32, 1}, 1},
    {"uint32", {kDLUInt, 32, 1}, 1},
    {"int64", {kDLInt, 64, 1}, 1},
    {"float16", {kDLFloat, 16, 1}, 0x3C00},
    {"float32", {kDLFloat, 32, 1}, 0x3F800000},
};
static DLTensor tensors[MOST_TENSORS];
static int64_t shapes[MOST_TENSORS][MOST_DIMENSIONS];
static int tensor_count;
static _Alignas(ALIGNMENT) char workspace[WORKSPACE];
static size_t used;
static int threads;

static void fail(const char *what, const char *which) {
  fprintf(stderr, "%s %s\n", what, which);
  exit(2);
}

/* What compiled libraries call of TVM's runtime. */

__attribute__((visibility("default"))) void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts,
                                                                             int32_t count) {
  fprintf(stderr, "%s: ", kind);
  for (int32_t i = 0; i < count; i++)
    if (parts[i]) fputs(parts[i], stderr);
  fputc('\n', stderr);
}

__attribute__((visibility("default"))) void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *text) {
  TVMFFIErrorSetRaisedFromCStrParts(kind, &text, 1);
}

struct group {
  void *handle;
  int32_t tasks;
};

static int launch(int (*task)(int, struct group *, void *), void *data, int tasks) {
  struct group group = {NULL, tasks > 0 ? tasks : threads};
  int error = task(0, &group, data);
  if (group.tasks == 1) return error;
  syscall(SYS_getppid, MARK, MARK_PAUSE);
  for (int number = 1; number < group.tasks && !error; number++) error = task(number, &group, data);
  syscall(SYS_getppid, MARK, MARK_RESUME);
  return error;
}

/* Workspaces are released in the opposite order: a stack, which costs a call nothing. */
static void *allocate(int kind, int device, uint64_t size, int code, int bits) {
  (void)kind, (void)device, (void)code, (void)bits;
  if (size > WORKSPACE - used) fail("no memory for", "a workspace");
  void *memory = workspace + used;
  used += (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  return memory;
}

static int release(int kind, int device, void *memory) {
  (void)kind, (void)device;
  used = (size_t)((char *)memory - workspace);
  return 0;
}

static void provide(void *library, const char *name, void *function) {
  void **place = dlsym(library, name);
  if (place) *place = function;
}

static size_t bytes_of(const DLTensor *tensor) {
  size_t bytes = tensor->dtype.bits / 8;
  for (int i = 0; i < tensor->ndim; i++) bytes *= (size_t)tensor->shape[i];
  return bytes;
}

static void fill(DLTensor *tensor, uint32_t one) {
  size_t size = tensor->dtype.bits / 8, bytes = bytes_of(tensor);
  uint64_t value = one;
  for (size_t i = 0; i < bytes / size; i++)
    if (size == 1)
      ((uint8_t *)tensor->data)[i] = (uint8_t)(i * 37 % 251);
    else
      memcpy((char *)tensor->data + i * size, &value, size);
}

static void make_tensor(char *text) {
  int empty = *text == '~';
  text += empty;
  char *dimensions = strchr(text, ':');
  if (!dimensions) fail("a tensor is TYPE:SHAPE, not", text);
  if (tensor_count == MOST_TENSORS) fail("too many tensors, with", text);
  *dimensions++ = 0;
  size_t type = 0;
  while (type < sizeof types / sizeof *types && strcmp(types[type].name, text)) type++;
  if (type == sizeof types / sizeof *types) fail("unknown type of a tensor:", text);
  DLTensor *tensor = &tensors[tensor_count];
  *tensor = (DLTensor){.device = {kDLCPU, 0}, .dtype = types[type].type, .shape = shapes[tensor_count++]};
  for (char *word = strtok(dimensions, "x"); word; word = strtok(NULL, "x")) {
    if (tensor->ndim == MOST_DIMENSIONS) fail("too many dimensions of a tensor of", text);
    tensor->shape[tensor->ndim++] = strtoll(word, NULL, 10);
  }
  size_t bytes = bytes_of(tensor);
  if (!bytes) fail("a tensor without elements, of", text);
  tensor->data = aligned_alloc(ALIGNMENT, (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
  if (!tensor->data) fail("no memory for a tensor of", text);
  if (!empty) fill(tensor, types[type].one);
}

static DLTensor *tensor_at(const char *text) {
  long at = strtol(text, NULL, 10);
  if (at < 0 || at >= tensor_count) fail("there is no tensor", text);
  return &tensors[at];
}

static void print(const DLTensor *tensor) {
  size_t bytes = bytes_of(tensor);
  for (size_t i = 0; i < bytes; i++) printf("%02x", ((uint8_t *)tensor->data)[i]);
  printf("\n");
}

static void call(void *library, char *text) {
  int counted = *text == '@', count = 0;
  char *name = text + counted, *list = strchr(name, ':'), symbol[512];
  if (!list) fail("a call is NAME:ARGUMENTS, not", name);
  *list++ = 0;
  snprintf(symbol, sizeof symbol, "__tvm_ffi_%s", name);
  TVMFFISafeCallType function = (TVMFFISafeCallType)dlsym(library, symbol);
  if (!function) fail("the library has no such function:", name);
  TVMFFIAny arguments[MOST_ARGUMENTS], result = {.type_index = kTVMFFINone};
  for (char *word = strtok(list, ","); word; word = strtok(NULL, ",")) {
    if (count == MOST_ARGUMENTS) fail("too many arguments of", name);
    if (*word == 'i')
      arguments[count++] = (TVMFFIAny){.type_index = kTVMFFIInt, .v_int64 = strtoll(word + 1, NULL, 10)};
    else
      arguments[count++] = (TVMFFIAny){.type_index = kTVMFFIDLTensorPtr, .v_ptr = tensor_at(word)};
  }
  if (counted) syscall(SYS_getppid, MARK, MARK_BEGIN);
  int error = function(NULL, arguments, count, &result);
  if (counted) syscall(SYS_getppid, MARK, MARK_END);
  if (error) fail("this function failed:", name);
}

int main(int count, char **words) {
  if (count < 4 || (threads = atoi(words[1])) < 1) fail("give", "THREADS LIBRARY TENSOR... -- CALL...");
  void *library = dlopen(words[2], RTLD_NOW | RTLD_LOCAL);
  if (!library) fail("the library does not load:", dlerror());
  provide(library, "__TVMBackendParallelLaunch", launch);
  provide(library, "__TVMBackendAllocWorkspace", allocate);
  provide(library, "__TVMBackendFreeWorkspace", release);
  int at = 3;
  while (at < count && strcmp(words[at], "--")) make_tensor(words[at++]);
  struct link_map *map;
  if (dlinfo(library, RTLD_DI_LINKMAP, &map)) fail("the library is not where it was loaded:", words[2]);
  printf("%zx\n", (size_t)map->l_addr);
  while (++at < count)
    if (*words[at] == '=')
      print(tensor_at(words[at] + 1));
    else
      call(library, words[at]);
  return 0;
}
