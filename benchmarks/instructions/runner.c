/* Runs a function of a compiled library some times.

   runner LIBRARY FUNCTION TIMES TYPE:SHAPE...   e.g. i8:4x32 for a tensor of int8

   Bytes of int8 and uint8 tensors count up, so that codes are not all alike; other tensors are filled with ones. The
   address of the library is printed, by which its blocks are found in a count of instructions. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tvm/ffi/c_api.h>

enum { MOST_TENSORS = 32, MOST_DIMENSIONS = 8, ALIGNMENT = 64 };

static const struct {
  const char *name;
  DLDataType type;
  uint32_t one;
} types[] = {
    {"int8", {kDLInt, 8, 1}, 0},          {"uint8", {kDLUInt, 8, 1}, 0},     {"int32", {kDLInt, 32, 1}, 1},
    {"float16", {kDLFloat, 16, 1}, 0x3C00}, {"float32", {kDLFloat, 32, 1}, 0x3F800000},
};

static void fail(const char *what) {
  fprintf(stderr, "runner: %s\n", what);
  exit(2);
}

static void fill(DLTensor *tensor, uint32_t one, size_t count) {
  size_t size = tensor->dtype.bits / 8;
  tensor->data = aligned_alloc(ALIGNMENT, (count * size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
  if (!tensor->data) fail("no memory");
  for (size_t i = 0; i < count; i++)
    if (size == 1)
      ((uint8_t *)tensor->data)[i] = (uint8_t)(i * 37 % 251);
    else
      memcpy((char *)tensor->data + i * size, &one, size);
}

static void make_tensor(char *text, DLTensor *tensor, int64_t *shape) {
  char *dimensions = strchr(text, ':');
  if (!dimensions) fail("a tensor is TYPE:SHAPE");
  *dimensions++ = 0;
  size_t count = 1, type = 0;
  while (type < sizeof types / sizeof *types && strcmp(types[type].name, text)) type++;
  if (type == sizeof types / sizeof *types) fail("unknown type of a tensor");
  *tensor = (DLTensor){.device = {kDLCPU, 0}, .dtype = types[type].type, .shape = shape};
  for (char *word = strtok(dimensions, "x"); word; word = strtok(NULL, "x")) {
    if (tensor->ndim == MOST_DIMENSIONS) fail("too many dimensions");
    shape[tensor->ndim] = strtoll(word, NULL, 10);
    count *= (size_t)shape[tensor->ndim++];
  }
  if (!count) fail("a tensor of no elements");
  fill(tensor, types[type].one, count);
}

static TVMFFIAny call_global(const char *name, const TVMFFIAny *arguments, int count) {
  TVMFFIByteArray text = {name, strlen(name)};
  TVMFFIObjectHandle function = NULL;
  TVMFFIAny result = {.type_index = kTVMFFINone};
  if (TVMFFIFunctionGetGlobal(&text, &function) || TVMFFIFunctionCall(function, (TVMFFIAny *)arguments, count, &result))
    fail(name);
  return result;
}

int main(int count, char **words) {
  if (count < 4 || count - 4 > MOST_TENSORS) fail("give LIBRARY FUNCTION TIMES TENSOR...");
  TVMFFIAny path = {.type_index = kTVMFFIRawStr, .v_c_str = words[1]};
  TVMFFIAny lookup[3] = {call_global("ffi.ModuleLoadFromFile", &path, 1),
                         {.type_index = kTVMFFIRawStr, .v_c_str = words[2]},
                         {.type_index = kTVMFFIBool, .v_int64 = 0}};
  TVMFFIAny function = call_global("ffi.ModuleGetFunction", lookup, 3);
  if (function.type_index == kTVMFFINone) fail("the library has no such function");
  static DLTensor tensors[MOST_TENSORS];
  static int64_t shapes[MOST_TENSORS][MOST_DIMENSIONS];
  static TVMFFIAny arguments[MOST_TENSORS];
  for (int i = 0; i < count - 4; i++) {
    make_tensor(words[4 + i], &tensors[i], shapes[i]);
    arguments[i] = (TVMFFIAny){.type_index = kTVMFFIDLTensorPtr, .v_ptr = &tensors[i]};
  }
  for (long left = strtol(words[3], NULL, 10); left > 0; left--) {
    TVMFFIAny result = {.type_index = kTVMFFINone};
    if (TVMFFIFunctionCall(function.v_obj, arguments, count - 4, &result)) fail("the function failed");
  }
  Dl_info library;
  char symbol[512];
  snprintf(symbol, sizeof symbol, "__tvm_ffi_%s", words[2]);
  void *handle = dlopen(words[1], RTLD_NOLOAD | RTLD_NOW), *address = handle ? dlsym(handle, symbol) : NULL;
  if (!address || !dladdr(address, &library)) fail("the library is not where it was loaded");
  printf("%zx\n", (size_t)library.dli_fbase);
  return 0;
}
