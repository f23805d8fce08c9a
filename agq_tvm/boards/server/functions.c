/* The functions that TVM's clients expect of a server, over tvm_ffi's C interface. */
#define _GNU_SOURCE
#include "board.h"

#include <dirent.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/auxv.h>
#include <tvm/ffi/c_api.h>

static const char *session_folder;
static int is_emulated;

static TVMFFIByteArray bytes(const char *text) { return (TVMFFIByteArray){text, strlen(text)}; }

int text_argument(const TVMFFIAny *arguments, int32_t count, char *text, size_t size) {
  TVMFFIByteArray value = {NULL, 0};
  if (count == 1 && arguments->type_index == kTVMFFIRawStr)
    value = bytes(arguments->v_c_str);
  else if (count == 1 && arguments->type_index == kTVMFFISmallStr)
    value = (TVMFFIByteArray){arguments->v_bytes, arguments->small_str_len};
  else if (count == 1 && arguments->type_index == kTVMFFIStr)
    value = *(const TVMFFIByteArray *)((const char *)arguments->v_ptr + sizeof(TVMFFIObject));
  if (!value.data || value.size >= size || memchr(value.data, 0, value.size)) {
    TVMFFIErrorSetRaisedFromCStr("ValueError", "the board expects one text");
    return -1;
  }
  memcpy(text, value.data, value.size);
  text[value.size] = 0;
  return 0;
}

/* Calls one of the runtime's functions by its name. */
static int call(const char *name, const TVMFFIAny *arguments, int32_t count, TVMFFIAny *result) {
  TVMFFIByteArray key = bytes(name);
  TVMFFIObjectHandle function = NULL;
  *result = (TVMFFIAny){.type_index = kTVMFFINone};
  if (TVMFFIFunctionGetGlobal(&key, &function)) return -1;
  if (!function) {
    TVMFFIErrorSetRaisedFromCStr("RuntimeError", "the board's runtime lacks a function");
    return -1;
  }
  int error = TVMFFIFunctionCall(function, (TVMFFIAny *)arguments, count, result);
  TVMFFIObjectDecRef(function);
  return error;
}

int return_text(const char *text, TVMFFIAny *result) {
  TVMFFIByteArray value = bytes(text);
  return TVMFFIStringFromByteArray(&value, result);
}

/* The path of a file of the session; only plain names, so that nothing outside its folder is touched. */
static int session_path(const TVMFFIAny *arguments, int32_t count, char *path, size_t size) {
  char name[256];
  if (text_argument(arguments, count, name, sizeof name)) return -1;
  if (strchr(name, '/') || !strcmp(name, ".") || !strcmp(name, "..")) {
    TVMFFIErrorSetRaisedFromCStr("ValueError", "the board takes plain file names only, without a folder");
    return -1;
  }
  snprintf(path, size, "%s/%s", session_folder, name);
  return 0;
}

static int work_path(void *self, const TVMFFIAny *arguments, int32_t count, TVMFFIAny *result) {
  char path[600];
  (void)self;
  return session_path(arguments, count, path, sizeof path) || return_text(path, result) ? -1 : 0;
}

static int load_module(void *self, const TVMFFIAny *arguments, int32_t count, TVMFFIAny *result) {
  char path[600];
  (void)self;
  if (session_path(arguments, count, path, sizeof path)) return -1;
  TVMFFIAny argument = {.type_index = kTVMFFIRawStr, .v_c_str = path};
  return call("ffi.ModuleLoadFromFile", &argument, 1, result);
}

static int list_folder(void *self, const TVMFFIAny *arguments, int32_t count, TVMFFIAny *result) {
  char path[600], names[16384] = "";
  (void)self;
  if (session_path(arguments, count, path, sizeof path)) return -1;
  DIR *folder = opendir(path);
  if (!folder) {
    TVMFFIErrorSetRaisedFromCStr("ValueError", "the board has no such folder: list \"\"");
    return -1;
  }
  size_t used = 0;
  for (struct dirent *entry; (entry = readdir(folder)) && used + 260 < sizeof names;)
    if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, ".."))
      used += (size_t)snprintf(names + used, sizeof names - used, "%s%s", used ? "," : "", entry->d_name);
  closedir(folder);
  return return_text(names, result);
}

/* Linux's names of the AT_HWCAP and AT_HWCAP2 bits; "" for bits that no device file names. */
static const char *const HWCAP[] = {
    "fp",     "asimd", "evtstrm", "aes",   "pmull",   "sha1", "sha2", "crc32",    "atomics", "fphp",
    "asimdhp", "cpuid", "asimdrdm", "jscvt", "fcma",  "lrcpc", "dcpop", "",       "",        "",
    "asimddp", "",     "sve",     "asimdfhm", "dit",  "uscat", "ilrcpc", "flagm", "ssbs",    "sb"};
static const char *const HWCAP2[] = {"",      "sve2",    "sveaes", "", "", "",     "", "",
                                     "frint", "svei8mm", "",       "", "", "i8mm", "bf16"};

static void append_names(char *text, size_t size, unsigned long bits, const char *const *names,
                         size_t count) {
  for (size_t bit = 0; bit < count; ++bit)
    if ((bits >> bit & 1) && *names[bit]) {
      size_t used = strlen(text);
      snprintf(text + used, size - used, "%s%s", used ? " " : "", names[bit]);
    }
}

/* The CPU's features as /proc/cpuinfo would name them; under emulation that file is the host's. */
static int cpu_features(void *self, const TVMFFIAny *arguments, int32_t count, TVMFFIAny *result) {
  char text[512] = "";
  (void)self, (void)arguments, (void)count;
#if defined(__aarch64__)
  append_names(text, sizeof text, getauxval(AT_HWCAP), HWCAP, sizeof HWCAP / sizeof *HWCAP);
  append_names(text, sizeof text, getauxval(AT_HWCAP2), HWCAP2, sizeof HWCAP2 / sizeof *HWCAP2);
#endif
  return return_text(text, result);
}

/* Reads the first line of a file of Linux's, without its end; "" if there is none. */
const char *line_of(const char *path, char *line, size_t size) {
  FILE *file = fopen(path, "r");
  *line = 0;
  if (file) {
    if (fgets(line, (int)size, file)) line[strcspn(line, "\n")] = 0;
    fclose(file);
  }
  return line;
}

/* The processors that the session may run on, a line for each: number, cpu_capacity and highest frequency (0 if
 * Linux does not say), and those that share its core. */
static int processors(void *self, const TVMFFIAny *arguments, int32_t count, TVMFFIAny *result) {
  static const char *const ITEMS[] = {"cpu_capacity", "cpufreq/cpuinfo_max_freq", "topology/thread_siblings_list"};
  char text[65536] = "", path[128], line[128];
  size_t used = 0;
  cpu_set_t allowed;
  (void)self, (void)arguments, (void)count;
  if (sched_getaffinity(0, sizeof allowed, &allowed)) CPU_ZERO(&allowed);
  for (int cpu = 0; cpu < CPU_SETSIZE && used + 512 < sizeof text; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed)) continue;
    used += (size_t)snprintf(text + used, sizeof text - used, "%s%d", used ? "\n" : "", cpu);
    for (int item = 0; item < 3; ++item) {
      snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/%s", cpu, ITEMS[item]);
      const char *value = line_of(path, line, sizeof line);
      used += (size_t)snprintf(text + used, sizeof text - used, " %s", *value || item == 2 ? value : "0");
    }
  }
  return return_text(text, result);
}

static int status(void *self, const TVMFFIAny *arguments, int32_t count, TVMFFIAny *result) {
  static char text[65536];
  (void)self, (void)arguments, (void)count;
  status_text(session_folder, text, sizeof text);
  return return_text(text, result);
}

/* runtime.config_threadpool(mode, threads, processors) with the processors as a text, "4 5 6 7": lists do not
 * travel over RPC. */
static int use_threads(void *self, const TVMFFIAny *arguments, int32_t count, TVMFFIAny *result) {
  char text[8192], *rest = text;
  TVMFFIAny names[CPU_SETSIZE], pool[3];
  int32_t number = 0;
  (void)self;
  if (count != 3 || text_argument(arguments + 2, 1, text, sizeof text)) return -1;
  for (char *name; number < CPU_SETSIZE && (name = strtok_r(rest, " ", &rest));)
    names[number++] = (TVMFFIAny){.type_index = kTVMFFIRawStr, .v_c_str = name};
  pool[0] = arguments[0], pool[1] = arguments[1];
  if (call("ffi.Array", names, number, &pool[2])) return -1;
  int error = call("runtime.config_threadpool", pool, 3, result);
  TVMFFIObjectDecRef(pool[2].v_obj);
  return error;
}

/* Whether the board was started as an emulated one: nothing inside an emulator can tell for sure. */
static int emulated(void *self, const TVMFFIAny *arguments, int32_t count, TVMFFIAny *result) {
  (void)self, (void)arguments, (void)count;
  *result = (TVMFFIAny){.type_index = kTVMFFIBool, .v_int64 = is_emulated};
  return 0;
}

static void print_raised(const char *what) {
  TVMFFIObjectHandle error = NULL;
  TVMFFIErrorMoveFromRaised(&error);
  if (!error) return;
  const TVMFFIErrorCell *cell = (const TVMFFIErrorCell *)((const char *)error + sizeof(TVMFFIObject));
  printf("%s: %.*s\n", what, (int)cell->message.size, cell->message.data);
  TVMFFIObjectDecRef(error);
}

int set_function(const char *name, TVMFFISafeCallType call) {
  TVMFFIByteArray key = bytes(name);
  TVMFFIObjectHandle function = NULL;
  if (TVMFFIFunctionCreate(NULL, call, NULL, &function) || TVMFFIFunctionSetGlobal(&key, function, 1)) {
    print_raised(name);
    return -1;
  }
  return TVMFFIObjectDecRef(function);
}

int register_functions(const char *folder, int is_emulated_board) {
  session_folder = folder;
  is_emulated = is_emulated_board;
  return set_function("tvm.rpc.server.workpath", work_path) ||
         set_function("tvm.rpc.server.load_module", load_module) ||
         set_function("tvm.rpc.server.listdir", list_folder) ||
         set_function("agq.board.cpu_features", cpu_features) ||
         set_function("agq.board.processors", processors) ||
         set_function("agq.board.status", status) ||
         set_function("agq.board.use_threads", use_threads) ||
         set_function("agq.board.emulated", emulated) || register_cache() || register_operations();
}

/* Calls one of the runtime's functions with a socket and, unless it is NULL, a message. */
int call_runtime(const char *name, int socket, const char *message) {
  TVMFFIByteArray key = bytes(name);
  TVMFFIObjectHandle function = NULL;
  if (TVMFFIFunctionGetGlobal(&key, &function) || !function) {
    printf("the runtime lacks %s\n", name);
    return -1;
  }
  TVMFFIAny arguments[2] = {{.type_index = kTVMFFIInt, .v_int64 = socket},
                            {.type_index = kTVMFFIRawStr, .v_c_str = message}};
  TVMFFIAny result = {.type_index = kTVMFFINone};
  int error = TVMFFIFunctionCall(function, arguments, message ? 2 : 1, &result);
  if (error) print_raised(name);
  if (!error && result.type_index >= kTVMFFIStaticObjectBegin) TVMFFIObjectDecRef(result.v_obj);
  TVMFFIObjectDecRef(function);
  return error;
}
