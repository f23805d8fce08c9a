/* A plugin for QEMU's user mode: how often each block of instructions ran.

   Writes a line "address instructions runs" for every block that ran between two marks (mark.h), at the second one;
   for every block of the program, when it ends, if there are no marks. The few declarations that it needs of the
   plugin interface, version 1, stand here, since distributions do not ship the header. */
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "mark.h"

struct qemu_plugin_tb;
enum { INLINE_ADD_U64 = 0 };
extern void qemu_plugin_register_vcpu_tb_trans_cb(uint64_t id, void (*callback)(uint64_t, struct qemu_plugin_tb *));
extern void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *block, int operation, void *counter,
                                                     uint64_t addend);
extern void qemu_plugin_register_vcpu_syscall_cb(uint64_t id,
                                                 void (*callback)(uint64_t, unsigned, int64_t, uint64_t, uint64_t,
                                                                  uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                                                                  uint64_t));
extern void qemu_plugin_register_atexit_cb(uint64_t id, void (*callback)(uint64_t, void *), void *data);
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *block);
extern uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *block);

__attribute__((visibility("default"))) int qemu_plugin_version = 1;

struct block {
  uint64_t address, instructions, runs, before_pause;
  struct block *next;
};
static struct block *blocks;
static char path[4096];
static int written;

/* Translation holds a lock, so the list needs none of its own. */
static void translated(uint64_t id, struct qemu_plugin_tb *tb) {
  (void)id;
  struct block *block = calloc(1, sizeof *block);
  if (!block) abort();
  block->address = qemu_plugin_tb_vaddr(tb);
  block->instructions = qemu_plugin_tb_n_insns(tb);
  block->next = blocks;
  blocks = block;
  qemu_plugin_register_vcpu_tb_exec_inline(tb, INLINE_ADD_U64, &block->runs, 1);
}

static void write_counts(void) {
  FILE *file = written ? NULL : fopen(path, "w");
  if (written) return;
  if (!file) abort();
  for (struct block *block = blocks; block; block = block->next)
    if (block->runs)
      fprintf(file, "%" PRIx64 " %" PRIu64 " %" PRIu64 "\n", block->address, block->instructions, block->runs);
  if (fclose(file)) abort();
  written = 1;
}

static void marked(uint64_t id, unsigned cpu, int64_t number, uint64_t mark, uint64_t what, uint64_t a, uint64_t b,
                   uint64_t c, uint64_t d, uint64_t e, uint64_t f) {
  (void)id, (void)cpu, (void)number, (void)a, (void)b, (void)c, (void)d, (void)e, (void)f;
  if (mark != MARK) return;
  for (struct block *block = blocks; block; block = block->next)
    if (what == MARK_BEGIN)
      block->runs = block->before_pause = 0;
    else if (what == MARK_PAUSE)
      block->before_pause = block->runs;
    else if (what == MARK_RESUME)
      block->runs = block->before_pause;
  if (what == MARK_END) write_counts();
}

static void ended(uint64_t id, void *data) {
  (void)id, (void)data;
  write_counts();
}

__attribute__((visibility("default"))) int qemu_plugin_install(uint64_t id, const void *info, int count,
                                                              char **arguments) {
  (void)info;
  if (count != 1 || strncmp(arguments[0], "out=", 4) || strlen(arguments[0]) >= sizeof path) return -1;
  strcpy(path, arguments[0] + 4);
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_vcpu_syscall_cb(id, marked);
  qemu_plugin_register_atexit_cb(id, ended, NULL);
  return 0;
}
