"""Candidates that behave in every way there is: small C libraries in the form of compiled kernels."""

from pathlib import Path

from agq_tvm.kernels.linear import LinearKernel
from agq_tvm.targets import Device
from agq_tvm.targets.link import link_shared
from agq_tvm.tuning import helpers
from agq_tvm.tuning.measure import Argument, Effort
from agq_tvm.tuning.task import Task

DIGEST = 64
ARGUMENTS = [Argument((64,), "int8", "cold"), Argument((64,), "int8", "output", digest=DIGEST)]
QUICK = Effort(repeats=3, milliseconds=1, cold_bytes=256)
_SOURCE = """
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>
extern void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *text);
struct value {{ int32_t type; uint32_t padding; void *pointer; }};
struct tensor {{ char *data; }}; /* the first field of DLTensor */
static char *data_of(const struct value *value) {{
  /* an object (a tensor of TVM's) has its DLTensor behind a header of 24 bytes; a DLTensor pointer has none */
  return ((struct tensor *)((char *)value->pointer + (value->type >= 64 ? 24 : 0)))->data;
}}
int __tvm_ffi_fill_0(void *self, const struct value *arguments, int32_t count, struct value *result) {{
  for (int i = 0; i < 64; ++i) data_of(arguments)[i] = 1;
  return 0;
}}
int __tvm_ffi_fill_1(void *self, const struct value *arguments, int32_t count, struct value *result) {{
  for (int i = 0; i < 64; ++i) data_of(arguments)[i] = 0;
  return 0;
}}
int __tvm_ffi_digest_1(void *self, const struct value *arguments, int32_t count, struct value *result) {{
  int64_t sum = 0;
  for (int i = 0; i < 64; ++i) sum += data_of(arguments)[i];
  *(int64_t *)data_of(arguments + 1) = sum;
  return 0;
}}
int __tvm_ffi_main(void *self, const struct value *arguments, int32_t count, struct value *result) {{
  volatile char *x = data_of(arguments), *y = data_of(arguments + 1);
  {body}
  return 0;
}}
"""
BODIES = {
    "right": "for (int i = 0; i < 64; ++i) y[i] = x[i];",
    "slow": "usleep(30000); for (int i = 0; i < 64; ++i) y[i] = x[i];",
    "wrong": "for (int i = 0; i < 63; ++i) y[i] = x[i];",
    "endless": "for (;;) y[0] = x[0];",
    "out of bounds": "for (long i = 0; i < 1L << 40; i += 4096) y[i] = x[0];",
    "illegal": "__builtin_trap(); (void)x; (void)y;",
    "exits": "(void)x; (void)y; _exit(7);",
    "fails": '(void)x; (void)y; TVMFFIErrorSetRaisedFromCStr("ValueError", "this is refused"); return -1;',
}


def candidate(behaviour: str, device: Device, folder: Path) -> str:
    """Write a candidate's library and return its path."""
    path = folder / f"{behaviour.replace(' ', '-')}.so"
    source = path.with_suffix(".c")
    source.write_text(_SOURCE.format(body=BODIES[behaviour]))
    link_shared(path, [source, Path(helpers.__file__).with_suffix(".c")], device)
    return str(path)


def task_for(device: Device) -> Task:
    """Return a task; its kernel is not what the candidates here compute."""
    kernel = LinearKernel(1, 64, 64, 4, 32, True, None, False)
    return Task("task", kernel, device.instruction_set, device, 1)
