/* How a board is: its clock, memory, disk, load, and, where Linux tells, frequencies and temperatures. */
#define _GNU_SOURCE
#include "board.h"

#include <dirent.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include <time.h>

struct text {
  char *data;
  size_t used, size;
};

__attribute__((format(printf, 2, 3))) static void add(struct text *text, const char *format, ...) {
  va_list values;
  va_start(values, format);
  int length = vsnprintf(text->data + text->used, text->size - text->used, format, values);
  va_end(values);
  text->used += length > 0 && (size_t)length < text->size - text->used ? (size_t)length : 0;
}

/* The number of a line of /proc/meminfo, in bytes; -1 if there is none. */
static long long memory_bytes(const char *name) {
  char line[128];
  long long found = -1;
  FILE *file = fopen("/proc/meminfo", "r");
  if (!file) return -1;
  while (found < 0 && fgets(line, sizeof line, file))
    if (!strncmp(line, name, strlen(name)) && line[strlen(name)] == ':') found = atoll(line + strlen(name) + 1) * 1024;
  fclose(file);
  return found;
}

static void add_memory(struct text *text) {
  long long all = memory_bytes("MemTotal"), free = memory_bytes("MemAvailable");
  if (all >= 0) add(text, ", \"memory_bytes\": %lld", all);
  if (free >= 0) add(text, ", \"memory_free_bytes\": %lld", free);
}

static void add_disk(struct text *text, const char *folder) {
  struct statvfs disk;
  if (statvfs(folder, &disk)) return;
  add(text, ", \"disk_bytes\": %llu", (unsigned long long)disk.f_blocks * disk.f_frsize);
  add(text, ", \"disk_free_bytes\": %llu", (unsigned long long)disk.f_bavail * disk.f_frsize);
}

static void add_load(struct text *text) {
  double load;
  if (getloadavg(&load, 1) == 1) add(text, ", \"load\": %.2f", load);
}

/* Frequencies by the number of the processor, in kHz. */
static void add_clocks(struct text *text) {
  char path[128], line[32];
  int found = 0;
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed)) return;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed)) continue;
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/cpufreq/scaling_cur_freq", cpu);
    long value = atol(line_of(path, line, sizeof line));
    if (value > 0) add(text, "%s\"%d\": %ld", found++ ? ", " : ", \"kilohertz\": {", cpu, value);
  }
  if (found) add(text, "}");
}

/* Temperatures by the name of the zone, in thousandths of a degree; zones of one name get their number behind it. */
static void add_temperatures(struct text *text) {
  static const char *const root = "/sys/class/thermal";
  char path[600], name[64], line[32];
  int found = 0;
  DIR *zones = opendir(root);
  if (!zones) return;
  for (struct dirent *entry; (entry = readdir(zones));) {
    if (strncmp(entry->d_name, "thermal_zone", 12)) continue;
    snprintf(path, sizeof path, "%s/%s/type", root, entry->d_name);
    line_of(path, name, sizeof name);
    if (!*name || strspn(name, PLAIN) != strlen(name)) snprintf(name, sizeof name, "zone");
    snprintf(path, sizeof path, "%s/%s/temp", root, entry->d_name);
    if (!*line_of(path, line, sizeof line)) continue;
    add(text, "%s\"%s-%s\": %ld", found++ ? ", " : ", \"millidegrees\": {", name, entry->d_name + 12, atol(line));
  }
  closedir(zones);
  if (found) add(text, "}");
}

void status_text(const char *folder, char *data, size_t size) {
  struct text text = {data, 0, size - 2}; /* room for the end */
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  add(&text, "{\"time\": %.3f", (double)now.tv_sec + 1e-9 * (double)now.tv_nsec);
  add_memory(&text);
  add_disk(&text, folder);
  add_load(&text);
  add_clocks(&text);
  add_temperatures(&text);
  snprintf(data + text.used, size - text.used, "}");
}
