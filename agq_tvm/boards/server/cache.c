/* Files that outlive a session, so that a model is sent once. They are named by their SHA-256 and lie in one folder;
 * the ones that were used longest ago make room. A file gets its name when it is whole: before that it is a part,
 * held under a lock, and what a session that died left of it is removed by the next. */
#define _GNU_SOURCE
#include "board.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <tvm/ffi/c_api.h>
#include <unistd.h>

#define PATH_SIZE 512
#define PART "part-"

static struct {
  char folder[PATH_SIZE - 80]; /* "": nothing is kept */
  uint64_t limit;
} cache;

/* The file that the session is sending. */
static struct {
  char sha256[65], path[PATH_SIZE];
  int file, kept; /* kept: it goes into the cache, and not only into the session's folder */
  uint64_t size, received;
  struct sha256 hash;
} part = {.file = -1};

static int raise(const char *what, const char *why) {
  char text[400];
  snprintf(text, sizeof text, "%s%s%s", what, why ? ": " : "", why ? why : "");
  TVMFFIErrorSetRaisedFromCStr("ValueError", text);
  return -1;
}

static int raise_full(void) {
  if (errno == ENOSPC || errno == EDQUOT || errno == EFBIG) return raise("the disk of the board is full", NULL);
  return raise("the board cannot write the file", strerror(errno));
}

/* Makes a folder and those above it. */
static int make_folders(char *path) {
  for (char *slash = path + 1; (slash = strchr(slash, '/')); *slash++ = '/') {
    *slash = 0;
    mkdir(path, 0755);
  }
  return mkdir(path, 0700) && errno != EEXIST ? -1 : 0;
}

void cache_configure(const char *folder, uint64_t limit) {
  const char *home = getenv("HOME");
  cache.limit = limit;
  if (folder)
    snprintf(cache.folder, sizeof cache.folder, "%s", folder);
  else if (home && *home == '/')
    snprintf(cache.folder, sizeof cache.folder, "%s/.cache/agq-board", home);
  if (strlen(cache.folder) + 1 == sizeof cache.folder) *cache.folder = 0; /* cut off */
  if (*cache.folder && (make_folders(cache.folder) || access(cache.folder, W_OK))) {
    printf("nothing is kept between sessions: cannot write %s\n", cache.folder);
    *cache.folder = 0;
  }
}

static int is_sha256(const char *name) { return strspn(name, "0123456789abcdef") == 64 && !name[64]; }

static void path_of(const char *name, char path[PATH_SIZE]) {
  snprintf(path, PATH_SIZE, "%s/%.70s", cache.folder, name);
}

/* Lets one session at a time change the folder; returns what to close, or -1. */
static int lock_folder(void) {
  char path[PATH_SIZE];
  path_of("lock", path);
  int lock = open(path, O_CREAT | O_RDWR | O_CLOEXEC, 0600);
  if (lock >= 0) flock(lock, LOCK_EX);
  return lock;
}

/* Removes a part that no session holds any more. */
static void remove_if_left(const char *path) {
  int file = open(path, O_RDWR | O_CLOEXEC);
  if (file < 0) return;
  if (!flock(file, LOCK_EX | LOCK_NB)) unlink(path);
  close(file);
}

/* Adds up what is kept, removes what other sessions left half-way, and finds what was used longest ago. */
static uint64_t survey(char oldest[PATH_SIZE]) {
  DIR *folder = opendir(cache.folder);
  uint64_t total = 0;
  struct timespec earliest = {0};
  *oldest = 0;
  for (struct dirent *entry; folder && (entry = readdir(folder));) {
    char path[PATH_SIZE];
    struct stat status;
    path_of(entry->d_name, path);
    if (!strncmp(entry->d_name, PART, strlen(PART))) remove_if_left(path);
    if (!is_sha256(entry->d_name) || lstat(path, &status)) continue;
    total += (uint64_t)status.st_size;
    struct timespec used = status.st_mtim;
    if (*oldest && (used.tv_sec > earliest.tv_sec ||
                    (used.tv_sec == earliest.tv_sec && used.tv_nsec >= earliest.tv_nsec)))
      continue;
    earliest = used;
    strcpy(oldest, path);
  }
  if (folder) closedir(folder);
  return total;
}

static uint64_t free_bytes(const char *folder) {
  struct statvfs disk;
  return statvfs(folder, &disk) ? 0 : (uint64_t)disk.f_bavail * disk.f_frsize;
}

/* Removes kept files until one of `size` bytes has room. */
static void make_room(uint64_t size) {
  char oldest[PATH_SIZE];
  while (survey(oldest) + size > cache.limit || free_bytes(cache.folder) < size)
    if (!*oldest || unlink(oldest)) return;
}

static void drop_part(void) {
  if (part.file < 0) return;
  close(part.file);
  part.file = -1;
  unlink(part.path);
}

/* sha256 and size, the arguments with which a file is named. */
static int named(const TVMFFIAny *arguments, char sha256[65], uint64_t *size) {
  if (text_argument(arguments, 1, sha256, 65)) return -1;
  if (!is_sha256(sha256) || arguments[1].type_index != kTVMFFIInt || arguments[1].v_int64 < 0)
    return raise("the board expects a SHA-256 and a size", NULL);
  *size = (uint64_t)arguments[1].v_int64;
  return 0;
}

/* A name in the session's folder, which is where the process runs. */
static int plain_name(const TVMFFIAny *argument, char *name, size_t size) {
  if (text_argument(argument, 1, name, size)) return -1;
  if (!*name || strchr(name, '/') || !strcmp(name, ".") || !strcmp(name, ".."))
    return raise("the board takes plain file names only, without a folder", NULL);
  return 0;
}

static int has_content(const char *path, const char *sha256, uint64_t size) {
  static unsigned char data[1 << 16];
  struct stat status;
  struct sha256 hash;
  char digits[65] = "";
  int file = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
  if (file < 0) return 0;
  if (!fstat(file, &status) && S_ISREG(status.st_mode) && (uint64_t)status.st_size == size) {
    sha256_begin(&hash);
    ssize_t count;
    while ((count = read(file, data, sizeof data)) > 0) sha256_add(&hash, data, (size_t)count);
    if (!count) sha256_end(&hash, digits);
  }
  close(file);
  return !strcmp(digits, sha256);
}

/* Gives a kept file a name in the session's folder, on another disk by a link that points to it. */
static int place(const char *path, const char *name) {
  unlink(name);
  return link(path, name) && symlink(path, name) ? raise_full() : 0;
}

/* agq.board.take(sha256, size, name): whether such a file is kept; then the session has it under that name. */
static int take(void *self, const TVMFFIAny *arguments, int32_t count, TVMFFIAny *result) {
  char sha256[65], name[256], path[PATH_SIZE];
  uint64_t size;
  (void)self;
  if (count != 3) return raise("the board expects three arguments", NULL);
  if (named(arguments, sha256, &size) || plain_name(arguments + 2, name, sizeof name)) return -1;
  *result = (TVMFFIAny){.type_index = kTVMFFIBool};
  if (!*cache.folder) return 0;
  path_of(sha256, path);
  if (access(path, F_OK)) return 0;
  if (!has_content(path, sha256, size)) {
    unlink(path); /* cut short by a power failure, or rotten */
    return 0;
  }
  utimensat(AT_FDCWD, path, NULL, 0);
  result->v_int64 = 1;
  return place(path, name);
}

static int open_part(void) {
  int lock = -1;
  part.kept = *cache.folder && part.size <= cache.limit;
  if (part.kept) {
    lock = lock_folder();
    make_room(part.size);
  }
  snprintf(part.path, sizeof part.path, "%s/" PART "XXXXXX", part.kept ? cache.folder : ".");
  part.file = mkostemp(part.path, O_CLOEXEC);
  if (part.file >= 0) flock(part.file, LOCK_EX);
  if (lock >= 0) close(lock);
  return part.file < 0 ? raise_full() : 0;
}

/* agq.board.receive(sha256, size): begins a file. */
static int receive(void *self, const TVMFFIAny *arguments, int32_t count, TVMFFIAny *result) {
  char text[160];
  (void)self, (void)result;
  drop_part();
  if (count != 2) return raise("the board expects two arguments", NULL);
  if (named(arguments, part.sha256, &part.size) || open_part()) return -1;
  uint64_t room = free_bytes(part.kept ? cache.folder : ".");
  if (room < part.size) {
    drop_part();
    snprintf(text, sizeof text, "the disk of the board is full: %llu MB are free, %llu MB are needed",
             (unsigned long long)room / 1000000, (unsigned long long)part.size / 1000000 + 1);
    return raise(text, NULL);
  }
  part.received = 0;
  sha256_begin(&part.hash);
  return 0;
}

/* The bytes of an argument, in whichever form they travelled; none if it has none. */
static TVMFFIByteArray bytes_of(const TVMFFIAny *argument) {
  switch (argument->type_index) {
    case kTVMFFIByteArrayPtr:
      return *(const TVMFFIByteArray *)argument->v_ptr;
    case kTVMFFIBytes:
      return *(const TVMFFIByteArray *)((const char *)argument->v_ptr + sizeof(TVMFFIObject));
    case kTVMFFISmallBytes:
      return (TVMFFIByteArray){argument->v_bytes, argument->small_str_len};
    default:
      return (TVMFFIByteArray){NULL, 0};
  }
}

/* agq.board.append(bytes): adds the next bytes to the file. */
static int append(void *self, const TVMFFIAny *arguments, int32_t count, TVMFFIAny *result) {
  (void)self, (void)result;
  TVMFFIByteArray bytes = count == 1 ? bytes_of(arguments) : (TVMFFIByteArray){NULL, 0};
  if (!bytes.data || part.file < 0) return raise("the board expects bytes of a file that was begun", NULL);
  for (size_t written = 0; written < bytes.size;) {
    ssize_t one = write(part.file, bytes.data + written, bytes.size - written);
    if (one < 0 && errno == EINTR) continue;
    if (one <= 0) {
      raise_full();
      drop_part();
      return -1;
    }
    written += (size_t)one;
  }
  part.received += bytes.size;
  sha256_add(&part.hash, bytes.data, bytes.size);
  return 0;
}

/* agq.board.keep(name): ends the file, which then has that name in the session's folder. */
static int keep(void *self, const TVMFFIAny *arguments, int32_t count, TVMFFIAny *result) {
  char name[256], digits[65], path[PATH_SIZE];
  (void)self, (void)result;
  if (count != 1 || part.file < 0) return raise("the board expects the name of a file that was begun", NULL);
  if (plain_name(arguments, name, sizeof name)) return -1;
  sha256_end(&part.hash, digits);
  if (part.received != part.size || strcmp(digits, part.sha256)) {
    drop_part();
    return raise("the board received another file than was announced", NULL);
  }
  path_of(part.sha256, path);
  if (fsync(part.file) || rename(part.path, part.kept ? path : name)) {
    raise_full();
    drop_part();
    return -1;
  }
  close(part.file);
  part.file = -1;
  return part.kept ? place(path, name) : 0;
}

int register_cache(void) {
  return set_function("agq.board.take", take) || set_function("agq.board.receive", receive) ||
         set_function("agq.board.append", append) || set_function("agq.board.keep", keep);
}
