/* What each function that TVM's virtual machine calls takes: the instrument that the machine calls around it. */
#define _GNU_SOURCE
#include "board.h"

#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <tvm/ffi/c_api.h>

static struct operation {
  char name[256];
  uint64_t calls, nanoseconds;
} operations[400];
static size_t known;
static struct operation *running;
static uint64_t begun;

static uint64_t nanoseconds(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return 1000000000ull * (uint64_t)time.tv_sec + (uint64_t)time.tv_nsec;
}

static struct operation *find(const char *name) {
  for (size_t i = 0; i < known; ++i)
    if (!strcmp(operations[i].name, name)) return &operations[i];
  if (known == sizeof operations / sizeof *operations) return NULL;
  struct operation *added = &operations[known++];
  memset(added, 0, sizeof *added);
  strcpy(added->name, name);
  return added;
}

/* (function, name, before, result, arguments…): the clock is read last before a call, and first after it. */
static int instrument(void *self, const TVMFFIAny *arguments, int32_t count, TVMFFIAny *result) {
  uint64_t now = nanoseconds();
  char name[sizeof operations->name];
  (void)self, (void)result;
  if (count < 3 || text_argument(arguments + 1, 1, name, sizeof name)) return -1;
  if (arguments[2].v_int64) {
    running = find(name);
    begun = nanoseconds();
  } else if (running) {
    running->calls += 1;
    running->nanoseconds += now - begun;
    running = NULL;
  }
  return 0;
}

/* agq.board.watch(): forgets what was counted, and returns an instrument for `set_instrument`. */
static int watch(void *self, const TVMFFIAny *arguments, int32_t count, TVMFFIAny *result) {
  TVMFFIObjectHandle function = NULL;
  (void)self, (void)arguments, (void)count;
  known = 0;
  running = NULL;
  if (TVMFFIFunctionCreate(NULL, instrument, NULL, &function)) return -1;
  *result = (TVMFFIAny){.type_index = kTVMFFIFunction, .v_obj = function};
  return 0;
}

/* agq.board.watched(): a line for each function: name, calls, nanoseconds. */
static int watched(void *self, const TVMFFIAny *arguments, int32_t count, TVMFFIAny *result) {
  static char text[sizeof operations];
  size_t used = 0;
  (void)self, (void)arguments, (void)count;
  *text = 0;
  for (size_t i = 0; i < known && used + 300 < sizeof text; ++i)
    used += (size_t)snprintf(text + used, sizeof text - used, "%s%s %llu %llu", used ? "\n" : "", operations[i].name,
                             (unsigned long long)operations[i].calls, (unsigned long long)operations[i].nanoseconds);
  return return_text(text, result);
}

/* agq.board.peak_bytes(): the most memory that the session had at a time. */
static int peak_bytes(void *self, const TVMFFIAny *arguments, int32_t count, TVMFFIAny *result) {
  struct rusage used;
  (void)self, (void)arguments, (void)count;
  getrusage(RUSAGE_SELF, &used);
  *result = (TVMFFIAny){.type_index = kTVMFFIInt, .v_int64 = 1024 * (int64_t)used.ru_maxrss};
  return 0;
}

int register_operations(void) {
  return set_function("agq.board.watch", watch) || set_function("agq.board.watched", watched) ||
         set_function("agq.board.peak_bytes", peak_bytes);
}
