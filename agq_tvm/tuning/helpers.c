/* What is linked to every candidate, so that a board can time it alone: no time on the wire is in the figures. */
#include <stdint.h>

/* A value as TVM passes it: its type, and 8 bytes. */
struct value {
  int32_t type;
  uint32_t padding;
  int64_t bits;
};

extern int __tvm_ffi_main(void *self, const struct value *arguments, int32_t count, struct value *result);

/* sweep(count, operands of a call, operands of the next, ...): calls the kernel with each `count` operands in turn. */
int __tvm_ffi_sweep(void *self, const struct value *arguments, int32_t count, struct value *result) {
  int32_t operands = (int32_t)arguments[0].bits;
  for (int32_t first = 1; first + operands <= count; first += operands) {
    int error = __tvm_ffi_main(self, arguments + first, operands, result);
    if (error) return error;
  }
  return 0;
}

/* fixed(rounds): the same work whatever the candidate is, a chain of multiplications that waits for nothing but the
 * clock. When it takes longer than before, the processor has slowed down. */
int __tvm_ffi_fixed(void *self, const struct value *arguments, int32_t count, struct value *result) {
  uint64_t value = 1;
  (void)self, (void)count, (void)result;
  for (int64_t round = arguments[0].bits; round > 0; --round) {
    value *= 6364136223846793005u;
    __asm__ volatile("" : "+r"(value)); /* the compiler must not see through the chain */
  }
  return 0;
}
